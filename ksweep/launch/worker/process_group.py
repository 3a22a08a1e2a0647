"""What a rank's work knows of its job: process group, devices, shared queue of work units."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from ksweep.launch.worker.devices import check_devices_are_own, device_text, gpu_ids_text, rank_devices
from ksweep.launch.worker.heartbeat import HeartbeatThread

COLLECTIVE_TIMEOUT = timedelta(days=2)
"""Ranks may wait long for another's last work unit; the heartbeat thread, not the collective, notices a dead rank."""
MEETING_POINT = "meeting-point"
"""Note of a start: host and port at which rank 0 serves the process group's store."""


@dataclass
class ProcessGroup:
    """A rank's view of a torch.distributed job, or of a job with one rank (evaluation.distributed.Ranks)."""

    heartbeat: HeartbeatThread
    devices: tuple[str, ...]
    store: Any = None
    claimed: dict[str, int] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Global rank."""
        return self.heartbeat.rank

    @property
    def world_size(self) -> int:
        """Ranks in the job."""
        return self.heartbeat.world_size

    @property
    def device_name(self) -> str:
        """The GPU's own name, or the processor's."""
        return device_text(self.devices)

    @property
    def job(self) -> str:
        """Id of the job."""
        return self.heartbeat.job.id

    @property
    def start(self) -> int:
        """Which start of the job this is."""
        return self.heartbeat.attempt

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.store is not None:
            import torch.distributed as dist

            self.heartbeat.waiting = True
            dist.barrier()
            self.heartbeat.waiting = False

    def from_first_rank(self, name: str, value: bytes) -> bytes:
        """Return rank 0's value, which travels through the process group's store."""
        if self.store is None:
            return value
        if self.rank == 0:
            self.store.set(f"ksweep/{name}", value)
        self.heartbeat.waiting = True
        value = bytes(self.store.get(f"ksweep/{name}"))
        self.heartbeat.waiting = False
        return value

    def claim_next(self, queue: str) -> int:
        """Return the next number of a queue, counted by the process group's store, so that a fast rank takes more."""
        if self.store is not None:
            return int(self.store.add(f"ksweep/{queue}", 1)) - 1
        self.claimed[queue] = self.claimed.get(queue, -1) + 1
        return self.claimed[queue]

    def should_stop(self) -> bool:
        """Return whether a stop signal has come."""
        return self.heartbeat.stopping

    def report(self, phase: str, done: int, total: int, **numbers: float) -> None:
        """Report progress, which the next heartbeat publishes."""
        self.heartbeat.update(phase, done, total, numbers)

    def begin_cell(self, key: str, seconds: Mapping[str, float]) -> None:
        """Attribute heartbeats to this cell."""
        self.heartbeat.begin_cell(key, seconds)


def join_process_group(heartbeat: HeartbeatThread, gpus: int, gpus_per_model: int, environment: Any) -> ProcessGroup:
    """Join the process group of the job on this rank's devices."""
    devices = rank_devices(environment, gpus, gpus_per_model)
    heartbeat.latest = replace(heartbeat.latest, device=device_text(devices), gpu=gpu_ids_text(devices))
    if environment.num_tasks == 1:
        return ProcessGroup(heartbeat, devices)
    import torch.distributed as dist
    from submitit.helpers import TorchDistributedEnvironment

    # Each rank sees all GPUs of its node and takes its own by number; with gpus=0 it must not be handed one.
    variables = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    store = _meet(heartbeat, variables.master_addr)
    check_devices_are_own(store, devices)
    # gloo carries barriers on CPUs as on GPUs: no tensor ever travels between ranks, results meet in the stores. NCCL would take
    # memory and a spinning kernel of each GPU, and fail in containers with little shared memory.
    dist.init_process_group("gloo", store=store, rank=heartbeat.rank, world_size=heartbeat.world_size, timeout=COLLECTIVE_TIMEOUT)
    return ProcessGroup(heartbeat, devices, dist.distributed_c10d._get_default_store())


def _meet(heartbeat: HeartbeatThread, host: str) -> Any:
    """Return the process group's store: rank 0 serves it at a port that is free, and writes which one into the start's directory.

    A port that all ranks know beforehand (submitit derives one between 20000 and 60000 from the job's id) may be in use on the
    node of rank 0: by another job, by an earlier start, or from 32768 on by anybody's connection.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    job, start = heartbeat.job, heartbeat.attempt
    if heartbeat.rank == 0:
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=COLLECTIVE_TIMEOUT)
        job.write_note(MEETING_POINT, {"host": host, "port": store.port}, start)
        return store
    heartbeat.waiting = True
    # On NFS a name that was missing is remembered as missing until this node changes the directory: its heartbeats do.
    while (found := job.read_note(MEETING_POINT, start)) is None:
        time.sleep(0.1)
    heartbeat.waiting = False
    return TCPStore(found["host"], found["port"], is_master=False, wait_for_workers=False, timeout=COLLECTIVE_TIMEOUT)


def leave_process_group(group: ProcessGroup) -> None:
    """Destroy the process group. After success only: the other ranks fail with it, and their errors would hide the cause."""
    if group.store is not None:
        import torch.distributed as dist

        dist.destroy_process_group()
