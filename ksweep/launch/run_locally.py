"""Run a sweep's missing cells on this machine: one job after another on CPUs; on GPUs as many at once as are free."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

from ksweep.config.resources import Resources
from ksweep.config.sweep import Sweep
from ksweep.launch import gpu_leases, hardware
from ksweep.launch import local_executor as launch
from ksweep.launch.job import Job, read_or
from ksweep.launch.job_spec import MissingCells, group_by_av
from ksweep.launch.progress import ProgressDisplay
from ksweep.launch.reconcile import finalize, give_up, raise_for_end
from ksweep.launch.status import JobStatus
from ksweep.utils.console import remark
from ksweep.utils.errors import RequestError, RunError, StoreError

LOCAL_POLL_SECONDS = 0.3
LEASE_POLL_SECONDS = 2.0
Claims = Callable[[], AbstractContextManager[object]]
"""Enters the lock under which jobs are created: no two commands create one for the same cells."""


def run_missing_cells(
    sweep: Sweep, missing: MissingCells, create_job: Callable[[MissingCells], Job | None], claims: Claims = nullcontext
) -> bool:
    """Run the missing cells on this machine and wait for them. Returns False if another command is at work on some of them.

    Args:
        create_job: creates the job of a group of cells; None if another command has begun or finished one of these.
        claims: enters the lock under which `create_job` is called.

    Raises:
        RequestError, RunError, StoreError: the first failure, once the jobs beside it have ended.
    """
    create_jobs = [partial(create_job, group) for group in group_by_av(sweep, missing)]
    return run_jobs(create_jobs, sweep.resources, sweep.resources.job_name or sweep.name, claims)


def run_jobs(
    create_jobs: Sequence[Callable[[], Job | None]], resources: Resources, name: str, claims: Claims = nullcontext
) -> bool:
    """Run jobs one after another on CPUs, on GPUs as these become free. Each is created just before it starts.

    Returns False if one was not created: then no other is started.

    Raises:
        RequestError, RunError, StoreError: as `run`.
    """
    waiting, running = list(create_jobs), list[_Running]()
    failure: Exception | None = None
    all_created = True
    gpus = hardware.num_gpus(resources) if hardware.resolve_cluster(resources) == "local" else 0
    most = _max_parallel_jobs(resources, gpus, len(waiting))
    with ProgressDisplay() as watch:
        while waiting or running:
            ends: dict[str, JobStatus] = {}
            try:
                # 1. Start jobs while there is room.
                while waiting and len(running) < most:
                    claimed = _claim(waiting[0], name, gpus, claims)
                    if claimed is None and running:
                        break
                    if claimed is None:
                        _wait_for_gpus(gpus, watch)
                        continue
                    job, devices = claimed
                    if job is None:
                        waiting, all_created = [], False
                        break
                    waiting.pop(0)
                    running.append(_start(job, resources, name, devices, watch, most))
                # 2. Wait until one ends, or all if none waits to start.
                _wait_for_jobs([r.submitted for r in running], hardware.total_ranks(resources), watch, ends, first=bool(waiting))
            except (RequestError, RunError, StoreError) as error:
                # The other running jobs go on to their end; none is started any more.
                if failure is not None:
                    remark(f"failed as well: {error}")
                failure = failure or error
                waiting.clear()
            # 3. Release the GPUs of jobs that have ended.
            for ended in [r for r in running if r.submitted.job.id in ends]:
                gpu_leases.release_gpus(ended.devices, ended.submitted.job.id)
                running.remove(ended)
    if failure is not None:
        raise failure
    return all_created


def _max_parallel_jobs(resources: Resources, gpus: int, num_jobs: int) -> int:
    """Return how many jobs can run in parallel on the GPUs of this machine."""
    room = hardware.visible_gpus() // gpus if gpus else num_jobs
    return max(1, min(resources.max_parallel_jobs or (num_jobs if gpus else 1), num_jobs, room))


@dataclass(frozen=True)
class _Running:
    submitted: launch.LocalJob
    devices: tuple[str, ...]


def _claim(
    create_job: Callable[[], Job | None], name: str, gpus: int, claims: Claims
) -> tuple[Job | None, tuple[str, ...]] | None:
    """Acquire GPUs and create the job that gets them; None if too few GPUs are free now. Without a job no GPU stays acquired."""
    with claims():  # before the GPUs: a command that waits for another one holds none
        devices = gpu_leases.acquire_gpus(hardware.visible_devices(), gpus, name) if gpus else ()
        if devices is None:
            return None
        job: Job | None = None
        try:
            job = create_job()
        finally:
            if job is None:
                gpu_leases.release_gpus(devices, name)
    return job, devices


def _start(job: Job, resources: Resources, name: str, devices: tuple[str, ...], watch: ProgressDisplay, most: int) -> _Running:
    """Start a job. One that does not start is finalized and its GPUs are released: this process, their holder, may live on."""
    submitted: launch.LocalJob | None = None
    try:
        watch.show(f"job {job.id}: starting", 0, 0)
        gpu_leases.transfer_gpus(devices, job, os.getpid())
        submitted = launch.start_local_job(job, resources, name, watch.show, devices or None, most)
        if devices:
            gpu_leases.transfer_gpus(devices, job, int(submitted.handle.job_id))
    except BaseException as error:
        try:
            if submitted is not None:
                submitted.kill()
            give_up(job, error)
        finally:
            for holder in (name, job.id):
                gpu_leases.release_gpus(devices, holder)
        raise
    return _Running(submitted, devices)


def _wait_for_gpus(count: int, watch: ProgressDisplay) -> None:
    """Show which jobs hold the GPUs, and wait a moment."""
    there = hardware.visible_devices()
    held = ", ".join(f"GPU {n}: {holder}" for n, holder in gpu_leases.gpu_holders(there).items())
    watch.show(f"waiting for {count} of {len(there)} GPUs ({held})", 0, 0)
    time.sleep(LEASE_POLL_SECONDS)


def _wait_for_jobs(
    jobs: list[launch.LocalJob], ranks: int, watch: ProgressDisplay, ends: dict[str, JobStatus], *, first: bool = False
) -> None:
    """Wait until every job has ended (with `first`, until one has), finalize those that have, and raise the first failure.

    Args:
        ends: filled with how jobs have ended, by their ids.
    """
    interrupted = 0
    while len(ends) < (min(1, len(jobs)) if first and not interrupted else len(jobs)):
        try:
            for submitted in jobs:
                if submitted.job.id not in ends:
                    watch.show_ranks(read_or(submitted.job.heartbeats, []))
                    if (end := launch.end_of_job(submitted, ranks)) is not None:
                        ends[submitted.job.id] = end
            time.sleep(0 if len(ends) == len(jobs) else LOCAL_POLL_SECONDS)
        except KeyboardInterrupt:
            interrupted += 1
            for submitted in jobs:
                submitted.stop() if interrupted == 1 else submitted.cancel()
            if interrupted > 1:
                raise
    ended = [s for s in jobs if s.job.id in ends]
    for submitted in ended:
        submitted.kill()
        finalize(submitted.job, ends[submitted.job.id])
    for submitted in ended:
        raise_for_end(submitted.job, ends[submitted.job.id])
    if stopped := [end for end in ends.values() if end.state == "stopped"]:
        reasons = "; ".join(sorted({end.reason for end in stopped}))
        raise RunError(f"stopped ({reasons}): finished units are kept; the same command continues from there")
