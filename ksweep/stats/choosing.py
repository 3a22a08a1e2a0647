"""Best-of-K chosen by one score and reported in another.

Where the AR that selects an explanation also scores it, the curve is what an oracle gets. A curve whose draws are chosen by
another score (another AR, a judge, a length) and whose error is the reporting AR's says how much of that survives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ksweep.stats.best_of_k import Selection, checked_ks, select
from ksweep.stats.bootstrap import FveCurve, check_aligned, curve_of_kept, document_weights, interval_ends, replicate_sums
from ksweep.stats.documents import effective_number, unique_documents
from ksweep.stats.fve import ORTHOGONAL_ERROR, Baseline

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True, kw_only=True, eq=False)
class ChosenMean:
    """Mean of a score of the chosen draw against K; every array has one entry per K."""

    k: Int[np.ndarray, " k"]
    mean: Float[np.ndarray, " k"]
    """Mean over activations and sets of K draws, of those whose chosen draw has a value; NaN if none has."""
    low: Float[np.ndarray, " k"]
    high: Float[np.ndarray, " k"]
    """Interval over documents."""
    share_with_value: Float[np.ndarray, " k"]
    """Share of the chosen draws that have a value."""
    num_documents: int
    effective_documents: float
    level: float
    replicates: Float[np.ndarray, "replicate k"] = field(repr=False)


def chosen_curve(
    errors: Float[np.ndarray, "activation draw"],
    choice: Float[np.ndarray, "activation draw"],
    documents: Sequence[str] | Sequence[int] | np.ndarray,
    baseline: Baseline,
    *,
    ks: Sequence[int] | None = None,
    failed_error: float = ORTHOGONAL_ERROR,
    num_replicates: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    selection: Selection = "order_statistics",
) -> FveCurve:
    """Return FVE by the reporting AR of the draw with the smallest `choice` among K, with the intervals of `fve_curve`.

    With `choice` equal to `errors` it is the oracle's curve. The replicates are those of `fve_curve` with the same seed, so that
    the two curves can be subtracted.

    Args:
        errors: error by the reporting AR; NaN where the draw failed.
        choice: score that chooses, smaller is better; NaN where it is unknown. A draw that failed or has no score is chosen only
            among others such.
        documents: document of each activation.
        baseline: of the activations.
        ks: values of K; None takes 1 to the number of draws.
        failed_error: error of a chosen draw that failed.
        num_replicates: bootstrap replicates.
        seed: seed of the bootstrap.
        level: nominal coverage.
        selection: as in `fve_curve`.
    """
    errors, choice = _aligned(errors, choice)
    documents = np.asarray(documents)
    check_aligned(errors, documents, baseline)
    num_draws = errors.shape[1]
    ks = checked_ks(range(1, num_draws + 1) if ks is None else ks, num_draws)
    failed = np.isnan(errors)
    ranks = _ranks(np.where(failed, np.nan, choice))
    chosen = partial(select, errors=ranks, ks=ks, selection=selection, failed_value=np.nan)
    best, failures = chosen(np.where(failed, failed_error, errors)), chosen(failed.astype(np.float64))
    succeeds = 1 - failures > 1e-12
    over_successes = np.divide(
        chosen(np.where(failed, 0.0, errors)), 1 - failures, out=np.full_like(best, np.nan), where=succeeds
    )
    return curve_of_kept(
        best, failures, over_successes, documents, baseline, ks=ks, num_draws=num_draws,
        num_without_success=int(failed.all(axis=1).sum()), num_replicates=num_replicates, seed=seed, level=level,
    )  # fmt: skip


def chosen_mean(
    values: Float[np.ndarray, "activation draw"],
    choice: Float[np.ndarray, "activation draw"],
    documents: Sequence[str] | Sequence[int] | np.ndarray,
    *,
    ks: Sequence[int] | None = None,
    num_replicates: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    selection: Selection = "order_statistics",
) -> ChosenMean:
    """Return the mean of a score of the draw with the smallest `choice` among K, with a bootstrap interval over documents.

    Args:
        values: the score that is reported (a judge's, a length); NaN where a draw has none. Such draws take part in the choice
            and are left out of the mean.
        choice: score that chooses, smaller is better; NaN as in `chosen_curve`.
        documents: document of each activation.
        ks: values of K; None takes 1 to the number of draws.
        num_replicates: bootstrap replicates.
        seed: seed of the bootstrap.
        level: nominal coverage.
        selection: as in `fve_curve`.
    """
    values, choice = _aligned(values, choice)
    num_draws = values.shape[1]
    ks = checked_ks(range(1, num_draws + 1) if ks is None else ks, num_draws)
    known = ~np.isnan(values)
    chosen = partial(select, errors=_ranks(choice), ks=ks, selection=selection, failed_value=np.nan)
    sums, shares = chosen(np.where(known, values, 0.0)), chosen(known.astype(np.float64))
    names, membership = unique_documents(documents)
    weights = document_weights(len(names), num_replicates, seed)
    resampled = replicate_sums(np.column_stack([sums, shares]), membership, weights)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = sums.sum(axis=0) / shares.sum(axis=0)
        replicates = resampled[:, : len(ks)] / resampled[:, len(ks) :]
    # A replicate without a value has no mean: it counts with the estimate.
    replicates = np.where(np.isfinite(replicates), replicates, mean)
    effective = effective_number(np.bincount(membership))
    low, high = interval_ends(mean, replicates, effective, level)
    return ChosenMean(
        k=np.asarray(ks), mean=mean, low=low, high=high, share_with_value=shares.mean(axis=0), num_documents=len(names),
        effective_documents=effective, level=level, replicates=replicates,
    )  # fmt: skip


def _ranks(choice: Float[np.ndarray, "activation draw"]) -> Float[np.ndarray, "activation draw"]:
    """Return the rank of each draw within its activation; equal scores share one, and so do unknown ones, behind all others."""
    order = np.argsort(choice, axis=1, kind="stable")  # NaN last
    ordered = np.take_along_axis(choice, order, axis=1)
    steps = np.column_stack([np.zeros(len(choice)), ordered[:, 1:] > ordered[:, :-1]]).cumsum(axis=1)
    ranks = np.empty_like(steps)
    np.put_along_axis(ranks, order, np.where(np.isnan(ordered), choice.shape[1], steps), axis=1)
    return ranks


def _aligned(
    values: Float[np.ndarray, "activation draw"], choice: Float[np.ndarray, "activation draw"]
) -> tuple[Float[np.ndarray, "activation draw"], Float[np.ndarray, "activation draw"]]:
    values, choice = np.asarray(values, dtype=np.float64), np.asarray(choice, dtype=np.float64)
    if values.shape != choice.shape or values.ndim != 2:
        raise ValueError(f"values and choice must both be [activation, draw]; got shapes {values.shape} and {choice.shape}")
    return values, choice
