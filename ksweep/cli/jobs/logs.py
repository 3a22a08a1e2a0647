"""`ksweep logs`: the output of a job's ranks, read or followed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ksweep.launch import status
from ksweep.launch.job import Job
from ksweep.utils.console import remark
from ksweep.utils.errors import RequestError, RunError

LOG_POLL_SECONDS = 1.0
CHUNK_BYTES = 1_000_000


def read_logs(job: Job, rank: int | None, *, follow: bool) -> Iterator[str]:
    """Yield the logs of a job's ranks, one file after another; with `follow` also new text, until the job has ended.

    Raises:
        RequestError: that rank has written nothing. RunError: there are no logs.
    """
    offsets: dict[Path, int] = {}
    newest: Path | None = None
    announced = False
    while True:
        job_status = status.job_statuses([job]).get(job.id)
        last_round = not follow or job_status is None or job_status.state not in status.LIVE_STATES
        paths = _log_paths(job, rank)
        if not paths and last_round:
            raise _no_logs_error(job, rank, job_status)
        if not paths and not announced:
            announced = True
            reason = "" if job_status is None else f" ({job_status.state}: {job_status.reason})"
            remark(f"job {job.id} has written nothing yet{reason}: waiting")
        several = sum(_size(path) > 0 for path in paths) > 1
        for path in paths:
            for text in _new_text(path, offsets):
                if several and path != newest:  # a header names the file, as in `tail -f`
                    yield f"==> {path.name} <==\n"
                newest = path
                yield text
        if last_round:
            return
        time.sleep(LOG_POLL_SECONDS)


def _log_paths(job: Job, rank: int | None) -> list[Path]:
    with suppress(OSError):
        return [p for p in job.logs() if rank is None or p.stem.endswith(f"_{rank}_log")]
    return []


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0


def _new_text(path: Path, offsets: dict[Path, int]) -> Iterator[str]:
    """Yield what was not read before; from the beginning where a new start of the job has truncated the file."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        start = offsets.get(path, 0)
        file.seek(start if path.stat().st_size >= start else 0)
        while chunk := file.read(CHUNK_BYTES):
            chunk += file.readline()  # up to the end of a line, so that no character is cut in two
            offsets[path] = file.tell()
            yield chunk.decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n")  # each state of a progress bar


def _no_logs_error(job: Job, rank: int | None, job_status: status.JobStatus | None) -> Exception:
    ranks = sorted({p.stem.split("_")[-2] for p in _log_paths(job, None) if p.stem.count("_") >= 2}, key=lambda n: (len(n), n))
    if rank is not None and ranks:
        return RequestError(f"rank {rank} of job {job.id} has written nothing; ranks with logs: {', '.join(ranks)}")
    state = "" if job_status is None else f" It is {job_status.state}: {job_status.reason}."
    waiting = job_status is not None and job_status.state == "waiting"
    advice = "-f waits for them" if waiting else f"`ksweep why {job.id}` shows what is known"
    return RunError(
        f"job {job.id} has no logs {'yet' if waiting else '(never written, or removed)'} in {job.path}.{state} {advice}"
    )
