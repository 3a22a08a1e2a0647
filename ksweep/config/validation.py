"""Validate single values of a spec."""

from __future__ import annotations

import math
from typing import Any

from ksweep.utils.errors import SpecError


def is_number(value: object) -> bool:
    """Return whether a value is a finite number; True and False are not numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def one_of(name: str, value: object, options: Any) -> None:
    """Raise SpecError unless a value is among those of a Literal type."""
    valid: tuple[object, ...] = options.__args__
    if value not in valid:
        raise SpecError(f"{name}={value!r} is not one of {', '.join(map(str, valid))}")


def at_least(name: str, value: int, low: int) -> None:
    """Raise SpecError unless a value is a whole number of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise SpecError(f"{name}={value!r} must be a whole number >= {low}")
