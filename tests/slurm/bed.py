"""What the tests do to the cluster, and how they run a sweep as a user would: a script in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksweep import Sweep
from ksweep.launch.job import Job, all_jobs
from ksweep.registry.database import connect

ROOT = Path(__file__).parents[2]


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
        log = self.folder.with_name(f"{self.folder.name}.log")
        with log.open("w+") as file:
            done = subprocess.run(
                [str(ROOT / "scripts" / "slurm_testbed.sh"), *arguments], stdout=file, stderr=file, check=False,
                env={**os.environ, **self.environment(), **self.options},
            )  # fmt: skip
            file.seek(0)
            text = file.read()
        log.unlink()
        assert done.returncode == 0 or not check, text
        return subprocess.CompletedProcess(done.args, done.returncode, text, text)


@dataclass(frozen=True)
class Ran:
    """What a user's command printed."""

    code: int
    out: str
    err: str


def command(sweep: Sweep, *arguments: str) -> list[str]:
    """A user's script with this sweep, and its command."""
    script = Path(sweep.registry).parent / "experiment.py"
    script.write_text(f"from ksweep import *\nsweep_main({sweep!r})\n")
    return [sys.executable, str(script), "--no-charts", *arguments]


def run(sweep: Sweep, *arguments: str, seconds: float = 240, **environment: str) -> Ran:
    done = subprocess.run(
        command(sweep, *arguments),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        env={**os.environ, **environment},
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def jobs(sweep: Sweep) -> list[Job]:
    return all_jobs(Path(sweep.registry).parent / "logs")


def until(what: str, condition: Callable[[], Any], seconds: float = 120) -> Any:
    """Wait for something to become true; its value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.2)
    raise AssertionError(f"{what}: not within {seconds} s")


def ask(sweep: Sweep, question: str) -> list[tuple[Any, ...]]:
    with connect(sweep.registry) as connection:
        return connection.execute(question).fetchall()


def texts(sweep: Sweep) -> list[tuple[Any, ...]]:
    """Every draw of a sweep, for comparison."""
    return ask(sweep, "SELECT activation, draw, text, token_ids FROM draws ORDER BY draws_key, activation, draw")


def slurm(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout
