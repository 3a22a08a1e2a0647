"""A job on disk: what to run, how far each rank is, how each rank ended. Files are the only truth between launcher and ranks.

logs/<job>/job.json                  entry point and its argument, cells, shape; written by the launcher
logs/<job>/slurm.json                under which id Slurm knows it, and where its output goes
logs/<job>/asked-to-end              somebody has cancelled it
logs/<job>/attempt-<n>/rank-<r>.json    heartbeat: process, node, GPU, phase, done / total
logs/<job>/attempt-<n>/ended-<r>.json   terminal record of a rank: status, error class, traceback
logs/<job>/attempt-<n>/requeued.json    it was put back into the queue, and why
logs/<job>/settled.json              how it ended, once that has been told to the registry; a rank that still runs ends itself

A start of a job (n = Slurm's restart count) writes into a directory of its own: processes of an older start that are still
alive somewhere cannot be taken for the newer one, and end themselves when they see it.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from ksweep.launch.rank_records import Heartbeat, Outcome, is_alive, this_process
from ksweep.utils.files import publish

_T = TypeVar("_T")
_U = TypeVar("_U")
READ_ERRORS = (OSError, ValueError, LookupError, TypeError)
"""What reading a file raises that is gone, half-written, or of a form that this version does not know."""


def read_or(question: Callable[[], _T], otherwise: _U) -> _T | _U:
    """What a job's files say, or something else where they cannot be read."""
    try:
        return question()
    except READ_ERRORS:
        return otherwise


@dataclass(frozen=True)
class Job:
    """A job directory."""

    path: Path

    @property
    def id(self) -> str:
        """Name of the job: time of submission and a random part."""
        return self.path.name

    def spec(self) -> dict[str, Any]:
        """Entry point ("package.module:function"), its argument, number of ranks."""
        return json.loads((self.path / "job.json").read_text())  # type: ignore[no-any-return]

    def attempt(self) -> int:
        """Number of the newest start; 0 before the first."""
        return max(self.starts(), default=0)

    def starts(self) -> list[int]:
        """Numbers of the starts that have said something."""
        return sorted(int(p.name[8:]) for p in self.path.glob("attempt-*") if p.name[8:].isdigit())

    def attempt_folder(self, attempt: int | None = None) -> Path:
        """Where a start (the newest, unless another is named) says how it goes."""
        return self.path / f"attempt-{self.attempt() if attempt is None else attempt:03d}"

    def write_heartbeat(self, heartbeat: Heartbeat) -> None:
        """Publish how far a rank is."""
        path = self.attempt_folder(heartbeat.attempt) / f"rank-{heartbeat.rank}.json"
        publish(path, json.dumps(asdict(heartbeat)).encode(), durable=False)

    def write_outcome(self, ending: Outcome) -> None:
        """Publish how a rank ended; on a full disk the room kept for this is used."""
        data = json.dumps(asdict(ending)).encode()
        path = self.attempt_folder(ending.attempt) / f"ended-{ending.rank}.json"
        try:
            publish(path, data)
        except OSError:
            self.free_reserve()
            publish(path, data)

    def has_live_rank(self) -> bool:
        """Whether a process of the job is alive and has not said how it ended."""
        attempt = self.attempt()
        ended = {e.rank for e in self.outcomes(attempt)}
        return any(is_alive(h) for h in self.heartbeats(attempt) if h.rank not in ended)

    def submitted_at(self) -> float:
        """When it was submitted, seconds since 1970."""
        return (self.path / "job.json").stat().st_mtime

    def last_activity(self) -> float:
        """When it was last heard of, seconds since 1970: its submission, a heartbeat, an ending, a requeue."""
        signs = [p.stat().st_mtime for p in self.attempt_folder().glob("*.json")]
        return max([self.submitted_at(), *signs])

    def free_reserve(self) -> None:
        """Give up what was only kept for the job's end."""
        (self.path / RESERVE).unlink(missing_ok=True)

    def heartbeats(self, attempt: int | None = None) -> list[Heartbeat]:
        """The newest heartbeat of every rank that has one."""
        return [Heartbeat(**_known_fields(Heartbeat, value)) for value in self._read_records("rank-*.json", attempt)]

    def outcomes(self, attempt: int | None = None) -> list[Outcome]:
        """The terminal records that are there."""
        return [Outcome(**_known_fields(Outcome, value)) for value in self._read_records("ended-*.json", attempt)]

    def write_note(self, name: str, value: dict[str, Any], attempt: int | None = None) -> None:
        """Write down a fact about the job, or about one start of it."""
        folder = self.path if attempt is None else self.attempt_folder(attempt)
        publish(folder / f"{name}.json", json.dumps(value).encode())

    def read_note(self, name: str, attempt: int | None = None) -> dict[str, Any] | None:
        """A fact that was written down; None where there is none."""
        folder = self.path if attempt is None else self.attempt_folder(attempt)
        with suppress(OSError, ValueError):
            return json.loads((folder / f"{name}.json").read_text())  # type: ignore[no-any-return]
        return None

    def final_status(self) -> dict[str, Any] | None:
        """How it ended as the registry was told, if somebody has: none of its ranks has anything to say after that."""
        return self.read_note("settled")

    def slurm_id(self) -> str | None:
        """Slurm's number: as the submission wrote it down, or as the job itself says."""
        noted = self.read_note("slurm")
        if noted is not None:
            return str(noted["id"])
        return next((h.slurm_id for h in self.heartbeats() if h.slurm_id), None)

    def request_cancel(self) -> None:
        """Say that it is to end, so that it does not put itself back into the queue."""
        publish(self.path / CANCEL_REQUESTED, b"")

    def cancel_requested(self) -> bool:
        """Whether somebody has cancelled it."""
        return (self.path / CANCEL_REQUESTED).exists()

    def logs(self) -> list[Path]:
        """What its ranks wrote to standard error and output."""
        noted = self.read_note("slurm")
        found = [*self.path.glob("*_log.err"), *self.path.glob("*_log.out")]
        if noted is not None:
            folder, name = Path(noted["folder"]), noted["id"]
            found += [*folder.glob(f"{name}_*_log.err"), *folder.glob(f"{name}_*_log.out")]
        return sorted(found)

    def log_tail(self, lines: int = 20) -> str:
        """The last lines of standard error, whichever rank wrote them."""
        return "\n".join(_last_lines(p, lines) for p in self.logs() if p.suffix == ".err" and p.stat().st_size)

    def log_bytes(self, rank: int) -> int:
        """How much a rank has written to standard error so far, over all starts."""
        with suppress(OSError):
            return sum(p.stat().st_size for p in self._error_logs(rank))
        return 0

    def last_log_lines(self, rank: int, start: int, lines: int = 20) -> str:
        """The last lines that a rank wrote to standard error in one start, its traceback left out: that has its own place."""
        began, ended = self._log_start(rank, start), self._log_start(rank, start + 1)
        said = next((e.traceback.strip() for e in self.outcomes(start) if e.rank == rank), "")
        texts = [_between(path, began or 0, ended) for path in self._error_logs(rank)]
        text = "\n".join(text.replace(said, "(its traceback)") if said else text for text in texts)
        return "\n".join(text.strip().splitlines()[-lines:])

    def _log_start(self, rank: int, start: int) -> int | None:
        """Where a start begins in the file that all starts of a rank write to; None where it did not say."""
        return next((beat.log_began for beat in self.heartbeats(start) if beat.rank == rank), None)

    def _error_logs(self, rank: int) -> list[Path]:
        return [path for path in self.logs() if path.suffix == ".err" and path.stem.endswith(f"_{rank}_log")]

    def _read_records(self, pattern: str, attempt: int | None) -> list[dict[str, Any]]:
        return [_read_json(path) for path in sorted(self.attempt_folder(attempt).glob(pattern))]


def _read_json(path: Path) -> dict[str, Any]:
    """A record. On a network file system one that is being replaced may for a moment be listed and not be readable (ESTALE)."""
    for _ in range(READ_ATTEMPTS - 1):
        with suppress(OSError, ValueError):
            return json.loads(path.read_text())  # type: ignore[no-any-return]
        time.sleep(0.05)
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def _last_lines(path: Path, lines: int) -> str:
    """The end of a file that may be large."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])


def _between(path: Path, began: int, ended: int | None) -> str:
    """Part of a file that may be large: its end, if it is long."""
    with path.open("rb") as file:
        last = min(path.stat().st_size, ended or path.stat().st_size)
        file.seek(max(began, last - TAIL_BYTES))
        return file.read(max(0, last - file.tell())).decode(errors="replace")


def _known_fields(kind: type, value: dict[str, Any]) -> dict[str, Any]:
    """What this version knows of a record that another version may have written."""
    names = {f.name for f in fields(kind)}
    return {k: v for k, v in value.items() if k in names}


RESERVE = "reserve"
"""A file that can be given up, so that even on a full disk a rank can say how it ended."""
RESERVE_BYTES = 256 * 1024
CANCEL_REQUESTED = "asked-to-end"
READ_ATTEMPTS = 4
"""How often a record is read before it is believed to be unreadable."""
TAIL_BYTES = 65_536


def all_jobs(logs: Path) -> list[Job]:
    """Every job that was ever created below a directory of logs, oldest first."""
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
) -> Job:
    """A new job directory with its job.json; `gpus` is the number on each node, `cells` are (key, label)."""
    job = Job(logs / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}")
    spec = {
        "entry": entry, "argument": argument, "num_ranks": num_ranks, "gpus": gpus, "gpus_per_model": gpus_per_model,
        "cluster": cluster,
        "cells": [{"key": key, "label": label} for key, label in cells], "launcher": this_process(),
    }  # fmt: skip
    publish(job.path / RESERVE, bytes(RESERVE_BYTES))
    publish(job.path / "job.json", json.dumps(spec, indent=1).encode())
    return job
