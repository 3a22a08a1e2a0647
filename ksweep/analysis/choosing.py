"""Best-of-K chosen by one score and reported in another: what selection gives where the AR that selects does not also score.

    cells = load_cells("registry", ["checkpoint_sweep"])
    chosen_curves(cells, by="ar=demo")                       # chosen by another AR over the same draws
    chosen_curves(cells, by="judge")                         # chosen by imported scores
    chosen_curves(cells, by="error", report="judge")         # chosen by the AR, reported by a judge
    chosen_curves(cells, by="-text.num_words")               # the longest

The maths is in `ksweep.stats.choosing`. Every row has the oracle's curve beside it: the reported score itself chooses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ksweep import stats
from ksweep.analysis.cell_curves import table_with_nulls
from ksweep.analysis.cells import CommonGround, MeasuredCell, common_ground, common_level, load_cells
from ksweep.registry.chosen_files import CHOSEN_SCHEMA
from ksweep.registry.metric_scores import StoredMetric, open_metric, stored_metrics
from ksweep.utils.errors import RequestError

OWN_ERROR = "error"


@dataclass(frozen=True, eq=False)
class DrawScore:
    """A score of each draw of a cell, with which draws are chosen or which is reported."""

    key: str | None
    """Key of the scores; None for errors of earlier versions, which lie beside the draws."""
    values: np.ndarray
    """[activation, draw]; NaN where a draw has none."""
    sign: float | None
    """1 where the lowest value is best, -1 where the highest is; None where neither is and the request does not say."""
    cell: MeasuredCell | None = None
    """The cell whose AR gave it, if it is an error of reconstruction."""

    @property
    def choice(self) -> np.ndarray:
        """The score as one of which the smallest is chosen."""
        return self.values if self.sign is None else self.sign * self.values


def chosen_curves(
    cells: Sequence[MeasuredCell],
    by: str,
    report: str = OWN_ERROR,
    *,
    ks: Sequence[int] | None = None,
    level: float | None = None,
) -> pa.Table:
    """Return the curve of each cell when `by` chooses the draw and `report` is what it is worth (CHOSEN_SCHEMA).

    Both are "error" (the cell's own AR), the label of another cell over the same draws (another AR), or a metric: "judge",
    "text.num_words". The draw with the best value is chosen: the lowest, unless higher is better. A minus in front turns this
    round. An error is reported as FVE, a metric as the mean over the chosen draws that have a value.

    Args:
        cells: from `load_cells`.
        by: the score that chooses.
        report: the score that is reported.
        ks: values of K; None takes those of the cell's spec, or every K.
        level: nominal coverage of the intervals; None takes that of the cells.

    Raises:
        RequestError: there is no such score, or it is of other draws.
    """
    level = common_level(cells, level)
    return table_with_nulls([row for cell in cells for row in _rows(cell, cells, by, report, ks, level)], CHOSEN_SCHEMA)


def _rows(
    cell: MeasuredCell, cells: Sequence[MeasuredCell], by: str, report: str, ks: Sequence[int] | None, level: float
) -> Iterator[dict[str, Any]]:
    # 1. Find both scores, over the draws that all have.
    chooser, reported = (score_named(cell, cells, name) for name in (by, report))
    of_cells = [cell, *(score.cell for score in (chooser, reported) if score.cell is not None)]
    shared = common_ground(of_cells)
    num_draws = min(one.num_draws for one in of_cells)
    grid = (slice(shared.num_activations), slice(num_draws))
    ks = [k for k in ks or cell.scoring.ks or range(1, num_draws + 1) if k <= num_draws] or [1]
    # 2. Compute the curve of the chosen draws and, by the same replicates, of the best ones.
    measure = _measure_fve if reported.cell is not None else _measure_mean
    estimates = measure(cell, shared, grid, chooser, reported, ks, level)
    # 3. Write a row for each K.
    has_text = ~np.isnan(cell.errors[grid])
    about = {
        "cell": cell.cell, "label": cell.label, "run_id": cell.run_id, "draws_key": cell.draws_key,
        "chosen_by": by, "chosen_by_key": chooser.key, "reported": report, "reported_key": reported.key,
        "level": level, "num_draws": num_draws,
        "num_activations": shared.num_activations, "num_replicates": cell.scoring.num_replicates,
        "share_with_choice": float(np.mean(~np.isnan(chooser.values[grid])[has_text])) if has_text.any() else None,
    }  # fmt: skip
    for i, k in enumerate(ks):
        yield about | {"k": k} | {name: value[i] if isinstance(value, np.ndarray) else value for name, value in estimates.items()}


def _measure_fve(
    cell: MeasuredCell,
    shared: CommonGround,
    grid: tuple[slice, slice],
    chooser: DrawScore,
    reported: DrawScore,
    ks: Sequence[int],
    level: float,
) -> dict[str, Any]:
    """Return the FVE by the reporting AR of the chosen and of the best draws, as columns."""

    def curve_by(choice: np.ndarray) -> stats.FveCurve:
        return stats.chosen_curve(
            reported.values[grid], choice[grid], cell.documents[grid[0]], shared.baseline, ks=ks,
            failed_error=cell.scoring.failed_error, num_replicates=cell.scoring.num_replicates, seed=cell.scoring.seed,
            level=level, selection=cell.scoring.selection,
        )  # fmt: skip

    curve, oracle = curve_by(chooser.choice), curve_by(reported.values)
    difference = stats.paired_difference(curve, oracle, level)
    return {
        "measure": "fve", "value": curve.fve, "value_low": curve.fve_low, "value_high": curve.fve_high,
        "oracle": oracle.fve, "oracle_low": oracle.fve_low, "oracle_high": oracle.fve_high,
        "difference": difference.estimate, "difference_low": difference.low, "difference_high": difference.high,
        "share_with_value": 1 - curve.failure_rate, "num_documents": curve.num_documents,
        "effective_documents": curve.effective_documents, "baseline": shared.baseline.value,
        "baseline_kind": shared.baseline_kind, "note": shared.note,
    }  # fmt: skip


def _measure_mean(
    cell: MeasuredCell,
    shared: CommonGround,
    grid: tuple[slice, slice],
    chooser: DrawScore,
    reported: DrawScore,
    ks: Sequence[int],
    level: float,
) -> dict[str, Any]:
    """Return the mean of the reported metric over the chosen and over the best draws, as columns."""

    def mean_by(choice: np.ndarray) -> stats.ChosenMean:
        return stats.chosen_mean(
            reported.values[grid], choice[grid], cell.documents[grid[0]], ks=ks, num_replicates=cell.scoring.num_replicates,
            seed=cell.scoring.seed, level=level, selection=cell.scoring.selection,
        )  # fmt: skip

    chosen = mean_by(chooser.choice)
    columns = {
        "measure": "mean", "value": chosen.mean, "value_low": chosen.low, "value_high": chosen.high,
        "share_with_value": chosen.share_with_value, "num_documents": chosen.num_documents,
        "effective_documents": chosen.effective_documents,
    }  # fmt: skip
    if reported.sign is None:  # no value is better than another, so nothing is the best one
        return columns
    oracle = mean_by(reported.choice)
    difference = chosen.mean - oracle.mean
    low, high = stats.interval_ends(difference, chosen.replicates - oracle.replicates, chosen.effective_documents, level)
    return columns | {
        "oracle": oracle.mean, "oracle_low": oracle.low, "oracle_high": oracle.high,
        "difference": difference, "difference_low": low, "difference_high": high,
    }  # fmt: skip


def score_named(cell: MeasuredCell, cells: Sequence[MeasuredCell], name: str) -> DrawScore:
    """Return the score of this name of a cell's draws: its own error, a metric, or the error of another cell.

    Raises:
        RequestError: there is no such score, or it is of other draws.
    """
    if name == OWN_ERROR:
        return DrawScore(cell.scores_key, cell.errors, 1.0, cell)
    if other := _other_ar(cell, cells, name):
        return DrawScore(other.scores_key, other.errors, 1.0, other)
    metrics = stored_metrics(cell.registry, cell.draws_key)
    for metric in metrics:
        column = metric.column_named(name.removeprefix("-"))
        if column is not None:
            values, _ = open_metric(cell.registry, metric).values(cell.num_activations, cell.num_draws)
            return DrawScore(metric.metric_key, values[column], _sign(metric, column, turned=name.startswith("-")))
    raise _no_such_score(cell, metrics, name)


def _sign(metric: StoredMetric, column: str, *, turned: bool) -> float | None:
    _, better = metric.layout.columns[column]
    if better == "neither":
        return -1.0 if turned else None
    return (1.0 if better == "lower" else -1.0) * (-1.0 if turned else 1.0)


def _other_ar(cell: MeasuredCell, cells: Sequence[MeasuredCell], name: str) -> MeasuredCell | None:
    """Return the cell of this name over the same draws; None if no cell has the name.

    Raises:
        RequestError: the cells of this name are over other draws, or several are over the same ones.
    """
    candidates = [other for other in cells if name in (other.label, other.cell, other.run_id)]
    if not candidates:
        try:
            candidates = load_cells(cell.registry, [name])
        except RequestError:
            return None
    over_same = [other for other in candidates if other.draws_key == cell.draws_key]
    if len(over_same) == 1:
        return over_same[0]
    if over_same:
        raise RequestError(f"{len(over_same)} cells over the draws of {cell.label} are called {name!r}: name one by its run id")
    raise RequestError(
        f"{name} is over other draws than {cell.label} (draws keys {candidates[0].draws_key[:8]} and {cell.draws_key[:8]}), so "
        "it cannot choose among them: a cell that differs in nothing but the AR scores the same draws"
    )


def _no_such_score(cell: MeasuredCell, metrics: Sequence[StoredMetric], name: str) -> RequestError:
    stored = [f"{metric.layout.metric}.{column}" for metric in metrics for column in metric.layout.columns]
    return RequestError(
        f"the draws of {cell.label} have no score {name!r}: it is {OWN_ERROR!r}, the label of a cell with another AR over the "
        f"same draws, or a stored metric ({', '.join(stored) or 'none yet'}; `ksweep scores compute text {cell.label!r}`, "
        "`ksweep scores import`)"
    )
