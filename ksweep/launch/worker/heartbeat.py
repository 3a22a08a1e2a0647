"""The pulse of a rank: a thread that says "alive", watches the others, and ends the rank when nothing it waits for can come."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from ksweep.launch.job import Job
from ksweep.launch.rank_records import SILENCE_SECONDS, Heartbeat, Outcome, is_alive, this_process
from ksweep.launch.worker.requeue import StoppedStart, fail_if_stuck, requeue_job

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 1.0
HEARTBEAT_SECONDS_ON_SLURM = 2.0
"""Heartbeats there go to a file system that is shared by many."""
FORCE_STOP_AFTER_SECONDS = 1.0
"""A repeated signal within this time is the same wish, sent to the process and to its group."""
ROOT_CAUSE_SECONDS = 3.0
"""How long a failing rank looks whether another one died first."""
CONNECTION_ERRORS = (
    "RuntimeError", "DistError", "DistBackendError", "DistNetworkError", "DistStoreError", "ConnectionError",
    "ConnectionResetError", "ConnectionAbortedError", "BrokenPipeError", "TimeoutError",
)  # fmt: skip
"""What a rank raises when another has closed its connection; any other error is its own, and is told at once."""
PEER_OUTCOME_GRACE_SECONDS = 2.5
"""How long a rank that failed stays, so that the others can say how they ended before Slurm kills them with it."""
UNIT_GRACE_SECONDS = 10.0
"""How long a rank may take to its own border after another has stopped."""
STALL_SECONDS = 15.0
"""A rank that has not looked around for so long was held up itself: what it missed meanwhile says nothing about the others."""
MAX_JOIN_SECONDS = 1800.0
"""A rank that has not said a word so long after another started will not come."""


class HeartbeatThread:
    """Heartbeat and watchdog of one rank: a thread that says "alive" and ends the rank when another one has died."""

    def __init__(self, job: Job, rank: int, world_size: int, attempt: int = 0, slurm_id: str = "") -> None:
        """Nothing runs until the context is entered."""
        self.job, self.rank, self.world_size, self.attempt, self.slurm_id = job, rank, world_size, attempt, slurm_id
        me = this_process()
        self.heartbeat = Heartbeat(
            rank=rank, **me, attempt=attempt, slurm_id=slurm_id, began=me["time"], log_began=job.log_bytes(rank)
        )
        self.stopping, self._asked, self.signal = False, 0.0, 0
        self.waiting = False
        """Whether this rank waits for the others and has nothing of its own to bring to an end."""
        self._phase = ("", 0.0, 0)
        self._seconds: Mapping[str, float] = {}
        self._followed = 0.0
        self._entered = self._looked = time.monotonic()
        self._heard: dict[int, tuple[float, float]] = {}
        """Rank on another host -> its newest heartbeat, and when that was news to this process."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ksweep-pulse", daemon=True)

    def __enter__(self) -> HeartbeatThread:
        self.publish_heartbeat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def handle_stop_signal(self, number: int, _frame: object) -> None:
        """Signal handler: the work loop stops at the next border; a second signal ends the rank at once."""
        now = time.monotonic()
        if (
            self.stopping and now - self._asked > FORCE_STOP_AFTER_SECONDS and not self.slurm_id
        ):  # Slurm repeats itself, people insist
            self._write_outcome(Outcome(rank=self.rank, status="stopped", message=f"ended at once by signal {number}"))
            os._exit(128 + number)
        if not self.stopping:
            log.warning("signal %d: stopping at the end of the unit at hand", number)
            self._asked, self.stopping, self.signal = now, True, number

    def update(self, phase: str, done: int, total: int, numbers: dict[str, float]) -> None:
        """What the next heartbeat will say."""
        if phase != self._phase[0]:
            self._phase = (phase, time.monotonic(), done)
        _, began, first = self._phase
        rate = (done - first) / max(1e-9, time.monotonic() - began)
        self.heartbeat = replace(self.heartbeat, phase=phase, done=done, total=total, numbers=numbers, rate=rate)

    def begin_cell(self, key: str, seconds: Mapping[str, float]) -> None:
        """Which cell the heartbeats tell of from now on; `seconds` goes on counting."""
        self._seconds = seconds
        self.heartbeat = replace(self.heartbeat, cell=key, cell_began=time.time())

    def stopped_start(self) -> StoppedStart:
        """What decides whether this job is put back into the queue."""
        beat = self.heartbeat  # `total` counts the draws that were missing at the start, but all activations
        progress = [beat.phase, beat.total, beat.done if beat.phase == "activations" else 0]
        return StoppedStart(self.job, self.attempt, self.slurm_id, self.signal, beat.phase, progress)

    def attribute_failure(self, ending: Outcome) -> Outcome:
        """A failure that may only be the echo of another rank's (its connection closed) is given to that rank."""
        if ending.kind != "bug" or ending.error_type not in CONNECTION_ERRORS or self.world_size == 1:
            return ending
        deadline = time.monotonic() + ROOT_CAUSE_SECONDS
        while time.monotonic() < deadline:
            first = next((e for e in self.job.outcomes(self.attempt) if e.rank != self.rank and e.status != "finished"), None)
            if first is not None:
                message = f"rank {first.rank} {first.status}; what this one saw of it: {ending.message}"
                return replace(ending, status="stopped", kind="", message=message)
            dead = self._find_dead_rank()
            if dead is not None:
                return replace(ending, kind=self._dead_rank_class(dead), message=self._dead_rank_message(dead), error_type="")
            time.sleep(0.1)
        return ending

    def finish(self, ending: Outcome) -> None:
        """Publish the last heartbeat and the terminal record."""
        self._ended.set()
        self.publish_heartbeat()
        self._write_outcome(ending)

    def _write_outcome(self, ending: Outcome) -> None:
        self.job.write_outcome(replace(ending, attempt=self.attempt))

    def wait_for_other_ranks(self, seconds: float) -> None:
        """Until every other rank has said how it ended, or is dead, or the time is over."""
        deadline = time.monotonic() + seconds
        while (
            time.monotonic() < deadline and len(self.job.outcomes(self.attempt)) < self.world_size and not self._find_dead_rank()
        ):
            time.sleep(0.1)

    def _run(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS_ON_SLURM if self.slurm_id else HEARTBEAT_SECONDS):
            self.publish_heartbeat()
            try:
                self._check_other_ranks()
            except (OSError, ValueError) as error:  # a file system that stutters must not silence this rank for good
                log.warning("the other ranks cannot be seen: %s", error)

    def _check_other_ranks(self) -> None:
        if self.job.attempt() > self.attempt:
            log.error("start %d of this job is running elsewhere: ending this rank of start %d", self.job.attempt(), self.attempt)
            os._exit(1)
        if (settled := self.job.final_status()) is not None:
            # A failure, not a stop: a job that is stopped puts itself back into the queue.
            reason = f"the job was given up while it ran ({settled.get('reason')}): its cells belong to another by now"
            self._abort("lost", reason)
        # A failure first: those that only followed it have stopped, and a job that was stopped comes back.
        for ending in sorted(self.job.outcomes(self.attempt), key=lambda e: e.status != "failed"):
            if ending.status != "finished" and ending.rank != self.rank:
                self._follow_rank(ending)
        dead = self._find_dead_rank()
        if dead is not None:
            self._abort(self._dead_rank_class(dead), self._dead_rank_message(dead))
        if time.monotonic() - self._entered > MAX_JOIN_SECONDS and (absent := self._missing_ranks()):
            named = ", ".join(map(str, absent))
            self._abort(
                "dead rank", f"rank {named} of {self.world_size} has not started within {MAX_JOIN_SECONDS / 60:.0f} minutes"
            )

    def publish_heartbeat(self) -> None:
        """Publish a heartbeat."""
        with suppress(OSError):  # a full disk must not kill a rank that could still finish its unit
            self.job.write_heartbeat(replace(self.heartbeat, time=time.time(), seconds=dict(self._seconds)))

    def _find_dead_rank(self) -> Heartbeat | None:
        now = time.monotonic()
        if now - self._looked > STALL_SECONDS:
            self._heard.clear()
        self._looked = now
        silent = [h for h in self.job.heartbeats(self.attempt) if h.rank != self.rank and self._is_silent(h, now)]
        # Endings are read last: a rank that ended between the two looks has written its own by now.
        ended = {e.rank for e in self.job.outcomes(self.attempt)} if silent else set()
        return next((h for h in silent if h.rank not in ended), None)

    def _is_silent(self, beat: Heartbeat, now: float) -> bool:
        """By this process's own clock: those of two nodes may differ by minutes."""
        if beat.host == self.heartbeat.host:
            return not is_alive(beat)
        told, since = self._heard.get(beat.rank, (beat.time, now))
        self._heard[beat.rank] = (beat.time, since if told == beat.time else now)
        return now - self._heard[beat.rank][1] >= SILENCE_SECONDS

    def _missing_ranks(self) -> list[int]:
        seen = {h.rank for h in self.job.heartbeats(self.attempt)} | {e.rank for e in self.job.outcomes(self.attempt)}
        return sorted(set(range(self.world_size)) - seen - {self.rank})

    def _follow_rank(self, ending: Outcome) -> None:
        """Another rank has failed or stopped: nothing that this one waits for will ever come, and it stops too.

        After a stop it may bring its own unit to an end, if it is at one.
        """
        if self._ended.is_set():
            return
        if ending.status == "stopped":
            self._followed = self._followed or time.monotonic()
            self.stopping = True
            if not self.waiting and time.monotonic() - self._followed < UNIT_GRACE_SECONDS:
                return
        comes_back = bool(self.slurm_id) and ending.status == "stopped"
        own = Outcome(rank=self.rank, status="stopped", message=f"rank {ending.rank} {ending.status}")
        if comes_back and self.rank == 0:
            own = fail_if_stuck(self.stopped_start(), own)
        self._exit_process(own, comes_back=comes_back and own.status == "stopped")

    def _abort(self, kind: str, message: str) -> None:
        log.error("%s: ending rank %d", message, self.rank)
        self._exit_process(Outcome(rank=self.rank, status="failed", kind=kind, message=message), comes_back=False)

    def _exit_process(self, ending: Outcome, *, comes_back: bool) -> None:
        """End this process, whatever becomes of its last words: on a full disk there are none."""
        try:
            self._write_outcome(ending)
            if comes_back and self.rank == 0:
                requeue_job(self.stopped_start())
        except OSError:
            log.exception("the end of rank %d could not be written", self.rank)
        finally:
            os._exit(0 if comes_back else 1)

    def _dead_rank_class(self, dead: Heartbeat) -> str:
        """srun ends a job at once when a task of it dies; a rank elsewhere that is only silent has lost its node."""
        return "node failure" if self.slurm_id and dead.host != self.heartbeat.host else "dead rank"

    @staticmethod
    def _dead_rank_message(dead: Heartbeat) -> str:
        who = f"rank {dead.rank} (pid {dead.pid} on {dead.host})"
        return f"{who} died without a word during {dead.phase!r} (killed, or out of memory)"
