"""What submitit calls on every rank: its work from process group to terminal record, here, on this machine or on Slurm."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ksweep.evaluation.distributed import Ranks, Solo, Stopped
from ksweep.launch.job import Job
from ksweep.launch.rank_records import Outcome
from ksweep.launch.worker import process_group
from ksweep.launch.worker.heartbeat import HEARTBEAT_SECONDS, PEER_OUTCOME_GRACE_SECONDS, UNIT_GRACE_SECONDS, HeartbeatThread
from ksweep.launch.worker.requeue import fail_if_stuck, requeue_job
from ksweep.utils import machine
from ksweep.utils.errors import RequestError, RunError, StoreError, classify

log = logging.getLogger(__name__)


def run_rank(job_path: str) -> Any:
    """One rank of a submitit job, from process group to terminal record."""
    import submitit

    job = Job(Path(job_path))
    environment = submitit.JobEnvironment()
    rank = environment.global_rank
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s rank {rank} %(name)s: %(message)s", force=True)
    return _run_on_slurm(job, environment) if environment.cluster == "slurm" else _run_locally(job, environment)


def _run_locally(job: Job, environment: Any) -> Any:
    """As a process of submitit's local controller."""
    pulse = HeartbeatThread(job, environment.global_rank, environment.num_tasks)
    _install_stop_handlers(pulse)
    # Ctrl-C reaches every process of the terminal: the launcher answers it, and asks the ranks once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with pulse:
        ending = _run_to_outcome(pulse, environment)
        _log_failure(ending)
        pulse.finish(ending)
    # A collective that waits for a dead rank would keep this process alive; everything worth keeping is on disk.
    logging.shutdown()
    if ending.status != "finished":
        os._exit(1)
    return ending.result


def _run_on_slurm(job: Job, environment: Any) -> None:
    """As a task of srun: told to stop by Slurm, and put back into the queue by itself."""
    attempt = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    rank = environment.global_rank
    pulse = HeartbeatThread(job, rank, environment.num_tasks, attempt, slurm_id=environment.job_id)
    _install_stop_handlers(pulse)
    with pulse:
        ending = _run_to_outcome(pulse, environment)
        if ending.status == "stopped" and rank == 0:
            ending = fail_if_stuck(pulse.stopped_start(), ending)
        _log_failure(ending)
        pulse.finish(ending)
        if ending.status == "stopped" and rank == 0:
            pulse.wait_for_other_ranks(UNIT_GRACE_SECONDS)
            requeue_job(pulse.stopped_start())
        if ending.status == "failed":
            pulse.wait_for_other_ranks(PEER_OUTCOME_GRACE_SECONDS)
    logging.shutdown()
    sys.stdout.flush()
    # Zero for a rank that stopped: any other number makes srun kill those that are still on their way to a border.
    os._exit(1 if ending.status == "failed" else 0)


def _install_stop_handlers(pulse: HeartbeatThread) -> None:
    for name in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(name, pulse.handle_stop_signal)


def _log_failure(ending: Outcome) -> None:
    if ending.status == "failed":
        log.error("failed (%s): %s\n%s", ending.kind, ending.message, ending.traceback)


def _run_to_outcome(pulse: HeartbeatThread, environment: Any) -> Outcome:
    return pulse.attribute_failure(run_guarded(pulse.rank, lambda: _work(pulse, environment)))


def _work(pulse: HeartbeatThread, environment: Any) -> Any:
    if pulse.job.cancel_requested():
        # Whoever cancels a job asks first and then looks for heartbeats to signal: this rank's own has been there before.
        raise Stopped("cancelled before it started")
    spec = pulse.job.spec()
    ranks = process_group.join_process_group(pulse, spec["gpus"], spec.get("gpus_per_model", 1), environment)
    result = load_entry(spec["entry"])(spec["argument"], ranks)
    process_group.leave_process_group(ranks)
    return result


def run_in_process(job: Job, devices: tuple[str, ...], on_report: Callable[..., None] | None = None) -> Outcome:
    """The same job as the only rank, in this process, for debugging; exceptions are recorded, not raised."""
    spec = job.spec()
    # torch's OpenMP runtime reads how threads wait when it is loaded: later the record would tell of what is not so.
    added = {} if "torch" in sys.modules else machine.wait_environment()
    pulse = HeartbeatThread(job, 0, 1)  # without its thread: a watchdog must not end a notebook
    pulse.heartbeat = replace(pulse.heartbeat, device=process_group.device_text(devices), gpu=process_group.gpu_ids_text(devices))
    solo = Solo(
        devices=devices,
        device_name=pulse.heartbeat.device,
        job=job.id,
        on_report=_report_to_heartbeat(pulse, on_report),
        on_cell=pulse.begin_cell,
    )
    pulse.publish_heartbeat()
    with _stopped_by_sigterm(solo), machine.environment(added):
        ending = run_guarded(0, lambda: load_entry(spec["entry"])(spec["argument"], solo))
    pulse.finish(ending)
    return ending


def _report_to_heartbeat(pulse: HeartbeatThread, on_report: Callable[..., None] | None) -> Callable[..., None]:
    """What the work reports, to the heartbeat and to whoever asked."""
    said = time.monotonic()

    def report(phase: str, done: int, total: int, **numbers: float) -> None:
        nonlocal said
        pulse.update(phase, done, total, numbers)
        if time.monotonic() - said >= HEARTBEAT_SECONDS:
            said = time.monotonic()
            pulse.publish_heartbeat()
        if on_report is not None:
            on_report(phase, done, total, **numbers)

    return report


@contextmanager
def _stopped_by_sigterm(solo: Solo) -> Iterator[None]:
    """`ksweep cancel` ends the unit at hand, not the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: object) -> None:
        solo.stop = True

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def load_entry(entry: str) -> Callable[[dict[str, Any], Ranks], Any]:
    """The function behind "package.module:function"."""
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def run_guarded(rank: int, work: Callable[[], Any]) -> Outcome:
    """Run `work` and say how it ended; never raises."""
    try:
        return Outcome(rank=rank, status="finished", result=work())
    except Stopped as stop:
        return Outcome(rank=rank, status="stopped", message=str(stop))
    except KeyboardInterrupt:
        return Outcome(rank=rank, status="stopped", message="interrupted")
    except BaseException as error:
        ours = isinstance(error, (RequestError, RunError, StoreError))
        name = type(error).__name__
        return Outcome(
            rank=rank, status="failed", kind=classify(error), message=str(error) if ours else f"{name}: {error}",
            traceback=traceback.format_exc(), error_type=name,
        )  # fmt: skip
