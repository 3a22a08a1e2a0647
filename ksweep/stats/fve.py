"""Error of a reconstruction, baseline of a set of activations, and FVE = 1 - mean error / baseline.

Two kinds of scoring, never mixed in one number:

* ``normalised`` (public NLA pairs): both vectors are scaled to norm sqrt(d), so the mean squared difference
  is 2(1 - cos).
* ``raw`` (talkative-autoencoder files): the mean squared difference of the vectors as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from ksweep.stats.documents import unique_documents

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from jaxtyping import Float, Int

ScoringKind = Literal["normalised", "raw"]
"""How a reconstruction is compared with its activation."""

BaselineKind = Literal["between documents", "distance from mean", "stated constant"]
"""How a baseline was obtained: half the mean squared distance between activations of different documents, their mean squared
distance from their own mean, or a constant stated in the spec."""

MEASURED_KINDS = frozenset({"between documents", "distance from mean", "evaluated set"})
"""Kinds whose value was measured on the scored activations. "evaluated set" occurs only in older records, for the
distance from the mean."""

ORTHOGONAL_ERROR = 2.0
"""Normalised error of a reconstruction orthogonal to its target; a failure counts as this (NLA ``reward.py:35``)."""

_DEGENERATE = 1e-10
"""Variance over mean square below which activations count as equal; float32 rounding gives 1e-14, Gemma-12B has 0.03."""

_CHUNK_VALUES = 2**22
"""float64 values held in memory at once while streaming over activations: 32 MiB."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """The error at which FVE is 0; reported beside every FVE."""

    value: float
    """Mean squared distance per dimension."""
    kind: BaselineKind
    num_activations: int | None
    """Activations that the value was measured on; None if unknown."""
    scoring: ScoringKind = "normalised"
    distances: Float[np.ndarray, " activation"] | None = field(default=None, repr=False, compare=False)
    """Contribution of each evaluated activation, with mean `value`; None for a stated constant. With documents resampled w times,
    sum(w * distances) / sum(w) is the baseline of the resample, exactly or to first order."""

    def parts(self, num_activations: int) -> Float[np.ndarray, " activation"]:
        """Return the distances; for a stated constant that constant for each activation."""
        return np.full(num_activations, self.value) if self.distances is None else self.distances


def unit_scaled(vectors: Float[np.ndarray, "*rows d"]) -> Float[np.ndarray, "*rows d"]:
    """Return vectors scaled to norm sqrt(d), so that the mean square of each is 1."""
    return comparable(vectors, "normalised")


def reconstruction_errors(
    reconstructions: Float[np.ndarray, "*draws d"],
    targets: Float[np.ndarray, "*draws d"],
    scoring: ScoringKind = "normalised",
) -> Float[np.ndarray, "*draws"]:
    """Return the mean squared difference of each reconstruction from its target; leading axes broadcast.

    `normalised` is 2(1 - cos), computed from the difference itself, which keeps digits near cos = 1 that 1 - cos
    loses.
    """
    left, right = comparable(reconstructions, scoring), comparable(targets, scoring)
    if left.shape[-1] != right.shape[-1]:
        raise ValueError(
            f"reconstructions have {left.shape[-1]} dimensions and targets {right.shape[-1]}; "
            "do AR and activations belong together?"
        )
    try:
        difference = left - right
    except ValueError:
        raise ValueError(f"reconstructions of shape {left.shape} do not line up with targets of shape {right.shape}") from None
    return np.asarray(np.einsum("...d,...d->...", difference, difference) / left.shape[-1], dtype=np.float64)


def cosines(
    reconstructions: Float[np.ndarray, "*draws d"], targets: Float[np.ndarray, "*draws d"]
) -> Float[np.ndarray, "*draws"]:
    """Return the cosine of each reconstruction with its target; NaN where either is all zeros and has no direction."""
    left, right = comparable(reconstructions, "raw"), comparable(targets, "raw")
    lengths = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.einsum("...d,...d->...", left, right) / lengths, dtype=np.float64)


def measured_baseline(
    kind: BaselineKind,
    vectors: Float[np.ndarray, "activation d"],
    documents: Sequence[str] | Sequence[int] | np.ndarray,
    scoring: ScoringKind = "normalised",
) -> Baseline:
    """Measure a baseline of the given kind on activations."""
    if kind == "between documents":
        return between_documents_baseline(vectors, documents, scoring)
    if kind == "distance from mean":
        return mean_distance_baseline(vectors, scoring)
    raise ValueError(f"a measured baseline is one of between documents, distance from mean; got {kind!r}")


def between_documents_baseline(
    vectors: Float[np.ndarray, "activation d"],
    documents: Sequence[str] | Sequence[int] | np.ndarray,
    scoring: ScoringKind = "normalised",
) -> Baseline:
    """Return half the mean squared distance, per dimension, between activations of different documents.

    This estimates the variance of activations over the population of documents without bias (a U-statistic over pairs of
    documents; Hoeffding 1948), however few or uneven the documents are. No pair is enumerated: with x measured from the overall
    mean, n_c and S_c the number and the sum of document c's activations, an activation of c has, over all others outside c,

        a = [(N - n_c) |x|^2 + 2 x S_c + sum of |y|^2 outside c] / 2d,    value = U = sum of a / (N^2 - sum n_c^2).

    `distances` are U + 2N (a - U (N - n_c)) / (N^2 - sum n_c^2). Their mean is U, and their mean over resampled documents is the
    U of the resample to first order in the documents' weights; for many documents they tend to |x|^2 / d.
    """
    vectors = _checked_activations(vectors)
    names, membership = unique_documents(documents)
    if len(membership) != len(vectors):
        raise ValueError(f"there are {len(vectors)} activations and document ids for {len(membership)}")
    if len(names) < 2:
        raise ValueError(
            f"all {len(vectors)} activations are of one document, and this baseline compares activations of different documents: "
            "take activations of more documents, state a baseline (scoring.baseline=...), or name the kind 'distance from mean'"
        )
    mean, square = _mean_and_square(vectors, scoring)
    squares, with_own = _products_with_own_document(vectors, membership, mean, scoring)
    sizes = np.bincount(membership)
    others = (len(vectors) - sizes)[membership]
    outside = squares.sum() - np.bincount(membership, weights=squares)[membership]
    parts = (others * squares + 2 * with_own + outside) / (2 * vectors.shape[1])
    num_pairs = float(others.sum())
    value = float(parts.sum() / num_pairs)
    _check_variance(value, square, len(vectors), scoring)
    distances = value + 2 * len(vectors) / num_pairs * (parts - value * others)
    return Baseline(value=value, kind="between documents", num_activations=len(vectors), scoring=scoring, distances=distances)


def mean_distance_baseline(vectors: Float[np.ndarray, "activation d"], scoring: ScoringKind = "normalised") -> Baseline:
    """Return the mean squared distance of the activations from their own mean (``mse_rawvar`` of NLA ``schema.py:153``).

    The mean is *not* scaled back to norm sqrt(d): doing so is a common mistake (0.94 instead of 0.72 on
    Qwen-7B). With normalised scoring the value is 1 - R^2, where R is the length of the mean unit vector.

    Measured from the sample's own mean the value is too small on average: by the factor (n - 1)/n for n independent
    activations, where n shrinks towards the effective number of documents if activations of one document are alike.
    FVE is then too low by up to about (1 - FVE)/documents, equally in every cell. `between_documents_baseline` has no
    such bias; this baseline is for comparison with the public code.
    """
    vectors = _checked_activations(vectors)
    mean, square = _mean_and_square(vectors, scoring)
    distances = np.empty(len(vectors))
    for rows, chunk in comparable_chunks(vectors, scoring):
        distances[rows] = np.square(chunk - mean).mean(axis=1)
    value = float(distances.mean())
    _check_variance(value, square, len(vectors), scoring)
    return Baseline(value=value, kind="distance from mean", num_activations=len(vectors), scoring=scoring, distances=distances)


def stated_baseline(value: float, *, num_activations: int | None = None, scoring: ScoringKind = "normalised") -> Baseline:
    """Return a baseline measured elsewhere, such as 0.7335 for the training mix of the public Qwen-7B pair."""
    _check_scoring(scoring)
    if not (np.isfinite(value) and value > 0):
        raise ValueError(f"a baseline must be a positive number; got {value!r}")
    if scoring == "normalised" and value > 2:
        raise ValueError(
            f"a normalised baseline is half a squared distance of scaled vectors and cannot exceed 2; got {value!r}: was it "
            "measured on raw vectors?"
        )
    return Baseline(value=float(value), kind="stated constant", num_activations=num_activations, scoring=scoring)


def fve(errors: Float[np.ndarray, " activation"], baseline: Baseline) -> float:
    """Return the fraction of variance explained: 1 - mean error / baseline, a ratio of means (NLA ``loss.py:108``)."""
    errors = np.asarray(errors, dtype=np.float64)
    if errors.ndim != 1 or not errors.size:
        raise ValueError(f"FVE takes one error per activation; got an array of shape {errors.shape}")
    if not np.isfinite(errors).all():
        raise ValueError(
            f"activation {_first_row(~np.isfinite(errors))} has error {errors[~np.isfinite(errors)][0]}; "
            "failed draws are counted by best_of_k_errors, not left as NaN"
        )
    return float(1 - errors.mean() / baseline.value)


def _checked_activations(vectors: Float[np.ndarray, "activation d"]) -> Float[np.ndarray, "activation d"]:
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or len(vectors) < 2:
        raise ValueError(f"a baseline needs at least two activations as [activation, d]; got shape {vectors.shape}")
    return vectors


def _mean_and_square(vectors: Float[np.ndarray, "activation d"], scoring: ScoringKind) -> tuple[Float[np.ndarray, " d"], float]:
    """Return the mean vector and the mean square per dimension."""
    total, square = np.zeros(vectors.shape[1]), 0.0
    for _, chunk in comparable_chunks(vectors, scoring):
        total += chunk.sum(axis=0)
        square += float(np.square(chunk).sum())
    return total / len(vectors), square / vectors.size


def _products_with_own_document(
    vectors: Float[np.ndarray, "activation d"],
    membership: Int[np.ndarray, " activation"],
    mean: Float[np.ndarray, " d"],
    scoring: ScoringKind,
) -> tuple[Float[np.ndarray, " activation"], Float[np.ndarray, " activation"]]:
    """Return |x|^2 and x S_c for each activation, with x measured from the mean and S_c the sum over its document.

    A few documents are processed at a time: the sums of all of them may be as large as the activations.
    """
    squares, with_own = np.empty(len(vectors)), np.empty(len(vectors))
    order, step = np.argsort(membership, kind="stable"), _rows_at_once(vectors)
    for first in range(0, int(membership.max()) + 1, step):
        start, stop = np.searchsorted(membership[order], [first, first + step])
        parts = [order[i : min(i + step, stop)] for i in range(start, stop, step)]
        sums = np.zeros((int(membership[parts[-1][-1]]) - first + 1, vectors.shape[1]))
        for rows in parts:
            centred = comparable(vectors[rows], scoring) - mean
            squares[rows] = np.square(centred).sum(axis=1)
            present, starts = np.unique(membership[rows] - first, return_index=True)
            sums[present] += np.add.reduceat(centred, starts, axis=0)
        for rows in parts:
            centred = comparable(vectors[rows], scoring) - mean
            with_own[rows] = np.einsum("id,id->i", centred, sums[membership[rows] - first])
    return squares, with_own


def _check_variance(value: float, square: float, num_activations: int, scoring: ScoringKind) -> None:
    if value <= _DEGENERATE * square:
        alike = "point the same way" if scoring == "normalised" else "are equal"
        raise ValueError(
            f"all {num_activations} activations {alike} (baseline {value:.3g}): no variance to explain; "
            "check the layer, the positions and that rows are not copies"
        )


def _check_scoring(scoring: str) -> None:
    if scoring not in get_args(ScoringKind):
        raise ValueError(f"scoring must be one of {', '.join(get_args(ScoringKind))}; got {scoring!r}")


def comparable(vectors: Float[np.ndarray, "*rows d"], scoring: ScoringKind, first_row: int = 0) -> Float[np.ndarray, "*rows d"]:
    """Return vectors as float64 in the space where `scoring` takes differences; error messages count rows from `first_row`."""
    _check_scoring(scoring)
    vectors = np.asarray(vectors, dtype=np.float64)
    if vectors.ndim == 0 or vectors.shape[-1] == 0:
        raise ValueError(f"vectors need a last axis of at least one dimension; got an array of shape {vectors.shape}")
    finite = np.isfinite(vectors).all(axis=-1)
    if not finite.all():
        row = _first_row(~finite, first_row)
        raise ValueError(f"vector {row} has NaN or infinite values; was it read or reconstructed correctly?")
    if scoring == "raw":
        return vectors
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    if not norms.all():
        row = _first_row(norms[..., 0] == 0, first_row)
        raise ValueError(f"vector {row} is all zeros and has no direction; remove it or count it as a failure")
    return np.asarray(vectors * (np.sqrt(vectors.shape[-1]) / norms), dtype=np.float64)


def comparable_chunks(
    vectors: Float[np.ndarray, "activation d"], scoring: ScoringKind
) -> Iterator[tuple[slice, Float[np.ndarray, "row d"]]]:
    """Yield comparable float64 rows, a few at a time: the activations may be a memory map larger than memory."""
    step = _rows_at_once(vectors)
    for start in range(0, len(vectors), step):
        rows = slice(start, start + step)
        yield rows, comparable(vectors[rows], scoring, first_row=start)


def _rows_at_once(vectors: Float[np.ndarray, "activation d"]) -> int:
    return max(1, _CHUNK_VALUES // max(1, int(vectors.shape[1])))


def _first_row(bad: np.ndarray, first_row: int = 0) -> int | tuple[int, ...]:
    """Return the index of the first True: a plain number for rows of a matrix, a tuple for deeper arrays."""
    where = [int(axis[0]) for axis in np.nonzero(np.atleast_1d(bad))]
    where[0] += first_row
    return where[0] if len(where) == 1 else tuple(where)
