"""What a rank writes into its job's directory: heartbeats while it runs, and its outcome when it ends."""

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
"""A rank on another host that has been silent this long is taken for dead; on the same host its process is looked at."""


@dataclass(frozen=True)
class Heartbeat:
    """How far a rank is."""

    rank: int
    pid: int
    host: str
    process_started: float
    """Creation time of the process (seconds since 1970): with pid and host it names one process for ever."""
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
    """Bytes in its log when it began: every start of a job on Slurm writes to the same one."""
    cell: str = ""
    """Key of the cell it is at; empty before the first."""
    cell_began: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by phase in that cell."""


@dataclass(frozen=True)
class Outcome:
    """How a rank ended."""

    rank: int
    status: str
    """finished, failed or stopped."""
    kind: str = ""
    """For a failure its class (ksweep.utils.errors.ErrorClass)."""
    message: str = ""
    traceback: str = ""
    result: Any = None
    time: float = field(default_factory=time.time, compare=False)
    attempt: int = 0
    error_type: str = ""
    """Python type of the exception, where there was one."""


def first_failure(endings: Sequence[Outcome]) -> Outcome | None:
    """The first failure, with which the others fell; before a rank that only saw another die, one that ran out of memory."""
    failed = sorted((e for e in endings if e.status == "failed"), key=lambda e: e.time)
    if failed and failed[0].kind == "dead rank":
        return next((e for e in failed if e.kind == "out of memory"), failed[0])
    return failed[0] if failed else None


def is_alive(heartbeat: Heartbeat) -> bool:
    """Whether the process behind a heartbeat still runs; on another host, whether it has spoken lately."""
    if heartbeat.host != socket.gethostname():
        return time.time() - heartbeat.time < SILENCE_SECONDS
    try:
        process = psutil.Process(heartbeat.pid)
        same = abs(process.create_time() - heartbeat.process_started) < 1.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def this_process() -> dict[str, Any]:
    """What names this process for ever; with `rank` it makes a heartbeat."""
    me = psutil.Process()
    return {"pid": me.pid, "host": socket.gethostname(), "process_started": me.create_time(), "time": time.time()}


def raise_for_outcome(ending: Outcome, directory: Path) -> None:
    """Turn a failed job into the error that the user sees: a mistake of theirs as such, a bug with its traceback."""
    if ending.status != "failed":
        return
    if ending.kind == "bad input":
        raise RequestError(ending.message)
    if ending.kind in ("disk full", "failure"):
        raise RunError(ending.message)
    words = f"job {directory.name}: rank {ending.rank} failed ({ending.kind}): {ending.message}\n{ending.traceback}".rstrip()
    raise RunError(f"{words}\nlogs: {directory}")
