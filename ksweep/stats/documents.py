"""Documents, the clusters of the bootstrap, and their effective number."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Int


def unique_documents(
    documents: Sequence[str] | Sequence[int] | np.ndarray,
) -> tuple[list[str], Int[np.ndarray, " activation"]]:
    """Return the sorted document ids as strings, and for each activation the index of its document."""
    ids = np.asarray(documents)
    if ids.ndim != 1 or not ids.size:
        raise ValueError(f"documents must be one id per activation; got an array of shape {ids.shape}")
    if ids.dtype.kind == "O":
        bad = [row for row, name in enumerate(ids) if not isinstance(name, (str, int, np.integer))]
        if bad:
            raise ValueError(f"activation {bad[0]} has document id {ids[bad[0]]!r}; an id is a string or a whole number")
    elif ids.dtype.kind not in "UiuT":
        raise ValueError(f"document ids are strings or whole numbers; got {ids.dtype}")
    # As strings: ids read back from a database as text must give the same order, hence the same replicates.
    names, membership = np.unique(ids.astype(np.str_), return_inverse=True)
    return names.tolist(), membership


def effective_documents(documents: Sequence[str] | Sequence[int] | np.ndarray) -> float:
    """Return the effective number of documents: (sum n)^2 / sum n^2, n the activations of each document (Kish 1965).

    It equals the number of documents if all have the same size, and tends to 1 if one document has nearly all activations.
    """
    return effective_number(np.bincount(unique_documents(documents)[1]))


def effective_number(sizes: Int[np.ndarray, " document"]) -> float:
    """Return `effective_documents` from the number of activations of each document."""
    return float(sizes.sum() ** 2 / np.square(sizes, dtype=np.float64).sum())
