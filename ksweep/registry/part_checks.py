"""Check the parts of a registry before SQL reads them: DuckDB verifies no checksum, and shows flipped bits as numbers and words.

A part is read once for each state of its file (size, time of change), by whoever connects first. The states that passed are kept
in `ksweep.duckdb.parts`, a line each with a digest of itself. That file may be deleted: everything is then checked again.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from ksweep.registry.chosen_files import damage_of_chosen
from ksweep.registry.draws import DRAWS_FILE_SCHEMA
from ksweep.registry.metric_scores import IDENTITY_FILE, MetricScores, is_identity, metric_layout_at, texts_of
from ksweep.registry.part_labels import column_digest, read_label
from ksweep.registry.part_store import PartStore
from ksweep.registry.run_record import ACTIVATIONS_FILE, damage_of_table
from ksweep.registry.scores import RECONSTRUCTION, MetricLayout, ScoresStore

log = logging.getLogger(__name__)

MANY = 1000
"""Parts that take ten seconds or more to check: 11 ms of processor time each, where a part has 512 draws."""
ReadBySql = Callable[[Path], pa.Table | str]
CHECKED = "ksweep.duckdb.parts"
_NUMBERS = r"\d+-\d+-\d+-\d+"
_PART_FILE = re.compile(rf"^(?:part|metric)-(?P<span>{_NUMBERS})(?:-of-(?P<part>{_NUMBERS}))?\.parquet$")
"""The draws that a file holds or scores, and, if these are not all of a part of draws, that part."""


@dataclass(frozen=True, order=True)
class DamagedPart:
    """A part that failed its check."""

    path: Path
    reason: str


def damaged_parts(registry: Path, read_by_sql: ReadBySql, *, again: bool = False) -> tuple[DamagedPart, ...]:
    """Return the files of views that fail their check. Reads only those that no earlier call has found whole.

    Nothing is set aside, so it may be called by any reader; where the directory cannot be written, the next process checks again.

    Args:
        registry: directory of the registry.
        read_by_sql: reads a part as SQL will, and returns its rows or why it cannot. Some flips of a file's metadata change what
            one reader sees and not the other.
        again: read every file, also those that have passed: a disk may change what it holds without changing its time.
    """
    passed = {} if again else _passed(registry)
    damaged, newly_passed = [], {}
    unread = {name: state for name, state in _states(registry).items() if passed.get(name) != state}
    if len(unread) >= MANY:
        log.warning("reading %d parts of draws and scores in %s once, to find damaged ones", len(unread), registry)
    for name, state in unread.items():
        if (reason := _damage(registry, name, read_by_sql)) is None:
            newly_passed[name] = state
        else:
            damaged.append(DamagedPart(registry / name, reason))
    _remember(registry, newly_passed)
    return tuple(sorted(damaged))


def set_damaged_aside(registry: Path, damaged: Sequence[DamagedPart]) -> None:
    """Set aside parts that `damaged_parts` has found, so that the next run computes them again."""
    for one in damaged:
        if (name := str(one.path.relative_to(registry))).endswith(".parquet") and name.startswith(("draws/", "scores/")):
            store, part = _store_and_part(registry, name)
            store.set_aside(part, one.reason)


def _damage(registry: Path, name: str, read_by_sql: ReadBySql) -> str | None:
    path = registry / name
    if path.name == IDENTITY_FILE:
        return None if is_identity(path) else "it is no JSON object that describes scores"
    if name.startswith("landing/"):
        return damage_of_table(path)
    if name.startswith("chosen/"):
        by_sql = read_by_sql(path)
        return by_sql if isinstance(by_sql, str) else damage_of_chosen(path, by_sql)
    return _damage_of_part(registry, *_store_and_part(registry, name), read_by_sql)


def _damage_of_part(registry: Path, store: PartStore[Any], part: Any, read_by_sql: ReadBySql) -> str | None:
    # 1. The checksums of its pages, the digests of its columns, its keys, its name.
    table = store.read_checked(part)
    if table is None or isinstance(table, str):
        return table
    # 2. What SQL sees.
    by_sql = read_by_sql(store.path / store.file_name(part))
    if isinstance(by_sql, str):
        return by_sql
    expected = store.columns if isinstance(store, ScoresStore) else DRAWS_FILE_SCHEMA.names
    if missing := set(expected).difference(by_sql.column_names):
        return f"it has no column {min(missing)}"
    for name in table.column_names:
        if name not in by_sql.column_names or column_digest(by_sql[name]) != column_digest(table[name]):
            return f"its column {name} is another in SQL than its checksums say"
    # 3. For scores, the draws that they belong to. Those of draws that are gone are no part of any answer.
    if isinstance(store, ScoresStore):
        label, of_draws = read_label(table.schema), texts_of(registry, store.keys["draws"]).read_label(part.of)
        if label is not None and of_draws is not None and label.scored != of_draws.digest:
            return "it scores other draws than are stored"
    return None


def _store_and_part(registry: Path, name: str) -> tuple[PartStore[Any], Any]:
    """Return the store of a part, which is named relative to the registry, and the part."""
    path = registry / name
    store: PartStore[Any]
    if path.relative_to(registry).parts[0] == "draws":
        store = texts_of(registry, path.parent.name)
    elif path.name.startswith(f"{RECONSTRUCTION.prefix}-"):
        store = ScoresStore(registry / "scores", path.parent.parent.name, path.parent.name)
    else:
        layout = metric_layout_at(path.parent) or MetricLayout(metric="unknown", columns={})
        store = MetricScores(registry, path.parent.parent.name, path.parent.name, layout)
    return store, store.part_named(path.name)


def _states(registry: Path) -> dict[str, str]:
    """Return for each file, named relative to the registry, size and time of change of all that its check depends on."""
    states, others = dict[str, str](), list[str]()
    for directory in _entries(registry / "draws"):
        states |= {f"draws/{directory}/{name}": state for name, state in _files(registry / "draws" / directory).items()}
    for draws_key in _entries(registry / "scores"):
        for scores_key in _entries(registry / "scores" / draws_key):
            for name, state in _files(registry / "scores" / draws_key / scores_key).items():
                match = _PART_FILE.match(name)
                assert match is not None
                of_draws = states.get(f"draws/{draws_key}/part-{match['part'] or match['span']}.parquet", "gone")
                states[f"scores/{draws_key}/{scores_key}/{name}"] = f"{state} {of_draws}"
            others.append(f"scores/{draws_key}/{scores_key}/{IDENTITY_FILE}")
    others += [f"chosen/{name}" for name in _entries(registry / "chosen") if name.endswith(".parquet")]
    others += [f"landing/{run}/{ACTIVATIONS_FILE}" for run in _entries(registry / "landing")]
    for name in others:
        if (of_file := _state(registry / name)) is not None:
            states[name] = of_file
    return states


def _entries(directory: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(directory) if not name.startswith(("_", ".")))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _files(directory: Path) -> dict[str, str]:
    """Return the state of each part in a directory by name."""
    return {
        name: state for name in _entries(directory) if _PART_FILE.match(name) and (state := _state(directory / name)) is not None
    }


def _state(path: Path) -> str | None:
    try:
        stat = path.stat()
    except (FileNotFoundError, NotADirectoryError):  # another job has set it aside; no directory of a run
        return None
    return f"{stat.st_size}:{stat.st_mtime_ns}"


# What has passed


def _passed(registry: Path) -> Mapping[str, str]:
    path = registry / CHECKED
    state = _state(path)
    return {} if state is None else _passed_in(path, state)


@lru_cache(maxsize=8)
def _passed_in(path: Path, state: str) -> Mapping[str, str]:
    """Return path -> state of the parts that a file lists; lines that contradict their digest count for nothing."""
    passed = {}
    for line in path.read_bytes().splitlines():
        digest, _, entry = line.partition(b" ")
        if xxhash.xxh3_64_hexdigest(entry).encode() == digest:
            with suppress(ValueError):
                name, of_file = json.loads(entry)
                passed[name] = of_file
    return passed


def _remember(registry: Path, newly_passed: Mapping[str, str]) -> None:
    """Append lines; each is written whole, so that several processes may append at once."""
    if not newly_passed:
        return
    entries = [json.dumps(item).encode() for item in newly_passed.items()]
    lines = b"".join(xxhash.xxh3_64_hexdigest(entry).encode() + b" " + entry + b"\n" for entry in entries)
    # A registry that cannot be written, or a full disk: the next process checks again.
    with suppress(OSError), (registry / CHECKED).open("ab", buffering=0) as file:
        file.write(lines)
