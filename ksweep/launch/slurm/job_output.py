"""What Slurm itself wrote into a job's output: evidence of how the job ended where accounting is off or says less."""

from __future__ import annotations

import re
from dataclasses import dataclass

END_LINES = 5
"""slurmstepd's final message is within this many lines of the end; one further up may be of an earlier start of the job."""
QUOTED_LINES, QUOTED_CHARACTERS = 3, 300

KILLED_FOR_MEMORY = re.compile(
    r"^(?:slurmstepd|srun)\b.*(?:oom[-_ ]kill|out of memory|exceeded (?:job |step )?memory limit).*$",
    re.IGNORECASE | re.MULTILINE,
)
"""Slurm's own lines only: a rank that survives another logs "killed, or out of memory", and so does one that halves its batch."""
ENDED_BY_SLURM = re.compile(r"\*\*\* JOB \S+ ON \S+ CANCELLED AT \S+ (?:DUE TO ([A-Z ]+?) )?\*\*\*")
STATE_OF_CAUSE = {"TIME LIMIT": "TIMEOUT", "PREEMPTION": "PREEMPTED", "NODE FAILURE": "NODE_FAIL"}
"""Cause in slurmstepd's message -> state that accounting gives."""


@dataclass(frozen=True)
class JobOutput:
    """What a job's output says of its end."""

    ended_as: str = ""
    """State that accounting would give, from slurmstepd's last message; empty where it wrote none."""
    memory_line: str = ""
    """The line in which Slurm says that it killed a process for its memory."""
    last_lines: str = ""
    """The end of the output, to be quoted; empty where nothing was written."""


def parse_output(text: str) -> JobOutput:
    """Return what the last lines of a job's output say of its end."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # slurmstepd says CANCELLED of a STEP, too, when srun ends it because one of its tasks was killed.
    ended = ENDED_BY_SLURM.search("\n".join(text.splitlines()[-END_LINES:]))
    killed = KILLED_FOR_MEMORY.search(text)
    return JobOutput(
        ended_as="" if ended is None else STATE_OF_CAUSE.get(ended[1] or "", "CANCELLED"),
        memory_line="" if killed is None else killed[0],
        last_lines=" | ".join(lines[-QUOTED_LINES:])[-QUOTED_CHARACTERS:],
    )
