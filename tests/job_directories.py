"""Job directories as jobs write them, and `ksweep` as it is typed."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import psutil
from typer.testing import CliRunner

from ksweep.cli import app
from ksweep.launch.job import Job, create_job
from ksweep.launch.rank_records import Heartbeat, Outcome
from ksweep.utils.errors import RequestError, RunError

LABEL = "temperature=0.7"


def job(registry: Path, sweep: str = "tiny", *labels: str, ranks: int = 1, **argument: Any) -> Job:
    """A job of a sweep with a cell for each label."""
    given = {"sweep": sweep, "cells": [], "registry": str(registry), **argument}
    cells = [(f"key of {label}", label) for label in labels or (LABEL,)]
    return create_job(registry.parent / "logs", "a:b", given, ranks, cells=cells)


def me(rank: int = 0, pid: int | None = None, **changes: Any) -> Heartbeat:
    """A heartbeat of this process (or another) as a rank."""
    process = psutil.Process(pid)
    return Heartbeat(rank=rank, pid=process.pid, host=socket.gethostname(), process_started=process.create_time(), **changes)


def ended(registry: Path, status: str, *labels: str, sweep: str = "tiny", **ending: Any) -> Job:
    """A job whose only rank has said how it ended."""
    made = job(registry, sweep, *labels)
    made.write_heartbeat(me(phase="drawing", done=3, total=8))
    made.write_outcome(Outcome(rank=0, status=status, **ending))
    return made


def ksweep(registry: Path, *words: str) -> tuple[int, str]:
    """Exit code and what is printed, as the command itself gives them."""
    done = CliRunner().invoke(app, [*words, "--registry", str(registry)])
    if isinstance(done.exception, (RequestError, RunError)):
        return 2 if isinstance(done.exception, RequestError) else 1, str(done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output
