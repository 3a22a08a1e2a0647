"""What the ranks of a job wrote, read or followed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ksweep.launch import status
from ksweep.launch.job import Job
from ksweep.utils.errors import RequestError, RunError

FOLLOW_SECONDS = 1.0
PIECE_BYTES = 1_000_000


def read_logs(job: Job, rank: int | None, *, follow: bool) -> Iterator[str]:
    """What the ranks of a job wrote, as of one file after another; with `follow` also what comes, until the job has ended.

    Raises:
        RequestError: no rank of that number has written anything. RunError: there are no logs.
    """
    at: dict[Path, int] = {}
    newest: Path | None = None
    told = False
    while True:
        verdict = status.job_statuses([job]).get(job.id)
        over = not follow or verdict is None or verdict.state not in status.LIVE_STATES
        paths = _paths(job, rank)
        if not paths and over:
            raise _none(job, rank, verdict)
        if not paths and not told:
            told = True
            reason = "" if verdict is None else f" ({verdict.state}: {verdict.reason})"
            print(f"job {job.id} has written nothing yet{reason}: waiting", file=sys.stderr, flush=True)
        several = sum(_size(path) > 0 for path in paths) > 1
        for path in paths:
            for text in _new_text(path, at):
                if several and path != newest:  # as `tail -f` does: whose words these are
                    yield f"==> {path.name} <==\n"
                newest = path
                yield text
        if over:
            return
        time.sleep(FOLLOW_SECONDS)


def _paths(job: Job, rank: int | None) -> list[Path]:
    with suppress(OSError):
        return [p for p in job.logs() if rank is None or p.stem.endswith(f"_{rank}_log")]
    return []


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0


def _new_text(path: Path, at: dict[Path, int]) -> Iterator[str]:
    """What a file has that was not read before; from its beginning where a new start of the job has begun it anew."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        start = at.get(path, 0)
        file.seek(start if path.stat().st_size >= start else 0)
        while piece := file.read(PIECE_BYTES):
            piece += file.readline()  # up to the end of a line: a character is not cut in two
            at[path] = file.tell()
            yield piece.decode(errors="replace")


def _none(job: Job, rank: int | None, verdict: status.JobStatus | None) -> Exception:
    there = sorted({p.stem.split("_")[-2] for p in _paths(job, None) if p.stem.count("_") >= 2}, key=lambda n: (len(n), n))
    if rank is not None and there:
        return RequestError(f"rank {rank} of job {job.id} has written nothing; ranks with logs: {', '.join(there)}")
    how = "" if verdict is None else f" It is {verdict.state}: {verdict.reason}."
    waits = verdict is not None and verdict.state == "waiting"
    advice = "-f waits for them" if waits else f"`ksweep why {job.id}` tells what is known"
    return RunError(f"job {job.id} has no logs {'yet' if waits else '(never written, or removed)'} in {job.path}.{how} {advice}")
