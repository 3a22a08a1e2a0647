"""FVE within groups of activations, against two baselines; and where the error sits.

`own`: the baseline of the group's own activations. Knowing which group an activation belongs to explains nothing here; it is the
FVE that would have been measured on that group alone. Small groups of alike vectors (special tokens) have hardly any variance of
their own and may come out far below zero.

`overall`: the baseline of all activations for every group. The groups' FVEs, weighted by their sizes, average to the whole FVE,
so this one says where the total is lost; a group near the common mean looks good here without a word of explanation.
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
"""Share of the overall baseline below which a group has no variance of its own."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupCurve:
    """FVE against K of one group, with intervals over documents; arrays have one entry per K."""

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
    """Expected share of the group's activations for which all K draws failed; at K = 1 the share of failed draws."""
    baseline: float
    baseline_kind: BaselineKind
    num_activations: int
    num_documents: int
    effective_documents: float
    replicates: Float[np.ndarray, "replicate k"] = field(repr=False)
    """NaN in replicates that drew no document of the group."""


@dataclass(frozen=True, kw_only=True)
class Tails:
    """Whether a mean error is that of most activations or that of a few."""

    fve: float
    fve_median: float
    """1 - median error / baseline: the activation in the middle, against the same baseline as the mean."""
    fve_trimmed: float
    """The same of the mean without the best and the worst 5 % of activations."""
    worst_share: float
    """Share of the summed error that the worst 1 % of activations hold (at least one activation); 0.01 if all are alike."""


def within_group_distances(
    vectors: Float[np.ndarray, "activation d"], groups: Sequence[str] | np.ndarray, scoring: ScoringKind = "normalised"
) -> Float[np.ndarray, " activation"]:
    """Mean squared distance per dimension of each activation from the mean of its own group; 0 in a group of one."""
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
    """A curve for each group, sorted by name, with the replicates of the whole cell.

    The documents of all activations are resampled, as for the cell's own curve; a replicate without a document of the group says
    nothing of it. So the groups' replicates, too, average to those of the whole.

    Args:
        best: best-of-K error of each activation of the cell, whichever selection made it.
        all_failed: chance that all K draws of the activation failed.
        ks: the K of these columns.
        documents: document of each activation.
        groups: group of each activation; None belongs to none, but its document and its part of the baseline count.
        baseline: of all activations: `overall`.
        own: with the distances of each activation within its own group, NaN where unknown: gives `own`. A group without variance
            of its own has no such curve.
    """
    best, all_failed = np.asarray(best, np.float64), np.asarray(all_failed, np.float64)
    names, membership = unique_documents(documents)
    weights = document_weights(len(names), num_replicates, seed)
    whole = _replicate_means(baseline.parts(len(best))[:, None], membership, weights)[:, 0]
    labels = np.array([("",) if name is None else (name,) for name in groups], dtype=object)[:, 0]
    found = []
    for name in sorted({name for name in groups if name is not None}):
        rows = np.flatnonzero(labels == name)
        inside, places = np.unique(membership[rows], return_inverse=True)
        drawn = weights[:, inside] if len(inside) > 1 else weights[:0, inside]  # of one document nothing can be said
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
            found.append(_group_curve(name, against, of_rows, ks, *of_group, level))
    return found


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
    """Mean over the activations of each replicate; NaN in a replicate that drew none of them."""
    if not len(weights):
        return np.empty((0, values.shape[1]))
    sums = replicate_sums(np.column_stack([values, np.ones(len(values))]), membership, weights)
    with np.errstate(invalid="ignore"):
        return np.asarray(sums[:, :-1] / sums[:, -1:])


def _own_baseline(own: Baseline | None, rows: Int[np.ndarray, " activation"], overall: float) -> Baseline | None:
    """The baseline of a group's own activations; None where it is not known or there is no variance."""
    distances = None if own is None or own.distances is None else own.distances[rows]
    if own is None or distances is None or not np.isfinite(distances).all() or not distances.mean() > _NO_VARIANCE * overall:
        return None
    value = float(distances.mean())
    return Baseline(value=value, kind=own.kind, num_activations=len(rows), scoring=own.scoring, distances=distances)


def quantile_groups(values: Float[np.ndarray, " activation"], num_groups: int = 4) -> Int[np.ndarray, " activation"]:
    """0 for the lowest part of the values, `num_groups` - 1 for the highest; equal values go together."""
    values = np.asarray(values, dtype=np.float64)
    edges = np.quantile(values, np.arange(1, num_groups) / num_groups)
    return np.searchsorted(edges, values, side="left")


def tails(best: Float[np.ndarray, " activation"], baseline: Baseline, trim: float = 0.05, worst: float = 0.01) -> Tails:
    """Mean, median and trimmed FVE of one error per activation, and how much of the error the worst ones hold."""
    ranked = np.sort(np.asarray(best, dtype=np.float64))
    cut = int(trim * len(ranked))
    return Tails(
        fve=float(1 - ranked.mean() / baseline.value),
        fve_median=float(1 - np.median(ranked) / baseline.value),
        fve_trimmed=float(1 - ranked[cut : len(ranked) - cut].mean() / baseline.value),
        worst_share=worst_share(ranked, worst),
    )


def worst_share(errors: Float[np.ndarray, " activation"], worst: float = 0.01) -> float:
    """Share of the summed error that the worst activations hold (at least one); NaN where there is no error at all."""
    num_worst, total = max(1, round(worst * len(errors))), float(np.sum(errors))
    return float(np.sort(errors)[-num_worst:].sum()) / total if total > 0 else float("nan")
