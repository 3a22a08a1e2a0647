"""One question, one answer: every way to ask for an interval of real runs gives the same digits."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pytest

from ksweep import Resources, Sweep
from ksweep.analysis import charts
from ksweep.analysis.compare import best_held_out, compare, curves_of_cells, groups_of_cells, load_cells
from ksweep.analysis.diff import diff_runs
from ksweep.analysis.report.data import read_report_data
from ksweep.analysis.report.page import page
from ksweep.registry.database import connect
from ksweep.registry.query import run_query
from ksweep.registry.run_details import run_details
from ksweep.registry.stored_queries import query_named, variables_of
from ksweep.stats.interval_text import interval_text
from ksweep.utils.errors import RequestError
from tests.registry.real_runs import KS, Real
from tests.tiny_sweeps import run, talking_pair, tiny_cell

ENDS = ("difference", "difference_low", "difference_high")
EXACT = 1e-12
UNUSUAL = ("scoring.level=0.8", "scoring.seed=3", "scoring.selection=prefix", "scoring.baseline=distance_from_mean")


def rows_of(real: Real, question: str, *values: str) -> list[dict[str, Any]]:
    found = query_named(real.root, question)
    rows: list[dict[str, Any]] = run_query(real.root, found.sql, variables_of(found, list(values))).to_pylist()
    return rows


def _datasets(chart: Any) -> Iterator[list[dict[str, Any]]]:
    """The rows inside a chart, wherever Vega-Lite keeps them."""
    if isinstance(chart, dict):
        for name, value in chart.items():
            if name == "values" and isinstance(value, str):
                yield json.loads(value)
            elif name == "datasets":
                yield from (json.loads(rows) if isinstance(rows, str) else rows for rows in value.values())
            else:
                yield from _datasets(value)
    elif isinstance(chart, list):
        for value in chart:
            yield from _datasets(value)


@pytest.mark.slow
def test_a_difference_is_the_same_in_diff_compare_sql_and_report(real: Real) -> None:
    a, b = real.runs[0.5], real.runs[0.7]
    cells = load_cells(real.root, [a, b])
    python = {row["k"]: [row[name] for name in ENDS] for row in compare(cells, reference=b).to_pylist() if row["k"] in KS}
    command = {
        row["k"]: [row["difference"], row["low"], row["high"]] for row in diff_runs(real.root, a, b)["numbers"] if row["k"] in KS
    }
    sql = {row["k"]: [row[name] for name in ENDS] for row in rows_of(real, "compare", f"cell={a}", f"other={b}")}
    report = {
        row["k"]: [row[name] for name in ENDS]
        for row in read_report_data(real.root, "tiny").differences
        if (row["run_id"], row["other_run_id"]) == (a, b)
    }
    assert set(python) == set(KS)
    for k in KS:
        for found in (command, sql, report):
            assert found[k] == pytest.approx(python[k], abs=EXACT)


@pytest.mark.slow
def test_the_printed_difference_is_the_same_in_diff_sql_and_report(
    real: Real, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ksweep.cli import main

    a, b = real.runs[0.5], real.runs[0.7]
    [row] = [row for row in rows_of(real, "compare", f"cell={a}", f"other={b}") if row["k"] == 8]
    low, high = interval_text(row, "difference_low", "difference_high").strip("[]").split(", ")
    for command in (["diff", a, b], ["sql", "@compare", f"cell={a}", f"other={b}"]):
        monkeypatch.setattr("sys.argv", ["ksweep", *command, "--registry", str(real.root)])
        with pytest.raises(SystemExit):
            main()
        out = capsys.readouterr().out
        assert re.search(rf"\s{re.escape(low)}\s+{re.escape(high)}\s", out), (command, low, high, out)
    turned = {"low": -row["difference_high"], "high": -row["difference_low"], "num_replicates": 200}
    ends = {interval_text(row, "difference_low", "difference_high", sign="+"), interval_text(turned, "low", "high", sign="+")}
    assert any(text in page(read_report_data(real.root, "tiny")) for text in ends), ends


@pytest.fixture(scope="module")
def unusual(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Two cells under every setting of the statistics that is not the default."""
    folder = tmp_path_factory.mktemp("unusual")
    sweep = Sweep(
        name="unusual", cell=tiny_cell(talking_pair(folder, num_rows=60), num_replicates=300), registry=str(folder / "registry"),
        vector_cache=str(folder / "vectors"), axes={"sampling.temperature": (0.5, 1.0)},
        resources=Resources(cluster="inprocess", gpus=0),
    )  # fmt: skip
    assert run(sweep, *UNUSUAL) == 0
    return sweep


@pytest.mark.slow
def test_every_way_to_ask_honours_level_seed_selection_and_baseline(unusual: Sweep) -> None:
    root = Path(unusual.registry)
    cells = load_cells(root, ["unusual"])
    [cold, hot] = cells
    python = {row["k"]: [row[name] for name in ENDS] for row in compare(cells, reference=cold.run_id).to_pylist() if row["k"]}
    with connect(root) as connection:
        found = connection.sql(f"FROM v_compare WHERE run_id = '{hot.run_id}'").to_arrow_table().to_pylist()
    command = diff_runs(root, hot.run_id, cold.run_id)
    assert len(found) == len(KS) and command["level"] == 0.8
    landed = {(row["run_id"], row["k"]): row for cell in cells for row in _curve(root, cell.run_id)}
    for row in found:
        k = row["k"]
        assert [row[name] for name in ENDS] == pytest.approx(python[k], abs=EXACT)
        [said] = [one for one in command["numbers"] if one["k"] == k]
        assert [said["difference"], said["low"], said["high"]] == pytest.approx(python[k], abs=EXACT)
        # prefix: the best of the first k draws, by hand
        best = [np.nan_to_num(np.fmin.reduce(cell.errors[:, :k], axis=1), nan=2.0) for cell in (cold, hot)]
        assert row["difference"] == pytest.approx((best[0] - best[1]).mean() / row["baseline"], abs=1e-9)
        assert (row["baseline_kind"], row["level"]) == ("distance from mean", 0.8)
    for again in curves_of_cells(cells).to_pylist():
        row = landed[again["run_id"], again["k"]]
        names = ("fve", "fve_low", "fve_high", "band_low", "band_high", "error", "failure_rate")
        assert [again[name] for name in names] == pytest.approx([row[name] for name in names], abs=EXACT)
    for by in ("norm", "position"):
        groups = [row for row in groups_of_cells([hot], by, ks=[4]).to_pylist() if row["against"] == "overall"]
        sizes = [row["num_activations"] for row in groups]
        assert np.average([row["fve"] for row in groups], weights=sizes) == pytest.approx(landed[hot.run_id, 4]["fve"], abs=1e-9)
    [held_out] = best_held_out(cells, ks=[8]).to_pylist()
    assert held_out["level"] == 0.8
    assert held_out["naive_fve"] == pytest.approx(max(landed[cell.run_id, 8]["fve"] for cell in cells), abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("scoring.selection=order_statistics", "scoring.selection="),
        ("scoring.seed=4", "do not share their bootstrap replicates"),
        ("scoring.baseline=between_documents", "scoring.baseline="),
        ("scoring.level=0.9", "name one level"),
    ],
)
def test_what_compare_refuses_diff_refuses_and_sql_leaves_out(unusual: Sweep, setting: str, words: str) -> None:
    settings = dict(text.split("=") for text in UNUSUAL)
    name, _, settings[name] = setting.partition("=")
    other = replace(unusual, name=f"other_{name.rpartition('.')[2]}", axes={})
    assert run(other, *(f"{key}={value}" for key, value in settings.items()), "sampling.temperature=0.5") == 0
    root = Path(unusual.registry)
    [one], hot = load_cells(root, [other.name]), load_cells(root, ["unusual"])[1]
    with pytest.raises(RequestError, match=words):
        compare([one, hot])
    found = diff_runs(root, one.run_id, hot.run_id)
    assert words in found["note"] and all(row["low"] is None for row in found["numbers"])
    assert found["refused"] == (not name.endswith("level"))
    with connect(root) as connection:
        pairs = f"FROM v_compare WHERE run_id = '{one.run_id}' AND other_run_id = '{hot.run_id}'"
        assert connection.sql(pairs).to_arrow_table().num_rows == 0


def _curve(root: Path, run_id: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = run_details(root, run_id)["curve"]
    return [row | {"run_id": run_id} for row in rows]


def test_an_fve_is_the_same_in_show_curves_groups_and_charts(real: Real) -> None:
    run = real.runs[1.0]
    told = run_details(real.root, run)
    landed = {row["k"]: [row["fve"], row["fve_low"], row["fve_high"]] for row in told["curve"]}
    [cell] = load_cells(real.root, [run])
    again = {row["k"]: [row["fve"], row["fve_low"], row["fve_high"]] for row in curves_of_cells([cell]).to_pylist()}
    with connect(real.root) as connection:
        chart = charts.fve_by_k(connection, sweep="again").to_dict()
    drawn = {
        tuple(row[name] for name in ("k", "fve", "fve_low", "fve_high"))
        for rows in _datasets(chart)
        for row in rows
        if "fve_low" in row
    }
    [whole] = [row for row in told["groups"] if row["breakdown"] == "all"]
    assert [whole["fve"], whole["fve_low"], whole["fve_high"]] == pytest.approx(landed[8], abs=EXACT)
    for k, values in landed.items():
        assert again[k] == pytest.approx(values, abs=EXACT)
        assert any(point == pytest.approx((k, *values), abs=EXACT) for point in drawn), k


def test_a_group_is_the_same_in_show_sql_python_and_charts_and_names_its_baseline(real: Real) -> None:
    run = real.runs[1.0]
    names = ("fve", "fve_low", "fve_high", "baseline", "error")
    told = [row for row in run_details(real.root, run)["groups"] if row["breakdown"] == "norm"]
    shown = {(row["part"], row["against"]): [row[name] for name in names] for row in told}
    assert {against for _, against in shown} == {"overall", "own"} and len(shown) == 8
    sql = {
        (row["part"], row["against"]): [row[name] for name in names]
        for row in rows_of(real, "by_group", f"cell={run}")
        if row["breakdown"] == "norm" and row["k"] == 8
    }
    table = groups_of_cells(load_cells(real.root, [run]), "norm", ks=[8])
    python = {(row["part"], row["against"]): [row[name] for name in names] for row in table.to_pylist()}
    assert set(sql) == set(python) == set(shown)
    for key, values in shown.items():
        assert sql[key] == pytest.approx(values, abs=EXACT) and python[key] == pytest.approx(values, abs=EXACT)
    for against in ("overall", "own"):
        chart = charts.by_group(table, against=against)
        assert isinstance(chart, alt.TopLevelMixin)
        words = json.dumps(chart.to_dict())
        assert f"Baseline: {against}" in words


def test_a_gain_is_the_same_in_sql_and_python(real: Real) -> None:
    run = real.runs[0.7]
    python = {row["k"]: row for row in curves_of_cells(load_cells(real.root, [run])).to_pylist()}
    rows = run_query(real.root, f"FROM v_gain WHERE run_id = '{run}'").to_pylist()
    assert [row["doubled_k"] for row in sorted(rows, key=lambda row: row["k"])] == [2, 4, 8]
    for row in rows:
        other = python[row["doubled_k"]]
        expected = [other["gain_per_doubling"], other["gain_low"], other["gain_high"]]
        assert [row["gain"], row["gain_low"], row["gain_high"]] == pytest.approx(expected, abs=EXACT)
