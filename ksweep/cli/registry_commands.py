"""What comes into the registry, what goes out of it, and what brings it up to date: plot, report, export, import-json, db."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from ksweep.cli.app import app, db
from ksweep.cli.output import Registry


@app.command("import-json")
def import_json(
    files: list[Path],
    registry: Registry = Path("registry"),
    metric: Annotated[
        str, typer.Option(help="Number of the curve: variance_recovery or mse_variance_recovery.")
    ] = "variance_recovery",
) -> None:
    """Bring result files of the reference sweep into the registry, so that old and new curves share a chart."""
    from ksweep.registry import database
    from ksweep.registry.tae_json import import_files

    registry.mkdir(parents=True, exist_ok=True)
    for arrival in import_files(registry, files, cast(Any, metric)):
        print(f"{arrival.path}: {arrival.run_id}{'' if arrival.landed else ' (was there already)'}")
        for note in arrival.notes:
            print(f"  note: {note}", file=sys.stderr)
    _say(database.ingest_landings(registry))


@app.command()
def plot(
    names: Annotated[list[str] | None, typer.Argument(help="Cells, labels, sweeps or run ids; all curves without.")] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="fve, or the reference's variance_recovery, mse_variance_recovery, r_squared: old and new in one unit."
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Path without its ending: .html, .png and .pdf are written.")
    ] = Path("curves"),
    title: Annotated[str | None, typer.Option(help="Above the chart.")] = None,
    registry: Registry = Path("registry"),
) -> None:
    """Draw curves against K: of this registry's own runs and of imported ones, side by side."""
    from ksweep.analysis import charts
    from ksweep.registry.query import named_curves

    for path in charts.save(charts.fve_by_k(named_curves(registry, names or [], metric), title=title), output):
        print(path)


@app.command()
def report(
    sweep: Annotated[str, typer.Argument(help="Name of a sweep of which at least one cell has finished.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file; without, charts/SWEEP/report.html in the registry.")
    ] = None,
    registry: Registry = Path("registry"),
) -> None:
    """Write one HTML page that opens offline: answer, curves, numbers, groups, what it said, failures, origin."""
    from ksweep.analysis.report import write_report

    print(write_report(registry, sweep, output))


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="Run id, or name of a cell, a label or a sweep of one cell (its newest run).")],
    as_json: Annotated[bool, typer.Option("--json", help="In the reference sweep's JSON schema (the only format).")] = True,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File; standard output without.")] = None,
    registry: Registry = Path("registry"),
) -> None:
    """Write a run in the JSON schema of the reference sweep, with what misleads in it named."""
    from ksweep.registry.query import run_named
    from ksweep.registry.tae_json import export_run, write_json

    document = export_run(registry, run_named(registry, run))
    if output is None:
        print(json.dumps(document, allow_nan=False))
    else:
        write_json(output, document)
        print(output)


@db.command()
def ingest(registry: Registry = Path("registry")) -> None:
    """Bring the database up to date with the landing files."""
    from ksweep.registry import database

    _say(database.ingest_landings(registry))


@db.command()
def rebuild(registry: Registry = Path("registry")) -> None:
    """Build the database from the landing files alone."""
    from ksweep.registry import database

    _say(database.rebuild_database(registry))


def _say(report: Any) -> None:
    print(
        f"{report.database}: {report.num_runs} runs, {report.num_new} new, {report.num_removed} removed, {report.seconds:.2f} s"
    )
    for bad in report.quarantined:
        print(f"not believed: {bad.path}: {bad.reason}", file=sys.stderr)
