"""What has become of a job: told by its own files; Slurm is asked only about one that is silent."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from ksweep.launch.job import READ_ERRORS, Job
from ksweep.launch.rank_records import Heartbeat, Outcome, first_failure, is_alive
from ksweep.launch.slurm import commands, sbatch
from ksweep.launch.slurm.polling import SlurmState, slurm_states
from ksweep.utils.files import on_local_disk

FRESH_HEARTBEAT_SECONDS = 20.0
"""A heartbeat younger than this says that the job runs; Slurm is not asked."""
RECHECK_SECONDS = 20.0
"""A job that has vanished, or whose node failed, is believed to be gone only when it still is so much later.

Seen on Slurm 22: NODE_FAIL stands for 5 s before the job is back in the queue; a requeued job was away for less than 2 s.
"""
RECORD_RECHECK_SECONDS = 75.0
"""The same for a job that may well have said how it ended: on a network file system this node may not see its record yet.

NFS believes what it knows of a directory for up to 60 s (acdirmax); a file that another node has put there appears after that.
"""
Recheck = Literal["", "queue", "record", "either"]
WORDS_LINES, WORDS_BYTES = 50, 4096
ENDED_LINES = 5
"""Further up may be the end of an earlier start: the output goes on in the same file."""
QUOTED_LINES, QUOTED_CHARACTERS = 3, 300

JobState = Literal["waiting", "running", "finished", "failed", "stopped", "unknown"]
LIVE_STATES: tuple[JobState, ...] = ("waiting", "running", "unknown")
"""States in which a job may still bring its results: its cells are not given to another."""

OUT_OF_MEMORY = re.compile(
    r"oom[-_ ]kill|out of memory|OutOfMemory|Cannot allocate memory|exceeded (job |step )?memory limit", re.IGNORECASE
)
"""The words of the kernel, of Python and torch, and of Slurm where it looks itself (JobAcctGatherParams=OverMemoryKill)."""
KILLED_FOR_MEMORY = re.compile(
    r"^(?:slurmstepd|srun)\b.*(?:oom[-_ ]kill|out of memory|exceeded (?:job |step )?memory limit).*$",
    re.IGNORECASE | re.MULTILINE,
)
"""Slurm's own lines only: a rank that survives another says "killed, or out of memory", and one that halves its batch."""
ENDED_BY_SLURM = re.compile(r"\*\*\* JOB \S+ ON \S+ CANCELLED AT \S+ (?:DUE TO ([A-Z ]+?) )?\*\*\*")


@dataclass(frozen=True)
class JobStatus:
    """What has become of a job, and why we say so."""

    state: JobState
    reason: str
    kind: str = ""
    """Class of an ending that was none of our own: timeout, preempted, cancelled, node failure, out of memory, dead rank."""
    outcome: Outcome | None = None
    """The first cause, where a rank has said one."""
    recheck: Recheck = ""
    """It seems to be gone: to be believed only when a later look says the same. What may turn up until then: the job, back in the
    queue; a record, written but not seen from here yet; either."""


DIRECTORY_GONE = JobStatus("stopped", "its directory is gone", "lost")


def job_status(job: Job) -> JobStatus:
    """What has become of one job."""
    return job_statuses([job]).get(job.id, DIRECTORY_GONE)


def job_statuses(jobs: Sequence[Job]) -> dict[str, JobStatus]:
    """What has become of jobs, by id; Slurm is asked once for all that are silent.

    One whose files cannot be read is unknown, whatever the others are; one whose directory is gone is left out.
    """
    told = {job.id: _guarded(job, partial(_from_files, job)) for job in jobs}
    silent = [job for job in jobs if told[job.id] is None]
    answers = _answers(silent)
    found = {job.id: told[job.id] or _guarded(job, partial(_of_silent, job, answers[job.id])) for job in jobs}
    return {name: job_status for name, job_status in found.items() if job_status is not None and job_status is not DIRECTORY_GONE}


def _answers(silent: Sequence[Job]) -> dict[str, SlurmState]:
    try:
        return slurm_states(silent)
    except READ_ERRORS:  # a file was torn between two looks at it: the next look tells more
        return {job.id: SlurmState(reachable=False) for job in silent}


def _guarded(job: Job, question: Callable[[], JobStatus | None]) -> JobStatus | None:
    try:
        return question()
    except READ_ERRORS as error:
        if not (job.path / "job.json").exists():
            return DIRECTORY_GONE
        return JobStatus("unknown", f"its files cannot be read ({type(error).__name__}: {error})")


def _of_silent(job: Job, answer: SlurmState) -> JobStatus:
    first = explain(job, answer)
    if first.state not in LIVE_STATES and (told := _from_files(job)) is not None:
        return told  # it has spoken while Slurm was asked
    return _second_look(job, first, answer.at)


def _from_files(job: Job) -> JobStatus | None:
    settled = job.read_note("settled")
    if settled is not None and "state" in settled:
        return JobStatus(settled["state"], settled["reason"], settled.get("kind", ""))
    attempt, spec = job.attempt(), job.spec()
    beats, endings = job.heartbeats(attempt), job.outcomes(attempt)
    if not beats and not endings and job.slurm_id() is None:
        return _not_begun(job, spec)
    local = spec.get("cluster") != "slurm"
    found = told(beats, endings, spec["num_ranks"], local=local)
    return found if found is None or local or found.kind != "dead rank" else or_out_of_memory(found, _last_words(job))


def or_out_of_memory(found: JobStatus, words: str) -> JobStatus:
    """A rank that says that another died does not know of what; Slurm writes it into the job's output."""
    line = KILLED_FOR_MEMORY.search(words)
    return found if line is None else replace(found, kind="out of memory", reason=f"out of memory ({line[0]}); {found.reason}")


def _not_begun(job: Job, spec: dict[str, Any]) -> JobStatus:
    launcher = spec.get("launcher")
    if launcher is not None and is_alive(Heartbeat(rank=0, **launcher)):
        return JobStatus("waiting", f"its launcher (process {launcher['pid']} on {launcher['host']}) has yet to start it")
    if sbatch.is_in_interrupted_submission(job):
        return JobStatus("unknown", "its launcher died while it handed it over; the sweep's own command asks Slurm for it")
    return JobStatus("stopped", "its launcher ended before it was started", "never submitted")


def told(beats: Sequence[Heartbeat], endings: Sequence[Outcome], num_ranks: int, *, local: bool) -> JobStatus | None:
    """What a job's files say by themselves; None where they are silent and somebody else has to be asked."""
    first = first_failure(endings)
    if first is not None:
        return JobStatus("failed", f"{first.kind}: {first.message}", first.kind, first)
    if len(endings) == num_ranks and all(e.status == "finished" for e in endings):
        return JobStatus("finished", "every rank finished", outcome=min(endings, key=lambda e: e.rank))
    stopped = next((e for e in endings if e.status == "stopped"), None)
    if stopped is not None:
        if not local:
            return None  # it may be on its way back into the queue: Slurm knows
        if len(endings) == num_ranks:
            return JobStatus("stopped", stopped.message, "stopped", stopped)
    ended = {e.rank for e in endings}
    running = [b for b in beats if b.rank not in ended]
    if any(_speaks(b, local) for b in running):
        newest = max(running, key=lambda b: b.time)
        counted = f" {newest.done}/{newest.total}" if newest.total else ""
        return JobStatus("running", f"{newest.phase}{counted}")
    if not local:
        return None
    silent = sorted(set(range(num_ranks)) - ended)
    message = f"rank {', '.join(map(str, silent))} of {num_ranks} is gone without a terminal record (killed, or out of memory)"
    return JobStatus("stopped", message, "killed")


def _speaks(beat: Heartbeat, local: bool) -> bool:
    return is_alive(beat) if local else time.time() - beat.time < FRESH_HEARTBEAT_SECONDS


@dataclass(frozen=True)
class Traces:
    """What a silent job has left behind."""

    requeued: str = ""
    """Why it put itself back into the queue."""
    asked: bool = False
    """Somebody has cancelled it."""
    stopped: str = ""
    """What a rank said that stopped."""
    spoke: bool = True
    """Whether any rank has ever said a word."""
    words: str = ""
    """The last lines of its output."""


def explain(job: Job, answer: SlurmState) -> JobStatus:
    """A silent job, with what Slurm says of it."""
    number = job.slurm_id()
    if number is None:  # files alone decide about those
        return JobStatus("unknown", "its submission is not settled yet")
    endings = job.outcomes()
    traces = Traces(
        requeued=(job.read_note("requeued", job.attempt()) or {}).get("why", ""), asked=job.cancel_requested(),
        stopped=next((e.message for e in endings if e.status == "stopped"), ""), spoke=bool(endings or job.heartbeats()),
        # Looked up for those that are gone: a listing of the output of a whole array, for each of its elements that wait.
        words=_last_words(job) if answer.reachable and not _is_queued(answer) else "",
    )  # fmt: skip
    return explained(number, answer, traces)


def _is_queued(answer: SlurmState) -> bool:
    return answer.queued is not None and answer.queued.state in (*commands.RUNNING_STATES, *commands.WAITING_STATES)


def _last_words(job: Job) -> str:
    """What the batch script or a rank said last on standard error, or else on standard output."""
    try:
        if said := job.log_tail(WORDS_LINES).strip():
            return said
        outs = [path.read_bytes()[-WORDS_BYTES:] for path in job.logs() if path.suffix == ".out"]
    except OSError:  # taken away meanwhile
        return ""
    return b"\n".join(outs).decode(errors="replace").strip()


def explained(number: str, answer: SlurmState, traces: Traces) -> JobStatus:
    """The same from values alone."""
    if answer.elsewhere:
        return JobStatus("unknown", f"silent; {answer.elsewhere}: ask there (job {number})")
    if not answer.reachable:
        return JobStatus("unknown", f"silent, and Slurm does not answer (job {number})")
    if answer.queued is not None:
        entry = answer.queued
        again = f", requeued: {traces.requeued}" if traces.requeued else ""
        if entry.state in commands.RUNNING_STATES:
            return JobStatus("running", f"silent; Slurm says {entry.state} (job {number}{again})")
        if entry.state in commands.WAITING_STATES:
            return JobStatus("waiting", f"{entry.state.lower()}: {entry.reason} (job {number}{again})")
    state = answer.accounted.state if answer.accounted is not None else answer.queued.state if answer.queued is not None else ""
    gone = _gone(number, state, answer.accounted, traces)
    if not traces.stopped or gone.kind in ("cancelled", "timeout", "preempted", "node failure"):
        return gone
    # Its ranks have said themselves that they stopped; that its shell then ended in whatever way says nothing more.
    return JobStatus("stopped", f"{traces.stopped} (job {number} has left the queue)", "stopped")


def _gone(number: str, state: str, word: commands.AccountingEntry | None, traces: Traces) -> JobStatus:
    where = f" on {word.nodes}" if word is not None and word.nodes not in ("", "None assigned") else ""
    says = f"Slurm: {state}{where} (job {number})" if state else f"job {number} has left the queue"
    oom = OUT_OF_MEMORY.search(traces.words) is not None
    if not state:  # no accounting: slurmstepd wrote into the job's output why it ended it
        state = _state_in(traces.words)
    if traces.asked or state.startswith("CANCELLED"):
        return JobStatus("stopped", f"cancelled; {says}", "cancelled")
    if state == "OUT_OF_MEMORY" or (oom and state in ("FAILED", "")):
        return JobStatus("failed", f"out of memory; {says}", "out of memory")
    if state in ("TIMEOUT", "DEADLINE"):
        return JobStatus("stopped", f"killed at its time limit; {says}", "timeout")
    if state == "PREEMPTED":
        return JobStatus("stopped", f"preempted and not requeued; {says}", "preempted", recheck="queue")
    if state in ("NODE_FAIL", "BOOT_FAIL"):
        return JobStatus("stopped", f"its node failed and it was not requeued; {says}", "node failure", recheck="queue")
    if state in commands.UNFINISHED_STATES:
        return JobStatus(
            "stopped", f"accounting says {state}, but it is not in the queue (job {number})", "lost", recheck="queue"
        )
    code = f", exit code {word.exit_code}" if word is not None and word.exit_code else ""
    if state == "COMPLETED":
        reason = f"it ended without a terminal record (not to be seen from here yet?); {says}"
        return JobStatus("failed", reason, "dead rank", recheck="record")
    if not traces.spoke and (state or traces.words):
        reason = f"it ended before any rank began, in the lines of `setup` or at srun; {says}{code}{_quoted(traces.words)}"
        return JobStatus("failed", reason, "setup", recheck="record" if state else "either")
    if state:
        reason = f"a rank ended without a terminal record; {says}{code}{_quoted(traces.words)}"
        return JobStatus("failed", reason, "dead rank", recheck="record")
    reason = f"job {number} is neither in the queue nor in accounting (cancelled while it waited, or killed)"
    return JobStatus("stopped", reason, "lost", recheck="either")


def _state_in(words: str) -> str:
    """What slurmstepd wrote when it ended a job, as accounting would have said it; empty where it wrote nothing.

    Of a STEP it says CANCELLED too when srun ends it because one of its tasks was killed.
    """
    found = ENDED_BY_SLURM.search("\n".join(words.splitlines()[-ENDED_LINES:]))
    if found is None:
        return ""
    return {"TIME LIMIT": "TIMEOUT", "PREEMPTION": "PREEMPTED", "NODE FAILURE": "NODE_FAIL"}.get(found[1] or "", "CANCELLED")


def _quoted(words: str) -> str:
    lines = [line.strip() for line in words.splitlines() if line.strip()][-QUOTED_LINES:]
    return f'; last lines: "{" | ".join(lines)[-QUOTED_CHARACTERS:]}"' if lines else ""


def _second_look(job: Job, first: JobStatus, said: float) -> JobStatus:
    """A job that seems to be gone is `unknown` until Slurm has said so for a while."""
    before = job.read_note("seems-gone")
    if not first.recheck:
        if before is not None:
            (job.path / "seems-gone.json").unlink(missing_ok=True)
        return first
    sign = job.last_activity()
    if before is None or before["sign"] != sign:
        before = {"since": said, "sign": sign}
        job.write_note("seems-gone", before)
    if said - before["since"] >= _patience(job, first.recheck):
        return first
    return replace(first, state="unknown", reason=f"{first.reason}; looking again before believing it")


def _patience(job: Job, what: Recheck) -> float:
    """How long Slurm has to say that a job is gone: until it would be back in the queue, or its record would be seen here."""
    record = 0.0 if what == "queue" or on_local_disk(job.path) else RECORD_RECHECK_SECONDS
    return max(record, 0.0 if what == "record" else RECHECK_SECONDS)


def awaiting_second_look(found: Iterable[JobStatus]) -> bool:
    """Whether a little patience would settle something."""
    return any(v.state == "unknown" and v.recheck for v in found)
