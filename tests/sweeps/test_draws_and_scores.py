"""Draws apart from scores: another AR, another precision, phases, a death in between, and registries of earlier versions."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ksweep import Activations, Autoencoder, Cell, Resources, Sampling, Scoring, Sweep, connect, results
from ksweep.analysis import charts
from ksweep.analysis.cells import load_cells
from ksweep.analysis.diff import diff_runs
from ksweep.analysis.report.data import read_report_data
from ksweep.autoencoder.nla.family import NlaPair
from ksweep.evaluation.identity import cell_keys, resolve_cell
from ksweep.registry.cell_draws import CellDraws
from ksweep.registry.query import named_curves
from tests.analysis.test_chart_kinds import rows_in
from tests.hub_server import HubRepository, serving_hub, use_hub
from tests.stored_rows import make_earlier
from tests.tiny_models import TinyPair, edit_weights
from tests.tiny_sweeps import ask, run, talking_pair, tiny_cell

pytestmark = pytest.mark.usefixtures("forked_python")

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
CURVES = "SELECT k, fve, fve_low, fve_high, error, cosine, shuffled_fve FROM curves WHERE sweep = '{}' ORDER BY cell, k"
COUNTS = """
    SELECT num_draws_sampled, num_draws_reused, num_draws_scored FROM runs WHERE sweep = '{}' AND status = 'finished'
    ORDER BY finished
"""
TEXTS = "SELECT activation, draw, text, token_ids FROM texts ORDER BY draws_key, activation, draw"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    return talking_pair(tmp_path_factory.mktemp("tiny"), num_rows=60)


@pytest.fixture(scope="module")
def other_ar(pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An AR with other weights."""
    path = tmp_path_factory.mktemp("other") / "nla-ar"
    shutil.copytree(pair.ar, path)
    edit_weights(path, change=lambda state: state["model.embed_tokens.weight"].mul_(-1.5))
    return str(path)


def sweep_in(folder: Path, pair: TinyPair, name: str = "tiny") -> Sweep:
    return Sweep(
        name=name, cell=tiny_cell(pair, num_replicates=50), resources=Resources(cluster="inprocess", gpus=0),
        registry=str(folder / "registry"), vector_cache=str(folder / "vector_cache"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """It has run once and is only read from: 40 activations, 8 draws of each."""
    sweep = sweep_in(tmp_path_factory.mktemp("undisturbed"), pair)
    assert run(sweep) == 0
    return sweep


@pytest.fixture
def finished(undisturbed: Sweep, tmp_path: Path) -> Sweep:
    """A copy of it."""
    shutil.copytree(undisturbed.registry, tmp_path / "registry")
    return replace(undisturbed, registry=str(tmp_path / "registry"))


@pytest.fixture
def no_av(monkeypatch: pytest.MonkeyPatch) -> None:
    """An AV cannot be loaded."""

    def refuse(self: NlaPair, devices: Any) -> Any:
        raise AssertionError("the AV was loaded")

    monkeypatch.setattr(NlaPair, "load_verbalizer", refuse)


def named(sweep: Sweep, name: str, **autoencoder: Any) -> Sweep:
    """The sweep under another name, with another AR."""
    cell = replace(sweep.cell, autoencoder=replace(sweep.cell.autoencoder, **autoencoder))
    return replace(sweep, name=name, cell=cell)


def assert_equal_curves(one: Sweep, two: Sweep) -> None:
    found, expected = ask(one, CURVES.format(one.name)), ask(two, CURVES.format(two.name))
    assert len(found) == len(expected) > 0
    np.testing.assert_allclose(np.array(found, float), np.array(expected, float), atol=1e-6)


# --- another AR, another precision ---


@pytest.mark.slow
@pytest.mark.parametrize("precision", [False, True])
def test_another_ar_samples_nothing_and_gives_the_numbers_of_a_registry_of_its_own(
    finished: Sweep, other_ar: str, tmp_path: Path, precision: bool, request: pytest.FixtureRequest
) -> None:
    change = {"ar_dtype": "bfloat16"} if precision else {"ar": other_ar}
    alone = replace(named(finished, "second", **change), registry=str(tmp_path / "alone"))
    assert run(alone) == 0
    request.getfixturevalue("no_av")
    second = replace(alone, registry=finished.registry)
    assert run(second) == 0
    assert ask(second, COUNTS.format("tiny")) == [(320, 0, 320)] and ask(second, COUNTS.format("second")) == [(0, 320, 320)]
    assert ask(second, TEXTS) == ask(alone, TEXTS)
    assert_equal_curves(second, alone)
    assert ask(second, CURVES.format("second")) != ask(second, CURVES.format("tiny"))
    keys = ask(second, "SELECT draws_key, scores_key FROM runs")
    assert len({draws for draws, _ in keys}) == 1 and len({scores for _, scores in keys}) == 2
    errors = "SELECT error FROM draws JOIN runs USING (draws_key, scores_key) WHERE sweep = 'second' ORDER BY activation, draw"
    np.testing.assert_allclose(np.array(ask(second, errors), float), np.array(ask(alone, errors), float), atol=1e-6)
    [(failed,)] = ask(second, "SELECT num_failed_draws FROM runs WHERE sweep = 'second'")
    assert ask(second, "SELECT count(*), count(DISTINCT scores_key), count(error) FROM draws") == [(640, 2, 640 - 2 * failed)]
    assert ask(second, "SELECT count(*) FROM best_draws") == [(80,)]


@pytest.mark.slow
def test_the_dry_run_counts_draws_to_score_apart_from_draws_to_sample(
    finished: Sweep, other_ar: str, capsys: pytest.CaptureFixture[str]
) -> None:
    second = named(finished, "second", ar=other_ar)
    assert run(second, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "score: all 320 draws are there" in out and "score 320" in out
    assert "to sample: 0 draws; to score only: 320 draws" in out
    assert run(second, "sampling.num_draws=12", "--dry-run") == 0
    assert "to sample: 160 draws; to score only: 320 draws" in capsys.readouterr().out


@pytest.mark.slow
def test_two_ars_in_one_sweep_are_one_job_that_draws_once(pair: TinyPair, other_ar: str, tmp_path: Path) -> None:
    sweep = sweep_in(tmp_path, pair)
    other = replace(sweep.cell.autoencoder, ar=other_ar)
    both = replace(sweep, axes={"autoencoder": (sweep.cell.autoencoder, other), "sampling.temperature": (0.7, 1.0)})
    assert run(both) == 0
    assert sorted(ask(both, COUNTS.format("tiny"))) == [(0, 320, 320)] * 2 + [(320, 0, 320)] * 2
    assert ask(both, "SELECT count(DISTINCT job), count(DISTINCT draws_key), count(DISTINCT scores_key) FROM runs") == [(1, 2, 2)]
    assert ask(both, "SELECT count(*) FROM texts") == [(640,)] and ask(both, "SELECT count(*) FROM draws") == [(1280,)]


@pytest.mark.slow
def test_fewer_activations_and_more_draws_under_another_ar_score_what_is_there_and_draw_the_rest(
    finished: Sweep, other_ar: str, tmp_path: Path
) -> None:
    asked = ("activations.num_activations=25", "sampling.num_draws=10")
    second = named(finished, "second", ar=other_ar)
    assert run(second, *asked) == 0
    assert ask(second, COUNTS.format("second")) == [(50, 200, 250)]
    alone = replace(second, registry=str(tmp_path / "alone"))
    assert run(alone, *asked) == 0
    assert_equal_curves(second, alone)


# --- phases, stops ---


@pytest.mark.slow
def test_phases_free_the_av_before_the_ar_is_loaded_and_give_the_numbers_of_one_stream(
    pair: TinyPair, undisturbed: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    load_av, load_ar = NlaPair.load_verbalizer, NlaPair.load_reconstructor

    def note_av(self: NlaPair, devices: Any) -> Any:
        av = load_av(self, devices)
        loaded.append(weakref.ref(av))
        return av

    def note_ar(self: NlaPair, devices: Any, verbalizer: Any = None) -> Any:
        loaded.append("AR" if verbalizer is None and loaded[0]() is None else "AR beside the AV")
        return load_ar(self, devices, verbalizer)

    monkeypatch.setattr(NlaPair, "load_verbalizer", note_av)
    monkeypatch.setattr(NlaPair, "load_reconstructor", note_ar)
    sweep = sweep_in(tmp_path, pair)
    assert run(sweep, "resources.phases=true") == 0
    assert loaded[1:] == ["AR"]
    assert ask(sweep, TEXTS) == ask(undisturbed, TEXTS)
    assert_equal_curves(sweep, undisturbed)
    assert ask(sweep, COUNTS.format("tiny")) == ask(undisturbed, COUNTS.format("tiny"))
    assert ask(sweep, "SELECT engine['sampler'], seconds['scoring'] > 0 FROM runs") == [("slots", True)]
    assert ask(sweep, "SELECT cell_key FROM runs") == ask(undisturbed, "SELECT cell_key FROM runs")


@pytest.mark.slow
def test_phases_free_the_ar_of_one_stream_before_the_av_of_the_next(
    pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[Any] = []
    most: list[tuple[str, int]] = []

    def counting(name: str) -> Callable[..., Any]:
        original = getattr(NlaPair, name)

        def load(self: NlaPair, *arguments: Any) -> Any:
            most.append((name, sum(model() is not None for model in alive)))
            model = original(self, *arguments)
            alive.append(weakref.ref(model))
            return model

        return load

    for name in ("load_verbalizer", "load_reconstructor"):
        monkeypatch.setattr(NlaPair, name, counting(name))
    sweep = sweep_in(tmp_path, pair)
    assert run(sweep, "resources.phases=true", "sampling.max_new_tokens=[6,9]", "sampling.num_draws=2") == 0
    assert most == [("load_verbalizer", 0), ("load_reconstructor", 0)] * 2


KILLED = """
import os, signal, sys
from ksweep import *
from ksweep.registry.cell_draws import CellDraws
publish_scores = CellDraws.publish_scores
published = []
def publish_and_die(self, unit, table, draws=None):
    if len(published) == {whole}:
        os.kill(os.getpid(), signal.SIGKILL)
    published.append(unit)
    publish_scores(self, unit, table, draws)
CellDraws.publish_scores = publish_and_die
sweep_main({sweep!r}, ["--no-charts"])
"""


@pytest.mark.slow
def test_a_process_that_is_killed_between_draws_and_scores_loses_neither(pair: TinyPair, tmp_path: Path) -> None:
    sweep = sweep_in(tmp_path, pair)
    sweep = replace(sweep, cell=replace(sweep.cell, sampling=replace(sweep.cell.sampling, num_draws=40)))  # units of 16, 16, 8
    command = [sys.executable, "-c", KILLED.format(whole=1, sweep=sweep)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    parts = {pattern: sorted(Path(sweep.registry).glob(pattern)) for pattern in ("draws/*/part-0*", "scores/*/*/part-0*")}
    drawn, scored = ([part.stem.split("-")[1:3] for part in found] for found in parts.values())
    assert (len(drawn), len(scored)) == (2, 1) and scored[0] in drawn
    num_drawn, num_scored = (sum(40 * (int(last) - int(first)) for first, last in rows) for rows in (drawn, scored))
    assert run(sweep, "--retry") == 0
    assert ask(sweep, COUNTS.format("tiny")) == [(1600 - num_drawn, num_drawn, 1600 - num_scored)]
    alone = sweep_in(tmp_path / "alone", pair)
    assert run(replace(alone, cell=sweep.cell)) == 0
    assert ask(sweep, TEXTS) == ask(alone, TEXTS)
    assert_equal_curves(sweep, alone)


@pytest.mark.slow
def test_what_was_drawn_when_scoring_failed_is_only_scored_by_the_next_start(
    pair: TinyPair, undisturbed: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    def fail(self: CellDraws, unit: Any, table: Any) -> None:
        raise OSError("no")

    sweep = sweep_in(tmp_path, pair)
    with monkeypatch.context() as patch:
        patch.setattr(CellDraws, "publish_scores", fail)
        assert run(sweep) == 1
    assert ask(sweep, "SELECT count(*), count(scores_key), count(error) FROM draws") == [(320, 0, 0)]
    assert ask(sweep, "SELECT count(*) FROM best_draws") == [(0,)]
    request.getfixturevalue("no_av")
    assert run(sweep, "--retry") == 0
    assert ask(sweep, COUNTS.format("tiny")) == [(0, 320, 320)]
    assert_equal_curves(sweep, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("phases", [False, True])
def test_two_ranks_share_what_is_only_to_be_scored(finished: Sweep, other_ar: str, tmp_path: Path, phases: bool) -> None:
    asked = ("sampling.num_draws=12",) if phases else ()
    second = named(finished, "second", ar=other_ar)
    two = replace(second, resources=Resources(cluster="local", gpus=0, tasks=2, phases=phases))
    assert run(two, *asked) == 0
    new = 160 if phases else 0
    assert ask(two, COUNTS.format("second")) == [(new, 320, 320 + new)]
    assert ask(two, "SELECT num_ranks FROM runs WHERE sweep = 'second'") == [(2,)]
    alone = replace(second, registry=str(tmp_path / "alone"))
    assert run(alone, *asked) == 0
    assert_equal_curves(two, alone)


# --- registries of earlier versions ---

UNCHANGED = (
    "SELECT * EXCLUDE (draws_key, scores_key, num_draws_scored, draws_bytes, scores_bytes) FROM runs ORDER BY run_id",
    "SELECT * EXCLUDE (replicates) FROM run_curves ORDER BY run_id, k",
    "SELECT * EXCLUDE (draws_key, scores_key) FROM draws ORDER BY cell, activation, draw",
    "SELECT * EXCLUDE (draws_key, scores_key) FROM best_draws ORDER BY cell, activation",
    "SELECT * FROM texts ORDER BY text, activation, draw".replace("*", "activation, draw, text, token_ids, context"),
    "SELECT * FROM v_compare ORDER BY run_id, other_run_id, k",
)


@pytest.mark.slow
def test_a_registry_of_an_earlier_version_reads_as_before(finished: Sweep) -> None:
    assert run(finished, "sampling.temperature=0.7") == 0
    before = [ask(finished, question) for question in UNCHANGED]
    report = read_report_data(Path(finished.registry), "tiny")
    [(a,), (b,)] = ask(finished, "SELECT run_id FROM runs ORDER BY finished")
    difference = diff_runs(Path(finished.registry), a, b)
    make_earlier(finished.registry)
    assert [ask(finished, question) for question in UNCHANGED] == before
    assert ask(finished, "SELECT count(*), count(scores_key) FROM draws") == [(640, 0)]
    again = read_report_data(Path(finished.registry), "tiny")
    assert again.errors == report.errors and again.explanations == report.explanations
    assert diff_runs(Path(finished.registry), a, b) == difference
    assert run(finished, "sampling.temperature=0.7", "--dry-run") == 0 and len(ask(finished, "FROM runs")) == 2


@pytest.mark.trials
@pytest.mark.slow
@pytest.mark.parametrize("named_by", ["identity.json", "its key alone"])
def test_a_registry_of_an_earlier_version_is_extended_without_computing_anything_again(
    finished: Sweep, other_ar: str, tmp_path: Path, named_by: str, request: pytest.FixtureRequest
) -> None:
    make_earlier(finished.registry)
    [earlier] = [path for path in Path(finished.registry).glob("draws/*") if path.name != "_schema"]
    if named_by != "identity.json":
        (earlier / "identity.json").unlink()
    content = {path: path.read_bytes() for path in earlier.iterdir()}
    more = replace(finished, name="more")
    size = sum(len(data) for path, data in content.items() if path.name.startswith("part-"))
    keys = cell_keys(resolve_cell(finished.cell))
    store = CellDraws(Path(finished.registry), keys.draws, keys.scores, keys.combined)
    assert store.bytes_to_take_over(40, 12) == size
    assert run(more, "sampling.num_draws=12") == 0
    assert ask(more, COUNTS.format("more")) == [(160, 320, 160)]
    request.getfixturevalue("no_av")
    if named_by == "identity.json":
        second = named(finished, "second", ar=other_ar)
        assert run(second) == 0 and ask(second, COUNTS.format("second")) == [(0, 320, 320)]
    assert {path: path.read_bytes() for path in earlier.iterdir()} == content
    request.getfixturevalue("monkeypatch").undo()
    for sweep, asked in ((more, ["sampling.num_draws=12"]), *([(second, [])] if named_by == "identity.json" else [])):
        alone = replace(sweep, registry=str(tmp_path / sweep.name))
        assert run(alone, *asked) == 0
        assert_equal_curves(sweep, alone)


@pytest.mark.trials
@pytest.mark.slow
def test_a_registry_that_an_earlier_version_wrote_is_read_and_extended_also_by_another_reading_of_the_ar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tests/fixtures/earlier_registry, written at commit e6a6435."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FIXTURES / "earlier_registry", "registry")
    shutil.copy(FIXTURES / "earlier_registry" / "rows.jsonl", "rows.jsonl")
    case = FIXTURES / "tae" / "gpt2_patch_all"
    [file] = case.glob("*.pt")
    sweep = Sweep(
        name="earlier",
        cell=Cell(
            autoencoder=Autoencoder(checkpoint=str(file), base=str(case / "base"), dtype="float32"),
            activations=Activations(
                text="rows.jsonl", num_activations=8, rows="first", min_position=4, max_length=100, dtype="float32"
            ),
            sampling=Sampling(num_draws=4), scoring=Scoring(num_replicates=50),
        ),
        axes={"sampling.temperature": (0.7, 1.0)}, resources=Resources(cluster="inprocess", gpus=0),
    )  # fmt: skip
    rows = ask(sweep, "SELECT label, k, fve FROM curves ORDER BY label, k")
    # As that version printed them.
    assert [(label, k, round(fve, 3)) for label, k, fve in rows if k in (1, 4)] == [
        ("temperature=0.7", 1, -1.503), ("temperature=0.7", 4, -1.173), ("temperature=1", 1, -1.467), ("temperature=1", 4, -1.111)
    ]  # fmt: skip
    texts = ask(sweep, "SELECT activation, draw, text FROM draws WHERE cell LIKE '%=1 %' ORDER BY activation, draw")
    assert run(sweep) == 0 and ask(sweep, "SELECT count(*) FROM runs") == [(2,)], "finished runs are seen as finished"
    again = replace(sweep, name="again", axes={"sampling.temperature": (1.0,)})
    assert run(again, "scoring.seed=1") == 0
    assert run(again, "autoencoder.encoder_prompt=text", "sampling.num_draws=6") == 0
    assert ask(sweep, COUNTS.format("again")) == [(0, 32, 0), (16, 32, 48)]
    fve = "SELECT fve FROM curves WHERE label = '{}' AND sweep = '{}' ORDER BY k"
    of_seed_1 = "FROM run_curves AS c JOIN runs USING (run_id) WHERE (spec->>'$.scoring.seed') = '1' ORDER BY k"
    seeded = ask(sweep, f"SELECT c.fve {of_seed_1}")
    np.testing.assert_allclose(seeded, ask(sweep, fve.format("temperature=1", "earlier")), rtol=1e-12)
    [(key,)] = ask(sweep, "SELECT DISTINCT draws_key FROM runs WHERE sweep = 'again'")
    stored = f"SELECT activation, draw, text FROM texts WHERE draws_key = '{key}' AND draw < 4 ORDER BY activation, draw"
    assert ask(sweep, stored) == texts


@pytest.mark.slow
def test_a_series_of_ars_scores_the_same_draws_and_is_a_training_curve_by_step(
    finished: Sweep, pair: TinyPair, other_ar: str, no_av: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step, source in (("iter_0000100", pair.ar), ("iter_0000020", other_ar)):
        shutil.copytree(source, tmp_path / "runs" / step / "ar")
    series = replace(finished, name="series")
    assert run(series, f"autoencoder.ar={tmp_path}/runs/iter_*/ar") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("step=")] == [
        "step=20",
        "step=100",
    ]
    found = ask(series, "SELECT label, step FROM v_sweep_cells WHERE sweep = 'series' ORDER BY place")
    assert found == [("step=20", 20), ("step=100", 100)], "the second is a cell that the other sweep computed"
    assert ask(series, "SELECT sum(num_draws_sampled), sum(num_draws_scored) FROM runs WHERE sweep = 'series'") == [(0, 320)]
    with connect(series.registry) as connection:
        points = rows_in(charts.fve_by_step(connection, sweep="series"))[0]
    assert [(point["step"], point["k"]) for point in points] == [(20, 1), (20, 8), (100, 1), (100, 8)]
    assert [curve.step for curve in load_cells(series.registry, ["series"])] == [20, 100]
    of_python, of_sql = results("series", series.registry).curves, named_curves(Path(series.registry), ["series"])
    assert set(of_python["step"].to_pylist()) == set(of_sql["step"].to_pylist()) == {20, 100}
    assert all(point["fve_low"] < point["fve"] < point["fve_high"] for point in points)


@pytest.mark.slow
def test_a_series_in_a_hub_repository_runs_and_its_records_state_the_commits(
    finished: Sweep, pair: TinyPair, other_ar: str, no_av: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {"av": pair.av, "iter_0000020/ar": Path(other_ar), "iter_0000100/ar": pair.ar}
    files = {f"{name}/{file.name}": file.read_bytes() for name, folder in folders.items() for file in folder.iterdir()}
    with serving_hub() as hub:
        hub.repositories["owner/nla"] = HubRepository({"v1": files | {"iter_0000100/optim_latest.pt": b""}})
        use_hub(monkeypatch, hub.endpoint, str(tmp_path / "cache"))
        series = replace(finished, name="on_hub")
        assert run(series, "autoencoder.av=owner/nla@v1/av", "autoencoder.ar=owner/nla@v1/iter_*/ar", "sampling.seed=0") == 0
        commit = hub.repositories["owner/nla"].commit_of("v1")
        assert "value_head.safetensors" in str(hub.asked_files()) and hub.asked_files() <= files.keys()
    found = ask(series, "SELECT label, step, revisions FROM runs WHERE sweep = 'on_hub' ORDER BY step")
    assert found == [("step=20", 20, [f"owner/nla@{commit}/av", f"owner/nla@{commit}/iter_0000020/ar"])], "the other was there"
