"""Bands over K, gains per doubling, few subsets: against simulation, hand computation and printed quantiles."""

import numpy as np
import pytest

from ksweep.stats import (
    curve_band,
    difference_at_own_best,
    difference_band,
    effective_subsets,
    few_subsets,
    fve_curve,
    gain_per_doubling,
    mean_gain_per_doubling,
    paired_difference,
    simultaneous_band,
    stated_baseline,
    tokens_drawn,
)
from tests.stats.test_bootstrap import sample, true_fve

KS = [1, 2, 4, 8, 16]


@pytest.mark.trials
@pytest.mark.slow
@pytest.mark.parametrize("num_documents", [12, 60])
def test_band_covers_the_whole_curve_as_often_as_it_says_and_pointwise_intervals_less(num_documents):
    generator, whole, pointwise, num_simulations = np.random.default_rng(0), 0, 0, 1200  # Monte-Carlo error 0.63 %
    truth = true_fve(KS)
    for seed in range(num_simulations):
        documents, _, errors = sample(generator, num_documents, num_draws=16)
        curve = fve_curve(errors, documents, stated_baseline(1, scoring="raw"), ks=KS, num_replicates=500, seed=seed)
        low, high = curve_band(curve)
        whole += ((low <= truth) & (truth <= high)).all()
        pointwise += ((curve.fve_low <= truth) & (truth <= curve.fve_high)).all()
    assert 0.92 < whole / num_simulations < 0.975, whole / num_simulations
    assert pointwise < whole


@pytest.mark.trials
@pytest.mark.slow
def test_band_of_loosely_related_points_covers_where_pointwise_intervals_do_not():
    # Ten means of independent columns: pointwise intervals hold together only 0.95^10 = 60 % of the time.
    generator, whole, pointwise, num_simulations = np.random.default_rng(1), 0, 0, 1000
    for seed in range(num_simulations):
        values = generator.normal(size=(50, 10))
        weights = np.random.default_rng(seed).multinomial(50, np.full(50, 0.02), size=800)
        replicates = weights @ values / 50
        low, high = simultaneous_band(values.mean(axis=0), replicates, 50)
        whole += ((low <= 0) & (high >= 0)).all()
        spread = 2.01 * values.std(axis=0, ddof=1) / np.sqrt(50)  # Student's interval, 49 degrees of freedom
        pointwise += (np.abs(values.mean(axis=0)) <= spread).all()
    assert 0.925 < whole / num_simulations < 0.975, whole / num_simulations
    assert pointwise / num_simulations < 0.7, pointwise / num_simulations


@pytest.mark.parametrize(("shared", "multiplier"), [(True, 1.960), (False, 2.800)])
def test_band_multiplier_is_the_normal_quantile_for_one_point_and_sidaks_for_ten_independent_ones(shared, multiplier):
    # Sidak: the (1 + 0.95^(1/10)) / 2 quantile of the normal, 2.800.
    generator = np.random.default_rng(0)
    replicates = generator.normal(size=(40_000, 1 if shared else 10)) @ (np.ones((1, 10)) if shared else np.eye(10))
    low, high = simultaneous_band(np.zeros(10), 0.3 * replicates, effective_documents=10**6)
    np.testing.assert_allclose([-low, high], 0.3 * multiplier, rtol=0.02)


def test_band_is_unknown_from_one_document_or_around_an_estimate_outside_its_replicates():
    replicates = np.random.default_rng(0).normal(size=(500, 3))
    assert np.isnan(simultaneous_band(np.zeros(3), replicates, effective_documents=1)).all()
    assert np.isfinite(simultaneous_band(np.zeros(3), replicates, effective_documents=30)).all()
    assert np.isnan(simultaneous_band(np.array([0.0, 5.0, 0.0]), replicates, effective_documents=30)).all()


def test_band_holds_the_pointwise_intervals():
    curve = curves()[0]
    low, high = curve_band(curve)
    assert (low <= curve.fve_low).all() and (high >= curve.fve_high).all()
    assert (high - low > 1.02 * (curve.fve_high - curve.fve_low)).any()


def test_band_of_one_point_is_its_interval():
    curve = curves()[0]
    low, high = simultaneous_band(curve.fve[:1], curve.replicates[:, :1], curve.effective_documents)
    np.testing.assert_allclose([low[0], high[0]], [curve.fve_low[0], curve.fve_high[0]], atol=0.02)


def test_band_of_a_gain_has_no_width_where_nothing_varies():
    replicates = np.column_stack([np.zeros(2000), np.random.default_rng(0).normal(size=2000)])
    low, high = simultaneous_band(np.array([0.0, 0.5]), replicates + np.array([0.0, 0.5]), effective_documents=10**6)
    assert low[0] == high[0] == 0
    np.testing.assert_allclose([low[1], high[1]], [0.5 - 1.96, 0.5 + 1.96], atol=0.1)


def curves(num_documents=30):
    generator = np.random.default_rng(3)
    documents, _, errors = sample(generator, num_documents, num_draws=8)
    baseline = stated_baseline(1, scoring="raw")
    better = 0.95 * errors * (0.95 + 0.1 * generator.random(errors.shape))
    return fve_curve(errors, documents, baseline), fve_curve(better, documents, baseline), (documents, errors, better, baseline)


def test_difference_band_holds_the_estimate_and_is_narrower_than_that_of_a_curve():
    one, other, _ = curves()
    low, high = difference_band(other, one)
    difference = paired_difference(other, one).estimate
    assert ((low < difference) & (difference < high)).all()
    curve_low, curve_high = curve_band(one)
    assert (high - low < 0.4 * (curve_high - curve_low)).all()


def test_difference_at_own_best_compares_greedy_with_the_most_draws():
    curve, _, (documents, errors, _, baseline) = curves()
    greedy = fve_curve(errors[:, :1], documents, baseline)
    k_curve, k_greedy, found = difference_at_own_best(curve, greedy)
    assert (k_curve, k_greedy) == (8, 1)
    assert found.estimate[0] == pytest.approx(errors[:, 0].mean() - errors.min(axis=1).mean())
    by_hand = np.quantile(curve.replicates[:, 7] - greedy.replicates[:, 0], [0.02, 0.98])  # 30 documents widen 2.5 % to 2.0 %
    np.testing.assert_allclose([found.low[0], found.high[0]], by_hand, atol=2e-3)


def test_gain_per_doubling_is_the_difference_of_neighbouring_powers():
    curve, _, _ = curves()
    starts, gain = gain_per_doubling(curve)
    assert starts == [1, 2, 3, 4]
    np.testing.assert_allclose(gain.estimate, curve.fve[[1, 3, 5, 7]] - curve.fve[[0, 1, 2, 3]])
    assert (gain.low > 0).all() and (gain.low < gain.estimate).all() and (gain.estimate < gain.high).all()
    mean = mean_gain_per_doubling(curve)
    np.testing.assert_allclose(mean.estimate, (gain.estimate[[0, 1, 3]]).mean())  # 1 to 2, 2 to 4, 4 to 8


@pytest.mark.parametrize("ks", [[3], [2, 3]])
def test_gain_per_doubling_without_a_double_says_what_to_ask_for(ks):
    _, _, (documents, errors, _, baseline) = curves()
    with pytest.raises(ValueError, match="ask for 1, 2, 4"):
        gain_per_doubling(fve_curve(errors, documents, baseline, ks=ks))


def test_few_subsets_begin_beyond_half_of_the_draws():
    assert few_subsets(8, np.arange(1, 9)).tolist() == [False] * 4 + [True] * 4
    assert few_subsets(1, np.array([1])).tolist() == [False]  # greedy decoding has one draw and needs no more
    assert effective_subsets(8, np.array([1, 2, 8])).tolist() == [8, 4, 1]


def test_tokens_drawn_count_every_draw():
    assert tokens_drawn(np.array([[10, 20], [30, 40]]), np.array([1, 2, 4])).tolist() == [25, 50, 100]
