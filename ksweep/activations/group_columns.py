"""Look up columns of a text, or of a file of vectors, at the rows that activations come from, to group activations by them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ksweep.activations.datasets import rows_of_columns, text_format
from ksweep.config.spec import Activations
from ksweep.utils.errors import DataError

MOST_GROUPS = 100
"""Different values of a column; more are no groups, but numbers or names of rows."""


def check_group_columns(activations: Activations, columns: Sequence[str]) -> None:
    """Check that the first row of the text or of the file of vectors has the columns. Rows of a hub dataset are not read.

    Raises:
        DataError: it lacks one, or has no columns at all.
    """
    if not columns or (activations.vectors is None and text_format(activations) == "hub"):
        return
    if (first := next(_rows(activations, columns), None)) is not None:
        _check_present(first[1], activations, columns)


def group_values(activations: Activations, columns: Sequence[str], row_ids: Sequence[str]) -> dict[str, list[str | None]]:
    """Return the value of each column, as text, at the row of each activation; None where the row has none.

    Raises:
        DataError: a column is missing, or has more than MOST_GROUPS values.
    """
    values: dict[str, dict[str, str | None]] = {column: {} for column in columns}
    if not columns:
        return {}
    wanted, is_first = set(row_ids), True
    for row_id, record in _rows(activations, columns):
        if is_first:  # later records of .jsonl may lack a column where it has no value
            _check_present(record, activations, columns)
            is_first = False
        if row_id not in wanted:
            continue
        for column in columns:
            value = record.get(column)
            values[column][row_id] = None if value in (None, "") else str(value)
        wanted.discard(row_id)
        if not wanted:
            break
    for column, of_rows in values.items():
        check_number_of_groups(column, of_rows.values(), _source(activations))
    return {column: [of_rows.get(row_id) for row_id in row_ids] for column, of_rows in values.items()}


def check_number_of_groups(column: str, values: Iterable[str | None], source: str) -> None:
    """Raise DataError if a column has more than MOST_GROUPS values."""
    if (count := len(set(values))) > MOST_GROUPS:
        raise DataError(
            f"scoring.groups has {column!r}, which has {count} values in {source}: at most {MOST_GROUPS} make groups. Put them "
            "into fewer ones in a column of their own."
        )


def _rows(activations: Activations, columns: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if activations.vectors is None:
        return rows_of_columns(activations, columns)
    return _vector_rows(activations, columns)


def _vector_rows(activations: Activations, columns: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield row ids as `VectorUnits` gives them, with the columns; where one is missing, with the names of all."""
    from ksweep.activations.vector_files import open_vectors

    named = activations.row_id_column
    with open_vectors(activations.vectors or "", activations.vector_column) as file:
        if {*columns} - {*file.schema.names}:
            yield "row:0", dict.fromkeys(file.names)
            return
        index = file.start
        for table in file.batches([*columns, *([] if named is None else [named])]):
            for record in table.to_pylist():
                yield f"row:{index}" if named is None else str(record[named]), record
                index += 1


def _check_present(record: Mapping[str, Any], activations: Activations, columns: Sequence[str]) -> None:
    if missing := [column for column in columns if column not in record]:
        raise DataError(
            f"scoring.groups has {missing[0]!r}, which is no column of {_source(activations)}; it has "
            f"{', '.join(map(str, record))}"
        )


def _source(activations: Activations) -> str:
    return activations.vectors or activations.text or ""
