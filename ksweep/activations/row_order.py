"""Read the rows of a text in the order in which activations are taken from them: as they stand, or as a seed says.

Under rows=random a row's place depends on the seed and on its document and id, so that the first n activations are a sample of
the whole text, more of them add to it, and rows that are appended to a text leave the order of the others as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from ksweep.activations.datasets import TextRow, read_documents, text_format
from ksweep.config.spec import Activations
from ksweep.utils.errors import DataError

if TYPE_CHECKING:
    from jaxtyping import Int64

POOL_ROWS = 10_000
"""Rows of a hub dataset that are put in order together: it is streamed, and may be larger than a disk."""

WINDOW_ROWS = 16_384
"""Rows of a local text that are held in memory at once; each window of the order is a pass through the text."""


def rows_identity(activations: Activations) -> dict[str, object]:
    """Return the part of the rule for rows that decides which activations there are; nothing for rows=first."""
    if activations.rows == "first":  # so that keys from before there was a choice hold
        return {}
    pool = {"pool": POOL_ROWS} if activations.vectors is None and text_format(activations) == "hub" else {}
    return {"rows": {"rule": activations.rows, "seed": activations.seed, **pool}}


def ordered_rows(activations: Activations) -> Iterator[TextRow]:
    """Yield the rows of `activations.text` in the order in which activations are taken from them.

    Raises:
        DataError: as `read_documents`.
    """
    if activations.rows == "first":
        yield from read_documents(activations)
    elif text_format(activations) == "hub":
        yield from _in_pools(read_documents(activations), activations.seed)
    else:
        order = _order_of(activations)
        for start in range(0, len(order), WINDOW_ROWS):
            yield from _picked(activations, order[start : start + WINDOW_ROWS])


def _order_of(activations: Activations) -> Int64[np.ndarray, " row"]:
    """Return the indices of a local text's rows in the order of the seed; reads all of it."""
    return ascending(row_number(activations.seed, row.document, row.row_id) for row in read_documents(activations))


def row_number(seed: int, document: str, row_id: str) -> int:
    """Return the number that a row is ordered by, 0 to 2^64 - 1: the beginning of a SHA-256 of seed, document and row id."""
    return int.from_bytes(hashlib.sha256(f"rows|{seed}|{document}|{row_id}".encode()).digest()[:8])


def ascending(numbers: Iterable[int]) -> Int64[np.ndarray, " row"]:
    """Return the indices of numbers in ascending order; of equal ones the earlier comes first."""
    return np.argsort(np.fromiter(numbers, dtype=np.uint64), kind="stable")


def _in_pools(rows: Iterator[TextRow], seed: int) -> Iterator[TextRow]:
    while pool := list(islice(rows, POOL_ROWS)):
        yield from (pool[i] for i in ascending(row_number(seed, row.document, row.row_id) for row in pool))


def _picked(activations: Activations, indices: Int64[np.ndarray, " row"]) -> Iterator[TextRow]:
    """Yield the rows at these indices, in their order, from one pass through the text."""
    wanted, rows = set(indices.tolist()), {}
    for row in read_documents(activations):
        if row.index in wanted:
            rows[row.index] = row
            if len(rows) == len(wanted):
                break
    if len(rows) < len(wanted):
        raise DataError(
            f"{activations.text} gave {len(wanted) - len(rows)} rows fewer than a moment ago: was it changed? Run again."
        )
    yield from (rows[i] for i in indices.tolist())
