"""The torch devices of a rank: which are its own of those that its job sees on the node, and what they are called."""

from __future__ import annotations

import os
import platform
import socket
from typing import Any

from ksweep.launch import gpu_support
from ksweep.utils.errors import RunError


def rank_devices(environment: Any, gpus: int, per_model: int) -> tuple[str, ...]:
    """Return the devices of this rank.

    Where torch sees as many GPUs as the job has on the node, ranks take theirs by number. Where it sees as many as one rank
    needs, the cluster has bound them to the task (`gpu-bind=single:1`, or a cgroup for each task), and all are the rank's.

    Args:
        environment: submitit's JobEnvironment.
        gpus: of the job on each node; 0 runs on the CPU.
        per_model: GPUs over which the rank spreads each model.

    Raises:
        RunError: torch sees another number of GPUs.
    """
    if gpus == 0:
        return ("cpu",)
    import torch

    seen = torch.cuda.device_count()
    is_bound = seen == per_model < gpus
    if seen < gpus and not is_bound:
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        variable = "CUDA_VISIBLE_DEVICES is not set" if shown is None else f"CUDA_VISIBLE_DEVICES={shown}"
        problem = gpu_support.gpu_problem(gpu_support.torch_build(), gpu_support.gpu_driver())
        reason = problem or f"{variable}; does `nvidia-smi -L` in the job list {gpus} GPUs, or {per_model} for each task?"
        raise RunError(f"the job was given {gpus} GPUs on {socket.gethostname()}, torch sees {seen}: {reason}")
    devices = gpus_of_rank(0 if is_bound else environment.local_rank, per_model)
    torch.cuda.set_device(devices[0])  # the one that is meant where none is named
    return devices


def check_devices_are_own(store: Any, devices: tuple[str, ...]) -> None:
    """Check that no other rank of the process group has the same GPU.

    Raises:
        RunError: one has, as where all tasks of a node were shown one GPU and took it for their own.
    """
    import torch

    for device in devices:
        if not device.startswith("cuda") or "MIG" in torch.cuda.get_device_name(device):  # slices may have their GPU's UUID
            continue
        gpu = f"{socket.gethostname()}/{_card(device).partition(' ')[2] or device}"
        if store.add(f"ksweep/gpu/{gpu}", 1) > 1:
            raise RunError(
                f"two ranks of this job use the same GPU ({gpu}): its tasks see too few. Show each task the GPUs of the job "
                "(resources.gpus of each node), or bind another one to each (resources.extra={gpu-bind: single:1})."
            )


def gpus_of_rank(local_rank: int, per_model: int) -> tuple[str, ...]:
    """Return the GPUs of a rank among those that its job sees on the node: consecutive numbers, in the order of the ranks."""
    return tuple(f"cuda:{local_rank * per_model + i}" for i in range(per_model))


def device_text(devices: tuple[str, ...]) -> str:
    """Return a human-readable name of torch devices: number and name of the GPUs, or the kind of processor."""
    if not devices[0].startswith("cuda"):
        return f"cpu ({platform.machine()})"
    import torch

    several = f"{len(devices)} x " if len(devices) > 1 else ""
    return several + str(torch.cuda.get_device_name(devices[0]))


def gpu_ids_text(devices: tuple[str, ...]) -> str:
    """Return the UUIDs of GPUs as nvidia-smi -L shows them, to find a card that fails repeatedly; empty for a processor."""
    return ", ".join(_card(device) for device in devices if device.startswith("cuda"))


def _card(device: str) -> str:
    import torch

    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return f"{device} GPU-{str(uuid).removeprefix('GPU-')}" if uuid else device
