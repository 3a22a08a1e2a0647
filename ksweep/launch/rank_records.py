"""The records that a rank writes into its job's directory: heartbeats while it runs, and its outcome when it ends."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass, field
from typing import Any

import psutil

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

    @property
    def has_begun(self) -> bool:
        """Whether the rank had begun its work; jobs of earlier versions name no cell, but a phase."""
        return bool(self.cell) or self.phase not in ("", "starting")


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
