"""`ksweep import-json` and `ksweep export`: read and write results in the JSON schema of the reference sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from ksweep.cli.output import RegistryOption
from ksweep.utils.console import remark, say, say_exactly


def import_json_command(
    files: list[Path],
    registry: RegistryOption = Path("registry"),
    metric: Annotated[
        str, typer.Option(help="Number of the curve: variance_recovery or mse_variance_recovery.")
    ] = "variance_recovery",
) -> None:
    """Import result files of the reference sweep into the registry, so that old and new curves share a chart."""
    from ksweep.cli.db import print_ingest_report
    from ksweep.registry.database import ingest_landings
    from ksweep.registry.tae_import import import_files

    registry.mkdir(parents=True, exist_ok=True)
    for imported in import_files(registry, files, cast(Any, metric)):
        say(f"{imported.path}: {imported.run_id}{'' if imported.landed else ' (already in the registry)'}")
        for note in imported.notes:
            remark(f"  note: {note}")
    print_ingest_report(ingest_landings(registry))


def export_command(
    run: Annotated[str, typer.Argument(help="Run id, or name of a cell, a label or a sweep of one cell (its newest run).")],
    as_json: Annotated[bool, typer.Option("--json", help="In the reference sweep's JSON schema (the only format).")] = True,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; without, standard output.")] = None,
    registry: RegistryOption = Path("registry"),
) -> None:
    """Write a run in the JSON schema of the reference sweep, and name the fields that mislead."""
    from ksweep.registry.query import run_named
    from ksweep.registry.tae_export import export_run, write_json

    document = export_run(registry, run_named(registry, run))
    if output is None:
        say_exactly(json.dumps(document, allow_nan=False))
    else:
        write_json(output, document)
        say(output)
