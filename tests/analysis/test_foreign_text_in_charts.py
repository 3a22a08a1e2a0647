"""Titles, labels and data of somebody else in charts: nothing of them runs in a page, and none of them ends the process."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import altair as alt
import pyarrow as pa
import pytest

from ksweep import Sweep
from ksweep.analysis import charts
from ksweep.analysis.charts.style import data
from ksweep.analysis.report.data import read_report_data
from ksweep.analysis.report.page import page
from tests.analysis.test_charts import curves

if TYPE_CHECKING:
    from playwright.sync_api import Browser

HOSTILE = "</script><img src=x onerror='window.ran=1'><!--<script>window.ran=1</script>"


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)


def elements(page: str) -> list[str]:
    """The elements that a browser finds; what a script element holds is none."""
    parser = _Elements()
    parser.feed(page)
    return parser.tags


def hostile_chart(text: str) -> Any:
    return charts.fve_by_k(curves((0.4, 0.7), num_draws=2, prefix=text), title=text)


@pytest.mark.slow
def test_a_saved_chart_has_the_same_elements_whatever_its_texts_are(tmp_path: Path) -> None:
    pages = [charts.save(hostile_chart(text), tmp_path / "chart", ["html"])[0].read_text() for text in ("plain", HOSTILE)]
    assert elements(pages[0]) == elements(pages[1]) and "img" not in elements(pages[1])
    assert pages[1].count("window.ran=1") == pages[1].count("\\u003cimg") * 2 > 4  # it is in titles and in data


def test_data_of_a_chart_cannot_end_a_script_wherever_it_is_embedded() -> None:
    assert "<" not in str(data([{"label": HOSTILE}]).to_dict()["values"])


def hostile_report(sweep: Sweep) -> str:
    facts = read_report_data(Path(sweep.registry), sweep.name)

    def renamed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        names = ("label", "other_label", "part", "document", "explanation", "context", "host", "device", "note")
        return [row | {name: f"{row[name]} {HOSTILE}" for name in names if isinstance(row.get(name), str)} for row in rows]

    tables = {name: getattr(facts, name) for name in ("curves", "errors")}
    lists = {name: renamed(getattr(facts, name)) for name in ("runs", "groups", "differences", "explanations", "controls")}
    return page(
        replace(
            facts, question=HOSTILE, sweep=HOSTILE, **lists,
            **{name: pa.Table.from_pylist(renamed(table.to_pylist()), table.schema) for name, table in tables.items()},
        )
    )  # fmt: skip


@pytest.mark.slow
def test_a_report_has_no_element_from_its_data(sweep: Sweep) -> None:
    plain = elements(page(read_report_data(Path(sweep.registry), sweep.name)))
    written = hostile_report(sweep)
    assert written.count("window.ran") > 40
    assert {tag: elements(written).count(tag) for tag in ("script", "img")} == {"script": plain.count("script"), "img": 0}


@pytest.mark.slow
@pytest.mark.parametrize("what", ["chart", "report"])
def test_nothing_in_a_page_runs_that_came_with_the_data(what: str, tmp_path: Path, browser: Browser, sweep: Sweep) -> None:
    path = tmp_path / "hostile.html"
    if what == "chart":
        path = charts.save(hostile_chart(HOSTILE), tmp_path / "hostile", ["html"])[0]
    else:
        path.write_text(hostile_report(sweep))
    shown = browser.new_page(offline=True)
    failed: list[str] = []
    shown.on("pageerror", lambda error: failed.append(str(error)))
    shown.goto(path.as_uri())
    shown.wait_for_selector("#vis canvas, #vis svg" if what == "chart" else "#chart-fve_by_k svg")
    assert shown.evaluate("window.ran") is None and failed == []
    shown.close()


CHARACTERS = (*range(0x20), 0x7F, 0x85, 0x9B, 0x202E, 0x2066, 0xD800, 0xDFFF, 0xFFFE, 0xFFFF, 0x1F600)
DRAW = """
import sys
import altair as alt
from pathlib import Path
from ksweep.analysis import charts
from tests.analysis.test_foreign_text_in_charts import everywhere
print([len(path.read_bytes()) for path in charts.save(everywhere(), Path(sys.argv[1]), ["png", "svg", "pdf", "html"])])
"""


def everywhere() -> Any:
    """A chart with every odd character in its title, subtitle, axis, legend, facet, marks and a user's own data."""
    odd = "".join(f"x{chr(code)}" for code in CHARACTERS)
    line = odd.replace("\n", "")  # Vega has no titles of axes with line breaks
    rows = [{"a": f"{odd}{i}", "b": i, "facet": odd} for i in range(2)]
    colour = alt.Color("a:N", title=line, scale=alt.Scale(domain=[row["a"] for row in rows], range=["red", "blue"]))
    bars = alt.Chart(data(rows)).mark_bar().encode(alt.X("a:N", title=line), alt.Y("b:Q"), colour, alt.Row("facet:N"))
    own = alt.Chart(alt.Data(values=rows)).mark_text().encode(alt.X("b:Q"), text="a:N")
    return alt.vconcat(bars, own).properties(title=alt.TitleParams([odd, odd], subtitle=[odd]))


@pytest.mark.trials
@pytest.mark.slow
def test_no_character_in_a_chart_ends_the_process(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", DRAW, str(tmp_path / "odd")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    svg = (tmp_path / "odd.svg").read_text()
    assert svg.count("x\ufffdx\ufffd") > 20 and "x😀" in svg
