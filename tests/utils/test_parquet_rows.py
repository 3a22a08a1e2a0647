"""Text that is no text, and damaged files: refused with file and row wherever text, vectors and given texts are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ksweep.activations.datasets import read_documents
from ksweep.activations.vector_source import VectorUnits, are_of_one_document, rows_by_activation
from ksweep.autoencoder.texts_file import read_texts_file
from ksweep.config.spec import Activations
from ksweep.utils.errors import DataError
from tests.activations.helpers import vector_spec

BAD_ROW = 5
GOOD = [f"text {i}" for i in range(8)]


def with_bad_utf8(texts: list[str]) -> pa.Array:
    """Texts of which that of row 5 holds the byte 0xFF, as a careless writer leaves it."""
    data = [text.encode() for text in texts]
    data[BAD_ROW] = b"caf\xff"
    binary = pa.array(data, pa.binary())
    return pa.StringArray.from_buffers(len(data), binary.buffers()[1], binary.buffers()[2])


def write(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def vectors() -> pa.Array:
    return pa.array(np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32).tolist(), pa.list_(pa.float32(), 4))


def documents(path: Path, **fields: Any) -> list[Any]:
    return list(read_documents(Activations(model="m", text=str(path), num_activations=1, **fields)))


def of_text(path: Path, bad: Any) -> Any:
    return lambda: documents(write(path, text=bad))


def of_document(path: Path, bad: Any) -> Any:
    return lambda: documents(write(path, text=GOOD, source=bad), document_column="source")


def of_vectors(path: Path, bad: Any) -> Any:
    return lambda: list(VectorUnits(vector_spec(write(path, activation_vector=vectors(), doc_id=bad), 8)).units([0]))


def of_window(path: Path, bad: Any) -> Any:
    return lambda: list(
        VectorUnits(vector_spec(write(path, activation_vector=vectors(), detokenized_text_truncated=bad), 8)).units([0])
    )


def of_names(path: Path, bad: Any) -> Any:
    return lambda: rows_by_activation(write(path, activation_vector=vectors(), name=bad), "name")


def of_one_document(path: Path, bad: Any) -> Any:
    return lambda: are_of_one_document(vector_spec(write(path, activation_vector=vectors(), doc_id=bad), 8))


def of_given_texts(path: Path, bad: Any) -> Any:
    return lambda: read_texts_file(str(write(path, row_id=[f"row:{i}" for i in range(8)], text=bad)))


def of_given_names(path: Path, bad: Any) -> Any:
    return lambda: read_texts_file(str(write(path, row_id=bad, text=GOOD)))


READERS = (of_text, of_document, of_vectors, of_window, of_names, of_one_document, of_given_texts, of_given_names)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_text_that_is_not_utf8_is_refused_with_file_and_row(reader: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    with pytest.raises(DataError, match=f"row {BAD_ROW} of .*x.parquet has text in column .* that is not UTF-8"):
        reader(path, with_bad_utf8(GOOD))()
    reader(tmp_path / "good.parquet", GOOD)()


@pytest.mark.parametrize("reader", [of_text, of_vectors, of_given_texts], ids=lambda reader: reader.__name__)
def test_parquet_with_damaged_pages_is_refused_with_its_file(reader: Callable[..., Any], tmp_path: Path) -> None:
    """Every eighth byte before the footer is flipped, one after another: what goes unnoticed ends like a whole file."""
    whole = tmp_path / "whole.parquet"
    reader(whole, GOOD)()
    good, path, refused = whole.read_bytes(), tmp_path / "x.parquet", 0
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    read = {
        of_text: documents,
        of_vectors: lambda p: list(VectorUnits(vector_spec(p, 8)).units([0])),
        of_given_texts: lambda p: read_texts_file(str(p)),
    }
    for at in range(4, footer, 8):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :])
        try:
            read[reader](path)
        except DataError as error:
            refused += 1
            assert "x.parquet" in str(error)
    assert refused > 0


@pytest.mark.parametrize("line", [b'{"text": "a\\ud800", "row_id": "r"}', b'{"text": "a", "row_id": "\\udc00"}',
                                  b'{"text": "\xff", "row_id": "r"}', b'{"text": "a", "row_id": ' + b"[" * 20_000])  # fmt: skip
def test_line_of_json_that_is_no_text_is_refused_with_file_and_line(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "good", "row_id": "g"}\n' + line + b"\n")
    for read in (documents, lambda path: read_texts_file(str(path))):
        with pytest.raises(DataError, match=r"line 2 of .*x\.jsonl"):
            read(path)


@pytest.mark.parametrize("value", ["abc", "1", 2.5, float("inf"), -float("inf"), 1e300, True, "9" * 5000])
def test_position_that_is_no_index_is_refused_with_its_row(value: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", activation_vector=vectors(), name=GOOD, n_raw_tokens=[value] * 8)
    for read in (lambda: list(VectorUnits(vector_spec(path, 8)).units([0])), lambda: rows_by_activation(path, "name")):
        with pytest.raises(DataError, match=r"row 0 of .*x\.parquet has .* in column 'n_raw_tokens'") as caught:
            read()
        assert len(str(caught.value)) < 500
    given = write(tmp_path / "given.parquet", row_id=GOOD, text=GOOD, n_raw_tokens=[value] * 8)
    with pytest.raises(DataError, match=r"row 0 of .*given\.parquet has .* in column 'n_raw_tokens'"):
        read_texts_file(str(given))
