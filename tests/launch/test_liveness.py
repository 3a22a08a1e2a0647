"""A process lives or not by its kernel's account: whatever the wall clock says, in whichever container one asks.

Real containers and a real /proc/stat of another time need `unshare`; where that is not permitted these tests say so and skip.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest

from ksweep.cli.jobs.cancel import cancel_jobs
from ksweep.launch import gpu_leases, liveness, rank_records, status
from ksweep.launch.job import Job, create_job
from ksweep.launch.liveness import Life, LifeEvidence, Lock, ProcessIdentity, TableEntry, hold_lock, life_of, lock_state
from ksweep.launch.local_executor import LocalJob
from ksweep.launch.rank_records import SILENCE_SECONDS, Heartbeat, is_alive, process_record, record_is_alive
from ksweep.launch.reconcile import finalize_ended_jobs
from ksweep.launch.survey import survey_jobs
from ksweep.launch.worker.heartbeat import HeartbeatThread
from ksweep.utils.files import publish

ROOT = Path(__file__).parents[2]
HOUR = 3600.0

# The pure function

RANK = ProcessIdentity(70, "box", 1000.0, "boot A", "pid:[1]", 5000)
READER = ProcessIdentity(71, "box", 1100.0, "boot A", "pid:[1]", 6000)
BEFORE = ProcessIdentity(70, "box", 1000.0)  # as earlier versions wrote it
NO_PROC = ProcessIdentity(71, "box", 1100.0)  # a reader on a system without /proc
Entry = TableEntry | Literal["none", "hidden"]


def same(started: float = 1000.0) -> TableEntry:
    return TableEntry(5000, started)


VERDICTS: list[tuple[str, ProcessIdentity, ProcessIdentity, Entry, Lock, Life]] = [
    ("its process is there", RANK, READER, same(), "", "alive"),
    ("the clock was set three seconds on", RANK, READER, same(1003.0), "", "alive"),
    ("the clock was set an hour back", RANK, READER, same(-2600.0), "", "alive"),
    ("no such process", RANK, READER, "none", "", "dead"),
    ("another process has its pid", RANK, READER, TableEntry(5001, 1000.0), "", "dead"),
    ("no such process, its lock inherited by a child", RANK, READER, "none", "held", "dead"),
    ("its process is there, its lock file was removed", RANK, READER, same(), "free", "alive"),
    ("its name was changed", RANK, replace(READER, host="renamed"), same(), "", "alive"),
    ("/proc hides it", RANK, READER, "hidden", "", "unknown"),
    ("/proc hides it, it holds its lock", RANK, READER, "hidden", "held", "alive"),
    ("/proc hides it, its lock is free", RANK, READER, "hidden", "free", "dead"),
    ("another container, which holds its lock", RANK, replace(READER, namespaces="pid:[2]"), "hidden", "held", "alive"),
    ("another container, whose lock is free", RANK, replace(READER, namespaces="pid:[2]"), "hidden", "free", "dead"),
    ("another container, no locks", RANK, replace(READER, namespaces="pid:[2]"), "hidden", "", "unknown"),
    ("another container, where its pid is another's", RANK, replace(READER, namespaces="pid:[2]"), "none", "held", "alive"),
    ("another container of another name", RANK, replace(READER, namespaces="pid:[2]", host="b"), "hidden", "free", "dead"),
    ("another machine of the same name, or restarted", RANK, replace(READER, boot_id="boot B"), "none", "", "unknown"),
    (
        "another machine, over whose file system no lock is seen",
        RANK,
        replace(READER, boot_id="boot B"),
        "none",
        "free",
        "unknown",
    ),
    ("another machine, which crashed with its lock", RANK, replace(READER, boot_id="boot B"), "none", "held", "unknown"),
    ("earlier version, its process is there", BEFORE, READER, same(1000.4), "", "alive"),
    ("earlier version, another process", BEFORE, READER, same(1003.0), "", "dead"),
    ("earlier version, no such process", BEFORE, READER, "none", "", "dead"),
    ("earlier version, another machine", replace(BEFORE, host="far"), READER, "none", "", "unknown"),
    ("no /proc, its process is there", BEFORE, NO_PROC, same(), "", "alive"),
    ("no /proc, no such process", BEFORE, NO_PROC, "none", "held", "dead"),
    ("no /proc, the clock was set and it holds its lock", BEFORE, NO_PROC, same(1003.0), "held", "alive"),
    ("no /proc, another process, its lock is free", BEFORE, NO_PROC, same(1003.0), "free", "dead"),
    ("no /proc, another start, no locks", BEFORE, NO_PROC, same(1003.0), "", "unknown"),
]


@pytest.mark.parametrize(
    ("process", "reader", "entry", "lock", "life"), [row[1:] for row in VERDICTS], ids=[r[0] for r in VERDICTS]
)
def test_life_follows_from_the_evidence(
    process: ProcessIdentity, reader: ProcessIdentity, entry: Entry, lock: Lock, life: Life
) -> None:
    assert life_of(LifeEvidence(process=process, reader=reader, entry=entry, lock=lock)) == life


# What it is gathered from


def me(**changes: Any) -> Heartbeat:
    """A heartbeat of this process."""
    return replace(Heartbeat(rank=0, **process_record(), phase="drawing", cell="key"), **changes)


def job_with(tmp_path: Path, heartbeat: Heartbeat, **argument: Any) -> Job:
    job = create_job(tmp_path / "logs", "a:b", {"sweep": "s"} | argument, 1, cells=[("key", "n=1")])
    job.write_heartbeat(heartbeat)
    return job


def step_clock(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Set the wall clock, and with it the boot time from which psutil computes when a process began."""
    now, created, booted = time.time, psutil.Process.create_time, psutil.boot_time
    monkeypatch.setattr(time, "time", lambda: now() + seconds)
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: created(process) + seconds)
    monkeypatch.setattr(psutil, "boot_time", lambda: booted() + seconds)


@pytest.mark.parametrize("seconds", [3.0, HOUR, -3.0, -HOUR])
def test_a_step_of_the_clock_neither_kills_nor_revives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setenv("KSWEEP_HOME", str(tmp_path / "home"))
    alive = job_with(tmp_path, me())
    dead = job_with(tmp_path, me(start_ticks=1))
    starting = create_job(tmp_path / "logs", "a:b", {"sweep": "s"}, 1, cells=[("other", "n=2")])
    starting.write_note("controller", process_record())
    unstarted = create_job(tmp_path / "logs", "a:b", {"sweep": "s"}, 1, cells=[("third", "n=3")])
    assert gpu_leases.acquire_gpus(("0",), 1, "sweep") == ("0",)
    watching = HeartbeatThread(alive, 1, 2)
    step_clock(monkeypatch, seconds)
    found = {job: status.job_status(job) for job in (alive, dead, starting, unstarted)}
    assert [found[job].state for job in (alive, dead, starting, unstarted)] == ["running", "failed", "waiting", "waiting"]
    assert found[dead].kind == "dead rank" and not found[dead].recheck, "proven: nothing to look at again"
    assert watching._find_dead_rank() is None
    assert gpu_leases.acquire_gpus(("0",), 1, "another") is None
    finalize_ended_jobs(tmp_path / "logs")
    assert alive.final_status() is None and dead.final_status() is not None


@pytest.mark.parametrize("local_disk", [False, True])
@pytest.mark.parametrize("seconds", [HOUR, -HOUR])
def test_a_step_of_the_clock_does_not_book_a_rank_on_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, local_disk: bool
) -> None:
    """Nothing is proven of it: it is unknown or running until this process has watched it for long enough."""
    monkeypatch.setattr(status, "on_local_disk", lambda _: local_disk)
    job = job_with(tmp_path, far := me(host="elsewhere", boot_id="another kernel"))
    step_clock(monkeypatch, seconds)
    assert status.job_status(job).state in status.LIVE_STATES
    clock = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    for beat in range(1, 300, 2):  # it goes on: whatever the clocks say, it is never given up
        clock[0] += 2.0
        job.write_heartbeat(replace(far, time=far.time + beat))
        assert status.job_status(job).state in status.LIVE_STATES, beat
    for wait in (SILENCE_SECONDS - 1, 1.0):
        assert status.job_status(job).state in status.LIVE_STATES
        clock[0] += wait
    status.job_status(job)
    clock[0] += SILENCE_SECONDS
    found = status.job_status(job)
    assert (found.state, found.kind) == ("failed", "dead rank") and found.from_silence


@pytest.mark.parametrize("there", [{"boot_id": "another kernel"}, {"namespaces": "pid:[1]"}])
@pytest.mark.parametrize(("started", "kind"), [(False, "never submitted"), (True, "killed")])
def test_a_job_of_another_machine_that_is_slow_to_start_is_not_finalized_for_its_age(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: dict[str, str], started: bool, kind: str
) -> None:
    """Launcher and controller write their records once: that these are old says nothing, nor does a clock that is ahead."""
    job = create_job(tmp_path / "logs", "a:b", {"sweep": "s"}, 1, cells=[("key", "n=1")])
    record = process_record() | there | {"time": time.time() - SILENCE_SECONDS - 5}
    (job.path / "job.json").write_text(json.dumps(job.spec() | {"launcher": record}))
    if started:
        job.write_note("controller", record)
        (job.path / f"{2**22 + 1}_submitted.pkl").touch()
    clock = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    found = status.job_status(job)
    assert (found.state, found.recheck, found.from_silence) == ("unknown", "record", True)
    clock[0] += SILENCE_SECONDS - 1
    finalize_ended_jobs(tmp_path / "logs")
    assert job.final_status() is None
    job.write_heartbeat(me(**there))
    assert status.job_status(job).state == "running"
    (job.attempt_folder() / "rank-0.json").unlink()
    assert status.job_status(job).state == "unknown", "it is watched anew"
    clock[0] += SILENCE_SECONDS
    found = status.job_status(job)
    assert (found.state, found.kind) == ("stopped", kind)


def test_a_controllers_pid_of_another_machine_is_not_looked_up_here(tmp_path: Path) -> None:
    """Between submitit's pickle and the controller's note."""
    job = create_job(tmp_path / "logs", "a:b", {"sweep": "s"}, 1, cells=[("key", "n=1")])
    launcher = process_record() | {"boot_id": "another kernel"}
    (job.path / "job.json").write_text(json.dumps(job.spec() | {"launcher": launcher}))
    (job.path / f"{2**22 + 1}_submitted.pkl").touch()
    assert status.job_status(job).state == "waiting"


def test_a_silent_rank_of_another_machine_of_this_name_is_no_proof_until_it_was_watched(tmp_path: Path) -> None:
    job = job_with(tmp_path, me(boot_id="another kernel"))
    assert status.job_status(job).state == "running", "its process is not looked up here"
    job.write_heartbeat(me(boot_id="another kernel", time=time.time() - 2 * SILENCE_SECONDS))
    found = status.job_status(job)
    assert found.from_silence and found.kind == "node failure" and "machine was restarted" in found.reason


def test_a_process_that_has_the_pid_of_a_dead_rank_is_not_the_rank(tmp_path: Path) -> None:
    found = status.job_status(job_with(tmp_path, me(start_ticks=me().start_ticks + 1)))
    assert (found.state, found.kind) == ("failed", "dead rank")
    assert is_alive(me()) and not is_alive(me(start_ticks=me().start_ticks - 1))


def test_a_stopped_rank_lives_however_long_it_is_silent(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        process.send_signal(signal.SIGSTOP)
        until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
        job = job_with(tmp_path, beat := Heartbeat(rank=0, **process_record(process.pid) | {"time": time.time() - 30 * HOUR}))
        assert status.job_status(job).state == "running" and job.life_of_rank(beat) == "alive"
        finalize_ended_jobs(tmp_path / "logs")
        assert job.final_status() is None
    finally:
        process.kill()
        process.wait()
    assert job.life_of_rank(beat) == "dead"


def test_records_of_earlier_and_of_later_versions_are_read(tmp_path: Path) -> None:
    new = {"boot_id", "namespaces", "start_ticks"}
    earlier = {name: value for name, value in process_record().items() if name not in new}
    assert record_is_alive(earlier) and record_is_alive(process_record() | {"a field of tomorrow": 1})
    assert not record_is_alive(earlier | {"process_started": 1.0}) and not record_is_alive(process_record() | {"pid": 2**22 + 1})
    assert status.job_status(job_with(tmp_path, Heartbeat(rank=0, **earlier))).state == "running"


def test_a_process_hidden_by_the_proc_of_another_namespace_or_user_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert liveness._look_up(2**22 + 1) == "none"

    def refuse(pid: int, _: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)  # so the kernel says that another user's process has the pid
    assert liveness._look_up(2**22 + 1) == "hidden"
    monkeypatch.undo()
    monkeypatch.setattr(os, "readlink", lambda _: "13019")  # /proc/self under its pid in another namespace
    assert liveness._look_up(os.getpid()) == "hidden"


# Locks


def test_a_lock_is_free_once_its_holder_has_let_go_and_looking_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.lock"
    assert lock_state(path) == "" and not path.exists()
    held = hold_lock(path)
    assert held is not None and lock_state(path) == "held" and hold_lock(path) is None
    held.close()
    before = path.stat()
    assert [lock_state(path) for _ in range(2)] == ["free", "free"] and path.stat().st_mtime_ns == before.st_mtime_ns


def test_a_rank_holds_its_lock_until_its_outcome_is_written(tmp_path: Path) -> None:
    job = create_job(tmp_path, "a:b", {}, 1)
    heartbeat = HeartbeatThread(job, 0, 1)
    heartbeat.publish_heartbeat()
    [beat] = job.heartbeats()
    assert beat.lock_device and lock_state(job.attempt_folder(0) / "rank-0.lock") == "held"
    heartbeat.finish(rank_records.Outcome(rank=0, status="finished"))
    assert lock_state(job.attempt_folder(0) / "rank-0.lock") == "free"


def test_without_locks_on_the_file_system_a_rank_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(liveness.fcntl, "flock", refuse)
    job = create_job(tmp_path, "a:b", {}, 1)
    HeartbeatThread(job, 0, 1).publish_heartbeat()
    [beat] = job.heartbeats()
    assert beat.lock_device == 0 and job.is_alive(beat)
    other = replace(beat, namespaces="pid:[0]")
    assert job.life_of_rank(other) == "unknown" and job.is_alive(other), "unknown, and not silent"


@pytest.mark.parametrize("stopped", [False, True])
def test_the_rank_of_another_container_lives_as_long_as_its_lock(tmp_path: Path, stopped: bool) -> None:
    """Also frozen, and silent for longer than any limit."""
    job = create_job(tmp_path / "logs", "a:b", {"sweep": "s"}, 1, cells=[("key", "n=1")])
    path = job.attempt_folder(0) / "rank-0.lock"
    publish(path, b"")
    script = (
        f"import fcntl, time; f = open({str(path)!r}); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        # Here the pid is that of a process that began at another time.
        beat = me(pid=1, start_ticks=7, namespaces="pid:[0]", lock_device=path.stat().st_dev, time=time.time() - 30 * HOUR)
        job.write_heartbeat(beat)
        if stopped:
            holder.send_signal(signal.SIGSTOP)
        assert status.job_status(job).state == "running" and HeartbeatThread(job, 1, 2)._find_dead_rank() is None
        finalize_ended_jobs(tmp_path / "logs")
        assert job.final_status() is None and holder.poll() is None
    finally:
        holder.kill()
        holder.wait()
    found = status.job_status(job)
    assert (found.state, found.kind, found.recheck) == ("failed", "dead rank", "")
    assert HeartbeatThread(job, 1, 2)._find_dead_rank() == beat


def test_a_lock_that_is_seen_through_another_mount_proves_nothing(tmp_path: Path) -> None:
    job = create_job(tmp_path / "logs", "a:b", {"sweep": "s"}, 1, cells=[("key", "n=1")])
    publish(job.attempt_folder(0) / "rank-0.lock", b"")
    beat = me(pid=1, start_ticks=7, namespaces="pid:[0]", lock_device=tmp_path.stat().st_dev)
    assert job.life_of_rank(beat) == "dead"
    assert job.life_of_rank(replace(beat, lock_device=tmp_path.stat().st_dev + 1)) == "unknown"


def test_no_lock_is_touched_where_the_process_table_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Path] = []
    monkeypatch.setattr(liveness, "lock_state", lambda path: (looked.append(path), "held")[1])
    job = create_job(tmp_path / "logs", "a:b", {"sweep": "s"}, 1, cells=[("key", "n=1")])
    publish(path := job.attempt_folder(0) / "rank-0.lock", b"")
    here = me(lock_device=tmp_path.stat().st_dev)
    assert [job.life_of_rank(replace(here, start_ticks=ticks)) for ticks in (here.start_ticks, 1)] == ["alive", "dead"]
    assert looked == []
    monkeypatch.setattr(liveness, "_look_up", lambda _: "hidden")
    assert job.life_of_rank(here) == "alive" and looked == [path]


def test_a_gpu_stays_leased_to_a_job_of_another_container_whose_rank_holds_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KSWEEP_HOME", str(tmp_path / "home"))
    there = {"namespaces": "pid:[0]", "time": time.time() - HOUR}
    job = job_with(tmp_path, me(lock_device=tmp_path.stat().st_dev, **there))
    gpu_leases._write_lease("0", {"job": job.id, "process": process_record() | there, "path": str(job.path)})
    held = job.lock_rank(0, 0)
    assert held is not None and gpu_leases.acquire_gpus(("0",), 1, "another") is None
    held.close()
    assert gpu_leases.acquire_gpus(("0",), 1, "another") == ("0",)


# Signals reach the rank itself and nobody else


class Handle:
    job_id = "1"

    def done(self) -> bool:
        return False


def test_no_signal_is_sent_to_a_pid_of_another_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)) if number else None)
    job = job_with(tmp_path, me(namespaces="pid:[0]"))
    LocalJob(job, Handle()).stop()
    [result] = cancel_jobs([job])
    assert sent == [] and not result.cancelled and f"another container on {socket.gethostname()}" in result.reason
    job.write_heartbeat(me())
    LocalJob(job, Handle()).stop()
    assert sent == [(os.getpid(), signal.SIGTERM)]


def test_a_process_that_has_the_controllers_pid_by_now_is_not_killed(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        job = create_job(tmp_path, "a:b", {}, 1)
        identity = liveness.identity_of(other.pid)
        LocalJob(job, Handle(), replace(identity, start_ticks=identity.start_ticks - 1)).kill()
        assert other.poll() is None
        LocalJob(job, Handle(), identity).kill()
        assert other.wait(60) == -signal.SIGKILL
    finally:
        other.kill()
        other.wait()


def test_a_controller_without_a_note_is_known_by_its_command_line(tmp_path: Path) -> None:
    """A job of an earlier version: submitit names its pickle by the controller's pid."""
    job = create_job(tmp_path, "a:b", {"sweep": "s"}, 1, cells=[("key", "n=1")])
    controller = subprocess.Popen([sys.executable, "-c", "input()", str(job.path)], stdin=subprocess.PIPE)
    (job.path / f"{controller.pid}_submitted.pkl").touch()
    os.utime(job.path / f"{controller.pid}_submitted.pkl", (1.0, 1.0))
    assert status.job_status(job).state == "waiting"
    controller.kill()
    controller.wait()
    assert status.job_status(job).state == "stopped"
    (job.path / f"{os.getpid()}_submitted.pkl").touch()
    assert status.job_status(job).state == "stopped", "this process has nothing to do with the job"


# Really: other namespaces, another /proc/stat

SCRIPT = """
import sys, time
from pathlib import Path
from ksweep.launch.job import Job
from ksweep.launch.worker.heartbeat import HeartbeatThread

heartbeat = HeartbeatThread(Job(Path(sys.argv[1])), 0, 1)
heartbeat.begin_cell("key", {})
print("there", flush=True)
time.sleep(600)
"""
READ = """
import sys
from pathlib import Path
from ksweep.launch.job import Job
from ksweep.launch.status import job_status
print(job_status(Job(Path(sys.argv[1]))).state)
"""


@pytest.fixture
def unshare() -> str:
    """The command, where it may be used."""
    command = shutil.which("unshare")
    if command is None:
        pytest.skip("there is no `unshare` here")
    tried = subprocess.run([command, "--mount", "--pid", "--fork", "--mount-proc", "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"`unshare` is not permitted here: {tried.stderr.strip()}")
    return command


@contextmanager
def rank(job: Job, *before: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*before, sys.executable, "-c", SCRIPT, str(job.path)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stdout.readline() == "there\n"
        yield process
    finally:
        process.kill()
        process.wait()


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def test_a_rank_in_a_container_of_the_same_name_is_seen_alive_and_dead_from_outside(tmp_path: Path, unshare: str) -> None:
    job = create_job(tmp_path / "logs", "a:b", {"sweep": "s"}, 1, cells=[("key", "n=1")])
    with rank(job, unshare, "--pid", "--fork", "--kill-child", "--mount-proc") as process:
        [beat] = job.heartbeats()
        assert (beat.pid, beat.host) == (1, socket.gethostname()), "in its own namespace it is the first process"
        job.write_heartbeat(replace(beat, time=beat.time - HOUR))
        assert status.job_status(job).state == "running" and survey_jobs(tmp_path / "logs").ended == []
        [inner] = psutil.Process(process.pid).children()
        inner.kill()
        until(lambda: not inner.is_running() or inner.status() == psutil.STATUS_ZOMBIE)
        found = status.job_status(job)
        assert (found.state, found.kind) == ("failed", "dead rank")


def test_a_command_that_reads_another_boot_time_sees_a_rank_alive(tmp_path: Path, unshare: str) -> None:
    """The wall clock of one command is three seconds ahead: /proc/stat of a machine whose clock was set."""
    job = create_job(tmp_path / "logs", "a:b", {"sweep": "s"}, 1, cells=[("key", "n=1")])
    lines = Path("/proc/stat").read_text().splitlines()
    later = [f"btime {int(line.split()[1]) + 3}" if line.startswith("btime") else line for line in lines]
    (tmp_path / "stat").write_text("\n".join(later) + "\n")
    command = f'mount --bind {tmp_path}/stat /proc/stat && exec "$0" -c "$1" "$2"'
    with rank(job):
        done = subprocess.run(
            [unshare, "--mount", "sh", "-c", command, sys.executable, READ, str(job.path)], capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert (done.stdout, done.returncode) == ("running\n", 0), done.stderr
