"""`ksweep ls`: a row a cell, of jobs that are under way and of runs that have ended, the newest first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from ksweep.cli.jobs.find import Facts, facts_of, logs_of, short
from ksweep.cli.jobs.rows import Line, at_work, seen, unsettled
from ksweep.launch import status
from ksweep.launch.job import Job, read_or
from ksweep.launch.reconcile import finalize_if_ended
from ksweep.utils.console import ago_text
from ksweep.utils.errors import RequestError

STATES = ("running", "waiting", "unknown", "finished", "failed", "stopped")
NARROW = 110
COLUMNS = ("id", "sweep", "cell", "state", "progress", "FVE", "when")


@dataclass(frozen=True)
class Row:
    """A cell that is under way, or a run of it that has ended."""

    run: str | None
    """Run id; None while the cell has not ended."""
    job: str | None
    """Job id of a cell that has not ended."""
    sweep: str
    cell: str
    state: str
    reason: str
    """Of a failure or a stop its class and message, of a waiting cell what it waits for."""
    error_class: str | None
    """Why a run that has ended did not finish."""
    done: int | None
    total: int | None
    """Draws of a cell at work."""
    fve: float | None
    k: int | None
    """Of an ended run the highest point of its curve, of a cell at work the FVE so far at K = 1."""
    num_activations: int | None
    num_draws: int | None
    num_draws_sampled: int | None
    tokens_per_second: float | None
    time: str
    """UTC: when the run ended, or when the job was submitted."""


def rows(registry: Path, sweep: str | None = None, state: str | None = None) -> list[Row]:
    """Cells at work, cells that wait, and runs, each the newest first. Jobs that ended unseen are told to the registry before.

    Raises:
        RequestError: there is no such registry, sweep or state.
    """
    from ksweep.registry.query import run_query

    if state is not None and state not in STATES:
        raise RequestError(f"--state {state!r} is not one of {', '.join(STATES)}")
    live = _book_and_look(registry)
    ended = run_query(registry, _RUNS).to_pylist()
    found = [row for job, line in live for row in _under_way(job, line, _finished(ended))]
    found.sort(key=lambda row: row.time, reverse=True)
    found.sort(key=lambda row: row.state == "waiting")  # a limit must not leave out what runs for what waits
    found += [_ended(run) for run in ended]
    if sweep is not None:
        name = _sweep_called(sweep, {row.sweep for row in found})
        found = [row for row in found if row.sweep == name]
    return [row for row in found if state in (None, row.state)]


def book_ended(registry: Path) -> None:
    """Tell the registry of jobs that have ended since anybody looked."""
    if registry.is_dir():
        _book_and_look(registry)


def _book_and_look(registry: Path) -> list[tuple[Job, Line]]:
    jobs = {job.id: job for job in unsettled(logs_of(registry))}
    live = []
    for line, verdict in seen(list(jobs.values())):
        if verdict.state in status.LIVE_STATES:
            live.append((jobs[line.job], line))
        else:
            read_or(partial(finalize_if_ended, jobs[line.job], verdict), None)
    return live


_RUNS = """
    SELECT run_id, sweep, cell, label, cell_key, status, error_class, error_type, error_message, num_activations, num_draws,
           num_draws_sampled, round(tokens_per_second) AS tokens_per_second, finished, best.fve, best.k
    FROM runs LEFT JOIN (
        SELECT run_id, round(max(fve), 4) AS fve, arg_max(k, fve) AS k FROM run_curves GROUP BY run_id
    ) AS best USING (run_id) ORDER BY finished DESC, run_id
"""


def _finished(ended: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Cell key -> when its newest finished run ended, seconds since 1970."""
    return {
        run["cell_key"]: run["finished"].replace(tzinfo=UTC).timestamp() for run in reversed(ended) if run["status"] == "finished"
    }


def _under_way(job: Job, line: Line, finished: Mapping[str, float]) -> Iterator[Row]:
    """The cells of a job that is not over: the one at hand, and those that have yet to come."""
    facts = read_or(partial(facts_of, job), Facts("", ()))
    cells = [(key, label) for key, label in facts.cells if finished.get(key, -1.0) < line.submitted]
    # A job that loads models or activations is at the first cell that it has not finished.
    at = at_work(line)[0] or next((label for _, label in cells), "")
    submitted = f"{datetime.fromtimestamp(line.submitted, UTC):%Y-%m-%d %H:%M:%S}"
    for key, label in cells:
        here = line.state == "running" and label == at
        state, reason = _standing(line, here=here)
        fve = line.numbers.get("fve") if here else None
        counted = here and line.total > 0
        yield Row(
            None, job.id, line.sweep, f"{facts.titles.get(key, label)} @{key[:8]}", state, reason, None,
            line.done if counted else None, line.total if counted else None, fve, None if fve is None else 1, None, None, None,
            line.numbers.get("tokens_per_second") if here else None, submitted,
        )  # fmt: skip


def _standing(line: Line, *, here: bool) -> tuple[str, str]:
    """State and reason of a cell: that of its job, unless that is at another one."""
    if line.state != "running":
        return line.state, line.reason
    return ("running", at_work(line)[1] or line.reason) if here else ("waiting", "later in its job")


def _ended(run: Mapping[str, Any]) -> Row:
    words = [word for word in (run["error_class"] or run["error_type"], run["error_message"]) if word]
    return Row(
        run["run_id"], None, run["sweep"], run["cell"], run["status"], " ".join(": ".join(words).split()),
        run["error_class"], None, None, run["fve"], run["k"], run["num_activations"], run["num_draws"], run["num_draws_sampled"],
        run["tokens_per_second"], f"{run['finished']:%Y-%m-%d %H:%M:%S}",
    )  # fmt: skip


def _sweep_called(name: str, there: set[str]) -> str:
    near = sorted(sweep for sweep in there if sweep.startswith(name))
    if name in there or len(near) == 1:
        return name if name in there else near[0]
    if near:
        raise RequestError(f"{name!r} could be {', '.join(near)}: write more of it")
    raise RequestError(
        f"no sweep is called {name!r}" + (f"; there are {', '.join(sorted(there))}" if there else ": there are none")
    )


def for_people(row: Row, width: int) -> dict[str, str]:
    """What a table has room for, by column; in full where there is more than a terminal's width."""
    wide, name = width >= NARROW, row.run or row.job or ""
    moment = datetime.strptime(row.time, "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC)
    return {
        "id": name if wide else short(name), "sweep": row.sweep, "cell": row.cell, "state": row.state,
        "progress": _progress(row, wide=wide), "FVE": "" if row.fve is None else f"{row.fve:.3f} K={row.k}",
        "when": row.time if wide else ago_text((datetime.now(UTC) - moment).total_seconds()),
    }  # fmt: skip


def _progress(row: Row, *, wide: bool) -> str:
    if row.total and row.done is not None:
        return f"{row.reason} {row.done:,}/{row.total:,}" if wide else f"{row.reason} {row.done / row.total:.0%}"
    if row.state == "finished":
        return f"{row.num_draws_sampled:,} new draws" if row.num_draws_sampled and wide else ""
    if wide:
        return row.reason
    if row.state in ("failed", "stopped"):
        return row.reason.partition(": ")[0]
    return row.reason.removeprefix("pending: ").partition(" (")[0]


def as_object(row: Row) -> dict[str, Any]:
    """For programs: every field."""
    return asdict(row)
