"""The context of a job: where its results go and how large its batches may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ksweep.config.spec import Cell, cell_from_dict


@dataclass(frozen=True)
class RunContext:
    """Where results go and how large batches may be; never part of any identity."""

    registry: Path
    vector_cache: Path
    batch_size: int | None = None
    """Draws in flight; None: as many as memory allows."""
    sweep: str = ""
    resources: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    """Provenance of the launcher: its commit and command."""
    names: Mapping[Cell, tuple[str, str]] = field(default_factory=dict)
    """Label and title of each cell within its sweep; empty where a job states none."""
    unit_order_seed: int = 0
    """Seed of the order in which a job claims its work units: different for each job, the same on all its ranks."""

    @classmethod
    def from_argument(cls, argument: dict[str, Any]) -> RunContext:
        """Read the context from the argument of a job."""
        return cls(
            registry=Path(argument["registry"]),
            vector_cache=Path(argument["vector_cache"]),
            batch_size=argument["batch_size"],
            sweep=argument["sweep"],
            resources=argument["resources"],
            origin=argument["origin"],
            names=names_by_cell(argument),
            unit_order_seed=argument.get("order", 0),
        )


def names_by_cell(argument: dict[str, Any]) -> dict[Cell, tuple[str, str]]:
    """Return the label and title of each cell of a job; empty for jobs of versions that stated none."""
    names = argument.get("names", ())
    return {cell_from_dict(cell): (label, title) for cell, (label, title) in zip(argument["cells"], names, strict=False)}
