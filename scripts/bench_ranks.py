"""Are several ranks as fast as one rank with all threads, and how long do ranks wait for each other at the end?

    python scripts/bench_ranks.py                                      # 2 ranks on 2 cores against 1 rank on 2 threads
    python scripts/bench_ranks.py --activations 24 --draws 8 --repeats 1

Each side is a sweep of one cell as a user runs it; the sides alternate. The rate is that of the run record: tokens over the time
from the first unit to the last, including waiting for other ranks. Loading and statistics are left out, as they do not depend on
the number of draws. The idle tail comes from the ranks' own heartbeats: the share of all ranks' drawing time spent waiting with
nothing left to do.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_common import demo_sweep, parser, report, spread

from ksweep import Resources, Sweep, connect, sweep_main
from ksweep.launch.job import all_jobs


def main() -> None:
    options = arguments()
    if options.measure:
        sweep_main(the_sweep(options, options.measure), ["--no-charts"])
    rates: dict[str, list[float]] = {}
    tails, walls = [], []
    for round_ in range(options.repeats):
        for ranks in (1, options.ranks):
            rate, tail, wall = measured(options, ranks)
            rates.setdefault(f"{ranks} rank{'s' * (ranks > 1)}", []).append(rate)
            if ranks > 1:
                tails.append(tail)
                walls.append(wall)
        print(f"round {round_ + 1}: { ({name: round(values[-1]) for name, values in rates.items()}) }, idle tail {tails[-1]:.1%}")
    title = f"{options.activations} activations x {options.draws} draws, natural lengths, {os.cpu_count()} cores"
    report(title, "tokens/s", rates, "1 rank")
    print(f"idle tail of {options.ranks} ranks: {spread(tails, '.1%')}; a run of {statistics.median(walls):.0f} s")


def arguments() -> argparse.Namespace:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--activations", type=int, default=200)
    options.add_argument("--draws", type=int, default=32)
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--measure", type=Path, help="run one sweep alone, into this directory")
    return options.parse_args()


def the_sweep(options: argparse.Namespace, place: Path) -> Sweep:
    return demo_sweep(
        place, options.activations, options.draws, 50, resources=Resources(cluster="local", gpus=0, tasks=options.ranks)
    )


def measured(options: argparse.Namespace, ranks: int) -> tuple[float, float, float]:
    """Return tokens per second, the idle share of all ranks' drawing time, and seconds from start to end."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--activations", str(options.activations), "--draws", str(options.draws), "--ranks", str(ranks)]
        began = time.perf_counter()
        done = subprocess.run([sys.executable, __file__, "--measure", folder, *flags], capture_output=True, text=True)
        wall = time.perf_counter() - began
        if done.returncode:
            sys.exit(done.stderr)
        with connect(Path(folder) / "registry") as connection:
            [(rate, seconds)] = connection.execute("SELECT tokens_per_second, seconds FROM runs").fetchall()
        [job] = all_jobs(Path(folder) / "logs")
        others = [beat.seconds for beat in job.heartbeats() if beat.rank]
        return float(rate), idle_share([seconds, *others]), wall


def idle_share(of_ranks: list[dict[str, float]]) -> float:
    waited = sum(seconds.get("waiting", 0.0) for seconds in of_ranks)
    return waited / (waited + sum(seconds["drawing"] for seconds in of_ranks))


if __name__ == "__main__":
    main()
