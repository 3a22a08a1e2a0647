"""The activation store: `vector_cache/<key>/`, content-addressed Arrow IPC shards, memory-mapped and checksummed.

    shard-00012-<16 hex>.arrow   the rows of unit 12; named after its content
    shard-00012.json             that file's name, rows, bytes, xxh3-128: *the* statement that unit 12 exists
    manifest.json                readable summary, written last, rebuilt from the above at any time; nothing relies on it
    used                         empty; its time is when the key was last read, for `ksweep cache gc`
    *.damaged-<time>             what was set aside; *.part what a killed process left

A shard is published by two atomic steps: its data file is renamed into place, then its JSON is linked there, which fails when
another process was first. So a reader sees all of a shard or none of it, processes that fill one key agree on which bytes count,
and there is no lock for a dead process to hold.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from ksweep.activations.source import STORED_DTYPES, Unit, keys_of, norms_of, to_float32
from ksweep.utils.errors import DiskFullError, RunError, StoreError
from ksweep.utils.files import publish, publish_once
from ksweep.utils.version import VERSION

if TYPE_CHECKING:
    from jaxtyping import Float32, Int64

log = logging.getLogger(__name__)

Column = Literal["row_id", "document", "position", "token_id", "window", "role", "activation_key", "norm"]

BYTES_PER_ROW_BESIDE_VECTOR = 330
"""Measured on English text: window ~205, ids and documents ~60, role ~10, offsets, position, token, key and norm ~45."""

STATEMENT = re.compile(r"shard-(\d+)\.json")

USED = "used"
TOUCH_SECONDS = 60.0
"""How often at most the time of `used` is renewed."""

MOST_OPEN_SHARDS = 128
"""A mapping holds a file descriptor; 1024 of them is a common limit."""

NOT_DAMAGE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT)
"""What hinders this process from reading a file that may well be whole."""

_verified: set[tuple[str, int, int, int]] = set()
"""(path, size, mtime, rows stated) of shards whose checksum this process has compared."""


@dataclass(frozen=True)
class Shard:
    """What a shard's JSON says."""

    unit: int
    file: str
    rows: int
    bytes: int
    checksum: str
    """xxh3-128 of the data file, hex."""
    dtype: str
    d_model: int
    source_rows: int
    """Rows of text (or of the vector file) that were looked at."""
    skipped_rows: int
    """Of these, without any activation: empty, or no allowed position."""
    is_last: bool
    """The source ends with this unit."""
    producer: dict[str, str]
    """Versions of what computed it."""
    role_counts: dict[str, int] | None
    """Tokens of each role in all source rows that were looked at; None where no chat template tells."""


SHARD_FIELDS = tuple(field.name for field in fields(Shard))


class ActivationStore:
    """The shards of one key."""

    def __init__(self, root: str | Path, key: str, identity: Mapping[str, Any]) -> None:
        """`root` is the vector cache; `identity` is the readable form of the key, kept in the manifest. Creates nothing."""
        self.directory = Path(root).expanduser() / key
        self._place = str(self.directory)
        self.key = key
        self.identity = dict(identity)
        self._shards: dict[int, Shard] = {}
        self._touched: float | None = None

    # ---- what is there

    def shards(self) -> dict[int, Shard]:
        """Published shards by unit, in order. Reads only the JSON of those not seen before; damaged ones are set aside."""
        units = sorted(int(match[1]) for name in _names(self.directory) if (match := STATEMENT.fullmatch(name)))
        self._shards = {unit: self._shards[unit] for unit in units if unit in self._shards}
        for unit in units:
            if unit not in self._shards and (shard := self._read_shard(unit)) is not None:
                self._shards[unit] = shard
        return dict(sorted(self._shards.items()))

    def contiguous(self) -> list[Shard]:
        """Shards 0, 1, 2, ... up to the first gap or the end of the source."""
        out: list[Shard] = []
        for unit, shard in self.shards().items():
            if unit != len(out) or (out and out[-1].is_last):
                break
            out.append(shard)
        return out

    def available(self) -> int:
        """Activations that can be read: published, contiguous from the first."""
        return sum(shard.rows for shard in self.contiguous())

    def has(self, unit: int) -> bool:
        """Whether a unit is published now, by whomever."""
        return self._json(unit).exists()

    def touch(self) -> None:
        """Say that the key is in use now; costs a system call a minute."""
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
        """Units that are certainly needed for the first `num_activations` and not published.

        A unit counts as needed as long as those before it cannot hold enough, each missing one taken to be as full as it can be.
        So no unit is computed for nothing, and no rank needs to know what another is finding; as counts come in, more units may
        turn out to be needed.
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

    def write_unit(self, index: int, unit: Unit, dtype: str) -> Shard:
        """Publish a unit. If another process has published it meanwhile, its shard is the one that counts.

        Raises:
            RunError: no space left; nothing half-written stays.
        """
        return self.publish_unit(index, unit, dtype)[0]

    def publish_unit(self, index: int, unit: Unit, dtype: str) -> tuple[Shard, bool]:
        """`write_unit`, and whether this process was the first."""
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
        try:
            try:
                ours = self._publish(shard, data)
            except FileNotFoundError:  # `ksweep cache gc` took the directory away in between: it is begun anew
                ours = self._publish(shard, data)
        except OSError as error:
            raise self._no_space(error, len(data)) from error
        if ours:
            return shard, True
        theirs = self._read_shard(index)
        if theirs is not None and theirs.file != shard.file:
            (self.directory / shard.file).unlink(missing_ok=True)
        return theirs or shard, False

    def _publish(self, shard: Shard, data: pa.Buffer) -> bool:
        publish(self.directory / shard.file, data)
        ours = publish_once(self._json(shard.unit), _json_bytes(asdict(shard)))
        _sync_directory(self.directory)
        return ours

    def _no_space(self, error: OSError, needed: int) -> Exception:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return RunError(f"cannot write activations to {self.directory} ({error.strerror}): is it yours to write to?")
        why = "no space left" if error.errno == errno.ENOSPC else "disk quota exceeded"
        return DiskFullError(
            f"{why} in {self.directory}: the next shard needs {needed:,} bytes and {free_bytes(self.directory):,} are free. The "
            f"{len(self.shards())} shards written so far are whole and will be used. Free some space, or set vector_cache to a "
            "directory on another disk, and run again."
        )

    # ---- integrity

    def verify(self, units: Sequence[int]) -> list[int]:
        """Compare checksums of units with their files; those that differ are set aside and returned. Once a process per file."""
        shards = self.shards()
        damaged = []
        for unit in units:
            if unit in shards and (problem := _problem(self.directory, shards[unit])):
                self._set_aside(shards[unit], problem)
                damaged.append(unit)
        return damaged

    def _set_aside(self, shard: Shard, problem: str) -> None:
        """Quarantine a shard that was found damaged, unless it has been set aside and published again meanwhile."""
        try:
            now = self._statement(shard.unit)
            if now.file != shard.file or not _problem(self.directory, now):
                self._shards.pop(shard.unit, None)
                return
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            pass
        self.quarantine(shard.unit, problem)

    def quarantine(self, unit: int, problem: str) -> None:
        """Set a damaged shard aside, so that it is never read and will be computed again."""
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
            raise _hindered(f"{self._place}/shard-{unit:05d}.json", error) from error
        if not os.path.isfile(f"{self._place}/{shard.file}"):
            self.quarantine(unit, f"{shard.file} is gone")
            return None
        return shard

    def _statement(self, unit: int) -> Shard:
        """What the JSON of a unit says; what a later version says besides is left out."""
        with open(f"{self._place}/shard-{unit:05d}.json", "rb") as file:  # opening a large store is mostly this: no pathlib
            said = json.loads(file.read())
        shard = Shard(**{name: said[name] for name in SHARD_FIELDS})
        if shard.unit != unit or shard.dtype not in STORED_DTYPES:
            raise ValueError(f"it describes unit {shard.unit} with dtype {shard.dtype}")
        return shard

    def _json(self, unit: int) -> Path:
        return self.directory / f"shard-{unit:05d}.json"

    # ---- reading

    def open(self, num_activations: int) -> ActivationTable:
        """The first `num_activations` activations, memory-mapped; checksums are compared when a shard is first read.

        Raises:
            StoreError: fewer are there.
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
        """Summarise what is there, for people and `ksweep cache`. Written only when it would say something new."""
        shards = self.contiguous()
        path = self.directory / "manifest.json"
        listed = [{name: value for name, value in asdict(shard).items() if name != "producer"} for shard in shards]
        try:
            if json.loads(path.read_text())["shards"] == listed:
                return
        except (OSError, ValueError, KeyError, TypeError):
            pass
        # Norms are read from every shard, those beyond the request too: a damaged one there must not end a run that needs it not.
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
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):  # a cache of someone else's can be read all the same
                log.warning("%s is left as it is (%s): nothing relies on it", path, error.strerror)
                return
            raise self._no_space(error, 4096) from error


class ActivationTable:
    """Activations 0..n-1 of a store: vectors and where they come from. Shards are opened when they are first touched."""

    def __init__(self, store: ActivationStore, shards: Sequence[Shard], num_activations: int) -> None:
        """Made by `ActivationStore.open`."""
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

    def vectors(self, start: int = 0, stop: int | None = None) -> Float32[np.ndarray, "activation d_model"]:
        """Vectors of activations start..stop-1 as float32, exact values of what is stored."""
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
        """One stored vector, as a view like those of `stored`; `take` gathers many into a new array."""
        if not 0 <= index < self._num:
            raise IndexError(f"activation {index} is outside 0..{self._num - 1}")
        place = int(np.searchsorted(self._starts, index, side="right")) - 1
        vector: np.ndarray = self._vectors_of(place)[index - self._starts[place]]
        return vector

    def take(self, indices: Sequence[int] | Int64[np.ndarray, " activation"]) -> Float32[np.ndarray, "activation d_model"]:
        """Vectors of any activations, in the order given."""
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < self._num):
            raise IndexError(f"activation {wanted.min() if wanted.min() < 0 else wanted.max()} is outside 0..{self._num - 1}")
        out = np.empty((wanted.size, self.d_model), dtype=np.float32)
        places = np.searchsorted(self._starts, wanted, side="right") - 1
        for place in np.unique(places):
            rows = np.flatnonzero(places == place)
            out[rows] = to_float32(self._vectors_of(int(place))[wanted[rows] - self._starts[place]])
        return out

    def column(self, name: Column, start: int = 0, stop: int | None = None) -> np.ndarray:
        """A provenance column of activations start..stop-1; an object array with None where something is unknown."""
        arrays = [self._batch(shard).column(name).slice(low, high - low) for shard, low, high in self._spans(start, stop)]
        if not arrays:
            return np.empty(0, dtype=object)
        whole = pa.chunked_array(arrays)
        if pa.types.is_string(whole.type) or whole.null_count:
            return np.array(whole.to_pylist(), dtype=object)
        return np.asarray(whole.to_numpy())

    def num_documents(self) -> int:
        """Distinct documents: how many clusters the bootstrap has."""
        names: set[str] = set()
        for shard, low, high in self._spans(0, None):
            names.update(pc.unique(self._batch(shard).column("document").slice(low, high - low)).to_pylist())
        return len(names)

    def role_counts(self) -> dict[str, int] | None:
        """Tokens by role in all source rows up to these activations: {"user": 12, ..., "pad": 0, "total": 40}.

        Whole shards are counted: rows without an activation too, and those that the last shard holds beyond the request. None
        where no chat template tells roles.
        """
        return _sum_role_counts(self._shards[: np.searchsorted(self._starts, self._num)])

    def num_source_rows(self) -> int:
        """Source rows whose tokens `role_counts` counts."""
        return sum(self._shards[place].source_rows for place, _, _ in self._spans(0, None))

    def _spans(self, start: int, stop: int | None) -> Iterator[tuple[int, int, int]]:
        """(shard, first row in it, end row in it) of a range; as slices do, a range beyond the end is cut."""
        start, stop, _ = slice(start, stop).indices(self._num)
        # Thousands of shards: those around the range are found by bisection.
        first, end = np.searchsorted(self._starts, start, side="right") - 1, np.searchsorted(self._starts, stop, side="left")
        for place in range(int(first), int(end)):
            low, high = max(start, int(self._starts[place])), min(stop, int(self._starts[place + 1]))
            if low < high:
                yield place, low - int(self._starts[place]), high - int(self._starts[place])

    def _vectors_of(self, place: int) -> np.ndarray:
        flat = self._batch(place).column("vector").flatten()
        kind = STORED_DTYPES[self.dtype]
        # Not `to_numpy`, which imports pandas where that is installed: a quarter of a second before the first vector.
        values = np.frombuffer(flat.buffers()[1], dtype=kind, count=len(flat), offset=flat.offset * kind.itemsize)
        return values.reshape(-1, self.d_model)

    def _batch(self, place: int) -> pa.RecordBatch:
        self._store.touch()
        if place in self._open:
            self._open.move_to_end(place)
            return self._open[place]
        shard = self._shards[place]
        if problem := _problem(self.directory, shard):
            self._store._set_aside(shard, problem)
            raise StoreError(
                f"shard {shard.unit} of {self.directory} is damaged ({problem}) and was set aside: run again to compute it anew"
            )
        self._open[place] = _read_batch(self.directory / shard.file)
        if len(self._open) > MOST_OPEN_SHARDS:
            self._open.popitem(last=False)
        return self._open[place]


def estimate_bytes(num_activations: int, d_model: int, dtype: str) -> int:
    """Bytes on disk of so many activations: the vectors exactly, their provenance about."""
    return num_activations * (d_model * STORED_DTYPES[dtype].itemsize + BYTES_PER_ROW_BESIDE_VECTOR)


def free_bytes(directory: str | Path) -> int:
    """Free space for a directory that may not exist yet."""
    path = Path(directory).expanduser().absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def producer_versions() -> dict[str, str]:
    """Versions of the packages that decide the bits."""
    out = {"ksweep": VERSION}
    for name in ("torch", "transformers", "pyarrow"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "unknown"
    return out


def _serialise(unit: Unit, dtype: str, metadata: dict[str, str]) -> pa.Buffer:
    """A unit as one Arrow IPC file with one record batch: the same unit gives the same bytes."""
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
        "activation_key": pa.array(keys_of(unit), pa.int64()),
        "norm": pa.array(norms_of(unit.vectors), pa.float32()),
    }
    schema = pa.schema([pa.field(name, array.type) for name, array in columns.items()], metadata={"dtype": dtype, **metadata})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(list(columns.values()), schema=schema))
    return sink.getvalue()


def _names(directory: Path) -> list[str]:
    """What lies in a directory; nothing where there is none (yet, or any more)."""
    try:
        return os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _hindered(directory, error) from error


def _read_batch(path: Path) -> pa.RecordBatch:
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).get_batch(0)


def _problem(directory: Path, shard: Shard) -> str | None:
    """What is wrong with a shard's data file, or None. Arrow reads a flipped byte without an error: hence the checksum."""
    path = directory / shard.file
    try:
        stat = path.stat()
        seen = (str(path), stat.st_size, stat.st_mtime_ns, shard.rows)
        if stat.st_size != shard.bytes:
            return f"{shard.file} has {stat.st_size:,} bytes instead of {shard.bytes:,}"
        if seen in _verified:
            return None
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            checksum = xxhash.xxh3_128_hexdigest(view)
        if checksum != shard.checksum:
            return f"{shard.file} has checksum {checksum} instead of {shard.checksum}"
        stated = _stated(shard, directory.name)
        if (found := _found(_read_batch(path))) != stated:
            return f"{shard.file} holds {found} instead of {stated}"
    except OSError as error:
        if error.errno in NOT_DAMAGE:
            raise _hindered(path, error) from error
        return f"{shard.file}: {error.strerror}"
    _verified.add(seen)
    return None


def _stated(shard: Shard, key: str) -> dict[str, str]:
    """What the JSON says beside the checksum: a file may have come from another key, and JSON be damaged, too."""
    return {"key": key, "unit": str(shard.unit), "dtype": shard.dtype, "rows": str(shard.rows), "d_model": str(shard.d_model)}


def _found(batch: pa.RecordBatch) -> dict[str, str]:
    """The same of a data file."""
    said = {name.decode(): value.decode() for name, value in (batch.schema.metadata or {}).items()}
    width = batch.schema.field("vector").type.list_size
    return {**{name: said.get(name, "") for name in ("key", "unit", "dtype")}, "rows": str(len(batch)), "d_model": str(width)}


def _hindered(path: str | Path, error: OSError) -> StoreError:
    return StoreError(f"{path} cannot be read ({error.strerror}) and was left where it is: it need not be damaged")


def _sync_directory(directory: Path) -> None:
    """Make renames survive a power cut, where the file system can."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def _norm_summary(norms: np.ndarray) -> dict[str, float | int]:
    """Mean, percentiles and how many are not finite: a norm that is far off tells of a wrong model or of normalised vectors."""
    finite = norms[np.isfinite(norms)].astype(np.float64)
    if not finite.size:
        return {"num_not_finite": int(norms.size)}
    points = {f"p{p:02d}": float(np.percentile(finite, p)) for p in (1, 5, 25, 50, 75, 95, 99)}
    return {"mean": float(finite.mean()), **points, "num_not_finite": int(norms.size - finite.size)}


def _sum_role_counts(shards: Sequence[Shard]) -> dict[str, int] | None:
    known = [shard.role_counts for shard in shards if shard.role_counts is not None]
    return {role: sum(counts[role] for counts in known) for role in known[0]} if known else None


def _json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()
