"""`ksweep ls`: one row per cell, unfinished ones and runs that have ended, newest first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from ksweep.cli.jobs.find import JobFacts, job_facts, short_id
from ksweep.cli.jobs.rows import JobRow, current_cell, format_reason, job_rows_with_status, open_jobs
from ksweep.launch import status
from ksweep.launch.job import Job, logs_directory, read_or
from ksweep.launch.survey import cell_of_end
from ksweep.utils.console import WIDE_COLUMNS, ago_text
from ksweep.utils.errors import RequestError

CELL_STATES = ("running", "waiting", "unknown", "finished", "failed", "stopped")
LS_COLUMNS = ("id", "sweep", "cell", "state", "progress", "FVE", "when")


@dataclass(frozen=True)
class CellRow:
    """A cell that has not ended, or a run that has."""

    run: str | None
    """Run id; None while the cell has not ended, or nobody has recorded how its job did."""
    job: str | None
    """Job id of a cell without a run."""
    sweep: str
    cell: str
    state: str
    reason: str
    """Class and message of a failure or stop; what a waiting cell waits for."""
    error_class: str | None
    """Why a run that has ended did not finish."""
    done: int | None
    total: int | None
    """Draws of the job's current cell."""
    fve: float | None
    k: int | None
    """The highest point of an ended run's curve; for the current cell the FVE so far, at K = 1."""
    num_activations: int | None
    num_draws: int | None
    num_draws_sampled: int | None
    tokens_per_second: float | None
    time: str
    """UTC: when the run ended; when a job without one last wrote anything if it has ended, and else when it was submitted."""


def cell_rows(registry: Path, sweep: str | None = None, state: str | None = None) -> list[CellRow]:
    """Return running cells, then waiting cells, then runs and cells of jobs that ended unattended, each newest first.

    Nothing is recorded: of a job that nobody has finalized, the status is shown that the next sweep command will record.

    Raises:
        RequestError: there is no such registry, sweep or state.
    """
    from ksweep.registry.query import run_query

    if state is not None and state not in CELL_STATES:
        raise RequestError(f"--state {state!r} is not one of {', '.join(CELL_STATES)}")
    runs = run_query(registry, _RUNS).to_pylist()
    finished = _last_finished(runs)
    rows, ended = list[CellRow](), [_ended_cell_row(run) for run in runs]
    for job, job_row, job_status in _open_jobs(registry):
        if job_status.state in status.LIVE_STATES:
            rows += _live_cell_rows(job, job_row, finished)
        elif job_status.state != "finished":  # rank 0 has recorded the runs of one that finished
            ended += _unrecorded_cell_rows(job, job_row, job_status, finished)
    rows.sort(key=lambda row: row.time, reverse=True)
    rows.sort(key=lambda row: row.state == "waiting")  # a limit must not cut off running cells in favour of waiting ones
    rows += sorted(ended, key=lambda row: row.time, reverse=True)
    if sweep is not None:
        name = _matching_sweep(sweep, {row.sweep for row in rows})
        rows = [row for row in rows if row.sweep == name]
    return [row for row in rows if state in (None, row.state)]


def _open_jobs(registry: Path) -> list[tuple[Job, JobRow, status.JobStatus]]:
    """Return the jobs that are not finalized, each with its row and its status."""
    jobs = {job.id: job for job in open_jobs(logs_directory(registry))}
    return [(jobs[row.job], row, job_status) for row, job_status in job_rows_with_status(list(jobs.values()))]


_RUNS = """
    SELECT run_id, sweep, cell, label, cell_key, status, error_class, error_type, error_message, num_activations, num_draws,
           num_draws_sampled, round(tokens_per_second) AS tokens_per_second, finished, best.fve, best.k
    FROM runs LEFT JOIN (
        SELECT run_id, round(max(fve), 4) AS fve, arg_max(k, fve) AS k FROM run_curves GROUP BY run_id
    ) AS best USING (run_id) ORDER BY finished DESC, run_id
"""


def _last_finished(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Map each cell key to the time at which its newest finished run ended, in seconds since 1970."""
    return {
        run["cell_key"]: run["finished"].replace(tzinfo=UTC).timestamp() for run in reversed(runs) if run["status"] == "finished"
    }


def _live_cell_rows(job: Job, row: JobRow, last_finished: Mapping[str, float]) -> Iterator[CellRow]:
    """Yield the unfinished cells of a live job: the current one, and those still to come."""
    facts = read_or(partial(job_facts, job), JobFacts("", ()))
    cells = [(key, label) for key, label in facts.cells if last_finished.get(key, -1.0) < row.submitted]
    # A job that loads models or activations is at the first cell that it has not finished.
    current = current_cell(row)[0] or next((label for _, label in cells), "")
    submitted = f"{datetime.fromtimestamp(row.submitted, UTC):%Y-%m-%d %H:%M:%S}"
    for key, label in cells:
        is_current = row.state == "running" and label == current
        state, reason = _cell_state(row, is_current=is_current)
        fve = row.numbers.get("fve") if is_current else None
        has_count = is_current and row.total > 0
        yield CellRow(
            run=None, job=job.id, sweep=row.sweep, cell=f"{facts.titles.get(key, label)} @{key[:8]}", state=state, reason=reason,
            error_class=None, done=row.done if has_count else None, total=row.total if has_count else None, fve=fve,
            k=None if fve is None else 1, num_activations=None, num_draws=None, num_draws_sampled=None,
            tokens_per_second=row.numbers.get("tokens_per_second") if is_current else None, time=submitted,
        )  # fmt: skip


def _unrecorded_cell_rows(
    job: Job, row: JobRow, job_status: status.JobStatus, last_finished: Mapping[str, float]
) -> Iterator[CellRow]:
    """Yield the cell that a job was at when it failed or stopped, or else its first unfinished one."""
    facts = read_or(partial(job_facts, job), JobFacts("", ()))
    unfinished = [key for key, _ in facts.cells if last_finished.get(key, -1.0) < row.submitted]
    current = cell_of_end(job, job_status) or next(iter(unfinished), None)
    for key, label in facts.cells:
        if key == current:
            yield CellRow(
                run=None, job=job.id, sweep=row.sweep, cell=f"{facts.titles.get(key, label)} @{key[:8]}", state=row.state,
                reason=" ".join(format_reason(row.kind, row.reason).split()), error_class=row.kind or None, done=None, total=None,
                fve=None, k=None, num_activations=None, num_draws=None, num_draws_sampled=None, tokens_per_second=None,
                time=f"{datetime.fromtimestamp(row.last_sign, UTC):%Y-%m-%d %H:%M:%S}",
            )  # fmt: skip


def _cell_state(row: JobRow, *, is_current: bool) -> tuple[str, str]:
    """Return state and reason of a cell: those of its job, unless the job is at another cell."""
    if row.state != "running":
        return row.state, row.reason
    return ("running", current_cell(row)[1] or row.reason) if is_current else ("waiting", "later in its job")


def _ended_cell_row(run: Mapping[str, Any]) -> CellRow:
    words = [word for word in (run["error_class"] or run["error_type"], run["error_message"]) if word]
    return CellRow(
        run=run["run_id"], job=None, sweep=run["sweep"], cell=run["cell"], state=run["status"],
        reason=" ".join(": ".join(words).split()), error_class=run["error_class"], done=None, total=None, fve=run["fve"],
        k=run["k"], num_activations=run["num_activations"], num_draws=run["num_draws"],
        num_draws_sampled=run["num_draws_sampled"], tokens_per_second=run["tokens_per_second"],
        time=f"{run['finished']:%Y-%m-%d %H:%M:%S}",
    )  # fmt: skip


def _matching_sweep(name: str, sweeps: set[str]) -> str:
    near = sorted(sweep for sweep in sweeps if sweep.startswith(name))
    if name in sweeps or len(near) == 1:
        return name if name in sweeps else near[0]
    if near:
        raise RequestError(f"{name!r} could be {', '.join(near)}: give more of it")
    raise RequestError(
        f"no sweep is called {name!r}" + (f"; there are {', '.join(sorted(sweeps))}" if sweeps else ": there are none")
    )


def format_cell_row(row: CellRow, width: int) -> dict[str, str]:
    """Return the text of each column, abbreviated where the terminal is narrow."""
    wide, name = width >= WIDE_COLUMNS, row.run or row.job or ""
    moment = datetime.strptime(row.time, "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC)
    return {
        "id": name if wide else short_id(name), "sweep": row.sweep, "cell": row.cell, "state": row.state,
        "progress": _format_cell_progress(row, wide=wide), "FVE": "" if row.fve is None else f"{row.fve:.3f} K={row.k}",
        "when": row.time if wide else ago_text((datetime.now(UTC) - moment).total_seconds()),
    }  # fmt: skip


def _format_cell_progress(row: CellRow, *, wide: bool) -> str:
    if row.total and row.done is not None:
        return f"{row.reason} {row.done:,}/{row.total:,}" if wide else f"{row.reason} {row.done / row.total:.0%}"
    if row.state == "finished":
        return f"{row.num_draws_sampled:,} new draws" if row.num_draws_sampled and wide else ""
    if wide:
        return row.reason
    if row.state in ("failed", "stopped"):
        return row.reason.partition(": ")[0]
    return row.reason.removeprefix("pending: ").partition(" (")[0]
