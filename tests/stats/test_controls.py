"""Controls against brute force, and on synthetic draws that know everything, something or nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksweep.stats import (
    between_documents_baseline,
    derangement,
    fve,
    fve_curve,
    mean_distance_baseline,
    mean_reconstructions,
    mean_vector_error,
    reconstruction_errors,
    retrieval,
    stated_baseline,
)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=40), st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_derangement_uses_each_donor_once_and_another_document_where_that_can_be(documents, seed):
    documents = np.array(documents)
    donors = derangement(len(documents), seed, documents)
    assert sorted(donors) == list(range(len(documents)))
    assert (donors != np.arange(len(documents))).all()
    if 2 * np.bincount(documents).max() <= len(documents):
        assert (documents[donors] != documents).all()


def test_derangement_depends_on_the_seed_alone():
    assert derangement(50, 3).tolist() == derangement(50, 3).tolist()
    assert derangement(50, 3).tolist() != derangement(50, 4).tolist()


def synthetic(knowledge, num_activations=60, num_draws=8, d=24, seed=0):
    generator = np.random.default_rng(seed)
    vectors = generator.normal(size=(num_activations, d)) + 0.5
    noise = generator.normal(size=(num_activations, num_draws, d)) + 0.5
    return vectors, knowledge * vectors[:, None] + (1 - knowledge) * noise


def test_draws_of_another_activation_climb_with_k_but_stay_far_below():
    vectors, draws = synthetic(0.6)
    documents = np.repeat(np.arange(20), 3)
    baseline = mean_distance_baseline(vectors)
    donors = derangement(len(vectors), 0, documents)
    own = fve_curve(reconstruction_errors(draws, vectors[:, None]), documents, baseline)
    swapped = fve_curve(reconstruction_errors(draws[donors], vectors[:, None]), documents, baseline)
    assert swapped.fve[-1] > swapped.fve[0] + 0.1  # selection alone
    assert (own.fve_low > swapped.fve_high).all()


def test_scoring_in_the_donors_order_gives_the_same_errors():
    vectors, draws = synthetic(0.6)
    donors = derangement(len(vectors), 0)
    recipient = np.argsort(donors)
    by_donor = reconstruction_errors(draws, vectors[recipient][:, None])
    np.testing.assert_allclose(by_donor[donors], reconstruction_errors(draws[donors], vectors[:, None]))


@pytest.mark.parametrize("scoring", ["normalised", "raw"])
def test_mean_vector_error_equals_scoring_the_mean_itself(scoring):
    vectors, _ = synthetic(0)
    baseline = mean_distance_baseline(vectors, scoring)
    directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    mean = (vectors if scoring == "raw" else directions).mean(axis=0)
    errors = reconstruction_errors(mean, vectors, scoring)
    assert mean_vector_error(baseline) == pytest.approx(errors.mean(), abs=1e-12)
    assert fve(errors, baseline) <= 1e-12


def test_mean_vector_error_of_a_baseline_between_documents_is_refused_with_the_one_to_pass():
    vectors, _ = synthetic(0)
    with pytest.raises(ValueError, match="pass mean_distance_baseline"):
        mean_vector_error(between_documents_baseline(vectors, np.arange(len(vectors))))


def test_mean_vector_error_of_public_baselines_equals_the_published_table():
    # reference/nla_checkpoints.md 4.3: 2(1 - R) for Qwen-7B, Gemma-12B, Gemma-27B, Llama-70B
    for value, expected in [(0.7335, 0.968), (0.0302, 0.03043), (0.0579, 0.05876), (0.9169, 1.423)]:
        assert mean_vector_error(stated_baseline(value)) == pytest.approx(expected, rel=1e-3)


def flat(draws, keep):
    """Successful draws in one list with their owners, as a rank has them."""
    owners, draw = np.nonzero(keep)
    return draws[owners, draw], owners


@pytest.mark.parametrize("scoring", ["normalised", "raw"])
def test_retrieval_ranks_equal_brute_force_over_all_pairs(scoring):
    vectors, draws = synthetic(0.25)
    vectors *= np.random.default_rng(1).uniform(0.5, 2, size=(len(vectors), 1))
    keep = np.random.default_rng(2).random(draws.shape[:2]) > 0.3
    keep[7] = False
    found = retrieval(mean_reconstructions(*flat(draws, keep), len(vectors), scoring), vectors, scoring)
    for i in range(len(vectors)):
        if i == 7:
            assert np.isnan(found.ranks[i])
            continue
        errors = reconstruction_errors(draws[i, keep[i]][:, None], vectors[None], scoring).mean(axis=0)
        assert found.ranks[i] == 1 + (errors < errors[i]).sum()
    assert 0.05 < found.top_1_rate < 0.95  # a hard case, so the comparison means something
    assert found.top_1_rate == (found.ranks == 1).sum() / len(vectors)  # the failed one counts as missed
    assert found.top_1_rate < found.mean_reciprocal_rank < 1


@pytest.mark.parametrize(("knowledge", "low", "high"), [(1.0, 1.0, 1.0), (0.0, 0.0, 0.1)])
def test_retrieval_of_draws_that_know_all_or_nothing_is_perfect_or_chance(knowledge, low, high):
    vectors, draws = synthetic(knowledge, num_activations=200)
    found = retrieval(mean_reconstructions(*flat(draws, np.ones(draws.shape[:2], bool)), 200), vectors)
    assert low <= found.top_1_rate <= high
    assert found.chance == 1 / 200


def test_retrieval_among_nearly_parallel_activations_keeps_its_precision():
    generator = np.random.default_rng(0)
    vectors = 20_000 + generator.normal(size=(300, 64)).astype(np.float32)  # cosines above 0.99999999
    found = retrieval(mean_reconstructions(vectors, np.arange(300), 300), vectors)
    assert found.top_1_rate == 1


def test_retrieval_among_copies_counts_ties_against_it():
    vectors = np.vstack([np.eye(3), np.eye(3)])
    assert retrieval(mean_reconstructions(vectors, np.arange(6), 6), vectors).ranks.tolist() == [2] * 6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: derangement(1, 0), "at least two"),
        (lambda: derangement(3, 0, ["a", "b"]), "document ids for 2"),
        (lambda: mean_reconstructions(np.ones((2, 3)), [0], 4), "each with an owner"),
        (lambda: mean_reconstructions(np.ones((2, 3)), [0, 4], 4), "from 0 to 4 and there are 4"),
        (lambda: retrieval(np.ones((2, 3)), np.ones((3, 3))), "one mean reconstruction each"),
    ],
)
def test_bad_input_gets_a_message_that_helps(call, message):
    with pytest.raises(ValueError, match=message):
        call()
