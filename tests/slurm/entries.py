"""What jobs of these tests run: units of known length in place of draws, so that Slurm is what takes the time."""

from __future__ import annotations

import errno
import os
import socket
import time
from pathlib import Path
from typing import Any

from ksweep.evaluation.distributed import Ranks, claim_indices


def units(argument: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Publish a file a unit, as the draws store does; those that are there are not done again."""
    folder = Path(argument["folder"])
    ranks.barrier()
    left = [i for i in range(argument["total"]) if not (folder / f"{i:04d}").exists()]
    ranks.barrier()
    for index in claim_indices(ranks, f"units/{len(left)}", len(left)):
        ranks.report("units", index, len(left))
        time.sleep(argument["seconds"])
        with (folder / f"{left[index]:04d}").open("a") as file:
            file.write(f"{os.environ.get('SLURM_RESTART_COUNT', '0')}\n")
    ranks.barrier()
    return where(argument, ranks)


def where(argument: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """What a rank is given, and when it ran."""
    begun = time.time()
    time.sleep(argument.get("seconds", 0.0))
    return {
        "host": socket.gethostname(), "rank": ranks.rank, "world_size": ranks.world_size, "begun": begun, "ended": time.time(),
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "setup": os.environ.get("FROM_SETUP"), "code": __file__,
        "name": os.environ.get("SLURM_JOB_NAME"), "cpus": os.environ.get("SLURM_CPUS_PER_TASK"),
        "local_rank": os.environ.get("SLURM_LOCALID"), "openable": openable_gpus(),
    }  # fmt: skip


def openable_gpus() -> list[int]:
    """Numbers of the bed's devices that this process may open: there is nothing behind them, but a cgroup refuses before that."""
    found = []
    for device in sorted(Path(os.environ["SLURM_CONF"]).parents[1].glob("dev/nvidia[0-9]")):
        try:
            os.close(os.open(device, os.O_RDWR))
        except OSError as error:
            if error.errno == errno.EPERM:
                continue
        found.append(int(device.name.removeprefix("nvidia")))
    return found


def until_told(argument: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Holds what it was given until a file is there."""
    (Path(argument["folder"]) / "begun").touch()
    while not (Path(argument["folder"]) / "end").exists():
        time.sleep(0.2)
    return where({}, ranks)


def fills_memory(argument: dict[str, Any], ranks: Ranks) -> None:
    """Takes twice the memory that it was given, and keeps it."""
    held = []
    for _ in range(20):
        held.append(bytearray(os.urandom(1000) * 50_000))
        time.sleep(0.1)
    time.sleep(60)


def two_ranks_raise(argument: dict[str, Any], ranks: Ranks) -> None:
    """Ranks 0 and 1 each fail for a reason of their own."""
    raise ValueError(f"what only rank {ranks.rank} knows")


def deaf(argument: dict[str, Any], ranks: Ranks) -> str:
    """A unit that does not look at the clock: longer than the grace time."""
    begun = Path(argument["folder"]) / f"begun-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    begun.touch()
    if begun.name == "begun-0":
        time.sleep(300)
    return begun.name
