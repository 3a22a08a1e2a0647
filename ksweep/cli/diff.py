"""`ksweep diff`: what differs between two runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ksweep.cli.output import JsonOption, OutputRow, RegistryOption, print_json, print_section, print_text, table_curve
from ksweep.utils.errors import RequestError


def diff_command(
    a: Annotated[str, typer.Argument(help="Run, cell, label, or sweep of one cell; the beginning of a run id or key is enough.")],
    b: Annotated[str, typer.Argument(help="The run that is subtracted.")],
    registry: RegistryOption = Path("registry"),
    level: Annotated[float | None, typer.Option(help="Coverage of the intervals; by default that of the runs.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what differs between two runs: spec, where they ran, counts, and FVE at each K with a paired interval."""
    from ksweep.analysis.diff import diff_runs

    if level is not None and not 0 < level < 1:
        raise RequestError(f"--level {level} is not a coverage: give a number between 0 and 1, such as 0.95")
    differences = diff_runs(registry, a, b, level)
    if as_json:
        print_json(differences)
        raise typer.Exit(2 if differences["refused"] else 0)
    _print_sections(differences)
    if differences["refused"]:
        raise RequestError(differences["note"])
    _print_fve(differences)


def _print_sections(differences: OutputRow) -> None:
    for name, run in zip("ab", differences["runs"], strict=True):
        print_text(f"{name}: {run['run_id']}  {run['cell']}  {run['status']} {run['finished']}")
    same = [what for what, is_same in differences["same"].items() if is_same]
    print_text(f"the same: {', '.join(same) or 'none of cell, draws, scores, activations'}")
    for title in ("spec", "provenance", "counts"):
        if differences[title]:
            print_section(title, differences[title])
        else:
            print_text(f"{title}: nothing differs")


def _print_fve(differences: OutputRow) -> None:
    names = ("k", "a", "b", "difference", "low", "high")
    rows = [{name: row[name] for name in names} | {"clear": _clear(row)} for row in table_curve(differences["numbers"])]
    num_replicates = next((row.get("num_replicates") for row in differences["numbers"]), None)
    print_section("FVE: a minus b", rows, {"level": differences["level"], "num_replicates": num_replicates})
    print_text(differences["note"])


def _clear(row: OutputRow) -> str | None:
    """Say whether the interval excludes 0."""
    if row.get("low") is None:
        return None
    return "yes" if row["low"] > 0 or row["high"] < 0 else "no"
