"""Which cluster a job runs on, and how many GPUs and ranks it has there."""

from __future__ import annotations

import os
import shutil
from itertools import takewhile
from pathlib import Path

from ksweep.config.resources import Resources
from ksweep.launch.slurm import commands
from ksweep.utils.errors import SpecError


def resolve_cluster(resources: Resources) -> str:
    """Resolve `resources.cluster`: slurm, local or inprocess."""
    if resources.cluster == "slurm":
        if shutil.which("sbatch") is None:
            raise SpecError("resources.cluster=slurm, but there is no sbatch here: log in to a submit node, or use cluster=local")
        if not commands.has_cluster():
            raise SpecError(
                "resources.cluster=slurm, but Slurm's commands find no cluster here: is SLURM_CONF set? (scontrol ping)"
            )
    if resources.cluster != "auto":
        return resources.cluster
    return "slurm" if commands.has_cluster() else "local"


def num_gpus(resources: Resources) -> int:
    """Return the GPUs per node of a job: by default one if this machine has any, which a login node of Slurm may not."""
    if resources.gpus is not None:
        return resources.gpus
    return min(1, visible_gpus())


def visible_gpus() -> int:
    """Return how many GPUs a process on this machine would see, without importing torch."""
    return len(visible_devices())


def visible_devices() -> tuple[str, ...]:
    """Return the visible GPUs as CUDA_VISIBLE_DEVICES names them (number, "GPU-<UUID>", "MIG-..."); else all by number."""
    if (shown := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        named = [device.strip() for device in shown.split(",")]
        return tuple(takewhile(lambda d: d not in ("", "-1"), named))  # CUDA sees none after one that is not there
    return tuple(str(n) for n in range(len([p for p in Path("/dev").glob("nvidia[0-9]*") if p.name[6:].isdigit()])))


def tasks_per_node(resources: Resources) -> int:
    """Return the number of ranks per node: one for every `gpus_per_model` GPUs, or `tasks` on CPUs (1 if left open)."""
    return num_gpus(resources) // resources.gpus_per_model or resources.tasks or 1


def total_ranks(resources: Resources) -> int:
    """Return the number of ranks of one job."""
    if resolve_cluster(resources) == "inprocess":
        return 1
    return tasks_per_node(resources) * resources.nodes
