"""`ksweep watch`: jobs until they have ended, as a table that fits the terminal, as lines in a pipe, or as JSON."""

from __future__ import annotations

import json
import os
import select
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ksweep.cli.jobs.find import JobFacts, find_jobs, readable_job_facts, short_id
from ksweep.cli.jobs.rows import RECENT_SECONDS, JobRow, current_cell, format_reason, job_rows, open_jobs
from ksweep.launch import status
from ksweep.launch.job import Job, logs_directory
from ksweep.utils.console import WIDE_COLUMNS, duration_text, say, say_exactly
from ksweep.utils.errors import RequestError
from ksweep.utils.text import visible

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

REFRESH_SECONDS = 2.0
PRINT_SECONDS = 15.0
"""Away from a terminal a job is printed when its state changes, and its progress at most this often."""
STATE_PRIORITY = ("running", "unknown", "failed", "stopped", "waiting", "finished")
"""Which jobs are shown first when there is no room for all."""
OTHER_LINES = 4
"""Lines of the screen that are not jobs: counts, column names, what is left out, and the cursor."""


def poll_job_rows(registry: Path, name: str | None, *, once: bool = False) -> Iterator[list[JobRow]]:
    """Yield the state of jobs every REFRESH_SECONDS until none is live.

    With a name: that job, or the newest job of each cell of that sweep. Without: all live jobs, and those that ended within the
    last hour.
    """
    first = True
    while True:
        try:
            rows = _rows_of(registry, name) if name else _recent_rows(registry)
        except RequestError:  # somebody removed the directories while they were watched
            if first:
                raise
            return
        yield rows
        if once or not any(row.state in status.LIVE_STATES for row in rows):
            return
        first = False
        time.sleep(REFRESH_SECONDS)


def _rows_of(registry: Path, name: str) -> list[JobRow]:
    newest = newest_by_cell(readable_job_facts(find_jobs(registry, name)))
    return job_rows(list(newest), {job.id: labels for job, labels in newest.items()})


def newest_by_cell(facts_by_job: dict[Job, JobFacts]) -> dict[Job, list[str]]:
    """Map each job (oldest first) to the labels of its cells that no newer job has; leave out jobs without any."""
    seen: set[str] = set()
    newest: dict[Job, list[str]] = {}
    for job, facts in reversed(facts_by_job.items()):
        cells = [(key, label) for key, label in facts.cells if key not in seen]
        seen |= {key for key, _ in cells}
        if cells:
            newest[job] = [label for _, label in cells]
    return dict(reversed(newest.items()))


def _recent_rows(registry: Path) -> list[JobRow]:
    since = time.time() - RECENT_SECONDS
    rows = job_rows(open_jobs(logs_directory(registry), within=RECENT_SECONDS))
    return [row for row in rows if row.state in status.LIVE_STATES or row.last_sign >= since]


# On a terminal


def show_updates(updates: Iterator[list[JobRow]], console: Console) -> list[JobRow]:
    """Show updates as a table that changes on a terminal, or as lines in a pipe. Return the last update."""
    if not console.is_terminal or console.is_dumb_terminal:
        return print_changes(updates)
    from rich.live import Live

    last: list[JobRow] = []
    with Live(console=console, auto_refresh=False) as live:
        for last in filter(None, updates):
            live.update(render_screen(last, console.width, console.height), refresh=True)
    return last


def render_screen(rows: Sequence[JobRow], width: int, height: int) -> RenderableType:
    """Return counts, then one line per job: all of them if they fit, else those of highest priority."""
    from rich.console import Group
    from rich.text import Text

    shown = prioritize(rows, max(1, height - OTHER_LINES))
    left_out = [row for row in rows if row not in shown]
    lines: list[RenderableType] = [Text(visible(_headline(rows)), no_wrap=True, overflow="ellipsis"), jobs_table(shown, width)]
    if left_out:
        lines.append(Text(f"and {state_counts(left_out)}", no_wrap=True, overflow="ellipsis"))
    return Group(*lines)


def prioritize(rows: Sequence[JobRow], room: int) -> list[JobRow]:
    """Return at most `room` rows by STATE_PRIORITY; up to a third of them failed or stopped, however many jobs run."""
    rank = {state: i for i, state in enumerate(STATE_PRIORITY)}
    ordered = sorted(rows, key=lambda row: rank.get(row.state, len(STATE_PRIORITY)))
    if len(ordered) <= room:
        return ordered
    bad = [row for row in ordered if row.state in ("failed", "stopped")][: room // 3]
    rest = [row for row in ordered if row not in bad][: room - len(bad)]
    return sorted([*rest, *bad], key=lambda row: rank.get(row.state, len(STATE_PRIORITY)))


def state_counts(rows: Sequence[JobRow]) -> str:
    """Return text such as "3 running, 1 failed", in the order of STATE_PRIORITY."""
    number = Counter(row.state for row in rows)
    return ", ".join(f"{number[state]} {state}" for state in STATE_PRIORITY if number[state])


def _headline(rows: Sequence[JobRow]) -> str:
    sweeps = sorted({row.sweep for row in rows})
    what = sweeps[0] if len(sweeps) == 1 else f"{len(sweeps)} sweeps"
    jobs = f"{len(rows)} job{'s' * (len(rows) != 1)}"
    return f"{what}, {jobs}: {state_counts(rows)}; {time.strftime('%H:%M:%S')}"


def jobs_table(rows: Sequence[JobRow], width: int) -> RenderableType:
    """Return a table with one line per job, cut to the width. Narrow terminals do without Slurm ids and nodes."""
    from rich.table import Table
    from rich.text import Text

    wide, several_sweeps = width >= WIDE_COLUMNS, len({row.sweep for row in rows}) > 1
    lines = []
    for row in rows:
        cell = f"{row.sweep} {_format_cell(row)}" if several_sweeps else _format_cell(row)
        more = (row.slurm or "", row.nodes) if wide else ()
        texts = (short_id(row.job), *more, cell, row.state, format_progress(row, wide=wide))
        lines.append([visible(text) for text in texts])
    names = ("job", *(("Slurm", "nodes") if wide else ()), "cell", "state", "progress")
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name, column_width in zip(names, _column_widths(names, lines, width), strict=True):
        table.add_column(name, no_wrap=True, overflow="ellipsis", width=column_width)
    for line in lines:
        table.add_row(*(Text(text) for text in line))
    return table


def _column_widths(names: Sequence[str], lines: Sequence[Sequence[str]], width: int) -> list[int]:
    """Return the widths of the longest texts, of cells and nodes at most a third of the screen; the last column has the rest."""
    longest = [max(map(len, column)) for column in zip(names, *lines, strict=True)][:-1]
    widths = [min(n, width // 3) if name in ("cell", "nodes") else n for name, n in zip(names, longest, strict=False)]
    return [*widths, max(10, width - sum(widths) - 2 * len(widths))]


def _format_cell(row: JobRow) -> str:
    """Return the job's current cell and its number among several, or the first cell where there is no current one."""
    label = current_cell(row)[0] or next(iter(row.labels), "")
    if len(row.labels) < 2:
        return label
    number = row.labels.index(label) + 1
    return f"{number}/{len(row.labels)} {label}" if current_cell(row)[0] else f"{label} and {len(row.labels) - 1} more"


def format_progress(row: JobRow, *, wide: bool) -> str:
    """Return what a job does, how far it is and how long it will take; or why it does nothing."""
    if row.state == "finished":
        return f"took {duration_text(max(0.0, row.last_sign - row.submitted))}" if row.submitted else ""
    if row.state != "running":
        return " ".join(format_reason(row.kind, row.reason).split())
    _, phase = current_cell(row)
    if not row.total:
        return phase or row.reason
    words = [f"{phase} {row.done:,}/{row.total:,}" if wide else f"{phase} {row.done / row.total:.0%}"]
    words += [f"{duration_text(row.seconds_left)} left"] if row.seconds_left is not None else []
    if (fve := row.numbers.get("fve")) is not None:
        words.append(f"FVE {fve:.3f}{f' {_running_interval(row)} so far (K=1)' if wide else ''}")
    words += [f"{row.per_second:,.1f}/s"] if row.per_second and wide else []
    return ", ".join(words)


def _running_interval(row: JobRow) -> str:
    # These import NumPy and SciPy, which a list of jobs does without.
    from ksweep.evaluation.running_fve import REPLICATES
    from ksweep.stats.interval_text import interval_text

    return interval_text(row.numbers | {"num_replicates": REPLICATES})


# In a pipe


def print_changes(updates: Iterator[list[JobRow]], *, as_json: bool = False) -> list[JobRow]:
    """Print a job when its state changes, and its progress now and then. Return the last update; stop when nobody reads."""
    printed: dict[str, tuple[str, float]] = {}
    last: list[JobRow] = []
    for last in updates:
        for row in last:
            state, when = printed.get(row.job, ("", 0.0))
            if row.state != state or (row.state == "running" and time.monotonic() - when >= PRINT_SECONDS):
                printed[row.job] = (row.state, time.monotonic())
                if as_json:
                    say_exactly(json.dumps({"time": time.time(), **asdict(row)}))
                else:
                    say(_sentence(row))
        if _stdout_closed():
            break
    return last


def _sentence(row: JobRow) -> str:
    return f"{time.strftime('%H:%M:%S')} {row.job} {row.cells}: {row.state} {format_progress(row, wide=True)}".rstrip()


def _stdout_closed() -> bool:
    """Return whether the reader of the pipe is gone, which a write would show only when there is something to print."""
    with suppress(OSError, ValueError):
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    return False


def discard_stdout() -> None:
    """Send buffered output to /dev/null, so that Python does not complain at exit about a closed pipe."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
