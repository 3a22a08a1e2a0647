"""What the stores of draws and scores share: parts that are published whole, read with checks, and set aside if damaged."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ksweep.registry.part_labels import PartLabel, labelled, read_label
from ksweep.registry.work_units import WorkUnit
from ksweep.utils.errors import DiskError, DiskFullError, RunError, classify
from ksweep.utils.files import clear_leftovers, link_once, publish, umask_permissions
from ksweep.utils.fingerprint import json_digest
from ksweep.utils.notes import Note, load_notes, save_notes

log = logging.getLogger(__name__)

Part = TypeVar("Part", bound=WorkUnit)
IDENTITY_FILE = "identity.json"
"""File beside the parts that says what their key is hashed from."""
SPAN = r"(\d+)-(\d+)-(\d+)-(\d+)"


class PartStore(ABC, Generic[Part]):
    """The parts of one directory. A part's name exists only after its file is complete."""

    content: ClassVar[str]
    """What a part holds, for messages: "draws"."""
    remedy: ClassVar[str]
    """What is computed again in place of a damaged part, for messages."""

    def __init__(self, path: Path, keys: Mapping[str, str]) -> None:
        """Open a directory; it is created when the first part is published. `keys` is what labels of its parts must say."""
        self.path, self.keys = path, keys

    @property
    @abstractmethod
    def columns(self) -> Sequence[str]:
        """Columns that labels have digests of."""

    @abstractmethod
    def file_name(self, part: Part) -> str:
        """Return the name of a part's file."""

    @abstractmethod
    def part_named(self, name: str) -> Part | None:
        """Return the part that a file name says; None for other files."""

    def num_rows(self, part: Part) -> int:
        """Return how many rows a part has."""
        return part.num_draws

    def parts(self) -> list[Part]:
        """Return the published parts in order, read from the file names."""
        try:
            names = os.listdir(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(part for name in names if (part := self.part_named(name)) is not None)

    def parts_meeting(self, num_activations: int, num_draws: int) -> list[Part]:
        """Return the parts with any of the first draws of the first activations."""
        return [part for part in self.parts() if part.meets(num_activations, num_draws)]

    def bytes_on_disk(self) -> int:
        """Return the size of all parts in bytes."""
        return sum(self.size_of(part) for part in self.parts())

    def size_of(self, part: Part) -> int:
        """Return the size of a part in bytes; 0 where another job has set it aside."""
        try:
            return (self.path / self.file_name(part)).stat().st_size
        except FileNotFoundError:
            return 0

    def coverage(self, num_activations: int, num_draws: int) -> np.ndarray:
        """Return which draws have a row in a part, boolean [activation, draw]."""
        exists = np.zeros((num_activations, num_draws), dtype=bool)
        for part in self.parts():
            exists[part.index()] = True
        return exists

    def describe(self, identity: Mapping[str, Any]) -> None:
        """Write what the key is hashed from into identity.json, unless it is there, and whole."""
        target = self.path / IDENTITY_FILE
        try:
            read_identity(target)
        except (OSError, ValueError):
            self.write_identity(identity)

    def write_identity(self, identity: Mapping[str, Any]) -> None:
        """Write identity.json, with a digest of what it says."""
        content = {**identity, "digest": json_digest({**identity})}
        data = json.dumps(content, indent=1, sort_keys=True).encode()
        guard_disk(self.path, lambda: publish(self.path / IDENTITY_FILE, data))

    def write(self, part: Part, table: pa.Table, label: PartLabel, *, replace: bool) -> bool:
        """Write a part under another name, flush it, and give it its name; return whether it is now the part of this call.

        Without `replace` a part of the same name that another job has published stays.

        Raises:
            DiskFullError: the disk is full; no partial file is left.
        """
        assert table.num_rows == self.num_rows(part), (table.num_rows, part)
        target = self.path / self.file_name(part)
        return guard_disk(self.path, lambda: self._write(target, labelled(table, label), replace))

    def _write(self, target: Path, table: pa.Table, replace: bool) -> bool:
        self.path.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self.path, prefix=".", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                # Page checksums: a flipped byte is an error when the part is read, not another number.
                pq.write_table(table, file, compression="zstd", write_page_checksum=True)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, umask_permissions())
            if not replace:
                return link_once(Path(temporary), target)
            os.replace(temporary, target)
            return True
        finally:
            Path(temporary).unlink(missing_ok=True)

    def read_label(self, part: Part) -> PartLabel | None:
        """Return the label of a part; None where there is no such part, or none that can be read."""
        try:
            return read_label(pq.read_schema(self.path / self.file_name(part)))
        except (FileNotFoundError, ValueError, pa.ArrowException):
            return None
        except OSError as error:
            if error.errno is not None:
                raise
            return None  # what pyarrow raises for a footer that it cannot read

    def read_part(self, part: Part, columns: Sequence[str] | None = None) -> pa.Table | None:
        """Return the rows of a part by activation and draw; None, with the part set aside and a warning, where it is damaged.

        `columns` are read beside activation and draw; None: all.
        """
        table = self.read_checked(part, columns)
        if not isinstance(table, str):
            return table
        self.set_aside(part, table)
        return None

    def read_checked(self, part: Part, columns: Sequence[str] | None = None) -> pa.Table | str | None:
        """Return the rows of a part, or what is wrong with them; None where there is no such part. Nothing is set aside."""
        path = self.path / self.file_name(part)
        wanted = None if columns is None else list(dict.fromkeys(["activation", "draw", *columns]))
        try:
            table = pq.read_table(path, columns=wanted, page_checksum_verification=True, partitioning=None)
        except FileNotFoundError:  # another job has set it aside
            return None
        except (pa.ArrowException, OSError, ValueError) as error:
            # Errors with an errno ("too many open files", "permission denied") say nothing about the content of the file.
            if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
                raise RunError(f"{self.content} part {path} cannot be read: {error}") from error
            return str(error).splitlines()[0]
        try:
            reason = mismatch(table, part, self.num_rows(part)) or self._label_mismatch(table)
        except (ValueError, TypeError, pa.ArrowException) as error:  # a label that is none, a column of another type
            reason = str(error).splitlines()[0]
        return by_activation_and_draw(table) if reason is None else reason

    def read(self, num_activations: int, num_draws: int, columns: Sequence[str] | None = None) -> pa.Table | None:
        """Return the first draws of the first activations, ordered by activation and draw; None if some are missing.

        A damaged part is set aside with a warning, and its rows count as missing.
        """
        seen = self.read_seen(num_activations, num_draws, columns)
        return None if seen is None else as_grid(seen, num_activations, num_draws)

    def read_seen(self, num_activations: int, num_draws: int, columns: Sequence[str] | None = None) -> pa.Table | None:
        """Return those of the first activations' first draws that exist, in any order; None if there are none."""
        tables = [self.read_part(part, columns) for part in self.parts_meeting(num_activations, num_draws)]
        return within_grid([table for table in tables if table is not None], num_activations, num_draws)

    def _label_mismatch(self, table: pa.Table) -> str | None:
        label = read_label(table.schema)
        if label is None:
            return "it has no label"
        if unknown := set(label.columns).difference(self.columns):
            return f"its label names a column {min(unknown)!r}, which {self.content} do not have"
        return label.mismatch(table, self.keys)

    def set_aside(self, part: Part, reason: str) -> bool:
        """Rename a part, so that its rows count as missing, with a warning that gives the reason.

        Returns False where another job has set it aside.
        """
        path = self.path / self.file_name(part)
        aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
        try:
            path.rename(aside)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise RunError(
                f"{self.content} part {path} is damaged ({reason}) and cannot be set aside ({error.strerror})"
            ) from error
        log.warning("%s part %s is damaged (%s): set aside as %s, %s", self.content, path, reason, aside.name, self.remedy)
        return True

    def has_damaged(self) -> bool:
        """Return whether a part of the directory has been set aside."""
        return any(self.path.glob("*.parquet.damaged-*"))

    def clear_leftovers(self) -> None:
        """Remove what killed writers left in the directory."""
        clear_leftovers(self.path)

    @property
    def notes(self) -> tuple[Note, ...]:
        """Notes on the model that gave these rows."""
        return load_notes(self.path)

    def keep_notes(self, notes: Iterable[Note]) -> None:
        """Write notes beside the parts."""
        guard_disk(self.path, lambda: save_notes(self.path, notes))

    def read_json(self, name: str) -> Any:
        """Return what `publish_json` has written; None where there is no such file, or another than was written."""
        try:
            content = json.loads((self.path / name).read_bytes())
            return content["value"] if content["digest"] == json_digest(content) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def publish_json(self, name: str, value: Any) -> None:
        """Write a JSON file beside the parts, with a digest of itself."""
        content = json.loads(json.dumps({"value": value}))
        data = json.dumps(content | {"digest": json_digest(content)}).encode()
        guard_disk(self.path, lambda: publish(self.path / name, data))


def read_identity(path: Path) -> dict[str, Any]:
    """Return what an identity.json says; those of earlier versions have no digest.

    Raises:
        OSError: it cannot be read. ValueError: it is not what was written.
    """
    try:
        content = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError(str(error)) from error
    if not isinstance(content, dict) or content.get("digest", digest := json_digest(content)) != digest:
        raise ValueError("it is not what was written: its digest is another")
    return content


def unit_named(pattern: re.Pattern[str], name: str) -> WorkUnit | None:
    """Return the work unit whose four numbers a pattern finds in a name; None if it does not match."""
    match = pattern.match(name)
    return None if match is None else WorkUnit(*map(int, match.groups()))


def mismatch(table: pa.Table, part: WorkUnit, num_rows: int) -> str | None:
    """Return how the rows of a part contradict its file name, as after a renaming by hand; None if they agree."""
    if table.num_rows != num_rows:
        return f"{table.num_rows} rows where its name says {num_rows}"
    for name, first, last in (("activation", part.first_row, part.last_row), ("draw", part.first_draw, part.last_draw)):
        if name not in table.column_names:
            return f"no column {name}"
        ends = pc.min_max(table[name]).as_py()
        if (ends["min"], ends["max"]) != (first, last - 1):
            return f"{name} {ends['min']} to {ends['max']} where its name says {first} to {last - 1}"
    return None


def by_activation_and_draw(table: pa.Table) -> pa.Table:
    """Return the rows in order of activation and draw, as parts have them already unless another program wrote them."""
    activation, draw = table["activation"].to_numpy(), table["draw"].to_numpy()
    order = np.lexsort((draw, activation))
    return table if (order == np.arange(len(order))).all() else table.take(pa.array(order))


def as_grid(table: pa.Table, num_activations: int, num_draws: int) -> pa.Table | None:
    """Return the rows by activation and draw, the first of each pair; None if one is missing."""
    activation = table["activation"].to_numpy()
    draw = table["draw"].to_numpy().astype(np.int64)
    _, first = np.unique(activation * num_draws + draw, return_index=True)
    return table.take(pa.array(first)) if len(first) == num_activations * num_draws else None


def within_grid(tables: Sequence[pa.Table], num_activations: int, num_draws: int) -> pa.Table | None:
    """Return the rows of the first draws of the first activations; None for no tables."""
    if not tables:
        return None
    rows = pa.concat_tables([table.replace_schema_metadata() for table in tables])
    inside = (rows["activation"].to_numpy() < num_activations) & (rows["draw"].to_numpy() < num_draws)
    return rows.filter(pa.array(inside))


def stored_reconstructions(
    store: PartStore[Part], parts: Sequence[Part], activations: np.ndarray, draws: np.ndarray, d_model: int
) -> np.ndarray:
    """Return the reconstruction of each (activation, draw), float32 [pair, d_model]; NaN where none is kept.

    Reads one part at a time. Of two parts with the same draw the first counts, as everywhere.
    """
    vectors = np.full((len(draws), d_model), np.nan, dtype=np.float32)
    for part in reversed(parts):
        inside = (part.first_row <= activations) & (activations < part.last_row)
        inside &= (part.first_draw <= draws) & (draws < part.last_draw)
        wanted = np.flatnonzero(inside)
        if len(wanted) and (table := store.read_part(part, ["reconstruction"])) is not None:
            _fill(vectors, wanted, part, table, activations[wanted], draws[wanted])
    return vectors


def _fill(
    target: np.ndarray, wanted: np.ndarray, part: WorkUnit, table: pa.Table, activations: np.ndarray, draws: np.ndarray
) -> None:
    kept = table["reconstruction"].combine_chunks()
    valid = np.flatnonzero(kept.is_valid().to_numpy(zero_copy_only=False))
    vectors = kept.take(pa.array(valid)).flatten().to_numpy().reshape(-1, target.shape[1])
    index = np.full(part.num_draws, -1)
    index[valid] = np.arange(len(valid))  # rows of a part are ordered by activation and draw
    source_rows = index[(activations - part.first_row) * (part.last_draw - part.first_draw) + draws - part.first_draw]
    target[wanted[source_rows >= 0]] = vectors[source_rows[source_rows >= 0]]


Value = TypeVar("Value")


def guard_disk(path: Path, write: Callable[[], Value]) -> Value:
    """Return what `write` returns.

    Raises:
        DiskFullError: it failed because the disk of `path` is full.
        DiskError: it failed because the disk did.
    """
    try:
        return write()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            near = next(p for p in (path, *path.parents) if p.exists())
            free = shutil.disk_usage(near).free
            raise DiskFullError(
                f"the disk of {path} is full ({free / 1e6:.1f} MB free): no partial file was left. "
                "Free some space or point `registry` elsewhere, then run the same command again; finished draws are kept."
            ) from error
        if classify(error) == "disk error" or isinstance(error, PermissionError):
            raise DiskError(
                f"the disk of {path} refused a file ({error.strerror or error}): no partial file was left. "
                "Run the same command again once it works; finished draws are kept."
            ) from error
        raise
