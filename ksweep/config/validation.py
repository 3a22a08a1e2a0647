"""Validate single values of a spec."""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Any

from ksweep.utils.errors import SpecError
from ksweep.utils.text import bounded_repr

LARGEST_NUMBER = 2**31 - 1
"""Largest whole number of a field that has no limit of its own: positions, lengths and counts are stored in 32 bits."""
LARGEST_SEED = 2**63 - 1
"""Largest seed: the database's column of seeds has 64 bits and a sign."""
LONGEST_NAME = 100
"""Most characters of a name that becomes part of a file name, or an option of sbatch."""

NOT_IN_A_LINE = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories: control characters, surrogates, separators of lines and paragraphs."""

PLAIN_NAME = re.compile(r"\w([\w .,:;=+@%()~-]*[\w.+@%)~-])?")
"""Names of sweeps and jobs: one line, which cannot be taken for an option, a path or a hidden file."""
SLURM_NAME = re.compile(r"[\w*]([\w.,:=+@-]*[\w+@-])?")
"""Partitions, accounts and the like, or several with commas between them."""
SLURM_FEATURES = re.compile(r"[\w\[(][\w.,:=+@&|*()\[\]!-]*")
"""Features of a node with the operators of sbatch's --constraint."""


def is_number(value: object) -> bool:
    """Return whether a value is a finite number that a float can hold; True and False are not numbers."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number of more than 308 digits
        return False


def one_of(name: str, value: object, options: Any) -> None:
    """Raise SpecError unless a value is among those of a Literal type."""
    valid: tuple[object, ...] = options.__args__
    if value not in valid:
        raise SpecError(f"{name}={bounded_repr(value)} is not one of {', '.join(map(str, valid))}")


def list_of_texts(name: str, value: object) -> tuple[str, ...]:
    """Return a text or a list of texts as a tuple. Raises SpecError for anything else."""
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise SpecError(f"{name}={bounded_repr(value)} must be a list of texts; [] for none")
    return tuple(texts)


def sorted_pairs(name: str, value: object) -> tuple[tuple[str, Any], ...] | None:
    """Return arguments by name as pairs in the order of their names; None for none. Raises SpecError for anything else."""
    try:
        pairs = dict(value)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        raise SpecError(f"{name}={bounded_repr(value)} must be values by name, such as {{enable_thinking: false}}") from None
    return tuple(sorted(((str(key), entry) for key, entry in pairs.items()), key=lambda pair: pair[0])) or None


def at_least(name: str, value: int, low: int, high: int = LARGEST_NUMBER) -> None:
    """Raise SpecError unless a value is a whole number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise SpecError(f"{name}={bounded_repr(value)} must be a whole number >= {low}")
    if value > high:
        raise SpecError(f"{name}={bounded_repr(value)} is too large: it must be a whole number from {low:,} to {high:,}")


def is_seed(name: str, value: int, low: int = 0) -> None:
    """Raise SpecError unless a value is a whole number from `low` to LARGEST_SEED."""
    at_least(name, value, low, LARGEST_SEED)


def plain_name(name: str, value: object, pattern: re.Pattern[str], example: str) -> None:
    """Raise SpecError unless a value is a text of at most LONGEST_NAME characters that matches a pattern as a whole."""
    if not isinstance(value, str) or len(value) > LONGEST_NAME or not pattern.fullmatch(value):
        raise SpecError(
            f"{name}={bounded_repr(value)} is not a name that can be used: expected one line of at most {LONGEST_NAME} letters, "
            f"digits and signs such as _ and -, which begins with a letter or digit, e.g. {example}"
        )


def as_name(text: str) -> str:
    """Return a text as a name that PLAIN_NAME matches, with "_" for what a name cannot have."""
    return re.sub(r"^\W+|[^\w .=+@~-]+|\W+$", "_", text[:LONGEST_NAME])


def one_line(name: str, value: object, longest: int = 4096) -> None:
    """Raise SpecError if a text has line breaks, control characters such as NUL or lone surrogates, or is too long."""
    if isinstance(value, str) and (len(value) > longest or any(unicodedata.category(c) in NOT_IN_A_LINE for c in value)):
        raise SpecError(
            f"{name}={bounded_repr(value)} must be one line of at most {longest} characters without control characters"
        )
