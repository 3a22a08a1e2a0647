"""How a job on Slurm comes back: it puts itself into the queue again, unless somebody has ended it or it gets nowhere."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ksweep.launch.job import Ending

if TYPE_CHECKING:
    from ksweep.launch.pulse import Pulse

log = logging.getLogger(__name__)

STARTS_WITHOUT_PROGRESS = 3
"""So often a job may be stopped at the same place; then its units do not fit into its time limit."""


def going_on_later(pulse: Pulse, ending: Ending) -> Ending:
    """A job that is stopped at the same place again and again would be requeued for ever: that is a failure, and is said."""
    at_limit = pulse.signal == signal.SIGUSR2 and not pulse.job.asked_to_end()
    if at_limit and is_stuck([pulse.job.noted("requeued", n) for n in range(pulse.attempt)], pulse.place()):
        message = (
            f"{STARTS_WITHOUT_PROGRESS} starts reached the time limit in {pulse.beat.phase!r} and published nothing: a unit of "
            "work takes longer than a start may last. Raise resources.time, or spread the work over more ranks"
        )
        return replace(ending, status="failed", kind="time limit", message=message)
    return ending


def is_stuck(requeues: Sequence[Mapping[str, Any] | None], place: list[Any]) -> bool:
    """Whether the starts before this one reached their time limit where this one is stopped, with nothing published between."""
    last = requeues[-(STARTS_WITHOUT_PROGRESS - 1) :]
    same = [r for r in last if r and r["why"] == "time limit" and r["place"] == place]
    return len(same) == STARTS_WITHOUT_PROGRESS - 1


def requeue(pulse: Pulse) -> None:
    """Put this job back into the queue after a signal of Slurm's; not when somebody has ended it, nor when a rank has failed."""
    from ksweep.launch import slurm

    job, number = pulse.job, pulse.slurm_id
    if any(e.status == "failed" for e in job.endings(pulse.attempt)):
        log.warning("not requeued: a rank of job %s has failed", number)
        return
    if job.given_up() is not None:
        log.warning("not requeued: job %s was given up, its cells belong to another by now", number)
        return
    facts = slurm.describe(number)
    tag = (job.noted("slurm") or {}).get("tag")
    if tag and facts.get("Comment", tag) != tag:
        log.warning("not requeued: job %s is another by now: slurmctld forgot this one and gave its number again", number)
        return
    if job.asked_to_end() or (facts.get("JobState") != "RUNNING"):
        log.warning(
            "not requeued: job %s is %s", number, "to end" if job.asked_to_end() else facts.get("JobState", "unknown to Slurm")
        )
        return
    preempted = facts.get("PreemptTime", "None") not in ("None", "", "Unknown", "N/A")
    why = "preempted" if preempted else "time limit" if pulse.signal == signal.SIGUSR2 else "asked to stop"
    note = {"why": why, "time": time.time(), "place": pulse.place()}
    job.note("requeued", note, pulse.attempt)
    refused = slurm.requeue(number)
    if refused is not None:
        log.warning("Slurm does not requeue job %s: %s", number, refused)
        job.note("requeued", note | {"refused": refused}, pulse.attempt)
