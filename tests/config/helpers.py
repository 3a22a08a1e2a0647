"""A sweep with overrides laid over it, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ksweep import Sweep
from ksweep.config.overrides import apply_overrides, parse_overrides


def overridden(sweep: Sweep, arguments: Sequence[str] = (), config: Path | None = None) -> Sweep:
    return apply_overrides(sweep, parse_overrides(arguments, config))
