"""What a job is doing, or how it ended: one pure function of the evidence, and the gathering of that evidence.

`status_of` is the only judge. Launcher, waiting commands, `ksweep ls` and `watch`, the next command, and ranks about one another
gather evidence and ask it, so that the same death has the same state, class and retry policy whoever saw it.

A job's own files are believed first. Slurm is asked only about a job that is silent.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil

from ksweep.launch.job import READ_ERRORS, Job
from ksweep.launch.liveness import boot_id, gather_life, identity_in, life_of
from ksweep.launch.rank_records import SILENCE_SECONDS, Heartbeat, Outcome, life_in_record
from ksweep.launch.slurm import commands, sbatch
from ksweep.launch.slurm.job_output import JobOutput, parse_output
from ksweep.launch.slurm.polling import SlurmState, slurm_states
from ksweep.utils.errors import ErrorClass, end_state
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

JobState = Literal["waiting", "running", "finished", "failed", "stopped", "unknown"]
LIVE_STATES: tuple[JobState, ...] = ("waiting", "running", "unknown")
"""States in which a job may still bring its results: its cells are not given to another job."""
SAW_ANOTHER_END: tuple[ErrorClass, ...] = ("dead rank", "killed", "node failure")
"""Classes in the outcome of a rank that saw another one end and does not know why."""


@dataclass(frozen=True)
class JobStatus:
    """What a job is doing or how it ended, and the reason for saying so."""

    state: JobState
    reason: str
    kind: str = ""
    """Class of the end (ksweep.utils.errors.END_CLASSES); empty while the job is live and where it finished."""
    outcome: Outcome | None = None
    """The outcome of the rank that explains the job's end, where a rank has written one."""
    recheck: Recheck = ""
    """Set where the job only seems to have ended, which counts once a later check agrees. It names what may appear until then:
    the job, back in the queue; its record, written but not yet visible from here; either."""
    from_silence: bool = False
    """Whether only silence says so, of processes of which nothing proves that they are dead. It counts once it was watched for
    SILENCE_SECONDS, by this process's own clock: those of two machines may differ, or be set."""


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
    """Ranks that count as alive: by `rank_records.is_alive` where the job is local, by a fresh heartbeat on Slurm."""
    unproven_ranks: frozenset[int] = frozenset()
    """Ranks of a local job that are silent, and of which nothing proves that they are dead."""
    outcomes: Sequence[Outcome] = ()
    launcher: str | None = None
    """The process that is about to start the job, while it lives."""
    launcher_silent: bool = False
    """Nothing proves that this process has ended: it runs on another machine or in another container."""
    controller: Literal["", "alive", "ended", "silent"] = ""
    """submitit's process that starts the ranks; empty where there was none, silent as a launcher."""
    start_raised: bool = False
    """A rank's process raised an exception before its first heartbeat; submitit has kept it."""
    machine_restarted: bool = False
    """A machine of this name was started anew after a rank had run on it."""
    submission_interrupted: bool = False
    """Its launcher died while it handed the job to Slurm."""
    slurm_id: str | None = None
    slurm: SlurmState | None = None
    """What Slurm says of the job; None while it has not been asked."""
    requeued: str = ""
    """Why the newest start put itself back into the queue."""
    cancel_requested: bool = False
    output: JobOutput = field(default_factory=JobOutput)
    """What Slurm wrote into the output of the ranks or of the batch script, and how that ends."""


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
        return _status_before_first_heartbeat(evidence)
    # 3. A failed rank ends the job; the first failure is its cause.
    if failure is not None:
        return _status_of_failure(failure, evidence)
    # 4. The job has finished when every rank says so.
    if len(evidence.outcomes) == evidence.num_ranks and all(o.status == "finished" for o in evidence.outcomes):
        return JobStatus("finished", "every rank finished", outcome=min(evidence.outcomes, key=lambda o: o.rank))
    # 5. Ranks stopped. On Slurm the job may be on its way back into the queue, whatever the others still do: Slurm knows.
    if stopped is not None and not evidence.local:
        return _status_from_slurm(evidence, stopped.message)
    if stopped is not None and len(evidence.outcomes) == evidence.num_ranks:
        return JobStatus("stopped", stopped.message, "cancelled" if evidence.cancel_requested else "stopped", stopped)
    # 6. A live rank that has not ended: the job runs.
    if any(h.rank in evidence.live_ranks for h in running):
        newest = max(running, key=lambda h: h.time)
        counted = f" {newest.done}/{newest.total}" if newest.total else ""
        return JobStatus("running", f"{newest.phase}{counted}")
    # 7. Silence. On this machine it means that the process is gone; on Slurm somebody else has to explain it.
    return _status_of_silence(evidence, running) if evidence.local else _status_from_slurm(evidence, "")


def class_of_death(dead: Sequence[Heartbeat], *, node_lost: bool = False) -> ErrorClass:
    """Return the class of an end that ranks did not record, from their last heartbeats.

    A rank that had begun its cell may have been killed for what the cell needs, and is not run again unasked. One that was killed
    before, while it started, says nothing of its cell.
    """
    if node_lost:
        return "node failure"
    return "dead rank" if any(heartbeat.has_begun for heartbeat in dead) else "killed"


def first_failure(outcomes: Sequence[Outcome]) -> Outcome | None:
    """Return the earliest failure, which explains the others; out of memory takes precedence over the end of another rank."""
    failed = sorted((o for o in outcomes if o.status == "failed"), key=lambda o: o.time)
    if failed and failed[0].kind in SAW_ANOTHER_END:
        return next((o for o in failed if o.kind == "out of memory"), failed[0])
    return failed[0] if failed else None


def _status_before_first_heartbeat(evidence: JobEvidence) -> JobStatus:
    """Return the status of a job that no rank has begun; its end is unproven where that of its launcher or controller is."""
    unproven = evidence.controller == "silent" or (not evidence.controller and evidence.launcher_silent)
    status = _status_before_first_rank(evidence)
    return replace(status, recheck="record", from_silence=True) if unproven and status.state not in LIVE_STATES else status


def _status_before_first_rank(evidence: JobEvidence) -> JobStatus:
    if evidence.controller == "alive":
        return JobStatus("waiting", "its ranks are starting")
    if evidence.controller:
        quoted = _quoted(evidence.output)
        if evidence.start_raised:
            return JobStatus("failed", f"it ended before any rank began{quoted}", "setup")
        return JobStatus("stopped", f"it ended before any rank began (killed, or out of memory){quoted}", "killed")
    if evidence.launcher is not None:
        return JobStatus("waiting", f"its launcher ({evidence.launcher}) has yet to start it")
    if evidence.submission_interrupted:
        return JobStatus("unknown", "its launcher died while it handed it over; the sweep's own command asks Slurm for it")
    return JobStatus("stopped", "its launcher ended before it was started", "never submitted")


def _status_of_failure(failure: Outcome, evidence: JobEvidence) -> JobStatus:
    """Return the status of a failed job: a rank that sees another die does not know the cause, but Slurm's output may."""
    status = JobStatus(end_state(failure.kind), f"{failure.kind}: {failure.message}", failure.kind, failure)
    line = evidence.output.memory_line
    if evidence.local or failure.kind not in SAW_ANOTHER_END or not line:
        return status
    return replace(status, state="failed", kind="out of memory", reason=f"out of memory ({line}); {status.reason}")


def _status_of_silence(evidence: JobEvidence, dead: Sequence[Heartbeat]) -> JobStatus:
    """Return the status of a job on this machine of which some ranks have ended without an outcome, and none runs."""
    ended = {o.rank for o in evidence.outcomes}
    silent = ", ".join(str(rank) for rank in range(evidence.num_ranks) if rank not in ended)
    reason = f"rank {silent} of {evidence.num_ranks} is gone without an outcome"
    unproven = any(heartbeat.rank in evidence.unproven_ranks for heartbeat in dead)
    recheck: Recheck = "record" if unproven else ""
    if evidence.cancel_requested:
        return JobStatus("stopped", f"cancelled; {reason}", "cancelled", recheck=recheck, from_silence=unproven)
    kind = class_of_death(dead, node_lost=evidence.machine_restarted)
    cause = "its machine was restarted" if evidence.machine_restarted else "killed, or out of memory"
    cause += "; silent, where its process is not seen from here" if unproven else ""
    before = " before it had begun a cell" if kind == "killed" else ""
    return JobStatus(end_state(kind), f"{reason}{before} ({cause})", kind, recheck=recheck, from_silence=unproven)


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
    entry, output = slurm.accounted, evidence.output
    state = entry.state if entry is not None else slurm.queued.state if slurm.queued is not None else ""
    where = f" on {entry.nodes}" if entry is not None and entry.nodes not in ("", "None assigned") else ""
    says = f"Slurm: {state}{where} (job {number})" if state else f"job {number} has left the queue"
    # 1. Without accounting, slurmstepd's last line in the job's output says why Slurm ended it.
    state = state or output.ended_as
    # 2. Slurm or a user ended it.
    if evidence.cancel_requested or state.startswith("CANCELLED"):
        return JobStatus("stopped", f"cancelled; {says}", "cancelled")
    if state == "OUT_OF_MEMORY" or (output.memory_line and state in ("FAILED", "")):
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
    if not (evidence.heartbeats or evidence.outcomes) and (state or output.last_lines):
        reason = f"it ended before any rank began, in the lines of `setup` or at srun; {says}{code}{_quoted(output)}"
        return JobStatus("failed", reason, "setup", recheck="record" if state else "either")
    ended = {o.rank for o in evidence.outcomes}
    kind = class_of_death([h for h in evidence.heartbeats if h.rank not in ended])
    before = " before it had begun a cell" if kind == "killed" else ""
    if state == "COMPLETED":
        reason = f"it ended without an outcome{before} (not to be seen from here yet?); {says}"
        return JobStatus(end_state(kind), reason, kind, recheck="record")
    if state:
        reason = f"a rank ended without an outcome{before}; {says}{code}{_quoted(output)}"
        return JobStatus(end_state(kind), reason, kind, recheck="record")
    # 5. It has vanished.
    reason = f"job {number} is neither in the queue nor in accounting (cancelled while it waited, or killed)"
    return JobStatus("stopped", reason, "lost", recheck="either")


def _quoted(output: JobOutput) -> str:
    return f'; last lines: "{output.last_lines}"' if output.last_lines else ""


# Gathering the evidence


def job_status(job: Job) -> JobStatus:
    """Return the status of one job."""
    return job_statuses([job]).get(job.id, DIRECTORY_GONE)


def job_statuses(jobs: Sequence[Job]) -> dict[str, JobStatus]:
    """Return the statuses of jobs by id; Slurm is asked once for all that are silent. Nothing is written.

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
    status = status_of(gather_evidence(job))
    return None if status is None else _recheck(job, status, time.monotonic())


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
    launcher = spec.get("launcher") if unstarted else None
    launcher_life = "ended" if launcher is None else life_in_record(launcher)
    controller = _controller(job, launcher) if unstarted and local else ""
    ended = {o.rank for o in outcomes}
    open_ranks = [h for h in heartbeats if h.rank not in ended]
    live = frozenset(h.rank for h in open_ranks if (job.is_alive(h) if local else _is_fresh(h)))
    silent = [h for h in open_ranks if local and h.rank not in live]
    failure = first_failure(outcomes)
    # Reading the log lists the output of a whole array: not for each of its elements that wait in the queue.
    left_queue = slurm is not None and slurm.reachable and not _is_queued(slurm)
    wants_output = left_queue or (failure is not None and failure.kind in SAW_ANOTHER_END)
    return JobEvidence(
        num_ranks=spec["num_ranks"], local=local, heartbeats=heartbeats, outcomes=outcomes, slurm_id=slurm_id, slurm=slurm,
        live_ranks=live, unproven_ranks=frozenset(h.rank for h in silent if job.life_of_rank(h) == "unknown"),
        launcher=f"process {launcher['pid']} on {launcher['host']}" if launcher and launcher_life == "alive" else None,
        launcher_silent=launcher_life == "silent",
        controller=controller, start_raised=controller == "ended" and any(job.path.glob("*_result.pkl")),
        machine_restarted=any(map(_restarted_since, silent)),
        submission_interrupted=unstarted and launcher_life != "alive" and sbatch.is_in_interrupted_submission(job),
        requeued=(job.read_note("requeued", attempt) or {}).get("why", "") if slurm is not None else "",
        cancel_requested=job.cancel_requested(),
        output=parse_output(_log_end(job)) if (not local and wants_output) or controller == "ended" else JobOutput(),
    )  # fmt: skip


def _is_fresh(heartbeat: Heartbeat) -> bool:
    """Return whether a heartbeat is new. One from the future is not: a clock was set back, and Slurm is asked."""
    return abs(time.time() - heartbeat.time) < FRESH_HEARTBEAT_SECONDS


def _restarted_since(heartbeat: Heartbeat) -> bool:
    """Return whether a machine of this name was started anew since; heartbeats of earlier versions have only the clock's word."""
    process = heartbeat.process
    if process.host != socket.gethostname():
        return False
    return process.boot_id != boot_id() if process.boot_id else psutil.boot_time() > heartbeat.time


def _controller(job: Job, launcher: dict[str, Any] | None) -> Literal["", "alive", "ended", "silent"]:
    """Return whether the process runs that starts the ranks of a local job."""
    if (record := job.read_note("controller")) is not None:
        return life_in_record(record)
    if launcher is not None and life_of(gather_life(identity_in(launcher))) == "unknown":
        return ""  # pids of another machine mean nothing here
    # No note: a job of an earlier version, or its launcher was killed before it. submitit names its pickle by the process's id.
    pids = [name for path in job.path.glob("*_submitted.pkl") if (name := path.name.partition("_")[0]).isdigit()]
    if not pids:
        return ""
    return "alive" if any(_is_controller_of(job, int(pid)) for pid in pids) else "ended"


def _is_controller_of(job: Job, pid: int) -> bool:
    """Return whether a process was started with the job's directory as an argument, as submitit's controller is."""
    try:
        return any(Path(word).name == job.id for word in psutil.Process(pid).cmdline())  # a zombie has none
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False
    except psutil.AccessDenied:
        return True


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

_seems_gone: dict[Path, tuple[float, float]] = {}
"""Job directory -> when the job first seemed to have ended (monotonic), to Slurm or by silence, and its last activity by then."""


def _recheck(job: Job, status: JobStatus, asked_at: float) -> JobStatus:
    """Return `unknown` for a job that seems to have ended, until it has seemed so to this process for long enough."""
    if not status.recheck:
        _seems_gone.pop(job.path, None)
        return status
    activity = job.last_activity()
    since, activity_then = _seems_gone.get(job.path, (asked_at, activity))
    if activity_then != activity:
        since = asked_at
    _seems_gone[job.path] = (since, activity)
    if asked_at - since >= _recheck_seconds(job, status):
        return status
    return replace(status, state="unknown", reason=f"{status.reason}; looking again before believing it")


def _recheck_seconds(job: Job, status: JobStatus) -> float:
    """Return how long a job must seem to have ended: until a requeue, a heartbeat or its final record would be visible here."""
    if status.from_silence:
        return SILENCE_SECONDS
    record = 0.0 if status.recheck == "queue" or on_local_disk(job.path) else RECORD_RECHECK_SECONDS
    return max(record, 0.0 if status.recheck == "record" else RECHECK_SECONDS)
