"""Charts beside the two curves: what they count, what they say, that they stay small, and that a cell keeps its colour."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import altair as alt
import duckdb
import numpy as np
import pyarrow as pa
import pytest

from ksweep import connect
from ksweep.analysis import charts
from ksweep.registry.run_record import write_run
from ksweep.utils.errors import RequestError
from tests.analysis.test_charts import curves, layers, mark
from tests.registry.landed_runs import controls_of, curve_of, publish_draws, record_of

GENERATOR = np.random.default_rng(0)


def rows_in(chart: Any) -> list[list[dict[str, Any]]]:
    """Every data set of a chart, parsed."""
    return [json.loads(values) if isinstance(values, str) else values for values in chart.to_dict().get("datasets", {}).values()]


def subtitle(chart: Any) -> str:
    return " ".join(chart.to_dict()["title"]["subtitle"])


def draws(num_activations: int = 50, num_draws: int = 8, labels: tuple[str, ...] = ("T=0.5", "T=1")) -> pa.Table:
    """Errors of 0.2 to 1.2; every tenth draw failed."""
    n = num_activations * num_draws
    error = np.where(np.arange(n) % 10 == 3, np.nan, 0.2 + GENERATOR.random(n))
    one = {"activation": np.repeat(np.arange(num_activations), num_draws), "error": pa.array(error, from_pandas=True)}
    return pa.concat_tables([pa.table(one | {"label": [label] * n}) for label in labels])


def differences(**more: Any) -> pa.Table:
    """c - a and b - a, falling and rising, with a band; K up to 8."""
    rows = [
        {
            "label": label, "other_label": "a", "k": k, "difference": sign * 0.01 * k, "difference_low": sign * 0.01 * k - 0.01,
            "difference_high": sign * 0.01 * k + 0.02, "band_low": sign * 0.01 * k - 0.03, "band_high": sign * 0.01 * k + 0.04,
            "level": 0.95, "few_subsets": k > 4, "num_activations": 100, "num_documents": 40, "baseline": 0.7,
            "baseline_kind": "evaluated set",
        }
        | more
        for label, sign in (("c", -1), ("b", 1))
        for k in range(1, 9)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows)


def groups() -> pa.Table:
    rows = [
        {
            "label": label, "breakdown": breakdown, "part": part, "place": place, "k": k, "fve": 0.3 + 0.1 * place,
            "fve_low": 0.25, "fve_high": 0.5, "level": 0.95, "against": against, "num_activations": 1200,
        }
        for label in ("T=0.5", "T=1")
        for breakdown, parts in (("role", ("user", "assistant")), ("norm", tuple(f"quarter {q} of 4" for q in (1, 2, 3, 4))))
        for place, part in enumerate(parts)
        for k in (1, 16)
        for against in ("own", "overall")
    ]  # fmt: skip
    return pa.Table.from_pylist(rows)


def speeds() -> pa.Table:
    return pa.table(
        {
            "label": ["T=1", "T=0.5", "T=1"],
            "tokens_per_second": [900.0, 1100.0, 950.0],
            "device": ["H100"] * 3,
            "num_ranks": [8] * 3,
        }
    )


def states() -> pa.Table:
    return pa.table({"label": ["T=1", "T=0.5"], "done": [120, 1280], "total": [1280, 1280], "state": ["running", "finished"]})


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    """Two finished cells with draws in their store and one that failed."""
    for minutes, temperature in enumerate((0.5, 1.0)):
        record = record_of(
            f"r{minutes}", temperature=temperature, minutes=minutes, num_activations=3, tokens_per_second=1000.0 + minutes,
            device="H100", num_ranks=1, mean_tokens=20.0,
        )  # fmt: skip
        write_run(tmp_path, record, curve_of(0.3 + 0.1 * minutes), controls_of())
        assert record.draws_key is not None
        publish_draws(tmp_path, record.draws_key, [[0.2, 0.4, None, 0.3], [0.5, 0.6, 0.7, 0.8], [None, None, 0.9, 1.0]])
    write_run(
        tmp_path, record_of("r9", temperature=2.0, minutes=9, status="failed", error_type="RunError", error_message="no room")
    )
    return tmp_path


def test_error_distribution_counts_every_draw_once_and_the_best_of_each_activation() -> None:
    table = draws(labels=("T=1",))
    above, below = rows_in(charts.error_distribution(table))
    errors = table["error"].to_numpy()
    known = errors[~np.isnan(errors)]
    edges = [r["start"] for r in above]
    np.testing.assert_allclose([r["share"] for r in above][:-1], np.histogram(known, edges)[0] / len(known))
    best = [np.nanmin(errors[8 * i : 8 * i + 8]) for i in range(50)]
    np.testing.assert_allclose([r["share"] for r in below][:-1], np.histogram(best, edges)[0] / 50)
    assert above[-1]["share"] == 0, "the outline closes"


@pytest.mark.slow
def test_error_distribution_says_what_failed_and_how_heavy_the_tail_is() -> None:
    said = subtitle(charts.error_distribution(draws(labels=("T=1",))))
    assert "400 draws, 10.00% of them failed" in said and "beyond the axis" not in said
    # 100 activations with one draw each: the worst has 50.5 of 150.
    heavy = pa.table({"label": ["a"] * 100, "activation": np.arange(100), "error": [1.0] * 99 + [51.0]})
    said = subtitle(charts.error_distribution(heavy))
    assert "worst 1 % of activations hold 34.0% of the error" in said and "1.00% lie beyond the axis" in said


def test_error_distribution_without_activations_has_one_panel() -> None:
    table = draws().drop_columns(["activation"])
    chart = charts.error_distribution(table)
    assert "vconcat" not in chart.to_dict() and "worst" not in subtitle(chart)


def test_norm_distribution_keeps_the_bulk_in_view_and_tells_the_rest() -> None:
    norms = np.concatenate([GENERATOR.normal(100, 5, 999), [1e6]])
    chart = charts.norm_distribution(pa.table({"label": ["layer 20"] * 1000, "norm": norms}))
    (rows,) = rows_in(chart)
    assert rows[-1]["start"] < 200
    assert "1,000 activations; median" in subtitle(chart) and "longest 1e+06; 0.10% lie beyond the axis" in subtitle(chart)


@pytest.mark.slow
def test_distributions_of_a_million_draws_stay_a_few_hundred_rows() -> None:
    many = draws(num_activations=62_500, num_draws=8)  # 1e6 draws
    assert many.num_rows == 1_000_000
    chart = charts.error_distribution(many)
    assert sum(map(len, rows_in(chart))) <= 2 * 2 * 61
    assert len(chart.to_json()) < 60_000
    norms = pa.table({"label": ["layer 1"] * 10**6, "norm": GENERATOR.random(10**6)})
    assert len(charts.norm_distribution(norms).to_json()) < 40_000


@pytest.mark.slow
def test_compare_draws_pointwise_band_and_the_paler_one_over_the_zero_line() -> None:
    units = layers(charts.compare(differences()))
    areas = [(u["encoding"]["y"]["field"], u["mark"]["opacity"]) for u in units if mark(u) == "area"]
    assert [name for name, _ in areas] == ["band_low", "fve_low", "fve_low"]
    assert areas[0][1] < areas[1][1]
    assert any(u["encoding"]["y"].get("field") == "zero" for u in units)
    assert "for each K by itself" in subtitle(charts.compare(differences()))
    without = charts.compare(differences(band_low=None, band_high=None))
    assert "all K at once" not in subtitle(without) and "all K at once" in subtitle(charts.compare(differences()))


def test_compare_turns_a_difference_round_for_the_other_reference() -> None:
    chart = charts.compare(differences(), reference="b")
    rows = [r for rows in rows_in(chart) for r in rows if r.get("label") == "a"]
    at_two = next(r for r in rows if r["k"] == 2)
    # b - a is 0.02 with 0.01 to 0.04 and band -0.01 to 0.06.
    assert [at_two[n] for n in ("fve", "fve_low", "fve_high", "band_low", "band_high")] == pytest.approx(
        [-0.02, -0.04, -0.01, -0.06, 0.01]
    )
    assert chart.to_dict()["title"]["text"] == ["a less b"]
    with pytest.raises(RequestError, match="no cell is called 'z'; the reference is one of a, b, c"):
        charts.compare(differences(), reference="z")


@pytest.mark.slow
def test_compare_takes_no_greedy_cell_for_its_reference_unasked() -> None:
    rows = differences().to_pylist()
    greedy = [r | {"label": "0 greedy"} for r in rows if r["k"] == 1 and r["label"] == "b"]
    chart = charts.compare([*rows, *greedy])
    assert chart.to_dict()["title"]["text"] == ["FVE less that of a"]
    assert colours_in(chart)["b"] == charts.palette(["0 greedy", "a", "b", "c"])["b"]


def test_compare_leaves_out_the_row_of_each_at_its_own_best() -> None:
    own_best = pa.Table.from_pylist([differences().to_pylist()[0] | {"k": None, "difference": 99.0}], schema=differences().schema)
    chart = charts.compare(pa.concat_tables([differences(), own_best]))
    assert all(r.get("fve") != 99 for rows in rows_in(chart) for r in rows)


@pytest.mark.slow
def test_beyond_half_of_the_draws_curves_are_lighter_and_join_the_full_part() -> None:
    units = layers(charts.fve_by_k(curves((0.4, 0.7), num_draws=16).append_column("num_draws", pa.array([16] * 32))))
    lines = [u for u in units if mark(u) == "line" and u["encoding"]["y"]["field"] == "fve"]
    assert [line["mark"].get("opacity") for line in lines] == [1.0, 0.4]
    chart = charts.fve_by_k(curves((0.4,), num_draws=16).append_column("num_draws", pa.array([16] * 16)))
    sets = sorted({tuple(r["k"] for r in rows) for rows in rows_in(chart) if rows and "k" in rows[0]}, key=len)
    assert tuple(range(1, 9)) in sets and tuple(range(8, 17)) in sets
    assert "Lighter: K > N/2" in subtitle(chart)
    assert "Lighter" not in subtitle(charts.fve_by_k(curves()))


def test_a_greedy_cell_is_not_lighter_for_having_one_draw() -> None:
    greedy = curves((0.0,), num_draws=1).append_column("num_draws", pa.array([1]))
    assert "Lighter" not in subtitle(charts.fve_by_k(greedy))


@pytest.mark.slow
def test_fve_by_temperature_draws_k_beyond_half_of_the_draws_lighter() -> None:
    table = curves(num_draws=16).append_column("num_draws", pa.array([16] * 48))
    (rows,) = [rows for rows in rows_in(charts.fve_by_temperature(table)) if "few" in rows[0]]
    assert {(r["k"], r["few"]) for r in rows} == {(1, False), (4, False), (16, True)}


def test_fve_by_tokens_puts_curves_on_an_axis_of_equal_compute() -> None:
    table = pa.concat_tables([curves((0.4,), tokens=0.0), curves((0.7,), tokens=0.0)])
    rows = [r | {"tokens": r["k"] * (20.0 if r["temperature"] == 0.4 else 60.0)} for r in table.to_pylist()]
    chart = charts.fve_by_k(rows, axis="tokens")
    line = next(u for u in layers(chart) if mark(u) == "line" and u["encoding"]["y"]["field"] == "fve")
    assert line["encoding"]["x"]["field"] == "tokens" and line["encoding"]["x"]["scale"]["type"] == "log"
    assert line["encoding"]["x"]["axis"]["values"] == [20, 50, 100, 200, 500]  # 20 to 960
    with pytest.raises(RequestError, match="lacks tokens"):
        charts.fve_by_k(curves(), axis="tokens")


@pytest.mark.slow
def test_by_group_draws_each_breakdown_against_the_baseline_asked_for() -> None:
    chart = charts.by_group(groups())
    assert len(chart.to_dict()["vconcat"]) == 2
    assert "Best of K = 16" in subtitle(chart) and "Baseline: own" in subtitle(chart)
    rows = [r for rows in rows_in(chart) for r in rows]
    assert {r["against"] for r in rows} == {"own"} and {r["k"] for r in rows} == {16}
    assert "user  (N = 1,200)" in {r["named"] for r in rows}
    only = charts.by_group(groups(), breakdown="role", k=1, against="overall")
    assert "vconcat" not in only.to_dict() and "that of all activations" in subtitle(only)
    with pytest.raises(RequestError, match="no group of the table has breakdown=document"):
        charts.by_group(groups(), breakdown="document")


def test_by_group_of_many_documents_shows_both_ends() -> None:
    rows = [
        {"label": "a", "breakdown": "document", "part": f"d{i}", "k": 1, "fve": i / 100, "fve_low": None, "fve_high": None}
        for i in range(100)
    ]
    chart = charts.by_group(rows)
    (shown,) = rows_in(chart)
    assert {r["part"] for r in shown} == {f"d{i}" for i in (*range(15), *range(85, 100))}
    assert "The 15 lowest and 15 highest of 100 groups" in subtitle(chart) and "intervals" not in subtitle(chart)


def test_throughput_has_a_dot_a_run_and_names_the_devices() -> None:
    chart = charts.throughput(speeds())
    assert [len(rows) for rows in rows_in(chart)] == [3]
    assert subtitle(chart) == "3 runs on 8 x H100."
    with pytest.raises(RequestError, match="no run of the table sampled anything"):
        charts.throughput([{"label": "a", "tokens_per_second": None}])


@pytest.mark.slow
def test_throughput_and_progress_of_thousands_of_cells_stay_bounded() -> None:
    many = [{"label": f"cell {i}", "tokens_per_second": 1.0 * i} for i in range(5000)]
    chart = charts.throughput(many)
    assert sum(map(len, rows_in(chart))) == 40 and "4960 cells of earlier runs" in subtitle(chart)
    cells = [{"label": f"cell {i}", "done": 10, "total": 10, "state": "finished"} for i in range(5000)]
    cells[4321] |= {"done": 1, "state": "failed"}
    chart = charts.progress(cells)
    (rows,) = rows_in(chart)
    assert len(rows) == 40 and "cell 4321" in {r["label"] for r in rows}, "what is not finished is shown first"
    assert "49,991 of 50,000 draws" in subtitle(chart) and "4960 further cells" in subtitle(chart)


def test_progress_is_the_share_of_the_draws_wanted_coloured_by_state() -> None:
    chart = charts.progress(states())
    (rows,) = rows_in(chart)
    assert {r["label"]: r["share"] for r in rows} == {"T=0.5": 1.0, "T=1": 120 / 1280}
    front = next(u for u in layers(chart) if "color" in u["encoding"])
    assert front["encoding"]["color"]["scale"]["domain"] == ["finished", "running"]
    assert "1,400 of 2,560 draws (54.7%), 2 cells" in subtitle(chart)


@pytest.mark.slow
def test_charts_answer_from_a_connection_to_a_registry(registry: Path) -> None:
    with connect(registry) as connection:
        by_k = charts.fve_by_k(connection, sweep="temp_sweep")
        assert {r["label"] for rows in rows_in(by_k) for r in rows if "label" in r} == {"temperature=0.5", "temperature=1"}
        tokens = next(u for u in layers(charts.fve_by_k(connection, axis="tokens")) if mark(u) == "line")
        assert tokens["encoding"]["x"]["axis"]["values"][0] == 20
        assert "24 draws" in subtitle(charts.error_distribution(connection)) and "25.00%" in subtitle(
            charts.error_distribution(connection)
        )
        assert "2 runs on 1 x H100" in subtitle(charts.throughput(connection))
        (rows,) = rows_in(charts.progress(connection))
        charts.fve_by_temperature(connection).to_dict()
    found = {r["label"]: (r["done"], r["state"]) for r in rows}
    assert found == {
        "temperature=0.5": (12, "finished"),
        "temperature=1": (12, "finished"),
        "temperature=2": (0, "failed"),
    }


@pytest.mark.slow
def test_a_sweep_that_is_not_there_has_nothing_to_draw(registry: Path) -> None:
    with connect(registry) as connection, pytest.raises(RequestError, match="no rows"):
        charts.fve_by_k(connection, sweep="another")


@pytest.mark.slow
def test_charts_ask_a_connection_for_the_views_named_in_the_dictionary() -> None:
    with duckdb.connect() as connection:
        with pytest.raises(RequestError, match="this database cannot answer"):
            charts.compare(connection)
        connection.register("compared", differences())
        connection.execute(
            "CREATE VIEW v_compare AS "
            "SELECT *, label AS run_id, other_label AS other_run_id, label AS cell, 'a' AS other_cell FROM compared"
        )
        named = "'s' AS sweep, label, label AS cell, label AS run_id, label AS cell_key, now() AS finished, 'finished' AS status"
        labels = "SELECT label FROM compared UNION SELECT other_label FROM compared UNION SELECT label FROM grouped"
        connection.register("grouped", groups())
        connection.execute(f"CREATE TABLE runs AS SELECT {named}, row_number() OVER () AS place FROM ({labels})")
        connection.execute("CREATE VIEW v_sweep_cells AS FROM runs")
        connection.execute("CREATE VIEW metrics AS SELECT * EXCLUDE (level), label AS run_id, label AS cell_key FROM grouped")
        connection.execute("CREATE VIEW curves AS SELECT label AS run_id, 0.95 AS level FROM grouped")
        connection.execute("CREATE TABLE activations AS SELECT 'b' AS run_id, unnest([1.0, 2.0, 3.0]) AS norm")
        connection.execute(
            "CREATE TABLE v_latest AS SELECT 'b' AS run_id, 'b' AS cell_key, 10 AS num_activations, '/models/Qwen' AS model, "
            "NULL::VARCHAR AS vectors, 20 AS layer, 'x' AS activations_key"
        )
        assert charts.compare(connection, sweep="s").to_dict()["title"]["text"] == ["FVE less that of a"]
        assert "95% intervals" in subtitle(charts.by_group(connection, breakdown="norm"))
        (rows,) = rows_in(charts.norm_distribution(connection))
        assert {r["label"] for r in rows} == {"Qwen layer 20"}


def colours_in(chart: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    for unit in layers(chart):
        colour = unit.get("encoding", {}).get("color", {})
        if colour.get("field") == "label":
            found |= dict(zip(colour["scale"]["domain"], colour["scale"]["range"], strict=True))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("names", [("T=0.5", "T=1", "T=2"), ("gemma", "llama", "qwen")])
def test_a_cell_has_the_same_colour_in_every_chart(names: tuple[str, ...]) -> None:
    colours = charts.palette(reversed(names))
    shown = names[1:]  # a chart of some of the cells, in another order
    curve = [r | {"label": name} for name in reversed(shown) for r in curves((0.5,)).to_pylist()]
    grouped = [r | {"label": shown[r["label"] == "T=1"]} for r in groups().to_pylist()]
    speed = [r | {"label": shown[r["label"] == "T=1"]} for r in speeds().to_pylist()]
    paired = [r | {"label": shown[r["label"] == "b"], "other_label": names[0]} for r in differences().to_pylist()]
    made = [
        charts.fve_by_k(curve, colours=colours),
        charts.error_distribution(draws(labels=shown), colours=colours),
        charts.by_group(grouped, breakdown="role", colours=colours),
        charts.throughput(speed, colours=colours),
        charts.compare(paired, colours=colours),
    ]
    for chart in made:
        assert colours_in(chart) == {name: colours[name] for name in shown}


def test_palette_sorts_numbers_as_numbers_and_runs_dark_to_light_over_temperatures() -> None:
    found = charts.palette(["checkpoint-10", "checkpoint-9"])
    assert found == {"checkpoint-9": charts.OKABE_ITO[0], "checkpoint-10": charts.OKABE_ITO[1]}
    temperatures = charts.palette(["pair T=1.5 @ab12", "pair T=0.5 @cd34", "pair T=1 @ef56"])
    assert temperatures["pair T=0.5 @cd34"] == charts.ORDERED[0] and temperatures["pair T=1.5 @ab12"] == charts.ORDERED[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "chart",
    [
        lambda: charts.compare(differences()), lambda: charts.error_distribution(draws()), lambda: charts.by_group(groups()),
        lambda: charts.norm_distribution(pa.table({"label": ["a"] * 9, "norm": np.arange(9.0)})),
        lambda: charts.throughput(speeds()), lambda: charts.progress(states()),
    ],
    ids=["compare", "error_distribution", "by_group", "norm_distribution", "throughput", "progress"],
)  # fmt: skip
def test_every_chart_is_an_svg_png_and_pdf_with_titled_axes(tmp_path: Path, chart: Any) -> None:
    made = chart()
    assert isinstance(made, alt.TopLevelMixin)
    svg, png, pdf = charts.save(made, tmp_path / "chart", ("svg", "png", "pdf"))
    text = svg.read_text()
    assert "…" not in text and "NaN" not in text and "undefined" not in text
    assert any(word in text for word in ("FVE", "Error (", "Length of", "Tokens sampled", "Draws that are there"))
    assert png.read_bytes()[:4] == b"\x89PNG" and pdf.read_bytes()[:5] == b"%PDF-"
