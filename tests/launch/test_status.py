"""What is said of a job: from its files alone while they speak, with Slurm's word only where they are silent."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from ksweep.launch import status
from ksweep.launch import survey as survey_module
from ksweep.launch.job import Job, create_job
from ksweep.launch.rank_records import Heartbeat, Outcome
from ksweep.launch.slurm import commands, polling, sbatch
from ksweep.launch.slurm.commands import AccountingEntry, QueueEntry
from ksweep.launch.slurm.job_output import parse_output
from ksweep.launch.slurm.polling import SlurmState
from ksweep.launch.status import JobEvidence, JobStatus, status_of
from ksweep.launch.survey import survey_jobs
from ksweep.launch.worker.requeue import is_stuck

NOW = time.time()


@pytest.fixture(autouse=True)
def asked_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSWEEP_SLURM_SECONDS", "0")
    monkeypatch.setattr(polling, "_last", polling._Poll())


def beat(rank: int = 0, age: float = 1.0, **changes: Any) -> Heartbeat:
    """Of a rank on another machine, so many seconds ago."""
    plain = Heartbeat(rank=rank, pid=1, host="elsewhere", process_started=0.0, phase="drawing", done=3, total=8)
    return replace(plain, time=time.time() - age, **changes)


def said(rank: int, status: str, kind: str = "", message: str = "", after: float = 0.0) -> Outcome:
    return Outcome(rank=rank, status=status, kind=kind, message=message, time=NOW + after)


def queued(state: str, reason: str = "None") -> SlurmState:
    return SlurmState(queued=QueueEntry("7", state, reason, "ksweep:x"))


def accounted(state: str) -> SlurmState:
    return SlurmState(accounted=AccountingEntry(state, "0:9", "gpu3"))


def of(*records: Heartbeat | Outcome, live: Sequence[int] = (), **fields: Any) -> JobEvidence:
    """Evidence of job 7 on Slurm (or with local=True): records of its ranks, and those that prove to be alive."""
    heartbeats = [r for r in records if isinstance(r, Heartbeat)]
    outcomes = [r for r in records if isinstance(r, Outcome)]
    fields = {name: value for name, value in fields.items() if name != "log"} | {"output": parse_output(fields.get("log", ""))}
    return JobEvidence(
        **{"slurm_id": "7", "heartbeats": heartbeats, "outcomes": outcomes, "live_ranks": frozenset(live)} | fields
    )


def silent(slurm: SlurmState, log: str = "", **fields: Any) -> JobEvidence:
    """A rank has spoken once, and Slurm has been asked."""
    return of(beat(age=500), slurm=slurm, log=log, **fields)


def mute(slurm: SlurmState, log: str = "") -> JobEvidence:
    """No rank has ever spoken."""
    return of(slurm=slurm, log=log)


# As slurmstepd 22.05 wrote it into the output of a job.
OUT_OF_TIME = "slurmstepd-gpu2: error: *** JOB 15009 ON gpu2 CANCELLED AT 2026-11-23T01:36:32 DUE TO TIME LIMIT ***"
CANCELLED = "slurmstepd-gpu2: error: *** JOB 15006 ON gpu2 CANCELLED AT 2026-11-23T01:33:59 ***"
NO_MODULE = "/spool/gpu1/job15007/slurm_script: line 7: module: command not found"
OOM = "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=7.0. Some of your processes may have been killed"
DONE, STOPPED, DIED = said(0, "finished"), said(0, "stopped", "", "asked to"), said(0, "failed", "dead rank", "rank 1 died", 2)
NO_ROOM = said(1, "failed", "out of memory", "no room")

TABLE: list[tuple[JobEvidence, tuple[str, str, str] | None, str]] = [
    # What the files say: (evidence, (state, class, what to check again), words of the reason). None: Slurm has to be asked.
    (of(finalized=JobStatus("failed", "as told", "bug")), ("failed", "bug", ""), "as told"),
    (of(beat(), live=[0]), ("running", "", ""), "drawing 3/8"),
    (of(beat(age=25)), None, ""),
    (of(beat(0), beat(1), DONE, said(1, "finished"), num_ranks=2), ("finished", "", ""), ""),
    (of(beat(0), beat(1), DONE, num_ranks=2, live=[1]), ("running", "", ""), ""),
    (of(beat(0), beat(1, 300), DONE, num_ranks=2), None, ""),
    # The first rank that failed is the cause; before one that saw another die, one that ran out of memory.
    (of(DIED, NO_ROOM, said(2, "stopped", "", "rank 1 failed", -1), num_ranks=3), ("failed", "out of memory", ""), "no room"),
    (of(replace(DIED, time=NOW), replace(NO_ROOM, time=NOW + 1), num_ranks=3), ("failed", "out of memory", ""), "no room"),
    (of(DIED), ("failed", "dead rank", ""), "rank 1 died"),
    # A dead rank is out of memory where Slurm says so in the log, and only there.
    (of(DIED, log=f"at work\n{OOM}\n"), ("failed", "out of memory", ""), "rank 1 died"),
    (of(DIED, log="srun: error: gpu1: task 1: Out Of Memory"), ("failed", "out of memory", ""), "rank 1 died"),
    (of(DIED, log="rank 1 died without an outcome during 'drawing' (killed, or out of memory): ending rank 0"),
     ("failed", "dead rank", ""), "rank 1 died"),
    (of(DIED, log="WARNING ksweep: out of memory while drawing; continuing with at most 8 rows at once"),
     ("failed", "dead rank", ""), "rank 1 died"),
    # Ranks that stopped on Slurm leave it to the queue whether they come back.
    (of(beat(), STOPPED), None, ""),
    (of(beat(), STOPPED, local=True), ("stopped", "stopped", ""), "asked to"),
    (of(beat(), STOPPED, requeued="preempted", slurm=queued("PENDING", "BeginTime")), ("waiting", "", ""), "requeued: preempted"),
    (of(beat(), STOPPED, slurm=accounted("COMPLETED")), ("stopped", "stopped", ""), "asked to"),
    (of(beat(), STOPPED, slurm=accounted("TIMEOUT")), ("stopped", "timeout", ""), "time limit"),
    # A silent job on this machine is gone. A rank that had begun its cell may have died of it; one that was starting had not.
    (of(beat(), local=True), ("failed", "dead rank", ""), "rank 0 of 1 is gone"),
    (of(beat(phase="starting"), local=True), ("stopped", "killed", ""), "before it had begun a cell"),
    (of(beat(phase="starting", cell="key"), local=True), ("failed", "dead rank", ""), "rank 0 of 1 is gone"),
    (of(beat(0), beat(1, phase="starting"), DONE, num_ranks=2, local=True), ("stopped", "killed", ""), "rank 1 of 2 is gone"),
    (of(beat(0), beat(1), STOPPED, num_ranks=2, local=True), ("failed", "dead rank", ""), "rank 1 of 2 is gone"),
    (of(beat(), local=True, cancel_requested=True), ("stopped", "cancelled", ""), "rank 0 of 1 is gone"),
    (of(beat(), STOPPED, local=True, cancel_requested=True), ("stopped", "cancelled", ""), "asked to"),
    (of(beat(), local=True, machine_restarted=True), ("stopped", "node failure", ""), "machine was restarted"),
    # Where only its silence says that a rank is dead, it is looked at again before that is believed.
    (of(beat(), local=True, unproven_ranks=frozenset([0])), ("failed", "dead rank", "record"), "not seen from here"),
    (of(beat(), local=True, unproven_ranks=frozenset([0]), machine_restarted=True), ("stopped", "node failure", "record"), ""),
    (of(beat(), local=True, unproven_ranks=frozenset([0]), cancel_requested=True), ("stopped", "cancelled", "record"), ""),
    (of(beat(0), beat(1), local=True, num_ranks=2, unproven_ranks=frozenset([0]), live=[1]), ("running", "", ""), ""),
    # What a rank saw of another's death has the state and class that others give it.
    (of(said(0, "failed", "killed", "rank 1 died"), local=True), ("stopped", "killed", ""), "rank 1 died"),
    (of(said(0, "failed", "node failure", "rank 1 died")), ("stopped", "node failure", ""), "rank 1 died"),
    (of(said(0, "failed", "a class of tomorrow", "x")), ("failed", "a class of tomorrow", ""), "x"),
    # A job that no rank has begun waits for its launcher, or for the processes that were started for it.
    (of(slurm_id=None, local=True, launcher="process 5", controller="alive"), ("waiting", "", ""), "its ranks are starting"),
    (of(slurm_id=None, local=True, launcher="process 5", controller="ended"), ("stopped", "killed", ""), "before any rank began"),
    (of(slurm_id=None, local=True, controller="ended", start_raised=True, log="No module named 'ksweep'"),
     ("failed", "setup", ""), "No module named"),
    (of(slurm_id=None, local=True, launcher="process 5 on here"), ("waiting", "", ""), "process 5 on here"),
    (of(slurm_id=None, submission_interrupted=True), ("unknown", "", ""), "handed it over"),
    (of(slurm_id=None), ("stopped", "never submitted", ""), "before it was started"),
    # What Slurm says of a silent job.
    (mute(queued("PENDING", "Priority")), ("waiting", "", ""), "pending: Priority"),
    (mute(queued("RUNNING")), ("running", "", ""), "Slurm says RUNNING"),
    (silent(queued("COMPLETING")), ("running", "", ""), "COMPLETING"),
    (silent(accounted("TIMEOUT")), ("stopped", "timeout", ""), "on gpu3"),
    (mute(accounted("CANCELLED")), ("stopped", "cancelled", ""), ""),
    (silent(accounted("FAILED"), cancel_requested=True), ("stopped", "cancelled", ""), ""),
    # Seen: NODE_FAIL for five seconds, then PENDING, RUNNING, COMPLETED.
    (silent(accounted("NODE_FAIL")), ("stopped", "node failure", "queue"), ""),
    (silent(accounted("PREEMPTED")), ("stopped", "preempted", "queue"), ""),
    (silent(accounted("RUNNING")), ("stopped", "lost", "queue"), "not in the queue"),
    (silent(accounted("OUT_OF_MEMORY")), ("failed", "out of memory", ""), ""),
    # Seen: a job killed for memory is FAILED, and only its step and its log say why.
    (silent(accounted("FAILED"), OOM), ("failed", "out of memory", ""), ""),
    # On a network file system the terminal record may be seen later than the end in accounting.
    (silent(accounted("FAILED")), ("failed", "dead rank", "record"), "exit code 0:9"),
    (silent(accounted("COMPLETED")), ("failed", "dead rank", "record"), ""),
    # A rank that was killed before it had begun its cell is run again, on Slurm as elsewhere.
    (of(beat(age=500, phase="starting"), slurm=accounted("FAILED")), ("stopped", "killed", "record"), "begun a cell"),
    # A line of `setup` that exits: no rank has ever spoken.
    (mute(accounted("FAILED"), NO_MODULE), ("failed", "setup", "record"), "module: command not found"),
    (mute(SlurmState(), NO_MODULE), ("failed", "setup", "either"), "module: command not found"),
    # Without accounting slurmstepd's own words are all there is.
    (silent(SlurmState(), OUT_OF_TIME), ("stopped", "timeout", ""), ""),
    (mute(SlurmState(), f"{NO_MODULE}\n{CANCELLED}"), ("stopped", "cancelled", ""), ""),
    (silent(SlurmState(), CANCELLED.replace("JOB 15006", "STEP 15006.0")), ("stopped", "lost", "either"), ""),
    (silent(SlurmState(), OUT_OF_TIME + "\nlater start" * 6), ("stopped", "lost", "either"), ""),
    # A cancelled element that was waiting leaves no record at all.
    (mute(SlurmState()), ("stopped", "lost", "either"), "neither in the queue nor in accounting"),
    (silent(SlurmState(reachable=False)), ("unknown", "", ""), "does not answer"),
    (silent(SlurmState(reachable=False, elsewhere="it is on cluster b")), ("unknown", "", ""), "on cluster b: ask there"),
]  # fmt: skip


@pytest.mark.parametrize(("evidence", "expected", "words"), TABLE)
def test_status_follows_from_the_evidence(evidence: JobEvidence, expected: tuple[str, str, str] | None, words: str) -> None:
    found = status_of(evidence)
    if expected is None:
        assert found is None
    else:
        assert found is not None and (found.state, found.kind, found.recheck) == expected and words in found.reason


def test_the_outcome_that_explains_a_failure_is_kept_with_the_status() -> None:
    found = status_of(of(DIED, NO_ROOM, num_ranks=3))
    assert found is not None and found.outcome == NO_ROOM


def submitted(tmp_path: Path) -> Job:
    job = create_job(tmp_path, "a:b", {"sweep": "s"}, 1, cluster="slurm", cells=[("key", "n=1")])
    job.write_note("slurm", {"id": "7", "folder": str(tmp_path), "tag": "ksweep:mine", "cluster": "testbed"})
    return job


def orphan(tmp_path: Path) -> Job:
    """A job that has not begun, of a launcher that is dead."""
    job = create_job(tmp_path, "a:b", {"sweep": "s"}, 1)
    dead = {"pid": 2**22 + 1, "host": socket.gethostname(), "process_started": 0.0}
    (job.path / "job.json").write_text(json.dumps(job.spec() | {"launcher": dead}))
    return job


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **words: str) -> None:
    """Slurm's commands as scripts that say one thing (or fail)."""
    commands._config.cache_clear()
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    for name in ("squeue", "sacct", "scontrol"):
        text = words.get(name)
        (folder / name).write_text(f"#!/bin/sh\ncat <<'E'\n{text}\nE\n" if text is not None else "#!/bin/sh\nexit 1\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_job_that_seems_gone_is_believed_gone_only_at_a_second_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, squeue="", sacct="7|NODE_FAIL|0:0|gpu1")
    job = submitted(tmp_path)
    assert status.job_status(job).state == "unknown"
    monkeypatch.setattr(status, "RECHECK_SECONDS", 0.0)
    found = status.job_status(job)
    assert (found.state, found.kind) == ("stopped", "node failure")
    # It comes back: whatever was believed is forgotten.
    stand_in(tmp_path, monkeypatch, squeue="7|PENDING|BeginTime|ksweep:mine|(null)", sacct="7|NODE_FAIL|0:0|gpu1")
    assert status.job_status(job).state == "waiting"
    stand_in(tmp_path, monkeypatch, squeue="", sacct="7|NODE_FAIL|0:0|gpu1")
    monkeypatch.setattr(status, "RECHECK_SECONDS", 20.0)
    assert status.job_status(job).state == "unknown"


def test_a_number_that_slurm_gave_twice_is_not_taken_for_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, squeue="7|RUNNING|None|somebody else's|(null)", sacct="")
    assert status.job_status(submitted(tmp_path)).recheck
    stand_in(tmp_path, monkeypatch, squeue="7|RUNNING|None|ksweep:mine|(null)", sacct="")
    assert status.job_status(submitted(tmp_path)).state == "running"


def test_a_job_whose_comment_a_site_has_rewritten_is_known_by_its_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, squeue=f"7|RUNNING|None|billed | to lab|{tmp_path}/script.sh", sacct="")
    assert status.job_status(submitted(tmp_path)).state == "running"
    stand_in(tmp_path, monkeypatch, squeue="7|RUNNING|None|billed | to lab|/elsewhere/script.sh", sacct="")
    assert status.job_status(submitted(tmp_path)).recheck


# Lines of `scontrol show config` of Slurm 22.05.
CONFIG = "AccountingStorageEnforce = associations,limits,qos\nClusterName             = {}\nMaxArraySize            = 9"


def test_a_job_on_another_cluster_of_the_same_file_system_is_not_finalized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "RECHECK_SECONDS", 0.0)
    job = submitted(tmp_path)
    stand_in(tmp_path, monkeypatch, squeue="", sacct="7|FAILED|1:0|x1", scontrol=CONFIG.format("other"))
    found = status.job_status(job)
    assert found.state == "unknown" and "on cluster testbed, and this command runs on other: ask there" in found.reason
    assert polling.ids_on_this_cluster([job]) == [], "its number is somebody else's job here"
    stand_in(tmp_path, monkeypatch, squeue="", sacct="7|FAILED|1:0|x1", scontrol=CONFIG.format("testbed"))
    assert status.job_status(job).state == "failed" and polling.ids_on_this_cluster([job]) == ["7"]
    assert commands.max_array_size() == 9


def test_a_submission_that_died_on_another_cluster_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, squeue="", sacct="", scontrol=CONFIG.format("other"))
    folder = tmp_path / "submissions" / "one"
    folder.mkdir(parents=True)
    (folder / "jobs.json").write_text(json.dumps([str(submitted(tmp_path).path)]))
    dead = {"pid": 2**22 + 1, "host": socket.gethostname(), "process_started": 0.0, "time": 0.0}
    intent = {"tag": "ksweep:one", "launcher": dead, "user": getpass.getuser(), "cluster": "testbed"}
    (folder / "intent.json").write_text(json.dumps(intent))
    [line] = sbatch.resolve_interrupted_submissions(tmp_path)
    assert "its launcher died on cluster testbed; this is other" in line and not (folder / "submitted.json").exists()


def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, queue: str) -> Path:
    """A squeue that counts how often it is asked."""
    stand_in(tmp_path, monkeypatch, sacct="", scontrol=CONFIG.format("testbed"))
    count = tmp_path / "count"
    (tmp_path / "bin" / "squeue").write_text(f"#!/bin/sh\necho x >>{count}\necho '{queue}'\n")
    (tmp_path / "bin" / "squeue").chmod(0o755)
    return count


def test_slurm_is_asked_once_in_a_while_however_often_one_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSWEEP_SLURM_SECONDS", "15")
    clock = [1000.0]
    monkeypatch.setattr(polling.time, "monotonic", lambda: clock[0])
    count = asked(tmp_path, monkeypatch, "7|PENDING|Priority|ksweep:mine|(null)")
    job = submitted(tmp_path)
    moments = []
    for second in range(300):
        clock[0] = 1000.0 + second
        before = len(count.read_text()) if count.exists() else 0
        assert status.job_status(job).state == "waiting"
        if len(count.read_text()) > before:
            moments.append(second)
    # All that it says is that the job waits: the pause grows to a minute.
    assert moments == [0, 15, 45, 105, 165, 225, 285]
    # A job that was submitted since then is not in that answer: about it Slurm is asked at once, and only once.
    new = submitted(tmp_path)
    new.write_note("slurm", {"id": "8", "folder": str(tmp_path), "tag": "ksweep:new", "cluster": "testbed"})
    for _ in range(3):
        assert status.job_status(new).recheck
    assert len(count.read_text().split()) == len(moments) + 1


def test_jobs_that_speak_cost_slurm_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = asked(tmp_path, monkeypatch, "")
    job = submitted(tmp_path)
    job.write_heartbeat(beat())
    assert status.job_status(job).state == "running" and not count.exists()
    job.write_heartbeat(beat(age=25))
    assert status.job_status(job).state == "unknown" and count.exists(), "an old heartbeat says nothing"


def test_what_may_only_be_out_of_sight_is_waited_for_longer_on_a_network_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that another node has put into a directory may stay unseen for 60 s on NFS."""
    stand_in(tmp_path, monkeypatch, squeue="", sacct="7|COMPLETED|0:0|gpu1", scontrol=CONFIG.format("testbed"))
    job, now = submitted(tmp_path), [NOW]
    monkeypatch.setattr(polling.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(status, "on_local_disk", lambda _: False)
    for age, state in ((0, "unknown"), (61, "unknown"), (76, "failed")):
        now[0] = NOW + age
        assert status.job_status(job).state == state, age
    job.write_outcome(Outcome(rank=0, status="finished"))
    assert status.job_status(job).state == "finished"
    (job.attempt_folder() / "ended-0.json").unlink()
    monkeypatch.setattr(status, "on_local_disk", lambda _: True)
    assert status.job_status(job).state == "failed"


def test_lines_of_setup_that_end_a_job_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "RECHECK_SECONDS", 0.0)
    stand_in(tmp_path, monkeypatch, squeue="", scontrol=CONFIG.format("testbed"))
    job = submitted(tmp_path)
    (tmp_path / "7_0_log.err").write_text("Lmod has detected the following error:\nThe module cuda/99 is unknown\n")
    (tmp_path / "7_0_log.out").write_text("")
    found = status.job_status(job)
    assert (found.state, found.kind) == ("failed", "setup") and found.reason.endswith(
        'last lines: "Lmod has detected the following error: | The module cuda/99 is unknown"'
    )


def test_a_colleagues_job_that_this_user_cannot_see_in_the_queue_is_not_finalized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, squeue="", sacct="7|PENDING|0:0|")
    monkeypatch.setattr(status, "RECHECK_SECONDS", 0.0)
    job = submitted(tmp_path)
    assert status.job_status(job).state == "stopped"
    job.write_note("slurm", {"id": "7", "folder": str(tmp_path), "tag": "ksweep:mine", "user": "a colleague"})
    assert status.job_status(job).state == "unknown"


def test_a_job_whose_launcher_died_at_sbatch_is_left_to_the_settling(tmp_path: Path) -> None:
    folder = tmp_path / "submissions" / "one"
    folder.mkdir(parents=True)
    path = orphan(tmp_path).path
    (folder / "jobs.json").write_text(f'["{path}"]')
    (folder / "intent.json").write_text("{}")
    assert status.job_status(Job(path)).state == "unknown"
    (folder / "submitted.json").write_text("{}")
    assert status.job_status(Job(path)).kind == "never submitted"


def test_slurm_that_does_not_answer_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch)
    found = status.job_status(submitted(tmp_path))
    assert found.state == "unknown" and "does not answer" in found.reason and found.state in status.LIVE_STATES


def test_an_older_start_is_not_taken_for_the_newer(tmp_path: Path) -> None:
    job = submitted(tmp_path)
    job.write_heartbeat(beat(age=300))
    job.write_outcome(Outcome(rank=0, status="failed", kind="dead rank", message="cut off", attempt=0))
    job.write_heartbeat(beat(attempt=1))
    assert status.job_status(job).state == "running"
    # The older start ends after the newer began; whatever it says is about itself.
    job.write_outcome(Outcome(rank=0, status="finished", attempt=0))
    assert status.job_status(job).state == "running" and job.outcomes() == []


def test_a_job_that_its_launcher_never_started_ends_with_it(tmp_path: Path) -> None:
    job = create_job(tmp_path, "a:b", {"sweep": "s"}, 1, cells=[("key", "n=1")])
    assert status.job_status(job).state == "waiting"
    found = status.job_status(orphan(tmp_path))
    assert (found.state, found.kind) == ("stopped", "never submitted")


def test_a_local_rank_is_alive_as_long_as_its_process(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    job = create_job(tmp_path, "a:b", {"sweep": "s"}, 1)
    started = psutil.Process(process.pid).create_time()
    job.write_heartbeat(replace(beat(age=900), pid=process.pid, host=socket.gethostname(), process_started=started))
    assert status.job_status(job).state == "running"
    process.kill()
    process.wait()
    found = status.job_status(job)
    assert (found.state, found.kind) == ("failed", "dead rank")


def test_a_job_is_stuck_when_two_starts_before_reached_their_limit_at_the_same_place() -> None:
    here, before = ["drawing", 4096, 0], ["drawing", 6000, 0]
    limit, preempted, earlier = (
        {"why": w, "place": p} for w, p in (("time limit", here), ("preempted", here), ("time limit", before))
    )
    assert is_stuck([limit, limit], here) and is_stuck([earlier, preempted, limit, limit], here)
    assert not is_stuck([], here) and not is_stuck([limit], here)
    assert not is_stuck([earlier, limit], here), "something was published in between"
    assert not is_stuck([limit, preempted], here), "a preempted start says nothing about the length of a unit"
    assert not is_stuck([limit, None], here)


def test_a_survey_names_the_cells_that_are_at_work_and_the_jobs_that_ended(tmp_path: Path) -> None:
    running, failed, finalized = (create_job(tmp_path, "a:b", {}, 1, cells=[(key, key)]) for key in ("one", "two", "three"))
    running.write_heartbeat(
        replace(beat(), pid=os.getpid(), host=socket.gethostname(), process_started=psutil.Process().create_time())
    )
    failed.write_outcome(Outcome(rank=0, status="failed", kind="NaN", message="loss is NaN"))
    finalized.write_note("settled", {"state": "failed", "reason": "said before", "kind": "bug"})
    survey = survey_jobs(tmp_path)
    assert set(survey.live_job_by_cell) == {"one"} and [job.id for job, _ in survey.ended] == [failed.id]
    assert survey.failures == {"two": ("NaN", "loss is NaN")}


def test_a_survey_looks_into_finalized_jobs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey_module, "INDEX_AFTER", 3)
    assert survey_jobs(tmp_path / "nowhere").statuses == {}
    jobs = [create_job(tmp_path, "a:b", {}, 1, cells=[("key", "n=1")]) for _ in range(5)]
    for job in jobs[:4]:
        job.write_note("settled", {"state": "finished", "reason": "", "kind": ""})
    assert set(survey_jobs(tmp_path).statuses) == {jobs[4].id} and not (tmp_path / survey_module.FINALIZED_INDEX).exists()
    for _ in range(2):
        assert set(survey_jobs(tmp_path, update_index=True).statuses) == {jobs[4].id}
    for job in jobs[:4]:  # looked into again, these would be open
        (job.path / "settled.json").unlink()
    assert set(survey_jobs(tmp_path).statuses) == {jobs[4].id}
    (tmp_path / survey_module.FINALIZED_INDEX).unlink()
    assert len(survey_jobs(tmp_path).statuses) == 5


def test_a_failure_is_blamed_on_the_cell_that_the_rank_was_at(tmp_path: Path) -> None:
    job = create_job(tmp_path, "a:b", {}, 2, cells=[("one", "one"), ("two", "two")])
    job.write_heartbeat(beat(0, cell="one"))
    job.write_heartbeat(beat(1, cell="two"))
    job.write_outcome(Outcome(rank=1, status="failed", kind="NaN", message="loss is NaN"))
    assert survey_jobs(tmp_path).failures == {"two": ("NaN", "loss is NaN")}


# As sacct of Slurm 22.05 printed it: JobID,State,ExitCode,NodeList,Submit,SubmitLine. The second job was handed over with --wrap.
RECORDED = """15001_0|COMPLETED|0:0|gpu1|2026-11-23T02:54:07|sbatch --wait --parsable {folder}/script.sh
15001_0.batch|COMPLETED|0:0|gpu1|2026-11-23T02:54:08|
15001_1|COMPLETED|0:0|gpu1|2026-11-23T02:54:07|sbatch --wait --parsable {folder}/script.sh
15001_1.batch|COMPLETED|0:0|gpu1|2026-11-23T02:54:08|
15003|COMPLETED|0:0|gpu1|2026-11-23T02:54:09|sbatch --wait --parsable --job-name=a b --output=/dev/null --wrap=true; echo 'x|y'
echo two
15003.batch|COMPLETED|0:0|gpu1|2026-11-23T02:54:10|"""


def recorded(tmp_path: Path, number: str, submitted_at: str = "2026-11-23T02:54:05") -> Job:
    job = submitted(tmp_path)
    job.write_note("slurm", {"id": number, "folder": str(tmp_path / "sub"), "tag": "ksweep:mine", "cluster": "testbed"})
    moment = datetime.fromisoformat(submitted_at).timestamp()
    os.utime(job.path / "job.json", (moment, moment))
    return job


def test_accounting_is_believed_of_a_job_that_our_own_sbatch_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, squeue="", sacct=RECORDED.format(folder=tmp_path / "sub"))
    found = polling.slurm_states([recorded(tmp_path, "15001_1"), recorded(tmp_path, "15003")])
    assert [a.accounted and a.accounted.state for a in found.values()] == ["COMPLETED", None]


@pytest.mark.parametrize(("began", "believed"), [("2026-11-23T02:54:05", True), ("2026-11-23T09:00:00", False)])
def test_accounting_without_submit_lines_is_not_believed_of_an_earlier_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, began: str, believed: bool
) -> None:
    stand_in(tmp_path, monkeypatch, squeue="", sacct="")
    # Slurm before 21.08: "sacct: error: Invalid field requested".
    script = "#!/bin/sh\ncase $* in *SubmitLine*) exit 1;; esac\necho '15003|COMPLETED|0:0|gpu1|2026-11-23T02:54:09'\n"
    (tmp_path / "bin" / "sacct").write_text(script)
    job = recorded(tmp_path, "15003", began)
    assert (polling.slurm_states([job])[job.id].accounted is not None) == believed


@pytest.mark.parametrize(
    ("state", "refused"), [("PENDING", None), ("COMPLETING", None), ("", None), ("RUNNING", "scontrol: exit code -15")]
)
def test_a_requeue_that_kills_its_own_scontrol_is_judged_by_what_slurm_then_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, refused: str | None
) -> None:
    stand_in(tmp_path, monkeypatch)
    said = f"echo JobId=7 JobState={state}" if state else "exit 1"
    (tmp_path / "bin" / "scontrol").write_text(f"#!/bin/sh\ncase $1 in requeue) kill -TERM $$; sleep 9;; *) {said};; esac\n")
    assert commands.scontrol_requeue("7") == refused


def test_a_dead_rank_is_out_of_memory_where_the_jobs_own_log_says_so(tmp_path: Path) -> None:
    job = submitted(tmp_path)
    (job.path / "7_0_log.err").write_text(f"at work\n{OOM}\n")
    job.write_outcome(Outcome(rank=0, status="failed", kind="dead rank", message="rank 1 died"))
    found = status.job_status(job)
    assert (found.state, found.kind) == ("failed", "out of memory") and "rank 1 died" in found.reason


def test_a_survey_with_a_torn_heartbeat_tells_of_the_others_and_leaves_its_cells_to_it(tmp_path: Path) -> None:
    torn, failed, gone = (create_job(tmp_path, "a:b", {}, 1, cells=[(key, key)]) for key in ("one", "two", "three"))
    torn.write_heartbeat(beat())
    (torn.path / "attempt-000" / "rank-0.json").write_text('{"rank": 0, "pi')
    failed.write_outcome(Outcome(rank=0, status="failed", kind="NaN", message="loss is NaN"))
    survey = survey_jobs(tmp_path)
    assert survey.statuses[torn.id].state == "unknown" and "cannot be read" in survey.statuses[torn.id].reason
    assert set(survey.live_job_by_cell) == {"one", "three"} and [job.id for job, _ in survey.ended] == [failed.id]
    shutil.rmtree(gone.path)
    assert set(status.job_statuses([torn, gone])) == {torn.id}
