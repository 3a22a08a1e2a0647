"""Do nominal 95 % intervals hold the truth as often as they say? Uneven documents, heavy tails, clustered failures, simulated."""

import runpy
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.made_once import made_once

BASELINES = ("measured", "stated")
SIMULATIONS = 1000
SLACK = 2 * np.sqrt(0.95 * 0.05 / SIMULATIONS)
"""Two standard errors: 1.4 %."""


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    script = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "simulate_coverage.py"))
    truth = script["truth_of"](difficulty=0.6)

    @cache
    def coverage(num_documents, sizes):
        name = f"coverage-{num_documents}-{sizes}"
        simulate = lambda _: script["coverage"](num_documents, sizes, 0.6, truth, SIMULATIONS, replicates=1000)  # noqa: E731
        return made_once(tmp_path_factory, name, simulate)

    return coverage


@pytest.mark.trials
@pytest.mark.heavy(3)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_documents", "sizes"),
    [
        *((n, "uneven") for n in (10, 20)),
        (20, "even"),
        *(pytest.param(n, sizes, marks=pytest.mark.trials) for n, sizes in ((40, "uneven"), (80, "uneven"), (80, "even"))),
    ],
)
def test_intervals_and_bands_cover_and_with_uneven_documents_the_old_ones_do_not(simulated, num_documents, sizes):
    found = simulated(num_documents, sizes)
    shares = {key: np.concatenate([row[name] for name in ("cell", "difference", "bands")]) for key, row in found.items()}
    new, old = (np.array([shares[baseline, way] for baseline in BASELINES]) for way in ("new", "old"))
    assert ((new > 0.93 - SLACK) & (new < 0.97 + SLACK)).all(), new
    if sizes == "uneven":
        assert old.min() < 0.93 - 2 * SLACK, old
        assert (new[:, :3] > old[:, :3]).all()  # cells


@pytest.mark.trials
@pytest.mark.slow
def test_fve_against_the_baseline_between_documents_is_not_biased_and_against_the_distance_from_the_mean_is(simulated):
    found = simulated(20, "uneven")
    off = {way: found["measured", way]["fve"] - found["stated", way]["fve"] for way in ("new", "old")}
    assert abs(off["new"]) < 0.006  # standard error 0.002
    assert off["old"] < -0.05
