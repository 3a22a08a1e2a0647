"""Does drawing keep its speed while other processes use the cores? Default ranks against one rank whose threads spin.

    python scripts/bench_busy.py --repeats 2                     # no, one and two other busy cores; about 9 minutes
    python scripts/bench_busy.py --busy 1 --seconds 10 --repeats 1

Each side is a job as a sweep starts it: rank processes load the demo's AV and draw for a few seconds. Its rate is the tokens
that all ranks have sampled over the time of the slowest. "one rank, threads spin" has one thread per core with the OpenMP
runtime's own default (libgomp: 300,000 turns, GNU's documentation of GOMP_SPINCOUNT), as ranks used to have. "one rank, threads
sleep" is what a rank with several threads has now, where memory is too small for one rank per core or `tasks=1` is given.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_common import NATURAL_LIMIT, held_out, load_pair, parser, report

from ksweep import Resources
from ksweep.evaluation.distributed import Ranks
from ksweep.inference.engine import MOST_DRAWS, Request, draw
from ksweep.launch import local_executor as launch
from ksweep.launch.job import Job, create_job
from ksweep.utils import machine

NUM_ACTIVATIONS = 64
LOADING_SECONDS, MOST_SECONDS = 120, 40
"""Limits for loading the models and for drawing. Then the job is ended, and what its ranks have reported counts. A job without a
single finished step counts as if it had one, so that its rate is too high and the ratio of the others to it too low."""
SPINNING = {"GOMP_SPINCOUNT": "300000", "OMP_NUM_THREADS": str(machine.num_cores())}


def main() -> None:
    options = arguments()
    sides: dict[str, tuple[int, dict[str, str]]] = {
        "one rank, threads spin": (1, SPINNING),
        "one rank, threads sleep": (1, {}),
        "default": (default_ranks(), {}),
    }
    with tempfile.TemporaryDirectory() as folder:
        vectors = Path(folder) / "vectors.npy"
        np.save(vectors, held_out(NUM_ACTIVATIONS).float().numpy())
        for busy in options.busy:
            rates: dict[str, list[float]] = {name: [] for name in sides}
            for _ in range(options.repeats):
                for name, (ranks, environment) in sides.items():
                    with busy_cores(busy):
                        rates[name].append(tokens_per_second(vectors, ranks, environment, options))
            title = f"beside {busy} busy cores" if busy else "alone"
            title += f": {machine.num_cores()} cores, {sides['default'][0]} ranks by default"
            report(title, "tokens/s", rates, next(iter(sides)))


def default_ranks() -> int:
    """Return the number of ranks of a sweep of the demo, whose AV and AR take about 0.5 GB."""
    with only({}):
        return machine.num_cpu_ranks(NUM_ACTIVATIONS * 64, 5 * 10**8)


def arguments() -> argparse.Namespace:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2], help="cores kept busy by other processes")
    options.add_argument("--seconds", type=float, default=10, help="seconds of drawing")
    return options.parse_args()


@contextmanager
def busy_cores(count: int) -> Iterator[None]:
    """Run processes that each keep one core busy."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def tokens_per_second(vectors: Path, ranks: int, environment: Mapping[str, str], options: argparse.Namespace) -> float:
    """Return the rate of a job with this many ranks, started as a sweep starts its jobs."""
    argument = {"vectors": str(vectors), "seconds": options.seconds, "dtype": options.dtype}
    job = create_job(vectors.parent / "logs", "bench_busy:draw_for", argument, ranks)
    with only(environment):
        submitted = launch.start_local_job(job, Resources(cluster="local", gpus=0, tasks=ranks, time=5), "bench")
    wait(submitted, LOADING_SECONDS, lambda: has_begun(job))
    wait(submitted, MOST_SECONDS, lambda: False)
    submitted.kill()
    if failed := [e for e in job.outcomes() if e.status == "failed"]:
        sys.exit(failed[0].message + failed[0].traceback)
    if not has_begun(job):
        sys.exit(f"the models were not loaded within {LOADING_SECONDS} s: {job.log_tail()}")
    said = {beat.rank: beat.numbers for beat in job.heartbeats()} | {e.rank: e.result for e in job.outcomes()}
    tokens = sum(numbers.get("tokens", 0) for numbers in said.values())
    return tokens / max(numbers.get("seconds", 0) for numbers in said.values()) if tokens else MOST_DRAWS / MOST_SECONDS


@contextmanager
def only(environment: Mapping[str, str]) -> Iterator[None]:
    """Set these variables, and no others that affect threads."""
    before = dict(os.environ)
    for name in (machine.NUM_THREADS, *machine.SPIN_SETTINGS):
        os.environ.pop(name, None)
    os.environ.update(environment, PYTHONPATH=os.pathsep.join(sys.path))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def wait(submitted: launch.LocalJob, seconds: float, until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not submitted.has_ended() and not until() and time.monotonic() < deadline:
        time.sleep(0.2)


def has_begun(job: Job) -> bool:
    return any(beat.phase == "drawing" for beat in job.heartbeats())


def draw_for(argument: dict[str, Any], ranks: Ranks) -> dict[str, float]:
    """Draw as one rank of the job; return the tokens sampled and the seconds taken."""
    av, _ = load_pair(argument["dtype"])
    vectors = torch.from_numpy(np.load(argument["vectors"]))
    requests = [Request(row=r, activation_key=r + 1, draw=k + 64 * ranks.rank) for r in range(len(vectors)) for k in range(64)]
    ranks.barrier()
    began, said = time.monotonic(), {"tokens": 0.0, "seconds": 0.0}
    ranks.report("drawing", 0, 0, **said)

    def count(tokens: int) -> None:
        said.update(tokens=said["tokens"] + tokens, seconds=time.monotonic() - began)
        ranks.report("drawing", 0, 0, **said)

    while said["seconds"] < argument["seconds"]:
        for _ in draw(
            av, vectors, requests, temperature=1.0, max_new_tokens=NATURAL_LIMIT, seed=0, on_step=count,
            should_stop=lambda: said["seconds"] >= argument["seconds"],
        ):  # fmt: skip
            pass
    return said


if __name__ == "__main__":
    main()
