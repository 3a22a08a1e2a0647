"""Records of sweeps: `sweeps/<id>.json`, the question of a sweep and its cells, written by the command that plans the sweep.

A run names the sweep that computed it. A sweep whose cells were all computed by other sweeps has no run, so its question and
cells are recorded here. The id consists of a hash of the sweep's name, a version number, and a hash of question and cells.
Planning a sweep again unchanged adds no file; a change, or the way back to an earlier version, adds one. The record with the
highest number is the current version of the sweep.
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
"""Hash of the sweep's name, version number, hash of question and cells."""


@dataclass(frozen=True, kw_only=True)
class SweepCell:
    """One cell of a sweep."""

    cell_key: str
    label: str
    """The settings in which the cell differs from the others of its sweep: "temperature=0.7"."""
    place: int
    """Order in the sweep, 0-based."""


@dataclass(frozen=True, kw_only=True)
class SweepRecord:
    """One version of a sweep; schema.sql explains each field (tables sweeps and sweep_cells)."""

    sweep: str
    question: str
    cells: tuple[SweepCell, ...]
    asked: datetime
    argv: tuple[str, ...] = ()
    git_commit: str | None = None
    git_dirty: bool | None = None

    @property
    def content(self) -> str:
        """Hash of question and cells, whoever planned the sweep and when."""
        return fingerprint({"sweep": self.sweep, "question": self.question, "cells": [asdict(cell) for cell in self.cells]})[:16]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> SweepRecord:
        """Parse the record of a file, ignoring fields that this version does not know."""
        values = {f.name: value[f.name] for f in fields(cls) if f.name in value}
        cells = [SweepCell(**{f.name: cell[f.name] for f in fields(SweepCell)}) for cell in values["cells"]]
        asked = datetime.fromisoformat(values["asked"])
        return cls(**values | {"cells": tuple(cells), "asked": asked, "argv": tuple(values.get("argv", ()))})

    def to_json(self) -> dict[str, Any]:
        """Return plain values, the time in UTC."""
        return asdict(self) | {"asked": self.asked.astimezone(UTC).isoformat()}


def write_sweep_record(registry_root: Path | str, record: SweepRecord) -> str:
    """Write a new version of a sweep, unless its newest version is the same; return the id of the file that holds it."""
    prefix = fingerprint(record.sweep)[:8]
    versions = [match for name in sweep_record_ids(registry_root) if (match := SWEEP_ID.fullmatch(name)) and match[1] == prefix]
    newest = max(versions, key=lambda match: match[0], default=None)
    if newest is not None and newest[3] == record.content:
        return newest[0]
    number = 0 if newest is None else int(newest[2]) + 1
    name = f"{prefix}-{number:06d}-{record.content}"
    entry = record.to_json()
    text = json.dumps({"format": SWEEP_RECORD_FORMAT, "id": name, "sha256": _digest(entry), "asking": entry}, indent=1)
    publish_once(Path(registry_root) / SWEEPS_FOLDER / f"{name}.json", text.encode())
    return name


def sweep_record_ids(registry_root: Path | str) -> set[str]:
    """Return the ids of all records; files whose names begin with a dot are still being written."""
    return json_names(Path(registry_root) / SWEEPS_FOLDER)


def record_number(name: str) -> int:
    """Return the version number in an id."""
    return int(name.split("-")[1])


def read_sweep_record(path: Path) -> SweepRecord:
    """Read the record of a sweep and check it against the digest in the file.

    Raises:
        LandingError: the file is damaged, of a later format, or of another sweep.
    """
    try:
        raw = json.loads(path.read_bytes())
        if raw["format"] > SWEEP_RECORD_FORMAT:
            raise LandingError(
                f"{path.name} has format {raw['format']}, this ksweep reads up to {SWEEP_RECORD_FORMAT}: update ksweep"
            )
        if raw["sha256"] != _digest(raw["asking"]):
            raise LandingError(f"{path.name} is not what was written: it was altered")
        record = SweepRecord.from_json(raw["asking"])
        if raw["id"] != path.stem or SWEEP_ID.fullmatch(path.stem) is None:
            raise LandingError(f"{path.name} is the record of {raw['id']}: was the file renamed or copied?")
    except OSError as error:
        raise LandingError(f"{path.name} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LandingError(f"{path.name} holds no record of a sweep ({error}): cut short or altered") from error
    return record


def make_sweep_record(sweep: str, question: str, cells: Sequence[tuple[str, str]]) -> SweepRecord:
    """Return the record of a sweep that this process plans; `cells` are (cell key, label), in order."""
    from ksweep.utils.provenance import provenance

    facts = provenance()
    return SweepRecord(
        sweep=sweep, question=question, asked=datetime.now(UTC), argv=tuple(facts["argv"]), git_commit=facts["git_commit"],
        git_dirty=facts["git_dirty"],
        cells=tuple(SweepCell(cell_key=key, label=label, place=i) for i, (key, label) in enumerate(cells)),
    )  # fmt: skip


def _digest(entry: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(entry).encode()).hexdigest()
