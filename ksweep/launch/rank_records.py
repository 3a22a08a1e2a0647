"""The records that a rank writes into its job's directory: heartbeats while it runs, and its outcome when it ends."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ksweep.launch.liveness import ProcessIdentity, gather_life, identity_in, identity_of, life_of

SILENCE_SECONDS = 120.0
"""A rank whose life nothing proves (on another machine, or in another container where the file system has no locks) seems dead
after this much silence; its job counts as ended once it was watched for as long again."""


@dataclass(frozen=True)
class Heartbeat:
    """Progress of a rank, and the process that proves that it is alive. Field names are those of rank-<r>.json."""

    rank: int
    pid: int
    host: str
    process_started: float
    """Start of the process by the wall clock (seconds since 1970): all that heartbeats of earlier versions have."""
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
    boot_id: str = ""
    namespaces: str = ""
    start_ticks: int = 0
    """See `liveness.ProcessIdentity`; empty in heartbeats of earlier versions."""
    lock_device: int = 0
    """Device of rank-<r>.lock as the rank sees it, which keeps the file locked for as long as it lives; 0 without locks."""

    @property
    def process(self) -> ProcessIdentity:
        """Who the rank's process is."""
        return identity_in(vars(self))

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


def is_alive(heartbeat: Heartbeat, lock: Path | None = None) -> bool:
    """Return whether a rank counts as alive: proven by its process or its lock, or else not silent for SILENCE_SECONDS.

    Args:
        lock: the file that the rank keeps locked.
    """
    life = life_of(gather_life(heartbeat.process, lock))
    return life == "alive" or (life == "unknown" and not is_silent(heartbeat))


class HeartbeatWatch:
    """For how long this process has seen no newer heartbeat of each rank, by its own monotonic clock."""

    def __init__(self) -> None:
        """Nothing has been seen yet."""
        self._last_news: dict[tuple[ProcessIdentity, int, int], tuple[float, float]] = {}
        """Rank of a start -> time in its newest heartbeat, and when this process first saw that one (monotonic)."""

    def seconds_unchanged(self, heartbeat: Heartbeat) -> float:
        """Return for how long the newest heartbeat of a rank has been this one; 0 where it is seen for the first time."""
        rank, now = (heartbeat.process, heartbeat.rank, heartbeat.attempt), time.monotonic()
        sent, since = self._last_news.get(rank, (heartbeat.time, now))
        self._last_news[rank] = (heartbeat.time, since if sent == heartbeat.time else now)
        return now - self._last_news[rank][1]

    def forget(self) -> None:
        """Begin anew: this process was stalled, and what it did not see proves nothing."""
        self._last_news.clear()


_watch = HeartbeatWatch()


def is_silent(heartbeat: Heartbeat) -> bool:
    """Return whether a heartbeat is SILENCE_SECONDS old by the wall clock, or this process has seen no newer one for so long.

    The second holds also where the clocks of two machines differ, or one was set back.
    """
    return time.time() - heartbeat.time >= SILENCE_SECONDS or _watch.seconds_unchanged(heartbeat) >= SILENCE_SECONDS


def process_record(pid: int | None = None) -> dict[str, Any]:
    """Return the fields of a heartbeat that identify this process, or another one here; with `rank` they make a heartbeat.

    Raises:
        psutil.NoSuchProcess: there is no such process.
    """
    return asdict(identity_of(os.getpid() if pid is None else pid)) | {"time": time.time()}


def record_is_alive(record: Mapping[str, Any]) -> bool:
    """Return whether a process counts as alive that a record identifies; a later version may have written more into it."""
    return life_in_record(record) == "alive"


def life_in_record(record: Mapping[str, Any]) -> Literal["alive", "ended", "silent"]:
    """Return whether a process that a record identifies is alive or has ended; `silent` where neither is proven and it is old.

    A record that is written once says nothing of its process later on, however long it is silent.
    """
    known = {field.name for field in fields(Heartbeat)}
    heartbeat = Heartbeat(rank=0, **{name: value for name, value in record.items() if name in known})
    life = life_of(gather_life(heartbeat.process))
    if life == "unknown":
        return "silent" if is_silent(heartbeat) else "alive"
    return "alive" if life == "alive" else "ended"
