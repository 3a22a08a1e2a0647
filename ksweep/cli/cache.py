"""`ksweep cache`: list, check and clean up the vector cache."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ksweep.cli.output import JsonOption, OutputRow, RegistryOption, VectorCacheOption, print_json, print_rows
from ksweep.utils.console import bytes_text, remark, say
from ksweep.utils.errors import RequestError, StoreError

if TYPE_CHECKING:
    from ksweep.activations.maintenance import Removal

cache_group = typer.Typer(no_args_is_help=True, help="The vector cache: what is in it, whether it is intact, what can go.")

UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@cache_group.command("ls")
def cache_ls_command(vector_cache: VectorCacheOption = Path("vector_cache"), as_json: JsonOption = False) -> None:
    """List the keys, most recently used first."""
    from ksweep.activations import maintenance

    rows = [
        {
            "key": e.key, "model": e.model, "layer": e.layer, "text": e.text, "positions": e.positions,
            "activations": e.num_activations, "bytes": e.bytes, "last_used": _utc_text(e.last_used),
            "whole_source": e.is_whole_source,
        }
        for e in maintenance.entries(vector_cache)
    ]  # fmt: skip
    names = ["key", "model", "layer", "text", "positions", "activations", "bytes", "last_used", "whole_source"]
    print_rows(rows if as_json else [_abbreviated(row) for row in rows], as_json=as_json, names=names)


def _abbreviated(row: OutputRow) -> OutputRow:
    """Return what a table has room for; --json and `show` have the whole paths."""
    file_names = {name: None if row[name] is None else Path(row[name]).name for name in ("model", "text")}
    whole = "yes" if row["whole_source"] else "no"
    return {**row, **file_names, "key": row["key"][:10], "bytes": bytes_text(row["bytes"]), "whole_source": whole}


@cache_group.command("show")
def cache_show_command(
    key: Annotated[str, typer.Argument(help="The key, or its beginning.")],
    vector_cache: VectorCacheOption = Path("vector_cache"),
    as_json: JsonOption = False,
) -> None:
    """Show the manifest of a key, and what is on disk now."""
    from ksweep.activations import maintenance

    entry = maintenance.entry_of(vector_cache, key)
    manifest = maintenance.manifest_of(entry)
    on_disk = {
        "directory": str(entry.directory), "num_activations": entry.num_activations, "bytes": entry.bytes,
        "last_used": _utc_text(entry.last_used), "has_manifest": manifest is not None,
    }  # fmt: skip
    contents = {**(manifest or {"key": entry.key}), "on_disk": on_disk}
    if as_json:
        print_json(contents)
        return
    if manifest is None:
        remark(f"{entry.directory}/manifest.json is missing or unreadable; the next run writes a new one")
    contents["shards"] = len(contents.get("shards", []))
    for name, value in _dotted("", contents):
        say(f"{name:<32} {value}")


@cache_group.command("verify")
def cache_verify_command(
    key: Annotated[str | None, typer.Argument(help="The key, or its beginning; without, every key.")] = None,
    vector_cache: VectorCacheOption = Path("vector_cache"),
    as_json: JsonOption = False,
) -> None:
    """Verify the checksum of every shard. Damaged shards are set aside and computed again by the next run; exit code 1."""
    from ksweep.activations import maintenance

    rows: list[OutputRow] = []
    for entry in maintenance.entries(vector_cache) if key is None else [maintenance.entry_of(vector_cache, key)]:
        shards, damaged = maintenance.verify(entry)
        rows.append({"key": entry.key, "shards": shards, "bytes": entry.bytes, "damaged": damaged})
    texts = [{**row, "bytes": bytes_text(row["bytes"]), "damaged": row["damaged"] or "none"} for row in rows]
    print_rows(rows if as_json else texts, as_json=as_json, names=["key", "shards", "bytes", "damaged"])
    if num_damaged := sum(len(row["damaged"]) for row in rows):
        raise StoreError(
            f"{num_damaged} damaged shards were set aside in {vector_cache}; the next run that needs them computes them again"
        )


@cache_group.command("gc")
def cache_gc_command(
    older_than: Annotated[str | None, typer.Option(help="Remove keys not used for this long: 30d, 12h, 90m, 2w.")] = None,
    keep_used: Annotated[
        bool, typer.Option("--keep-used", help="Keep the keys of the registry's runs and draws, and remove the rest.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove; without it, only list what would be removed.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Remove keys touched within the last hour too.")] = False,
    vector_cache: VectorCacheOption = Path("vector_cache"),
    registry: RegistryOption = Path("registry"),
    as_json: JsonOption = False,
) -> None:
    """Free disk space: keys by --older-than, --keep-used or both (then only those that meet both), and always crash leftovers.

    Lists what would be removed, and removes nothing unless --yes is given. Draws and scores are results and are never removed.
    """
    from ksweep.activations import maintenance
    from ksweep.registry.run_record import activations_in_use

    entries = maintenance.entries(vector_cache)
    used = activations_in_use(registry) if keep_used else None
    keys = maintenance.unused(entries, None if older_than is None else _seconds(older_than), used)
    busy = [] if force else [removal for removal in keys if maintenance.is_in_use(removal)]
    keys = [removal for removal in keys if removal not in busy]
    removals = keys + maintenance.leftovers_in(vector_cache)
    for directory in sorted([*(registry / "draws").glob("*/"), *(registry / "scores").glob("*/*/")]):
        removals += maintenance.leftovers_of(directory)
    removed_directories = {removal.path for removal in keys}
    removals = [removal for removal in removals if removal.path.parent not in removed_directories]
    _print_removals(removals, yes, as_json)
    for removal in busy:
        remark(f"kept: {removal.key}, touched within the last hour: a job may need it (--force removes it)")
    for removal in removals if yes else []:
        if not maintenance.remove(removal, force=force):
            remark(f"kept: {removal.key}, a job has started to use it")


def _print_removals(removals: Sequence[Removal], yes: bool, as_json: bool) -> None:
    rows = [
        {"key": r.key, "path": str(r.path), "bytes": r.bytes if as_json else bytes_text(r.bytes), "reason": r.reason}
        for r in removals
    ]
    if rows or as_json:
        print_rows(rows, as_json=as_json)
    total = bytes_text(sum(removal.bytes for removal in removals))
    summary = f"frees {total}" if yes else f"would free {total}; nothing was removed: give --yes to remove"
    remark(summary if removals else "nothing to remove")


@cache_group.command("merged")
def cache_merged_command(
    older_than: Annotated[str | None, typer.Option(help="Only copies not used for this long: 30d, 12h, 90m, 2w.")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove them: the next sweep that needs one writes it again.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the copies of AVs in $KSWEEP_HOME/merged: adapters merged into their base, for sampling.engine=vllm."""
    from ksweep.autoencoder.nla.plain_weights import merged_copies, remove_copy

    oldest = math.inf if older_than is None else datetime.now(UTC).timestamp() - _seconds(older_than)
    copies = [copy for copy in merged_copies() if copy.last_used <= oldest]
    rows = [
        {
            "directory": str(copy.directory), "av": copy.av, "dtype": copy.dtype,
            "bytes": copy.bytes if as_json else bytes_text(copy.bytes), "last_used": _utc_text(copy.last_used),
        }
        for copy in copies
    ]  # fmt: skip
    print_rows(rows, as_json=as_json, names=["directory", "av", "dtype", "bytes", "last_used"])
    for copy in copies if remove else []:
        remove_copy(copy)
    if remove:
        remark(f"freed {bytes_text(sum(copy.bytes for copy in copies))}")


@cache_group.command("du")
def cache_du_command(
    vector_cache: VectorCacheOption = Path("vector_cache"),
    registry: RegistryOption = Path("registry"),
    as_json: JsonOption = False,
) -> None:
    """Show the bytes of each key and in total, of the activations and of the registry's draws and scores."""
    from ksweep.activations import maintenance

    rows: list[OutputRow] = [{"store": "activations", "key": e.key, "bytes": e.bytes} for e in maintenance.entries(vector_cache)]
    draws = [path for path in (registry / "draws").glob("*/") if not path.name.startswith("_")]
    rows += [{"store": "draws", "key": path.name, "bytes": maintenance.disk_bytes(path)} for path in draws]
    scores = [path for path in (registry / "scores").glob("*/*/") if not path.name.startswith("_")]
    rows += [
        {"store": "scores", "key": f"{path.parent.name}/{path.name}", "bytes": maintenance.disk_bytes(path)} for path in scores
    ]
    rows.sort(key=lambda row: -row["bytes"])
    rows.append({"store": "all", "key": None, "bytes": sum(row["bytes"] for row in rows)})
    print_rows(rows if as_json else [{**row, "bytes": bytes_text(row["bytes"])} for row in rows], as_json=as_json)


def _seconds(text: str) -> float:
    """Return the seconds of 30d, 12h, 90m, 45s or 2w."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    if match is None or not math.isfinite(float(match[1])):
        raise RequestError(f"--older-than {text!r} is not a duration: give a number with s, m, h, d or w, e.g. 30d or 12h")
    return float(match[1]) * UNIT_SECONDS[match[2]]


def _utc_text(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"


def _dotted(name: str, value: Any) -> list[tuple[str, Any]]:
    """Return nested mappings as pairs of a dotted name and a value."""
    if not isinstance(value, dict):
        return [(name, value)]
    return [pair for key, inner in value.items() for pair in _dotted(f"{name}.{key}".lstrip("."), inner)]
