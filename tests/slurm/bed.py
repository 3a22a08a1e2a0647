"""What the tests do to the cluster, and how they run a sweep as a user would: a script in a process of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

import psutil

from ksweep import Cell, Resources, Sweep
from ksweep.launch import status
from ksweep.launch.job import Job, all_jobs
from tests.slurm.story import Story
from tests.tiny_sweeps import ask

ROOT = Path(__file__).parents[2]

NODES = 9
ANYWHERE = "gpu[1-2]"
"""Where jobs run that nothing happens to. gpu3 loses its slurmd (its job goes on on gpu7), on gpu4 to gpu6 jobs are preempted, on
gpu8 and gpu9 GPUs are counted."""


def only(nodes: str) -> dict[str, str]:
    """Options of sbatch for a job that runs on one of these nodes only ("gpu[1-2]")."""
    wanted = slurm("scontrol", "show", "hostnames", nodes).split()
    return {"exclude": ",".join(f"gpu{i}" for i in range(1, NODES + 1) if f"gpu{i}" not in wanted)}


@dataclass(frozen=True)
class Bed:
    """The cluster of scripts/slurm_testbed.sh."""

    folder: Path
    options: Mapping[str, str]

    def environment(self) -> dict[str, str]:
        return {
            "SLURM_TESTBED": str(self.folder),
            "SLURM_CONF": str(self.folder / "etc" / "slurm.conf"),
            "MYSQL_UNIX_PORT": str(self.folder / "db.sock"),
            "PYTHONPATH": str(ROOT),
            "KSWEEP_SLURM_SECONDS": "1",  # this cluster is nobody else's
        }

    def script(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        # Daemons inherit what the script inherits: a pipe would stay open as long as they live.
        with tempfile.TemporaryFile("w+") as file:
            done = subprocess.run(
                [str(ROOT / "scripts" / "slurm_testbed.sh"), *arguments], stdout=file, stderr=file, check=False,
                env={**os.environ, **self.environment(), **self.options},
            )  # fmt: skip
            file.seek(0)
            text = file.read()
        assert done.returncode == 0 or not check, text
        return subprocess.CompletedProcess(done.args, done.returncode, text, text)


@dataclass(frozen=True)
class Ran:
    """What a user's command printed."""

    code: int
    out: str
    err: str


SLOW = """import os, time
import ksweep.registry.draws
import ksweep.registry.work_units
publish = ksweep.registry.draws.DrawsStore.publish
def slowly(store, unit, table):
    time.sleep({seconds} if int(os.environ.get("SLURM_RESTART_COUNT", 0)) < {starts} else 0)
    return publish(store, unit, table)
ksweep.registry.draws.DrawsStore.publish = slowly
ksweep.registry.work_units.DRAWS_PER_WORK_UNIT = 16
"""
"""Units of a tiny pair take a tenth of a second; with this they take as long as those of a large one, at no cost; and there are
more of them, of fewer draws each."""

ALONE: dict[Cell, list[tuple[Any, ...]]] = {}
LOCK = Lock()


@dataclass
class Place:
    """Where one test works: a directory, a sweep of its own, and the story of what was done and seen."""

    path: Path
    bed: Bed
    plain: Sweep
    story: Story
    begun: dict[subprocess.Popen[str], float] = field(default_factory=dict)

    @property
    def sweep(self) -> Sweep:
        """A cell of 40 activations with 8 draws each, on one CPU rank."""
        return replace(self.plain, registry=str(self.path / "registry"), vector_cache=str(self.path / "vector_cache"))

    def long(self, units: int, seconds: float, *, starts: int = 1000, **resources: Any) -> Sweep:
        """A cell of so many units of 64 draws, each of so many seconds in the first starts of its job."""
        (self.path / "slow").mkdir(exist_ok=True)
        (self.path / "slow" / "sitecustomize.py").write_text(SLOW.format(seconds=seconds, starts=starts))
        cell = self.plain.cell
        cell = replace(
            cell, sampling=replace(cell.sampling, num_draws=16 * units),
            activations=replace(cell.activations, num_activations=4, positions_per_document=1),
        )  # fmt: skip
        setup = f'export PYTHONPATH={self.path}/slow:"$PYTHONPATH"'
        return replace(self.sweep, cell=cell, resources=replace(self.plain.resources, setup=setup, **resources))

    def with_(self, **resources: Any) -> Sweep:
        """The plain sweep with other resources."""
        return replace(self.sweep, resources=replace(self.plain.resources, **resources))

    def begin(self, sweep: Sweep, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """A user's command, not waited for."""
        process = subprocess.Popen(
            self.command(sweep, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, **environment},
        )  # fmt: skip
        self.begun[process] = time.monotonic()
        return process

    def finish(self, process: subprocess.Popen[str], sweep: Sweep, *arguments: str, seconds: float = 240) -> Ran:
        """What a command that was begun has printed."""
        out, err = process.communicate(timeout=seconds)
        ran = Ran(process.returncode, out, err)
        self.story.ran(sweep, arguments, self.begun[process], ran.code, out, err)
        return ran

    def run(self, sweep: Sweep, *arguments: str, **environment: str) -> Ran:
        return self.finish(self.begin(sweep, *arguments, **environment), sweep, *arguments)

    def command(self, sweep: Sweep, *arguments: str) -> list[str]:
        """A user's script with this sweep, and its command."""
        script = Path(sweep.registry).parent / "experiment.py"
        temporary = script.with_suffix(".new")
        temporary.write_text(f"from ksweep import *\nfrom ksweep.config.spec import *\nsweep_main({sweep!r})\n")
        temporary.replace(script)
        return [sys.executable, str(script), "--no-charts", *arguments]

    def ksweep(self, *words: str) -> str:
        """What the command of that name prints."""
        code = "from ksweep.cli import main; main()"
        command = [sys.executable, "-c", code, *words, "--registry", self.sweep.registry]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
        self.story.did(f"ksweep {shlex.join(words)}", done.stdout + done.stderr)
        return done.stdout + done.stderr

    def slurm(self, *words: str) -> str:
        """A command of Slurm's that belongs to the story."""
        said = slurm(*words)
        self.story.did(shlex.join(words), said)
        return said

    def daemons(self, *words: str) -> None:
        """Something done to the cluster itself."""
        self.story.did(f"scripts/slurm_testbed.sh {shlex.join(words)}")
        self.bed.script(*words)

    def jobs(self) -> list[Job]:
        return all_jobs(self.path / "logs")

    def parts(self) -> int:
        """Units that are published."""
        return len(list((self.path / "registry").glob("draws/*/part-0*.parquet")))

    def ask(self, question: str) -> list[tuple[Any, ...]]:
        return ask(self.sweep, question)

    def texts(self) -> list[tuple[Any, ...]]:
        """Every draw, for comparison."""
        return self.ask("SELECT activation, draw, text, token_ids FROM draws ORDER BY draws_key, activation, draw")

    def undisturbed(self, sweep: Sweep) -> list[tuple[Any, ...]]:
        """The draws of the same cell, taken by one process of this machine in another registry; once for all tests that ask."""
        with LOCK:
            if sweep.cell not in ALONE:
                alone = Place(self.path / "alone", self.bed, self.plain, Story("", ""))
                alone.path.mkdir()
                other = replace(alone.sweep, cell=sweep.cell, resources=Resources(cluster="inprocess", gpus=0))
                done = alone.run(other)
                assert done.code == 0, done.err
                ALONE[sweep.cell] = alone.texts()
            return ALONE[sweep.cell]


def slurm(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def until(what: str, condition: Callable[[], Any], seconds: float = 120) -> Any:
    """Wait for something to become true; its value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.2)
    raise AssertionError(f"{what}: not within {seconds} s")


def ended(job: Job, seconds: float = 120) -> status.JobStatus:
    def look() -> status.JobStatus | None:
        found = status.job_status(job)
        return found if found.state not in status.LIVE_STATES else None

    return until(f"an end of job {job.slurm_id()}", look, seconds)  # type: ignore[no-any-return]


def finished(job: Job) -> bool:
    """Whether a job ends as finished; what it said if it does not."""
    found = ended(job)
    assert found.state == "finished", f"{found}\n{job.log_tail()}"
    return True


def process_of(job: Job, rank: int) -> psutil.Process:
    """The process of a rank, whatever PID it has on its node."""
    folder = str((job.read_note("slurm") or {})["folder"])
    for process in psutil.process_iter(["name", "cmdline"]):
        words = process.info["cmdline"] or []
        if "ksweep.launch.worker.start" in words and folder in words and process.info["name"].startswith("python"):
            environment = process.environ()
            number = environment.get("SLURM_ARRAY_TASK_ID")
            mine = number is None or str(job.slurm_id()).endswith(f"_{number}")
            if mine and environment.get("SLURM_PROCID") == str(rank):
                return process
    raise AssertionError(f"rank {rank} of job {job.id} runs nowhere")
