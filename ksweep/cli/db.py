"""`ksweep db`: the DuckDB file, brought up to date or rebuilt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ksweep.cli.output import RegistryOption
from ksweep.utils.console import remark, say

if TYPE_CHECKING:
    from ksweep.registry.database import IngestReport

db_group = typer.Typer(no_args_is_help=True, help="The DuckDB file, an index over the landing files.")


@db_group.command("ingest")
def ingest_command(registry: RegistryOption = Path("registry")) -> None:
    """Bring the database up to date with the landing files."""
    from ksweep.registry.database import ingest_landings

    print_ingest_report(ingest_landings(registry))


@db_group.command("rebuild")
def rebuild_command(registry: RegistryOption = Path("registry")) -> None:
    """Build the database from the landing files alone."""
    from ksweep.registry.database import rebuild_database

    print_ingest_report(rebuild_database(registry))


def print_ingest_report(report: IngestReport) -> None:
    """Print what came into the database, and on standard error the landing directories that could not be read."""
    say(f"{report.database}: {report.num_runs} runs, {report.num_new} new, {report.num_removed} removed, {report.seconds:.2f} s")
    for bad in report.quarantined:
        remark(f"not believed: {bad.path}: {bad.reason}")
