"""Read texts that somebody already has: a .jsonl or .parquet file with a row for each text, which names its activation.

row_id        row of the text (or of the file of vectors) that the activation is from; a file that holds the vectors itself may
              leave it out, and then every row is an activation of its own ("row:0", "row:1", ...)
position      token of that row, as in exported draws; without it n_raw_tokens - 1, as in the public files; may be left out where
              a row gives one activation
explanation   the text, or `text`, or the column that the spec names; null is a failed draw

Other columns may be named in scoring.groups.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ksweep.utils.errors import DataError
from ksweep.utils.files import json_lines, named_path
from ksweep.utils.parquet_rows import parquet_rows
from ksweep.utils.sidecar_keys import abbreviated

ROW_ID, POSITION, NUM_RAW_TOKENS, VECTOR = "row_id", "position", "n_raw_tokens", "activation_vector"
TEXT_COLUMNS = ("explanation", "text")
"""Columns of texts unless the spec names one. Exported draws have both, and `text` then still has the AV's tags."""

ActivationName = tuple[str, int | None]
"""Row id and position; the position is None for every activation if a file states none."""


@dataclass(frozen=True, eq=False)
class TextsFile:
    """The texts of a file by activation."""

    path: Path
    column: str
    """Column that the texts are from."""
    columns: tuple[str, ...]
    texts: Mapping[ActivationName, Sequence[str | None]]
    """Texts of each activation in the order of the file; None where a row has null."""
    digest: str
    """Of names and texts: other columns, the format of the file and the order of its activations do not change it."""

    @property
    def has_positions(self) -> bool:
        """Whether activations are named by row id and position."""
        return any(position is not None for _, position in self.texts)

    @property
    def fewest(self) -> int:
        """Number of texts that every activation has."""
        return min(map(len, self.texts.values()))

    @property
    def most(self) -> int:
        """Largest number of texts of an activation."""
        return max(map(len, self.texts.values()))

    def group_values(self, column: str) -> dict[ActivationName, str | None]:
        """Return the value of a column, as text, for each activation; None where it is null or empty.

        Raises:
            DataError: texts of one activation have different values.
        """
        values: dict[ActivationName, str | None] = {}
        for index, record in enumerate(_records(self.path, self.columns, (*_name_columns(self.columns), column))):
            name = _name(record, index, self.path, self.columns)
            value = record.get(column)
            text = None if value in (None, "") else str(value)
            if values.setdefault(name, text) != text:
                raise DataError(
                    f"scoring.groups has {column!r}, and {self.path} has {values[name]!r} and {text!r} in it for texts of one "
                    f"activation ({name_text(name)}): groups are of activations. Make it the same in all rows of an activation, "
                    "or score each kind of text as a file of its own."
                )
        return values

    def digest_of_groups(self, column: str) -> str:
        """Return a digest of the value of a column for each activation; the order of the file does not change it."""
        values = self.group_values(column).items()
        return hashlib.sha256(json.dumps(sorted(values, key=lambda item: _order(item[0]))).encode()).hexdigest()[:32]


def read_texts_file(source: str, column: str | None = None) -> TextsFile:
    """Return the texts of a file. A file that has not changed is read once per process.

    Args:
        source: path of a .jsonl or .parquet file.
        column: column of the texts; None takes the first of TEXT_COLUMNS that there is.

    Raises:
        DataError: no such file, another format, a missing column, a row without a name, or no rows.
    """
    path = named_path(source, DataError)
    if not path.is_file():
        raise DataError(
            f"no file of texts at {source!r}: expected .jsonl or .parquet with the columns {ROW_ID} and {TEXT_COLUMNS[1]}; check "
            "the path, which starts from the current directory"
        )
    stat = path.stat()
    return _read(path, column, stat.st_size, stat.st_mtime_ns)


def name_text(name: ActivationName) -> str:
    """Return how messages name an activation: "row:3", or "row:3 at position 57"."""
    row_id, position = name
    return row_id if position is None else f"{row_id} at position {position}"


@lru_cache(maxsize=2)
def _read(path: Path, column: str | None, size: int, changed: int) -> TextsFile:
    # 1. Find the columns.
    columns = _columns(path)
    asked = column or next((name for name in TEXT_COLUMNS if name in columns), TEXT_COLUMNS[-1])
    _check_columns(path, columns, asked)
    # 2. Collect the texts of each activation, in the order of the file.
    texts: dict[ActivationName, list[str | None]] = {}
    for index, record in enumerate(_records(path, columns, (*_name_columns(columns), asked))):
        text = record.get(asked)
        if text is not None and not isinstance(text, str):
            raise DataError(
                f"row {index} of {path} has a {type(text).__name__} in column {asked!r}; expected text, or null for a failed "
                "draw. Is autoencoder.texts_column the right one?"
            )
        texts.setdefault(_name(record, index, path, columns), []).append(text)
    # 3. Digest names and texts.
    digest = hashlib.sha256()
    for name in sorted(texts, key=_order):
        digest.update(json.dumps([name, texts[name]]).encode() + b"\n")
    return TextsFile(path, asked, columns, texts, digest.hexdigest()[:32])


def _order(name: ActivationName) -> tuple[str, int]:
    return name[0], -1 if name[1] is None else name[1]


def _columns(path: Path) -> tuple[str, ...]:
    """Return the columns of a file; of .jsonl those of the first object."""
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".parquet"):
        raise DataError(f"file of texts {path} ends in {path.suffix or 'nothing'!r}; expected .jsonl or .parquet")
    if path.stat().st_size == 0:
        raise DataError(f"file of texts {path} is empty (0 bytes): was it written to the end?")
    if suffix == ".jsonl":
        first = next(json_lines(path), None)
        columns, num_rows = tuple(map(str, first or ())), int(first is not None)
    else:
        try:
            with pq.ParquetFile(path) as file:
                columns, num_rows = tuple(file.schema_arrow.names), file.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"file of texts {path} is not a readable Parquet file ({error}); is it whole?") from error
    if not num_rows:
        raise DataError(f"file of texts {path} has no rows")
    return columns


def _check_columns(path: Path, columns: Sequence[str], text: str) -> None:
    has = f"it has {', '.join(columns)}"
    if text not in columns:
        raise DataError(f"{path} has no column {text!r} of texts; {has}. Set autoencoder.texts_column to the right one.")
    if ROW_ID not in columns and VECTOR not in columns:
        raise DataError(
            f"{path} has no column {ROW_ID!r}, which names the activation of each text; {has}. Add it (exported draws have it; "
            f'without a column row_id in the text of the activations its rows are "row:0", "row:1", ...), or the activations '
            f"themselves as a column {VECTOR!r} of a Parquet file."
        )


def _name_columns(columns: Sequence[str]) -> tuple[str, ...]:
    if ROW_ID not in columns:
        return ()
    position = next((name for name in (POSITION, NUM_RAW_TOKENS) if name in columns), None)
    return (ROW_ID,) if position is None else (ROW_ID, position)


def _name(record: Mapping[str, Any], index: int, path: Path, columns: Sequence[str]) -> ActivationName:
    if ROW_ID not in columns:
        return f"row:{index}", None
    if (row_id := record.get(ROW_ID)) is None:
        raise DataError(f"row {index} of {path} has no {ROW_ID}: every text needs the row id of its activation")
    names = _name_columns(columns)[1:]
    value = record.get(names[0]) if names else None
    if value is None or value != value:  # pandas writes a missing number as NaN
        return str(row_id), None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 2**31 or value != value // 1:
        raise DataError(
            f"row {index} of {path} has {abbreviated(value)} in column {names[0]!r}; expected a whole number, the index of "
            "a token"
        )
    return str(row_id), int(value) - (names[0] == NUM_RAW_TOKENS)


def _records(path: Path, columns: Sequence[str], wanted: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    if path.suffix.lower() == ".jsonl":
        yield from json_lines(path)
        return
    yield from parquet_rows(path, [name for name in columns if name in wanted], batch_size=4096)
