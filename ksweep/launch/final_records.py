"""Make the final records of a job that has ended: a row per rank and start, and a run record if its cell did not finish."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from ksweep.config.spec import cell_from_dict
from ksweep.evaluation.cell_record import identity_fields, request_fields
from ksweep.evaluation.context import keys_by_cell, names_by_cell
from ksweep.evaluation.identity import cell_keys
from ksweep.launch.job import Job, read_or
from ksweep.launch.rank_records import Heartbeat, Outcome
from ksweep.launch.status import JobStatus
from ksweep.launch.survey import cell_of_end
from ksweep.registry.attempts import Attempt
from ksweep.utils.errors import RequestError, StoreError

CLASS_OF_REQUEUE = {"time limit": "timeout", "preempted": "preempted", "asked to stop": "stopped"}
"""Why a start was put back into the queue -> the class of its end."""


def attempt_rows(job: Job, status: JobStatus) -> list[Attempt]:
    """Return a row for each rank of each start. A job that wrote only to its logs has one start."""
    spec = job.spec()
    starts = job.starts() or ([0] if any(path.stat().st_size for path in job.logs()) else [])
    of_job = {
        "job": job.id, "slurm_id": job.slurm_id(), "num_ranks": spec["num_ranks"],
        "sweep": str((spec.get("argument") or {}).get("sweep", "")),
        "cells": tuple(cell["label"] for cell in spec.get("cells", [])),
    }  # fmt: skip
    labels = {cell["key"]: cell["label"] for cell in spec.get("cells", [])}
    rows = []
    for start in starts:
        newest = start == starts[-1]
        of_start = of_job | {"start": start, **_end_of_start(job, start, status, newest=newest)}
        requeue_reason = (job.read_note("requeued", start) or {}).get("why", "")
        heartbeats = {h.rank: h for h in read_or(partial(job.heartbeats, start), [])}
        outcomes = {o.rank: o for o in read_or(partial(job.outcomes, start), [])}
        for rank in range(spec["num_ranks"]):
            heartbeat, outcome = heartbeats.get(rank), outcomes.get(rank)
            of_rank = _heartbeat_fields(heartbeat, labels) | _outcome_fields(outcome, status, requeue_reason, newest=newest)
            of_rank["ended"] = _utc(outcome.time if outcome else heartbeat.time if heartbeat else None)
            lines = read_or(partial(job.last_log_lines, rank, start), None) or None
            rows.append(Attempt(**of_start, **of_rank, rank=rank, last_log_lines=lines))
    return rows


def _end_of_start(job: Job, start: int, status: JobStatus, *, newest: bool) -> dict[str, Any]:
    """Return why a start of a job ended, and why it was put back into the queue, if it was."""
    note = job.read_note("requeued", start) or {}
    if newest:
        return {"requeued": None if "refused" in note else note.get("why"), "why": _reason_with_class(status)}
    # A preempted job may find that Slurm has put it back already, and refuses to do it twice.
    why = note.get("why", "by Slurm: killed, preempted or its node lost before it could say so")
    return {"requeued": why, "why": f"requeued: {why}"}


def _reason_with_class(status: JobStatus) -> str:
    if status.state == "finished" or not status.kind or status.reason.startswith(status.kind):
        return status.reason or status.state
    return f"{status.kind}: {status.reason}"


def _heartbeat_fields(heartbeat: Heartbeat | None, labels: dict[str, str]) -> dict[str, Any]:
    if heartbeat is None:
        return {}
    return {
        "host": heartbeat.host, "device": heartbeat.device or None, "gpu": heartbeat.gpu or None, "phase": heartbeat.phase,
        "done": heartbeat.done, "total": heartbeat.total, "began": _utc(heartbeat.began or None),
        "cell_key": heartbeat.cell or None, "label": labels.get(heartbeat.cell),
    }  # fmt: skip


def _outcome_fields(outcome: Outcome | None, status: JobStatus, requeue_reason: str, *, newest: bool) -> dict[str, Any]:
    """Return how a rank ended, from its outcome; if it wrote none, from the job's status where that explains the end."""
    if outcome is None:
        # Where another rank's own failure ended the job, a rank without an outcome is not to blame.
        explains = (
            newest
            and status.state != "finished"
            and (status.outcome is None or status.outcome.kind in ("dead rank", "node failure"))
        )
        return {"status": "gone"} | ({"error_class": status.kind or None, "message": status.reason} if explains else {})
    kind = outcome.kind if outcome.status == "failed" else ""
    if outcome.status == "stopped":
        kind = CLASS_OF_REQUEUE.get(requeue_reason) or (status.kind if newest and status.state == "stopped" else "")
    return {
        "status": outcome.status, "error_class": kind or None, "error_type": outcome.error_type or None,
        "message": outcome.message or None, "traceback": outcome.traceback or None,
    }  # fmt: skip


def record_unfinished_run(job: Job, status: JobStatus, rows: Sequence[Attempt]) -> None:
    """Write the run record of a job that failed or stopped, with what every rank reported.

    Its run id depends on the job alone, so that two commands that find the job at once write one record.
    """
    spec, newest, cause = job.spec(), job.attempt(), status.outcome
    heartbeats = {h.rank: h for h in read_or(job.heartbeats, [])}
    heartbeat = heartbeats.get(cause.rank if cause else 0) or next(iter(heartbeats.values()), None)
    current = cell_of_end(job, status)
    row = next((r for r in rows if r.start == newest and cause and r.rank == cause.rank), None)
    keys = [cell["key"] for cell in spec["cells"]]
    write_unfinished_run(
        spec, None if current is None else keys.index(current), job.id[-6:],
        status="failed" if status.state == "failed" else "stopped",
        job=job.id, start=newest, error_class=status.kind or status.state,
        error_type=row.error_type if row else None,
        error_message=cause.message if cause and cause.kind == status.kind else status.reason,
        tracebacks=tuple(text for r in rows if r.start == newest and (text := _report_of_rank(r))),
        host=heartbeat.host if heartbeat else None, device=heartbeat.device or None if heartbeat else None,
        num_ranks=spec["num_ranks"], seconds=heartbeat.seconds if heartbeat else {},
        started=_utc(heartbeat.cell_began or heartbeat.began or None if heartbeat else None) or _utc(job.submitted_at()),
        finished=_utc(cause.time if cause else job.last_activity()),
    )  # fmt: skip


def _report_of_rank(row: Attempt) -> str:
    """Return what a rank reported, as text: message, traceback and last log lines."""
    if row.status == "finished" or not (row.traceback or row.last_log_lines or row.message):
        return ""
    end = ", ".join(word for word in (row.status, row.error_class) if word)
    where = f" on {row.host} ({row.gpu or row.device})" if row.host else ""
    lines = [f"rank {row.rank}{where}, {end}: {row.message or ''}", row.traceback]
    lines += [f"last log lines:\n{row.last_log_lines}"] if row.last_log_lines else []
    return "\n".join(line.rstrip() for line in lines if line)


def _utc(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def write_unfinished_run(spec: dict[str, Any], cell: int | None, name: str, **fields: Any) -> None:
    """Write the run record of a cell that did not finish, unless it is there already.

    Args:
        spec: the content of job.json.
        cell: index of the current cell; None for the first that neither finished nor failed since the job was started.
        name: end of the run id.
        fields: further fields of the record: status, class, what every rank reported.
    """
    from ksweep.registry import run_record

    argument = spec["argument"]
    registry = Path(argument["registry"])
    cell = _current_cell(spec, fields["started"]) if cell is None else cell
    if cell is None:
        return
    identity = _identity_of_cell(spec, cell)
    run_id = f"{fields['finished']:%Y%m%dT%H%M%S}-{identity['cell_key'][:8]}-{name}"
    if (registry / "landing" / run_id).exists():
        return
    request = request_fields(argument["sweep"], argument["resources"], argument.get("origin", {}))
    run_record.write_run(registry, run_record.RunRecord(**identity | {"run_id": run_id}, **request, **fields))


def _identity_of_cell(spec: dict[str, Any], index: int) -> dict[str, Any]:
    """Return the fields of a run record that say what was evaluated, from job.json alone where it states the cell's keys.

    Those of a job of an earlier version are computed from the files that the cell names; if these have changed or gone since,
    the record has what such a job states: key and label of the cell.
    """
    argument, stated = spec["argument"], spec["cells"][index]
    cell = cell_from_dict(argument["cells"][index])
    label, title = names_by_cell(argument).get(cell, (stated["label"], stated["label"]))
    keys = keys_by_cell(argument).get(cell)
    if keys is None:
        with suppress(RequestError, StoreError, OSError):
            derived = cell_keys(cell).with_names(label, title)
            keys = derived if derived.cell == stated["key"] else None
    if keys is not None:
        return identity_fields(cell, keys)
    return {"cell": f"{title} @{stated['key'][:8]}", "label": label, "cell_key": stated["key"], "spec": asdict(cell)}


def _current_cell(spec: dict[str, Any], started: datetime) -> int | None:
    """Return the index of the cell that a job was working on, where no heartbeat says so.

    None where an older version of the job has recorded its failure itself.
    """
    from ksweep.registry.query import runs_since

    status_by_key = runs_since(Path(spec["argument"]["registry"]), started)
    keys = [cell["key"] for cell in spec["cells"]]
    if any(status_by_key.get(key) == "failed" for key in keys):
        return None
    return next((n for n, key in enumerate(keys) if key not in status_by_key), len(keys) - 1)
