"""What earlier commands left behind: ended jobs are told to the registry, once, whoever finds them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Literal

from ksweep.errors import RunError, StoreError
from ksweep.evaluate import land_lost
from ksweep.launch import states
from ksweep.launch.job import Ending, Job


def book_ended(logs: Path) -> states.Survey:
    """The jobs below a directory of logs as they stand; those that have ended are booked."""
    survey = states.survey(logs)
    for job, verdict in survey.ended:
        book(job, verdict)
    return survey


def book(job: Job, verdict: states.Verdict) -> None:
    """Tell the registry how a job ended that nobody waited for, once."""
    if job.noted("settled") is not None:
        return
    ending = verdict.ending or Ending(rank=0, status=verdict.state, kind=verdict.kind, message=verdict.reason)
    if verdict.state != "finished" and verdict.kind != "never submitted":
        land_ending(job, ending, "failed" if verdict.state == "failed" else "stopped")
    job.note("settled", {"state": verdict.state, "reason": verdict.reason, "kind": verdict.kind})
    job.release()


def land_ending(job: Job, ending: Ending, status: Literal["failed", "stopped"] = "failed") -> None:
    """Put into the registry how a job ended that could not do so itself: every rank's words, the last log lines, node, GPU."""
    endings = sorted(job.endings(), key=lambda e: e.time)
    words = [f"rank {e.rank} ({e.status}): {e.message}\n{e.traceback}".rstrip() for e in endings if e.traceback]
    if tail := job.log_tail():
        words.append(f"last log lines:\n{tail}")
    words = words or [ending.traceback] * bool(ending.traceback)
    first = next((b for b in job.heartbeats() if b.rank == ending.rank), None)
    with suppress(RunError, StoreError, OSError):  # what ended the job is told beside; this must not hide it
        land_lost(
            job.spec()["argument"], ending.kind, ending.message, tuple(words), job.started(),
            status=status, host=first.host if first else None, device=first.device or None if first else None,
        )  # fmt: skip
