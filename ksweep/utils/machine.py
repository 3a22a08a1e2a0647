"""Cores and memory of this machine, and how many ranks and threads a job on CPUs has.

Threads of a parallel region meet at a barrier many times per token. An OpenMP runtime that spins there loses its whole time slice
to any other process on one of the cores: two threads on two cores drew 1,550 tokens/s alone and fewer than 55 beside a busy
core. A single thread has no barriers (1,035 tokens/s beside a busy core); threads that sleep at barriers drew 890 (930 alone).
So a job on CPUs has one rank per core, up to `MOST_RANKS` and as memory and work allow; each rank has an equal share of the cores
as threads, and several threads sleep while they wait.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")

MOST_RANKS = 8
"""Most ranks on CPUs unless the user asks for more: they share the memory's bandwidth, and each holds the models."""
DRAWS_PER_RANK = 256
"""Missing draws that justify another rank: 5 s of drawing on one core, about as long as loading the models takes."""
RANK_BYTES = 1_500_000_000
"""Memory of a rank besides its models: torch, logits, and keys and values of a few hundred draws."""

WAIT_POLICY, NUM_THREADS = "OMP_WAIT_POLICY", "OMP_NUM_THREADS"
SPIN_SETTINGS = (WAIT_POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which a user decides how threads wait. If one of them is set, ksweep sets none."""


def num_cores() -> int:
    """Return the number of cores that this process may use: those it is bound to, or fewer under a container's quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for group in _own_groups() if (quota := _cpu_quota(group)) is not None]
    return max(1, min([bound, *(int(quota) for quota in quotas)]))


def free_memory() -> int | None:
    """Return the bytes that a process on this machine can still allocate; None if the system does not report them."""
    limits = [n for n in (_available(), *map(_left_to_group, _own_groups())) if n is not None]
    return min(limits, default=None)


def num_cpu_ranks(num_draws: int, model_bytes: int, cpus_per_rank: int | None = None) -> int:
    """Return the number of ranks of a job on this machine's CPUs: one per core, as memory, work and `MOST_RANKS` allow.

    Args:
        num_draws: draws that are still missing.
        model_bytes: size of the weights that each rank loads.
        cpus_per_rank: cores of each rank. None: OMP_NUM_THREADS if it is set, otherwise one.
    """
    most = [num_cores() // (cpus_per_rank or _threads_asked_for() or 1), num_draws // DRAWS_PER_RANK, MOST_RANKS]
    if (memory := free_memory()) is not None:
        most.append(memory // (model_bytes + RANK_BYTES))
    return max(1, min(most))


def rank_environment(num_ranks: int, cpus_per_rank: int | None = None) -> dict[str, str]:
    """Return the variables that set the threads of torch and NumPy in a rank's process, except those that the user has set.

    Args:
        num_ranks: ranks that share the cores of this machine, including those of concurrent jobs.
        cpus_per_rank: threads of each rank. None: an equal share of the cores.
    """
    threads = {} if os.environ.get(NUM_THREADS) else {NUM_THREADS: str(cpus_per_rank or max(1, num_cores() // num_ranks))}
    return threads | wait_environment()


def wait_environment() -> dict[str, str]:
    """Return the variable that lets threads sleep at barriers; nothing if the user has set how they wait."""
    return {} if any(os.environ.get(name) for name in SPIN_SETTINGS) else {WAIT_POLICY: "PASSIVE"}


@contextmanager
def extra_environment(added: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables while the body runs: OpenMP and BLAS read theirs when a process loads them, not later."""
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def rank_environment_lines(num_ranks: int) -> list[str]:
    """Return `rank_environment` as shell lines for a Slurm job, which only learns on its node how many CPUs it has."""
    spins = "".join(f"${{{name}:-}}" for name in SPIN_SETTINGS)
    cpus = "${SLURM_CPUS_ON_NODE:-1}"
    share = f"$(( {cpus} < {num_ranks} ? 1 : {cpus} / {num_ranks} ))"
    return [
        f'[ -n "{spins}" ] || export {WAIT_POLICY}=PASSIVE',
        f'export {NUM_THREADS}="${{{NUM_THREADS}:-${{SLURM_CPUS_PER_TASK:-{share}}}}}"',
    ]


def _threads_asked_for() -> int | None:
    """Return the first number of OMP_NUM_THREADS, which may list a number for each level of nesting."""
    first = os.environ.get(NUM_THREADS, "").partition(",")[0].strip()
    return int(first) if first.isdigit() and int(first) else None


def _own_groups() -> Iterator[Path]:
    """Yield the control groups (version 2) of this process, the innermost first."""
    try:
        own = next(line[3:].strip() for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return
    group = CGROUP / own.lstrip("/")
    yield from (outer for outer in (group, *group.parents) if outer.is_relative_to(CGROUP))


def _cpu_quota(group: Path) -> float | None:
    """Return the CPU quota of a group in cores; None without a limit."""
    try:
        quota, period = (group / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _available() -> int | None:
    """Return MemAvailable of the machine in bytes."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _left_to_group(group: Path) -> int | None:
    """Return the bytes that a container or Slurm job can still allocate; the kernel reclaims inactive file pages when needed."""
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text()) - _inactive_file(group)
        return None if limit == "max" else max(0, int(limit) - max(0, used))
    except (OSError, ValueError):
        return None


def _inactive_file(group: Path) -> int:
    """Return the bytes of a group's page cache that the kernel reclaims first; 0 if it does not report them."""
    with suppress(OSError):
        lines = (group / "memory.stat").read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
    return 0
