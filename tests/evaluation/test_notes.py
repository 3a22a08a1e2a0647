"""Notes of checks: from the check into the run's record, the database, the table, `ksweep show` and the page."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ksweep import Resources, Sweep, connect
from ksweep.analysis.report import write_report
from ksweep.autoencoder.family import family_of
from ksweep.autoencoder.norms import norm_notes
from ksweep.cli import main
from ksweep.config.presets import demo_pair
from ksweep.registry.run_record import read_run, write_run
from ksweep.utils import notes as module
from ksweep.utils.errors import RunError
from ksweep.utils.notes import Note, load_notes, notes_of, save_notes
from tests.registry.landed_runs import curve_of, record_of
from tests.tae_sweeps import checkpoint, sweep_over
from tests.tae_sweeps import run as run_tae
from tests.tiny_models import TinyPair, edit_sidecar
from tests.tiny_sweeps import run, talking_pair, tiny_cell


@pytest.fixture
def pair(tmp_path: Path) -> TinyPair:
    pair = talking_pair(tmp_path, num_rows=60)
    for path in (pair.av, pair.ar):
        edit_sidecar(path, base_checkpoint=f"tiny/{pair.base.name}")  # whose directory tells the base by its name
    return pair


@pytest.fixture
def sweep(pair: TinyPair, tmp_path: Path) -> Sweep:
    return Sweep(
        name="noted", cell=tiny_cell(pair, num_replicates=20), resources=Resources(cluster="inprocess", gpus=0),
        registry=str(tmp_path / "registry"), vector_cache=str(tmp_path / "vector_cache"),
        axes={"sampling.temperature": (0.7, 1.3)},
    )  # fmt: skip


def notes_in(sweep: Sweep) -> list[list[dict[str, str]]]:
    with connect(sweep.registry) as connection:
        return [notes for (notes,) in connection.execute("SELECT notes FROM runs ORDER BY finished").fetchall()]


def median_norm(sweep: Sweep) -> float:
    with connect(sweep.registry) as connection:
        [(value,)] = connection.execute("SELECT median(norm) FROM activations").fetchall()
    return float(value)


def vectors(norm: float, spread: float = 0.1, count: int = 100) -> Any:
    """Vectors of about one norm, the same ones on every call: a generator of their own makes them independent of other tests."""
    generator = np.random.default_rng(0)
    directions = generator.standard_normal((count, 16))
    norms = norm * (1 + spread * generator.uniform(-1, 1, count))
    return (directions / np.linalg.norm(directions, axis=1, keepdims=True) * norms[:, None]).astype(np.float32)


# --- the check of lengths ---


def test_vectors_as_long_as_the_training_ones_or_of_unknown_training_are_not_noted() -> None:
    assert list(norm_notes(vectors(238), 250.0, "x")) == []
    assert list(norm_notes(vectors(1), None, "x")) == []


@pytest.mark.parametrize("trained", [100.0, 600.0])
def test_vectors_much_longer_or_shorter_than_the_training_ones_are_noted_with_both_lengths(trained: float) -> None:
    [note] = norm_notes(vectors(238), trained, "layer10.parquet")
    assert note.about == "norms" and "layer10.parquet have a median norm of 23" in note.text and f"had {trained:.3g}" in note.text


def test_vectors_of_one_length_are_noted_as_normalised_whatever_the_training_had() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        stored = torch.from_numpy(vectors(1, spread=0)).to(dtype).float().numpy()
        [note] = norm_notes(stored, None, "unit.parquet")
        assert "All activations of unit.parquet have the norm 1" in note.text


@pytest.mark.demo
def test_the_demo_pair_knows_its_vectors_and_only_those_of_another_layer_are_noted() -> None:
    trained = family_of(demo_pair()).training_norm()
    # Medians of 300 passages at layers 20, 19 and 10, and the length that the demo's AV injects.
    assert list(norm_notes(vectors(238), trained, "x")) == list(norm_notes(vectors(223), trained, "x")) == []
    for other in (133, 60):
        assert len(list(norm_notes(vectors(other), trained, "x"))) == 1


# --- from a check to where it is read ---


@pytest.mark.slow
def test_a_note_lands_with_each_run_and_stands_in_table_show_and_page(
    sweep: Sweep, pair: TinyPair, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(sweep) == 0
    assert notes_in(sweep) == [[], []] and "note on" not in capsys.readouterr().out
    edit_sidecar(pair.av, training__activation_norm=2 * median_norm(sweep))
    for path in Path(sweep.vector_cache).iterdir():  # as if it had been found while activations were computed
        save_notes(path, [Note("text", "Some rows were left out")])
    assert run(sweep) == 0
    said = "have a median norm of"
    out = capsys.readouterr().out
    assert out.count("note on norms: The activations of") == 1 and said in " ".join(out.split())
    of_second = notes_in(sweep)[2:]
    assert [[note["about"] for note in notes] for notes in of_second] == [["text", "norms"], ["text", "norms"]]
    records = [json.loads(path.read_text()) for path in sorted(Path(sweep.registry).glob("landing/*/record.json"))]
    assert [record["notes"] for record in records[2:]] == of_second
    monkeypatch.setattr("sys.argv", ["ksweep", "show", records[-1]["run_id"], "--registry", sweep.registry])
    with pytest.raises(SystemExit):
        main()
    assert said in " ".join(capsys.readouterr().out.split())
    page = write_report(Path(sweep.registry), "noted").read_text()
    assert page.count(f"Note on norms: {of_second[0][1]['text'][:20]}") == 1


@pytest.mark.slow
def test_a_note_that_some_cells_have_names_them_in_the_table(
    sweep: Sweep, pair: TinyPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(sweep, "sampling.temperature=[0.7]") == 0
    width = 32
    path = tmp_path / "unit.parquet"
    unit = vectors(1, spread=0, count=60)
    unit = np.pad(unit, ((0, 0), (0, width - unit.shape[1])))
    pq.write_table(pa.table({"activation_vector": pa.FixedSizeListArray.from_arrays(unit.reshape(-1), width)}), path)
    given = replace(sweep.cell.activations, model=None, text=None, vectors=str(path), layer=1)
    mixed = replace(sweep, axes={"activations": (sweep.cell.activations, given)})
    capsys.readouterr()
    assert run(mixed) == 0
    [line] = [line for line in capsys.readouterr().out.split("note on ")[1:]]
    [_, label] = mixed.labels()
    assert " ".join(line.split()).startswith(f"norms ({label}): All activations of")


@pytest.mark.slow
def test_notes_of_a_loader_stay_with_the_draws_when_a_later_run_loads_nothing(tmp_path: Path) -> None:
    import shutil

    case = tmp_path / "case"
    shutil.copytree(checkpoint("gemma3_patch_two").parent, case)
    [path] = case.glob("*.pt")
    value = torch.load(path, weights_only=False)
    value["models"]["encoder"]["proj.weight"].copy_(torch.eye(48))
    torch.save(value, path)
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"the of and to in is was he for it {i} " * 4}) for i in range(40)))
    sweep = sweep_over(text, tmp_path)
    arguments = (f"autoencoder.checkpoint={path}", f"autoencoder.base={case / 'base'}", "activations.model=null")
    arguments += ("activations.layer=null",)
    assert run_tae(sweep, "gemma3_patch_two", *arguments) == 0
    assert run_tae(sweep, "gemma3_patch_two", *arguments, "scoring.seed=1") == 0
    first, second = ([note["text"] for note in notes] for notes in notes_in(sweep))
    assert first == second and any("encoder's projection" in text for text in first)
    with connect(sweep.registry) as connection:
        assert connection.execute("SELECT num_draws_sampled > 0 FROM runs ORDER BY finished").fetchall() == [(True,), (False,)]


# --- the record ---


def test_notes_are_distinct_and_in_order_and_objects_without_have_none() -> None:
    a, b = Note("layer", "a"), Note("base model", "b")

    class Checked:
        notes = (b, a)

    assert notes_of(object(), Checked(), Checked()) == (b, a)


def test_kept_notes_come_back_whole_and_a_damaged_one_is_left_out(tmp_path: Path) -> None:
    notes = [Note("prompt", "Grüße: “quoted”."), Note("layer", "one")]
    save_notes(tmp_path, notes)
    save_notes(tmp_path, notes)
    assert len(list(tmp_path.iterdir())) == 2 and set(load_notes(tmp_path)) == set(notes)
    next(tmp_path.glob("note-*.json")).write_text('{"about": "cut sho')
    assert len(load_notes(tmp_path)) == 1
    assert load_notes(tmp_path / "nowhere") == ()


@pytest.mark.parametrize("reason", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_note_in_a_directory_that_cannot_be_written_is_said_and_ends_nothing(
    reason: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refuse_writing(monkeypatch, reason)
    save_notes(tmp_path, [Note("layer", "one"), Note("prompt", "two")])
    assert [record.getMessage() for record in caplog.records] == ["layer: one", "prompt: two"] and load_notes(tmp_path) == ()


def test_a_note_that_a_full_disk_does_not_take_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_writing(monkeypatch, errno.ENOSPC)
    with pytest.raises((OSError, RunError)):
        save_notes(tmp_path, [Note("layer", "one")])


def refuse_writing(monkeypatch: pytest.MonkeyPatch, reason: int) -> None:
    """As a disk would; root may write wherever it is mounted for writing."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(module, "publish", refuse)


def test_records_with_plain_notes_or_none_stay_readable(tmp_path: Path) -> None:
    for name, notes in (("old", ["variance_recovery is not known"]), ("older", ...), ("new", [{"about": "layer", "text": "x"}])):
        record = tmp_path / "landing" / name / "record.json"
        write_run(tmp_path, record_of(name, temperature=0.7), curve_of())
        value = json.loads(record.read_text())
        assert value.pop("notes") == [] and value.pop("digest")
        record.write_text(json.dumps(value if notes is ... else value | {"notes": notes}))
    assert read_run(tmp_path / "landing" / "old").record.notes == (
        Note("reference quantities", "variance_recovery is not known"),
    )  # fmt: skip
    with connect(tmp_path) as connection:
        found = dict(connection.execute("SELECT run_id, notes FROM runs").fetchall())
    assert found["older"] == [] and found["new"] == [{"about": "layer", "text": "x"}]
    assert found["old"][0]["text"] == "variance_recovery is not known"


# --- how draws were computed ---


def engines(sweep: Sweep) -> list[dict[str, str]]:
    with connect(sweep.registry) as connection:
        return [engine for (engine,) in connection.execute("SELECT engine FROM runs ORDER BY finished").fetchall()]


@pytest.mark.slow
def test_a_run_says_batch_settings_threads_and_dtype_of_the_draws_it_sampled(sweep: Sweep) -> None:
    assert run(sweep, "sampling.temperature=0.7", "batch_size=7") == 0
    assert run(sweep, "sampling.temperature=0.7", "scoring.seed=1") == 0
    assert run(sweep, "sampling.temperature=1.3", "autoencoder.dtype=bfloat16") == 0
    asked, reused, free = engines(sweep)
    assert reused == {}, "nothing was sampled"
    assert asked["batch_size"] == asked["draws_in_flight"] == asked["texts_at_once"] == "7" and asked["dtype"] == "float32"
    assert free["batch_size"] == "auto" and free["draws_in_flight"] == str(40 * 8) and free["dtype"] == "bfloat16"
    for engine in (asked, free):
        assert engine["threads"] == str(torch.get_num_threads()) and engine["sampler"] == "slots"
        assert {"attention", "tf32", "cuda_graphs", "prompts_at_once"} <= engine.keys()


@pytest.mark.slow
def test_a_batch_that_was_halved_for_memory_says_both_sizes(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    from ksweep.inference.kv_cache import KVCache

    whole = KVCache.__init__

    def small(self: KVCache, *arguments: Any, **named: Any) -> None:
        if arguments[2] > 100:
            raise torch.OutOfMemoryError("out of memory: only a hundred slots here")
        whole(self, *arguments, **named)

    monkeypatch.setattr(KVCache, "__init__", small)
    assert run(sweep, "sampling.temperature=0.7") == 0
    [engine] = engines(sweep)
    assert engine["draws_in_flight"] == "320 then 160 then 80" and engine["batch_size"] == "auto"


def test_records_that_kept_the_engine_among_the_packages_are_read_as_if_they_had_one(tmp_path: Path) -> None:
    write_run(tmp_path, record_of("old", temperature=0.7), curve_of())
    record = tmp_path / "landing" / "old" / "record.json"
    value = json.loads(record.read_text())
    del value["engine"], value["digest"]
    value["packages"] = {"torch": "2.9", "attention": "sdpa", "tf32": "off", "cuda_graphs": "on"}
    record.write_text(json.dumps(value))
    with connect(tmp_path) as connection:
        [(packages, engine)] = connection.execute("SELECT packages, engine FROM runs").fetchall()
    assert packages == {"torch": "2.9"} and engine == {"attention": "sdpa", "tf32": "off", "cuda_graphs": "on"}
