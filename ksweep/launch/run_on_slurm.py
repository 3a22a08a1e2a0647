"""Run a sweep's missing cells on Slurm: complete its resources, submit arrays of jobs, wait for them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ksweep.config.sweep import Sweep
from ksweep.launch import code_snapshot, status
from ksweep.launch.job import Job, logs_directory, read_or
from ksweep.launch.job_spec import MissingCells, create_job_for_cells, group_by_av
from ksweep.launch.progress import ProgressDisplay
from ksweep.launch.reconcile import finalize_if_ended, give_up, raise_for_end
from ksweep.launch.slurm import sbatch
from ksweep.launch.slurm.polling import ids_on_this_cluster
from ksweep.utils.console import remark
from ksweep.utils.errors import RunError, SpecError
from ksweep.utils.version import VERSION

WAIT_POLL_SECONDS = 2.0
WAIT_POLL_SECONDS_PER_JOB = 0.01
"""Checking a job's files takes some ten requests to a file system that many share."""


def with_slurm_resources(sweep: Sweep) -> Sweep:
    """Fill in resources that were left open, and check that the cluster has them, in a dry run too."""
    resources = sbatch.with_sbatch_defaults(sweep.resources)
    if resources.gpus is None:
        resources = replace(resources, gpus=min(1, sbatch.max_gpus_per_node(resources)))
    if not resources.gpus and resources.tasks is None:
        resources = replace(resources, tasks=1)
    sbatch.validate_slurm_resources(resources)
    return replace(sweep, resources=resources)


def submit_missing_cells(sweep: Sweep, missing: MissingCells, at_work: Iterable[Job] = ()) -> list[Job]:
    """Submit the missing cells to Slurm: arrays with an element for each job, which runs a snapshot of the code.

    Raises:
        SpecError, RunError: Slurm takes none of them, or only some.
    """
    logs = logs_directory(sweep.registry)
    resources = sweep.resources
    code = code_snapshot.snapshot_code(logs)
    note = _code_note(code)
    jobs: list[Job] = []
    try:
        for group in group_by_av(sweep, missing):
            jobs.append(create_job_for_cells(sweep, group, "slurm", note))
        done = sbatch.submit_arrays(
            logs, jobs, resources, sweep.name, code.path if code else None, beside=_slurm_ids(sweep, at_work)
        )
    except SpecError:
        # Refused before anything was submitted. After any other failure the next command finds out which jobs Slurm has.
        for job in jobs:
            shutil.rmtree(job.path)
        raise
    except BaseException as error:
        # This process, their launcher, may live on. Those in an interrupted submission are left to the next command.
        for job in jobs:
            if job.slurm_id() is None and not sbatch.is_in_interrupted_submission(job):
                give_up(job, error)
        raise
    if num_left := len(done.not_submitted):
        raise RunError(
            f"{len(jobs) - num_left} of {len(jobs)} jobs are submitted and continue without this command; Slurm rejected the "
            f"other {num_left} ({done.why}): the same command submits them, `ksweep watch {sweep.name}` shows the rest"
        )
    return jobs


def _code_note(code: code_snapshot.CodeSnapshot | None) -> dict[str, Any]:
    """Return the note that says where a job's code comes from."""
    if code is not None:
        diff = str(code.diff) if code.diff else None
        return {"path": str(code.path), "commit": code.commit, "diff": diff, "new": code.new, "left_out": code.num_left_out}
    package, version = Path(__file__).parents[1], f"ksweep {VERSION}"
    remark(f"jobs run the installed {version} in {package} itself: leave it as it is while they do")
    return {"path": str(package), "commit": version, "diff": None}


def _slurm_ids(sweep: Sweep, jobs: Iterable[Job]) -> list[str]:
    """Return Slurm's ids of the jobs that belong to this sweep."""
    return ids_on_this_cluster(job for job in jobs if job.spec()["argument"].get("sweep") == sweep.name)


def wait_for_slurm_jobs(jobs: Sequence[Job], sweep: Sweep) -> None:
    """Wait until every job has ended, finalize each, and raise the first failure. The jobs do not need this process."""
    live = {job.id: job for job in jobs}
    ended: list[tuple[Job, status.JobStatus]] = []
    with ProgressDisplay() as watch:
        try:
            while live:
                statuses = status.job_statuses(list(live.values()))
                ended += [(live.pop(name), status.DIRECTORY_GONE) for name in set(live) - set(statuses)]
                for name, job_status in statuses.items():
                    if job_status.state not in status.LIVE_STATES and finalize_if_ended(live[name], job_status):
                        ended.append((live.pop(name), job_status))
                watch.show_jobs(statuses, {job.id: read_or(job.heartbeats, []) for job in live.values()})
                time.sleep(max(WAIT_POLL_SECONDS, WAIT_POLL_SECONDS_PER_JOB * len(live)) if live else 0)
        except KeyboardInterrupt:
            raise RunError(
                f"no longer waiting: {len(live)} jobs continue without this command. `ksweep watch {sweep.name}` shows them, "
                f"`ksweep cancel {sweep.name}` ends them, the same command attaches to them again"
            ) from None
    _raise_first_failure(ended)


def _raise_first_failure(ended: Sequence[tuple[Job, status.JobStatus]]) -> None:
    """Print every job that failed, by its cells, and raise the first one's failure with all that is known of it."""
    failed = [(job, job_status) for job, job_status in ended if job_status.state == "failed"]
    for job, job_status in failed[1:]:
        remark(f"failed: {_cells_text(job)} (job {job.id}): {job_status.reason}")
    for job, job_status in failed[:1]:
        remark(f"failed: {_cells_text(job)} (job {job.id}):")
        raise_for_end(job, job_status)
    if any(job_status.state == "stopped" for _, job_status in ended):
        reasons = "; ".join(sorted({v.reason for _, v in ended if v.state == "stopped"}))
        raise RunError(f"stopped ({reasons}): finished units are kept; the same command continues from there")


def _cells_text(job: Job) -> str:
    return ", ".join(f"{cell['label']} @{cell['key'][:8]}" for cell in job.spec()["cells"])
