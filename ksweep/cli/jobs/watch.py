"""Jobs watched until they have ended: a table that fits the terminal, lines in a pipe, an object a line for programs."""

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

from ksweep.cli.jobs.find import Facts, facts_of_all, find, logs_of, short
from ksweep.cli.jobs.rows import RECENT_SECONDS, Line, at_work, classed, lines, unsettled
from ksweep.launch import status
from ksweep.launch.job import Job
from ksweep.stats.interval_text import interval_text
from ksweep.utils.console import duration_text
from ksweep.utils.errors import RequestError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

REFRESH_SECONDS = 2.0
LINE_SECONDS = 15.0
"""Away from a terminal a job's line is printed when its state changes, and its progress at most this often."""
NARROW = 110
ORDER = ("running", "unknown", "failed", "stopped", "waiting", "finished")
"""What is looked for first when not all has room."""
ROWS_AROUND = 4
"""Lines of the screen that are not jobs: counts, names of the columns, what is left out, and the cursor."""


def watch(registry: Path, name: str | None, *, once: bool = False) -> Iterator[list[Line]]:
    """How jobs stand, again and again, until none is under way: the newest job of each cell of a sweep, one job, or all.

    Without a name those that are under way, and those that ended within the last hour.
    """
    first = True
    while True:
        try:
            now = _named(registry, name) if name else _recent(registry)
        except RequestError:  # somebody removed the directories that were watched
            if first:
                raise
            return
        yield now
        if once or not any(line.state in status.LIVE_STATES for line in now):
            return
        first = False
        time.sleep(REFRESH_SECONDS)


def _named(registry: Path, name: str) -> list[Line]:
    newest = newest_by_cell(facts_of_all(find(registry, name)))
    return lines(list(newest), {job.id: labels for job, labels in newest.items()})


def newest_by_cell(facts: dict[Job, Facts]) -> dict[Job, list[str]]:
    """Jobs (oldest first) with those of their cells that no newer job has; the others are left out."""
    taken: set[str] = set()
    kept: dict[Job, list[str]] = {}
    for job, told in reversed(facts.items()):
        mine = [(key, label) for key, label in told.cells if key not in taken]
        taken |= {key for key, _ in mine}
        if mine:
            kept[job] = [label for _, label in mine]
    return dict(reversed(kept.items()))


def _recent(registry: Path) -> list[Line]:
    since = time.time() - RECENT_SECONDS
    found = lines(unsettled(logs_of(registry), within=RECENT_SECONDS))
    return [line for line in found if line.state in status.LIVE_STATES or line.last_sign >= since]


def show(updates: Iterator[list[Line]], console: Console) -> list[Line]:
    """Watch on a terminal (a table that changes) or in a pipe (a line when something changes); the last state."""
    if not console.is_terminal or console.is_dumb_terminal:
        return say_changes(updates)
    from rich.live import Live

    last: list[Line] = []
    with Live(console=console, auto_refresh=False) as live:
        for last in filter(None, updates):
            live.update(screen(last, console.width, console.height), refresh=True)
    return last


def say_changes(updates: Iterator[list[Line]], *, as_json: bool = False) -> list[Line]:
    """A line when a job's state changes or it has gone on for a while; the last state. Ends when nobody reads any more."""
    said: dict[str, tuple[str, float]] = {}
    last: list[Line] = []
    for last in updates:
        for line in last:
            state, moment = said.get(line.job, ("", 0.0))
            if line.state != state or (line.state == "running" and time.monotonic() - moment >= LINE_SECONDS):
                said[line.job] = (line.state, time.monotonic())
                print(as_object(line) if as_json else _sentence(line), flush=True)
        if _nobody_reads():
            break
    return last


def as_object(line: Line) -> str:
    """A job as a JSON object, with the moment."""
    return json.dumps({"time": time.time(), **asdict(line)})


def _sentence(line: Line) -> str:
    return f"{time.strftime('%H:%M:%S')} {line.job} {line.cells}: {line.state} {how_far(line, wide=True)}".rstrip()


def _nobody_reads() -> bool:
    """Whether the other end of the pipe is closed; a write would tell only when there is something to say."""
    with suppress(OSError, ValueError):
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    return False


def leave_quietly() -> None:
    """After the reader has gone: what is still to be flushed goes nowhere, without a complaint at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def screen(found: Sequence[Line], width: int, height: int) -> RenderableType:
    """Counts, then a row a job: all of them where they have room, else what runs and what failed first."""
    from rich.console import Group
    from rich.text import Text

    shown = most_wanted(found, max(1, height - ROWS_AROUND))
    left_out = [line for line in found if line not in shown]
    rows: list[RenderableType] = [Text(_counted(found), no_wrap=True, overflow="ellipsis"), table(shown, width)]
    if left_out:
        rows.append(Text(f"and {counts(left_out)}", no_wrap=True, overflow="ellipsis"))
    return Group(*rows)


def most_wanted(found: Sequence[Line], room: int) -> list[Line]:
    """At most so many, in ORDER; of what failed or stopped at least a third of the room, however many run."""
    rank = {state: place for place, state in enumerate(ORDER)}
    ordered = sorted(found, key=lambda line: rank.get(line.state, len(ORDER)))
    if len(ordered) <= room:
        return ordered
    bad = [line for line in ordered if line.state in ("failed", "stopped")][: room // 3]
    rest = [line for line in ordered if line not in bad][: room - len(bad)]
    return sorted([*rest, *bad], key=lambda line: rank.get(line.state, len(ORDER)))


def counts(found: Sequence[Line]) -> str:
    """ "3 running, 1 failed": in ORDER."""
    number = Counter(line.state for line in found)
    return ", ".join(f"{number[state]} {state}" for state in ORDER if number[state])


def _counted(found: Sequence[Line]) -> str:
    sweeps = sorted({line.sweep for line in found})
    what = sweeps[0] if len(sweeps) == 1 else f"{len(sweeps)} sweeps"
    jobs = f"{len(found)} job{'s' * (len(found) != 1)}"
    return f"{what}, {jobs}: {counts(found)}; {time.strftime('%H:%M:%S')}"


def table(found: Sequence[Line], width: int) -> RenderableType:
    """A line a job, cut to the width; on a narrow terminal without what can be had from `ksweep why`."""
    from rich.table import Table
    from rich.text import Text

    wide, several = width >= NARROW, len({line.sweep for line in found}) > 1
    rows = []
    for line in found:
        cell = f"{line.sweep} {_cell(line)}" if several else _cell(line)
        more = (line.slurm or "", line.nodes) if wide else ()
        rows.append((short(line.job), *more, cell, line.state, how_far(line, wide=wide)))
    names = ("job", *(("Slurm", "nodes") if wide else ()), "cell", "state", "progress")
    out = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name, room in zip(names, _widths(names, rows, width), strict=True):
        out.add_column(name, no_wrap=True, overflow="ellipsis", width=room)
    for row in rows:
        out.add_row(*(Text(text) for text in row))
    return out


def _widths(names: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """As wide as what stands in it, cells and nodes at most a third of the screen; the last column has what is left."""
    widest = [max(map(len, column)) for column in zip(names, *rows, strict=True)][:-1]
    fitting = [min(room, width // 3) if name in ("cell", "nodes") else room for name, room in zip(names, widest, strict=False)]
    return [*fitting, max(10, width - sum(fitting) - 2 * len(fitting))]


def _cell(line: Line) -> str:
    """The cell that a job is at; of the cells of a job that is at none the first."""
    label = at_work(line)[0] or next(iter(line.labels), "")
    if len(line.labels) < 2:
        return label
    place = line.labels.index(label) + 1
    return f"{place}/{len(line.labels)} {label}" if at_work(line)[0] else f"{label} and {len(line.labels) - 1} more"


def how_far(line: Line, *, wide: bool) -> str:
    """What a job is doing and for how long, or why it is not."""
    if line.state == "finished":
        return f"took {duration_text(max(0.0, line.last_sign - line.submitted))}" if line.submitted else ""
    if line.state != "running":
        return " ".join(classed(line.kind, line.reason).split())
    _, phase = at_work(line)
    if not line.total:
        return phase or line.reason
    words = [f"{phase} {line.done:,}/{line.total:,}" if wide else f"{phase} {line.done / line.total:.0%}"]
    words += [f"{duration_text(line.seconds_left)} left"] if line.seconds_left is not None else []
    if (fve := line.numbers.get("fve")) is not None:
        from ksweep.evaluation.running_fve import REPLICATES  # with NumPy and SciPy, which a list of jobs does without

        between = f" {interval_text(line.numbers | {'num_replicates': REPLICATES})} so far (K=1)"
        words.append(f"FVE {fve:.3f}{between if wide else ''}")
    words += [f"{line.per_second:,.1f}/s"] if line.per_second and wide else []
    return ", ".join(words)
