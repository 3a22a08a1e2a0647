"""Jobs ended and run again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ksweep.cli.jobs.find import Named, facts_of
from ksweep.launch import status
from ksweep.launch.job import Job, read_or
from ksweep.launch.rank_records import is_alive
from ksweep.launch.slurm import commands
from ksweep.launch.slurm.polling import cluster_of, ids_in_queue, ids_on_this_cluster
from ksweep.utils.errors import RunError


@dataclass(frozen=True)
class Cancelled:
    """What became of the wish to end a job."""

    job: str
    cancelled: bool
    state: str
    """Before."""
    reason: str
    slurm: str | None


def cancel(jobs: Sequence[Job]) -> list[Cancelled]:
    """End jobs at the border of their units; what became of the wish for each."""
    found = status.job_statuses(jobs)
    live = [job for job in jobs if job.id in found and found[job.id].state in status.LIVE_STATES]
    numbers = {job.id: _number(job) for job in live}
    on_slurm = [job for job in live if numbers[job.id] is not None]
    queued = ids_in_queue(on_slurm)
    out_of_reach = {job.id: _why_not(job) for job in on_slurm if job.id not in queued}
    out_of_reach |= {
        job.id: f"its ranks run on {hosts}: cancel it there" for job in live if job not in on_slurm and (hosts := _ask_ranks(job))
    }
    commands.scancel(sorted(queued.values()))
    return [
        Cancelled(
            job.id, job in live and job.id not in out_of_reach, found[job.id].state,
            out_of_reach.get(job.id, found[job.id].reason), numbers[job.id] if job in live else read_or(job.slurm_id, None),
        )
        for job in jobs if job.id in found
    ]  # fmt: skip


def _why_not(job: Job) -> str:
    """Of a job on Slurm that is not in this cluster's queue: its number may be another's by now, there or here."""
    if not ids_on_this_cluster([job]):
        return f"it is on cluster {cluster_of(job)}: cancel it there (`scancel {read_or(job.slurm_id, None)}`)"
    return f"Slurm has no job {read_or(job.slurm_id, None)} of ours in its queue: it has ended, or Slurm has forgotten it"


def _number(job: Job) -> str | None:
    """Ask a job to end, so that it does not put itself back into the queue; its number at Slurm."""
    job.request_cancel()
    return read_or(job.slurm_id, None)


def _ask_ranks(job: Job) -> str:
    """Signal the ranks of a local job; the hosts that cannot be reached from here."""
    beats = read_or(job.heartbeats, [])
    for beat in beats:
        if beat.host == socket.gethostname() and is_alive(beat):
            with suppress(ProcessLookupError):
                os.kill(beat.pid, signal.SIGTERM)
    return ", ".join(sorted({beat.host for beat in beats if beat.host != socket.gethostname()}))


def say_cancelled(name: str, found: Sequence[Cancelled]) -> list[str]:
    """The same in words: of many jobs that had ended only how many."""
    said = [f"cancelled: {c.job}" + (f" (Slurm {c.slurm})" if c.slurm else "") for c in found if c.cancelled]
    said += [f"not cancelled: {c.job}: {c.reason}" for c in found if not c.cancelled and c.state in status.LIVE_STATES]
    ended = [c for c in found if c.state not in status.LIVE_STATES]
    if len(found) == 1 and ended:
        return [f"nothing to cancel: {ended[0].job} has {_ended(ended[0])}"]
    if ended:
        nothing = "" if said else f"nothing of {name} is under way: "
        said.append(f"{nothing}{len(ended)} job{'s' * (len(ended) != 1)} had ended before")
    return said


def _ended(one: Cancelled) -> str:
    return one.state + (f" ({one.reason})" if one.reason else "")


@dataclass(frozen=True)
class Retry:
    """The sweep's own command, to be run again."""

    sweep: str
    cells: tuple[str, ...]
    """Labels of the cells that are run again although they failed; empty: all that failed."""
    directory: str
    command: tuple[str, ...]


def plan_retry(named: Named) -> Retry:
    """The command that runs failed cells again: all of a sweep, or those of one job, or one.

    Raises:
        RunError: the command cannot be had any more, or there is nothing to run again.
    """
    job, whole = named.jobs[-1], named.kind == "sweep"
    facts = facts_of(job)
    if not whole and (reason := _nothing_to_retry(job)):
        raise RunError(f"job {job.id} {reason}")
    origin: dict[str, Any] = job.spec()["argument"].get("origin", {})
    argv, directory = list(origin.get("argv", [])), origin.get("directory")
    if not argv or directory is None or not (Path(directory) / argv[0]).is_file():
        raise RunError(f"the script of this sweep ({' '.join(argv) or 'unknown'}) is not there any more: run yours with --retry")
    plain = [word for word in argv if word != "--retry" and not word.startswith("--retry-cell=")]
    cells = [] if whole else [(key, label) for key, label in facts.cells if key in (named.keys or facts.keys)]
    asked = ["--retry"] if whole else [f"--retry-cell={key}" for key, _ in cells]
    return Retry(facts.sweep, tuple(label for _, label in cells), str(directory), (sys.executable, *plain, *asked))


def _nothing_to_retry(job: Job) -> str:
    verdict = status.job_status(job)
    if verdict.state == "finished":
        return "has finished: nothing is to be run again"
    if verdict.state in status.LIVE_STATES:
        return f"is still {verdict.state} ({verdict.reason}): `ksweep cancel` ends it"
    return ""


def run_again(retry: Retry, *, as_json: bool = False) -> dict[str, Any]:
    """Run it; with `as_json` what it prints goes to standard error. Its exit code with the rest."""
    cells = f" (of what failed only {', '.join(retry.cells)})" if retry.cells else ""
    print(f"{retry.directory}: {' '.join(retry.command)}{cells}", file=sys.stderr, flush=True)
    output = sys.stderr if as_json else None
    done = subprocess.run(retry.command, cwd=retry.directory, check=False, stdout=output)
    return {**asdict(retry), "exit_code": done.returncode}
