"""The vector cache: what is there, whether it is whole, what may go."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ksweep.cli.app import cache
from ksweep.cli.output import Json, Registry, print_rows
from ksweep.utils.console import bytes_text
from ksweep.utils.errors import RequestError, StoreError

if TYPE_CHECKING:
    from ksweep.activations.maintenance import Removal

Cache = Annotated[Path, typer.Option("--vector-cache", help="Directory of cached activations.")]
Key = Annotated[str, typer.Argument(help="The key, or the beginning of it.")]
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@cache.command("ls")
def cache_ls(vector_cache: Cache = Path("vector_cache"), as_json: Json = False) -> None:
    """Keys, the one used last first."""
    from ksweep.activations import maintenance

    found = maintenance.entries(vector_cache)
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
    print_rows(names, shown, as_json)


@cache.command("show")
def cache_show(key: Key, vector_cache: Cache = Path("vector_cache"), as_json: Json = False) -> None:
    """What the manifest of a key says, and what is on disk now."""
    from ksweep.activations import maintenance

    entry = maintenance.entry_of(vector_cache, key)
    manifest = maintenance.manifest_of(entry)
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
    from ksweep.activations import maintenance

    found = maintenance.entries(vector_cache) if key is None else [maintenance.entry_of(vector_cache, key)]
    rows = []
    for entry in found:
        shards, damaged = maintenance.verify(entry)
        rows.append({"key": entry.key, "shards": shards, "bytes": entry.bytes, "damaged": damaged})
    shown = [
        {
            **row,
            "bytes": bytes_text(cast(int, row["bytes"])),
            "damaged": ", ".join(map(str, cast(list[int], row["damaged"]))) or "none",
        }
        for row in rows
    ]
    print_rows(["key", "shards", "bytes", "damaged"], rows if as_json else shown, as_json)
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
    from ksweep.activations import maintenance
    from ksweep.registry.run_record import activations_in_use

    found = maintenance.entries(vector_cache)
    used = activations_in_use(registry) if keep_used else None
    keys = maintenance.unused(found, None if older_than is None else _duration(older_than), used)
    busy = [] if force else [removal for removal in keys if maintenance.is_in_use(removal)]
    keys = [removal for removal in keys if removal not in busy]
    removals = keys + maintenance.leftovers_in(vector_cache)
    for draws in sorted((registry / "draws").glob("*/")):
        removals += maintenance.leftovers_of(draws)
    going = {removal.path for removal in keys}
    removals = [removal for removal in removals if removal.path.parent not in going]
    _tell(removals, yes, as_json)
    for removal in busy:
        print(f"kept: {removal.key}, touched within the last hour: a job may need it (--force removes it)", file=sys.stderr)
    for removal in removals if yes else []:
        if not maintenance.remove(removal, force=force):
            print(f"kept: {removal.key}, a job has begun to use it", file=sys.stderr)


@cache.command("du")
def cache_du(vector_cache: Cache = Path("vector_cache"), registry: Registry = Path("registry"), as_json: Json = False) -> None:
    """Bytes by key and in all, of the activations and of the draws in the registry."""
    from ksweep.activations import maintenance

    rows: list[dict[str, Any]] = [
        {"store": "activations", "key": e.key, "bytes": e.bytes} for e in maintenance.entries(vector_cache)
    ]
    draws = [path for path in (registry / "draws").glob("*/") if not path.name.startswith("_")]
    rows += [{"store": "draws", "key": path.name, "bytes": maintenance.disk_bytes(path)} for path in draws]
    rows.sort(key=lambda row: -row["bytes"])
    rows.append({"store": "all", "key": None, "bytes": sum(row["bytes"] for row in rows)})
    print_rows(
        ["store", "key", "bytes"], rows if as_json else [{**row, "bytes": bytes_text(row["bytes"])} for row in rows], as_json
    )


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
        print_rows(["key", "path", "bytes", "reason"], rows, as_json)
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
