"""The activation store: `vector_cache/<key>/`, content-addressed Arrow IPC shards, memory-mapped and checksummed.

    shard-00012-<16 hex>.arrow   the rows of unit 12; the name contains the checksum of the content
    shard-00012.json             the name, rows, bytes and xxh3-128 of that file: unit 12 exists once this file does
    manifest.json                human-readable summary, written last and rebuilt from the JSON files; nothing depends on it
    used                         empty; its modification time is when the key was last read, for `ksweep cache gc`
    *.damaged-<time>             files that were set aside as damaged; *.part files are left by killed processes

A shard is published in two atomic steps: its data file is renamed to its name, then its JSON is linked to its own, which fails if
another process was first. So a reader sees all of a shard or none of it, processes that fill the same key agree on which bytes
count, and there is no lock that a dead process could hold.
"""

from __future__ import annotations

import errno
import json
import logging
import mmap
import os
import re
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from ksweep.activations.source import STORED_DTYPES, ActivationUnit, norms_of, to_float32, unit_keys
from ksweep.utils.errors import DiskFullError, RunError, StoreError
from ksweep.utils.files import READ_ONLY, publish, publish_once
from ksweep.utils.notes import Note, load_notes
from ksweep.utils.version import VERSION

if TYPE_CHECKING:
    from jaxtyping import Float32, Int64

log = logging.getLogger(__name__)

Column = Literal["row_id", "document", "position", "token_id", "window", "role", "activation_key", "norm"]

BYTES_PER_ROW_BESIDE_VECTOR = 330
"""Measured on English text: window ~205, row id and document ~60, role ~10, offsets, position, token, key and norm ~45."""

SHARD_JSON = re.compile(r"shard-(\d+)\.json")

USED = "used"
TOUCH_SECONDS = 60.0
"""The time of `used` is renewed at most this often."""

MOST_OPEN_SHARDS = 128
"""A memory map holds a file descriptor, and 1024 descriptors are a common limit."""

NOT_DAMAGE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT)
"""Error numbers that keep this process from reading a file without saying that the file is damaged."""

_verified: set[tuple[str, int, int, int]] = set()
"""(path, size, mtime, stated rows) of the shards whose checksum this process has compared."""


@dataclass(frozen=True)
class Shard:
    """Contents of a shard's JSON file."""

    unit: int
    file: str
    rows: int
    bytes: int
    checksum: str
    """xxh3-128 of the data file, hex."""
    dtype: str
    d_model: int
    source_rows: int
    """Rows of text (or of the vector file) that were read for this unit."""
    skipped_rows: int
    """Those of them without an activation: empty, or without an allowed position."""
    is_last: bool
    """Whether the source ends with this unit."""
    producer: dict[str, str]
    """Versions of the packages that computed it."""
    role_counts: dict[str, int] | None
    """Tokens of each role in all source rows that were read; None where the tokenizer has no known chat template."""


SHARD_FIELDS = tuple(field.name for field in fields(Shard))


class ActivationStore:
    """The shards of one key."""

    def __init__(self, root: str | Path, key: str, identity: Mapping[str, Any]) -> None:
        """Refer to a key of the vector cache `root`; create nothing. `identity`, hashed to the key, is for the manifest."""
        self.directory = Path(root).expanduser() / key
        self._place = str(self.directory)
        self.key = key
        self.identity = dict(identity)
        self._shards: dict[int, Shard] = {}
        self._touched: float | None = None

    # ---- what is there

    def shards(self) -> dict[int, Shard]:
        """Return published shards by unit, in order. Read only JSON files new to this object; set damaged ones aside."""
        units = sorted(int(match[1]) for name in _names(self.directory) if (match := SHARD_JSON.fullmatch(name)))
        self._shards = {unit: self._shards[unit] for unit in units if unit in self._shards}
        for unit in units:
            if unit not in self._shards and (shard := self._read_shard(unit)) is not None:
                self._shards[unit] = shard
        return dict(sorted(self._shards.items()))

    def contiguous(self) -> list[Shard]:
        """Return shards 0, 1, 2, ... up to the first gap or the end of the source."""
        out: list[Shard] = []
        for unit, shard in self.shards().items():
            if unit != len(out) or (out and out[-1].is_last):
                break
            out.append(shard)
        return out

    def available(self) -> int:
        """Return the number of activations that can be read: those in contiguous shards from the first on."""
        return sum(shard.rows for shard in self.contiguous())

    def has(self, unit: int) -> bool:
        """Return whether a unit is published, by this or any other process."""
        return self._json(unit).exists()

    def touch(self) -> None:
        """Mark the key as in use now, with a system call at most once a minute."""
        now = time.monotonic()
        if self._touched is not None and now - self._touched <= TOUCH_SECONDS:
            return
        try:
            (self.directory / USED).touch()
        except FileNotFoundError:  # nothing was published yet
            return
        except OSError:  # a cache that is not ours to write to can be read all the same
            pass
        self._touched = now

    def missing_units(self, num_activations: int, most_per_unit: int) -> list[int]:
        """Return unpublished units that the first `num_activations` activations certainly need.

        A unit is needed if those before it cannot hold enough, counting each missing one as full. So no unit is computed in vain
        and ranks need not exchange counts. Once missing units are published with their real counts, more may be needed.
        """
        missing: list[int] = []
        shards, most, unit = self.shards(), 0, 0
        while most < num_activations:
            shard = shards.get(unit)
            if shard is None:
                missing.append(unit)
            most += most_per_unit if shard is None else shard.rows
            if shard is not None and shard.is_last:
                break
            unit += 1
        return missing

    # ---- writing

    def write_unit(self, index: int, unit: ActivationUnit, dtype: str) -> Shard:
        """Publish a unit and return the shard that counts: that of another process if it was first.

        Raises:
            RunError: no space left; no half-written file stays.
        """
        return self.publish_unit(index, unit, dtype)[0]

    def publish_unit(self, index: int, unit: ActivationUnit, dtype: str) -> tuple[Shard, bool]:
        """Do as `write_unit`, and return also whether this process was first."""
        # 1. Serialise: the same unit gives the same bytes, so the checksum in the file name identifies the content.
        data = _serialise(unit, dtype, {"key": self.key, "unit": str(index)})
        checksum = xxhash.xxh3_128_hexdigest(data)
        shard = Shard(
            unit=index,
            file=f"shard-{index:05d}-{checksum[:16]}.arrow",
            rows=len(unit.vectors),
            bytes=len(data),
            checksum=checksum,
            dtype=dtype,
            d_model=unit.vectors.shape[1],
            source_rows=unit.num_rows,
            skipped_rows=unit.num_skipped,
            is_last=unit.is_last,
            producer=producer_versions(),
            role_counts=unit.role_counts,
        )
        # 2. Publish the data file, then the JSON that names it. The first process to link its JSON wins.
        try:
            try:
                is_first = self._publish(shard, data)
            except FileNotFoundError:  # `ksweep cache gc` has removed the directory in between: create it again
                is_first = self._publish(shard, data)
        except OSError as error:
            raise self._write_error(error, len(data)) from error
        if is_first:
            return shard, True
        # 3. Another process was first: its shard counts, and this data file goes unless the bytes are the same.
        published = self._read_shard(index)
        if published is not None and published.file != shard.file:
            (self.directory / shard.file).unlink(missing_ok=True)
        return published or shard, False

    def _publish(self, shard: Shard, data: pa.Buffer) -> bool:
        publish(self.directory / shard.file, data)
        is_first = publish_once(self._json(shard.unit), _json_bytes(asdict(shard)))
        (self.directory / shard.file).stat()  # if `ksweep cache gc` came between the two, the directory is a new one
        _sync_directory(self.directory)
        return is_first

    def _write_error(self, error: OSError, needed: int) -> Exception:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return RunError(f"cannot write activations to {self.directory} ({error.strerror}): may you write there?")
        why = "no space left" if error.errno == errno.ENOSPC else "disk quota exceeded"
        return DiskFullError(
            f"{why} in {self.directory}: the next shard needs {needed:,} bytes and {free_disk_bytes(self.directory):,} are free. "
            f"The {len(self.shards())} shards written so far are whole and will be used. Free some space, or set vector_cache to "
            "a directory on another disk, and run again."
        )

    # ---- integrity

    def verify(self, units: Sequence[int]) -> list[int]:
        """Compare checksums of units with their files; set damaged ones aside and return them. A process reads a file once."""
        shards = self.shards()
        damaged = []
        for unit in units:
            if unit in shards and (problem := _problem(self.directory, shards[unit])):
                self._set_aside(shards[unit], problem)
                damaged.append(unit)
        return damaged

    def problems(self) -> dict[int, str]:
        """Return what is wrong with each damaged unit; nothing is set aside."""
        problems = {}
        for unit in sorted(int(match[1]) for name in _names(self.directory) if (match := SHARD_JSON.fullmatch(name))):
            try:
                problem = _problem(self.directory, self._statement(unit))
            except FileNotFoundError:  # another process has set it aside
                continue
            except (ValueError, TypeError, KeyError) as error:
                problem = f"its JSON cannot be read ({error})"
            if problem:
                problems[unit] = problem
        return problems

    def _set_aside(self, shard: Shard, problem: str) -> None:
        """Quarantine a shard that this process has found damaged."""
        # 1. Leave it if another process has set it aside and published it again meanwhile.
        try:
            now = self._statement(shard.unit)
            if now.file != shard.file or not _problem(self.directory, now):
                self._shards.pop(shard.unit, None)
                return
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            pass
        # 2. Otherwise rename its files.
        self.quarantine(shard.unit, problem)

    def quarantine(self, unit: int, problem: str) -> None:
        """Rename the files of a damaged shard to *.damaged-<time>, so that the unit is never read and will be computed again."""
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        shard = self._shards.pop(unit, None)
        paths = [self._json(unit)] + ([self.directory / shard.file] if shard else [])
        for path in paths:
            try:
                path.rename(path.with_name(f"{path.name}.damaged-{stamp}"))
            except FileNotFoundError:  # another process has set it aside, or that is the damage
                continue
            except OSError as error:
                raise StoreError(
                    f"shard {unit} of {self.directory} is damaged ({problem}) and cannot be set aside ({error.strerror}): "
                    "ask whoever owns the cache to run `ksweep cache verify`, or set vector_cache to a directory of your own"
                ) from error
        log.warning(
            "shard %d of %s is damaged (%s): set aside as *.damaged-%s, to be computed anew", unit, self.directory, problem, stamp
        )

    def _read_shard(self, unit: int) -> Shard | None:
        try:
            shard = self._statement(unit)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            self.quarantine(unit, f"shard-{unit:05d}.json is unreadable: {type(error).__name__} {error}")
            return None
        except OSError as error:
            raise _io_error(f"{self._place}/shard-{unit:05d}.json", error) from error
        if not os.path.isfile(f"{self._place}/{shard.file}"):
            self.quarantine(unit, f"{shard.file} is gone")
            return None
        return shard

    def _statement(self, unit: int) -> Shard:
        """Read the JSON of a unit, without fields that a later version may have added."""
        with open(f"{self._place}/shard-{unit:05d}.json", "rb") as file:  # opening a large store is mostly this: no pathlib
            record = json.loads(file.read())
        shard = Shard(**{name: record[name] for name in SHARD_FIELDS})
        if shard.unit != unit or shard.dtype not in STORED_DTYPES:
            raise ValueError(f"it describes unit {shard.unit} with dtype {shard.dtype}")
        return shard

    def _json(self, unit: int) -> Path:
        return self.directory / f"shard-{unit:05d}.json"

    # ---- reading

    def open(self, num_activations: int) -> ActivationTable:
        """Return the first `num_activations` activations, memory-mapped. A shard's checksum is compared when it is first read.

        Raises:
            StoreError: the store holds fewer.
        """
        self._shards.clear()  # another process may have replaced a damaged shard since
        shards = self.contiguous()
        rows = sum(shard.rows for shard in shards)
        if rows < num_activations:
            raise StoreError(
                f"{self.directory} holds {rows} activations and {num_activations} were asked for: let `ensure` compute the rest"
            )
        self.touch()
        return ActivationTable(self, shards, num_activations)

    # ---- manifest

    def write_manifest(self, source: Mapping[str, Any] | None = None) -> None:
        """Write the human-readable summary that `ksweep cache` shows, unless it would be the same."""
        shards = self.contiguous()
        path = self.directory / "manifest.json"
        listed = [{name: value for name, value in asdict(shard).items() if name != "producer"} for shard in shards]
        try:
            if json.loads(path.read_text())["shards"] == listed:
                return
        except (OSError, ValueError, KeyError, TypeError):
            pass
        # Norms are read from every shard, also beyond the request: a damaged one there must not end a run that does not need it.
        if self.verify([shard.unit for shard in shards]):
            return self.write_manifest(source)
        rows = sum(shard.rows for shard in shards)
        table = ActivationTable(self, shards, rows)
        producers = {json.dumps(shard.producer, sort_keys=True): shard.producer for shard in shards}
        manifest = {
            "key": self.key,
            "identity": self.identity,
            "source": dict(source or {}),
            "num_activations": rows,
            "num_documents": table.num_documents(),
            "source_rows": sum(shard.source_rows for shard in shards),
            "skipped_rows": sum(shard.skipped_rows for shard in shards),
            "is_whole_source": bool(shards) and shards[-1].is_last,
            "dtype": table.dtype,
            "d_model": table.d_model,
            "bytes": sum(shard.bytes for shard in shards),
            "norms": _norm_summary(table.column("norm")),
            "role_counts": _sum_role_counts(shards),
            "producers": list(producers.values()),
            "shards": listed,
        }
        try:
            publish(path, _json_bytes(manifest))
        except OSError as error:
            if error.errno in READ_ONLY:  # a read-only cache can be read all the same
                log.warning("%s is left as it is (%s): nothing relies on it", path, error.strerror)
                return
            raise self._write_error(error, 4096) from error


class ActivationTable:
    """Activations 0..n-1 of a store: their vectors and provenance. A shard is opened when it is first read."""

    def __init__(self, store: ActivationStore, shards: Sequence[Shard], num_activations: int) -> None:
        """Use `ActivationStore.open`."""
        self.key = store.key
        self.directory = store.directory
        self.dtype = shards[0].dtype if shards else "float32"
        self.d_model = shards[0].d_model if shards else 0
        self._store = store
        self._shards = list(shards)
        self._starts = np.concatenate([[0], np.cumsum([shard.rows for shard in shards], dtype=np.int64)])
        self._num = num_activations
        self._open: OrderedDict[int, pa.RecordBatch] = OrderedDict()

    def __len__(self) -> int:
        return self._num

    @property
    def notes(self) -> tuple[Note, ...]:
        """Notes that were saved when the activations were computed."""
        return load_notes(self.directory)

    def vectors(self, start: int = 0, stop: int | None = None) -> Float32[np.ndarray, "activation d_model"]:
        """Return vectors of activations start..stop-1 as float32, the exact stored values."""
        parts = [to_float32(part) for part in self.stored(start, stop)]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty((0, self.d_model), dtype=np.float32)

    def stored(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Yield vectors of activations start..stop-1 as read-only views into the memory map, one per shard, without a copy.

        bfloat16 comes as uint16: `torch.from_numpy(view.view(np.int16)).view(torch.bfloat16)` is a tensor over the same memory.
        torch has no notion of read-only: writing into such a tensor ends the process.
        """
        for shard, low, high in self._spans(start, stop):
            yield self._vectors_of(shard)[low:high]

    def row(self, index: int) -> np.ndarray:
        """Return a stored vector as a read-only view, as `stored` does; `take` copies many into a new array."""
        if not 0 <= index < self._num:
            raise IndexError(f"activation {index} is outside 0..{self._num - 1}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        vector: np.ndarray = self._vectors_of(shard)[index - self._starts[shard]]
        return vector

    def take(self, indices: Sequence[int] | Int64[np.ndarray, " activation"]) -> Float32[np.ndarray, "activation d_model"]:
        """Return the vectors of any activations, in the given order, as float32."""
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < self._num):
            raise IndexError(f"activation {wanted.min() if wanted.min() < 0 else wanted.max()} is outside 0..{self._num - 1}")
        out = np.empty((wanted.size, self.d_model), dtype=np.float32)
        shards = np.searchsorted(self._starts, wanted, side="right") - 1
        for shard in np.unique(shards):
            rows = np.flatnonzero(shards == shard)
            out[rows] = to_float32(self._vectors_of(int(shard))[wanted[rows] - self._starts[shard]])
        return out

    def column(self, name: Column, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return a provenance column of activations start..stop-1; an object array with None where a value is unknown."""
        arrays = [self._batch(shard).column(name).slice(low, high - low) for shard, low, high in self._spans(start, stop)]
        if not arrays:
            return np.empty(0, dtype=object)
        whole = pa.chunked_array(arrays)
        if pa.types.is_string(whole.type) or whole.null_count:
            return np.array(whole.to_pylist(), dtype=object)
        return np.asarray(whole.to_numpy())

    def num_documents(self) -> int:
        """Return the number of distinct documents, which are the clusters of the bootstrap."""
        names: set[str] = set()
        for shard, low, high in self._spans(0, None):
            names.update(pc.unique(self._batch(shard).column("document").slice(low, high - low)).to_pylist())
        return len(names)

    def role_counts(self) -> dict[str, int] | None:
        """Return the tokens of each role in the source rows behind these activations: {"user": 12, ..., "pad": 0, "total": 40}.

        Whole shards are counted, with rows that gave no activation and rows of the last shard beyond the request. None where the
        tokenizer has no known chat template.
        """
        return _sum_role_counts(self._shards[: np.searchsorted(self._starts, self._num)])

    def num_source_rows(self) -> int:
        """Return the number of source rows whose tokens `role_counts` counts."""
        return sum(self._shards[shard].source_rows for shard, _, _ in self._spans(0, None))

    def _spans(self, start: int, stop: int | None) -> Iterator[tuple[int, int, int]]:
        """Yield (shard, first row, end row) for a range of activations; a range beyond the end is cut, as in a slice."""
        start, stop, _ = slice(start, stop).indices(self._num)
        # Thousands of shards: those around the range are found by bisection.
        first, end = np.searchsorted(self._starts, start, side="right") - 1, np.searchsorted(self._starts, stop, side="left")
        for shard in range(int(first), int(end)):
            low, high = max(start, int(self._starts[shard])), min(stop, int(self._starts[shard + 1]))
            if low < high:
                yield shard, low - int(self._starts[shard]), high - int(self._starts[shard])

    def _vectors_of(self, shard: int) -> np.ndarray:
        flat = self._batch(shard).column("vector").flatten()
        kind = STORED_DTYPES[self.dtype]
        # Not `to_numpy`, which imports pandas where that is installed: a quarter of a second before the first vector.
        values = np.frombuffer(flat.buffers()[1], dtype=kind, count=len(flat), offset=flat.offset * kind.itemsize)
        return values.reshape(-1, self.d_model)

    def _batch(self, index: int) -> pa.RecordBatch:
        self._store.touch()
        if index in self._open:
            self._open.move_to_end(index)
            return self._open[index]
        shard = self._shards[index]
        if problem := _problem(self.directory, shard):
            self._store._set_aside(shard, problem)
            raise StoreError(
                f"shard {shard.unit} of {self.directory} is damaged ({problem}) and was set aside: run again to recompute it"
            )
        self._open[index] = _read_batch(self.directory / shard.file)
        if len(self._open) > MOST_OPEN_SHARDS:
            self._open.popitem(last=False)
        return self._open[index]


class TransformedTable(ActivationTable):
    """Activations whose vectors went through a transform, under a key of their own; their provenance is unchanged."""

    def __init__(self, table: ActivationTable, key: str, transform: Callable[[np.ndarray], np.ndarray]) -> None:
        """Transform vectors when they are read; nothing is stored."""
        self.__dict__.update(vars(table))
        self.key, self._table, self._transform = key, table, transform

    def vectors(self, start: int = 0, stop: int | None = None) -> Float32[np.ndarray, "activation d_model"]:
        """Return transformed vectors of activations start..stop-1, float32."""
        return self._transform(self._table.vectors(start, stop))

    def take(self, indices: Sequence[int] | Int64[np.ndarray, " activation"]) -> Float32[np.ndarray, "activation d_model"]:
        """Return the transformed vectors of any activations, in the given order, float32."""
        return self._transform(self._table.take(indices))

    def stored(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Yield transformed vectors of activations start..stop-1."""
        yield self.vectors(start, stop)

    def row(self, index: int) -> np.ndarray:
        """Return one transformed vector."""
        row: np.ndarray = self.take([index])[0]
        return row


def estimate_bytes(num_activations: int, d_model: int, dtype: str) -> int:
    """Return the bytes on disk of so many activations: the vectors exactly, their provenance estimated."""
    return num_activations * (d_model * STORED_DTYPES[dtype].itemsize + BYTES_PER_ROW_BESIDE_VECTOR)


def free_disk_bytes(directory: str | Path) -> int:
    """Return the free bytes on the disk of a directory, which need not exist yet."""
    path = Path(directory).expanduser().absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def producer_versions() -> dict[str, str]:
    """Return the versions of the packages that can change a bit of an activation."""
    out = {"ksweep": VERSION}
    for name in ("torch", "transformers", "pyarrow"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "unknown"
    return out


def _serialise(unit: ActivationUnit, dtype: str, metadata: dict[str, str]) -> pa.Buffer:
    """Return a unit as an Arrow IPC file with one record batch: the same unit gives the same bytes."""
    d_model = unit.vectors.shape[1]
    assert unit.vectors.dtype == STORED_DTYPES[dtype], (unit.vectors.dtype, dtype)
    flat = pa.array(np.ascontiguousarray(unit.vectors).reshape(-1))
    columns: dict[str, pa.Array] = {
        "vector": pa.FixedSizeListArray.from_arrays(flat, d_model),
        "row_id": pa.array(unit.row_ids, pa.string()),
        "document": pa.array(unit.documents, pa.string()),
        "position": pa.array(unit.positions, pa.int32()),
        "token_id": pa.array(unit.token_ids, pa.int32()),
        "window": pa.array(unit.windows, pa.string()),
        "role": pa.array(unit.roles, pa.string()),
        "activation_key": pa.array(unit_keys(unit), pa.int64()),
        "norm": pa.array(norms_of(unit.vectors), pa.float32()),
    }
    schema = pa.schema([pa.field(name, array.type) for name, array in columns.items()], metadata={"dtype": dtype, **metadata})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(list(columns.values()), schema=schema))
    return sink.getvalue()


def _names(directory: Path) -> list[str]:
    """Return the names in a directory; none if it does not exist (yet, or any more)."""
    try:
        return os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _io_error(directory, error) from error


def _read_batch(path: Path) -> pa.RecordBatch:
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).get_batch(0)


def _problem(directory: Path, shard: Shard) -> str | None:
    """Return what is wrong with a shard's data file, or None. Arrow reads a flipped byte without an error: hence the checksum."""
    path = directory / shard.file
    try:
        # 1. The size, which is cheap; the rest once per process and file.
        stat = path.stat()
        seen = (str(path), stat.st_size, stat.st_mtime_ns, shard.rows)
        if stat.st_size != shard.bytes:
            return f"{shard.file} has {stat.st_size:,} bytes instead of {shard.bytes:,}"
        if seen in _verified:
            return None
        # 2. The checksum of the bytes.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            checksum = xxhash.xxh3_128_hexdigest(view)
        if checksum != shard.checksum:
            return f"{shard.file} has checksum {checksum} instead of {shard.checksum}"
        # 3. The contents: a file may come from another key, and its JSON be damaged, too.
        expected, actual = _expected_contents(shard, directory.name), _actual_contents(_read_batch(path))
        if actual != expected:
            return f"{shard.file} holds {actual} instead of {expected}"
    except OSError as error:
        if error.errno in NOT_DAMAGE:
            raise _io_error(path, error) from error
        return f"{shard.file}: {error.strerror}"
    _verified.add(seen)
    return None


def _expected_contents(shard: Shard, key: str) -> dict[str, str]:
    """Return what the JSON of a shard says about its data file, beside the checksum."""
    return {"key": key, "unit": str(shard.unit), "dtype": shard.dtype, "rows": str(shard.rows), "d_model": str(shard.d_model)}


def _actual_contents(batch: pa.RecordBatch) -> dict[str, str]:
    """Return the same facts, read from the data file."""
    metadata = {name.decode(): value.decode() for name, value in (batch.schema.metadata or {}).items()}
    width = batch.schema.field("vector").type.list_size
    return {**{name: metadata.get(name, "") for name in ("key", "unit", "dtype")}, "rows": str(len(batch)), "d_model": str(width)}


def _io_error(path: str | Path, error: OSError) -> StoreError:
    return StoreError(f"{path} cannot be read ({error.strerror}) and was left in place: it need not be damaged")


def _sync_directory(directory: Path) -> None:
    """Make renames survive a power cut, where the file system supports it."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def _norm_summary(norms: np.ndarray) -> dict[str, float | int]:
    """Return mean, percentiles and number of non-finite norms: norms far off indicate a wrong model or normalised vectors."""
    finite = norms[np.isfinite(norms)].astype(np.float64)
    if not finite.size:
        return {"num_not_finite": int(norms.size)}
    points = {f"p{p:02d}": float(np.percentile(finite, p)) for p in (1, 5, 25, 50, 75, 95, 99)}
    return {"mean": float(finite.mean()), **points, "num_not_finite": int(norms.size - finite.size)}


def _sum_role_counts(shards: Sequence[Shard]) -> dict[str, int] | None:
    counts_by_shard = [shard.role_counts for shard in shards if shard.role_counts is not None]
    return {role: sum(counts[role] for counts in counts_by_shard) for role in counts_by_shard[0]} if counts_by_shard else None


def _json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()
