"""What jobs of these tests run: units of known length in place of draws, so that Slurm is what takes the time."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

from ksweep.ranks import Ranks, share


def units(argument: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Publish a file a unit, as the draws store does; those that are there are not done again."""
    folder = Path(argument["folder"])
    ranks.barrier()
    left = [i for i in range(argument["total"]) if not (folder / f"{i:04d}").exists()]
    ranks.barrier()
    for index in share(ranks, f"units/{len(left)}", len(left)):
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
    }  # fmt: skip


def one_rank_is_killed(argument: dict[str, Any], ranks: Ranks) -> None:
    """Rank 1 is shot while the others wait for it."""
    ranks.barrier()
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.barrier()


def is_killed(argument: dict[str, Any], ranks: Ranks) -> None:
    """The only rank is shot."""
    os.kill(os.getpid(), signal.SIGKILL)


def fills_memory(argument: dict[str, Any], ranks: Ranks) -> None:
    """Takes more memory than it was given."""
    held = []
    for _ in range(2000):
        held.append(bytearray(os.urandom(1000) * 1000))
        time.sleep(0.001)


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
