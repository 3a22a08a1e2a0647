"""Bounds on values that a parser made of somebody else's file: depth, size with repeats, digits, and characters.

An alias of YAML and a memo of a pickle can make ten lines stand for ten billion entries, which a message or a loop would go
through one by one. Such a value is refused before anything else sees it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

MOST_LEVELS = 64
MOST_ENTRIES = 2_000_000
"""Entries of a value, those of a shared container counted wherever it is used. The weight index of the largest public models has
150,000."""
MOST_BITS = 256
"""Bits of a whole number; every one of them can be converted to a float."""


class PlainValueError(ValueError):
    """A value beyond the bounds of this module."""


def check_plain(value: Any) -> None:
    """Check that a value is not too deep, not too large with its repeats, and that its numbers and texts can be shown.

    Objects that are no containers, texts or numbers are passed over.

    Raises:
        PlainValueError: the message says what it has too much of.
    """
    sizes: dict[int, tuple[int, int]] = {}  # of each container: entries with repeats, levels
    unfinished: set[int] = set()
    path: list[_Visit] = []
    current: Any = [value]  # a container around the value, so that there is always one
    while True:
        # 1. Enter a container that has not been measured.
        if current is not None:
            if id(current) in unfinished:
                raise PlainValueError("a container in it contains itself")
            unfinished.add(id(current))
            path.append(_Visit(current))
            if len(path) > MOST_LEVELS:
                raise PlainValueError(f"it is nested more than {MOST_LEVELS} levels deep")
        # 2. Measure its entries up to the next container of that kind.
        visit = path[-1]
        current = visit.next_unmeasured(sizes)
        # 3. Leave it, and add its size to that of the container around it.
        if current is None:
            sizes[id(visit.container)] = visit.entries, visit.levels
            unfinished.discard(id(visit.container))
            path.pop()
            if not path:
                return
            path[-1].add(*sizes[id(visit.container)])


class _Visit:
    """A container that is being measured."""

    def __init__(self, container: Any) -> None:
        self.container, self.entries, self.levels = container, 0, 1
        self.children = _children(container)

    def next_unmeasured(self, sizes: Mapping[int, tuple[int, int]]) -> Any:
        """Count entries up to the next container without a size, and return that; None at the end."""
        for child in self.children:
            if not isinstance(child, (dict, list, tuple, set, frozenset)):
                _check_leaf(child)
                self.add(1, 0)
            elif id(child) in sizes:
                self.add(*sizes[id(child)])
            else:
                return child
        return None

    def add(self, entries: int, levels: int) -> None:
        """Add the size of an entry."""
        self.entries, self.levels = self.entries + entries + 1, max(self.levels, levels + 1)
        if self.entries > MOST_ENTRIES:
            raise PlainValueError(f"it stands for more than {MOST_ENTRIES:,} entries")
        if self.levels > MOST_LEVELS:
            raise PlainValueError(f"it is nested more than {MOST_LEVELS} levels deep")


def _children(container: Any) -> Iterator[Any]:
    if isinstance(container, dict):
        yield from container.keys()
        yield from container.values()
    else:
        yield from container


def _check_leaf(value: Any) -> None:
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise PlainValueError(f"it holds a whole number of {value.bit_length()} bits")
    if isinstance(value, str) and has_lone_surrogate(value):
        raise PlainValueError("it holds half of a surrogate pair, which is no character")


def has_lone_surrogate(text: str) -> bool:
    """Return whether a text holds half of a surrogate pair (U+D800 to U+DFFF), which UTF-8 cannot encode."""
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
