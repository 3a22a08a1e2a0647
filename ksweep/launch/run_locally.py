"""A sweep's missing cells on this machine: one job after another on CPUs, on GPUs as many as are free."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ksweep.config.resources import Resources
from ksweep.config.sweep import Sweep
from ksweep.launch import gpu_leases, hardware
from ksweep.launch import local_executor as launch
from ksweep.launch.job import Job
from ksweep.launch.job_spec import MissingCells, create_job_for_cells, group_by_autoencoder
from ksweep.launch.progress import ProgressDisplay
from ksweep.launch.rank_records import Outcome, raise_for_outcome
from ksweep.launch.reconcile import finalize, status_from_outcome
from ksweep.utils.errors import RequestError, RunError, StoreError

LOCAL_POLL_SECONDS = 0.3
LEASE_POLL_SECONDS = 2.0
ABORT_GRACE_SECONDS = 20.0
"""How long ranks may take to notice that one of them has failed before they are killed."""


def run_missing_cells(sweep: Sweep, missing: MissingCells) -> None:
    """Start the missing cells on this machine and wait for them.

    Raises:
        RequestError, RunError, StoreError: the first failure, once the jobs beside it have ended.
    """
    orders = [partial(create_job_for_cells, sweep, group, "local") for group in group_by_autoencoder(sweep, missing)]
    run_jobs(orders, sweep.resources, sweep.resources.job_name or sweep.name)


def run_jobs(orders: Sequence[Callable[[], Job]], resources: Resources, name: str) -> None:
    """Jobs one after another on CPUs, on GPUs as they become free; each is created when its turn has come.

    Raises:
        RequestError, RunError, StoreError: as `run`.
    """
    waiting, running = list(orders), list[_Running]()
    failure: Exception | None = None
    gpus = hardware.num_gpus(resources) if hardware.resolve_cluster(resources) == "local" else 0
    most = _max_parallel_jobs(resources, gpus, len(waiting))
    with ProgressDisplay() as watch:
        while waiting or running:
            while waiting and len(running) < most:
                devices = _acquire_gpus(name, gpus, watch, wait=not running)
                if devices is None:
                    break
                running.append(_start(waiting.pop(0)(), resources, name, devices, watch, most))
            try:
                _wait_for_jobs([r.submitted for r in running], hardware.total_ranks(resources), watch, first=bool(waiting))
            except (RequestError, RunError, StoreError) as error:
                # The jobs beside it go on to their end; none is started any more.
                if failure is not None:
                    print(f"failed as well: {error}", file=sys.stderr)
                failure = failure or error
                waiting.clear()
            for ended in [r for r in running if r.submitted.job.read_note("settled") is not None]:
                gpu_leases.release_gpus(ended.devices, ended.submitted.job.id)
                running.remove(ended)
    if failure is not None:
        raise failure


def _max_parallel_jobs(resources: Resources, gpus: int, num_jobs: int) -> int:
    """Jobs that run side by side, as far as the GPUs of this machine suffice."""
    room = hardware.visible_gpus() // gpus if gpus else num_jobs
    return max(1, min(resources.max_parallel_jobs or (num_jobs if gpus else 1), num_jobs, room))


@dataclass(frozen=True)
class _Running:
    submitted: launch.LocalJob
    devices: tuple[str, ...]


def _start(job: Job, resources: Resources, name: str, devices: tuple[str, ...], watch: ProgressDisplay, most: int) -> _Running:
    watch.show(f"job {job.id}: starting", 0, 0)
    gpu_leases.transfer_gpus(devices, job, os.getpid())
    submitted = launch.start_local_job(job, resources, name, watch.show, devices or None, most)
    if devices:
        gpu_leases.transfer_gpus(devices, job, int(submitted.handle.job_id))
    return _Running(submitted, devices)


def _acquire_gpus(name: str, count: int, watch: ProgressDisplay, *, wait: bool) -> tuple[str, ...] | None:
    """Free GPUs for a job, waiting for those of other launchers; without `wait` None where too few are free now."""
    if count == 0:
        return ()
    there = hardware.visible_devices()
    while (taken := gpu_leases.acquire_gpus(there, count, name)) is None and wait:
        held = ", ".join(f"GPU {n}: {holder}" for n, holder in gpu_leases.gpu_holders(there).items())
        watch.show(f"waiting for {count} of {len(there)} GPUs ({held})", 0, 0)
        time.sleep(LEASE_POLL_SECONDS)
    return taken


def _wait_for_jobs(jobs: list[launch.LocalJob], ranks: int, watch: ProgressDisplay, *, first: bool = False) -> None:
    """Until every job of this machine has ended (with `first`, until one has); then the first failure is raised."""
    endings: dict[str, Outcome] = {}
    interrupted = 0
    while len(endings) < (min(1, len(jobs)) if first and not interrupted else len(jobs)):
        try:
            for submitted in jobs:
                if submitted.job.id not in endings:
                    _check_job(submitted, ranks, endings, watch)
            time.sleep(0 if len(endings) == len(jobs) else LOCAL_POLL_SECONDS)
        except KeyboardInterrupt:
            interrupted += 1
            for submitted in jobs:
                submitted.stop() if interrupted == 1 else submitted.kill()
            if interrupted > 1:
                raise
    ended = [s for s in jobs if s.job.id in endings]
    for submitted in ended:
        submitted.kill()
        finalize(submitted.job, status_from_outcome(endings[submitted.job.id]))
    for submitted in ended:
        raise_for_outcome(endings[submitted.job.id], submitted.job.path)
    if any(ending.status == "stopped" for ending in endings.values()):
        raise RunError("stopped: finished units are kept; the same command carries on from there")


def _check_job(submitted: launch.LocalJob, ranks: int, endings: dict[str, Outcome], watch: ProgressDisplay) -> None:
    watch.show_ranks(submitted.job.heartbeats())
    ending = launch.outcome(submitted, ranks)
    if ending is None and any(e.status == "failed" for e in submitted.job.outcomes()):
        ending = _wait_for_abort(submitted, ranks)
    if ending is not None:
        endings[submitted.job.id] = ending


def _wait_for_abort(submitted: launch.LocalJob, ranks: int) -> Outcome | None:
    """One rank has failed: the others notice by their watchdog; those that hang are killed."""
    deadline = time.monotonic() + ABORT_GRACE_SECONDS
    while time.monotonic() < deadline:
        ending = launch.outcome(submitted, ranks)
        if ending is not None:
            return ending
        time.sleep(LOCAL_POLL_SECONDS)
    submitted.kill()
    return next(e for e in submitted.job.outcomes() if e.status == "failed")
