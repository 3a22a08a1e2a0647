"""One row per job: state, progress, and what it is working on. Job directories may vanish while they are read."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ksweep.cli.jobs.find import JobFacts, job_facts, list_jobs
from ksweep.launch import status
from ksweep.launch.job import Job, read_or
from ksweep.launch.rank_records import Heartbeat

RECENT_SECONDS = 3600.0


def open_jobs(logs: Path, within: float = 0.0) -> list[Job]:
    """Return the jobs that are not finalized, and those that were finalized within the last `within` seconds."""
    return [job for job in list_jobs(logs) if _is_open(job, within) and (job.path / "job.json").exists()]


_long_finalized: set[Job] = set()
"""Jobs that were finalized long ago and need not be looked at again."""


def _is_open(job: Job, within: float) -> bool:
    if job in _long_finalized:
        return False
    try:
        age = time.time() - (job.path / "settled.json").stat().st_mtime
    except OSError:
        return True
    if age > RECENT_SECONDS:
        _long_finalized.add(job)
    return age < within


@dataclass(frozen=True)
class JobRow:
    """One job as `ksweep watch` and `ksweep why` show it."""

    job: str
    sweep: str
    cells: str
    """Labels of the cells that no newer job has."""
    state: str
    reason: str
    phase: str
    done: int
    total: int
    per_second: float | None
    seconds_left: float | None
    slurm: str | None
    nodes: str
    start: int
    numbers: dict[str, float]
    """Rank 0's FVE so far with its interval, and its tokens per second."""
    kind: str = ""
    """Class of a failure or stop."""
    submitted: float = 0.0
    """Seconds since 1970."""
    last_sign: float = 0.0
    """When the job last wrote anything, in seconds since 1970."""
    labels: tuple[str, ...] = field(default=(), repr=False)


def job_rows(jobs: Sequence[Job], cells: Mapping[str, Sequence[str]] | None = None) -> list[JobRow]:
    """Return a row for every job that still exists. `cells` maps a job id to the labels to show, where these are not all."""
    return [row for row, _ in job_rows_with_status(jobs, cells)]


def job_rows_with_status(
    jobs: Sequence[Job], cells: Mapping[str, Sequence[str]] | None = None
) -> list[tuple[JobRow, status.JobStatus]]:
    """Return the same rows, each with the status it was made from."""
    statuses = status.job_statuses(jobs)
    return [(_job_row(job, statuses[job.id], (cells or {}).get(job.id)), statuses[job.id]) for job in jobs if job.id in statuses]


def _job_row(job: Job, job_status: status.JobStatus, cells: Sequence[str] | None) -> JobRow:
    beats = sorted(read_or(job.heartbeats, []), key=lambda b: b.rank)
    done, total, rate = progress_of_ranks(beats)
    facts = read_or(lambda: job_facts(job), JobFacts("", ()))
    labels = tuple(cells if cells is not None else [label for _, label in facts.cells])
    seconds_left = (total - done) / rate if rate and total and job_status.state == "running" else None
    return JobRow(
        job=job.id, sweep=facts.sweep, cells=", ".join(labels), state=job_status.state, reason=job_status.reason,
        phase=beats[0].phase if beats else "", done=done, total=total, per_second=rate or None, seconds_left=seconds_left,
        slurm=read_or(job.slurm_id, None), nodes=",".join(sorted({b.host for b in beats})), start=read_or(job.attempt, 0),
        numbers=beats[0].numbers if beats else {}, kind=job_status.kind, submitted=read_or(job.submitted_at, 0.0),
        last_sign=read_or(job.last_activity, 0.0), labels=labels,
    )  # fmt: skip


def progress_of_ranks(beats: Sequence[Heartbeat]) -> tuple[int, int, float]:
    """Return units done, units in all, and units per second, summed over the ranks that are in the first rank's phase."""
    same = [b for b in beats if b.phase == beats[0].phase]
    if not same or not same[0].total:
        return 0, 0, 0.0
    if same[0].phase == "activations":  # every rank reports what is in the store, whichever rank put it there
        return max(b.done for b in same), same[0].total, max(b.rate for b in same)
    return min(sum(b.done for b in same), same[0].total), same[0].total, sum(b.rate for b in same)


def format_reason(kind: str, reason: str) -> str:
    """Return class and reason of an ending, the class only once."""
    return reason if not kind or reason.startswith(kind) else f"{kind}: {reason}".removesuffix(": ")


def current_cell(row: JobRow) -> tuple[str, str]:
    """Split a phase such as "temperature=0.7: drawing" into the label of the current cell ("" if none) and the rest."""
    for label in sorted(row.labels, key=len, reverse=True):
        if row.phase.startswith(f"{label}: "):
            return label, row.phase[len(label) + 2 :]
    return "", row.phase
