"""Metrics: functions of draws, and of their activations where needed, to named columns. The AR's reconstruction is one of them.

Reconstruction (`ksweep.registry.scores.RECONSTRUCTION`) needs the AR and is computed in the draw loop. Those of METRICS, and a
user's own "package.module:name", are computed from stored draws: when a cell is recorded (`scoring.metrics`), or later
(`ksweep scores compute`). Scores that a judge or a person gives are imported (`ksweep scores import`) and are a metric too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ksweep.registry.metric_scores import MetricScores, digest_of_texts, read_texts, stored_metrics
from ksweep.registry.scores import RECONSTRUCTION, Better, MetricLayout
from ksweep.utils.errors import SpecError
from ksweep.utils.imports import check_has, digest_of_named, is_dotted_name, load_named

WORD = re.compile(r"\w+(?:['’]\w+)*")
"""A word: letters, digits and underscores, with apostrophes between them. Text without spaces (Chinese) is one word a phrase."""


class Metric(Protocol):
    """A function of draws to named columns."""

    name: str
    """Name in SQL, charts and options: "text"."""
    columns: Mapping[str, tuple[str, Better]]
    """Column -> what it measures, with its unit, and which values are better: "lower", "higher" or "neither"."""
    needs_activations: bool
    """Whether it is given the activations; optional, False."""

    def identity(self) -> Mapping[str, Any]:
        """Return what the values depend on beside the draws: its key is hashed from it. Optional for a metric of one's own."""

    def __call__(self, draws: pa.Table, activations: np.ndarray | None) -> pa.Table:
        """Return the columns, a row for each of `draws`; NULL or NaN where a draw has no value.

        Args:
            draws: draws that have an explanation, with the columns of `ksweep.registry.draws.DRAWS_SCHEMA`.
            activations: float32 [activation, d_model], by the draws' column `activation`; None unless `needs_activations`.
        """


class TextMetric:
    """Length and vocabulary of an explanation, and what it repeats of the text around its activation."""

    name = "text"
    columns: Mapping[str, tuple[str, Better]] = {
        "num_tokens": ("length of the generated text in tokens of the AV, tags included", "neither"),
        "num_words": ("words in the explanation", "neither"),
        "distinct_words": ("share of the words that are distinct, regardless of case", "neither"),
        "context_overlap": ("share of the distinct words that occur in the context too, regardless of case", "neither"),
    }
    needs_activations = False
    version = 1
    """Raised whenever the same text would give other values."""

    def identity(self) -> Mapping[str, Any]:
        """Return its version."""
        return {"version": self.version}

    def __call__(self, draws: pa.Table, activations: np.ndarray | None) -> pa.Table:
        """Return the columns; shares are NULL for an explanation without words, the overlap also without a context."""
        rows: list[dict[str, float | None]] = []
        for explanation, context in zip(draws["explanation"].to_pylist(), draws["context"].to_pylist(), strict=True):
            words = split_words(explanation)
            distinct = set(words)
            shared = None if context is None else distinct & set(split_words(context))
            rows.append(
                {
                    "num_words": len(words),
                    "distinct_words": len(distinct) / len(words) if words else None,
                    "context_overlap": len(shared) / len(distinct) if distinct and shared is not None else None,
                }
            )
        schema = pa.schema([(name, pa.float64()) for name in self.columns if name != "num_tokens"])
        return pa.Table.from_pylist(rows, schema=schema).append_column("num_tokens", draws["num_tokens"])


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case: runs of letters, digits and underscores, with apostrophes within them."""
    return cast("list[str]", WORD.findall(text.casefold()))


METRICS: Mapping[str, Callable[[], Metric]] = {"text": TextMetric}
"""Metrics by name, beside reconstruction."""


def metric_named(source: str, field: str = "scoring.metrics") -> Metric:
    """Return the metric of this name: one of METRICS, or what "package.module:name" names (a class is called without arguments).

    Raises:
        SpecError: there is no such metric, or what the name stands for is none.
    """
    if source in METRICS:
        return METRICS[source]()
    if not is_dotted_name(source):
        why = "is computed for every cell" if source == RECONSTRUCTION.metric else "is not a metric"
        raise SpecError(
            f"{field}: {source!r} {why}; it takes {', '.join(METRICS)}, or a metric of your own as package.module:name"
        )
    named = load_named(source, field, ("columns",))
    metric = named() if isinstance(named, type) else named
    check_has(metric, ("columns", "__call__"), f"{field}={source}")
    return cast("Metric", OwnMetric(source, metric, field))


class OwnMetric:
    """A metric that a user named, with what it leaves out filled in."""

    def __init__(self, source: str, metric: Any, field: str) -> None:
        """Wrap the object that `source` names.

        Raises:
            SpecError: its name or its columns cannot be used.
        """
        self.metric, self.name = metric, getattr(metric, "name", None) or source.rpartition(":")[2]
        self.needs_activations = bool(getattr(metric, "needs_activations", False))
        self._identity = {"source": source, "digest": digest_of_named(source, metric, field)}
        if hasattr(metric, "identity"):
            self._identity |= metric.identity()
        if self.name in (*METRICS, RECONSTRUCTION.metric) or not re.fullmatch(r"\w+", self.name):
            raise SpecError(f"{field}={source}: its name {self.name!r} is taken, or is not one word; give it another `name`")
        self.columns = _checked_columns(metric.columns, f"{field}={source}")

    def identity(self) -> Mapping[str, Any]:
        """Return its name, its digest, and what it says itself."""
        return self._identity

    def __call__(self, draws: pa.Table, activations: np.ndarray | None) -> pa.Table:
        """Return the columns."""
        return self.metric(draws, activations)


def _checked_columns(columns: Any, where: str) -> Mapping[str, tuple[str, Better]]:
    expected = 'expected {"column": ("what it measures, with its unit", "lower", "higher" or "neither is better")}'
    if not isinstance(columns, Mapping) or not columns:
        raise SpecError(f"{where}: its columns are {columns!r}; {expected}")
    for name, column in columns.items():
        if not (isinstance(column, (tuple, list)) and len(column) == 2 and column[1] in get_args(Better)):
            raise SpecError(f"{where}: its column {name!r} is {column!r}; {expected}")
    return {str(name): (str(text), better) for name, (text, better) in columns.items()}


def metric_layout(metric: Metric) -> MetricLayout:
    """Return the name and columns of a metric as they are stored."""
    return MetricLayout(metric=metric.name, columns=metric.columns)


def metric_keys(sources: Sequence[str]) -> dict[str, str]:
    """Return name -> key of the metrics that a spec names.

    Raises:
        SpecError: there is no such metric, or two have the same name.
    """
    metrics = [metric_named(source) for source in sources]
    keys = {metric.name: metric_layout(metric).key(metric.identity()) for metric in metrics}
    if len(keys) < len(metrics):
        raise SpecError(f"scoring.metrics={list(sources)}: two of them have the same name ({', '.join(m.name for m in metrics)})")
    return keys


def compute_metric(
    metric: Metric,
    registry: Path,
    draws_key: str,
    grid: tuple[int, int],
    activations: Callable[[int], np.ndarray],
) -> int:
    """Compute a metric for the draws of a grid [activation, draw] that lack it; return for how many.

    Whole parts of the draws store are scored, also where they reach beyond the grid.

    Args:
        metric: the metric.
        registry: directory of the registry.
        draws_key: key of the draws.
        grid: number of activations, and of draws of each.
        activations: returns the first n activations, float32 [n, d_model]; called only if the metric needs them.

    Raises:
        SpecError: the metric returns something else than it promises.
    """
    layout, identity = metric_layout(metric), metric.identity()
    key = layout.key(identity)
    store = MetricScores(registry, draws_key, key, layout)
    missing = store.missing_parts(*grid)
    vectors = activations(max(part.last_row for part in missing)) if missing and metric.needs_activations else None
    num_scored = 0
    for part in missing:
        draws, scored = read_texts(store.texts, part), digest_of_texts(store.texts, part)
        if draws is not None and scored is not None:
            store.publish_values(part, draws, _values_of(metric, draws, vectors), scored)
            num_scored += len(draws)
    if key not in {stored.metric_key for stored in stored_metrics(registry, draws_key)}:
        store.record(identity)
    return num_scored


def _values_of(metric: Metric, draws: pa.Table, vectors: np.ndarray | None) -> dict[str, np.ndarray]:
    """Return column -> value of each draw; NaN for draws without an explanation and where the metric has no value."""
    has_text = draws["explanation"].is_valid().to_numpy()
    table = metric(draws.filter(pa.array(has_text)), vectors)
    expected = int(has_text.sum())
    if not isinstance(table, pa.Table) or len(table) != expected or set(metric.columns) - set(table.column_names):
        shown = f"{len(table)} rows of {', '.join(table.column_names)}" if isinstance(table, pa.Table) else type(table).__name__
        raise SpecError(
            f"metric {metric.name} returned {shown}; expected an Arrow table with a row for each of the {expected} draws and the "
            f"columns {', '.join(metric.columns)}"
        )
    values = {name: np.full(len(draws), np.nan) for name in metric.columns}
    for name, column in values.items():
        try:
            numbers = pc.cast(table[name], pa.float64()).to_numpy()
        except pa.ArrowException as error:
            raise SpecError(f"metric {metric.name}: column {name} is no number ({error})") from error
        column[has_text] = np.where(np.isfinite(numbers), numbers, np.nan)
    return values
