"""Submit jobs to Slurm: resources -> batch script -> array, with a note before and after sbatch, so that no job is ever lost.

logs/submissions/<name>/intent.json    written before sbatch: which jobs, under which tag
                        script.sh      the batch script
                        jobs.json      job directory of each element of the array
                        submitted.json written after sbatch: Slurm's number
                        *_log.err|out  what the ranks wrote

A job needs nothing from the launcher once sbatch has it: all that it reads is on disk by then. If a launcher dies after sbatch
and before its note, the job is found again by its tag, or by its own heartbeat, and adopted.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import secrets
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ksweep.config.resources import Resources
from ksweep.launch.job import Job, read_or
from ksweep.launch.ownership import is_own, owner_of
from ksweep.launch.rank_records import process_record, record_is_alive
from ksweep.launch.slurm import commands
from ksweep.utils import machine
from ksweep.utils.errors import SpecError
from ksweep.utils.files import publish

log = logging.getLogger(__name__)

TAG = "ksweep:"
SIGNAL_SECONDS = 120
"""How long before its time limit a job is signalled to stop; half of the limit if that is shorter."""
SBATCH_DEFAULT_FIELDS = ("partition", "account", "qos", "constraint")
SBATCH_DEFAULT_EXTRAS = ("wckey", "reservation")
SBATCH_OUTLIVES_SECONDS = 3.0
"""How long an sbatch may run on after its launcher was killed."""


def sbatch_parameters(
    resources: Resources, name: str, *, num_jobs: int = 1, tag: str = "", after: str | None = None
) -> dict[str, Any]:
    """Translate resources into parameters of submitit's SlurmExecutor."""
    gpus = resources.gpus or 0
    extra: dict[str, Any] = {"requeue": True, "comment": tag}
    if resources.niceness:
        extra["nice"] = resources.niceness
    if resources.whole_nodes and resources.mem_gb is None:
        extra["mem"] = 0  # an exclusive node gives all its CPUs and GPUs, but of its memory only what is asked for
    others = {key.replace("_", "-"): value for key, value in resources.extra.items()}
    if after is not None:
        both = [f"afterany:{after}", *([str(others.pop("dependency"))] if "dependency" in others else [])]
        extra["dependency"] = ",".join(both)
    parameters = {
        "job_name": resources.job_name or name,
        "time": resources.minutes,
        "nodes": resources.nodes,
        "ntasks_per_node": gpus // resources.gpus_per_model or resources.tasks or 1,
        "gpus_per_node": gpus or None,
        # Slurm's own --cpus-per-gpu excludes --cpus-per-task, and submitit wants --gpus-per-task with it.
        "cpus_per_task": cpus_per_rank(resources, gpus),
        "mem": None if resources.mem_gb is None else f"{round(resources.mem_gb * 1024)}MB",
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "exclusive": True if resources.whole_nodes else None,
        "signal_delay_s": min(SIGNAL_SECONDS, resources.minutes * 30),
        "setup": resources.setup_lines,
        # A rank that fails ends the others at once; one that has finished or stopped does not, however long they take.
        "srun_args": ["--kill-on-bad-exit=1", "--wait=0"],
        "array_parallelism": min(num_jobs, resources.max_parallel_jobs or num_jobs),
        "additional_parameters": extra | others,
    }
    return {k: v for k, v in parameters.items() if v is not None}


def cpus_per_rank(resources: Resources, gpus: int) -> int | None:
    """Return the CPUs for each rank of a job with so many GPUs on a node; None if the user left that open."""
    if not gpus:
        return resources.cpus_per_task
    return None if resources.cpus_per_gpu is None else resources.cpus_per_gpu * resources.gpus_per_model


def batch_script(
    folder: Path, resources: Resources, name: str, *, num_jobs: int, tag: str, code: Path | None = None, after: str | None = None
) -> str:
    """Return the text of a submission's batch script: submitit's, with our own start command instead of its pickles."""
    import submitit

    executor = submitit.SlurmExecutor(folder=folder)
    given = sbatch_parameters(resources, name, num_jobs=num_jobs, tag=tag, after=after)
    # The user's lines first: what they set must not take away the code as submitted.
    path = f'export PYTHONPATH={shlex.quote(str(code))}"${{PYTHONPATH:+:$PYTHONPATH}}"' if code else ""
    # A signal for the whole job must not end the shell before the ranks have stopped.
    threads = machine.rank_environment_lines(given["ntasks_per_node"])
    given["setup"] = [*given["setup"], *threads, "trap : TERM USR2", *([path] if path else [])]
    executor.update_parameters(**given)
    if num_jobs > 1:
        executor.parameters["map_count"] = num_jobs
    # -P: the directory that a job starts in, often the checkout itself, must not hide the code as submitted.
    start = shlex.join([sys.executable, "-u", "-P", "-m", "ksweep.launch.worker.start", str(folder)])
    return str(executor._make_submission_file_text(start, uid=tag))


def validate_slurm_resources(resources: Resources) -> None:
    """Check before anything is submitted that the cluster has the resources; an error lists what it has.

    Raises:
        SpecError: it has no such partition, account, QOS, feature, number of GPUs or nodes, memory, or time limit.
    """
    there = commands.partitions()
    if resources.partition is not None:
        _validate_choice("partition", resources.partition, sorted(there))
    wanted = _requested_partitions(resources, there)
    _validate_account(resources, [p.name for p in wanted])
    ranks, cpus = ("gpus", "cpus_per_gpu") if resources.gpus else ("tasks", "cpus_per_task")
    for what, value, most in (
        ("gpus", resources.gpus or 0, max((p.gpus for p in wanted), default=0)),
        ("nodes", resources.nodes, max((p.num_nodes for p in wanted), default=0)),
        ("mem_gb", resources.mem_gb or 0, max((p.memory_mb for p in wanted), default=0) / 1024),
        (
            f"{ranks} x {cpus}",
            (getattr(resources, ranks) or 1) * (getattr(resources, cpus) or 1),
            max((p.cpus for p in wanted), default=0),
        ),
    ):
        if wanted and value > most:
            where = "" if what == "nodes" else " on a node"
            raise SpecError(f"resources.{what}={value}, but {_partition_names(wanted)} has {most:.6g}{where}: lower it")
    limits = [p.minutes for p in wanted if p.minutes is not None]
    if limits and len(limits) == len(wanted) and resources.minutes > max(limits):
        raise SpecError(
            f"resources.time={resources.time!r}, but {_partition_names(wanted)} allows {max(limits)} minutes: lower it; "
            "a job that reaches its limit is requeued"
        )
    features = frozenset().union(*(p.features for p in wanted))
    if resources.constraint and features and resources.constraint.replace("_", "").replace("-", "").isalnum():
        _validate_choice("constraint", resources.constraint, sorted(features))


def with_sbatch_defaults(resources: Resources) -> Resources:
    """Fill in what the sweep leaves open from the user's defaults for sbatch ($SBATCH_ACCOUNT and so on).

    sbatch itself runs without these variables: they would override the sweep.
    """
    defaults = {
        name: value
        for name in (*SBATCH_DEFAULT_FIELDS, *SBATCH_DEFAULT_EXTRAS)
        if (value := os.environ.get(f"SBATCH_{name.upper()}"))
    }
    fields: dict[str, Any] = {
        name: defaults[name] for name in SBATCH_DEFAULT_FIELDS if name in defaults and getattr(resources, name) is None
    }
    return replace(
        resources,
        **fields,
        extra={name: defaults[name] for name in SBATCH_DEFAULT_EXTRAS if name in defaults} | dict(resources.extra),
    )


def max_gpus_per_node(resources: Resources) -> int:
    """Return the largest number of GPUs on a node of the job's partition; GPUs of the login node do not count."""
    return max((p.gpus for p in _requested_partitions(resources, commands.partitions())), default=0)


def _requested_partitions(resources: Resources, there: Mapping[str, commands.Partition]) -> list[commands.Partition]:
    named = [there[p] for p in (resources.partition or "").split(",") if p in there]
    return named or [p for p in there.values() if p.is_default]


def _partition_names(partitions: Sequence[commands.Partition]) -> str:
    return f"partition {' or '.join(p.name for p in partitions)}"


def _validate_account(resources: Resources, partitions: Sequence[str]) -> None:
    """Check that account and QOS are this user's; if accounting does not say, `sbatch --test-only` decides later."""
    enforced = commands.enforced_limits()
    if not {resources.account, resources.qos} - {None} or "associations" not in enforced:
        return
    associations = [a for a in commands.associations(getpass.getuser()) if a.partition in ("", *partitions)]
    if resources.account is not None and associations:
        _validate_choice("account", resources.account, sorted({a.account for a in associations}), " (yours on this cluster)")
        associations = [a for a in associations if a.account == resources.account]
    valid = sorted(frozenset().union(*(a.qos for a in associations)))
    if resources.qos is not None and valid and "qos" in enforced:
        _validate_choice(
            "qos", resources.qos, valid, f" (yours{f' with account {resources.account}' if resources.account else ''})"
        )


def _validate_choice(what: str, value: str, valid: Sequence[str], whose: str = "") -> None:
    if any(part not in valid for part in value.split(",")):
        raise SpecError(f"resources.{what}={value!r} is not one of {', '.join(valid)}{whose}")


@dataclass(frozen=True)
class Submission:
    """Result of submitting jobs."""

    arrays: list[str]
    """Slurm's id of each array."""
    not_submitted: list[Job]
    """Jobs that Slurm refused after it had accepted others; their cells are still missing."""
    why: str = ""


def submit_arrays(
    logs: Path, jobs: Sequence[Job], resources: Resources, name: str, code: Path | None = None, *, beside: Sequence[str] = ()
) -> Submission:
    """Submit jobs in arrays that the cluster accepts; with max_parallel_jobs they wait for the jobs `beside` (Slurm's ids).

    Raises:
        SpecError: the cluster does not take such a job; nothing is submitted. RunError: Slurm does not answer, or refuses all.
    """
    most = commands.max_array_size()
    arrays: list[str] = []
    # A cap holds within an array; an array waits for the one before, so that all together keep it.
    after = ":".join(sorted({n.partition("_")[0] for n in beside})) if resources.max_parallel_jobs else ""
    for start in range(0, len(jobs), most):
        part, rest = jobs[start : start + most], jobs[start + most :]
        try:
            number = _submit_array(logs, part, resources, name, code, after or None, check=start == 0)
        except commands.SlurmError as error:
            _mark_never_submitted(rest, "Slurm did not take the array before its own")
            if not arrays:
                raise
            return Submission(arrays, [*part, *rest], str(error))
        arrays.append(number)
        after = number if resources.max_parallel_jobs else ""
    return Submission(arrays, [])


def _submit_array(
    logs: Path, jobs: Sequence[Job], resources: Resources, name: str, code: Path | None, after: str | None, *, check: bool
) -> str:
    key = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"
    folder, tag = logs / "submissions" / key, f"{TAG}{key}"
    text = batch_script(folder, resources, name, num_jobs=len(jobs), tag=tag, code=code, after=after)
    if check and (reason := commands.sbatch_refusal(text)):
        raise SpecError(f"the cluster rejects this job ({reason}); asked for: {job_shape_text(resources)}")
    publish(folder / "jobs.json", json.dumps([str(job.path) for job in jobs]).encode())
    publish(folder / "script.sh", text.encode())
    intent = {"tag": tag, "launcher": process_record(), "user": getpass.getuser(), "cluster": commands.cluster_name()}
    publish(folder / "intent.json", json.dumps(intent).encode())
    try:
        number = _sbatch(folder, tag, jobs)
        _note_submission(folder, number, jobs)
    except BaseException:
        if not (folder / "submitted.json").exists():  # interrupted: a notebook lives on, and hands nothing over any more
            ended = intent | {"launcher": process_record() | {"process_started": 0.0, "start_ticks": -1}}
            publish(folder / "intent.json", json.dumps(ended).encode())
        raise
    return number


def _sbatch(folder: Path, tag: str, jobs: Sequence[Job]) -> str:
    """Submit the script of a submission, and return Slurm's number."""
    try:
        return commands.sbatch(folder / "script.sh")
    except commands.SlurmError as error:
        # "Socket timed out" may come after the job was taken. Where squeue does not answer either, the next command settles it.
        submitted_id = _find_submitted_id(folder, tag, jobs)
        if submitted_id is None:
            _mark_submission_failed(folder, jobs, f"sbatch refused it: {error}")
            raise
        return submitted_id


def _note_submission(folder: Path, number: str, jobs: Sequence[Job]) -> None:
    user, cluster = getpass.getuser(), commands.cluster_name()
    for index, job in enumerate(jobs):
        job.write_note(
            "slurm",
            {
                "id": f"{number}_{index}" if len(jobs) > 1 else number, "folder": str(folder), "tag": f"{TAG}{folder.name}",
                "user": user, "cluster": cluster,
            },
        )  # fmt: skip
    publish(folder / "submitted.json", json.dumps({"id": number}).encode())


def resolve_interrupted_submissions(logs: Path) -> list[str]:
    """Resolve submissions whose launcher died between its two notes: adopt jobs that Slurm has, finalize the others.

    Returns a line of text for each.
    """
    return [line for folder in _interrupted_submissions(logs) for line in _resolve_submission(folder)]


def is_in_interrupted_submission(job: Job) -> bool:
    """Return whether a job belongs to a submission that Slurm may or may not have accepted."""
    return any(
        str(job.path) in json.loads((folder / "jobs.json").read_text()) for folder in _interrupted_submissions(job.path.parent)
    )


def _interrupted_submissions(logs: Path) -> list[Path]:
    intents = sorted((logs / "submissions").glob("*/intent.json"))
    return [p.parent for p in intents if not (p.parent / "submitted.json").exists()]


def _resolve_submission(folder: Path) -> list[str]:
    if read_or(lambda: record_is_alive(json.loads((folder / "intent.json").read_text())["launcher"]), False):
        return [f"submission {folder.name}: another launcher is handing it over at this moment"]
    if not is_own(folder / "intent.json"):
        owner = owner_of(folder / "intent.json")
        return [f"submission {folder.name}: it is in doubt; only a command of {owner} can tell whether Slurm has it"]
    intent = json.loads((folder / "intent.json").read_text())
    jobs = [Job(Path(path)) for path in json.loads((folder / "jobs.json").read_text())]
    if (owner := intent.get("user", getpass.getuser())) != getpass.getuser():
        return [f"submission {folder.name}: its launcher died; only a command of {owner} can tell whether Slurm has it"]
    if (there := intent.get("cluster")) and (here := commands.cluster_name()) not in (None, there):
        return [f"submission {folder.name}: its launcher died on cluster {there}; this is {here}, only a command there can tell"]
    number = _find_submitted_id(folder, intent["tag"], jobs)
    if number is not None:
        _note_submission(folder, number, jobs)
        return [f"submission {folder.name}: its launcher died before it noted Slurm's number; found again as job {number}"]
    _mark_submission_failed(folder, jobs, "its launcher died before sbatch")
    return [
        f"submission {folder.name}: its launcher died before sbatch; Slurm knows nothing of it, so its cells are submitted again"
    ]


def _mark_submission_failed(folder: Path, jobs: Sequence[Job], why: str) -> None:
    """Note that Slurm has not accepted a submission: its cells are missing again."""
    _mark_never_submitted(jobs, why)
    publish(folder / "submitted.json", json.dumps({"id": None}).encode())


def _mark_never_submitted(jobs: Sequence[Job], why: str) -> None:
    for job in jobs:
        job.write_note("settled", {"state": "stopped", "kind": "never submitted", "reason": why})
        job.free_reserve()


def _find_submitted_id(folder: Path, tag: str, jobs: Sequence[Job]) -> str | None:
    """Return Slurm's id of a submission; look twice: its sbatch may have begun so recently that it is not in the queue yet."""
    number = _submitted_id(folder, tag, jobs)
    if number is None:  # how long ago that was, only the wall clock says
        time.sleep(SBATCH_OUTLIVES_SECONDS)
        number = _submitted_id(folder, tag, jobs)
    return number


def _submitted_id(folder: Path, tag: str, jobs: Sequence[Job]) -> str | None:
    """Return Slurm's id of a submission, from a job that runs or ran, from its output files, or from the queue."""
    ids = [job.slurm_id() for job in jobs] + [p.name.partition("_")[0] for p in folder.glob("*_log.*")]
    # By the script as well: some sites write a comment of their own over the tag.
    script_path = str(folder / "script.sh")
    ids += [entry.id for entry in commands.squeue(user=getpass.getuser()) if entry.tag == tag or entry.script == script_path]
    return next((slurm_id.partition("_")[0] for slurm_id in ids if slurm_id), None)


def job_shape_text(resources: Resources) -> str:
    """Return human-readable resources of one job: "2 nodes x 8 GPUs, 24:00:00, partition main"."""
    gpus, tasks = resources.gpus or 0, resources.tasks or 1
    what = f"{gpus} GPU{'s' * (gpus != 1)}" if gpus else f"{tasks} CPU rank{'s' * (tasks != 1)}"
    what += f" ({resources.gpus_per_model} per model)" if resources.gpus_per_model > 1 else ""
    nodes = f"{resources.nodes} nodes x " if resources.nodes > 1 else ""
    hours, mins = divmod(resources.minutes, 60)
    named = [f"{n} {v}" for n in ("partition", "account", "qos", "constraint") if (v := getattr(resources, n))]
    words = [f"{nodes}{what}", f"{hours}:{mins:02d}:00", *named]
    words += ["exclusive"] if resources.whole_nodes else []
    words += [f"nice {resources.niceness}"] if resources.niceness else []
    return ", ".join(words)
