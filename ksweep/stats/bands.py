"""Bands that hold for all K at once, which K deserve less trust, and what a doubling of K buys.

A pointwise interval holds for one K named beforehand. Whoever looks at a whole curve and picks a point looks at many: the band
is for them.

There is no prediction for K beyond the number of draws N, on purpose. The expected smallest of K draws is a polynomial of degree
K in the draws' distribution, and from N < K draws no unbiased estimate of it exists (Halmos 1946). What lies below the smallest
draw seen would come from an assumed shape of the tail, and a check on held-out draws reaches no further than the draws do. Take
more draws: earlier ones are kept, and only the missing ones cost anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

from ksweep.stats.bootstrap import FveCurve, Interval, interval_ends, interval_of, paired_difference, paired_with

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

FEWEST_SUBSETS = 2.0
"""Disjoint sets of K that the draws of an activation must hold for a point to be drawn in full."""


def simultaneous_band(
    estimate: Float[np.ndarray, " k"],
    replicates: Float[np.ndarray, "replicate k"],
    effective_documents: float,
    level: float = 0.95,
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Band that covers the whole curve with probability `level`: the pointwise intervals stretched about the estimate, all alike.

    The stretch is the `level` quantile over replicates of how many times the way from the estimate to the pointwise quantiles a
    replicate goes, at the K where it goes farthest (max-t; Montiel Olea and Plagborg-Moeller 2019, with quantiles for the
    standard errors), and Student's quantile in place of the normal one of the same probability. Where nothing varies (a curve
    less itself) the band has no width. From one document, or where an estimate lies outside its quantiles, it is unknown: NaN.
    """
    low, high = interval_ends(estimate, replicates, effective_documents, level)
    below, above = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2], axis=0) - estimate
    varies = above - below > 1e-7 * np.abs(estimate).max()  # more than the rounding to float32
    if not np.isfinite(low).all() or (below[varies] >= 0).any() or (above[varies] <= 0).any():
        nothing = np.full(len(estimate), np.nan)
        return nothing, nothing.copy()
    if not varies.any():
        return low, high
    deviation = (replicates - estimate)[:, varies]
    farthest = np.maximum(deviation / below[varies], deviation / above[varies]).max(axis=1)
    stretch = max(1.0, float(np.quantile(farthest, level, method="inverted_cdf")))
    stretch *= _student_over_normal(stretch, effective_documents, level)
    return estimate + stretch * (low - estimate), estimate + stretch * (high - estimate)


def _student_over_normal(stretch: float, effective_documents: float, level: float) -> float:
    """How much farther Student's quantile lies out than the normal one, compared with where `interval_reach` has it already."""
    z = float(ndtri((1 + level) / 2))
    normal = np.array([z, min(stretch * z, 7.0)])  # beyond 7 probabilities are 1
    ratio = stdtrit(effective_documents + 1, ndtr(normal)) / normal
    return float(ratio[1] / ratio[0])


def curve_band(curve: FveCurve) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """The simultaneous band of a curve, beside its pointwise `fve_low` and `fve_high`."""
    return simultaneous_band(curve.fve, curve.replicates, curve.effective_documents, curve.level)


def effective_subsets(num_draws: int, ks: Int[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    """Disjoint sets of K among the draws of an activation, N/K: how many independent looks at best-of-K each one gives."""
    return num_draws / np.asarray(ks, dtype=np.float64)


def few_subsets(num_draws: int, ks: Int[np.ndarray, " k"]) -> Bool[np.ndarray, " k"]:
    """Whether K is so near to N that all its subsets share most of their draws (N/K < 2); K = 1 of one draw is not meant.

    The estimate stays unbiased and the interval over documents holds; what is lost is averaging within an activation: at K = N
    one lucky draw stands for all subsets.
    """
    ks = np.asarray(ks)
    return np.asarray((effective_subsets(num_draws, ks) < FEWEST_SUBSETS) & (ks > 1))


def gain_per_doubling(curve: FveCurve, level: float = 0.95) -> tuple[list[int], Interval]:
    """FVE at 2K less FVE at K, for each K of the curve whose double is on it too, paired; and those K."""
    at = {int(k): i for i, k in enumerate(curve.k)}
    starts = [k for k in at if 2 * k in at]
    if not starts:
        raise ValueError(f"no K of the curve has its double on it: {', '.join(map(str, at))}; ask for 1, 2, 4, ...")
    low, high = [at[k] for k in starts], [at[2 * k] for k in starts]
    replicates = curve.replicates[:, high] - curve.replicates[:, low]
    return starts, interval_of(curve.fve[high] - curve.fve[low], replicates, curve.resampling, level)


def mean_gain_per_doubling(curve: FveCurve, level: float = 0.95) -> Interval:
    """(FVE at the largest K - FVE at the smallest) / doublings between them: one number for a curve, paired; one entry."""
    first, last = int(curve.k.argmin()), int(curve.k.argmax())
    doublings = np.log2(curve.k[last] / curve.k[first])
    if doublings == 0:
        raise ValueError(f"the curve has one K, {curve.k[first]}: a gain needs two")
    replicates = (curve.replicates[:, [last]] - curve.replicates[:, [first]]) / doublings
    return interval_of((curve.fve[[last]] - curve.fve[[first]]) / doublings, replicates, curve.resampling, level)


def tokens_drawn(num_tokens: Float[np.ndarray, "activation draw"], ks: Int[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    """Tokens sampled per activation for a best of K: mean length of a draw times K. Failed draws were paid for too."""
    return float(np.mean(num_tokens)) * np.asarray(ks, dtype=np.float64)


def difference_at_own_best(curve: FveCurve, reference: FveCurve, level: float = 0.95) -> tuple[int, int, Interval]:
    """Highest FVE of `curve` less highest FVE of `reference`, each at the K where it is highest; the two K, and one entry.

    For cells with different numbers of draws, such as greedy decoding, which has one. A curve is highest at its largest K but for
    ties and failures, so picking that K flatters hardly at all.
    """
    paired_with(curve, reference)
    ours, theirs = int(np.argmax(curve.fve)), int(np.argmax(reference.fve))
    replicates = curve.replicates[:, [ours]] - reference.replicates[:, [theirs]]
    interval = interval_of(curve.fve[[ours]] - reference.fve[[theirs]], replicates, curve.resampling, level)
    return int(curve.k[ours]), int(reference.k[theirs]), interval


def difference_band(
    curve: FveCurve, reference: FveCurve, level: float = 0.95
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """The simultaneous band of `paired_difference`."""
    difference = paired_difference(curve, reference, level)
    return simultaneous_band(difference.estimate, curve.replicates - reference.replicates, curve.effective_documents, level)
