"""The statuses of all jobs that are not finalized, and the cells that they still work on."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ksweep.launch.job import Job, read_or
from ksweep.launch.status import LIVE_STATES, JobStatus, job_statuses
from ksweep.utils.files import publish

FINALIZED_INDEX = ".settled"
INDEX_AFTER = 50
"""The index is rewritten when this many jobs are finalized that it does not list."""


@dataclass(frozen=True)
class JobSurvey:
    """The statuses of all jobs that were not finalized when they were listed."""

    statuses: dict[str, JobStatus]
    live_job_by_cell: dict[str, Job]
    """Cell key -> the job that may still bring its results."""
    ended: list[tuple[Job, JobStatus]]
    """Jobs that have ended and are not finalized."""

    @property
    def live_jobs(self) -> list[Job]:
        """Jobs that may still bring results, each once."""
        return list({job.id: job for job in self.live_job_by_cell.values()}.values())

    @property
    def failures(self) -> dict[str, tuple[str, str]]:
        """Cell key -> class and message, of cells whose job has just been found failed."""
        failures: dict[str, tuple[str, str]] = {}
        for job, status in self.ended:
            keys = [cell["key"] for cell in _cells(job)]
            if status.state == "failed" and keys:
                message = status.reason.removeprefix(f"{status.kind}: ")  # as a recorded run says it
                failures[cell_of_end(job, status) or keys[0]] = (status.kind, message)
        return failures

    def live_job_on(self, cell_key: str) -> tuple[Literal["running", "waiting"], str] | None:
        """Return state and reason of the live job with this cell; None if there is none."""
        job = self.live_job_by_cell.get(cell_key)
        if job is None:
            return None
        status = self.statuses[job.id]
        return "waiting" if status.state == "waiting" else "running", f"job {job.id}: {status.reason}"


def cell_of_end(job: Job, status: JobStatus) -> str | None:
    """Return the key of the cell that a job was at when it ended; None if no heartbeat says so.

    That is the cell of the rank that explains the end, or else of the first rank.
    """
    heartbeats = {h.rank: h for h in read_or(job.heartbeats, [])}
    heartbeat = heartbeats.get(status.outcome.rank if status.outcome else 0) or next(iter(heartbeats.values()), None)
    return heartbeat.cell if heartbeat and heartbeat.cell in {cell["key"] for cell in _cells(job)} else None


def unfinalized_jobs(logs: Path, *, update_index: bool = False) -> list[Job]:
    """Return the jobs that have not been finalized, oldest first.

    After a year thousands are finalized: listing the directory and reading an index of them spares a look into each. The index
    can be removed; only a command that finalizes jobs writes it.
    """
    index = logs / FINALIZED_INDEX
    indexed = set(index.read_text().split()) if index.exists() else set[str]()
    with suppress(FileNotFoundError):
        names = sorted(entry.name for entry in os.scandir(logs) if entry.name not in indexed)
        jobs = [Job(logs / name) for name in names if (logs / name / "job.json").exists()]
        finalized = {job.id for job in jobs if job.final_status() is not None}
        if update_index and len(finalized) >= INDEX_AFTER:
            with suppress(OSError):  # another user's logs
                publish(index, "\n".join(sorted(indexed | finalized)).encode())
        return [job for job in jobs if job.id not in finalized]
    return []


def _cells(job: Job) -> list[dict[str, str]]:
    return read_or(lambda: list(job.spec().get("cells", [])), [])


def survey_jobs(logs: Path, *, update_index: bool = False) -> JobSurvey:
    """Check every job below a directory of logs that is not finalized; Slurm is asked about those that are silent.

    Nothing is written, except, with `update_index`, the index of finalized jobs.
    """
    jobs = unfinalized_jobs(logs, update_index=update_index)
    statuses = job_statuses(jobs)
    live = [job for job in jobs if job.id in statuses and statuses[job.id].state in LIVE_STATES]
    ended = [(job, statuses[job.id]) for job in jobs if job.id in statuses and job not in live]
    return JobSurvey(statuses, {cell["key"]: job for job in live for cell in _cells(job)}, ended)
