"""A job's directory: what to run, each rank's heartbeat and outcome. Launcher and ranks exchange nothing but these files.

    job.json                  launcher: entry point and its argument (resolved cells, their keys, resources), number of ranks,
                              key and label of each cell, the launcher's process, on Slurm the code that is run; never changed
    reserve                   launcher: 256 kB that a rank removes to write its outcome on a full disk
    slurm.json                launcher: Slurm's id, cluster, user and tag of the job, and where its output goes
    asked-to-end              `ksweep cancel`, or Ctrl-C twice: the job is not put back into the queue
    attempt-*/rank-*.json     rank: heartbeat (process, node, GPU, phase, done / total, current cell)
    attempt-*/rank-*.lock     rank: locked for as long as it lives, where the file system has locks
    attempt-*/meeting-point.json    rank 0: host and port at which the ranks of this start meet
    attempt-*/ended-*.json    rank: outcome (finished, failed or stopped, class, message, traceback, result)
    attempt-*/requeued.json   rank 0: why this start was put back into the queue, and at which point of the work
    controller.json           launcher: submitit's process that starts the ranks of a job on this machine
    settled.json              whoever finalizes: status that was recorded in the registry; a rank that still runs then ends itself
    *_log.err, *_log.out      output of each rank; on Slurm in the directory that slurm.json names
    *_submitted.pkl, *_result.pkl, *_submission.sh    submitit: its call, its answer, its command line

Each start of a job (n = Slurm's restart count) writes into a directory of its own: processes of an older start that are still
alive somewhere cannot be mistaken for the newer one, and end themselves when they see it.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any, TypeVar

from ksweep.launch.liveness import Life, gather_life, hold_lock, life_of
from ksweep.launch.rank_records import Heartbeat, Outcome, is_alive, process_record
from ksweep.utils.files import publish

_T = TypeVar("_T")
_U = TypeVar("_U")
READ_ERRORS = (OSError, ValueError, LookupError, TypeError)
"""What reading raises if a file is gone, half-written, or in a form that this version does not know."""


def read_or(read: Callable[[], _T], default: _U) -> _T | _U:
    """Return read(), or a default if the job's files cannot be read."""
    try:
        return read()
    except READ_ERRORS:
        return default


@dataclass(frozen=True)
class Job:
    """A job directory."""

    path: Path

    @property
    def id(self) -> str:
        """The job's id: its time of submission and a random part."""
        return self.path.name

    def spec(self) -> dict[str, Any]:
        """Return the content of job.json: entry point ("package.module:function"), its argument, number of ranks, ..."""
        return json.loads((self.path / "job.json").read_text())  # type: ignore[no-any-return]

    def attempt(self) -> int:
        """Return the number of the newest start; 0 before the first."""
        return max(self.starts(), default=0)

    def starts(self) -> list[int]:
        """Return the numbers of the starts that have written anything."""
        return sorted(int(p.name[8:]) for p in self.path.glob("attempt-*") if p.name[8:].isdigit())

    def attempt_folder(self, attempt: int | None = None) -> Path:
        """Return the directory that a start writes into: the newest start, unless another is given."""
        return self.path / f"attempt-{self.attempt() if attempt is None else attempt:03d}"

    def write_heartbeat(self, heartbeat: Heartbeat) -> None:
        """Publish a rank's heartbeat."""
        path = self.attempt_folder(heartbeat.attempt) / f"rank-{heartbeat.rank}.json"
        publish(path, json.dumps(asdict(heartbeat)).encode(), durable=False)

    def write_outcome(self, outcome: Outcome) -> None:
        """Publish a rank's outcome; on a full disk the reserve file makes room for it."""
        data = json.dumps(asdict(outcome)).encode()
        path = self.attempt_folder(outcome.attempt) / f"ended-{outcome.rank}.json"
        try:
            publish(path, data)
        except OSError:
            self.free_reserve()
            publish(path, data)

    def has_live_rank(self) -> bool:
        """Return whether any rank without an outcome is still alive."""
        attempt = self.attempt()
        ended = {e.rank for e in self.outcomes(attempt)}
        return any(self.is_alive(h) for h in self.heartbeats(attempt) if h.rank not in ended)

    def is_alive(self, heartbeat: Heartbeat) -> bool:
        """Return whether the rank that wrote a heartbeat counts as alive: proven, or not silent for long where nothing is."""
        return is_alive(heartbeat, self._lock_of(heartbeat))

    def life_of_rank(self, heartbeat: Heartbeat) -> Life:
        """Return whether the rank that wrote a heartbeat is proven to be alive or dead, and else that this is unknown."""
        return life_of(gather_life(heartbeat.process, self._lock_of(heartbeat)))

    def lock_rank(self, rank: int, attempt: int) -> IO[bytes] | None:
        """Lock the file that proves that a rank of a start lives while the returned file is open; None without locks."""
        return hold_lock(self._lock_path(rank, attempt))

    def _lock_of(self, heartbeat: Heartbeat) -> Path | None:
        """Return the file that a rank keeps locked, if this process sees it through the same mounted file system.

        Two containers may have mounted one directory each for itself (FUSE): neither sees the other's locks.
        """
        path = self._lock_path(heartbeat.rank, heartbeat.attempt)
        with suppress(OSError):
            return path if path.stat().st_dev == heartbeat.lock_device else None
        return None

    def _lock_path(self, rank: int, attempt: int) -> Path:
        return self.attempt_folder(attempt) / f"rank-{rank}.lock"

    def code(self) -> dict[str, Any] | None:
        """Return path, commit and difference of the code that the job runs; None if nobody noted it."""
        noted = self.spec().get("code")
        return noted if noted is not None else self.read_note("code")  # a file of its own in earlier versions

    def submitted_at(self) -> float:
        """Return when the job was submitted, in seconds since 1970."""
        return (self.path / "job.json").stat().st_mtime

    def last_activity(self) -> float:
        """Return when the job last wrote anything (submission, heartbeat, outcome, requeue), in seconds since 1970."""
        times = [p.stat().st_mtime for p in self.attempt_folder().glob("*.json")]
        return max([self.submitted_at(), *times])

    def free_reserve(self) -> None:
        """Remove the file that was only kept to make room for outcomes."""
        (self.path / RESERVE).unlink(missing_ok=True)

    def heartbeats(self, attempt: int | None = None) -> list[Heartbeat]:
        """Return the newest heartbeat of every rank that has one."""
        return [Heartbeat(**_known_fields(Heartbeat, value)) for value in self._read_records("rank-*.json", attempt)]

    def outcomes(self, attempt: int | None = None) -> list[Outcome]:
        """Return the outcomes that ranks have written."""
        return [Outcome(**_known_fields(Outcome, value)) for value in self._read_records("ended-*.json", attempt)]

    def write_note(self, name: str, value: dict[str, Any], attempt: int | None = None) -> None:
        """Write a JSON note about the job, or about one start of it."""
        folder = self.path if attempt is None else self.attempt_folder(attempt)
        publish(folder / f"{name}.json", json.dumps(value).encode())

    def read_note(self, name: str, attempt: int | None = None) -> dict[str, Any] | None:
        """Return a note about the job or one of its starts; None if there is none."""
        folder = self.path if attempt is None else self.attempt_folder(attempt)
        with suppress(OSError, ValueError):
            return json.loads((folder / f"{name}.json").read_text())  # type: ignore[no-any-return]
        return None

    def final_status(self) -> dict[str, Any] | None:
        """Return the status with which the job was finalized, or None; ranks that still run then end themselves."""
        return self.read_note("settled")

    def slurm_id(self) -> str | None:
        """Return Slurm's id of the job, from the submission's note or else from a heartbeat."""
        note = self.read_note("slurm")
        if note is not None:
            return str(note["id"])
        return next((h.slurm_id for h in self.heartbeats() if h.slurm_id), None)

    def request_cancel(self) -> None:
        """Request that the job end, so that it does not put itself back into the queue."""
        publish(self.path / CANCEL_REQUESTED, b"")

    def cancel_requested(self) -> bool:
        """Return whether somebody has cancelled the job."""
        return (self.path / CANCEL_REQUESTED).exists()

    def logs(self) -> list[Path]:
        """Return the files to which its ranks' standard error and output were written."""
        note = self.read_note("slurm")
        logs = [*self.path.glob("*_log.err"), *self.path.glob("*_log.out")]
        if note is not None:
            folder, name = Path(note["folder"]), note["id"]
            logs += [*folder.glob(f"{name}_*_log.err"), *folder.glob(f"{name}_*_log.out")]
        return sorted(logs)

    def log_tail(self, lines: int = 20) -> str:
        """Return the last lines of standard error of every rank."""
        return "\n".join(_last_lines(p, lines) for p in self.logs() if p.suffix == ".err" and p.stat().st_size)

    def log_bytes(self, rank: int) -> int:
        """Return the number of bytes that a rank has written to standard error over all starts."""
        with suppress(OSError):
            return sum(p.stat().st_size for p in self._error_logs(rank))
        return 0

    def last_log_lines(self, rank: int, start: int, lines: int = 20) -> str:
        """Return the last lines that a rank wrote to standard error in one start, without the traceback that its outcome has."""
        began, ended = self._log_start(rank, start), self._log_start(rank, start + 1)
        traceback = next((e.traceback.strip() for e in self.outcomes(start) if e.rank == rank), "")
        texts = [_between(path, began or 0, ended) for path in self._error_logs(rank)]
        text = "\n".join(text.replace(traceback, "(its traceback)") if traceback else text for text in texts)
        return "\n".join(text.strip().splitlines()[-lines:])

    def _log_start(self, rank: int, start: int) -> int | None:
        """Return the byte at which a start begins in the log that all starts of a rank append to; None if unknown."""
        return next((beat.log_began for beat in self.heartbeats(start) if beat.rank == rank), None)

    def _error_logs(self, rank: int) -> list[Path]:
        return [path for path in self.logs() if path.suffix == ".err" and path.stem.endswith(f"_{rank}_log")]

    def _read_records(self, pattern: str, attempt: int | None) -> list[dict[str, Any]]:
        return [_read_json(path) for path in sorted(self.attempt_folder(attempt).glob(pattern))]


def _read_json(path: Path) -> dict[str, Any]:
    """Read a record; on a network file system it may be unreadable for a moment while it is replaced (ESTALE), so try again."""
    for _ in range(READ_ATTEMPTS - 1):
        with suppress(OSError, ValueError):
            return json.loads(path.read_text())  # type: ignore[no-any-return]
        time.sleep(0.05)
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def _last_lines(path: Path, lines: int) -> str:
    """Return the last lines of a file that may be large."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])


def _between(path: Path, began: int, ended: int | None) -> str:
    """Return the part of a file between two bytes; only its end, if it is long."""
    with path.open("rb") as file:
        last = min(path.stat().st_size, ended or path.stat().st_size)
        file.seek(max(began, last - TAIL_BYTES))
        return file.read(max(0, last - file.tell())).decode(errors="replace")


def _known_fields(kind: type, value: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a record that this version knows; another version may have written it."""
    names = {f.name for f in fields(kind)}
    return {k: v for k, v in value.items() if k in names}


RESERVE = "reserve"
"""A file that can be removed, so that a rank can write its outcome even on a full disk."""
RESERVE_BYTES = 256 * 1024
CANCEL_REQUESTED = "asked-to-end"
READ_ATTEMPTS = 4
"""Number of attempts to read a record before it counts as unreadable."""
TAIL_BYTES = 65_536


def logs_directory(registry: Path | str) -> Path:
    """Return the directory of the jobs that write into a registry, which lies beside it."""
    return Path(os.path.abspath(registry)).parent / "logs"


def all_jobs(logs: Path) -> list[Job]:
    """Return every job below a directory of logs, oldest first."""
    return [Job(path.parent) for path in sorted(logs.glob("*/job.json"))]


def create_job(
    logs: Path,
    entry: str,
    argument: dict[str, Any],
    num_ranks: int,
    gpus: int = 0,
    *,
    gpus_per_model: int = 1,
    cluster: str = "local",
    cells: Sequence[tuple[str, str]] = (),
    code: dict[str, Any] | None = None,
) -> Job:
    """Create a job directory with its job.json.

    Args:
        logs: directory of all jobs.
        entry: function that each rank calls, "package.module:function".
        argument: its argument.
        num_ranks: number of ranks.
        gpus: number of GPUs on each node.
        gpus_per_model: number of GPUs that each rank spreads its models over.
        cluster: "local" or "slurm".
        cells: key and label of each cell.
        code: path, commit, difference and new files of the code that a job on Slurm runs.
    """
    job = Job(logs / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}")
    spec = {
        "entry": entry, "argument": argument, "num_ranks": num_ranks, "gpus": gpus, "gpus_per_model": gpus_per_model,
        "cluster": cluster,
        "cells": [{"key": key, "label": label} for key, label in cells], "launcher": process_record(),
        **({} if code is None else {"code": code}),
    }  # fmt: skip
    publish(job.path / RESERVE, bytes(RESERVE_BYTES))
    publish(job.path / "job.json", json.dumps(spec, indent=1).encode(), mode=0o644)  # a file that others can write is not rerun
    return job
