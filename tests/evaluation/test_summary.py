"""A cell's curve, controls and counts against brute force and values by hand."""

from __future__ import annotations

import re
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksweep.config.spec import Scoring
from ksweep.evaluation.summary import SUMMARISED, Summary, summarise
from ksweep.registry.draws import DRAWS_FILE_SCHEMA

SCORING = Scoring(num_replicates=200)
NUM_ACTIVATIONS, NUM_DRAWS, D = 24, 4, 6


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def best_of(errors: list[float | None], k: int) -> float:
    """Mean over every choice of k draws of the best success among them, 2 where all of them failed; by brute force."""
    kept = [[e for e in chosen if e is not None] for chosen in combinations(errors, k)]
    return float(np.mean([min(successes) if successes else 2.0 for successes in kept]))


def by_activation(draws: pa.Table, column: str) -> list[list[Any]]:
    return np.array(draws[column].to_pylist(), dtype=object).reshape(-1, NUM_DRAWS).tolist()  # type: ignore[no-any-return]


def draws_of(
    vectors: np.ndarray,
    *,
    num_draws: int = NUM_DRAWS,
    per_document: int = 2,
    failed: frozenset[tuple[int, int]] = frozenset(),
    noise: float = 1.0,
    seed: int = 0,
) -> pa.Table:
    """Draws whose reconstructions are the vectors with noise; errors written down as 2 (1 - cosine)."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for i, vector in enumerate(vectors):
        for j in range(num_draws):
            made = (vector + noise * rng.normal(size=len(vector))).astype(np.float32).astype(float)
            other, ok = (i + per_document) % len(vectors), (i, j) not in failed
            row = {
                "activation": i, "draw": j, "document": f"d{i // per_document}", "text": f"<explanation>{i}.{j}",
                "num_tokens": 10, "explanation": f"{i}.{j}" if ok else None, "parse": "ok" if ok else "no closing tag",
                "finish": "stop" if ok else "length", "shuffled_activation": other,
                "error": 2 - 2 * cosine(made, vector) if ok else None, "cosine": cosine(made, vector) if ok else None,
                "shuffled_error": 2 - 2 * cosine(made, vectors[other]) if ok else None,
                "reconstruction": made.tolist() if ok and j == 0 else None,
            }  # fmt: skip
            rows.append(row)
    return pa.Table.from_pylist(
        [{name: row.get(name) for name in DRAWS_FILE_SCHEMA.names} for row in rows], schema=DRAWS_FILE_SCHEMA
    )


def edited(draws: pa.Table, **columns: list[Any]) -> pa.Table:
    for name, values in columns.items():
        field = DRAWS_FILE_SCHEMA.field(name)
        draws = draws.set_column(draws.schema.get_field_index(name), field, pa.array(values, field.type))
    return draws


def summary_of(draws: pa.Table, vectors: np.ndarray, scoring: Scoring = SCORING, **arguments: Any) -> Summary:
    num_draws = draws.num_rows // len(vectors)
    given = {"ks": tuple(range(1, num_draws + 1)), "empty_text": None}
    if "first_draws" not in arguments:
        given["first_draws"] = firsts_of(draws, *vectors.shape)
    return summarise(draws, vectors, scoring, **(given | arguments))


def firsts_of(draws: pa.Table, num_activations: int, d_model: int) -> np.ndarray:
    made = draws["reconstruction"].to_pylist()[:: draws.num_rows // num_activations]
    return np.array([[np.nan] * d_model if vector is None else vector for vector in made])


def control(summary: Summary, name: str) -> dict[str, Any]:
    [row] = [row for row in summary.controls if row["control"] == name]
    return row


def names(summary: Summary) -> set[str]:
    return {row["control"] for row in summary.controls}


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """With a common part, as activations have."""
    return (np.random.default_rng(7).normal(size=(NUM_ACTIVATIONS, D)) + 1.0).astype(np.float32)


def mean_direction_length(vectors: np.ndarray) -> float:
    """R, the length of the mean unit vector."""
    units = np.array([v / np.sqrt(v @ v) for v in vectors.astype(float)])
    return float(np.sqrt((units.mean(axis=0) ** 2).sum()))


def between_documents(vectors: np.ndarray, per_document: int = 2) -> float:
    """Half the mean squared distance of the scaled vectors over pairs of different documents: 1 - cosine, pair by pair."""
    pairs = [(i, j) for i in range(len(vectors)) for j in range(i) if i // per_document != j // per_document]
    return float(np.mean([1 - cosine(vectors[i].astype(float), vectors[j].astype(float)) for i, j in pairs]))


def test_curve_is_the_mean_over_every_subset_of_draws(vectors: np.ndarray) -> None:
    draws = draws_of(vectors, failed=frozenset({(0, 0), (3, 1), (3, 2)}))
    baseline = between_documents(vectors)
    for row in summary_of(draws, vectors).curve:
        best = np.mean([best_of(errors, row["k"]) for errors in by_activation(draws, "error")])
        assert row["error"] == pytest.approx(best, abs=1e-12)
        assert row["fve"] == pytest.approx(1 - best / baseline, abs=1e-9)
        assert row["cosine"] == pytest.approx(1 - best / 2, abs=1e-9)  # a failure counts as a right angle in both
        assert row["fve_low"] <= row["fve"] <= row["fve_high"]
        assert (row["baseline_kind"], row["num_activations"], row["num_documents"], row["num_draws"]) == (
            "between documents", NUM_ACTIVATIONS, 12, NUM_DRAWS,
        )  # fmt: skip


def test_curve_with_a_stated_baseline_divides_by_it(vectors: np.ndarray) -> None:
    draws = draws_of(vectors)
    row = summary_of(draws, vectors, Scoring(num_replicates=200, baseline=0.25)).curve[0]
    assert row["fve"] == pytest.approx(1 - np.mean(draws["error"].to_pylist()) / 0.25, abs=1e-12)
    assert (row["baseline"], row["baseline_kind"]) == (0.25, "stated constant")


def test_curve_has_only_the_ks_asked_for(vectors: np.ndarray) -> None:
    assert [row["k"] for row in summary_of(draws_of(vectors), vectors, ks=(2, 4)).curve] == [2, 4]


def test_failures_count_with_the_error_that_scoring_gives_them(vectors: np.ndarray) -> None:
    draws = draws_of(vectors, num_draws=1, failed=frozenset({(0, 0), (1, 0)}))
    known = [e for e in draws["error"].to_pylist() if e is not None]
    row = summary_of(draws, vectors, Scoring(num_replicates=200, failed_error=1.5)).curve[0]
    assert row["error"] == pytest.approx((sum(known) + 2 * 1.5) / NUM_ACTIVATIONS, abs=1e-12)
    assert row["failure_rate"] == pytest.approx(2 / NUM_ACTIVATIONS)
    baseline = between_documents(vectors)
    assert row["fve_over_successes"] == pytest.approx(1 - np.mean(known) / baseline, abs=1e-12)


def test_empty_text_control_is_one_vector_held_against_all(vectors: np.ndarray) -> None:
    empty = np.random.default_rng(1).normal(size=D).astype(np.float32)
    found = control(summary_of(draws_of(vectors), vectors, empty_text=empty), "empty_text")
    error = np.mean([2 - 2 * cosine(empty.astype(float), v) for v in vectors.astype(float)])
    assert found["value"] == pytest.approx(1 - error / between_documents(vectors), abs=1e-6)
    assert found["num_activations"] == NUM_ACTIVATIONS


def test_empty_text_control_by_hand() -> None:
    # Two activations at a right angle: half their squared distance is 1. The empty text points along the first: errors 0 and 2.
    vectors = np.eye(2, dtype=np.float32)
    draws = draws_of(vectors, num_draws=1, per_document=1)
    found = control(summary_of(draws, vectors, empty_text=np.array([3.0, 0.0])), "empty_text")
    assert found["value"] == pytest.approx(1 - 1 / 1.0)


def test_empty_text_control_is_left_out_where_it_was_not_measured(vectors: np.ndarray) -> None:
    assert "empty_text" not in names(summary_of(draws_of(vectors), vectors))


@pytest.mark.parametrize("stated", [None, 0.7335])
def test_mean_vector_control_is_two_times_one_less_r(vectors: np.ndarray, stated: float | None) -> None:
    r = mean_direction_length(vectors)
    baseline = between_documents(vectors) if stated is None else stated
    summary = summary_of(draws_of(vectors), vectors, Scoring(num_replicates=200, baseline=stated))
    assert control(summary, "mean_vector")["value"] == pytest.approx(1 - 2 * (1 - r) / baseline, abs=1e-6)


def test_one_activation_has_no_mean_vector_and_no_retrieval() -> None:
    vectors = np.ones((1, D), dtype=np.float32)
    summary = summary_of(draws_of(vectors), vectors, Scoring(num_replicates=200, baseline=0.5), empty_text=np.ones(D))
    assert names(summary) == {"empty_text", "gain"}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.3, 1.0, 3.0]), st.sets(st.integers(0, 9), max_size=9))
def test_retrieval_control_is_what_comparing_every_pair_gives(seed: int, noise: float, failed: set[int]) -> None:
    vectors = (np.random.default_rng(seed).normal(size=(10, D)) + 0.5).astype(np.float32)
    draws = draws_of(vectors, num_draws=2, noise=noise, seed=seed, failed=frozenset((i, 0) for i in failed))
    first = draws["reconstruction"].to_pylist()[::2]
    hits = 0
    for i, made in enumerate(first):
        if made is not None:
            cosines = [cosine(np.array(made), v) for v in vectors.astype(float)]
            hits += int(np.argmax(cosines)) == i
    summary = summary_of(draws, vectors)
    assert control(summary, "retrieval_top1")["value"] == pytest.approx(hits / 10)
    assert control(summary, "retrieval_chance")["value"] == pytest.approx(1 / 10)


def test_retrieval_is_among_the_first_activations_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ksweep.evaluation.summary.RETRIEVAL_POOL", 4)
    vectors = np.eye(6, dtype=np.float32) + 0.1
    summary = summary_of(draws_of(vectors, num_draws=1, noise=0.01), vectors)
    found = control(summary, "retrieval_top1")
    assert (found["value"], found["num_activations"]) == (1.0, 4)
    assert control(summary, "retrieval_chance")["value"] == 0.25


def test_shuffled_control_is_the_best_of_k_of_the_errors_against_another(vectors: np.ndarray) -> None:
    draws = draws_of(vectors, failed=frozenset({(2, 3)}))
    baseline = between_documents(vectors)
    for row in summary_of(draws, vectors).curve:
        best = np.mean([best_of(errors, row["k"]) for errors in by_activation(draws, "shuffled_error")])
        assert row["shuffled_fve"] == pytest.approx(1 - best / baseline, abs=1e-9)


def test_the_band_for_all_k_is_around_the_curve_and_wider_than_the_intervals(vectors: np.ndarray) -> None:
    curve = summary_of(draws_of(vectors), vectors, Scoring(num_replicates=2000)).curve
    assert len(curve) > 2 and all(row["band_low"] < row["fve"] < row["band_high"] for row in curve)
    widths = [(row["band_high"] - row["band_low"]) / (row["fve_high"] - row["fve_low"]) for row in curve]
    assert np.mean(widths) > 1


def test_one_document_leaves_shuffled_and_intervals_unknown(vectors: np.ndarray) -> None:
    n = NUM_ACTIVATIONS * NUM_DRAWS
    draws = edited(draws_of(vectors, per_document=100), shuffled_activation=[None] * n, shuffled_error=[None] * n)
    with pytest.raises(ValueError, match="of one document"):
        summary_of(draws, vectors)
    from_mean = Scoring(num_replicates=200, baseline="distance_from_mean")
    for row in summary_of(draws, vectors, from_mean).curve:
        assert row["fve"] == pytest.approx(1 - row["error"] / (1 - mean_direction_length(vectors) ** 2), abs=1e-9)
        assert row["num_documents"] == 1
        assert row["shuffled_fve"] is None and row["fve_low"] is None and row["fve_high"] is None
        assert row["band_low"] is None and row["band_high"] is None
        assert row["fve"] is not None
    gain = control(summary_of(draws, vectors, from_mean), "gain")
    assert "interval" not in gain["note"]


def test_gain_is_the_difference_of_the_curve_and_lies_in_its_interval(vectors: np.ndarray) -> None:
    summary = summary_of(draws_of(vectors), vectors, Scoring(num_replicates=500))
    gain = control(summary, "gain")
    first, last = summary.curve[0], summary.curve[-1]
    assert gain["value"] == pytest.approx(last["fve"] - first["fve"], abs=1e-12)
    assert gain["k"] == NUM_DRAWS and gain["num_activations"] == NUM_ACTIVATIONS
    found = re.search(r"95% interval (\S+) to (\S+)$", gain["note"])
    assert found
    low, high = float(found[1]), float(found[2])
    assert 0 <= low <= gain["value"] <= high  # more draws never hurt
    # Paired: narrower than the two intervals laid end to end.
    assert high - low < (first["fve_high"] - first["fve_low"]) + (last["fve_high"] - last["fve_low"])


@pytest.mark.parametrize("ks", [(1,), (2, 4), (4,)])
def test_gain_is_left_out_where_the_curve_has_no_two_points_from_one(vectors: np.ndarray, ks: tuple[int, ...]) -> None:
    assert "gain" not in names(summary_of(draws_of(vectors), vectors, ks=ks))


def test_counts_by_hand() -> None:
    vectors = np.eye(2, 3, dtype=np.float32) + 0.1
    draws = edited(
        draws_of(vectors, num_draws=4, per_document=1, failed=frozenset({(0, 1), (0, 2), (1, 3)})),
        parse=["ok", "empty", "cut off", "ok", "ok", "ok", "ok", "cut off"],
        finish=["stop", "stop", "length", "stop", "stop", "stop", "stop", "length"],
        num_tokens=[1, 2, 3, 4, 5, 6, 7, 12],
        text=["a", "b", "c", "a", "a", "a", "d", "d"],  # distinct within an activation: a b c, a d
        explanation=["蒼い空と海", None, None, "a plain one", "海", "", "123", None],
    )
    counts = summary_of(draws, vectors).counts
    assert counts["num_draws_total"] == 8
    assert counts["failures"] == {"cut off": 2, "empty": 1}
    assert counts["failure_rate"] == 3 / 8
    assert counts["cut_off_rate"] == 2 / 8
    assert counts["distinct_text_fraction"] == 5 / 8
    assert counts["cjk_fraction"] == 2 / 5
    assert counts["mean_tokens"] == 5.0
    assert counts["num_without_success"] == 0


def test_cell_in_which_everything_failed_is_counted_and_not_dropped(vectors: np.ndarray) -> None:
    everything = frozenset((i, j) for i in range(NUM_ACTIVATIONS) for j in range(NUM_DRAWS))
    summary = summary_of(draws_of(vectors, failed=everything), vectors)
    baseline = between_documents(vectors)
    for row in summary.curve:
        assert row["fve"] == pytest.approx(1 - 2 / baseline)
        assert row["failure_rate"] == pytest.approx(1.0)
        assert (row["fve_over_successes"], row["cosine"]) == (None, 0.0)
    assert control(summary, "retrieval_top1")["value"] == 0.0
    assert control(summary, "gain")["value"] == 0.0
    counts = summary.counts
    assert counts["num_without_success"] == NUM_ACTIVATIONS and counts["failure_rate"] == 1.0 and counts["cjk_fraction"] == 0.0


def test_columns_that_a_summary_says_it_needs_are_enough(vectors: np.ndarray) -> None:
    draws = draws_of(vectors)
    needed = draws.select(["activation", "draw", *SUMMARISED])
    assert summary_of(needed, vectors, first_draws=firsts_of(draws, *vectors.shape)) == summary_of(draws, vectors)
