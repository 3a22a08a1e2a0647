"""Whole sweeps on a tiny random autoencoder: the path a user takes, from the experiment file to the registry."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ksweep import Resources, Sweep
from tests.tiny_models import TinyPair, edit_sidecar
from tests.tiny_sweeps import ask, run, talking_pair, tiny_cell

pytestmark = pytest.mark.usefixtures("forked_python")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    return talking_pair(tmp_path_factory.mktemp("tiny"), num_rows=60)


def sweep_in(folder: Path, pair: TinyPair) -> Sweep:
    return Sweep(
        name="tiny",
        cell=tiny_cell(pair, num_replicates=200),
        resources=Resources(cluster="inprocess", gpus=0),
        registry=str(folder / "registry"),
        vector_cache=str(folder / "vector_cache"),
    )  # fmt: skip


@pytest.fixture
def sweep(pair: TinyPair, tmp_path: Path) -> Sweep:
    """Nothing of it has run."""
    return sweep_in(tmp_path, pair)


@pytest.fixture(scope="module")
def undisturbed(pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """It has run once, and is only read from; `finished` is a copy."""
    sweep = sweep_in(tmp_path_factory.mktemp("undisturbed"), pair)
    assert run(sweep) == 0
    return sweep


@pytest.fixture
def finished(undisturbed: Sweep, pair: TinyPair, tmp_path: Path) -> Sweep:
    """It has run once."""
    shutil.copytree(Path(undisturbed.registry).parent, tmp_path, dirs_exist_ok=True)
    (tmp_path / "registry" / "ksweep.duckdb").unlink()  # its views name the files of the original
    return sweep_in(tmp_path, pair)


def texts(sweep: Sweep) -> list[tuple[Any, ...]]:
    return ask(sweep, "SELECT activation, draw, text, token_ids FROM draws ORDER BY draws_key, activation, draw")


def curve(sweep: Sweep) -> np.ndarray:
    return np.array(ask(sweep, "SELECT fve, fve_low, fve_high, error, cosine, shuffled_fve FROM curves ORDER BY cell, k"))


@pytest.mark.slow
def test_a_sweep_ends_in_curves_draws_runs_and_a_table(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(sweep, "sampling.temperature=[0.7,1.0]") == 0
    out = capsys.readouterr().out
    assert "temperature=0.7" in out and "K=8" in out and "computed 2 of 2 cells" in out
    rows = ask(sweep, "SELECT cell, k, fve, fve_low, fve_high FROM curves ORDER BY 1, 2")
    assert [k for _, k, *_ in rows] == [1, 2, 3, 4, 5, 6, 7, 8] * 2
    assert all(low <= fve <= high for _, _, fve, low, high in rows)
    assert ask(sweep, "SELECT count(*), count(DISTINCT activation), count(error) > 100 FROM draws") == [(640, 40, True)]
    runs = ask(sweep, "SELECT status, num_draws_sampled, failure_rate, git_commit IS NOT NULL FROM runs ORDER BY temperature")
    failed = ask(sweep, "SELECT count(*) FILTER (error IS NULL) / 320 FROM draws GROUP BY draws_key, cell ORDER BY cell")
    assert [run[:2] + run[3:] for run in runs] == [("finished", 320, True)] * 2
    assert [run[2] for run in runs] == [rate for (rate,) in failed]


@pytest.mark.slow
def test_the_curve_is_what_the_stored_draws_give_by_hand(undisturbed: Sweep) -> None:
    errors = np.array(ask(undisturbed, "SELECT coalesce(error, 2.0) FROM draws ORDER BY activation, draw")).reshape(40, 8)
    [(baseline,)] = ask(undisturbed, "SELECT DISTINCT baseline FROM curves")
    by_k = dict(ask(undisturbed, "SELECT k, fve FROM curves"))
    assert by_k[1] == pytest.approx(1 - errors.mean() / baseline, abs=1e-12)
    # No successful error exceeds 2 here by much; failures rank last whatever their value.
    known = np.array(ask(undisturbed, "SELECT coalesce(min(error), 2.0) FROM draws GROUP BY activation ORDER BY activation"))
    assert by_k[8] == pytest.approx(1 - known.mean() / baseline, abs=1e-12)


@pytest.mark.slow
def test_the_second_run_computes_nothing(
    finished: Sweep, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = curve(finished)
    monkeypatch.setattr("ksweep.launch.local_executor.start_local_job", lambda *_: pytest.fail("a job was submitted"))
    assert run(finished) == 0
    assert "computed 0 of 1 cells" in capsys.readouterr().out
    assert ask(finished, "SELECT count(*) FROM runs") == [(1,)]
    np.testing.assert_array_equal(curve(finished), before)


@pytest.mark.slow
def test_texts_do_not_depend_on_the_batch_size(sweep: Sweep, undisturbed: Sweep) -> None:
    assert run(sweep, "batch_size=32") == 0
    assert texts(sweep) == texts(undisturbed) and len(texts(sweep)) == 320
    np.testing.assert_allclose(curve(sweep), curve(undisturbed), atol=1e-5)


@pytest.mark.slow
def test_two_ranks_draw_cells_in_one_stream_as_one_rank_draws_each(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    one = replace(sweep, axes={"sampling.temperature": (0.7, 1.0, 0.0)}, resources=replace(sweep.resources, cells_per_job=1))
    two = replace(
        one, registry=str(tmp_path / "two" / "registry"), vector_cache=str(tmp_path / "two" / "vectors"),
        resources=Resources(cluster="local", gpus=0, tasks=2),
    )  # fmt: skip
    assert run(one) == 0 and run(two) == 0
    assert ask(two, "SELECT status, num_ranks FROM runs") == [("finished", 2)] * 3
    assert texts(two) == texts(one) and len(texts(one)) == 320 + 320 + 40
    np.testing.assert_allclose(curve(two), curve(one), atol=1e-5)


@pytest.mark.slow
def test_growing_draws_and_activations_takes_only_what_is_missing(sweep: Sweep, undisturbed: Sweep) -> None:
    assert run(sweep, "sampling.num_draws=4", "activations.num_activations=20") == 0
    assert run(sweep) == 0
    assert ask(sweep, "SELECT num_draws_sampled, num_draws_reused FROM runs ORDER BY finished") == [(80, 0), (240, 80)]
    grown = {row[:2]: row[2:] for row in texts(sweep)}
    assert [grown[row[:2]] == row[2:] for row in texts(undisturbed)] == [True] * 320
    newest = "SELECT fve, shuffled_fve FROM curves WHERE num_draws = 8 ORDER BY k"
    np.testing.assert_allclose(ask(sweep, newest), ask(undisturbed, newest), atol=1e-5)
    controls = "SELECT value FROM controls JOIN runs USING (run_id) WHERE num_draws = 8 ORDER BY control"
    np.testing.assert_allclose(ask(sweep, controls), ask(undisturbed, controls), atol=1e-5)
    assert run(sweep, "sampling.num_draws=4", "activations.num_activations=30") == 0
    assert ask(sweep, "SELECT num_draws_sampled FROM runs ORDER BY finished DESC LIMIT 1") == [(0,)]


@pytest.mark.slow
def test_another_temperature_shares_the_activations_only(finished: Sweep) -> None:
    cache = {p: p.stat().st_mtime_ns for p in Path(finished.vector_cache).rglob("*.arrow")}
    assert len(cache) > 0 and run(finished, "sampling.temperature=0.5") == 0
    assert {p: p.stat().st_mtime_ns for p in Path(finished.vector_cache).rglob("*.arrow")} == cache
    assert ask(finished, "SELECT count(DISTINCT draws_key), count(DISTINCT activations_key) FROM runs") == [(2, 1)]


def test_the_dry_run_says_what_and_why_and_does_nothing(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(sweep, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "missing" in out and "no draws yet" in out and "320" in out and "disk" in out
    assert not Path(sweep.registry).exists() and not Path(sweep.vector_cache).exists()


def test_the_dry_run_of_a_finished_sweep_counts_the_draws_that_are_there(
    undisturbed: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(undisturbed, "sampling.num_draws=12", "--dry-run") == 0
    assert "320 of 480 draws are there" in capsys.readouterr().out
    assert run(undisturbed, "--dry-run") == 0
    assert "done" in capsys.readouterr().out


@pytest.mark.slow
def test_a_damaged_draws_file_is_set_aside_and_drawn_again(finished: Sweep) -> None:
    before = texts(finished)
    part = next(p for p in Path(finished.registry).glob("draws/*/part-00000000-*.parquet"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 0xFF
    part.write_bytes(bytes(data))
    assert run(finished, "scoring.seed=1") == 0
    assert len(list(part.parent.glob("*.damaged-*"))) == 1
    assert texts(finished) == before


@pytest.mark.slow
def test_what_stands_beside_the_draws_is_made_again_when_it_is_gone(finished: Sweep) -> None:
    before, root = texts(finished), Path(finished.registry)
    paths = [*root.glob("draws/[!_]*/identity.json"), *root.glob("scores/[!_]*/*/*.json")]
    kept = {path: path.read_text() for path in paths}
    assert [path.name for path in paths].count("identity.json") == 2 and len(paths) == 3
    for path in paths:
        path.write_text("{") if path.name == "controls.json" else path.unlink()
    assert run(finished, "scoring.seed=1") == 0
    assert {path: path.read_text() for path in paths} == kept and texts(finished) == before
    assert ask(finished, "SELECT num_draws_sampled FROM runs ORDER BY finished") == [(320,), (0,)]


@pytest.mark.slow
def test_vectors_from_parquet_are_a_source_of_their_own(sweep: Sweep, pair: TinyPair, tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(50, pair.d_model)).astype(np.float32)
    table = pa.table(
        {
            "activation_vector": pa.FixedSizeListArray.from_arrays(vectors.ravel(), pair.d_model),
            "doc_id": [f"d{i}" for i in range(50)],
        }
    )
    pq.write_table(table, tmp_path / "v.parquet")
    assert run(sweep, f"activations.vectors={tmp_path / 'v.parquet'}") == 0
    assert ask(sweep, "SELECT num_activations, num_documents FROM runs") == [(40, 40)]


@pytest.mark.slow
def test_greedy_beside_other_temperatures_takes_one_draw_and_reports_k_one(sweep: Sweep) -> None:
    assert run(sweep, "sampling.temperature=[0,0.7]", "scoring.ks=[2,4]") == 0
    assert ask(sweep, "SELECT temperature, k, num_draws FROM curves ORDER BY 1, 2") == [(0.0, 1, 1), (0.7, 2, 8), (0.7, 4, 8)]
    per_cell = "SELECT temperature, count(*) FROM draws JOIN runs USING (draws_key) GROUP BY temperature ORDER BY temperature"
    assert ask(sweep, per_cell) == [(0.0, 40), (0.7, 320)]


@pytest.mark.slow
def test_pairs_whose_directories_have_the_same_name_stay_apart(
    sweep: Sweep, pair: TinyPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pair.av, tmp_path / "other" / "nla-av")
    edit_sidecar(tmp_path / "other" / "nla-av", extraction__injection_scale=10.0)
    second = replace(sweep.cell.autoencoder, av=str(tmp_path / "other" / "nla-av"))
    both = replace(sweep, axes={"autoencoder": (sweep.cell.autoencoder, second)})
    assert len(set(both.labels())) == 2
    assert run(both) == 0
    assert ask(sweep, "SELECT count(DISTINCT cell), count(*) FROM curves") == [(2, 16)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["smapling.seed=1"], "did you mean sampling.seed"),
        (["sampling.temperature=-1"], "temperature=-1"),
        (["scoring.ks=[1,64]"], "K=64 but sampling.num_draws=8"),
        (["autoencoder.av=/nowhere/av"], "no AV checkpoint at '/nowhere/av'"),
        (["activations.text=/nowhere.jsonl"], "/nowhere.jsonl"),
        (["activations.model=/nowhere"], "/nowhere"),
        (["activations.layer=0"], "activations are of layer 0"),
        (["registry=/proc/nowhere"], "registry=/proc/nowhere cannot be written"),
        (["scoring.num_replicates=1"], "scoring.num_replicates=1"),
        (["activations.num_activations=1"], "no variance to explain"),
        (["activations.num_activations=100000"], "100000"),
        (["activations.text_column=body"], "body"),
        (["--config", "/nowhere.yaml"], "no configuration file"),
        (["resources.cluster=local", "resources.gpus=99"], "this machine has"),
    ],
)
def test_a_mistake_in_the_request_exits_with_two_and_one_paragraph(
    sweep: Sweep, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert run(sweep, *arguments) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
    assert not list(Path(sweep.registry).glob("landing/*/curve.parquet"))


def test_an_av_given_as_ar_is_refused_by_name(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    av, ar = sweep.cell.autoencoder.av, sweep.cell.autoencoder.ar
    assert run(sweep, f"autoencoder.ar={av}") == 2 and "role" in capsys.readouterr().err
    assert run(sweep, f"autoencoder.av={ar}") == 2 and "role" in capsys.readouterr().err


def test_an_empty_text_file_is_refused(sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("empty.txt", "empty.jsonl"):
        (tmp_path / name).write_text("")
        assert run(sweep, f"activations.text={tmp_path / name}") == 2
        assert name in capsys.readouterr().err


def test_vectors_of_one_document_are_refused_while_planning_unless_the_baseline_needs_no_other(
    sweep: Sweep, pair: TinyPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vectors = np.random.default_rng(0).normal(size=(50, pair.d_model)).astype(np.float32)
    lists = pa.FixedSizeListArray.from_arrays(vectors.ravel(), pair.d_model)
    pq.write_table(pa.table({"activation_vector": lists, "doc_id": ["one"] * 45 + ["two"] * 5}), tmp_path / "v.parquet")
    asked = (f"activations.vectors={tmp_path / 'v.parquet'}", "--dry-run")
    assert run(sweep, *asked) == 2 and "all 40 activations" in capsys.readouterr().err
    for other in ("scoring.baseline=0.7", "scoring.baseline=distance_from_mean", "activations.num_activations=50"):
        assert run(sweep, *asked, other) == 0
    assert not list(Path(sweep.vector_cache).glob("*"))


def test_a_bad_vector_in_the_middle_is_landed_as_a_failed_run(
    sweep: Sweep, pair: TinyPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vectors = np.random.default_rng(0).normal(size=(50, pair.d_model)).astype(np.float32)
    vectors[30, 3] = np.nan
    table = pa.table({"activation_vector": pa.FixedSizeListArray.from_arrays(vectors.ravel(), pair.d_model)})
    pq.write_table(table, tmp_path / "v.parquet")
    assert run(sweep, f"activations.vectors={tmp_path / 'v.parquet'}") == 2
    assert "30" in capsys.readouterr().err
    assert ask(sweep, "SELECT status, error_class, error_type FROM runs") == [("failed", "bad input", "DataError")]
    assert ask(sweep, "SELECT count(*) FROM curves") == [(0,)]


@pytest.mark.slow
def test_a_full_disk_exits_with_one_says_so_and_leaves_nothing_half_written(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ksweep.registry.part_store.PartStore._write", full)
    assert run(sweep) == 1
    error = capsys.readouterr().err
    assert "is full" in error and "Traceback" not in error
    assert not [p for p in Path(sweep.registry).glob("draws/*/*part*") if p.parent.name != "_schema"]
    monkeypatch.undo()
    assert run(sweep) == 0


@pytest.mark.slow
def test_a_cell_that_failed_is_reported_and_run_again_only_with_retry(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a bug in the statistics")

    monkeypatch.setattr("ksweep.evaluation.cell_statistics.summarise", broken)
    assert run(sweep) == 1
    monkeypatch.undo()
    capsys.readouterr()
    assert run(sweep, "--dry-run") == 0 and "failed" in capsys.readouterr().out
    assert run(sweep) == 1
    error = capsys.readouterr().err
    assert "a bug in the statistics" in error and "--retry" in error
    assert ask(sweep, "SELECT status FROM runs") == [("failed",)]
    assert run(sweep, "sampling.temperature=[0.7,1.0]") == 1  # the other cell is measured, and this one still is not
    assert "temperature=0.7" in capsys.readouterr().out
    assert run(sweep, "--retry") == 0
    assert ask(sweep, "SELECT status FROM runs ORDER BY finished") == [("failed",), ("finished",), ("finished",)]


def test_a_disk_that_is_too_small_is_refused_before_anything_starts(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ksweep.launch.preflight.BYTES_PER_DRAW", 10**15)
    assert run(sweep) == 1
    assert "nothing was started" in capsys.readouterr().err
    assert not list(Path(sweep.vector_cache).rglob("*.arrow"))


def test_the_dry_run_refuses_a_disk_that_is_too_small_and_makes_nothing(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(sweep, "--dry-run") == 0
    # 40 float32 vectors of 32 numbers with their provenance; 40 x 8 draws of 700 bytes.
    assert "disk about 242.3 kB (18.3 kB activations, 224.0 kB draws)" in capsys.readouterr().out
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100_000))
    assert run(sweep, "--dry-run") == 1
    captured = capsys.readouterr()
    assert "18.3 kB activations" in captured.out, "the plan is shown before the refusal"
    assert "100.0 kB are free: nothing was started. Free some room" in captured.err
    assert not Path(sweep.registry).exists() and not Path(sweep.vector_cache).exists()


@pytest.mark.slow
@pytest.mark.trials
def test_a_run_killed_at_random_moments_ends_with_the_draws_of_an_undisturbed_one(
    sweep: Sweep, undisturbed: Sweep, tmp_path: Path
) -> None:
    other = replace(sweep, registry=str(tmp_path / "killed" / "registry"), vector_cache=str(tmp_path / "killed" / "vectors"))
    script = tmp_path / "experiment.py"
    script.write_text(f"from ksweep import *\nfrom ksweep.config.spec import *\nsweep_main({other!r})\n")
    moments = random.Random(1)
    killed = 0
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, script, "--no-charts", "--retry"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
        try:
            while not killed and not Path(other.registry).exists():
                time.sleep(0.01)
            process.wait(moments.uniform(0.05, 0.6) if killed else 0.0)  # the first as soon as it has begun
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
    else:
        assert run(other, "--retry") == 0
    assert killed
    assert texts(other) == texts(undisturbed)
    np.testing.assert_allclose(curve(other), curve(undisturbed), atol=1e-6)
