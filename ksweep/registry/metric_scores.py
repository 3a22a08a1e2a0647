"""Scores by metrics other than reconstruction: which are stored, and their values as arrays.

`registry/scores/<draws key>/<metric key>/metric-*.parquet`: a part scores all draws of the part of the draws store with the same
numbers. A metric computed by other code, or imported with other content, has another key; the key that was recorded last counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ksweep.registry.draws import DRAWS_SCHEMA, DrawsStore
from ksweep.registry.earlier_draws import EarlierDraws
from ksweep.registry.part_labels import label_of, read_label
from ksweep.registry.part_store import IDENTITY_FILE, read_identity
from ksweep.registry.scores import MetricLayout, ScoresStore, scored_unit
from ksweep.registry.work_units import WorkUnit
from ksweep.utils.errors import StoreError


@dataclass(frozen=True, kw_only=True)
class StoredMetric:
    """A metric that is stored for the draws of a key."""

    draws_key: str
    metric_key: str
    layout: MetricLayout
    recorded: str
    """When its scores were last computed or imported, UTC, ISO 8601."""

    def column_named(self, name: str) -> str | None:
        """Return the column that a name such as "text.num_words" means; the metric's name alone means its only column."""
        metric, _, column = name.partition(".")
        if metric != self.layout.metric or (not column and len(self.layout.columns) != 1):
            return None
        column = column or next(iter(self.layout.columns))
        return column if column in self.layout.columns else None


def stored_metrics(registry: Path, draws_key: str) -> list[StoredMetric]:
    """Return the metrics that are stored for the draws of a key, by name; of each the key that was recorded last."""
    newest: dict[str, StoredMetric] = {}
    for path in (registry / "scores" / draws_key).glob(f"*/{IDENTITY_FILE}"):
        metric = _stored_metric(path)
        if metric is not None:
            before = newest.setdefault(metric.layout.metric, metric)
            newest[metric.layout.metric] = max(before, metric, key=lambda one: (one.recorded, one.metric_key))
    return [newest[name] for name in sorted(newest)]


def metric_layout_at(directory: Path) -> MetricLayout | None:
    """Return the layout of the scores in a directory, as its identity.json says; None where that cannot be read."""
    try:
        return _layout_in(read_identity(directory / IDENTITY_FILE))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _layout_in(identity: Any) -> MetricLayout:
    columns = {name: (column["description"], column["better"]) for name, column in identity["columns"].items()}
    return MetricLayout(metric=identity["metric"], columns=columns)


def describes_scores(path: Path) -> bool:
    """Return whether an identity.json can be read by the view of stored metrics."""
    try:
        columns = read_identity(path).get("columns", {})
        return all(isinstance(column["description"], str) and isinstance(column["better"], str) for column in columns.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _stored_metric(path: Path) -> StoredMetric | None:
    try:
        content = read_identity(path)
        layout, recorded = _layout_in(content), content["recorded"]  # identities of reconstruction have no time
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return StoredMetric(draws_key=path.parts[-3], metric_key=path.parts[-2], layout=layout, recorded=recorded)


class MetricScores(ScoresStore):
    """The scores of the draws of one key by one metric."""

    remedy = "compute or import them again"

    def __init__(self, registry: Path, draws_key: str, metric_key: str, layout: MetricLayout) -> None:
        """Open the scores; no directory is created before the first part is published."""
        super().__init__(registry / "scores", draws_key, metric_key, layout)
        self.texts = texts_of(registry, draws_key)

    def record(self, identity: Mapping[str, Any]) -> None:
        """Write identity.json with the present time: from now on this key counts, not another of the same metric."""
        recorded = datetime.now(UTC).isoformat(timespec="microseconds")
        self.write_identity(self.layout.description(self.keys["draws"], identity) | {"recorded": recorded})

    def missing_parts(self, num_activations: int, num_draws: int) -> list[WorkUnit]:
        """Return the parts of the draws store that have draws of a grid and whose scores are missing or of other texts."""
        parts = self.texts.parts_meeting(num_activations, num_draws)
        return [part for part in parts if not self._scores_texts_of(part)]

    def _scores_texts_of(self, part: WorkUnit) -> bool:
        label = self.read_label(scored_unit(part))
        return label is not None and label.scored == digest_of_texts(self.texts, part)

    def publish_values(self, part: WorkUnit, draws: pa.Table, values: Mapping[str, np.ndarray], scored: str) -> None:
        """Publish the scores of every draw of a part.

        Args:
            part: the part of the draws store.
            draws: its rows, for their activation and draw.
            values: column -> value of each row; NaN where a draw has none.
            scored: digest of the texts (`digest_of_texts`).
        """
        names = list(self.layout.columns)
        repeated = {name: np.repeat(draws[name].to_numpy(), len(names)) for name in ("activation", "draw")}
        stacked = np.column_stack([np.asarray(values[name], dtype=np.float64) for name in names]).ravel()
        columns = {**repeated, "name": names * len(draws), "value": pa.array(stacked, from_pandas=True)}
        self.publish(scored_unit(part), pa.table(columns), scored)

    def values(self, num_activations: int, num_draws: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Return each column as an array [activation, draw], and which draws have been scored, boolean of the same shape.

        NaN where a draw has no value. Where two parts hold the same draw the first counts, as in the view `texts`.
        """
        grid = (num_activations, num_draws)
        values = {name: np.full(grid, np.nan) for name in self.layout.columns}
        scored = np.zeros(grid, dtype=bool)
        for part in reversed(self.texts.parts_meeting(*grid)):
            block = self._read_values(part)
            rows, draws = part.index()
            shape = (part.last_row - part.first_row, part.last_draw - part.first_draw)
            inside = (slice(0, max(0, num_activations - part.first_row)), slice(0, max(0, num_draws - part.first_draw)))
            scored[rows, draws] = block is not None
            for name, array in values.items():
                array[rows, draws] = np.nan if block is None else block[name].reshape(shape)[inside]
        return values, scored

    def _read_values(self, part: WorkUnit) -> dict[str, np.ndarray] | None:
        """Return the value of each draw of a part by column; None where its scores are missing, damaged or of other texts."""
        unit = scored_unit(part)
        table = self.read_part(unit)
        if table is None:
            return None
        label = read_label(table.schema)
        if label is None or label.scored != digest_of_texts(self.texts, part):
            self.set_aside(unit, "it scores other draws than are stored")
            return None
        names = np.asarray(table["name"].to_pylist(), dtype=object)
        if absent := [name for name in self.layout.columns if (names == name).sum() != part.num_draws]:
            raise StoreError(
                f"{self.path / self.file_name(unit)} has no value of {absent[0]!r} for each draw, which {IDENTITY_FILE} beside "
                "it names: compute or import the scores again"
            )
        values = table["value"].to_numpy()
        return {name: values[names == name] for name in self.layout.columns}


def open_metric(registry: Path, metric: StoredMetric) -> MetricScores:
    """Return the scores of a stored metric."""
    return MetricScores(registry, metric.draws_key, metric.metric_key, metric.layout)


def texts_of(registry: Path, draws_key: str) -> DrawsStore | EarlierDraws:
    """Return the draws of a key; those of earlier versions, whose parts have no label, are read as such."""
    store = DrawsStore(registry / "draws", draws_key)
    return EarlierDraws(registry / "draws", draws_key) if _are_without_labels(store) else store


def _are_without_labels(store: DrawsStore) -> bool:
    """Return whether the first part whose metadata can be read has no label. A damaged one says nothing."""
    for part in store.parts():
        with suppress(OSError, ValueError, pa.ArrowException):
            return read_label(pq.read_schema(store.path / store.file_name(part))) is None
    return False


def read_texts(store: DrawsStore | EarlierDraws, part: WorkUnit, columns: Sequence[str] | None = None) -> pa.Table | None:
    """Return the draws of a part without scores; None, with the part set aside, if it is damaged."""
    return store.read_part(part, list(DRAWS_SCHEMA.names if columns is None else columns))


def digest_of_texts(store: DrawsStore | EarlierDraws, part: WorkUnit) -> str | None:
    """Return the digest of the draws of a part, which scores refer to; None if the part is gone.

    It stands in the label of a part; that of a part of an earlier version, which has no label, is computed from its rows.
    """
    label = store.read_label(part)
    if label is not None:
        return label.digest
    table = read_texts(store, part)
    return None if table is None else label_of(table, store.keys, DRAWS_SCHEMA.names).digest
