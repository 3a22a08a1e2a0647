"""Best-of-K errors for every K from the same N draws, by order statistics.

Keeping the best of K is *oracle* selection: the AR that selects the explanation also scores it, with access to the
activation. It measures how good the best of K explanations is, not what a reader without the activation would select.

`prefix` selection takes the best of the first K draws instead, as the reference sweep does: unbiased too, but K = 1
uses one draw of N.

A failed draw (no closing tag, empty, cut off) is NaN. It uses up one of the K and is never kept over a success; only
where all K failed does the activation count with `failed_error`. A success may be worse than that: with errors
[failed, 3.0] and failed_error 2.0 the best of one is 2.5 on average and the best of two is 3.0, because the success is
kept. So a curve may fall where reconstructions point away from the activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from ksweep.stats.fve import ORTHOGONAL_ERROR

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

Selection = Literal["order_statistics", "prefix"]
"""order_statistics: mean over all subsets of K draws. prefix: the first K draws, as in the reference sweep."""


def best_errors(
    errors: Float[np.ndarray, "activation draw"],
    ks: Sequence[int],
    selection: Selection = "order_statistics",
    failed_error: float | Float[np.ndarray, " activation"] = ORTHOGONAL_ERROR,
) -> Float[np.ndarray, "activation k"]:
    """Return the best-of-K error of each activation, with either selection."""
    best_of = prefix_of_k_errors if _is_prefix(selection) else best_of_k_errors
    return best_of(errors, ks, failed_error)


def all_failed_rates(
    errors: Float[np.ndarray, "activation draw"], ks: Sequence[int], selection: Selection = "order_statistics"
) -> Float[np.ndarray, "activation k"]:
    """Return the probability that all K draws of an activation fail; with `prefix` 1 if the first K did, else 0."""
    if _is_prefix(selection):
        failed = np.isnan(_checked_errors(errors))
        return np.asarray(np.logical_and.accumulate(failed, axis=1)[:, _columns(ks, failed.shape[1])], dtype=np.float64)
    return best_of_k_failure_rates(errors, ks)


def best_errors_over_successes(
    errors: Float[np.ndarray, "activation draw"], ks: Sequence[int], selection: Selection = "order_statistics"
) -> Float[np.ndarray, "activation k"]:
    """Return the best-of-K error over the subsets of K draws with a success; NaN where there is none."""
    if _is_prefix(selection):
        return prefix_of_k_errors(errors, ks, np.nan)
    return best_of_k_errors_over_successes(errors, ks)


def select(
    quantity: Float[np.ndarray, "activation draw"],
    errors: Float[np.ndarray, "activation draw"],
    ks: Sequence[int],
    selection: Selection = "order_statistics",
    *,
    failed_value: float,
) -> Float[np.ndarray, "activation k"]:
    """Return another quantity (such as the cosine) of the draw that best-of-K keeps, with either selection."""
    chosen = prefix_of_k_select if _is_prefix(selection) else best_of_k_select
    return chosen(quantity, errors, ks, failed_value)


def _is_prefix(selection: Selection) -> bool:
    if selection not in get_args(Selection):
        raise ValueError(f"selection must be one of {', '.join(get_args(Selection))}; got {selection!r}")
    return selection == "prefix"


def _columns(ks: Sequence[int], num_draws: int) -> np.ndarray:
    return np.asarray(checked_ks(ks, num_draws)) - 1


def prefix_of_k_errors(
    errors: Float[np.ndarray, "activation draw"],
    ks: Sequence[int],
    failed_error: float | Float[np.ndarray, " activation"] = ORTHOGONAL_ERROR,
) -> Float[np.ndarray, "activation k"]:
    """Return the smallest error among the first K draws; failed draws (NaN) are skipped, K failures count as `failed_error`."""
    errors = _checked_errors(errors)
    best = np.fmin.accumulate(errors, axis=1)[:, _columns(ks, errors.shape[1])]
    instead = np.asarray(failed_error, dtype=np.float64)
    return np.where(np.isnan(best), instead[:, None] if instead.ndim else instead, best)


def prefix_of_k_select(
    quantity: Float[np.ndarray, "activation draw"],
    errors: Float[np.ndarray, "activation draw"],
    ks: Sequence[int],
    failed_value: float,
) -> Float[np.ndarray, "activation k"]:
    """Return another quantity of the draw with the smallest error among the first K; `failed_value` where all of them failed.

    A tie goes to the earlier draw.
    """
    errors = _checked_errors(errors)
    values = np.where(np.isnan(errors), failed_value, np.asarray(quantity, dtype=np.float64))
    ranked = np.where(np.isnan(errors), np.inf, errors)
    kept = [np.argmin(ranked[:, :k], axis=1) for k in checked_ks(ks, errors.shape[1])]
    return np.take_along_axis(values, np.stack(kept, axis=1), axis=1)


def best_of_k_weights(num_draws: int, ks: Sequence[int]) -> Float[np.ndarray, "rank k"]:
    """Return the probability that the i-th smallest of N draws is the smallest of K of them: C(N-i, K-1) / C(N, K).

    The weights of the unbiased max@k estimator (the continuous pass@k of Chen et al. 2021; PKPO, arXiv
    2505.15201; Tang et al. 2020). Drawing with replacement instead is biased: -0.19 sd at K = N = 32. Built
    as a running product of ratios (N-i-K+1)/(N-i) from K/N: no factorials, so good to 1e-12 at N = 10,000.
    """
    k = np.asarray(checked_ks(ks, num_draws))
    rank = np.arange(1, num_draws)[:, None]
    ratios = np.maximum(num_draws - rank - k + 1, 0) / (num_draws - rank)
    return np.asarray(np.cumprod(np.vstack([k / num_draws, ratios]), axis=0), dtype=np.float64)


def best_of_k_errors(
    errors: Float[np.ndarray, "activation draw"],
    ks: Sequence[int],
    failed_error: float | Float[np.ndarray, " activation"] = ORTHOGONAL_ERROR,
) -> Float[np.ndarray, "activation k"]:
    """Return the expected smallest error among K of the draws: the mean over all subsets of K (Chen et al. 2021).

    Unbiased for K fresh draws; K = 1 is the mean, K = N the minimum. `failed_error` may differ between
    activations: with raw scoring a failure can count as the zero vector, mean_j g_j^2.
    """
    ranked, instead = _ranked(errors), np.asarray(failed_error, dtype=np.float64)
    if instead.shape not in ((), ranked.shape[:1]):
        raise ValueError(f"failed_error is one number or one for each of {len(ranked)} activations; got shape {instead.shape}")
    ranked = np.where(np.isnan(ranked), instead[..., None], ranked)
    return np.asarray(ranked @ best_of_k_weights(ranked.shape[1], ks))


def best_of_k_failure_rates(errors: Float[np.ndarray, "activation draw"], ks: Sequence[int]) -> Float[np.ndarray, "activation k"]:
    """Return the probability that all K draws fail; at K = 1 the fraction of failed draws."""
    ranked = _ranked(errors)
    return np.asarray(np.isnan(ranked) @ best_of_k_weights(ranked.shape[1], ks))


def best_of_k_errors_over_successes(
    errors: Float[np.ndarray, "activation draw"], ks: Sequence[int]
) -> Float[np.ndarray, "activation k"]:
    """Return the expected smallest error among K draws, over the subsets of K with a success.

    NaN where no draw succeeded. K still counts every draw that was sampled, and an activation counts for all K
    or for none. Subsets of successes only would drop an activation from the curve once K exceeds its number of
    successes, and the harder activations first.
    """
    ranked = _ranked(errors)
    weights = best_of_k_weights(ranked.shape[1], ks)
    success = ~np.isnan(ranked)
    # An activation without success has 0/0. One with a success cannot: its best rank has weight K/N > 0.
    with np.errstate(invalid="ignore"):
        return np.asarray((np.where(success, ranked, 0.0) @ weights) / (success @ weights))


def best_of_k_select(
    quantity: Float[np.ndarray, "activation draw"],
    errors: Float[np.ndarray, "activation draw"],
    ks: Sequence[int],
    failed_value: float | None = None,
) -> Float[np.ndarray, "activation k"]:
    """Return the expected value of another quantity (cosine, tokens) of the draw with the smallest error among K.

    Draws are ranked by error and the same weights go to `quantity`, as in the best-of-n estimator of WebGPT
    (Nakano et al. 2021). Draws of equal error, and the failed ones among themselves, share the
    mean of their values, since any of them may be kept. `failed_value` is what a failed draw has (0.0 for cosine); without it the
    quantity's own values count (tokens were spent). A quantity that is NaN where it may be selected makes the
    result NaN.
    """
    quantity, errors = np.array(quantity, dtype=np.float64), _checked_errors(errors)
    if quantity.shape != errors.shape:
        raise ValueError(f"quantity has shape {quantity.shape} and errors {errors.shape}; both must be [activation, draw]")
    if failed_value is not None:
        quantity[np.isnan(errors)] = failed_value
    order = np.argsort(errors, axis=1)  # NaN, a failed draw, goes last
    shared = _mean_over_ties(np.take_along_axis(quantity, order, axis=1), np.take_along_axis(errors, order, axis=1))
    weights = best_of_k_weights(errors.shape[1], ks)
    unknown = np.isnan(shared)
    selected = np.where(unknown, 0.0, shared) @ weights
    selected[unknown @ (weights > 0)] = np.nan
    return np.asarray(selected)


def checked_ks(ks: Sequence[int], num_draws: int) -> list[int]:
    """Return the K as ints, each between 1 and the number of draws.

    Raises:
        ValueError: a K is not.
    """
    checked = [int(k) for k in ks if int(k) == k and k >= 1]
    if len(checked) != len(ks) or not checked:
        raise ValueError(f"K must be whole numbers of at least 1; got {list(ks)!r}")
    if max(checked) > num_draws:
        raise ValueError(
            f"best-of-{max(checked)} needs at least {max(checked)} draws per activation and there are "
            f"{num_draws}: raise sampling.num_draws or ask for a smaller K"
        )
    return checked


def _checked_errors(errors: Float[np.ndarray, "activation draw"]) -> Float[np.ndarray, "activation draw"]:
    errors = np.asarray(errors, dtype=np.float64)
    if errors.ndim != 2 or not errors.size:
        raise ValueError(f"errors must be [activation, draw] with at least one of each; got shape {errors.shape}")
    bad = np.isinf(errors) | (errors < 0)
    if bad.any():
        activation, draw = (int(where[0]) for where in np.nonzero(bad))
        raise ValueError(
            f"draw {draw} of activation {activation} has error {errors[activation, draw]}; "
            "an error is a finite number of at least 0, or NaN for a failed draw"
        )
    return errors


def _ranked(errors: Float[np.ndarray, "activation draw"]) -> Float[np.ndarray, "activation rank"]:
    """Return the errors of each activation from smallest to largest, failed draws (NaN) last."""
    return np.asarray(np.sort(_checked_errors(errors), axis=1))


def _mean_over_ties(
    quantity: Float[np.ndarray, "activation rank"], ranked: Float[np.ndarray, "activation rank"]
) -> Float[np.ndarray, "activation rank"]:
    same: Bool[np.ndarray, "activation rank"] = ranked[:, 1:] == ranked[:, :-1]
    same |= np.isnan(ranked[:, 1:]) & np.isnan(ranked[:, :-1])
    starts = np.column_stack([np.ones(len(ranked), dtype=bool), ~same])
    block = np.cumsum(starts.ravel()) - 1
    mean = np.bincount(block, weights=quantity.ravel()) / np.bincount(block)
    return np.asarray(mean[block].reshape(quantity.shape))


def kept_ks(ks: Sequence[int]) -> list[int]:
    """Return the K whose values are kept for each activation: powers of two, and the largest."""
    return [k for k in sorted(ks) if k & (k - 1) == 0 or k == max(ks)]
