"""Chosen by one score, reported in another: against every subset of the draws in SQL; by command, SQL and Python alike."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import ksweep
from ksweep import Resources, Sweep, connect
from ksweep.analysis import charts
from ksweep.analysis.cells import load_cells
from ksweep.analysis.choosing import chosen_curves
from ksweep.cli import app
from ksweep.registry.chosen_files import CHOSEN_SCHEMA
from ksweep.registry.outside_scores import import_scores
from ksweep.utils.errors import RequestError
from tests.tiny_models import edit_weights
from tests.tiny_sweeps import ask, run, talking_pair, tiny_cell

NAN = np.nan


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Two ARs over the same draws, 40 activations x 8 draws, with text metrics; and a judge who scored the first 5 draws."""
    folder = tmp_path_factory.mktemp("choosing")
    pair = talking_pair(folder, num_rows=60)
    other = folder / "other-ar"
    shutil.copytree(pair.ar, other)
    edit_weights(other, change=lambda state: state["model.embed_tokens.weight"].mul_(-1.5))
    cell = tiny_cell(pair, num_replicates=50)
    cell = replace(cell, scoring=replace(cell.scoring, metrics=("text",)))
    both = (cell.autoencoder, replace(cell.autoencoder, ar=str(other)))
    sweep = Sweep(
        name="ars", cell=cell, axes={"autoencoder": both}, resources=Resources(cluster="inprocess", gpus=0),
        registry=str(folder / "registry"), vector_cache=str(folder / "vector_cache"),
    )  # fmt: skip
    assert run(sweep) == 0
    with connect(sweep.registry) as connection:
        texts = connection.sql("SELECT draws_key, activation, draw, explanation FROM texts ORDER BY ALL").to_arrow_table()
    rng = np.random.default_rng(0)
    scores = texts.append_column("score", pa.array(rng.integers(0, 4, len(texts)).astype(float)))
    scores = scores.filter(pa.array((scores["draw"].to_numpy() < 5) & scores["explanation"].is_valid().to_numpy()))
    import_scores(Path(sweep.registry), scores, "judge", better="higher")
    return sweep


def labels(sweep: Sweep) -> list[str]:
    return sweep.labels()


def grid(sweep: Sweep, metric: str, name: str, label: str | None = None) -> np.ndarray:
    """A score of each draw [activation, draw] from SQL; NaN where there is none."""
    of_ar = f"AND scores_key = (SELECT scores_key FROM runs WHERE label = '{label}')" if label else ""
    rows = ask(
        sweep, f"SELECT value FROM draw_scores WHERE metric = '{metric}' AND name = '{name}' {of_ar} ORDER BY activation, draw"
    )
    return np.array([NAN if value is None else value for (value,) in rows]).reshape(40, 8)


def brute(values: np.ndarray, choice: np.ndarray, k: int) -> float:
    """Mean over all subsets of k draws of the value at the smallest choice; ties share, and draws of unknown choice come last."""
    choice = np.where(np.isnan(choice), np.inf, choice)
    means = []
    for subset in combinations(range(len(values)), k):
        least = min(choice[d] for d in subset)
        means.append(np.mean([values[d] for d in subset if choice[d] == least]))
    return float(np.mean(means))


def value_at(table: pa.Table, label: str, k: int, name: str = "value") -> float:
    [row] = [row for row in table.to_pylist() if (row["label"], row["k"]) == (label, k)]
    return float(row[name])


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 3, 8])
def test_chosen_by_another_ar_or_a_metric_is_the_mean_over_every_subset(finished: Sweep, k: int) -> None:
    first, second = labels(finished)
    own, other = (grid(finished, "reconstruction", "error", label) for label in (first, second))
    words, judge = grid(finished, "text", "num_words"), grid(finished, "judge", "score")
    assert np.isnan(own).any() and np.isnan(judge[:, 5:]).all()
    baseline = ask(finished, f"SELECT baseline FROM runs WHERE label = '{first}'")[0][0]
    cells = load_cells(finished.registry, ["ars"])
    failed = np.isnan(own)
    filled = np.where(failed, 2.0, own)
    for by, choice in (
        (second, other),
        ("judge", -judge),
        ("text.num_words", words),
        ("-text.num_words", -words),
        ("error", own),
    ):
        usable = np.where(failed, NAN, choice)
        error = np.mean([brute(filled[a], usable[a], k) for a in range(40)])
        assert value_at(chosen_curves(cells, by), first, k) == pytest.approx(1 - error / baseline, abs=1e-9), by


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2, 8])
def test_a_metric_of_the_chosen_draws_is_the_mean_of_those_that_have_one(finished: Sweep, k: int) -> None:
    first, _ = labels(finished)
    own, judge = grid(finished, "reconstruction", "error", first), grid(finished, "judge", "score")
    table = chosen_curves(load_cells(finished.registry, ["ars"]), "error", "judge")
    known = ~np.isnan(judge)
    shares = [brute(known[a].astype(float), own[a], k) for a in range(40)]
    sums = [brute(np.where(known, judge, 0)[a], own[a], k) for a in range(40)]
    assert value_at(table, first, k) == pytest.approx(np.sum(sums) / np.sum(shares), abs=1e-9)
    assert value_at(table, first, k, "share_with_value") == pytest.approx(np.mean(shares), abs=1e-9)
    best = [brute(np.where(known, judge, 0)[a], -judge[a], k) for a in range(40)]
    shares = [brute(known[a].astype(float), -judge[a], k) for a in range(40)]
    assert value_at(table, first, k, "oracle") == pytest.approx(np.sum(best) / np.sum(shares), abs=1e-9)


@pytest.mark.slow
def test_chosen_by_its_own_error_a_cell_has_the_curve_of_its_run(finished: Sweep) -> None:
    for row in chosen_curves(load_cells(finished.registry, ["ars"]), "error").to_pylist():
        [curve] = ask(finished, f"SELECT fve, fve_low, fve_high FROM curves WHERE label = '{row['label']}' AND k = {row['k']}")
        for columns in (("value", "value_low", "value_high"), ("oracle", "oracle_low", "oracle_high")):
            assert [row[name] for name in columns] == pytest.approx(list(curve), abs=1e-9)
        assert (row["difference"], row["difference_low"], row["difference_high"]) == (0, 0, 0)


@pytest.mark.slow
def test_the_reporting_ar_of_another_cell_gives_that_cells_curve(finished: Sweep) -> None:
    """Chosen by A and reported by B does not depend on which of the two cells is asked."""
    first, second = labels(finished)
    table = chosen_curves(load_cells(finished.registry, ["ars"]), by=first, report=second)
    other = chosen_curves(load_cells(finished.registry, ["ars"]), by=first)
    for k in (1, 4, 8):
        for name in ("value", "value_low", "difference", "difference_high"):
            assert value_at(table, first, k, name) == value_at(table, second, k, name) == value_at(other, second, k, name)
    assert value_at(table, first, 8, "difference") < 0 and value_at(table, first, 1, "difference") == pytest.approx(0, abs=1e-12)


@pytest.mark.slow
def test_nothing_is_best_of_a_metric_without_a_direction_unless_a_minus_gives_one(finished: Sweep) -> None:
    cells = load_cells(finished.registry, ["ars"])
    assert chosen_curves(cells, "error", "text.num_words")["oracle"].null_count == 16
    longest = chosen_curves(cells, "-text.num_words", "-text.num_words").to_pylist()
    words = grid(finished, "text", "num_words")
    assert [row["difference"] for row in longest] == pytest.approx([0] * 16, abs=1e-12)
    assert longest[7]["value"] == pytest.approx(np.nanmean(np.nanmax(words, axis=1)))


@pytest.mark.slow
def test_command_sql_and_python_give_the_same_numbers(finished: Sweep) -> None:
    first, second = labels(finished)
    asked = ["choose", "ars", "--by", second, "--registry", finished.registry]
    result = CliRunner().invoke(app, [*asked, "--json"])
    assert result.exit_code == 0, result.output
    printed = [json.loads(line) for line in result.output.splitlines()]
    in_python = ksweep.results("ars", finished.registry).chosen(by=second).to_pylist()
    with connect(finished.registry) as connection:
        question = f"SELECT {', '.join(CHOSEN_SCHEMA.names)} FROM chosen_curves ORDER BY label, k"
        in_sql = connection.sql(question).to_arrow_table().to_pylist()
        without = "SELECT column_name FROM duckdb_columns() WHERE table_name = 'chosen_curves' AND comment IS NULL"
        assert connection.execute(without).fetchall() == []
    assert len(in_python) == 16 and in_sql == sorted(in_python, key=lambda row: (row["label"], row["k"])) and printed == in_python
    # The same again is the same file; another choice is another row.
    table = CliRunner().invoke(app, asked)
    assert "chooses among K" in table.output and "oracle" in table.output
    CliRunner().invoke(app, ["choose", first, "--by", "judge", "--report", "text.num_words", "--registry", finished.registry])
    rows = ask(finished, "SELECT chosen_by, measure, count(*) FROM chosen_curves GROUP BY ALL ORDER BY 1")
    assert sorted(rows) == sorted([(second, "fve", 16), ("judge", "mean", 8)])
    assert len(list((Path(finished.registry) / "chosen").glob("[!.]*.parquet"))) == 3  # with that of no rows


@pytest.mark.slow
def test_exported_draws_come_back_as_scores_by_command(finished: Sweep, tmp_path: Path) -> None:
    file, registry = str(tmp_path / "draws.parquet"), ["--registry", finished.registry]
    exported = CliRunner().invoke(app, ["scores", "export", "ars", "-o", file, *registry])
    assert exported.exit_code == 0 and "each is a draw with an explanation" in exported.output
    table = pq.read_table(file)
    pq.write_table(table.append_column("mark", table["activation"]), file)
    command = ["scores", "import", file, "--as", "teacher", "--column", "mark", "--lower-is-better", *registry]
    done = CliRunner().invoke(app, command)
    assert f"teacher: {len(table)} scores of {len(table)} draws (1 draws keys), lower is better" in done.output
    assert ask(
        finished, "SELECT count(*), sum(value - activation) FROM draw_scores WHERE metric = 'teacher' AND value IS NOT NULL"
    ) == [(len(table), 0.0)]
    refused = CliRunner().invoke(app, ["scores", "import", file, "--as", "text", "--column", "mark", *registry])
    assert isinstance(refused.exception, RequestError) and "computes a metric of this name itself" in str(refused.exception)


@pytest.mark.slow
def test_draws_that_nobody_scored_are_said(finished: Sweep) -> None:
    result = CliRunner().invoke(app, ["choose", "ars", "--by", "judge", "--registry", finished.registry])
    own, judge = grid(finished, "reconstruction", "error", labels(finished)[0]), grid(finished, "judge", "score")
    share = np.isnan(judge)[~np.isnan(own)].mean()
    assert f"{share:.1%} of the draws that did not fail have no score to choose by" in result.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("by", "reason"),
    [
        ("judges", r"have no score 'judges'.*judge\.score.*text\.context_overlap"),
        ("text", "have no score 'text'"),
        ("text.letters", "have no score 'text.letters'"),
    ],
)
def test_score_that_does_not_exist_is_refused(finished: Sweep, by: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        chosen_curves(load_cells(finished.registry, ["ars"]), by)


@pytest.mark.slow
def test_a_cell_over_other_draws_cannot_choose(finished: Sweep, tmp_path: Path) -> None:
    shutil.copytree(finished.registry, tmp_path / "registry")
    cell = replace(finished.cell, sampling=replace(finished.cell.sampling, seed=7))
    other = replace(finished, name="seed7", cell=cell, axes={}, registry=str(tmp_path / "registry"))
    assert run(other) == 0
    with pytest.raises(RequestError, match="over other draws"):
        chosen_curves(load_cells(other.registry, ["ars"]), "seed7")


@pytest.mark.slow
def test_chart_has_both_curves_of_each_cell(finished: Sweep) -> None:
    results: Any = ksweep.results("ars", finished.registry)
    chart = results.chart("chosen", by="judge").to_dict()
    [rows] = (json.loads(values) if isinstance(values, str) else values for values in chart["datasets"].values())
    assert {(row["label"], row["curve"]) for row in rows} == {
        (label, curve) for label in labels(finished) for curve in ("chosen by judge", "oracle: the reported score chooses")
    }
    with pytest.raises(RequestError, match="several scores"):
        charts.chosen(pa.concat_tables([results.chosen(by="judge"), results.chosen(by="error")]))
