"""Curves and groups of cells, recomputed from their draws, with bands, gains and tails that the registry does not keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import pyarrow as pa

from ksweep import stats
from ksweep.analysis.cells import CommonGround, MeasuredCell, common_ground
from ksweep.config.spec import Scoring
from ksweep.registry import activation_metadata
from ksweep.registry.curve_rows import finite, rows_of_curve
from ksweep.registry.group_rows import group_rows
from ksweep.utils.errors import RequestError

Grouping = Literal["role", "position", "norm", "document"]

GROUP_SCHEMA = pa.schema(
    [
        ("cell", pa.string()),
        ("label", pa.string()),
        ("run_id", pa.string()),
        ("temperature", pa.float64()),
        ("breakdown", pa.string()),
        ("part", pa.string()),
        ("place", pa.int32()),
        ("against", pa.string()),
        ("k", pa.int32()),
        ("fve", pa.float64()),
        ("fve_low", pa.float64()),
        ("fve_high", pa.float64()),
        ("level", pa.float64()),
        ("error", pa.float64()),
        ("median_error", pa.float64()),
        ("worst_share", pa.float64()),
        ("failure_rate", pa.float64()),
        ("all_failed_rate", pa.float64()),
        ("num_activations", pa.int64()),
        ("num_documents", pa.int64()),
        ("effective_documents", pa.float64()),
        ("baseline", pa.float64()),
        ("baseline_kind", pa.string()),
    ]
)
"""Columns as in the registry's view metrics. against: overall (baseline of all activations of the cell) or own (baseline of the
activations of the group alone)."""


def curves_of_cells(cells: Sequence[MeasuredCell]) -> pa.Table:
    """Return the curves of cells with the columns of the registry's `curves`, and more that charts and papers need.

    More: band_low, band_high (simultaneous band over all K), few_subsets, tokens (per activation), gain_per_doubling with its
    interval (FVE at this K minus FVE at K/2), and fve_median, fve_trimmed, worst_share (stats.Tails).
    """
    return pa.Table.from_pylist([row for cell in cells for row in _curve_rows(cell)])


def groups_of_cells(cells: Sequence[MeasuredCell], by: Grouping, ks: Sequence[int] | None = None) -> pa.Table:
    """Return the FVE within groups of activations, against both baselines (GROUP_SCHEMA).

    Documents have the overall baseline only: one document has too few activations for a baseline of its own.

    Args:
        cells: from `load_cells`.
        by: how activations are grouped.
        ks: values of K; None takes 1 and the number of draws.

    Raises:
        RequestError: the groups of a cell's activations are unknown.
    """
    return table_with_nulls([row for cell in cells for row in _group_rows(cell, by, ks)], GROUP_SCHEMA)


def curve_over(cell: MeasuredCell, shared: CommonGround, ks: Sequence[int], scoring: Scoring, level: float) -> stats.FveCurve:
    """Return the curve of a cell over the shared activations, with the selection and the replicates of `scoring`."""
    n = shared.num_activations
    return stats.fve_curve(
        cell.errors[:n], cell.documents[:n], shared.baseline, ks=ks, failed_error=cell.scoring.failed_error,
        num_replicates=scoring.num_replicates, seed=scoring.seed, level=level, selection=scoring.selection,
    )  # fmt: skip


def _curve_rows(cell: MeasuredCell) -> Iterator[dict[str, Any]]:
    shared = common_ground([cell])
    ks = [k for k in cell.scoring.ks or range(1, cell.num_draws + 1) if k <= cell.num_draws] or [1]
    curve = curve_over(cell, shared, ks, cell.scoring, cell.scoring.level)
    low, high = stats.curve_band(curve)
    few, tokens = stats.few_subsets(cell.num_draws, curve.k), stats.tokens_drawn(cell.num_tokens, curve.k)
    best = stats.best_errors(cell.errors, ks, cell.scoring.selection, cell.scoring.failed_error)
    gains = _gains(curve)
    for i, row in enumerate(rows_of_curve(curve)):
        tails = stats.tails(best[:, i], shared.baseline)
        yield row | gains.get(row["k"], _NO_GAIN) | {
            "cell": cell.cell, "label": cell.label, "run_id": cell.run_id, "sweep": cell.sweep, "temperature": cell.temperature,
            "step": cell.step, "metric": "fve", "baseline_kind": shared.baseline_kind, "note": shared.note,
            "few_subsets": bool(few[i]),
            "band_low": finite(low[i]), "band_high": finite(high[i]),
            "tokens": float(tokens[i]), "fve_median": tails.fve_median, "fve_trimmed": tails.fve_trimmed,
            "worst_share": tails.worst_share,
        }  # fmt: skip


_NO_GAIN = {"gain_per_doubling": None, "gain_low": None, "gain_high": None}


def _gains(curve: stats.FveCurve) -> dict[int, dict[str, float | None]]:
    """Return K -> gain in FVE over K/2, for each K whose half is on the curve."""
    if not {2 * k for k in curve.k.tolist()} & set(curve.k.tolist()):
        return {}
    starts, gain = stats.gain_per_doubling(curve, curve.level)
    return {
        2 * k: {
            "gain_per_doubling": float(gain.estimate[i]),
            "gain_low": finite(gain.low[i]),
            "gain_high": finite(gain.high[i]),
        }
        for i, k in enumerate(starts)
    }


def _group_rows(cell: MeasuredCell, by: Grouping, ks: Sequence[int] | None) -> Iterator[dict[str, Any]]:
    if by not in (*activation_metadata.GROUPINGS, "document"):
        raise RequestError(f"activations are grouped by {', '.join(activation_metadata.GROUPINGS)} or document, not by {by!r}")
    shared = common_ground([cell])
    ks = sorted({1, cell.num_draws}) if ks is None else [k for k in ks if k <= cell.num_draws]
    metadata = cell.metadata(cell.num_activations)
    if metadata is None and by != "document":
        raise RequestError(
            f"{cell.cell} ran before groups were kept, and its vectors are not available: give vector_cache, their directory"
        )
    metadata = pa.table({"document": pa.array(cell.documents, pa.string())}) if metadata is None else metadata
    rows = list(group_rows(cell.errors, metadata, shared.baseline, cell.scoring, ks, by))
    if not rows:
        raise RequestError(f"the {by} of the activations of {cell.label} is unknown, so there are no groups")
    for row in rows:
        yield row | {"cell": cell.cell, "label": cell.label, "run_id": cell.run_id, "temperature": cell.temperature}


def table_with_nulls(rows: Sequence[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Return the rows as a table of the schema; NaN, which SQL would sort above every number, becomes null."""
    columns = schema.names
    plain = [{name: finite(row.get(name)) for name in columns} for row in rows]
    return pa.Table.from_pylist(plain, schema=schema)
