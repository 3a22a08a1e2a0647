"""FVE within groups of activations, against two baselines; and where the error sits.

`own`: distances from the group's own mean, 1 - sum E / sum |x - mean_group|^2. Knowing which group an activation belongs to
explains nothing here; it is the FVE that would have been measured on that group alone. Small groups of alike vectors (special
tokens) have hardly any variance of their own and may come out far below zero.

`overall`: the baseline value of all activations for every group. The groups' FVEs, weighted by their sizes, average to the whole
FVE, so this one says where the total is lost; a group near the common mean looks good here without a word of explanation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ksweep.stats.bootstrap import FveCurve, fve_curve
from ksweep.stats.documents import unique_documents
from ksweep.stats.fve import Baseline, ScoringKind, comparable_chunks

if TYPE_CHECKING:
    from jaxtyping import Float, Int

GroupBaseline = Literal["own", "overall"]


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupCurve:
    """The curve of one group."""

    group: str
    curve: FveCurve
    against: GroupBaseline


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
    errors: Float[np.ndarray, "activation draw"],
    documents: Sequence[str] | Sequence[int] | np.ndarray,
    groups: Sequence[str] | np.ndarray,
    baseline: Baseline,
    distances: Float[np.ndarray, " activation"] | None,
    *,
    ks: Sequence[int],
    failed_error: float | Float[np.ndarray, " activation"] | None = None,
    num_replicates: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> list[GroupCurve]:
    """A curve for each group, sorted by name, with intervals over the documents that the group occurs in.

    `distances` are those from the group's own mean (`within_group_distances`) and give `own`; without them the value of
    `baseline` is taken for all, `overall`. A group without variance of its own has no `own` curve. The value of `overall` is
    taken as known in its intervals.
    """
    documents, (names, membership) = np.asarray(documents), unique_documents(groups)
    found = []
    for i, name in enumerate(names):
        rows = np.flatnonzero(membership == i)
        of_group = _baseline(baseline, None if distances is None else distances[rows])
        if of_group is None:
            continue
        failed = failed_error[rows] if isinstance(failed_error, np.ndarray) else failed_error
        curve = fve_curve(
            errors[rows], documents[rows], of_group, ks=ks, failed_error=failed, num_replicates=num_replicates, seed=seed,
            level=level,
        )  # fmt: skip
        found.append(GroupCurve(group=name, curve=curve, against="overall" if distances is None else "own"))
    return found


def quantile_groups(values: Float[np.ndarray, " activation"], num_groups: int = 4) -> Int[np.ndarray, " activation"]:
    """0 for the lowest part of the values, `num_groups` - 1 for the highest; equal values go together."""
    values = np.asarray(values, dtype=np.float64)
    edges = np.quantile(values, np.arange(1, num_groups) / num_groups)
    return np.searchsorted(edges, values, side="left")


def tails(best: Float[np.ndarray, " activation"], baseline: Baseline, trim: float = 0.05, worst: float = 0.01) -> Tails:
    """Mean, median and trimmed FVE of one error per activation, and how much of the error the worst ones hold."""
    ranked = np.sort(np.asarray(best, dtype=np.float64))
    cut, num_worst = int(trim * len(ranked)), max(1, round(worst * len(ranked)))
    total = ranked.sum()
    return Tails(
        fve=float(1 - ranked.mean() / baseline.value),
        fve_median=float(1 - np.median(ranked) / baseline.value),
        fve_trimmed=float(1 - ranked[cut : len(ranked) - cut].mean() / baseline.value),
        worst_share=float(ranked[-num_worst:].sum() / total) if total else float("nan"),
    )


def _baseline(overall: Baseline, distances: Float[np.ndarray, " activation"] | None) -> Baseline | None:
    if distances is None:
        return Baseline(
            value=overall.value, kind="stated constant", num_activations=overall.num_activations, scoring=overall.scoring
        )
    value = float(distances.mean())
    if not value > 1e-10 * overall.value:
        return None
    return Baseline(
        value=value, kind="distance from mean", num_activations=len(distances), scoring=overall.scoring, distances=distances
    )
