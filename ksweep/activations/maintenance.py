"""Keeping house in the vector cache: what is there, whether it is whole, what may go. Computes nothing, loads no model.

    entries(cache), entry_of(cache, "3fa9")      what is there
    verify(entry)                                checksums; what is damaged is set aside, to be computed again
    unused(...), leftovers_in(...) -> Removal    what could go, and why
    remove(removal)                              and away

A key is removed by renaming its directory aside, then deleting that: whoever looks sees all of it or nothing, and a job that
begins to fill the key meanwhile fills a new directory. What a killed removal left is a leftover of the next.
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

from ksweep.activations.store import ActivationStore
from ksweep.utils.errors import RequestError, RunError
from ksweep.utils.files import LEFTOVER_AGE, leftovers

KEY = re.compile(r"[0-9a-f]{32}")
SHARD = re.compile(r"shard-(\d+)\.json")
IN_USE_SECONDS = 3600.0
"""What was touched within this time may belong to a running job."""
ASIDE = ".removing-"


@dataclass(frozen=True)
class Entry:
    """One key of the cache. What only the manifest says is None where there is none (the next run writes it)."""

    key: str
    directory: Path
    model: str | None
    layer: int | None
    text: str | None
    """Text that the model read, or the file of vectors."""
    positions: str | None
    num_activations: int
    """Can be read: whole shards, contiguous from the first."""
    is_whole_source: bool
    bytes: int
    """On disk, leftovers included."""
    last_used: float
    """Last read or written, seconds since 1970."""


@dataclass(frozen=True)
class Removal:
    """Something that could go: the directory of a key, or a leftover file."""

    path: Path
    bytes: int
    reason: str
    key: str | None = None
    """None for a leftover."""
    last_used: float = 0.0


def entries(cache: Path) -> list[Entry]:
    """Every key, the one used last first.

    Raises:
        RequestError: no such directory.
    """
    if not cache.is_dir():
        raise RequestError(f"no vector cache at {cache}: check --vector-cache, or run a sweep first")
    found = []
    for path in sorted(cache.iterdir()):
        if path.is_dir() and KEY.fullmatch(path.name):
            with suppress(FileNotFoundError):  # removed while one looks
                found.append(_entry(path))
    return sorted(found, key=lambda entry: -entry.last_used)


def entry_of(cache: Path, prefix: str) -> Entry:
    """The one key that begins so.

    Raises:
        RequestError: none, or several; says which keys there are.
    """
    there = entries(cache)
    found = [entry for entry in there if entry.key.startswith(prefix)]
    if len(found) == 1:
        return found[0]
    if found:
        raise RequestError(f"{len(found)} keys of {cache} begin with {prefix!r}; give more of one: {_listed(found)}")
    raise RequestError(
        f"no key of {cache} begins with {prefix!r}; there {f'are {_listed(there)}' if there else 'is none at all'}"
    )


def manifest_of(entry: Entry) -> dict[str, Any] | None:
    """The manifest, or None where it is missing or unreadable: nothing is lost, the next run writes it anew."""
    try:
        value = json.loads((entry.directory / "manifest.json").read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def verify(entry: Entry) -> tuple[int, list[int]]:
    """Compare the checksum of every shard: (number of shards, those that were damaged). Damaged ones are set aside."""
    store = ActivationStore(entry.directory.parent, entry.key, {})
    said = [int(match[1]) for path in entry.directory.iterdir() if (match := SHARD.fullmatch(path.name))]
    readable = store.shards()  # what cannot be read as JSON, or has lost its data, is set aside here
    return len(said), sorted({*(set(said) - set(readable)), *store.verify(list(readable))})


def unused(found: Iterable[Entry], older_than: float | None, used_keys: Collection[str] | None) -> list[Removal]:
    """Keys that were not used for so many seconds and that nothing names; None leaves a condition out, both: nothing goes."""
    if older_than is None and used_keys is None:
        return []
    out, now = [], time.time()
    for entry in found:
        age = now - entry.last_used
        if (older_than is None or age >= older_than) and (used_keys is None or entry.key not in used_keys):
            reason = f"not used for {ago(age)}" + ("" if used_keys is None else ", named by no run")
            is_link = entry.directory.is_symlink()
            reason += ", a link: what it leads to stays" if is_link else ""
            out.append(Removal(entry.directory, 0 if is_link else entry.bytes, reason, entry.key, entry.last_used))
    return out


def is_in_use(removal: Removal) -> bool:
    """Whether a key was touched so lately that a running job may still need it."""
    return removal.key is not None and time.time() - removal.last_used < IN_USE_SECONDS


def leftovers_in(cache: Path) -> list[Removal]:
    """What nobody will read any more, in every key: left by killed processes, set aside, published by nobody."""
    out = [Removal(path, disk_bytes(path), "left by a removal that was killed") for path in sorted(cache.glob(f"{ASIDE}*"))]
    for path in sorted(cache.iterdir()):
        if path.is_dir() and KEY.fullmatch(path.name):
            out += leftovers_of(path)
            out += [Removal(orphan, disk_bytes(orphan), "a shard that was never published") for orphan in _orphans(path)]
    return out


def leftovers_of(directory: Path) -> list[Removal]:
    """Half-written and damaged files of one key, of either store, that are old enough to be nobody's."""
    out = [Removal(path, disk_bytes(path), "left by a process that was killed") for path in leftovers(directory)]
    damaged = [path for path in sorted(directory.glob("*.damaged-*")) if time.time() - time_of(path) > LEFTOVER_AGE]
    return out + [Removal(path, disk_bytes(path), "damaged, was set aside") for path in damaged]


def remove(removal: Removal, *, force: bool = False) -> bool:
    """Remove it; says whether it went. A key that a job has touched since it was looked at stays, unless `force`.

    Raises:
        RunError: it is not ours to remove.
    """
    try:
        if removal.key is None:
            _delete(removal.path)
            return True
        return _remove_key(removal.path, math.inf if force else removal.last_used)
    except FileNotFoundError:  # someone else was quicker
        return True
    except OSError as error:
        raise RunError(f"cannot remove {removal.path} ({error.strerror}): is it yours? The rest was left as it is") from error


def _remove_key(directory: Path, last_looked: float) -> bool:
    if last_used(directory) > last_looked:
        return False
    aside = directory.with_name(f"{ASIDE}{directory.name}-{secrets.token_hex(4)}")
    directory.rename(aside)
    if last_used(aside) > last_looked and not directory.exists():  # a job came between the two looks
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
    """When anything in a key was last written, or `used` renewed by a reader; a directory's own time changes with tidying up."""
    return max((time_of(path) for path in directory.iterdir()), default=time_of(directory))


def time_of(path: Path) -> float:
    """Time of last change; 0 for what has just gone."""
    with suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0


def disk_bytes(path: Path) -> int:
    """Size of a file, or of everything below a directory; what goes while one looks counts nothing."""
    if path.is_dir():
        return sum(disk_bytes(inner) for inner in path.iterdir())
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def ago(seconds: float) -> str:
    """A length of time as people say it."""
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
    said = {
        "model": source.get("model"),
        "layer": identity.get("layer"),
        "text": source.get("text") or source.get("vectors"),
        "positions": _rule(identity.get("positions")),
    }
    return Entry(**{**vars(bare), **said})


def _rule(positions: dict[str, Any] | None) -> str | None:
    if not positions:
        return None
    rest = " ".join(f"{name}={value}" for name, value in positions.items() if name != "rule")
    return f"{positions.get('rule')} {rest}".strip()


def _contiguous(directory: Path) -> Iterator[dict[str, Any]]:
    """What shards 0, 1, 2, ... say of themselves. Only looks, where `ActivationStore` would set a damaged one aside."""
    unit, shard = 0, _said(directory / "shard-00000.json")
    while shard is not None:
        yield shard
        unit += 1
        shard = None if shard["is_last"] else _said(directory / f"shard-{unit:05d}.json")


def _said(path: Path) -> dict[str, Any] | None:
    """What a shard's JSON says; None where it is not there or not whole."""
    try:
        value = json.loads(path.read_text())
        return value if {"rows", "is_last", "file"} <= value.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _orphans(directory: Path) -> Iterator[Path]:
    """Data files that no JSON names, because their writer was killed in between or another process was first."""
    for path in sorted(directory.glob("shard-*-*.arrow")):
        statement = directory / f"{path.name.rpartition('-')[0]}.json"
        said = _said(statement)
        nobodys = not statement.exists() if said is None else said["file"] != path.name
        if nobodys and time.time() - time_of(path) > LEFTOVER_AGE:
            yield path


def _listed(found: Iterable[Entry]) -> str:
    return ", ".join(f"{entry.key[:12]} ({entry.model or entry.text or 'no manifest'})" for entry in found)
