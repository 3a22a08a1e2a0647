"""The scores store: what draws were worth. `registry/scores/<draws key>/<scores key>/part-*.parquet`, a row per draw.

A directory holds the scores of one metric, which its identity.json names. A part scores draws of one part of the draws store: all
of them under the same name, or some of them as `part-<draws scored>-of-<draws in the part>.parquet`. Its label has the digest of
that part, so that a text is never read with the score of another.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from ksweep.registry.part_labels import label_of
from ksweep.registry.part_store import SPAN, PartStore
from ksweep.registry.work_units import WorkUnit
from ksweep.utils.fingerprint import fingerprint

RECONSTRUCTION_SCHEMA = pa.schema(
    [
        ("activation", pa.int64()),
        ("draw", pa.int32()),
        ("error", pa.float64()),
        ("cosine", pa.float64()),
        ("norm", pa.float64()),
        ("shuffled_error", pa.float64()),
        ("shuffled_activation", pa.int64()),
        ("reconstruction", pa.list_(pa.float32())),
    ]
)
"""`reconstruction` [d_model], as the AR gave it, is kept where it is needed again: for draw 0 (retrieval among the activations)
and, with a checkpoint, for every draw whose error is below that of each earlier draw of its activation in the unit. The best of
the first K draws of an activation is always one of these, however its draws are cut into units. Of 16 draws 3.4 are kept on
average, of 64 draws 4.7 (harmonic numbers). Parts of early versions have it for draw 0 only."""


LONG_SCHEMA = pa.schema([("activation", pa.int64()), ("draw", pa.int32()), ("name", pa.string()), ("value", pa.float64())])
"""Scores of every metric but reconstruction: a row for each draw and column of the metric, NULL where the draw has no value."""

Better = Literal["lower", "higher", "neither"]


@dataclass(frozen=True, kw_only=True)
class MetricLayout:
    """What a metric measures, and how its scores are stored."""

    metric: str
    """Name of the metric, as in identity.json."""
    columns: Mapping[str, tuple[str, Better]]
    """Column -> what it measures, with its unit, and which values are better."""
    prefix: str = "metric"
    """What the names of its parts begin with: files of one prefix have the same columns, so that one scan reads them all."""
    schema: pa.Schema = LONG_SCHEMA

    @property
    def rows_per_draw(self) -> int:
        """Rows that a draw has in a part."""
        return len(self.columns) if self.schema is LONG_SCHEMA else 1

    def key(self, identity: Mapping[str, Any]) -> str:
        """Return the key of the metric's scores: hashed from its name and its identity, not from the draws."""
        return fingerprint({"metric": self.metric, **identity})

    def description(self, draws_key: str, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of identity.json."""
        columns = {name: {"description": text, "better": better} for name, (text, better) in self.columns.items()}
        return {
            "metric": self.metric,
            "draws_key": draws_key,
            "scores": {"metric": self.metric, **identity},
            "columns": columns,
        }


RECONSTRUCTION = MetricLayout(
    metric="reconstruction", prefix="part", schema=RECONSTRUCTION_SCHEMA,
    columns={
        "error": ("error of the AR's reconstruction of the activation; NLA pairs: 2 (1 - cosine)", "lower"),
        "cosine": ("cosine between the reconstruction and the activation", "higher"),
    },
)  # fmt: skip
"""Reconstruction of the activation by an AR. It is computed in the draw loop, and the error is what curves of FVE are made of."""


@dataclass(frozen=True, order=True)
class ScoredUnit(WorkUnit):
    """Draws that are scored at once."""

    of: WorkUnit
    """The part of the draws store that they lie in."""


def scored_unit(unit: WorkUnit, of: WorkUnit | None = None) -> ScoredUnit:
    """Return a rectangle of draws as a unit to be scored; it is a part of the draws store, or lies in the part `of`."""
    return ScoredUnit(unit.first_row, unit.last_row, unit.first_draw, unit.last_draw, of=of or unit)


class ScoresStore(PartStore[ScoredUnit]):
    """All scores of the draws of one key by one metric."""

    content = "scores"
    remedy = "its draws are scored again"

    def __init__(self, root: Path, draws_key: str, scores_key: str, layout: MetricLayout = RECONSTRUCTION) -> None:
        """Open the scores of a key below `root` (registry/scores); no directory is created before the first unit is published."""
        super().__init__(root / draws_key / scores_key, {"draws": draws_key, "scores": scores_key})
        self.layout = layout
        self._pattern = re.compile(rf"^{re.escape(layout.prefix)}-{SPAN}(?:-of-{SPAN})?\.parquet$")

    @property
    def columns(self) -> list[str]:
        """Columns of the metric's layout."""
        return self.layout.schema.names  # type: ignore[no-any-return]

    def file_name(self, part: ScoredUnit) -> str:
        """Return the name of a unit's file."""
        some = "" if part.span == part.of.span else f"-of-{part.of.span}"
        return f"{self.layout.prefix}-{part.span}{some}.parquet"

    def num_rows(self, part: ScoredUnit) -> int:
        """Return how many rows a part has."""
        return part.num_draws * self.layout.rows_per_draw

    def part_named(self, name: str) -> ScoredUnit | None:
        """Return the unit of a file name; None for other files."""
        match = self._pattern.match(name)
        if match is None:
            return None
        numbers = [int(number) for number in match.groups() if number is not None]
        return scored_unit(WorkUnit(*numbers[:4]), WorkUnit(*numbers[-4:]))

    def publish(self, unit: ScoredUnit, table: pa.Table, scored: str) -> None:
        """Publish the scores of a unit; `scored` is the digest of the draws part.

        Raises:
            DiskFullError: the disk is full; no partial file is left.
        """
        scores = table.select(self.layout.schema.names).cast(self.layout.schema)
        self.write(unit, scores, label_of(scores, self.keys, self.layout.schema.names, scored), replace=True)
