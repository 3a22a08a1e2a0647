"""Controls to report beside an FVE. No control needs more draws.

* Draws of *another* activation, as a whole best-of-K curve: choosing the best of K by the target's own error
  makes FVE grow with K even if the texts carry no information on the target. Score activation i against the draws
  of ``derangement(...)[i]``; the resulting [activation, draw] errors go through `fve_curve` like any others. When
  scoring draw by draw in the donors' order, the target is ``vectors[np.argsort(donors)[owner]]``.
* Empty text: one reconstruction for all, ``reconstruction_errors(empty[None], vectors)[:, None]`` into
  `fve_curve`.
* Mean vector: `mean_vector_error`.
* Retrieval: how often an activation's own draws are closer to it than to every other activation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ksweep.stats.documents import unique_documents
from ksweep.stats.fve import Baseline, ScoringKind, comparable, comparable_chunks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int


@dataclass(frozen=True, kw_only=True, eq=False)
class Retrieval:
    """Rank of each activation among all candidates, ordered by mean error against the activation's own draws."""

    ranks: Float[np.ndarray, " activation"] = field(repr=False)
    """1 is best; NaN where every draw failed, which counts as not retrieved."""
    num_candidates: int

    @property
    def top_1_rate(self) -> float:
        """Fraction of activations ranked first."""
        return float((self.ranks == 1).mean())

    @property
    def mean_reciprocal_rank(self) -> float:
        """Mean of 1/rank; a failure counts as 0."""
        return float(np.nan_to_num(1 / self.ranks).mean())

    @property
    def chance(self) -> float:
        """Top-1 rate of uninformative draws, 1 over the number of candidates."""
        return 1 / self.num_candidates


def derangement(
    num_activations: int, seed: int, documents: Sequence[str] | Sequence[int] | np.ndarray | None = None
) -> Int[np.ndarray, " activation"]:
    """Return for each activation another one as donor, each used once; given documents, one of another document.

    Documents and the activations inside them are shuffled, then the sequence is rotated by at least the longest
    document. If one document holds more than half of all activations, some donors are of the same document:
    ``documents == documents[donors]``.
    """
    if num_activations < 2:
        raise ValueError(f"swapping draws between activations needs at least two activations; got {num_activations}")
    ids = np.arange(num_activations) if documents is None else np.asarray(documents)
    if len(ids) != num_activations:
        raise ValueError(f"there are {num_activations} activations and document ids for {len(ids)}")
    names, membership = unique_documents(ids)
    generator = np.random.default_rng(seed)
    row = np.lexsort((generator.random(num_activations), generator.permutation(len(names))[membership]))
    longest = min(int(np.bincount(membership).max()), num_activations // 2)
    turn = int(generator.integers(longest, num_activations - longest + 1))
    donors = np.empty(num_activations, dtype=np.int64)
    donors[row] = np.roll(row, -turn)
    return donors


def mean_vector_error(baseline: Baseline) -> float:
    """Return the error of predicting the mean vector for every activation; `baseline` is a distance from the mean.

    No constant text can do better. With normalised scoring the prediction is scaled too: the error is 2(1 - R), above the
    baseline 1 - R^2, and FVE is below 0 (-0.32 on public Qwen-7B). With raw scoring it is the baseline, FVE 0.
    """
    if baseline.kind == "between documents":
        raise ValueError("the mean's own error follows from the distance from the mean: pass mean_distance_baseline(vectors)")
    if baseline.scoring == "raw":
        return baseline.value
    # 2(1 - R) with R = sqrt(1 - b), written so that a baseline of 0.03 keeps its digits.
    return float(2 * baseline.value / (1 + np.sqrt(1 - baseline.value)))


def mean_reconstructions(
    reconstructions: Float[np.ndarray, "draw d"],
    owners: Int[np.ndarray, " draw"],
    num_activations: int,
    scoring: ScoringKind = "normalised",
) -> Float[np.ndarray, "activation d"]:
    """Return the mean (scaled) reconstruction of each activation's successful draws; NaN rows where all failed.

    `owners` is the activation of each row, so failed draws are simply absent. Errors are quadratic, so this
    vector orders candidates exactly as the mean error over the draws does: all pairs cost one matrix product,
    not one per draw. Call it for a few activations at a time, with owners counted from the first of them.
    """
    vectors, owners = comparable(reconstructions, scoring), np.asarray(owners)
    if vectors.ndim != 2 or owners.shape != vectors.shape[:1]:
        raise ValueError(f"reconstructions are [draw, d], each with an owner; got shapes {vectors.shape} and {owners.shape}")
    if owners.size and not 0 <= owners.min() <= owners.max() < num_activations:
        raise ValueError(f"owners run from {owners.min()} to {owners.max()} and there are {num_activations} activations")
    order = np.argsort(owners, kind="stable")
    present, starts, counts = np.unique(owners[order], return_index=True, return_counts=True)
    means = np.full((num_activations, vectors.shape[1]), np.nan)
    if owners.size:
        means[present] = np.add.reduceat(vectors[order], starts, axis=0) / counts[:, None]
    return means


def retrieval(
    means: Float[np.ndarray, "activation d"],
    vectors: Float[np.ndarray, "activation d"],
    scoring: ScoringKind = "normalised",
) -> Retrieval:
    """Return the rank of each activation among all of `vectors` by mean error against its own draws; ties count against it.

    `means` comes from `mean_reconstructions`, with the same scoring. Rates depend on the candidates: compare only
    over the same activations. The candidates are held as float32; pass a few thousand at most where d is large
    (10,000 of d = 8,192 are 330 MB and 10^12 multiplications).
    """
    vectors = np.asarray(vectors)
    queries = np.asarray(means, dtype=np.float64)
    if queries.shape != vectors.shape or vectors.ndim != 2 or len(vectors) < 2:
        raise ValueError(
            "retrieval needs two or more activations and one mean reconstruction each, both [activation, d]; "
            f"got shapes {vectors.shape} and {queries.shape}"
        )
    mean, pool = _centred_pool(vectors, scoring)
    squares = np.einsum("id,id->i", pool, pool)
    ranks = np.full(len(pool), np.nan)
    answered = np.flatnonzero(~np.isnan(queries).any(axis=1))
    for start in range(0, len(answered), 256):
        rows = answered[start : start + 256]
        # |u - v|^2 without |u|^2, which is the same for every candidate.
        errors = squares - 2 * ((queries[rows] - mean).astype(np.float32) @ pool.T)
        own = errors[np.arange(len(rows)), rows]
        ranks[rows] = (errors <= own[:, None]).sum(axis=1)
    return Retrieval(ranks=ranks, num_candidates=len(pool))


def _centred_pool(
    vectors: Float[np.ndarray, "activation d"], scoring: ScoringKind
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "activation d"]]:
    """Return the mean of the candidates and the centred candidates: on Gemma all cosines exceed 0.95, too close for float32."""
    mean = sum((chunk.sum(axis=0) for _, chunk in comparable_chunks(vectors, scoring)), np.zeros(vectors.shape[1])) / len(vectors)
    pool = np.empty(vectors.shape, dtype=np.float32)
    for rows, chunk in comparable_chunks(vectors, scoring):
        pool[rows] = chunk - mean
    return mean, pool
