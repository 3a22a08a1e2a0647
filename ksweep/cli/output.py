"""Options and output that commands share: rows as a table, or as one JSON object per line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ksweep.utils.console import WIDE_COLUMNS, columns, console, say, say_exactly
from ksweep.utils.text import visible

if TYPE_CHECKING:
    import pyarrow as pa


def _directory(text: str | Path) -> Path:
    """Return a directory as typed; without a name it would be the current one, into which an index would be written."""
    if not str(text).strip():
        raise typer.BadParameter("it is empty: give the path of a directory ('.' is the current one)")
    if "\0" in str(text) or (os.path.lexists(text) and not os.path.isdir(text)):
        raise typer.BadParameter(f"{text} is no directory")
    return Path(text)


_OF_REGISTRY = "Directory of landing files, draws and the database."
RegistryOption = Annotated[Path, typer.Option("--registry", parser=_directory, metavar="PATH", help=_OF_REGISTRY)]
VectorCacheOption = Annotated[
    Path, typer.Option("--vector-cache", parser=_directory, metavar="PATH", help="Directory of cached activations.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")]

OutputRow = dict[str, Any]


def print_rows(
    rows: Sequence[OutputRow], *, as_json: bool = False, names: Iterable[str] | None = None, about: OutputRow | None = None
) -> None:
    """Print rows as a table, or as one JSON object per line.

    `names` are the columns; without it they are those of the rows. `about` gives the level and num_replicates of all intervals,
    where the rows do not.
    """
    if as_json:
        for row in rows:
            print_json(row)
        return
    names = list(dict.fromkeys(name for row in rows for name in row) if names is None else names)
    texts = []
    for row in rows:
        decimals = _interval_decimals(row | (about or {}))
        texts.append({name: _format_value(row.get(name), decimals.get(name, 4)) for name in names})
    print_table(names, texts)


def print_table(names: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    """Print texts in columns, folded where a terminal is too narrow, never cut. Blank names get no heading."""
    from rich.text import Text

    out = console()
    # Borders would take a quarter of a narrow terminal.
    narrow: dict[str, Any] = {} if out.width >= WIDE_COLUMNS else {"box": None, "padding": (0, 1, 0, 0), "pad_edge": False}
    table = columns(out, show_header=any(name.strip() for name in names), **narrow)
    for name in names:
        table.add_column(Text(visible(name)), overflow="fold")
    for row in rows:
        table.add_row(*(Text(visible(row[name])) for name in names))
    out.print(table)


def print_section(title: str, rows: Sequence[OutputRow], about: OutputRow | None = None) -> None:
    """Print a title and its rows, or nothing where there are none."""
    if rows:
        print_text(f"\n{title}")
        print_rows(rows, about=about)


def print_text(text: str, *, soft_wrap: bool = False) -> None:
    """Print text without markup and highlighting, and with control characters visible."""
    console().print(text, soft_wrap=soft_wrap)


def print_json(value: Any) -> None:
    """Print a value as one line of JSON."""
    say_exactly(json.dumps(_jsonable(value)))


def write_parquet(path: Path, answer: pa.Table) -> None:
    """Write a table to a Parquet file, and say so.

    Raises:
        RunError: the file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ksweep.utils.errors import RunError
    from ksweep.utils.files import publish

    sink = pa.BufferOutputStream()
    pq.write_table(answer, sink, compression="zstd")
    try:
        publish(path, sink.getvalue().to_pybytes())
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
    say(f"{path}: {answer.num_rows} rows")


def table_curve(curve: Sequence[OutputRow]) -> list[OutputRow]:
    """Return the points of a curve that a table has room for; JSON has them all."""
    from ksweep.stats.best_of_k import kept_ks

    shown = set(kept_ks([row["k"] for row in curve])) if curve else set()
    return [row for row in curve if row["k"] in shown]


def _interval_decimals(row: OutputRow) -> dict[str, int]:
    """Return how many decimals the ends of each interval (fve_low and fve_high, low and high) are precise to."""
    from ksweep.stats.interval_text import decimals_of_interval

    decimals: dict[str, int] = {}
    for low in row:
        high = f"{low.removesuffix('low')}high"
        if (low == "low" or low.endswith("_low")) and all(isinstance(row.get(name), float) for name in (low, high)):
            decimals |= dict.fromkeys((low, high), decimals_of_interval(row, low, high))
    return decimals


def _format_value(value: Any, decimals: int = 4) -> str:
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_format_value, value))
    return f"{value:z.{decimals}f}" if isinstance(value, float) else str(value)


def _jsonable(value: Any) -> Any:
    """Return a value that JSON can hold: NaN and infinity become null, times become text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _jsonable(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(inner) for inner in value]
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
