"""Every stored question, asked of what real runs have left; the answers are worked out from the draws and vectors on disk."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ksweep.analysis.cells import load_cells
from ksweep.analysis.choosing import chosen_curves
from ksweep.registry.chosen_files import record_chosen
from ksweep.registry.query import run_query
from ksweep.registry.stored_queries import queries, query_named, variables_of
from ksweep.stats import interval_reach
from ksweep.stats.bootstrap import document_weights
from ksweep.utils.errors import RequestError
from tests.registry.real_runs import KS, OTHER_COMMIT, TEMPERATURES, Real

Rows = list[dict[str, Any]]


def answer(real: Real, name: str, *given: str) -> Rows:
    query = query_named(real.root, name)
    rows: Rows = run_query(real.root, query.sql, variables_of(query, list(given))).to_pylist()
    return rows


def replicates(real: Real, temperature: float, k: int) -> np.ndarray:
    """FVE in each of the 200 replicates of the spec: every draw of documents taken anew, activation by activation."""
    documents = real.documents()
    names, membership = np.unique(documents, return_inverse=True)
    best, scaled = real.best_of(temperature, k), real.scaled()
    half_squares = np.array([[np.square(a - b).mean() / 2 for b in scaled] for a in scaled])
    other = membership[:, None] != membership[None]
    # A small change of a document's weight moves the mean over pairs by its pairs with others: the replicate to first order.
    value, num_pairs = half_squares[other].mean(), other.sum()
    parts = (half_squares * other).sum(axis=1) - value * other.sum(axis=1)
    found = []
    for drawn in document_weights(len(names), 200, 0):
        times = drawn[membership]
        baseline = value + 2 * len(best) / num_pairs * np.average(parts, weights=times)
        found.append(1 - np.average(best, weights=times) / baseline)
    return np.array(found)


def paired(real: Real, a: tuple[float, int], b: tuple[float, int]) -> tuple[float, float, float]:
    """Difference of two FVE (temperature, K) and its 95 % interval from the shared replicates."""
    estimate = real.fve(*a) - real.fve(*b)
    sizes = np.unique(real.documents(), return_counts=True)[1]
    reach = interval_reach(sizes.sum() ** 2 / np.square(sizes).sum(), 0.95)
    below, above = np.quantile(replicates(real, *a) - replicates(real, *b), [0.025, 0.975])
    middle, half = estimate + 1.5 * ((below + above) / 2 - estimate), reach * (above - below) / 2
    return estimate, middle - half, middle + half


def is_paired(found: tuple[Any, ...], real: Real, a: tuple[float, int], b: tuple[float, int]) -> bool:
    # Replicates are kept in 32 bits.
    return bool(np.allclose(found, paired(real, a, b), atol=1e-6))


@pytest.mark.slow
def test_there_are_ten_questions_each_named_commented_and_tested(real: Real) -> None:
    found = queries(real.root)
    assert len(found) >= 10
    for query in found.values():
        assert query.sql.startswith("-- ") and query.question.endswith("?"), query.name
        assert f'"{query.name}"' in Path(__file__).read_text(), f"no test of @{query.name}"


def test_best_temperature_is_that_of_the_largest_fve_with_its_lead(real: Real) -> None:
    rows = answer(real, "best_temperature")
    assert [row["k"] for row in rows] == [1, 8]
    for row in rows:
        k = row["k"]
        ranked = sorted(TEMPERATURES, key=lambda t: -real.fve(t, k))
        assert (row["best_temperature"], row["next_temperature"]) == (ranked[0], ranked[1])
        assert row["fve"] == pytest.approx(real.fve(ranked[0], k), abs=1e-9)
        assert is_paired((row["lead"], row["lead_low"], row["lead_high"]), real, (ranked[0], k), (ranked[1], k))
        assert (row["num_temperatures"], row["num_activations"], row["num_documents"]) == (3, 40, len(set(real.documents())))


@pytest.mark.slow
def test_growth_with_k_is_the_mean_over_every_choice_of_k_draws(real: Real) -> None:
    rows = answer(real, "growth_with_k")
    assert [(row["temperature"], row["k"]) for row in sorted(rows, key=lambda r: (r["temperature"], r["k"]))] == [
        (t, k) for t in TEMPERATURES for k in KS
    ]
    for row in rows:
        t, k = row["temperature"], row["k"]
        assert row["fve"] == pytest.approx(real.fve(t, k), abs=1e-9)
        assert row["over_one_draw"] == pytest.approx(real.fve(t, k) - real.fve(t, 1), abs=1e-9)
        assert row["few_subsets"] == (k > 4)


@pytest.mark.slow
def test_gain_per_doubling_is_paired_over_documents(real: Real) -> None:
    rows = answer(real, "gain_per_doubling")
    assert len(rows) == 3 * 3
    for row in rows:
        t, k = row["temperature"], row["k"]
        assert is_paired((row["gain"], row["gain_low"], row["gain_high"]), real, (t, 2 * k), (t, k))
        assert row["is_clear"] == (row["gain_low"] > 0)


def test_compare_pairs_cells_in_either_order(real: Real) -> None:
    cells = {t: real.record(t)["cell"] for t in TEMPERATURES}
    rows = answer(real, "compare", f"cell={cells[1.0]}", f"other={cells[0.5]}")
    assert [row["k"] for row in rows] == list(KS)
    for row in rows:
        assert is_paired(
            (row["difference"], row["difference_low"], row["difference_high"]), real, (1.0, row["k"]), (0.5, row["k"])
        )
    turned = answer(real, "compare", f"cell={cells[0.5]}", f"other={cells[1.0]}")
    assert [-row["difference"] for row in turned] == pytest.approx([row["difference"] for row in rows])
    assert len(answer(real, "compare", f"cell={cells[0.5]}")) == 2 * len(KS)
    assert len(answer(real, "compare")) == 3 * len(KS), "each pair once"


def test_said_best_and_worst_are_the_ends_of_the_best_draws(real: Real) -> None:
    draws = real.draws(1.0)
    best = []
    for first in range(0, 320, 8):
        best.append(min(draws[first : first + 8], key=lambda d: math.inf if d["error"] is None else d["error"]))
    ranked = sorted(best, key=lambda d: (math.inf if d["error"] is None else d["error"], d["activation"]))
    rows = answer(real, "said_best_and_worst", f"cell={real.runs[1.0]}")
    for rank, expected in (("best", ranked[:5]), ("median", ranked[17:22]), ("worst", ranked[::-1][:5])):
        found = [row for row in rows if row["rank"] == rank]
        assert [row["number"] for row in found] == [1, 2, 3, 4, 5]
        names = ("activation", "draw", "error", "cosine", "context", "document", "position")
        assert [[row[n] for n in names] for row in found] == [[d[n] for n in names] for d in expected]
        assert [row["explanation"] for row in found] == [d["explanation"] for d in expected]
    assert {row["rank"] for row in answer(real, "said_best_and_worst", "rank=worst")} == {"worst"}


def test_failures_by_class_counts_runs_and_says_what_is_still_open(real: Real) -> None:
    [row] = answer(real, "failures_by_class")
    assert (row["class"], row["num_runs"], row["num_cells"], row["num_open"]) == ("bad input", 1, 1, 1)
    assert row["sweeps"] == ["broken"] and "30" in row["last_message"]


def test_failed_draws_are_those_without_an_explanation(real: Real) -> None:
    rows = answer(real, "failed_draws")
    found = {(row["temperature"], row["cause"]): (row["num_failed_draws"], row["failure_rate"]) for row in rows}
    expected: dict[tuple[float, str], int] = {}
    for t in TEMPERATURES:
        for draw in real.draws(t):
            if draw["parse"] != "ok":
                expected[t, draw["parse"]] = expected.get((t, draw["parse"]), 0) + 1
    assert expected and found == {key: (count, count / 320) for key, count in expected.items()}


def test_throughput_by_host_takes_medians_of_runs_that_sampled(real: Real) -> None:
    [row] = answer(real, "throughput_by_host")
    records = [real.record(t) for t in TEMPERATURES] + [real.record(0.7)]  # measured "twice"
    assert (row["host"], row["num_ranks"], row["num_runs"]) == (records[0]["host"], 1, 4)
    assert row["tokens_per_second"] == pytest.approx(float(np.median([r["tokens_per_second"] for r in records])))
    speeds = [320 / (r["seconds"]["drawing"] + r["seconds"].get("waiting", 0.0)) for r in records]
    assert row["draws_per_second"] == pytest.approx(float(np.median(speeds)))
    tokens = {t: sum(d["num_tokens"] for d in real.draws(t)) for t in TEMPERATURES}
    assert row["num_tokens"] == sum(tokens.values()) + tokens[0.7]


def test_runs_by_source_finds_text_model_and_autoencoder_by_part_of_their_names(real: Real) -> None:
    assert len(answer(real, "runs_by_source")) == 5
    assert {row["run_id"] for row in answer(real, "runs_by_source", "text=text.jsonl", "model=base", "autoencoder=nla-av")} == {
        *real.runs.values(), "20260101T000000-earlier",
    }  # fmt: skip
    [failed] = answer(real, "runs_by_source", "text=vectors.parquet")
    assert (failed["status"], failed["sweep"]) == ("failed", "broken")
    assert answer(real, "runs_by_source", "model=gemma") == []


def test_measured_twice_says_how_far_apart_and_by_which_code(real: Real) -> None:
    [row] = answer(real, "measured_twice")
    assert (row["num_runs"], row["num_commits"], row["at_k"], row["agree"]) == (2, 2, 8, False)
    assert row["largest_difference"] == pytest.approx(0.008, abs=1e-9)  # 0.001 times K
    assert row["commits"] == sorted([OTHER_COMMIT[:12], real.record(0.7)["git_commit"][:12]])
    assert row["within_interval"] is True, "0.008 is far less than the width of an interval here"


def test_disk_by_sweep_is_what_lies_on_disk_and_shared_draws_are_named(real: Real) -> None:
    size = {}
    for t in TEMPERATURES:
        size[t] = sum(part.stat().st_size for directory in real.directories(t) for part in directory.glob("part-*.parquet"))
    rows = {row["sweep"]: row for row in answer(real, "disk_by_sweep")}
    # The second sweep found 0.7 measured and did not run it again.
    assert {name: (row["num_draws"], row["bytes"]) for name, row in rows.items()} == {
        "tiny": (640, size[0.5] + size[0.7]), "again": (320, size[1.0]),
    }  # fmt: skip
    assert rows["again"]["bytes_per_draw"] == pytest.approx(size[1.0] / 320) and rows["again"]["shared_with"] == []


def test_controls_beside_curves_are_those_of_the_landed_files(real: Real) -> None:
    rows = answer(real, "controls_beside_curves")
    assert sorted(row["temperature"] for row in rows) == list(TEMPERATURES)
    draws, scaled = real.draws(TEMPERATURES[0]), real.scaled()
    mean = scaled.mean(axis=0) * math.sqrt(scaled.shape[1]) / np.linalg.norm(scaled.mean(axis=0))
    constant = 1 - np.square(scaled - mean).mean() / real.between()
    for row in rows:
        t = row["temperature"]
        assert (row["largest_k"], row["retrieval_chance"]) == (8, 1 / 40)
        assert row["fve_at_one"] == pytest.approx(real.fve(t, 1), abs=1e-9)
        assert row["mean_vector"] == pytest.approx(constant, abs=1e-9) and -3 < row["empty_text"] < 1
        shuffled = [d["shuffled_error"] for d in real.draws(t)]
        best = [
            2.0 if all(e is None for e in errors) else min(e for e in errors if e is not None)
            for i in range(0, 320, 8)
            if draws[i]["shuffled_activation"] is not None
            for errors in [shuffled[i : i + 8]]
        ]
        assert row["shuffled"] == pytest.approx(1 - np.mean(best) / real.between(), abs=1e-9)


def test_equal_compute_ranks_what_so_many_tokens_reach(real: Real) -> None:
    rows = answer(real, "equal_compute")
    length = {t: np.mean([d["num_tokens"] for d in real.draws(t)]) for t in TEMPERATURES}
    points = [(k * length[t], real.fve(t, k), t, k) for t in TEMPERATURES for k in KS]
    assert len(rows) == len(points)
    for row in rows:
        t, k = row["temperature"], row["k"]
        tokens, fve = k * length[t], real.fve(t, k)
        assert row["tokens"] == pytest.approx(tokens) and row["fve"] == pytest.approx(fve, abs=1e-9)
        better = {other for spent, reached, other, _ in points if other != t and spent <= tokens and reached > fve}
        assert row["place"] == 1 + len(better)


@pytest.mark.slow
def test_by_group_divides_the_error_of_a_group_by_both_baselines(real: Real) -> None:
    rows = answer(real, "by_group", f"cell={real.runs[1.0]}")
    positions = np.array([row["position"] for row in real.draws(1.0)[::8]])
    norms = np.array(
        run_query(real.root, f"SELECT norm FROM activations WHERE run_id = '{real.runs[1.0]}' ORDER BY activation")["norm"]
    )
    quarters = np.searchsorted(np.quantile(norms, [0.25, 0.5, 0.75]), norms, side="left")
    failed = np.array([row["error"] is None for row in real.draws(1.0)]).reshape(40, 8).mean(axis=1)
    assert {row["breakdown"] for row in rows} >= {"all", "position", "norm"}
    for row in rows:
        best = real.best_of(1.0, row["k"])
        if row["breakdown"] == "all":
            inside = np.ones(40, dtype=bool)
            assert row["worst_share"] == pytest.approx(best.max() / best.sum()) and row["against"] == "overall"
        elif row["breakdown"] == "position":
            first, _, last = row["part"].split()
            inside = (positions >= int(first)) & (positions <= int(last))
        elif row["breakdown"] == "norm":
            inside = quarters == int(row["part"].split()[1]) - 1
        else:
            continue
        baseline = real.between(inside) if row["against"] == "own" else real.between()
        assert row["num_activations"] == inside.sum()
        assert row["baseline"] == pytest.approx(baseline, abs=1e-9)
        assert row["fve"] == pytest.approx(1 - best[inside].mean() / baseline, abs=1e-9)
        assert row["median_error"] == pytest.approx(float(np.median(best[inside])))
        assert row["failure_rate"] == pytest.approx(failed[inside].mean())
    quarters_at_one = [row for row in rows if row["breakdown"] == "norm" and row["k"] == 1]
    assert {row["against"] for row in quarters_at_one} == {"overall", "own"}
    overall = [row for row in quarters_at_one if row["against"] == "overall"]
    assert np.average([r["fve"] for r in overall], weights=[r["num_activations"] for r in overall]) == pytest.approx(
        real.fve(1.0, 1)
    )
    assert {row["against"] for row in answer(real, "by_group", "against=own")} == {"own"}


def test_own_questions_lie_in_the_registry_and_unknown_ones_are_told(tmp_path: Path) -> None:
    (tmp_path / "queries").mkdir()
    (tmp_path / "queries" / "mine.sql").write_text(
        "-- How many runs?\nSELECT count(*) AS n FROM runs WHERE getvariable('x') IS NULL"
    )
    query = query_named(tmp_path, "mine")
    assert (query.question, query.variables) == ("How many runs?", ["x"])
    assert run_query(tmp_path, query.sql, {"x": "1"}).to_pylist() == [{"n": 0}]
    with pytest.raises(RequestError, match="did you mean @best_temperature"):
        query_named(tmp_path, "best_temprature")
    for given in ("y=1", "x"):
        with pytest.raises(RequestError, match="takes x="):
            variables_of(query, [given])


def test_questions_run_in_the_duckdb_command_as_they_are(real: Real) -> None:
    file = Path(__file__).parents[2] / "registry" / "queries" / "growth_with_k.sql"
    command = [
        str(Path(sys.executable).with_name("duckdb")),
        "-readonly",
        "-json",
        str(real.root / "ksweep.duckdb"),
        "-f",
        str(file),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(json.loads(done.stdout)) == 12


@pytest.mark.slow
def test_chosen_against_oracle_has_the_curve_itself_where_the_reported_error_chooses(real: Real, tmp_path: Path) -> None:
    copy = replace(real, root=Path(shutil.copytree(real.root, tmp_path / "registry")))
    record_chosen(copy.root, chosen_curves(load_cells(copy.root, ["tiny"]), "error", "error"))
    rows = answer(copy, "chosen_against_oracle")
    assert {(row["label"], row["k"]) for row in rows} == {(f"temperature={t}", k) for t in TEMPERATURES[:2] for k in KS}
    for row in rows:
        fve = real.fve(float(row["label"].removeprefix("temperature=")), row["k"])
        assert (row["value"], row["oracle"]) == (pytest.approx(fve, abs=1e-9), pytest.approx(fve, abs=1e-9))
        assert row["value_low"] < fve < row["value_high"] and row["difference"] == pytest.approx(0, abs=1e-12)
        assert row["chosen_by"] == row["reported"] == "error"
