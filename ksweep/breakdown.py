"""From the draws of a cell to what is kept of its activations: errors, groups, examples, influences. Arrays in, tables out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ksweep import stats
from ksweep.spec import Scoring
from ksweep.stats.influence import clustered_interval, document_influence

POSITION_EDGES = (0, 32, 64, 128, 256, 512, 1024)
"""Where buckets of token positions begin."""
NUM_NORM_GROUPS = 4
NUM_EXAMPLES = 5
WORST = 0.01
"""Share of the activations whose part in the error is told: a heavy tail shows there."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Breakdown:
    """What a run lands besides its curve and controls."""

    activations: pa.Table
    metrics: list[dict[str, Any]]
    examples: pa.Table
    influence: dict[int, list[float]]
    """K -> what each document adds to the FVE; see stats.influence."""


def break_down(
    draws: pa.Table,
    baseline: stats.Baseline,
    scoring: Scoring,
    ks: Sequence[int],
    columns: Mapping[str, np.ndarray],
    norms: np.ndarray,
) -> Breakdown:
    """Per activation, per group, and a few to look at.

    Args:
        draws: every draw, ordered by activation and draw.
        baseline: of the cell, with its distances where it was measured.
        scoring: failure policy and selection.
        ks: values of K of the curve; powers of two and the largest are kept.
        columns: row_id, document, position, role and window of each activation; None where unknown.
        norms: length of each activation.
    """
    kept = kept_ks(ks)
    errors = draws["error"].to_numpy().reshape(len(norms), -1)
    best_of = stats.prefix_of_k_errors if scoring.selection == "prefix" else stats.best_of_k_errors
    failed = stats.ORTHOGONAL_ERROR if scoring.failed_error is None else scoring.failed_error
    best = best_of(errors, kept, failed)
    distances = np.full(len(best), baseline.value) if baseline.distances is None else baseline.distances
    documents = np.asarray(columns["document"])
    num_failed = np.isnan(errors).sum(axis=1)
    influence = document_influence(best, distances, documents)
    return Breakdown(
        activations=_activations(best, kept, distances, num_failed, norms, columns),
        metrics=_metrics(best, kept, distances, num_failed / errors.shape[1], documents, _groups(columns, norms)),
        examples=_examples(draws, errors, columns),
        influence={k: row.tolist() for k, row in zip(kept, influence, strict=True)},
    )


def kept_ks(ks: Sequence[int]) -> list[int]:
    """The K of which something is kept for each activation: powers of two, and the largest."""
    return [k for k in sorted(ks) if k & (k - 1) == 0 or k == max(ks)]


def _activations(
    best: np.ndarray, ks: list[int], distances: np.ndarray, num_failed: np.ndarray, norms: np.ndarray, columns: Mapping[str, Any]
) -> pa.Table:
    n = len(best)
    known = {name: pa.array(list(columns[name])) for name in ("row_id", "document", "position", "role")}
    return pa.table(
        {
            "activation": np.arange(n),
            **known,
            "norm": norms,
            "distance": distances,
            "num_failed": num_failed,
            "ks": pa.array([ks] * n, pa.list_(pa.int32())),
            "errors": pa.array(best.tolist(), pa.list_(pa.float64())),
        }
    )


def _groups(columns: Mapping[str, np.ndarray], norms: np.ndarray) -> Iterator[tuple[str, str, int, np.ndarray]]:
    """(breakdown, part, its place, which activations) of every group that has some."""
    yield "all", "all", 0, np.ones(len(norms), dtype=bool)
    roles = np.asarray(columns["role"], dtype=object)
    for place, role in enumerate(sorted({role for role in roles.tolist() if role is not None})):
        yield "role", role, place, roles == role
    positions = np.array([-1 if p is None else int(p) for p in columns["position"].tolist()])
    for place, first in enumerate(POSITION_EDGES):
        end = POSITION_EDGES[place + 1] if place + 1 < len(POSITION_EDGES) else None
        inside = (positions >= first) & (positions < (end or np.inf))
        if inside.any():
            yield "position", f"{first} and later" if end is None else f"{first} to {end - 1}", place, inside
    # By rank, so that equal norms fall where they stand; as many in each group as can be.
    group = np.argsort(np.argsort(norms, kind="stable")) * NUM_NORM_GROUPS // len(norms)
    for place in range(NUM_NORM_GROUPS):
        if (group == place).any():
            yield "norm", f"quarter {place + 1} of {NUM_NORM_GROUPS}", place, group == place


def _metrics(
    best: np.ndarray,
    ks: list[int],
    distances: np.ndarray,
    failed: np.ndarray,
    documents: np.ndarray,
    groups: Iterator[tuple[str, str, int, np.ndarray]],
) -> list[dict[str, Any]]:
    rows = []
    for breakdown, part, place, inside in groups:
        errors, baseline = best[inside], float(distances[inside].mean())
        mean = errors.mean(axis=0)
        fve = 1 - mean / baseline if baseline > 0 else np.full(len(ks), np.nan)
        influence = document_influence(errors, distances[inside], documents[inside])
        low, high = clustered_interval(fve, influence)
        common = {
            "breakdown": breakdown, "part": part, "place": place, "baseline": baseline,
            "failure_rate": float(failed[inside].mean()), "num_activations": int(inside.sum()),
            "num_documents": len(set(documents[inside].tolist())),
        }  # fmt: skip
        rows += [
            common
            | {
                "k": k, "fve": float(fve[i]), "fve_low": float(low[i]), "fve_high": float(high[i]), "error": float(mean[i]),
                "median_error": float(np.median(errors[:, i])), "worst_share": worst_share(errors[:, i]),
            }
            for i, k in enumerate(ks)
        ]  # fmt: skip
    return rows


def worst_share(errors: np.ndarray) -> float:
    """Part of the summed error that the worst hundredth of the activations has (at least one activation)."""
    most = max(1, round(WORST * len(errors)))
    total = float(errors.sum())
    return float(np.sort(errors)[-most:].sum()) / total if total > 0 else 0.0


def _examples(draws: pa.Table, errors: np.ndarray, columns: Mapping[str, np.ndarray]) -> pa.Table:
    """The best draw of the activations that the cell is best, middling and worst at; one without a success is worst of all."""
    ranked = np.where(np.isnan(errors), np.inf, errors)
    draw = ranked.argmin(axis=1)
    order = np.argsort(ranked[np.arange(len(ranked)), draw], kind="stable")
    few = min(NUM_EXAMPLES, max(1, len(order) // 3))
    middle = (len(order) - few) // 2
    chosen = {"best": order[:few], "median": order[middle : middle + few], "worst": order[::-1][:few]}
    activations = np.concatenate(list(chosen.values()))
    picked = draws.take(pa.array(activations * errors.shape[1] + draw[activations]))
    known = {name: picked[name] for name in ("error", "cosine", "explanation", "text", "parse")}
    where = {"context": "window", "document": "document", "position": "position"}
    return pa.table(
        {
            "rank": [rank for rank, rows in chosen.items() for _ in rows],
            "number": [i + 1 for rows in chosen.values() for i in range(len(rows))],
            "activation": activations,
            "draw": draw[activations],
            **known,
            **{name: pa.array([columns[source][a] for a in activations.tolist()]) for name, source in where.items()},
        }
    )
