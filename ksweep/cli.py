"""`ksweep ...`: ask the registry from the shell. Sweeps themselves are run as `python experiments/NAME.py`."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.table import Table
from rich.text import Text

from ksweep import registry_commands
from ksweep.errors import RequestError, RunError, StoreError
from ksweep.terminal import bytes_text, console

if TYPE_CHECKING:
    from ksweep.activations.housekeeping import Removal

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Best-of-K sweeps of natural-language autoencoders: ask past runs."
)
db = typer.Typer(no_args_is_help=True, help="The DuckDB file, an index over the landing files.")
app.add_typer(db, name="db")
cache = typer.Typer(no_args_is_help=True, help="The vector cache: what is there, whether it is whole, what may go.")
app.add_typer(cache, name="cache")

Registry = Annotated[Path, typer.Option(help="Directory of landing files, draws and database.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]
Cache = Annotated[Path, typer.Option("--vector-cache", help="Directory of cached activations.")]
Key = Annotated[str, typer.Argument(help="The key, or the beginning of it.")]
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


registry_commands.register(app)


@app.command()
def ls(registry: Registry = Path("registry"), as_json: Json = False) -> None:
    """Runs, newest first; jobs that are under way: ksweep watch --once."""
    from ksweep.registry.questions import ask

    _book(registry)

    question = """
        SELECT run_id AS run, sweep, cell, status, num_activations, num_draws, num_draws_sampled,
               round(tokens_per_second) AS tokens_per_second,
               (SELECT round(max(fve), 4) FROM run_curves AS c WHERE c.run_id = runs.run_id) AS best_fve, finished
        FROM runs ORDER BY finished DESC
    """
    table = ask(registry, question)
    _print(table.column_names, table.to_pylist(), as_json)


@app.command()
def watch(
    sweep: Annotated[str | None, typer.Argument(help="Sweep, job or run; without, all jobs that are under way.")] = None,
    registry: Registry = Path("registry"),
    once: Annotated[bool, typer.Option("--once", help="Show once and leave.")] = False,
    as_json: Json = False,
) -> None:
    """How far jobs are, until they have ended; their launcher is not needed. --json shows them once, an object a line."""
    from ksweep import jobs

    updates = jobs.watch(registry, sweep, once=once or as_json)
    if as_json:
        for line in next(updates):
            print(json.dumps(asdict(line)))
        return
    last = jobs.show(updates, console())
    if not last:
        print("no jobs are under way")
    _book(registry)


@app.command()
def logs(
    run: Annotated[str, typer.Argument(help="Job, run or sweep (its newest job); a unique prefix will do.")],
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job has ended.")] = False,
    rank: Annotated[int | None, typer.Option(help="Of one rank only.")] = None,
    registry: Registry = Path("registry"),
) -> None:
    """What the ranks of a job wrote."""
    from ksweep import jobs

    for text in jobs.read_logs(jobs.find(registry, run)[-1], rank, follow=follow):
        print(text, end="", flush=True)


@app.command()
def why(
    run: Annotated[str, typer.Argument(help="Job, run or sweep (its newest job); a unique prefix will do.")],
    registry: Registry = Path("registry"),
    as_json: Json = False,
) -> None:
    """How a job goes or ended, and why: class, every rank's traceback, node, GPU, code, last log lines."""
    from ksweep import jobs

    told = jobs.why(jobs.find(registry, run)[-1])
    print(json.dumps(told) if as_json else "\n".join(jobs.explain(told)))


@app.command()
def cancel(
    run: Annotated[str, typer.Argument(help="Job, run or sweep (all its jobs); a unique prefix will do.")],
    registry: Registry = Path("registry"),
) -> None:
    """End jobs at the border of their units; what is whole is kept."""
    from ksweep import jobs

    ended = jobs.cancel(jobs.find(registry, run))
    for job in ended:
        print(f"cancelled: {job.id}" + (f" (Slurm {job.slurm_id()})" if job.slurm_id() else ""))
    if not ended:
        print(f"nothing of {run} is under way")


@app.command()
def retry(
    sweep: Annotated[str, typer.Argument(help="Sweep whose failed cells are to be run again.")],
    registry: Registry = Path("registry"),
) -> None:
    """Run the sweep's own command again with --retry: failed cells too, done ones are left alone."""
    from ksweep import jobs

    raise typer.Exit(jobs.retry(jobs.find(registry, sweep)))


def _book(registry: Path) -> None:
    """Tell the registry of jobs that have ended since anybody looked."""
    from ksweep.jobs import logs_of
    from ksweep.reconcile import book_ended

    if registry.is_dir():
        book_ended(logs_of(registry))


@app.command("import-json")
def import_json(
    files: list[Path],
    registry: Registry = Path("registry"),
    metric: Annotated[
        str, typer.Option(help="Number of the curve: variance_recovery or mse_variance_recovery.")
    ] = "variance_recovery",
) -> None:
    """Bring result files of the reference sweep into the registry, so that old and new curves share a chart."""
    from ksweep.registry import database
    from ksweep.registry.reference_json import import_files

    registry.mkdir(parents=True, exist_ok=True)
    for arrival in import_files(registry, files, cast(Any, metric)):
        print(f"{arrival.path}: {arrival.run_id}{'' if arrival.landed else ' (was there already)'}")
        for note in arrival.notes:
            print(f"  note: {note}", file=sys.stderr)
    _say(database.ingest(registry))


@app.command()
def plot(
    names: Annotated[list[str] | None, typer.Argument(help="Cells, labels, sweeps or run ids; all curves without.")] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="fve, or the reference's variance_recovery, mse_variance_recovery, r_squared: old and new in one unit."
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Path without its ending: .html, .png and .pdf are written.")
    ] = Path("curves"),
    title: Annotated[str | None, typer.Option(help="Above the chart.")] = None,
    registry: Registry = Path("registry"),
) -> None:
    """Draw curves against K: of this registry's own runs and of imported ones, side by side."""
    from ksweep import charts
    from ksweep.registry.questions import named_curves

    for path in charts.save(charts.fve_by_k(named_curves(registry, names or [], metric), title=title), output):
        print(path)


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="Run id, or name of a cell, a label or a sweep of one cell (its newest run).")],
    as_json: Annotated[bool, typer.Option("--json", help="In the reference sweep's JSON schema (the only format).")] = True,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File; standard output without.")] = None,
    registry: Registry = Path("registry"),
) -> None:
    """Write a run in the JSON schema of the reference sweep, with what misleads in it named."""
    from ksweep.registry.questions import run_named
    from ksweep.registry.reference_json import export_run, write_json

    document = export_run(registry, run_named(registry, run))
    if output is None:
        print(json.dumps(document, allow_nan=False))
    else:
        write_json(output, document)
        print(output)


@db.command()
def ingest(registry: Registry = Path("registry")) -> None:
    """Bring the database up to date with the landing files."""
    from ksweep.registry import database

    _say(database.ingest(registry))


@db.command()
def rebuild(registry: Registry = Path("registry")) -> None:
    """Build the database from the landing files alone."""
    from ksweep.registry import database

    _say(database.rebuild(registry))


@cache.command("ls")
def cache_ls(vector_cache: Cache = Path("vector_cache"), as_json: Json = False) -> None:
    """Keys, the one used last first."""
    from ksweep.activations import housekeeping

    found = housekeeping.entries(vector_cache)
    rows = [
        {
            "key": e.key, "model": e.model, "layer": e.layer, "text": e.text, "positions": e.positions,
            "activations": e.num_activations, "bytes": e.bytes, "last_used": _moment(e.last_used),
            "whole_source": e.is_whole_source,
        }
        for e in found
    ]  # fmt: skip
    shown = rows if as_json else [{**row, **_brief(row)} for row in rows]
    names = ["key", "model", "layer", "text", "positions", "activations", "bytes", "last_used", "whole_source"]
    _print(names, shown, as_json)


@cache.command("show")
def cache_show(key: Key, vector_cache: Cache = Path("vector_cache"), as_json: Json = False) -> None:
    """What the manifest of a key says, and what is on disk now."""
    from ksweep.activations import housekeeping

    entry = housekeeping.entry_of(vector_cache, key)
    manifest = housekeeping.manifest_of(entry)
    now = {
        "directory": str(entry.directory), "num_activations": entry.num_activations, "bytes": entry.bytes,
        "last_used": _moment(entry.last_used), "has_manifest": manifest is not None,
    }  # fmt: skip
    whole = {**(manifest or {"key": entry.key}), "on_disk": now}
    if as_json:
        print(json.dumps(whole))
        return
    if manifest is None:
        print(f"{entry.directory}/manifest.json is missing or unreadable; the next run writes it anew", file=sys.stderr)
    whole["shards"] = len(whole.get("shards", []))
    for name, value in _flat("", whole):
        print(f"{name:<32} {value}")


@cache.command("verify")
def cache_verify(
    key: Annotated[str | None, typer.Argument(help="The key, or the beginning of it; every key without.")] = None,
    vector_cache: Cache = Path("vector_cache"),
    as_json: Json = False,
) -> None:
    """Compare the checksum of every shard. Damaged ones are set aside, to be computed again by the next run; exit code 1."""
    from ksweep.activations import housekeeping

    found = housekeeping.entries(vector_cache) if key is None else [housekeeping.entry_of(vector_cache, key)]
    rows = []
    for entry in found:
        shards, damaged = housekeeping.verify(entry)
        rows.append({"key": entry.key, "shards": shards, "bytes": entry.bytes, "damaged": damaged})
    shown = [
        {
            **row,
            "bytes": bytes_text(cast(int, row["bytes"])),
            "damaged": ", ".join(map(str, cast(list[int], row["damaged"]))) or "none",
        }
        for row in rows
    ]
    _print(["key", "shards", "bytes", "damaged"], rows if as_json else shown, as_json)
    if bad := sum(len(cast(list[int], row["damaged"])) for row in rows):
        raise StoreError(
            f"{bad} damaged shards were set aside in {vector_cache}; the next run that needs them computes them again"
        )


@cache.command("gc")
def cache_gc(
    older_than: Annotated[str | None, typer.Option(help="Keys not used for so long: 30d, 12h, 90m, 2w.")] = None,
    keep_used: Annotated[
        bool, typer.Option("--keep-used", help="Keep what runs or draws of the registry name; the rest goes.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove; without it, only say what would go.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also keys touched within the last hour.")] = False,
    vector_cache: Cache = Path("vector_cache"),
    registry: Registry = Path("registry"),
    as_json: Json = False,
) -> None:
    """Free disk: keys by --older-than, --keep-used or both (then only what both let go), and always what crashes left.

    Says what would go and removes nothing, unless --yes is given. Draws are results and are never removed.
    """
    from ksweep.activations import housekeeping
    from ksweep.registry.landing import activations_in_use

    found = housekeeping.entries(vector_cache)
    used = activations_in_use(registry) if keep_used else None
    keys = housekeeping.unused(found, None if older_than is None else _duration(older_than), used)
    busy = [] if force else [removal for removal in keys if housekeeping.is_in_use(removal)]
    keys = [removal for removal in keys if removal not in busy]
    removals = keys + housekeeping.leftovers_in(vector_cache)
    for draws in sorted((registry / "draws").glob("*/")):
        removals += housekeeping.leftovers_of(draws)
    going = {removal.path for removal in keys}
    removals = [removal for removal in removals if removal.path.parent not in going]
    _tell(removals, yes, as_json)
    for removal in busy:
        print(f"kept: {removal.key}, touched within the last hour: a job may need it (--force removes it)", file=sys.stderr)
    for removal in removals if yes else []:
        if not housekeeping.remove(removal, force=force):
            print(f"kept: {removal.key}, a job has begun to use it", file=sys.stderr)


@cache.command("du")
def cache_du(vector_cache: Cache = Path("vector_cache"), registry: Registry = Path("registry"), as_json: Json = False) -> None:
    """Bytes by key and in all, of the activations and of the draws in the registry."""
    from ksweep.activations import housekeeping

    rows: list[dict[str, Any]] = [
        {"store": "activations", "key": e.key, "bytes": e.bytes} for e in housekeeping.entries(vector_cache)
    ]
    draws = [path for path in (registry / "draws").glob("*/") if not path.name.startswith("_")]
    rows += [{"store": "draws", "key": path.name, "bytes": housekeeping.disk_bytes(path)} for path in draws]
    rows.sort(key=lambda row: -row["bytes"])
    rows.append({"store": "all", "key": None, "bytes": sum(row["bytes"] for row in rows)})
    _print(["store", "key", "bytes"], rows if as_json else [{**row, "bytes": bytes_text(row["bytes"])} for row in rows], as_json)


def _brief(row: dict[str, Any]) -> dict[str, Any]:
    """What a table has room for; --json and `show` have the whole paths."""
    names = {name: None if row[name] is None else Path(row[name]).name for name in ("model", "text")}
    whole = "yes" if row["whole_source"] else "no"
    return {**names, "key": row["key"][:10], "bytes": bytes_text(row["bytes"]), "whole_source": whole}


def _tell(removals: Sequence[Removal], yes: bool, as_json: bool) -> None:
    """What gc is about to free, or would."""
    rows = [
        {"key": r.key, "path": str(r.path), "bytes": r.bytes if as_json else bytes_text(r.bytes), "reason": r.reason}
        for r in removals
    ]
    if rows or as_json:
        _print(["key", "path", "bytes", "reason"], rows, as_json)
    total = bytes_text(sum(removal.bytes for removal in removals))
    said = f"frees {total}" if yes else f"would free {total}; nothing was removed: give --yes to remove"
    print(said if removals else "nothing to remove", file=sys.stderr)


def _duration(text: str) -> float:
    """Seconds of 30d, 12h, 90m, 45s or 2w."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    if match is None:
        raise RequestError(f"--older-than {text!r} is no length of time: give a number with s, m, h, d or w, e.g. 30d or 12h")
    return float(match[1]) * SECONDS[match[2]]


def _moment(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"


def _flat(name: str, value: Any) -> list[tuple[str, Any]]:
    """Nested mappings as dotted names."""
    if not isinstance(value, dict):
        return [(name, value)]
    return [pair for key, inner in value.items() for pair in _flat(f"{name}.{key}".lstrip("."), inner)]


def _say(report: Any) -> None:
    print(
        f"{report.database}: {report.num_runs} runs, {report.num_new} new, {report.num_removed} removed, {report.seconds:.2f} s"
    )
    for bad in report.quarantined:
        print(f"not believed: {bad.path}: {bad.reason}", file=sys.stderr)


def _print(names: list[str], rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        for row in rows:
            print(json.dumps({name: _finite(value) for name, value in row.items()}, default=str))
        return
    table = Table()
    for name in names:
        table.add_column(Text(name))
    for row in rows:
        table.add_row(*(Text("" if row[name] is None else _short(row[name])) for name in names))
    console().print(table)


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def main() -> None:
    """Entry point of the `ksweep` command; exit code 2 for a mistake in the request, 1 for a failure."""
    try:
        app()
    except RequestError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (RunError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
