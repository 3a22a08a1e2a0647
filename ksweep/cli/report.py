"""`ksweep report`: the page of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ksweep.cli.output import RegistryOption
from ksweep.utils.console import say


def report_command(
    sweep: Annotated[str, typer.Argument(help="Name of a sweep of which at least one cell has finished.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file; without, charts/SWEEP/report.html in the registry.")
    ] = None,
    registry: RegistryOption = Path("registry"),
) -> None:
    """Write one HTML page that opens offline: answer, curves, numbers, groups, explanations, failures, provenance."""
    from ksweep.analysis.report import write_report

    say(write_report(registry, sweep, output))
