"""Measure seconds by phase, of a cell or of cells that are drawn together."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TypeVar

Item = TypeVar("Item")


class Clock:
    """Accumulates seconds by phase."""

    def __init__(self) -> None:
        """Set the start to now."""
        self.started = datetime.now(UTC)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time that the body takes to a phase."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.add({phase: time.monotonic() - began})

    def each(self, phase: str, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items, and add the time that the iterator takes, not what the caller does with them, to a phase."""
        source = iter(items)
        while True:
            with self(phase):
                try:
                    item = next(source)
                except StopIteration:
                    return
            yield item

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add seconds to their phases."""
        for phase, value in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + value

    def take(self, other: Clock, share: float = 1.0) -> None:
        """Move a share of another clock's seconds to this one."""
        self.add({phase: share * value for phase, value in other.seconds.items()})
        other.seconds = {phase: (1 - share) * value for phase, value in other.seconds.items()}
