"""What is recorded of a job that has ended: a row for each rank of each start, and a run record where a cell did not finish."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from ksweep.config.spec import cell_from_dict
from ksweep.evaluation.cell_record import identity_fields, request_fields
from ksweep.evaluation.context import names_by_cell
from ksweep.evaluation.identity import cell_keys
from ksweep.launch import status
from ksweep.launch.job import Job, read_or
from ksweep.launch.rank_records import Heartbeat, Outcome
from ksweep.registry.attempts import Attempt

CLASS_OF_REQUEUE = {"time limit": "timeout", "preempted": "preempted", "asked to stop": "stopped"}
"""Why a start was put back into the queue -> class of its end."""


def attempt_rows(job: Job, verdict: status.JobStatus) -> list[Attempt]:
    """An entry for each rank of each start; of a job that wrote to its logs only, for the start that said nothing else."""
    spec = job.spec()
    starts = job.starts() or ([0] if any(path.stat().st_size for path in job.logs()) else [])
    common = {
        "job": job.id, "slurm_id": job.slurm_id(), "num_ranks": spec["num_ranks"],
        "sweep": str((spec.get("argument") or {}).get("sweep", "")),
        "cells": tuple(cell["label"] for cell in spec.get("cells", [])),
    }  # fmt: skip
    labels = {cell["key"]: cell["label"] for cell in spec.get("cells", [])}
    found = []
    for start in starts:
        newest = start == starts[-1]
        of_start = common | {"start": start, **_end_of_start(job, start, verdict, newest=newest)}
        wish = (job.read_note("requeued", start) or {}).get("why", "")
        beats = {beat.rank: beat for beat in read_or(partial(job.heartbeats, start), [])}
        endings = {ending.rank: ending for ending in read_or(partial(job.outcomes, start), [])}
        for rank in range(spec["num_ranks"]):
            beat, ending = beats.get(rank), endings.get(rank)
            told = _of_beat(beat, labels) | _of_ending(ending, verdict, wish, newest=newest)
            told["ended"] = _utc(ending.time if ending else beat.time if beat else None)
            lines = read_or(partial(job.last_log_lines, rank, start), None) or None
            found.append(Attempt(**of_start, **told, rank=rank, last_log_lines=lines))
    return found


def _end_of_start(job: Job, start: int, verdict: status.JobStatus, *, newest: bool) -> dict[str, Any]:
    """Why a start of a job ended, and why it was put back into the queue, if it was."""
    note = job.read_note("requeued", start) or {}
    if newest:
        return {"requeued": None if "refused" in note else note.get("why"), "why": _because(verdict)}
    # A preempted job may find that Slurm has put it back already, and refuses to do it twice.
    again = note.get("why", "by Slurm: killed, preempted or its node lost before it could say so")
    return {"requeued": again, "why": f"requeued: {again}"}


def _because(verdict: status.JobStatus) -> str:
    if verdict.state == "finished" or not verdict.kind or verdict.reason.startswith(verdict.kind):
        return verdict.reason or verdict.state
    return f"{verdict.kind}: {verdict.reason}"


def _of_beat(beat: Heartbeat | None, labels: dict[str, str]) -> dict[str, Any]:
    if beat is None:
        return {}
    return {
        "host": beat.host, "device": beat.device or None, "gpu": beat.gpu or None, "phase": beat.phase, "done": beat.done,
        "total": beat.total, "began": _utc(beat.began or None), "cell_key": beat.cell or None, "label": labels.get(beat.cell),
    }  # fmt: skip


def _of_ending(ending: Outcome | None, verdict: status.JobStatus, wish: str, *, newest: bool) -> dict[str, Any]:
    """What a rank said about its end; of one that said nothing, what is said of the job where that fits it.

    `wish` is why the start wanted to be put back into the queue, if it did.
    """
    if ending is None:
        # Of a job that a rank ended with words of its own, the silent ones are not to blame.
        known = (
            newest
            and verdict.state != "finished"
            and (verdict.outcome is None or verdict.outcome.kind in ("dead rank", "node failure"))
        )
        told = {"error_class": verdict.kind or None, "message": verdict.reason} if known else {}
        return {"status": "gone", **told}
    kind = ending.kind if ending.status == "failed" else ""
    if ending.status == "stopped":
        kind = CLASS_OF_REQUEUE.get(wish) or (verdict.kind if newest and verdict.state == "stopped" else "")
    return {
        "status": ending.status, "error_class": kind or None, "error_type": ending.error_type or None,
        "message": ending.message or None, "traceback": ending.traceback or None,
    }  # fmt: skip


def record_unfinished_run(job: Job, verdict: status.JobStatus, left: Sequence[Attempt]) -> None:
    """Put it into the registry with every rank's words; under a name that two who find the job at once both give it."""
    spec, newest = job.spec(), job.attempt()
    beats = {beat.rank: beat for beat in read_or(job.heartbeats, [])}
    ending = verdict.outcome
    beat = beats.get(ending.rank if ending else 0) or next(iter(beats.values()), None)
    first = next((a for a in left if a.start == newest and ending and a.rank == ending.rank), None)
    keys = [cell["key"] for cell in spec["cells"]]
    at = keys.index(beat.cell) if beat and beat.cell in keys else None
    write_unfinished_run(
        spec["argument"], at, job.id[-6:],
        status="failed" if verdict.state == "failed" else "stopped",
        job=job.id, start=newest, error_class=verdict.kind or verdict.state,
        error_type=first.error_type if first else None,
        error_message=ending.message if ending and ending.kind == verdict.kind else verdict.reason,
        tracebacks=tuple(words for a in left if a.start == newest and (words := _words(a))),
        host=beat.host if beat else None, device=beat.device or None if beat else None,
        num_ranks=spec["num_ranks"], seconds=beat.seconds if beat else {},
        started=_utc(beat.cell_began or beat.began or None if beat else None) or _utc(job.submitted_at()),
        finished=_utc(ending.time if ending else job.last_activity()),
    )  # fmt: skip


def _words(attempt: Attempt) -> str:
    """What one rank has to say, as text."""
    if attempt.status == "finished" or not (attempt.traceback or attempt.last_log_lines or attempt.message):
        return ""
    how = ", ".join(word for word in (attempt.status, attempt.error_class) if word)
    where = f" on {attempt.host} ({attempt.gpu or attempt.device})" if attempt.host else ""
    lines = [f"rank {attempt.rank}{where}, {how}: {attempt.message or ''}", attempt.traceback]
    lines += [f"last log lines:\n{attempt.last_log_lines}"] if attempt.last_log_lines else []
    return "\n".join(line.rstrip() for line in lines if line)


def _utc(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def write_unfinished_run(argument: dict[str, Any], cell: int | None, name: str, **told: Any) -> None:
    """Land the run of a job that ended before its time; it says nothing itself, because no rank knows how the others ended.

    Args:
        argument: what the job was given.
        cell: which of its cells it was at; None for the first that neither finished nor failed since the job was started.
        name: end of the run id: two who find the same job make one run.
        told: fields of the record: status, class, every rank's words.
    """
    from ksweep.registry import run_record

    registry = Path(argument["registry"])
    cell = _current_cell(argument, told["started"]) if cell is None else cell
    if cell is None:
        return
    origin = argument.get("origin", {})
    known = cell_from_dict(argument["cells"][cell])
    names = names_by_cell(argument).get(known)
    keys = cell_keys(known) if names is None else cell_keys(known).with_names(*names)
    identity = identity_fields(known, keys) | {"run_id": f"{told['finished']:%Y%m%dT%H%M%S}-{keys.cell[:8]}-{name}"}
    if (registry / "landing" / identity["run_id"]).exists():
        return
    record = run_record.RunRecord(**identity, **request_fields(argument["sweep"], argument["resources"], origin), **told)
    run_record.write_run(registry, record)


def _current_cell(argument: dict[str, Any], started: datetime) -> int | None:
    """Of a job that did not say which cell it was at; None where an older version of it has landed its failure itself."""
    from ksweep.registry.query import runs_since

    said = runs_since(Path(argument["registry"]), started)
    keys = [cell_keys(cell).cell for cell in map(cell_from_dict, argument["cells"])]
    if any(said.get(key) == "failed" for key in keys):
        return None
    return next((n for n, key in enumerate(keys) if key not in said), len(keys) - 1)
