"""What was asked: `sweeps/<id>.json`, the question of a sweep and its cells. Written once, by the command that plans the sweep.

Runs say who computed a cell; a sweep whose cells had all been computed by another one has no run, so its question is kept here.
The id is made of the sweep's name, a count, and a hash of what was asked. Asking the same again as last time adds nothing; asking
something else, or going back to what was asked before, adds a file. The one with the highest count is what the sweep is now.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ksweep.registry.run_record import LandingError
from ksweep.utils.files import json_names, publish_once
from ksweep.utils.fingerprint import canonical_json, fingerprint

SWEEPS_FOLDER = "sweeps"
SWEEP_RECORD_FORMAT = 1
SWEEP_ID = re.compile(r"([0-9a-f]{8})-(\d{6})-([0-9a-f]{16})")
"""Hash of the sweep's name, how many askings came before, hash of what was asked."""


@dataclass(frozen=True, kw_only=True)
class SweepCell:
    """One cell of a sweep."""

    cell_key: str
    label: str
    """What tells it from the others of its sweep: "temperature=0.7"."""
    place: int
    """Place in the sweep, 0-based."""


@dataclass(frozen=True, kw_only=True)
class SweepRecord:
    """One asking of a sweep; registry/schema.sql says what each field means (tables sweeps and sweep_cells)."""

    sweep: str
    question: str
    cells: tuple[SweepCell, ...]
    asked: datetime
    argv: tuple[str, ...] = ()
    git_commit: str | None = None
    git_dirty: bool | None = None

    @property
    def content(self) -> str:
        """Hash of what was asked, whoever asked it and when."""
        return fingerprint({"sweep": self.sweep, "question": self.question, "cells": [asdict(cell) for cell in self.cells]})[:16]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> SweepRecord:
        """An asking as it stands in a file; fields that this version does not know are left out."""
        known = {f.name: value[f.name] for f in fields(cls) if f.name in value}
        cells = [SweepCell(**{f.name: cell[f.name] for f in fields(SweepCell)}) for cell in known["cells"]]
        asked = datetime.fromisoformat(known["asked"])
        return cls(**known | {"cells": tuple(cells), "asked": asked, "argv": tuple(known.get("argv", ()))})

    def to_json(self) -> dict[str, Any]:
        """Plain values, the time in UTC."""
        return asdict(self) | {"asked": self.asked.astimezone(UTC).isoformat()}


def write_sweep_record(registry_root: Path | str, asking: SweepRecord) -> str:
    """Write what was asked, unless it is what the sweep is already; the id of the file that holds it."""
    beginning = fingerprint(asking.sweep)[:8]
    found = [match for name in sweep_record_ids(registry_root) if (match := SWEEP_ID.fullmatch(name)) and match[1] == beginning]
    newest = max(found, key=lambda match: match[0], default=None)
    if newest is not None and newest[3] == asking.content:
        return newest[0]
    number = 0 if newest is None else int(newest[2]) + 1
    name = f"{beginning}-{number:06d}-{asking.content}"
    entry = asking.to_json()
    text = json.dumps({"format": SWEEP_RECORD_FORMAT, "id": name, "sha256": _digest(entry), "asking": entry}, indent=1)
    publish_once(Path(registry_root) / SWEEPS_FOLDER / f"{name}.json", text.encode())
    return name


def sweep_record_ids(registry_root: Path | str) -> set[str]:
    """Ids that are there; what is still being written begins with a dot."""
    return json_names(Path(registry_root) / SWEEPS_FOLDER)


def record_number(name: str) -> int:
    """How many askings of the sweep came before the one of this id."""
    return int(name.split("-")[1])


def read_sweep_record(path: Path) -> SweepRecord:
    """What was asked, checked against what the file says about it.

    Raises:
        LandingError: what is wrong, with the file's name.
    """
    try:
        raw = json.loads(path.read_bytes())
        if raw["format"] > SWEEP_RECORD_FORMAT:
            raise LandingError(
                f"{path.name} has format {raw['format']}, this ksweep reads up to {SWEEP_RECORD_FORMAT}: update ksweep"
            )
        if raw["sha256"] != _digest(raw["asking"]):
            raise LandingError(f"{path.name} is not what was written: it was altered")
        asking = SweepRecord.from_json(raw["asking"])
        if raw["id"] != path.stem or SWEEP_ID.fullmatch(path.stem) is None:
            raise LandingError(f"{path.name} tells of {raw['id']}: was the file renamed or copied?")
    except OSError as error:
        raise LandingError(f"{path.name} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LandingError(f"{path.name} holds no asking of a sweep ({error}): cut short or altered") from error
    return asking


def make_sweep_record(sweep: str, question: str, cells: Sequence[tuple[str, str]]) -> SweepRecord:
    """What this process asks: (cell key, label) of each cell, in order."""
    from ksweep.utils.provenance import provenance

    facts = provenance()
    return SweepRecord(
        sweep=sweep, question=question, asked=datetime.now(UTC), argv=tuple(facts["argv"]), git_commit=facts["git_commit"],
        git_dirty=facts["git_dirty"],
        cells=tuple(SweepCell(cell_key=key, label=label, place=place) for place, (key, label) in enumerate(cells)),
    )  # fmt: skip


def _digest(entry: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(entry).encode()).hexdigest()
