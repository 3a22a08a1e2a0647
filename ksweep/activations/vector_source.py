"""Read ready-made vectors: as in the public NLA datasets (stage0_extract.py), whose Parquet files have the columns below.

`ksweep.activations.vector_files` opens them, other formats and several parts included.

activation_vector            FixedSizeList<float32>[d] (hand-made files: list of float or double)     required
doc_id                       document, the cluster of the bootstrap; activations.document_column names another column
                             (without either: "document" where there is one, else each row is a document of its own)
n_raw_tokens                 position + 1, special tokens counted
detokenized_text_truncated   text up to the position
role                         whose token it is: user, assistant, ...
activation_layer             block whose output the vectors are, the same in every row

A sidecar `{file}.nla_meta.yaml` says which model and layer they are of. A key of it that is not understood is refused by name
(`ksweep.utils.sidecar_keys` lists those that only inform).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ksweep.activations.hub_vectors import SIDECAR
from ksweep.activations.row_order import ascending, row_number
from ksweep.activations.source import WINDOW_CHARACTERS, ActivationUnit, kept_rows, refuse_unusable
from ksweep.activations.vector_files import VECTOR_COLUMN, VectorFile, open_vectors, vector_sidecars, without_range
from ksweep.config.spec import Activations
from ksweep.utils.errors import DataError
from ksweep.utils.files import named_path
from ksweep.utils.notes import Note
from ksweep.utils.parquet_rows import column_values
from ksweep.utils.planning_pass import once_per_pass
from ksweep.utils.sidecar_keys import (
    LAYER_KEYS,
    TEXT_OF_VECTORS,
    abbreviated,
    base_model,
    check_keys,
    is_done,
    read_layer,
    read_yaml,
    value_at,
)

if TYPE_CHECKING:
    from jaxtyping import Float32, Int64

POSITION_COLUMN = "n_raw_tokens"
STATED_POSITION = "position"
"""Column of positions in exported draws, read where rows are named and there is no column n_raw_tokens."""
DOCUMENT_COLUMNS = ("doc_id", "document")
"""Columns that name documents unless the spec names one: that of the public datasets, and that of texts."""
LAYER_COLUMN = "activation_layer"
PROVENANCE_COLUMNS = (POSITION_COLUMN, "detokenized_text_truncated", "role")
VECTORS_SIDECAR_KEYS = frozenset({
    "kind", "schema_version", "d_model", "base_model", "base_checkpoint", "extraction.base_model", "extraction.d_model",
    "hidden_size", "extraction.hidden_size",
    "extraction.norm", "extraction.injection_scale", "extraction.mse_scale", *LAYER_KEYS,
})  # fmt: skip
"""Keys of a vectors' sidecar that are read, or that say how a pair uses the vectors rather than how they were made."""
ABOUT_PROMPTS = frozenset({"tokens", "prompt_templates"})
"""Sections that tell trainers how to build prompts; AV and AR have their own."""
VECTOR_ROWS_PER_UNIT = 1024
WINDOW_UNITS = 16
"""Units of rows=random that are read in one pass and held in memory together."""


@dataclass(frozen=True)
class VectorsSidecar:
    """Facts about a file of vectors from `{file}.nla_meta.yaml`; None if it does not state them."""

    layer: int | None
    base_model: str | None
    d_model: int | None
    norm: str | None
    """"none" for raw vectors; there is no other value, because no supported pair takes other vectors."""
    notes: tuple[Note, ...] = ()


def read_vectors_sidecar(vectors: str | Path) -> VectorsSidecar | None:
    """Return the sidecar beside a file of vectors, or None if there is none.

    Raises:
        DataError: a sidecar that is damaged, of another kind, of vectors that are not raw, or with an unknown key.
    """
    # 1. Read the sidecar beside the file; else those of its parts, and of their folders.
    beside = Path(f"{named_path(without_range(str(vectors)), DataError)}.{SIDECAR}")
    found = [beside] if beside.is_file() else []
    if not found:
        with suppress(DataError):  # where there are none the vectors are refused
            found = vector_sidecars(str(vectors))
    stated = [_read_sidecar(path) for path in found]
    # 2. Those of several parts must agree.
    if any(replace(other, notes=()) != replace(stated[0], notes=()) for other in stated):
        raise DataError(f"the parts of {vectors} have sidecars that say different things: give parts of one extraction")
    return stated[0] if stated else None


def _read_sidecar(path: Path) -> VectorsSidecar:
    meta = read_yaml(path, DataError)
    if not isinstance(meta, dict) or meta.get("kind") != "nla_dataset":
        kind = abbreviated(meta.get("kind")) if isinstance(meta, dict) else repr(type(meta).__name__)
        raise DataError(f"sidecar {path} is of kind {kind}; beside a file of vectors `kind: nla_dataset` is expected")
    if not isinstance(meta.get("extraction") or {}, dict):
        raise DataError(f"sidecar {path} has an `extraction` that is no mapping: {abbreviated(meta['extraction'])}")
    if (version := meta.get("schema_version")) not in (None, 1, 2):
        raise DataError(f"sidecar {path} has schema_version={abbreviated(version)}; 1 is understood: use a later ksweep for it")
    norm = value_at(meta, "extraction.norm")
    if norm is not None and not is_done("norm", norm):
        raise DataError(
            f"sidecar {path} has extraction.norm={abbreviated(norm)}: the vectors are not as the model gives them, and AV and AR "
            "are trained on raw ones (norm: none). Give the raw vectors, or extract them from text (activations.text)."
        )
    judged = {key: value for key, value in meta.items() if key not in ABOUT_PROMPTS}
    check_keys(judged, VECTORS_SIDECAR_KEYS, path, DataError, TEXT_OF_VECTORS)
    notes: list[Note] = []
    return VectorsSidecar(
        layer=read_layer(meta, path, DataError),
        base_model=base_model(meta, path, DataError, notes),
        d_model=_said_width(meta, path),
        norm=None if norm is None else "none",
        notes=tuple(notes),
    )


def _said_width(meta: dict[str, Any], path: Path) -> int | None:
    keys = ("d_model", "extraction.d_model", "hidden_size", "extraction.hidden_size")
    widths = {key: width for key in keys if (width := _whole(meta, key, path)) is not None}
    if len(set(widths.values())) > 1:
        raise DataError(f"sidecar {path} has {' and '.join(f'{key}={width}' for key, width in widths.items())}: make them agree")
    return next(iter(widths.values()), None)


def vectors_shape(vectors: str | Path, column: str | None = None) -> tuple[int, int]:
    """Return rows and width of a file of vectors, from its header if that has the width, else from the first row.

    Raises:
        DataError: as `open_vectors`.
    """
    with open_vectors(vectors, column) as file:
        return file.num_rows, file.d_model


def vectors_say_positions(vectors: str | Path, column: str | None = None) -> bool:
    """Return whether a file of vectors has a column of positions.

    Raises:
        DataError: as `open_vectors`.
    """
    with open_vectors(vectors, column) as file:
        return POSITION_COLUMN in file.names


def vectors_layer(vectors: str | Path, column: str | None = None) -> int | None:
    """Return the layer of a file of vectors, from its sidecar or its column `activation_layer`; None if neither states it.

    Raises:
        DataError: the two disagree, or the rows are of several layers; and as `read_vectors_sidecar` and `vectors_shape`.
    """
    sidecar = read_vectors_sidecar(vectors)
    in_sidecar, in_rows = None if sidecar is None else sidecar.layer, _layer_of_rows(vectors, column)
    if None not in (in_sidecar, in_rows) and in_sidecar != in_rows:
        raise DataError(
            f"the sidecar of {vectors} says layer {in_sidecar} and its column {LAYER_COLUMN!r} says {in_rows}: the two are of "
            "different files, or one is wrong"
        )
    return in_rows if in_sidecar is None else in_sidecar


def _layer_of_rows(vectors: str | Path, column: str | None) -> int | None:
    with open_vectors(vectors, column) as file:
        if LAYER_COLUMN not in file.names:
            return None
        stated = pc.unique(file.table([LAYER_COLUMN]).column(0))
        layers = _whole_layers(column_values(stated, vectors, LAYER_COLUMN), vectors)
    if len(layers) > 1:
        raise DataError(
            f"{vectors} holds activations of several layers ({', '.join(map(str, sorted(layers)[:5]))} in column "
            f"{LAYER_COLUMN!r}), and a pair is trained on one: write those of its layer to a file of their own"
        )
    return layers[0] if layers else None


def _whole_layers(values: list[Any], vectors: str | Path) -> list[int]:
    """Return the layers in the column as whole numbers, without nulls and NaN, beside which pandas writes 20 as 20.0."""
    stated = [value for value in values if value is not None and value == value]
    wrong = [value for value in stated if not _is_whole(value)]
    if wrong:
        raise DataError(
            f"{vectors} has {abbreviated(wrong[0])} in column {LAYER_COLUMN!r}; expected whole numbers, the block whose output "
            "the vectors are. Correct or drop the column."
        )
    return sorted({int(value) for value in stated})


def _is_whole(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and abs(value) < 2**31 and value == value // 1


def _position(value: Any, before: int, row: int, vectors: str | Path, column: str | None) -> int | None:
    """Return the index of a token; None for null or NaN."""
    if value is None or value != value:
        return None
    if not _is_whole(value):
        raise DataError(
            f"row {row} of {vectors} has {abbreviated(value)} in column {column!r}; expected a whole number, the index of a token"
        )
    return int(value) - before


def document_column(vectors: str | Path, asked: str | None, column: str | None = None) -> str | None:
    """Return the column that names the documents of a file of vectors; None if each row is its own document.

    Raises:
        DataError: no such column, one of lists or structs; and as `open_vectors`.
    """
    with open_vectors(vectors, column) as file:
        schema, names, vector = file.schema, file.names, file.column
    if asked is not None and asked not in names:
        raise DataError(
            f"{vectors} has no column {asked!r}; it has {', '.join(names)}. Set activations.document_column to the right one."
        )
    if asked is not None and (asked == vector or pa.types.is_nested(schema.field(asked).type)):
        kind = "vector" if asked == vector else schema.field(asked).type
        raise DataError(
            f"column {asked!r} of {vectors} is of type {kind}; expected text or numbers that name documents. "
            "Set activations.document_column to such a column."
        )
    return asked if asked is not None else next((name for name in DOCUMENT_COLUMNS if name in names), None)


def are_of_one_document(activations: Activations) -> bool:
    """Return whether the vectors that a request takes are of a single document; reads the names of documents.

    Raises:
        DataError: as `document_column`.
    """
    vectors, column = activations.vectors or "", activations.vector_column
    named = document_column(vectors, activations.document_column, column)
    if named is None:
        return activations.num_activations == 1
    with open_vectors(vectors, column) as file:
        count, is_random = (
            activations.num_activations,
            activations.rows == "random" and activations.num_activations < file.num_rows,
        )
        names = _names_of_documents(file, named)
        if not is_random:
            return _is_one(islice(names, count))
        taken = list(names)
    return _is_one(taken[i] for i in _order(activations)[:count].tolist())


def _names_of_documents(file: VectorFile, column: str) -> Iterator[Any]:
    """Yield the values of the column of documents as they are read."""
    row = 0
    for table in file.batches([column]):
        yield from column_values(table.column(column), file.source, column, file.start + row)
        row += len(table)


def _is_one(names: Iterable[Any]) -> bool:
    """Return whether there is one name; each null names a document of its own. Stops at the second."""
    seen: set[str | int] = set()
    for row, name in enumerate(names):
        seen.add(row if name is None else str(name))
        if len(seen) > 1:
            return False
    return len(seen) == 1


def vector_order(activations: Activations) -> Int64[np.ndarray, " row"] | None:
    """Return the rows of a file of vectors in the order in which they are taken; None: as they stand.

    Raises:
        DataError: as `document_column` and `rows_by_activation`.
    """
    return None if activations.rows == "first" else _order(activations)


def _order(activations: Activations) -> Int64[np.ndarray, " row"]:
    """Return the order of rows=random, which is the same for any number of activations."""
    named, column = activations.row_id_column, activations.vector_column
    return _order_by_seed(activations.vectors or "", column, activations.document_column, named, activations.seed)


@once_per_pass
def _order_by_seed(
    vectors: str, column: str | None, document: str | None, row_id: str | None, seed: int
) -> Int64[np.ndarray, " row"]:
    named = document_column(vectors, document, column)
    with open_vectors(vectors, column) as file:
        row_ids = [f"row:{file.start + i}" for i in range(file.num_rows)]
        documents = row_ids if named is None else list(_names_of_documents(file, named))
    if row_id is not None:
        row_ids = rows_by_activation(vectors, row_id, column).row_ids
    return ascending(row_number(seed, str(of or name), name) for of, name in zip(documents, row_ids, strict=True))


@dataclass(frozen=True, eq=False)
class NamedRows:
    """The rows of a file of vectors by the names of their activations."""

    row_ids: list[str]
    positions: list[int | None]
    first: np.ndarray
    """[row] index of the first row of the same activation."""

    @property
    def num_activations(self) -> int:
        """Number of different activations."""
        return int((self.first == np.arange(len(self.first))).sum())


@once_per_pass
def rows_by_activation(vectors: str | Path, column: str, vector_column: str | None = None) -> NamedRows:
    """Return the names of a file's rows: a column of row ids, and the position (`n_raw_tokens` - 1, or `position`) if known.

    Raises:
        DataError: no such column, or a row without a name.
    """
    with open_vectors(vectors, vector_column) as file:
        names = file.names
        if column not in names:
            raise DataError(f"activations.row_id_column={column!r} is no column of {vectors}; it has {', '.join(names)}")
        position = next((name for name in (POSITION_COLUMN, STATED_POSITION) if name in names), None)
        table = file.table([column, *([] if position is None else [position])])
    if nulls := table[column].null_count:
        raise DataError(f"{nulls} rows of {vectors} have null in column {column!r}: every row needs the name of its activation")
    stated = [None] * len(table) if position is None else column_values(table[position], vectors, position)
    before = int(position == POSITION_COLUMN)
    positions = [_position(value, before, i, vectors, position) for i, value in enumerate(stated)]
    row_ids = [str(value) for value in column_values(table[column], vectors, column)]
    first: dict[tuple[str, int | None], int] = {}
    firsts = [first.setdefault(name, i) for i, name in enumerate(zip(row_ids, positions, strict=True))]
    return NamedRows(row_ids, positions, np.array(firsts))


class VectorUnits:
    """Units of a file of vectors, stored in float32 as the public files are: rounding would change them silently."""

    dtype = "float32"
    most_per_unit = VECTOR_ROWS_PER_UNIT

    def __init__(self, activations: Activations) -> None:
        """Read what is beside the vectors: names of documents and activations, and the order in which they are taken.

        Raises:
            DataError: as `open_vectors`, `document_column` and `rows_by_activation`.
        """
        self.source, self.column = activations.vectors or "", activations.vector_column
        self.documents = document_column(self.source, activations.document_column, self.column)
        self._asked, self._num_activations = activations.document_column is not None, activations.num_activations
        with open_vectors(self.source, self.column) as file:
            self.num_rows, self.d_model, self.first_row = file.num_rows, file.d_model, file.start
        named = activations.row_id_column
        self.named = None if named is None else rows_by_activation(self.source, named, self.column)
        self.order = vector_order(activations)
        self._is_checked = self.named is None
        self._tables: Iterator[pa.Table] = iter(())
        self._next_unit = -1

    def close(self) -> None:
        """Close the file."""
        self._tables, self._next_unit = iter(()), -1

    def units(self, indices: Iterable[int]) -> Iterator[tuple[int, ActivationUnit]]:
        """Yield the units. The file is streamed; a lower index opens it again at the row group of that unit.

        Raises:
            DataError: null, ragged, non-finite or zero vectors.
        """
        for index in indices:
            self._check_repeated()
            if not 0 <= self._next_unit <= index:
                self._tables, self._next_unit = self._from_unit(index), index
            while True:
                table = next(self._tables)
                self._next_unit += 1
                if self._next_unit > index:
                    break
            start = index * VECTOR_ROWS_PER_UNIT
            rows = np.arange(start, start + len(table)) if self.order is None else self.order[start : start + len(table)]
            yield index, self._unit(table, rows)

    def _from_unit(self, index: int) -> Iterator[pa.Table]:
        """Yield the table of each unit from one on, forever: the last one is short, later ones are empty."""
        wanted = {VECTOR_COLUMN, *PROVENANCE_COLUMNS, *([] if self.documents is None else [self.documents])}
        start, size = index * VECTOR_ROWS_PER_UNIT, VECTOR_ROWS_PER_UNIT
        with open_vectors(self.source, self.column) as file:
            held: pa.Table | None = None
            if self.order is None:
                for table in file.batches(wanted, start):
                    held = table if held is None else pa.concat_tables([held, table])
                    while len(held) >= size:
                        yield held.slice(0, size)
                        held = held.slice(size)
            else:
                while start < self.num_rows:
                    window = self.order[start : start + self._window_rows(start)]
                    held, start = _picked(file, wanted, window), start + len(window)
                    while len(held) >= size:
                        yield held.slice(0, size)
                        held = held.slice(size)
            if held is None:
                held = next(file.batches(wanted)).slice(0, 0)
            yield held
            while True:
                yield held.slice(0, 0)

    def _window_rows(self, start: int) -> int:
        """Return how many rows are read together: no more units than the request takes, where a row is an activation."""
        missing = -(-(self._num_activations - start) // VECTOR_ROWS_PER_UNIT)
        units = WINDOW_UNITS if self.named is not None else max(1, min(WINDOW_UNITS, missing))
        return units * VECTOR_ROWS_PER_UNIT

    def _unit(self, table: pa.Table, numbers: np.ndarray) -> ActivationUnit:
        """Return the unit of a table whose rows have these numbers in the range that is read."""
        n, place, source = len(table), self.first_row + numbers, self.source
        wanted = [*PROVENANCE_COLUMNS, *([] if self.documents is None else [self.documents])]
        columns = {
            name: column_values(table.column(name), source, name, int(place[0]) if n else 0)
            if name in table.column_names
            else [None] * n
            for name in wanted
        }
        named = [None] * n if self.documents is None else columns[self.documents]
        if self._asked:
            self._refuse_unnamed(named, place)
        rows = [f"row:{number}" for number in place]
        lengths = columns[POSITION_COLUMN]
        positions = [_position(length, 1, int(i), source, POSITION_COLUMN) for i, length in zip(place, lengths, strict=True)]
        if self.named is not None:
            rows, positions = ([values[i] for i in numbers] for values in (self.named.row_ids, self.named.positions))
        where = f"{source} from row {place[0] if n else 0}"
        unit = ActivationUnit(
            vectors=flat_vectors(table.column(VECTOR_COLUMN), self.d_model, where),
            row_ids=rows,
            documents=[row if document is None else str(document) for row, document in zip(rows, named, strict=True)],
            positions=positions,
            token_ids=[None] * n,
            windows=[str(text or "")[-WINDOW_CHARACTERS:] for text in columns["detokenized_text_truncated"]],
            roles=[None if role is None else str(role) for role in columns["role"]],
            num_rows=n,
            num_skipped=0,
            is_last=self._next_unit * VECTOR_ROWS_PER_UNIT >= self.num_rows,
        )
        refuse_unusable(unit, source)
        if self.named is None:
            return unit
        return kept_rows(unit, np.flatnonzero(self._is_taken(numbers)))

    def _is_taken(self, numbers: np.ndarray) -> np.ndarray:
        """Return whether each row is the one that its activation is taken from: the first that has its name, in any order."""
        assert self.named is not None
        taken: np.ndarray = self.named.first[numbers] == numbers
        return taken

    def _check_repeated(self) -> None:
        """Check once that all rows of an activation have the same vector. Reads the whole file.

        Raises:
            DataError: two of them differ.
        """
        if self._is_checked or self.named is None:
            return
        digests: list[bytes] = []
        with open_vectors(self.source, self.column) as file:
            for table in file.batches([VECTOR_COLUMN]):
                where = f"{self.source} from row {self.first_row + len(digests)}"
                vectors = flat_vectors(table.column(VECTOR_COLUMN), self.d_model, where)
                digests += [hashlib.blake2b(vector.tobytes(), digest_size=16).digest() for vector in vectors]
        for row, first in enumerate(self.named.first.tolist()):
            if digests[row] != digests[first]:
                raise DataError(
                    f"rows {first} and {row} of {self.source} are both of activation {self.named.row_ids[row]!r} and have "
                    "different vectors: give different activations different row ids or positions"
                )
        self._is_checked = True

    def _refuse_unnamed(self, named: list[Any], place: np.ndarray) -> None:
        """Raise DataError if a row has null, NaN or empty text in the document column that the spec names."""
        rows = [str(i) for i, name in zip(place, named, strict=True) if name is None or name != name or str(name).strip() == ""]
        if rows:
            raise DataError(
                f"{self.source} names no document in column {self.documents!r} of {len(rows)} rows ({', '.join(rows[:5])}"
                f"{', ...' if len(rows) > 5 else ''}), and the bootstrap draws documents: fill them in, or drop those rows."
            )


def flat_vectors(column: pa.ChunkedArray, d_model: int, where: str) -> Float32[np.ndarray, "row d_model"]:
    """Return a list column as a float32 array.

    `flatten` drops nulls and ignores row lengths, so a null or a short row would shift every later vector
    (cast_to_fixed_size_list.py): nulls and lengths are checked first.

    Raises:
        DataError: a null, or rows that are not all of width `d_model`.
    """
    parts = []
    for chunk in column.chunks:
        if chunk.null_count:
            raise DataError(
                f"{where}: {chunk.null_count} rows of {VECTOR_COLUMN} are null; each needs a vector of {d_model} numbers"
            )
        lengths = pc.min_max(pc.list_value_length(chunk)).as_py()
        if len(chunk) and (lengths["min"], lengths["max"]) != (d_model, d_model):
            raise DataError(
                f"{where}: {VECTOR_COLUMN} is ragged: {lengths['min']} to {lengths['max']} numbers a row, expected {d_model}"
            )
        flat = chunk.flatten()
        if flat.null_count:
            raise DataError(f"{where}: {flat.null_count} numbers of {VECTOR_COLUMN} are null; a vector must be complete")
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, which is refused by row
            parts.append(flat.to_numpy(zero_copy_only=False).astype(np.float32, copy=False))
    flat = np.concatenate(parts) if parts else np.empty(0, dtype=np.float32)
    if flat.size != len(column) * d_model:
        raise DataError(
            f"{where}: {VECTOR_COLUMN} has {flat.size} numbers in {len(column)} rows, expected {len(column)} x {d_model}"
        )
    return flat.reshape(len(column), d_model)


def _picked(file: VectorFile, columns: Collection[str], rows: Int64[np.ndarray, " row"]) -> pa.Table:
    """Return rows of a file of vectors in the given order, from one pass through it."""
    place = np.empty(len(rows), dtype=np.int64)
    place[np.argsort(rows, kind="stable")] = np.arange(len(rows))
    return pa.concat_tables(list(file.rows_at(columns, np.sort(rows)))).take(pa.array(place))


def _whole(meta: dict[str, Any], key: str, path: Path) -> int | None:
    value = value_at(meta, key)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31):
        return value
    raise DataError(f"sidecar {path}: {key} is {abbreviated(value)}, expected a whole number")
