"""Read text as a stream of rows: paragraphs of a .txt file, JSONL, Parquet, a `datasets` directory or a hub dataset.

The text column of a table holds texts, lists of token ids made by a tokenizer before, padding included, or conversations: lists
of messages with `role` and `content` (or `from` and `value`, as ShareGPT has them).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from ksweep.activations.messages import is_conversation, messages_identity, read_messages
from ksweep.config.spec import Activations
from ksweep.utils.bos_token import text_gets_second_bos
from ksweep.utils.errors import DataError
from ksweep.utils.files import json_lines, named_path
from ksweep.utils.hub import content_digest, note_revision
from ksweep.utils.imports import digest_of_named, is_dotted_name, load_named
from ksweep.utils.plain_values import has_lone_surrogate

Format = Literal["txt", "jsonl", "parquet", "datasets", "hub", "own"]

Holds = Literal["text", "token_ids", "messages"]

TEXT_FIELD = "activations.text"

JSON_CONVERSATION = re.compile(r"""\s*\[\s*\{\s*['"](role|from|content|value)['"]\s*:""")
"""Beginning of a conversation that was written as JSON, or as Python prints it."""

HUB_DATASET = re.compile(r"^(?:datasets/)?(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?$")


@dataclass(frozen=True)
class TextRow:
    """A row of text. The activations of a row depend on this row alone."""

    index: int
    row_id: str
    """Key of the row's positions: the `row_id` column; else "repo:split:index" of a hub dataset (the public NLA rule); else
    "row:index"."""
    document: str
    """Cluster of the bootstrap: the document column, or the row id without one."""
    text: str
    token_ids: tuple[int, ...] | None = None
    """Token ids of a pretokenised row, used unchanged, padding included; such a row has no text."""
    messages: tuple[Mapping[str, Any], ...] | None = None
    """Messages of a conversation, which has no text until the base model's chat template has written it."""

    @property
    def holds_something(self) -> bool:
        """Whether the row is neither null nor empty."""
        return bool(self.token_ids or self.messages or self.text.strip())


@dataclass(frozen=True)
class HubDataset:
    """A hub dataset at a commit."""

    repo: str
    config: str | None
    revision: str


def read_documents(activations: Activations) -> Iterator[TextRow]:
    """Yield the rows of `activations.text` in order. Rows without text are yielded as empty, so that indices count all rows.

    Raises:
        DataError: no such text, an unknown format, a missing column, a value that is neither text nor token ids, a mix of both,
            or no text at all.
    """
    any_text = False
    for row in _rows(activations):
        any_text |= row.holds_something
        yield row
    if not any_text:
        column = "" if text_format(activations) == "txt" else f" in column {activations.text_column!r}"
        raise DataError(f"{activations.text} holds no text{column}: expected at least one row that is not empty")


def first_row(activations: Activations) -> TextRow | None:
    """Return the first row of the text, as it stands there, that is not empty."""
    return next((row for row in read_documents(activations) if row.holds_something), None)


def text_identity(activations: Activations) -> dict[str, object]:
    """Return what identifies the text: content digest (or hub commit), format, column, kind and split; never the path.

    Local files are read up to their first text, so that an empty file or a mistyped column is found while planning.

    Raises:
        DataError: as `read_documents`.
    """
    kind = text_format(activations)
    identity: dict[str, object] = {"format": kind, "document_column": activations.document_column}
    if kind != "txt":
        identity["column"] = activations.text_column
    if kind == "hub":
        hub = hub_dataset(activations.text or "")
        note_revision(f"datasets/{hub.repo}@{hub.revision}")
        return identity | {"hub": hub.repo, "config": hub.config, "revision": hub.revision, "split": activations.text_split}
    if kind == "datasets":
        identity["split"] = activations.text_split
    source = activations.text or ""
    first = first_row(activations)
    if first is not None and first.token_ids is not None:
        identity["holds"] = "token_ids"
    if first is not None and first.messages is not None:
        identity["holds"] = "messages"
        identity |= messages_identity(_first_value(activations))
    if kind == "own":
        return identity | {"name": source, "digest": digest_of_named(source, load_named(source, TEXT_FIELD), TEXT_FIELD)}
    return identity | {"digest": content_digest(_local(activations))}


def text_begins_with_bos(activations: Activations, model: Path) -> bool:
    """Return whether the first row that is not empty begins with the BOS that the model's tokenizer adds to texts.

    False for a hub dataset, whose rows are not read while planning: `TextUnits` raises an error if they begin with BOS.

    Raises:
        DataError: as `read_documents`.
    """
    if text_format(activations) == "hub":
        return False
    first = first_row(activations)
    return first is not None and first.token_ids is None and text_gets_second_bos(first.text, model)


def text_format(activations: Activations) -> Format:
    """Return the format of the text at a path, "hub" for a hub dataset id, "own" for the dotted name of a text source.

    Raises:
        DataError: nothing at the path, or an unknown format.
    """
    source = activations.text or ""
    path = _local(activations)
    if is_dotted_name(source):
        return "own"
    if path.is_dir():
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return "datasets"
        raise DataError(
            f"text directory {path} is not a `datasets` directory (no state.json or dataset_dict.json as save_to_disk writes): "
            "name one .txt, .jsonl or .parquet file in it, or save it with datasets"
        )
    if path.is_file():
        return _file_format(path)
    if HUB_DATASET.match(source) and path.suffix not in (".txt", ".jsonl", ".parquet"):
        return "hub"
    raise DataError(
        f"no text at {source!r}: expected an existing .txt, .jsonl or .parquet file, a `datasets` directory, or a hub dataset id "
        "(owner/name, owner/name:config, owner/name@revision). Check the spelling, and that a relative path starts from the "
        "current directory."
    )


def _file_format(path: Path) -> Format:
    formats: dict[str, Format] = {".txt": "txt", ".jsonl": "jsonl", ".parquet": "parquet"}
    if path.suffix.lower() not in formats:
        raise DataError(f"text file {path} ends in {path.suffix or 'nothing'!r}; expected one of {', '.join(formats)}")
    if path.stat().st_size == 0:
        raise DataError(f"text file {path} is empty (0 bytes): was it written to the end?")
    return formats[path.suffix.lower()]


def _local(activations: Activations) -> Path:
    return named_path(activations.text or "", DataError)


def _rows(activations: Activations) -> Iterator[TextRow]:
    if text_format(activations) == "txt":
        yield from (TextRow(i, f"row:{i}", f"row:{i}", text) for i, text in enumerate(_paragraphs(_local(activations))))
    else:
        yield from _named(_records(activations), activations)


def rows_of_columns(activations: Activations, columns: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the row id of every row of a text with its record, which has these columns besides those of the text.

    Raises:
        DataError: as `read_documents`; a .txt file has no columns.
    """
    if text_format(activations) == "txt":
        raise DataError(f"{activations.text} is a .txt file, which has no columns {', '.join(columns)}: give .jsonl or .parquet")
    prefix = _row_prefix(activations)
    for index, record in enumerate(_records(activations, columns)):
        yield _row_id(record, prefix, index), record


def _records(activations: Activations, columns: Sequence[str] = ()) -> Iterable[Mapping[str, Any]]:
    """Return the records of a table, in order, with these columns besides those that are always read."""
    kind, path = text_format(activations), _local(activations)
    if kind == "jsonl":
        return json_lines(path)
    if kind == "parquet":
        return _parquet_rows(path, activations, columns)
    if kind == "own":
        return _own_rows(activations)
    from ksweep.utils.parquet_rows import decoded_records

    if kind == "datasets":
        return decoded_records(_saved_dataset(path, activations, columns), str(path))
    return decoded_records(_hub_rows(hub_dataset(activations.text or ""), activations), activations.text or "")


def _row_prefix(activations: Activations) -> str:
    if text_format(activations) != "hub":
        return "row"
    return f"{hub_dataset(activations.text or '').repo}:{activations.text_split}"


def _row_id(record: Mapping[str, Any], prefix: str, index: int) -> str:
    return str(record["row_id"]) if record.get("row_id") is not None else f"{prefix}:{index}"


def _own_rows(activations: Activations) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a text source of the user's: texts, or records with the text column.

    Raises:
        SpecError: the source cannot be imported. DataError: what it gives are no rows.
    """
    source = activations.text or ""
    named = load_named(source, TEXT_FIELD)
    rows = named() if callable(named) else named
    if isinstance(rows, str) or not isinstance(rows, Iterable):
        raise DataError(
            f"{TEXT_FIELD}={source} gives a {type(rows).__name__}; expected texts or records (docs/extending.md), in the same "
            "order every time"
        )
    for index, row in enumerate(rows):
        if not isinstance(row, (str, Mapping)):
            raise DataError(
                f"row {index} of {TEXT_FIELD}={source} is a {type(row).__name__}; expected a text, or a record such as "
                f"{{{activations.text_column!r}: '...', 'document': '...'}}"
            )
        yield {activations.text_column: row} if isinstance(row, str) else row


def _named(records: Iterable[Mapping[str, Any]], activations: Activations) -> Iterator[TextRow]:
    """Yield the records of a table as rows: text or token ids, document and row id from their columns."""
    prefix = _row_prefix(activations)
    kind, numbered = _begin(records, activations)
    for index, record in numbered:
        value = _value(record, activations.text_column, "text_column", index, activations)
        value = None if _is_empty(value) and not (kind == "text" and isinstance(value, str)) else value
        where = f"row {index} of {activations.text}", f"in column {activations.text_column!r}"
        row_id = _row_id(record, prefix, index)
        document = _document(record, row_id, index, activations)
        if kind == "token_ids":
            yield TextRow(index, row_id, document, "", _token_ids(value, *where))
        elif kind == "messages":
            yield TextRow(index, row_id, document, "", messages=read_messages(value, *where))
        else:
            yield TextRow(index, row_id, document, _text(value, *where))


def _begin(
    records: Iterable[Mapping[str, Any]], activations: Activations
) -> tuple[Holds, Iterator[tuple[int, Mapping[str, Any]]]]:
    """Return what the column holds, by its first value that is not empty, and all records, numbered.

    Raises:
        DataError: a conversation that was written as JSON, and would be taken for plain text.
    """
    numbered, seen, column = enumerate(records), [], activations.text_column
    for index, record in numbered:
        seen.append((index, record))
        if not _is_empty(record.get(column, "missing")):
            break
    value = seen[-1][1].get(column) if seen else None
    if isinstance(value, str) and JSON_CONVERSATION.match(value):
        raise DataError(
            f"row {seen[-1][0]} of {activations.text} has a conversation written as JSON in column {column!r}, which would be "
            "taken for plain text: read it (json.loads) and save it as a list of messages, or do so in a text source of your own "
            "(docs/extending.md)"
        )
    kind: Holds = "messages" if is_conversation(value) else "token_ids" if isinstance(value, list) else "text"
    return kind, chain(seen, numbered)


def _is_empty(value: Any) -> bool:
    return not value.strip() if isinstance(value, str) else value is None or value in ([], {})


def _first_value(activations: Activations) -> Any:
    """Return the first value of the text column, as it stands there, that is not empty."""
    values = (record.get(activations.text_column) for record in _records(activations))
    return next((value for value in values if not _is_empty(value)), None)


def _text(value: Any, row: str, column: str) -> str:
    if isinstance(value, str) and has_lone_surrogate(value):
        raise DataError(f"{row} has half of a surrogate pair {column}, which is no character: correct or drop it")
    if value is None or isinstance(value, str):
        return value or ""
    raise DataError(
        f"{row} has a {type(value).__name__} {column}; expected text, or in every row a list of token ids. "
        "Is activations.text_column the right one?"
    )


def _token_ids(value: Any, row: str, column: str) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise DataError(
            f"{row} has a {type(value).__name__} {column}, where earlier rows have lists of token ids: make all alike"
        )
    for index, token in enumerate(value):
        if type(token) is not int:  # bool is an int, too
            raise DataError(
                f"{row} has a list {column} with {str(token)[:50]!r} ({type(token).__name__}) at index {index}; expected token "
                "ids, which are whole numbers, or text. Is activations.text_column the right one?"
            )
    return tuple(value)


def _document(record: Mapping[str, Any], row_id: str, index: int, activations: Activations) -> str:
    if activations.document_column is None:
        value = record.get("document")
    else:
        value = _value(record, activations.document_column, "document_column", index, activations)
    return row_id if value is None else str(value)


def _value(record: Mapping[str, Any], column: str, field: str, index: int, activations: Activations) -> Any:
    if column in record:
        return record[column]
    raise DataError(
        f"row {index} of {activations.text} has no column {column!r}; it has {', '.join(map(str, record)) or 'none'}. "
        f"Set activations.{field} to the right one."
    )


def _paragraphs(path: Path) -> Iterator[str]:
    """Yield the blocks of lines between blank lines."""
    block: list[str] = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line in file:
                if line.strip():
                    block.append(line)
                elif block:
                    yield "".join(block).strip()
                    block = []
    except UnicodeDecodeError as error:
        raise DataError(f"text file {path} is not UTF-8 ({error.reason}): convert it first") from error
    if block:
        yield "".join(block).strip()


def _parquet_rows(path: Path, activations: Activations, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ksweep.utils.parquet_rows import parquet_rows

    try:
        with pq.ParquetFile(path) as file:
            wanted = _columns(file.schema_arrow.names, activations, columns)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"text file {path} is not a readable Parquet file ({error}); is it whole?") from error
    yield from parquet_rows(path, wanted, batch_size=256)


def _columns(present: list[str], activations: Activations, columns: Sequence[str]) -> list[str]:
    """Return the columns to read; all of them if one is missing, so that an error can list them."""
    if activations.text_column not in present or activations.document_column not in (None, *present) or {*columns} - {*present}:
        return present
    wanted = {activations.text_column, activations.document_column or "document", "row_id", *columns}
    return [name for name in present if name in wanted]


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "this text needs the package `datasets`, which is not installed: pip install 'ksweep[datasets]', or give a .txt, "
            ".jsonl or .parquet file"
        ) from error
    return datasets


def _saved_dataset(path: Path, activations: Activations, columns: Sequence[str]) -> Iterable[Mapping[str, Any]]:
    datasets = _datasets()
    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"`datasets` cannot load {path} ({error}); is the directory whole?") from error
    if isinstance(dataset, Mapping):
        if activations.text_split not in dataset:
            splits = ", ".join(dataset)
            raise DataError(f"{path} has no split {activations.text_split!r}; it has {splits}. Set activations.text_split.")
        dataset = dataset[activations.text_split]
    # With a saved format (torch, numpy) rows would hold tensors instead of lists.
    rows: Iterable[Mapping[str, Any]] = dataset.with_format(None).select_columns(
        _columns(dataset.column_names, activations, columns)
    )
    return rows


@cache
def hub_dataset(source: str) -> HubDataset:
    """Return repository, configuration and commit of "owner/name:config@revision". A process asks the hub only once.

    Raises:
        DataError: the hub cannot be reached or has no such dataset.
    """
    match = HUB_DATASET.match(source)
    assert match, source
    repo, config, revision = match["repo"], match["config"], match["revision"]
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return HubDataset(repo, config, revision)
    from huggingface_hub import HfApi

    try:
        sha = HfApi().dataset_info(repo, revision=revision).sha
    except Exception as error:  # which HTTP library's errors come through depends on the hub client's version
        raise DataError(
            f"text {source!r} is neither a local path nor available from the hub ({_brief(error)}). "
            "Check the spelling, log in for gated datasets (hf auth login), name a full commit (owner/name@<40 hex digits>) to "
            "work from the local hub cache, or pass a local file."
        ) from error
    assert sha
    return HubDataset(repo, config, sha)


def _hub_rows(hub: HubDataset, activations: Activations) -> Iterable[Mapping[str, Any]]:
    datasets = _datasets()
    try:
        rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(
            hub.repo, name=hub.config, split=activations.text_split, revision=hub.revision, streaming=True
        )
    except Exception as error:  # the library raises a dozen unrelated classes for a wrong split, configuration or network
        raise DataError(
            f"hub dataset {hub.repo} (configuration {hub.config}, split {activations.text_split!r}, commit {hub.revision[:8]}) "
            f"cannot be opened: {_brief(error)}. Set activations.text_split, or name a configuration as owner/name:config."
        ) from error
    return rows


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
