"""What earlier commands left behind: ended jobs are told to the registry, once, whoever finds them."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from ksweep.evaluation.recording import land_unfinished
from ksweep.launch import status
from ksweep.launch.job import Ending, Heartbeat, Job, is_alive, read
from ksweep.registry import attempts
from ksweep.registry.attempts import Attempt
from ksweep.utils.errors import RequestError, StoreError

log = logging.getLogger(__name__)

LAST_WORDS_SECONDS = 6.0
"""How long the ranks of a job that has just ended may take to say how: a look around on Slurm, and the search for an echo."""
BEATS_SECONDS = 3.0
"""Within which a living rank beats."""
REQUEUED = {"time limit": "timeout", "preempted": "preempted", "asked to stop": "stopped"}
"""Why a start was put back into the queue -> class of its end."""


def book_ended(logs: Path) -> status.Survey:
    """The jobs below a directory of logs as they stand; those that have ended are booked."""
    survey = status.survey(logs)
    believed = _believed(survey.ended)
    for job, verdict in believed:
        settle(job, verdict)
    # A job that has come back meanwhile is at work again, and the first look does not say so.
    return survey if len(believed) == len(survey.ended) else status.survey(logs)


def book(job: Job, verdict: status.Verdict) -> bool:
    """Tell the registry how a job ended that nobody waited for, once; whether it has: it may have come back meanwhile."""
    believed = _believed([(job, verdict)])
    for _, found in believed:
        settle(job, found)
    return bool(believed)


def settle(job: Job, verdict: status.Verdict) -> None:
    """Tell the registry how a job ended: what each rank of each start left, and the run that came to nothing."""
    if job.given_up() is not None:
        return
    job.release()
    left = attempts_of(job, verdict) if verdict.kind != "never submitted" else []
    argument = job.spec().get("argument") or {}
    try:
        if left and "registry" in argument:
            attempts.write_attempts(argument["registry"], left)
        if verdict.state in ("failed", "stopped") and verdict.kind != "never submitted" and _is_of_cells(job):
            _land_run(job, verdict, left)
    except (RequestError, StoreError, OSError) as error:  # what ended the job is told beside; this must not hide it
        log.warning("the end of job %s could not be landed: %s", job.id, error)
    job.note("settled", {"state": verdict.state, "reason": verdict.reason, "kind": verdict.kind})


def _is_of_cells(job: Job) -> bool:
    """Whether there is a run to speak of: any other work (a job of another version, a test's) has attempts only."""
    argument = job.spec().get("argument") or {}
    return bool(job.spec().get("cells") and argument.get("cells") and {"registry", "sweep", "resources"} <= argument.keys())


def verdict_of(ending: Ending) -> status.Verdict:
    """How a job ended that this process has seen through."""
    state: status.State = "finished" if ending.status == "finished" else "failed" if ending.status == "failed" else "stopped"
    reason = ending.message or ("every rank finished" if state == "finished" else state)
    return status.Verdict(state, reason, ending.kind or ("stopped" if state == "stopped" else ""), ending)


def _believed(ended: Sequence[tuple[Job, status.Verdict]]) -> list[tuple[Job, status.Verdict]]:
    """Those that have ended still, once every rank has had time to say how."""
    if not ended:
        return []
    jobs = [job for job, _ in ended]
    before = {job.id: _beats(job) for job in jobs}
    _hear_out(jobs)
    if any(verdict.kind == "killed" and _is_elsewhere(job) for job, verdict in ended):
        time.sleep(BEATS_SECONDS)
    found = status.verdicts(jobs)
    gone = [job for job in jobs if job.id in found and found[job.id].state not in status.LIVE]
    # A rank of another machine, told dead because the two clocks differ, goes on beating.
    return [(job, found[job.id]) for job in gone if found[job.id].kind != "killed" or _beats(job) == before[job.id]]


def _hear_out(jobs: Sequence[Job]) -> None:
    deadline = time.monotonic() + LAST_WORDS_SECONDS
    while time.monotonic() < deadline and any(_may_speak(job) for job in jobs):
        time.sleep(0.1)


def _may_speak(job: Job) -> bool:
    """Whether a rank that has not said how it ended is alive, or was so lately on another machine."""
    ended = {e.rank for e in read(job.endings, [])}
    silent = [beat for beat in read(job.heartbeats, []) if beat.rank not in ended]
    return time.time() - job.last_sign() < LAST_WORDS_SECONDS and any(map(is_alive, silent))


def _is_elsewhere(job: Job) -> bool:
    return any(beat.host != socket.gethostname() for beat in read(job.heartbeats, []))


def _beats(job: Job) -> dict[int, float]:
    return {beat.rank: beat.time for beat in read(job.heartbeats, [])}


# What each rank of each start left


def attempts_of(job: Job, verdict: status.Verdict) -> list[Attempt]:
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
        wish = (job.noted("requeued", start) or {}).get("why", "")
        beats = {beat.rank: beat for beat in read(partial(job.heartbeats, start), [])}
        endings = {ending.rank: ending for ending in read(partial(job.endings, start), [])}
        for rank in range(spec["num_ranks"]):
            beat, ending = beats.get(rank), endings.get(rank)
            told = _of_beat(beat, labels) | _of_ending(ending, verdict, wish, newest=newest)
            told["ended"] = _utc(ending.time if ending else beat.time if beat else None)
            lines = read(partial(job.last_log_lines, rank, start), None) or None
            found.append(Attempt(**of_start, **told, rank=rank, last_log_lines=lines))
    return found


def _end_of_start(job: Job, start: int, verdict: status.Verdict, *, newest: bool) -> dict[str, Any]:
    """Why a start of a job ended, and why it was put back into the queue, if it was."""
    note = job.noted("requeued", start) or {}
    if newest:
        return {"requeued": None if "refused" in note else note.get("why"), "why": _because(verdict)}
    # A preempted job may find that Slurm has put it back already, and refuses to do it twice.
    again = note.get("why", "by Slurm: killed, preempted or its node lost before it could say so")
    return {"requeued": again, "why": f"requeued: {again}"}


def _because(verdict: status.Verdict) -> str:
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


def _of_ending(ending: Ending | None, verdict: status.Verdict, wish: str, *, newest: bool) -> dict[str, Any]:
    """What a rank said about its end; of one that said nothing, what is said of the job where that fits it.

    `wish` is why the start wanted to be put back into the queue, if it did.
    """
    if ending is None:
        # Of a job that a rank ended with words of its own, the silent ones are not to blame.
        known = (
            newest
            and verdict.state != "finished"
            and (verdict.ending is None or verdict.ending.kind in ("dead rank", "node failure"))
        )
        told = {"error_class": verdict.kind or None, "message": verdict.reason} if known else {}
        return {"status": "gone", **told}
    kind = ending.kind if ending.status == "failed" else ""
    if ending.status == "stopped":
        kind = REQUEUED.get(wish) or (verdict.kind if newest and verdict.state == "stopped" else "")
    return {
        "status": ending.status, "error_class": kind or None, "error_type": ending.error_type or None,
        "message": ending.message or None, "traceback": ending.traceback or None,
    }  # fmt: skip


# The run that came to nothing


def _land_run(job: Job, verdict: status.Verdict, left: Sequence[Attempt]) -> None:
    """Put it into the registry with every rank's words; under a name that two who find the job at once both give it."""
    spec, newest = job.spec(), job.attempt()
    beats = {beat.rank: beat for beat in read(job.heartbeats, [])}
    ending = verdict.ending
    beat = beats.get(ending.rank if ending else 0) or next(iter(beats.values()), None)
    first = next((a for a in left if a.start == newest and ending and a.rank == ending.rank), None)
    keys = [cell["key"] for cell in spec["cells"]]
    at = keys.index(beat.cell) if beat and beat.cell in keys else None
    land_unfinished(
        spec["argument"], at, job.id[-6:],
        status="failed" if verdict.state == "failed" else "stopped",
        job=job.id, start=newest, error_class=verdict.kind or verdict.state,
        error_type=first.error_type if first else None,
        error_message=ending.message if ending and ending.kind == verdict.kind else verdict.reason,
        tracebacks=tuple(words for a in left if a.start == newest and (words := _words(a))),
        host=beat.host if beat else None, device=beat.device or None if beat else None,
        num_ranks=spec["num_ranks"], seconds=beat.seconds if beat else {},
        started=_utc(beat.cell_began or beat.began or None if beat else None) or _utc(job.started()),
        finished=_utc(ending.time if ending else job.last_sign()),
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
