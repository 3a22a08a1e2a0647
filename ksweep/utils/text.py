"""Names in messages: in the order that a reader expects, and not too many of them."""

from __future__ import annotations

import re
from collections.abc import Iterable


def natural_sorted(names: Iterable[str]) -> list[str]:
    """Return names sorted with the numbers in them by value: "8 to 15" before "16 to 31"."""
    # Splitting gives texts and numbers in turn, a text (which may be empty) first.
    return sorted(names, key=lambda name: [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))])


def some_of(names: Iterable[str], most: int = 5) -> str:
    """Return a few names for a message, numbers in them sorted by value: "row 2, row 10 and 12 more"."""
    ordered = natural_sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more
