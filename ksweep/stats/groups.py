"""FVE within groups of activations, against two baselines, and how errors are distributed over activations.

`own`: the baseline of the group's own activations. Knowing the group of an activation explains nothing here: it is the FVE that
would be measured on the group alone. Small groups of similar vectors (special tokens) have hardly any variance of their own and
may have an FVE far below zero.

`overall`: the baseline of all activations for every group. The groups' FVEs, weighted by their sizes, average to the whole FVE,
so that it shows which groups lower the total. A group near the common mean has a high FVE here even with uninformative texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from ksweep.stats.bootstrap import document_weights, fve_replicates, interval_ends, replicate_sums
from ksweep.stats.documents import effective_documents, unique_documents
from ksweep.stats.fve import Baseline, BaselineKind, ScoringKind, comparable_chunks

if TYPE_CHECKING:
    from jaxtyping import Float, Int

GroupBaseline = Literal["overall", "own"]

_NO_VARIANCE = 1e-10
"""Fraction of the overall baseline below which a group counts as having no variance of its own."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupCurve:
    """FVE against K of one group, with intervals over documents; every array has one entry per K."""

    group: str
    against: GroupBaseline
    k: Int[np.ndarray, " k"]
    fve: Float[np.ndarray, " k"]
    fve_low: Float[np.ndarray, " k"]
    fve_high: Float[np.ndarray, " k"]
    level: float
    error: Float[np.ndarray, " k"]
    """Mean best-of-K error of the group."""
    failure_rate: Float[np.ndarray, " k"]
    """Expected fraction of the group's activations whose K draws all fail; at K = 1 the fraction of failed draws."""
    baseline: float
    baseline_kind: BaselineKind
    num_activations: int
    num_documents: int
    effective_documents: float
    replicates: Float[np.ndarray, "replicate k"] = field(repr=False)
    """FVE in each replicate; NaN in replicates that drew no document of the group."""


@dataclass(frozen=True, kw_only=True)
class Tails:
    """Mean, median and trimmed FVE, and the concentration of the error in a few activations."""

    fve: float
    fve_median: float
    """1 - median error / baseline."""
    fve_trimmed: float
    """1 - mean error / baseline, without the best and the worst 5 % of activations."""
    worst_share: float
    """Fraction of the summed error that the worst 1 % of activations hold (at least one activation); 0.01 if errors are equal."""


def within_group_distances(
    vectors: Float[np.ndarray, "activation d"], groups: Sequence[str] | np.ndarray, scoring: ScoringKind = "normalised"
) -> Float[np.ndarray, " activation"]:
    """Return the squared distance per dimension of each activation from the mean of its group; 0 in a group of one."""
    names, membership = unique_documents(groups)
    totals = np.zeros((len(names), vectors.shape[1]))
    for rows, chunk in comparable_chunks(vectors, scoring):
        for group in np.unique(membership[rows]):
            totals[group] += chunk[membership[rows] == group].sum(axis=0)
    means = totals / np.bincount(membership)[:, None]
    distances = np.empty(len(vectors))
    for rows, chunk in comparable_chunks(vectors, scoring):
        distances[rows] = np.square(chunk - means[membership[rows]]).mean(axis=1)
    return distances


def group_curves(
    best: Float[np.ndarray, "activation k"],
    all_failed: Float[np.ndarray, "activation k"],
    ks: Sequence[int],
    documents: Sequence[str] | Sequence[int] | np.ndarray,
    groups: Sequence[str | None],
    baseline: Baseline,
    own: Baseline | None = None,
    *,
    num_replicates: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> list[GroupCurve]:
    """Return a curve for each group and baseline, sorted by group, with the replicates of the whole cell.

    All documents of the cell are resampled, as for the cell's own curve, so that the groups' replicates, too, average to those of
    the whole. Replicates without a document of the group do not count for it.

    Args:
        best: best-of-K error of each activation of the cell, with either selection.
        all_failed: probability that all K draws of the activation fail.
        ks: the K of these columns.
        documents: document of each activation.
        groups: group of each activation; one without a group (None) still counts for documents and overall baseline.
        baseline: of all activations, for `overall`.
        own: distances of each activation within its own group, NaN where unknown, for `own`. A group without variance of its own
            has no such curve.
    """
    best, all_failed = np.asarray(best, np.float64), np.asarray(all_failed, np.float64)
    names, membership = unique_documents(documents)
    weights = document_weights(len(names), num_replicates, seed)
    whole = _replicate_means(baseline.parts(len(best))[:, None], membership, weights)[:, 0]
    labels = np.array([("",) if name is None else (name,) for name in groups], dtype=object)[:, 0]
    curves = []
    for name in sorted({name for name in groups if name is not None}):
        rows = np.flatnonzero(labels == name)
        inside, places = np.unique(membership[rows], return_inverse=True)
        drawn = weights[:, inside] if len(inside) > 1 else weights[:0, inside]  # one document gives no interval
        errors = _replicate_means(best[rows], places, drawn)
        of_both: list[tuple[GroupBaseline, Baseline, np.ndarray]] = [("overall", baseline, whole[: len(drawn)])]
        if (its_own := _own_baseline(own, rows, baseline.value)) is not None and its_own.distances is not None:
            of_both.append(("own", its_own, _replicate_means(its_own.distances[:, None], places, drawn)[:, 0]))
        for against, of_rows, denominators in of_both:
            drew_it = ~np.isnan(errors).any(axis=1)
            replicates = np.full(errors.shape, np.nan)
            if drew_it.any():
                replicates[drew_it] = fve_replicates(errors[drew_it], denominators[drew_it])
            of_group = (best[rows], all_failed[rows], membership[rows], replicates)
            curves.append(_group_curve(name, against, of_rows, ks, *of_group, level))
    return curves


def _group_curve(
    name: str,
    against: GroupBaseline,
    baseline: Baseline,
    ks: Sequence[int],
    best: Float[np.ndarray, "activation k"],
    all_failed: Float[np.ndarray, "activation k"],
    membership: Int[np.ndarray, " activation"],
    replicates: Float[np.ndarray, "replicate k"],
    level: float,
) -> GroupCurve:
    error, effective = best.mean(axis=0), effective_documents(membership)
    fve = 1 - error / baseline.value
    low, high = interval_ends(fve, replicates[~np.isnan(replicates).any(axis=1)], effective, level)
    return GroupCurve(
        group=name, against=against, k=np.asarray(ks), fve=fve, fve_low=low, fve_high=high, level=level, error=error,
        failure_rate=all_failed.mean(axis=0), baseline=baseline.value, baseline_kind=baseline.kind, num_activations=len(best),
        num_documents=len(np.unique(membership)), effective_documents=effective, replicates=replicates,
    )  # fmt: skip


def _replicate_means(
    values: Float[np.ndarray, "activation value"],
    membership: Int[np.ndarray, " activation"],
    weights: Int[np.ndarray, "replicate document"],
) -> Float[np.ndarray, "replicate value"]:
    """Return the mean over the activations of each replicate; NaN in a replicate that drew none of them."""
    if not len(weights):
        return np.empty((0, values.shape[1]))
    sums = replicate_sums(np.column_stack([values, np.ones(len(values))]), membership, weights)
    with np.errstate(invalid="ignore"):
        return np.asarray(sums[:, :-1] / sums[:, -1:])


def _own_baseline(own: Baseline | None, rows: Int[np.ndarray, " activation"], overall: float) -> Baseline | None:
    """Return the baseline of a group's own activations; None if it is unknown or the group has no variance."""
    distances = None if own is None or own.distances is None else own.distances[rows]
    if own is None or distances is None or not np.isfinite(distances).all() or not distances.mean() > _NO_VARIANCE * overall:
        return None
    value = float(distances.mean())
    return Baseline(value=value, kind=own.kind, num_activations=len(rows), scoring=own.scoring, distances=distances)


def quantile_groups(values: Float[np.ndarray, " activation"], num_groups: int = 4) -> Int[np.ndarray, " activation"]:
    """Return the quantile group of each value, 0 for the lowest to `num_groups` - 1; equal values are in one group."""
    values = np.asarray(values, dtype=np.float64)
    edges = np.quantile(values, np.arange(1, num_groups) / num_groups)
    return np.searchsorted(edges, values, side="left")


def tails(best: Float[np.ndarray, " activation"], baseline: Baseline, trim: float = 0.05, worst: float = 0.01) -> Tails:
    """Return mean, median and trimmed FVE of one error per activation, and the fraction of the error in the worst ones."""
    ranked = np.sort(np.asarray(best, dtype=np.float64))
    cut = int(trim * len(ranked))
    return Tails(
        fve=float(1 - ranked.mean() / baseline.value),
        fve_median=float(1 - np.median(ranked) / baseline.value),
        fve_trimmed=float(1 - ranked[cut : len(ranked) - cut].mean() / baseline.value),
        worst_share=worst_share(ranked, worst),
    )


def worst_share(errors: Float[np.ndarray, " activation"], worst: float = 0.01) -> float:
    """Return the fraction of the summed error that the worst activations hold (at least one); NaN if the sum is 0."""
    num_worst, total = max(1, round(worst * len(errors))), float(np.sum(errors))
    return float(np.sort(errors)[-num_worst:].sum()) / total if total > 0 else float("nan")
