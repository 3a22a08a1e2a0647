"""One sweep started twice at one moment on one machine: each cell is given to one job, and both commands end with the results."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from ksweep import Resources, Sweep
from ksweep.launch import gpu_leases, run_locally, run_sweep
from ksweep.launch.job import Job, all_jobs, create_job
from ksweep.launch.rank_records import Outcome
from ksweep.launch.run_sweep import SweepPlan, identify_cells, planned
from ksweep.launch.survey import survey_jobs
from tests.tiny_models import TinyPair
from tests.tiny_sweeps import ask, talking_pair, tiny_cell
from tests.waiting import until

ROOT = Path(__file__).parents[2]
IN_PROCESS = Resources(cluster="inprocess", gpus=0, cells_per_job=1)
"""A job is run by its launcher itself: no process has to start for it."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    return talking_pair(tmp_path_factory.mktemp("tiny"), num_rows=60)


@pytest.fixture
def sweep(pair: TinyPair, tmp_path: Path) -> Sweep:
    """Two cells, each of which is a job of its own."""
    return Sweep(
        name="tiny", cell=tiny_cell(pair, num_replicates=50), axes={"sampling.temperature": (0.7, 1.0)},
        resources=Resources(cluster="local", gpus=0, tasks=1, time=5, cells_per_job=1),
        registry=str(tmp_path / "registry"), vector_cache=str(tmp_path / "vector_cache"),
    )  # fmt: skip


def logs(sweep: Sweep) -> Path:
    return Path(sweep.registry).parent / "logs"


@pytest.mark.slow
def test_of_commands_that_claim_the_same_cells_at_one_moment_one_gets_them(sweep: Sweep) -> None:
    Path(sweep.registry).mkdir()
    plan = planned(identify_cells(sweep))
    jobs: list[Job | None] = []
    together = threading.Barrier(3)

    def claim() -> None:
        together.wait()
        with run_sweep._claims(sweep):
            jobs.append(run_sweep._claim_cells(sweep, (), claimed, plan.missing))

    claimed: set[str] = set()
    threads = [threading.Thread(target=claim) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [job] = all_jobs(logs(sweep))
    assert sorted(jobs, key=bool) == [None, None, job] and claimed == {step.cell_key for step in plan.steps}
    assert set(survey_jobs(logs(sweep)).live_job_by_cell) == claimed


@pytest.mark.slow
def test_cells_that_another_command_has_begun_are_waited_for_and_planned_anew(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between plan and claim another command begins the first cell, and fails at it."""
    other: list[Job] = []

    def claim(*arguments: Any) -> Job | None:
        if not other:
            group = arguments[-1]
            other.append(create_job(logs(sweep), "a:b", {"sweep": "tiny"}, 1, cells=[(group[0][1].cell_key, "n=1")]))
        return claim_cells(*arguments)

    def sleep_until_the_other_fails(seconds: float) -> None:
        slept(seconds)
        for job in other:
            job.write_outcome(Outcome(rank=0, status="failed", kind="NaN", message="loss is NaN"))

    claim_cells, slept = run_sweep._claim_cells, time.sleep
    monkeypatch.setattr(run_sweep, "_claim_cells", claim)
    monkeypatch.setattr("ksweep.launch.reconcile.time.sleep", sleep_until_the_other_fails)
    monkeypatch.setattr(run_locally, "run_jobs", lambda create_jobs, *_: all(create() is not None for create in create_jobs))
    plans: list[SweepPlan] = []
    jobs = run_sweep.run_missing(identify_cells(sweep), retry=(), on_plan=plans.append)
    assert f"job {other[0].id} of another command is still at work on this sweep: waiting" in capsys.readouterr().err
    assert [[step.state for step in plan.steps] for plan in plans] == [["missing", "missing"], ["failed", "missing"]]
    assert jobs.num_computed == 1 and [step.reason for step in jobs.plan.failed] == ["NaN: loss is NaN (--retry runs it again)"]


def test_gpus_acquired_for_a_job_that_is_not_created_are_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSWEEP_HOME", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    asked: list[int] = []
    several = [lambda: asked.append(1)] * 3  # None: another command is at work on its cells
    assert run_locally.run_jobs(several, Resources(cluster="local", gpus=1), "test") is False
    assert asked == [1] and gpu_leases.gpu_holders(("0", "1")) == {}


LAUNCHER = """
import os, time
from pathlib import Path
from ksweep import *
from ksweep.config.spec import *
from ksweep.launch import run_sweep

folder, plan = Path({folder!r}), run_sweep.planned
def planned_at_one_moment(*arguments):
    planned = plan(*arguments)
    (folder / f"planned-{{os.getpid()}}").touch()
    while len(list(folder.glob("planned-*"))) < 2:
        time.sleep(0.01)
    return planned
run_sweep.planned = planned_at_one_moment
sweep_main({sweep!r}, ["--no-charts"])
"""


@pytest.mark.trials
@pytest.mark.slow
@pytest.mark.usefixtures("forked_python")
@pytest.mark.parametrize("killed", [False, True])
def test_two_launchers_at_once_compute_every_unit_once_and_both_end_well(sweep: Sweep, tmp_path: Path, killed: bool) -> None:
    """Both plan before either starts anything. If the one that began is killed (-9), the other carries on."""
    sweep = sweep if killed else replace(sweep, resources=IN_PROCESS)
    script = LAUNCHER.format(folder=str(tmp_path), sweep=sweep)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    launchers = [
        subprocess.Popen(
            [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    if killed:
        [job] = until(lambda: [job for job in all_jobs(logs(sweep)) if job.heartbeats()])
        psutil.Process(job.spec()["launcher"]["pid"]).kill()
    ends = [launcher.communicate() for launcher in launchers]
    assert sorted(launcher.returncode for launcher in launchers) == ([-9, 0] if killed else [0, 0]), ends
    for launcher, (out, _) in zip(launchers, ends, strict=True):
        assert launcher.returncode or ("0.7" in out and "of 2 cells" in out)
    assert ask(sweep, "SELECT label, status, num_draws_sampled FROM runs ORDER BY label") == [
        ("temperature=0.7", "finished", 320), ("temperature=1", "finished", 320),
    ]  # fmt: skip
    jobs = all_jobs(logs(sweep))
    assert len(jobs) == 2 and {(job.final_status() or {})["state"] for job in jobs} == {"finished"}
    assert [step.state for step in planned(identify_cells(sweep)).steps] == ["done", "done"]
