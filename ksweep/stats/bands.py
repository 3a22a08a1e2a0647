"""Simultaneous bands over all K, gains per doubling of K, and which K have few independent subsets of draws.

A pointwise interval holds for one K named beforehand. A band is for choosing a K after seeing the whole curve.

There is deliberately no extrapolation beyond the number of draws N. The expected smallest error of K draws is a polynomial of
degree K in the distribution of draws, and no unbiased estimate of it exists from N < K draws (Halmos 1946). Errors below the
smallest observed one would depend on an assumed shape of the tail, which held-out draws cannot check either. Sample more draws
instead: earlier ones are kept, and only the missing ones cost anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ksweep.stats.bootstrap import FveCurve, Interval, interval_ends, interval_of, paired_difference, paired_with

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

FEWEST_SUBSETS = 2.0
"""Number of disjoint sets of K draws below which charts show a point lighter."""


def simultaneous_band(
    estimate: Float[np.ndarray, " k"],
    replicates: Float[np.ndarray, "replicate k"],
    effective_documents: float,
    level: float = 0.95,
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Return a band that covers the whole curve with probability `level`: the pointwise intervals, all stretched by one factor.

    For each replicate, take its deviation from the estimate over that of the pointwise quantile, at the K where this ratio
    is largest; the factor is the `level` quantile of these maxima (sup-t band; Montiel Olea and Plagborg-Moeller 2019, with
    quantiles instead of standard errors), with Student's quantile in place of the normal one of the same probability. Where
    nothing varies (a curve minus itself) the band has no width. It is NaN for one document, or where an estimate lies outside
    its quantiles.
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
    """Return Student's over the normal quantile at the stretched probability, relative to the ratio in `interval_reach`."""
    from scipy.special import ndtr, ndtri, stdtrit

    z = float(ndtri((1 + level) / 2))
    normal = np.array([z, min(stretch * z, 7.0)])  # beyond 7 probabilities are 1
    ratio = stdtrit(effective_documents + 1, ndtr(normal)) / normal
    return float(ratio[1] / ratio[0])


def curve_band(curve: FveCurve) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Return the simultaneous band of a curve; `fve_low` and `fve_high` are its pointwise intervals."""
    return simultaneous_band(curve.fve, curve.replicates, curve.effective_documents, curve.level)


def effective_subsets(num_draws: int, ks: Int[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    """Return N/K, the number of disjoint sets of K among the N draws of an activation."""
    return num_draws / np.asarray(ks, dtype=np.float64)


def few_subsets(num_draws: int, ks: Int[np.ndarray, " k"]) -> Bool[np.ndarray, " k"]:
    """Return whether all subsets of K draws share most of their draws (N/K < 2); False for K = 1.

    The estimate remains unbiased and the interval over documents valid, but averaging within an activation is lost: at K = N
    there is one subset.
    """
    ks = np.asarray(ks)
    return np.asarray((effective_subsets(num_draws, ks) < FEWEST_SUBSETS) & (ks > 1))


def gain_per_doubling(curve: FveCurve, level: float = 0.95) -> tuple[list[int], Interval]:
    """Return each K whose double is on the curve too, and FVE at 2K minus FVE at K, paired."""
    index_of = {int(k): i for i, k in enumerate(curve.k)}
    starts = [k for k in index_of if 2 * k in index_of]
    if not starts:
        raise ValueError(f"no K of the curve has its double on it: {', '.join(map(str, index_of))}; ask for 1, 2, 4, ...")
    low, high = [index_of[k] for k in starts], [index_of[2 * k] for k in starts]
    replicates = curve.replicates[:, high] - curve.replicates[:, low]
    return starts, interval_of(curve.fve[high] - curve.fve[low], replicates, curve.resampling, level)


def mean_gain_per_doubling(curve: FveCurve, level: float = 0.95) -> Interval:
    """Return (FVE at the largest K - FVE at the smallest) / number of doublings between them, paired, as one entry."""
    first, last = int(curve.k.argmin()), int(curve.k.argmax())
    doublings = np.log2(curve.k[last] / curve.k[first])
    if doublings == 0:
        raise ValueError(f"the curve has one K, {curve.k[first]}: a gain needs two")
    replicates = (curve.replicates[:, [last]] - curve.replicates[:, [first]]) / doublings
    return interval_of((curve.fve[[last]] - curve.fve[[first]]) / doublings, replicates, curve.resampling, level)


def tokens_drawn(num_tokens: Float[np.ndarray, "activation draw"], ks: Int[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    """Return tokens sampled per activation for a best of K: mean length of a draw times K, failed draws included."""
    return float(np.mean(num_tokens)) * np.asarray(ks, dtype=np.float64)


def difference_at_own_best(curve: FveCurve, reference: FveCurve, level: float = 0.95) -> tuple[int, int, Interval]:
    """Return the two K where the curves are highest, and the difference of these highest FVEs, paired, as one entry.

    For cells with different numbers of draws, such as greedy decoding with one. Apart from ties and failures a curve is highest
    at its largest K, so that choosing this K hardly biases the difference.
    """
    paired_with(curve, reference)
    i, j = int(np.argmax(curve.fve)), int(np.argmax(reference.fve))
    replicates = curve.replicates[:, [i]] - reference.replicates[:, [j]]
    interval = interval_of(curve.fve[[i]] - reference.fve[[j]], replicates, curve.resampling, level)
    return int(curve.k[i]), int(reference.k[j]), interval


def difference_band(
    curve: FveCurve, reference: FveCurve, level: float = 0.95
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Return the simultaneous band of `paired_difference`."""
    difference = paired_difference(curve, reference, level)
    return simultaneous_band(difference.estimate, curve.replicates - reference.replicates, curve.effective_documents, level)
