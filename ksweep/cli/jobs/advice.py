"""What to do about a job, by the class of its ending or by what it waits for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ksweep.cli.jobs.rows import Line

WAITS = {
    "Priority": "other jobs are before it: nothing is to be done",
    "Resources": "it starts as soon as enough is free; fewer gpus or nodes, or a shorter resources.time, may start sooner",
    "QOS": "a limit of its QOS: it starts when others of yours have ended, or submit under another resources.qos",
    "Assoc": "a limit of its account: it starts when others of yours have ended, or submit under another resources.account",
    "Dependency": "it waits for the array before it (resources.max_parallel_jobs)",
    "JobArrayTaskLimit": "as many of its array run as resources.max_parallel_jobs allows",
    "JobHeld": "it is held: `scontrol release {slurm}`, or ask who held it",
    "BeginTime": "it was put back into the queue a moment ago and starts again soon",
    "ReqNodeNotAvail": "its nodes are down or reserved, perhaps for a maintenance: a shorter resources.time may fit before that",
    "PartitionTimeLimit": "resources.time is longer than the partition allows: cancel it and submit with a shorter one",
    "PartitionDown": "its partition is down: wait, or cancel it and submit to another resources.partition",
    "Reservation": "its reservation has not begun, or is not there any more",
}
"""Beginning of the reason that Slurm gives -> what it means."""

AGAIN = "`{retry}` runs it again"
WITH_SETTINGS = "then your sweep's command with that setting and --retry"
CARRIES_ON = "whole units are kept: `{retry}`, or the sweep's own command, carries on from them"
REMEDIES = {
    "out of memory": "of the GPU: lower resources.batch_size (now {batch_size}); of the node: raise resources.mem_gb "
    f"(now {{mem_gb}}); {WITH_SETTINGS}",
    "time limit": "a unit of draws does not fit into one start: raise resources.time (now {time}), or use more ranks; "
    f"{WITH_SETTINGS}",
    "timeout": "it reached resources.time ({time}) and was not put back into the queue: raise it, or lower "
    f"resources.cells_per_job; {CARRIES_ON}",
    "preempted": f"raise its priority (resources.qos) if this goes on; {CARRIES_ON}",
    "cancelled": CARRIES_ON,
    "stopped": CARRIES_ON,
    "node failure": f"if it is the same node again, leave it out: extra={{{{exclude: {{nodes}}}}}}; {CARRIES_ON}",
    "lost": f"somebody cancelled it, or Slurm forgot it; {CARRIES_ON}",
    "killed": "somebody ended it, or this machine ran out of memory (see `dmesg`): if so, lower resources.batch_size "
    f"(now {{batch_size}}); {CARRIES_ON}",
    "never submitted": "nothing was computed: the sweep's own command submits it again",
    "dead rank": "a rank was killed without a word, most often for memory: lower resources.batch_size (now {batch_size}) "
    f"or raise resources.mem_gb (now {{mem_gb}}), {WITH_SETTINGS}; if it was not that, {AGAIN}",
    "disk full": f"free some room, or set registry= and vector_cache= to a larger disk; {CARRIES_ON}",
    "bad input": f"what was asked for cannot be done, see the message; correct it, {WITH_SETTINGS}",
    "NaN": "a model gave values that are not finite: look at the input that is named, try autoencoder.dtype=float32; "
    f"{WITH_SETTINGS}",
    "failure": f"see the message; {AGAIN}",
    "bug": f"an error in the code, see the traceback; {AGAIN} once it is mended",
}
"""Class of an ending -> what to do next."""
OTHER_NAMES = {"DiskFullError": "disk full"}


def advice(line: Line, argument: Mapping[str, Any]) -> str:
    """What to do next; `argument` is what the job was given (batch_size, resources)."""
    if line.state == "finished":
        return f"`ksweep ls {line.sweep}` shows its results"
    if line.state == "running":
        return f"`ksweep watch {line.job}` shows how it goes on, `ksweep logs {line.job} -f` what it says"
    words = _words(line, argument)
    if line.state == "waiting":
        reason = re.sub(r"^\w+: ", "", line.reason)
        return next((text.format(**words) for begin, text in WAITS.items() if reason.startswith(begin)), "")
    if line.state == "unknown":
        return "look again in half a minute; the sweep's own command asks Slurm too"
    remedy = REMEDIES.get(OTHER_NAMES.get(line.kind, line.kind))
    return (remedy or (AGAIN if line.state == "failed" else CARRIES_ON)).format(**words)


def _words(line: Line, argument: Mapping[str, Any]) -> dict[str, str]:
    resources = argument.get("resources") or {}
    known = {"batch_size": argument.get("batch_size"), "mem_gb": resources.get("mem_gb"), "time": resources.get("time")}
    return {
        **{name: "the default" if value is None else str(value) for name, value in known.items()},
        "retry": f"ksweep retry {line.sweep}",
        "slurm": line.slurm or "",
        "nodes": line.nodes or "NODE",
    }
