"""The winner's curse: there with the naive maximum, gone with a choice made on other documents."""

import numpy as np
import pytest

from ksweep.stats import fve_curve, halves, held_out_best, paired_difference, stated_baseline

BASELINE = stated_baseline(1, scoring="raw")


def settings(generator, means, num_documents=40, per_document=2, num_draws=4, spread=0.3):
    """Errors of several settings over the same activations, log-normal with the means given, alike within documents."""
    documents = np.repeat(np.arange(num_documents), per_document)
    shape = (len(means), num_documents)
    shared = generator.normal(size=shape)[:, documents, None]
    alone = generator.normal(size=(len(means), len(documents), num_draws))
    errors = np.exp(spread * (np.sqrt(0.5) * shared + np.sqrt(0.5) * alone) - spread**2 / 2)
    return documents, errors * np.array(means)[:, None, None]


@pytest.mark.trials
@pytest.mark.slow
def test_held_out_best_is_unbiased_where_the_naive_maximum_promises_too_much():
    # Eight settings that are all equally good: whatever is chosen is worth 1 - 0.5.
    generator, naive, honest, covered, num_simulations = np.random.default_rng(0), [], [], 0, 600
    for seed in range(num_simulations):
        documents, errors = settings(generator, [0.5] * 8)
        found = held_out_best(errors, documents, BASELINE, k=1, num_replicates=300, seed=seed)
        naive.append(found.naive_fve)
        honest.append(found.curve.fve[0])
        covered += found.curve.fve_low[0] <= 0.5 <= found.curve.fve_high[0]
    error = np.std(honest) / np.sqrt(num_simulations)  # 0.0008
    assert abs(np.mean(honest) - 0.5) < 3 * error, (np.mean(honest), error)
    assert np.mean(naive) - 0.5 > 0.02, np.mean(naive)  # 25 standard errors
    assert covered / num_simulations > 0.95, covered / num_simulations  # with the choices held fixed 0.88


@pytest.mark.trials
@pytest.mark.slow
def test_interval_of_the_held_out_best_covers_as_often_as_it_says_where_one_setting_is_clearly_best():
    generator, covered = np.random.default_rng(5), 0
    for seed in range(1000):
        documents, errors = settings(generator, [0.4, 0.6])
        found = held_out_best(errors, documents, BASELINE, k=1, num_replicates=400, seed=seed)
        covered += found.curve.fve_low[0] <= 0.6 <= found.curve.fve_high[0]
    assert 0.925 < covered / 1000 < 0.97, covered


@pytest.mark.trials
@pytest.mark.slow
def test_held_out_best_is_worth_what_the_choice_is_worth_where_settings_differ():
    generator, means, honest, worth = np.random.default_rng(1), [0.5, 0.52, 0.54, 0.56], [], []
    for seed in range(600):
        documents, errors = settings(generator, means)
        found = held_out_best(errors, documents, BASELINE, k=1, num_replicates=2, seed=seed)
        honest.append(found.curve.fve[0])
        worth.append(1 - np.mean([means[i] for i in found.chosen]))
    difference = np.array(honest) - np.array(worth)
    assert abs(difference.mean()) < 3 * difference.std() / np.sqrt(len(difference))
    assert 0.44 < np.mean(worth) < 0.5


def test_held_out_best_by_hand_measures_each_choice_on_the_other_half():
    documents, errors = settings(np.random.default_rng(2), [0.5, 0.5, 0.5], num_documents=11)
    found = held_out_best(errors, documents, BASELINE, k=4, seed=5)
    second, best = halves(documents, 5), errors.min(axis=2)
    on_first = min(range(3), key=lambda i: best[i, ~second].sum())
    on_second = min(range(3), key=lambda i: best[i, second].sum())
    total = best[on_first, second].sum() + best[on_second, ~second].sum()
    assert found.chosen == (on_second, on_first)
    assert found.curve.fve[0] == pytest.approx(1 - total / len(documents))
    assert found.naive_fve == pytest.approx(1 - best.mean(axis=1).min())
    assert found.optimism == pytest.approx(found.naive_fve - found.curve.fve[0])


def test_held_out_best_of_a_clear_winner_is_that_winner_without_optimism():
    documents, errors = settings(np.random.default_rng(3), [0.3, 0.9])
    found = held_out_best(errors, documents, BASELINE, k=2)
    assert (found.best, found.chosen, found.optimism) == (0, (0, 0), pytest.approx(0))


def test_held_out_best_takes_settings_with_other_numbers_of_draws_and_pairs_with_curves():
    documents, errors = settings(np.random.default_rng(4), [0.5, 0.4])
    found = held_out_best([errors[0][:, :1], errors[1]], documents, BASELINE, k=1)
    greedy = fve_curve(errors[0][:, :1], documents, BASELINE)
    assert paired_difference(found.curve, greedy).estimate[0] == pytest.approx(found.curve.fve[0] - greedy.fve[0])


def test_halves_split_documents_not_activations_and_depend_on_the_seed_alone():
    documents = np.repeat([f"d{i}" for i in range(9)], 3)
    second = halves(documents, 0)
    assert all(len(set(second[documents == name])) == 1 for name in documents)
    assert second.sum() == 3 * 4
    shuffle = np.random.default_rng(0).permutation(len(documents))
    assert (halves(documents[shuffle], 0) == second[shuffle]).all()
    assert (halves(documents, 1) != second).any()


def test_held_out_best_of_one_document_is_refused():
    with pytest.raises(ValueError, match="at least two documents"):
        held_out_best([np.ones((3, 2))], ["a"] * 3, BASELINE, k=1)
