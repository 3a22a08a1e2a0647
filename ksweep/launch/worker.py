"""What submitit calls on every rank: process group, stop signal, heartbeat, watchdog, terminal record."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import platform
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

from ksweep.errors import DiskFullError, RequestError, RunError, StoreError
from ksweep.launch.job import SILENCE_SECONDS, Ending, Heartbeat, Job, is_alive
from ksweep.ranks import Ranks, Stopped

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
SECOND_THOUGHT_SECONDS = 1.0
"""A repeated signal within this time is the same wish, sent to the process and to its group."""
ECHO_SECONDS = 3.0
"""How long a failing rank looks whether another one died first."""
COLLECTIVE_TIMEOUT = timedelta(days=2)
"""Ranks may wait long for the last unit of another; the watchdog, not the collective, notices a dead one."""


BEAT_SECONDS_ON_SLURM = 2.0
"""Heartbeats there go to a file system that is shared by many."""
LAST_WORDS_SECONDS = 2.5
"""How long a rank that failed stays, so that the others can say how they ended before Slurm kills them with it."""
FOLLOW_SECONDS = 10.0
"""How long a rank may take to its own border after another has stopped."""
STALL_SECONDS = 15.0
"""A rank that has not looked around for so long was held up itself: what it missed meanwhile says nothing about the others."""
JOIN_SECONDS = 1800.0
"""A rank that has not said a word so long after another started will not come."""
STARTS_WITHOUT_PROGRESS = 3
"""So often a job may be stopped at the same place; then its units do not fit into its time limit."""


def run_rank(job_path: str) -> Any:
    """One rank of a submitit job, from process group to terminal record."""
    import submitit

    job = Job(Path(job_path))
    environment = submitit.JobEnvironment()
    if environment.cluster == "slurm":
        return _run_on_slurm(job, environment)
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s rank {environment.global_rank} %(name)s: %(message)s", force=True
    )
    pulse = Pulse(job, environment.global_rank, environment.num_tasks)
    for name in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(name, pulse.ask_to_stop)
    # Ctrl-C reaches every process of the terminal: the launcher answers it, and asks the ranks once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with pulse:
        ending = pulse.explained(guarded(environment.global_rank, lambda: _with_group(job, pulse, environment)))
        if ending.status == "failed":
            log.error("failed (%s): %s\n%s", ending.kind, ending.message, ending.traceback)
        pulse.end(ending)
    # A collective that waits for a dead rank would keep this process alive; everything worth keeping is on disk.
    logging.shutdown()
    if ending.status != "finished":
        os._exit(1)
    return ending.result


def _run_on_slurm(job: Job, environment: Any) -> None:
    """The same, as a task of srun: told to stop by Slurm, and put back into the queue by itself."""
    attempt = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    rank = environment.global_rank
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s rank {rank} %(name)s: %(message)s", force=True)
    pulse = Pulse(job, rank, environment.num_tasks, attempt, slurm_id=environment.job_id)
    for name in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(name, pulse.ask_to_stop)
    with pulse:
        ending = pulse.explained(guarded(rank, lambda: _with_group(job, pulse, environment)))
        if ending.status == "stopped" and rank == 0:
            ending = _going_on_later(pulse, ending)
        if ending.status == "failed":
            log.error("failed (%s): %s\n%s", ending.kind, ending.message, ending.traceback)
        pulse.end(ending)
        if ending.status == "stopped" and rank == 0:
            pulse.wait_for_others(FOLLOW_SECONDS)
            _requeue(pulse)
        if ending.status == "failed":
            pulse.wait_for_others(LAST_WORDS_SECONDS)
    logging.shutdown()
    sys.stdout.flush()
    # Zero for a rank that stopped: any other number makes srun kill those that are still on their way to a border.
    os._exit(1 if ending.status == "failed" else 0)


def _going_on_later(pulse: Pulse, ending: Ending) -> Ending:
    """A job that is stopped at the same place again and again would be requeued for ever: that is a failure, and is said."""
    at_limit = pulse.signal == signal.SIGUSR2 and not pulse.job.asked_to_end()
    if at_limit and is_stuck([pulse.job.noted("requeued", n) for n in range(pulse.attempt)], pulse.place()):
        message = (
            f"{STARTS_WITHOUT_PROGRESS} starts reached the time limit in {pulse.beat.phase!r} and published nothing: a unit of "
            "work takes longer than a start may last. Raise resources.time, or spread the work over more ranks"
        )
        return replace(ending, status="failed", kind="time limit", message=message)
    return ending


def is_stuck(requeues: Sequence[Mapping[str, Any] | None], place: list[Any]) -> bool:
    """Whether the starts before this one reached their time limit where this one is stopped, with nothing published between."""
    last = requeues[-(STARTS_WITHOUT_PROGRESS - 1) :]
    same = [r for r in last if r and r["why"] == "time limit" and r["place"] == place]
    return len(same) == STARTS_WITHOUT_PROGRESS - 1


def _requeue(pulse: Pulse) -> None:
    """Put this job back into the queue after a signal of Slurm's; not when somebody has ended it, nor when a rank has failed."""
    from ksweep.launch import slurm

    job, number = pulse.job, pulse.slurm_id
    if any(e.status == "failed" for e in job.endings(pulse.attempt)):
        log.warning("not requeued: a rank of job %s has failed", number)
        return
    facts = slurm.describe(number)
    if job.asked_to_end() or (facts.get("JobState") != "RUNNING"):
        log.warning(
            "not requeued: job %s is %s", number, "to end" if job.asked_to_end() else facts.get("JobState", "unknown to Slurm")
        )
        return
    preempted = facts.get("PreemptTime", "None") not in ("None", "", "Unknown", "N/A")
    why = "preempted" if preempted else "time limit" if pulse.signal == signal.SIGUSR2 else "asked to stop"
    note = {"why": why, "time": time.time(), "place": pulse.place()}
    job.note("requeued", note, pulse.attempt)
    refused = slurm.requeue(number)
    if refused is not None:
        log.warning("Slurm does not requeue job %s: %s", number, refused)
        job.note("requeued", note | {"refused": refused}, pulse.attempt)


def run_here(job: Job, devices: tuple[str, ...], on_report: Callable[..., None] | None = None) -> Ending:
    """The same job as the only rank, in this process, for debugging; exceptions are recorded, not raised."""
    from ksweep.ranks import Solo

    spec = job.spec()
    solo = Solo(devices=devices, device_name=name_of(devices), on_report=on_report)
    ending = guarded(0, lambda: load_entry(spec["entry"])(spec["argument"], solo))
    job.end(ending)
    return ending


def load_entry(entry: str) -> Callable[[dict[str, Any], Ranks], Any]:
    """The function behind "package.module:function"."""
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def guarded(rank: int, work: Callable[[], Any]) -> Ending:
    """Run `work` and say how it ended; never raises."""
    try:
        return Ending(rank=rank, status="finished", result=work())
    except Stopped as stop:
        return Ending(rank=rank, status="stopped", message=str(stop))
    except KeyboardInterrupt:
        return Ending(rank=rank, status="stopped", message="interrupted")
    except BaseException as error:
        ours = isinstance(error, (RequestError, RunError, StoreError))
        message = str(error) if ours else f"{type(error).__name__}: {error}"
        return Ending(rank=rank, status="failed", kind=classify(error), message=message, traceback=traceback.format_exc())


def classify(error: BaseException) -> str:
    """The class of a failure, for people and for the exit code."""
    if isinstance(error, RequestError):
        return "bad input"
    if isinstance(error, DiskFullError) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return "disk full"
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__:
        return "out of memory"
    if isinstance(error, FloatingPointError) or (isinstance(error, RunError) and re.search(r"\bNaN\b|not finite", str(error))):
        return "NaN"
    return "failure" if isinstance(error, (RunError, StoreError)) else "bug"


def _with_group(job: Job, pulse: Pulse, environment: Any) -> Any:
    spec = job.spec()
    devices = _devices(environment, spec["gpus"], spec.get("gpus_per_model", 1))
    device = devices[0]
    pulse.beat = replace(pulse.beat, device=name_of(devices))
    if environment.num_tasks == 1:
        return load_entry(spec["entry"])(spec["argument"], Group(pulse, devices))
    import torch
    import torch.distributed as dist
    from submitit.helpers import TorchDistributedEnvironment

    # Each rank sees all GPUs of its node and takes its own by number; with gpus=0 it must not be handed one.
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    # Processes of an earlier start may still hold its port.
    os.environ["MASTER_PORT"] = str(20000 + (int(os.environ["MASTER_PORT"]) - 20000 + 97 * pulse.attempt) % 40000)
    if device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // _local_ranks(environment)))
    # gloo carries barriers on CPUs as on GPUs: no tensor ever travels between ranks, results meet in the stores.
    dist.init_process_group("gloo" if device == "cpu" else "nccl", init_method="env://", timeout=COLLECTIVE_TIMEOUT)
    result = load_entry(spec["entry"])(spec["argument"], Group(pulse, devices, _shared_store(dist)))
    # Only after success: taking the group down makes the other ranks fail too, and their words would hide the cause.
    dist.destroy_process_group()
    return result


def _devices(environment: Any, gpus: int, per_model: int) -> tuple[str, ...]:
    if gpus == 0:
        return ("cpu",)
    import torch

    if (there := torch.cuda.device_count()) < gpus:
        raise RunError(f"the job was given {gpus} GPUs, torch sees {there}: is this torch built for CUDA, and the driver loaded?")
    devices = own_gpus(environment.local_rank, per_model)
    torch.cuda.set_device(devices[0])  # barriers go over this one
    return devices


def own_gpus(local_rank: int, per_model: int) -> tuple[str, ...]:
    """The GPUs of a rank among those that its job sees on the node: equal runs of numbers, in the order of the ranks."""
    return tuple(f"cuda:{local_rank * per_model + i}" for i in range(per_model))


def name_of(devices: tuple[str, ...]) -> str:
    """What torch devices are: the GPU's own name, and how many, or the kind of processor."""
    if not devices[0].startswith("cuda"):
        return f"cpu ({platform.machine()})"
    import torch

    several = f"{len(devices)} x " if len(devices) > 1 else ""
    return several + str(torch.cuda.get_device_name(devices[0]))


def _local_ranks(environment: Any) -> int:
    return max(1, int(environment.num_tasks) // max(1, int(environment.num_nodes)))


def _shared_store(dist: Any) -> Any:
    return dist.distributed_c10d._get_default_store()


@dataclass
class Group:
    """The ranks of a torch.distributed job (or of a job with one rank)."""

    pulse: Pulse
    devices: tuple[str, ...]
    store: Any = None
    taken: dict[str, int] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Global rank."""
        return self.pulse.rank

    @property
    def world_size(self) -> int:
        """Ranks in the job."""
        return self.pulse.world_size

    @property
    def device_name(self) -> str:
        """The GPU's own name, or the processor's."""
        return name_of(self.devices)

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.store is not None:
            import torch.distributed as dist

            self.pulse.waiting = True
            dist.barrier()
            self.pulse.waiting = False

    def take(self, queue: str) -> int:
        """The next number of a queue; the store of the process group counts, so a fast rank takes more."""
        if self.store is not None:
            return int(self.store.add(f"ksweep/{queue}", 1)) - 1
        self.taken[queue] = self.taken.get(queue, -1) + 1
        return self.taken[queue]

    def should_stop(self) -> bool:
        """Whether a stop signal has come."""
        return self.pulse.stopping

    def report(self, phase: str, done: int, total: int, **numbers: float) -> None:
        """Progress, published with the next heartbeat."""
        self.pulse.update(phase, done, total, numbers)


class Pulse:
    """Heartbeat and watchdog of one rank: a thread that says "alive" and ends the rank when another one has died."""

    def __init__(self, job: Job, rank: int, world_size: int, attempt: int = 0, slurm_id: str = "") -> None:
        """Nothing runs until the context is entered."""
        me = psutil.Process()
        self.job, self.rank, self.world_size, self.attempt, self.slurm_id = job, rank, world_size, attempt, slurm_id
        self.beat = Heartbeat(
            rank=rank, pid=me.pid, host=socket.gethostname(), process_started=me.create_time(), attempt=attempt, slurm_id=slurm_id
        )
        self.stopping, self._asked, self.signal = False, 0.0, 0
        self.waiting = False
        """Whether this rank waits for the others and has nothing of its own to bring to an end."""
        self._phase = ("", 0.0, 0)
        self._followed = 0.0
        self._entered = self._looked = time.monotonic()
        self._heard: dict[int, tuple[float, float]] = {}
        """Rank on another host -> its newest heartbeat, and when that was news to this process."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ksweep-pulse", daemon=True)

    def __enter__(self) -> Pulse:
        self._say_alive()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def ask_to_stop(self, number: int, _frame: object) -> None:
        """Signal handler: the work loop stops at the next border; a second signal ends the rank at once."""
        now = time.monotonic()
        if (
            self.stopping and now - self._asked > SECOND_THOUGHT_SECONDS and not self.slurm_id
        ):  # Slurm repeats itself, people insist
            self._say_end(Ending(rank=self.rank, status="stopped", message=f"ended at once by signal {number}"))
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
        self.beat = replace(self.beat, phase=phase, done=done, total=total, numbers=numbers, rate=rate)

    def place(self) -> list[Any]:
        """Where the work stands: what counts as whole, so that two starts that publish nothing between them are at one place."""
        beat = self.beat  # `total` counts the draws that were missing at the start, but all activations
        return [beat.phase, beat.total, beat.done if beat.phase == "activations" else 0]

    def explained(self, ending: Ending) -> Ending:
        """A failure that may only be the echo of another rank's (its connection closed) is given to that rank."""
        if ending.kind != "bug" or self.world_size == 1:
            return ending
        deadline = time.monotonic() + ECHO_SECONDS
        while time.monotonic() < deadline:
            first = next((e for e in self.job.endings(self.attempt) if e.rank != self.rank and e.status != "finished"), None)
            if first is not None:
                return replace(ending, status="stopped", message=f"rank {first.rank} {first.status}")
            dead = self._dead_peer()
            if dead is not None:
                return replace(ending, kind=self._cause(dead), message=self._obituary(dead))
            time.sleep(0.1)
        return ending

    def end(self, ending: Ending) -> None:
        """Publish the last heartbeat and the terminal record."""
        self._ended.set()
        self._say_alive()
        self._say_end(ending)

    def _say_end(self, ending: Ending) -> None:
        self.job.end(replace(ending, attempt=self.attempt))

    def wait_for_others(self, seconds: float) -> None:
        """Until every other rank has said how it ended, or is dead, or the time is over."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and len(self.job.endings(self.attempt)) < self.world_size and not self._dead_peer():
            time.sleep(0.1)

    def _run(self) -> None:
        while not self._ended.wait(BEAT_SECONDS_ON_SLURM if self.slurm_id else BEAT_SECONDS):
            self._say_alive()
            try:
                self._look_around()
            except (OSError, ValueError) as error:  # a file system that stutters must not silence this rank for good
                log.warning("the other ranks cannot be seen: %s", error)

    def _look_around(self) -> None:
        if self.job.attempt() > self.attempt:
            log.error("start %d of this job is running elsewhere: ending this rank of start %d", self.job.attempt(), self.attempt)
            os._exit(1)
        # A failure first: those that only followed it have stopped, and a job that was stopped comes back.
        for ending in sorted(self.job.endings(self.attempt), key=lambda e: e.status != "failed"):
            if ending.status != "finished" and ending.rank != self.rank:
                self._follow(ending)
        dead = self._dead_peer()
        if dead is not None:
            self._abort(self._cause(dead), self._obituary(dead))
        if time.monotonic() - self._entered > JOIN_SECONDS and (absent := self._absent()):
            named = ", ".join(map(str, absent))
            self._abort("dead rank", f"rank {named} of {self.world_size} has not started within {JOIN_SECONDS / 60:.0f} minutes")

    def _say_alive(self) -> None:
        with suppress(OSError):  # a full disk must not kill a rank that could still finish its unit
            self.job.beat(replace(self.beat, time=time.time()))

    def _dead_peer(self) -> Heartbeat | None:
        now = time.monotonic()
        if now - self._looked > STALL_SECONDS:
            self._heard.clear()
        self._looked = now
        silent = [h for h in self.job.heartbeats(self.attempt) if h.rank != self.rank and self._is_silent(h, now)]
        # Endings are read last: a rank that ended between the two looks has written its own by now.
        ended = {e.rank for e in self.job.endings(self.attempt)} if silent else set()
        return next((h for h in silent if h.rank not in ended), None)

    def _is_silent(self, beat: Heartbeat, now: float) -> bool:
        """By this process's own clock: those of two nodes may differ by minutes."""
        if beat.host == self.beat.host:
            return not is_alive(beat)
        told, since = self._heard.get(beat.rank, (beat.time, now))
        self._heard[beat.rank] = (beat.time, since if told == beat.time else now)
        return now - self._heard[beat.rank][1] >= SILENCE_SECONDS

    def _absent(self) -> list[int]:
        seen = {h.rank for h in self.job.heartbeats(self.attempt)} | {e.rank for e in self.job.endings(self.attempt)}
        return sorted(set(range(self.world_size)) - seen - {self.rank})

    def _follow(self, ending: Ending) -> None:
        """Another rank has failed or stopped: nothing that this one waits for will ever come, and it stops too.

        After a stop it may bring its own unit to an end, if it is at one.
        """
        if self._ended.is_set():
            return
        if ending.status == "stopped":
            self._followed = self._followed or time.monotonic()
            self.stopping = True
            if not self.waiting and time.monotonic() - self._followed < FOLLOW_SECONDS:
                return
        comes_back = bool(self.slurm_id) and ending.status == "stopped"
        own = Ending(rank=self.rank, status="stopped", message=f"rank {ending.rank} {ending.status}")
        if comes_back and self.rank == 0:
            own = _going_on_later(self, own)
        self._leave(own, comes_back=comes_back and own.status == "stopped")

    def _abort(self, kind: str, message: str) -> None:
        log.error("%s: ending rank %d", message, self.rank)
        self._leave(Ending(rank=self.rank, status="failed", kind=kind, message=message), comes_back=False)

    def _leave(self, ending: Ending, *, comes_back: bool) -> None:
        """End this process, whatever becomes of its last words: on a full disk there are none."""
        try:
            self._say_end(ending)
            if comes_back and self.rank == 0:
                _requeue(self)
        except OSError:
            log.exception("the end of rank %d could not be written", self.rank)
        finally:
            os._exit(0 if comes_back else 1)

    def _cause(self, dead: Heartbeat) -> str:
        """srun ends a job at once when a task of it dies; a rank elsewhere that is only silent has lost its node."""
        return "node failure" if self.slurm_id and dead.host != self.beat.host else "dead rank"

    @staticmethod
    def _obituary(dead: Heartbeat) -> str:
        who = f"rank {dead.rank} (pid {dead.pid} on {dead.host})"
        return f"{who} died without a word during {dead.phase!r} (killed, or out of memory)"
