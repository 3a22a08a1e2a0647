"""Intervals: do they cover, are they paired, do they depend on nothing they should not depend on?"""

import tracemalloc
from dataclasses import replace

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from ksweep.stats import (
    between_documents_baseline,
    effective_documents,
    fve_curve,
    gain_over,
    interval_decimals,
    interval_ends,
    interval_reach,
    mean_distance_baseline,
    paired_difference,
    stated_baseline,
)
from ksweep.stats.bootstrap import ASYMMETRY, document_weights

KS = [1, 4, 16]


def sample(generator, num_documents, per_document=4, num_draws=16, dimensions=16):
    """Activations and errors, half of whose variance lies between documents, with a known FVE.

    The error of a draw is a(0.5 + 0.5 u)/1.25, u uniform and a log-normal with mean 1, so that best-of-K has
    mean (0.5 + 0.5/(K + 1))/1.25; each dimension of an activation has variance 1.
    """
    documents = np.repeat(np.arange(num_documents), per_document)

    def half_shared(*shape):
        shared = generator.normal(size=(num_documents, *shape))[documents]
        return np.sqrt(0.5) * (shared + generator.normal(size=(len(documents), *shape)))

    difficulty = np.exp(0.3 * half_shared() - 0.3**2 / 2)
    draws = 0.5 + 0.5 * generator.random((len(documents), num_draws))
    return documents, half_shared(dimensions), difficulty[:, None] * draws / 1.25


def true_fve(ks):
    return 1 - (0.5 + 0.5 / (np.array(ks) + 1)) / 1.25


def covered(curve, truth):
    return (curve.fve_low <= truth) & (truth <= curve.fve_high)


@pytest.mark.trials
@pytest.mark.slow
def test_intervals_over_documents_cover_the_truth_and_over_activations_do_not():
    generator, num_simulations = np.random.default_rng(0), 1500  # Monte-Carlo error 0.56 %
    hits = {"distance from mean": 0, "stated constant": 0, "clusters ignored": 0}
    for seed in range(num_simulations):
        documents, vectors, errors = sample(generator, num_documents=80)
        settings = {"ks": KS, "num_replicates": 400, "seed": seed}
        measured, stated = mean_distance_baseline(vectors, "raw"), stated_baseline(1, scoring="raw")
        ignored = np.arange(len(documents))
        hits["distance from mean"] += covered(fve_curve(errors, documents, measured, **settings), true_fve(KS))
        hits["stated constant"] += covered(fve_curve(errors, documents, stated, **settings), true_fve(KS))
        if seed % 5 == 0:
            hits["clusters ignored"] += 5 * covered(fve_curve(errors, ignored, stated, **settings), true_fve(KS))
    coverage = {name: count / num_simulations for name, count in hits.items()}
    for name in ("distance from mean", "stated constant"):
        assert ((coverage[name] > 0.93) & (coverage[name] < 0.97)).all(), coverage
    assert (coverage["clusters ignored"] < 0.87).all(), coverage


@pytest.mark.trials
@pytest.mark.slow
def test_intervals_from_eight_documents_are_widened_enough_to_cover():
    generator, hits, plain_hits = np.random.default_rng(1), 0, 0
    for seed in range(1000):
        documents, _, errors = sample(generator, num_documents=8)
        curve = fve_curve(errors, documents, stated_baseline(1), ks=KS, num_replicates=1000, seed=seed)
        hits += covered(curve, true_fve(KS))
        low, high = np.quantile(curve.replicates, [0.025, 0.975], axis=0)
        plain_hits += (low <= true_fve(KS)) & (true_fve(KS) <= high)
    assert curve.few_documents
    assert (hits / 1000 > 0.91).all(), hits
    assert (plain_hits / 1000 < 0.9).all(), plain_hits


@pytest.mark.slow
def test_paired_difference_is_narrower_than_the_curves_and_covers():
    generator, hits, widths = np.random.default_rng(2), 0, []
    for seed in range(400):
        documents, vectors, errors = sample(generator, num_documents=60)
        better = 0.95 * errors * (0.95 + 0.1 * generator.random(errors.shape))  # mean ratio 0.95 at K = 1
        baseline = mean_distance_baseline(vectors, "raw")
        one, other = (fve_curve(e, documents, baseline, ks=[1], num_replicates=400, seed=seed) for e in (better, errors))
        difference = paired_difference(one, other)
        hits += (difference.low <= 0.05 * 0.6) & (difference.high >= 0.05 * 0.6)  # mean error at K = 1 is 0.6
        widths.append([difference.high - difference.low, one.fve_high - one.fve_low])
    assert abs(hits[0] / 400 - 0.95) < 0.03
    paired, single = np.mean(widths, axis=0)[:, 0]
    assert paired < 0.2 * single  # unpaired would be sqrt(2) times the single width


def test_gain_over_one_draw_excludes_zero_where_the_curve_rises():
    documents, vectors, errors = sample(np.random.default_rng(3), num_documents=60)
    curve = fve_curve(errors, documents, mean_distance_baseline(vectors, "raw"), ks=KS)
    gain = gain_over(curve, k=1)
    np.testing.assert_allclose(gain.estimate, curve.fve - curve.fve[0])
    assert gain.low[0] == gain.high[0] == 0
    assert (gain.low[1:] > 0).all()
    assert gain.high[2] - gain.low[2] < curve.fve_high[2] - curve.fve_low[2]


def test_replicate_by_hand_is_the_ratio_over_the_documents_drawn():
    documents = ["b", "a", "b"]
    vectors = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    errors = np.array([[0.2, 0.4], [0.6, 0.8], [0.1, 0.5]])
    baseline = mean_distance_baseline(vectors)
    curve = fve_curve(errors, documents, baseline, ks=[2], num_replicates=50, seed=7)
    weights = document_weights(2, 50, 7)  # columns: documents in sorted order, a then b
    per_row = weights[:, [1, 0, 1]]
    expected = 1 - (per_row @ errors.min(axis=1)) / (per_row @ baseline.distances)
    np.testing.assert_allclose(curve.replicates[:, 0], expected)


def test_curve_ignores_the_order_of_rows_and_the_type_of_document_ids():
    documents, vectors, errors = sample(np.random.default_rng(4), num_documents=30)
    errors[5, 2:9] = np.nan
    shuffle = np.random.default_rng(0).permutation(len(documents))
    curve = fve_curve(errors, documents, mean_distance_baseline(vectors))
    names = [str(name) for name in documents[shuffle]]
    again = fve_curve(errors[shuffle], names, mean_distance_baseline(vectors[shuffle]))
    assert curve.resampling == again.resampling
    np.testing.assert_allclose(again.replicates, curve.replicates, atol=1e-12)
    for field in ("fve", "fve_low", "fve_high", "failure_rate", "fve_over_successes"):
        np.testing.assert_allclose(getattr(again, field), getattr(curve, field), atol=1e-12)


def test_replicates_do_not_depend_on_which_k_are_asked_for():
    documents, vectors, errors = sample(np.random.default_rng(5), num_documents=20)
    baseline = mean_distance_baseline(vectors)
    whole, one = fve_curve(errors, documents, baseline), fve_curve(errors, documents, baseline, ks=[7])
    np.testing.assert_allclose(whole.k, range(1, 17))
    np.testing.assert_allclose(one.replicates[:, 0], whole.replicates[:, 6], atol=1e-12)


def test_more_replicates_continue_the_same_sequence():
    short, long = document_weights(11, 300, 0), document_weights(11, 700, 0)
    np.testing.assert_array_equal(long[:300], short)
    assert (long.sum(axis=1) == 11).all()
    assert not np.array_equal(document_weights(11, 300, 1), short)


def test_interval_holds_its_estimate_in_high_dimension_with_few_documents():
    # Re-centring the mean in every replicate would put the whole interval below the estimate here.
    generator = np.random.default_rng(6)
    documents, vectors, errors = sample(generator, num_documents=6, dimensions=2048)
    curve = fve_curve(errors, documents, mean_distance_baseline(vectors, "raw"))
    middle = (curve.fve_low + curve.fve_high) / 2
    assert (abs(middle - curve.fve) < 0.2 * (curve.fve_high - curve.fve_low)).all()


def test_failures_lower_the_curve_by_hand_and_are_counted():
    errors = np.array([[0.1, 0.1], [np.nan, 0.1], [np.nan, np.nan], [0.1, 0.1]])
    curve = fve_curve(errors, ["a", "b", "c", "d"], stated_baseline(0.5))
    np.testing.assert_allclose(curve.failure_rate, [3 / 8, 1 / 4])
    # K = 1: (0.1 + 1.05 + 2 + 0.1)/4 = 0.8125; K = 2: (0.1 + 0.1 + 2 + 0.1)/4 = 0.575
    np.testing.assert_allclose(curve.error, [0.8125, 0.575])
    np.testing.assert_allclose(curve.fve, [1 - 1.625, 1 - 1.15])
    np.testing.assert_allclose(curve.fve_over_successes, [0.8, 0.8])
    assert curve.num_without_success == 1


def test_curve_without_any_success_counts_as_orthogonal_and_says_unknown_over_successes():
    curve = fve_curve(np.full((3, 2), np.nan), [1, 2, 3], stated_baseline(0.5))
    np.testing.assert_allclose(curve.fve, 1 - 2 / 0.5)
    assert np.isnan(curve.fve_over_successes).all()


def test_one_document_gives_an_estimate_without_an_interval():
    curve = fve_curve(np.random.default_rng(0).random((9, 4)), ["only"] * 9, stated_baseline(0.7))
    assert np.isfinite(curve.fve).all()
    assert np.isnan(curve.fve_low).all() and np.isnan(curve.fve_high).all()
    assert (curve.num_documents, curve.few_documents) == (1, True)


@pytest.mark.parametrize(
    ("effective", "level", "reach"),
    [
        # (n + 1) / n t / z with t from the printed table: 2.2622 at 9, 2.0227 at 39, 1.8331 at 9 (90 %); z = 1.9600, 1.6449
        (8, 0.95, 9 / 8 * 2.2622 / 1.9600),
        (38, 0.95, 39 / 38 * 2.0227 / 1.9600),
        (8, 0.90, 9 / 8 * 1.8331 / 1.6449),
        (1e6, 0.95, 1.0),
    ],
)
def test_interval_reach_equals_the_printed_table(effective, level, reach):
    assert interval_reach(effective, level) == pytest.approx(reach, abs=1e-4)


def test_interval_reach_between_whole_numbers_of_documents_lies_between_theirs():
    assert interval_reach(10, 0.95) > interval_reach(10.4, 0.95) > interval_reach(11, 0.95)


def test_interval_ends_by_hand_stretch_the_quantiles_and_lean_as_they_do():
    # Replicates 0, 1, ..., 100: quantiles at 5 % and 95 % are 5 and 95, their middle 50; estimate 40: middle 40 + 1.5 x 10.
    reach = interval_reach(7.5, 0.9)
    low, high = interval_ends(np.array([40.0]), np.arange(101.0)[:, None], 7.5, level=0.9)
    np.testing.assert_allclose([low[0], high[0]], [55 - 45 * reach, 55 + 45 * reach])


def test_replicates_of_documents_without_variance_lie_far_out_and_differences_stay_numbers():
    # Document c lies on the mean: a resample of c alone (1 in 27) has nothing to explain and counts 1 % of the usual variance.
    vectors = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [0.0, 0.0], [0.0, 0.0]])
    baseline = mean_distance_baseline(vectors, "raw")
    assert baseline.distances.tolist() == [0.5, 0.5, 0.5, 0.5, 0, 0]
    curves = [fve_curve(np.full((6, 1), error), list("aabbcc"), baseline) for error in (0.1, 0.2)]
    lowest = curves[0].replicates.min()
    assert lowest == pytest.approx(1 - 6 * 0.1 / (0.01 * 2), rel=0.02)  # mean sum of distances over resamples: 2
    difference = paired_difference(*curves)
    assert np.isfinite([difference.low, difference.high]).all() and difference.high[0] > 1


def test_interval_ends_from_sql_over_stored_float_lists_are_the_same():
    documents, vectors, errors = sample(np.random.default_rng(8), num_documents=12)
    curve = fve_curve(errors, documents, between_documents_baseline(vectors, documents, "raw"), ks=[4])
    kept = pa.table(
        {
            "replicates": pa.array([curve.replicates[:, 0].astype(np.float32)], pa.list_(pa.float32())),
            "fve": curve.fve,
            "reach": [interval_reach(curve.effective_documents, curve.level)],
        }
    )
    quantiles = "SELECT fve, reach, list_aggregate(replicates::DOUBLE[], 'quantile_cont', [0.025, 0.975]) AS q FROM kept"
    middle = f"fve + {ASYMMETRY} * ((q[1] + q[2]) / 2 - fve)"
    ends = f"SELECT {middle} - reach * (q[2] - q[1]) / 2, {middle} + reach * (q[2] - q[1]) / 2 FROM ({quantiles})"
    (row,) = duckdb.sql(ends).fetchall()
    assert kept.num_rows == 1
    np.testing.assert_allclose(row, [curve.fve_low[0], curve.fve_high[0]], rtol=1e-13)


def test_interval_decimals_of_another_seed_change_the_last_one_by_at_most_one():
    documents, vectors, errors = sample(np.random.default_rng(9), num_documents=20)
    baseline = between_documents_baseline(vectors, documents, "raw")
    for replicates, expected in ((2000, 2), (200_000, 3)):
        curves = [fve_curve(errors, documents, baseline, ks=[1], num_replicates=replicates, seed=seed) for seed in range(6)]
        ends = np.array([[curve.fve_low[0], curve.fve_high[0]] for curve in curves])
        decimals = {interval_decimals(low, high, replicates) for low, high in ends}
        assert decimals == {expected}
        assert np.ptp(np.round(ends, expected), axis=0).max() < 1.001 * 10.0**-expected


def test_interval_decimals_of_an_unknown_or_empty_interval_are_three():
    assert [interval_decimals(low, high, 2000) for low, high in ((np.nan, np.nan), (0.2, 0.2))] == [3, 3]


@pytest.mark.parametrize(
    ("documents", "effective"),
    [
        (list("aabbcc"), 3.0),
        (list("aaab"), 16 / 10),  # (3 + 1)^2 / (9 + 1)
        ([7, 7, 7], 1.0),
        ([3, 1, 2, 2, 2, 2], 36 / 18),  # (4 + 1 + 1)^2 / (16 + 1 + 1)
    ],
)
def test_effective_documents_by_hand_equal_kish(documents, effective):
    assert effective_documents(documents) == pytest.approx(effective)


def test_curve_of_uneven_documents_warns_by_their_effective_number():
    documents = np.repeat(np.arange(40), [200] + [1] * 39)  # 239^2 / (200^2 + 39) = 1.43
    curve = fve_curve(np.random.default_rng(0).random((239, 2)), documents, stated_baseline(0.7))
    assert (curve.num_documents, curve.few_documents) == (40, True)
    assert curve.effective_documents == pytest.approx(239**2 / 40_039)
    assert gain_over(curve).few_documents


def test_replicates_are_float32_values():
    documents, _, errors = sample(np.random.default_rng(4), num_documents=30)
    replicates = fve_curve(errors, documents, stated_baseline(1)).replicates
    assert replicates.dtype == np.float64
    np.testing.assert_array_equal(replicates.astype(np.float32), replicates)


def test_fve_curve_of_many_activations_stays_small_in_memory():
    # 4,000 activations of 4,000 documents, 32 draws, 2,000 replicates: the replicate weights are 32 MB; a
    # tensor of replicates by activations by K, which a plain bootstrap would make, is 2 GB.
    errors = np.random.default_rng(0).random((4000, 32))
    document_weights.cache_clear()
    tracemalloc.start()
    fve_curve(errors, np.arange(4000), stated_baseline(0.7))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    document_weights.cache_clear()
    assert peak < 150e6


def curve_over(documents, seed=0, ks=(1, 2)):
    return fve_curve(np.ones((len(documents), 2)), documents, stated_baseline(0.7), ks=ks, seed=seed, num_replicates=20)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: paired_difference(curve_over(list("ab")), curve_over(list("ac"))),
            r"2 and 2 documents \(not the same ones\)",
        ),
        (lambda: paired_difference(curve_over(list("ab")), curve_over(list("abc"))), "2 and 3 documents"),
        (lambda: paired_difference(curve_over(list("ab")), curve_over(list("ab"), seed=1)), "seeds 0 and 1"),
        (
            lambda: paired_difference(curve_over(list("ab")), curve_over(list("ab"), ks=[1])),
            "different K: 1, 2 and 1",
        ),
        (lambda: gain_over(curve_over(list("ab")), k=5), "no K = 5; it has 1, 2"),
        (lambda: fve_curve(np.ones((2, 4)), ["a", "b"], stated_baseline(0.7), ks=[8]), "best-of-8"),
        (
            lambda: fve_curve(np.ones((2, 4)), ["a"], stated_baseline(0.7)),
            "2 activations and document ids for 1",
        ),
        (
            lambda: fve_curve(np.ones((2, 4)), ["a", None], stated_baseline(0.7)),
            "activation 1 has document id None",
        ),
        (lambda: fve_curve(np.ones((2, 4)), [0.5, 1.5], stated_baseline(0.7)), "got float64"),
        (
            lambda: fve_curve(np.ones((2, 4)), ["a", "b"], mean_distance_baseline(np.eye(3))),
            "baseline is of 3",
        ),
        (lambda: fve_curve(np.ones(4), ["a", "b"], stated_baseline(0.7)), r"\[activation, draw\]"),
        (lambda: fve_curve(np.ones((2, 4)), ["a", "b"], stated_baseline(0.7), level=95), "between 0 and 1"),
        (
            lambda: fve_curve(np.ones((2, 4)), ["a", "b"], stated_baseline(0.7), num_replicates=1),
            "at least 2",
        ),
        (lambda: fve_curve([[0.1, np.nan]], ["a"], stated_baseline(4, scoring="raw")), "pass `failed_error`"),
        (
            lambda: fve_curve(np.ones((3, 4)), list("abc"), replace(mean_distance_baseline(np.eye(3)), distances=None)),
            "lost its distances",
        ),
    ],
)
def test_bad_input_gets_a_message_that_helps(call, message):
    with pytest.raises(ValueError, match=message):
        call()
