"""`ksweep sql`: query the registry by SQL or by the name of a stored question."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ksweep.cli.output import RegistryOption, print_rows, write_parquet
from ksweep.utils.errors import RequestError

if TYPE_CHECKING:
    import pyarrow as pa

FORMULA_BEGINS = ("=", "+", "-", "@", "\t", "\r")
"""First characters by which a spreadsheet takes a text for a formula (OWASP, CSV injection)."""


def sql_command(
    question: Annotated[
        str | None, typer.Argument(help="SQL, or @name of a stored question; without, the stored questions are listed.")
    ] = None,
    values: Annotated[list[str] | None, typer.Argument(help="name=value for a stored question.")] = None,
    registry: RegistryOption = Path("registry"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV with a header line.")] = False,
    for_spreadsheet: Annotated[
        bool,
        typer.Option(
            "--for-spreadsheet",
            help="With --csv: a ' before texts that begin with = + - @, which Excel and others would run as formulas.",
        ),
    ] = False,
    parquet: Annotated[Path | None, typer.Option(help="Write the answer to this Parquet file.")] = None,
) -> None:
    """Query the registry: ksweep sql "select cell, k, fve from curves where k in (1, 16)", or ksweep sql @best_temperature."""
    from ksweep.registry.query import run_query

    if as_json + as_csv + (parquet is not None) > 1:
        raise RequestError("give one of --json, --csv and --parquet")
    if for_spreadsheet and not as_csv:
        raise RequestError("--for-spreadsheet goes with --csv")
    if question in (None, "@"):
        _print_questions(registry, as_json)
        return
    assert question is not None
    text, variables = _text_and_variables(registry, question, values or [])
    answer = run_query(registry, text, variables)
    if parquet is not None:
        write_parquet(parquet, answer)
    elif as_csv:
        _print_csv(answer, for_spreadsheet=for_spreadsheet)
    else:
        print_rows(answer.to_pylist(), as_json=as_json, names=answer.column_names)


def _text_and_variables(registry: Path, question: str, values: list[str]) -> tuple[str, dict[str, str]]:
    from ksweep.registry.stored_queries import query_named, variables_of

    if question.startswith("@"):
        query = query_named(registry, question[1:])
        return query.sql, variables_of(query, values)
    if values:
        raise RequestError(f"{values[0]!r}: only stored questions (@name) take name=value; quote the SQL as one argument")
    return question, {}


def _print_questions(registry: Path, as_json: bool) -> None:
    from ksweep.registry.stored_queries import queries

    rows = [{"name": f"@{q.name}", "question": q.question, "takes": ", ".join(q.variables)} for q in queries(registry).values()]
    print_rows(rows, as_json=as_json)


class _Line:
    def write(self, line: str) -> None:
        sys.stdout.write(line.removesuffix("\r\n") + "\n")


def _print_csv(answer: pa.Table, *, for_spreadsheet: bool) -> None:
    # With "\n" as its line terminator, csv would leave a carriage return within a text without quotes.
    writer = csv.writer(_Line(), lineterminator="\r\n")
    shown = _without_formula if for_spreadsheet else (lambda text: text)
    writer.writerow([shown(name) for name in answer.column_names])
    for row in answer.to_pylist():
        texts = [json.dumps(v, default=str) if isinstance(v, (list, dict)) else v for v in row.values()]
        writer.writerow([shown(text) if isinstance(text, str) else text for text in texts])


def _without_formula(text: str) -> str:
    """Return a text as a spreadsheet shows it; numbers are no texts and stay numbers."""
    return f"'{text}" if text.startswith(FORMULA_BEGINS) else text
