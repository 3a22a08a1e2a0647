"""What the commands share: their options, tables for people, an object a line for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

Registry = Annotated[Path, typer.Option(help="Directory of landing files, draws and database.")]
NARROW = 110
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]


def print_rows(names: Sequence[str], rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    """Rows as a table, or as JSON lines."""
    if as_json:
        for row in rows:
            print(json.dumps({name: _finite(value) for name, value in row.items()}, default=str))
        return
    print_table(names, [{name: "" if row[name] is None else _short(row[name]) for name in names} for row in rows])


def print_table(names: Sequence[str], rows: Sequence[dict[str, str]]) -> None:
    """Words in columns; folded where a terminal is too narrow, never cut."""
    from rich.text import Text

    from ksweep.utils.console import columns, console

    out = console()
    # Borders would take a quarter of a narrow terminal.
    narrow = {"box": None, "padding": (0, 1, 0, 0), "pad_edge": False}
    table = columns(out, **({} if out.width >= NARROW else narrow))
    for name in names:
        table.add_column(Text(name), overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[name]) for name in names))
    out.print(table)


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
