"""ksweep cancel: jobs on Slurm by numbers that are theirs alone, and local jobs that have yet to start."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ksweep.config.resources import Resources
from ksweep.launch import local_executor as launch
from ksweep.launch.job import Job, create_job
from ksweep.launch.slurm import commands, polling
from tests.job_directories import ksweep, me

pytestmark = pytest.mark.usefixtures("forked_python")

CONFIG = "ClusterName             = testbed"


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cluster whose queue has job 7 of ours and, of somebody else's, 8 and 9; what scancel is told."""
    queue = "7|RUNNING|None|ksweep:of-7|(null)\n8|RUNNING|None|another's|(null)\n9|RUNNING|None|another's|(null)"
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("squeue", queue), ("scontrol", CONFIG), ("sacct", "")):
        (folder / name).write_text(f"#!/bin/sh\ncat <<'E'\n{text}\nE\n")
    (folder / "scancel").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/told\n')
    for path in folder.iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(polling, "_last", polling._Poll())
    commands._config.cache_clear()
    return tmp_path / "told"


def on_slurm(registry: Path, number: str, cluster: str = "testbed") -> Job:
    job = create_job(registry.parent / "logs", "a:b", {"sweep": "s"}, 1, cluster="slurm", cells=[(number, number)])
    job.write_note("slurm", {"id": number, "folder": str(registry), "tag": f"ksweep:of-{number}", "cluster": cluster})
    return job


def test_cancel_tells_slurm_only_the_numbers_that_are_ours(registry: Path, told: Path) -> None:
    ours, forgotten, far = on_slurm(registry, "7"), on_slurm(registry, "8"), on_slurm(registry, "9", "elsewhere")
    code, out = ksweep(registry, "cancel", "s")
    assert told.read_text() == "--quiet 7\n" and code == 1
    assert f"cancelled: {ours.id} (Slurm 7)" in out.splitlines()
    assert f"not cancelled: {forgotten.id}: Slurm has no job 8 of ours in its queue" in out
    assert f"not cancelled: {far.id}: it is on cluster elsewhere: cancel it there (`scancel 9`)" in out
    assert all(job.cancel_requested() for job in (ours, forgotten, far)), "none of them puts itself back into the queue"


def test_cancel_of_local_jobs_asks_slurm_nothing(registry: Path, told: Path) -> None:
    made = create_job(registry.parent / "logs", "a:b", {"sweep": "s"}, 1, cells=[("key", "n=1")])
    made.write_heartbeat(me().__class__(rank=0, pid=1, host="elsewhere", process_started=1.0))
    assert ksweep(registry, "cancel", "s")[0] == 1 and not told.exists()


@pytest.mark.slow
def test_a_local_job_that_is_cancelled_before_its_rank_starts_does_no_work(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    (tmp_path / "out").mkdir()
    argument = {"sweep": "s", "folder": str(tmp_path / "out"), "total": 4}
    job = create_job(registry.parent / "logs", "tests.launch.entries:count", argument, 1, cells=[("key", "n=1")])
    assert ksweep(registry, "cancel", job.id) == (0, f"cancelled: {job.id}\n")
    submitted = launch.start_local_job(job, Resources(cluster="local", gpus=0, tasks=1, time=5), "test")
    try:
        submitted.handle.wait()
    finally:
        submitted.kill()
    assert [(e.status, e.message) for e in job.outcomes()] == [("stopped", "cancelled before it started")]
    assert list((tmp_path / "out").iterdir()) == []
