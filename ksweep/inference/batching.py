"""Batches of rows of similar length for a forward pass: little padding, and not too many batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BATCH_COST = 64
"""Fixed cost of a batch, in tokens. Measured on 2 cores with 21 blocks of 576: launching its operations takes as long as 10 more
tokens, and products with 64 tokens run at 3/4 of the speed of those with 512. Larger models and GPUs have other costs, but nearly
the same best batches."""


def length_batches(lengths: Sequence[int], most_tokens: int, most_rows: int | None = None) -> list[list[int]]:
    """Cut rows into batches, longest first, with the fewest padded tokens plus `BATCH_COST` per batch. Returns indices of rows.

    Rows of length 0 are left out. A batch has at most `most_rows` rows (at least 1) and `most_tokens` padded tokens, or a single
    row with more. The same lengths give the same batches, on any machine.
    """
    most_rows = len(lengths) if most_rows is None else max(1, most_rows)
    order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: (-lengths[i], i))
    ordered = np.array([lengths[i] for i in order], dtype=np.int64)
    # 1. Dynamic programming over rows sorted by length. cost[i]: of the first i rows in their best batches, the last of which
    # begins at row begin[i], its longest.
    cost, begin = np.zeros(len(order) + 1, dtype=np.int64), np.zeros(len(order) + 1, dtype=np.int64)
    for end in range(1, len(order) + 1):
        # Every row of a batch is at least as long as its last one.
        rows = max(1, min(most_rows, most_tokens // int(ordered[end - 1]), end))
        first = np.arange(end - rows, end)
        padded = (end - first) * ordered[first]
        allowed = (padded <= most_tokens) | (first == end - 1)
        total = np.where(allowed, cost[first] + padded + BATCH_COST, np.iinfo(np.int64).max)
        best = int(total.argmin())
        cost[end], begin[end] = total[best], first[best]
    # 2. Follow the beginnings back from the last row.
    batches, end = [], len(order)
    while end:
        batches.append(order[begin[end] : end])
        end = int(begin[end])
    return batches[::-1]
