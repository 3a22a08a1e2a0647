"""Chosen by one score, reported in another: against every subset, and against the oracle's own curve."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksweep.stats import between_documents_baseline, chosen_curve, chosen_mean, fve_curve, stated_baseline

NAN = np.nan
BASELINE = stated_baseline(1.0)
score = st.one_of(st.sampled_from([-1.0, 0.0, 0.5, 3.0]), st.floats(-4, 4), st.just(NAN))
error = st.one_of(st.sampled_from([0.0, 0.5, 1.5]), st.floats(0, 4), st.just(NAN))


def kept(choice, chosen):
    """Draws that may be kept of a subset: those of the smallest known score, or all where none is known."""
    known = [draw for draw in chosen if not np.isnan(choice[draw])]
    return [draw for draw in known if choice[draw] == min(choice[d] for d in known)] or list(chosen)


def brute(values, choice, k):
    """Mean over every subset of k draws; draws that tie share."""
    return np.mean([np.mean([values[draw] for draw in kept(choice, subset)]) for subset in combinations(range(len(values)), k)])


@given(st.lists(st.tuples(error, score), min_size=1, max_size=6))
@settings(max_examples=60)
def test_chosen_curve_is_the_mean_over_every_subset(pairs):
    errors, choice = (np.array(column) for column in zip(*pairs, strict=True))
    ks = range(1, len(pairs) + 1)
    curve = chosen_curve([errors], [choice], ["d"], BASELINE, failed_error=2.0, num_replicates=2)
    usable = np.where(np.isnan(errors), NAN, choice)  # a failed draw is not chosen over a success, whatever its score
    expected = [brute(np.where(np.isnan(errors), 2.0, errors), usable, k) for k in ks]
    np.testing.assert_allclose(curve.error, expected, atol=1e-12)
    np.testing.assert_allclose(curve.failure_rate, [brute(np.isnan(errors).astype(float), usable, k) for k in ks], atol=1e-12)


@given(st.lists(st.tuples(score, score), min_size=1, max_size=6))
@settings(max_examples=60)
def test_chosen_mean_is_the_mean_over_the_chosen_draws_that_have_a_value(pairs):
    values, choice = (np.array(column) for column in zip(*pairs, strict=True))
    ks, known = range(1, len(pairs) + 1), ~np.isnan(values)
    mean = chosen_mean([values], [choice], ["d"], num_replicates=2)
    shares = np.array([brute(known.astype(float), choice, k) for k in ks])
    sums = np.array([brute(np.where(known, values, 0.0), choice, k) for k in ks])
    np.testing.assert_allclose(mean.share_with_value, shares, atol=1e-12)
    for got, total, share in zip(mean.mean, sums, shares, strict=True):
        assert got == pytest.approx(total / share, abs=1e-9) if share > 1e-12 else np.isnan(got)


def cells(seed=0, draws=8):
    generator = np.random.default_rng(seed)
    vectors = generator.normal(size=(60, 16))
    documents = np.repeat(np.arange(20), 3)
    errors = generator.gamma(2, 0.3, size=(60, draws)) + generator.gamma(1, 0.2, size=20)[documents][:, None]
    errors[generator.random(errors.shape) < 0.1] = NAN
    return errors, documents, between_documents_baseline(vectors, documents)


@pytest.mark.parametrize("selection", ["order_statistics", "prefix"])
def test_choosing_by_the_reported_error_is_the_oracles_curve_with_its_interval(selection):
    errors, documents, baseline = cells()
    ks = (1, 2, 8)
    options = {"ks": ks, "num_replicates": 300, "seed": 3, "selection": selection}
    oracle = fve_curve(errors, documents, baseline, **options)
    chosen = chosen_curve(errors, errors, documents, baseline, **options)
    for name in ("fve", "fve_low", "fve_high", "error", "failure_rate", "replicates"):
        np.testing.assert_allclose(getattr(chosen, name), getattr(oracle, name), atol=1e-6, err_msg=name)
    np.testing.assert_allclose(chosen.fve_over_successes, oracle.fve_over_successes, atol=1e-9)
    assert chosen.resampling == oracle.resampling


def test_choosing_by_noise_stays_at_one_draw_and_by_a_noisy_copy_lies_between():
    errors, documents, baseline = cells(draws=16)
    noise = np.random.default_rng(9).normal(size=errors.shape)
    curves = {
        name: chosen_curve(errors, choice, documents, baseline, ks=(1, 16), num_replicates=50).fve
        for name, choice in {"noise": noise, "copy": errors + 0.5 * noise, "oracle": errors}.items()
    }
    assert curves["noise"][0] == pytest.approx(curves["oracle"][0])  # K = 1 chooses nothing
    assert curves["noise"][1] < curves["copy"][1] < curves["oracle"][1]


@pytest.mark.slow
def test_intervals_of_a_chosen_mean_cover_the_truth():
    """Documents of 3 activations whose judge's scores are a document's own mean plus noise; the choice is independent of them."""
    hits, generator = [], np.random.default_rng(0)
    for _ in range(200):
        documents = np.repeat(np.arange(25), 3)
        values = generator.normal(size=25)[documents][:, None] + generator.normal(size=(75, 4))
        result = chosen_mean(values, generator.normal(size=values.shape), documents, ks=(4,), num_replicates=400)
        hits.append(result.low[0] <= 0 <= result.high[0])
    assert 0.90 <= np.mean(hits) <= 0.985
