"""`ksweep retry`: run the command of a sweep again, for the cells that failed."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ksweep.cli.jobs.find import JobSelection, job_facts
from ksweep.launch import status
from ksweep.launch.job import Job
from ksweep.launch.ownership import spec_and_doubt
from ksweep.utils.console import remark
from ksweep.utils.errors import RunError


@dataclass(frozen=True)
class Retry:
    """The sweep's own command, to be run again."""

    sweep: str
    cells: tuple[str, ...]
    """Labels of the cells that are run again although they failed; empty: all that failed."""
    directory: str
    command: tuple[str, ...]


def plan_retry(selection: JobSelection) -> Retry:
    """Return the command that runs failed cells again: all of a sweep, those of one job, or a single one.

    Raises:
        RunError: the script is gone, there is nothing to run again, or the command was recorded without its tokens or belongs to
            another user.
    """
    job, whole_sweep = selection.jobs[-1], selection.kind == "sweep"
    facts = job_facts(job)
    if not whole_sweep and (obstacle := _retry_obstacle(job)):
        raise RunError(f"job {job.id} {obstacle}")
    spec, doubt = spec_and_doubt(job)
    origin: dict[str, Any] = spec["argument"].get("origin", {})
    argv, directory = list(origin.get("argv", [])), origin.get("directory")
    if not argv or directory is None or not (Path(directory) / argv[0]).is_file():
        raise RunError(f"the script of this sweep ({' '.join(argv) or 'unknown'}) no longer exists: run yours with --retry")
    plain = [word for word in argv if word != "--retry" and not word.startswith("--retry-cell=")]
    cells = [] if whole_sweep else [(key, label) for key, label in facts.cells if key in (selection.keys or facts.keys)]
    options = ["--retry"] if whole_sweep else [f"--retry-cell={key}" for key, _ in cells]
    if any("***" in str(word) for word in plain):
        raise RunError(
            f"the command of job {job.id} was recorded without its tokens and passwords: run it yourself, with them in place of "
            f"***: cd {shlex.quote(str(directory))} && {' '.join(['python', *map(str, plain), *options])}"
        )
    if doubt:
        typed = f"cd {shlex.quote(str(directory))} && {shlex.join(['python', *map(str, plain), *options])}"
        raise RunError(f"job {job.id} {doubt}, so its command is shown and not run. If you trust it, run it yourself: {typed}")
    return Retry(facts.sweep, tuple(label for _, label in cells), str(directory), (sys.executable, *plain, *options))


def _retry_obstacle(job: Job) -> str:
    job_status = status.job_status(job)
    if job_status.state == "finished":
        return "has finished: there is nothing to run again"
    if job_status.state in status.LIVE_STATES:
        return f"is still {job_status.state} ({job_status.reason}): `ksweep cancel` ends it"
    return ""


def run_retry(retry: Retry, *, as_json: bool = False) -> dict[str, Any]:
    """Run the command; with `as_json` its output goes to standard error. Return the retry and the command's exit code."""
    cells = f" (of the failed cells only {', '.join(retry.cells)})" if retry.cells else ""
    remark(f"{retry.directory}: {' '.join(retry.command)}{cells}")
    output = sys.stderr if as_json else None
    done = subprocess.run(retry.command, cwd=retry.directory, check=False, stdout=output)
    return {**asdict(retry), "exit_code": done.returncode}
