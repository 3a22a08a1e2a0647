"""One rank's view of a job's ranks; evaluation uses this interface, never torch.distributed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol


class Stopped(Exception):
    """Raised on a rank whose job was asked to stop. Whole units are published, and the same command continues from there."""


class Ranks(Protocol):
    """A rank of a job, and what it shares with the other ranks."""

    @property
    def rank(self) -> int:
        """Number of this rank within the job, from 0."""

    @property
    def world_size(self) -> int:
        """Number of ranks in the job."""

    @property
    def devices(self) -> tuple[str, ...]:
        """Torch devices of this rank; each of its models is spread over all of them."""

    @property
    def device_name(self) -> str:
        """Name of those devices, for the run record."""

    @property
    def job(self) -> str:
        """Id of the job."""

    @property
    def start(self) -> int:
        """How often the job has been started before this time."""

    def barrier(self) -> None:
        """Wait until every rank has come here."""

    def from_first_rank(self, name: str, value: bytes) -> bytes:
        """Return the value that rank 0 gives under this name, which is used once; waits for it."""

    def claim_next(self, queue: str) -> int:
        """Return the next number of a queue that all ranks share: 0, 1, 2, ..., each to one rank."""

    def should_stop(self) -> bool:
        """Return whether a stop was requested."""

    def report(self, phase: str, done: int, total: int, **numbers: float) -> None:
        """Report this rank's progress to the launcher; cheap enough to be called at every step."""

    def begin_cell(self, key: str, seconds: Mapping[str, float]) -> None:
        """Report which cell this rank is working on, with its seconds by phase, a mapping that goes on counting."""


def claim_indices(ranks: Ranks, queue: str, total: int) -> Iterator[int]:
    """Yield the indices below `total` that this rank claims, first come first served.

    Raises:
        Stopped: a stop was requested.
    """
    while (index := ranks.claim_next(queue)) < total:
        if ranks.should_stop():
            raise Stopped(f"stopped with {total - index} of {total} units of {queue} not started")
        yield index


@dataclass
class Solo:
    """The only rank of a job, in this process."""

    devices: tuple[str, ...] = ("cpu",)
    device_name: str = "cpu"
    rank: int = 0
    world_size: int = 1
    job: str = ""
    start: int = 0
    on_report: Callable[..., None] | None = None
    on_cell: Callable[[str, Mapping[str, float]], None] | None = None
    claimed: Counter[str] = field(default_factory=Counter)
    stop: bool = False
    started: float = field(default_factory=time.monotonic)

    def barrier(self) -> None:
        """Return at once: there is no other rank."""

    def from_first_rank(self, name: str, value: bytes) -> bytes:
        """Return the value: there is no other rank."""
        return value

    def claim_next(self, queue: str) -> int:
        """Return the next number of a queue."""
        self.claimed[queue] += 1
        return self.claimed[queue] - 1

    def should_stop(self) -> bool:
        """Return whether `stop` was set."""
        return self.stop

    def report(self, phase: str, done: int, total: int, **numbers: float) -> None:
        """Pass the progress to `on_report`."""
        if self.on_report is not None:
            self.on_report(phase, done, total, **numbers)

    def begin_cell(self, key: str, seconds: Mapping[str, float]) -> None:
        """Pass the cell to `on_cell`."""
        if self.on_cell is not None:
            self.on_cell(key, seconds)
