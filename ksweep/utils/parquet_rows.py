"""Rows of somebody else's Parquet file as Python values; what cannot be decoded is refused with file and row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ksweep.utils.errors import DataError


def parquet_rows(path: Path, columns: Sequence[str], batch_size: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file with these columns.

    Raises:
        DataError: a damaged file, or text that is not UTF-8; the message names the row.
    """
    first = 0
    with damage_refused(path), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=batch_size, columns=list(columns)):
            values = {name: column_values(batch.column(name), path, name, first) for name in batch.schema.names}
            yield from (dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True))
            first += len(batch)


def column_values(column: pa.Array | pa.ChunkedArray, path: Path | str, name: str, first: int = 0) -> list[Any]:
    """Return the values of a column.

    Args:
        column: the column, or a part of it.
        path, name: of file and column, for the message.
        first: index of the first value in the file.

    Raises:
        DataError: text that is not UTF-8.
    """
    try:
        return column.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        for index in range(len(column)):
            _check_value(column[index], path, name, first + index)
        raise


def _check_value(value: pa.Scalar, path: Path | str, name: str, row: int) -> None:
    try:
        value.as_py()
    except UnicodeDecodeError as error:
        raise DataError(
            f"row {row} of {path} has text in column {name!r} that is not UTF-8 ({error.reason}): write the file again with "
            "valid text, or drop the row"
        ) from error


@contextmanager
def damage_refused(path: Path | str) -> Iterator[None]:
    """Turn the errors of a damaged file into DataError while the body reads it."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} cannot be read to its end ({reason}): copy or write it again") from error


def decoded_records(records: Iterable[Mapping[str, Any]], source: str) -> Iterator[Mapping[str, Any]]:
    """Yield the records of a library; DataError names the row that it cannot decode."""
    index, rows = 0, iter(records)
    while True:
        try:
            record = next(rows, None)
        except (UnicodeDecodeError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"row {index} of {source} cannot be read ({reason}): write it again, or drop the row") from error
        if record is None:
            return
        yield record
        index += 1
