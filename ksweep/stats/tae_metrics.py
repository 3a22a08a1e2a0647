"""Compute the reference sweep's own quantities, so that its published numbers can be reproduced and compared. NumPy only.

    sums = ReferenceSums(ks)
    for activations, draws in chunks:                        # [n, d], [n, draw, d]; raw space, never scaled
        sums.add(selected(activations, draws, ks, "prefix"))
    sums.quantities()                                        # variance_recovery, r_squared, ... for each K
    reference_intervals(sums, the_same_chunks_again)         # its bootstrap over single vectors: percentile, BCa

With A the activations, R = A - reconstruction and variances per dimension (ddof 1) summed over dimensions:

* ``variance_recovery`` = 1 - var(R) / var(A). A constant bias of the reconstruction costs nothing.
* ``mse_variance_recovery`` = 1 - mean |R|^2 / var(A): the bias counts. With our raw FVE against the
  distance from the mean it is 1 - (1 - FVE) (N - 1) / N.
* ``r_squared`` = 1 - sum R^2 / sum (A - m)^2 with one scalar mean m: what dimensions differ in counts as explained (0.966 beside
  0.750 on Gemma-3-27B).

Sums are float64 and kept as mean and squared deviation (Chan, Golub & LeVeque 1979), so a dimension with a mean of 1e5 keeps its
digits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from ksweep.stats.best_of_k import Selection, best_of_k_weights, checked_ks

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from jaxtyping import Float, Int

ROLE_MINIMUM = 10
"""The variance of a role is reported only if it has more vectors than this."""

FEWEST_FOR_INTERVALS = 3
"""Smallest number of activations that the bootstrap accepts."""

REFERENCE_REPLICATES = 1000
REFERENCE_SEED = 42
"""The reference resets NumPy's legacy generator to this for every K."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """Activations with the reconstruction selected for each K."""

    activations: Float[np.ndarray, "activation d"]
    reconstructions: Float[np.ndarray, "activation k d"] | None
    """Reconstruction of the selected draw; with order statistics its expectation over the choices of K draws. None if unknown:
    then everything that needs a variance of residuals is unknown too, and `squared_errors` is required."""
    squared_errors: Float[np.ndarray, "activation k"] | None = None
    """Expected squared norm of the residual; None where `reconstructions` are single draws, from which it is computed."""
    roles: Sequence[str | None] | None = None
    """Role of each activation's token, for statistics by role; None if unknown."""


@dataclass(frozen=True, kw_only=True)
class ReferenceQuantities:
    """The quantities that the reference reports for one K."""

    k: int
    num_activations: int
    d_model: int
    avg_mse: float
    """Mean over vectors and dimensions of the squared residual."""
    mse_std: float
    """Standard deviation over vectors of the mean squared residual, ddof 0."""
    variance_recovery: float
    """NaN if reconstructions are unknown."""
    mse_variance_recovery: float
    r_squared: float
    mse_for_new_variance: float
    """Mean squared norm of the residual: d times avg_mse."""
    total_variance: float
    """Variance of the activations, ddof 1, summed over dimensions. NaN for one activation."""
    residual_variance: float
    """Variance of the residuals, computed in the same way. NaN if reconstructions are unknown."""
    original_mean: float
    """Mean over all entries."""


@dataclass(frozen=True, kw_only=True)
class ReferenceInterval:
    """Bootstrap interval of one quantity at one K, from replicates of single vectors; NaN where it is undefined."""

    estimate: float
    bias: float
    """Mean of the replicates less the estimate."""
    std: float
    """ddof 0."""
    low: float
    high: float
    """Plain percentiles."""
    bca_low: float = np.nan
    bca_high: float = np.nan


def prefix_of_k_draws(errors: Float[np.ndarray, "activation draw"], ks: Sequence[int]) -> Int[np.ndarray, "activation k"]:
    """Return which of the first K draws has the smallest error; the first of equal ones, as with the reference's argmin."""
    errors = _checked(errors)
    chosen = [np.argmin(errors[:, :k], axis=1) for k in checked_ks(ks, errors.shape[1])]
    return np.asarray(np.stack(chosen, axis=1))


def selection_weights(
    errors: Float[np.ndarray, "activation draw"], ks: Sequence[int], selection: Selection
) -> Float[np.ndarray, "activation draw k"]:
    """Return the probability that best-of-K keeps each draw.

    Ties go to the earlier draw, as with the reference's argmin; with order statistics too, so that the probabilities sum to 1.
    """
    errors = _checked(errors)
    if selection == "prefix":
        chosen = prefix_of_k_draws(errors, ks)
        return np.asarray(np.arange(errors.shape[1])[:, None] == chosen[:, None], dtype=np.float64)
    if selection != "order_statistics":
        raise ValueError(f"selection must be one of {', '.join(get_args(Selection))}; got {selection!r}")
    ranks = np.argsort(np.argsort(errors, axis=1, kind="stable"), axis=1)
    return np.asarray(best_of_k_weights(errors.shape[1], ks)[ranks])


def selected(
    activations: Float[np.ndarray, "activation d"],
    reconstructions: Float[np.ndarray, "activation draw d"],
    ks: Sequence[int],
    selection: Selection = "order_statistics",
    roles: Sequence[str | None] | None = None,
) -> Chunk:
    """Return the reconstructions that best-of-K keeps, selected by raw squared error against the activation itself (oracle)."""
    activations, reconstructions = np.asarray(activations, np.float64), np.asarray(reconstructions, np.float64)
    if reconstructions.ndim != 3 or activations.shape != (len(reconstructions), reconstructions.shape[2]):
        raise ValueError(
            f"activations are [activation, d] and reconstructions [activation, draw, d]; got {activations.shape} and "
            f"{reconstructions.shape}"
        )
    errors = np.square(reconstructions - activations[:, None]).sum(axis=2)
    weights = selection_weights(errors, ks, selection)
    return Chunk(
        activations=activations,
        reconstructions=np.einsum("ajk,ajd->akd", weights, reconstructions),
        squared_errors=np.einsum("ajk,aj->ak", weights, errors),
        roles=roles,
    )


@dataclass
class Moments:
    """Count, mean and summed squared deviation of rows, column by column."""

    count: int = 0
    mean: np.ndarray = field(default_factory=lambda: np.zeros(()))
    squares: np.ndarray = field(default_factory=lambda: np.zeros(()))

    def add(self, rows: np.ndarray) -> None:
        """Add rows, [row, ...column]."""
        if len(rows):
            mean = rows.mean(axis=0)
            self.merge(Moments(len(rows), mean, np.square(rows - mean).sum(axis=0)))

    def merge(self, other: Moments) -> None:
        """Add the moments of another rank (Chan, Golub & LeVeque 1979, equation 2.1)."""
        total = self.count + other.count
        if not total:
            return
        shift = other.mean - self.mean
        self.squares = self.squares + other.squares + np.square(shift) * (self.count * other.count / total)
        self.mean = self.mean + shift * (other.count / total)
        self.count = total


@dataclass
class ReferenceSums:
    """Streaming sums from which every quantity of the reference follows; order and size of the chunks do not matter."""

    ks: tuple[int, ...]
    activations: Moments = field(default_factory=Moments)
    """Moments of shape [d]."""
    residuals: Moments = field(default_factory=Moments)
    """Moments of shape [k, d]."""
    errors: Moments = field(default_factory=Moments)
    """Moments of each vector's mean squared residual, of shape [k]."""
    excess: np.ndarray = field(default_factory=lambda: np.zeros(()))
    """Sum over vectors of E|residual|^2 - |E residual|^2, the variance due to the choice of K draws; of shape [k]."""
    by_role: dict[str, ReferenceSums] = field(default_factory=dict)

    def add(self, chunk: Chunk) -> None:
        """Add activations to the sums, without keeping them.

        Raises:
            ValueError: shapes that do not fit, or values that are not finite.
        """
        if chunk.reconstructions is None:
            squared = _without_residuals(chunk, len(self.ks))
        else:
            residuals, squared = _residuals(chunk, len(self.ks))
            self.residuals.add(residuals)
            self.excess = self.excess + (squared - np.square(residuals).sum(axis=2)).sum(axis=0)
        self.activations.add(np.asarray(chunk.activations, np.float64))
        self.errors.add(squared / chunk.activations.shape[1])
        if chunk.roles is not None:
            self._add_roles(chunk, chunk.roles)

    def _add_roles(self, chunk: Chunk, roles: Sequence[str | None]) -> None:
        names = np.asarray(roles, dtype=object)
        if names.shape != (len(chunk.activations),):
            raise ValueError(f"there are {len(chunk.activations)} activations and {len(names)} roles")
        for role in dict.fromkeys(role for role in roles if role is not None):
            rows = np.flatnonzero(names == role)
            made, squared = (None if v is None else v[rows] for v in (chunk.reconstructions, chunk.squared_errors))
            part = Chunk(activations=chunk.activations[rows], reconstructions=made, squared_errors=squared)
            self.by_role.setdefault(role, ReferenceSums(self.ks)).add(part)

    def merge(self, other: ReferenceSums) -> None:
        """Add the sums of another rank."""
        if self.ks != other.ks:
            raise ValueError(f"sums for K = {self.ks} cannot be merged with sums for K = {other.ks}")
        for moments, other_moments in zip(self._moments(), other._moments(), strict=True):
            moments.merge(other_moments)
        self.excess = self.excess + other.excess
        for role, sums in other.by_role.items():
            self.by_role.setdefault(role, ReferenceSums(self.ks)).merge(sums)

    def of(self, ks: tuple[int, ...]) -> ReferenceSums:
        """Return the sums of these values of K over all activations, without the sums by role."""
        indices = [self.ks.index(k) for k in ks]
        residuals, errors = (Moments(m.count, m.mean[indices], m.squares[indices]) for m in (self.residuals, self.errors))
        return ReferenceSums(ks, self.activations, residuals, errors, self.excess[indices])

    def _moments(self) -> tuple[Moments, Moments, Moments]:
        return self.activations, self.residuals, self.errors

    def quantities(self) -> tuple[ReferenceQuantities, ...]:
        """Return the quantities for each K, in the order of `ks`."""
        if not self.activations.count:
            raise ValueError("no activations have been added: there is nothing to report")
        return tuple(self._quantities(i) for i in range(len(self.ks)))

    def _quantities(self, index: int) -> ReferenceQuantities:
        n, d = self.activations.count, self.activations.mean.size
        grand_mean = float(self.activations.mean.mean())
        total = float(self.activations.squares.sum())
        spread = total + n * float(np.square(self.activations.mean - grand_mean).sum())
        has_residuals = self.residuals.count == n
        residual = float(self.residuals.squares[index].sum() + self.excess[index]) if has_residuals else np.nan
        avg_mse = float(self.errors.mean[index])
        return ReferenceQuantities(
            k=self.ks[index],
            num_activations=n,
            d_model=d,
            avg_mse=avg_mse,
            mse_std=float(np.sqrt(self.errors.squares[index] / n)),
            variance_recovery=float(1 - _ratio(residual, total)),
            mse_variance_recovery=float(1 - _ratio(avg_mse * d * (n - 1), total)),
            r_squared=float(1 - _ratio(avg_mse * d * n, spread)),
            mse_for_new_variance=avg_mse * d,
            total_variance=float(_ratio(total, n - 1)),
            residual_variance=float(_ratio(residual, n - 1)),
            original_mean=grand_mean,
        )


def reference_intervals(
    sums: ReferenceSums,
    chunks: Iterable[Chunk],
    *,
    num_replicates: int = REFERENCE_REPLICATES,
    seed: int = REFERENCE_SEED,
    level: float = 0.95,
) -> dict[str, tuple[ReferenceInterval, ...]]:
    """Return the reference's bootstrap intervals of "variance_recovery" (with BCa), "mse" and "r_squared" for each K.

    Single vectors are resampled, the same for every K. These intervals are too narrow when vectors of one document are
    alike; trust those of `fve_curve`. `chunks` are those of `sums` again, split in any way but in the same order. A
    replicate needs the weighted sums of A and R, not copies of them: [replicate, d] numbers for each K, and scalars
    for each vector. The leave-one-out values of BCa follow from the vectors' own squared distances.

    Raises:
        ValueError: the chunks do not hold as many activations as the sums, or reconstructions are unknown.
    """
    n = sums.activations.count
    weights = reference_weights(n, num_replicates, seed)
    scalars, spreads = _resampled(sums, chunks, weights)
    return {
        "variance_recovery": tuple(_recovery(scalars, spreads, weights, k, level) for k in range(len(sums.ks))),
        "mse": tuple(_mse(scalars, weights, k, level) for k in range(len(sums.ks))),
        "r_squared": tuple(_r_squared(scalars, weights, k, level) for k in range(len(sums.ks))),
    }


def reference_rows(
    sums: ReferenceSums, intervals: Mapping[str, Sequence[ReferenceInterval]] | None = None
) -> list[dict[str, Any]]:
    """Return a row for each quantity, K and role (None: all activations); unknown quantities have no row.

    `spread` is between vectors (of avg_mse alone, ddof 0); `bias`, `std` and the interval are over replicates.
    """
    rows = []
    for role, part in [(None, sums), *sorted(sums.by_role.items(), key=lambda item: str(item[0]))]:
        for i, quantities in enumerate(part.quantities()):
            num_activations = quantities.num_activations
            for name in REPORTED:
                value = getattr(quantities, name)
                if np.isnan(value) or (role is not None and not _is_reported_by_role(name, num_activations)):
                    continue
                row = {"quantity": name, "role": role, "k": quantities.k, "value": value, "num_activations": num_activations}
                row |= {"spread": quantities.mse_std} if name == "avg_mse" else {}
                rows.append(row | (_interval_columns(intervals, name, i) if role is None else {}))
    return rows


REPORTED = (
    "avg_mse", "variance_recovery", "mse_variance_recovery", "r_squared", "mse_for_new_variance", "total_variance",
    "residual_variance", "original_mean",
)  # fmt: skip
"""Quantities in the order of their rows."""


def _is_reported_by_role(name: str, num_activations: int) -> bool:
    """Follow the reference: report errors for every role, and variances for roles with more than ten vectors."""
    return name == "avg_mse" or (
        name in ("variance_recovery", "total_variance", "residual_variance") and num_activations > ROLE_MINIMUM
    )


def _interval_columns(intervals: Mapping[str, Sequence[ReferenceInterval]] | None, name: str, index: int) -> dict[str, float]:
    by_k = (intervals or {}).get("mse" if name == "avg_mse" else name)
    if by_k is None:
        return {}
    columns = ("bias", "std", "low", "high", "bca_low", "bca_high")
    return {column: value for column in columns if not np.isnan(value := getattr(by_k[index], column))}


def reference_weights(num_activations: int, num_replicates: int, seed: int) -> Int[np.ndarray, "replicate activation"]:
    """Return how often each vector is drawn in each replicate, from NumPy's legacy generator seeded as in the reference."""
    if num_activations < FEWEST_FOR_INTERVALS or num_replicates < 2:
        raise ValueError(
            f"these intervals need at least {FEWEST_FOR_INTERVALS} activations and 2 replicates; got {num_activations} and "
            f"{num_replicates}"
        )
    generator = np.random.RandomState(seed)
    weights = np.empty((num_replicates, num_activations), dtype=np.uint16)
    for row in weights:
        row[:] = np.bincount(generator.randint(0, num_activations, num_activations), minlength=num_activations)
    return weights


def bca_interval(
    replicates: Float[np.ndarray, " replicate"], estimate: float, left_out: Float[np.ndarray, " activation"], level: float = 0.95
) -> tuple[float, float]:
    """Return the bias-corrected and accelerated interval (Efron 1987); NaN where the estimate lies outside all replicates.

    `left_out` holds the estimate without each vector in turn. The correction counts replicates below the estimate, half of those
    equal to it (scipy's rule; the reference counts those below only, which is the same without ties).
    """
    below = float((replicates < estimate).mean() + (replicates == estimate).mean() / 2)
    distances = left_out.mean() - left_out
    scale = float(np.square(distances).sum() ** 1.5)
    if not 0 < below < 1 or not np.isfinite(scale):
        return np.nan, np.nan
    acceleration = float((distances**3).sum()) / (6 * scale) if scale else 0.0
    normal = NormalDist()
    centre = normal.inv_cdf(below)

    def share(tail: float) -> float:
        moved = centre + normal.inv_cdf(tail)
        return normal.cdf(centre + moved / (1 - acceleration * moved))

    low, high = np.percentile(replicates, [100 * share((1 - level) / 2), 100 * share((1 + level) / 2)])
    return float(low), float(high)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Scalars:
    """One number for each vector (and K)."""

    distance: Float[np.ndarray, " activation"]
    """|A - mean|^2."""
    residual_distance: Float[np.ndarray, "activation k"]
    """|R - mean|^2, of the expected residual."""
    excess: Float[np.ndarray, "activation k"]
    squared_error: Float[np.ndarray, "activation k"]
    entry_sum: Float[np.ndarray, " activation"]
    """Sum of A - m over dimensions, m the grand mean."""
    entry_squares: Float[np.ndarray, " activation"]
    d_model: int


@dataclass(frozen=True, kw_only=True, eq=False)
class _Spreads:
    """Squared norm of the weighted sum of centred vectors in each replicate: how far resampling moves the mean."""

    activations: Float[np.ndarray, " replicate"]
    residuals: Float[np.ndarray, "replicate k"]


def _resampled(sums: ReferenceSums, chunks: Iterable[Chunk], weights: Int[np.ndarray, "r a"]) -> tuple[_Scalars, _Spreads]:
    """Run the second pass: with both means known, compute scalars of each vector and [replicate, d] weighted sums."""
    n, d, num_ks = sums.activations.count, sums.activations.mean.size, len(sums.ks)
    moved_a = np.zeros((len(weights), d))
    moved_r = np.zeros((num_ks, len(weights), d))
    parts: list[tuple[np.ndarray, ...]] = []
    start = 0
    for chunk in chunks:
        if chunk.reconstructions is None:
            raise ValueError("these intervals need the reconstructions of every chunk")
        residuals, squared = _residuals(chunk, num_ks)
        drawn = weights[:, start : start + len(residuals)].astype(np.float64)
        start += len(residuals)
        if start > n:
            break
        raw = np.asarray(chunk.activations, np.float64)
        centred, centred_residuals = raw - sums.activations.mean, residuals - sums.residuals.mean
        moved_a += drawn @ centred
        for k in range(num_ks):
            moved_r[k] += drawn @ centred_residuals[:, k]
        parts.append(_scalars_of(raw - sums.activations.mean.mean(), centred, centred_residuals, residuals, squared))
    if start != n:
        raise ValueError(f"the chunks hold {start} activations and the sums {n}: pass the same chunks again")
    names = ("distance", "residual_distance", "excess", "squared_error", "entry_sum", "entry_squares")
    joined = {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(names)}
    spreads = _Spreads(activations=np.square(moved_a).sum(axis=1), residuals=np.square(moved_r).sum(axis=2).T)
    return _Scalars(**joined, d_model=d), spreads


def _scalars_of(
    entries: np.ndarray, centred: np.ndarray, centred_residuals: np.ndarray, residuals: np.ndarray, squared: np.ndarray
) -> tuple[np.ndarray, ...]:
    return (
        np.square(centred).sum(axis=1),
        np.square(centred_residuals).sum(axis=2),
        squared - np.square(residuals).sum(axis=2),
        squared,
        entries.sum(axis=1),
        np.square(entries).sum(axis=1),
    )


def _recovery(scalars: _Scalars, spreads: _Spreads, weights: np.ndarray, k: int, level: float) -> ReferenceInterval:
    n = len(scalars.distance)
    residual = scalars.residual_distance[:, k] + scalars.excess[:, k]
    total = weights @ scalars.distance - spreads.activations / n
    replicates = 1 - _ratio(weights @ residual - spreads.residuals[:, k] / n, total)
    estimate = 1 - _ratio(residual.sum(), scalars.distance.sum())
    # Without vector i the centred sum is minus that vector, over n - 1.
    left_total = scalars.distance.sum() - scalars.distance * n / (n - 1)
    left_residual = residual.sum() - residual - scalars.residual_distance[:, k] / (n - 1)
    bca = bca_interval(replicates, estimate, 1 - _ratio(left_residual, left_total), level)
    return _interval(replicates, estimate, level, *bca)


def _mse(scalars: _Scalars, weights: np.ndarray, k: int, level: float) -> ReferenceInterval:
    mse = scalars.squared_error[:, k] / scalars.d_model
    return _interval(weights @ mse / len(mse), float(mse.mean()), level)


def _r_squared(scalars: _Scalars, weights: np.ndarray, k: int, level: float) -> ReferenceInterval:
    size = len(scalars.distance) * scalars.d_model
    errors = scalars.squared_error[:, k]
    spread = weights @ scalars.entry_squares - np.square(weights @ scalars.entry_sum) / size
    estimate = 1 - _ratio(errors.sum(), scalars.entry_squares.sum() - scalars.entry_sum.sum() ** 2 / size)
    return _interval(1 - _ratio(weights @ errors, spread), estimate, level)


def _interval(replicates: np.ndarray, estimate: float, level: float, *bca: float) -> ReferenceInterval:
    low, high = np.percentile(replicates, [50 * (1 - level), 50 * (1 + level)])
    return ReferenceInterval(
        estimate=float(estimate),
        bias=float(replicates.mean() - estimate),
        std=float(replicates.std()),
        low=float(low),
        high=float(high),
        **dict(zip(("bca_low", "bca_high"), bca, strict=False)),
    )


def _residuals(chunk: Chunk, num_ks: int) -> tuple[Float[np.ndarray, "activation k d"], Float[np.ndarray, "activation k"]]:
    """Return residuals in float64 and their (expected) squared norms."""
    activations = np.asarray(chunk.activations, np.float64)
    reconstructions = np.asarray(chunk.reconstructions, np.float64)
    if activations.ndim != 2 or reconstructions.shape != (len(activations), num_ks, activations.shape[1]):
        raise ValueError(
            f"a chunk for {num_ks} values of K has activations [n, d] and reconstructions [n, {num_ks}, d]; got "
            f"{activations.shape} and {reconstructions.shape}"
        )
    residuals = activations[:, None] - reconstructions
    if not np.isfinite(residuals).all():
        raise ValueError(
            f"row {int(np.argwhere(~np.isfinite(residuals))[0][0])} of a chunk is not finite: a talkative-autoencoder "
            "draw cannot fail, so a vector was read or reconstructed incorrectly"
        )
    squared = np.square(residuals).sum(axis=2) if chunk.squared_errors is None else np.asarray(chunk.squared_errors, np.float64)
    return residuals, squared


def _without_residuals(chunk: Chunk, num_ks: int) -> Float[np.ndarray, "activation k"]:
    """Return the squared norms of residuals that are themselves unknown."""
    squared = np.asarray(chunk.squared_errors, np.float64) if chunk.squared_errors is not None else np.empty(0)
    if squared.shape != (len(chunk.activations), num_ks) or not np.isfinite(squared).all():
        raise ValueError(
            f"a chunk without reconstructions has finite squared errors [{len(chunk.activations)}, {num_ks}]; got {squared.shape}"
        )
    return squared


def _checked(errors: Float[np.ndarray, "activation draw"]) -> Float[np.ndarray, "activation draw"]:
    errors = np.asarray(errors, dtype=np.float64)
    if errors.ndim != 2 or not errors.size or not np.isfinite(errors).all():
        raise ValueError(
            f"errors must be finite numbers [activation, draw]; got shape {errors.shape} with "
            f"{int((~np.isfinite(errors)).sum())} that are not finite. A failed draw has no reconstruction to select"
        )
    return errors


def _ratio(above: np.ndarray | float, below: np.ndarray | float) -> Any:
    """Return the quotient, NaN or infinite without a warning where there is no variance to explain."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(above, below)
