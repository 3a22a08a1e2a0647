"""The draws store: what an AV said. `registry/draws/<draws key>/part-*.parquet`, a row per draw. Scores are in scores.py."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from pathlib import Path

import pyarrow as pa

from ksweep.registry.part_labels import label_of, labelled, read_label
from ksweep.registry.part_store import SPAN, PartStore, unit_named
from ksweep.registry.work_units import WorkUnit, missing_rectangles, missing_work_units

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
        ("log_probability", pa.float64()),
    ]
)

EMBEDDED_SCORES = (
    pa.field("error", pa.float64()),
    pa.field("cosine", pa.float64()),
    pa.field("norm", pa.float64()),
    pa.field("shuffled_error", pa.float64()),
    pa.field("shuffled_activation", pa.int64()),
    pa.field("reconstruction", pa.list_(pa.float32())),
)
"""Scores that parts of earlier versions hold beside the draws. Parts of this version have the columns without values: DuckDB then
reads both in one scan, without opening every file first to learn its columns."""

DRAWS_FILE_SCHEMA = pa.schema([*DRAWS_SCHEMA, *EMBEDDED_SCORES])

PART_NAME = re.compile(rf"^part-{SPAN}\.parquet$")


class DrawsDirectory(PartStore[WorkUnit]):
    """The parts of one directory below registry/draws, of this version or of an earlier one."""

    content = "draws"
    remedy = "its draws are sampled again"

    def __init__(self, root: Path, key: str) -> None:
        """Open a directory below `root` (registry/draws); it is not created before the first unit is published."""
        super().__init__(root / key, {"draws": key})
        self.key = key

    @property
    def columns(self) -> list[str]:
        """Columns of draws, without those of scores that earlier versions have beside them."""
        return DRAWS_SCHEMA.names  # type: ignore[no-any-return]

    def file_name(self, part: WorkUnit) -> str:
        """Return the name of a unit's file."""
        return f"part-{part.span}.parquet"

    def part_named(self, name: str) -> WorkUnit | None:
        """Return the unit of a file name; None for other files."""
        return unit_named(PART_NAME, name)


class DrawsStore(DrawsDirectory):
    """All draws of one key: of one AV, one set of activations, one way of sampling."""

    def missing(self, num_activations: int, num_draws: int) -> list[WorkUnit]:
        """Return the missing draws as work units (see `missing_work_units`)."""
        return missing_work_units(self.coverage(num_activations, num_draws))

    def still_missing(self, unit: WorkUnit) -> list[WorkUnit]:
        """Return the draws of a unit that are still missing: another sweep may have published some meanwhile."""
        block = self.coverage(unit.last_row, unit.last_draw)[unit.index()]
        return missing_rectangles(block, unit.first_row, unit.first_draw)

    def set_aside(self, part: WorkUnit, reason: str) -> bool:
        """Set a part aside, and with it everybody's scores of its texts: sampled again, in bfloat16 they may be others."""
        was_there = super().set_aside(part, reason)
        scores = self.path.parents[1] / "scores" / self.key
        for path in scores.glob(f"*/*-{part.span}.parquet") if was_there else ():
            with suppress(FileNotFoundError):  # another job
                path.rename(path.with_name(f"{path.name}.damaged-{time.time_ns()}"))
        return was_there

    def labelled_draws(self, table: pa.Table) -> pa.Table:
        """Return the columns of draws with their label, by which scores refer to them."""
        draws = table.select(DRAWS_SCHEMA.names).cast(DRAWS_SCHEMA)
        return labelled(draws, label_of(draws, self.keys, DRAWS_SCHEMA.names))

    def publish(self, unit: WorkUnit, table: pa.Table) -> pa.Table | None:
        """Publish the draws of a unit and return them with their label; None, without effect, where another job was first.

        Scores refer to the texts of a part, so a part that exists is never replaced by another.

        Raises:
            DiskFullError: the disk is full; no partial file is left.
        """
        draws = rows = self.labelled_draws(table)
        label = read_label(draws.schema)
        assert label is not None
        for field in EMBEDDED_SCORES:
            rows = rows.append_column(field, pa.nulls(len(rows), field.type))
        return draws if self.write(unit, rows, label, replace=False) else None
