"""Choose the best of several settings without the winner's curse.

If several settings are measured on the same activations, the FVE of the best one is biased upwards, the more so the more settings
there are and the closer they are. Here documents are split into two halves (sample splitting, Cox 1975): the setting that is best
on one half is measured on the other, both ways, and the two are pooled into one FVE over all documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ksweep.stats.best_of_k import Selection, best_errors
from ksweep.stats.bootstrap import (
    FveCurve,
    document_weights,
    fve_curve,
    fve_replicates,
    interval_ends,
    replicate_sums,
)
from ksweep.stats.documents import unique_documents
from ksweep.stats.fve import ORTHOGONAL_ERROR, Baseline

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOutBest:
    """The best setting at one K, and its FVE on documents that it was not chosen on."""

    k: int
    best: int
    """Index of the setting with the highest FVE over all documents: the one to use."""
    chosen: tuple[int, int]
    """Setting chosen on the second half and measured on the first, and the reverse. If they differ, the lead is within noise."""
    naive_fve: float
    """FVE of `best` on the documents that it was chosen on: biased upwards."""
    curve: FveCurve
    """Held-out FVE at the one K. The choice is made on half of the documents, so a bias, if any, is downwards. Its replicates
    pair with those of any curve over the same documents."""

    @property
    def optimism(self) -> float:
        """Naive minus held-out FVE."""
        return self.naive_fve - float(self.curve.fve[0])


def halves(documents: Sequence[str] | Sequence[int] | np.ndarray, seed: int = 0) -> Bool[np.ndarray, " activation"]:
    """Return whether each activation belongs to the second half of the documents, a split fixed by the documents and the seed."""
    names, membership = unique_documents(documents)
    if len(names) < 2:
        raise ValueError("choosing on one half of the documents and measuring on the other needs at least two documents")
    second = np.zeros(len(names), dtype=bool)
    second[np.random.default_rng(seed).permutation(len(names))[: len(names) // 2]] = True
    return np.asarray(second[membership])


def held_out_best(
    errors: Sequence[Float[np.ndarray, "activation draw"]],
    documents: Sequence[str] | Sequence[int] | np.ndarray,
    baseline: Baseline,
    k: int,
    *,
    failed_error: float | Float[np.ndarray, " activation"] = ORTHOGONAL_ERROR,
    num_replicates: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    selection: Selection = "order_statistics",
) -> HeldOutBest:
    """Return the best-of-K FVE with the setting chosen on one half of the documents and measured on the other, both ways, pooled.

    `errors` has one array for each setting, over the same activations; numbers of draws may differ. Both halves share the
    baseline of all activations, so that the pooled FVE is 1 - sum of errors / sum of distances.

    The choice is made again in every replicate. In simulation the interval at nominal 95 % covered 95 % with a clear winner and
    up to 99.8 % where settings are alike. With the two choices held fixed it covered 88 %: where the choices differ, each half
    measures the setting that another one beat on it, so that the errors of the halves are correlated.
    """
    best = np.stack([best_errors(e, [k], selection, failed_error)[:, 0] for e in errors])
    second = halves(documents, seed)
    on_first, on_second = (int(best[:, half].mean(axis=1).argmin()) for half in (~second, second))
    held_out = np.where(second, best[on_first], best[on_second])
    overall = best.mean(axis=1)
    curve = fve_curve(held_out[:, None], documents, baseline, num_replicates=num_replicates, seed=seed, level=level)
    replicates = _choosing_again(best, second, documents, baseline, num_replicates, seed)
    low, high = interval_ends(curve.fve, replicates, curve.effective_documents, level)
    return HeldOutBest(
        k=k,
        best=int(overall.argmin()),
        chosen=(on_second, on_first),
        naive_fve=float(1 - overall.min() / baseline.value),
        curve=replace(curve, k=np.array([k]), num_draws=k, replicates=replicates, fve_low=low, fve_high=high),
    )


def _choosing_again(
    best: Float[np.ndarray, "setting activation"],
    second: Bool[np.ndarray, " activation"],
    documents: Sequence[str] | Sequence[int] | np.ndarray,
    baseline: Baseline,
    num_replicates: int,
    seed: int,
) -> Float[np.ndarray, "replicate 1"]:
    """Return the held-out FVE in each replicate of the documents, with the setting chosen in that replicate."""
    names, membership = unique_documents(documents)
    distances = baseline.parts(len(second))
    weights = document_weights(len(names), num_replicates, seed)
    values = np.concatenate([best * ~second, best * second, [distances], [~second], [second]]).T
    sums = replicate_sums(values, membership, weights)
    count = len(best)
    first, other, (total, num_first, num_other) = sums[:, :count], sums[:, count : 2 * count], sums[:, 2 * count :].T
    rows = np.arange(num_replicates)
    # A replicate without documents of a half cannot choose on it: the choice on all documents of that half stands.
    on_first = np.where(num_first == 0, best[:, ~second].sum(axis=1).argmin(), first.argmin(axis=1))
    on_second = np.where(num_other == 0, best[:, second].sum(axis=1).argmin(), other.argmin(axis=1))
    return fve_replicates((other[rows, on_first] + first[rows, on_second])[:, None], total)
