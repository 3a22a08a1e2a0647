"""GPUs that torch cannot use, and those of a rank. No machine of the tests has any: torch.cuda's answers are stood in for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ksweep.cli import doctor
from ksweep.config.resources import Resources
from ksweep.launch import gpu_support, hardware
from ksweep.launch.gpu_support import GpuDriver, TorchBuild, gpu_problem, torch_build
from ksweep.launch.worker import devices, process_group
from ksweep.utils.errors import RunError, SpecError

OLD, NEW, NONE = GpuDriver("550.54.14", (12, 4)), GpuDriver("580.65.06", (13, 0)), GpuDriver(None, None)


@pytest.mark.parametrize(
    ("build", "driver", "words"),
    [
        (TorchBuild("2.13.0+cu130", "13.0"), NEW, None),
        (TorchBuild("2.13.0+cu129", "12.9"), OLD, None),  # minor versions are compatible
        (TorchBuild("2.8.0+cu126", "12.6"), NEW, None),
        (TorchBuild("2.13.0", "13.0"), GpuDriver("550.54.14", None), None),
        (TorchBuild("2.13.0+rocm7", None, True), NONE, None),
        (None, NONE, None),
        (
            TorchBuild("2.13.0", "13.0"),
            OLD,
            ["CUDA 13.0", "550.54.14 supports CUDA 12.4", "pip install torch==2.13.0 --index-url", "/cu129", "580"],
        ),
        (TorchBuild("2.13.0+cu129", "12.9"), GpuDriver("470.82", (11, 4)), ["CUDA 11.4", "update the driver to 525 or newer"]),
        (TorchBuild("2.13.0+cpu", None), OLD, ["without CUDA", "torch==2.13.0 --index-url", "/cu129"]),
        (TorchBuild("2.13.0+cpu", None), NEW, ["without CUDA", "torch==2.13.0 --index-url https://pypi.org/simple"]),
        (TorchBuild("2.13.0", "13.0"), NONE, ["no NVIDIA driver is loaded", "--gpus all"]),
    ],
)
def test_a_torch_that_a_driver_does_not_support_is_named_with_the_remedy(
    build: TorchBuild | None, driver: GpuDriver, words: list[str] | None
) -> None:
    problem = gpu_problem(build, driver)
    assert (problem is None) == (words is None)
    assert [word for word in words or [] if word not in (problem or "")] == []


def test_the_build_is_read_from_torchs_files() -> None:
    assert torch_build() == TorchBuild(torch.__version__, torch.version.cuda, torch.version.hip is not None)


def test_the_drivers_version_is_read_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "version"
    file.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024\nGCC version: 12.2\n"
    )
    monkeypatch.setattr(gpu_support, "DRIVER_VERSION_FILE", file)
    assert gpu_support.gpu_driver().version == "550.54.14"


@pytest.fixture
def old_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, and a torch that is too new for their driver."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(gpu_support, "torch_build", lambda: TorchBuild("2.13.0", "13.0"))
    monkeypatch.setattr(gpu_support, "gpu_driver", lambda: OLD)


@pytest.mark.usefixtures("old_driver")
def test_launcher_doctor_and_rank_say_the_same_of_gpus_that_torch_cannot_use() -> None:
    for cluster in ("local", "inprocess"):
        with pytest.raises(SpecError) as refused:
            gpu_support.check_local_gpus(Resources(cluster=cluster, gpus=1))
    gpu_support.check_local_gpus(Resources(cluster="local", gpus=0))
    [finding] = doctor._gpu()
    with pytest.raises(RunError) as failed:
        devices.rank_devices(SimpleNamespace(local_rank=0), 1, 1)
    assert finding.state == "bad" and "2 GPUs here" in finding.message and "torch sees 0" in str(failed.value)
    problem = gpu_problem(TorchBuild("2.13.0", "13.0"), OLD)
    assert all(problem in text for text in (str(refused.value), finding.message, str(failed.value)))  # type: ignore[operator]


def test_doctor_notes_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "visible_devices", lambda: ())
    [finding] = doctor._gpu()
    assert finding.state == "note" and "runs use the CPU" in finding.message


@pytest.mark.parametrize(
    ("gpus", "per_model", "seen", "local_rank", "expected"),
    [
        (8, 1, 8, 5, ["cuda:5"]),
        (8, 2, 8, 3, ["cuda:6", "cuda:7"]),
        (8, 1, 1, 5, ["cuda:0"]),  # the cluster binds one to each task
        (8, 2, 2, 3, ["cuda:0", "cuda:1"]),
        (1, 1, 4, 0, ["cuda:0"]),
        (8, 1, 3, 5, None),
        (8, 2, 1, 0, None),
    ],
)
def test_a_rank_takes_its_gpus_by_number_or_those_that_the_cluster_has_bound_to_it(
    monkeypatch: pytest.MonkeyPatch, gpus: int, per_model: int, seen: int, local_rank: int, expected: list[str] | None
) -> None:
    current: list[str] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(gpu_support, "gpu_driver", lambda: NEW)
    monkeypatch.setattr(gpu_support, "torch_build", lambda: TorchBuild("2.13.0", "13.0"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7,1")
    environment = SimpleNamespace(local_rank=local_rank)
    if expected is None:
        with pytest.raises(RunError, match=f"given {gpus} GPUs on .*, torch sees {seen}: CUDA_VISIBLE_DEVICES=4,7,1"):
            devices.rank_devices(environment, gpus, per_model)
    else:
        assert list(devices.rank_devices(environment, gpus, per_model)) == expected and current == expected[:1]


class Store(dict[str, int]):
    """The counters of a process group's store."""

    def add(self, key: str, amount: int) -> int:
        self[key] = self.get(key, 0) + amount
        return self[key]


@pytest.mark.parametrize(("name", "refused"), [("NVIDIA H100", True), ("NVIDIA H100 MIG 1g.10gb", False)])
def test_two_ranks_that_were_shown_one_gpu_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, refused: bool) -> None:
    uuid = ["4bcb7e12"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid[0]))
    store = Store()
    devices.check_devices_are_own(store, ("cuda:0",))
    devices.check_devices_are_own(store, ("cpu",))
    if refused:
        with pytest.raises(RunError, match="GPU-4bcb7e12"):
            devices.check_devices_are_own(store, ("cuda:0",))
    else:
        devices.check_devices_are_own(store, ("cuda:0",))
    uuid[0] = "another"
    devices.check_devices_are_own(store, ("cuda:0",))


def test_ranks_on_gpus_meet_over_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL would take memory and a spinning kernel of each GPU, for barriers alone."""
    import torch.distributed as dist

    joined: list[Any] = []
    monkeypatch.setattr(process_group, "rank_devices", lambda *_: ("cuda:0",))
    for name in ("device_text", "gpu_ids_text", "check_devices_are_own"):
        monkeypatch.setattr(process_group, name, lambda *_: "")
    monkeypatch.setattr(process_group, "_meet", lambda heartbeat, host: Store())
    monkeypatch.setattr(process_group, "replace", lambda latest, **_: latest)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: joined.append(backend))
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", Store)
    monkeypatch.setattr(
        "submitit.helpers.TorchDistributedEnvironment",
        lambda: SimpleNamespace(export=lambda **_: SimpleNamespace(master_addr="")),
    )
    heartbeat: Any = SimpleNamespace(latest=None, rank=0, world_size=2)
    process_group.join_process_group(heartbeat, 2, 1, SimpleNamespace(num_tasks=2))
    assert joined == ["gloo"]
