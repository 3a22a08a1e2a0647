"""Names and values in messages: in the order that a reader expects, not too many or too long, control characters visible."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable

_BOUNDED = reprlib.Repr()
_BOUNDED.maxlevel, _BOUNDED.maxstring, _BOUNDED.maxother, _BOUNDED.maxlong = 4, 200, 200, 60
_BOUNDED.maxtuple = _BOUNDED.maxlist = _BOUNDED.maxdict = _BOUNDED.maxset = 8


CONTROLS = re.compile("\r\n|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""Characters that steer a terminal (all of C0 but tab and newline, DEL, C1), that reorder text, or that no XML can hold."""


def bounded_repr(value: object) -> str:
    """Return `repr(value)` for a message, with "..." for what is long or deep: a nested value can have 10^8 parts."""
    if isinstance(value, int) and abs(value) >= 10**60:  # Python refuses to write more than 4300 digits
        return f"{'-' * (value < 0)}10**{int((abs(value).bit_length() - 1) * 0.30103)} or more"
    try:
        return _BOUNDED.repr(value)
    except ValueError:  # such a number within a list
        return f"<{type(value).__name__}>"


def natural_sorted(names: Iterable[str]) -> list[str]:
    """Return names sorted with the numbers in them by value: "8 to 15" before "16 to 31"."""
    # Splitting gives texts and numbers in turn, a text (which may be empty) first.
    return sorted(names, key=lambda name: [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))])


def some_of(names: Iterable[str], most: int = 5) -> str:
    """Return a few names for a message, numbers in them sorted by value: "row 2, row 10 and 12 more"."""
    ordered = natural_sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more


def visible(text: str) -> str:
    """Return a text whose control characters are written as escapes: `\\x1b`, `\\u202e`. Tabs and line breaks stay."""
    return CONTROLS.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    if match[0] == "\r\n":
        return "\n"
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
