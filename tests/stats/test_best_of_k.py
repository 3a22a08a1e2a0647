"""Order-statistics estimators against brute force over every subset and hand values."""

from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksweep.stats import (
    all_failed_rates,
    best_errors,
    best_errors_over_successes,
    best_of_k_errors,
    best_of_k_errors_over_successes,
    best_of_k_failure_rates,
    best_of_k_select,
    best_of_k_weights,
    select,
)

NAN = np.nan
# A few repeated values, so that ties happen, and failures.
one_error = st.one_of(st.sampled_from([0.0, 0.5, 1.0, 3.5]), st.floats(0, 4), st.just(NAN))
errors_of_one = st.lists(one_error, min_size=1, max_size=7)


def subsets(errors, k):
    return [list(chosen) for chosen in combinations(range(len(errors)), k)]


def best(errors, chosen):
    """What the policy keeps of one subset: the smallest error of a success, or 2 where all failed."""
    successes = [errors[draw] for draw in chosen if not np.isnan(errors[draw])]
    return min(successes) if successes else 2.0


@pytest.mark.slow
@given(errors_of_one)
@settings(max_examples=150, deadline=None)
def test_best_of_k_errors_equal_the_mean_over_every_subset(errors):
    ks = range(1, len(errors) + 1)
    brute = [np.mean([best(errors, chosen) for chosen in subsets(errors, k)]) for k in ks]
    np.testing.assert_allclose(best_of_k_errors([errors], ks)[0], brute, atol=1e-12)


@given(errors_of_one)
@settings(max_examples=100, deadline=None)
def test_failure_rates_equal_the_share_of_subsets_without_success(errors):
    ks = range(1, len(errors) + 1)
    brute = [np.mean([np.isnan(np.take(errors, chosen)).all() for chosen in subsets(errors, k)]) for k in ks]
    np.testing.assert_allclose(best_of_k_failure_rates([errors], ks)[0], brute, atol=1e-12)


@given(errors_of_one)
@settings(max_examples=100, deadline=None)
def test_errors_over_successes_equal_the_mean_over_subsets_with_a_success(errors):
    ks = range(1, len(errors) + 1)
    brute = []
    for k in ks:
        kept = [best(errors, c) for c in subsets(errors, k) if not np.isnan(np.take(errors, c)).all()]
        brute.append(np.mean(kept) if kept else NAN)
    np.testing.assert_allclose(best_of_k_errors_over_successes([errors], ks)[0], brute, atol=1e-12)


@given(errors_of_one, st.integers(0, 10**6))
@settings(max_examples=150, deadline=None)
def test_best_of_k_select_equals_the_mean_over_every_subset_with_ties_shared(errors, seed):
    quantity = np.random.default_rng(seed).normal(size=len(errors))
    ranks = np.where(np.isnan(errors), np.inf, errors)
    # Ties are shared over the whole tied block of the N draws, not only over those in the subset.
    shared = np.array([quantity[ranks == rank].mean() for rank in ranks])
    ks = range(1, len(errors) + 1)
    brute = [np.mean([shared[min(c, key=lambda draw: ranks[draw])] for c in subsets(errors, k)]) for k in ks]
    np.testing.assert_allclose(best_of_k_select([quantity], [errors], ks)[0], brute, atol=1e-12)


@given(st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_weights_equal_the_binomial_ratio_exactly(num_draws):
    ks = range(1, num_draws + 1)
    exact = [[comb(num_draws - i, k - 1) / comb(num_draws, k) for k in ks] for i in range(1, num_draws + 1)]
    np.testing.assert_allclose(best_of_k_weights(num_draws, ks), exact, rtol=1e-12)


def test_weights_at_ten_thousand_draws_stay_accurate():
    ks = [1, 2, 7, 100, 5000, 9999, 10_000]
    weights = best_of_k_weights(10_000, ks)
    np.testing.assert_allclose(weights.sum(axis=0), 1, atol=1e-11)
    for column, k in enumerate(ks):
        for rank in (1, 2, 50, 1000):
            exact = comb(10_000 - rank, k - 1) / comb(10_000, k)
            assert weights[rank - 1, column] == pytest.approx(exact, rel=1e-10, abs=1e-300)


def test_best_of_one_is_the_mean_and_best_of_all_the_minimum():
    errors = np.random.default_rng(0).random((30, 16))
    curve = best_of_k_errors(errors, [1, 16])
    np.testing.assert_allclose(curve[:, 0], errors.mean(axis=1))
    np.testing.assert_allclose(curve[:, 1], errors.min(axis=1))


def test_failed_draws_by_hand_follow_the_policy():
    errors = [[0.4, NAN, 3.0], [NAN, NAN, NAN]]
    # K = 1: (0.4 + 2 + 3)/3. K = 2: {.4,F} .4, {.4,3} .4, {F,3} 3, for a success of 3 goes before a failure.
    np.testing.assert_allclose(best_of_k_errors(errors, [1, 2, 3]), [[1.8, 3.8 / 3, 0.4], [2, 2, 2]])
    # With one own value per activation, as raw scoring needs: (0.4 + 9 + 3)/3 and 7.
    np.testing.assert_allclose(best_of_k_errors(errors, [1], np.array([9.0, 7.0])), [[12.4 / 3], [7]])
    np.testing.assert_allclose(best_of_k_failure_rates(errors, [1, 2, 3]), [[1 / 3, 0, 0], [1, 1, 1]])
    over = best_of_k_errors_over_successes(errors, [1, 2, 3])
    np.testing.assert_allclose(over, [[1.7, 3.8 / 3, 0.4], [NAN, NAN, NAN]])


def test_select_by_hand_takes_the_cosine_of_the_best_and_zero_for_a_failure():
    errors, cosine = [[0.4, NAN]], [[0.8, NAN]]
    np.testing.assert_allclose(best_of_k_select(cosine, errors, [1, 2], failed_value=0.0), [[0.4, 0.8]])
    # Unknown is unknown: a missing value shows where its draw may be the one that is kept, and only there.
    np.testing.assert_allclose(best_of_k_select(cosine, errors, [1, 2]), [[NAN, 0.8]])


def test_select_of_the_errors_themselves_equals_best_of_k():
    errors = np.random.default_rng(1).choice([0.1, 0.2, 0.7, NAN], size=(20, 8))
    ks = [1, 3, 8]
    np.testing.assert_allclose(best_of_k_select(errors, errors, ks, failed_value=2.0), best_of_k_errors(errors, ks))


def test_estimates_leave_their_input_alone():
    errors, tokens = np.array([[0.5, NAN, 0.1]]), np.array([[5.0, 6.0, 7.0]])
    before = errors.copy(), tokens.copy()
    best_of_k_errors(errors, [1])
    best_of_k_select(tokens, errors, [1], failed_value=0.0)
    np.testing.assert_array_equal(errors, before[0])
    np.testing.assert_array_equal(tokens, before[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: best_of_k_errors(np.ones((2, 16)), [32]), "best-of-32 needs at least 32 draws .* 16: raise"),
        (lambda: best_of_k_errors(np.ones((2, 4)), [0]), "at least 1"),
        (lambda: best_of_k_errors(np.ones((2, 4)), [1.5]), "whole numbers"),
        (lambda: best_of_k_errors(np.ones((2, 4)), []), "at least 1"),
        (lambda: best_of_k_errors(np.ones(4), [1]), r"\[activation, draw\]"),
        (lambda: best_of_k_errors([[0.1, np.inf]], [1]), "draw 1 of activation 0 has error inf"),
        (lambda: best_of_k_errors([[0.1], [-0.2]], [1]), "draw 0 of activation 1 has error -0.2"),
        (lambda: best_of_k_errors(np.ones((2, 4)), [1], np.ones(3)), "one for each of 2 activations"),
        (lambda: best_of_k_select(np.ones((2, 3)), np.ones((2, 4)), [1]), "both must be"),
    ],
)
def test_bad_input_gets_a_message_that_helps(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# A failed draw and a success of error 3, which is worse than the 2 that a failure counts as.
WORSE_THAN_A_FAILURE = np.array([[NAN, 3.0]])


@pytest.mark.parametrize(("selection", "first"), [("order_statistics", 2.5), ("prefix", 2.0)])
def test_a_success_worse_than_a_failure_is_kept_all_the_same(selection, first):
    # One draw of the two is the failure (2) or the success (3); the first draw is the failure. Of both the success is kept.
    assert best_errors(WORSE_THAN_A_FAILURE, [1, 2], selection).tolist() == [[first, 3.0]]
    assert best_errors(WORSE_THAN_A_FAILURE, [2], selection, failed_error=0.5).tolist() == [[3.0]]
    cosines = select(np.array([[NAN, -0.5]]), WORSE_THAN_A_FAILURE, [2], selection, failed_value=0.0)
    assert cosines.tolist() == [[-0.5]]
    assert best_errors_over_successes(WORSE_THAN_A_FAILURE, [2], selection).tolist() == [[3.0]]
    assert all_failed_rates(WORSE_THAN_A_FAILURE, [1, 2], selection)[0].tolist() == [first == 2.0 or 0.5, 0.0]


@given(errors_of_one)
@settings(max_examples=100, deadline=None)
def test_prefix_selection_keeps_the_best_success_of_the_first_k(errors):
    ks = range(1, len(errors) + 1)
    assert best_errors([errors], ks, "prefix")[0].tolist() == [best(errors, range(k)) for k in ks]
    failed = [float(np.isnan(errors[:k]).all()) for k in ks]
    assert all_failed_rates([errors], ks, "prefix")[0].tolist() == failed
    known = best_errors_over_successes([errors], ks, "prefix")[0]
    assert np.isnan(known).tolist() == [rate == 1.0 for rate in failed]


def test_an_unknown_selection_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="one of order_statistics, prefix; got 'best'"):
        best_errors([[1.0]], [1], "best")
