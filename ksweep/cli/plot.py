"""`ksweep plot`: FVE against K, of several runs in one chart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ksweep.cli.output import RegistryOption
from ksweep.utils.console import say


def plot_command(
    names: Annotated[list[str] | None, typer.Argument(help="Cells, labels, sweeps or run ids; without, all curves.")] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="fve, or the reference's variance_recovery, mse_variance_recovery, r_squared: old and new in one unit."
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Path without its suffix: .html, .png and .pdf are written.")
    ] = Path("curves"),
    title: Annotated[str | None, typer.Option(help="Title above the chart.")] = None,
    registry: RegistryOption = Path("registry"),
) -> None:
    """Plot curves against K: this registry's own runs and imported ones, side by side."""
    from ksweep.analysis import charts
    from ksweep.registry.query import named_curves

    for path in charts.save(charts.fve_by_k(named_curves(registry, names or [], metric), title=title), output):
        say(path)
