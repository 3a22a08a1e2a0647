"""Poll Slurm about silent jobs, rarely: squeue and sacct are shared, and sites lock out users who poll them often.

Progress comes from heartbeats. Slurm is asked about silent jobs only, once for all of them; its answer is kept for
SLURM_POLL_SECONDS, and longer and longer while every job only waits.
"""

from __future__ import annotations

import getpass
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ksweep.launch.job import Job
from ksweep.launch.slurm import commands

SLURM_POLL_SECONDS = 15.0
"""$KSWEEP_SLURM_SECONDS overrides it."""
MAX_CLOCK_SKEW_SECONDS = 2 * 3600.0
"""Two clocks differ by less, and so do the two readings of a time in the hour that is repeated in autumn."""
MAX_SLURM_POLL_SECONDS = 60.0
"""The longest interval, for jobs that all wait: one that starts writes a heartbeat."""


@dataclass(frozen=True)
class SlurmState:
    """Slurm's information on a job."""

    queued: commands.QueueEntry | None = None
    accounted: commands.AccountingEntry | None = None
    reachable: bool = True
    elsewhere: str = ""
    """Why this Slurm cannot tell: which cluster the job is on."""
    answered_at: float = field(default_factory=time.monotonic, compare=False)
    """When Slurm said it, by this process's monotonic clock."""


@dataclass
class _Poll:
    """Slurm's last answer, and the jobs that it was about."""

    queued: dict[str, commands.QueueEntry] = field(default_factory=dict)
    accounted: dict[str, commands.AccountingEntry] = field(default_factory=dict)
    numbers: frozenset[str] = frozenset()
    users: frozenset[str] = frozenset()
    reachable: bool = False
    here: str | None = None
    """The cluster that was asked."""
    answered_at: float = 0.0
    asked: float = float("-inf")
    """By the monotonic clock."""
    pause: float = 0.0

    def covers(self, numbers: Iterable[str], users: frozenset[str]) -> bool:
        """Return whether the poll is recent enough and was about these jobs."""
        if time.monotonic() - self.asked >= self.pause or not users <= self.users:
            return False
        return not self.reachable or all(n in self.numbers or n in self.queued for n in numbers)


_last = _Poll()


def slurm_states(jobs: Sequence[Job]) -> dict[str, SlurmState]:
    """Return Slurm's state of each job, by id, from the last poll if recent enough; jobs without a Slurm id are left out."""
    numbers = {job.id: n for job in jobs if (n := job.slurm_id()) is not None}
    owners = {job.id: _owner(job) for job in jobs}
    poll = _newest_poll(frozenset(numbers.values()), frozenset(owners[name] for name in numbers)) if numbers else _Poll()
    states = {}
    for job in jobs:
        cluster = cluster_of(job)
        if cluster and poll.here and cluster != poll.here:
            why = f"it is on cluster {cluster}, and this command runs on {poll.here}"
            states[job.id] = SlurmState(reachable=False, elsewhere=why, answered_at=poll.answered_at)
        else:
            answer = _answer(job, numbers.get(job.id), poll)
            states[job.id] = _from_afar(answer) if owners[job.id] != getpass.getuser() else answer
    return states


def cluster_of(job: Job) -> str | None:
    """Return the cluster that a job was submitted to."""
    return (job.read_note("slurm") or {}).get("cluster")


def ids_on_this_cluster(jobs: Iterable[Job]) -> list[str]:
    """Return Slurm's ids of the jobs on this cluster; on another cluster the same id is another job."""
    here = commands.cluster_name()
    ours = [job for job in jobs if cluster_of(job) in (None, here)]
    return [number for job in ours if (number := job.slurm_id()) is not None]


def ids_in_queue(jobs: Sequence[Job]) -> dict[str, str]:
    """Ask Slurm now, however recent the last poll, and return job id -> Slurm id of the jobs in this cluster's queue.

    Raises:
        SlurmError: Slurm does not answer.
    """
    here = {job.id: job for job in jobs if job.slurm_id() is not None and ids_on_this_cluster([job])}
    if not here:
        return {}
    there = {entry.id: entry for entry in commands.squeue(user=",".join(sorted({_owner(job) for job in here.values()})))}
    entries = {name: _own(job, there.get(str(job.slurm_id()))) for name, job in here.items()}
    return {name: entry.id for name, entry in entries.items() if entry is not None}


def _owner(job: Job) -> str:
    return str((job.read_note("slurm") or {}).get("user", getpass.getuser()))


def _answer(job: Job, number: str | None, poll: _Poll) -> SlurmState:
    if number is None:
        return SlurmState()
    if not poll.reachable:
        return SlurmState(reachable=False, answered_at=poll.answered_at)
    return SlurmState(
        _own(job, poll.queued.get(number)), _own_record(job, poll.accounted.get(number)), answered_at=poll.answered_at
    )


def _newest_poll(numbers: frozenset[str], users: frozenset[str]) -> _Poll:
    global _last
    if not _last.covers(numbers, users):
        _last = _poll(numbers, users, _last.pause)
    return _last


def _poll(numbers: frozenset[str], users: frozenset[str], before: float) -> _Poll:
    """Ask Slurm about jobs, and decide how long the answer is kept."""
    # 1. The queue. If it does not answer, neither would accounting.
    base = float(os.environ.get("KSWEEP_SLURM_SECONDS", SLURM_POLL_SECONDS))
    now, poll = time.monotonic(), _Poll(numbers=numbers, users=users, here=commands.cluster_name(), pause=base)
    try:
        queued = {entry.id: entry for entry in commands.squeue(user=",".join(sorted(users)))}
    except commands.SlurmError:
        return replace(poll, answered_at=now, asked=time.monotonic())
    # 2. Accounting, only about jobs that have left the queue.
    accounted = commands.sacct(sorted(numbers - set(queued)))
    # 3. While all jobs wait, ask at twice the interval each time.
    all_wait = all(n in queued and queued[n].state == "PENDING" for n in numbers)
    pause = max(base, min(2 * before, MAX_SLURM_POLL_SECONDS)) if all_wait else base
    return replace(poll, queued=queued, accounted=accounted, reachable=True, answered_at=now, asked=time.monotonic(), pause=pause)


def _from_afar(answer: SlurmState) -> SlurmState:
    """Return what can be concluded about another user's job: many clusters hide such jobs, which then seem to have vanished."""
    ended = answer.accounted is not None and answer.accounted.state not in commands.UNFINISHED_STATES
    return answer if answer.queued is not None or ended else replace(answer, reachable=False)


def _own(job: Job, entry: commands.QueueEntry | None) -> commands.QueueEntry | None:
    """Return the entry if it is this job's; as slurmctld reuses ids when it loses its state, the tag or the script must match."""
    noted = job.read_note("slurm") or {}
    if entry is None or not entry.tag or entry.tag == noted.get("tag", entry.tag):
        return entry
    return entry if entry.script and entry.script == _script(noted) else None


def _own_record(job: Job, entry: commands.AccountingEntry | None) -> commands.AccountingEntry | None:
    """Return the record if it is this job's: accounting seldom has the tag, so script and time of submission must match."""
    noted = job.read_note("slurm") or {}
    if entry is None or (entry.command and "folder" in noted and _script(noted) not in entry.command):
        return None
    before = entry.submitted is not None and entry.submitted < job.submitted_at() - MAX_CLOCK_SKEW_SECONDS
    return None if before else entry


def _script(noted: Mapping[str, Any]) -> str:
    """Return the batch script of a submission."""
    return f"{noted['folder']}/script.sh"
