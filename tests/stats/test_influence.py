"""Linearised intervals over documents: against the textbook formula, a jackknife, and their own coverage."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from ksweep.stats.influence import clustered_interval, document_influence


def simulated(generator: np.random.Generator, num_documents: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Errors, distances and documents of 5 activations a document, half of the variance between documents."""
    shift = np.repeat(generator.normal(size=num_documents), 5)
    errors = 0.5 + 0.1 * (shift + generator.normal(size=5 * num_documents))
    distances = 1.0 + 0.1 * (0.5 * shift + generator.normal(size=5 * num_documents))
    return errors, distances, np.repeat(np.arange(num_documents), 5)


def test_influence_is_what_leaving_a_document_out_changes_to_first_order() -> None:
    errors, distances, documents = simulated(np.random.default_rng(0), 40)
    influence = document_influence(errors[:, None], distances, documents)[0]
    whole = 1 - errors.sum() / distances.sum()
    names = np.unique(documents.astype(str))
    without = [1 - errors[documents.astype(str) != n].sum() / distances[documents.astype(str) != n].sum() for n in names]
    assert influence.sum() == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(influence, (whole - np.array(without)) * (1 - 1 / 40), rtol=0.02, atol=2e-5)


def test_interval_is_students_t_times_the_clustered_error() -> None:
    errors, distances, documents = simulated(np.random.default_rng(1), 12)
    influence = document_influence(errors[:, None], distances, documents)
    ratio = errors.sum() / distances.sum()
    sums = np.array([(errors - ratio * distances)[documents == d].sum() for d in range(12)])
    error = np.sqrt(12 / 11 * np.square(sums).sum()) / distances.sum()
    low, high = clustered_interval(np.array([1 - ratio]), influence)
    reach = scipy_stats.t.ppf(0.975, 11) * error
    assert (low[0], high[0]) == (pytest.approx(1 - ratio - reach, abs=1e-9), pytest.approx(1 - ratio + reach, abs=1e-9))
    assert np.isnan(clustered_interval(np.array([0.5]), influence[:, :1])).all()


def test_more_documents_than_clusters_are_joined_and_the_error_stays() -> None:
    errors, distances, documents = simulated(np.random.default_rng(2), 2000)
    few = document_influence(errors[:, None], distances, documents)
    all_of_them = document_influence(errors[:, None], distances, documents, max_clusters=10_000)
    assert few.shape == (1, 256) and all_of_them.shape == (1, 2000)
    assert np.linalg.norm(few) == pytest.approx(float(np.linalg.norm(all_of_them)), rel=0.15)


def test_interval_of_an_fve_covers_its_population_value() -> None:
    generator, hits, trials = np.random.default_rng(3), 0, 600
    for _ in range(trials):
        errors, distances, documents = simulated(generator, 40)
        estimate = np.array([1 - errors.sum() / distances.sum()])
        low, high = clustered_interval(estimate, document_influence(errors[:, None], distances, documents))
        hits += bool(low[0] <= 0.5 <= high[0])
    assert 0.92 < hits / trials < 0.98
