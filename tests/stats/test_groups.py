"""FVE within groups and heavy tails, against brute force and hand computation."""

import numpy as np
import pytest

from ksweep.stats import (
    fve_curve,
    group_curves,
    mean_distance_baseline,
    quantile_groups,
    stated_baseline,
    tails,
    within_group_distances,
)

GENERATOR = np.random.default_rng(0)
VECTORS = GENERATOR.normal(size=(60, 5)) + 1
GROUPS = np.array(["user", "assistant", "special"])[GENERATOR.integers(3, size=60)]
DOCUMENTS = np.arange(60) // 3
ERRORS = GENERATOR.random((60, 4))
ERRORS[7, :2] = np.nan


@pytest.mark.parametrize("kind", ["normalised", "raw"])
def test_own_group_curve_is_what_measuring_that_group_alone_gives(kind):
    distances = within_group_distances(VECTORS, GROUPS, kind)
    found = group_curves(ERRORS, DOCUMENTS, GROUPS, mean_distance_baseline(VECTORS, kind), distances, ks=[1, 4], failed_error=2.0)
    assert [g.group for g in found] == ["assistant", "special", "user"]
    for group in found:
        rows = group.group == GROUPS
        alone = fve_curve(ERRORS[rows], DOCUMENTS[rows], mean_distance_baseline(VECTORS[rows], kind), ks=[1, 4], failed_error=2.0)
        np.testing.assert_allclose(group.curve.fve, alone.fve)
        np.testing.assert_allclose([group.curve.fve_low, group.curve.fve_high], [alone.fve_low, alone.fve_high])
        assert group.against == "own"


def test_overall_group_fves_weighted_by_size_average_to_the_whole():
    baseline = mean_distance_baseline(VECTORS)
    found = group_curves(ERRORS, DOCUMENTS, GROUPS, baseline, None, ks=[2])
    assert {g.against for g in found} == {"overall"}
    sizes = [g.curve.num_activations for g in found]
    whole = fve_curve(ERRORS, DOCUMENTS, baseline, ks=[2])
    assert np.average([g.curve.fve[0] for g in found], weights=sizes) == pytest.approx(whole.fve[0])


def test_own_baseline_gives_nothing_for_knowing_the_group():
    # Two groups far apart, each vector predicted by its group's mean.
    vectors = np.concatenate([VECTORS[:30], VECTORS[30:] + 20])
    groups = ["a"] * 30 + ["b"] * 30
    means = np.repeat([vectors[:30].mean(axis=0), vectors[30:].mean(axis=0)], 30, axis=0)
    errors = ((vectors - means) ** 2).mean(axis=1, keepdims=True)
    baseline = mean_distance_baseline(vectors, "raw")
    own = group_curves(errors, DOCUMENTS, groups, baseline, within_group_distances(vectors, groups, "raw"), ks=[1])
    np.testing.assert_allclose([g.curve.fve[0] for g in own], 0, atol=1e-12)
    overall = group_curves(errors, DOCUMENTS, groups, baseline, None, ks=[1])
    assert all(g.curve.fve[0] > 0.95 for g in overall)


def test_a_group_without_variance_of_its_own_has_no_own_curve():
    groups = ["rest"] * 59 + ["lonely"]
    baseline = mean_distance_baseline(VECTORS)
    found = group_curves(ERRORS, DOCUMENTS, groups, baseline, within_group_distances(VECTORS, groups), ks=[1])
    assert [g.group for g in found] == ["rest"]


def test_quantile_groups_are_quarters_and_keep_ties_together():
    assert np.bincount(quantile_groups(GENERATOR.permutation(100))).tolist() == [25] * 4
    assert set(quantile_groups(np.ones(10))) == {0}
    tied = quantile_groups(np.array([1, 1, 1, 1, 1, 2, 3, 4]))
    assert len(set(tied[:5])) == 1 and tied[-1] == 3


def test_tails_by_hand_tell_a_mean_made_by_one_activation():
    # 99 errors of 0.1 and one of 10.1: sum 20, mean 0.2, median 0.1, trimmed 0.1, the worst holds 10.1/20.
    found = tails(np.array([10.1] + [0.1] * 99), stated_baseline(0.5, scoring="raw"))
    assert found.fve == pytest.approx(1 - 0.2 / 0.5)
    assert found.fve_median == found.fve_trimmed == pytest.approx(1 - 0.1 / 0.5)
    assert found.worst_share == pytest.approx(0.505)


def test_tails_of_equal_errors_show_nothing_and_trim_both_ends():
    assert tails(np.full(200, 0.3), stated_baseline(0.6)).worst_share == pytest.approx(0.01)
    ranked = np.arange(1.0, 21.0)  # 5 % of 20 is one at each end: mean of 2 to 19 is 10.5
    assert tails(ranked, stated_baseline(100, scoring="raw")).fve_trimmed == pytest.approx(1 - 0.105)
    assert np.isnan(tails(np.zeros(5), stated_baseline(1)).worst_share)
