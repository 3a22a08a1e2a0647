"""`ksweep ...`: ask the registry from the shell. Sweeps themselves are run as `python experiments/NAME.py`."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.table import Table
from rich.text import Text

from ksweep.errors import RequestError, RunError, StoreError
from ksweep.terminal import console

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Best-of-K sweeps of natural-language autoencoders: ask past runs."
)
db = typer.Typer(no_args_is_help=True, help="The DuckDB file, an index over the landing files.")
app.add_typer(db, name="db")

Registry = Annotated[Path, typer.Option(help="Directory of landing files, draws and database.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]


@app.command()
def sql(question: str, registry: Registry = Path("registry"), as_json: Json = False) -> None:
    """Ask the registry: ksweep sql "select cell, k, fve from curves where k in (1, 16)"."""
    from ksweep.registry.questions import ask

    table = ask(registry, question)
    _print(table.column_names, table.to_pylist(), as_json)


@app.command()
def ls(registry: Registry = Path("registry"), as_json: Json = False) -> None:
    """Runs, newest first."""
    from ksweep.registry.questions import ask

    question = """
        SELECT run_id AS run, sweep, cell, status, num_activations, num_draws, num_draws_sampled,
               round(tokens_per_second) AS tokens_per_second,
               (SELECT round(max(fve), 4) FROM run_curves AS c WHERE c.run_id = runs.run_id) AS best_fve, finished
        FROM runs ORDER BY finished DESC
    """
    table = ask(registry, question)
    _print(table.column_names, table.to_pylist(), as_json)


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
    from ksweep.registry.reference_json import import_files

    registry.mkdir(parents=True, exist_ok=True)
    for arrival in import_files(registry, files, cast(Any, metric)):
        print(f"{arrival.path}: {arrival.run_id}{'' if arrival.landed else ' (was there already)'}")
        for note in arrival.notes:
            print(f"  note: {note}", file=sys.stderr)
    _say(database.ingest(registry))


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
    from ksweep import charts
    from ksweep.registry.questions import named_curves

    for path in charts.save(charts.fve_by_k(named_curves(registry, names or [], metric), title=title), output):
        print(path)


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="Run id, or name of a cell, a label or a sweep of one cell (its newest run).")],
    as_json: Annotated[bool, typer.Option("--json", help="In the reference sweep's JSON schema (the only format).")] = True,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File; standard output without.")] = None,
    registry: Registry = Path("registry"),
) -> None:
    """Write a run in the JSON schema of the reference sweep, with what misleads in it named."""
    from ksweep.registry.questions import run_named
    from ksweep.registry.reference_json import export_run, write_json

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

    _say(database.ingest(registry))


@db.command()
def rebuild(registry: Registry = Path("registry")) -> None:
    """Build the database from the landing files alone."""
    from ksweep.registry import database

    _say(database.rebuild(registry))


def _say(report: Any) -> None:
    print(
        f"{report.database}: {report.num_runs} runs, {report.num_new} new, {report.num_removed} removed, {report.seconds:.2f} s"
    )
    for bad in report.quarantined:
        print(f"not believed: {bad.path}: {bad.reason}", file=sys.stderr)


def _print(names: list[str], rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        for row in rows:
            print(json.dumps({name: _finite(value) for name, value in row.items()}, default=str))
        return
    table = Table()
    for name in names:
        table.add_column(Text(name))
    for row in rows:
        table.add_row(*(Text("" if row[name] is None else _short(row[name])) for name in names))
    console().print(table)


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def main() -> None:
    """Entry point of the `ksweep` command; exit code 2 for a mistake in the request, 1 for a failure."""
    try:
        app()
    except RequestError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (RunError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
