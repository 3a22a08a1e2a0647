"""Records of how jobs went: `attempts/<job>.json`, an entry for each start and rank, written once when the job is over.

The file is written under another name and linked into place, so that readers see all of it or nothing, and of two processes that
record the same job the first one wins. It carries the SHA-256 of its entries: a truncated or altered file is refused by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ksweep.registry.run_record import LandingError
from ksweep.utils.files import json_names, publish_once

ATTEMPTS_FOLDER = "attempts"
ATTEMPTS_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One rank in one start of a job; schema.sql explains each field (table attempts). None means unknown."""

    job: str
    start: int
    rank: int
    num_ranks: int
    sweep: str
    cells: tuple[str, ...]
    cell_key: str | None = None
    label: str | None = None
    slurm_id: str | None = None
    host: str | None = None
    device: str | None = None
    gpu: str | None = None
    began: datetime | None = None
    ended: datetime | None = None
    phase: str | None = None
    done: int | None = None
    total: int | None = None
    status: str
    error_class: str | None = None
    error_type: str | None = None
    message: str | None = None
    traceback: str | None = None
    last_log_lines: str | None = None
    requeued: str | None = None
    why: str

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Attempt:
        """Parse an entry of a file, ignoring fields that this version does not know."""
        values = {f.name: value[f.name] for f in fields(cls) if f.name in value}
        values |= {name: datetime.fromisoformat(values[name]) for name in ("began", "ended") if values.get(name)}
        return cls(**values | {"cells": tuple(values["cells"])})

    def to_json(self) -> dict[str, Any]:
        """Return plain values, times in UTC."""
        times = {
            name: None if (t := getattr(self, name)) is None else t.astimezone(UTC).isoformat() for name in ("began", "ended")
        }
        return asdict(self) | times


def write_attempts(registry_root: Path | str, attempts: Sequence[Attempt]) -> None:
    """Write the attempts of one job, unless its file exists."""
    [job] = {attempt.job for attempt in attempts}
    entries = [attempt.to_json() for attempt in attempts]
    text = json.dumps({"format": ATTEMPTS_FORMAT, "job": job, "sha256": _digest(entries), "attempts": entries}, indent=1)
    publish_once(Path(registry_root) / ATTEMPTS_FOLDER / f"{job}.json", text.encode())


def jobs_with_attempts(registry_root: Path | str) -> set[str]:
    """Return the jobs whose attempts are recorded; files whose names begin with a dot are still being written."""
    return json_names(Path(registry_root) / ATTEMPTS_FOLDER)


def read_attempts(path: Path) -> list[Attempt]:
    """Read the attempts of a job and check them against the digest in the file.

    Raises:
        LandingError: the file is damaged, of a later format, or of another job.
    """
    try:
        raw = json.loads(path.read_bytes())
        entries = raw["attempts"]
        if raw["format"] > ATTEMPTS_FORMAT:
            raise LandingError(
                f"{path.name} has format {raw['format']}, this ksweep reads up to {ATTEMPTS_FORMAT}: update ksweep"
            )
        if raw["sha256"] != _digest(entries):
            raise LandingError(f"{path.name} is not what was written: its entries were altered")
        attempts = [Attempt.from_json(entry) for entry in entries]
    except OSError as error:
        raise LandingError(f"{path.name} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LandingError(f"{path.name} holds no attempts of a job ({error}): cut short or altered") from error
    if {attempt.job for attempt in attempts} != {path.stem}:
        raise LandingError(f"{path.name} is the record of another job: was the file renamed or copied?")
    return attempts


def _digest(entries: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
