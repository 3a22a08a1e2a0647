"""Bootstrap intervals: resample whole documents, recompute FVE as a ratio, with the same replicates for every K and every cell.

Activations of one document are alike, so whole documents are resampled (cluster bootstrap, Davison and Hinkley 1997, 3.8):
resampling activations as if independent covered 72 % instead of 95 % in simulation. The draws of an activation are never
resampled: the smallest of N resampled draws is not distributed like the smallest of N fresh ones (60 % coverage at K = N). Their
randomness is already part of the spread between activations.

The replicates depend only on the documents and the seed, not on row order, K, temperature or checkpoint. Two curves over the
same documents therefore share them, and a difference is computed replicate by replicate.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from ksweep.stats.best_of_k import Selection, all_failed_rates, best_errors, best_errors_over_successes, checked_ks
from ksweep.stats.documents import effective_number, unique_documents
from ksweep.stats.fve import MEASURED_KINDS, ORTHOGONAL_ERROR, Baseline

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int

FEW_DOCUMENTS = 20
"""With fewer effective documents an interval may cover less than its nominal level: a rare failure or a heavy tail that none of
them shows is not in it. Ten documents of equal size cover 90 to 94 % instead of 95 % in simulation."""

ASYMMETRY = 1.5
"""Distance between the middle of an interval and the estimate, as a multiple of that between the middle of the quantiles and the
estimate. A percentile interval of a mean has a third of the asymmetry that skewed values require (Hesterberg 2015). The full
factor of 3 adds noise where differences have heavy tails; 1.5 covered best over cells and differences."""

_CHUNK_REPLICATES = 256
"""Replicates whose weights are float64 at once: 20 MiB for 10,000 documents."""


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """Properties that two sets of replicates must share to be paired."""

    documents_digest: str
    num_documents: int
    effective_documents: float
    """(sum n)^2 / sum n^2, n the activations of each document."""
    num_replicates: int
    seed: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Interval:
    """An estimate with its interval over documents, one entry per K."""

    estimate: Float[np.ndarray, " k"]
    low: Float[np.ndarray, " k"]
    high: Float[np.ndarray, " k"]
    level: float
    num_replicates: int
    num_documents: int
    effective_documents: float

    @property
    def few_documents(self) -> bool:
        """Whether the interval needs a warning: see FEW_DOCUMENTS."""
        return self.effective_documents < FEW_DOCUMENTS


@dataclass(frozen=True, kw_only=True, eq=False)
class FveCurve:
    """FVE against K for one cell; every array has one entry per K."""

    k: Int[np.ndarray, " k"]
    fve: Float[np.ndarray, " k"]
    """1 - error / baseline. A failed draw uses up one of the K."""
    fve_low: Float[np.ndarray, " k"]
    fve_high: Float[np.ndarray, " k"]
    """Interval over documents; NaN if there is only one."""
    error: Float[np.ndarray, " k"]
    """Mean best-of-K error; with normalised scoring the mean cosine is 1 - error / 2, where a failure counts as 0."""
    failure_rate: Float[np.ndarray, " k"]
    """Expected fraction of activations whose K draws all fail; at K = 1 the fraction of failed draws."""
    fve_over_successes: Float[np.ndarray, " k"]
    """`fve` over the sets of K draws with a success, with the same baseline; NaN if no draw succeeded."""
    num_without_success: int
    """Number of activations without a successful draw, which `fve_over_successes` leaves out."""
    baseline: Baseline
    num_activations: int
    num_draws: int
    level: float
    """Nominal coverage of the interval, for each K by itself."""
    resampling: Resampling
    replicates: Float[np.ndarray, "replicate k"] = field(repr=False)
    """FVE in each bootstrap replicate, for paired comparisons; rounded to float32, as the registry stores it, so that both give
    the same digits."""

    @property
    def num_documents(self) -> int:
        """Number of documents, the clusters of the bootstrap."""
        return self.resampling.num_documents

    @property
    def effective_documents(self) -> float:
        """(sum n)^2 / sum n^2, n the activations of each document."""
        return self.resampling.effective_documents

    @property
    def few_documents(self) -> bool:
        """Whether the interval needs a warning: see FEW_DOCUMENTS."""
        return self.effective_documents < FEW_DOCUMENTS


def fve_curve(
    errors: Float[np.ndarray, "activation draw"],
    documents: Sequence[str] | Sequence[int] | np.ndarray,
    baseline: Baseline,
    *,
    ks: Sequence[int] | None = None,
    failed_error: float | Float[np.ndarray, " activation"] | None = None,
    num_replicates: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    selection: Selection = "order_statistics",
) -> FveCurve:
    """Return FVE for each K (by default 1 to the number of draws) with a bootstrap interval over documents.

    `selection="prefix"` takes the best of the first K draws, errors and failures alike, as the reference sweep does.

    Coverage of the population's FVE at nominal 95 %, K = 1, 4, 16, with heavy tails and 5 % clustered failures
    (scripts/simulate_coverage.py, standard error 0.5 %): 94 to 96 % with 10 to 80 documents of uneven size (5 to 27
    effective), 93 to 96 % with 20 to 80 of equal size, 91 to 94 % with 10 of equal size, for a baseline between documents and
    a stated one alike. Sizes were independent of errors there. Where larger documents are harder (errors proportional to
    size^0.25, log-normal sizes) the rare very large ones are missing from the sample: 73 to 85 %.
    """
    errors, documents = np.asarray(errors, dtype=np.float64), np.asarray(documents)
    check_aligned(errors, documents, baseline)
    _check_level(level)
    num_draws = errors.shape[1]
    ks = checked_ks(range(1, num_draws + 1) if ks is None else ks, num_draws)
    best = best_errors(errors, ks, selection, _failed_error(failed_error, errors, baseline))
    return curve_of_kept(
        best, all_failed_rates(errors, ks, selection), best_errors_over_successes(errors, ks, selection), documents, baseline,
        ks=ks, num_draws=num_draws, num_without_success=int(np.isnan(errors).all(axis=1).sum()),
        num_replicates=num_replicates, seed=seed, level=level,
    )  # fmt: skip


def curve_of_kept(
    best: Float[np.ndarray, "activation k"],
    all_failed: Float[np.ndarray, "activation k"],
    over_successes: Float[np.ndarray, "activation k"],
    documents: np.ndarray,
    baseline: Baseline,
    *,
    ks: Sequence[int],
    num_draws: int,
    num_without_success: int,
    num_replicates: int,
    seed: int,
    level: float,
) -> FveCurve:
    """Return the curve of draws that were kept by any rule, with its interval over documents.

    Args:
        best: expected error of the kept draw of each activation.
        all_failed: probability that the kept draw is a failed one.
        over_successes: expected error where it is not; NaN where it always is.
        documents: document of each activation.
        baseline: of the activations.
        ks: the K of the columns.
        num_draws: draws of each activation.
        num_without_success: activations of which every draw failed.
        num_replicates: bootstrap replicates.
        seed: seed of the bootstrap.
        level: nominal coverage.
    """
    replicates, resampling = _bootstrap(best, documents, baseline, num_replicates, seed)
    error = best.mean(axis=0)
    estimate = 1 - error / baseline.value
    low, high = interval_ends(estimate, replicates, resampling.effective_documents, level)
    return FveCurve(
        k=np.asarray(ks),
        fve=estimate,
        fve_low=low,
        fve_high=high,
        error=error,
        failure_rate=all_failed.mean(axis=0),
        fve_over_successes=1 - _nan_mean(over_successes) / baseline.value,
        num_without_success=num_without_success,
        baseline=baseline,
        num_activations=len(best),
        num_draws=num_draws,
        level=level,
        resampling=resampling,
        replicates=replicates,
    )


def _bootstrap(
    best: Float[np.ndarray, "activation k"], documents: np.ndarray, baseline: Baseline, num_replicates: int, seed: int
) -> tuple[Float[np.ndarray, "replicate k"], Resampling]:
    """Return FVE in each bootstrap replicate over documents, and how the documents were resampled.

    In each replicate a document counts as often as it was drawn, in the numerator and, for a measured baseline, in the
    denominator: 1 - sum_c w_c E_c / sum_c w_c D_c. The distances D are those of the full set, which captures the first-order
    effect. Measuring the distance from the mean again in every replicate would subtract |mu_r - mu|^2 / d, nearly a constant
    in high dimension: the interval would move off its estimate by up to (1 - FVE) / documents. At d = 256, with half of the
    variance between documents, 40 documents would cover 86 % instead of 94 %, and 20 documents 74 % instead of 92 %.
    """
    names, membership = unique_documents(documents)
    weights = document_weights(len(names), num_replicates, seed)
    sums = replicate_sums(np.column_stack([best, baseline.parts(len(best))]), membership, weights)
    resampling = Resampling(
        documents_digest=hashlib.sha256("\0".join(names).encode()).hexdigest(),
        num_documents=len(names),
        effective_documents=effective_number(np.bincount(membership)),
        num_replicates=num_replicates,
        seed=seed,
    )
    return fve_replicates(sums[:, :-1], sums[:, -1]), resampling


def paired_difference(curve: FveCurve, reference: FveCurve, level: float = 0.95) -> Interval:
    """Return FVE of `curve` minus FVE of `reference` at each K, paired: variation that both share (hard documents) cancels."""
    if curve.k.tolist() != reference.k.tolist():
        raise ValueError(f"the curves have different K: {_brief(curve.k)} and {_brief(reference.k)}; pass the same `ks`")
    paired_with(curve, reference)
    return interval_of(curve.fve - reference.fve, curve.replicates - reference.replicates, curve.resampling, level)


def paired_with(curve: FveCurve, reference: FveCurve) -> None:
    """Raise ValueError for two curves that do not share their replicates."""
    a, b = curve.resampling, reference.resampling
    if a != b:
        raise ValueError(
            "the curves were not resampled alike, so their difference cannot be paired: "
            f"{a.num_documents} and {b.num_documents} documents"
            f"{' (not the same ones)' if a.documents_digest != b.documents_digest else ''}, "
            f"{a.num_replicates} and {b.num_replicates} replicates, "
            f"seeds {a.seed} and {b.seed}; recompute both over the same documents, with the same replicates and seed"
        )


def gain_over(curve: FveCurve, k: int = 1, level: float = 0.95) -> Interval:
    """Return FVE at each K minus FVE at one K of the same curve, paired: the gain from more draws."""
    if k not in curve.k:
        raise ValueError(f"the curve has no K = {k}; it has {_brief(curve.k)}")
    index = int(np.flatnonzero(curve.k == k)[0])
    return interval_of(curve.fve - curve.fve[index], curve.replicates - curve.replicates[:, [index]], curve.resampling, level)


@lru_cache(maxsize=2)  # the cells of a sweep ask for the same weights one after another
def document_weights(num_documents: int, num_replicates: int, seed: int) -> Int[np.ndarray, "replicate document"]:
    """Return how often each document is drawn, with replacement, in each replicate (read-only).

    Row r depends only on the seed, r and the number of documents: more replicates continue the same sequence.
    """
    if num_replicates < 2:
        raise ValueError(f"a bootstrap needs at least 2 replicates (2000 for a 95 % interval); got {num_replicates}")
    generator = np.random.default_rng(seed)
    weights = np.empty((num_replicates, num_documents), dtype=np.int32)
    for start in range(0, num_replicates, _CHUNK_REPLICATES):
        chunk = weights[start : start + _CHUNK_REPLICATES]
        drawn = generator.integers(num_documents, size=chunk.shape)
        drawn += np.arange(len(chunk))[:, None] * num_documents
        chunk[:] = np.bincount(drawn.ravel(), minlength=chunk.size).reshape(chunk.shape)
    weights.flags.writeable = False
    return weights


def interval_ends(
    estimate: Float[np.ndarray, " k"],
    replicates: Float[np.ndarray, "replicate k"],
    effective_documents: float,
    level: float = 0.95,
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Return the ends of an interval over documents, from what the registry keeps: estimate, replicates, one number for all.

        estimate + ASYMMETRY (middle of the quantiles - estimate) -/+ reach (half of their distance)

    with the quantiles of the replicates at (1 -/+ level) / 2, linearly interpolated (NumPy's default, DuckDB's `quantile_cont`),
    and `interval_reach`. With a single document both ends are NaN.
    """
    _check_level(level)
    if not effective_documents > 1:
        unknown = np.full(replicates.shape[1:], np.nan)
        return unknown, unknown.copy()
    below, above = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2], axis=0)
    middle = estimate + ASYMMETRY * ((below + above) / 2 - estimate)
    half = interval_reach(effective_documents, level) * (above - below) / 2
    return middle - half, middle + half


def interval_reach(effective_documents: float, level: float = 0.95) -> float:
    """Return how far an interval reaches relative to its replicates' quantiles: (n + 1) / n t / z, n the effective documents.

    A percentile interval is too narrow with few clusters, as a normal interval with the n-divisor variance is (Hesterberg 2015,
    "What Teachers Should Know About the Bootstrap"), and clusters of unequal size are worth fewer equal ones (Carter, Schnepel &
    Steigerwald 2017). z is the normal quantile and t Student's; n + 1 degrees of freedom and (n + 1) / n covered 93 to 97 % where
    the textbook's n - 1 and sqrt(n / (n - 1)) cover 97.5 % at n = 5 and 1 % too little at n = 27 (scripts/simulate_coverage.py).
    """
    from scipy.special import ndtri, stdtrit  # a fifth of a second, which most commands do without

    n, probability = effective_documents, (1 + level) / 2
    return float((n + 1) / n * stdtrit(n + 1, probability) / ndtri(probability))


def interval_decimals(low: float, high: float, num_replicates: int, level: float = 0.95) -> int:
    """Return how many decimals (1 to 3) of interval ends are reproducible: another seed changes the last one by at most one.

    The quantile p of R replicates of standard deviation s varies by s sqrt(p (1 - p) / R) / phi(z_p) from seed to seed (phi the
    normal density), an end by at most sqrt((1 + ASYMMETRY^2) / 2) times that. Twice the result is to stay within one unit of the
    last decimal. An unknown interval has 3.
    """
    from scipy.special import ndtri

    tail = (1 - level) / 2
    z = float(ndtri(1 - tail))
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    of_quantile = (high - low) / (2 * z) * np.sqrt(tail * (1 - tail) / num_replicates) / density
    deviation = of_quantile * np.sqrt((1 + ASYMMETRY**2) / 2)
    return 3 if not deviation > 0 else int(np.clip(np.floor(-np.log10(2 * deviation)), 1, 3))


def fve_replicates(
    errors: Float[np.ndarray, "replicate k"], distances: Float[np.ndarray, " replicate"]
) -> Float[np.ndarray, "replicate k"]:
    """Return FVE from each replicate's means, rounded to float32 as the registry stores it.

    A replicate of identical documents has no variance to explain. It counts as having 1 % of the usual variance: its FVE lies far
    out, and differences of two such FVEs are still numbers.
    """
    fve = 1 - errors / np.maximum(distances, 0.01 * distances.mean())[:, None]
    return np.asarray(fve.astype(np.float32), dtype=np.float64)


def _nan_mean(values: Float[np.ndarray, "activation k"]) -> Float[np.ndarray, " k"]:
    """Return the mean over activations without NaN; NaN where all are NaN."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.nansum(values, axis=0) / (~np.isnan(values)).sum(axis=0))


def replicate_sums(
    values: Float[np.ndarray, "activation value"],
    membership: Int[np.ndarray, " activation"],
    weights: Int[np.ndarray, "replicate document"],
) -> Float[np.ndarray, "replicate value"]:
    """Return the sums over each replicate of `document_weights`; summed by document first, so that the product stays small."""
    order = np.argsort(membership, kind="stable")
    starts = np.flatnonzero(np.diff(membership[order], prepend=-1))
    per_document = np.add.reduceat(values[order], starts, axis=0)
    return np.concatenate(
        [
            weights[start : start + _CHUNK_REPLICATES].astype(np.float64) @ per_document
            for start in range(0, len(weights), _CHUNK_REPLICATES)
        ]
    )


def interval_of(
    estimate: Float[np.ndarray, " k"],
    replicates: Float[np.ndarray, "replicate k"],
    resampling: Resampling,
    level: float,
) -> Interval:
    """Return the interval over documents of a quantity, from its values in the shared replicates."""
    low, high = interval_ends(estimate, replicates, resampling.effective_documents, level)
    return Interval(
        estimate=estimate,
        low=low,
        high=high,
        level=level,
        num_replicates=resampling.num_replicates,
        num_documents=resampling.num_documents,
        effective_documents=resampling.effective_documents,
    )


def _failed_error(
    failed_error: float | Float[np.ndarray, " activation"] | None,
    errors: Float[np.ndarray, "activation draw"],
    baseline: Baseline,
) -> float | Float[np.ndarray, " activation"]:
    if failed_error is not None:
        return failed_error
    if baseline.scoring == "raw" and np.isnan(errors).any():
        raise ValueError(
            f"{int(np.isnan(errors).sum())} draws failed and raw errors have no agreed value for that; "
            "pass `failed_error`, for example the mean square of each activation (as if 0 were predicted)"
        )
    return ORTHOGONAL_ERROR


def check_aligned(errors: Float[np.ndarray, "activation draw"], documents: np.ndarray, baseline: Baseline) -> None:
    """Raise ValueError unless errors, documents and the baseline's distances are of the same activations."""
    if errors.ndim != 2 or not errors.size:
        raise ValueError(f"errors must be [activation, draw] with at least one of each; got shape {errors.shape}")
    if len(documents) != len(errors):
        raise ValueError(f"there are errors for {len(errors)} activations and document ids for {len(documents)}")
    if baseline.distances is not None and len(baseline.distances) != len(errors):
        raise ValueError(
            f"there are errors for {len(errors)} activations and the baseline is of "
            f"{len(baseline.distances)}; take the baseline of the scored activations, same order"
        )
    if baseline.distances is None and baseline.kind in MEASURED_KINDS:
        raise ValueError(f"this measured baseline ({baseline.kind}) has lost its distances; measure it again on the activations")


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is the nominal coverage, between 0 and 1, such as 0.95; got {level!r}")


def _brief(ks: Int[np.ndarray, " k"]) -> str:
    names = [str(k) for k in ks.tolist()]
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:3])}, ..., {names[-1]}"
