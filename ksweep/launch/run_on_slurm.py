"""A sweep's missing cells on Slurm: what a job takes, an array with an element for each job, and waiting for them."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ksweep.config.sweep import Sweep
from ksweep.launch import code_snapshot, status
from ksweep.launch import local_executor as launch
from ksweep.launch.job import Ending, Job, read
from ksweep.launch.job_spec import Missing, groups, job_for, logs_of
from ksweep.launch.progress import Watch
from ksweep.launch.reconcile import book
from ksweep.launch.slurm import sbatch
from ksweep.launch.slurm.polling import numbers_here
from ksweep.utils.errors import RunError, SpecError
from ksweep.utils.version import VERSION

POLL_SECONDS = 2.0
POLL_SECONDS_A_JOB = 0.01
"""Looking at a job's files takes some ten questions to a file system that is shared by many."""


def with_shape(sweep: Sweep) -> Sweep:
    """The sweep with what a job takes where that was left open; what the cluster has not is refused, in a dry run too."""
    resources = sbatch.with_users_defaults(sweep.resources)
    if resources.gpus is None:
        resources = replace(resources, gpus=min(1, sbatch.most_gpus(resources)))
    if not resources.gpus and resources.tasks is None:
        resources = replace(resources, tasks=1)
    sbatch.refuse(resources)
    return replace(sweep, resources=resources)


def submit(sweep: Sweep, missing: Missing, at_work: Iterable[Job] = ()) -> list[Job]:
    """Hand the missing cells to Slurm: an array with an element for each job, which runs the code as it is now.

    Raises:
        SpecError, RunError: Slurm takes none of them, or only some.
    """
    logs = logs_of(sweep)
    resources = sweep.resources
    code = code_snapshot.take(logs)
    jobs = [job_for(sweep, group, "slurm") for group in groups(sweep, missing)]
    told = _told(code)
    for job in jobs:
        job.note("code", told)
    try:
        done = sbatch.submit(logs, jobs, resources, sweep.name, code.path if code else None, beside=_numbers_of(sweep, at_work))
    except SpecError:
        # Refused before anything was handed over. After any other failure the next command finds out what Slurm has of them.
        for job in jobs:
            shutil.rmtree(job.path)
        raise
    if done.left:
        raise RunError(
            f"{len(jobs) - len(done.left)} of {len(jobs)} jobs are submitted and go on without this command; Slurm did not take "
            f"the other {len(done.left)} ({done.why}): the same command submits them, `ksweep watch {sweep.name}` shows the rest"
        )
    return jobs


def _told(code: code_snapshot.Code | None) -> dict[str, str | None]:
    """Where a job's code comes from, for its record."""
    if code is not None:
        return {"path": str(code.path), "commit": code.commit, "diff": str(code.diff) if code.diff else None}
    place, version = Path(__file__).parents[2], f"ksweep {VERSION}"
    print(f"jobs run the installed {version} in {place} itself: leave it as it is while they do", file=sys.stderr)
    return {"path": str(place), "commit": version, "diff": None}


def _numbers_of(sweep: Sweep, jobs: Iterable[Job]) -> list[str]:
    """Slurm's numbers of those jobs that are of this sweep."""
    return numbers_here(job for job in jobs if job.spec()["argument"].get("sweep") == sweep.name)


def wait(jobs: Sequence[Job], sweep: Sweep) -> None:
    """Until every job has ended; then each is booked, and the first failure raised. The jobs do not need this process."""
    live = {job.id: job for job in jobs}
    ended: list[tuple[Job, status.Verdict]] = []
    with Watch() as watch:
        try:
            while live:
                found = status.verdicts(list(live.values()))
                ended += [(live.pop(name), status.GONE) for name in set(live) - set(found)]
                for name, verdict in found.items():
                    if verdict.state not in status.LIVE and book(live[name], verdict):
                        ended.append((live.pop(name), verdict))
                watch.show_jobs(found, {job.id: read(job.heartbeats, []) for job in live.values()})
                time.sleep(max(POLL_SECONDS, POLL_SECONDS_A_JOB * len(live)) if live else 0)
        except KeyboardInterrupt:
            raise RunError(
                f"no longer waiting: {len(live)} jobs go on without this command. `ksweep watch {sweep.name}` shows them, "
                f"`ksweep cancel {sweep.name}` ends them, the same command attaches to them again"
            ) from None
    _raise_for(ended)


def _raise_for(ended: Sequence[tuple[Job, status.Verdict]]) -> None:
    """Every job that failed, by its cells; the first with all that is known of it."""
    failed = [(job, verdict) for job, verdict in ended if verdict.state == "failed"]
    for job, verdict in failed[1:]:
        print(f"failed: {_cells(job)} (job {job.id}): {verdict.reason}", file=sys.stderr)
    for job, verdict in failed[:1]:
        print(f"failed: {_cells(job)} (job {job.id}):", file=sys.stderr)
        launch.raise_for(verdict.ending or Ending(rank=0, status="failed", kind=verdict.kind, message=verdict.reason), job)
    if any(verdict.state == "stopped" for _, verdict in ended):
        reasons = "; ".join(sorted({v.reason for _, v in ended if v.state == "stopped"}))
        raise RunError(f"stopped ({reasons}): finished units are kept; the same command carries on from there")


def _cells(job: Job) -> str:
    return ", ".join(f"{cell['label']} @{cell['key'][:8]}" for cell in job.spec()["cells"])
