"""Advice on what to do about a job, by the class of its failure or stop, or by what it waits for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ksweep.cli.jobs.rows import JobRow

WAITING_ADVICE = {
    "Priority": "other jobs are ahead of it: there is nothing to do",
    "Resources": "it starts as soon as enough is free; fewer gpus or nodes, or a shorter resources.time, may start sooner",
    "QOS": "it has hit a limit of its QOS: it starts when other jobs of yours have ended, or submit under another resources.qos",
    "Assoc": "it has hit a limit of its account: it starts when other jobs of yours have ended, or submit under another "
    "resources.account",
    "Dependency": "it waits for the array before it (resources.max_parallel_jobs)",
    "JobArrayTaskLimit": "resources.max_parallel_jobs limits how many jobs of its array run at once",
    "JobHeld": "it is held: `scontrol release {slurm}`, or ask who held it",
    "BeginTime": "it was put back into the queue a moment ago and will start again soon",
    "ReqNodeNotAvail": "its nodes are down or reserved, perhaps for maintenance: a shorter resources.time may fit before that",
    "PartitionTimeLimit": "resources.time is longer than the partition allows: cancel it and submit with a shorter time",
    "PartitionDown": "its partition is down: wait, or cancel it and submit to another resources.partition",
    "Reservation": "its reservation has not begun, or no longer exists",
}
"""Start of the reason that Slurm gives -> what it means."""

RETRY = "`{retry}` runs it again"
RETRY_WITH_SETTING = "then run your sweep's command with that setting and --retry"
CONTINUE = "complete units are kept: `{retry}`, or the sweep's own command, continues from them"
ADVICE = {
    "out of memory": "if it was GPU memory, lower resources.batch_size (now {batch_size}); if it was the node's, raise "
    f"resources.mem_gb (now {{mem_gb}}); {RETRY_WITH_SETTING}",
    "time limit": "one unit of draws does not fit into one start: raise resources.time (now {time}), or use more ranks; "
    f"{RETRY_WITH_SETTING}",
    "timeout": "it reached resources.time ({time}) and was not put back into the queue: raise it, or lower "
    f"resources.cells_per_job; {CONTINUE}",
    "preempted": f"raise its priority (resources.qos) if this goes on; {CONTINUE}",
    "cancelled": CONTINUE,
    "stopped": CONTINUE,
    "node failure": f"if it is the same node again, exclude it: extra={{{{exclude: {{nodes}}}}}}; {CONTINUE}",
    "lost": f"somebody cancelled it, or Slurm has forgotten it; {CONTINUE}",
    "killed": "somebody killed it, or this machine ran out of memory (see `dmesg`): if so, lower resources.batch_size "
    f"(now {{batch_size}}); {CONTINUE}",
    "never submitted": "nothing was computed: the sweep's own command submits it again",
    "dead rank": "a rank was killed without leaving a message, most often for memory: lower resources.batch_size (now "
    f"{{batch_size}}) or raise resources.mem_gb (now {{mem_gb}}), {RETRY_WITH_SETTING}; if it was not memory, {RETRY}",
    "disk full": f"free some space, or set registry= and vector_cache= to a larger disk; {CONTINUE}",
    "disk error": f"look at the disk or the network file system that the message names; {CONTINUE}",
    "bad input": f"the request cannot be carried out, see the message; correct it, {RETRY_WITH_SETTING}",
    "NaN": "a model returned values that are not finite: look at the input named in the message, try autoencoder.dtype=float32; "
    f"{RETRY_WITH_SETTING}",
    "failure": f"see the message; {RETRY}",
    "bug": f"an error in the code, see the traceback; {RETRY} once it is fixed",
}
"""Class of a failure or stop -> what to do next."""
CLASS_OF_EXCEPTION = {"DiskFullError": "disk full"}
"""Exception names that runs of earlier versions have in place of a class."""


def advice(row: JobRow, argument: Mapping[str, Any]) -> str:
    """Return what to do next about a job; `argument` is what the job was given (batch_size, resources)."""
    if row.state == "finished":
        return f"`ksweep ls {row.sweep}` shows its results"
    if row.state == "running":
        return f"`ksweep watch {row.job}` shows its progress, `ksweep logs {row.job} -f` its output"
    fields = _advice_fields(row, argument)
    if row.state == "waiting":
        reason = re.sub(r"^\w+: ", "", row.reason)
        return next((text.format(**fields) for start, text in WAITING_ADVICE.items() if reason.startswith(start)), "")
    if row.state == "unknown":
        return "look again in half a minute; the sweep's own command asks Slurm too"
    template = ADVICE.get(CLASS_OF_EXCEPTION.get(row.kind, row.kind))
    return (template or (RETRY if row.state == "failed" else CONTINUE)).format(**fields)


def _advice_fields(row: JobRow, argument: Mapping[str, Any]) -> dict[str, str]:
    resources = argument.get("resources") or {}
    settings = {"batch_size": argument.get("batch_size"), "mem_gb": resources.get("mem_gb"), "time": resources.get("time")}
    return {
        **{name: "the default" if value is None else str(value) for name, value in settings.items()},
        "retry": f"ksweep retry {row.sweep}",
        "slurm": row.slurm or "",
        "nodes": row.nodes or "NODE",
    }
