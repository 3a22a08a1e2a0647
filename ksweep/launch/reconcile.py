"""Finalize jobs that earlier commands left: record in the registry how each ended, once, whichever command finds it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from ksweep.config.sweep import Sweep
from ksweep.evaluation.identity import CellKeys
from ksweep.launch import status
from ksweep.launch.final_records import attempt_rows, record_unfinished_run
from ksweep.launch.job import Job, logs_directory, read_or
from ksweep.launch.ownership import may_finalize
from ksweep.launch.progress import ProgressDisplay
from ksweep.launch.slurm import sbatch
from ksweep.launch.status import JobStatus
from ksweep.launch.survey import JobSurvey, survey_jobs
from ksweep.registry import attempts
from ksweep.utils.console import remark
from ksweep.utils.errors import RequestError, RunError, StoreError, classify, end_state

log = logging.getLogger(__name__)

FINAL_RECORD_GRACE_SECONDS = 6.0
"""How long the ranks of a job that has just ended may take to write outcomes: on Slurm they check the others every 2 s, and look
for a root cause for 3 s."""
MAX_HEARTBEAT_INTERVAL_SECONDS = 3.0
"""A live rank writes a heartbeat within this time."""
_unrecorded: dict[Job, JobStatus] = {}
"""Jobs of this process whose end could not be written. Their files say that they run; the next survey tries again."""
EARLIER_JOBS_POLL_SECONDS = 0.3
EARLIER_SLURM_JOBS_POLL_SECONDS = 2.0


def finalize_earlier_jobs(sweep: Sweep, keys: Sequence[CellKeys], *, wait: bool) -> JobSurvey:
    """Finalize what earlier commands left behind, and return how the remaining jobs stand.

    A job on these cells that only seems to have ended is checked again until that is certain. With `wait` (on this machine) a
    job that is still at work on these cells is waited for, instead of computing them twice.
    """
    logs, cell_keys = logs_directory(sweep.registry), {key.cell for key in keys}
    # 1. Submissions whose launcher died: adopt the jobs that Slurm has, forget the others.
    for line in sbatch.resolve_interrupted_submissions(logs):
        remark(line)
    announced: set[str] = set()
    with ProgressDisplay() as display:
        while True:
            # 2. Finalize all jobs that have ended.
            survey = finalize_ended_jobs(logs)
            # 3. Return, unless a job on these cells is worth waiting for.
            ours = {job.id: job for key, job in survey.live_job_by_cell.items() if key in cell_keys}
            awaited = [i for i in ours if survey.statuses[i].recheck or (wait and survey.statuses[i].state != "unknown")]
            if not awaited:
                return survey
            # 4. Say so once for each job, and show its progress.
            for name in awaited:
                if name not in announced:
                    announced.add(name)
                    gone = "seems to be gone: making sure" if survey.statuses[name].recheck else ""
                    what = gone or "is still at work on this sweep: waiting"
                    remark(f"job {name} of another command {what} ({survey.statuses[name].reason})")
                display.show_ranks(read_or(ours[name].heartbeats, []))
            time.sleep(EARLIER_JOBS_POLL_SECONDS if wait else EARLIER_SLURM_JOBS_POLL_SECONDS)


def finalize_ended_jobs(logs: Path) -> JobSurvey:
    """Finalize the jobs below a directory of logs that have ended; return how all that were not finalized before stand."""
    for job in [job for job in _unrecorded if job.path.parent == logs]:
        with suppress(FileNotFoundError):  # somebody has removed it
            finalize(job, _unrecorded[job])
        del _unrecorded[job]
    survey = survey_jobs(logs, update_index=True)
    ours = [(job, job_status) for job, job_status in survey.ended if read_or(partial(may_finalize, job), False)]
    confirmed = _confirm_ended(ours)
    for job, job_status in confirmed:
        finalize(job, job_status)
    # A job that turned out to be running again is not shown so by the first survey.
    return survey if len(confirmed) == len(ours) else survey_jobs(logs)


def finalize_all(logs: Path) -> list[tuple[Job, JobStatus]]:
    """Finalize every job that has ended; one that only seems to have ended is checked again until that is certain."""
    for line in sbatch.resolve_interrupted_submissions(logs):
        remark(line)
    finalized: list[tuple[Job, JobStatus]] = []
    while True:
        survey = finalize_ended_jobs(logs)
        finalized += [(job, job_status) for job, job_status in survey.ended if job.final_status() is not None]
        # A status that counts keeps its `recheck`; one that may not be recorded by this user is not waited for.
        if not any(job_status.recheck and job_status.state in status.LIVE_STATES for job_status in survey.statuses.values()):
            return finalized
        time.sleep(EARLIER_SLURM_JOBS_POLL_SECONDS)


def finalize_if_ended(job: Job, job_status: JobStatus) -> bool:
    """Record how an unattended job ended. Returns False if it turned out to be running again."""
    confirmed = _confirm_ended([(job, job_status)])
    for _, newest in confirmed:
        finalize(job, newest)
    return bool(confirmed)


def finalize(job: Job, job_status: JobStatus) -> None:
    """Write the job's end into the registry: a row for each rank of each start, and the run that did not finish. Once only.

    A job of another user is left to that user's commands (and root's): what its files name is no place to write to.
    """
    if job.final_status() is not None or not may_finalize(job):
        return
    job.free_reserve()
    started = job_status.kind != "never submitted"
    rows = attempt_rows(job, job_status) if started else []
    argument = job.spec().get("argument") or {}
    try:
        if rows and "registry" in argument:
            attempts.write_attempts(argument["registry"], rows)
        if started and job_status.state in ("failed", "stopped") and _has_cells(job):
            record_unfinished_run(job, job_status, rows)
    except (RequestError, StoreError, OSError) as error:  # must not hide why the job ended, which the user is told as well
        log.warning("the end of job %s could not be recorded: %s", job.id, error)
    job.write_note("settled", {"state": job_status.state, "reason": job_status.reason, "kind": job_status.kind})


def give_up(job: Job, error: BaseException) -> None:
    """Finalize a job that this process could not start, or ran itself and could not record: as a notebook it may live on."""
    ended = status.job_status(job)
    if ended.state in status.LIVE_STATES:
        began = bool(read_or(job.heartbeats, []))
        kind = classify(error) if isinstance(error, Exception) else "stopped"
        ended = JobStatus(end_state(kind), f"{kind}: {type(error).__name__}: {error}", kind)
        if not began:
            ended = JobStatus("stopped", f"it could not be started ({type(error).__name__}: {error})", "never submitted")
    try:
        finalize(job, ended)
    except OSError as why:
        log.warning("the end of job %s could not be written: %s", job.id, why)
        _unrecorded[job] = ended


def _has_cells(job: Job) -> bool:
    """Return whether the job computes cells: other work (of another version, of a test) leaves attempts but no run."""
    argument = job.spec().get("argument") or {}
    return bool(job.spec().get("cells") and argument.get("cells") and {"registry", "sweep", "resources"} <= argument.keys())


def raise_for_end(job: Job, job_status: JobStatus) -> None:
    """Raise a failed job's error for the user: a bad request as such, any other with its traceback and the job's directory.

    Raises:
        RequestError, RunError: the job failed.
    """
    if job_status.state != "failed":
        return
    outcome, kind = job_status.outcome, job_status.kind
    message = outcome.message if outcome is not None and outcome.kind == kind else job_status.reason
    if kind == "bad input":
        raise RequestError(message)
    if kind in ("disk full", "disk error", "failure"):
        raise RunError(message)
    rank = "" if outcome is None else f"rank {outcome.rank} "
    details = read_or(job.log_tail, "") if outcome is None else outcome.traceback
    raise RunError(f"job {job.id}: {rank}failed ({kind}): {message}\n{details}".rstrip() + f"\nlogs: {job.path}")


def _confirm_ended(ended: Sequence[tuple[Job, JobStatus]]) -> list[tuple[Job, JobStatus]]:
    """Return the jobs that still count as ended once every rank has had time to write its outcome, with their newest status."""
    if not ended:
        return []
    jobs = [job for job, _ in ended]
    # 1. Remember the newest heartbeats, and give live ranks time to write outcomes.
    times = {job.id: _heartbeat_times(job) for job in jobs}
    _wait_for_final_records(jobs)
    if any(job_status.from_silence for _, job_status in ended):
        time.sleep(MAX_HEARTBEAT_INTERVAL_SECONDS)
    # 2. Check again.
    newest = status.job_statuses(jobs)
    gone = [job for job in jobs if job.id in newest and newest[job.id].state not in status.LIVE_STATES]
    # 3. A rank that seemed dead because two clocks differ, or one was set, goes on writing heartbeats.
    return [(job, newest[job.id]) for job in gone if not newest[job.id].from_silence or _heartbeat_times(job) == times[job.id]]


def _wait_for_final_records(jobs: Sequence[Job]) -> None:
    deadline = time.monotonic() + FINAL_RECORD_GRACE_SECONDS
    while time.monotonic() < deadline and any(_could_still_report(job) for job in jobs):
        time.sleep(0.1)


def _could_still_report(job: Job) -> bool:
    """Return whether a rank that has written no outcome counts as alive."""
    ended = {o.rank for o in read_or(job.outcomes, [])}
    return any(job.is_alive(h) for h in read_or(job.heartbeats, []) if h.rank not in ended)


def _heartbeat_times(job: Job) -> dict[int, float]:
    return {h.rank: h.time for h in read_or(job.heartbeats, [])}
