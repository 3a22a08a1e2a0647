"""One death, one answer: launcher, watcher, next command and the other ranks give it the same state, class and retry policy."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from ksweep.cli.jobs.rows import job_rows
from ksweep.launch.job import Job, create_job
from ksweep.launch.local_executor import LocalJob, end_of_job
from ksweep.launch.plan import RETRIED_FREELY, CellFacts, plan_steps
from ksweep.launch.rank_records import Heartbeat, Outcome
from ksweep.launch.survey import survey_jobs
from ksweep.launch.worker.heartbeat import HeartbeatThread
from ksweep.utils.errors import END_CLASSES, ERROR_CLASSES

pytestmark = pytest.mark.usefixtures("forked_python")

ROOT = Path(__file__).parents[2]


class Ended:
    """submitit's job, of which no process is left."""

    job_id = str(2**22 + 1)

    def done(self) -> bool:
        return True


def gone(rank: int = 0, **changes: Any) -> Heartbeat:
    """The last heartbeat of a rank of this machine whose process no longer exists."""
    plain = Heartbeat(rank=rank, pid=2**22 + 1, host=socket.gethostname(), process_started=1.0)
    return replace(plain, time=time.time(), **changes)


AT_CELL = {"phase": "drawing", "cell": "key", "done": 3, "total": 8}
Write = Callable[[Job], object]


def with_records(*records: Heartbeat | Outcome, cancelled: bool = False, files: tuple[str, ...] = ()) -> Write:
    def write(job: Job) -> None:
        for record in records:
            job.write_heartbeat(record) if isinstance(record, Heartbeat) else job.write_outcome(record)
        if cancelled:
            job.request_cancel()
        for name in files:
            (job.path / name).write_text("No module named 'ksweep'" if name.endswith(".err") else "")

    return write


PID = 2**22 + 1
ROWS: list[tuple[str, Write, int, tuple[str, str, bool]]] = [
    # What lies in the directory, number of ranks; state, class, whether the next command runs the cell again unasked.
    ("killed at its cell", with_records(gone(**AT_CELL)), 1, ("failed", "dead rank", False)),
    ("killed while it started", with_records(gone()), 1, ("stopped", "killed", True)),
    ("killed before its first heartbeat", with_records(files=(f"{PID}_submitted.pkl",)), 1, ("stopped", "killed", True)),
    ("raised before its first heartbeat",
     with_records(files=(f"{PID}_submitted.pkl", f"{PID}_0_result.pkl", f"{PID}_0_log.err")), 1, ("failed", "setup", False)),
    ("both killed at their cells", with_records(gone(0, **AT_CELL), gone(1, **AT_CELL)), 2, ("failed", "dead rank", False)),
    ("one finished, one killed at its cell",
     with_records(gone(0, **AT_CELL), gone(1, **AT_CELL), Outcome(rank=0, status="finished")), 2, ("failed", "dead rank", False)),
    ("one stopped, one killed while it started",
     with_records(gone(0, **AT_CELL), gone(1), Outcome(rank=0, status="stopped", message="asked to")), 2,
     ("stopped", "killed", True)),
    ("one saw another die at its cell",
     with_records(gone(0, **AT_CELL), gone(1, **AT_CELL), Outcome(rank=0, status="failed", kind="dead rank", message="1")), 2,
     ("failed", "dead rank", False)),
    ("one saw another die while it started",
     with_records(gone(0), gone(1), Outcome(rank=0, status="failed", kind="killed", message="rank 1")), 2,
     ("stopped", "killed", True)),
    ("killed by the user", with_records(gone(**AT_CELL), cancelled=True), 1, ("stopped", "cancelled", True)),
    ("cancelled, and stopped", with_records(gone(**AT_CELL), Outcome(rank=0, status="stopped"), cancelled=True), 1,
     ("stopped", "cancelled", True)),
    ("asked to stop", with_records(gone(**AT_CELL), Outcome(rank=0, status="stopped", message="asked to")), 1,
     ("stopped", "stopped", True)),
    ("its machine was restarted", with_records(replace(gone(**AT_CELL), time=psutil.boot_time() - 60)), 1,
     ("stopped", "node failure", True)),
    ("out of memory", with_records(gone(**AT_CELL), Outcome(rank=0, status="failed", kind="out of memory")), 1,
     ("failed", "out of memory", False)),
    ("full disk", with_records(gone(**AT_CELL), Outcome(rank=0, status="failed", kind="disk full")), 1,
     ("failed", "disk full", True)),
    ("a disk that fails", with_records(gone(**AT_CELL), Outcome(rank=0, status="failed", kind="disk error")), 1,
     ("failed", "disk error", True)),
]  # fmt: skip


@pytest.mark.parametrize(("write", "ranks", "expected"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_launcher_watcher_and_next_command_give_one_answer(
    tmp_path: Path, write: Write, ranks: int, expected: tuple[str, str, bool]
) -> None:
    job = create_job(tmp_path, "a:b", {"sweep": "s"}, ranks, cells=[("key", "n=1")])
    write(job)
    state, kind, retried = expected
    # 1. The launcher, which sees the processes of the job end.
    launcher = end_of_job(LocalJob(job, Ended()), ranks)
    assert launcher is not None and (launcher.state, launcher.kind) == (state, kind)
    # 2. A watching command.
    [row] = job_rows([job])
    assert (row.state, row.kind) == (state, kind)
    # 3. The next command: what it will record, and whether it runs the cell again.
    survey = survey_jobs(tmp_path)
    [(_, found)] = survey.ended
    assert (found.state, found.kind) == (state, kind)
    facts = CellFacts("key", "a", "n=1", None, 0, 1, 0, 1, 1, 1, None, failure=survey.failures.get("key"))
    assert (plan_steps([facts])[0].state == "missing") == retried == (kind in RETRIED_FREELY)


@pytest.mark.parametrize(("begun", "kind"), [(False, "killed"), (True, "dead rank")])
def test_a_rank_gives_another_ranks_death_the_class_that_others_give_it(
    tmp_path: Path, begun: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = create_job(tmp_path, "a:b", {"sweep": "s"}, 2, cells=[("key", "n=1")])
    job.write_heartbeat(gone(1, **AT_CELL) if begun else gone(1))
    watching = HeartbeatThread(job, 0, 2)
    monkeypatch.setattr(os, "_exit", lambda _: None)
    watching._check_other_ranks()
    [outcome] = job.outcomes()
    assert outcome.kind == kind


@pytest.mark.slow
@pytest.mark.parametrize(("begun", "expected"), [(False, ("stopped", "killed")), (True, ("failed", "dead rank"))])
def test_a_process_that_is_shot_is_seen_alike_by_its_files_alone(tmp_path: Path, begun: bool, expected: tuple[str, str]) -> None:
    """A real rank, killed between its first heartbeat and its cell, or right after it has begun the cell."""
    job = create_job(tmp_path, "a:b", {"sweep": "s"}, 1, cells=[("key", "n=1")])
    script = f"""
import time
from pathlib import Path
from ksweep.launch.job import Job
from ksweep.launch.worker.heartbeat import HeartbeatThread
with HeartbeatThread(Job(Path({str(job.path)!r})), 0, 1) as heartbeat:
    if {begun}:
        heartbeat.begin_cell("key", {{}})
    print("there", flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert process.stdout is not None and process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGKILL)  # at once: a heartbeat that is a second old would not do
    process.wait()
    [row] = job_rows([job])
    assert (row.state, row.kind) == expected


def test_the_table_of_classes_is_whole_and_documented() -> None:
    assert tuple(END_CLASSES) and set(END_CLASSES) == set(ERROR_CLASSES)
    documented = re.findall(
        r"^\| `([^`]+)` \| (failed|stopped) \| (yes|no) \| (.+) \|$", (ROOT / "docs/slurm.md").read_text(), re.M
    )
    rows = [(name, row.state, "yes" if row.retried else "no", row.meaning) for name, row in END_CLASSES.items()]
    assert documented == rows
    assert set(RETRIED_FREELY) == {name for name, _, retried, _ in rows if retried == "yes"}
