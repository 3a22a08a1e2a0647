"""Which activation stands in for another in the shuffled control, and which reconstructions are kept."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksweep.evaluation.scoring import running_minima, shuffled_partners

# Documents in the order of a store: runs of activations of one document, neighbouring runs of different ones.
runs = st.lists(st.integers(1, 5), min_size=1, max_size=8)


def documents_of(lengths: list[int]) -> np.ndarray:
    return np.array([f"d{i}" for i, n in enumerate(lengths) for _ in range(n)], dtype=object)


@given(runs.filter(lambda lengths: len(lengths) > 1))
def test_shuffled_partners_are_of_another_document(lengths: list[int]) -> None:
    documents = documents_of(lengths)
    found = shuffled_partners(documents)
    assert (found[: lengths[0]] == -1).all() and (found[lengths[0] :] >= 0).all()
    assert (documents[found] != documents)[found >= 0].all()


@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=12).filter(lambda names: len(set(names)) > 1))
def test_shuffled_partners_are_of_another_document_also_where_one_comes_back(names: list[str]) -> None:
    documents = np.array(names, dtype=object)
    found = shuffled_partners(documents)
    assert (documents[found] != documents)[found >= 0].all() and (found >= 0).any()


@given(runs, st.data())
def test_shuffled_partners_stay_the_same_when_the_run_grows(lengths: list[int], data: st.DataObject) -> None:
    documents = documents_of(lengths)
    count = data.draw(st.integers(1, len(documents)))
    np.testing.assert_array_equal(shuffled_partners(documents[:count]), shuffled_partners(documents)[:count])


@given(st.integers(1, 20))
def test_shuffled_partners_within_one_document_are_unknown(count: int) -> None:
    assert shuffled_partners(documents_of([count])).tolist() == [-1] * count


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([1, 1], [-1, 0]),
        ([2, 1], [-1, -1, 0]),
        ([2, 3], [-1, -1, 0, 1, 0]),  # those of the first in turn
        ([1, 1, 2], [-1, 0, 1, 1]),
        ([3, 2, 4], [-1, -1, -1, 0, 1, 3, 4, 3, 4]),
    ],
)
def test_shuffled_partners_go_round_the_document_before(lengths: list[int], expected: list[int]) -> None:
    assert shuffled_partners(documents_of(lengths)).tolist() == expected


def test_shuffled_partners_of_documents_numbered_by_row_work_too() -> None:
    assert shuffled_partners(np.array([7, 7, 9])).tolist() == [-1, -1, 0]


@given(st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4, float("nan")]), min_size=1, max_size=12), st.data())
def test_the_best_of_the_first_k_is_a_running_minimum_however_draws_are_cut(errors: list[float], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, len(errors)), max_size=3)) | {0, len(errors)})
    kept = [x for a, b in pairwise(cuts) for x in running_minima(np.array([errors[a:b]]))[0]]
    for k in range(1, len(errors) + 1):
        known = [(error, draw) for draw, error in enumerate(errors[:k]) if not np.isnan(error)]
        assert not known or kept[min(known)[1]]


def test_running_minima_leave_out_ties_failures_and_what_is_worse() -> None:
    nan = float("nan")
    errors = np.array([[3.0, 4.0, 2.0, 2.0, nan, 1.0], [nan, nan, 5.0, 6.0, 5.0, 4.0]])
    expected = [[True, False, True, False, False, True], [False, False, True, False, False, True]]
    assert running_minima(errors).tolist() == expected
