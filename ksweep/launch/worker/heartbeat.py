"""The heartbeat of a rank: a thread that proves it alive, watches the other ranks, and ends this one if they cannot go on."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import IO

from ksweep.launch.job import Job
from ksweep.launch.rank_records import SILENCE_SECONDS, Heartbeat, HeartbeatWatch, Outcome, process_record
from ksweep.launch.status import class_of_death
from ksweep.launch.worker.requeue import StoppedStart, fail_if_stuck, requeue_job

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 1.0
HEARTBEAT_SECONDS_ON_SLURM = 2.0
"""Longer, because heartbeats go to a file system there that many share."""
FORCE_STOP_AFTER_SECONDS = 1.0
"""A second signal this soon is the same request, sent to the process and to its group; a later one ends the rank at once."""
ROOT_CAUSE_SECONDS = 3.0
"""How long a rank whose connection broke looks for another rank that ended first."""
CONNECTION_ERRORS = (
    "RuntimeError", "DistError", "DistBackendError", "DistNetworkError", "DistStoreError", "ConnectionError",
    "ConnectionResetError", "ConnectionAbortedError", "BrokenPipeError", "TimeoutError",
)  # fmt: skip
"""What a rank raises when another has closed its connection; any other error is its own and is reported at once."""
PEER_OUTCOME_GRACE_SECONDS = 2.5
"""How long a failed rank stays, so that the others can write their outcomes before Slurm kills them with it."""
UNIT_GRACE_SECONDS = 10.0
"""How long a rank may take to finish its work unit after another has stopped."""
STALL_SECONDS = 15.0
"""A rank that has not checked the others for this long was stalled itself: their silence meanwhile proves nothing."""
MAX_JOIN_SECONDS = 1800.0
"""A rank that has written nothing this long after another started will not come."""


class HeartbeatThread:
    """Publishes the heartbeats of one rank, and ends the rank when another one has failed, stopped or died."""

    def __init__(self, job: Job, rank: int, world_size: int, attempt: int = 0, slurm_id: str = "") -> None:
        """Prepare the thread; it runs once the context is entered."""
        self.job, self.rank, self.world_size, self.attempt, self.slurm_id = job, rank, world_size, attempt, slurm_id
        process = process_record()
        self.latest = Heartbeat(
            rank=rank, **process, attempt=attempt, slurm_id=slurm_id, began=process["time"], log_began=job.log_bytes(rank)
        )
        self.stopping, self._stop_time, self.signal = False, 0.0, 0
        self.waiting = False
        """Whether this rank waits at a barrier and has no work unit to finish."""
        self._phase = ("", 0.0, 0)
        """Name of the phase, when it began (monotonic), and units done by then."""
        self._seconds: Mapping[str, float] = {}
        self._peer_stopped = 0.0
        """When another rank was first seen to have stopped (monotonic); 0 before."""
        self._entered = self._checked = time.monotonic()
        self._watch = HeartbeatWatch()
        """Of ranks of which nothing is proven."""
        self._lock: IO[bytes] | None = None
        """Open, and so locked, while this rank lives."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ksweep-heartbeat", daemon=True)

    def __enter__(self) -> HeartbeatThread:
        self.publish_heartbeat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._release_lock()

    def handle_stop_signal(self, number: int, _frame: object) -> None:
        """Signal handler: the work loop stops after its unit; a second signal ends the rank at once."""
        now = time.monotonic()
        # Slurm repeats its signals; from anybody else a second one is meant.
        if self.stopping and now - self._stop_time > FORCE_STOP_AFTER_SECONDS and not self.slurm_id:
            self._write_outcome(Outcome(rank=self.rank, status="stopped", message=f"ended at once by signal {number}"))
            os._exit(128 + number)
        if not self.stopping:
            log.warning("signal %d: stopping at the end of the current work unit", number)
            self._stop_time, self.stopping, self.signal = now, True, number

    def update(self, phase: str, done: int, total: int, numbers: dict[str, float]) -> None:
        """Set the progress that the next heartbeat reports."""
        if phase != self._phase[0]:
            self._phase = (phase, time.monotonic(), done)
        _, began, first = self._phase
        rate = (done - first) / max(1e-9, time.monotonic() - began)
        self.latest = replace(self.latest, phase=phase, done=done, total=total, numbers=numbers, rate=rate)

    def begin_cell(self, key: str, seconds: Mapping[str, float]) -> None:
        """Attribute heartbeats to this cell; `seconds` by phase goes on counting."""
        self._seconds = seconds
        self.latest = replace(self.latest, cell=key, cell_began=time.time())
        self.publish_heartbeat()  # whether a rank had begun its cell decides whether the cell is run again after its death

    def stopped_start(self) -> StoppedStart:
        """Return the facts that decide whether this job is requeued."""
        current = self.latest  # `total` counts the draws that were missing at the start, but all activations
        progress_marker = [current.phase, current.total, current.done if current.phase == "activations" else 0]
        return StoppedStart(self.job, self.attempt, self.slurm_id, self.signal, current.phase, progress_marker)

    def attribute_failure(self, outcome: Outcome) -> Outcome:
        """Return the outcome of a rank whose connection broke with the cause: another rank that failed, stopped or died.

        Any other outcome is returned as it is.
        """
        if outcome.kind != "bug" or outcome.error_type not in CONNECTION_ERRORS or self.world_size == 1:
            return outcome
        deadline = time.monotonic() + ROOT_CAUSE_SECONDS
        while time.monotonic() < deadline:
            others = (o for o in self.job.outcomes(self.attempt) if o.rank != self.rank and o.status != "finished")
            if (first := next(others, None)) is not None:
                message = f"rank {first.rank} {first.status}; what this one saw of it: {outcome.message}"
                return replace(outcome, status="stopped", kind="", message=message)
            if (dead := self._find_dead_rank()) is not None:
                return replace(outcome, kind=self._dead_rank_class(dead), message=self._dead_rank_message(dead), error_type="")
            time.sleep(0.1)
        return outcome

    def finish(self, outcome: Outcome) -> None:
        """Publish the last heartbeat and the outcome."""
        self._ended.set()
        try:
            self.publish_heartbeat()
            self._write_outcome(outcome)
        finally:
            self._release_lock()

    def _release_lock(self) -> None:
        """Unlock: this process may live on, as a notebook does."""
        if self._lock is not None:
            self._lock.close()

    def _write_outcome(self, outcome: Outcome) -> None:
        self.job.write_outcome(replace(outcome, attempt=self.attempt))

    def wait_for_other_ranks(self, seconds: float) -> None:
        """Wait until every other rank has written its outcome or one is dead, for so many seconds at most."""
        deadline = time.monotonic() + seconds
        while (
            time.monotonic() < deadline and len(self.job.outcomes(self.attempt)) < self.world_size and not self._find_dead_rank()
        ):
            time.sleep(0.1)

    def publish_heartbeat(self) -> None:
        """Write the current heartbeat; before the first one, lock the file that proves this rank's life to other containers."""
        if self._lock is None:
            self._lock = self.job.lock_rank(self.rank, self.attempt)
            self.latest = replace(self.latest, lock_device=0 if self._lock is None else os.fstat(self._lock.fileno()).st_dev)
        with suppress(OSError):  # a full disk must not kill a rank that could still finish its unit
            self.job.write_heartbeat(replace(self.latest, time=time.time(), seconds=dict(self._seconds)))

    def _run(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS_ON_SLURM if self.slurm_id else HEARTBEAT_SECONDS):
            self.publish_heartbeat()
            try:
                self._check_other_ranks()
            except (OSError, ValueError) as error:  # one failed read must not silence this rank for good
                log.warning("the other ranks cannot be seen: %s", error)

    def _check_other_ranks(self) -> None:
        """End this rank if the job's files show that its work can no longer be completed or is no longer wanted."""
        # 1. A newer start of the job runs: this one is left over from an older.
        if (newest := self.job.attempt()) > self.attempt:
            log.error("start %d of this job is running elsewhere: ending this rank of start %d", newest, self.attempt)
            os._exit(1)
        # 2. The job was finalized while it ran. That is a failure, not a stop: a stopped job puts itself back into the queue.
        if (final := self.job.final_status()) is not None:
            reason = f"the job was finalized while it ran ({final.get('reason')}): its cells belong to another by now"
            self._abort("lost", reason)
        # 3. Another rank failed or stopped. Failures first: ranks that only followed one have stopped, and a stop is requeued.
        for outcome in sorted(self.job.outcomes(self.attempt), key=lambda o: o.status != "failed"):
            if outcome.status != "finished" and outcome.rank != self.rank:
                self._follow_rank(outcome)
        # 4. Another rank died without an outcome.
        if (dead := self._find_dead_rank()) is not None:
            self._abort(self._dead_rank_class(dead), self._dead_rank_message(dead))
        # 5. Another rank never started.
        if time.monotonic() - self._entered > MAX_JOIN_SECONDS and (missing := self._missing_ranks()):
            ranks, minutes = ", ".join(map(str, missing)), MAX_JOIN_SECONDS / 60
            self._abort("dead rank", f"rank {ranks} of {self.world_size} has not started within {minutes:.0f} minutes")

    def _find_dead_rank(self) -> Heartbeat | None:
        """Return the last heartbeat of a rank that is silent and has written no outcome; None if there is no such rank."""
        now = time.monotonic()
        if now - self._checked > STALL_SECONDS:
            self._watch.forget()
        self._checked = now
        silent = [h for h in self.job.heartbeats(self.attempt) if h.rank != self.rank and self._is_silent(h)]
        # Outcomes are read last: a rank that ended between the two reads has written its own by now.
        ended = {o.rank for o in self.job.outcomes(self.attempt)} if silent else set()
        return next((h for h in silent if h.rank not in ended), None)

    def _is_silent(self, heartbeat: Heartbeat) -> bool:
        """Return whether a rank is proven dead, or, where nothing is proven, has been silent by this process's own clock.

        The clocks of two nodes may differ by minutes.
        """
        if (life := self.job.life_of_rank(heartbeat)) != "unknown":
            return life == "dead"
        return self._watch.seconds_unchanged(heartbeat) >= SILENCE_SECONDS

    def _missing_ranks(self) -> list[int]:
        seen = {h.rank for h in self.job.heartbeats(self.attempt)} | {o.rank for o in self.job.outcomes(self.attempt)}
        return sorted(set(range(self.world_size)) - seen - {self.rank})

    def _follow_rank(self, other: Outcome) -> None:
        """Stop too, because another rank has failed or stopped: nothing that this one waits for will come.

        After a stop this rank may finish its own work unit first.
        """
        if self._ended.is_set():
            return
        if other.status == "stopped":
            self._peer_stopped = self._peer_stopped or time.monotonic()
            self.stopping = True
            if not self.waiting and time.monotonic() - self._peer_stopped < UNIT_GRACE_SECONDS:
                return
        comes_back = bool(self.slurm_id) and other.status == "stopped"
        outcome = Outcome(rank=self.rank, status="stopped", message=f"rank {other.rank} {other.status}")
        if comes_back and self.rank == 0:
            outcome = fail_if_stuck(self.stopped_start(), outcome)
        self._exit_process(outcome, comes_back=comes_back and outcome.status == "stopped")

    def _abort(self, kind: str, message: str) -> None:
        log.error("%s: ending rank %d", message, self.rank)
        self._exit_process(Outcome(rank=self.rank, status="failed", kind=kind, message=message), comes_back=False)

    def _exit_process(self, outcome: Outcome, *, comes_back: bool) -> None:
        """End this process, even if its outcome cannot be written: on a full disk it cannot."""
        try:
            self._write_outcome(outcome)
            if comes_back and self.rank == 0:
                requeue_job(self.stopped_start())
        except OSError:
            log.exception("the outcome of rank %d could not be written", self.rank)
        finally:
            os._exit(0 if comes_back else 1)

    def _dead_rank_class(self, dead: Heartbeat) -> str:
        """Return the class of a dead rank's end; srun ends a job when a task dies, so silence elsewhere is a lost node."""
        return class_of_death([dead], node_lost=bool(self.slurm_id) and dead.host != self.latest.host)

    @staticmethod
    def _dead_rank_message(dead: Heartbeat) -> str:
        rank = f"rank {dead.rank} (pid {dead.pid} on {dead.host})"
        return f"{rank} died without an outcome during {dead.phase!r} (killed, or out of memory)"
