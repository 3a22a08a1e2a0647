"""Run Slurm's commands: answers as plain values, refusals as reasons.

A job's success is never concluded from their answers, which only explain why a job is silent.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path

from ksweep.utils.errors import RunError

COMMAND_SECONDS = 60
SACCT_FIELDS = "JobID,State,ExitCode,NodeList,Submit"
DEFAULT_MAX_ARRAY_SIZE = 1000
"""Used if the cluster does not say (Slurm's own default is 1001)."""

WAITING_STATES = (
    "PENDING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_FED",
    "REQUEUE_HOLD",
    "SPECIAL_EXIT",
    "RESV_DEL_HOLD",
    "SUSPENDED",
    "STOPPED",
)
UNFINISHED_STATES = ("PENDING", "RUNNING", "REQUEUED", "SUSPENDED", "RESIZING")
"""States in accounting of a job that has not ended."""
RUNNING_STATES = ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "RESIZING")


class SlurmError(RunError):
    """Slurm does not answer, or refuses."""


class CutOffError(SlurmError):
    """One of Slurm's commands was killed before it answered."""


@dataclass(frozen=True)
class QueueEntry:
    """A line of the queue."""

    id: str
    """As squeue shows it: 12, or 12_3 for an element of an array."""
    state: str
    reason: str
    tag: str
    """What the job was submitted with as its comment; some sites write their own over it."""
    script: str = ""
    """The file that sbatch was given."""


@dataclass(frozen=True)
class AccountingEntry:
    """Accounting's record of a job that has left the queue."""

    state: str
    exit_code: str = ""
    nodes: str = ""
    submitted: float | None = None
    """Seconds since 1970; of a job that was requeued the last time. None: not said."""
    command: str = ""
    """How it was submitted, with the file that sbatch was given; empty where Slurm is older than 21.08."""


def run_command(*command: str, text: str | None = None) -> str:
    """Return the standard output of a Slurm command.

    Raises:
        SlurmError: it is not there, takes too long or refuses; with its words.
    """
    try:
        done = subprocess.run(
            command,
            input=text,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
            env=environment_outside_allocation(),
        )
    except FileNotFoundError as error:
        raise SlurmError(f"{command[0]} is not installed here: log in to a submit node") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{command[0]} has not answered within {COMMAND_SECONDS} s") from error
    if done.returncode != 0:
        lines = [line.strip().removeprefix(f"{command[0]}: ").removeprefix("error: ") for line in done.stderr.splitlines()]
        words = " ".join(line for line in lines if line)
        kind = CutOffError if done.returncode < 0 else SlurmError
        raise kind(f"{command[0]}: {words or f'exit code {done.returncode}'}")
    return done.stdout + (done.stderr if "--test-only" in command else "")


def environment_outside_allocation() -> dict[str, str]:
    """Return the environment without the variables of a surrounding allocation, which jobs must not inherit."""
    inherited = ("SLURM_CONF",)
    return {k: v for k, v in os.environ.items() if k in inherited or not k.startswith(("SLURM_", "SUBMITIT_", "SBATCH_"))}


def has_cluster() -> bool:
    """Return whether a Slurm cluster is set up here; commands without a configuration are not enough."""
    return shutil.which("sbatch") is not None and _configured(os.environ.get("SLURM_CONF"), os.environ.get("PATH"))


@lru_cache
def _configured(conf: str | None, path: str | None) -> bool:
    try:
        done = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return "Slurmctld" in done.stdout


def cluster_config() -> dict[str, str]:
    """Return the cluster's configuration, read once; empty if Slurm does not answer."""
    try:
        return _config(os.environ.get("SLURM_CONF"), os.environ.get("PATH"))
    except SlurmError:
        return {}


@lru_cache
def _config(conf: str | None, path: str | None) -> dict[str, str]:
    return dict(re.findall(r"^(\w+) *= *(.*?) *$", run_command("scontrol", "show", "config"), re.MULTILINE))


def cluster_name() -> str | None:
    """Return the name of this cluster; job ids are only valid on their own cluster."""
    return cluster_config().get("ClusterName")


def max_array_size() -> int:
    """Return the largest number of elements in an array: Slurm's MaxArraySize bounds the index, which counts from 0."""
    return int(cluster_config().get("MaxArraySize", DEFAULT_MAX_ARRAY_SIZE))


@dataclass(frozen=True)
class Partition:
    """Resources and limits of a partition."""

    name: str
    num_nodes: int
    gpus: int
    """Most GPUs on a node."""
    cpus: int
    memory_mb: int
    minutes: int | None
    """Longest time limit; None: no limit."""
    features: frozenset[str]
    is_default: bool


def partitions() -> dict[str, Partition]:
    """Return the partitions that this user can see, by name."""
    by_name: dict[str, Partition] = {}
    for line in run_command("sinfo", "-h", "-a", "-o", "%P|%D|%G|%c|%m|%l|%f").splitlines():
        name, nodes, gres, cpus, memory, limit, features = (part.strip() for part in line.split("|"))
        plain = name.rstrip("*")
        before = by_name.get(plain, Partition(plain, 0, 0, 0, 0, _minutes(limit), frozenset(), name.endswith("*")))
        by_name[plain] = Partition(
            plain, before.num_nodes + int(nodes), max(before.gpus, _gpus(gres)), max(before.cpus, _number(cpus)),
            max(before.memory_mb, _number(memory)), before.minutes, before.features | _features(features), before.is_default,
        )  # fmt: skip
    return by_name


def _gpus(gres: str) -> int:
    """Return the number of GPUs of a node from "gpu:h100:8(S:0-1),shard:4"."""
    counts = re.findall(r"(?:^|,)gpu(?::[^:,()]+)?:(\d+)", gres)
    return sum(map(int, counts))


def _features(text: str) -> frozenset[str]:
    return frozenset() if text in ("(null)", "") else frozenset(text.split(","))


def _number(text: str) -> int:
    return int(re.sub(r"\D.*", "", text) or 0)


def _minutes(limit: str) -> int | None:
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit)
    if not match:
        return None
    days, hours, mins, _ = (int(part or 0) for part in match.groups())
    return days * 1440 + hours * 60 + mins


@dataclass(frozen=True)
class Association:
    """An account that a user may charge, and what it permits."""

    account: str
    partition: str
    """The only partition that it holds in; empty: all of them."""
    qos: frozenset[str]
    """Empty: nothing is said about it."""


def associations(user: str) -> list[Association]:
    """Return the accounts of a user on this cluster; none without accounting."""
    here = [f"cluster={name}"] if (name := cluster_name()) else []
    try:
        lines = run_command(
            "sacctmgr", "-n", "-P", "show", "assoc", "where", f"user={user}", *here, "format=account,partition,qos"
        )
    except SlurmError:
        return []
    rows = [line.strip().split("|") for line in lines.splitlines() if line.count("|") == 2]
    return [Association(account, partition, frozenset(filter(None, qos.split(",")))) for account, partition, qos in rows]


def enforced_limits() -> frozenset[str]:
    """Return which limits of accounting are enforced: associations, limits, qos."""
    return frozenset(cluster_config().get("AccountingStorageEnforce", "").lower().split(","))


def sbatch_refusal(script: str) -> str | None:
    """Return why the cluster would refuse a batch script; None if it would accept it."""
    try:
        run_command("sbatch", "--test-only", text=script)
    except SlurmError as error:
        return str(error)
    return None


def sbatch(script: Path) -> str:
    """Submit a batch script and return the job id. The script's path identifies the job later."""
    answer = run_command("sbatch", "--parsable", str(script))
    return answer.strip().splitlines()[-1].partition(";")[0]


def squeue(ids: Iterable[str] = (), user: str | None = None) -> list[QueueEntry]:
    """Return the queue entries of some jobs, or of all jobs of a user (or users, "a,b"); each element of an array has its own.

    Raises:
        SlurmError: Slurm does not answer; a job that it has forgotten is simply not listed.
    """
    wanted = sorted(set(ids))
    command = ["squeue", "-h", "-r", "-o", "%i|%T|%r|%k|%o"]
    command += ["-u", user] if user else []
    if wanted and not user:
        # One forgotten id in a list is an error for the whole list: all of this user's are asked for instead.
        command += ["--me"]
    lines = run_command(*command).splitlines()
    entries = [_queued(line) for line in lines if line.count("|") >= 4]
    return [entry for entry in entries if not wanted or entry.id in wanted]


def _queued(line: str) -> QueueEntry:
    number, state, reason, *tag, script = (part.strip() for part in line.split("|"))  # a site's comment may hold anything
    return QueueEntry(number, state, reason, "|".join(tag).replace("(null)", ""), script.replace("(null)", ""))


def sacct(ids: Sequence[str]) -> dict[str, AccountingEntry]:
    """Return the newest accounting entry of each job; empty without accounting.

    `-D` would list earlier starts too; without it the last one stands.
    """
    if not ids:
        return {}
    main = ",".join(sorted({i.partition("_")[0] for i in ids}))
    text = _sacct(main)
    entries: dict[str, AccountingEntry] = {}
    steps_out_of_memory = set()
    for line in text.splitlines():
        job, state, code, nodes, submitted, command = (line.split("|", 5) + [""] * 6)[:6]
        base, dot, _ = job.partition(".")
        if dot:
            # Slurm 22 says FAILED of a job whose step was killed for memory.
            if state == "OUT_OF_MEMORY":
                steps_out_of_memory.add(base)
        elif base in ids:
            entries[base] = AccountingEntry(state.split()[0] if state else "UNKNOWN", code, nodes, _moment(submitted), command)
    return {
        job: replace(entry, state="OUT_OF_MEMORY") if job in steps_out_of_memory and entry.state == "FAILED" else entry
        for job, entry in entries.items()
    }


def _sacct(jobs: str) -> str:
    # Slurm before 21.08 does not know SubmitLine, and refuses the whole command for it.
    for fields in (f"{SACCT_FIELDS},SubmitLine", SACCT_FIELDS):
        with suppress(SlurmError):
            return run_command("sacct", "-n", "-P", "-o", fields, "-j", jobs)
    return ""


def _moment(text: str) -> float | None:
    """Return a time that Slurm printed in this machine's time zone as seconds since 1970."""
    with suppress(ValueError):
        return datetime.fromisoformat(text).timestamp()
    return None


def scontrol_requeue(job_id: str) -> str | None:
    """Put a running job back into the queue. Returns why Slurm refused, or None.

    A job that requeues itself may be killed before scontrol answers; then Slurm is asked for the job's state.
    """
    for last in (False, True):
        try:
            run_command("scontrol", "requeue", job_id)
        except CutOffError as error:
            if scontrol_show_job(job_id).get("JobState", "") != "RUNNING":
                return None
            if last:
                return str(error)
        except SlurmError as error:
            return str(error)
        else:
            return None
    return None


def scancel(ids: Sequence[str]) -> None:
    """Cancel jobs; it is no error if some have ended."""
    if ids:
        run_command("scancel", "--quiet", *ids)


def scontrol_show_job(job_id: str) -> dict[str, str]:
    """Return scontrol's KEY=VALUE pairs of a job; empty if scontrol does not answer."""
    try:
        text = run_command("scontrol", "-o", "show", "job", job_id)
    except SlurmError:
        return {}
    return dict(part.split("=", 1) for part in text.split() if "=" in part)
