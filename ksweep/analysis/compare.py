"""Compare cells: paired differences, and which of several cells is best. Reads draws, never a model.

    cells = load_cells("registry", ["temp_sweep"])      # newest finished runs of cells, labels, sweeps or run ids
    compare(cells)                    # every pair, every K, pointwise interval and band; and each at its own best K
    compare(cells, reference="temperature=1")
    best_held_out(cells, ks=(1, 16))  # which cell is best, without the winner's curse
    curves_of_cells(cells)            # curves with bands, gains per doubling, tokens, median and trimmed FVE
    groups_of_cells(cells, "role")    # FVE within groups

Each returns an Arrow table for SQL and charts. The maths is in `ksweep.stats`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from ksweep import stats
from ksweep.analysis.cell_curves import (
    GROUP_SCHEMA,
    Grouping,
    curve_over,
    curves_of_cells,
    groups_of_cells,
    table_with_nulls,
)
from ksweep.analysis.cells import CommonGround, MeasuredCell, cell_named, common_ground, common_level, load_cells
from ksweep.registry.curve_rows import finite, rows_of_curve
from ksweep.utils.errors import RequestError

__all__ = [
    "BEST_SCHEMA",
    "COMPARISON_SCHEMA",
    "GROUP_SCHEMA",
    "Grouping",
    "MeasuredCell",
    "best_held_out",
    "common_ground",
    "compare",
    "curves_of_cells",
    "groups_of_cells",
    "load_cells",
]

COMPARISON_SCHEMA = pa.schema(
    [
        ("cell", pa.string()),
        ("label", pa.string()),
        ("run_id", pa.string()),
        ("other_cell", pa.string()),
        ("other_label", pa.string()),
        ("other_run_id", pa.string()),
        ("k", pa.int32()),
        ("own_k", pa.int32()),
        ("other_k", pa.int32()),
        ("fve", pa.float64()),
        ("other_fve", pa.float64()),
        ("difference", pa.float64()),
        ("difference_low", pa.float64()),
        ("difference_high", pa.float64()),
        ("band_low", pa.float64()),
        ("band_high", pa.float64()),
        ("level", pa.float64()),
        ("few_subsets", pa.bool_()),
        ("tokens", pa.float64()),
        ("other_tokens", pa.float64()),
        ("num_activations", pa.int64()),
        ("num_documents", pa.int64()),
        ("effective_documents", pa.float64()),
        ("baseline", pa.float64()),
        ("baseline_kind", pa.string()),
        ("note", pa.string()),
    ]
)
"""A row for each pair and each K that both cells have, and a row whose `k` is null with each cell at the K of its highest FVE
(own_k, other_k). difference = fve - other_fve, with the column names of the registry's v_compare. difference_low/high is an
interval for one K named beforehand, band_low/high a band over all K of the pair. few_subsets: K > N/2 of either cell. tokens:
tokens sampled per activation for that K."""

BEST_SCHEMA = pa.schema(
    [
        ("k", pa.int32()),
        ("best", pa.string()),
        ("best_temperature", pa.float64()),
        ("chosen_on_first_half", pa.string()),
        ("chosen_on_second_half", pa.string()),
        ("naive_fve", pa.float64()),
        ("fve", pa.float64()),
        ("fve_low", pa.float64()),
        ("fve_high", pa.float64()),
        ("level", pa.float64()),
        ("num_cells", pa.int32()),
        ("num_activations", pa.int64()),
        ("num_documents", pa.int64()),
        ("effective_documents", pa.float64()),
        ("baseline", pa.float64()),
        ("baseline_kind", pa.string()),
    ]
)
"""A row for each K. best: label of the cell with the highest FVE over all documents, the cell to use. fve: FVE of the choice made
on one half of the documents and measured on the other, both ways, pooled. naive_fve: FVE of `best` on the documents that it was
chosen on, which is biased upwards."""


def compare(cells: Sequence[MeasuredCell], reference: str | None = None, *, level: float | None = None) -> pa.Table:
    """Return the paired differences of every two cells, or of each cell from a reference (COMPARISON_SCHEMA).

    A difference is over the activations that both cells have, replicate by replicate.

    Args:
        cells: from `load_cells`.
        reference: label, cell or run id of the cell that is subtracted from the others.
        level: nominal coverage of the intervals; None takes that of the cells.

    Raises:
        RequestError: the cells are over different activations, their FVEs do not mean the same, or their bootstraps differ.
    """
    if reference is None:
        pairs = list(itertools.combinations(cells, 2))
    else:
        base = cell_named(cells, reference)
        pairs = [(cell, base) for cell in cells if cell is not base]
    if not pairs:
        raise RequestError(f"a comparison needs two cells; there is {', '.join(c.label for c in cells) or 'none'}")
    level, curves = common_level(cells, level), dict[Any, stats.FveCurve]()
    return pa.Table.from_pylist([row for a, b in pairs for row in _pair_rows(a, b, level, curves)], schema=COMPARISON_SCHEMA)


def best_held_out(cells: Sequence[MeasuredCell], ks: Sequence[int] | None = None, *, level: float | None = None) -> pa.Table:
    """Return which cell is best at each K, and its FVE on documents that it was not chosen on (BEST_SCHEMA).

    Args:
        cells: from `load_cells`; those with fewer than K draws take no part at that K.
        ks: values of K; None takes 1, 2, 4, ... as far as two cells have them.
        level: nominal coverage of the intervals; None takes that of the cells.

    Raises:
        RequestError: there is one document, or fewer than two cells have K draws.
    """
    shared, level, scoring = common_ground(cells), common_level(cells, level), cells[0].scoring
    n, documents = shared.num_activations, cells[0].documents[: shared.num_activations]
    if len(set(documents)) < 2:
        raise RequestError("all activations are of one document: there is no half to choose on and half to measure on")
    most = sorted(c.num_draws for c in cells)[-2] if len(cells) > 1 else 0
    rows = []
    for k in ks if ks is not None else [2**i for i in range(most.bit_length())]:
        able = [c for c in cells if c.num_draws >= k]
        if len(able) < 2:
            raise RequestError(f"fewer than two of these cells have {k} draws: there is nothing to choose between at K = {k}")
        choice = stats.held_out_best(
            [c.errors[:n] for c in able], documents, shared.baseline, k, failed_error=scoring.failed_error,
            num_replicates=scoring.num_replicates, seed=scoring.seed, level=level, selection=scoring.selection,
        )  # fmt: skip
        rows.append(
            rows_of_curve(choice.curve)[0]
            | {
                "baseline_kind": shared.baseline_kind,
                "k": k,
                "best": able[choice.best].label,
                "best_temperature": able[choice.best].temperature,
                "chosen_on_first_half": able[choice.chosen[1]].label,
                "chosen_on_second_half": able[choice.chosen[0]].label,
                "naive_fve": choice.naive_fve,
                "num_cells": len(able),
            }
        )
    return table_with_nulls(rows, BEST_SCHEMA)


def _pair_rows(a: MeasuredCell, b: MeasuredCell, level: float, curves: dict[Any, stats.FveCurve]) -> Iterator[dict[str, Any]]:
    """Yield the rows of COMPARISON_SCHEMA for one pair; `curves` caches curves that other pairs need too."""
    # 1. both curves, over the activations that both cells have and with the replicates of `a`
    shared = common_ground([a, b])
    whole_a, whole_b = (_whole_curve(cell, a, shared, level, curves) for cell in (a, b))
    count = min(a.num_draws, b.num_draws)
    curve_a, curve_b = _first_ks(whole_a, count), _first_ks(whole_b, count)
    # 2. a row for each K that both have
    difference = stats.paired_difference(curve_a, curve_b, level)
    band = stats.difference_band(curve_a, curve_b, level)
    few = stats.few_subsets(count, curve_a.k)
    tokens_a, tokens_b = (float(cell.num_tokens[: shared.num_activations].mean()) for cell in (a, b))
    same = {
        "cell": a.cell, "label": a.label, "run_id": a.run_id,
        "other_cell": b.cell, "other_label": b.label, "other_run_id": b.run_id,
        "level": level, "num_activations": shared.num_activations, "num_documents": curve_a.num_documents,
        "effective_documents": curve_a.effective_documents,
        "baseline": shared.baseline.value, "baseline_kind": shared.baseline_kind,
        "note": shared.note,
    }  # fmt: skip
    for i, k in enumerate(curve_a.k.tolist()):
        yield same | _difference_columns(difference, i) | {
            "k": k, "own_k": k, "other_k": k, "fve": float(curve_a.fve[i]), "other_fve": float(curve_b.fve[i]),
            "band_low": finite(band[0][i]), "band_high": finite(band[1][i]), "few_subsets": bool(few[i]),
            "tokens": tokens_a * k, "other_tokens": tokens_b * k,
        }  # fmt: skip
    # 3. a row with each cell at the K of its highest FVE
    k_a, k_b, at_best = stats.difference_at_own_best(whole_a, whole_b, level)
    yield same | _difference_columns(at_best, 0) | {
        "own_k": k_a, "other_k": k_b, "fve": float(whole_a.fve.max()), "other_fve": float(whole_b.fve.max()),
        "few_subsets": 2 * k_a > a.num_draws > 1 or 2 * k_b > b.num_draws > 1,
        "tokens": tokens_a * k_a, "other_tokens": tokens_b * k_b,
    }  # fmt: skip


def _whole_curve(
    cell: MeasuredCell, first: MeasuredCell, shared: CommonGround, level: float, curves: dict[Any, stats.FveCurve]
) -> stats.FveCurve:
    """Return the curve of a cell at every K, resampled as the first cell of its pair is; from the cache `curves` if possible."""
    key = (cell.run_id, shared.num_activations, first.scoring.num_replicates, first.scoring.seed, first.scoring.selection)
    if key not in curves:
        curves[key] = curve_over(cell, shared, range(1, cell.num_draws + 1), first.scoring, level)
    return curves[key]


def _first_ks(curve: stats.FveCurve, count: int) -> stats.FveCurve:
    """Return the curve up to K = count."""
    cut = {name: getattr(curve, name)[:count] for name in ("k", "fve", "fve_low", "fve_high", "error", "failure_rate")}
    return replace(curve, **cut, fve_over_successes=curve.fve_over_successes[:count], replicates=curve.replicates[:, :count])


def _difference_columns(interval: stats.Interval, i: int) -> dict[str, Any]:
    return {
        "difference": float(interval.estimate[i]),
        "difference_low": finite(interval.low[i]),
        "difference_high": finite(interval.high[i]),
    }
