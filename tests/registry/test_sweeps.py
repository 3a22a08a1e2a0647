"""What was asked is kept, whoever computed the cells."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from ksweep import Resources, Sweep, connect
from ksweep.registry import sweeps
from ksweep.registry.database import ingest_landings, rebuild_database
from ksweep.registry.run_record import write_run
from ksweep.registry.sweeps import SweepCell, SweepRecord
from tests.registry.landed_runs import curve_of, record_of
from tests.tiny_sweeps import run, talking_pair, tiny_cell

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


def asking(*keys: str, minutes: int = 0, **changes: Any) -> SweepRecord:
    cells = tuple(SweepCell(cell_key=key, label=f"label of {key}", place=place) for place, key in enumerate(keys))
    plain = {"sweep": "warm", "question": "How warm?", "cells": cells, "asked": NOON + timedelta(minutes=minutes)}
    return SweepRecord(**plain | {"argv": ("warm.py",), "git_commit": "c0ffee", "git_dirty": False} | changes)


def rows(root: Path, question: str) -> list[tuple[Any, ...]]:
    with connect(root) as connection:
        return connection.execute(question).fetchall()


def files(root: Path) -> list[Path]:
    return sorted((root / "sweeps").glob("*"))


def test_asking_the_same_again_lands_nothing_new(root: Path) -> None:
    first = sweeps.write_sweep_record(root, asking("a", "b"))
    assert sweeps.write_sweep_record(root, asking("a", "b", minutes=5, argv=("other.py",), git_commit=None)) == first
    assert len(files(root)) == 1


@pytest.mark.parametrize(
    "other",
    [asking("a"), asking("b", "a"), asking("a", "b", question="How cold?"), asking("a", "b", "c")],
    ids=["fewer", "order", "question", "more"],
)
def test_asking_something_else_and_the_first_again_each_land(root: Path, other: SweepRecord) -> None:
    for asked in (asking("a", "b"), other, asking("a", "b")):
        sweeps.write_sweep_record(root, asked)
    assert len(files(root)) == 3
    assert rows(root, "SELECT question, num_cells, number FROM v_sweeps") == [("How warm?", 2, 2)]
    assert rows(root, "SELECT cell_key FROM v_sweep_cells ORDER BY place") == [("a",), ("b",)]


def test_newest_asking_wins_even_when_a_clock_was_wrong(root: Path) -> None:
    sweeps.write_sweep_record(root, asking("a", minutes=60))
    sweeps.write_sweep_record(root, asking("b", minutes=0))
    assert rows(root, "SELECT cell_key FROM v_sweep_cells") == [("b",)]


def test_cells_of_an_asking_keep_order_and_labels_and_find_runs_of_other_sweeps(root: Path) -> None:
    done = record_of("r1", temperature=0.7, sweep="earlier")
    failed = record_of("r2", temperature=1.0, sweep="earlier", status="failed", error_type="RunError", error_message="x")
    write_run(root, done, curve_of())
    write_run(root, failed)
    sweeps.write_sweep_record(root, asking("never", done.cell_key, failed.cell_key))
    found = rows(root, "SELECT place, label, status, run_id, run_by FROM v_sweep_cells WHERE sweep = 'warm' ORDER BY place")
    assert found == [
        (0, "label of never", "not run", None, None),
        (1, f"label of {done.cell_key}", "finished", "r1", "earlier"),
        (2, f"label of {failed.cell_key}", "failed", None, "earlier"),
    ]


def test_a_sweep_without_an_asking_is_what_its_runs_tell_of(root: Path) -> None:
    write_run(root, record_of("r1", temperature=1.0, minutes=1), curve_of())
    write_run(root, record_of("r2", temperature=0.4, minutes=2), curve_of())
    write_run(root, record_of("r3", temperature=1.0, num_draws=2, minutes=3), curve_of(num_draws=2))
    found = rows(root, "SELECT sweep, place, label, run_id FROM v_sweep_cells ORDER BY place")
    assert found == [("temp_sweep", 0, "temperature=0.4", "r2"), ("temp_sweep", 1, "temperature=1", "r3")]
    assert rows(root, "FROM v_sweeps") == []


@pytest.mark.slow
def test_askings_are_rebuilt_row_for_row_and_disappear_with_their_file(root: Path) -> None:
    for asked in (asking("a"), asking("a", "b"), asking("z", sweep="other", question="")):
        sweeps.write_sweep_record(root, asked)
        ingest_landings(root)
    question = "SELECT s.*, c.* FROM sweeps AS s JOIN sweep_cells AS c USING (sweep_id) ORDER BY ALL"
    step_by_step = rows(root, question)
    rebuild_database(root)
    assert rows(root, question) == step_by_step and len(step_by_step) == 4
    assert not ingest_landings(root).changed
    files(root)[0].unlink()
    report = ingest_landings(root)
    assert (report.num_new, report.num_removed) == (0, 0), "no run came or went"
    assert len(rows(root, "FROM sweeps")) == 2


def test_an_altered_asking_is_quarantined_by_name_and_believed_again_when_repaired(root: Path) -> None:
    name = sweeps.write_sweep_record(root, asking("a"))
    path = root / "sweeps" / f"{name}.json"
    whole = path.read_text()
    path.write_text(whole.replace("How warm?", "How cold?"))
    [bad] = ingest_landings(root).quarantined
    assert bad.run_id == f"sweeps/{name}" and "is not what was written" in bad.reason and bad.path == path
    assert rows(root, "FROM v_sweeps") == []
    path.write_text(whole)
    assert ingest_landings(root).quarantined == ()
    assert rows(root, "SELECT question FROM v_sweeps") == [("How warm?",)]


def test_a_renamed_asking_and_one_of_a_later_format_are_refused(root: Path) -> None:
    name = sweeps.write_sweep_record(root, asking("a"))
    path = root / "sweeps" / f"{name}.json"
    path.rename(path.with_name("00000000-000000-0000000000000000.json"))
    later = json.loads(files(root)[0].read_text()) | {"format": 99}
    (root / "sweeps" / "later.json").write_text(json.dumps(later))
    reasons = sorted(bad.reason for bad in ingest_landings(root).quarantined)
    assert "renamed or copied" in reasons[0] and "update ksweep" in reasons[1]
    assert sweeps.write_sweep_record(root, asking("a")) == name, "files that are not ours are in nobody's way"


def _land(root: Path) -> None:
    sweeps.write_sweep_record(root, asking("a", "b"))


@pytest.mark.slow
def test_many_who_ask_the_same_at_once_leave_one_asking(root: Path) -> None:
    with multiprocessing.get_context("fork").Pool(8) as pool:
        pool.map(_land, [root] * 32)
    assert len(files(root)) == 1
    assert len(rows(root, "FROM sweep_cells")) == 2


@pytest.mark.slow
def test_a_sweep_whose_cells_another_one_computed_keeps_its_question_cells_and_command(tmp_path: Path) -> None:
    pair = talking_pair(tmp_path, num_rows=60)
    first = Sweep(
        name="first", question="How?", cell=tiny_cell(pair, num_replicates=20), resources=Resources(cluster="inprocess", gpus=0),
        registry=str(tmp_path / "registry"), vector_cache=str(tmp_path / "vector_cache"),
    )  # fmt: skip
    root = Path(first.registry)
    assert run(first, "--dry-run", "sampling.temperature=[0.7,1.3]") == 0
    assert not (root / "sweeps").exists()
    assert run(first, "sampling.temperature=[0.7,1.3]") == 0
    second = replace(first, name="second", question="Why?", axes={"sampling.temperature": (1.3, 0.7)})
    assert run(second) == 0
    found = rows(root, "SELECT sweep, label, status, run_by FROM v_sweep_cells ORDER BY sweep, place")
    assert found == [
        ("first", "temperature=0.7", "finished", "first"),
        ("first", "temperature=1.3", "finished", "first"),
        ("second", "temperature=1.3", "finished", "first"),
        ("second", "temperature=0.7", "finished", "first"),
    ]
    assert run(second) == 0
    [(question, argv, num_cells)] = rows(root, "SELECT question, argv, num_cells FROM sweeps WHERE sweep = 'second'")
    assert (question, num_cells) == ("Why?", 2) and argv
