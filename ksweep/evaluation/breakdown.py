"""Break a cell's draws down by activation and group, and pick examples. Arrays in, tables out; no model, no file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ksweep import stats
from ksweep.config.spec import Scoring
from ksweep.registry import activation_metadata
from ksweep.registry.group_rows import group_rows
from ksweep.registry.run_record import NUM_EXAMPLES
from ksweep.stats.best_of_k import kept_ks


@dataclass(frozen=True, kw_only=True, eq=False)
class Breakdown:
    """Tables of a run beside its curve and controls."""

    activations: pa.Table
    metrics: list[dict[str, Any]]
    examples: pa.Table


def break_down(
    draws: pa.Table,
    metadata: pa.Table,
    baseline: stats.Baseline,
    scoring: Scoring,
    ks: Sequence[int],
    windows: Sequence[str | None],
    groups: Sequence[str] = (),
) -> Breakdown:
    """Compute the errors of each activation and the curve of each group, and pick example draws.

    Args:
        draws: every draw, ordered by activation and draw.
        metadata: a row for each activation (`activation_metadata.METADATA_SCHEMA`).
        baseline: baseline of the cell, with each activation's part where it was measured.
        scoring: failure policy and selection.
        ks: values of K of the curve, of which powers of two and the largest are kept.
        windows: text around the position of each activation.
        groups: further groupings, whose columns `activation_metadata.with_groups` has added to the metadata.
    """
    kept = kept_ks(ks)
    errors = draws["error"].to_numpy().reshape(len(metadata), -1)
    best = stats.best_errors(errors, kept, scoring.selection, scoring.failed_error)
    return Breakdown(
        activations=_activations(best, kept, baseline.parts(len(best)), np.isnan(errors).sum(axis=1), metadata),
        metrics=[
            row
            for by in (None, *activation_metadata.GROUPINGS, *groups)
            for row in group_rows(errors, metadata, baseline, scoring, kept, by)
        ],
        examples=_examples(draws, errors, metadata, windows),
    )


def _activations(best: np.ndarray, ks: list[int], distances: np.ndarray, num_failed: np.ndarray, metadata: pa.Table) -> pa.Table:
    return pa.table(
        {
            **{name: metadata[name] for name in ("activation", "row_id", "document", "position", "role", "norm")},
            "distance": distances,
            "num_failed": num_failed,
            "ks": pa.array([ks] * len(best), pa.list_(pa.int32())),
            "errors": pa.array(best.tolist(), pa.list_(pa.float64())),
        }
    )


def _examples(draws: pa.Table, errors: np.ndarray, metadata: pa.Table, windows: Sequence[str | None]) -> pa.Table:
    """Return the best draw of the activations with the smallest, middle and largest best error; those that failed rank last."""
    ranked = np.where(np.isnan(errors), np.inf, errors)
    draw = ranked.argmin(axis=1)
    order = np.argsort(ranked[np.arange(len(ranked)), draw], kind="stable")
    few = min(NUM_EXAMPLES, max(1, len(order) // 3))
    middle = (len(order) - few) // 2
    chosen = {"best": order[:few], "median": order[middle : middle + few], "worst": order[::-1][:few]}
    activations = np.concatenate(list(chosen.values()))
    picked = draws.take(pa.array(activations * errors.shape[1] + draw[activations]))
    where = metadata.take(pa.array(activations))
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
