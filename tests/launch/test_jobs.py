"""Real submitit jobs with real ranks: they share work, fail together, at once, and say why."""

from __future__ import annotations

import re
import socket
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import submitit

from ksweep.config.resources import Resources
from ksweep.launch import hardware
from ksweep.launch import job as job_module
from ksweep.launch import local_executor as launch
from ksweep.launch.job import create_job
from ksweep.launch.plan import RETRIED_FREELY
from ksweep.launch.rank_records import Heartbeat, Outcome, is_alive
from ksweep.launch.reconcile import finalize
from ksweep.launch.status import JobStatus
from ksweep.launch.worker.devices import gpus_of_rank
from ksweep.utils.errors import SpecError
from tests.launch.entries import gpus_of_this_rank

pytestmark = pytest.mark.usefixtures("forked_python")

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def importable_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def start(tmp_path: Path, entry: str, ranks: int, **argument: Any) -> launch.LocalJob:
    job = create_job(tmp_path / "logs", f"tests.launch.entries:{entry}", argument, ranks)
    return launch.start_local_job(job, Resources(cluster="local", gpus=0, tasks=ranks, time=5), "test")


def end(submitted: launch.LocalJob, ranks: int, seconds: float = 240) -> JobStatus:
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            ending = launch.end_of_job(submitted, ranks)
            if ending is not None:
                return ending
            time.sleep(0.05)
        raise AssertionError(f"no end after {seconds} s: {submitted.job.heartbeats()} {submitted.job.log_tail()}")
    finally:
        submitted.kill()


@pytest.mark.slow
def test_two_ranks_take_each_number_once_and_both_finish(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    submitted = start(tmp_path, "count", 2, folder=str(tmp_path / "out"), total=40)
    assert end(submitted, 2).state == "finished"
    results = {e.rank: e.result for e in submitted.job.outcomes()}
    assert sorted(results[0] + results[1]) == list(range(40))
    assert results[0] and results[1], "one rank did all the work"


@pytest.mark.slow
def test_ranks_meet_at_a_port_that_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that all know beforehand is in use now and then: by another job of the node, or by anybody's connection."""
    (tmp_path / "out").mkdir()
    with socket.create_server(("", 0)) as taken:
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        submitted = start(tmp_path, "count", 2, folder=str(tmp_path / "out"), total=40)
        ending = end(submitted, 2)
    assert ending.state == "finished", (ending, submitted.job.log_tail())


@pytest.mark.parametrize(("gpus", "per_model", "ranks"), [(8, 1, 8), (8, 2, 4), (8, 8, 1), (6, 3, 2)])
def test_ranks_share_the_gpus_of_a_node_out_among_them(gpus: int, per_model: int, ranks: int) -> None:
    resources = Resources(cluster="local", gpus=gpus, gpus_per_model=per_model)
    assert hardware.total_ranks(resources) == hardware.tasks_per_node(resources) == ranks
    taken = [gpus_of_rank(rank, per_model) for rank in range(ranks)]
    assert [device for own in taken for device in own] == [f"cuda:{i}" for i in range(gpus)]
    assert {len(own) for own in taken} == {per_model}


@pytest.mark.slow
def test_two_processes_take_two_gpus_each_of_those_that_their_job_was_lent(tmp_path: Path) -> None:
    executor = submitit.LocalExecutor(folder=tmp_path)
    ranks = hardware.tasks_per_node(Resources(cluster="local", gpus=4, gpus_per_model=2))
    executor.update_parameters(tasks_per_node=ranks, gpus_per_node=4, visible_gpus=(1, 4, 6, 7), timeout_min=2)
    assert executor.submit(gpus_of_this_rank, 2).results() == [["1", "4"], ["6", "7"]]


@pytest.mark.slow
def test_a_rank_that_raises_ends_the_job_with_its_traceback(tmp_path: Path) -> None:
    ending = end(start(tmp_path, "one_rank_raises", 2), 2).outcome
    assert ending is not None and (ending.status, ending.rank, ending.kind) == ("failed", 1, "bad input")
    assert ending.message == "vector 17 is not finite" and "one_rank_raises" in ending.traceback


@pytest.mark.slow
def test_a_rank_that_is_shot_ends_the_job_and_is_named(tmp_path: Path) -> None:
    submitted = start(tmp_path, "one_rank_is_killed", 2)
    ending = end(submitted, 2)
    assert (ending.state, ending.kind) == ("failed", "dead rank")
    assert "rank 1 (pid" in ending.reason and "died without an outcome" in ending.reason
    assert not any(is_alive(h) for h in submitted.job.heartbeats())


@pytest.mark.slow
def test_a_rank_that_is_shot_while_it_starts_has_not_begun(tmp_path: Path) -> None:
    submitted = start(tmp_path, "one_rank_is_killed_while_it_starts", 2)
    ending = end(submitted, 2)
    assert (ending.state, ending.kind) == ("stopped", "killed") and "killed" in RETRIED_FREELY
    assert "rank 1 (pid" in ending.reason and "during 'starting'" in ending.reason


@pytest.mark.slow
def test_a_job_that_is_asked_to_stop_ends_at_a_border_of_its_units(tmp_path: Path) -> None:
    submitted = start(tmp_path, "works_until_told_to_stop", 2)
    while not any(h.phase == "working" for h in submitted.job.heartbeats()):
        assert not submitted.has_ended(), submitted.job.log_tail()
        time.sleep(0.1)
    submitted.stop()
    ending = end(submitted, 2)
    assert ending.state == "stopped"
    assert "not started" in ending.reason or "rank" in ending.reason


def test_a_job_in_this_process_records_its_end(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    job = create_job(tmp_path / "logs", "tests.launch.entries:count", {"folder": str(tmp_path / "out"), "total": 3}, 1)
    seen: list[tuple[str, int, int]] = []
    submitted = launch.start_local_job(job, Resources(cluster="inprocess", gpus=0), "test", lambda *a, **_: seen.append(a))
    found = launch.end_of_job(submitted, 1)
    assert found is not None and found.outcome == Outcome(rank=0, status="finished", result=[0, 1, 2])
    assert seen == [("counting", i, 3) for i in range(3)]


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        ({"cluster": "local", "gpus": 0, "nodes": 2}, "a local job has one node"),
        ({"cluster": "local", "gpus": 99}, "this machine has"),
    ],
)
def test_resources_that_cannot_be_had_are_refused_before_anything_starts(
    tmp_path: Path, resources: dict[str, Any], words: str
) -> None:
    job = create_job(tmp_path, "tests.launch.entries:count", {}, 1)
    with pytest.raises(SpecError, match=words):
        launch.start_local_job(job, Resources(**resources), "test")


def test_slurm_without_sbatch_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SpecError, match="no sbatch here"):
        hardware.resolve_cluster(Resources(cluster="slurm"))
    assert hardware.resolve_cluster(Resources(cluster="auto")) == "local"


def test_a_process_that_reuses_a_pid_is_not_taken_for_the_rank() -> None:
    import os
    import socket

    import psutil

    me = psutil.Process()
    alive = Heartbeat(rank=0, pid=os.getpid(), host=socket.gethostname(), process_started=me.create_time())
    other = Heartbeat(rank=0, pid=os.getpid(), host=socket.gethostname(), process_started=me.create_time() - 100)
    assert is_alive(alive) and not is_alive(other)


def test_every_file_of_a_job_is_documented_in_one_place(tmp_path: Path) -> None:
    patterns = re.findall(r"^    (\S.*?)   ", job_module.__doc__ or "", re.M)
    documented = [pattern for line in patterns for pattern in line.split(", ")]
    (tmp_path / "out").mkdir()
    job = create_job(tmp_path / "logs", "tests.launch.entries:count", {"folder": str(tmp_path / "out"), "total": 3}, 1)
    launch.start_local_job(job, Resources(cluster="inprocess", gpus=0), "test")
    finalize(job, JobStatus("finished", ""))
    job.request_cancel()
    written = {str(path.relative_to(job.path)) for path in job.path.rglob("*") if path.is_file()}
    of_rank = {f"attempt-000/{name}" for name in ("rank-0.json", "rank-0.lock", "ended-0.json")}
    assert written == {"job.json", "asked-to-end", "settled.json", *of_rank}
    # Notes that only other jobs write.
    for path in (ROOT / "ksweep").rglob("*.py"):
        names = re.findall(r'write_note\(\s*"([^"]+)"(.*)', path.read_text())
        written |= {f"attempt-000/{name}.json" if "attempt" in rest else f"{name}.json" for name, rest in names}
    assert {"slurm.json", "controller.json", "attempt-000/requeued.json"} < written
    assert {path for path in written if not any(fnmatch(path, pattern) for pattern in documented)} == set()
