"""What submitit calls on every rank: run its work and write its outcome, in this process, on this machine or on Slurm."""

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
from ksweep.launch.worker.devices import device_text, gpu_ids_text
from ksweep.launch.worker.heartbeat import HEARTBEAT_SECONDS, PEER_OUTCOME_GRACE_SECONDS, UNIT_GRACE_SECONDS, HeartbeatThread
from ksweep.launch.worker.requeue import fail_if_stuck, requeue_job
from ksweep.utils import machine
from ksweep.utils.errors import RequestError, RunError, StoreError, classify

log = logging.getLogger(__name__)


def run_rank(job_path: str) -> Any:
    """Run one rank of a submitit job: join the process group, work, write the outcome."""
    import submitit

    job = Job(Path(job_path))
    environment = submitit.JobEnvironment()
    rank = environment.global_rank
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s rank {rank} %(name)s: %(message)s", force=True)
    return _run_on_slurm(job, environment) if environment.cluster == "slurm" else _run_locally(job, environment)


def _run_locally(job: Job, environment: Any) -> Any:
    """Run the rank as a process of submitit's local controller."""
    heartbeat = HeartbeatThread(job, environment.global_rank, environment.num_tasks)
    _install_stop_handlers(heartbeat)
    # Ctrl-C reaches every process of the terminal: the launcher handles it, and signals the ranks once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with heartbeat:
        outcome = _run_to_outcome(heartbeat, environment)
        _log_failure(outcome)
        heartbeat.finish(outcome)
    # A collective that waits for a dead rank would keep this process alive; everything worth keeping is on disk.
    logging.shutdown()
    if outcome.status != "finished":
        os._exit(1)
    return outcome.result


def _run_on_slurm(job: Job, environment: Any) -> None:
    """Run the rank as a task of srun, which Slurm signals to stop and which puts its job back into the queue."""
    attempt = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    rank = environment.global_rank
    heartbeat = HeartbeatThread(job, rank, environment.num_tasks, attempt, slurm_id=environment.job_id)
    _install_stop_handlers(heartbeat)
    with heartbeat:
        outcome = _run_to_outcome(heartbeat, environment)
        if outcome.status == "stopped" and rank == 0:
            outcome = fail_if_stuck(heartbeat.stopped_start(), outcome)
        _log_failure(outcome)
        heartbeat.finish(outcome)
        if outcome.status == "stopped" and rank == 0:
            heartbeat.wait_for_other_ranks(UNIT_GRACE_SECONDS)
            requeue_job(heartbeat.stopped_start())
        if outcome.status == "failed":
            heartbeat.wait_for_other_ranks(PEER_OUTCOME_GRACE_SECONDS)
    logging.shutdown()
    sys.stdout.flush()
    # Zero for a rank that stopped: any other code makes srun kill those that still finish their work units.
    os._exit(1 if outcome.status == "failed" else 0)


def _install_stop_handlers(heartbeat: HeartbeatThread) -> None:
    for name in _stop_signals(signal.SIGTERM, signal.SIGUSR2):
        signal.signal(name, heartbeat.handle_stop_signal)


def _stop_signals(*names: signal.Signals) -> list[signal.Signals]:
    """Return these signals, and that of a closed terminal unless it is ignored, as under nohup."""
    return [*names, signal.SIGHUP] if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL else list(names)


def _log_failure(outcome: Outcome) -> None:
    if outcome.status == "failed":
        log.error("failed (%s): %s\n%s", outcome.kind, outcome.message, outcome.traceback)


def _run_to_outcome(heartbeat: HeartbeatThread, environment: Any) -> Outcome:
    return heartbeat.attribute_failure(run_guarded(heartbeat.rank, lambda: _work(heartbeat, environment)))


def _work(heartbeat: HeartbeatThread, environment: Any) -> Any:
    if heartbeat.job.cancel_requested():
        # `ksweep cancel` writes the request before it looks for heartbeats to signal; this rank's was written before this check.
        raise Stopped("cancelled before it started")
    spec = heartbeat.job.spec()
    ranks = process_group.join_process_group(heartbeat, spec["gpus"], spec.get("gpus_per_model", 1), environment)
    result = load_entry(spec["entry"])(spec["argument"], ranks)
    process_group.leave_process_group(ranks)
    return result


def run_in_process(job: Job, devices: tuple[str, ...], on_report: Callable[..., None] | None = None) -> Outcome:
    """Run a job as its only rank in this process, for debugging; exceptions are recorded, not raised."""
    spec = job.spec()
    # torch's OpenMP runtime reads how threads wait when it is loaded; set later, the run record would be wrong.
    added = {} if "torch" in sys.modules else machine.wait_environment()
    heartbeat = HeartbeatThread(job, 0, 1)  # without its thread: a watchdog must not end a notebook
    heartbeat.latest = replace(heartbeat.latest, device=device_text(devices), gpu=gpu_ids_text(devices))
    solo = Solo(
        devices=devices,
        device_name=heartbeat.latest.device,
        job=job.id,
        on_report=_report_to_heartbeat(heartbeat, on_report),
        on_cell=heartbeat.begin_cell,
    )
    heartbeat.publish_heartbeat()
    with _stopped_by_sigterm(solo), machine.extra_environment(added):
        outcome = run_guarded(0, lambda: load_entry(spec["entry"])(spec["argument"], solo))
    heartbeat.finish(outcome)
    return outcome


def _report_to_heartbeat(heartbeat: HeartbeatThread, on_report: Callable[..., None] | None) -> Callable[..., None]:
    """Return a function that passes reported progress to the heartbeat and to `on_report`."""
    last_published = time.monotonic()

    def report(phase: str, done: int, total: int, **numbers: float) -> None:
        nonlocal last_published
        heartbeat.update(phase, done, total, numbers)
        if time.monotonic() - last_published >= HEARTBEAT_SECONDS:
            last_published = time.monotonic()
            heartbeat.publish_heartbeat()
        if on_report is not None:
            on_report(phase, done, total, **numbers)

    return report


@contextmanager
def _stopped_by_sigterm(solo: Solo) -> Iterator[None]:
    """Let SIGTERM (`ksweep cancel`) and SIGHUP (a closed terminal) stop the work after its unit instead of ending the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: object) -> None:
        solo.stop = True

    before = {name: signal.signal(name, stop) for name in _stop_signals(signal.SIGTERM)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, signal.SIG_DFL if handler is None else handler)


def load_entry(entry: str) -> Callable[[dict[str, Any], Ranks], Any]:
    """Import the function named "package.module:function"."""
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def run_guarded(rank: int, work: Callable[[], Any]) -> Outcome:
    """Run `work` and return its outcome; never raises."""
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
