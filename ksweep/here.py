"""A sweep's missing cells on this machine: one job after another on CPUs, on GPUs as many as are free."""

from __future__ import annotations

import shutil
import time

from ksweep.errors import RequestError, RunError, StoreError
from ksweep.launch import slots
from ksweep.launch import submit as launch
from ksweep.launch.job import Ending, Job
from ksweep.launch.plan import Step
from ksweep.launch.watch import Watch
from ksweep.orders import Missing, groups, job_for
from ksweep.reconcile import land_ending
from ksweep.spec import Cell, Sweep

POLL_SECONDS = 0.3
SLOT_SECONDS = 2.0
PATIENCE_SECONDS = 20.0
"""How long ranks may take to notice that one of them has failed before they are killed."""


def run(sweep: Sweep, missing: Missing) -> None:
    """Start the missing cells on this machine and wait for them: on CPUs one job after another, on GPUs as they become free."""
    waiting: list[list[tuple[Cell, Step]]] = groups(sweep, missing)
    running: list[tuple[launch.Submitted, tuple[int, ...]]] = []
    failure: Exception | None = None
    gpus = launch.num_gpus(sweep.resources) if launch.resolve_cluster(sweep.resources) == "local" else 0
    most = sweep.resources.max_parallel_jobs or (len(waiting) if gpus else 1)
    with Watch() as watch:
        while waiting or running:
            while waiting and len(running) < most:
                job = job_for(sweep, waiting[0], "local")
                numbers = _gpus_for(job, gpus, watch, wait=not running)
                if numbers is None:
                    shutil.rmtree(job.path)
                    break
                waiting.pop(0)
                watch.show(f"job {job.id}: starting", 0, 0)
                submitted = launch.submit(
                    job, sweep.resources, sweep.resources.job_name or sweep.name, watch.show, numbers or None
                )
                if numbers:
                    slots.hand_on(numbers, job.id, int(submitted.handle.job_id))
                running.append((submitted, numbers))
            try:
                _wait([s for s, _ in running], sweep, watch, first=bool(waiting))
            except (RequestError, RunError, StoreError) as error:
                # The jobs beside it go on to their end; none is started any more.
                failure = failure or error
                waiting.clear()
            for submitted, numbers in [r for r in running if r[0].job.noted("settled") is not None]:
                slots.release(numbers)
                running.remove((submitted, numbers))
    if failure is not None:
        raise failure


def _gpus_for(job: Job, count: int, watch: Watch, *, wait: bool) -> tuple[int, ...] | None:
    """Free GPUs for a job, waiting for those of other launchers; without `wait` None where none are free now."""
    if count == 0:
        return ()
    there = launch.visible_numbers()
    if len(there) < count:  # named by UUID: submitit counts them itself
        return ()
    while (taken := slots.take(there, count, job.id)) is None and wait:
        held = ", ".join(f"GPU {n}: job {name}" for n, name in slots.holders(there).items())
        watch.show(f"waiting for {count} of {len(there)} GPUs ({held})", 0, 0)
        time.sleep(SLOT_SECONDS)
    return taken


def _wait(jobs: list[launch.Submitted], sweep: Sweep, watch: Watch, *, first: bool = False) -> None:
    """Until every job of this machine has ended (with `first`, until one has); then the first failure is raised."""
    ranks = launch.num_ranks(sweep.resources)
    endings: dict[str, Ending] = {}
    interrupted = 0
    while len(endings) < (min(1, len(jobs)) if first and not interrupted else len(jobs)):
        try:
            for submitted in jobs:
                if submitted.job.id not in endings:
                    _look(submitted, ranks, endings, watch)
            time.sleep(0 if len(endings) == len(jobs) else POLL_SECONDS)
        except KeyboardInterrupt:
            interrupted += 1
            for submitted in jobs:
                submitted.stop() if interrupted == 1 else submitted.kill()
            if interrupted > 1:
                raise
    ended = [s for s in jobs if s.job.id in endings]
    for submitted in ended:
        submitted.kill()
        submitted.job.release()
        ending = endings[submitted.job.id]
        if ending.status == "failed":
            land_ending(submitted.job, ending)
        submitted.job.note("settled", {"state": ending.status, "reason": ending.message, "kind": ending.kind})
    for submitted in ended:
        launch.raise_for(endings[submitted.job.id], submitted.job)
    if any(ending.status == "stopped" for ending in endings.values()):
        raise RunError("stopped: finished units are kept; the same command carries on from there")


def _look(submitted: launch.Submitted, ranks: int, endings: dict[str, Ending], watch: Watch) -> None:
    watch.show_ranks(submitted.job.heartbeats())
    ending = launch.outcome(submitted, ranks)
    if ending is None and any(e.status == "failed" for e in submitted.job.endings()):
        ending = _give_up(submitted, ranks)
    if ending is not None:
        endings[submitted.job.id] = ending


def _give_up(submitted: launch.Submitted, ranks: int) -> Ending | None:
    """One rank has failed: the others notice by their watchdog; those that hang are killed."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        ending = launch.outcome(submitted, ranks)
        if ending is not None:
            return ending
        time.sleep(POLL_SECONDS)
    submitted.kill()
    return next(e for e in submitted.job.endings() if e.status == "failed")
