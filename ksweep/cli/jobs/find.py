"""A job by a short name: the beginning of its id or of its random part, Slurm's number, a sweep, a run, a cell."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ksweep.launch.job import Job
from ksweep.utils.errors import RequestError

WHOLE_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")
SLURM_NUMBER = re.compile(r"\d+(_\d+)?")
READERS = 16
"""Files read side by side: on a network file system each costs a round trip."""
SHORTEST_KEY = 4
NAMES_TO_LIST = 12


def logs_of(registry: Path) -> Path:
    """Where the jobs of a registry say how they go."""
    return Path(os.path.abspath(registry)).parent / "logs"


@dataclass(frozen=True)
class Facts:
    """What never changes of a job, as far as people name it by that."""

    sweep: str
    cells: tuple[tuple[str, str], ...]
    """Key and label of each."""
    titles: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Names of cells where they stand alone, by key; none in jobs of earlier versions."""

    @property
    def keys(self) -> frozenset[str]:
        """Keys of its cells."""
        return frozenset(key for key, _ in self.cells)


@cache
def facts_of(job: Job) -> Facts:
    """Sweep and cells of a job; whoever watches reads them once.

    Raises:
        OSError, ValueError: job.json is gone or cannot be read.
    """
    spec = json.loads((job.path / "job.json").read_text())
    cells = tuple((str(cell["key"]), str(cell["label"])) for cell in spec.get("cells", []))
    argument = spec.get("argument") or {}
    titles = {key: str(title) for (key, _), (_, title) in zip(cells, argument.get("names", ()), strict=False)}
    return Facts(str(argument.get("sweep", "")), cells, titles)


def facts_of_all(jobs: Sequence[Job]) -> dict[Job, Facts]:
    """Of all jobs that can be read, in their order."""
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(_facts_or_none, jobs)
        return {job: facts for job, facts in zip(jobs, found, strict=True) if facts is not None}


def _facts_or_none(job: Job) -> Facts | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        return facts_of(job)
    return None


def listed(logs: Path) -> list[Job]:
    """Every job directory, oldest first, by its name alone: nothing of it is read."""
    with suppress(FileNotFoundError), os.scandir(logs) as entries:
        names = sorted(entry.name for entry in entries if WHOLE_ID.fullmatch(entry.name))
        return [Job(logs / name) for name in names]
    return []


def short(job_or_run: str) -> str:
    """The random part at the end of an id, which is enough to name it."""
    return job_or_run.rpartition("-")[2]


@dataclass(frozen=True)
class Named:
    """What a name stands for."""

    jobs: list[Job]
    kind: Literal["sweep", "job", "run", "cell"]
    keys: frozenset[str] = frozenset()
    """Of a run or a cell: the key of the cell."""


def find(registry: Path, name: str) -> list[Job]:
    """The jobs that a name stands for, oldest first."""
    return named(registry, name).jobs


def named(registry: Path, name: str) -> Named:
    """One job, by a unique prefix of its id or of its random part, by Slurm's number, a run or a cell; or the jobs of a sweep.

    Raises:
        RequestError: nothing is called that, or several things are.
    """
    logs = logs_of(registry)
    if WHOLE_ID.fullmatch(name) and (logs / name / "job.json").is_file():
        return Named([Job(logs / name)], "job")
    facts = facts_of_all(listed(logs))
    sweeps: dict[str, list[Job]] = {}
    for job, told in facts.items():
        sweeps.setdefault(told.sweep, []).append(job)
    if name in sweeps:
        return Named(sweeps[name], "sweep")
    if SLURM_NUMBER.fullmatch(name) and (numbered := _numbered(list(facts), name)):
        return Named(numbered, "job")
    found = [job for job in facts if job.id.startswith(name) or short(job.id).startswith(name)]
    near = sorted(sweep for sweep in sweeps if sweep.startswith(name))
    if len(found) == 1 and not near:
        return Named(found, "job")
    if len(near) == 1 and not found:
        return Named(sweeps[near[0]], "sweep")
    if found or near:
        raise RequestError(f"{name!r} could be {_some([*near, *(job.id for job in reversed(found))])}: write more of it")
    other = _of_run(registry, facts, name) or _of_cell(facts, name)
    if other is not None:
        return other
    known = _some([*sorted(sweeps), *(job.id for job in list(facts)[-5:])])
    raise RequestError(
        f"no job, run or sweep is called {name!r}" + (f"; there are {known}" if known else ": there are no jobs yet")
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_TO_LIST:,} more" if len(names) > NAMES_TO_LIST else ""
    return ", ".join(names[:NAMES_TO_LIST]) + more


def _numbered(jobs: Sequence[Job], number: str) -> list[Job]:
    """The job of a number of Slurm's, or all elements of an array."""
    with ThreadPoolExecutor(READERS) as pool:
        known = dict(zip(jobs, pool.map(lambda job: job.read_note("slurm") or {}, jobs), strict=True))
    numbers = {job: str(noted.get("id", "")) for job, noted in known.items()}
    return [job for job in jobs if numbers[job] == number or numbers[job].partition("_")[0] == number]


def _of_run(registry: Path, facts: dict[Job, Facts], name: str) -> Named | None:
    """The job that a run was part of: the newest one with its cell that was submitted before the run ended."""
    runs = runs_called(registry, name)
    if len(runs) != 1:
        return None
    key, finished = runs[0]["cell_key"], runs[0]["finished"].replace(tzinfo=UTC).timestamp()
    mine = [job for job, told in facts.items() if key in told.keys and _submitted(job) <= finished + 1]
    return Named(mine[-1:], "run", frozenset({key})) if mine else None


def _submitted(job: Job) -> float:
    """By its name: that is there whatever became of its files."""
    return datetime.strptime(job.id[:15], "%Y%m%d-%H%M%S").replace(tzinfo=UTC).timestamp()


def _of_cell(facts: dict[Job, Facts], name: str) -> Named | None:
    """The newest job with the cell whose key begins so."""
    key = name.removeprefix("@")
    keys = {k for told in facts.values() for k in told.keys if k.startswith(key)}
    if len(key) < SHORTEST_KEY or len(keys) != 1:
        return None
    return Named([job for job, told in facts.items() if told.keys & keys][-1:], "cell", frozenset(keys))


def runs_called(registry: Path, name: str) -> list[dict[str, Any]]:
    """Runs whose id, or the random part of it, begins so: with status, cell and what was said at their end."""
    if not registry.is_dir():
        return []
    from ksweep.registry.database import connect

    question = """
        SELECT run_id, sweep, label, cell_key, status, error_class, error_type, error_message, tracebacks, host, device, finished
        FROM runs WHERE starts_with(run_id, $1) OR starts_with(split_part(run_id, '-', -1), $1) ORDER BY run_id
    """
    with connect(registry) as connection:
        found: list[dict[str, Any]] = connection.sql(question, params=[name]).to_arrow_table().to_pylist()
    return found
