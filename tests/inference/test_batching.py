"""Batches of rows of similar length."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ksweep.inference.batching import BATCH_COST, length_batches

LENGTHS = st.lists(st.integers(0, 300), max_size=12)


def cost(lengths: list[int], batches: list[list[int]]) -> int:
    return sum(max(lengths[i] for i in batch) * len(batch) + BATCH_COST for batch in batches)


def cheapest(lengths: list[int], most_tokens: int, most_rows: int) -> int:
    """Of all ways to cut rows in the order of their lengths."""
    if not lengths:
        return 0
    ways = [
        lengths[0] * count + BATCH_COST + cheapest(lengths[count:], most_tokens, most_rows)
        for count in range(1, min(most_rows, len(lengths)) + 1)
        if count == 1 or lengths[0] * count <= most_tokens
    ]
    return min(ways)


def test_every_row_is_in_one_batch_within_the_limits() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(0, 90, size=200)]
    batches = length_batches(lengths, 256, most_rows=5)
    assert sorted(i for batch in batches for i in batch) == [i for i, n in enumerate(lengths) if n]
    assert all(max(lengths[i] for i in batch) * len(batch) <= 256 and len(batch) <= 5 for batch in batches)


@given(LENGTHS, st.sampled_from([100, 400, 10_000]), st.sampled_from([1, 3, 12]))
def test_no_other_cuts_are_cheaper(lengths: list[int], most_tokens: int, most_rows: int) -> None:
    batches = length_batches(lengths, most_tokens, most_rows)
    assert sorted(i for batch in batches for i in batch) == [i for i, n in enumerate(lengths) if n]
    assert cost(lengths, batches) == cheapest(sorted(filter(None, lengths), reverse=True), most_tokens, most_rows)


def test_a_row_longer_than_the_limit_goes_alone() -> None:
    assert length_batches([5, 300, 0, 6], most_tokens=100) == [[1], [3, 0]]


def test_rows_of_one_length_are_not_cut() -> None:
    assert length_batches([7] * 50, most_tokens=10_000) == [list(range(50))]
    assert length_batches([], most_tokens=10) == []
    assert length_batches([3, 2], most_tokens=10, most_rows=0) == [[0], [1]]
