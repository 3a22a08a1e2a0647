"""Read ready-made vectors: a Parquet file with an `activation_vector` column, as in the public NLA datasets (stage0_extract.py).

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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ksweep.activations.source import WINDOW_CHARACTERS, ActivationUnit, kept_rows, refuse_unusable
from ksweep.utils.errors import DataError
from ksweep.utils.notes import Note
from ksweep.utils.parquet_rows import column_values, damage_refused
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
    from jaxtyping import Float32

VECTOR_COLUMN = "activation_vector"
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
    path = Path(f"{Path(vectors).expanduser()}.nla_meta.yaml")
    try:
        meta = read_yaml(path, DataError)
    except FileNotFoundError:
        return None
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


def vectors_shape(vectors: str | Path) -> tuple[int, int]:
    """Return rows and width of a file of vectors, from its footer if the type has the width, else from the first row.

    Raises:
        DataError: no such file, not Parquet, no `activation_vector` column, another type, or no rows.
    """
    with _open(vectors) as file:
        return file.metadata.num_rows, _width(file, Path(vectors))


def vectors_say_positions(vectors: str | Path) -> bool:
    """Return whether a file of vectors has a column of positions.

    Raises:
        DataError: no such file, or not Parquet.
    """
    with _open(vectors) as file:
        return POSITION_COLUMN in file.schema_arrow.names


def vectors_layer(vectors: str | Path) -> int | None:
    """Return the layer of a file of vectors, from its sidecar or its column `activation_layer`; None if neither states it.

    Raises:
        DataError: the two disagree, or the rows are of several layers; and as `read_vectors_sidecar` and `vectors_shape`.
    """
    sidecar = read_vectors_sidecar(vectors)
    in_sidecar, in_rows = None if sidecar is None else sidecar.layer, _layer_of_rows(vectors)
    if None not in (in_sidecar, in_rows) and in_sidecar != in_rows:
        raise DataError(
            f"the sidecar of {vectors} says layer {in_sidecar} and its column {LAYER_COLUMN!r} says {in_rows}: the two are of "
            "different files, or one is wrong"
        )
    return in_rows if in_sidecar is None else in_sidecar


def _layer_of_rows(vectors: str | Path) -> int | None:
    with _open(vectors) as file:
        if LAYER_COLUMN not in file.schema_arrow.names:
            return None
        with damage_refused(vectors):
            stated = pc.unique(file.read(columns=[LAYER_COLUMN]).column(0))
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


def document_column(vectors: str | Path, asked: str | None) -> str | None:
    """Return the column that names the documents of a file of vectors; None if each row is its own document.

    Raises:
        DataError: no such column, one of lists or structs, no such file, or not Parquet.
    """
    with _open(vectors) as file:
        schema = file.schema_arrow
    names = schema.names
    if asked is not None and asked not in names:
        raise DataError(
            f"{vectors} has no column {asked!r}; it has {', '.join(names)}. Set activations.document_column to the right one."
        )
    if asked is not None and pa.types.is_nested(schema.field(asked).type):
        raise DataError(
            f"column {asked!r} of {vectors} is of type {schema.field(asked).type}; expected text or numbers that name documents. "
            "Set activations.document_column to such a column."
        )
    return asked if asked is not None else next((name for name in DOCUMENT_COLUMNS if name in names), None)


def are_of_one_document(vectors: str | Path, asked: str | None, num_rows: int) -> bool:
    """Return whether the first `num_rows` rows of a file of vectors are of a single document. Reads up to the second document.

    Raises:
        DataError: as `document_column`.
    """
    column, seen, left = document_column(vectors, asked), set[str](), num_rows
    if column is None:
        return num_rows == 1
    with _open(vectors) as file:
        batches = file.iter_batches(batch_size=VECTOR_ROWS_PER_UNIT, columns=[column])
        while (batch := _next_batch(batches, Path(vectors))) is not None:
            names = batch.column(0).slice(0, left)
            seen.update(map(str, column_values(names.drop_null().unique(), vectors, column)))
            if len(seen) > 1 or (names.null_count and left > 1):  # a row without a name is its own document
                return False
            left -= len(names)
            if not left:
                break
    return True


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
def rows_by_activation(vectors: str | Path, column: str) -> NamedRows:
    """Return the names of a file's rows: a column of row ids, and the position (`n_raw_tokens` - 1, or `position`) if known.

    Raises:
        DataError: no such column, or a row without a name.
    """
    with _open(vectors) as file:
        names = file.schema_arrow.names
        if column not in names:
            raise DataError(f"activations.row_id_column={column!r} is no column of {vectors}; it has {', '.join(names)}")
        position = next((name for name in (POSITION_COLUMN, STATED_POSITION) if name in names), None)
        with damage_refused(vectors):
            table = file.read(columns=[column, *([] if position is None else [position])])
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

    def __init__(self, vectors: str | Path, documents: str | None = None, row_id_column: str | None = None) -> None:
        """Read the footer, and the names of activations.

        Args:
            vectors: the file.
            documents: column that names the documents. None: see `document_column`.
            row_id_column: column that names activations; rows after the first of a name are left out.

        Raises:
            DataError: as `vectors_shape` and `document_column`.
        """
        self.path = Path(vectors).expanduser()
        self.documents, self._asked = document_column(self.path, documents), documents is not None
        self.num_rows, self.d_model = vectors_shape(self.path)
        self.named = None if row_id_column is None else rows_by_activation(self.path, row_id_column)
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
                wanted = {VECTOR_COLUMN, *PROVENANCE_COLUMNS, self.documents}
                self._tables, self._next_unit = (
                    _tables(self.path, index * VECTOR_ROWS_PER_UNIT, VECTOR_ROWS_PER_UNIT, wanted),
                    index,
                )
            while True:
                table = next(self._tables)
                self._next_unit += 1
                if self._next_unit > index:
                    break
            yield index, self._unit(table, index)

    def _unit(self, table: pa.Table, index: int) -> ActivationUnit:
        first, n = index * VECTOR_ROWS_PER_UNIT, len(table)
        wanted = [*PROVENANCE_COLUMNS, *([] if self.documents is None else [self.documents])]
        columns = {
            name: column_values(table.column(name), self.path, name, first) if name in table.column_names else [None] * n
            for name in wanted
        }
        named = [None] * n if self.documents is None else columns[self.documents]
        if self._asked:
            self._refuse_unnamed(named, first)
        rows = [f"row:{first + i}" for i in range(n)]
        lengths = columns[POSITION_COLUMN]
        positions = [_position(length, 1, first + i, self.path, POSITION_COLUMN) for i, length in enumerate(lengths)]
        if self.named is not None:
            rows, positions = self.named.row_ids[first : first + n], self.named.positions[first : first + n]
        unit = ActivationUnit(
            vectors=flat_vectors(table.column(VECTOR_COLUMN), self.d_model, f"{self.path} from row {first}"),
            row_ids=rows,
            documents=[row if document is None else str(document) for row, document in zip(rows, named, strict=True)],
            positions=positions,
            token_ids=[None] * n,
            windows=[str(text or "")[-WINDOW_CHARACTERS:] for text in columns["detokenized_text_truncated"]],
            roles=[None if role is None else str(role) for role in columns["role"]],
            num_rows=n,
            num_skipped=0,
            is_last=first + n >= self.num_rows,
        )
        refuse_unusable(unit, str(self.path))
        if self.named is None:
            return unit
        return kept_rows(unit, np.flatnonzero(self.named.first[first : first + n] == np.arange(first, first + n)))

    def _check_repeated(self) -> None:
        """Check once that all rows of an activation have the same vector. Reads the whole file.

        Raises:
            DataError: two of them differ.
        """
        if self._is_checked or self.named is None:
            return
        digests: list[bytes] = []
        with _open(self.path) as file:
            batches = file.iter_batches(batch_size=VECTOR_ROWS_PER_UNIT, columns=[VECTOR_COLUMN])
            while (batch := _next_batch(batches, self.path)) is not None:
                column = pa.chunked_array([batch.column(0)])
                vectors = flat_vectors(column, self.d_model, f"{self.path} from row {len(digests)}")
                digests += [hashlib.blake2b(vector.tobytes(), digest_size=16).digest() for vector in vectors]
        for row, first in enumerate(self.named.first.tolist()):
            if digests[row] != digests[first]:
                raise DataError(
                    f"rows {first} and {row} of {self.path} are both of activation {self.named.row_ids[row]!r} and have "
                    "different vectors: give different activations different row ids or positions"
                )
        self._is_checked = True

    def _refuse_unnamed(self, named: list[Any], first: int) -> None:
        """Raise DataError if a row has null, NaN or empty text in the document column that the spec names."""
        rows = [str(first + i) for i, name in enumerate(named) if name is None or name != name or str(name).strip() == ""]
        if rows:
            raise DataError(
                f"{self.path} names no document in column {self.documents!r} of {len(rows)} rows ({', '.join(rows[:5])}"
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


def _tables(path: Path, start: int, rows: int, wanted: Collection[str | None]) -> Iterator[pa.Table]:
    """Yield tables of `rows` rows from row `start` on, forever: the one at the end of the file is short, later ones are empty."""
    with _open(path) as file:
        groups, skip = _groups_from(file, start)
        columns = [name for name in file.schema_arrow.names if name in wanted]
        batches = file.iter_batches(batch_size=rows, row_groups=groups, columns=columns) if groups else iter(())
        held = file.schema_arrow.empty_table().select(columns)
        while True:
            while len(held) < skip + rows and (batch := _next_batch(batches, path)) is not None:
                held = pa.concat_tables([held, pa.Table.from_batches([batch]).cast(held.schema)])
                dropped = min(skip, len(held))
                held, skip = held.slice(dropped), skip - dropped
            yield held.slice(0, rows)
            held = held.slice(rows)


def _next_batch(batches: Iterator[pa.RecordBatch], path: Path) -> pa.RecordBatch | None:
    with damage_refused(path):
        return next(batches, None)


def _groups_from(file: pq.ParquetFile, start: int) -> tuple[list[int], int]:
    """Return the row groups from that of row `start` on, and the number of rows before `start` in it."""
    before = 0
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if start < before + size:
            return list(range(group, file.num_row_groups)), start - before
        before += size
    return [], 0


def _open(vectors: str | Path) -> pq.ParquetFile:
    path = Path(vectors).expanduser()
    if not path.is_file():
        raise DataError(
            f"no file of vectors at {str(vectors)!r}: expected Parquet with a column {VECTOR_COLUMN!r}; check the path"
        )
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file ({error}); is it whole?") from error
    names = file.schema_arrow.names
    if VECTOR_COLUMN not in names:
        raise DataError(
            f"{path} has no column {VECTOR_COLUMN!r}; it has {', '.join(names)}. Text goes to activations.text, not .vectors."
        )
    if file.metadata.num_rows == 0:
        raise DataError(f"{path} has a column {VECTOR_COLUMN!r} but no rows")
    return file


def _width(file: pq.ParquetFile, path: Path) -> int:
    kind = file.schema_arrow.field(VECTOR_COLUMN).type
    is_list = pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not is_list or not pa.types.is_floating(kind.value_type):
        raise DataError(
            f"column {VECTOR_COLUMN!r} of {path} is of type {kind}; expected FixedSizeList<float32>[d_model] or a list of floats"
        )
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size)
    with damage_refused(path):
        first: Any = next(file.iter_batches(batch_size=1, columns=[VECTOR_COLUMN])).column(0)[0].as_py()
    if not first:
        raise DataError(
            f"row 0 of {VECTOR_COLUMN!r} in {path} is {'null' if first is None else 'empty'}; every row needs a vector"
        )
    return len(first)


def _whole(meta: dict[str, Any], key: str, path: Path) -> int | None:
    value = value_at(meta, key)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31):
        return value
    raise DataError(f"sidecar {path}: {key} is {abbreviated(value)}, expected a whole number")
