"""ksweep ls: unfinished cells and runs that have ended in one list, the newest first."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ksweep.cli import output as output_module
from ksweep.launch.rank_records import Outcome
from ksweep.registry.run_record import write_run
from ksweep.utils import console as console_module
from tests.job_directories import job, ksweep, me
from tests.registry.landed_runs import controls_of, curve_of, record_of

NUMBERS = {"fve": 0.31, "fve_low": 0.25, "fve_high": 0.35, "tokens_per_second": 120.0}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of an earlier day, a job at the second of its three cells, one that loads models, one that has yet to start."""
    path = tmp_path_factory.mktemp("shared") / "registry"
    path.mkdir()
    write_run(path, record_of("r0", temperature=0.4, minutes=0, sweep="old"), curve_of(0.3), controls_of())
    failed: dict[str, Any] = {"sweep": "old", "status": "failed"}
    write_run(path, record_of("r1", minutes=5, **failed, error_type="out of memory", error_message="rank 1 is full"))
    write_run(path, record_of("r3", minutes=7, **failed, error_class="disk full", error_type="OSError", error_message="no"))
    running = job(path, "tiny", "a", "b", "c")
    running.write_heartbeat(me(phase="b: drawing", done=50, total=200, numbers=NUMBERS))
    os.utime(running.path / "job.json", (0, 0))  # submitted long before the run of its first cell ended
    write_run(path, record_of("r2", minutes=9, sweep="tiny", cell_key="key of a"), curve_of(0.5), controls_of())
    job(path, "fresh", "x", "y").write_heartbeat(me(phase="activations", done=3, total=9))
    job(path, "later", "v", "w")  # its launcher, this process, has yet to start it
    return path


def rows(registry: Path, *words: str) -> list[dict[str, Any]]:
    code, out = ksweep(registry, "ls", "--json", *words)
    assert code == 0, out
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


def test_ls_lists_running_cells_then_waiting_ones_then_runs_that_have_ended(shared: Path) -> None:
    found = [
        (r["run"], r["cell"].partition(" @")[0] if not r["run"] else "", r["state"], r["done"], r["total"], r["fve"], r["k"])
        for r in rows(shared)
    ]
    nothing = (None, None, None, None)
    assert found[:2] == [(None, "x", "running", 3, 9, None, None), (None, "b", "running", 50, 200, 0.31, 1)]
    assert {row[1] for row in found[2:5]} == {"y", "v", "w"} and {row[2:] for row in found[2:6]} == {("waiting", *nothing)}
    assert found[5][1] == "c"
    assert found[6:] == [
        ("r2", "", "finished", None, None, 0.53, 4),  # curve_of(0.5) climbs by 0.01 with each of 4 draws
        ("r3", "", "failed", *nothing),
        ("r1", "", "failed", *nothing),
        ("r0", "", "finished", None, None, 0.33, 4),
    ]
    reasons = {r["cell"].partition(" @")[0]: r["reason"] for r in rows(shared) if not r["run"]}
    assert (reasons["x"], reasons["y"], reasons["b"], reasons["c"]) == (
        "activations", "later in its job", "drawing", "later in its job",
    )  # fmt: skip
    assert "has yet to start it" in reasons["v"] and reasons["v"] == reasons["w"]


def test_ls_of_a_sweep_and_of_a_state(shared: Path) -> None:
    assert {r["sweep"] for r in rows(shared, "tiny")} == {r["sweep"] for r in rows(shared, "ti")} == {"tiny"}
    failed = {r["run"]: (r["error_class"], r["reason"]) for r in rows(shared, "--state", "failed")}
    assert failed == {"r3": ("disk full", "disk full: no"), "r1": (None, "out of memory: rank 1 is full")}
    assert [r["run"] for r in rows(shared, "tiny", "--state", "finished")] == ["r2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [(["nothing"], "there are fresh, later, old, tiny"), (["--state", "done"], "running, waiting, unknown, finished")],
)
def test_ls_of_what_is_not_there_names_what_is(shared: Path, words: list[str], message: str) -> None:
    code, out = ksweep(shared, "ls", *words)
    assert code == 2 and message in out


def test_ls_with_a_limit_says_how_many_more_there_are(shared: Path) -> None:
    code, out = ksweep(shared, "ls", "--limit", "2")
    assert code == 0 and "8 more, older ones: --limit 0 shows all" in out and "r0" not in out
    assert len(rows(shared, "--limit", "0")) == 10 and "more" not in ksweep(shared, "ls", "--limit", "10")[1]


@pytest.mark.slow
def test_ls_shows_how_jobs_ended_unattended_and_finalize_records_it(registry: Path) -> None:
    silent, failed = job(registry, "gone", "x"), job(registry, "gone", "y", "z")
    silent.write_heartbeat(me().__class__(rank=0, pid=2**22 + 1, host=me().host, process_started=1.0))
    failed.write_heartbeat(me(cell="key of z"))
    failed.write_outcome(Outcome(rank=0, status="failed", kind="bug", message="x"))
    for _ in range(2):  # the first has recorded nothing
        found = {(r["cell"][:1], r["state"], r["error_class"], r["run"], r["job"]) for r in rows(registry)}
        assert found == {("x", "stopped", "killed", None, silent.id), ("z", "failed", "bug", None, failed.id)}
    asked = ("sql", "select error_class from attempts order by all", "--csv")
    assert ksweep(registry, *asked) == (0, "error_class\n") and silent.final_status() is None
    code, out = ksweep(registry, "finalize")
    assert code == 0 and f"finalized: {failed.id} has failed (bug: x)" in out and f"{silent.id} has stopped" in out
    assert ksweep(registry, *asked)[1].splitlines()[:3] == ["error_class", "bug", "killed"] and failed.final_status() is not None
    assert ksweep(registry, "finalize") == (0, "")


def test_ls_on_eighty_columns_is_a_line_a_row_with_names_that_why_takes(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    for module in (console_module, output_module):
        monkeypatch.setattr(module, "console", lambda: out)
    assert ksweep(shared, "ls", "tiny")[0] == ksweep(shared, "ls", "--state", "failed")[0] == 0
    [_, first, *_] = lines = out.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80
    assert "running" in first and "drawing 25%" in first and "0.310 K=1" in first
    assert any("disk full" in line for line in lines)
    assert ksweep(shared, "why", first.split()[0])[0] == 0
