"""What each document does to an FVE: enough to put an interval on any difference without the errors behind it.

FVE = 1 - sum E / sum D is a ratio of sums over documents. To first order a document moves it by

    influence_c = -(E_c - r D_c) / sum D,     r = sum E / sum D,     sum_c influence_c = 0

and the cluster-robust (linearised, "sandwich") variance of FVE is C / (C - 1) times the sum of their squares. The influences of a
difference of two FVE over the same documents are the differences of their influences, so a database can pair any two cells from
one short list each. Intervals take t quantiles of C - 1 degrees of freedom.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import stdtrit

from ksweep.stats.documents import unique_documents

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float

MAX_CLUSTERS = 256
"""More documents than this are joined into so many groups: the t quantile grows from 1.960 to 1.969, and what a registry keeps of
five thousand runs stays at tens of megabytes."""


def document_influence(
    errors: Float[np.ndarray, "activation k"],
    distances: Float[np.ndarray, " activation"],
    documents: Sequence[str] | Sequence[int] | np.ndarray,
    max_clusters: int = MAX_CLUSTERS,
) -> Float[np.ndarray, "k cluster"]:
    """Influence of each document on the FVE at each K, in the sorted order of the document ids.

    Args:
        errors: best-of-K error of each activation.
        distances: what each activation adds to the baseline; for a stated constant that constant.
        documents: the document of each activation.
        max_clusters: document i of the sorted ones goes to group i modulo this, whatever the errors are.
    """
    names, membership = unique_documents(documents)
    clusters = membership % max_clusters
    num_clusters = min(len(names), max_clusters)
    total = distances.sum()
    ratio = errors.sum(axis=0) / total
    moved = -(errors - ratio * distances[:, None]) / total
    return np.stack([np.bincount(clusters, weights=column, minlength=num_clusters) for column in moved.T])


def clustered_interval(
    estimate: Float[np.ndarray, " k"], influence: Float[np.ndarray, "k cluster"], level: float = 0.95
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Normal-theory interval over documents; NaN for a single one."""
    num_clusters = influence.shape[1]
    if num_clusters < 2:
        nothing = np.full(len(influence), np.nan)
        return nothing, nothing.copy()
    spread = np.sqrt(num_clusters / (num_clusters - 1) * np.square(influence).sum(axis=1))
    reach = _quantile((1 + level) / 2, num_clusters - 1) * spread
    return estimate - reach, estimate + reach


@lru_cache(maxsize=1024)  # groups of activations ask for the same few again and again
def _quantile(probability: float, degrees: int) -> float:
    return float(stdtrit(degrees, probability))
