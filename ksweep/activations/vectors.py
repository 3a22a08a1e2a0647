"""Ready-made vectors: a Parquet file with an `activation_vector` column, as the public NLA datasets are (stage0_extract.py).

activation_vector            FixedSizeList<float32>[d] (hand-made files: list of float or double)     required
doc_id                       document, the cluster of the bootstrap                                    else the row
n_raw_tokens                 position + 1, special tokens counted
detokenized_text_truncated   text up to the position
role                         whose token it is: user, assistant, ...
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from ksweep.activations.units import Unit, refuse_unusable
from ksweep.errors import DataError

if TYPE_CHECKING:
    from jaxtyping import Float32

COLUMN = "activation_vector"
POSITIONS = "n_raw_tokens"
PROVENANCE = ("doc_id", POSITIONS, "detokenized_text_truncated", "role")
ROWS_PER_UNIT = 1024
WINDOW_CHARACTERS = 200


@dataclass(frozen=True)
class VectorsSidecar:
    """What `{file}.nla_meta.yaml` says of a file of vectors; None where it does not."""

    layer: int | None
    base_model: str | None
    d_model: int | None
    norm: str | None
    """"none" for raw vectors."""


def read_sidecar(vectors: str | Path) -> VectorsSidecar | None:
    """The sidecar beside a file of vectors, or None where there is none. Unknown keys are tolerated.

    Raises:
        DataError: a sidecar that is damaged or of another kind.
    """
    path = Path(f"{Path(vectors).expanduser()}.nla_meta.yaml")
    if not path.is_file():
        return None
    try:
        meta = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"sidecar {path} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(meta, dict) or meta.get("kind") != "nla_dataset":
        kind = meta.get("kind") if isinstance(meta, dict) else type(meta).__name__
        raise DataError(f"sidecar {path} is of kind {kind!r}; beside a file of vectors `kind: nla_dataset` is expected")
    extraction = meta.get("extraction")
    if extraction is None:
        extraction = {}
    if not isinstance(extraction, dict):
        raise DataError(f"sidecar {path} has an `extraction` that is no mapping: {extraction!r}")
    return VectorsSidecar(
        layer=_typed(extraction, "layer_index", int, path),
        base_model=_typed(extraction, "base_model", str, path),
        d_model=_typed(extraction, "d_model", int, path),
        norm=_typed(extraction, "norm", str, path),
    )


def vectors_shape(vectors: str | Path) -> tuple[int, int]:
    """Rows and width of a file of vectors, from its footer where the type says it, else from the first row.

    Raises:
        DataError: no such file, not Parquet, no `activation_vector` column, another type, or no rows.
    """
    with _open(vectors) as file:
        return file.metadata.num_rows, _width(file, Path(vectors))


def vectors_say_positions(vectors: str | Path) -> bool:
    """Whether a file of vectors has the column that positions are read from.

    Raises:
        DataError: no such file, or not Parquet.
    """
    with _open(vectors) as file:
        return POSITIONS in file.schema_arrow.names


class VectorUnits:
    """Units of a file of vectors. They are kept in float32: the public files are, and rounding them would be a silent change."""

    dtype = "float32"
    most_per_unit = ROWS_PER_UNIT

    def __init__(self, vectors: str | Path) -> None:
        """Reads the footer only.

        Raises:
            DataError: as `vectors_shape`.
        """
        self.path = Path(vectors).expanduser()
        self.num_rows, self.d_model = vectors_shape(self.path)
        self._tables: Iterator[pa.Table] = iter(())
        self._next_unit = -1

    def close(self) -> None:
        """Let go of the file."""
        self._tables, self._next_unit = iter(()), -1

    def units(self, indices: Iterable[int]) -> Iterator[tuple[int, Unit]]:
        """Read units; the file is streamed, going back opens it again at the row group in question.

        Raises:
            DataError: null, ragged, non-finite or zero vectors.
        """
        for index in indices:
            if not 0 <= self._next_unit <= index:
                self._tables, self._next_unit = _tables(self.path, index * ROWS_PER_UNIT, ROWS_PER_UNIT), index
            while True:
                table = next(self._tables)
                self._next_unit += 1
                if self._next_unit > index:
                    break
            yield index, self._unit(table, index)

    def _unit(self, table: pa.Table, index: int) -> Unit:
        first, n = index * ROWS_PER_UNIT, len(table)
        columns = {name: table.column(name).to_pylist() if name in table.column_names else [None] * n for name in PROVENANCE}
        rows = [f"row:{first + i}" for i in range(n)]
        lengths = columns[POSITIONS]
        unit = Unit(
            vectors=flat_vectors(table.column(COLUMN), self.d_model, f"{self.path} from row {first}"),
            row_ids=rows,
            documents=[row if document is None else str(document) for row, document in zip(rows, columns["doc_id"], strict=True)],
            positions=[None if length is None else int(length) - 1 for length in lengths],
            token_ids=[None] * n,
            windows=[str(text or "")[-WINDOW_CHARACTERS:] for text in columns["detokenized_text_truncated"]],
            roles=[None if role is None else str(role) for role in columns["role"]],
            num_rows=n,
            num_skipped=0,
            is_last=first + n >= self.num_rows,
        )
        refuse_unusable(unit, str(self.path))
        return unit


def flat_vectors(column: pa.ChunkedArray, d_model: int, where: str) -> Float32[np.ndarray, "row d_model"]:
    """A list column as one float32 array, read flat.

    `flatten` drops nulls and does not see rows of unequal length: every vector behind one would shift
    (cast_to_fixed_size_list.py), so nulls and lengths are checked first.

    Raises:
        DataError: a null, or rows that are not all of width `d_model`.
    """
    parts = []
    for chunk in column.chunks:
        if chunk.null_count:
            raise DataError(f"{where}: {chunk.null_count} rows of {COLUMN} are null; each needs a vector of {d_model} numbers")
        lengths = pc.min_max(pc.list_value_length(chunk)).as_py()
        if len(chunk) and (lengths["min"], lengths["max"]) != (d_model, d_model):
            raise DataError(
                f"{where}: {COLUMN} is ragged: {lengths['min']} to {lengths['max']} numbers a row, expected {d_model}"
            )
        flat = chunk.flatten()
        if flat.null_count:
            raise DataError(f"{where}: {flat.null_count} numbers of {COLUMN} are null; a vector must be complete")
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, which is refused by row
            parts.append(flat.to_numpy(zero_copy_only=False).astype(np.float32, copy=False))
    flat = np.concatenate(parts) if parts else np.empty(0, dtype=np.float32)
    if flat.size != len(column) * d_model:
        raise DataError(f"{where}: {COLUMN} has {flat.size} numbers in {len(column)} rows, expected {len(column)} x {d_model}")
    return flat.reshape(len(column), d_model)


def _tables(path: Path, start: int, rows: int) -> Iterator[pa.Table]:
    """Consecutive tables of `rows` rows from row `start` on, without end: short, then empty where the file has ended."""
    with _open(path) as file:
        groups, skip = _groups_from(file, start)
        columns = [COLUMN, *(name for name in PROVENANCE if name in file.schema_arrow.names)]
        batches = file.iter_batches(batch_size=rows, row_groups=groups, columns=columns) if groups else iter(())
        held = file.schema_arrow.empty_table().select(columns)
        while True:
            while len(held) < skip + rows and (batch := next(batches, None)) is not None:
                held = pa.concat_tables([held, pa.Table.from_batches([batch]).cast(held.schema)])
                dropped = min(skip, len(held))
                held, skip = held.slice(dropped), skip - dropped
            yield held.slice(0, rows)
            held = held.slice(rows)


def _groups_from(file: pq.ParquetFile, start: int) -> tuple[list[int], int]:
    """Row groups from the one that holds row `start` on, and how many rows of it come before."""
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
        raise DataError(f"no file of vectors at {str(vectors)!r}: expected Parquet with a column {COLUMN!r}; check the path")
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file ({error}); is it whole?") from error
    names = file.schema_arrow.names
    if COLUMN not in names:
        raise DataError(
            f"{path} has no column {COLUMN!r}; it has {', '.join(names)}. Text goes to activations.text, not .vectors."
        )
    if file.metadata.num_rows == 0:
        raise DataError(f"{path} has a column {COLUMN!r} but no rows")
    return file


def _width(file: pq.ParquetFile, path: Path) -> int:
    kind = file.schema_arrow.field(COLUMN).type
    is_list = pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not is_list or not pa.types.is_floating(kind.value_type):
        raise DataError(
            f"column {COLUMN!r} of {path} is of type {kind}; expected FixedSizeList<float32>[d_model] or a list of floats"
        )
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size)
    first: Any = next(file.iter_batches(batch_size=1, columns=[COLUMN])).column(0)[0].as_py()
    if not first:
        raise DataError(f"row 0 of {COLUMN!r} in {path} is {'null' if first is None else 'empty'}; every row needs a vector")
    return len(first)


def _typed(mapping: dict[str, Any], key: str, kind: type, path: Path) -> Any:
    value = mapping.get(key)
    if value is None or (isinstance(value, kind) and not isinstance(value, bool)):
        return value
    raise DataError(f"sidecar {path}: extraction.{key} is {value!r}, expected {'a whole number' if kind is int else 'text'}")
