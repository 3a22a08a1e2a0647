"""A job on disk: what to run, how far each rank is, how each rank ended. Files are the only truth between launcher and ranks.

logs/<job>/job.json          entry point and its argument, written by the launcher
logs/<job>/rank-<r>.json     heartbeat: pid, phase, done / total
logs/<job>/ended-<r>.json    terminal record of a rank: status, error class, traceback
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ksweep.files import publish


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
        """Publish how a rank ended."""
        publish(self.path / f"ended-{ending.rank}.json", json.dumps(asdict(ending)).encode())

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


def create(logs: Path, entry: str, argument: dict[str, Any], num_ranks: int) -> Job:
    """A new job directory with its job.json."""
    job = Job(logs / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}")
    spec = {"entry": entry, "argument": argument, "num_ranks": num_ranks}
    publish(job.path / "job.json", json.dumps(spec, indent=1).encode())
    return job
