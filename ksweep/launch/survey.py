"""All jobs below a directory of logs that nobody has finalized yet, and the cells that they still work on."""

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
"""So many are looked into each time, instead of writing the file each time."""


@dataclass(frozen=True)
class JobSurvey:
    """All jobs that are not settled yet, as they stand."""

    statuses: dict[str, JobStatus]
    live_job_by_cell: dict[str, Job]
    """Cell key -> the job that may still bring its results."""
    ended: list[tuple[Job, JobStatus]]
    """Jobs whose end nobody has booked yet."""

    @property
    def live_jobs(self) -> list[Job]:
        """Jobs that may still bring something, each once."""
        return list({job.id: job for job in self.live_job_by_cell.values()}.values())

    @property
    def failures(self) -> dict[str, tuple[str, str]]:
        """Cell key -> class and message, of cells whose job has just been found failed."""
        found: dict[str, tuple[str, str]] = {}
        for job, verdict in self.ended:
            if verdict.state == "failed":
                cells = _cells(job)
                at = {
                    b.cell for b in read_or(job.heartbeats, []) if verdict.outcome is not None and b.rank == verdict.outcome.rank
                }
                blamed = [cell for cell in cells if cell["key"] in at] or cells[:1]
                found |= {cell["key"]: (verdict.kind, verdict.reason) for cell in blamed}
        return found

    def live_job_on(self, cell_key: str) -> tuple[Literal["running", "waiting"], str] | None:
        """Whether a job is at work on a cell, and what is known of it."""
        job = self.live_job_by_cell.get(cell_key)
        if job is None:
            return None
        found = self.statuses[job.id]
        return "waiting" if found.state == "waiting" else "running", f"job {job.id}: {found.reason}"


def unfinalized_jobs(logs: Path) -> list[Job]:
    """Jobs whose end nobody has booked, oldest first.

    After a year there are thousands that are settled: a listing, and a file that names them, spare a look into each. The file is
    an index, and can be removed.
    """
    index = logs / FINALIZED_INDEX
    known = set(index.read_text().split()) if index.exists() else set[str]()
    with suppress(FileNotFoundError):
        names = sorted(entry.name for entry in os.scandir(logs) if entry.name not in known)
        jobs = [Job(logs / name) for name in names if (logs / name / "job.json").exists()]
        settled = {job.id for job in jobs if job.read_note("settled") is not None}
        if len(settled) >= INDEX_AFTER:
            with suppress(OSError):  # somebody else's logs
                publish(index, "\n".join(sorted(known | settled)).encode())
        return [job for job in jobs if job.id not in settled]
    return []


def _cells(job: Job) -> list[dict[str, str]]:
    return read_or(lambda: list(job.spec().get("cells", [])), [])


def survey_jobs(logs: Path) -> JobSurvey:
    """Every unsettled job below a directory of logs; Slurm is asked about those that are silent."""
    jobs = unfinalized_jobs(logs)
    found = job_statuses(jobs)
    jobs = [job for job in jobs if job.id in found]
    at_work = {cell["key"]: job for job in jobs if found[job.id].state in LIVE_STATES for cell in _cells(job)}
    return JobSurvey(found, at_work, [(job, found[job.id]) for job in jobs if found[job.id].state not in LIVE_STATES])
