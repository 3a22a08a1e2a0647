"""Jobs and runs as people ask about them: ls, watch, logs, why, cancel, retry."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ksweep.cli.app import app
from ksweep.cli.output import Json, Registry, print_table
from ksweep.utils.errors import RequestError

One = Annotated[str, typer.Argument(help="Job, run, cell or sweep (its newest job); a unique prefix will do.")]
INTERRUPTED = 130


@app.command()
def ls(
    sweep: Annotated[str | None, typer.Argument(help="Of one sweep only; a unique prefix will do.")] = None,
    state: Annotated[str | None, typer.Option(help="running, waiting, unknown, finished, failed or stopped.")] = None,
    limit: Annotated[int, typer.Option(help="The newest so many; 0: all.", min=0)] = 30,
    registry: Registry = Path("registry"),
    as_json: Json = False,
) -> None:
    """Cells that wait or run, and runs that have ended: the newest first."""
    from ksweep.cli.jobs import ls
    from ksweep.utils.console import console

    found = ls.rows(registry, sweep, state)
    shown = found[: limit or None]
    if as_json:
        for row in shown:
            print(json.dumps(ls.as_object(row)))
    else:
        out = console()
        print_table(ls.COLUMNS, [ls.for_people(r, out.width) for r in shown])
    if len(shown) < len(found):
        print(f"{len(found) - len(shown):,} more, older ones: --limit 0 shows all", file=sys.stderr)


@app.command()
def watch(
    name: Annotated[
        str | None, typer.Argument(metavar="[SWEEP]", help="Sweep, job or run; without, all jobs that are under way.")
    ] = None,
    registry: Registry = Path("registry"),
    once: Annotated[bool, typer.Option("--once", help="Show once and leave.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="An object a line whenever a job's state has changed.")] = False,
) -> None:
    """How far jobs are, until they have ended; their launcher is not needed. Exit code 1 where a job of SWEEP has failed."""
    from ksweep.cli.jobs import ls, watch
    from ksweep.cli.jobs.find import short
    from ksweep.utils.console import console

    updates = watch.watch(registry, name, once=once)
    try:
        last = watch.say_changes(updates, as_json=True) if as_json else watch.show(updates, console())
    except KeyboardInterrupt:
        print("no longer watching: the jobs go on", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        watch.leave_quietly()
        return
    if not last and not as_json:
        print("no jobs are under way, and none has ended within the last hour")
    bad = [line for line in last if line.state in ("failed", "stopped")]
    if bad and not as_json:
        print(f"why: ksweep why {short(bad[0].job)}", file=sys.stderr)
    ls.book_ended(registry)
    raise typer.Exit(1 if name and bad and not once else 0)


@app.command()
def logs(
    run: One,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job has ended.")] = False,
    rank: Annotated[int | None, typer.Option(help="Of one rank only.")] = None,
    registry: Registry = Path("registry"),
) -> None:
    """What the ranks of a job wrote."""
    from ksweep.cli.jobs.find import find
    from ksweep.cli.jobs.logs import read_logs
    from ksweep.cli.jobs.watch import leave_quietly

    try:
        for text in read_logs(find(registry, run)[-1], rank, follow=follow):
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        leave_quietly()


@app.command()
def why(run: One, registry: Registry = Path("registry"), as_json: Json = False) -> None:
    """How a job goes or ended, why, and what to do: class, every rank's node, GPU and traceback, code, last log lines."""
    from ksweep.cli.jobs import why
    from ksweep.cli.jobs.find import find, runs_called

    try:
        job = find(registry, run)[-1]
    except RequestError:
        runs = runs_called(registry, run)
        if len(runs) != 1:
            raise
        told = why.why_run(runs[0])
        print(json.dumps(told) if as_json else "\n".join(why.explain_run(told)))
        return
    told = why.why(job)
    print(json.dumps(told) if as_json else "\n".join(why.explain(told)))


@app.command()
def cancel(
    run: Annotated[str, typer.Argument(help="Job, run or sweep (all its jobs); a unique prefix will do.")],
    registry: Registry = Path("registry"),
    as_json: Json = False,
) -> None:
    """End jobs at the border of their units; what is whole is kept. Exit code 1 where one could not be reached."""
    from ksweep.cli.jobs import cancel
    from ksweep.cli.jobs.find import find
    from ksweep.launch.status import LIVE_STATES

    found = cancel.cancel(find(registry, run))
    for text in [json.dumps(asdict(one)) for one in found] if as_json else cancel.say_cancelled(run, found):
        print(text)
    raise typer.Exit(1 if any(one.state in LIVE_STATES and not one.cancelled for one in found) else 0)


@app.command()
def retry(
    name: Annotated[
        str,
        typer.Argument(metavar="RUN|SWEEP", help="Sweep (all that failed), or one job, run or cell; a unique prefix will do."),
    ],
    registry: Registry = Path("registry"),
    as_json: Json = False,
) -> None:
    """Run the sweep's own command again, failed cells too (or only those named); what is done or under way is left alone."""
    from ksweep.cli.jobs import cancel
    from ksweep.cli.jobs.find import named

    done = cancel.run_again(cancel.plan_retry(named(registry, name)), as_json=as_json)
    if as_json:
        print(json.dumps(done))
    raise typer.Exit(done["exit_code"])
