"""GPUs of this machine, lent to one local job at a time, whichever launcher started it: the queue that submitit lacks.

$KSWEEP_HOME/gpus/<host>/<GPU>.json names the job that holds a GPU, and a process of it. It is held as long as that process lives,
or any rank of the job does: a launcher that dies gives nothing back that its job still computes on.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from ksweep.launch.job import Job
from ksweep.launch.rank_records import Heartbeat, is_alive, this_process
from ksweep.utils.files import home, locked, publish

DRIVER_DIRECTORY = Path("/proc/driver/nvidia/gpus")
"""A directory a GPU, named by its place on the bus, in the order in which GPUs are numbered."""


def acquire_gpus(devices: Sequence[str], count: int, name: str) -> tuple[str, ...] | None:
    """`count` of these GPUs for a job; None while not so many are free. Held by this process until handed on or released."""
    with _lock():
        free = [d for d in devices if _holder(d) is None]
        if len(free) < count:
            return None
        for device in free[:count]:
            _write_lease(device, {"job": name, "process": this_process()})
    return tuple(free[:count])


def transfer_gpus(devices: Sequence[str], job: Job, pid: int) -> None:
    """Let the job and a process of its hold GPUs, so that they stay taken when the launcher is gone."""
    import psutil

    with _lock(), suppress(psutil.NoSuchProcess):
        holder = {**this_process(), "pid": pid, "process_started": psutil.Process(pid).create_time()}
        for device in devices:
            _write_lease(device, {"job": job.id, "process": holder, "path": str(job.path)})


def release_gpus(devices: Sequence[str], job: str) -> None:
    """Give back what a job held; a GPU of a job that has ended may have been lent to another by now."""
    with _lock():
        for device in devices:
            if (_read_lease(device) or {}).get("job") == job:
                _lease_path(device).unlink(missing_ok=True)


def gpu_holders(devices: Sequence[str]) -> dict[str, str]:
    """Which job holds which GPU."""
    return {d: job for d in devices if (job := _holder(d)) is not None}


def _holder(device: str) -> str | None:
    told = _read_lease(device)
    if told is None:
        return None
    held = is_alive(Heartbeat(rank=0, **told["process"])) or ("path" in told and Job(Path(told["path"])).has_live_rank())
    return f"job {told['job']}" if held else None


def _read_lease(device: str) -> dict[str, Any] | None:
    try:
        return json.loads(_lease_path(device).read_text())  # type: ignore[no-any-return]
    except (OSError, ValueError):
        return None


def _write_lease(device: str, holder: dict[str, object]) -> None:
    publish(_lease_path(device), json.dumps(holder).encode(), durable=False)


def _lease_path(device: str) -> Path:
    return _folder() / f"{_gpu_name(device)}.json"


def _gpu_name(device: str) -> str:
    """One name for a GPU, whether a launcher was given its number or (the beginning of) its UUID."""
    if device.startswith("GPU-"):
        same = [i for i, uuid in enumerate(_uuids()) if uuid.startswith(device)]
        if len(same) == 1:
            return str(same[0])
    return device.replace("/", "_")


def _uuids() -> list[str]:
    found = [re.search(r"GPU UUID:\s*(\S+)", path.read_text()) for path in sorted(DRIVER_DIRECTORY.glob("*/information"))]
    return [match[1] if match else "" for match in found]


def _folder() -> Path:
    return home() / "gpus" / socket.gethostname()


def _lock() -> AbstractContextManager[bool]:
    return locked(_folder() / "lock", "another launcher")
