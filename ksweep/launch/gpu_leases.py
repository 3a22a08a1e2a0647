"""Leases of this machine's GPUs, which submitit lacks: one local job at a time holds a GPU, whichever launcher started it.

$KSWEEP_HOME/gpus/<host>/<GPU>.json names the job that holds a GPU, and a process of it. The lease lasts as long as that process
or any rank of the job lives: if a launcher dies, its job keeps the GPUs that it still computes on.
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
from ksweep.launch.rank_records import process_record, record_is_alive
from ksweep.utils.files import home, locked, publish

DRIVER_DIRECTORY = Path("/proc/driver/nvidia/gpus")
"""One directory for each GPU, named by its address on the bus, in the order in which GPUs are numbered."""


def acquire_gpus(devices: Sequence[str], count: int, name: str) -> tuple[str, ...] | None:
    """Acquire `count` of these GPUs for a job, held by this process until transferred or released; None if too few are free."""
    with _lock():
        free = [d for d in devices if _holder(d) is None]
        if len(free) < count:
            return None
        for device in free[:count]:
            _write_lease(device, {"job": name, "process": process_record()})
    return tuple(free[:count])


def transfer_gpus(devices: Sequence[str], job: Job, pid: int) -> None:
    """Transfer GPUs to the job and one of its processes, so that the lease survives the launcher."""
    import psutil

    with _lock(), suppress(psutil.NoSuchProcess):
        holder = process_record(pid)
        for device in devices:
            _write_lease(device, {"job": job.id, "process": holder, "path": str(job.path)})


def release_gpus(devices: Sequence[str], job: str) -> None:
    """Release the GPUs that a job holds; one that another job has acquired in the meantime stays with that job."""
    with _lock():
        for device in devices:
            if (_read_lease(device) or {}).get("job") == job:
                _lease_path(device).unlink(missing_ok=True)


def gpu_holders(devices: Sequence[str]) -> dict[str, str]:
    """Return a mapping from each leased GPU to the job that holds it."""
    return {d: job for d in devices if (job := _holder(d)) is not None}


def _holder(device: str) -> str | None:
    lease = _read_lease(device)
    if lease is None:
        return None
    held = record_is_alive(lease["process"]) or ("path" in lease and Job(Path(lease["path"])).has_live_rank())
    return f"job {lease['job']}" if held else None


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
    """Return the same name for a GPU whether a launcher was given its number or (the beginning of) its UUID."""
    if device.startswith("GPU-"):
        same = [i for i, uuid in enumerate(_uuids()) if uuid.startswith(device)]
        if len(same) == 1:
            return str(same[0])
    return device.replace("/", "_")


def _uuids() -> list[str]:
    matches = [re.search(r"GPU UUID:\s*(\S+)", path.read_text()) for path in sorted(DRIVER_DIRECTORY.glob("*/information"))]
    return [match[1] if match else "" for match in matches]


def _folder() -> Path:
    return home() / "gpus" / socket.gethostname()


def _lock() -> AbstractContextManager[bool]:
    return locked(_folder() / "lock", "another launcher")
