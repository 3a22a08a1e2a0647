"""FVE within groups and heavy tails, against brute force and hand computation."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksweep.stats import (
    Baseline,
    GroupCurve,
    Selection,
    all_failed_rates,
    best_errors,
    between_documents_baseline,
    fve_curve,
    group_curves,
    mean_distance_baseline,
    quantile_groups,
    stated_baseline,
    tails,
    within_group_distances,
    worst_share,
)
from ksweep.stats.bootstrap import document_weights

GENERATOR = np.random.default_rng(0)
VECTORS = GENERATOR.normal(size=(60, 5)) + 1
GROUPS = np.array(["user", "assistant", "special"])[GENERATOR.integers(3, size=60)]
DOCUMENTS = np.arange(60) // 3
ERRORS = GENERATOR.random((60, 4))
ERRORS[7, :2] = np.nan


def curves(
    errors: np.ndarray, groups: Any, baseline: Baseline, own: Baseline | None = None, *, ks: list[int],
    selection: Selection = "order_statistics", documents: np.ndarray = DOCUMENTS,
) -> list[GroupCurve]:  # fmt: skip
    best, failed = best_errors(errors, ks, selection), all_failed_rates(errors, ks, selection)
    return group_curves(best, failed, ks, documents, list(groups), baseline, own)


def within(vectors: np.ndarray, groups: Any, kind: Any) -> Baseline:
    """Distances of each activation from the mean of its group."""
    distances = within_group_distances(vectors, groups, kind)
    return Baseline(
        value=float(distances.mean()), kind="distance from mean", num_activations=len(vectors), scoring=kind, distances=distances
    )


@pytest.mark.parametrize("kind", ["normalised", "raw"])
def test_own_group_curve_is_what_measuring_that_group_alone_gives(kind):
    own = within(VECTORS, GROUPS, kind)
    found = curves(ERRORS, GROUPS, mean_distance_baseline(VECTORS, kind), own, ks=[1, 4])
    assert [(g.group, g.against) for g in found] == [
        (group, against) for group in ("assistant", "special", "user") for against in ("overall", "own")
    ]
    for group in found[1::2]:
        rows = group.group == GROUPS
        alone = fve_curve(ERRORS[rows], DOCUMENTS[rows], mean_distance_baseline(VECTORS[rows], kind), ks=[1, 4], failed_error=2.0)
        np.testing.assert_allclose(group.fve, alone.fve)
        np.testing.assert_allclose(group.failure_rate, alone.failure_rate)
        assert (group.num_activations, group.num_documents) == (alone.num_activations, alone.num_documents)
        assert group.effective_documents == pytest.approx(alone.effective_documents)
        assert group.baseline == pytest.approx(alone.baseline.value)


def test_group_replicates_are_means_over_the_documents_that_the_whole_cell_resamples():
    baseline = between_documents_baseline(VECTORS, DOCUMENTS)
    found = {g.group: g for g in curves(ERRORS, GROUPS, baseline, ks=[2])}
    best, drawn = best_errors(ERRORS, [2])[:, 0], document_weights(20, 2000, 0)
    _, membership = np.unique(DOCUMENTS.astype(str), return_inverse=True)  # document ids are sorted as text
    for replicate in (0, 7, 1999):
        times = drawn[replicate][membership]  # how often each activation is in the replicate
        denominator = np.average(baseline.distances, weights=times)
        for name, curve in found.items():
            inside = name == GROUPS
            expected = 1 - np.average(best[inside], weights=times[inside]) / denominator
            assert curve.replicates[replicate, 0] == pytest.approx(expected)
    assert all(g.fve_low < g.fve < g.fve_high for g in found.values())


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**32 - 1), selection=st.sampled_from(["order_statistics", "prefix"]), num_groups=st.integers(1, 6),
    measured=st.booleans(),
)  # fmt: skip
def test_overall_group_fves_weighted_by_size_average_to_the_whole(seed, selection, num_groups, measured):
    generator = np.random.default_rng(seed)
    documents = generator.integers(0, 8, size=40)
    documents[:2] = 0, 1
    errors = generator.random((40, 5)) * 3
    errors[generator.random((40, 5)) < 0.2] = np.nan
    vectors = generator.normal(size=(40, 4))
    baseline = between_documents_baseline(vectors, documents) if measured else stated_baseline(0.7)
    ks = [1, 2, 5]
    found = curves(
        errors, generator.integers(num_groups, size=40).astype(str), baseline, ks=ks, selection=selection, documents=documents
    )
    whole = fve_curve(errors, documents, baseline, ks=ks, failed_error=2.0, selection=selection)
    sizes = [g.num_activations for g in found]
    assert sum(sizes) == 40
    np.testing.assert_allclose(np.average([g.fve for g in found], axis=0, weights=sizes), whole.fve)
    np.testing.assert_allclose(np.average([g.failure_rate for g in found], axis=0, weights=sizes), whole.failure_rate)


def test_own_baseline_gives_nothing_for_knowing_the_group():
    # Two groups far apart, each vector predicted by its group's mean.
    vectors = np.concatenate([VECTORS[:30], VECTORS[30:] + 20])
    groups = ["a"] * 30 + ["b"] * 30
    means = np.repeat([vectors[:30].mean(axis=0), vectors[30:].mean(axis=0)], 30, axis=0)
    errors = ((vectors - means) ** 2).mean(axis=1, keepdims=True)
    found = curves(errors, groups, mean_distance_baseline(vectors, "raw"), within(vectors, groups, "raw"), ks=[1])
    np.testing.assert_allclose([g.fve[0] for g in found if g.against == "own"], 0, atol=1e-12)
    assert all(g.fve[0] > 0.95 for g in found if g.against == "overall")


def test_a_group_without_variance_of_its_own_has_no_own_curve():
    groups = ["rest"] * 59 + ["lonely"]
    found = curves(ERRORS, groups, mean_distance_baseline(VECTORS), within(VECTORS, groups, "normalised"), ks=[1])
    assert [(g.group, g.against) for g in found] == [("lonely", "overall"), ("rest", "overall"), ("rest", "own")]


def test_a_group_of_one_document_has_no_interval_and_one_of_none_belongs_to_no_group():
    groups = ["one" if d == 0 else None if d == 1 else "rest" for d in DOCUMENTS]
    found = {g.group: g for g in curves(ERRORS, groups, mean_distance_baseline(VECTORS), ks=[1])}
    assert set(found) == {"one", "rest"}
    assert np.isnan([found["one"].fve_low, found["one"].fve_high]).all() and np.isfinite(found["one"].fve).all()
    assert found["rest"].num_activations == 54 and found["rest"].num_documents == 18


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
    assert np.isnan(worst_share(np.zeros(5)))
