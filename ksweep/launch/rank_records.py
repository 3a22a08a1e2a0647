"""The records that a rank writes into its job's directory: heartbeats while it runs, and its outcome when it ends."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ksweep.utils.errors import RequestError, RunError

SILENCE_SECONDS = 120.0
"""A rank on another host counts as dead after this much silence; on the same host its process is looked up instead."""


@dataclass(frozen=True)
class Heartbeat:
    """Progress of a rank, and the process that proves that it is alive. Field names are those of rank-<r>.json."""

    rank: int
    pid: int
    host: str
    process_started: float
    """Creation time of the process (seconds since 1970): with pid and host it identifies one process for ever."""
    phase: str = "starting"
    done: int = 0
    total: int = 0
    numbers: dict[str, float] = field(default_factory=dict)
    time: float = field(default_factory=time.time)
    attempt: int = 0
    device: str = ""
    slurm_id: str = ""
    rate: float = 0.0
    """Units per second in this phase."""
    gpu: str = ""
    """Which card `device` is: cuda:1 GPU-<uuid>."""
    began: float = 0.0
    """When this start of the rank began."""
    log_began: int = 0
    """Size of the rank's log in bytes when it began: every start of a job on Slurm appends to the same file."""
    cell: str = ""
    """Key of the current cell; empty before the first."""
    cell_began: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by phase in that cell."""


@dataclass(frozen=True)
class Outcome:
    """How a rank ended. Field names are those of ended-<r>.json."""

    rank: int
    status: str
    """finished, failed or stopped."""
    kind: str = ""
    """Class of a failure (ksweep.utils.errors.ErrorClass)."""
    message: str = ""
    traceback: str = ""
    result: Any = None
    time: float = field(default_factory=time.time, compare=False)
    attempt: int = 0
    error_type: str = ""
    """Python type of the exception, where there was one."""


def first_failure(outcomes: Sequence[Outcome]) -> Outcome | None:
    """Return the earliest failure, which explains the others; out of memory takes precedence over the death of another rank."""
    failed = sorted((o for o in outcomes if o.status == "failed"), key=lambda o: o.time)
    if failed and failed[0].kind == "dead rank":
        return next((o for o in failed if o.kind == "out of memory"), failed[0])
    return failed[0] if failed else None


def is_alive(heartbeat: Heartbeat) -> bool:
    """Return whether the process behind a heartbeat still runs; on another host, whether the heartbeat is recent."""
    if heartbeat.host != socket.gethostname():
        return time.time() - heartbeat.time < SILENCE_SECONDS
    try:
        process = psutil.Process(heartbeat.pid)
        same = abs(process.create_time() - heartbeat.process_started) < 1.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def this_process() -> dict[str, Any]:
    """Return the fields of a heartbeat that identify this process; with `rank` they make a heartbeat."""
    process = psutil.Process()
    return {
        "pid": process.pid, "host": socket.gethostname(), "process_started": process.create_time(), "time": time.time(),
    }  # fmt: skip


def raise_for_outcome(outcome: Outcome, directory: Path) -> None:
    """Raise a failed job's error for the user: a bad request as such, a bug with its traceback and the job's directory.

    Raises:
        RequestError, RunError: the outcome is a failure.
    """
    if outcome.status != "failed":
        return
    if outcome.kind == "bad input":
        raise RequestError(outcome.message)
    if outcome.kind in ("disk full", "failure"):
        raise RunError(outcome.message)
    words = f"job {directory.name}: rank {outcome.rank} failed ({outcome.kind}): {outcome.message}\n{outcome.traceback}".rstrip()
    raise RunError(f"{words}\nlogs: {directory}")
