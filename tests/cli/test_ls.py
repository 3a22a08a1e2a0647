"""ksweep ls: cells under way and runs that have ended in one list, the newest first."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ksweep.launch.rank_records import Outcome
from ksweep.registry.run_record import write_run
from ksweep.utils import console as console_module
from tests.job_directories import job, ksweep, me
from tests.registry.landed_runs import controls_of, curve_of, record_of

NUMBERS = {"fve": 0.31, "fve_low": 0.25, "fve_high": 0.35, "tokens_per_second": 120.0}


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    """A finished run of an earlier day, a failed one, and a job that is at the second of its three cells."""
    path = tmp_path / "registry"
    path.mkdir()
    write_run(path, record_of("r0", temperature=0.4, minutes=0, sweep="old"), curve_of(0.3), controls_of())
    write_run(
        path, record_of("r1", minutes=5, sweep="old", status="failed", error_type="out of memory", error_message="rank 1 is full")
    )
    running = job(path, "tiny", "a", "b", "c")
    running.write_heartbeat(me(phase="b: drawing", done=50, total=200, numbers=NUMBERS))
    os.utime(running.path / "job.json", (0, 0))  # submitted long before the run of its first cell ended
    write_run(path, record_of("r2", minutes=9, sweep="tiny", cell_key="key of a"), curve_of(0.5), controls_of())
    return path


def rows(registry: Path, *words: str) -> list[dict[str, Any]]:
    code, out = ksweep(registry, "ls", "--json", *words)
    assert code == 0, out
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


def test_ls_lists_cells_under_way_before_runs_that_have_ended(registry: Path) -> None:
    found = [(r["cell"].partition(" @")[0], r["state"], r["done"], r["total"], r["fve"], r["k"]) for r in rows(registry)]
    assert found[:2] == [("b", "running", 50, 200, 0.31, 1), ("c", "waiting", None, None, None, None)]
    assert [(state, fve, k) for _, state, _, _, fve, k in found[2:]] == [
        ("finished", 0.53, 4),  # curve_of(0.5) climbs by 0.01 with each of 4 draws
        ("failed", None, None),
        ("finished", 0.33, 4),
    ]
    assert [r["run"] for r in rows(registry)] == [None, None, "r2", "r1", "r0"]


def test_ls_of_a_job_that_loads_models_is_at_the_first_cell_it_has_not_finished(registry: Path) -> None:
    fresh = job(registry, "fresh", "x", "y")
    fresh.write_heartbeat(me(phase="activations", done=3, total=9))
    assert [(r["cell"][:1], r["state"], r["reason"]) for r in rows(registry, "fresh")] == [
        ("x", "running", "activations"),
        ("y", "waiting", "later in its job"),
    ]


def test_ls_of_a_waiting_job_lists_its_cells_as_waiting(registry: Path) -> None:
    job(registry, "later", "x", "y")  # its launcher, this process, has yet to start it
    assert [(r["state"], "has yet to start it" in r["reason"]) for r in rows(registry, "later")] == [("waiting", True)] * 2


def test_ls_of_a_sweep_and_of_a_state(registry: Path) -> None:
    assert {r["sweep"] for r in rows(registry, "tiny")} == {r["sweep"] for r in rows(registry, "ti")} == {"tiny"}
    assert [r["run"] for r in rows(registry, "--state", "failed")] == ["r1"]
    assert [r["run"] for r in rows(registry, "tiny", "--state", "finished")] == ["r2"]


@pytest.mark.parametrize(
    ("words", "message"), [(["nothing"], "there are old, tiny"), (["--state", "done"], "running, waiting, unknown, finished")]
)
def test_ls_of_what_is_not_there_names_what_is(registry: Path, words: list[str], message: str) -> None:
    code, out = ksweep(registry, "ls", *words)
    assert code == 2 and message in out


def test_ls_with_a_limit_says_how_many_more_there_are(registry: Path) -> None:
    code, out = ksweep(registry, "ls", "--limit", "2")
    assert code == 0 and "3 more, older ones: --limit 0 shows all" in out and "r0" not in out
    assert len(rows(registry, "--limit", "0")) == 5 and "more" not in ksweep(registry, "ls", "--limit", "5")[1]


def test_ls_tells_the_registry_of_jobs_that_ended_unseen(registry: Path) -> None:
    dead = job(registry, "gone", "x")
    dead.write_heartbeat(me().__class__(rank=0, pid=2**22 + 1, host=me().host, process_started=1.0))
    assert not any(r["sweep"] == "gone" and r["state"] in ("running", "waiting") for r in rows(registry))


def test_ls_shows_the_class_of_a_failure_in_the_table_and_as_json(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(
        registry,
        record_of(
            "r3", minutes=7, sweep="old", status="failed", error_class="disk full", error_type="OSError", error_message="no"
        ),
    )
    found = {r["run"]: (r["error_class"], r["reason"]) for r in rows(registry, "--state", "failed")}
    assert found == {"r3": ("disk full", "disk full: no"), "r1": (None, "out of memory: rank 1 is full")}
    out = on_a_terminal(80)()
    monkeypatch.setattr(console_module, "console", lambda: out)
    assert ksweep(registry, "ls", "--state", "failed")[0] == 0
    assert "disk full" in out.file.getvalue()  # type: ignore[attr-defined]


def test_sql_tells_the_registry_of_jobs_that_ended_unseen(registry: Path) -> None:
    dead = job(registry, "gone", "x")
    dead.write_outcome(Outcome(rank=0, status="failed", kind="bug", message="x"))
    code, out = ksweep(registry, "sql", "select error_class from attempts", "--csv")
    assert (code, out) == (0, "error_class\nbug\n") and dead.final_status() is not None


def on_a_terminal(width: int) -> Callable[[], Console]:
    return lambda: Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)


def test_ls_on_eighty_columns_is_a_line_a_row_with_names_that_why_takes(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = on_a_terminal(80)()
    monkeypatch.setattr(console_module, "console", lambda: out)
    assert ksweep(registry, "ls")[0] == 0
    [_, first, *_] = lines = out.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80
    assert "running" in first and "drawing 25%" in first and "0.310 K=1" in first
    assert ksweep(registry, "why", first.split()[0])[0] == 0
