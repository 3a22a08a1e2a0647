"""How jobs stand, a line each. Job directories may vanish and records be half-written while they are looked at."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ksweep.cli.jobs.find import Facts, facts_of, listed
from ksweep.launch import status
from ksweep.launch.job import Job, read_or
from ksweep.launch.rank_records import Heartbeat

RECENT_SECONDS = 3600.0


def unsettled(logs: Path, within: float = 0.0) -> list[Job]:
    """Jobs whose end nobody has booked yet, and those that were booked within the last so many seconds."""
    return [job for job in listed(logs) if _is_unsettled(job, within) and (job.path / "job.json").exists()]


_booked: set[Job] = set()
"""Jobs that were booked long ago: they stay so, and whoever watches need not look at them again."""


def _is_unsettled(job: Job, within: float) -> bool:
    if job in _booked:
        return False
    try:
        age = time.time() - (job.path / "settled.json").stat().st_mtime
    except OSError:
        return True
    if age > RECENT_SECONDS:
        _booked.add(job)
    return age < within


@dataclass(frozen=True)
class Line:
    """One job as people see it."""

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
    """FVE so far of rank 0 with its interval, tokens per second."""
    kind: str = ""
    """Class of an ending."""
    submitted: float = 0.0
    last_sign: float = 0.0
    """When it was last heard of. Both in seconds since 1970."""
    labels: tuple[str, ...] = field(default=(), repr=False)


def lines(jobs: Sequence[Job], cells: Mapping[str, Sequence[str]] | None = None) -> list[Line]:
    """Jobs as they stand; `cells`: job id -> labels of those of its cells that are of interest, where these are not all."""
    return [line for line, _ in seen(jobs, cells)]


def seen(jobs: Sequence[Job], cells: Mapping[str, Sequence[str]] | None = None) -> list[tuple[Line, status.JobStatus]]:
    """The same with the verdicts."""
    found = status.job_statuses(jobs)
    return [(_line(job, found[job.id], (cells or {}).get(job.id)), found[job.id]) for job in jobs if job.id in found]


def _line(job: Job, verdict: status.JobStatus, cells: Sequence[str] | None) -> Line:
    beats = sorted(read_or(job.heartbeats, []), key=lambda b: b.rank)
    done, total, rate = progress(beats)
    facts = read_or(lambda: facts_of(job), Facts("", ()))
    labels = tuple(cells if cells is not None else [label for _, label in facts.cells])
    left = (total - done) / rate if rate and total and verdict.state == "running" else None
    return Line(
        job=job.id, sweep=facts.sweep, cells=", ".join(labels), state=verdict.state, reason=verdict.reason,
        phase=beats[0].phase if beats else "", done=done, total=total, per_second=rate or None, seconds_left=left,
        slurm=read_or(job.slurm_id, None), nodes=",".join(sorted({b.host for b in beats})), start=read_or(job.attempt, 0),
        numbers=beats[0].numbers if beats else {}, kind=verdict.kind, submitted=read_or(job.submitted_at, 0.0),
        last_sign=read_or(job.last_activity, 0.0), labels=labels,
    )  # fmt: skip


def progress(beats: Sequence[Heartbeat]) -> tuple[int, int, float]:
    """Units done and to do in the phase of the first rank, over the ranks that share it, and units per second."""
    same = [b for b in beats if b.phase == beats[0].phase]
    if not same or not same[0].total:
        return 0, 0, 0.0
    if same[0].phase == "activations":  # every rank tells what is in the store, whoever put it there
        return max(b.done for b in same), same[0].total, max(b.rate for b in same)
    return min(sum(b.done for b in same), same[0].total), same[0].total, sum(b.rate for b in same)


def classed(kind: str, reason: str) -> str:
    """Class and reason of an ending, the class once."""
    return reason if not kind or reason.startswith(kind) else f"{kind}: {reason}".removesuffix(": ")


def at_work(line: Line) -> tuple[str, str]:
    """The cell that a job is at, and what it does there: a phase is "temperature=0.7: drawing"."""
    for label in sorted(line.labels, key=len, reverse=True):
        if line.phase.startswith(f"{label}: "):
            return label, line.phase[len(label) + 2 :]
    return "", line.phase
