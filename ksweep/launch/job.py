"""A job on disk: what to run, how far each rank is, how each rank ended. Files are the only truth between launcher and ranks.

logs/<job>/job.json          entry point and its argument, written by the launcher
logs/<job>/rank-<r>.json     heartbeat: pid, phase, done / total
logs/<job>/ended-<r>.json    terminal record of a rank: status, error class, traceback
"""

from __future__ import annotations

import json
import secrets
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ksweep.files import publish

SILENCE_SECONDS = 120.0
"""A rank on another host that has been silent this long is taken for dead; on the same host its process is looked at."""


@dataclass(frozen=True)
class Job:
    """A job directory."""

    path: Path

    @property
    def id(self) -> str:
        """Name of the job: time of submission and a random part."""
        return self.path.name

    def spec(self) -> dict[str, Any]:
        """Entry point ("package.module:function"), its argument, number of ranks."""
        return json.loads((self.path / "job.json").read_text())  # type: ignore[no-any-return]

    def beat(self, heartbeat: Heartbeat) -> None:
        """Publish how far a rank is."""
        publish(self.path / f"rank-{heartbeat.rank}.json", json.dumps(asdict(heartbeat)).encode(), durable=False)

    def end(self, ending: Ending) -> None:
        """Publish how a rank ended; on a full disk the room kept for this is used."""
        data = json.dumps(asdict(ending)).encode()
        try:
            publish(self.path / f"ended-{ending.rank}.json", data)
        except OSError:
            (self.path / RESERVE).unlink(missing_ok=True)
            publish(self.path / f"ended-{ending.rank}.json", data)

    def at_work(self) -> bool:
        """Whether a process of the job is alive and has not said how it ended."""
        ended = {e.rank for e in self.endings()}
        return any(is_alive(h) for h in self.heartbeats() if h.rank not in ended)

    def started(self) -> float:
        """When it was submitted, seconds since 1970."""
        return (self.path / "job.json").stat().st_mtime

    def release(self) -> None:
        """Give up what was only kept for the job's end."""
        (self.path / RESERVE).unlink(missing_ok=True)

    def heartbeats(self) -> list[Heartbeat]:
        """The newest heartbeat of every rank that has one."""
        return [Heartbeat(**value) for value in self._read("rank-*.json")]

    def endings(self) -> list[Ending]:
        """The terminal records that are there."""
        return [Ending(**value) for value in self._read("ended-*.json")]

    def _read(self, pattern: str) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(self.path.glob(pattern))]


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


@dataclass(frozen=True)
class Ending:
    """How a rank ended."""

    rank: int
    status: str
    """finished, failed or stopped."""
    kind: str = ""
    """For a failure: bad input, out of memory, disk full, dead rank or bug."""
    message: str = ""
    traceback: str = ""
    result: Any = None
    time: float = field(default_factory=time.time, compare=False)


RESERVE = "reserve"
"""A file that can be given up, so that even on a full disk a rank can say how it ended."""
RESERVE_BYTES = 256 * 1024


def jobs_at_work(logs: Path) -> list[Job]:
    """Jobs with a living rank, whoever started them."""
    found = [Job(path.parent) for path in sorted(logs.glob("*/job.json"))]
    return [job for job in found if job.at_work()]


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


def create(logs: Path, entry: str, argument: dict[str, Any], num_ranks: int, gpus: int = 0) -> Job:
    """A new job directory with its job.json; `gpus` is the number on each node."""
    job = Job(logs / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}")
    spec = {"entry": entry, "argument": argument, "num_ranks": num_ranks, "gpus": gpus}
    publish(job.path / RESERVE, bytes(RESERVE_BYTES))
    publish(job.path / "job.json", json.dumps(spec, indent=1).encode())
    return job
