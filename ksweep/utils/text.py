"""Names in messages: in the order that a reader expects, and not too many of them."""

from __future__ import annotations

import re
from collections.abc import Iterable


def some_of(names: Iterable[str], most: int = 5) -> str:
    """Return a few names for a message, numbers in them sorted by value: "row 2, row 10 and 12 more"."""
    ordered = sorted(names, key=lambda name: [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name)])
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more
