"""Where a job's results go and how large its batches may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ksweep.config.spec import Cell

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Place:
    """Where results go and how large batches may be; never part of any identity."""

    registry: Path
    vector_cache: Path
    batch_size: int | None = None
    """Draws at once; None: as many as memory allows."""
    sweep: str = ""
    resources: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    """Provenance of the launcher: its commit and command."""
    names: Mapping[Cell, tuple[str, str]] = field(default_factory=dict)
    """Label and title of cells in the sweep, where one asked for them."""
    order: int = 0
    """Seed of the order in which a job takes the missing units: another for each job, the same for its ranks."""
