"""Charts are valid, say what they show, and are files that open anywhere."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import altair as alt
import duckdb
import pyarrow as pa
import pytest

from ksweep.analysis import charts
from ksweep.utils.errors import RequestError


def curves(
    temperatures: tuple[float, ...] = (0.4, 0.7, 1.0),
    num_draws: int = 16,
    shuffled: float | None = -0.5,
    prefix: str = "",
    **more: Any,
) -> pa.Table:
    """Curves that rise by 0.03 per doubling of K."""
    cells = [(t, k) for t in temperatures for k in range(1, num_draws + 1)]
    rows = [
        {
            "label": f"{prefix}temperature={t:g}",
            "k": k,
            "fve": 0.3 - 0.1 * t + 0.03 * math.log2(k),
            "fve_low": 0.28 - 0.1 * t + 0.03 * math.log2(k),
            "fve_high": 0.32 - 0.1 * t + 0.03 * math.log2(k),
            "level": 0.95,
            "temperature": t,
            "baseline": 0.7335,
            "baseline_kind": "evaluated set",
            "num_activations": 1000,
            "num_documents": 400,
            "shuffled_fve": shuffled,
        }
        | more
        for t, k in cells
    ]
    return pa.Table.from_pylist(rows)


def layers(chart: Any) -> list[dict[str, Any]]:
    """Every unit of a chart, however deep; `to_dict` validates against the Vega-Lite schema."""

    def units(spec: dict[str, Any]) -> list[dict[str, Any]]:
        inner = [s for name in ("layer", "vconcat") for s in spec.get(name, [])] + ([spec["spec"]] if "facet" in spec else [])
        return [u for s in inner for u in units(s)] or [spec]

    return units(chart.to_dict())


def mark(unit: dict[str, Any]) -> str:
    return str(unit["mark"]["type"])


def test_fve_by_k_has_log2_axis_line_band_and_dashed_control() -> None:
    units = layers(charts.fve_by_k(curves()))
    line = next(u for u in units if mark(u) == "line")
    assert line["encoding"]["x"]["scale"] | {"domain": 0} == {"type": "log", "base": 2, "domain": 0, "nice": False}
    assert line["encoding"]["x"]["axis"]["values"] == [1, 2, 4, 8, 16]
    assert (line["encoding"]["y"]["field"], line["encoding"]["color"]["field"]) == ("fve", "label")
    band = next(u for u in units if mark(u) == "area")
    assert (band["encoding"]["y"]["field"], band["encoding"]["y2"]["field"]) == ("fve_low", "fve_high")
    control = next(u for u in units if u["encoding"].get("y", {}).get("field") == "shuffled_fve")
    assert control["mark"]["strokeDash"] and control["mark"]["color"] == charts.GREY


def test_fve_by_k_subtitle_states_selection_interval_baseline_and_counts() -> None:
    subtitle = " ".join(charts.fve_by_k(curves()).to_dict()["title"]["subtitle"])
    for words in (
        "Oracle selection by the AR",
        "95% intervals",
        "Baseline 0.7335 (evaluated set)",
        "N = 1,000 activations",
        "400 documents",
    ):
        assert words in subtitle


def test_fve_by_k_subtitle_gives_the_range_where_cells_differ() -> None:
    table = pa.concat_tables([curves((0.4,)), curves((0.7,), baseline=0.8, num_documents=500)])
    subtitle = " ".join(charts.fve_by_k(table).to_dict()["title"]["subtitle"])
    assert "Baseline 0.7335 to 0.8 (evaluated set)" in subtitle and "400 to 500 documents" in subtitle


@pytest.mark.slow
def test_fve_by_k_gives_a_far_control_its_own_panel_and_a_near_one_none() -> None:
    assert "vconcat" in charts.fve_by_k(curves(shuffled=-0.5)).to_dict()
    assert "vconcat" not in charts.fve_by_k(curves(shuffled=0.15)).to_dict()
    without = charts.fve_by_k(curves(shuffled=None)).to_dict()
    assert "vconcat" not in without and "another activation" not in str(without["title"])


def test_fve_by_k_draws_the_zero_line_only_where_the_range_crosses_it() -> None:
    def has_zero_line(table: pa.Table) -> bool:
        return any("zero" in str(u["encoding"].get("y", {}).get("field")) for u in layers(charts.fve_by_k(table)))

    assert not has_zero_line(curves(shuffled=None))
    assert has_zero_line(curves((0.4, 3.5), shuffled=None))


@pytest.mark.parametrize(
    ("num_draws", "ticks"), [(1, [1]), (16, [1, 2, 4, 8, 16]), (20, [1, 2, 4, 8, 16]), (24, [1, 2, 4, 8, 16, 24])]
)
def test_fve_by_k_ticks_are_whole_and_end_where_the_curve_does(num_draws: int, ticks: list[int]) -> None:
    line = next(u for u in layers(charts.fve_by_k(curves(num_draws=num_draws))) if mark(u) == "line")
    assert line["encoding"]["x"]["axis"]["values"] == ticks


def test_colours_are_told_apart_keep_their_order_and_repeat_only_with_another_dash() -> None:
    many = pa.concat_tables([curves((0.7,), prefix=f"checkpoint-{i}, ") for i in range(10)])
    line = next(u for u in layers(charts.fve_by_k(many)) if mark(u) == "line")
    scale, dashes = line["encoding"]["color"]["scale"], line["encoding"]["strokeDash"]["scale"]["range"]
    assert scale["domain"][:2] == ["checkpoint-0, temperature=0.7", "checkpoint-1, temperature=0.7"]
    assert tuple(scale["range"][:8]) == charts.OKABE_ITO and scale["range"][8] == charts.OKABE_ITO[0]
    assert len({(colour, tuple(dash)) for colour, dash in zip(scale["range"], dashes, strict=True)}) == 10


def test_colours_of_temperatures_run_from_dark_to_light_in_any_order_of_rows() -> None:
    table = pa.concat_tables([curves((1.0,)), curves((0.4,)), curves((0.7,))])
    scale = next(u for u in layers(charts.fve_by_k(table)) if mark(u) == "line")["encoding"]["color"]["scale"]
    found = dict(zip(scale["domain"], scale["range"], strict=True))
    assert found["temperature=0.4"] == charts.ORDERED[0] and found["temperature=1"] == charts.ORDERED[-1]


@pytest.mark.slow
def test_fve_by_temperature_has_a_line_with_error_bars_per_k() -> None:
    chart = charts.fve_by_temperature(curves(num_draws=20))
    line = next(u for u in layers(chart) if mark(u) == "line")
    assert line["encoding"]["x"]["field"] == "temperature" and line["encoding"]["x"]["axis"]["values"] == [0.4, 0.7, 1.0]
    assert line["encoding"]["color"]["scale"]["domain"] == [1, 4, 16, 20]
    bars = next(u for u in layers(chart) if mark(u) == "rule")
    assert (bars["encoding"]["y"]["field"], bars["encoding"]["y2"]["field"]) == ("fve_low", "fve_high")
    only = next(u for u in layers(charts.fve_by_temperature(curves(), ks=(16, 2))) if mark(u) == "line")
    assert only["encoding"]["color"]["scale"]["domain"] == [2, 16]


@pytest.mark.slow
def test_a_band_over_k_is_drawn_over_k_and_not_spoken_of_where_there_is_none() -> None:
    banded = curves(band_low=0.1, band_high=0.6)
    assert "Paler band" in json.dumps(charts.fve_by_k(banded).to_dict())
    assert "Paler band" not in json.dumps(charts.fve_by_k(curves()).to_dict())
    assert "Paler band" not in json.dumps(charts.fve_by_temperature(banded).to_dict())


@pytest.mark.slow
def test_fve_by_temperature_keeps_greedy_which_has_one_draw() -> None:
    table = pa.concat_tables([curves((0.0,), num_draws=1), curves()])
    line = next(u for u in layers(charts.fve_by_temperature(table)) if mark(u) == "line")
    assert line["encoding"]["x"]["axis"]["values"] == [0.0, 0.4, 0.7, 1.0]
    assert line["encoding"]["color"]["scale"]["domain"] == [1, 4, 16]


@pytest.mark.slow
def test_fve_by_temperature_separates_cells_that_differ_in_more() -> None:
    table = pa.concat_tables([curves(prefix="a, "), curves(prefix="b, ")])
    assert charts.fve_by_temperature(table).to_dict()["facet"]["sort"] == ["a", "b"]


def test_fve_by_temperature_refuses_a_line_through_two_cells_of_one_name() -> None:
    table = pa.concat_tables([curves((0.4, 0.7)), curves((0.4,))])
    with pytest.raises(RequestError, match=r"share temperature 0\.4"):
        charts.fve_by_temperature(table)


def training_curve(steps: tuple[int, ...], **more: Any) -> pa.Table:
    """Curves of a series of checkpoints, labelled by step; the column says another step, as of a run that another sweep made."""
    tables = [curves((0.7,), **more).to_pylist() for _ in steps]
    rows = [row | {"label": f"step={step}", "step": 7} for step, table in zip(steps, tables, strict=True) for row in table]
    return pa.Table.from_pylist(rows)


def test_fve_by_step_is_a_training_curve_at_one_draw_and_at_the_most() -> None:
    table = training_curve((0, 50, 1000))
    chart = charts.fve_by_step(table)
    line = next(u for u in layers(chart) if mark(u) == "line")
    assert line["encoding"]["x"]["field"] == "step" and line["encoding"]["x"]["axis"]["values"] == [0, 50, 1000]
    assert line["encoding"]["color"]["scale"]["domain"] == [1, 16]
    bars = next(u for u in layers(chart) if mark(u) == "rule")
    assert (bars["encoding"]["y"]["field"], bars["encoding"]["y2"]["field"]) == ("fve_low", "fve_high")
    assert "facet" not in chart.to_dict(), "all cells are of one group once the step is left out of their labels"


def test_fve_by_step_takes_the_column_where_labels_say_no_step_and_refuses_two_cells_of_one() -> None:
    rows = [row | {"label": f"demo, temperature={t}", "step": 50} for t in (0.4, 0.7) for row in curves((t,)).to_pylist()]
    assert charts.fve_by_step(rows).to_dict()["facet"]["sort"] == ["demo temperature=0.4", "demo temperature=0.7"]
    with pytest.raises(RequestError, match="no row of the table has a step and one of K"):
        charts.fve_by_step([row | {"step": None} for row in rows])
    with pytest.raises(RequestError, match="two cells named 'demo' share step 50"):
        charts.fve_by_step([row | {"label": f"demo step={50:0{n}d}"} for n in (1, 2, 3) for row in rows[:1]])


def test_cells_that_differ_in_their_step_have_colours_from_dark_to_light_in_the_order_of_the_steps() -> None:
    found = charts.palette(["step=1000", "step=90", "step=500"])
    assert list(found) == ["step=90", "step=500", "step=1000"] and found["step=90"] == charts.ORDERED[0]
    assert found["step=1000"] == charts.ORDERED[-1]
    assert charts.palette(["a, step=1", "b, step=2"])["a, step=1"] == charts.OKABE_ITO[0]


@pytest.mark.slow
def test_charts_take_a_duckdb_relation_and_thousands_of_rows() -> None:
    table = pa.concat_tables([curves((float(t),), num_draws=64) for t in range(100)])  # 6,400 rows; Altair's own limit is 5,000
    with duckdb.connect() as connection:
        connection.register("curves", table)
        chart = charts.fve_by_k(connection.sql("SELECT * FROM curves ORDER BY label, k"))
    (values,) = {len(json.loads(values)) for values in chart.to_dict()["datasets"].values() if len(values) > 500_000}
    assert values == 6400


@pytest.mark.parametrize("table", [curves().slice(0, 0), curves().drop_columns(["fve"])])
def test_charts_without_rows_or_columns_say_so(table: pa.Table) -> None:
    with pytest.raises(RequestError, match=r"no rows|lacks fve"):
        charts.fve_by_k(table)


def test_fve_by_k_unknown_interval_draws_a_line_without_claiming_one() -> None:
    chart = charts.fve_by_k(curves(fve_low=float("nan"), fve_high=None, level=None))
    assert "bootstrap" not in str(chart.to_dict()["title"])
    assert "NaN" not in chart.to_json()


@pytest.mark.slow
def test_save_writes_offline_html_double_size_png_and_pdf(tmp_path: Path) -> None:
    chart = charts.fve_by_k(curves())
    html, png, pdf = charts.save(chart, tmp_path / "charts" / "fve.by_k")
    assert [p.name for p in (html, png, pdf)] == ["fve.by_k.html", "fve.by_k.png", "fve.by_k.pdf"]
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(png.read_bytes()[16:20]) > 2 * charts.WIDTH
    assert pdf.read_bytes()[:5] == b"%PDF-" and pdf.stat().st_size > 5000
    text = html.read_text()
    assert not re.search(r"<(script|link)[^>]+(src|href)=", text), "nothing is fetched"
    assert "Oracle selection by the AR" in text and "vegaEmbed" in text


@pytest.mark.slow
def test_save_svg_keeps_every_word(tmp_path: Path) -> None:
    (svg,) = charts.save(charts.fve_by_k(curves(), title="A question? " * 12), tmp_path / "fve", ("svg",))
    text = svg.read_text()
    assert "…" not in text and charts.K in text and charts.FVE in text
    assert all(word in text for word in ("A question? A question?", "Oracle selection", "shuffled FVE"))


def test_save_unknown_format_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"'gif'.*html, png, pdf, svg"):
        charts.save(charts.fve_by_k(curves()), tmp_path / "fve", ("gif",))


def test_charts_are_altair_charts_that_can_be_changed_further() -> None:
    assert isinstance(charts.fve_by_k(curves()), alt.TopLevelMixin)
