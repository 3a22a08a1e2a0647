"""Start a job on this machine through submitit, or run it in this process. For Slurm see slurm/sbatch.py."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ksweep.config.resources import Resources
from ksweep.launch.hardware import num_gpus, resolve_cluster, tasks_per_node, visible_devices, visible_gpus
from ksweep.launch.job import Job, read_or
from ksweep.launch.liveness import ProcessIdentity, identity_in, is_in_this_table
from ksweep.launch.rank_records import process_record
from ksweep.launch.slurm import sbatch
from ksweep.launch.status import LIVE_STATES, JobStatus, job_status
from ksweep.launch.worker import main
from ksweep.launch.worker.devices import gpus_of_rank
from ksweep.utils import machine
from ksweep.utils.errors import SpecError

log = logging.getLogger(__name__)

END_POLL_SECONDS = 0.1
ABORT_GRACE_SECONDS = 20.0
"""How long ranks may take to notice that one of them has failed; then they are killed."""


@dataclass
class LocalJob:
    """A job that was started on this machine."""

    job: Job
    handle: Any
    """submitit's job, or None for a job that ran in this process."""
    controller: ProcessIdentity | None = None
    """submitit's process that starts the ranks."""

    def has_ended(self) -> bool:
        """Return whether submitit sees no process of the job any more."""
        return self.handle is None or bool(self.handle.done())

    def stop(self) -> None:
        """Signal every rank to stop after its work unit; a second call ends them at once."""
        if self.handle is None:
            return
        for heartbeat in self.job.heartbeats():
            if is_in_this_table(heartbeat.process):
                with suppress(ProcessLookupError):
                    os.kill(heartbeat.pid, signal.SIGTERM)

    def cancel(self) -> None:
        """Kill the job because the user wants it; whoever asks about it later sees that it was cancelled."""
        if not self.has_ended():
            self.job.request_cancel()
        self.kill()

    def kill(self) -> None:
        """Kill what is left of the job: its controller and every rank."""
        if self.controller is None or not is_in_this_table(self.controller):  # its pid may be another's by now
            return
        with suppress(psutil.NoSuchProcess):
            controller = psutil.Process(self.controller.pid)
            for process in [*controller.children(recursive=True), controller]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()


def start_local_job(
    job: Job,
    resources: Resources,
    name: str,
    on_report: Callable[..., None] | None = None,
    gpus: Sequence[str] | None = None,
    side_by_side: int = 1,
) -> LocalJob:
    """Start a job on this machine, on these GPUs. An in-process job has ended when this returns.

    Args:
        side_by_side: number of such jobs that run at once and share the cores.
    """
    if resolve_cluster(resources) == "inprocess":
        devices = gpus_of_rank(0, resources.gpus_per_model) if num_gpus(resources) else ("cpu",)
        main.run_in_process(job, devices, on_report)
        return LocalJob(job, None)
    executor = _executor(job.path, resources, name, gpus)
    cpus = sbatch.cpus_per_rank(resources, num_gpus(resources))
    added = machine.rank_environment(tasks_per_node(resources) * side_by_side, cpus)
    with _ignore_sigint(), machine.extra_environment(added):
        handle = executor.submit(main.run_rank, str(job.path))
        local_job = LocalJob(job, handle)
        try:
            record = process_record(int(handle.job_id))
            local_job.controller = identity_in(record)
            job.write_note("controller", record)
        except psutil.NoSuchProcess:  # it has ended already
            pass
        except OSError:
            local_job.kill()
            raise
    return local_job


@contextmanager
def _ignore_sigint() -> Iterator[None]:
    """Start processes inside that ignore Ctrl-C, which a terminal sends to all of them: only the launcher handles it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def validate_local_resources(resources: Resources) -> None:
    """Check before anything starts that this machine has the resources.

    Raises:
        SpecError: more than one node, more GPUs than there are, several slices of GPUs.
    """
    if resources.nodes > 1:
        raise SpecError(f"resources.nodes={resources.nodes}: a local job has one node; use cluster=slurm")
    gpus = num_gpus(resources)
    if gpus > (there := visible_gpus()):
        raise SpecError(f"resources.gpus={gpus}, but this machine has {there}: lower it, or gpus=0 for the CPU")
    if gpus > 1 and any(device.startswith("MIG-") for device in visible_devices()[:gpus]):
        raise SpecError(
            f"resources.gpus={gpus}, but CUDA_VISIBLE_DEVICES names slices of GPUs (MIG), of which a process sees one: use "
            "gpus=1; jobs of several cells then run side by side (cells_per_job=1)"
        )


def _executor(folder: Path, resources: Resources, name: str, devices: Sequence[str] | None) -> Any:
    import submitit

    validate_local_resources(resources)
    gpus = num_gpus(resources)
    local = submitit.LocalExecutor(folder=folder)
    local.update_parameters(
        timeout_min=resources.minutes, tasks_per_node=tasks_per_node(resources), gpus_per_node=gpus, name=name
    )
    # It joins them to CUDA_VISIBLE_DEVICES; its own check knows numbers only.
    local.parameters["visible_gpus"] = tuple(devices if devices is not None else visible_devices()[:gpus])
    return local


def end_of_job(local_job: LocalJob, num_ranks: int) -> JobStatus | None:
    """Return how a job ended, once no other rank can write an earlier failure; None while it runs."""
    local_job.has_ended()  # lets submitit notice that its process has ended
    if job_status(local_job.job).state in LIVE_STATES:
        return None
    # Ranks that hang are killed some time after one of them has failed.
    deadline = time.monotonic() + ABORT_GRACE_SECONDS
    while not local_job.has_ended() and len(read_or(local_job.job.outcomes, [])) < num_ranks:
        if time.monotonic() > deadline:
            local_job.kill()
            break
        time.sleep(END_POLL_SECONDS)
    end = job_status(local_job.job)
    return None if end.state in LIVE_STATES else end
