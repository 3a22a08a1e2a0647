"""What earlier commands left behind: ended jobs are told to the registry, once, whoever finds them."""

from __future__ import annotations

import logging
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ksweep.config.sweep import Sweep
from ksweep.evaluation.identity import CellKeys
from ksweep.launch import status
from ksweep.launch.final_records import attempt_rows, record_unfinished_run
from ksweep.launch.job import Job, read_or
from ksweep.launch.job_spec import logs_of
from ksweep.launch.progress import ProgressDisplay
from ksweep.launch.rank_records import Outcome, is_alive
from ksweep.launch.slurm import sbatch
from ksweep.launch.survey import JobSurvey, survey_jobs
from ksweep.registry import attempts
from ksweep.utils.errors import RequestError, StoreError

log = logging.getLogger(__name__)

FINAL_RECORD_GRACE_SECONDS = 6.0
"""How long the ranks of a job that has just ended may take to say how: a look around on Slurm, and the search for an echo."""
MAX_HEARTBEAT_INTERVAL_SECONDS = 3.0
"""Within which a living rank beats."""


def finalize_ended_jobs(logs: Path) -> JobSurvey:
    """The jobs below a directory of logs as they stand; those that have ended are booked."""
    survey = survey_jobs(logs)
    believed = _confirm_ended(survey.ended)
    for job, verdict in believed:
        finalize(job, verdict)
    # A job that has come back meanwhile is at work again, and the first look does not say so.
    return survey if len(believed) == len(survey.ended) else survey_jobs(logs)


def finalize_if_ended(job: Job, verdict: status.JobStatus) -> bool:
    """Tell the registry how a job ended that nobody waited for, once; whether it has: it may have come back meanwhile."""
    believed = _confirm_ended([(job, verdict)])
    for _, found in believed:
        finalize(job, found)
    return bool(believed)


def finalize(job: Job, verdict: status.JobStatus) -> None:
    """Tell the registry how a job ended: what each rank of each start left, and the run that came to nothing."""
    if job.final_status() is not None:
        return
    job.free_reserve()
    left = attempt_rows(job, verdict) if verdict.kind != "never submitted" else []
    argument = job.spec().get("argument") or {}
    try:
        if left and "registry" in argument:
            attempts.write_attempts(argument["registry"], left)
        if verdict.state in ("failed", "stopped") and verdict.kind != "never submitted" and _is_of_cells(job):
            record_unfinished_run(job, verdict, left)
    except (RequestError, StoreError, OSError) as error:  # what ended the job is told beside; this must not hide it
        log.warning("the end of job %s could not be landed: %s", job.id, error)
    job.write_note("settled", {"state": verdict.state, "reason": verdict.reason, "kind": verdict.kind})


def _is_of_cells(job: Job) -> bool:
    """Whether there is a run to speak of: any other work (a job of another version, a test's) has attempts only."""
    argument = job.spec().get("argument") or {}
    return bool(job.spec().get("cells") and argument.get("cells") and {"registry", "sweep", "resources"} <= argument.keys())


def status_from_outcome(ending: Outcome) -> status.JobStatus:
    """How a job ended that this process has seen through."""
    state: status.JobState = "finished" if ending.status == "finished" else "failed" if ending.status == "failed" else "stopped"
    reason = ending.message or ("every rank finished" if state == "finished" else state)
    return status.JobStatus(state, reason, ending.kind or ("stopped" if state == "stopped" else ""), ending)


def _confirm_ended(ended: Sequence[tuple[Job, status.JobStatus]]) -> list[tuple[Job, status.JobStatus]]:
    """Those that have ended still, once every rank has had time to say how."""
    if not ended:
        return []
    jobs = [job for job, _ in ended]
    before = {job.id: _heartbeat_times(job) for job in jobs}
    _wait_for_final_records(jobs)
    if any(verdict.kind == "killed" and _has_remote_rank(job) for job, verdict in ended):
        time.sleep(MAX_HEARTBEAT_INTERVAL_SECONDS)
    found = status.job_statuses(jobs)
    gone = [job for job in jobs if job.id in found and found[job.id].state not in status.LIVE_STATES]
    # A rank of another machine, told dead because the two clocks differ, goes on beating.
    return [(job, found[job.id]) for job in gone if found[job.id].kind != "killed" or _heartbeat_times(job) == before[job.id]]


def _wait_for_final_records(jobs: Sequence[Job]) -> None:
    deadline = time.monotonic() + FINAL_RECORD_GRACE_SECONDS
    while time.monotonic() < deadline and any(_could_still_report(job) for job in jobs):
        time.sleep(0.1)


def _could_still_report(job: Job) -> bool:
    """Whether a rank that has not said how it ended is alive, or was so lately on another machine."""
    ended = {e.rank for e in read_or(job.outcomes, [])}
    silent = [beat for beat in read_or(job.heartbeats, []) if beat.rank not in ended]
    return time.time() - job.last_activity() < FINAL_RECORD_GRACE_SECONDS and any(map(is_alive, silent))


def _has_remote_rank(job: Job) -> bool:
    return any(beat.host != socket.gethostname() for beat in read_or(job.heartbeats, []))


def _heartbeat_times(job: Job) -> dict[int, float]:
    return {beat.rank: beat.time for beat in read_or(job.heartbeats, [])}


# What each rank of each start left


# The run that came to nothing


EARLIER_JOBS_POLL_SECONDS = 0.3


EARLIER_SLURM_JOBS_POLL_SECONDS = 2.0


def finalize_earlier_jobs(sweep: Sweep, keys: Sequence[CellKeys], *, wait: bool) -> JobSurvey:
    """What earlier commands left: submissions are settled, ended jobs booked, and what is still at work is known.

    With `wait` (on this machine) a job that is at work on these cells is seen through, instead of computing twice.
    """
    logs, wanted = logs_of(sweep), {key.cell for key in keys}
    for line in sbatch.resolve_interrupted_submissions(logs):
        print(line, file=sys.stderr)
    told: set[str] = set()
    with ProgressDisplay() as watch:
        while True:
            survey = finalize_ended_jobs(logs)
            ours = {job.id: job for key, job in survey.live_job_by_cell.items() if key in wanted}
            patient = [i for i in ours if survey.statuses[i].recheck or (wait and survey.statuses[i].state != "unknown")]
            if not patient:
                return survey
            for name in patient:
                if name not in told:
                    told.add(name)
                    what = (
                        "seems to be gone: making sure"
                        if survey.statuses[name].recheck
                        else "is still at work on this sweep: waiting"
                    )
                    print(f"job {name} of an earlier command {what} ({survey.statuses[name].reason})", file=sys.stderr)
                watch.show_ranks(read_or(ours[name].heartbeats, []))
            time.sleep(EARLIER_JOBS_POLL_SECONDS if wait else EARLIER_SLURM_JOBS_POLL_SECONDS)
