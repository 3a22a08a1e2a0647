"""How a job on Slurm puts itself back into the queue, unless somebody has cancelled it or it makes no progress."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ksweep.launch.job import Job
from ksweep.launch.rank_records import Outcome

log = logging.getLogger(__name__)

STARTS_WITHOUT_PROGRESS = 3
"""After so many starts that stop at the same point a job fails: its work units do not fit into its time limit."""


@dataclass(frozen=True)
class StoppedStart:
    """What rank 0 knows of a start of a job on Slurm that was stopped."""

    job: Job
    attempt: int
    slurm_id: str
    signal: int
    """Number of the signal that stopped it; 0 where another rank was stopped."""
    phase: str
    progress_marker: list[Any]
    """Equal in two starts between which nothing was published."""


def fail_if_stuck(start: StoppedStart, outcome: Outcome) -> Outcome:
    """Turn a stop into a failure when the job keeps reaching its time limit at the same point: requeued, it would never end."""
    at_limit = start.signal == signal.SIGUSR2 and not start.job.cancel_requested()
    if at_limit and is_stuck([start.job.read_note("requeued", n) for n in range(start.attempt)], start.progress_marker):
        message = (
            f"{STARTS_WITHOUT_PROGRESS} starts reached the time limit in {start.phase!r} and published nothing: a unit of "
            "work takes longer than a start may last. Raise resources.time, or spread the work over more ranks"
        )
        return replace(outcome, status="failed", kind="time limit", message=message)
    return outcome


def is_stuck(requeues: Sequence[Mapping[str, Any] | None], progress_marker: list[Any]) -> bool:
    """Return whether the starts before this one also reached their time limit at this point, with nothing published between."""
    last = requeues[-(STARTS_WITHOUT_PROGRESS - 1) :]
    same = [r for r in last if r and r["why"] == "time limit" and r["place"] == progress_marker]
    return len(same) == STARTS_WITHOUT_PROGRESS - 1


def requeue_job(start: StoppedStart) -> None:
    """Put this job back into the queue after a signal from Slurm, unless a rank failed, or the job was cancelled or finalized."""
    from ksweep.launch.slurm import commands

    job, number = start.job, start.slurm_id
    if any(e.status == "failed" for e in job.outcomes(start.attempt)):
        log.warning("not requeued: a rank of job %s has failed", number)
        return
    if job.final_status() is not None:
        log.warning("not requeued: job %s was finalized, its cells belong to another by now", number)
        return
    shown = commands.scontrol_show_job(number)
    tag = (job.read_note("slurm") or {}).get("tag")
    if tag and shown.get("Comment", tag) != tag:
        log.warning("not requeued: job %s is another by now: slurmctld forgot this one and gave its number again", number)
        return
    if job.cancel_requested() or (shown.get("JobState") != "RUNNING"):
        log.warning(
            "not requeued: job %s is %s",
            number,
            "to end" if job.cancel_requested() else shown.get("JobState", "unknown to Slurm"),
        )
        return
    preempted = shown.get("PreemptTime", "None") not in ("None", "", "Unknown", "N/A")
    why = "preempted" if preempted else "time limit" if start.signal == signal.SIGUSR2 else "asked to stop"
    note = {"why": why, "time": time.time(), "place": start.progress_marker}
    job.write_note("requeued", note, start.attempt)
    refused = commands.scontrol_requeue(number)
    if refused is not None:
        log.warning("Slurm does not requeue job %s: %s", number, refused)
        job.write_note("requeued", note | {"refused": refused}, start.attempt)
