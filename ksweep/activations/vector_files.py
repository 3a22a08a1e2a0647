"""Open files of vectors: Parquet (one file, or several parts), .npy, .npz, .safetensors, .pt; whole, or a range of their rows.

    with open_vectors("acts/part-*.parquet@[0:1000]", "act_L42") as file:
        file.num_rows, file.d_model, file.names
        file.table(["doc_id"])                    # columns beside the vectors, of all rows
        file.batches(["doc_id", VECTOR_COLUMN])   # tables of some rows, one after the other

An array or tensor can have a table of its rows beside it, `FILE.rows.parquet` or `FILE.rows.jsonl`, with the columns that a
Parquet file of vectors has. Whatever the column or tensor is called, tables have it as VECTOR_COLUMN.
"""

from __future__ import annotations

import glob
import hashlib
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ksweep.activations.hub_vectors import HUB_VECTORS, SIDECAR, are_parts, by_split, count_other_things, hub_parts
from ksweep.utils.errors import DataError
from ksweep.utils.files import json_lines, named_path, publish_output
from ksweep.utils.hub import content_digest
from ksweep.utils.npz_files import npz_headers, read_npz_array
from ksweep.utils.parquet_rows import damage_refused
from ksweep.utils.plain_values import bounded_json
from ksweep.utils.tensor_headers import Tensor, read_header
from ksweep.utils.text import some_of
from ksweep.utils.torch_file import read_torch_file

VECTOR_COLUMN = "activation_vector"
USUAL_NAMES = (VECTOR_COLUMN, "activations", "vectors", "reconstructions", "W_dec")
"""Names that need not be stated: the last is the decoder of a sparse autoencoder, which has a vector for each feature."""
ARRAYS = (".npy", ".npz", ".safetensors", ".pt")
FORMATS = ("Parquet (a file, a directory or pattern of parts, a hub data set)", *ARRAYS)
ROW_TABLES = (".rows.parquet", ".rows.jsonl")
BESIDE_ARRAYS = tuple(array + table for array in ARRAYS for table in ROW_TABLES)
BATCH_ROWS = 1024
RANGE = re.compile(r"(?P<source>.+)@\[(?P<start>\d*):(?P<stop>\d*)\]")
SAFETENSORS_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
FLOATS = (2, 4, 8)
"""Bytes of a number in an array; NumPy's long double differs from machine to machine."""
MOST_UNPACKED_BYTES = 2**34
"""Arrays of a .npz are unpacked in memory; those of the other formats are mapped from disk."""


@dataclass(frozen=True)
class StoredArray:
    """An array or tensor in a file: what the file says of it, and how to read it."""

    shape: tuple[int, ...]
    dtype: str
    is_float: bool
    """Whether its numbers are floats of 16, 32 or 64 bits."""
    read: Callable[[], np.ndarray]
    """Returns its numbers, mapped from disk where that can be done; bfloat16 as uint16 bit patterns."""


@dataclass
class VectorFile(AbstractContextManager["VectorFile"]):
    """An open file of vectors, or several parts of one; a range of its rows."""

    source: str
    """As the user wrote it."""
    paths: tuple[Path, ...]
    column: str
    """Name of the column or tensor in the file."""
    start: int
    stop: int
    total: int
    """Rows of the file."""
    parts: list[pq.ParquetFile] = field(default_factory=list)
    stored: StoredArray | None = None
    rows: pa.Table | None = None
    """Table of the rows of an array."""

    def __exit__(self, *exception: object) -> None:
        for part in self.parts:
            part.close()

    @property
    def is_whole(self) -> bool:
        """Whether the range is all rows."""
        return (self.start, self.stop) == (0, self.total)

    @property
    def num_rows(self) -> int:
        """Number of rows of the range."""
        return self.stop - self.start

    @cached_property
    def schema(self) -> pa.Schema:
        """Columns besides the vectors."""
        whole = self.parts[0].schema_arrow if self.parts else pa.schema([]) if self.rows is None else self.rows.schema
        return pa.schema([field for field in whole if field.name != self.column or not self.parts])

    @property
    def names(self) -> list[str]:
        """Names of the columns, the vectors among them under the name that they have in the file."""
        return [self.column, *self.schema.names]

    @cached_property
    def array(self) -> np.ndarray:
        """The numbers of an array [row, d_model]."""
        assert self.stored is not None
        with _damage_of_array_refused(self.paths[0]):
            return self.stored.read()

    @cached_property
    def d_model(self) -> int:
        """Width of the vectors.

        Raises:
            DataError: the first vector is null or empty.
        """
        if self.stored is not None:
            return self.stored.shape[1]
        kind = self.parts[0].schema_arrow.field(self.column).type
        if pa.types.is_fixed_size_list(kind):
            return int(kind.list_size)
        with damage_refused(self.paths[0]):
            first: Any = next(self.parts[0].iter_batches(batch_size=1, columns=[self.column])).column(0)[0].as_py()
        if not first:
            what = "null" if first is None else "empty"
            raise DataError(f"row 0 of {self.column!r} in {self.source} is {what}; every row needs a vector")
        return len(first)

    def digest(self) -> str:
        """Return what identifies the content: of one Parquet file its digest, else one over all parts and the table of rows."""
        digests = [content_digest(path) for path in self.paths]
        return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()[:32]

    def table(self, columns: Sequence[str]) -> pa.Table:
        """Return columns besides the vectors, of all rows of the range."""
        return pa.concat_tables(list(self.batches(columns))) if self.num_rows else self.schema.empty_table().select(columns)

    def batches(self, columns: Collection[str], first: int = 0) -> Iterator[pa.Table]:
        """Yield tables of consecutive rows, from row `first` of the range to its end.

        Args:
            columns: columns, and VECTOR_COLUMN for the vectors. Those that the file lacks are left out.
        """
        left, tables = self.num_rows - first, self._tables(columns, self.start + first)
        for _, table in tables:
            if left <= 0:
                return
            yield table.slice(0, left)
            left -= len(table)
        if left > 0:
            raise DataError(f"{self.source} cannot be read to its end: it lacks {left} rows. Copy or write it again")

    def rows_at(self, columns: Collection[str], rows: np.ndarray) -> Iterator[pa.Table]:
        """Yield tables of the rows at ascending places of the range; row groups of a Parquet file without any are not read."""
        places = rows + self.start
        for start, table in self._tables(columns, int(places[0]), places):
            low, high = np.searchsorted(places, [start, start + len(table)])
            if low < high:
                yield table.take(pa.array(places[low:high] - start))
            if high == len(places):
                return
        raise DataError(f"{self.source} cannot be read to row {places[-1]}. Copy or write it again")

    def _tables(self, columns: Collection[str], row: int, wanted: np.ndarray | None = None) -> Iterator[tuple[int, pa.Table]]:
        """Yield tables from a row on, with their first row; those without wanted rows may be left out."""
        inside = [name for name in self.schema.names if name in columns and name != VECTOR_COLUMN]
        if self.stored is not None:
            yield from self._of_array(inside, VECTOR_COLUMN in columns, row, wanted)
        else:
            yield from self._of_parts([*inside, *([self.column] if VECTOR_COLUMN in columns else [])], row, wanted)

    def _of_array(
        self, columns: list[str], with_vectors: bool, row: int, wanted: np.ndarray | None
    ) -> Iterator[tuple[int, pa.Table]]:
        for start in range(row, self.total, BATCH_ROWS):
            stop = min(start + BATCH_ROWS, self.total)
            if not _has_some(wanted, start, stop):
                continue
            table = None if self.rows is None else self.rows.slice(start, stop - start).select(columns)
            data = {name: table.column(name) for name in columns} if table is not None else {}
            if with_vectors or not data:
                data[VECTOR_COLUMN] = _lists(self.array[start:stop])
            yield start, pa.table(data)

    def _of_parts(self, columns: list[str], row: int, wanted: np.ndarray | None) -> Iterator[tuple[int, pa.Table]]:
        before = 0
        for path, part in zip(self.paths, self.parts, strict=True):
            for group in range(part.num_row_groups):
                size = part.metadata.row_group(group).num_rows
                start, skip, before = before, max(0, row - before), before + size
                if skip >= size or not _has_some(wanted, start, before):
                    continue
                batches = part.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=columns)
                while (batch := _next_batch(batches, path)) is not None:
                    table = pa.Table.from_batches([batch]).slice(skip)
                    first, start = start + len(batch) - len(table), start + len(batch)
                    skip = max(0, skip - len(batch))
                    if len(table):
                        renamed = [VECTOR_COLUMN if name == self.column else name for name in table.column_names]
                        yield first, table.rename_columns(renamed)


def open_vectors(source: str | Path, column: str | None = None) -> VectorFile:
    """Open a file of vectors, or several parts of one.

    Args:
        source: path, directory, pattern or hub data set; with `@[0:1000]` behind it a range of its rows.
        column: column or tensor of the vectors. None: see `USUAL_NAMES`, or the only one that there is.

    Raises:
        DataError: nothing there, an unknown format, no such column, or no rows.
    """
    paths, start, stop = _located(str(source))
    opened = _open_array(str(source), paths[0], column) if paths[0].suffix in ARRAYS else _open_parts(str(source), paths, column)
    opened.start, opened.stop = start, opened.total if stop is None else min(stop, opened.total)
    if opened.start >= opened.stop:
        raise DataError(
            f"{source} has a column {opened.column!r} but no rows"
            + (f" from {start} to {stop}: it has {opened.total}" if opened.total else "")
        )
    return opened


def vector_paths(source: str) -> tuple[Path, ...]:
    """Return the files that a source names, the table of rows beside an array among them.

    Raises:
        DataError: there are none, or several arrays.
    """
    paths, _, _ = _located(source)
    return (*paths, *_row_tables(paths[0])) if paths[0].suffix in ARRAYS else paths


def vector_sidecars(source: str) -> list[Path]:
    """Return the sidecars of the files that a source names: beside each, and in the folders from its own up to the named one.

    Raises:
        DataError: as `vector_paths`.
    """
    folder, paths = _found(without_range(source))
    beside = [Path(f"{path}.{SIDECAR}") for path in paths]
    if named_path(without_range(source), DataError).is_file():
        return [path for path in beside if path.is_file()]
    inside = {above for path in paths for above in path.parents if above == path.parent or folder in (above, *above.parents)}
    return [path for path in (*beside, *(above / SIDECAR for above in sorted(inside))) if path.is_file()]


def write_vectors(path: Path, tensors: Mapping[str, np.ndarray], rows: pa.Table, metadata: Mapping[str, str]) -> Path:
    """Write tensors [row, d_model] as a .safetensors file, and the table of their rows beside it; return where that is.

    Raises:
        RunError: one may not write there.
    """
    from safetensors.numpy import save

    table, sink = path.with_name(path.name + ROW_TABLES[0]), pa.BufferOutputStream()
    pq.write_table(rows, sink)
    advice = "give a file in a directory where you may write"
    publish_output(table, sink.getvalue().to_pybytes(), advice)
    publish_output(path, save({name: np.ascontiguousarray(values) for name, values in tensors.items()}, dict(metadata)), advice)
    return table


def without_range(source: str) -> str:
    """Return what names the files of a source, without the range of rows behind it."""
    if "@[" not in source or named_path(source, DataError).exists():
        return source
    if (match := RANGE.fullmatch(source)) is None:
        raise DataError(f"{source}: expected a range of rows as @[START:STOP], counted from 0; either may be left out")
    return match["source"]


def _located(source: str) -> tuple[tuple[Path, ...], int, int | None]:
    """Return the files, the first row, and the end of the range if there is one."""
    start, stop, files = 0, None, without_range(source)
    if files != source and (match := RANGE.fullmatch(source)):
        start, stop = int(match["start"] or 0), int(match["stop"]) if match["stop"] else None
    return _found(files)[1], start, stop


def _found(source: str) -> tuple[Path | None, tuple[Path, ...]]:
    """Return the directory or data set that a source without range names, if it names one, and its files in order."""
    path = named_path(source, DataError)
    if path.is_file():
        return None, (path,)
    if path.is_dir():
        inside = (_without_row_tables(sorted(files)) for files in (path.glob("*.parquet"), path.rglob("*.parquet")))
        arrays = (file for file in sorted(path.iterdir()) if file.suffix in ARRAYS)
        folder, found = path, next(filter(None, inside), None) or list(arrays)
        _refuse_other_numbers(path, found)
    else:
        folder, found = None, _without_row_tables(sorted(map(Path, glob.glob(str(path)))))
        if not found and HUB_VECTORS.fullmatch(source) and not path.parent.is_dir() and path.suffix not in (".parquet", *ARRAYS):
            return hub_parts(source)
    if not found:
        raise DataError(
            f"no file of vectors at {source!r}: expected {', '.join(FORMATS)}; check the path, and that a relative one starts "
            "from the current directory"
        )
    if len(found) > 1 and (array := next((file for file in found if file.suffix in ARRAYS), None)):
        raise DataError(
            f"{source} is {len(found)} files, an array among them ({array.name}), and only Parquet files are read as parts of "
            "one table: name one file, or write the arrays as one"
        )
    return folder, tuple(found)


def _refuse_other_numbers(folder: Path, paths: Sequence[Path]) -> None:
    """Raise DataError for files in a directory whose names differ in a number that counts layers or steps, not parts."""
    names = [path.relative_to(folder).as_posix() for path in paths if path.suffix not in ARRAYS]
    splits = [names] if count_other_things(names) else by_split(names).values()
    if others := next((split for split in splits if split and not are_parts(split)), None):
        pattern = folder / "/".join(["*"] * others[0].count("/") + ["*.parquet"])
        raise DataError(
            f"{folder} holds {some_of(others)}, whose numbers are not those of the parts of one table (from 0 or 1 on without a "
            f"gap, or -00000-of-00002): name one of them, or a pattern if they are parts all the same ({pattern})"
        )


def _without_row_tables(paths: Sequence[Path]) -> list[Path]:
    """Return paths without the tables and sidecars that lie beside others."""
    return [path for path in paths if not path.name.endswith((*BESIDE_ARRAYS, f".{SIDECAR}")) and path.name != SIDECAR]


def _open_parts(source: str, paths: Sequence[Path], column: str | None) -> VectorFile:
    parts: list[pq.ParquetFile] = []
    for path in paths:
        try:
            parts.append(pq.ParquetFile(path))
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{path} is not a readable Parquet file ({error}); is it whole? Vectors may be {', '.join(FORMATS)}"
            ) from error
    first = parts[0].schema_arrow
    lists = [entry.name for entry in first if _is_list_of_floats(entry.type)]
    chosen = _chosen(source, column, lists, first.names)
    kind = first.field(chosen).type
    if chosen not in lists:
        raise DataError(
            f"column {chosen!r} of {source} is of type {kind}; expected FixedSizeList<float32>[d_model] or a list of floats"
        )
    for path, part in zip(paths, parts, strict=True):
        if part.schema_arrow.remove_metadata() != first.remove_metadata():
            raise DataError(f"{path} has other columns or types than {paths[0]}: give parts of one table")
    total = sum(part.metadata.num_rows for part in parts)
    return VectorFile(source, tuple(paths), chosen, 0, total, total, parts=parts)


def _open_array(source: str, path: Path, column: str | None) -> VectorFile:
    arrays = _arrays(path)
    names = [name for name, stored in arrays.items() if len(stored.shape) == 2 and stored.is_float]
    chosen = _chosen(source, column, names, list(arrays))
    stored = arrays[chosen]
    if chosen not in names or stored.shape[1] == 0:
        raise DataError(
            f"{chosen!r} of {source} is an array {stored.shape} of {stored.dtype}; "
            "expected floats of 16, 32 or 64 bits, [row, d_model]"
        )
    if path.suffix == ".npz" and (size := math.prod(stored.shape) * np.dtype(stored.dtype).itemsize) > MOST_UNPACKED_BYTES:
        raise DataError(
            f"{chosen!r} of {path} takes {size:,} bytes of memory when it is unpacked (at most {MOST_UNPACKED_BYTES:,}): save it "
            "as .npy or .safetensors, which are read from disk"
        )
    tables = _row_tables(path)
    rows = _row_table(tables[0]) if tables else None
    total = stored.shape[0]
    if rows is not None and len(rows) != total:
        raise DataError(f"{tables[0]} has {len(rows)} rows and {chosen!r} of {path} has {total}: one for each vector is needed")
    return VectorFile(source, (path, *tables), chosen, 0, total, total, stored=stored, rows=rows)


def _chosen(source: str, asked: str | None, fitting: Sequence[str], names: Sequence[str]) -> str:
    """Return the name of the column or tensor of vectors."""
    if asked is not None and asked in names:
        return asked
    usual = [name for name in USUAL_NAMES if name in names][:1]
    found = [] if asked is not None else usual or (fitting if len(fitting) == 1 else [])
    if not found:
        what = f"no column {VECTOR_COLUMN!r}" if asked is None else f"no column or tensor {asked!r}"
        several = f"; vectors are in {some_of(list(fitting))}: choose one with activations.vector_column" if fitting else ""
        raise DataError(
            f"{source} has {what}; it has {', '.join(map(str, names)) or 'none'}{several}. Text goes to "
            "activations.text, not .vectors."
        )
    return found[0]


def _arrays(path: Path) -> dict[str, StoredArray]:
    """Return the arrays in a file by name; a single one is called VECTOR_COLUMN."""
    with _damage_of_array_refused(path):
        if path.suffix == ".npy":
            return {VECTOR_COLUMN: _stored(np.load(path, mmap_mode="r", allow_pickle=False))}
        if path.suffix == ".npz":
            return {name: _of_npz(path, name, *header) for name, header in npz_headers(path).items()}
        if path.suffix == ".safetensors":
            return {name: _of_safetensors(path, name, tensor) for name, tensor in read_header(path).items()}
        value = read_torch_file(path)
        tensors = value if isinstance(value, dict) else {VECTOR_COLUMN: value}
        return {str(name): _of_tensor(tensor) for name, tensor in tensors.items() if hasattr(tensor, "detach")}


@contextmanager
def _damage_of_array_refused(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # NumPy and zipfile raise whatever a damaged file happens to cause
        raise DataError(f"{path} cannot be read as an array ({str(error)[:300]}); is it whole?") from error


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" and dtype.itemsize in FLOATS


def _stored(array: np.ndarray) -> StoredArray:
    return StoredArray(array.shape, str(array.dtype), _is_float(array.dtype), lambda: array)


def _of_npz(path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> StoredArray:
    return StoredArray(shape, str(dtype), _is_float(dtype), lambda: read_npz_array(path, name))


def _of_safetensors(path: Path, name: str, tensor: Tensor) -> StoredArray:
    def mapped() -> np.ndarray:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: Any = bounded_json(file.read(length))
        begin = 8 + length + header[name]["data_offsets"][0]
        return np.memmap(path, SAFETENSORS_DTYPES[tensor.dtype], "r", begin, tensor.shape)

    is_float = tensor.dtype in SAFETENSORS_DTYPES and 0 not in tensor.shape
    return StoredArray(tensor.shape, tensor.dtype, is_float, mapped)


def _of_tensor(tensor: Any) -> StoredArray:
    name = str(tensor.dtype).removeprefix("torch.")
    is_float = name in ("float16", "bfloat16", "float32", "float64")
    return StoredArray(tuple(tensor.shape), name, is_float, lambda: tensor.detach().float().cpu().numpy())


def _lists(array: np.ndarray) -> pa.FixedSizeListArray:
    values = (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array
    flat = np.ascontiguousarray(values, values.dtype.newbyteorder("=")).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), array.shape[1])


def _row_tables(path: Path) -> tuple[Path, ...]:
    return tuple(table for ending in ROW_TABLES if (table := path.with_name(path.name + ending)).is_file())[:1]


def _row_table(path: Path) -> pa.Table:
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path)
        return _table_of_lines(path, [dict(row) for row in json_lines(path)])
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable table ({error}); is it whole?") from error


def _table_of_lines(path: Path, rows: list[dict[str, Any]]) -> pa.Table:
    """Return a table with a column for each key that any row has."""
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
        except pa.ArrowException as error:
            raise DataError(f"{name!r} of {path} is of several types ({error}): give every row the same type, or null") from error
    return pa.table(columns)


def _has_some(wanted: np.ndarray | None, start: int, stop: int) -> bool:
    return wanted is None or bool(np.diff(np.searchsorted(wanted, [start, stop]))[0])


def _is_list_of_floats(kind: pa.DataType) -> bool:
    is_list = pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return bool(is_list and pa.types.is_floating(kind.value_type))


def _next_batch(batches: Iterator[pa.RecordBatch], path: Path) -> pa.RecordBatch | None:
    with damage_refused(path):
        return next(batches, None)
