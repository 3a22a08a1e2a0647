"""How a job goes or ended, and why: all that its files and Slurm say."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from ksweep.cli.jobs.advice import advice
from ksweep.cli.jobs.rows import Line, at_work, classed, seen
from ksweep.launch.job import Job, read_or
from ksweep.utils.console import duration_text


def why(job: Job) -> dict[str, Any]:
    """All that is known of how a job goes or ended."""
    [(line, verdict)] = seen([job])
    argument = read_or(lambda: dict(job.spec()["argument"]), {})
    return {
        "job": job.id, "sweep": line.sweep, "cells": list(line.labels), "state": verdict.state, "class": verdict.kind,
        "reason": verdict.reason, "next": advice(line, argument), "slurm": line.slurm, "submitted": line.submitted,
        "last_sign": line.last_sign, "at_cell": at_work(line)[0] or None, "code": job.read_note("code"),
        "starts": [_start(job, n) for n in range(line.start + 1)],
        "endings": [{k: v for k, v in asdict(e).items() if k != "result"} for e in read_or(job.outcomes, [])],
        "last_log_lines": read_or(job.log_tail, ""), "logs": [str(path) for path in read_or(job.logs, [])],
    }  # fmt: skip


def _start(job: Job, number: int) -> dict[str, Any]:
    ranks = [
        {"rank": b.rank, "node": b.host, "device": b.device, "phase": b.phase, "done": b.done, "total": b.total}
        for b in sorted(read_or(lambda: job.heartbeats(number), []), key=lambda b: b.rank)
    ]
    return {"start": number, "ranks": ranks, "requeued": job.read_note("requeued", number)}


def why_run(run: Mapping[str, Any]) -> dict[str, Any]:
    """What the registry knows of a run whose job is not there any more."""
    kind = run["error_class"] or run["error_type"]
    names = {"failed": kind or "", "stopped": kind or "stopped"}
    line = Line(
        job=run["run_id"], sweep=run["sweep"], cells=run["label"], state=run["status"], reason=run["error_message"] or "",
        phase="", done=0, total=0, per_second=None, seconds_left=None, slurm=None, nodes=run["host"] or "", start=0, numbers={},
        kind=names.get(run["status"], ""),
    )  # fmt: skip
    return {
        "run": run["run_id"], "sweep": run["sweep"], "cells": [run["label"]], "state": run["status"], "class": line.kind,
        "reason": line.reason, "next": advice(line, {}), "node": run["host"], "device": run["device"],
        "finished": run["finished"].isoformat(), "tracebacks": list(run["tracebacks"] or []),
    }  # fmt: skip


def explain_run(told: Mapping[str, Any]) -> Iterator[str]:
    """The same as lines of text."""
    yield f"run {told['run']} of {told['sweep']} ({', '.join(told['cells'])}): {told['state']}"
    yield f"  {classed(told['class'], told['reason'])} (its job directory is not there any more; this is what the registry keeps)"
    if told["node"]:
        yield f"  on {told['node']}" + (f" ({told['device']})" if told["device"] else "") + f", ended {told['finished']} UTC"
    yield from told["tracebacks"]
    if told["next"]:
        yield f"next: {told['next']}"


def explain(told: Mapping[str, Any]) -> Iterator[str]:
    """What is known of a job as lines of text: the answer first, the next step last, where the eye is."""
    slurm = f", Slurm {told['slurm']}" if told["slurm"] else ""
    yield f"job {told['job']} of {told['sweep']} ({', '.join(told['cells'])}{slurm}): {told['state']}"
    yield f"  {classed(told['class'], told['reason'])}"
    if told["submitted"]:
        heard = duration_text(max(0.0, time.time() - told["last_sign"]))
        yield f"  submitted {_moment(told['submitted'])}, last heard of {_moment(told['last_sign'])} ({heard} ago)"
    if told["code"]:
        yield f"  code: {told['code']['commit'][:12]}{' + ' + told['code']['diff'] if told['code']['diff'] else ''}"
    for start in told["starts"]:
        yield from _start_in_words(start)
    for end in told["endings"]:
        yield from _ending_in_words(end)
    if log := _beyond_tracebacks(told):
        yield f"last log lines:\n{log}"
    if told["next"]:
        yield f"next: {told['next']}"


def _start_in_words(start: Mapping[str, Any]) -> Iterator[str]:
    for rank in start["ranks"]:
        counted = f" {rank['done']}/{rank['total']}" if rank["total"] else ""
        device = f" ({rank['device']})" if rank["device"] else ""
        yield f"  start {start['start']}, rank {rank['rank']} on {rank['node']}{device}: {rank['phase']}{counted}"
    if start["requeued"]:
        refused = f" (Slurm refused: {start['requeued']['refused']})" if start["requeued"].get("refused") else ""
        yield f"  start {start['start']} was requeued: {start['requeued'].get('why', 'unknown')}{refused}"


def _ending_in_words(end: Mapping[str, Any]) -> Iterator[str]:
    said = f": {end['message']}" if end["message"] and end["message"] not in end["traceback"] else ""
    yield f"rank {end['rank']} {end['status']}{said}"
    if end["traceback"]:
        yield end["traceback"].rstrip()


def _beyond_tracebacks(told: Mapping[str, Any]) -> str:
    """What the log says that the tracebacks do not: a rank that fails writes its traceback there too."""
    shown = {line.strip() for end in told["endings"] for line in end["traceback"].splitlines()}
    return "\n".join(line for line in told["last_log_lines"].splitlines() if line.strip() and line.strip() not in shown)


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
