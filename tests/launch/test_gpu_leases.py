"""GPUs of this machine are lent to one job at a time, by launchers that know nothing of each other, and come back from the dead.

No GPU is needed: jobs say which CUDA_VISIBLE_DEVICES they were given, and when.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ksweep.config.resources import Resources
from ksweep.launch import gpu_leases, hardware
from ksweep.launch import local_executor as launch
from ksweep.launch.job import Job, create_job
from ksweep.launch.rank_records import Heartbeat, process_record
from ksweep.utils.errors import SpecError
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("forked_python")

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSWEEP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_gpus_are_lent_once_and_waited_for_together() -> None:
    assert gpu_leases.acquire_gpus(("0", "1", "2"), 2, "first") == ("0", "1")
    assert gpu_leases.acquire_gpus(("0", "1", "2"), 2, "second") is None
    assert gpu_leases.acquire_gpus(("0", "1", "2"), 1, "third") == ("2",)
    assert gpu_leases.gpu_holders(("0", "1", "2")) == {"0": "job first", "1": "job first", "2": "job third"}
    gpu_leases.release_gpus(("0", "1", "2"), "first")
    assert gpu_leases.acquire_gpus(("0", "1", "2"), 2, "second") == ("0", "1")


def test_only_the_gpus_that_are_visible_are_lent() -> None:
    assert gpu_leases.acquire_gpus(("5", "7"), 1, "a") == ("5",)
    assert gpu_leases.acquire_gpus(("5",), 1, "b") is None
    assert gpu_leases.acquire_gpus(("5", "7"), 1, "c") == ("7",)


def test_a_gpu_named_by_its_uuid_and_by_its_number_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bus, uuid in (("0000:65:00.0", "GPU-bbbb-2"), ("0000:17:00.0", "GPU-aaaa-1")):
        (tmp_path / "gpus" / bus).mkdir(parents=True)
        (tmp_path / "gpus" / bus / "information").write_text(f"Model: \t\t NVIDIA H100\nGPU UUID: \t {uuid}\nBus Type: PCIe\n")
    monkeypatch.setattr(gpu_leases, "DRIVER_DIRECTORY", tmp_path / "gpus")
    assert gpu_leases.acquire_gpus(("GPU-bbbb",), 1, "by uuid") == ("GPU-bbbb",)
    assert gpu_leases.acquire_gpus(("0", "1"), 2, "by number") is None
    assert gpu_leases.acquire_gpus(("0", "1"), 1, "by number") == ("0",)
    # A slice of a GPU, and a UUID that this machine has not, are slots of their own.
    assert gpu_leases.acquire_gpus(("MIG-GPU-aaaa-1/0/1", "GPU-cccc"), 2, "more") == ("MIG-GPU-aaaa-1/0/1", "GPU-cccc")


def test_a_gpu_is_held_as_long_as_the_controller_or_a_rank_lives(tmp_path: Path) -> None:
    controller, rank = (subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(2))
    job = create_job(tmp_path / "logs", "a:b", {}, 1)
    assert gpu_leases.acquire_gpus(("0",), 1, "sweep") == ("0",)
    gpu_leases.transfer_gpus(("0",), job, controller.pid)
    job.write_heartbeat(Heartbeat(rank=0, **process_record(rank.pid)))
    for process in (controller, rank):
        assert gpu_leases.acquire_gpus(("0",), 1, "other") is None
        process.kill()
        process.wait()
    assert gpu_leases.acquire_gpus(("0",), 1, "other") == ("0",)
    gpu_leases.release_gpus(("0",), job.id)  # its launcher has noticed only now
    assert gpu_leases.acquire_gpus(("0",), 1, "third") is None


@pytest.mark.parametrize(
    ("shown", "devices"),
    [
        ("0,1,2,3", ("0", "1", "2", "3")),
        ("2, 0", ("2", "0")),
        ("GPU-8f,MIG-1d", ("GPU-8f", "MIG-1d")),
        ("1,-1,0", ("1",)),
        ("", ()),
    ],
)
def test_visible_devices_are_those_that_cuda_would_see(
    monkeypatch: pytest.MonkeyPatch, shown: str, devices: tuple[str, ...]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert hardware.visible_devices() == devices and hardware.visible_gpus() == len(devices)


def test_several_slices_for_one_job_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1d,MIG-2e")
    launch.validate_local_resources(Resources(cluster="local", gpus=1))
    with pytest.raises(SpecError, match="use gpus=1"):
        launch.validate_local_resources(Resources(cluster="local", gpus=2))


LAUNCHER = """
import sys
from functools import partial
from pathlib import Path
from ksweep.launch import run_locally
from ksweep.launch.job import create_job
from ksweep.config.resources import Resources

run_locally.LEASE_POLL_SECONDS, (folder, count, seconds, gpus, beside) = 0.2, sys.argv[1:]
# gpus=0 for the ranks: nothing is behind these GPUs, so torch must not be asked for them.
argument = {"folder": folder, "seconds": float(seconds), "beside": int(beside)}
argument |= {"registry": f"{folder}/registry", "sweep": "test", "cells": []}
order = partial(create_job, Path(folder) / "logs", "tests.launch.entries:holds_gpus", argument, 1, 0)
run_locally.run_jobs([order] * int(count), Resources(cluster="local", gpus=int(gpus), time=5), "test")
"""


def launcher(folder: Path, shown: str, count: int, seconds: float, beside: int = 1) -> subprocess.Popen[bytes]:
    """A launcher of so many jobs, each on one of the GPUs that are shown to it; none ends before so many have begun."""
    folder.mkdir(exist_ok=True)
    log = (folder / f"launcher-{time.monotonic_ns()}.log").open("wb")
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(folder), str(count), str(seconds), "1", str(beside)], stdout=log, stderr=log,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": shown},
    )  # fmt: skip


def told(folder: Path) -> list[dict[str, Any]]:
    """What jobs have said of their beginning, and of their end."""
    return sorted((json.loads(path.read_text()) for path in folder.glob("gpus-*.json")), key=lambda t: t["begun"])


def overlaps(told: list[dict[str, Any]]) -> int:
    """How many jobs ran at once, at most."""
    return max(sum(other["begun"] <= one["begun"] < other["ended"] for other in told) for one in told)


@pytest.mark.slow
def test_two_launchers_at_once_share_four_gpus_without_overlap(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    several = [launcher(folder, "0,1,2,3", 4, 0.5, beside=2) for folder in folders]
    assert [process.wait(280) for process in several] == [0, 0]
    all_of_them = told(folders[0]) + told(folders[1])
    assert len(all_of_them) == 8 and {job["devices"] for job in all_of_them} == {"0", "1", "2", "3"}
    for device in "0123":
        assert overlaps([job for job in all_of_them if job["devices"] == device]) == 1, all_of_them
    assert overlaps(all_of_them) > 1, "they waited for each other instead of running side by side"


@pytest.mark.slow
def test_a_killed_launchers_job_keeps_its_gpu_until_it_ends(tmp_path: Path) -> None:
    first = launcher(tmp_path / "a", "0", 1, 6.0)
    until(lambda: told(tmp_path / "a"))
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = launcher(tmp_path / "b", "0", 1, 0.0)
    assert second.wait(240) == 0
    [one], [two] = told(tmp_path / "a"), told(tmp_path / "b")
    assert one["ended"] and two["begun"] >= one["ended"]


@pytest.mark.slow
def test_the_gpu_of_a_job_that_was_shot_is_lent_to_the_next(tmp_path: Path) -> None:
    first = launcher(tmp_path / "a", "GPU-8f3c", 1, 600.0)
    [job] = until(lambda: told(tmp_path / "a"))
    assert job["devices"] == "GPU-8f3c"
    second = launcher(tmp_path / "b", "GPU-8f3c", 1, 0.0)
    log = next((tmp_path / "b").glob("launcher-*.log"))
    until(lambda: "waiting for 1 of 1 GPUs (GPU GPU-8f3c: job" in log.read_text())
    os.kill(job["pid"], signal.SIGKILL)
    assert (first.wait(240), second.wait(240)) == (1, 0)
    assert "before it had begun a cell (killed, or out of memory)" in next((tmp_path / "a").glob("launcher-*.log")).read_text()
    assert [j["devices"] for j in told(tmp_path / "b")] == ["GPU-8f3c"]
    assert all(Job(path.parent).read_note("settled") for path in tmp_path.glob("*/logs/*/job.json"))
