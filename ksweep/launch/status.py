"""What a job is doing, or how it ended: one pure function of the evidence, and the reading of that evidence.

A job's own files are believed first. Slurm is asked only about a job that is silent.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from ksweep.launch.job import READ_ERRORS, Job
from ksweep.launch.rank_records import Heartbeat, Outcome, first_failure, is_alive
from ksweep.launch.slurm import commands, sbatch
from ksweep.launch.slurm.polling import SlurmState, slurm_states
from ksweep.utils.files import on_local_disk

FRESH_HEARTBEAT_SECONDS = 20.0
"""A heartbeat younger than this proves that the job runs; Slurm is not asked."""
RECHECK_SECONDS = 20.0
"""A job that has vanished, or whose node failed, counts as ended only if Slurm still says so this much later.

Seen on Slurm 22: NODE_FAIL stands for 5 s before the job is back in the queue; a requeued job was away for less than 2 s.
"""
RECORD_RECHECK_SECONDS = 75.0
"""The same for a job that may well have written its outcome: on a network file system this node may not see the file yet.

NFS caches a directory for up to 60 s (acdirmax); a file that another node has put there appears after that.
"""
Recheck = Literal["", "queue", "record", "either"]
LOG_LINES, LOG_BYTES = 50, 4096
END_LINES = 5
"""slurmstepd's final message is within this many lines of the end; one further up may be of an earlier start of the job."""
QUOTED_LINES, QUOTED_CHARACTERS = 3, 300

JobState = Literal["waiting", "running", "finished", "failed", "stopped", "unknown"]
LIVE_STATES: tuple[JobState, ...] = ("waiting", "running", "unknown")
"""States in which a job may still bring its results: its cells are not given to another job."""

OUT_OF_MEMORY = re.compile(
    r"oom[-_ ]kill|out of memory|OutOfMemory|Cannot allocate memory|exceeded (job |step )?memory limit", re.IGNORECASE
)
"""What the kernel, Python, torch, and Slurm where it watches memory itself (JobAcctGatherParams=OverMemoryKill) write."""
KILLED_FOR_MEMORY = re.compile(
    r"^(?:slurmstepd|srun)\b.*(?:oom[-_ ]kill|out of memory|exceeded (?:job |step )?memory limit).*$",
    re.IGNORECASE | re.MULTILINE,
)
"""Slurm's own lines only: a rank that survives another logs "killed, or out of memory", and so does one that halves its batch."""
ENDED_BY_SLURM = re.compile(r"\*\*\* JOB \S+ ON \S+ CANCELLED AT \S+ (?:DUE TO ([A-Z ]+?) )?\*\*\*")


@dataclass(frozen=True)
class JobStatus:
    """What a job is doing or how it ended, and the reason for saying so."""

    state: JobState
    reason: str
    kind: str = ""
    """Class of the end: that of the first failure, or timeout, preempted, cancelled, node failure, lost, setup, killed, ..."""
    outcome: Outcome | None = None
    """The outcome of the rank that explains the job's end, where a rank has written one."""
    recheck: Recheck = ""
    """Set where the job only seems to have ended, which counts once a later check agrees. It names what may appear until then:
    the job, back in the queue; its record, written but not yet visible from here; either."""


DIRECTORY_GONE = JobStatus("stopped", "its directory is gone", "lost")


@dataclass(frozen=True, kw_only=True)
class JobEvidence:
    """All that a job's status is decided from."""

    num_ranks: int = 1
    local: bool = False
    """The job runs on this machine and not on Slurm."""
    finalized: JobStatus | None = None
    """The status that is recorded in the registry."""
    heartbeats: Sequence[Heartbeat] = ()
    live_ranks: frozenset[int] = frozenset()
    """Ranks that prove to be alive: by their process where the job is local, by a fresh heartbeat on Slurm."""
    outcomes: Sequence[Outcome] = ()
    launcher: str | None = None
    """The process that is about to start the job, while it lives."""
    submission_interrupted: bool = False
    """Its launcher died while it handed the job to Slurm."""
    slurm_id: str | None = None
    slurm: SlurmState | None = None
    """What Slurm says of the job; None while it has not been asked."""
    requeued: str = ""
    """Why the newest start put itself back into the queue."""
    cancel_requested: bool = False
    log: str = ""
    """The last lines of the output of the ranks or of the batch script."""


def status_of(evidence: JobEvidence) -> JobStatus | None:
    """Return the status of a job; None if its files alone do not determine it and Slurm has not been asked."""
    failure = first_failure(evidence.outcomes)
    stopped = next((o for o in evidence.outcomes if o.status == "stopped"), None)
    ended = {o.rank for o in evidence.outcomes}
    running = [h for h in evidence.heartbeats if h.rank not in ended]
    # 1. What was finalized stands.
    if evidence.finalized is not None:
        return evidence.finalized
    # 2. Nothing has been written by a rank, and Slurm does not have the job: has its launcher yet to start it?
    if not evidence.heartbeats and not evidence.outcomes and evidence.slurm_id is None:
        return _status_before_start(evidence)
    # 3. A failed rank ends the job; the first failure is its cause.
    if failure is not None:
        return _failed(failure, evidence)
    # 4. The job has finished when every rank says so.
    if len(evidence.outcomes) == evidence.num_ranks and all(o.status == "finished" for o in evidence.outcomes):
        return JobStatus("finished", "every rank finished", outcome=min(evidence.outcomes, key=lambda o: o.rank))
    # 5. Ranks stopped. On Slurm the job may be on its way back into the queue, whatever the others still do: Slurm knows.
    if stopped is not None and not evidence.local:
        return _status_from_slurm(evidence, stopped.message)
    if stopped is not None and len(evidence.outcomes) == evidence.num_ranks:
        return JobStatus("stopped", stopped.message, "stopped", stopped)
    # 6. A live rank that has not ended: the job runs.
    if any(h.rank in evidence.live_ranks for h in running):
        newest = max(running, key=lambda h: h.time)
        counted = f" {newest.done}/{newest.total}" if newest.total else ""
        return JobStatus("running", f"{newest.phase}{counted}")
    # 7. Silence. On this machine it means that the process is gone; on Slurm somebody else has to explain it.
    if not evidence.local:
        return _status_from_slurm(evidence, "")
    silent = ", ".join(str(rank) for rank in range(evidence.num_ranks) if rank not in ended)
    reason = f"rank {silent} of {evidence.num_ranks} is gone without a terminal record (killed, or out of memory)"
    return JobStatus("stopped", reason, "killed")


def _status_before_start(evidence: JobEvidence) -> JobStatus:
    if evidence.launcher is not None:
        return JobStatus("waiting", f"its launcher ({evidence.launcher}) has yet to start it")
    if evidence.submission_interrupted:
        return JobStatus("unknown", "its launcher died while it handed it over; the sweep's own command asks Slurm for it")
    return JobStatus("stopped", "its launcher ended before it was started", "never submitted")


def _failed(failure: Outcome, evidence: JobEvidence) -> JobStatus:
    """Return the status of a failed job: a rank that sees another die does not know the cause, but Slurm's output may."""
    failed = JobStatus("failed", f"{failure.kind}: {failure.message}", failure.kind, failure)
    if evidence.local or failure.kind != "dead rank" or (line := KILLED_FOR_MEMORY.search(evidence.log)) is None:
        return failed
    return replace(failed, kind="out of memory", reason=f"out of memory ({line[0]}); {failed.reason}")


def _status_from_slurm(evidence: JobEvidence, stop_message: str) -> JobStatus | None:
    """Return the status of a silent job from Slurm's answer and the job's files; None while Slurm has not been asked."""
    slurm, number = evidence.slurm, evidence.slurm_id
    if slurm is None:
        return None
    # 1. Slurm cannot tell.
    if number is None:
        return JobStatus("unknown", "its submission is not resolved yet")
    if slurm.elsewhere:
        return JobStatus("unknown", f"silent; {slurm.elsewhere}: ask there (job {number})")
    if not slurm.reachable:
        return JobStatus("unknown", f"silent, and Slurm does not answer (job {number})")
    # 2. The job is in the queue.
    if slurm.queued is not None:
        entry = slurm.queued
        again = f", requeued: {evidence.requeued}" if evidence.requeued else ""
        if entry.state in commands.RUNNING_STATES:
            return JobStatus("running", f"silent; Slurm says {entry.state} (job {number}{again})")
        if entry.state in commands.WAITING_STATES:
            return JobStatus("waiting", f"{entry.state.lower()}: {entry.reason} (job {number}{again})")
    # 3. It has left the queue. If its ranks said that they stopped, the way in which its shell then ended says nothing more.
    left = _status_after_queue(evidence, number, slurm)
    if not stop_message or left.kind in ("cancelled", "timeout", "preempted", "node failure"):
        return left
    return JobStatus("stopped", f"{stop_message} (job {number} has left the queue)", "stopped")


def _status_after_queue(evidence: JobEvidence, number: str, slurm: SlurmState) -> JobStatus:
    """Return how a job that is no longer in Slurm's queue ended."""
    entry, log = slurm.accounted, evidence.log
    state = entry.state if entry is not None else slurm.queued.state if slurm.queued is not None else ""
    where = f" on {entry.nodes}" if entry is not None and entry.nodes not in ("", "None assigned") else ""
    says = f"Slurm: {state}{where} (job {number})" if state else f"job {number} has left the queue"
    # 1. Without accounting, slurmstepd's last line in the job's output says why Slurm ended it.
    state = state or _state_from_log(log)
    # 2. Slurm or a user ended it.
    if evidence.cancel_requested or state.startswith("CANCELLED"):
        return JobStatus("stopped", f"cancelled; {says}", "cancelled")
    if state == "OUT_OF_MEMORY" or (OUT_OF_MEMORY.search(log) is not None and state in ("FAILED", "")):
        return JobStatus("failed", f"out of memory; {says}", "out of memory")
    if state in ("TIMEOUT", "DEADLINE"):
        return JobStatus("stopped", f"killed at its time limit; {says}", "timeout")
    # 3. It may be back in the queue in a moment.
    if state == "PREEMPTED":
        return JobStatus("stopped", f"preempted and not requeued; {says}", "preempted", recheck="queue")
    if state in ("NODE_FAIL", "BOOT_FAIL"):
        return JobStatus("stopped", f"its node failed and it was not requeued; {says}", "node failure", recheck="queue")
    if state in commands.UNFINISHED_STATES:
        reason = f"accounting says {state}, but it is not in the queue (job {number})"
        return JobStatus("stopped", reason, "lost", recheck="queue")
    # 4. It ended by itself, and a rank's outcome may be written but not visible from here yet.
    code = f", exit code {entry.exit_code}" if entry is not None and entry.exit_code else ""
    if state == "COMPLETED":
        reason = f"it ended without a terminal record (not to be seen from here yet?); {says}"
        return JobStatus("failed", reason, "dead rank", recheck="record")
    if not (evidence.heartbeats or evidence.outcomes) and (state or log):
        reason = f"it ended before any rank began, in the lines of `setup` or at srun; {says}{code}{_quote_end(log)}"
        return JobStatus("failed", reason, "setup", recheck="record" if state else "either")
    if state:
        reason = f"a rank ended without a terminal record; {says}{code}{_quote_end(log)}"
        return JobStatus("failed", reason, "dead rank", recheck="record")
    # 5. It has vanished.
    reason = f"job {number} is neither in the queue nor in accounting (cancelled while it waited, or killed)"
    return JobStatus("stopped", reason, "lost", recheck="either")


def _state_from_log(log: str) -> str:
    """Return the state that accounting would give, from what slurmstepd wrote when it ended a job; empty where it wrote nothing.

    slurmstepd says CANCELLED of a STEP, too, when srun ends it because one of its tasks was killed.
    """
    match = ENDED_BY_SLURM.search("\n".join(log.splitlines()[-END_LINES:]))
    if match is None:
        return ""
    return {"TIME LIMIT": "TIMEOUT", "PREEMPTION": "PREEMPTED", "NODE FAILURE": "NODE_FAIL"}.get(match[1] or "", "CANCELLED")


def _quote_end(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()][-QUOTED_LINES:]
    return f'; last lines: "{" | ".join(lines)[-QUOTED_CHARACTERS:]}"' if lines else ""


# Reading the evidence


def job_status(job: Job) -> JobStatus:
    """Return the status of one job."""
    return job_statuses([job]).get(job.id, DIRECTORY_GONE)


def job_statuses(jobs: Sequence[Job]) -> dict[str, JobStatus]:
    """Return the statuses of jobs by id; Slurm is asked once for all that are silent.

    A job whose files cannot be read is unknown, whatever the others are; one whose directory is gone is left out.
    """
    from_files = {job.id: _guarded(job, partial(_status_from_files, job)) for job in jobs}
    silent = [job for job in jobs if from_files[job.id] is None]
    slurm = _ask_slurm(silent)
    statuses = {job.id: from_files[job.id] or _guarded(job, partial(_status_of_silent, job, slurm[job.id])) for job in jobs}
    return {name: status for name, status in statuses.items() if status is not None and status is not DIRECTORY_GONE}


def _ask_slurm(silent: Sequence[Job]) -> dict[str, SlurmState]:
    try:
        return slurm_states(silent)
    except READ_ERRORS:  # a file was replaced between two reads: the next check succeeds
        return {job.id: SlurmState(reachable=False) for job in silent}


def _guarded(job: Job, read: Callable[[], JobStatus | None]) -> JobStatus | None:
    try:
        return read()
    except READ_ERRORS as error:
        if not (job.path / "job.json").exists():
            return DIRECTORY_GONE
        return JobStatus("unknown", f"its files cannot be read ({type(error).__name__}: {error})")


def _status_from_files(job: Job) -> JobStatus | None:
    return status_of(gather_evidence(job))


def _status_of_silent(job: Job, slurm: SlurmState) -> JobStatus | None:
    status = status_of(gather_evidence(job, slurm))  # files are read again: a rank may have written while Slurm was asked
    return None if status is None else _recheck(job, status, slurm.answered_at)


def gather_evidence(job: Job, slurm: SlurmState | None = None) -> JobEvidence:
    """Read what a job's files say; `slurm` is what Slurm says of it, if it was asked."""
    final = job.final_status()
    if final is not None and "state" in final:
        return JobEvidence(finalized=JobStatus(final["state"], final["reason"], final.get("kind", "")))
    attempt, spec = job.attempt(), job.spec()
    heartbeats, outcomes, slurm_id = job.heartbeats(attempt), job.outcomes(attempt), job.slurm_id()
    local = spec.get("cluster") != "slurm"
    unstarted = not heartbeats and not outcomes and slurm_id is None
    launcher = _live_launcher(spec) if unstarted else None
    ended = {o.rank for o in outcomes}
    failure = first_failure(outcomes)
    # Reading the log lists the output of a whole array: not for each of its elements that wait in the queue.
    left_queue = slurm is not None and slurm.reachable and not _is_queued(slurm)
    wants_log = not local and (left_queue or (failure is not None and failure.kind == "dead rank"))
    return JobEvidence(
        num_ranks=spec["num_ranks"], local=local, heartbeats=heartbeats, outcomes=outcomes, slurm_id=slurm_id, slurm=slurm,
        live_ranks=frozenset(h.rank for h in heartbeats if h.rank not in ended and _proves_life(h, local)),
        launcher=launcher,
        submission_interrupted=unstarted and launcher is None and sbatch.is_in_interrupted_submission(job),
        requeued=(job.read_note("requeued", attempt) or {}).get("why", "") if slurm is not None else "",
        cancel_requested=job.cancel_requested(), log=_log_end(job) if wants_log else "",
    )  # fmt: skip


def _proves_life(heartbeat: Heartbeat, local: bool) -> bool:
    return is_alive(heartbeat) if local else time.time() - heartbeat.time < FRESH_HEARTBEAT_SECONDS


def _live_launcher(spec: dict[str, Any]) -> str | None:
    launcher = spec.get("launcher")
    alive = launcher is not None and is_alive(Heartbeat(rank=0, **launcher))
    return f"process {launcher['pid']} on {launcher['host']}" if alive and launcher is not None else None


def _is_queued(slurm: SlurmState) -> bool:
    return slurm.queued is not None and slurm.queued.state in (*commands.RUNNING_STATES, *commands.WAITING_STATES)


def _log_end(job: Job) -> str:
    """Return the last lines of standard error, or else of standard output."""
    try:
        if text := job.log_tail(LOG_LINES).strip():
            return text
        outs = [path.read_bytes()[-LOG_BYTES:] for path in job.logs() if path.suffix == ".out"]
    except OSError:  # removed in the meantime
        return ""
    return b"\n".join(outs).decode(errors="replace").strip()


# A job that only seems to have ended


def _recheck(job: Job, status: JobStatus, asked_at: float) -> JobStatus:
    """Return `unknown` for a job that seems to have ended, until Slurm has said so for long enough."""
    note = job.read_note("seems-gone")
    if not status.recheck:
        if note is not None:
            (job.path / "seems-gone.json").unlink(missing_ok=True)
        return status
    activity = job.last_activity()
    if note is None or note["sign"] != activity:
        note = {"since": asked_at, "sign": activity}
        job.write_note("seems-gone", note)
    if asked_at - note["since"] >= _recheck_seconds(job, status.recheck):
        return status
    return replace(status, state="unknown", reason=f"{status.reason}; looking again before believing it")


def _recheck_seconds(job: Job, recheck: Recheck) -> float:
    """Return how long Slurm must report a job as ended: until a requeue or its final record would be visible here."""
    record = 0.0 if recheck == "queue" or on_local_disk(job.path) else RECORD_RECHECK_SECONDS
    return max(record, 0.0 if recheck == "record" else RECHECK_SECONDS)
