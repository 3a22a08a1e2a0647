"""Errors, baselines and FVE against hand values, identities and the public NLA code's own numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksweep.stats import (
    between_documents_baseline,
    cosines,
    fve,
    mean_distance_baseline,
    reconstruction_errors,
    stated_baseline,
    unit_scaled,
)

NLA = Path(__file__).parents[1] / "fixtures" / "nla"
CASES = sorted(path.parent.name for path in NLA.glob("*/expected.npz"))


def pairs(seed, rows=12, d=7):
    generator = np.random.default_rng(seed)
    vectors = generator.normal(size=(rows, d)) + 0.5
    return vectors, vectors + generator.normal(size=(rows, d))


@pytest.mark.parametrize("case", CASES)
def test_fve_of_public_fixture_equals_the_public_code(case):
    expected = json.loads((NLA / case / "expected.json").read_text())["fve"]
    arrays = np.load(NLA / case / "expected.npz")
    errors = reconstruction_errors(arrays["fve_predictions"], arrays["fve_vectors"])
    baseline = mean_distance_baseline(arrays["fve_vectors"])
    np.testing.assert_allclose(errors, arrays["fve_mse_nrm"], atol=1e-5, rtol=0)
    assert baseline.value == pytest.approx(expected["baseline_raw_mean"], abs=1e-5)
    assert errors.mean() == pytest.approx(expected["mean_mse_nrm"], abs=1e-5)
    assert fve(errors, baseline) == pytest.approx(expected["fve_nrm"], abs=1e-5)
    # The tempting mistake, normalising the mean as well, is far outside the tolerance.
    assert abs(baseline.value - expected["baseline_normalised_mean"]) > 0.01


def test_fixtures_are_there():
    assert CASES == ["gemma3_text", "qwen2_text"]


def test_fve_by_hand_equals_one_minus_the_ratio():
    # Scaled golds (s, 0) and (0, s), s = sqrt(2); mean (s/2, s/2); squared distance 1 over d = 2: 0.5.
    golds = np.array([[3.0, 0.0], [0.0, 0.01]])
    baseline = mean_distance_baseline(golds)
    assert baseline.value == pytest.approx(0.5)
    assert (baseline.kind, baseline.num_activations) == ("distance from mean", 2)
    # First exact, second at 60 degrees: errors 0 and 2(1 - 1/2) = 1; FVE = 1 - 0.5/0.5.
    errors = reconstruction_errors(np.array([[7.0, 0.0], [np.sqrt(3), 1.0]]), golds)
    np.testing.assert_allclose(errors, [0, 1], atol=1e-12)
    assert fve(errors, baseline) == pytest.approx(0)


def test_raw_scoring_by_hand_keeps_norms():
    golds = np.array([[2.0, 0.0], [0.0, 0.0]])  # mean (1, 0): squared distance 1 each over d = 2
    baseline = mean_distance_baseline(golds, "raw")
    assert baseline.value == pytest.approx(0.5)
    errors = reconstruction_errors(np.array([[1.0, 0.0], [0.0, 1.0]]), golds, "raw")
    np.testing.assert_allclose(errors, [0.5, 0.5])
    assert fve(errors, baseline) == pytest.approx(0)


@given(st.integers(0, 10**6), st.lists(st.floats(1e-6, 1e6), min_size=24, max_size=24))
@settings(max_examples=40, deadline=None)
def test_fve_ignores_the_scale_of_activations_and_reconstructions(seed, scales):
    vectors, reconstructions = pairs(seed)
    scales = np.array(scales)[:, None]
    plain = fve(reconstruction_errors(reconstructions, vectors), mean_distance_baseline(vectors))
    scaled_vectors, scaled = vectors * scales[:12], reconstructions * scales[12:]
    rescaled = fve(reconstruction_errors(scaled, scaled_vectors), mean_distance_baseline(scaled_vectors))
    assert rescaled == pytest.approx(plain, abs=1e-9)


@given(st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_normalised_error_equals_twice_one_minus_cosine(seed):
    vectors, reconstructions = pairs(seed)
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(reconstructions, axis=1)
    cosine = (vectors * reconstructions).sum(axis=1) / norms
    np.testing.assert_allclose(reconstruction_errors(reconstructions, vectors), 2 * (1 - cosine), atol=1e-12)


@given(st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_baseline_equals_one_minus_squared_length_of_the_mean_unit_vector(seed):
    vectors, _ = pairs(seed)
    length = np.linalg.norm((vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).mean(axis=0))
    baseline = mean_distance_baseline(vectors)
    assert baseline.value == pytest.approx(1 - length**2, abs=1e-12)
    assert baseline.distances.mean() == pytest.approx(baseline.value)


def test_predicting_the_raw_mean_explains_nothing():
    vectors, _ = pairs(3)
    errors = reconstruction_errors(vectors.mean(axis=0), vectors, "raw")
    assert fve(errors, mean_distance_baseline(vectors, "raw")) == pytest.approx(0, abs=1e-12)


def test_errors_of_many_draws_broadcast_against_their_activation():
    vectors, _ = pairs(4)
    draws = np.random.default_rng(0).normal(size=(12, 5, 7)).astype(np.float32)
    errors = reconstruction_errors(draws, vectors[:, None])
    assert errors.shape == (12, 5)
    assert errors[3, 2] == pytest.approx(reconstruction_errors(draws[3, 2], vectors[3]))


@pytest.mark.slow
def test_baseline_over_several_chunks_equals_the_definition():
    vectors = np.random.default_rng(0).normal(size=(90, 100_000)).astype(np.float32) + 0.3  # 41 rows a chunk
    scaled = unit_scaled(vectors)
    assert mean_distance_baseline(vectors).value == pytest.approx(np.square(scaled - scaled.mean(axis=0)).mean(), abs=1e-12)
    vectors[77] = 0
    with pytest.raises(ValueError, match="vector 77 is all zeros"):
        mean_distance_baseline(vectors)


def test_unit_scaled_of_bad_rows_names_the_row():
    vectors = np.ones((4, 3))
    vectors[2] = 0
    with pytest.raises(ValueError, match="vector 2 is all zeros"):
        unit_scaled(vectors)
    vectors[1, 0] = np.nan
    with pytest.raises(ValueError, match="vector 1 has NaN"):
        unit_scaled(vectors)
    with pytest.raises(ValueError, match=r"vector \(0, 1\) has NaN"):
        unit_scaled(vectors[None])


@pytest.mark.parametrize("scoring", ["normalised", "raw"])
def test_baseline_of_equal_activations_is_refused(scoring):
    copies = np.tile(np.random.default_rng(0).normal(size=64).astype(np.float32), (9, 1))
    with pytest.raises(ValueError, match="no variance to explain"):
        mean_distance_baseline(copies, scoring)
    with pytest.raises(ValueError, match="no variance to explain"):
        between_documents_baseline(copies, range(9), scoring)


def test_baseline_of_parallel_float32_activations_is_refused():
    direction = np.random.default_rng(0).normal(size=64).astype(np.float32)
    with pytest.raises(ValueError, match="point the same way"):
        mean_distance_baseline(direction * np.linspace(0.1, 9, 20, dtype=np.float32)[:, None])


@pytest.mark.parametrize("value", [0, -0.1, np.nan, np.inf, 2.4])
def test_stated_baseline_that_cannot_be_is_refused(value):
    with pytest.raises(ValueError, match="baseline"):
        stated_baseline(value)


def test_stated_baseline_of_raw_scoring_may_exceed_one():
    assert stated_baseline(41.5, scoring="raw").value == 41.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reconstruction_errors(np.ones((2, 3)), np.ones((2, 4))), "3 dimensions and targets 4"),
        (lambda: reconstruction_errors(np.ones((2, 3)), np.ones((5, 3))), "do not line up"),
        (lambda: reconstruction_errors(np.ones(3), np.ones(3), "cosine"), "normalised, raw"),
        (lambda: mean_distance_baseline(np.ones((1, 3))), "at least two"),
        (lambda: fve(np.array([0.1, np.nan]), stated_baseline(0.5)), "activation 1 has error nan"),
    ],
)
def test_bad_input_gets_a_message_that_helps(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_cosines_ignore_lengths_and_leave_a_zero_vector_unknown():
    left, right = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]]), np.array([[6.0, 8.0], [1.0, 1.0], [1.0, 2.0]])
    np.testing.assert_allclose(cosines(left, right), [1.0, 0.5**0.5, np.nan], rtol=1e-12)


def half_mean_square_over_pairs(vectors, documents, weights=None):
    """Half the mean squared distance per dimension over all pairs of different documents, weighted."""
    weights = np.ones(len(vectors)) if weights is None else weights
    total = pairs_counted = 0.0
    for i in range(len(vectors)):
        for j in range(len(vectors)):
            if documents[i] != documents[j]:
                total += weights[i] * weights[j] * np.square(vectors[i] - vectors[j]).mean() / 2
                pairs_counted += weights[i] * weights[j]
    return total / pairs_counted


UNEVEN = np.array(list("daaaabbcaecbaaaa"))


def test_baseline_between_documents_by_hand():
    # Two documents, a: (2, 0) and (0, 0), b: (0, 2). Squared distances over d = 2: 4 and 2; half of their mean 3.
    baseline = between_documents_baseline(np.array([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), ["a", "b", "a"], "raw")
    assert baseline.value == pytest.approx(1.5)
    assert (baseline.kind, baseline.num_activations, baseline.scoring) == ("between documents", 3, "raw")
    # N = 3, N^2 - sum n^2 = 4; halves over others a = 2, 3 (b has both), 1; others 1, 2, 1: 1.5 + 6/4 (a - 1.5 others).
    np.testing.assert_allclose(baseline.distances, [2.25, 1.5, 0.75])


@pytest.mark.parametrize("scoring", ["normalised", "raw"])
@pytest.mark.parametrize("documents", [UNEVEN, np.arange(16), np.repeat([0, 1], 8), np.repeat([5, 3], [15, 1])])
def test_baseline_between_documents_equals_the_mean_over_pairs(scoring, documents):
    vectors = np.random.default_rng(5).normal(size=(16, 6)) + 3
    space = unit_scaled(vectors) if scoring == "normalised" else vectors
    baseline = between_documents_baseline(vectors, documents, scoring)
    assert baseline.value == pytest.approx(half_mean_square_over_pairs(space, documents), rel=1e-12)
    assert baseline.distances.mean() == pytest.approx(baseline.value, rel=1e-12)


def test_distances_between_documents_give_a_resampled_baseline_to_first_order():
    vectors, step = np.random.default_rng(6).normal(size=(16, 6)) + 3, 1e-5
    distances = between_documents_baseline(vectors, UNEVEN, "raw").distances
    for document in "abcde":
        up, down = (np.where(document == UNEVEN, 1 + sign * step, 1.0) for sign in (1, -1))
        exact = half_mean_square_over_pairs(vectors, UNEVEN, up) - half_mean_square_over_pairs(vectors, UNEVEN, down)
        linear = (up @ distances) / up.sum() - (down @ distances) / down.sum()
        assert linear / step == pytest.approx(exact / step, abs=1e-6)


def test_distances_between_many_documents_tend_to_those_from_the_mean():
    vectors, documents = np.random.default_rng(7).normal(size=(6000, 8)), np.repeat(np.arange(3000), 2)
    between, mean = between_documents_baseline(vectors, documents, "raw"), mean_distance_baseline(vectors, "raw")
    np.testing.assert_allclose(between.distances, mean.distances, rtol=5e-3, atol=5e-3)


def test_baseline_between_documents_far_from_the_origin_keeps_its_digits():
    vectors = np.random.default_rng(8).normal(size=(16, 6))
    near, far = (between_documents_baseline(vectors + offset, UNEVEN, "raw") for offset in (0, 1e4))
    assert far.value == pytest.approx(near.value, rel=1e-10)
    np.testing.assert_allclose(far.distances, near.distances, rtol=1e-9)


@pytest.mark.slow
def test_baseline_between_documents_of_a_memory_map_over_several_chunks_equals_the_definition(tmp_path):
    generator = np.random.default_rng(9)
    np.save(tmp_path / "vectors.npy", generator.normal(size=(90, 100_000)).astype(np.float32) + 0.3)  # 41 rows a chunk
    vectors = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    scaled = unit_scaled(vectors)
    squared = (2 - 2 * scaled @ scaled.T / 100_000) / 2  # half the squared distance per dimension of rows of mean square 1
    for documents in (generator.integers(0, 60, 90), np.repeat([1, 2, 3], [55, 30, 5])):
        other = documents[:, None] != documents
        baseline = between_documents_baseline(vectors, documents)
        assert baseline.value == pytest.approx(squared[other].mean(), abs=1e-12)
        assert baseline.distances.mean() == pytest.approx(baseline.value, abs=1e-12)


def test_baseline_between_documents_is_right_on_average_where_the_distance_from_the_mean_is_low():
    # Documents vary by 1, activations within one by 1: the variance over the population is 2. Eight documents, one large.
    generator, found = np.random.default_rng(10), []
    documents = np.repeat(np.arange(8), [40, 5, 5, 5, 2, 2, 1, 1])
    for _ in range(300):
        vectors = generator.normal(size=(8, 200))[documents] + generator.normal(size=(len(documents), 200))
        found.append([between_documents_baseline(vectors, documents, "raw").value, mean_distance_baseline(vectors, "raw").value])
    between, mean = np.mean(found, axis=0)
    assert abs(between - 2) < 0.02  # standard error 0.005
    assert mean < 1.6


def test_baseline_between_documents_of_one_document_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"one document.*scoring\.baseline=.*'distance from mean'"):
        between_documents_baseline(np.eye(3), ["only"] * 3)


def test_baseline_between_documents_needs_an_id_for_each_activation():
    with pytest.raises(ValueError, match="3 activations and document ids for 2"):
        between_documents_baseline(np.eye(3), ["a", "b"])
