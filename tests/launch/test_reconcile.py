"""The record of how a job went: every start and rank of it, in the registry, whoever finds that it is over."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from ksweep import Resources, Sweep
from ksweep.evaluation.identity import cell_keys
from ksweep.launch import local_executor as launch
from ksweep.launch import status
from ksweep.launch.job import Job, all_jobs, create_job
from ksweep.launch.rank_records import Heartbeat, Outcome, is_alive
from ksweep.launch.reconcile import finalize_ended_jobs, finalize_if_ended
from ksweep.launch.slurm.polling import SlurmState
from ksweep.registry.database import connect, ingest_landings, rebuild_database
from ksweep.utils.errors import RequestError
from tests.tiny_models import TinyPair
from tests.tiny_sweeps import ask, run, talking_pair, tiny_cell

pytestmark = pytest.mark.usefixtures("forked_python")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    return talking_pair(tmp_path_factory.mktemp("tiny"), num_rows=60)


@pytest.fixture
def sweep(pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "registry").mkdir()
    return Sweep(
        name="tiny", cell=tiny_cell(pair, num_replicates=50), resources=Resources(cluster="local", gpus=0, tasks=2, time=5),
        registry=str(tmp_path / "registry"), vector_cache=str(tmp_path / "vector_cache"),
    )  # fmt: skip


def logs(sweep: Sweep) -> Path:
    return Path(sweep.registry).parent / "logs"


def job_of(sweep: Sweep, entry: str = "works_until_told_to_stop", ranks: int = 2, *, cluster: str = "local") -> Job:
    """A job of two cells, of which the second has temperature 0.7."""
    cells = [sweep.cell, replace(sweep.cell, sampling=replace(sweep.cell.sampling, temperature=0.7))]
    keys = [cell_keys(cell).cell for cell in cells]
    argument = {
        "sweep": "tiny", "cells": [asdict(cell) for cell in cells], "registry": sweep.registry,
        "resources": {"tasks": ranks}, "origin": {"argv": ["tiny.py"], "git_commit": "abc", "packages": {"torch": "2"}},
    }  # fmt: skip
    return create_job(
        logs(sweep), f"tests.launch.entries:{entry}", argument, ranks, cluster=cluster,
        cells=list(zip(keys, ("temperature=1.0", "temperature=0.7"), strict=True)),
    )  # fmt: skip


def beat_of(rank: int, *, alive: bool = False, **changes: Any) -> Heartbeat:
    me = psutil.Process()
    plain = Heartbeat(
        rank=rank, pid=me.pid, host=socket.gethostname(), process_started=me.create_time() - (0 if alive else 1000),
        device="H100", gpu=f"cuda:{rank} GPU-x", began=1000.0, phase="drawing", done=3, total=8, time=1060.0,
    )  # fmt: skip
    return replace(plain, **changes)


def rebuilt(sweep: Sweep) -> bool:
    """Whether the database built anew holds the same attempts and runs."""

    def held() -> list[list[tuple[Any, ...]]]:
        with connect(sweep.registry) as connection:
            return [connection.execute(f"SELECT * FROM {t} ORDER BY ALL").fetchall() for t in ("attempts", "runs", "quarantine")]

    before = held()
    rebuild_database(sweep.registry)
    return held() == before and bool(before[0])


@pytest.mark.slow
def test_two_ranks_that_raise_leave_a_traceback_each_and_the_user_is_told_one(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ksweep.launch.job_spec.ENTRY", "tests.launch.entries:two_ranks_raise")
    assert run(sweep) == 1
    error = capsys.readouterr().err
    assert any(f"rank {r} failed (bug): ValueError: what only rank {r} knows" in error for r in (0, 1))
    rows = ask(
        sweep,
        "SELECT start, rank, num_ranks, sweep, host, phase, done, total, status, error_class, error_type, message, requeued "
        "FROM attempts ORDER BY rank",
    )
    host = socket.gethostname()
    assert rows == [
        (0, r, 2, "tiny", host, "drawing", 3 + r, 8, "failed", "bug", "ValueError", f"ValueError: what only rank {r} knows", None)
        for r in (0, 1)
    ]
    for rank, traceback, lines, device in ask(sweep, "SELECT rank, traceback, last_log_lines, device FROM attempts"):
        assert f"what only rank {rank} knows" in traceback and "two_ranks_raise" in traceback
        assert f"rank {rank} was about to go wrong" in lines and "two_ranks_raise" not in lines, "the traceback is told once"
        assert device.startswith("cpu")
    assert ask(sweep, "SELECT began < ended AND ended - began < INTERVAL 1 MINUTE FROM attempts") == [(True,)] * 2
    [(kind, name, words, seconds)] = ask(sweep, "SELECT error_class, error_type, tracebacks, seconds FROM runs")
    assert (kind, name, seconds) == ("bug", "ValueError", {"drawing": 1.5})
    for rank in (0, 1):
        assert all(said in words[rank] for said in (f"rank {rank} on {host}", f"only rank {rank} knows", "was about to"))
    [(ranks,)] = ask(sweep, "SELECT ranks FROM v_failures")
    assert [(r["rank"], r["error_class"], "Traceback" in r["traceback"]) for r in ranks] == [(r, "bug", True) for r in (0, 1)]
    assert rebuilt(sweep)


@pytest.mark.slow
def test_a_rank_that_is_shot_is_told_by_its_peer_and_has_a_row(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ksweep.launch.job_spec.ENTRY", "tests.launch.entries:one_rank_is_killed")
    assert run(sweep) == 1
    assert "(dead rank): rank 1 (pid" in capsys.readouterr().err
    rows = ask(sweep, "SELECT rank, status, error_class, host IS NOT NULL, why FROM attempts ORDER BY rank")
    assert [row[:4] for row in rows] == [(0, "failed", "dead rank", True), (1, "gone", "dead rank", True)]
    assert rows[0][4] == rows[1][4] and "died without an outcome" in rows[0][4]
    assert ask(sweep, "SELECT error_class, error_type FROM runs") == [("dead rank", None)]
    assert run(sweep) == 1 and "dead rank: rank 1" in capsys.readouterr().err, "not run again unasked"


@pytest.mark.slow
def test_a_job_that_is_stopped_and_left_is_finalized_by_the_next_command(sweep: Sweep) -> None:
    job = job_of(sweep)
    submitted = launch.start_local_job(job, sweep.resources, "test")
    until(lambda: any(beat.phase == "working" for beat in job.heartbeats()))
    assert finalize_ended_jobs(logs(sweep)).statuses[job.id].state == "running" and ask(sweep, "FROM attempts") == []
    submitted.stop()
    until(lambda: len(job.outcomes()) == 2)
    finalize_ended_jobs(logs(sweep))
    rows = ask(sweep, "SELECT rank, status, error_class, phase, why IS NOT NULL FROM attempts ORDER BY rank")
    assert rows == [(r, "stopped", "stopped", "working", True) for r in (0, 1)]
    assert ask(sweep, "SELECT status, error_class, job, num_ranks FROM runs") == [("stopped", "stopped", job.id, 2)]
    assert rebuilt(sweep)


@pytest.mark.slow
def test_no_memory_is_a_class_that_is_not_run_again_unasked(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = replace(sweep, resources=Resources(cluster="inprocess", gpus=0))
    monkeypatch.setattr("ksweep.launch.job_spec.ENTRY", "tests.launch.entries:has_no_memory")
    assert run(here) == 1
    assert ask(here, "SELECT status, error_class, error_type, host, num_ranks FROM runs") == [
        ("failed", "out of memory", "MemoryError", socket.gethostname(), 1)
    ]
    assert ask(here, "SELECT status, error_class, error_type, message FROM attempts") == [
        ("failed", "out of memory", "MemoryError", "MemoryError: Unable to allocate 8.00 TiB for an array")
    ]
    monkeypatch.undo()
    capsys.readouterr()
    assert run(here) == 1
    assert "out of memory: MemoryError: Unable to allocate" in capsys.readouterr().err
    assert run(here, "--retry") == 0
    # What finished leaves its attempts too, and its run leads to them.
    joined = (
        "SELECT r.status, a.status, a.cell_key = r.cell_key, a.label = r.label, a.why FROM runs AS r JOIN attempts AS a "
        "USING (job, start) ORDER BY r.finished"
    )
    assert ask(here, joined) == [
        ("failed", "failed", None, None, "out of memory: MemoryError: Unable to allocate 8.00 TiB for an array"),
        ("finished", "finished", True, True, "every rank finished"),
    ]
    assert rebuilt(here)


def until(condition: Callable[[], Any], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


# From files alone


def write_log(job: Job, rank: int, text: str) -> None:
    with (job.path / f"7_{rank}_log.err").open("a") as file:
        file.write(text)


@pytest.mark.slow
def test_each_start_of_a_requeued_job_has_its_ranks_its_lines_and_its_reason(sweep: Sweep) -> None:
    job, key = job_of(sweep), job_of(sweep).spec()["cells"][1]["key"]
    for start, why in enumerate(("preempted", "time limit")):
        for rank in (0, 1):
            began = (job.path / f"7_{rank}_log.err").stat().st_size if start else 0
            job.write_heartbeat(beat_of(rank, attempt=start, host=f"gpu{start}", log_began=began, began=1000.0 + start))
            write_log(job, rank, f"start {start} of rank {rank}\n")
            job.write_outcome(
                Outcome(rank=rank, status="stopped", message="stopped with 3 units not started", attempt=start, time=1100.0)
            )
        job.write_note("requeued", {"why": why, "time": 0.0, "place": []}, start)
    for rank in (0, 1):
        began = (job.path / f"7_{rank}_log.err").stat().st_size
        job.write_heartbeat(beat_of(rank, attempt=2, host="gpu2", log_began=began, cell=key, cell_began=1500.0))
        write_log(job, rank, f"start 2 of rank {rank}\nthe end: Traceback of {rank}\n")
    job.write_outcome(
        Outcome(rank=1, status="failed", kind="out of memory", message="no room", traceback="Traceback of 1", attempt=2,
                error_type="OutOfMemoryError", time=1600.0)
    )  # fmt: skip
    finalize_ended_jobs(logs(sweep))
    rows = ask(
        sweep,
        "SELECT start, rank, host, epoch(began), epoch(ended), status, error_class, requeued, last_log_lines FROM attempts "
        "ORDER BY start, rank",
    )
    assert rows[:4] == [
        (start, rank, f"gpu{start}", 1000.0 + start, 1100.0, "stopped", kind, why, f"start {start} of rank {rank}")
        for start, (kind, why) in enumerate((("preempted", "preempted"), ("timeout", "time limit")))
        for rank in (0, 1)
    ]
    assert rows[4] == (2, 0, "gpu2", 1000.0, 1060.0, "gone", None, None, "start 2 of rank 0\nthe end: Traceback of 0")
    assert rows[5][4:] == (1600.0, "failed", "out of memory", None, "start 2 of rank 1\nthe end: (its traceback)")
    why = ask(sweep, "SELECT DISTINCT start, why FROM attempts ORDER BY start")
    assert why == [(0, "requeued: preempted"), (1, "requeued: time limit"), (2, "out of memory: no room")]
    found = ask(
        sweep,
        "SELECT temperature, start, num_ranks, host, device, git_commit, epoch(started), epoch(finished), error_type FROM runs",
    )
    assert found == [(0.7, 2, 2, "gpu2", "H100", "abc", 1500.0, 1600.0, "OutOfMemoryError")], "recorded on the cell it was at"


@pytest.mark.slow
def test_a_job_that_only_wrote_to_its_log_has_a_row_for_each_rank(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(sweep, cluster="slurm")
    job.write_note("slurm", {"id": "7", "folder": str(logs(sweep)), "tag": "x"})
    write_log(job, 0, "ModuleNotFoundError: No module named 'ksweep'\n")
    monkeypatch.setattr(status, "slurm_states", lambda jobs: {job.id: SlurmState() for job in jobs})
    monkeypatch.setattr(status, "RECHECK_SECONDS", 0.0)
    finalize_ended_jobs(logs(sweep))
    rows = ask(sweep, "SELECT rank, slurm_id, host, status, error_class, last_log_lines FROM attempts ORDER BY rank")
    words = "ModuleNotFoundError: No module named 'ksweep'"
    assert rows == [(0, "7", None, "gone", "setup", words), (1, "7", None, "gone", "setup", None)]


def test_a_job_that_never_began_leaves_nothing(sweep: Sweep) -> None:
    job = job_of(sweep)
    path = job.path / "job.json"
    path.write_text(json.dumps(job.spec() | {"launcher": {"pid": 1, "host": socket.gethostname(), "process_started": 0.0}}))
    finalize_ended_jobs(logs(sweep))
    assert (job.final_status() or {})["kind"] == "never submitted"
    assert ask(sweep, "SELECT count(*) FROM attempts") == [(0,)] and ask(sweep, "SELECT count(*) FROM runs") == [(0,)]


@pytest.mark.slow
def test_finalizing_waits_for_the_outcome_of_a_living_rank(sweep: Sweep) -> None:
    job = job_of(sweep)
    for rank in (0, 1):
        job.write_heartbeat(beat_of(rank, alive=True))
    job.write_outcome(Outcome(rank=0, status="failed", kind="bug", message="first"))
    later = Outcome(rank=1, status="failed", kind="NaN", message="second", traceback="Traceback of the second")
    threading.Timer(1.0, lambda: job.write_outcome(later)).start()
    finalize_ended_jobs(logs(sweep))
    assert ask(sweep, "SELECT error_class, message FROM attempts ORDER BY rank") == [("bug", "first"), ("NaN", "second")]
    assert ask(sweep, "SELECT error_class, len(tracebacks) FROM runs") == [("bug", 2)]


@pytest.mark.slow
def test_a_rank_that_does_not_end_is_waited_for_a_few_seconds(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ksweep.launch.reconcile.FINAL_RECORD_GRACE_SECONDS", 0.5)
    job = job_of(sweep)
    job.write_heartbeat(beat_of(1, alive=True))
    job.write_outcome(Outcome(rank=0, status="failed", kind="bug", message="first"))
    finalize_ended_jobs(logs(sweep))
    assert ask(sweep, "SELECT status, error_class FROM attempts ORDER BY rank") == [("failed", "bug"), ("gone", None)]


@pytest.mark.slow
def test_a_job_that_has_come_back_meanwhile_is_not_finalized(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ksweep.launch.reconcile.FINAL_RECORD_GRACE_SECONDS", 0.5)
    job = job_of(sweep)
    job.write_heartbeat(beat_of(0))
    job_status = status.job_status(job)
    assert job_status.state == "stopped"
    job.write_heartbeat(beat_of(0, alive=True, attempt=1))
    assert not finalize_if_ended(job, job_status)
    assert job.final_status() is None and ask(sweep, "SELECT count(*) FROM attempts") == [(0,)]


def test_a_survey_of_a_job_that_came_back_during_it_says_that_it_runs(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(sweep)
    job.write_heartbeat(beat_of(0))
    monkeypatch.setattr(
        "ksweep.launch.reconcile._wait_for_final_records", lambda _: job.write_heartbeat(beat_of(0, alive=True, attempt=1))
    )
    survey = finalize_ended_jobs(logs(sweep))
    assert survey.statuses[job.id].state == "running" and set(survey.live_job_by_cell) == {c["key"] for c in job.spec()["cells"]}


@pytest.mark.slow
def test_a_rank_on_a_machine_with_another_clock_is_not_taken_for_dead(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ksweep.launch.reconcile.MAX_HEARTBEAT_INTERVAL_SECONDS", 0.3)
    monkeypatch.setattr(status, "SILENCE_SECONDS", 0.0)
    job = job_of(sweep, ranks=1)
    late = beat_of(0, host="elsewhere", time=time.time() - 3600)
    job.write_heartbeat(late)
    threading.Timer(0.1, lambda: job.write_heartbeat(replace(late, time=late.time + 1))).start()
    job_status = status.job_status(job)
    assert job_status.from_silence and not finalize_if_ended(job, job_status) and job.final_status() is None
    assert finalize_if_ended(job, status.job_status(job)), "nothing has come since"


@pytest.mark.slow
def test_two_that_find_the_same_job_leave_one_run_and_one_file(sweep: Sweep) -> None:
    job = job_of(sweep)
    job.write_outcome(Outcome(rank=0, status="failed", kind="bug", message="x"))
    job_status = status.job_status(job)
    assert finalize_if_ended(job, job_status)
    (job.path / "settled.json").unlink()
    assert finalize_if_ended(job, job_status)
    assert len(list(Path(sweep.registry).glob("landing/*"))) == len(list(Path(sweep.registry).glob("attempts/*"))) == 1
    assert ask(sweep, "SELECT count(*) FROM attempts") == [(2,)] and ask(sweep, "SELECT count(*) FROM quarantine") == [(0,)]


@pytest.mark.slow
def test_a_checkpoint_that_has_gone_does_not_keep_a_job_from_being_finalized(sweep: Sweep, tmp_path: Path) -> None:
    moved = shutil.copytree(sweep.cell.autoencoder.av, tmp_path / "av")  # type: ignore[arg-type]
    other = replace(sweep, cell=replace(sweep.cell, autoencoder=replace(sweep.cell.autoencoder, av=str(moved))))
    job = job_of(other)
    job.write_outcome(Outcome(rank=0, status="failed", kind="bug", message="x"))
    shutil.rmtree(moved)
    with pytest.raises(RequestError):
        cell_keys(other.cell)
    finalize_ended_jobs(logs(sweep))
    assert job.final_status() is not None and ask(sweep, "SELECT error_class FROM attempts WHERE rank = 0") == [("bug",)]


@pytest.mark.slow
@pytest.mark.parametrize("argument", [{}, {"registry": "here", "sweep": "tiny"}, {"registry": "here", "cells": []}])
def test_a_job_without_cells_is_finalized_with_its_attempts_alone(sweep: Sweep, argument: dict[str, Any]) -> None:
    given = argument | ({"registry": sweep.registry} if "registry" in argument else {})
    job = create_job(logs(sweep), "a:b", given, 1)
    job.write_outcome(Outcome(rank=0, status="failed", kind="bug", message="x"))
    survey = finalize_ended_jobs(logs(sweep))
    assert survey.failures == {} and (job.final_status() or {})["kind"] == "bug"
    assert ask(sweep, "SELECT count(*) FROM attempts") == [(1 if given else 0,)]
    assert ask(sweep, "SELECT count(*) FROM runs") == [(0,)]


@pytest.mark.slow
def test_a_torn_heartbeat_of_an_earlier_start_does_not_keep_a_job_from_being_finalized(sweep: Sweep) -> None:
    job = job_of(sweep, ranks=1)
    job.write_heartbeat(beat_of(0))
    (job.path / "attempt-000" / "rank-0.json").write_text('{"rank": 0, "pi')
    job.write_outcome(Outcome(rank=0, status="failed", kind="bug", message="x", attempt=1))
    finalize_ended_jobs(logs(sweep))
    assert ask(sweep, "SELECT start, status FROM attempts ORDER BY start") == [(0, "gone"), (1, "failed")]


# The files in the registry


def one_job(sweep: Sweep) -> Path:
    job = job_of(sweep)
    job.write_outcome(Outcome(rank=0, status="failed", kind="bug", message="x"))
    finalize_ended_jobs(logs(sweep))
    return Path(sweep.registry) / "attempts" / f"{job.id}.json"


def altered(text: str) -> Mapping[str, str]:
    later = text.replace('"format": 1', '"format": 2')
    return {"altered": text.replace('"bug"', '"fly"'), "cut": text[: len(text) // 2], "later": later, "empty": "{}"}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["altered", "cut", "later", "empty"])
def test_damaged_attempts_are_not_believed_until_they_are_repaired(sweep: Sweep, how: str) -> None:
    path = one_job(sweep)
    whole = path.read_text()
    path.write_text(altered(whole)[how])
    report = rebuild_database(sweep.registry)
    assert [(q.run_id, q.path) for q in report.quarantined] == [(f"attempts/{path.stem}", path)] and report.num_runs == 1
    assert path.stem in report.quarantined[0].reason and ask(sweep, "SELECT count(*) FROM attempts") == [(0,)]
    assert not ingest_landings(sweep.registry).changed, "it is not read again while it stays as it is"
    path.write_text(whole)
    os.utime(path, ns=(0, 0))
    report = ingest_landings(sweep.registry)
    assert report.quarantined == () and ask(sweep, "SELECT count(*) FROM attempts") == [(2,)]


@pytest.mark.slow
def test_attempts_that_are_removed_disappear_and_runs_stay(sweep: Sweep) -> None:
    path = one_job(sweep)
    assert ask(sweep, "SELECT count(*) FROM attempts") == [(2,)]
    path.unlink()
    report = ingest_landings(sweep.registry)
    assert (report.num_removed, report.num_runs, report.changed) == (0, 1, True)
    assert ask(sweep, "SELECT count(*) FROM attempts") == [(0,)]
    assert ask(sweep, "SELECT ranks FROM v_failures") == [(None,)]


# A job that was finalized


@pytest.mark.slow
def test_a_running_job_that_was_finalized_ends_itself(sweep: Sweep) -> None:
    job = job_of(sweep, "sleeps")
    submitted = launch.start_local_job(job, sweep.resources, "test")
    try:
        until(lambda: len(job.heartbeats()) == 2)
        job.write_note("settled", {"state": "stopped", "reason": "it seemed to be gone", "kind": "lost"})
        until(lambda: not any(map(is_alive, job.heartbeats())))
        words = {ending.message for ending in job.outcomes()}
        assert any("finalized while it ran (it seemed to be gone)" in word for word in words), words
    finally:
        submitted.kill()


@pytest.mark.slow
def test_a_run_in_this_process_shows_its_progress_to_others(sweep: Sweep) -> None:
    here = replace(sweep, resources=Resources(cluster="inprocess", gpus=0))
    assert run(here) == 0
    [job] = all_jobs(logs(here))
    [beat] = job.heartbeats()
    assert (beat.pid, beat.phase.endswith("statistics"), beat.cell) == (os.getpid(), True, cell_keys(here.cell).cell)
    assert set(beat.seconds) >= {"activations", "drawing"} and job.final_status() is not None
