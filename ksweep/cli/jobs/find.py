"""Find jobs by a short name: the start of a job id or of its random part, a Slurm number, a sweep, a run, or a cell."""

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

from ksweep.launch.job import Job, logs_directory
from ksweep.utils.errors import RequestError

JOB_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")
SLURM_NUMBER = re.compile(r"\d+(_\d+)?")
READERS = 16
"""Files read in parallel: on a network file system each costs a round trip."""
SHORTEST_KEY = 4
NAMES_TO_LIST = 12


@dataclass(frozen=True)
class JobFacts:
    """Sweep and cells of a job, which never change."""

    sweep: str
    cells: tuple[tuple[str, str], ...]
    """Key and label of each."""
    titles: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Full cell names by key; missing in jobs of earlier versions."""

    @property
    def keys(self) -> frozenset[str]:
        """Keys of its cells."""
        return frozenset(key for key, _ in self.cells)


@cache
def job_facts(job: Job) -> JobFacts:
    """Read sweep and cells of a job, once per process.

    Raises:
        OSError, ValueError: job.json is gone or cannot be read.
    """
    spec = json.loads((job.path / "job.json").read_text())
    cells = tuple((str(cell["key"]), str(cell["label"])) for cell in spec.get("cells", []))
    argument = spec.get("argument") or {}
    # "names" holds labels and titles in jobs of earlier versions.
    full = [value.get("title", "") for value in argument.get("keys", ())] or [title for _, title in argument.get("names", ())]
    titles = {key: str(title) for (key, _), title in zip(cells, full, strict=False)}
    return JobFacts(str(argument.get("sweep", "")), cells, titles)


def readable_job_facts(jobs: Sequence[Job]) -> dict[Job, JobFacts]:
    """Return the facts of every job that can be read, in the order of `jobs`."""
    with ThreadPoolExecutor(READERS) as pool:
        all_facts = pool.map(_facts_or_none, jobs)
        return {job: facts for job, facts in zip(jobs, all_facts, strict=True) if facts is not None}


def _facts_or_none(job: Job) -> JobFacts | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        return job_facts(job)
    return None


def list_jobs(logs: Path) -> list[Job]:
    """List job directories by name alone, oldest first, without reading any file."""
    with suppress(FileNotFoundError), os.scandir(logs) as entries:
        names = sorted(entry.name for entry in entries if JOB_ID.fullmatch(entry.name))
        return [Job(logs / name) for name in names]
    return []


def short_id(job_or_run: str) -> str:
    """Return the random part at the end of an id, which is enough to name a job or run."""
    return job_or_run.rpartition("-")[2]


@dataclass(frozen=True)
class JobSelection:
    """The jobs that a name stands for."""

    jobs: list[Job]
    """Oldest first."""
    kind: Literal["sweep", "job", "run", "cell"]
    keys: frozenset[str] = frozenset()
    """The cell's key, where the name is that of a run or a cell."""


def find_jobs(registry: Path, name: str) -> list[Job]:
    """Return the jobs that a name stands for, oldest first."""
    return select_jobs(registry, name).jobs


def select_jobs(registry: Path, name: str) -> JobSelection:
    """Return one job, by a unique prefix of its id or random part, by Slurm number, run or cell; or all jobs of a sweep.

    Raises:
        RequestError: the name matches nothing, or several things.
    """
    logs = logs_directory(registry)
    if JOB_ID.fullmatch(name) and (logs / name / "job.json").is_file():
        return JobSelection([Job(logs / name)], "job")
    facts_by_job = readable_job_facts(list_jobs(logs))
    sweeps: dict[str, list[Job]] = {}
    for job, facts in facts_by_job.items():
        sweeps.setdefault(facts.sweep, []).append(job)
    # 1. exact names
    if name in sweeps:
        return JobSelection(sweeps[name], "sweep")
    if SLURM_NUMBER.fullmatch(name) and (numbered := _with_slurm_number(list(facts_by_job), name)):
        return JobSelection(numbered, "job")
    # 2. unique prefixes of jobs and sweeps
    jobs = [job for job in facts_by_job if job.id.startswith(name) or short_id(job.id).startswith(name)]
    near = sorted(sweep for sweep in sweeps if sweep.startswith(name))
    if len(jobs) == 1 and not near:
        return JobSelection(jobs, "job")
    if len(near) == 1 and not jobs:
        return JobSelection(sweeps[near[0]], "sweep")
    if jobs or near:
        raise RequestError(f"{name!r} could be {_first_names([*near, *(job.id for job in reversed(jobs))])}: give more of it")
    # 3. runs and cells
    selection = _of_run(registry, facts_by_job, name) or _of_cell(facts_by_job, name)
    if selection is not None:
        return selection
    names = _first_names([*sorted(sweeps), *(job.id for job in list(facts_by_job)[-5:])])
    raise RequestError(
        f"no job, run or sweep is called {name!r}" + (f"; there are {names}" if names else ": there are no jobs yet")
    )


def _first_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_TO_LIST:,} more" if len(names) > NAMES_TO_LIST else ""
    return ", ".join(names[:NAMES_TO_LIST]) + more


def _with_slurm_number(jobs: Sequence[Job], number: str) -> list[Job]:
    """Return the job with a Slurm number, or all elements of a Slurm array."""
    with ThreadPoolExecutor(READERS) as pool:
        notes = dict(zip(jobs, pool.map(lambda job: job.read_note("slurm") or {}, jobs), strict=True))
    numbers = {job: str(note.get("id", "")) for job, note in notes.items()}
    return [job for job in jobs if numbers[job] == number or numbers[job].partition("_")[0] == number]


def _of_run(registry: Path, facts_by_job: dict[Job, JobFacts], name: str) -> JobSelection | None:
    """Return the job of a run: the newest one with its cell that was submitted before the run ended."""
    runs = find_runs(registry, name)
    if len(runs) != 1:
        return None
    key, finished = runs[0]["cell_key"], runs[0]["finished"].replace(tzinfo=UTC).timestamp()
    jobs = [job for job, facts in facts_by_job.items() if key in facts.keys and _submission_time(job) <= finished + 1]
    return JobSelection(jobs[-1:], "run", frozenset({key})) if jobs else None


def _submission_time(job: Job) -> float:
    """Return the time in a job's name, which survives whatever happens to its files."""
    return datetime.strptime(job.id[:15], "%Y%m%d-%H%M%S").replace(tzinfo=UTC).timestamp()


def _of_cell(facts_by_job: dict[Job, JobFacts], name: str) -> JobSelection | None:
    """Return the newest job of the cell whose key starts with `name`."""
    key = name.removeprefix("@")
    keys = {k for facts in facts_by_job.values() for k in facts.keys if k.startswith(key)}
    if len(key) < SHORTEST_KEY or len(keys) != 1:
        return None
    return JobSelection([job for job, facts in facts_by_job.items() if facts.keys & keys][-1:], "cell", frozenset(keys))


def find_runs(registry: Path, name: str) -> list[dict[str, Any]]:
    """Return the runs whose id, or its random part, starts with `name`: status, cell, and error."""
    if not registry.is_dir():
        return []
    from ksweep.registry.database import connect

    question = """
        SELECT run_id, sweep, label, cell_key, status, error_class, error_type, error_message, tracebacks, host, device, finished
        FROM runs WHERE starts_with(run_id, $1) OR starts_with(split_part(run_id, '-', -1), $1) ORDER BY run_id
    """
    with connect(registry) as connection:
        runs: list[dict[str, Any]] = connection.sql(question, params=[name]).to_arrow_table().to_pylist()
    return runs
