"""`ksweep cancel`: end jobs, on Slurm and on this machine."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from ksweep.launch import status
from ksweep.launch.job import Job, read_or
from ksweep.launch.liveness import is_in_this_table
from ksweep.launch.ownership import is_signalled, may_cancel, owner_of
from ksweep.launch.reconcile import finalize_if_ended
from ksweep.launch.slurm import commands
from ksweep.launch.slurm.polling import cluster_of, ids_in_queue, ids_on_this_cluster


@dataclass(frozen=True)
class CancelResult:
    """Outcome of one cancel request."""

    job: str
    cancelled: bool
    state: str
    """Before the request."""
    reason: str
    """Why it was in that state, or why it could not be cancelled."""
    slurm: str | None


def cancel_jobs(jobs: Sequence[Job]) -> list[CancelResult]:
    """Ask live jobs to end after their current work unit, and finalize those that have ended.

    Returns the outcome for each job that still exists.
    """
    statuses = status.job_statuses(jobs)
    live = [job for job in jobs if job.id in statuses and statuses[job.id].state in status.LIVE_STATES]
    # A foreign file could name a process or a Slurm job of this user.
    foreign = {job.id: _cancelled_by_owner(job) for job in live if not may_cancel(job)}
    live = [job for job in live if job.id not in foreign]
    # 1. A job that is asked to end does not put itself back into the queue.
    slurm_ids = {job.id: _ask_to_end(job) for job in live}
    # 2. On Slurm, cancel only numbers that are ours; elsewhere, signal the ranks of this machine.
    on_slurm = [job for job in live if slurm_ids[job.id] is not None]
    queued = ids_in_queue(on_slurm)
    obstacles = {job.id: _slurm_obstacle(job) for job in on_slurm if job.id not in queued}
    obstacles |= {
        job.id: f"its ranks run on {hosts}: cancel it there"
        for job in live if job not in on_slurm and (hosts := _signal_ranks(job))
    }  # fmt: skip
    commands.scancel(sorted(queued.values()))
    obstacles |= foreign
    # 3. Record how those ended that nobody waited for.
    for job in jobs:
        if job.id in statuses and job not in live and job.id not in foreign and job.final_status() is None:
            read_or(partial(finalize_if_ended, job, statuses[job.id]), None)
    return [
        CancelResult(
            job=job.id, cancelled=job in live and job.id not in obstacles, state=statuses[job.id].state,
            reason=obstacles.get(job.id, statuses[job.id].reason),
            slurm=slurm_ids[job.id] if job in live else read_or(job.slurm_id, None),
        )
        for job in jobs if job.id in statuses
    ]  # fmt: skip


def _cancelled_by_owner(job: Job) -> str:
    number = read_or(job.slurm_id, None)
    by_number = f" or an operator of the cluster, with `scancel {number}`" if number else ""
    return f"it belongs to {owner_of(job.path / 'job.json')}, who can cancel it{by_number}"


def _ask_to_end(job: Job) -> str | None:
    """Tell a job to end, and return its Slurm id."""
    job.request_cancel()
    return read_or(job.slurm_id, None)


def _slurm_obstacle(job: Job) -> str:
    """Say why a Slurm job that is not in this cluster's queue is left alone: its number may be somebody else's by now."""
    if not ids_on_this_cluster([job]):
        return f"it is on cluster {cluster_of(job)}: cancel it there (`scancel {read_or(job.slurm_id, None)}`)"
    return f"Slurm has no job {read_or(job.slurm_id, None)} of ours in its queue: it has ended, or Slurm has forgotten it"


def _signal_ranks(job: Job) -> str:
    """Send SIGTERM to the ranks of a local job; return where else it runs: a pid means nothing there."""
    elsewhere = set[str]()
    for beat in read_or(job.heartbeats, []):
        if is_in_this_table(beat.process) and is_signalled(job, beat.pid):
            with suppress(ProcessLookupError, PermissionError):  # ended meanwhile, or root's
                os.kill(beat.pid, signal.SIGTERM)
        elif job.life_of_rank(beat) != "dead":
            elsewhere.add(f"another container on {beat.host}" if beat.host == socket.gethostname() else beat.host)
    return ", ".join(sorted(elsewhere))


def format_cancel_results(name: str, results: Sequence[CancelResult]) -> list[str]:
    """Return one line per live job, and the number of those that had ended."""
    lines = [f"cancelled: {r.job}" + (f" (Slurm {r.slurm})" if r.slurm else "") for r in results if r.cancelled]
    lines += [f"not cancelled: {r.job}: {r.reason}" for r in results if not r.cancelled and r.state in status.LIVE_STATES]
    ended = [r for r in results if r.state not in status.LIVE_STATES]
    if len(results) == 1 and ended:
        reason = f" ({ended[0].reason})" if ended[0].reason else ""
        return [f"nothing to cancel: {ended[0].job} has {ended[0].state}{reason}"]
    if ended:
        nothing = "" if lines else f"no job of {name} is live: "
        lines.append(f"{nothing}{len(ended)} job{'s' * (len(ended) != 1)} had already ended")
    return lines
