"""`ksweep why`: how a job is doing or how it ended, and why, from its files and Slurm."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from ksweep.cli.jobs.advice import advice
from ksweep.cli.jobs.rows import JobRow, current_cell, format_reason, job_rows_with_status
from ksweep.launch.job import Job, read_or
from ksweep.utils.console import duration_text
from ksweep.utils.text import some_of


def job_report(job: Job) -> dict[str, Any]:
    """Return all that is known of how a job is doing or how it ended."""
    [(row, job_status)] = job_rows_with_status([job])
    argument = read_or(lambda: dict(job.spec()["argument"]), {})
    return {
        "job": job.id, "sweep": row.sweep, "cells": list(row.labels), "state": job_status.state, "class": job_status.kind,
        "reason": job_status.reason, "next": advice(row, argument), "slurm": row.slurm, "submitted": row.submitted,
        "last_sign": row.last_sign, "at_cell": current_cell(row)[0] or None, "code": read_or(job.code, None),
        "starts": [_start(job, n) for n in range(row.start + 1)],
        "endings": [{k: v for k, v in asdict(e).items() if k != "result"} for e in read_or(job.outcomes, [])],
        "last_log_lines": read_or(job.log_tail, ""), "logs": [str(path) for path in read_or(job.logs, [])],
    }  # fmt: skip


def _start(job: Job, number: int) -> dict[str, Any]:
    ranks = [
        {"rank": b.rank, "node": b.host, "device": b.device, "phase": b.phase, "done": b.done, "total": b.total}
        for b in sorted(read_or(lambda: job.heartbeats(number), []), key=lambda b: b.rank)
    ]
    return {"start": number, "ranks": ranks, "requeued": job.read_note("requeued", number)}


def run_report(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the registry knows of a run whose job directory is gone."""
    error_class = run["error_class"] or run["error_type"]
    kinds = {"failed": error_class or "", "stopped": error_class or "stopped"}
    row = JobRow(
        job=run["run_id"], sweep=run["sweep"], cells=run["label"], state=run["status"], reason=run["error_message"] or "",
        phase="", done=0, total=0, per_second=None, seconds_left=None, slurm=None, nodes=run["host"] or "", start=0, numbers={},
        kind=kinds.get(run["status"], ""),
    )  # fmt: skip
    return {
        "run": run["run_id"], "sweep": run["sweep"], "cells": [run["label"]], "state": run["status"], "class": row.kind,
        "reason": row.reason, "next": advice(row, {}), "node": run["host"], "device": run["device"],
        "finished": run["finished"].isoformat(), "tracebacks": list(run["tracebacks"] or []),
    }  # fmt: skip


def format_run_report(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a run's report."""
    yield f"run {report['run']} of {report['sweep']} ({', '.join(report['cells'])}): {report['state']}"
    if reason := format_reason(report["class"], report["reason"]):
        yield f"  {reason}"
    yield "  the job directory is gone: this is what the registry keeps"
    if report["node"]:
        device = f" ({report['device']})" if report["device"] else ""
        yield f"  on {report['node']}{device}, ended {report['finished']} UTC"
    yield from report["tracebacks"]
    if report["next"]:
        yield f"next: {report['next']}"


def format_job_report(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a job's report: the answer first, and what to do next in the last line, just above the prompt."""
    slurm = f", Slurm {report['slurm']}" if report["slurm"] else ""
    yield f"job {report['job']} of {report['sweep']} ({', '.join(report['cells'])}{slurm}): {report['state']}"
    yield f"  {format_reason(report['class'], report['reason'])}"
    if report["submitted"]:
        ago = duration_text(max(0.0, time.time() - report["last_sign"]))
        yield f"  submitted {_local_time(report['submitted'])}, last sign of life {_local_time(report['last_sign'])} ({ago} ago)"
    if report["code"]:
        yield f"  code: {_code_text(report['code'])}"
    for start in report["starts"]:
        yield from _format_start(start)
    for ending in report["endings"]:
        yield from _format_ending(ending)
    if log := _log_without_tracebacks(report):
        yield f"last log lines:\n{log}"
    if report["next"]:
        yield f"next: {report['next']}"


def _code_text(code: Mapping[str, Any]) -> str:
    """Return the commit, the file of the difference, and new files that the job could import."""
    parts = [code["commit"][:12], *([code["diff"]] if code["diff"] else [])]
    if new := code.get("new"):
        parts.append(f"new {some_of(new)}")
    left_out = code.get("left_out")
    return " + ".join(parts) + (f" ({left_out} other new files were left out)" if left_out else "")


def _format_start(start: Mapping[str, Any]) -> Iterator[str]:
    for rank in start["ranks"]:
        count = f" {rank['done']}/{rank['total']}" if rank["total"] else ""
        device = f" ({rank['device']})" if rank["device"] else ""
        yield f"  start {start['start']}, rank {rank['rank']} on {rank['node']}{device}: {rank['phase']}{count}"
    if start["requeued"]:
        refused = f" (Slurm refused: {start['requeued']['refused']})" if start["requeued"].get("refused") else ""
        yield f"  start {start['start']} was requeued: {start['requeued'].get('why', 'unknown')}{refused}"


def _format_ending(ending: Mapping[str, Any]) -> Iterator[str]:
    message = f": {ending['message']}" if ending["message"] and ending["message"] not in ending["traceback"] else ""
    yield f"rank {ending['rank']} {ending['status']}{message}"
    if ending["traceback"]:
        yield ending["traceback"].rstrip()


def _log_without_tracebacks(report: Mapping[str, Any]) -> str:
    """Return the log lines that are not in a traceback shown above: a rank that fails writes its traceback to both."""
    shown = {line.strip() for ending in report["endings"] for line in ending["traceback"].splitlines()}
    return "\n".join(line for line in report["last_log_lines"].splitlines() if line.strip() and line.strip() not in shown)


def _local_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
