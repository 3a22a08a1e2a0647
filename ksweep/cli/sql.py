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


def sql_command(
    question: Annotated[
        str | None, typer.Argument(help="SQL, or @name of a stored question; without, the stored questions are listed.")
    ] = None,
    values: Annotated[list[str] | None, typer.Argument(help="name=value for a stored question.")] = None,
    registry: RegistryOption = Path("registry"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV with a header line.")] = False,
    parquet: Annotated[Path | None, typer.Option(help="Write the answer to this Parquet file.")] = None,
) -> None:
    """Query the registry: ksweep sql "select cell, k, fve from curves where k in (1, 16)", or ksweep sql @best_temperature."""
    from ksweep.registry.query import run_query

    if as_json + as_csv + (parquet is not None) > 1:
        raise RequestError("give one of --json, --csv and --parquet")
    if question in (None, "@"):
        _print_questions(registry, as_json)
        return
    assert question is not None
    text, variables = _text_and_variables(registry, question, values or [])
    answer = run_query(registry, text, variables)
    if parquet is not None:
        write_parquet(parquet, answer)
    elif as_csv:
        _print_csv(answer)
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


def _print_csv(answer: pa.Table) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(answer.column_names)
    for row in answer.to_pylist():
        writer.writerow([json.dumps(v, default=str) if isinstance(v, (list, dict)) else v for v in row.values()])
