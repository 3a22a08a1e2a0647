"""The FVE that a watcher sees while a cell is drawn: the plain ratio, over what is there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ksweep.config.spec import Scoring
from ksweep.evaluation.running_fve import RunningFve


def test_fve_so_far_is_one_minus_mean_error_over_baseline_with_failures_as_orthogonal() -> None:
    vectors = np.random.default_rng(0).normal(size=(6, 8))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = unit @ unit.T
    baseline = np.mean([1 - cosines[i, j] for i in range(6) for j in range(6) if i // 2 != j // 2])
    watched = RunningFve.start(vectors, np.array(["a", "a", "b", "b", "c", "c"]), "normalised", Scoring())
    watched.add(np.array([0.2, np.nan, 0.4, 0.6]), np.array([0, 0, 1, 1]), np.array(["a", "b"], dtype=object))
    assert watched.numbers["fve"] == pytest.approx(1 - np.mean([(0.2 + 2.0) / 2, 0.5]) / baseline)
    watched.add(np.array([0.3, 0.5]), np.array([0, 1]), np.array(["c", "d"], dtype=object))
    assert watched.numbers["fve"] == pytest.approx(1 - np.mean([1.1, 0.5, 0.3, 0.5]) / baseline)
    assert watched.numbers["fve_low"] < watched.numbers["fve"] < watched.numbers["fve_high"]


def test_fve_so_far_of_equal_vectors_is_not_told() -> None:
    watched = RunningFve.start(np.ones((5, 4)), np.arange(5), "normalised", Scoring())
    watched.add(np.array([0.2, 0.3]), np.array([0, 1]), np.array(["a", "b"], dtype=object))
    assert watched.numbers == {}


@pytest.mark.parametrize(("baseline", "value"), [(0.5, 0.5), ("distance_from_mean", 0.75)])
def test_fve_so_far_takes_the_baseline_and_the_failed_error_of_the_spec(baseline: Any, value: float) -> None:
    # Four unit vectors at right angles: their mean has length 1/2, so their squared distance from it is 3/4 of the square.
    watched = RunningFve.start(np.eye(4), np.arange(4), "normalised", Scoring(baseline=baseline, failed_error=1.5))
    watched.add(np.array([np.nan, 0.3]), np.array([0, 1]), np.array(["a", "b"], dtype=object))
    assert watched.numbers["fve"] == pytest.approx(1 - (1.5 + 0.3) / 2 / value)
