"""GPUs of this machine, lent to one local job at a time, whichever launcher started it: the queue that submitit lacks.

$KSWEEP_HOME/gpus/<host>/<number>.json names the process that holds a GPU; a holder that is dead holds nothing.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from ksweep.files import home, locked, publish
from ksweep.launch.job import Heartbeat, is_alive, myself


def _folder() -> Path:
    return home() / "gpus" / socket.gethostname()


def take(numbers: Sequence[int], count: int, job: str) -> tuple[int, ...] | None:
    """`count` of these GPUs for a job; None while not so many are free. Held by this process until handed on or released."""
    with _lock():
        free = [n for n in numbers if _holder(n) is None]
        if len(free) < count:
            return None
        for number in free[:count]:
            _write(number, job, myself())
    return tuple(free[:count])


def hand_on(numbers: Sequence[int], job: str, pid: int) -> None:
    """Let the job's own process hold its GPUs, so that they stay taken when the launcher is gone."""
    import psutil

    with _lock(), suppress(psutil.NoSuchProcess):
        holder = {**myself(), "pid": pid, "process_started": psutil.Process(pid).create_time()}
        for number in numbers:
            _write(number, job, holder)


def release(numbers: Sequence[int]) -> None:
    """Give GPUs back."""
    with _lock():
        for number in numbers:
            (_folder() / f"{number}.json").unlink(missing_ok=True)


def holders(numbers: Sequence[int]) -> dict[int, str]:
    """Which job holds which GPU."""
    return {n: job for n in numbers if (job := _holder(n)) is not None}


def _holder(number: int) -> str | None:
    try:
        told = json.loads((_folder() / f"{number}.json").read_text())
    except (OSError, ValueError):
        return None
    return str(told["job"]) if is_alive(Heartbeat(rank=0, **told["process"])) else None


def _write(number: int, job: str, process: dict[str, object]) -> None:
    publish(_folder() / f"{number}.json", json.dumps({"job": job, "process": process}).encode(), durable=False)


def _lock() -> AbstractContextManager[bool]:
    return locked(_folder() / "lock", "another launcher")
