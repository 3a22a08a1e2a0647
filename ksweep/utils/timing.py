"""Seconds by phase: of one cell, or of cells that are drawn together."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TypeVar

T = TypeVar("T")


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        """Starts now."""
        self.started = datetime.now(UTC)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count what is inside under a phase."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.add({phase: time.monotonic() - began})

    def each(self, phase: str, items: Iterable[T]) -> Iterator[T]:
        """The items, with the time that they take to come counted under a phase; what is done with them is not."""
        source = iter(items)
        while True:
            with self(phase):
                try:
                    item = next(source)
                except StopIteration:
                    return
            yield item

    def add(self, seconds: Mapping[str, float]) -> None:
        """Count these too."""
        for phase, value in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + value

    def take(self, other: Clock, share: float = 1.0) -> None:
        """A share of what is on another clock, from there to here."""
        self.add({phase: share * value for phase, value in other.seconds.items()})
        other.seconds = {phase: (1 - share) * value for phase, value in other.seconds.items()}
