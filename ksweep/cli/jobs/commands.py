"""The commands about jobs: ls, watch, logs, why, cancel, retry."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ksweep.cli.output import JsonOption, RegistryOption, print_json, print_table
from ksweep.utils.console import remark, say
from ksweep.utils.errors import RequestError

JobArgument = Annotated[str, typer.Argument(help="Job, run, cell or sweep (its newest job); a unique prefix is enough.")]
INTERRUPTED = 130


def ls_command(
    sweep: Annotated[str | None, typer.Argument(help="Show this sweep only; a unique prefix is enough.")] = None,
    state: Annotated[str | None, typer.Option(help="running, waiting, unknown, finished, failed or stopped.")] = None,
    limit: Annotated[int, typer.Option(help="Show this many, the newest; 0: all.", min=0)] = 30,
    registry: RegistryOption = Path("registry"),
    as_json: JsonOption = False,
) -> None:
    """List waiting and running cells, and runs that have ended, newest first."""
    from ksweep.cli.jobs.ls import LS_COLUMNS, cell_rows, format_cell_row
    from ksweep.utils.console import console

    rows = cell_rows(registry, sweep, state)
    shown = rows[: limit or None]
    if as_json:
        for row in shown:
            print_json(asdict(row))
    else:
        width = console().width
        print_table(LS_COLUMNS, [format_cell_row(row, width) for row in shown])
    if len(shown) < len(rows):
        remark(f"{len(rows) - len(shown):,} more, older ones: --limit 0 shows all")


def watch_command(
    name: Annotated[str | None, typer.Argument(metavar="[SWEEP]", help="Sweep, job or run; without, all live jobs.")] = None,
    registry: RegistryOption = Path("registry"),
    once: Annotated[bool, typer.Option("--once", help="Show the current state and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object whenever a job's state has changed.")] = False,
) -> None:
    """Show the progress of jobs until they have ended; their launcher is not needed. Exit code 1 if a job of SWEEP failed."""
    from ksweep.cli.jobs.find import short_id
    from ksweep.cli.jobs.watch import discard_stdout, poll_job_rows, print_changes, show_updates
    from ksweep.utils.console import console

    updates = poll_job_rows(registry, name, once=once)
    try:
        last = print_changes(updates, as_json=True) if as_json else show_updates(updates, console())
    except KeyboardInterrupt:
        remark("no longer watching: the jobs go on")
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        discard_stdout()
        return
    if not last and not as_json:
        say("no jobs are running or waiting, and none has ended within the last hour")
    bad = [row for row in last if row.state in ("failed", "stopped")]
    if bad and not as_json:
        remark(f"why: ksweep why {short_id(bad[0].job)}")
    raise typer.Exit(1 if name and bad and not once else 0)


def logs_command(
    run: JobArgument,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Follow the logs until the job has ended.")] = False,
    rank: Annotated[int | None, typer.Option(help="Show this rank only.")] = None,
    registry: RegistryOption = Path("registry"),
) -> None:
    """Show the output of a job's ranks."""
    from ksweep.cli.jobs.find import find_jobs
    from ksweep.cli.jobs.logs import read_logs
    from ksweep.cli.jobs.watch import discard_stdout

    try:
        for text in read_logs(find_jobs(registry, run)[-1], rank, follow=follow):
            say(text, end="")
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        discard_stdout()


def why_command(run: JobArgument, registry: RegistryOption = Path("registry"), as_json: JsonOption = False) -> None:
    """Explain how a job is doing or ended, why, and what to do: class, each rank's node, GPU, traceback, code, last log lines."""
    from ksweep.cli.jobs import why
    from ksweep.cli.jobs.find import find_jobs, find_runs

    try:
        job = find_jobs(registry, run)[-1]
    except RequestError:
        runs = find_runs(registry, run)
        if len(runs) != 1:
            raise
        report = why.run_report(runs[0])
        lines = why.format_run_report(report)
    else:
        report = why.job_report(job)
        lines = why.format_job_report(report)
    if as_json:
        print_json(report)
    else:
        say("\n".join(lines))


def cancel_command(
    run: Annotated[str, typer.Argument(help="Job, run or sweep (all its jobs); a unique prefix is enough.")],
    registry: RegistryOption = Path("registry"),
    as_json: JsonOption = False,
) -> None:
    """End jobs after their current work units; complete units are kept. Exit code 1 if a job could not be reached."""
    from ksweep.cli.jobs.cancel import cancel_jobs, format_cancel_results
    from ksweep.cli.jobs.find import find_jobs
    from ksweep.launch.status import LIVE_STATES

    results = cancel_jobs(find_jobs(registry, run))
    if as_json:
        for result in results:
            print_json(asdict(result))
    else:
        for line in format_cancel_results(run, results):
            say(line)
    raise typer.Exit(1 if any(result.state in LIVE_STATES and not result.cancelled for result in results) else 0)


def finalize_command(registry: RegistryOption = Path("registry"), as_json: JsonOption = False) -> None:
    """Record in the registry how jobs ended that no command waited for, as the next sweep command does."""
    from ksweep.launch.job import logs_directory
    from ksweep.launch.reconcile import finalize_all

    for job, status in finalize_all(logs_directory(registry)):
        ending = {"job": job.id, "state": status.state, "class": status.kind, "reason": status.reason}
        if as_json:
            print_json(ending)
        else:
            say(f"finalized: {job.id} has {status.state}" + (f" ({status.reason})" if status.state != "finished" else ""))


def retry_command(
    name: Annotated[
        str,
        typer.Argument(metavar="RUN|SWEEP", help="Sweep (all failed cells), or one job, run or cell; a unique prefix is enough."),
    ],
    registry: RegistryOption = Path("registry"),
    as_json: JsonOption = False,
) -> None:
    """Run the sweep's own command again, now with failed cells (or only those named); finished and live cells are left alone."""
    from ksweep.cli.jobs.find import select_jobs
    from ksweep.cli.jobs.retry import plan_retry, run_retry

    result = run_retry(plan_retry(select_jobs(registry, name)), as_json=as_json)
    if as_json:
        print_json(result)
    raise typer.Exit(result["exit_code"])
