"""Entry points that jobs of the launch tests run."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from ksweep.evaluation.distributed import Ranks, claim_indices
from ksweep.utils.errors import DataError
from ksweep.utils.files import publish


def count(argument: dict[str, Any], ranks: Ranks) -> list[int]:
    """Take numbers from the shared queue and leave one file for each."""
    folder = Path(argument["folder"])
    ranks.barrier()
    mine = []
    for index in claim_indices(ranks, "numbers", argument["total"]):
        (folder / f"{index:04d}-{ranks.rank}").touch(exist_ok=False)
        if not mine:
            ranks.barrier()  # every rank takes a number before one takes the second
        ranks.report("counting", index, argument["total"], speed=1.0)
        mine.append(index)
    ranks.barrier()
    assert len(list(folder.iterdir())) == argument["total"], "the barrier let a rank through too early"
    return mine


def one_rank_raises(argument: dict[str, Any], ranks: Ranks) -> None:
    """Rank 1 raises while rank 0 waits for it."""
    if ranks.rank == 1:
        raise DataError("vector 17 is not finite")
    ranks.barrier()


def one_rank_is_killed(argument: dict[str, Any], ranks: Ranks) -> None:
    """Rank 1 is shot at its cell while rank 0 waits for it."""
    ranks.begin_cell("a cell", {})
    ranks.barrier()
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.barrier()


def one_rank_is_killed_while_it_starts(argument: dict[str, Any], ranks: Ranks) -> None:
    """Rank 1 is shot before any rank has begun a cell."""
    ranks.barrier()
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.barrier()


def works_until_told_to_stop(argument: dict[str, Any], ranks: Ranks) -> None:
    """Units of a tenth of a second, more than anybody waits for."""
    for index in claim_indices(ranks, "long", 10_000):
        ranks.report("working", index, 10_000)
        time.sleep(0.1)


def holds_gpus(argument: dict[str, Any], ranks: Ranks) -> None:
    """Say which GPUs and threads this process was given, and from when until when: until so many jobs have begun at least."""
    place = Path(argument["folder"]) / f"gpus-{os.getpid()}.json"
    told = {"devices": os.environ["CUDA_VISIBLE_DEVICES"], "pid": os.getpid(), "begun": time.time(), "ended": 0.0}
    told |= {"threads": os.environ.get("OMP_NUM_THREADS")}
    publish(place, json.dumps(told).encode())
    deadline = time.monotonic() + 120
    while len(list(place.parent.parent.glob("*/gpus-*.json"))) < argument["beside"] and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(argument["seconds"])
    publish(place, json.dumps(told | {"ended": time.time()}).encode())


def gpus_of_this_rank(gpus_per_model: int) -> list[str]:
    """The numbers that the GPUs of a rank have for the machine; called by submitit itself."""
    import submitit

    from ksweep.launch.worker.devices import gpus_of_rank

    seen = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    own = gpus_of_rank(submitit.JobEnvironment().local_rank, gpus_per_model)
    return [seen[int(device.removeprefix("cuda:"))] for device in own]


def two_ranks_raise(argument: dict[str, Any], ranks: Ranks) -> None:
    """Every rank fails at the same moment for a reason of its own, in a cell that it has begun."""
    ranks.begin_cell("", {"drawing": 1.5})
    ranks.report("drawing", 3 + ranks.rank, 8)
    ranks.barrier()
    print(f"rank {ranks.rank} was about to go wrong", file=sys.stderr, flush=True)
    raise ValueError(f"what only rank {ranks.rank} knows")


def has_no_memory(argument: dict[str, Any], ranks: Ranks) -> None:
    """What numpy raises for an array that does not fit."""
    raise MemoryError("Unable to allocate 8.00 TiB for an array")


def sleeps(argument: dict[str, Any], ranks: Ranks) -> None:
    """A rank that looks at nothing for longer than anybody waits."""
    time.sleep(600)


def threads(argument: dict[str, Any], ranks: Ranks) -> dict[str, str]:
    """What the record of a run would say of this rank's threads, once torch and NumPy are loaded."""
    from ksweep.evaluation.models import threads_in_use

    return threads_in_use()
