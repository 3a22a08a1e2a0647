"""What this machine gives a job: cores, memory, and how the threads of a rank share the cores with whatever else runs here.

Threads of one parallel region meet at a barrier many times a token. An OpenMP runtime that spins there loses its whole time slice
to any other process on one of the cores: two threads on two cores drew 1,550 tokens/s alone and fewer than 55 beside one busy
core. One thread has no barriers (1,035 beside it), and threads that sleep at barriers keep 890 (930 alone). So a job on
CPUs has a rank a core, up to `MOST_RANKS` and as memory and work allow; each rank has an equal share of the cores as its threads,
and where that is several they wait asleep.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")

MOST_RANKS = 8
"""Ranks on CPUs unless asked for: more of them share the memory's bandwidth, and each holds the models."""
DRAWS_PER_RANK = 256
"""Missing draws that make another rank worth its start: 5 s of drawing on one core, about what loading the models takes."""
RANK_BYTES = 1_500_000_000
"""Memory of a rank besides its models: torch, logits, and keys and values of some hundred draws."""

WAIT_POLICY, NUM_THREADS = "OMP_WAIT_POLICY", "OMP_NUM_THREADS"
SPIN_SETTINGS = (WAIT_POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which a user decides how threads wait; one of them set leaves the others alone."""


def num_cores() -> int:
    """Cores that this process may use: those it is bound to, or fewer where a container's quota says so."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for group in _own_groups() if (quota := _cpu_quota(group)) is not None]
    return max(1, min([bound, *(int(quota) for quota in quotas)]))


def free_memory() -> int | None:
    """Bytes that a process of this machine can still have; None where nobody says."""
    known = [n for n in (_available(), *map(_left_to_group, _own_groups())) if n is not None]
    return min(known, default=None)


def num_ranks(num_draws: int, model_bytes: int, cpus_per_rank: int | None = None) -> int:
    """Ranks for a job on the CPUs of this machine: one a core, as far as memory, work and `MOST_RANKS` allow.

    Args:
        num_draws: that the job has to take.
        model_bytes: weights that each rank loads.
        cpus_per_rank: cores of each rank; None: OMP_NUM_THREADS where that is set, else one.
    """
    most = [num_cores() // (cpus_per_rank or _threads_asked_for() or 1), num_draws // DRAWS_PER_RANK, MOST_RANKS]
    if (memory := free_memory()) is not None:
        most.append(memory // (model_bytes + RANK_BYTES))
    return max(1, min(most))


def rank_environment(num_ranks: int, cpus_per_rank: int | None = None) -> dict[str, str]:
    """Variables that a rank's process starts with, for torch and NumPy alike: what the user has set is left as it is.

    Args:
        num_ranks: ranks that share the cores of this machine, those of jobs side by side included.
        cpus_per_rank: threads of each; None: an equal share of the cores.
    """
    threads = {} if os.environ.get(NUM_THREADS) else {NUM_THREADS: str(cpus_per_rank or max(1, num_cores() // num_ranks))}
    return threads | wait_environment()


def wait_environment() -> dict[str, str]:
    """The variable that lets threads sleep at barriers; nothing where the user has set how they wait."""
    return {} if any(os.environ.get(name) for name in SPIN_SETTINGS) else {WAIT_POLICY: "PASSIVE"}


@contextmanager
def environment(added: Mapping[str, str]) -> Iterator[None]:
    """Processes started inside have these variables; OpenMP and BLAS libraries read theirs when they are loaded, not later."""
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
    """`rank_environment` as shell lines for a Slurm job, which learns there how many CPUs its node has for it."""
    spins = "".join(f"${{{name}:-}}" for name in SPIN_SETTINGS)
    cpus = "${SLURM_CPUS_ON_NODE:-1}"
    share = f"$(( {cpus} < {num_ranks} ? 1 : {cpus} / {num_ranks} ))"
    return [
        f'[ -n "{spins}" ] || export {WAIT_POLICY}=PASSIVE',
        f'export {NUM_THREADS}="${{{NUM_THREADS}:-${{SLURM_CPUS_PER_TASK:-{share}}}}}"',
    ]


def _threads_asked_for() -> int | None:
    """The first number of OMP_NUM_THREADS, which may list one for each level of nesting."""
    first = os.environ.get(NUM_THREADS, "").partition(",")[0].strip()
    return int(first) if first.isdigit() and int(first) else None


def _own_groups() -> Iterator[Path]:
    """Control groups (version 2) that this process is in, the innermost first."""
    try:
        own = next(line[3:].strip() for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return
    group = CGROUP / own.lstrip("/")
    yield from (one for one in (group, *group.parents) if one.is_relative_to(CGROUP))


def _cpu_quota(group: Path) -> float | None:
    """Cores' worth of time that a group may use; None without a limit."""
    try:
        quota, period = (group / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _available() -> int | None:
    """MemAvailable of the machine."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _left_to_group(group: Path) -> int | None:
    """What a container or a Slurm job has left. Pages of files that it has read and no longer uses are given up when needed."""
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text()) - _inactive_file(group)
        return None if limit == "max" else max(0, int(limit) - max(0, used))
    except (OSError, ValueError):
        return None


def _inactive_file(group: Path) -> int:
    """Bytes of a group's page cache that the kernel takes back first; 0 where it does not say."""
    with suppress(OSError):
        lines = (group / "memory.stat").read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
    return 0
