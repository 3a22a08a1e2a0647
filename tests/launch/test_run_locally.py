"""Jobs on this machine that do not start, or whose end cannot be written: nothing stays taken by a process that lives on."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ksweep.config.resources import Resources
from ksweep.launch import gpu_leases, run_locally, run_sweep
from ksweep.launch import local_executor as launch
from ksweep.launch.job import Job, create_job
from ksweep.launch.local_executor import LocalJob
from ksweep.launch.rank_records import Outcome
from ksweep.launch.reconcile import finalize_ended_jobs
from ksweep.launch.survey import survey_jobs
from ksweep.utils.errors import RunError, SpecError

ONE_GPU, IN_PROCESS = Resources(cluster="local", gpus=1), Resources(cluster="inprocess", gpus=0)


@pytest.fixture(autouse=True)
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSWEEP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")


@pytest.fixture
def create(tmp_path: Path) -> Callable[[], Job]:
    entry, cells = "tests.launch.entries:threads", [("key", "n=1")]
    return partial(create_job, tmp_path / "logs", entry, {}, 1, cells=cells)


def raises(error: BaseException) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    return refuse


def seen(tmp_path: Path) -> list[tuple[str, str]]:
    """State and class of every job that was finalized; no other is there."""
    assert survey_jobs(tmp_path / "logs").statuses == {}
    finals = [Job(path.parent).final_status() or {} for path in sorted((tmp_path / "logs").glob("*/job.json"))]
    return [(final["state"], final["kind"]) for final in finals]


@pytest.mark.parametrize("error", [SpecError("no such model"), RunError("the disk is full"), OSError("x"), KeyboardInterrupt()])
def test_gpus_are_released_if_their_job_cannot_be_claimed(error: BaseException) -> None:
    with pytest.raises(type(error)):
        run_locally.run_jobs([raises(error)], ONE_GPU, "test")
    assert gpu_leases.gpu_holders(("0", "1")) == {}


@pytest.mark.parametrize("error", [RunError("submitit refuses"), OSError("x"), KeyboardInterrupt()])
def test_a_job_that_does_not_start_is_finalized_and_its_gpus_are_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, create: Callable[[], Job], error: BaseException
) -> None:
    """Its launcher, a notebook, lives on: to others the job would be about to start."""
    monkeypatch.setattr(launch, "start_local_job", raises(error))
    with pytest.raises(type(error)):
        run_locally.run_jobs([create], ONE_GPU, "test")
    assert gpu_leases.gpu_holders(("0", "1")) == {} and seen(tmp_path) == [("stopped", "never submitted")]


def test_a_job_beside_one_that_cannot_be_claimed_ends_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, create: Callable[[], Job]
) -> None:
    def start(job: Job, *_: Any) -> LocalJob:
        threading.Timer(0.5, lambda: job.write_outcome(Outcome(rank=0, status="finished"))).start()
        return LocalJob(job, None)

    monkeypatch.setattr(launch, "start_local_job", start)
    two = Resources(cluster="local", gpus=0, tasks=1, max_parallel_jobs=2)
    with pytest.raises(RunError, match="the disk is full"):
        run_locally.run_jobs([create, raises(RunError("the disk is full"))], two, "test")
    assert seen(tmp_path) == [("finished", "")]


@pytest.mark.parametrize("everything", [False, True])
def test_a_run_in_this_process_whose_outcome_cannot_be_written_does_not_go_on_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, create: Callable[[], Job], everything: bool
) -> None:
    """The process lives on, and lock and heartbeat would say that the rank does. Nor may the note of its end be written."""
    refuse = raises(OSError(errno.EIO, "Input/output error"))
    monkeypatch.setattr(Job, "write_outcome", refuse)
    if everything:
        monkeypatch.setattr(Job, "write_note", refuse)
    with pytest.raises(OSError, match="Input/output"):
        run_locally.run_jobs([create], IN_PROCESS, "test")
    monkeypatch.undo()
    if everything:
        finalize_ended_jobs(tmp_path / "logs")
    assert seen(tmp_path) == [("failed", "disk error")]


def test_a_command_that_waits_to_claim_holds_no_gpu_and_says_so(
    tmp_path: Path, create: Callable[[], Job], capsys: pytest.CaptureFixture[str]
) -> None:
    sweep: Any = type("Sweep", (), {"registry": str(tmp_path / "registry")})
    held: list[dict[str, str]] = []

    @contextmanager
    def claims() -> Iterator[None]:
        threading.Timer(0.5, lambda: (held.append(gpu_leases.gpu_holders(("0", "1"))), free.set())).start()
        with run_sweep._claims(sweep):
            yield

    def hold() -> None:
        with run_sweep._claims(sweep):
            taken.set()
            free.wait()

    taken, free = threading.Event(), threading.Event()
    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    assert run_locally.run_jobs([lambda: None], ONE_GPU, "test", claims) is False
    thread.join()
    assert held == [{}] and f"another command is at work in {tmp_path / 'logs'}: waiting for it" in capsys.readouterr().err


def test_a_job_that_may_not_be_finalized_is_not_waited_for_again(
    monkeypatch: pytest.MonkeyPatch, create: Callable[[], Job]
) -> None:
    monkeypatch.setattr(run_locally, "finalize", lambda *_: None)
    looks = []
    monkeypatch.setattr(time, "sleep", lambda _: looks.append(1) if len(looks) < 9 else raises(AssertionError("it spins"))())
    assert run_locally.run_jobs([create], IN_PROCESS, "test")
