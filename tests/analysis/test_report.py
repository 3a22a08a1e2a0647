"""The report of a sweep: what it says is what the registry holds, and a browser without a network shows it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ksweep import Sweep
from ksweep.analysis.diff import flatten
from ksweep.analysis.report import data as facts_module
from ksweep.analysis.report.data import read_report_data
from ksweep.analysis.report.page import answer, page, write_report
from ksweep.cli import main
from ksweep.registry import attempts, sweeps
from ksweep.utils.errors import RequestError
from tests.analysis.conftest import written
from tests.tiny_sweeps import ask, run

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.mark.slow
def test_explanations_are_the_best_median_and_worst_draw_of_an_activation(sweep: Sweep) -> None:
    facts = read_report_data(Path(sweep.registry), sweep.name)
    shown = [r for r in facts.explanations if r["label"] == facts.runs[0]["label"]]
    assert len(shown) == 3 * 40 and len(facts.explanations) == 2 * len(shown)
    best = [r for r in shown if r["which"] == "best"]
    key = facts.runs[0]["draws_key"]
    for row in best[:5]:
        mine = ask(
            sweep,
            f"SELECT draw, error FROM draws WHERE draws_key = '{key}' AND activation = {row['activation']} "
            "ORDER BY error NULLS LAST, draw",
        )
        three = {r["which"]: (r["draw"], r["error"]) for r in shown if r["activation"] == row["activation"]}
        assert three == {"best": mine[0], "median": mine[3], "worst": mine[7]}
    errors = [r["error"] for r in best if r["error"] is not None]
    assert errors == sorted(errors)


def test_the_answer_names_the_cell_that_the_curves_put_first(sweep: Sweep) -> None:
    facts = read_report_data(Path(sweep.registry), sweep.name)
    [(label, fve, low, high)] = ask(
        sweep, "SELECT cell, fve, fve_low, fve_high FROM curves WHERE k = 8 ORDER BY fve DESC LIMIT 1"
    )
    own = next(r["label"] for r in facts.runs if r["cell"] == label)
    first, gap, *_ = answer(facts)
    ends = re.match(rf"{re.escape(own)} reaches an FVE of {fve:.3f} \[(\S+), (\S+)\] at best of 8 draws, ", first)
    assert ends is not None
    assert_rounded(ends.groups(), (low, high))
    [(difference, low, high)] = ask(
        sweep,
        "SELECT difference, difference_low, difference_high FROM v_compare WHERE k = 8 AND difference > 0",
    )
    ends = re.search(rf"{difference:.3f} \[(\S+), (\S+)\]", gap)
    assert ends is not None
    assert_rounded(ends.groups(), (low, high))
    assert ("Not distinguishable" in gap) == (low <= 0)


def assert_rounded(texts: tuple[str, ...], values: tuple[float, ...]) -> None:
    """Ends of an interval as printed: the values with as many decimals as hold, one at least."""
    for text, value in zip(texts, values, strict=True):
        decimals = len(text.partition(".")[2])
        assert decimals >= 1 and float(text) == pytest.approx(value, abs=0.5001 * 10**-decimals)


def test_settings_are_split_into_common_and_varied_ones(sweep: Sweep) -> None:
    facts = read_report_data(Path(sweep.registry), sweep.name)
    assert facts.varied == ["sampling.temperature"]
    assert facts.common["sampling.num_draws"] == 8 and "sampling.temperature" not in facts.common
    assert None not in facts.common.values() and "activations.vectors" not in facts.common  # fields left open are not listed
    assert dict(flatten({"a": {"b": 1, "c": None}, "d": [1]})) == {"a.b": 1, "a.c": None, "d": [1]}


@pytest.mark.slow
def test_cells_stand_in_the_order_of_the_sweep_under_its_labels_whoever_computed_them(sweep: Sweep, tmp_path: Path) -> None:
    other = replace(sweep, name="other way round", question="And back?", axes={"sampling.temperature": (1.3, 0.7)})
    assert run(other) == 0
    facts = read_report_data(Path(sweep.registry), other.name)
    assert [cell["label"] for cell in facts.cells] == ["temperature=1.3", "temperature=0.7"]
    assert [r["temperature"] for r in facts.runs] == [1.3, 0.7] and {r["sweep"] for r in facts.runs} == {"tiny"}
    assert list(dict.fromkeys(facts.curves["label"].to_pylist())) == ["temperature=1.3", "temperature=0.7"]
    assert "<h1>And back?</h1>" in page(facts)


@pytest.mark.slow
def test_cells_without_a_result_are_named_with_what_became_of_them(sweep: Sweep, tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    shutil.copytree(sweep.registry, registry)
    path = next((registry / "attempts").glob("*.json"))
    [attempt] = attempts.read_attempts(path)
    lost = replace(
        attempt, job="20990101-lost", status="failed", error_class="out of memory", message="CUDA <out> of memory", host="node7",
        cell_key="f" * 32, traceback="Traceback: <deep>", sweep="tiny",
    )  # fmt: skip
    attempts.write_attempts(registry, [lost])
    facts = read_report_data(registry, "tiny")
    cells = [(r["cell_key"], r["label"]) for r in facts.runs]
    sweeps.write_sweep_record(registry, sweeps.make_sweep_record("tiny", "Three?", [*cells, ("f" * 32, "temperature=9")]))
    facts = read_report_data(registry, "tiny")
    assert [cell["label"] for cell in facts.unfinished] == ["temperature=9"]
    shown = page(facts)
    assert "1 of 3 cells have no result" in shown and "temperature=9 (not run)" in shown
    assert "node7" in shown and "CUDA &lt;out&gt; of memory" in shown and "Traceback: &lt;deep&gt;" in shown


def test_only_blocks_of_activations_are_read_where_draws_are_many(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(sweep.registry)
    [(*keys, num_draws)] = ask(sweep, "SELECT draws_key, scores_key, num_draws FROM v_latest WHERE temperature = 0.7")
    wanted = {"draws_key": keys[0], "scores_key": keys[1], "num_activations": 40, "num_draws": num_draws}
    whole, some = (facts_module._draws_of(root, wanted, most) for most in (10**9, 1))
    assert whole is not None and some is not None and whole.num_rows == 40 * num_draws
    assert len({activation // 64 for activation in some["activation"].to_pylist()}) == 1
    monkeypatch.setattr(facts_module, "DRAWS_READ", 1)
    monkeypatch.setattr(facts_module, "FEWEST_READ", 1)
    assert read_report_data(root, sweep.name).errors.num_rows > 0


@pytest.mark.slow
@pytest.mark.usefixtures("forked_python")
def test_command_writes_the_page_where_it_is_told(sweep: Sweep, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from ksweep.cli import main; main()", "report"]
    done = subprocess.run(
        [*command, "tiny", "--registry", sweep.registry, "-o", str(tmp_path / "a.html")], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "a.html"), done.stderr
    assert (tmp_path / "a.html").read_text().startswith("<!DOCTYPE html>")


def test_command_refuses_unknown_sweeps(
    sweep: Sweep, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["ksweep", "report", "tinny", "--registry", sweep.registry])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and "sweeps there:" in capsys.readouterr().err


def test_a_sweep_that_is_not_there_is_refused_with_those_that_are(sweep: Sweep, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"'tinny'.*sweeps there:.* tiny"):
        write_report(Path(sweep.registry), "tinny", tmp_path / "report.html")


@pytest.mark.slow
def test_the_page_opens_offline_without_errors_and_its_table_can_be_searched(
    sweep: Sweep, tmp_path: Path, browser: Browser
) -> None:
    path = written(sweep, tmp_path)
    shown = browser.new_page(viewport={"width": 1280, "height": 900}, offline=True)
    said: list[str] = []
    asked: list[str] = []
    shown.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    shown.on("pageerror", lambda error: said.append(f"error: {error}"))
    shown.on("request", lambda request: asked.append(request.url))
    shown.goto(path.as_uri())
    for name in (
        "fve_by_k",
        "fve_by_temperature",
        "differences",
        "groups_own",
        "groups_overall",
        "errors",
        "norms",
        "throughput",
    ):
        shown.wait_for_selector(f"#chart-{name} svg")
    shown.wait_for_selector("#explanations tbody tr")
    assert not said
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked)
    assert shown.inner_text("h1") == "Does <b>warmth</b> & noise help?"
    entries = shown.inner_text(".dt-info")
    assert re.search(r"240 entries", entries), entries
    shown.fill(".dt-search input", "temperature=1.3 worst")
    shown.wait_for_function("document.querySelector('.dt-info').innerText.includes('filtered')")
    assert re.search(r"of 40 entries \(filtered from 240", shown.inner_text(".dt-info"))
    cells = shown.locator("#explanations tbody tr td:nth-child(2)").all_inner_texts()
    assert set(cells) == {"worst"}
    assert shown.evaluate("document.documentElement.scrollWidth") <= 1280, "nothing runs over the right edge"
    assert path.stat().st_size < 5_000_000
    shot = shown.screenshot(full_page=True, path=tmp_path / "report.png")
    assert len(shot) > 50_000
    shown.close()


@pytest.mark.slow
def test_what_models_and_texts_say_is_shown_as_text_and_never_run(sweep: Sweep, tmp_path: Path, browser: Browser) -> None:
    facts = read_report_data(Path(sweep.registry), sweep.name)
    hostile = "</script><img src=x onerror='window.ran = 1'><script>window.ran = 1</script>"
    changed = [row | {"explanation": hostile, "context": hostile, "document": hostile} for row in facts.explanations]
    path = tmp_path / "hostile.html"
    path.write_text(page(replace(facts, explanations=changed, question=hostile, sweep=hostile)))
    shown = browser.new_page()
    shown.goto(path.as_uri())
    shown.wait_for_selector("#explanations tbody tr")
    assert shown.inner_text("h1") == hostile and hostile in shown.inner_text("#explanations")
    assert shown.evaluate("window.ran") is None
    shown.close()
