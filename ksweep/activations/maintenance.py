"""List, verify and clean the vector cache. Computes nothing, loads no model.

    entries(cache), entry_of(cache, "3fa9")      the keys, a key by its first digits
    verify(entry)                                compare checksums; damaged shards are set aside, to be computed again
    unused(...), leftovers_in(...) -> Removal    what could be removed, and why
    remove(removal)                              remove it

A key is removed by renaming its directory, then deleting that: readers see all of it or nothing, and a job that starts to fill
the key meanwhile fills a new directory. If a removal is killed, the next one finds the rest as a leftover.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksweep.activations.store import SHARD_JSON, ActivationStore
from ksweep.utils.errors import RequestError, RunError
from ksweep.utils.files import LEFTOVER_AGE, leftovers

KEY = re.compile(r"[0-9a-f]{32}")
IN_USE_SECONDS = 3600.0
"""A key that was used within this time may belong to a running job."""
ASIDE = ".removing-"


@dataclass(frozen=True)
class Entry:
    """A key of the cache. Facts that only the manifest has are None without one (the next run writes it)."""

    key: str
    directory: Path
    model: str | None
    layer: int | None
    text: str | None
    """Source: the text that the model ran over, or the file of vectors."""
    positions: str | None
    num_activations: int
    """Activations that can be read: those in whole shards, contiguous from the first."""
    is_whole_source: bool
    bytes: int
    """Bytes on disk, including leftovers."""
    last_used: float
    """Time of the last read or write, seconds since 1970."""


@dataclass(frozen=True)
class Removal:
    """Something that could be removed: the directory of a key, or a leftover file."""

    path: Path
    bytes: int
    reason: str
    key: str | None = None
    """None for a leftover."""
    last_used: float = 0.0


def entries(cache: Path) -> list[Entry]:
    """Return every key, most recently used first.

    Raises:
        RequestError: the directory does not exist.
    """
    if not cache.is_dir():
        raise RequestError(f"no vector cache at {cache}: check --vector-cache, or run a sweep first")
    listed = []
    for path in sorted(cache.iterdir()):
        if path.is_dir() and KEY.fullmatch(path.name):
            with suppress(FileNotFoundError):  # removed meanwhile
                listed.append(_entry(path))
    return sorted(listed, key=lambda entry: -entry.last_used)


def entry_of(cache: Path, prefix: str) -> Entry:
    """Return the key that begins with `prefix`.

    Raises:
        RequestError: no key or several; the message lists them.
    """
    there = entries(cache)
    matches = [entry for entry in there if entry.key.startswith(prefix)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise RequestError(f"{len(matches)} keys of {cache} begin with {prefix!r}; give more of one: {_listed(matches)}")
    raise RequestError(
        f"no key of {cache} begins with {prefix!r}; there {f'are {_listed(there)}' if there else 'is none at all'}"
    )


def manifest_of(entry: Entry) -> dict[str, Any] | None:
    """Return the manifest, or None if it is missing or unreadable: nothing is lost, the next run writes it again."""
    try:
        value = json.loads((entry.directory / "manifest.json").read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def verify(entry: Entry) -> tuple[int, list[int]]:
    """Compare the checksum of every shard, and set damaged ones aside. Returns the number of shards and the damaged units."""
    store = ActivationStore(entry.directory.parent, entry.key, {})
    units = {int(match[1]) for path in entry.directory.iterdir() if (match := SHARD_JSON.fullmatch(path.name))}
    readable = store.shards()  # sets shards aside whose JSON is unreadable or whose data file is gone
    return len(units), sorted({*(units - set(readable)), *store.verify(list(readable))})


def damaged_shards(entry: Entry) -> dict[int, str]:
    """Return what is wrong with each damaged unit of a key; nothing is set aside."""
    return ActivationStore(entry.directory.parent, entry.key, {}).problems()


def unused(candidates: Iterable[Entry], older_than: float | None, used_keys: Collection[str] | None) -> list[Removal]:
    """Return keys not used for `older_than` seconds and not among `used_keys`. None skips a condition; with both None, no key."""
    if older_than is None and used_keys is None:
        return []
    out, now = [], time.time()
    for entry in candidates:
        age = now - entry.last_used
        if (older_than is None or age >= older_than) and (used_keys is None or entry.key not in used_keys):
            reason = f"not used for {ago(age)}" + ("" if used_keys is None else ", named by no run")
            is_link = entry.directory.is_symlink()
            reason += ", a link: what it leads to stays" if is_link else ""
            out.append(Removal(entry.directory, 0 if is_link else entry.bytes, reason, entry.key, entry.last_used))
    return out


def is_in_use(removal: Removal) -> bool:
    """Return whether a key was used so recently that a running job may still need it."""
    return removal.key is not None and time.time() - removal.last_used < IN_USE_SECONDS


def leftovers_in(cache: Path) -> list[Removal]:
    """Return files of every key that no process will read again: left by killed processes, set aside, or never published."""
    out = [Removal(path, disk_bytes(path), "left by a removal that was killed") for path in sorted(cache.glob(f"{ASIDE}*"))]
    for path in sorted(cache.iterdir()):
        if path.is_dir() and KEY.fullmatch(path.name):
            out += leftovers_of(path)
            out += [Removal(orphan, disk_bytes(orphan), "a shard that was never published") for orphan in _orphans(path)]
    return out


def leftovers_of(directory: Path) -> list[Removal]:
    """Return half-written and damaged files in a directory of either store, if too old to belong to a living process."""
    out = [Removal(path, disk_bytes(path), "left by a process that was killed") for path in leftovers(directory)]
    damaged = [path for path in sorted(directory.glob("*.damaged-*")) if time.time() - time_of(path) > LEFTOVER_AGE]
    return out + [Removal(path, disk_bytes(path), "damaged, was set aside") for path in damaged]


def remove(removal: Removal, *, force: bool = False) -> bool:
    """Remove a key or leftover and return whether it is gone. A key that a job has used since the listing stays, unless `force`.

    Raises:
        RunError: this process may not remove it.
    """
    try:
        if removal.key is None:
            _delete(removal.path)
            return True
        return _remove_key(removal.path, math.inf if force else removal.last_used)
    except FileNotFoundError:  # another process has removed it
        return True
    except OSError as error:
        raise RunError(
            f"cannot remove {removal.path} ({error.strerror}): may you write there? The rest was left in place"
        ) from error


def _remove_key(directory: Path, last_looked: float) -> bool:
    if last_used(directory) > last_looked:
        return False
    aside = directory.with_name(f"{ASIDE}{directory.name}-{secrets.token_hex(4)}")
    directory.rename(aside)
    if last_used(aside) > last_looked and not directory.exists():  # a job has used it between the two checks
        aside.rename(directory)
        return False
    _delete(aside)
    return True


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def last_used(directory: Path) -> float:
    """Return when a file of a key was last written, or `used` renewed by a reader. Cleaning changes the directory's own time."""
    return max((time_of(path) for path in directory.iterdir()), default=time_of(directory))


def time_of(path: Path) -> float:
    """Return the time of the last change; 0 if the file is gone."""
    with suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0


def disk_bytes(path: Path) -> int:
    """Return the bytes of a file, or of all files below a directory; files removed meanwhile count 0."""
    if path.is_dir():
        return sum(disk_bytes(inner) for inner in path.iterdir())
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def ago(seconds: float) -> str:
    """Return an age in words: "3 days", "5 hours"."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} seconds"


def _entry(directory: Path) -> Entry:
    shards = list(_contiguous(directory))
    bare = Entry(
        key=directory.name,
        directory=directory,
        model=None,
        layer=None,
        text=None,
        positions=None,
        num_activations=sum(int(shard["rows"]) for shard in shards),
        is_whole_source=bool(shards) and bool(shards[-1]["is_last"]),
        bytes=disk_bytes(directory),
        last_used=last_used(directory),
    )
    manifest = manifest_of(bare) or {}
    source, identity = manifest.get("source", {}), manifest.get("identity", {})
    facts = {
        "model": source.get("model"),
        "layer": identity.get("layer"),
        "text": source.get("text") or source.get("vectors"),
        "positions": _rule(identity.get("positions")),
    }
    return Entry(**{**vars(bare), **facts})


def _rule(positions: dict[str, Any] | None) -> str | None:
    if not positions:
        return None
    rest = " ".join(f"{name}={value}" for name, value in positions.items() if name != "rule")
    return f"{positions.get('rule')} {rest}".strip()


def _contiguous(directory: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON of shards 0, 1, 2, ... Changes nothing, whereas `ActivationStore` sets damaged shards aside."""
    unit, shard = 0, _said(directory / "shard-00000.json")
    while shard is not None:
        yield shard
        unit += 1
        shard = None if shard["is_last"] else _said(directory / f"shard-{unit:05d}.json")


def _said(path: Path) -> dict[str, Any] | None:
    """Return the JSON of a shard; None if it is missing or damaged."""
    try:
        value = json.loads(path.read_text())
        return value if {"rows", "is_last", "file"} <= value.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _orphans(directory: Path) -> Iterator[Path]:
    """Yield data files that no JSON names: their writer was killed before it, or another process was first."""
    for path in sorted(directory.glob("shard-*-*.arrow")):
        statement = directory / f"{path.name.rpartition('-')[0]}.json"
        record = _said(statement)
        is_orphan = not statement.exists() if record is None else record["file"] != path.name
        if is_orphan and time.time() - time_of(path) > LEFTOVER_AGE:
            yield path


def _listed(shown: Iterable[Entry]) -> str:
    return ", ".join(f"{entry.key[:12]} ({entry.model or entry.text or 'no manifest'})" for entry in shown)
