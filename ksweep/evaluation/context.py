"""The context of a job: where its results go and how large its batches may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ksweep.config.spec import Cell, cell_from_dict
from ksweep.evaluation.identity import CellKeys
from ksweep.utils.notes import Note


@dataclass(frozen=True)
class RunContext:
    """Where results go and how large batches may be; never part of any identity."""

    registry: Path
    vector_cache: Path
    batch_size: int | None = None
    """Draws in flight; None: as many as memory allows."""
    phases: bool | None = False
    """Whether all draws are taken before the AR is loaded and scores them; None: where the two do not fit on the GPUs."""
    sweep: str = ""
    resources: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    """Provenance of the launcher: its commit and command."""
    keys: Mapping[Cell, CellKeys] = field(default_factory=dict)
    """Keys of each resolved cell, as the launcher computed them; empty for jobs of earlier versions, whose ranks compute them."""
    names: Mapping[Cell, tuple[str, str]] = field(default_factory=dict)
    """Label and title of each cell within its sweep, where a job of an earlier version states them."""
    unit_order_seed: int = 0
    """Seed of the order in which a job claims its work units: different for each job, the same on all its ranks."""

    @classmethod
    def from_argument(cls, argument: dict[str, Any]) -> RunContext:
        """Read the context from the argument of a job."""
        return cls(
            registry=Path(argument["registry"]),
            vector_cache=Path(argument["vector_cache"]),
            batch_size=argument["batch_size"],
            phases=argument["resources"].get("phases", False),
            sweep=argument["sweep"],
            resources=argument["resources"],
            origin=argument["origin"],
            keys=keys_by_cell(argument),
            names=names_by_cell(argument),
            unit_order_seed=argument.get("order", 0),
        )


def keys_by_cell(argument: dict[str, Any]) -> dict[Cell, CellKeys]:
    """Return the keys that job.json states for each cell; a cell is left out if another version stated too little of it."""
    keys = zip(argument["cells"], argument.get("keys", ()), strict=False)
    return {cell_from_dict(cell): known for cell, value in keys if (known := cell_keys_from_dict(value)) is not None}


def cell_keys_from_dict(value: Mapping[str, Any]) -> CellKeys | None:
    """Return keys that were written as a dictionary; None if a field is missing that this version requires.

    Fields that this version does not know are ignored.
    """
    known = {f.name: value[f.name] for f in fields(CellKeys) if f.name in value}
    try:
        notes = tuple(Note(**note) for note in known.get("notes", ()))
        return CellKeys(**known | {"notes": notes, "revisions": tuple(known.get("revisions", ()))})
    except TypeError:
        return None


def names_by_cell(argument: dict[str, Any]) -> dict[Cell, tuple[str, str]]:
    """Return the label and title of each cell of a job that states no keys, as earlier versions did."""
    names = argument.get("names", ())
    return {cell_from_dict(cell): (label, title) for cell, (label, title) in zip(argument["cells"], names, strict=False)}
