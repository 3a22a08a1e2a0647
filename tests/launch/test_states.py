"""What is said of a job: from its files alone while they speak, with Slurm's word only where they are silent."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from ksweep.launch import states
from ksweep.launch.job import Ending, Heartbeat, Job, create
from ksweep.launch.slurm import Accounted, Queued
from ksweep.launch.states import Answer, explained, told
from ksweep.launch.worker import is_stuck

NOW = time.time()


def beat(rank: int = 0, age: float = 1.0, **changes: Any) -> Heartbeat:
    """Of a rank on another machine, so many seconds ago."""
    plain = Heartbeat(rank=rank, pid=1, host="elsewhere", process_started=0.0, phase="drawing", done=3, total=8)
    return replace(plain, time=time.time() - age, **changes)


def queued(state: str, reason: str = "None") -> Answer:
    return Answer(queued=Queued("7", state, reason, "ksweep:x"))


def accounted(state: str) -> Answer:
    return Answer(accounted=Accounted(state, "0:9", "gpu3"))


def test_fresh_heartbeats_say_running_and_how_far() -> None:
    found = told([beat()], [], 1, local=False)
    assert found is not None and (found.state, found.reason) == ("running", "drawing 3/8")


@pytest.mark.parametrize("age", [25.0, 500.0])
def test_old_heartbeats_say_nothing(age: float) -> None:
    assert told([beat(age=age)], [], 1, local=False) is None


def test_a_job_has_finished_when_every_rank_says_so_and_not_before() -> None:
    done = [Ending(rank=r, status="finished") for r in (0, 1)]
    assert (found := told([beat(0), beat(1)], done, 2, local=False)) is not None and found.state == "finished"
    assert (found := told([beat(0), beat(1)], done[:1], 2, local=False)) is not None and found.state == "running"
    assert told([beat(0), beat(1, age=300)], done[:1], 2, local=False) is None


def test_the_first_rank_that_failed_is_the_cause() -> None:
    endings = [
        Ending(rank=0, status="failed", kind="dead rank", message="rank 1 died", time=NOW + 2),
        Ending(rank=1, status="failed", kind="out of memory", message="no room", time=NOW),
        Ending(rank=2, status="stopped", message="rank 1 failed", time=NOW - 1),
    ]
    found = told([], endings, 3, local=False)
    assert found is not None and (found.state, found.kind, found.ending) == ("failed", "out of memory", endings[1])


def test_ranks_that_stopped_on_slurm_leave_it_to_the_queue_whether_they_come_back() -> None:
    endings = [Ending(rank=0, status="stopped", message="asked to")]
    assert told([beat()], endings, 1, local=False) is None
    assert (found := told([beat()], endings, 1, local=True)) is not None and found.state == "stopped"
    coming = explained("7", queued("PENDING", "BeginTime"), {"why": "preempted"}, False, stopped="asked to")
    assert coming.state == "waiting" and "requeued: preempted" in coming.reason
    gone = explained("7", accounted("COMPLETED"), None, False, stopped="asked to")
    assert (gone.state, gone.kind) == ("stopped", "stopped") and "asked to" in gone.reason


@pytest.mark.parametrize(
    ("answer", "oom", "state", "kind", "look_again"),
    [
        (queued("PENDING", "Priority"), False, "waiting", "", False),
        (queued("RUNNING"), False, "running", "", False),
        (queued("COMPLETING"), False, "running", "", False),
        (accounted("TIMEOUT"), False, "stopped", "timeout", False),
        (accounted("CANCELLED"), False, "stopped", "cancelled", False),
        # Seen: NODE_FAIL for five seconds, then PENDING, RUNNING, COMPLETED.
        (accounted("NODE_FAIL"), False, "stopped", "node failure", True),
        (accounted("PREEMPTED"), False, "stopped", "preempted", True),
        (accounted("OUT_OF_MEMORY"), False, "failed", "out of memory", False),
        # Seen: a job killed for memory is FAILED, and only its step and its log say why.
        (accounted("FAILED"), True, "failed", "out of memory", False),
        (accounted("FAILED"), False, "failed", "dead rank", False),
        # On a network file system the terminal record may be seen later than the end in accounting.
        (accounted("COMPLETED"), False, "failed", "dead rank", True),
        # A cancelled element that was waiting leaves no record at all.
        (Answer(), False, "stopped", "lost", True),
        (Answer(reachable=False), False, "unknown", "", False),
    ],
)
def test_silence_is_explained_by_what_slurm_says(answer: Answer, oom: bool, state: str, kind: str, look_again: bool) -> None:
    found = explained("7", answer, None, oom)
    assert (found.state, found.kind, found.look_again) == (state, kind, look_again)


def submitted(tmp_path: Path) -> Job:
    job = create(tmp_path, "a:b", {"sweep": "s"}, 1, cluster="slurm", cells=[("key", "n=1")])
    job.note("slurm", {"id": "7", "folder": str(tmp_path), "tag": "ksweep:mine"})
    return job


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **answers: str) -> None:
    """Slurm's commands as scripts that say one thing (or fail)."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    for name in ("squeue", "sacct"):
        text = answers.get(name)
        (folder / name).write_text(f"#!/bin/sh\ncat <<'E'\n{text}\nE\n" if text is not None else "#!/bin/sh\nexit 1\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_job_that_seems_gone_is_believed_gone_only_at_a_second_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, squeue="", sacct="7|NODE_FAIL|0:0|gpu1")
    job = submitted(tmp_path)
    assert states.verdict(job).state == "unknown"
    monkeypatch.setattr(states, "SECOND_LOOK_SECONDS", 0.0)
    found = states.verdict(job)
    assert (found.state, found.kind) == ("stopped", "node failure")
    # It comes back: whatever was believed is forgotten.
    stand_in(tmp_path, monkeypatch, squeue="7|PENDING|BeginTime|ksweep:mine", sacct="7|NODE_FAIL|0:0|gpu1")
    assert states.verdict(job).state == "waiting" and job.noted("seems-gone") is None


def test_a_number_that_slurm_gave_twice_is_not_taken_for_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, squeue="7|RUNNING|None|somebody else's", sacct="")
    assert states.verdict(submitted(tmp_path)).look_again
    stand_in(tmp_path, monkeypatch, squeue="7|RUNNING|None|ksweep:mine", sacct="")
    assert states.verdict(submitted(tmp_path)).state == "running"


def test_a_colleagues_job_that_this_user_cannot_see_in_the_queue_is_not_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, squeue="", sacct="7|PENDING|0:0|")
    monkeypatch.setattr(states, "SECOND_LOOK_SECONDS", 0.0)
    job = submitted(tmp_path)
    assert states.verdict(job).state == "stopped"
    job.note("slurm", {"id": "7", "folder": str(tmp_path), "tag": "ksweep:mine", "user": "a colleague"})
    assert states.verdict(job).state == "unknown"


def test_a_job_whose_launcher_died_at_sbatch_is_left_to_the_settling(tmp_path: Path) -> None:
    folder = tmp_path / "submissions" / "one"
    folder.mkdir(parents=True)
    code = f"import pathlib, ksweep.launch.job as j; print(j.create(pathlib.Path({str(tmp_path)!r}), 'a:b', {{}}, 1).path)"
    path = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    (folder / "jobs.json").write_text(f'["{path}"]')
    (folder / "intent.json").write_text("{}")
    assert states.verdict(Job(Path(path))).state == "unknown"
    (folder / "submitted.json").write_text("{}")
    assert states.verdict(Job(Path(path))).kind == "never submitted"


def test_slurm_that_does_not_answer_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch)
    found = states.verdict(submitted(tmp_path))
    assert found.state == "unknown" and "does not answer" in found.reason and found.state in states.LIVE


def test_an_older_start_is_not_taken_for_the_newer(tmp_path: Path) -> None:
    job = submitted(tmp_path)
    job.beat(beat(age=300))
    job.end(Ending(rank=0, status="failed", kind="dead rank", message="cut off", attempt=0))
    job.beat(beat(attempt=1))
    assert states.verdict(job).state == "running"
    # The older start ends after the newer began; whatever it says is about itself.
    job.end(Ending(rank=0, status="finished", attempt=0))
    assert states.verdict(job).state == "running" and job.endings() == []


def test_a_job_that_its_launcher_never_started_ends_with_it(tmp_path: Path) -> None:
    job = create(tmp_path, "a:b", {"sweep": "s"}, 1, cells=[("key", "n=1")])
    assert states.verdict(job).state == "waiting"
    code = f"import pathlib, ksweep.launch.job as j; print(j.create(pathlib.Path({str(tmp_path)!r}), 'a:b', {{}}, 1).id)"
    other = Job(
        tmp_path / subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    )
    found = states.verdict(other)
    assert (found.state, found.kind) == ("stopped", "never submitted")


def test_a_local_rank_is_alive_as_long_as_its_process(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    job = create(tmp_path, "a:b", {"sweep": "s"}, 1)
    started = psutil.Process(process.pid).create_time()
    job.beat(replace(beat(age=900), pid=process.pid, host=socket.gethostname(), process_started=started))
    assert states.verdict(job).state == "running"
    process.kill()
    process.wait()
    found = states.verdict(job)
    assert (found.state, found.kind) == ("stopped", "killed")


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
    running, failed, settled = (create(tmp_path, "a:b", {}, 1, cells=[(key, key)]) for key in ("one", "two", "three"))
    running.beat(replace(beat(), pid=os.getpid(), host=socket.gethostname(), process_started=psutil.Process().create_time()))
    failed.end(Ending(rank=0, status="failed", kind="NaN", message="loss is NaN"))
    settled.note("settled", {"state": "failed", "reason": "said before", "kind": "bug"})
    survey = states.survey(tmp_path)
    assert set(survey.at_work) == {"one"} and [job.id for job, _ in survey.ended] == [failed.id]
    assert survey.failures == {"two": ("NaN", "NaN: loss is NaN")}
