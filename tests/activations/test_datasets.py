"""Every kind of text gives the same rows; what cannot be read is refused with what to do about it."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ksweep.activations.datasets import hub_dataset, read_documents, text_format, text_identity
from ksweep.config.spec import Activations
from ksweep.utils.errors import DataError
from ksweep.utils.hub import noted_revisions
from tests.activations.helpers import write_jsonl

TEXTS = ["First row.\nIts second line.", "Zweite Zeile – ü.", "third"]
DOCUMENTS = ["a", "a", "b"]


def request(path: Path | str, **fields: Any) -> Activations:
    return Activations(model="unused", text=str(path), **fields)


def save(kind: str, directory: Path) -> Path:
    path = directory / f"text.{kind}"
    if kind == "txt":
        path.write_text("\n\n" + "\n \n\n".join(TEXTS) + "\n", encoding="utf-8-sig")
    elif kind == "jsonl":
        write_jsonl(path, TEXTS, document=DOCUMENTS)
    elif kind == "parquet":
        pq.write_table(pa.table({"text": TEXTS, "document": DOCUMENTS, "other": [1, 2, 3]}), path, row_group_size=2)
    else:
        datasets = pytest.importorskip("datasets")
        rows = datasets.Dataset.from_dict({"text": TEXTS, "document": DOCUMENTS})
        (datasets.DatasetDict({"train": rows}) if kind == "splits" else rows).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "dataset", "splits"])
def test_read_documents_gives_the_same_rows_from_every_format(tmp_path: Path, kind: str) -> None:
    rows = list(read_documents(request(save(kind, tmp_path))))
    assert [row.text for row in rows] == TEXTS
    assert [row.row_id for row in rows] == ["row:0", "row:1", "row:2"]
    assert [row.document for row in rows] == (["row:0", "row:1", "row:2"] if kind == "txt" else DOCUMENTS)


def test_read_documents_takes_the_named_columns(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", ["x", "y"], body=["one", "two"], book=[7, None], row_id=["p", "q"])
    rows = list(read_documents(request(path, text_column="body", document_column="book")))
    assert [(r.text, r.document, r.row_id) for r in rows] == [("one", "7", "p"), ("two", "q", "q")]


def test_read_documents_keeps_the_index_of_rows_without_text(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": null}\n\n{"text": "words"}\n')
    assert [(r.index, r.text) for r in read_documents(request(path))] == [(0, ""), (1, "words")]


@pytest.mark.parametrize(
    ("name", "content", "fields", "says"),
    [
        ("t.txt", "", {}, "empty"),
        ("t.txt", "\n  \n", {}, "no text"),
        ("t.jsonl", '{"text": ""}\n', {}, "no text in column 'text'"),
        ("t.jsonl", '{"body": "x"}\n', {}, "no column 'text'; it has body.*text_column"),
        ("t.jsonl", '{"text": "x"}\n', {"document_column": "book"}, "no column 'book'; it has text.*document_column"),
        ("t.jsonl", '{"text": 3}\n', {}, "a int in column 'text'"),
        ("t.jsonl", '{"text": "x"\n', {}, "line 1 .* not JSON"),
        ("t.jsonl", '["x"]\n', {}, "is a list; expected an object"),
        ("t.parquet", "not parquet", {}, "not a readable Parquet"),
        ("t.csv", "text\nx\n", {}, "ends in '.csv'.*.txt, .jsonl, .parquet"),
    ],
)
def test_bad_text_is_refused_with_what_to_do(tmp_path: Path, name: str, content: str, fields: dict[str, Any], says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=says):
        list(read_documents(request(tmp_path / name, **fields)))
    with pytest.raises(DataError, match=says):
        text_identity(request(tmp_path / name, **fields))


def test_missing_column_of_a_parquet_file_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column 'body'; it has text, document, other"):
        text_identity(request(save("parquet", tmp_path), text_column="body"))


def test_missing_file_directory_and_split_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text at"):
        text_identity(request(tmp_path / "nothing.txt"))
    with pytest.raises(DataError, match="not a `datasets` directory"):
        text_identity(request(tmp_path))
    with pytest.raises(DataError, match=r"no split 'test'; it has train"):
        list(read_documents(request(save("splits", tmp_path), text_split="test")))
    (tmp_path / "latin.txt").write_bytes("größer".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        list(read_documents(request(tmp_path / "latin.txt")))


def test_datasets_package_missing_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = save("dataset", tmp_path), builtins.__import__

    def without_datasets(name: str, *rest: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(DataError, match=r"pip install 'ksweep\[datasets\]'"):
        list(read_documents(request(path)))


def test_identity_of_text_is_its_content_and_not_its_path(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first, again = save("jsonl", tmp_path), save("jsonl", tmp_path / "other")
    assert text_identity(request(first)) == text_identity(request(again))
    assert text_identity(request(first)) != text_identity(request(first, text_column="document"))
    again.write_text(again.read_text() + '{"text": "more"}\n')
    assert text_identity(request(first)) != text_identity(request(again))


def test_hub_dataset_at_a_full_commit_needs_no_hub() -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    found = hub_dataset(f"owner/name:config@{commit}")
    assert hub_dataset(f"datasets/owner/name:config@{commit}") == found, "as a record spells it"
    with noted_revisions() as revisions:
        text_identity(request(f"owner/name:config@{commit}"))
    assert revisions == {f"datasets/owner/name@{commit}"}
    assert (found.repo, found.config, found.revision) == ("owner/name", "config", commit)
    identity = text_identity(request(f"owner/name:config@{commit}"))
    assert identity["revision"] == commit and identity["split"] == "train"
    assert text_format(request("owner/name")) == "hub"


def test_hub_rows_are_streamed_at_the_commit_and_named_as_the_public_data_are(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets, asked = pytest.importorskip("datasets"), {}
    commit = "0123456789abcdef0123456789abcdef01234567"

    def load_dataset(repo: str, **options: Any) -> Any:
        asked.update(options, repo=repo)
        return iter([{"text": "one"}, {"text": "two"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = list(read_documents(request(f"owner/corpus:config@{commit}", text_split="en")))
    assert [row.row_id for row in rows] == ["owner/corpus:en:0", "owner/corpus:en:1"]
    assert asked == {"repo": "owner/corpus", "name": "config", "split": "en", "revision": commit, "streaming": True}


def test_hub_dataset_out_of_reach_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    with pytest.raises(DataError, match=r"neither a local path nor available from the hub.*no route to host"):
        hub_dataset("owner/unreachable")
