"""The draws store: which draws exist, which are missing. `registry/draws/<key>/part-*.parquet`, a row per draw."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ksweep.utils.errors import DiskFullError, RunError
from ksweep.utils.files import clear_leftovers, publish, umask_permissions
from ksweep.utils.notes import Note, load_notes, save_notes

log = logging.getLogger(__name__)

ACTIVATIONS_PER_WORK_UNIT = 64
DRAWS_PER_WORK_UNIT = 64
MAX_WORK_UNIT_SIZE = 1024
"""Largest work unit: number of activations, draws of each, and draws in all. Towards the end of a job of several ranks units are
smaller. A unit is published whole or not at all. Draws of one activation share a prefix, in drawing and in scoring, so a unit
extends over draws first."""

DRAWS_SCHEMA = pa.schema(
    [
        ("activation", pa.int64()),
        ("draw", pa.int32()),
        ("row_id", pa.string()),
        ("document", pa.string()),
        ("position", pa.int32()),
        ("context", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("num_tokens", pa.int32()),
        ("text", pa.string()),
        ("explanation", pa.string()),
        ("finish", pa.string()),
        ("parse", pa.string()),
        ("error", pa.float64()),
        ("cosine", pa.float64()),
        ("norm", pa.float64()),
        ("log_probability", pa.float64()),
        ("shuffled_error", pa.float64()),
        ("shuffled_activation", pa.int64()),
        ("reconstruction", pa.list_(pa.float32())),
    ]
)
"""`reconstruction` [d_model], as the AR gave it, is kept where it is needed again: for draw 0 (retrieval among the activations)
and, with a checkpoint, for every draw whose error is below that of each earlier draw of its activation in the unit. The best of
the first K draws of an activation is always one of these, however its draws are cut into units. Of 16 draws 3.4 are kept on
average, of 64 draws 4.7 (harmonic numbers). Parts of earlier versions have it for draw 0 only."""

PART_NAME = re.compile(r"^part-(\d+)-(\d+)-(\d+)-(\d+)\.parquet$")


@dataclass(frozen=True, order=True)
class WorkUnit:
    """Draws that are computed and published at once: activations [first_row, last_row) x draws [first_draw, last_draw)."""

    first_row: int
    last_row: int
    first_draw: int
    last_draw: int

    @property
    def num_draws(self) -> int:
        """Number of draws in the rectangle."""
        return (self.last_row - self.first_row) * (self.last_draw - self.first_draw)

    @property
    def file_name(self) -> str:
        """Name of the file that holds the draws of this unit."""
        return f"part-{self.first_row:08d}-{self.last_row:08d}-{self.first_draw:05d}-{self.last_draw:05d}.parquet"


class DrawsStore:
    """All draws of one key: of one AV, one set of activations, one way of sampling."""

    def __init__(self, root: Path, key: str) -> None:
        """Open the draws of a key below `root` (registry/draws); no directory is created before the first unit is published."""
        self.key = key
        self.path = root / key

    def parts(self) -> list[WorkUnit]:
        """Return the published units, read from the file names: a name exists only after its file is complete."""
        if not self.path.is_dir():
            return []
        matches = (PART_NAME.match(name) for name in os.listdir(self.path))
        return sorted(WorkUnit(*map(int, match.groups())) for match in matches if match)

    def bytes_on_disk(self) -> int:
        """Return the size of all parts in bytes."""
        return sum((self.path / part.file_name).stat().st_size for part in self.parts())

    def coverage(self, num_activations: int, num_draws: int) -> np.ndarray:
        """Return which draws exist, boolean [activation, draw]."""
        exists = np.zeros((num_activations, num_draws), dtype=bool)
        for part in self.parts():
            exists[part.first_row : part.last_row, part.first_draw : part.last_draw] = True
        return exists

    def missing(self, num_activations: int, num_draws: int) -> list[WorkUnit]:
        """Return the missing draws as work units (see `missing_work_units`)."""
        return missing_work_units(self.coverage(num_activations, num_draws))

    def still_missing(self, unit: WorkUnit) -> list[WorkUnit]:
        """Return the draws of a unit that are still missing: another sweep may have published some meanwhile."""
        block = self.coverage(unit.last_row, unit.last_draw)[unit.first_row :, unit.first_draw :]
        return _rectangles(block, unit.first_row, unit.first_draw)

    def describe(self, identity: dict[str, Any]) -> None:
        """Write what the key is hashed from into identity.json, once."""
        target = self.path / "identity.json"
        if not target.exists():
            _guard_disk(self.path, lambda: publish(target, json.dumps(identity, indent=1, sort_keys=True).encode()))

    def publish(self, unit: WorkUnit, table: pa.Table) -> None:
        """Write the draws of a unit under another name and rename the file into place.

        Raises:
            DiskFullError: the disk is full; no partial file is left.
        """
        assert table.num_rows == unit.num_draws, (table.num_rows, unit)
        _guard_disk(self.path, lambda: self._write(unit, table))

    def _write(self, unit: WorkUnit, table: pa.Table) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self.path, prefix=".", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                # Page checksums: a flipped byte is an error when the part is read, not another number.
                pq.write_table(table.cast(DRAWS_SCHEMA), file, compression="zstd", write_page_checksum=True)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, umask_permissions())
            os.replace(temporary, self.path / unit.file_name)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def read(self, num_activations: int, num_draws: int, columns: list[str] | None = None) -> pa.Table | None:
        """Return the first draws of the first activations, ordered by activation and draw; None if some are missing.

        A damaged part is set aside with a warning, and its draws count as missing.
        """
        seen = self.read_seen(num_activations, num_draws, columns)
        return None if seen is None else _as_grid(seen, num_activations, num_draws)

    def read_seen(self, num_activations: int, num_draws: int, columns: list[str] | None = None) -> pa.Table | None:
        """Return those of the first activations' first draws that exist, in any order; None if there are none."""
        wanted = None if columns is None else list(dict.fromkeys(["activation", "draw", *columns]))
        tables = []
        for part in self.parts():
            if part.first_row < num_activations and part.first_draw < num_draws:
                table = self._read_part(part, wanted)
                if table is not None:
                    tables.append(table)
        if not tables:
            return None
        seen = pa.concat_tables(tables)
        inside = (seen["activation"].to_numpy() < num_activations) & (seen["draw"].to_numpy() < num_draws)
        return seen.filter(pa.array(inside))

    def reconstructions(
        self, activations: np.ndarray, draws: np.ndarray, d_model: int, parts: Sequence[WorkUnit] | None = None
    ) -> np.ndarray:
        """Return the reconstruction of each (activation, draw), float32 [pair, d_model]; NaN where none is kept.

        Reads one part at a time. `parts` saves listing the directory again in each of many calls.
        """
        vectors = np.full((len(draws), d_model), np.nan, dtype=np.float32)
        for part in self.parts() if parts is None else parts:
            inside = (part.first_row <= activations) & (activations < part.last_row)
            inside &= (part.first_draw <= draws) & (draws < part.last_draw)
            if inside.any():
                wanted = np.flatnonzero(inside)
                self._fill(vectors, wanted, part, activations[wanted], draws[wanted])
        return vectors

    def _fill(self, target: np.ndarray, wanted: np.ndarray, part: WorkUnit, activations: np.ndarray, draws: np.ndarray) -> None:
        table = self._read_part(part, ["activation", "draw", "reconstruction"])
        if table is None:
            return
        kept = table["reconstruction"].combine_chunks()
        valid = np.flatnonzero(kept.is_valid().to_numpy(zero_copy_only=False))
        vectors = kept.take(pa.array(valid)).flatten().to_numpy().reshape(-1, target.shape[1])
        index = np.full((part.last_row - part.first_row, part.last_draw - part.first_draw), -1)
        rows, columns = table["activation"].to_numpy()[valid] - part.first_row, table["draw"].to_numpy()[valid] - part.first_draw
        index[rows, columns] = np.arange(len(valid))
        source_rows = index[activations - part.first_row, draws - part.first_draw]
        target[wanted[source_rows >= 0]] = vectors[source_rows[source_rows >= 0]]

    def set_damaged_aside(self, num_activations: int, num_draws: int) -> None:
        """Read every part of these draws once and set damaged ones aside, so that their draws count as missing."""
        clear_leftovers(self.path)
        for part in self.parts():
            if part.first_row < num_activations and part.first_draw < num_draws:
                self._read_part(part, None)

    def _read_part(self, part: WorkUnit, columns: list[str] | None) -> pa.Table | None:
        path = self.path / part.file_name
        try:
            table = pq.read_table(path, columns=columns, page_checksum_verification=True, partitioning=None)
            if (reason := _part_mismatch(table, part)) is None:
                return table
        except FileNotFoundError:  # another job has set it aside
            return None
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            # Errors with an errno ("too many open files", "permission denied") say nothing about the content of the file.
            if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
                raise RunError(f"draws part {path} cannot be read: {error}") from error
            reason = str(error).splitlines()[0]
        aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
        try:
            path.rename(aside)
        except FileNotFoundError:  # as above
            return None
        except OSError as error:
            raise RunError(f"draws part {path} is damaged ({reason}) and cannot be set aside ({error.strerror})") from error
        log.warning("draws part %s is damaged (%s): set aside as %s, its draws are sampled again", path, reason, aside.name)
        return None

    @property
    def notes(self) -> tuple[Note, ...]:
        """Notes on the AV and the AR of these draws."""
        return load_notes(self.path)

    def keep_notes(self, notes: Iterable[Note]) -> None:
        """Write notes beside the draws."""
        _guard_disk(self.path, lambda: save_notes(self.path, notes))

    def controls(self) -> dict[str, Any] | None:
        """Return controls that are measured once per key, such as the error of an empty text; None if there are none yet."""
        try:
            return json.loads((self.path / "controls.json").read_text())  # type: ignore[no-any-return]
        except (OSError, ValueError):
            return None

    def publish_controls(self, controls: dict[str, Any]) -> None:
        """Write controls beside the draws."""
        _guard_disk(self.path, lambda: publish(self.path / "controls.json", json.dumps(controls).encode()))


def _part_mismatch(table: pa.Table, part: WorkUnit) -> str | None:
    """Return how the rows of a part contradict its file name, as after a renaming by hand; None if they agree."""
    if table.num_rows != part.num_draws:
        return f"{table.num_rows} rows where its name says {part.num_draws}"
    for name, first, last in (("activation", part.first_row, part.last_row), ("draw", part.first_draw, part.last_draw)):
        if name not in table.column_names:
            return f"no column {name}"
        ends = pc.min_max(table[name]).as_py()
        if (ends["min"], ends["max"]) != (first, last - 1):
            return f"{name} {ends['min']} to {ends['max']} where its name says {first} to {last - 1}"
    return None


def missing_work_units(exists: np.ndarray) -> list[WorkUnit]:
    """Return the draws that are False in `exists` [activation, draw] as work units, on a grid that the number of draws fixes.

    Jobs that share draws but request different numbers of them may compute the same draw in units of different shapes; one of the
    two is then dropped. That is rare, and cheaper than small units for all.
    """
    draws = min(DRAWS_PER_WORK_UNIT, exists.shape[1])
    rows = min(ACTIVATIONS_PER_WORK_UNIT, MAX_WORK_UNIT_SIZE >> max(0, draws - 1).bit_length())  # a divisor of the 64
    units: list[WorkUnit] = []
    for row in range(0, exists.shape[0], rows):
        for draw in range(0, exists.shape[1], DRAWS_PER_WORK_UNIT):
            units += _rectangles(exists[row : row + rows, draw : draw + DRAWS_PER_WORK_UNIT], row, draw)
    return units


def _rectangles(exists: np.ndarray, row: int, draw: int) -> list[WorkUnit]:
    """Return the missing draws of one grid block as few rectangles: neighbouring rows that lack the same draws are joined."""
    units: list[WorkUnit] = []
    for i, present in enumerate(exists):
        for first, last in _runs(~present):
            for index, unit in enumerate(units):
                if unit.last_row == row + i and (unit.first_draw, unit.last_draw) == (draw + first, draw + last):
                    units[index] = WorkUnit(unit.first_row, row + i + 1, unit.first_draw, unit.last_draw)
                    break
            else:
                units.append(WorkUnit(row + i, row + i + 1, draw + first, draw + last))
    return units


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _as_grid(table: pa.Table, num_activations: int, num_draws: int) -> pa.Table | None:
    """Return the rows by activation and draw, each pair once; None if one is missing."""
    activation = table["activation"].to_numpy()
    draw = table["draw"].to_numpy().astype(np.int64)
    _, first = np.unique(activation * num_draws + draw, return_index=True)
    return table.take(pa.array(first)) if len(first) == num_activations * num_draws else None


def _guard_disk(path: Path, write: Any) -> None:
    try:
        write()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            near = next(p for p in (path, *path.parents) if p.exists())
            free = shutil.disk_usage(near).free
            raise DiskFullError(
                f"the disk of {path} is full ({free / 1e6:.1f} MB free): no partial file was left. "
                "Free some space or point `registry` elsewhere, then run the same command again; finished draws are kept."
            ) from error
        raise
