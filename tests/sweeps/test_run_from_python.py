"""`ksweep.run`, `ksweep.plan` and `ksweep.results`: what a notebook calls. Nothing exits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import ksweep
from ksweep import Resources, Sweep
from tests.tiny_sweeps import ask, talking_pair, tiny_cell
from tests.tiny_sweeps import run as run_command


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    place = tmp_path_factory.mktemp("from_python")
    return Sweep(
        name="warmth", question="Does warmth help?", cell=tiny_cell(talking_pair(place, num_rows=60), num_replicates=100),
        axes={"sampling.temperature": (0.7, 1.3)}, resources=Resources(cluster="inprocess", gpus=0),
        registry=str(place / "registry"), vector_cache=str(place / "vector_cache"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(sweep: Sweep) -> ksweep.Results:
    return ksweep.run(sweep)


def test_a_plan_says_what_is_missing_and_writes_nothing(sweep: Sweep, tmp_path: Path) -> None:
    elsewhere = replace(sweep, registry=str(tmp_path / "registry"), vector_cache=str(tmp_path / "vectors"))
    plan = ksweep.plan(elsewhere)
    assert [step.state for step in plan.steps] == ["missing", "missing"]
    assert sum(step.draws_to_sample for step in plan.steps) == 2 * 40 * 8
    assert "warmth: 2 of 2 cells to run" in str(plan) and "temperature=1.3" in str(plan)
    assert list(tmp_path.iterdir()) == []


def test_curves_are_those_of_the_registry_under_the_labels_of_the_sweep(sweep: Sweep, results: ksweep.Results) -> None:
    stored = ask(sweep, "SELECT label, k, fve FROM curves ORDER BY temperature, k")
    assert list(zip(*(results.curves[name].to_pylist() for name in ("label", "k", "fve")), strict=True)) == stored
    assert {label for label, _, _ in stored} == {"temperature=0.7", "temperature=1.3"} and results.missing == []


def test_draws_hold_every_text_and_their_mean_best_error_is_that_of_the_curve(results: ksweep.Results) -> None:
    draws, curves = results.draws, results.curves.to_pylist()
    assert draws.num_rows == 2 * 40 * 8
    for label in results.labels.values():
        own = draws.filter(pc.equal(draws["label"], label)).group_by("activation").aggregate([("error", "min")])
        best = pc.mean(pc.fill_null(own["error_min"], 2.0)).as_py()
        [largest] = [row for row in curves if row["label"] == label and row["k"] == 8]
        assert best == pytest.approx(largest["error"], rel=1e-9)


@pytest.mark.slow
def test_draws_of_cells_that_share_them_come_once_a_cell_with_its_own_scores(sweep: Sweep, results: ksweep.Results) -> None:
    two = ksweep.run(replace(sweep, name="precisions", axes={"autoencoder.ar_dtype": ("float32", "bfloat16")}))
    draws = two.draws
    assert draws.num_rows == 2 * 40 * 8 and set(draws["label"].to_pylist()) == {"ar_dtype=float32", "ar_dtype=bfloat16"}
    first, second = (draws.filter(pc.equal(draws["label"], label)) for label in two.labels.values())
    assert first["explanation"].equals(second["explanation"]) and not first["error"].equals(second["error"])
    for table in (first, second):
        best = pc.mean(pc.fill_null(table.group_by("activation").aggregate([("error", "min")])["error_min"], 2.0)).as_py()
        [row] = [r for r in two.curves.to_pylist() if r["label"] == table["label"][0].as_py() and r["k"] == 8]
        assert best == pytest.approx(row["error"], rel=1e-9)


def test_the_comparison_is_that_of_sql(sweep: Sweep, results: ksweep.Results) -> None:
    table = results.compare(reference="temperature=0.7")
    rows = {row["k"]: row for row in table.to_pylist() if row["k"] is not None}
    stored = ask(
        sweep,
        "SELECT k, difference, difference_low FROM v_compare WHERE temperature = 1.3 AND other_temperature = 0.7 ORDER BY k",
    )
    assert len(stored) > 2
    for k, difference, low in stored:
        assert (rows[k]["difference"], rows[k]["difference_low"]) == (pytest.approx(difference), pytest.approx(low))


@pytest.mark.parametrize("kind", ["fve_by_k", "fve_by_temperature", "compare", "error_distribution"])
def test_each_chart_is_an_altair_chart_of_these_cells(results: ksweep.Results, kind: str) -> None:
    text = str(results.chart(kind).to_dict())
    assert "temperature=1.3" in text or "temperature" in text
    assert "vega-lite" in text


def test_an_unknown_chart_is_refused_by_the_names_of_those_there_are(results: ksweep.Results) -> None:
    with pytest.raises(ksweep.RequestError, match="'fve_by_kk' is not one of fve_by_k, fve_by_temperature"):
        results.chart("fve_by_kk")


@pytest.mark.slow
def test_the_report_is_written_where_it_is_asked_for(results: ksweep.Results, tmp_path: Path) -> None:
    path = results.report(tmp_path / "page.html")
    assert path == tmp_path / "page.html" and "Does warmth help?" in path.read_text()


def test_shown_it_is_the_table_that_the_command_prints(sweep: Sweep, results: ksweep.Results, capsys) -> None:
    assert run_command(sweep) == 0
    printed = capsys.readouterr().out
    assert str(results) in printed and "temperature=0.7" in str(results)


def test_results_of_before_are_those_that_run_returned(sweep: Sweep, results: ksweep.Results) -> None:
    again = ksweep.results("warmth", registry=sweep.registry)
    assert again == results and again.curves.equals(results.curves)
    with pytest.raises(ksweep.RequestError, match=r"no sweep 'warmh' in .*; it has .*warmth"):
        ksweep.results("warmh", registry=sweep.registry)
    with pytest.raises(ksweep.RequestError, match="no registry at"):
        ksweep.results("warmth", registry=sweep.registry + "x")


def test_running_again_samples_nothing(sweep: Sweep, results: ksweep.Results) -> None:
    before = ask(sweep, "SELECT count(*) FROM runs")
    assert ksweep.run(sweep).curves.equals(results.curves)
    assert ask(sweep, "SELECT count(*) FROM runs") == before


def test_what_a_command_would_exit_with_is_raised(sweep: Sweep, tmp_path: Path) -> None:
    with pytest.raises(ksweep.RequestError, match=r"'gpu' is not one of the resources .*gpus"):
        ksweep.run(sweep, gpu=8)
    with pytest.raises(ksweep.RequestError, match=r"resources\.gpus"):
        ksweep.plan(sweep, gpus="eight")
    lost = replace(sweep, axes={}, cell=ksweep.replace_at(sweep.cell, "autoencoder.av", str(tmp_path / "nothing")))
    with pytest.raises(ksweep.RequestError, match="nothing"):
        ksweep.run(lost)


@pytest.mark.slow
def test_a_cell_that_failed_is_raised_then_left_with_a_warning_and_run_again_on_request(
    sweep: Sweep, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 32)).astype(np.float32)
    vectors[30, 3] = np.nan
    path = tmp_path / "vectors.parquet"
    pq.write_table(pa.table({"activation_vector": pa.FixedSizeListArray.from_arrays(vectors.ravel(), 32)}), path)
    cell = replace(sweep.cell, activations=ksweep.Activations(vectors=str(path), num_activations=40))
    broken = replace(sweep, name="broken", axes={}, cell=cell, registry=str(tmp_path / "registry"))
    with pytest.raises(ksweep.RequestError, match="finite"):
        ksweep.run(broken)
    left = ksweep.run(broken)
    assert left.missing == ["broken"] and "retry=True runs it again" in caplog.text
    assert "none of its 1 cells has finished" in str(left)
    with pytest.raises(ksweep.RequestError, match="finite"):
        ksweep.run(broken, retry=True)
