"""The reference's quantities against its formulas written out naively, its golden numbers, scipy's BCa and hand values."""

from __future__ import annotations

import json
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest

from ksweep.stats import best_of_k_errors, fve, mean_distance_baseline, tae_metrics
from ksweep.stats.best_of_k import prefix_of_k_errors, prefix_of_k_select
from ksweep.stats.tae_metrics import (
    Chunk,
    ReferenceSums,
    bca_interval,
    reference_intervals,
    reference_weights,
    selected,
    selection_weights,
)

GOLDEN = Path(__file__).parents[1] / "fixtures" / "tae"


def made_up(num_activations=30, num_draws=6, d=5, seed=0):
    """Activations with one dimension of large mean and one heavy vector, reconstructions with a constant bias."""
    generator = np.random.default_rng(seed)
    activations = generator.normal(size=(num_activations, d)) * [1, 1, 2, 0.5, 3] + [1e4, 0, 0, -3, 0]
    activations[3] *= 1.5
    draws = activations[:, None] + generator.normal(size=(num_activations, num_draws, d)) + 0.4
    return activations, draws


def streamed(activations, draws, ks, selection="prefix", sizes=(7, 1, 22), roles=None):
    starts = np.cumsum((0, *sizes))
    parts = [slice(a, b) for a, b in pairwise(starts)]
    return [selected(activations[p], draws[p], ks, selection, None if roles is None else roles[p]) for p in parts]


def sums_of(chunks, ks):
    sums = ReferenceSums(ks)
    for chunk in chunks:
        sums.add(chunk)
    return sums


def naive(activations, chosen):
    """tae_reference.md 1.2, as written there."""
    residual = activations - chosen
    total = activations.var(axis=0, ddof=1).sum()
    mse = np.square(residual).mean(axis=0).sum()
    return {
        "avg_mse": np.square(residual).mean(),
        "mse_std": np.square(residual).mean(axis=1).std(),
        "variance_recovery": 1 - residual.var(axis=0, ddof=1).sum() / total,
        "mse_for_new_variance": mse,
        "mse_variance_recovery": 1 - mse / total,
        "r_squared": 1 - np.square(residual).sum() / np.square(activations - activations.mean()).sum(),
        "original_mean": activations.mean(),
        "total_variance": total,
        "residual_variance": residual.var(axis=0, ddof=1).sum(),
    }


def best_of_first(activations, draws, k):
    errors = np.square(draws[:, :k] - activations[:, None]).mean(axis=2)
    return draws[np.arange(len(draws)), errors.argmin(axis=1)]


def test_streamed_quantities_equal_the_formulas_on_whole_arrays():
    activations, draws = made_up()
    ks = (1, 2, 6)
    for k, found in zip(ks, sums_of(streamed(activations, draws, ks), ks).quantities(), strict=True):
        assert found.k == k and found.num_activations == 30 and found.d_model == 5
        for name, value in naive(activations, best_of_first(activations, draws, k)).items():
            assert getattr(found, name) == pytest.approx(value, rel=1e-11), name


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden cases of the reference are not in this checkout")
@pytest.mark.parametrize("case", sorted(p.parent.name for p in GOLDEN.glob("*/expected.json")))
def test_quantities_equal_the_reference_implementation(case):
    expected = json.loads((GOLDEN / case / "expected.json").read_text())["metrics"]
    arrays = np.load(GOLDEN / case / "expected.npz")
    activations, draws = arrays["metrics_activations"], arrays["metrics_candidates"]
    ks = tuple(row["k"] for row in expected)
    found = sums_of(streamed(activations, draws, ks, sizes=(13, 27)), ks).quantities()
    for mine, theirs in zip(found, expected, strict=True):
        for name in ("avg_mse", "mse_for_new_variance", "original_mean"):
            assert getattr(mine, name) == pytest.approx(theirs[name], rel=1e-6), name
        for name in ("variance_recovery", "mse_variance_recovery", "r_squared"):
            assert getattr(mine, name) == pytest.approx(theirs[name], abs=1e-6), name
        assert mine.total_variance == pytest.approx(theirs["original_variance"], rel=1e-6)
        assert mine.num_activations == theirs["total_positions"]
    np.testing.assert_allclose(
        prefix_of_k_errors(np.square(draws - activations[:, None]).mean(axis=2), ks).T, arrays["metrics_best_mse"], rtol=1e-5
    )


def test_quantities_by_hand():
    # A = (0,0), (2,4); reconstruction off by (1,0) both times: no residual variance, a bias of 1.
    chunk = Chunk(activations=np.array([[0.0, 0], [2, 4]]), reconstructions=np.array([[[-1.0, 0]], [[1, 4]]]))
    (found,) = sums_of([chunk], (1,)).quantities()
    assert found.total_variance == 2 + 8 and found.residual_variance == 0
    assert found.variance_recovery == 1  # blind to the bias
    assert found.avg_mse == 0.5 and found.mse_for_new_variance == 1
    assert found.mse_variance_recovery == pytest.approx(0.9)
    # Grand mean 1.5, squares 2.25 + 2.25 + 0.25 + 6.25 = 11; squared residuals 2.
    assert found.original_mean == 1.5 and found.r_squared == pytest.approx(1 - 2 / 11)


def test_mse_variance_recovery_is_our_raw_fve_but_for_n_minus_one():
    activations, draws = made_up()
    (found,) = sums_of(streamed(activations, draws, (1,)), (1,)).quantities()
    errors = np.square(draws[:, 0] - activations).mean(axis=1)
    ours = fve(errors, mean_distance_baseline(activations, "raw"))
    assert found.mse_variance_recovery == pytest.approx(1 - (1 - ours) * 29 / 30, abs=1e-10)


def test_chunks_and_ranks_do_not_change_the_sums():
    activations, draws = made_up()
    whole = sums_of(streamed(activations, draws, (1, 4), sizes=(30,)), (1, 4)).quantities()
    chunks = streamed(activations, draws, (1, 4), sizes=(10, 10, 10))
    first, second = sums_of(chunks[2:], (1, 4)), sums_of(chunks[:2], (1, 4))
    first.merge(second)
    first.merge(ReferenceSums((1, 4)))  # a rank without work
    for one, other in zip(whole, first.quantities(), strict=True):
        assert one.variance_recovery == pytest.approx(other.variance_recovery, abs=1e-13)
        assert one.r_squared == pytest.approx(other.r_squared, abs=1e-13)


def test_variance_keeps_its_digits_beside_a_huge_mean():
    generator = np.random.default_rng(0)
    small = generator.normal(size=(64, 3))
    chunk = Chunk(activations=small + 1e8, reconstructions=(small + 1e8)[:, None] - 0.1 * small[:, None])
    (found,) = sums_of([chunk], (1,)).quantities()
    assert found.variance_recovery == pytest.approx(0.99, abs=1e-6)


def test_order_statistics_equal_the_mean_over_every_choice_of_draws():
    activations, draws = made_up(num_activations=8, num_draws=4)
    ks = (1, 2, 3, 4)
    found = selected(activations, draws, ks)
    errors = np.square(draws - activations[:, None]).sum(axis=2)
    for at, k in enumerate(ks):
        choices = [list(c) for c in combinations(range(4), k)]
        kept = np.stack([np.take(c, errors[:, c].argmin(axis=1)) for c in choices])
        rows = np.arange(8)
        np.testing.assert_allclose(found.reconstructions[:, at], np.mean([draws[rows, j] for j in kept], axis=0), rtol=1e-12)
        np.testing.assert_allclose(found.squared_errors[:, at], np.mean([errors[rows, j] for j in kept], axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.squared_errors / 5, best_of_k_errors(errors / 5, ks))


def test_order_statistics_recovery_by_hand_counts_the_spread_of_the_choice():
    # One dimension; residuals of two draws +1 and -1 for A = 0, and the same for A = 4. K = 1 takes each half the time:
    # the expected residual is 0 but its mean square is 1. total = 8; residual M2 = 1 + 1; recovery 1 - 2/8.
    chunk = selected(np.array([[0.0], [4]]), np.array([[[-1.0], [1]], [[3], [5]]]), (1,))
    (found,) = sums_of([chunk], (1,)).quantities()
    assert found.variance_recovery == pytest.approx(0.75) and found.avg_mse == 1


def test_prefix_takes_the_best_of_the_first_and_passes_over_failures():
    errors = [[0.5, 0.2, 0.9], [np.nan, 0.7, 0.1], [np.nan, np.nan, 3.0]]
    found = prefix_of_k_errors(errors, (1, 2, 3))
    np.testing.assert_allclose(found, [[0.5, 0.2, 0.2], [2, 0.7, 0.1], [2, 2, 3]])
    np.testing.assert_allclose(prefix_of_k_errors(errors, (2,), np.array([9.0, 8, 7]))[:, 0], [0.2, 0.7, 7])


def test_a_tie_goes_to_the_earlier_draw():
    np.testing.assert_array_equal(selection_weights([[1.0, 0.5, 0.5]], (3,), "prefix")[0, :, 0], [0, 1, 0])
    np.testing.assert_allclose(selection_weights([[1.0, 0.5, 0.5]], (1, 2, 3), "order_statistics").sum(axis=1), 1)


def test_roles_have_their_own_mean_as_baseline_and_need_more_than_ten_vectors():
    activations, draws = made_up()
    roles = ["user"] * 18 + ["assistant"] * 12
    sums = sums_of(streamed(activations, draws, (2,), roles=roles), (2,))
    assert {role: s.activations.count for role, s in sums.by_role.items()} == {"user": 18, "assistant": 12}
    chosen = best_of_first(activations, draws, 2)
    (user,) = sums.by_role["user"].quantities()
    for name, value in naive(activations[:18], chosen[:18]).items():
        assert getattr(user, name) == pytest.approx(value, rel=1e-10), name
    assert tae_metrics.ROLE_MINIMUM == 10


def test_tokens_of_no_known_role_count_for_all_and_for_no_role():
    activations, draws = made_up()
    sums = sums_of(streamed(activations, draws, (2,), roles=["user"] * 18 + [None] * 12), (2,))
    assert list(sums.by_role) == ["user"] and sums.activations.count == 30
    (user,) = sums.by_role["user"].quantities()
    assert user.avg_mse == pytest.approx(naive(activations[:18], best_of_first(activations, draws, 2)[:18])["avg_mse"])


def test_errors_alone_leave_the_variance_of_residuals_unknown():
    activations, draws = made_up()
    (whole,) = streamed(activations, draws, (2,), sizes=(30,), roles=["user"] * 30)
    known, rest = (
        Chunk(
            activations=whole.activations[r], reconstructions=made, squared_errors=whole.squared_errors[r], roles=whole.roles[r]
        )
        for r, made in ((slice(20), whole.reconstructions[:20]), (slice(20, 30), None))
    )
    sums, merged, other = sums_of([known, rest], (2,)), sums_of([known], (2,)), sums_of([rest], (2,))
    merged.merge(other)
    expected = naive(activations, best_of_first(activations, draws, 2))
    for (found,) in (sums.quantities(), merged.quantities(), merged.by_role["user"].quantities()):
        for name, value in expected.items():
            of_residuals = name in ("variance_recovery", "residual_variance")
            assert np.isnan(getattr(found, name)) if of_residuals else getattr(found, name) == pytest.approx(value, rel=1e-10)
    named = {row["quantity"] for row in tae_metrics.reference_rows(sums)}
    assert "avg_mse" in named and not {"variance_recovery", "residual_variance"} & named
    with pytest.raises(ValueError, match="reconstructions of every chunk"):
        reference_intervals(sums, [known, rest], num_replicates=10)


def naive_replicates(activations, chosen, weights):
    values = {"variance_recovery": [], "mse": [], "r_squared": []}
    for w in weights:
        rows = np.repeat(np.arange(len(activations)), w)
        found = naive(activations[rows], chosen[rows])
        for name, key in (("variance_recovery", "variance_recovery"), ("mse", "avg_mse"), ("r_squared", "r_squared")):
            values[name].append(found[key])
    return {name: np.array(v) for name, v in values.items()}


def test_intervals_equal_resampling_whole_arrays():
    activations, draws = made_up()
    ks = (1, 6)
    chunks = streamed(activations, draws, ks)
    found = reference_intervals(sums_of(chunks, ks), iter(chunks), num_replicates=200)
    weights = reference_weights(30, 200, 42)
    for at, k in enumerate(ks):
        chosen = best_of_first(activations, draws, k)
        for name, replicates in naive_replicates(activations, chosen, weights).items():
            interval = found[name][at]
            assert interval.std == pytest.approx(replicates.std(), rel=1e-8)
            assert interval.low == pytest.approx(np.percentile(replicates, 2.5), rel=1e-9)
            assert interval.high == pytest.approx(np.percentile(replicates, 97.5), rel=1e-9)
            assert interval.bias == pytest.approx(replicates.mean() - interval.estimate, abs=1e-10)


def test_bca_equals_scipy_on_the_same_replicates():
    stats = pytest.importorskip("scipy.stats")
    activations, draws = made_up()
    chosen = best_of_first(activations, draws, 2)
    chunks = streamed(activations, draws, (2,))
    interval = reference_intervals(sums_of(chunks, (2,)), chunks, num_replicates=400)["variance_recovery"][0]
    replicates = naive_replicates(activations, chosen, reference_weights(30, 400, 42))["variance_recovery"]

    def recovery(rows, axis=-1):
        return np.apply_along_axis(lambda r: naive(activations[r], chosen[r])["variance_recovery"], axis, rows)

    earlier = stats._resampling.BootstrapResult(None, replicates, None) if hasattr(stats, "_resampling") else None
    theirs = stats.bootstrap((np.arange(30),), recovery, n_resamples=0, method="BCa", bootstrap_result=earlier, vectorized=True)
    assert interval.bca_low == pytest.approx(theirs.confidence_interval.low, rel=1e-9)
    assert interval.bca_high == pytest.approx(theirs.confidence_interval.high, rel=1e-9)


def test_bca_is_unknown_when_the_estimate_lies_outside_its_replicates():
    assert np.isnan(bca_interval(np.array([0.1, 0.2]), 0.5, np.array([0.4, 0.5, 0.6]))).all()


def test_replicates_are_those_of_the_legacy_generator():
    np.random.seed(42)
    expected = np.bincount(np.random.choice(12, size=12, replace=True), minlength=12)
    np.testing.assert_array_equal(reference_weights(12, 2, 42)[0], expected)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: ReferenceSums((1,)).quantities(), "no activations"),
        (
            lambda: ReferenceSums((1, 2)).add(Chunk(activations=np.ones((2, 3)), reconstructions=np.ones((2, 1, 3)))),
            r"\[n, 2, d\]",
        ),
        (
            lambda: ReferenceSums((1,)).add(Chunk(activations=np.ones((2, 3)), reconstructions=None)),
            r"without reconstructions has finite squared errors \[2, 1\]",
        ),
        (lambda: ReferenceSums((1,)).merge(ReferenceSums((2,))), "cannot be merged"),
        (lambda: selected(np.ones((2, 3)), np.ones((2, 4)), (1,)), r"\[activation, draw, d\]"),
        (lambda: selection_weights([[np.nan, 1.0]], (1,), "prefix"), "failed draw"),
        (lambda: selection_weights([[1.0]], (1,), "best"), "order_statistics, prefix"),
        (lambda: reference_weights(2, 100, 0), "at least 3"),
    ],
)
def test_what_cannot_be_meant_is_refused(act, words):
    with pytest.raises(ValueError, match=words):
        act()


def test_other_chunks_than_those_of_the_sums_are_refused():
    activations, draws = made_up()
    chunks = streamed(activations, draws, (1,))
    for wrong in (chunks[:2], [*chunks, chunks[0]]):
        with pytest.raises(ValueError, match="same chunks"):
            reference_intervals(sums_of(chunks, (1,)), wrong, num_replicates=10)


def test_prefix_select_follows_the_smallest_of_the_first_k_and_passes_over_failures():
    errors = np.array([[0.5, 0.2, 0.3], [np.nan, np.nan, 0.1]])
    cosines = np.array([[0.75, 0.9, 0.85], [np.nan, np.nan, 0.95]])
    np.testing.assert_array_equal(prefix_of_k_select(cosines, errors, (1, 2, 3), 0.0), [[0.75, 0.9, 0.9], [0.0, 0.0, 0.95]])
