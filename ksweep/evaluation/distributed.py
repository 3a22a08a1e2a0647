"""What one rank of a job knows of the others. The rest of the code sees this, never torch.distributed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol


class Stopped(Exception):
    """The job was asked to stop: what is whole has been published, the same command carries on from there."""


class Ranks(Protocol):
    """A rank's view of its job."""

    @property
    def rank(self) -> int:
        """Global rank."""

    @property
    def world_size(self) -> int:
        """Ranks in the job."""

    @property
    def devices(self) -> tuple[str, ...]:
        """Torch devices of this rank: a model of it is spread over all of them."""

    @property
    def device_name(self) -> str:
        """What those devices are, for the record."""

    @property
    def job(self) -> str:
        """Id of the job."""

    @property
    def start(self) -> int:
        """Which start of the job this is, from 0."""

    def barrier(self) -> None:
        """Wait for every rank."""

    def take(self, queue: str) -> int:
        """The next number of a queue that all ranks share: 0, 1, 2, ... each given to one rank."""

    def should_stop(self) -> bool:
        """Whether a stop signal has come."""

    def report(self, phase: str, done: int, total: int, **numbers: float) -> None:
        """Tell the launcher how far this rank is; cheap, may be called often."""

    def begin_cell(self, key: str, seconds: Mapping[str, float]) -> None:
        """Tell which cell this rank is at; `seconds` by phase, which goes on counting, is told with it."""


def share(ranks: Ranks, queue: str, total: int) -> Iterator[int]:
    """The units of work that fall to this rank, first come first served, until none is left or a stop is asked for."""
    while (index := ranks.take(queue)) < total:
        if ranks.should_stop():
            raise Stopped(f"stopped with {total - index} of {total} units of {queue} not begun")
        yield index


@dataclass
class Solo:
    """The only rank of a job that runs in this process."""

    devices: tuple[str, ...] = ("cpu",)
    device_name: str = "cpu"
    rank: int = 0
    world_size: int = 1
    job: str = ""
    start: int = 0
    on_report: Callable[..., None] | None = None
    on_cell: Callable[[str, Mapping[str, float]], None] | None = None
    taken: Counter[str] = field(default_factory=Counter)
    stop: bool = False
    started: float = field(default_factory=time.monotonic)

    def barrier(self) -> None:
        """Nobody to wait for."""

    def take(self, queue: str) -> int:
        """The next number of a queue."""
        self.taken[queue] += 1
        return self.taken[queue] - 1

    def should_stop(self) -> bool:
        """Whether `stop` was set."""
        return self.stop

    def report(self, phase: str, done: int, total: int, **numbers: float) -> None:
        """Hand progress to `on_report`."""
        if self.on_report is not None:
            self.on_report(phase, done, total, **numbers)

    def begin_cell(self, key: str, seconds: Mapping[str, float]) -> None:
        """Hand it to `on_cell`."""
        if self.on_cell is not None:
            self.on_cell(key, seconds)
