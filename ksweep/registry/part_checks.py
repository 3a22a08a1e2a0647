"""Check the parts of a registry before SQL reads them: DuckDB verifies no checksum, and shows flipped bits as numbers and words.

A part is read once for each state of its file (size, time of change), by whoever connects first. The states that passed are kept
in `ksweep.duckdb.parts`, a line each with a digest of itself. That file may be deleted: everything is then checked again.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import xxhash

from ksweep.registry.chosen_files import damage_of_chosen
from ksweep.registry.draws import DRAWS_FILE_SCHEMA
from ksweep.registry.metric_scores import describes_scores, metric_layout_at, texts_of
from ksweep.registry.part_labels import column_digest, read_label
from ksweep.registry.part_store import IDENTITY_FILE, PartStore
from ksweep.registry.run_record import ACTIVATIONS_FILE, damage_of_table
from ksweep.registry.scores import RECONSTRUCTION, MetricLayout, ScoresStore
from ksweep.utils.errors import RunError
from ksweep.utils.files import publish

log = logging.getLogger(__name__)

CHECK = b"1"
"""Version of the check; what passed another one is checked again."""
REMEMBERED_AT_ONCE = 20
"""Parts after which a process tells others what has passed, and learns what others have read: a quarter of a second."""
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
    is_readable: bool = True
    """Whether the file could be read: what a disk or the permissions of a file refuse says nothing about its content."""


def damaged_parts(registry: Path, read_by_sql: ReadBySql, *, again: bool = False) -> tuple[DamagedPart, ...]:
    """Return the files of views that fail their check. Reads only those that no earlier call has found whole.

    Nothing is set aside, so it may be called by any reader; where the directory cannot be written, the next process checks again.

    Args:
        registry: directory of the registry.
        read_by_sql: reads a part as SQL will, and returns its rows or why it cannot. Some flips of a file's metadata change what
            one reader sees and not the other.
        again: read every file, also those that have passed: a disk may change what it holds without changing its time.
    """
    states, passed = _states(registry), _passed(registry)
    unread = [name for name, state in states.items() if again or passed.get(name) != state]
    if len(unread) >= MANY:
        log.warning("reading %d parts of draws and scores in %s once, to find damaged ones", len(unread), registry)
    # Each process in an order of its own: of several that meet the same new parts each reads others first.
    random.Random(os.getpid()).shuffle(unread)
    damaged, stores = [], _Stores(registry)
    for start in range(0, len(unread), REMEMBERED_AT_ONCE):
        passed, result = _passed(registry), dict[str, str]()
        for name in unread[start : start + REMEMBERED_AT_ONCE]:
            state = states[name]
            if not again and passed.get(name) == state:
                continue
            try:
                reason = _damage(stores, name, read_by_sql)
                # A part that was replaced while it was read, or set aside, is none of what was read.
                while reason is not None and (now := _state_now(registry, name)) != state:
                    reason, state = (None, "") if now is None else (_damage(stores, name, read_by_sql), now)
            except (RunError, OSError) as error:
                damaged.append(DamagedPart(registry / name, str(error), is_readable=False))
                continue
            if reason is not None:
                damaged.append(DamagedPart(registry / name, reason))
            # A file may be damaged without another size or time: what has passed before is taken back.
            if passed.get(name, "") != (result_of := state if reason is None else ""):
                result[name] = result_of
        _remember(registry, result)
    _remember(registry, {}, tidy_over=2 * len(states))
    return tuple(sorted(damaged))


def set_damaged_aside(registry: Path, damaged: Sequence[DamagedPart]) -> None:
    """Set aside parts that `damaged_parts` has found, so that the next run computes them again."""
    stores = _Stores(registry)
    for one in damaged:
        name = str(one.path.relative_to(registry))
        if one.is_readable and name.endswith(".parquet") and name.startswith(("draws/", "scores/")):
            store = stores.of(name)
            if (part := store.part_named(one.path.name)) is not None:
                store.set_aside(part, one.reason)


def _damage(stores: _Stores, name: str, read_by_sql: ReadBySql) -> str | None:
    path = stores.registry / name
    if path.name == IDENTITY_FILE:
        return None if describes_scores(path) else "it is not what was written, or no JSON object that describes scores"
    if name.startswith("landing/"):
        return damage_of_table(path)
    if name.startswith("chosen/"):
        by_sql = read_by_sql(path)
        return by_sql if isinstance(by_sql, str) else damage_of_chosen(path, by_sql)
    store = stores.of(name)
    part = store.part_named(path.name)
    if part is None or store.file_name(part) != path.name:
        return "its name is none that ksweep gives"
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
            return f"DuckDB reads other values in its column {name} than its checksums allow"
    # 3. For scores, the draws that they belong to. Those of draws that are gone are no part of any answer.
    if isinstance(store, ScoresStore):
        label, of_draws = read_label(table.schema), stores.draws(store.keys["draws"]).read_label(part.of)
        if label is not None and of_draws is not None and label.scored != of_draws.digest:
            return "it scores other draws than are stored"
    return None


class _Stores:
    """The stores of a registry, each opened once: opening one of draws lists its directory."""

    def __init__(self, registry: Path) -> None:
        self.registry, self._stores = registry, dict[tuple[str, bool], PartStore[Any]]()

    def draws(self, key: str) -> PartStore[Any]:
        """Return the draws of a key."""
        return self._opened(f"draws/{key}", False, lambda: texts_of(self.registry, key))

    def of(self, name: str) -> PartStore[Any]:
        """Return the store of a part, which is named relative to the registry."""
        directory, _, file = name.rpartition("/")
        kind, draws_key, *scores_key = directory.split("/")
        if kind == "draws":
            return self.draws(draws_key)
        is_metric = not file.startswith(f"{RECONSTRUCTION.prefix}-")
        layout = metric_layout_at(self.registry / directory) if is_metric else RECONSTRUCTION
        layout = layout or MetricLayout(metric="unknown", columns={})
        scores = self.registry / "scores"
        return self._opened(directory, is_metric, lambda: ScoresStore(scores, draws_key, scores_key[0], layout))

    def _opened(self, directory: str, is_metric: bool, open_store: Callable[[], PartStore[Any]]) -> PartStore[Any]:
        if (directory, is_metric) not in self._stores:
            self._stores[directory, is_metric] = open_store()
        return self._stores[directory, is_metric]


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
                of_draws = states.get(_draws_part(draws_key, match), "gone")
                states[f"scores/{draws_key}/{scores_key}/{name}"] = f"{state} {of_draws}"
            others.append(f"scores/{draws_key}/{scores_key}/{IDENTITY_FILE}")
    others += [f"chosen/{name}" for name in _entries(registry / "chosen") if name.endswith(".parquet")]
    others += [f"landing/{run}/{ACTIVATIONS_FILE}" for run in _entries(registry / "landing")]
    for name in others:
        if (of_file := _state(registry / name)) is not None:
            states[name] = of_file
    return states


def _state_now(registry: Path, name: str) -> str | None:
    """Return the state of one file as `_states` gives it; None where it is gone."""
    state, match = _state(registry / name), _PART_FILE.match(Path(name).name)
    if state is None or match is None or not name.startswith("scores/"):
        return state
    return f"{state} {_state(registry / _draws_part(name.split('/')[1], match)) or 'gone'}"


def _draws_part(draws_key: str, of_scores: re.Match[str]) -> str:
    """Return the name of the part of draws that a part of scores belongs to."""
    return f"draws/{draws_key}/part-{of_scores['part'] or of_scores['span']}.parquet"


def _entries(directory: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(directory) if not name.startswith(("_", ".")))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _files(directory: Path) -> dict[str, str]:
    """Return the state of each part in a directory by name."""
    return {
        name: state
        for name in _entries(directory)
        # A path as text: with objects, every `connect` to a registry of 8,000 parts took 0.2 s longer.
        if _PART_FILE.match(name) and (state := _state(f"{directory}/{name}")) is not None
    }


def _state(path: Path | str) -> str | None:
    try:
        stat = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):  # another job has set it aside; no directory of a run
        return None
    return f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


# What has passed


_passed_unwritten: dict[Path, dict[str, str]] = {}
"""What this process has checked in registries that it cannot write."""


@dataclass
class _Listed:
    """What a file lists, as far as this process has read it: the file grows with the registry, and every part adds a line."""

    inode: int = 0
    size: int = 0
    last: bytes = b""
    """The end of what was read: where it is another now, the file was written anew."""
    passed: dict[str, str] = field(default_factory=dict)

    def read_on(self, file: BinaryIO) -> None:
        """Read the lines that were appended; lines that contradict their digest count for nothing."""
        inode = os.fstat(file.fileno()).st_ino
        file.seek(max(0, self.size - len(self.last)))
        if inode != self.inode or file.read(len(self.last)) != self.last:
            self.inode, self.size, self.last, self.passed = inode, 0, b"", {}
            file.seek(0)
        lines, newline, _ = file.read().rpartition(b"\n")
        for line in lines.split(b"\n") if newline else ():
            digest, _, entry = line.partition(b" ")
            if xxhash.xxh3_64_hexdigest(CHECK + entry).encode() == digest:
                with suppress(ValueError):
                    name, of_file = json.loads(entry)
                    self.passed[name] = of_file
        if newline:
            self.size, self.last = self.size + len(lines) + 1, (lines + newline)[-64:]


_listed: dict[Path, _Listed] = {}


def _passed(registry: Path) -> Mapping[str, str]:
    """Return path -> state of the parts that have passed."""
    path = registry / CHECKED
    try:
        with path.open("rb") as file:
            _listed.setdefault(path, _Listed()).read_on(file)
    except OSError:
        _listed.pop(path, None)
    listed = _listed[path].passed if path in _listed else {}
    return {**listed, **_passed_unwritten.get(registry, {})}


def _remember(registry: Path, results: Mapping[str, str], tidy_over: int | None = None) -> None:
    """Append lines; each is written whole, so that several processes may append at once. An empty state takes back what passed.

    With `tidy_over` a file of more lines is written anew first, with those that count.
    """
    path = registry / CHECKED
    try:
        if tidy_over is not None and path.exists() and path.read_bytes().count(b"\n") > tidy_over + MANY:
            publish(path, _lines({name: state for name, state in _passed(registry).items() if state}))
        if results:
            with path.open("ab", buffering=0) as file:
                file.write(_lines(results))
    except OSError:  # a registry that cannot be written, a full disk
        _passed_unwritten.setdefault(registry, {}).update(results)


def _lines(results: Mapping[str, str]) -> bytes:
    entries = [json.dumps(item).encode() for item in results.items()]
    return b"".join(xxhash.xxh3_64_hexdigest(CHECK + entry).encode() + b" " + entry + b"\n" for entry in entries)
