"""The heartbeat thread of a rank: what it does about the other ranks, of which it sees only the files."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ksweep.launch import job as job_module
from ksweep.launch import rank_records
from ksweep.launch.job import Job, create_job
from ksweep.launch.rank_records import Heartbeat, Outcome
from ksweep.launch.slurm import commands
from ksweep.launch.worker import heartbeat as module
from ksweep.launch.worker.heartbeat import HeartbeatThread
from ksweep.launch.worker.requeue import requeue_job

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # how `left` ends a thread


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit codes with which the rank would have ended this process; its thread ends instead."""
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS_ON_SLURM", 0.02)
    return codes


@pytest.fixture
def requeued(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Jobs that were put back into the queue of a Slurm that says they run."""
    numbers: list[str] = []
    monkeypatch.setattr(commands, "scontrol_show_job", lambda _: {"JobState": "RUNNING"})
    monkeypatch.setattr(commands, "scontrol_requeue", lambda number: numbers.append(number))
    return numbers


def rank_0(tmp_path: Path, ranks: int = 2, attempt: int = 0) -> HeartbeatThread:
    """The heartbeat thread of rank 0, which waits for the others."""
    found = HeartbeatThread(create_job(tmp_path, "a:b", {}, ranks, cluster="slurm"), 0, ranks, attempt, slurm_id="7")
    found.waiting = True
    return found


@contextmanager
def running(heartbeat: HeartbeatThread) -> Iterator[None]:
    """Run the thread; it has ended when the context is left."""
    with heartbeat:
        yield
    heartbeat._thread.join(120)


class Clock:
    """Time as the watchdog measures it: it passes when told to, after the watchdog has looked around."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.looks = 1000.0, 0
        self.time, self.sleep, attempt = time.time, time.sleep, Job.attempt

        def counted(job: Job) -> int:
            self.looks += 1
            return attempt(job)

        monkeypatch.setattr(Job, "attempt", counted)
        for measures in (module, rank_records):
            monkeypatch.setattr(measures, "time", self)

    def monotonic(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        """Not before a whole look, which begins after this call, has seen what there is."""
        before = self.looks
        until(lambda: self.looks >= before + 2)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def until(condition: Callable[[], Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def own_outcome(job: Job, attempt: int = 0) -> Outcome:
    return next(e for e in job.outcomes(attempt) if e.rank == 0)


def elsewhere(rank: int = 1) -> Heartbeat:
    """A rank on a node whose clock is an hour late."""
    return Heartbeat(rank=rank, pid=1, host="elsewhere", process_started=0.0, phase="drawing", time=time.time() - 3600)


def test_a_job_of_which_a_rank_failed_is_not_requeued_by_those_that_followed_it(
    tmp_path: Path, left: list[int], requeued: list[str]
) -> None:
    heartbeat = rank_0(tmp_path, ranks=3)
    heartbeat.job.write_outcome(Outcome(rank=1, status="stopped", message="rank 2 failed"))
    heartbeat.job.write_outcome(Outcome(rank=2, status="failed", kind="bug", message="no such column"))
    with running(heartbeat):
        until(lambda: left)
    assert left == [1] and not requeued and own_outcome(heartbeat.job).message == "rank 2 failed"


def test_a_stopped_rank_is_followed_back_into_the_queue(tmp_path: Path, left: list[int], requeued: list[str]) -> None:
    heartbeat = rank_0(tmp_path)
    heartbeat.job.write_outcome(Outcome(rank=1, status="stopped", message="stopped with 3 units not started"))
    with running(heartbeat):
        until(lambda: left)
    assert left == [0] and requeued == ["7"]


def test_a_job_stuck_at_its_time_limit_fails_also_where_rank_0_only_follows(
    tmp_path: Path, left: list[int], requeued: list[str]
) -> None:
    heartbeat = rank_0(tmp_path, attempt=2)
    for start in (0, 1):
        heartbeat.job.write_note("requeued", {"why": "time limit", "place": heartbeat.stopped_start().progress_marker}, start)
    heartbeat.handle_stop_signal(signal.SIGUSR2, None)
    heartbeat.job.write_outcome(Outcome(rank=1, status="stopped", message="its unit was abandoned", attempt=2))
    with running(heartbeat):
        until(lambda: left)
    outcome = own_outcome(heartbeat.job, 2)
    assert (outcome.status, outcome.kind) == ("failed", "time limit") and left == [1] and not requeued


def test_a_rank_ends_though_the_disk_takes_no_outcome(tmp_path: Path, left: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    heartbeat = rank_0(tmp_path)
    heartbeat.job.write_outcome(Outcome(rank=1, status="failed", kind="disk full", message="no room"))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Job, "write_outcome", full)
    with running(heartbeat):
        until(lambda: left)
    assert left == [1]


def test_a_full_disk_at_the_start_does_not_end_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Job, "write_heartbeat", full)
    with running(rank_0(tmp_path)):
        pass


def test_a_record_that_cannot_be_read_does_not_silence_a_rank(tmp_path: Path, left: list[int]) -> None:
    heartbeat = rank_0(tmp_path)
    broken = heartbeat.job.attempt_folder(0) / "rank-1.json"
    broken.parent.mkdir()
    broken.write_text("")
    with running(heartbeat):
        own = broken.with_name("rank-0.json")
        for _ in range(2):  # a beat after a look at the broken record
            before = own.stat().st_mtime_ns
            until(lambda: own.stat().st_mtime_ns > before)  # noqa: B023
    assert not left


def test_a_record_that_comes_back_at_once_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = create_job(tmp_path, "a:b", {}, 1)
    path = job.attempt_folder(0) / "rank-0.json"
    path.parent.mkdir()
    path.write_text("")
    monkeypatch.setattr(job_module, "time", SimpleNamespace(sleep=lambda _: job.write_heartbeat(elsewhere(0))))
    assert [h.host for h in job.heartbeats()] == ["elsewhere"]


def test_a_rank_on_another_node_is_told_dead_by_its_silence_and_not_by_its_clock(
    tmp_path: Path, left: list[int], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SILENCE_SECONDS", 10.0)
    heartbeat = rank_0(tmp_path)
    beat = elsewhere()
    heartbeat.job.write_heartbeat(beat)
    with running(heartbeat):
        for second in range(20):
            heartbeat.job.write_heartbeat(replace(beat, time=beat.time + second))
            clock.passes(9.0)
        clock.passes(0.5)
        assert not left
        clock.passes(0.6)
        until(lambda: left)
    # On one node srun sees a dead task at once: silence from another means that the node is gone, and the cell is run again.
    assert own_outcome(heartbeat.job).kind == "node failure"


def test_a_rank_that_was_held_up_itself_does_not_take_the_others_for_dead(
    tmp_path: Path, left: list[int], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SILENCE_SECONDS", 20.0)
    monkeypatch.setattr(module, "STALL_SECONDS", 15.0)
    heartbeat = rank_0(tmp_path)
    heartbeat.job.write_heartbeat(elsewhere())
    with running(heartbeat):
        clock.passes(14.0)
        clock.passes(100.0)  # as if it had been stopped meanwhile
        clock.passes(14.0)
        clock.passes(5.0)
        assert not left, "silence counts from when it was back"
        clock.passes(2.0)
        until(lambda: left)


def test_a_rank_that_never_comes_ends_the_job(tmp_path: Path, left: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_JOIN_SECONDS", 0.0)
    heartbeat = rank_0(tmp_path, ranks=3)
    heartbeat.job.write_heartbeat(replace(elsewhere(), time=time.time()))
    with running(heartbeat):
        until(lambda: left)
    assert "rank 2 of 3 has not started" in own_outcome(heartbeat.job).message


def test_a_finalized_job_ends_its_ranks_and_is_not_requeued(tmp_path: Path, left: list[int], requeued: list[str]) -> None:
    heartbeat = rank_0(tmp_path)
    heartbeat.job.write_outcome(Outcome(rank=1, status="stopped", message="stopped with 3 units not started"))
    heartbeat.job.write_note("settled", {"state": "stopped", "kind": "lost", "reason": "neither in the queue nor in accounting"})
    with running(heartbeat):
        until(lambda: left)
    outcome = own_outcome(heartbeat.job)
    assert left == [1] and not requeued
    assert (outcome.status, outcome.kind) == ("failed", "lost") and "neither in the queue nor in accounting" in outcome.message


def test_a_rank_on_its_way_out_does_not_requeue_a_job_that_was_finalized(tmp_path: Path, requeued: list[str]) -> None:
    heartbeat = rank_0(tmp_path)
    requeue_job(heartbeat.stopped_start())
    assert requeued == ["7"]
    heartbeat.job.write_note("settled", {"state": "stopped", "kind": "lost", "reason": "gone"})
    requeue_job(heartbeat.stopped_start())
    assert requeued == ["7"]


def test_an_error_of_its_own_is_not_taken_for_the_echo_of_another_ranks(tmp_path: Path) -> None:
    heartbeat = rank_0(tmp_path)
    heartbeat.job.write_outcome(Outcome(rank=1, status="failed", kind="bug", message="KeyError: 'x'"))
    own = Outcome(rank=0, status="failed", kind="bug", message="ValueError: y", error_type="ValueError", traceback="T")
    assert heartbeat.attribute_failure(own) == own
    echo = replace(own, message="RuntimeError: Connection closed by peer", error_type="RuntimeError")
    found = heartbeat.attribute_failure(echo)
    assert (found.status, found.kind, found.traceback) == ("stopped", "", "T")
    assert "rank 1 failed" in found.message and "Connection closed by peer" in found.message
