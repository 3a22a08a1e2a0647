"""The FVE that a watcher sees while a cell is drawn: the plain ratio, over what is there."""

from __future__ import annotations

import numpy as np
import pytest

from ksweep import so_far


def test_fve_so_far_is_one_minus_mean_error_over_baseline_with_failures_as_orthogonal() -> None:
    vectors = np.random.default_rng(0).normal(size=(6, 8))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    baseline = 1 - np.square(unit.mean(axis=0)).sum()  # of unit vectors: 1 - |mean|^2
    watched = so_far.start(vectors, "normalised")
    watched.add(np.array([0.2, np.nan, 0.4, 0.6]), np.array([0, 0, 1, 1]), np.array(["a", "b"], dtype=object))
    assert watched.numbers["fve"] == pytest.approx(1 - np.mean([(0.2 + 2.0) / 2, 0.5]) / baseline)
    watched.add(np.array([0.3, 0.5]), np.array([0, 1]), np.array(["c", "d"], dtype=object))
    assert watched.numbers["fve"] == pytest.approx(1 - np.mean([1.1, 0.5, 0.3, 0.5]) / baseline)
    assert watched.numbers["fve_low"] < watched.numbers["fve"] < watched.numbers["fve_high"]


def test_fve_so_far_of_equal_vectors_is_not_told() -> None:
    watched = so_far.start(np.ones((5, 4)), "normalised")
    watched.add(np.array([0.2, 0.3]), np.array([0, 1]), np.array(["a", "b"], dtype=object))
    assert watched.numbers == {}
