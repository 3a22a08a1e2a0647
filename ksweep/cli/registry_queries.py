"""`ksweep sql`, `show`, `diff`, `doctor`: the registry and this machine, asked from the shell.

Tables on a terminal, plain text without colour in a pipe, JSON for programs.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from ksweep.utils.console import bytes_text, columns, console
from ksweep.utils.errors import RequestError, RunError

if TYPE_CHECKING:
    import pyarrow as pa

Registry = Annotated[Path, typer.Option(help="Directory of landing files, draws and database.")]
Json = Annotated[bool, typer.Option("--json", help="For programs: JSON.")]
Row = dict[str, Any]

SHOWN_RUN = (
    "run_id", "status", "cell", "sweep", "started", "finished", "host", "device", "num_ranks", "git_commit", "git_dirty",
    "num_activations", "num_documents", "effective_documents", "layer", "d_model", "num_draws", "num_draws_sampled",
    "num_draws_reused", "draws_bytes", "tokens_per_second", "mean_tokens", "baseline", "baseline_kind", "baseline_from_mean",
    "fve_over_successes", "distinct_text_fraction", "cjk_fraction", "cell_key", "draws_key", "activations_key",
)  # fmt: skip
CURVE = ("k", "fve", "fve_low", "fve_high", "shuffled_fve", "error", "cosine", "failure_rate", "fve_over_successes")
GROUPS = ("breakdown", "part", "against", "k", "fve", "fve_low", "fve_high", "baseline", "error", "median_error", "worst_share",
          "failure_rate", "num_activations", "num_documents", "effective_documents")  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (sql, show, diff, doctor):
        app.command()(command)


def sql(
    question: Annotated[str | None, typer.Argument(help="SQL, or @name of a stored question; without, those there are.")] = None,
    values: Annotated[list[str] | None, typer.Argument(help="name=value for a stored question.")] = None,
    registry: Registry = Path("registry"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV with a line of names.")] = False,
    parquet: Annotated[Path | None, typer.Option(help="Write the answer to this Parquet file.")] = None,
) -> None:
    """Ask the registry: ksweep sql "select cell, k, fve from curves where k in (1, 16)", or ksweep sql @best_temperature."""
    from ksweep.cli.jobs.ls import book_ended
    from ksweep.registry.query import run_query

    if as_json + as_csv + (parquet is not None) > 1:
        raise RequestError("give one of --json, --csv and --parquet")
    if question in (None, "@"):
        _print_queries(registry, as_json)
        return
    assert question is not None
    text, variables = _question(registry, question, values or [])
    book_ended(registry)
    answer = run_query(registry, text, variables)
    if parquet is not None:
        _write_parquet(parquet, answer)
    elif as_csv:
        _print_csv(answer)
    else:
        _print_rows(answer.to_pylist(), as_json, answer.column_names)


def _question(registry: Path, question: str, values: list[str]) -> tuple[str, dict[str, str]]:
    from ksweep.registry.stored_queries import query_named, variables_of

    if question.startswith("@"):
        query = query_named(registry, question[1:])
        return query.sql, variables_of(query, values)
    if values:
        raise RequestError(f"{values[0]!r}: only stored questions (@name) take name=value; quote the SQL as one argument")
    return question, {}


def _print_queries(registry: Path, as_json: bool) -> None:
    from ksweep.registry.stored_queries import queries

    found = [{"name": f"@{q.name}", "question": q.question, "takes": ", ".join(q.variables)} for q in queries(registry).values()]
    _print_rows(found, as_json)


def _write_parquet(path: Path, answer: pa.Table) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ksweep.utils.files import publish

    sink = pa.BufferOutputStream()
    pq.write_table(answer, sink, compression="zstd")
    try:
        publish(path, sink.getvalue().to_pybytes())
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
    print(f"{path}: {answer.num_rows} rows")


def _print_csv(answer: pa.Table) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(answer.column_names)
    for row in answer.to_pylist():
        writer.writerow([json.dumps(v, default=str) if isinstance(v, (list, dict)) else v for v in row.values()])


def show(
    run: Annotated[str, typer.Argument(help="Run, cell, label, or sweep of one cell; the beginning of a run id or key will do.")],
    registry: Registry = Path("registry"),
    as_json: Json = False,
) -> None:
    """One run: spec, curve, controls, failures, groups, and what it said where it is best, middling and worst."""
    from ksweep.analysis.diff import flatten
    from ksweep.registry.run_details import run_details

    told = run_details(registry, run)
    if as_json:
        print(json.dumps(_jsonable(told)))
        return
    facts = told["run"]
    _section("run", [{"": name, " ": _brief(name, facts[name])} for name in SHOWN_RUN if facts[name] not in (None, [])])
    _section("notes", facts["notes"] or [])
    _section("engine", [{"": name, " ": value} for name, value in (facts["engine"] or {}).items()])
    _section("spec", [{"": name, " ": value} for name, value in flatten(told["spec"]) if value is not None])
    if facts["error_type"]:
        console().print(Text(f"{facts['error_type']}: {facts['error_message']}"))
        for words in facts["tracebacks"]:
            console().print(Text(words))
    scoring = told["spec"].get("scoring") or {}
    about = {name: scoring.get(name) for name in ("level", "num_replicates")}
    curve = [{name: row[name] for name in CURVE} for row in _few(told["curve"])]
    _section("curve: best of K draws, oracle selection by the AR", curve, about)
    _section("controls", told["controls"])
    _section("failed draws by cause", _failures(facts))
    groups = [{name: row[name] for name in GROUPS} for row in told["groups"]]
    _section("groups at the largest K, against two baselines: of all activations (overall), of the group's (own)", groups, about)
    _print_examples(told["examples"])


def _few(curve: Sequence[Row]) -> list[Row]:
    """The K that a table has room for; JSON has them all."""
    from ksweep.stats.best_of_k import kept_ks

    wanted = set(kept_ks([row["k"] for row in curve])) if curve else set()
    return [row for row in curve if row["k"] in wanted]


def _failures(facts: Row) -> list[Row]:
    total = (facts["num_activations"] or 0) * (facts["num_draws"] or 0)
    failures = facts["failures"] or {}
    return [{"cause": cause, "draws": count, "rate": count / total} for cause, count in failures.items() if total]


def _print_examples(examples: Sequence[Row]) -> None:
    out = console()
    for rank in ("best", "median", "worst"):
        mine = [row for row in examples if row["rank"] == rank]
        if mine:
            out.print(Text(f"\nwhat it said: {rank} {len(mine)} activations, the best draw of each"))
        for row in mine:
            out.print(Text(f"{rank} {row['number']}: {_score(row)}; activation {row['activation']}, draw {row['draw']}"))
            out.print(Text(f"    text ({row['document']}, token {row['position']}): {_one_line(row['context'])}"))
            said = row["explanation"]
            unparsed = f"({row['parse']}) {_one_line(row['text'])}"
            out.print(Text(f"    said: {unparsed if said is None else _one_line(said)}"))


def _score(row: Row) -> str:
    return "no draw succeeded" if row["error"] is None else f"error {row['error']:.4f}, cosine {row['cosine']:.4f}"


def _one_line(text: str | None) -> str:
    return "" if text is None else " ".join(text.split())


def diff(
    a: Annotated[str, typer.Argument(help="Run, cell, label, or sweep of one cell; the beginning of a run id or key will do.")],
    b: Annotated[str, typer.Argument(help="The one that is taken off.")],
    registry: Registry = Path("registry"),
    level: Annotated[float | None, typer.Option(help="Coverage of the intervals; by default that of the runs.")] = None,
    as_json: Json = False,
) -> None:
    """What differs between two runs: spec, where they ran, counts, and FVE at each K with a paired interval."""
    from ksweep.analysis.diff import diff_runs as differences

    if level is not None and not 0 < level < 1:
        raise RequestError(f"--level {level} is no coverage: give a number between 0 and 1, such as 0.95")
    found = differences(registry, a, b, level)
    if as_json:
        print(json.dumps(_jsonable(found)))
        raise typer.Exit(2 if found["refused"] else 0)
    out = console()
    for name, run in zip("ab", found["runs"], strict=True):
        out.print(Text(f"{name}: {run['run_id']}  {run['cell']}  {run['status']} {run['finished']}"))
    alike = [what for what, same in found["same"].items() if same]
    out.print(Text(f"the same: {', '.join(alike) or 'none of cell, draws, activations'}"))
    for title in ("spec", "provenance", "counts"):
        if found[title]:
            _section(title, found[title])
        else:
            out.print(Text(f"{title}: nothing differs"))
    if found["refused"]:
        raise RequestError(found["note"])
    shown = ("k", "a", "b", "difference", "low", "high")
    rows = [{name: row[name] for name in shown} | {"clear": _clear(row)} for row in _few(found["numbers"])]
    about = {"level": found["level"], "num_replicates": next((row.get("num_replicates") for row in found["numbers"]), None)}
    _section("FVE: a less b", rows, about)
    out.print(Text(found["note"]))


def _clear(row: Row) -> str | None:
    """Whether the interval leaves out 0."""
    if row.get("low") is None:
        return None
    return "yes" if row["low"] > 0 or row["high"] < 0 else "no"


def doctor(
    registry: Registry = Path("registry"),
    vector_cache: Annotated[Path, typer.Option("--vector-cache", help="Directory of cached activations.")] = Path("vector_cache"),
    as_json: Json = False,
) -> None:
    """Look this installation over: packages, GPU, stores, cluster, the engine on a tiny model; exit code 1 if something fails."""
    from ksweep.cli.doctor import examine

    findings = []
    for finding in examine(registry, vector_cache):
        findings.append(finding)
        if as_json:
            print(json.dumps(_jsonable(finding.__dict__)), flush=True)
        else:
            console().print(Text(f"{finding.state:<5} {finding.subject:<22} {finding.said}"), soft_wrap=True)
    if any(finding.state == "bad" for finding in findings):
        raise typer.Exit(1)


# Rows on the terminal


def _section(title: str, rows: Sequence[Row], about: Row | None = None) -> None:
    if rows:
        console().print(Text(f"\n{title}"))
        _print_rows(rows, as_json=False, about=about)


def _print_rows(rows: Sequence[Row], as_json: bool, names: Iterable[str] | None = None, about: Row | None = None) -> None:
    """`about`: level and num_replicates of all intervals, where the rows do not say them."""
    if as_json:
        for row in rows:
            print(json.dumps(_jsonable(row)))
        return
    out = console()
    table = columns(out, show_header=not names_are_blank(rows))
    for name in names if names is not None else dict.fromkeys(name for row in rows for name in row):
        table.add_column(Text(name), overflow="fold")
    for row in rows:
        decimals = _decimals_that_hold(row | (about or {}))
        table.add_row(*(Text(_cell(value, decimals.get(name, 4))) for name, value in row.items()))
    out.print(table)


def _decimals_that_hold(row: Row) -> dict[str, int]:
    """Of columns with the ends of an interval (fve_low and fve_high, low and high) the decimals that hold for this row."""
    from ksweep.stats.interval_text import decimals_of_interval

    found: dict[str, int] = {}
    for low in row:
        high = f"{low.removesuffix('low')}high"
        if (low == "low" or low.endswith("_low")) and all(isinstance(row.get(name), float) for name in (low, high)):
            found |= dict.fromkeys((low, high), decimals_of_interval(row, low, high))
    return found


def names_are_blank(rows: Sequence[Row]) -> bool:
    """Whether the rows are pairs of a name and its value, which need no heading."""
    return bool(rows) and not any(name.strip() for name in rows[0])


def _brief(name: str, value: Any) -> Any:
    return bytes_text(value) if name.endswith("_bytes") else value


def _cell(value: Any, decimals: int = 4) -> str:
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_cell, value))
    return f"{value:z.{decimals}f}" if isinstance(value, float) else str(value)


def _jsonable(value: Any) -> Any:
    """JSON knows neither NaN and infinity nor moments."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _jsonable(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(inner) for inner in value]
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
