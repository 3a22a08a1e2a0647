"""Where and how a sweep runs: cluster, GPUs, ranks, time, batches. No identity key depends on it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ksweep.config.validation import PLAIN_NAME, SLURM_FEATURES, SLURM_NAME, at_least, is_number, one_line, one_of, plain_name
from ksweep.utils.errors import SpecError
from ksweep.utils.provenance import without_tokens
from ksweep.utils.text import bounded_repr

if TYPE_CHECKING:
    pass


Cluster = Literal["auto", "slurm", "local", "inprocess"]


LONGEST_PLAIN_MINUTES = 7 * 24 * 60
"""Longest time limit that may be a bare number: YAML reads an unquoted 24:00:00 as 86400."""

_TRACKING = "with another value it could not find its jobs or their output"
_STOPPING = "with another value a job could not be told to stop, or would not be requeued"
_SHAPE = "the job would have other ranks than planned; set resources.gpus, tasks or nodes"


OWN_OPTIONS = {
    **dict.fromkeys(("comment", "error", "open-mode", "output", "parsable", "test-only", "wait", "wrap"), _TRACKING),
    **dict.fromkeys(("requeue", "no-requeue", "signal"), _STOPPING),
    **dict.fromkeys(("gpus", "gpus-per-node", "gpus-per-task", "nodes", "ntasks", "ntasks-per-gpu", "ntasks-per-node"), _SHAPE),
    "array": "each element of the array is a job; set resources.cells_per_job or max_parallel_jobs",
    "clusters": "ksweep looks for its jobs on this cluster; log in to the other one",
    "time": "set resources.time", "partition": "set resources.partition", "account": "set resources.account",
    "qos": "set resources.qos", "constraint": "set resources.constraint", "job-name": "set resources.job_name",
    "nice": "set resources.nice", "mem": "set resources.mem_gb", "cpus-per-gpu": "set resources.cpus_per_gpu",
    "cpus-per-task": "set resources.cpus_per_gpu, or cpus_per_task with gpus=0",
}  # fmt: skip
"""Options of sbatch that `Resources.extra` must not set, with the reason."""


EXTRA_OPTION = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
"""Names of options of sbatch, without the leading dashes."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Where and how a sweep runs. Nothing here enters an identity key; see `batch_size` for what can change draws in bfloat16."""

    cluster: Cluster = "auto"
    """auto: Slurm if this machine submits to a cluster, else local. local: jobs on this machine. inprocess: in the calling
    process, for debugging."""
    gpus: int | None = None
    """GPUs of a job on each node; every `gpus_per_model` of them serve one rank. 0 runs on the CPU. None: one, if the machine or
    partition has any."""
    tasks: int | None = None
    """Ranks on each node when gpus=0. None: on this machine one per core, up to 8, as far as memory and the number of missing
    draws allow; on Slurm one."""
    nodes: int = 1
    """Nodes of a job. Its ranks form one process group and share the missing draws."""
    gpus_per_model: int = 1
    """GPUs over which a rank spreads each of its models, for models too large for one; `gpus` must be a multiple of it."""
    cpus_per_gpu: int | None = None
    """CPUs of each GPU. None: the cluster's default."""
    cpus_per_task: int | None = None
    """CPUs, and so threads, of each rank when gpus=0. None: an equal share of the job's cores."""
    mem_gb: float | None = None
    """Memory on each node, GB. None: the cluster's default, or all of the node's with `exclusive`."""
    time: int | str = 24 * 60
    """Time limit of a start of a job: minutes, or as Slurm writes it ("24:00:00", "2-12"). A job at its limit is requeued."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    """Features that a node must have, e.g. "h100" or "h100&ib"."""
    nice: bool | int = False
    """Lowers the job's priority in the queue by this number; true is 10000. Every job can be requeued, whatever its priority."""
    exclusive: bool | None = None
    """Whether the job has its nodes to itself. None: if it asks for 8 GPUs on a node or more."""
    job_name: str | None = None
    """Name in the queue. None: the name of the sweep."""
    setup: str | tuple[str, ...] = ()
    """Shell lines that a job runs before Python, e.g. "module load cuda"."""
    cells_per_job: int | None = None
    """Most cells of a job. None: all cells that share an autoencoder, so that its models are loaded once."""
    max_parallel_jobs: int | None = None
    """Most jobs of the sweep that run at once. None: no limit of its own."""
    batch_size: int | None = None
    """Most draws in flight, and texts scored, at once on one rank. None: as many draws as fit in memory, up to 768. With
    autoencoder.dtype=float32 the draws are the same, bit for bit, for every batch size and number of ranks. In bfloat16 another
    batch size rounds differently and flips near ties: 15, 17 and 29 % of the demo pair's draws had other tokens at temperatures
    0.4, 0.8 and 1.2 (on a CPU). Stored draws are never drawn again; the run record says how they were drawn (runs.engine)."""
    phases: bool | None = None
    """Whether a rank first takes all draws with the AV alone, then frees it, loads the AR and scores. None: where the two do not
    fit into a GPU's memory together. The numbers are the same."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further sbatch options, passed through, e.g. {"reservation": "nightly"}."""

    def __post_init__(self) -> None:
        one_of("resources.cluster", self.cluster, Cluster)
        if self.gpus is not None:
            at_least("resources.gpus", self.gpus, 0)
        for name in ("nodes", "gpus_per_model"):
            at_least(f"resources.{name}", getattr(self, name), 1)
        for name in ("tasks", "cpus_per_gpu", "cpus_per_task", "cells_per_job", "max_parallel_jobs", "batch_size"):
            if getattr(self, name) is not None:
                at_least(f"resources.{name}", getattr(self, name), 1)
        if self.gpus_per_model > 1 and (not self.gpus or self.gpus % self.gpus_per_model):
            raise SpecError(
                f"resources.gpus_per_model={self.gpus_per_model}, but gpus={self.gpus}: set resources.gpus, the GPUs of a job on "
                f"each node, to a multiple of it, e.g. {-(-(self.gpus or 1) // self.gpus_per_model) * self.gpus_per_model}"
            )
        if self.mem_gb is not None and not (is_number(self.mem_gb) and 0 < self.mem_gb <= 1e7):
            raise SpecError(f"resources.mem_gb={bounded_repr(self.mem_gb)} must be a number > 0: gigabytes on each node")
        if not isinstance(self.nice, bool):
            at_least("resources.nice", self.nice, 0)
        if self.cpus_per_gpu is not None and self.gpus == 0:
            raise SpecError(f"resources.cpus_per_gpu={self.cpus_per_gpu}, but gpus=0: set resources.cpus_per_task")
        if self.cpus_per_task is not None and self.gpus:
            raise SpecError(f"resources.cpus_per_task={self.cpus_per_task} is for gpus=0: set resources.cpus_per_gpu")
        self._check_names()
        _ = self.minutes

    def _check_names(self) -> None:
        """Check what becomes a line of the batch script: a line break would begin a line of shell."""
        for name, pattern, example in (
            ("partition", SLURM_NAME, "gpu"),
            ("account", SLURM_NAME, "lab"),
            ("qos", SLURM_NAME, "normal"),
            ("constraint", SLURM_FEATURES, "h100&ib"),
            ("job_name", PLAIN_NAME, "temp_sweep"),
        ):
            if (value := getattr(self, name)) is not None:
                plain_name(f"resources.{name}", value, pattern, example)
        for line in self.setup_lines:
            one_line("resources.setup", line.replace("\t", " "), longest=100_000)
            _refuse_token("resources.setup", line)
        for key, value in self.extra.items():
            plain_name("resources.extra: option", str(key).lstrip("-"), EXTRA_OPTION, "reservation")
            _refuse_own_option(key)
            one_line(f"resources.extra[{key}]", str(value))
            _refuse_token(f"resources.extra[{key}]", str(value))

    @property
    def minutes(self) -> int:
        """Time limit of one start of a job, minutes."""
        if isinstance(self.time, int) and not 0 < self.time <= LONGEST_PLAIN_MINUTES:
            # YAML reads an unquoted 24:00:00 as 86400.
            raise SpecError(
                f'resources.time={bounded_repr(self.time)} minutes: write a limit of more than a week as "D-HH:MM:SS", in quotes'
            )
        return parse_time_limit(str(self.time), "resources.time")

    @property
    def niceness(self) -> int:
        """`nice` as a number, 0 for none."""
        return int(self.nice) if not isinstance(self.nice, bool) else 10_000 * self.nice

    @property
    def whole_nodes(self) -> bool:
        """Whether the job has its nodes to itself: `exclusive`, or its default."""
        return self.exclusive if self.exclusive is not None else (self.gpus or 0) >= 8

    @property
    def setup_lines(self) -> list[str]:
        """`setup` as a list of shell lines."""
        return self.setup.splitlines() if isinstance(self.setup, str) else list(self.setup)


def _refuse_token(name: str, text: str) -> None:
    if (shown := without_tokens(text)) != text:
        raise SpecError(
            f"{name} has what looks like a token or a password ({bounded_repr(shown)}): it would be kept in the registry, in "
            "job.json and in the batch script, for others to read. Set it in the environment that you submit from"
        )


def _refuse_own_option(key: str) -> None:
    option = str(key).replace("_", "-").lstrip("-")
    # sbatch takes the beginning of an option for the whole: "comm" would be a comment.
    own = option if option in OWN_OPTIONS else next((o for o in OWN_OPTIONS if o.startswith(option)), None)
    if own is not None:
        raise SpecError(f"resources.extra has {key}: ksweep sets --{own} itself ({OWN_OPTIONS[own]}). Leave it out")


def parse_time_limit(text: str, name: str = "time") -> int:
    """Return a Slurm time limit in whole minutes, rounded up: 90, 90:00, 24:00:00, 2-12, 2-12:30, 2-12:30:00.

    Raises:
        SpecError: any other text; the message calls it `name`.
    """
    match = re.fullmatch(r"(?:(\d{1,9})-)?(\d{1,9})(?::(\d{1,9}))?(?::(\d{1,9}))?", text.strip().strip("'\""))
    if not match:
        raise SpecError(
            f"{name}={bounded_repr(text)} is not a Slurm time limit: expected minutes, MM:SS, HH:MM:SS or D-HH:MM:SS, "
            "e.g. 24:00:00"
        )
    days, first, second, third = (int(part or 0) for part in match.groups())
    with_hours = match[1] is not None or match[4] is not None
    hours, mins, seconds = (first, second, third) if with_hours else (0, first, second)
    return max(1, days * 24 * 60 + hours * 60 + mins + math.ceil(seconds / 60))
