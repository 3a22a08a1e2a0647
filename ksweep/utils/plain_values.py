"""Bounds on values that a parser made of somebody else's file: depth, size with repeats, digits, and characters.

An alias of YAML and a memo of a pickle can make ten lines stand for ten billion entries, which a message or a loop would go
through one by one. Such a value is refused before anything else sees it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

MOST_LEVELS = 64
MOST_ENTRIES = 2_000_000
"""Entries of a value, those of a shared container counted wherever it is used. The weight index of the largest public models has
150,000."""
MOST_BITS = 256
"""Bits of a whole number; every one of them can be converted to a float."""


MOST_DIGITS = 77
SUSPICIOUS = re.compile(rb"\\u[dD][89a-fA-F]|[0-9]{60}")
"""A half of a surrogate pair or a huge number in JSON."""


class PlainValueError(ValueError):
    """A value beyond the bounds of this module."""


def check_plain(value: Any) -> None:
    """Check that a value is not too deep, not too large with its repeats, and that its numbers and texts can be shown.

    A shared container is gone through once. Objects that are no containers, texts or numbers are passed over.

    Raises:
        PlainValueError: the message says what it has too much of.
    """
    sizes: dict[int, tuple[int, int]] = {}  # of each container: entries with repeats, levels
    open_ids: set[int] = set()
    path = [_Branch(None, iter([value]))]
    while path:
        # 1. Count entries up to the next container without a size.
        branch = path[-1]
        for entry in branch.rest:
            entries = _entries_of(entry)
            if entries is None:
                _check_leaf(entry)
                branch.add(1, 0)
            elif id(entry) in sizes:
                branch.add(*sizes[id(entry)])
            elif id(entry) in open_ids:
                raise PlainValueError("a container in it contains itself")
            elif len(path) > MOST_LEVELS:
                raise PlainValueError(f"it is nested more than {MOST_LEVELS} levels deep")
            else:
                open_ids.add(id(entry))
                path.append(_Branch(entry, iter(entries)))
                break
        else:
            # 2. Leave the container, and add its size to that around it.
            path.pop()
            open_ids.discard(id(branch.container))
            sizes[id(branch.container)] = branch.size, branch.levels
            if path:
                path[-1].add(branch.size, branch.levels)


@dataclass
class _Branch:
    """A container whose entries are being counted."""

    container: Any
    rest: Iterator[Any]
    size: int = 1
    levels: int = 1

    def add(self, size: int, levels: int) -> None:
        """Add the size of an entry."""
        self.size, self.levels = self.size + size, max(self.levels, levels + 1)
        if self.size > MOST_ENTRIES:
            raise PlainValueError(f"it stands for more than {MOST_ENTRIES:,} entries")
        if self.levels > MOST_LEVELS + 1:  # the root is in a container of its own
            raise PlainValueError(f"it is nested more than {MOST_LEVELS} levels deep")


def _entries_of(value: Any) -> Iterable[Any] | None:
    if isinstance(value, dict):
        return chain(value.keys(), value.values())
    return value if isinstance(value, (list, tuple, set, frozenset)) else None


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


def bounded_json(data: bytes) -> Any:
    """Return the value of a JSON text, once it is within the bounds of `check_plain`.

    Raises:
        ValueError: it is no JSON or no UTF-8. PlainValueError: it is out of bounds.
    """
    try:
        value = json.loads(data.decode("utf-8-sig"), parse_int=_bounded_int)
    except RecursionError as error:
        raise PlainValueError(f"it is nested more than {MOST_LEVELS} levels deep") from error
    check_plain(value)
    return value


def bounded_json_row(line: bytes) -> Any:
    """Return the value of a line of JSON, checked as by `bounded_json` where something in the line could be out of bounds.

    Raises:
        ValueError: it is no JSON or no UTF-8. PlainValueError: it is out of bounds.
    """
    if line.count(b"[") + line.count(b"{") > MOST_LEVELS or SUSPICIOUS.search(line):
        return bounded_json(line)
    return json.loads(line.decode("utf-8-sig"))


def _bounded_int(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise PlainValueError(f"it holds a whole number of {len(digits):,} digits")
    return int(digits)
