"""Jobs for people: found by a short name, watched, read, explained, cancelled. All from files; nothing needs their launcher."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ksweep.errors import RequestError, RunError
from ksweep.launch import slurm, states
from ksweep.launch.answers import numbers_here
from ksweep.launch.job import Heartbeat, Job, all_jobs, is_alive
from ksweep.registry.questions import cell_of_run

REFRESH_SECONDS = 2.0
LINE_SECONDS = 15.0
"""Away from a terminal a job's line is printed when its state changes, and its progress at most this often."""
NARROW = 110


def logs_of(registry: Path) -> Path:
    """Where the jobs of a registry say how they go."""
    return Path(os.path.abspath(registry)).parent / "logs"


def sweep_of(job: Job) -> str:
    """The sweep that a job belongs to."""
    return str(job.spec()["argument"].get("sweep", ""))


def find(registry: Path, name: str) -> list[Job]:
    """One job, by a unique prefix of its id, by Slurm's number, or by (a unique prefix of) a run of its; or the jobs of a sweep.

    Raises:
        RequestError: nothing is called that, or several things are.
    """
    jobs = all_jobs(logs_of(registry))
    sweeps = {sweep_of(job) for job in jobs}
    if name in sweeps:
        return [job for job in jobs if sweep_of(job) == name]
    found = [job for job in jobs if job.id == name or job.slurm_id() == name] or [job for job in jobs if job.id.startswith(name)]
    if not found and (key := cell_of_run(registry, name)) is not None:
        found = [job for job in jobs if any(cell["key"] == key for cell in job.spec()["cells"])][-1:]
    near = [s for s in sorted(sweeps) if s.startswith(name)]
    if not found and len(near) == 1:
        return [job for job in jobs if sweep_of(job) == near[0]]
    if len(found) == 1:
        return found
    if found or near:
        raise RequestError(f"{name!r} could be {', '.join([*(job.id for job in found), *near])}: write more of it")
    known = ", ".join([*sorted(sweeps), *(job.id for job in jobs[-5:])])
    raise RequestError(
        f"no job, run or sweep is called {name!r}" + (f"; there are {known}" if known else ": there are no jobs yet")
    )


@dataclass(frozen=True)
class Line:
    """One job as people see it."""

    job: str
    sweep: str
    cells: str
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


def lines(jobs: Sequence[Job]) -> list[Line]:
    """Jobs as they stand."""
    found = states.verdicts(jobs)
    return [_line(job, found[job.id]) for job in jobs]


def _line(job: Job, verdict: states.Verdict) -> Line:
    beats = sorted(job.heartbeats(), key=lambda b: b.rank)
    done, total, rate = progress(beats)
    spec = job.spec()
    left = (total - done) / rate if rate and total and verdict.state == "running" else None
    return Line(
        job=job.id, sweep=sweep_of(job), cells=", ".join(cell["label"] for cell in spec.get("cells", [])), state=verdict.state,
        reason=verdict.reason, phase=beats[0].phase if beats else "", done=done, total=total, per_second=rate or None,
        seconds_left=left, slurm=job.slurm_id(), nodes=",".join(sorted({b.host for b in beats})), start=job.attempt(),
        numbers=beats[0].numbers if beats else {},
    )  # fmt: skip


def progress(beats: Sequence[Heartbeat]) -> tuple[int, int, float]:
    """Units done and to do in the phase of the first rank, over the ranks that share it, and units per second."""
    same = [b for b in beats if b.phase == beats[0].phase]
    if not same or not same[0].total:
        return 0, 0, 0.0
    if same[0].phase == "activations":  # every rank tells what is in the store, whoever put it there
        return max(b.done for b in same), same[0].total, max(b.rate for b in same)
    return min(sum(b.done for b in same), same[0].total), same[0].total, sum(b.rate for b in same)


def watch(registry: Path, name: str | None, *, once: bool = False) -> Iterator[list[Line]]:
    """The jobs of a sweep (or all that are under way) again and again, until none is."""
    while True:
        jobs = find(registry, name) if name else [j for j in all_jobs(logs_of(registry)) if j.noted("settled") is None]
        now = lines(jobs)
        yield now
        if once or not any(line.state in states.LIVE for line in now):
            return
        time.sleep(REFRESH_SECONDS)


def show(updates: Iterator[list[Line]], console: Console) -> list[Line]:
    """Watch on a terminal (a table that changes) or in a pipe (a line when something changes); the last state."""
    last: list[Line] = []
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            for last in updates:
                live.update(table(last, console.width), refresh=True)
        return last
    said: dict[str, tuple[str, float]] = {}
    for last in updates:
        for line in last:
            state, moment = said.get(line.job, ("", 0.0))
            if line.state != state or (line.state == "running" and time.monotonic() - moment >= LINE_SECONDS):
                said[line.job] = (line.state, time.monotonic())
                print(f"{time.strftime('%H:%M:%S')} {line.job} {line.cells}: {line.state} {_how_far(line)}".rstrip(), flush=True)
    return last


def table(found: Sequence[Line], width: int) -> Table:
    """A row a job; on a narrow terminal without what can be had from `ksweep why`."""
    wide = width >= NARROW
    out = Table()
    for column in ("job", "cells", "state", "progress", *(("Slurm", "nodes", "why") if wide else ())):
        out.add_column(column, overflow="fold")
    for line in found:
        more = (line.slurm or "", line.nodes, line.reason) if wide else ()
        out.add_row(*(Text(text) for text in (line.job, line.cells, line.state, _how_far(line), *more)))
    return out


def _how_far(line: Line) -> str:
    if line.state != "running" or not line.total:
        return line.reason if line.state != "running" else line.phase
    words = [f"{line.phase} {line.done:,}/{line.total:,}"]
    words += [f"{line.per_second:,.1f}/s"] if line.per_second else []
    words += [f"{_duration(line.seconds_left)} left"] if line.seconds_left is not None else []
    if (fve := line.numbers.get("fve")) is not None:
        words.append(f"FVE {fve:.3f} [{line.numbers['fve_low']:.3f}, {line.numbers['fve_high']:.3f}] so far")
    return ", ".join(words)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def why(job: Job) -> dict[str, Any]:
    """All that is known of how a job goes or ended."""
    verdict, spec = states.verdict(job), job.spec()
    starts = [
        {
            "start": n,
            "ranks": [
                {"rank": b.rank, "node": b.host, "device": b.device, "phase": b.phase, "done": b.done, "total": b.total}
                for b in job.heartbeats(n)
            ],
            "requeued": job.noted("requeued", n),
        }
        for n in range(job.attempt() + 1)
    ]
    return {
        "job": job.id, "sweep": sweep_of(job), "cells": [cell["label"] for cell in spec.get("cells", [])], "state": verdict.state,
        "class": verdict.kind, "reason": verdict.reason, "slurm": job.slurm_id(), "code": job.noted("code"), "starts": starts,
        "endings": [{k: v for k, v in asdict(e).items() if k != "result"} for e in job.endings()],
        "last_log_lines": job.log_tail(), "logs": [str(path) for path in job.logs()],
    }  # fmt: skip


def explain(told: dict[str, Any]) -> Iterator[str]:
    """The same as lines of text."""
    yield f"job {told['job']} of {told['sweep']} ({', '.join(told['cells'])}): {told['state']}"
    yield f"  {told['class'] + ': ' if told['class'] and not told['reason'].startswith(told['class']) else ''}{told['reason']}"
    if told["code"]:
        yield f"  code: {told['code']['commit'][:12]}{' + ' + told['code']['diff'] if told['code']['diff'] else ''}"
    for start in told["starts"]:
        for rank in start["ranks"]:
            counted = f" {rank['done']}/{rank['total']}" if rank["total"] else ""
            yield f"  start {start['start']}, rank {rank['rank']} on {rank['node']} ({rank['device']}): {rank['phase']}{counted}"
        if start["requeued"]:
            yield f"  start {start['start']} was requeued: {start['requeued']['why']}"
    for end in told["endings"]:
        yield f"rank {end['rank']} {end['status']}{': ' + end['message'] if end['message'] else ''}"
        if end["traceback"]:
            yield end["traceback"].rstrip()
    if told["last_log_lines"]:
        yield f"last log lines:\n{told['last_log_lines']}"
    if told["state"] in ("failed", "stopped"):
        yield f"to run it again: ksweep retry {told['sweep']}"


def read_logs(job: Job, rank: int | None, *, follow: bool) -> Iterator[str]:
    """What the ranks of a job wrote; with `follow` also what they go on to write, until the job has ended."""
    at: dict[Path, int] = {}
    while True:
        over = not follow or states.verdict(job).state not in states.LIVE
        for path in [p for p in job.logs() if rank is None or p.stem.endswith(f"_{rank}_log")]:
            with path.open(errors="replace") as file:
                file.seek(at.get(path, 0))
                if text := file.read():
                    yield text
                at[path] = file.tell()
        if over:
            return
        time.sleep(REFRESH_SECONDS / 2)


def cancel(jobs: Sequence[Job]) -> list[Job]:
    """End jobs at the border of their units; those that were under way."""
    found = states.verdicts(jobs)
    live = [job for job in jobs if found[job.id].state in states.LIVE]
    for job in live:
        job.ask_to_end()
        for beat in job.heartbeats():
            if job.slurm_id() is None and beat.host == socket.gethostname() and is_alive(beat):
                with suppress(ProcessLookupError):
                    os.kill(beat.pid, signal.SIGTERM)
    slurm.cancel(numbers_here(live))
    return live


def retry(jobs: Sequence[Job]) -> int:
    """Run a sweep's own command again, with --retry; its exit code.

    Raises:
        RunError: the command cannot be had any more.
    """
    origin = jobs[-1].spec()["argument"].get("origin", {})
    argv, directory = list(origin.get("argv", [])), origin.get("directory")
    if not argv or directory is None or not (Path(directory) / argv[0]).is_file():
        raise RunError(f"the script of this sweep ({' '.join(argv) or 'unknown'}) is not there any more: run yours with --retry")
    command = [sys.executable, *argv, *(["--retry"] if "--retry" not in argv else [])]
    print(f"{directory}: {' '.join(command)}", file=sys.stderr, flush=True)
    return subprocess.run(command, cwd=directory, check=False).returncode
