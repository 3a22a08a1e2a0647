"""From the draws of a cell to what is kept of its activations: errors, groups, examples. Arrays in, tables out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ksweep import evaluated, stats
from ksweep.spec import Scoring

NUM_EXAMPLES = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class Breakdown:
    """What a run lands besides its curve and controls."""

    activations: pa.Table
    metrics: list[dict[str, Any]]
    examples: pa.Table


def break_down(
    draws: pa.Table, known: pa.Table, baseline: stats.Baseline, scoring: Scoring, ks: Sequence[int], windows: Sequence[str | None]
) -> Breakdown:
    """Per activation, per group, and a few to look at.

    Args:
        draws: every draw, ordered by activation and draw.
        known: what is known of each activation (`evaluated.SCHEMA`).
        baseline: of the cell, with its distances where it was measured.
        scoring: failure policy and selection.
        ks: values of K of the curve; powers of two and the largest are kept.
        windows: text around each activation's position.
    """
    kept = kept_ks(ks)
    errors = draws["error"].to_numpy().reshape(len(known), -1)
    best = stats.best_errors(errors, kept, scoring.selection, scoring.failed_error)
    return Breakdown(
        activations=_activations(best, kept, baseline.parts(len(best)), np.isnan(errors).sum(axis=1), known),
        metrics=[row for by in (None, *evaluated.GROUPINGS) for row in group_rows(errors, known, baseline, scoring, kept, by)],
        examples=_examples(draws, errors, known, windows),
    )


def kept_ks(ks: Sequence[int]) -> list[int]:
    """The K of which something is kept for each activation: powers of two, and the largest."""
    return [k for k in sorted(ks) if k & (k - 1) == 0 or k == max(ks)]


def _activations(best: np.ndarray, ks: list[int], distances: np.ndarray, num_failed: np.ndarray, known: pa.Table) -> pa.Table:
    return pa.table(
        {
            **{name: known[name] for name in ("activation", "row_id", "document", "position", "role", "norm")},
            "distance": distances,
            "num_failed": num_failed,
            "ks": pa.array([ks] * len(best), pa.list_(pa.int32())),
            "errors": pa.array(best.tolist(), pa.list_(pa.float64())),
        }
    )


def group_rows(
    errors: np.ndarray, known: pa.Table, baseline: stats.Baseline, scoring: Scoring, ks: Sequence[int], by: str | None
) -> Iterator[dict[str, Any]]:
    """A row for each group, baseline and K: the one way in which runs and comparisons look at groups.

    Args:
        errors: [activation, draw], NaN where the draw failed.
        known: what is known of each activation (`evaluated.SCHEMA`).
        baseline: of all activations.
        scoring: selection, failure policy, bootstrap.
        ks: values of K.
        by: role, position, norm, document; None takes all activations as one group.
    """
    groups = ["all"] * len(known) if by is None else known[evaluated.GROUPINGS.get(by, by)].to_pylist()
    best = stats.best_errors(errors, ks, scoring.selection, scoring.failed_error)
    curves = stats.group_curves(
        best, stats.all_failed_rates(errors, ks, scoring.selection), ks, known["document"].to_pylist(), groups, baseline,
        _own_baseline(known, baseline, by), num_replicates=scoring.num_replicates, seed=scoring.seed, level=scoring.level,
    )  # fmt: skip
    places = evaluated.in_order({name for name in groups if name is not None})
    failed = np.isnan(errors).mean(axis=1)
    for curve in curves:
        inside = np.array([name == curve.group for name in groups])
        for i, k in enumerate(curve.k.tolist()):
            column = best[inside, i]
            yield {
                "breakdown": by or "all", "part": curve.group, "place": places.index(curve.group), "against": curve.against,
                "k": k, "fve": float(curve.fve[i]), "fve_low": float(curve.fve_low[i]), "fve_high": float(curve.fve_high[i]),
                "level": curve.level, "error": float(curve.error[i]), "median_error": float(np.median(column)),
                "worst_share": stats.worst_share(column), "baseline": curve.baseline, "baseline_kind": curve.baseline_kind,
                "failure_rate": float(failed[inside].mean()), "all_failed_rate": float(curve.failure_rate[i]),
                "num_activations": curve.num_activations, "num_documents": curve.num_documents,
                "effective_documents": curve.effective_documents,
            }  # fmt: skip


def _own_baseline(known: pa.Table, baseline: stats.Baseline, by: str | None) -> stats.Baseline | None:
    """Parts within groups, of the kind that is measured for the whole; a document alone has too few activations for one."""
    if by not in evaluated.GROUPINGS:
        return None
    kind = "between documents" if baseline.kind == "stated constant" else baseline.kind
    return evaluated.baseline_of(known, kind, baseline.scoring, by)


def _examples(draws: pa.Table, errors: np.ndarray, known: pa.Table, windows: Sequence[str | None]) -> pa.Table:
    """The best draw of the activations that the cell is best, middling and worst at; one without a success is worst of all."""
    ranked = np.where(np.isnan(errors), np.inf, errors)
    draw = ranked.argmin(axis=1)
    order = np.argsort(ranked[np.arange(len(ranked)), draw], kind="stable")
    few = min(NUM_EXAMPLES, max(1, len(order) // 3))
    middle = (len(order) - few) // 2
    chosen = {"best": order[:few], "median": order[middle : middle + few], "worst": order[::-1][:few]}
    activations = np.concatenate(list(chosen.values()))
    picked = draws.take(pa.array(activations * errors.shape[1] + draw[activations]))
    where = known.take(pa.array(activations))
    return pa.table(
        {
            "rank": [rank for rank, rows in chosen.items() for _ in rows],
            "number": [i + 1 for rows in chosen.values() for i in range(len(rows))],
            "activation": activations,
            "draw": draw[activations],
            **{name: picked[name] for name in ("error", "cosine", "explanation", "text", "parse")},
            "context": pa.array([windows[a] for a in activations.tolist()], pa.string()),
            **{name: where[name] for name in ("document", "position")},
        }
    )
