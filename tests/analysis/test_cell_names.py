"""A cell has one name, its own: in labels, tables, charts, commands and pages, also where cells look alike."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksweep import Autoencoder, Resources, Sweep, connect
from ksweep.analysis import charts
from ksweep.analysis.compare import compare, curves_of_cells, load_cells
from ksweep.analysis.report.data import read_report_data
from ksweep.config.spec import Sampling
from ksweep.evaluation.identity import resolve_cells, sweep_keys
from ksweep.registry.query import named_curves
from ksweep.registry.run_record import write_run
from ksweep.utils.cell_names import distinct_names, short_names
from ksweep.utils.errors import RequestError
from tests.analysis.test_chart_kinds import differences, rows_in, subtitle
from tests.registry.landed_runs import curve_of, record_of
from tests.tiny_models import make_pair
from tests.tiny_sweeps import run, talking_pair, tiny_cell

PAIR = Autoencoder(av="/models/demo/av", ar="/models/demo/ar")


# --- what tells the cells of a sweep apart ---


def sweep_over(axes: dict[str, tuple[Any, ...]], tmp_path: Path) -> Sweep:
    pair = make_pair(tmp_path, "qwen2")
    return Sweep(name="s", cell=tiny_cell(pair, num_replicates=20), axes=axes)


@pytest.mark.parametrize(
    ("axes", "labels"),
    [
        ({"sampling.temperature": (0.4, 1.0)}, ["temperature=0.4", "temperature=1"]),
        ({"autoencoder": (replace(PAIR, ar="/models/demo/untrained/ar"), PAIR)}, ["ar=untrained", "ar=demo"]),
        ({"autoencoder": (PAIR, replace(PAIR, av="/models/other/av"))}, ["autoencoder=demo", "autoencoder=other"]),
        ({"autoencoder": (PAIR, replace(PAIR, dtype="float32"))}, ["dtype=bfloat16", "dtype=float32"]),
        ({"autoencoder.ar": ("runs/a/step1/ar", "runs/b/step1/ar")}, ["ar=a/step1", "ar=b/step1"]),
        ({"autoencoder.ar": ("x/ar", "x/nla-ar")}, ["ar=ar", "ar=nla-ar"]),
        ({"sampling": (Sampling(seed=1), Sampling(seed=2, top_p=0.5))}, ["top_p=1, seed=1", "top_p=0.5, seed=2"]),
        ({"sampling.temperature": (0.1234567, 0.12345671)}, ["temperature=0.1234567", "temperature=0.12345671"]),
        ({"sampling.seed": (1,), "activations.seed": (1, 2)}, [f"sampling.seed=1, activations.seed={n}" for n in (1, 2)]),
        ({}, ["s"]),
    ],
)  # fmt: skip
def test_labels_say_what_differs_and_nothing_else(axes: dict[str, tuple[Any, ...]], labels: list[str], tmp_path: Path) -> None:
    assert sweep_over(axes, tmp_path).labels() == labels


paths = st.lists(st.sampled_from(["a", "b", "av", "ar", "nla-av", "demo"]), min_size=1, max_size=4).map("/".join)


@given(st.lists(paths, min_size=1, max_size=6))
def test_short_names_are_equal_for_equal_paths_only(given_paths: list[str]) -> None:
    names = short_names(given_paths)
    for name, path in zip(names, given_paths, strict=True):
        assert path.rstrip("/").endswith(name) or path.rpartition("/")[0].endswith(name)
        assert [n == name for n in names] == [p == path for p in given_paths]


def test_names_take_the_sweep_then_the_cell_then_the_run_until_they_differ() -> None:
    def cell(label: str, sweep: str, cell: str, run_id: str) -> dict[str, str]:
        return {"label": label, "sweep": sweep, "cell": cell, "run_id": run_id}

    a = cell("T=1", "s", "demo T=1 @aa", "r1")
    assert distinct_names([a, cell("T=2", "s", "demo T=2 @bb", "r2")]) == ["T=1", "T=2"]
    assert distinct_names([a, cell("T=1", "t", "demo T=1 @bb", "r2")]) == ["T=1 (s)", "T=1 (t)"]
    assert distinct_names([a, cell("T=1", "s", "demo T=1 @bb", "r2")]) == ["demo T=1 @aa", "demo T=1 @bb"]
    assert distinct_names([a, cell("T=1", "s", "demo T=1 @aa", "r2")]) == ["demo T=1 @aa r1", "demo T=1 @aa r2"]
    assert distinct_names([a, a]) == ["T=1", "T=1"], "one cell twice is one cell"


# --- two reconstructors behind one verbalizer: once the same label ---


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweep]:
    """One AV and two ARs, as experiments/checkpoint_sweep.py has them, run."""
    place = tmp_path_factory.mktemp("two")
    pair = talking_pair(place, num_rows=60)
    (place / "other").mkdir()
    other = make_pair(place / "other", "qwen2")
    cell = tiny_cell(pair, num_replicates=20)
    both = (replace(cell.autoencoder, ar=str(other.ar)), cell.autoencoder)
    sweep = Sweep(
        name="checkpoints", cell=cell, axes={"autoencoder": both}, resources=Resources(cluster="inprocess", gpus=0),
        registry=str(place / "registry"), vector_cache=str(place / "vector_cache"),
    )  # fmt: skip
    assert run(sweep) == 0
    yield sweep


def labels_in(chart: Any) -> set[str]:
    return {r["label"] for rows in rows_in(chart) for r in rows if "label" in r}


@pytest.mark.slow
def test_cells_of_one_verbalizer_have_names_of_their_own_in_record_asking_and_views(two: Sweep) -> None:
    labels = two.labels()
    assert labels[0] == "ar=other" and len(set(labels)) == 2
    with connect(two.registry) as connection:
        runs = connection.execute("SELECT label, cell, cell_key FROM runs ORDER BY finished").fetchall()
        asked = connection.execute("SELECT label FROM v_sweep_cells ORDER BY place").fetchall()
    assert [label for label, *_ in runs] == labels == [label for (label,) in asked]
    for label, cell, key in runs:
        assert cell.endswith(f" L1 T=1 {label} @{key[:8]}")
    keys = sweep_keys(two, resolve_cells(two.cells()))
    assert [(key.label, key.name) for key in keys] == [(label, cell) for label, cell, _ in runs]


@pytest.mark.slow
@pytest.mark.parametrize("sweep", ["checkpoints", None])
def test_every_chart_from_a_connection_shows_each_cell_under_its_own_name(two: Sweep, sweep: str | None) -> None:
    labels = set(two.labels())
    with connect(two.registry) as connection:
        by_k = charts.fve_by_k(connection, sweep=sweep)
        assert labels_in(by_k) == labels
        assert labels_in(charts.error_distribution(connection, sweep=sweep)) == labels
        assert labels_in(charts.by_group(connection, sweep=sweep)) == labels
        assert labels_in(charts.throughput(connection, sweep=sweep)) == {"ar=other"}, "the other samples nothing"
        assert labels_in(charts.progress(connection, sweep=sweep)) == labels
        [less] = charts.compare(connection, sweep=sweep).to_dict()["title"]["text"]
        assert set(less.split(" less ")) == labels
    counts = [len({(r["label"], r["k"]) for r in rows}) == len(rows) for rows in rows_in(by_k) if rows and "k" in rows[0]]
    assert all(counts), "one point a cell and K"


@pytest.mark.slow
def test_tables_commands_and_page_show_the_same_names(two: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    labels = two.labels()
    assert run(two) == 0
    out = capsys.readouterr().out
    assert all(label in out for label in labels)
    assert run(two, "--dry-run", "--json") == 0
    plan = [json.loads(line) for line in capsys.readouterr().out.splitlines()][:2]
    assert [step["label"] for step in plan] == labels
    assert [cell.label for cell in load_cells(two.registry, ["checkpoints"])] == labels
    assert list(dict.fromkeys(named_curves(Path(two.registry), ["checkpoints"])["label"].to_pylist())) == labels
    facts = read_report_data(Path(two.registry), "checkpoints")
    assert [run_["label"] for run_ in facts.runs] == labels == list(dict.fromkeys(facts.curves["label"].to_pylist()))


@pytest.mark.slow
def test_runs_of_before_that_share_a_label_are_distinct_names_by_their_cells(tmp_path: Path) -> None:
    """Without an asking, and with the label that both pairs had."""
    for name, ar in (("r1", "demo/untrained/ar"), ("r2", "demo/ar")):
        record = record_of(name, sweep="old", label="demo L20 T=0.7")
        spec = json.loads(json.dumps(record.spec))
        spec["autoencoder"]["ar"] = ar
        record = replace(record, spec=spec, cell_key=f"{name}key", cell=f"demo L20 T=0.7 @{name}key", activations_key="a")
        write_run(tmp_path, record, curve_of())
    cells = {"demo L20 T=0.7 @r1key", "demo L20 T=0.7 @r2key"}
    with connect(tmp_path) as connection:
        assert connection.execute("SELECT count(*) FROM v_sweep_cells WHERE sweep = 'old'").fetchall() == [(2,)]
        for sweep in ("old", None):
            assert labels_in(charts.fve_by_k(connection, sweep=sweep)) == cells
        # A table that says which cell a row is of is as good; one that does not is refused.
        assert labels_in(charts.fve_by_k(connection.sql("SELECT * FROM curves"))) == cells
        bare = connection.sql("SELECT label, k, fve, fve_low, fve_high, baseline FROM curves").to_arrow_table()
    with pytest.raises(RequestError, match=r"two rows of the table are of 'demo L20 T=0.7', k = \d: .* Give each cell a label"):
        charts.fve_by_k(bare)
    facts = read_report_data(tmp_path, "old")
    assert {run_["label"] for run_ in facts.runs} == cells


@pytest.mark.slow
def test_a_cell_without_a_result_does_not_lengthen_the_names_of_those_with_one(tmp_path: Path) -> None:
    write_run(tmp_path, record_of("r1", temperature=0.4), curve_of())
    failed = record_of("r2", temperature=0.4, num_draws=64, minutes=1, status="failed", error_type="RunError", error_message="x")
    write_run(tmp_path, failed)
    with connect(tmp_path) as connection:
        assert labels_in(charts.fve_by_k(connection)) == {"temperature=0.4"}
        assert len(connection.execute("SELECT * FROM runs").fetchall()) == 2


def test_two_draws_at_one_place_under_one_label_are_refused_and_those_of_two_cells_distinct_names() -> None:
    rows = [{"label": "a", "cell": cell, "activation": i, "draw": 0, "error": 0.1 * i} for cell in "xy" for i in range(40)]
    assert labels_in(charts.error_distribution(pa.Table.from_pylist(rows))) == {"x", "y"}
    bare = pa.Table.from_pylist(rows).drop_columns("cell")
    with pytest.raises(RequestError, match="two rows of the table are of 'a', activation = 0, draw = 0"):
        charts.error_distribution(bare)
    with pytest.raises(RequestError, match="two rows of the table are of 'a'"):
        charts.progress([{"label": "a", "done": 1, "total": 2, "state": "running"}] * 2)


def test_runs_of_one_cell_stay_one_row_of_speeds() -> None:
    rows = [{"label": "a", "cell": "a @1", "run_id": f"r{i}", "tokens_per_second": 100.0 + i} for i in range(3)]
    assert labels_in(charts.throughput(rows)) == {"a"}


# --- comparisons keep their reference ---


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["ar=other", None])
def test_a_comparison_is_drawn_against_its_own_reference(two: Sweep, reference: str | None) -> None:
    cells = load_cells(two.registry, ["checkpoints"])
    reference = reference or two.labels()[1]
    table = compare(cells, reference=reference)
    [title] = charts.compare(table).to_dict()["title"]["text"]
    assert title.endswith(f" less {reference}")


@pytest.mark.slow
@pytest.mark.parametrize("base", ["a", "b", "z"])
def test_a_comparison_of_several_cells_keeps_every_difference_whatever_its_reference_is_called(base: str) -> None:
    called = {"a": base, "b": "m", "c": "n"}
    rows = [r | {name: called[r[name]] for name in ("label", "other_label")} for r in differences().to_pylist()]
    chart = charts.compare(rows)
    assert chart.to_dict()["title"]["text"] == [f"FVE less that of {base}"] and labels_in(chart) == {"m", "n"}
    drawn = {(r["label"], r["k"], r["fve"]) for points in rows_in(chart) for r in points if "fve" in r}
    assert drawn == {(r["label"], r["k"], r["difference"]) for r in rows}


@pytest.mark.slow
def test_what_a_table_cannot_say_against_another_reference_is_said() -> None:
    assert "no difference from b for c" in subtitle(charts.compare(differences(), reference="b"))
    assert "no difference" not in subtitle(charts.compare(differences()))


def test_curves_of_cells_are_drawn_under_the_names_of_the_sweep(two: Sweep) -> None:
    assert labels_in(charts.fve_by_k(curves_of_cells(load_cells(two.registry, ["checkpoints"])))) == set(two.labels())


@pytest.mark.slow
def test_a_run_that_failed_bears_the_name_that_its_cell_has_in_the_sweep(
    two: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = replace(two, registry=str(tmp_path / "registry"), vector_cache=str(tmp_path / "vector_cache"))
    monkeypatch.setattr("ksweep.launch.job_spec.ENTRY", "tests.launch.entries:has_no_memory")
    assert run(failing) == 1
    with connect(failing.registry) as connection:
        [(label, cell)] = connection.execute("SELECT label, cell FROM runs").fetchall()
        [cells] = connection.execute("SELECT cells FROM attempts").fetchall()
    assert label == two.labels()[0] and f"L1 T=1 {label} @" in cell and cells == (two.labels(),), "one job for one AV"


@pytest.mark.slow
def test_jobs_of_before_that_say_no_names_are_measured_under_their_own(two: Sweep, tmp_path: Path) -> None:
    from dataclasses import asdict

    from ksweep.evaluation.distributed import Solo
    from ksweep.evaluation.evaluate import run_job

    [first, _] = resolve_cells(two.cells())
    argument = {
        "cells": [asdict(first)], "sweep": "s", "registry": str(tmp_path / "registry"), "vector_cache": two.vector_cache,
        "batch_size": None, "resources": {}, "origin": {},
    }  # fmt: skip
    assert len(run_job(argument, Solo())) == 1
    with connect(tmp_path / "registry") as connection:
        [(label,)] = connection.execute("SELECT label FROM runs").fetchall()
    assert label.endswith(" L1 T=1")
