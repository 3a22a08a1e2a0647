"""Ready-made vectors: what the public datasets and hand-made files hold, and what must be refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from ksweep.activations import activations_key, ensure, plan_activations, read_vectors_sidecar
from ksweep.activations.vector_source import VECTOR_ROWS_PER_UNIT, VectorUnits, are_of_one_document, vectors_layer
from ksweep.config.spec import Activations
from ksweep.utils.errors import DataError
from tests.activations.helpers import random_vectors, vector_spec, write_vectors


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_vectors_come_back_as_they_are(tmp_path: Path, fixed: bool, dtype: type) -> None:
    vectors = random_vectors(2500)  # four row groups of 700, three units of 1024
    path = write_vectors(tmp_path / "v.parquet", vectors.astype(dtype), fixed=fixed)
    table = ensure(vector_spec(path, 2500), None, tmp_path / "cache")
    assert np.array_equal(table.vectors(), vectors) and table.dtype == "float32"
    assert np.array_equal(table.vectors(1000, 1100), vectors[1000:1100])
    assert table.column("position").tolist() == [None] * 2500 and table.column("document")[3] == "row:3"


def test_public_columns_become_provenance(tmp_path: Path) -> None:
    columns = {
        "doc_id": ["c:train:0", "c:train:0", "c:train:1"],
        "n_raw_tokens": [51, 80, 60],
        "detokenized_text_truncated": ["x" * 300 + "end", "b", None],
    }
    path = write_vectors(tmp_path / "v.parquet", random_vectors(3), **columns)
    table = ensure(vector_spec(path, 3), None, tmp_path / "cache")
    assert table.column("document").tolist() == columns["doc_id"] and table.num_documents() == 2
    assert table.column("position").tolist() == [50, 79, 59]
    assert [len(window) for window in table.column("window")] == [200, 1, 0] and table.column("window")[0].endswith("end")
    assert len(set(table.column("activation_key").tolist())) == 3


def test_only_the_units_asked_for_are_read(tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "v.parquet", random_vectors(5000))
    table = ensure(vector_spec(path, 10), None, tmp_path / "cache")
    assert len(table) == 10 and len(list(table.directory.glob("*.arrow"))) == 1


def test_units_in_any_order_equal_units_in_order(tmp_path: Path) -> None:
    vectors = random_vectors(3 * VECTOR_ROWS_PER_UNIT + 5)
    source = VectorUnits(vector_spec(write_vectors(tmp_path / "v.parquet", vectors), 2))
    for index, unit in source.units([2, 0, 3, 1, 4]):
        assert np.array_equal(unit.vectors, vectors[index * VECTOR_ROWS_PER_UNIT : (index + 1) * VECTOR_ROWS_PER_UNIT])
        assert unit.is_last == (index >= 3)
        assert unit.row_ids[:1] == ([f"row:{index * VECTOR_ROWS_PER_UNIT}"] if index < 4 else [])


def test_more_vectors_than_there_are_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "v.parquet", random_vectors(7))
    for act in (plan_activations, ensure):
        with pytest.raises(DataError, match=r"has 7 rows: set activations.num_activations=7"):
            act(vector_spec(path, 8), None, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def lists(values: list[list[float | None] | None]) -> pa.Array:
    return pa.array(values, pa.list_(pa.float32()))


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (lists([[1.0, 2.0], [3.0], [4.0, 5.0, 6.0]]), "ragged: 1 to 3 numbers a row, expected 2"),  # six numbers in three rows
        (lists([[1.0, 2.0], None]), "1 rows of activation_vector are null"),
        (lists([[1.0, 2.0], [None, 3.0]]), "1 numbers of activation_vector are null"),
        (lists([[1.0, 2.0], [float("nan"), 3.0]]), r"row 'row:1' of .* is not finite in 1 of 2"),
        (lists([[1.0, 2.0], [0.0, 0.0]]), r"row 'row:1' of .* is zero everywhere"),
        (pa.array([[1.0, 1e300]], pa.list_(pa.float64())), r"row 'row:0' of .* is not finite"),
        (lists([None, [1.0]]), "row 0 of 'activation_vector' .* is null"),
        (pa.array([1.0, 2.0]), "is of type double; expected FixedSizeList"),
        (pa.array([], pa.list_(pa.float32())), "but no rows"),
    ],
)
def test_unusable_vectors_are_refused(tmp_path: Path, column: pa.Array, says: str) -> None:
    path = tmp_path / "v.parquet"
    pq.write_table(pa.table({"activation_vector": column}), path)
    with pytest.raises(DataError, match=says):
        ensure(vector_spec(path, 1), None, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/**/*.arrow"))


def test_file_that_is_no_vector_file_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "t.parquet")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nonsense")
    cases = {"t": "no column 'activation_vector'; it has text", "x": "not a readable Parquet", "n": "no file of vectors"}
    for name, says in cases.items():
        with pytest.raises(DataError, match=says):
            plan_activations(vector_spec(tmp_path / f"{name}.parquet", 1), None, tmp_path / "cache")


def sidecar(path: Path, **meta: object) -> Path:
    Path(f"{path}.nla_meta.yaml").write_text(yaml.safe_dump({"kind": "nla_dataset", "schema_version": 1, **meta}))
    return path


def test_sidecar_says_where_the_vectors_are_from(tmp_path: Path) -> None:
    extraction = {"base_model": "Qwen/Qwen2.5-7B-Instruct", "d_model": 3584, "layer_index": 20, "norm": "none", "corpus": "web"}
    found = read_vectors_sidecar(sidecar(tmp_path / "v.parquet", extraction=extraction))
    assert found is not None
    assert (found.layer, found.base_model, found.d_model, found.norm) == (20, "Qwen/Qwen2.5-7B-Instruct", 3584, "none")
    assert read_vectors_sidecar(tmp_path / "other.parquet") is None
    assert read_vectors_sidecar(sidecar(tmp_path / "bare.parquet")).layer is None  # type: ignore[union-attr]


def test_sidecar_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"kind 'nla_model'.*nla_dataset"):
        read_vectors_sidecar(sidecar(tmp_path / "v.parquet", kind="nla_model"))
    with pytest.raises(DataError, match="layer_index='twenty'"):
        read_vectors_sidecar(sidecar(tmp_path / "v.parquet", extraction={"layer_index": "twenty"}))


# documents


def documents_of(path: Path, count: int, cache: Path, column: str | None = None) -> list[str]:
    table = ensure(Activations(vectors=str(path), num_activations=count, document_column=column, rows="first"), None, cache)
    return [str(document) for document in table.column("document")]


@pytest.mark.parametrize("count", [1, 2, 3, 1500])
@pytest.mark.parametrize(
    "start", [["a", "a", "a"], ["a", "a", "b"], ["a", None, "a"], [None, "a", "a"], [None, None, "a"], [3, 3, 4], None]
)
def test_whether_vectors_are_of_one_document_is_told_as_their_table_does(
    start: list[Any] | None, count: int, tmp_path: Path
) -> None:
    columns = {} if start is None else {"doc_id": start + [start[2]] * 1495 + [7 if start[2] == 4 else "7"] * 2}
    path = write_vectors(tmp_path / "v.parquet", random_vectors(1500), **columns)
    table = ensure(vector_spec(path, count), None, tmp_path / "cache")
    assert are_of_one_document(vector_spec(path, count)) == (table.num_documents() == 1)


def test_document_column_that_is_asked_for_names_the_documents(tmp_path: Path) -> None:
    items = [f"q{i // 8}" for i in range(24)]
    path = write_vectors(tmp_path / "v.parquet", random_vectors(24), item_id=items, doc_id=[f"d{i}" for i in range(24)])
    assert documents_of(path, 24, tmp_path / "cache", "item_id") == items
    assert documents_of(path, 24, tmp_path / "cache") == [f"d{i}" for i in range(24)]  # not what the cache held of the other
    assert documents_of(path, 24, tmp_path / "cache", "doc_id") == [f"d{i}" for i in range(24)]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"doc_id": ["a", "a", "b"], "document": ["x", "y", "z"]}, ["a", "a", "b"]),
        ({"document": ["x", "x", "z"]}, ["x", "x", "z"]),
        ({"doc_id": [3, 3, None]}, ["3", "3", "row:2"]),
        ({}, ["row:0", "row:1", "row:2"]),
    ],
)
def test_documents_without_a_column_asked_for(columns: dict[str, list[Any]], expected: list[str], tmp_path: Path) -> None:
    assert documents_of(write_vectors(tmp_path / "v.parquet", random_vectors(3), **columns), 3, tmp_path / "cache") == expected


def test_documents_are_part_of_the_key_where_they_are_others_than_doc_id(tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "v.parquet", random_vectors(3), doc_id=["a", "a", "b"], item=["x", "y", "y"])
    request = vector_spec(path, 3)
    keys = {column: activations_key(replace(request, document_column=column), None)[0] for column in (None, "doc_id", "item")}
    assert keys[None] == keys["doc_id"] != keys["item"]
    assert "document_column" not in activations_key(request, None)[1]  # keys of the public files are as they were


@pytest.mark.parametrize("act", [plan_activations, ensure])
def test_document_column_that_is_missing_is_refused_with_those_there_are(act: Any, tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "v.parquet", random_vectors(3), doc_id=["a", "a", "b"])
    request = Activations(vectors=str(path), num_activations=3, document_column="item_id", rows="first")
    with pytest.raises(DataError, match=r"no column 'item_id'; it has activation_vector, doc_id\. Set .*document_column"):
        act(request, None, tmp_path / "cache")


# sidecars


@pytest.mark.parametrize("norm", ["none", None, "None", False, "raw"])
def test_sidecar_of_raw_vectors_is_read(norm: Any, tmp_path: Path) -> None:
    extraction = {"base_model": "a/b", "layer_index": 20, "norm": norm, "whitening": None, "corpus_slice": {"start": 0}}
    more = {
        "dataset_id": "base_x", "stage": "rl", "row_count": 7, "keep_debug_metadata": True, "parent_datasets": ["a"],
        "tokens": {"injection_char": "x", "anything": 1}, "prompt_templates": {"actor": "{depth_pct}"}, "git_commit": "abc",
        "api_summaries": {"model": "m", "instruction_prompt": "{text}"}, "created_at": "2026-03-13", "created_by": "nla",
    }  # fmt: skip
    found = read_vectors_sidecar(sidecar(tmp_path / "v.parquet", extraction=extraction, **more))
    assert found is not None and (found.layer, found.base_model) == (20, "a/b")


@pytest.mark.parametrize(
    ("meta", "says"),
    [
        ({"extraction": {"norm": "whitened_zca_v1"}}, r"norm='whitened_zca_v1': the vectors are not as the model gives them"),
        ({"extraction": {"norm": {"kind": "unit"}}}, r"norm={'kind': 'unit'}"),
        ({"extraction": {"whitening": {"method": "zca"}}}, r"extraction.whitening={'method': 'zca'}"),
        ({"norm": "unit"}, r"norm='unit'"),
        ({"schema_version": 3}, r"schema_version=3; 1 is understood"),
        ({"provenance": {"normalization": "l2"}}, r"provenance.normalization='l2'"),
        ({"extraction": {"projection": "pca"}}, r"extraction.projection='pca', which says how"),
        ({"checkpoints": [1]}, r"checkpoints=\[1\]"),
        ({"extraction": {"layer_index": 1}, "layer": 2}, r"names different layers: .*layer=2"),
        ({"extraction": {"base_model": "a/b"}, "base_model": "a/c"}, r"different base models"),
        ({"extraction": {"d_model": 8}, "d_model": 16}, r"d_model=16 and extraction.d_model=8"),
        ({"hidden_size": 8, "d_model": 16}, r"d_model=16 and hidden_size=8"),
        ({"parent_datasets": [{"extraction": {"norm": "whitened_zca_v1"}}]}, r"parent_datasets.extraction.norm="),
        ({"extraction": {"hook_point": "resid_pre"}}, r"extraction.hook_point='resid_pre'"),
        ({"training": {"zca": True}}, r"training.zca=True"),
        ({"subtract_baseline": True}, r"subtract_baseline=True"),
        ({"extraction": [1]}, r"`extraction` that is no mapping: \[1\]"),
    ],
)
def test_sidecar_that_says_more_than_is_understood_is_refused_by_name(meta: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says) as raised:
        read_vectors_sidecar(sidecar(tmp_path / "v.parquet", **meta))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("layers", [[20.0, 20.0, 20.0], [20.0, None, 20.0], [20.0, float("nan"), 20.0], [20, None, 20]])
def test_layer_of_the_rows_may_be_a_whole_float(layers: list[Any], tmp_path: Path) -> None:
    assert vectors_layer(write_vectors(tmp_path / "v.parquet", random_vectors(3), activation_layer=layers)) == 20


@pytest.mark.parametrize("layers", [[20.5] * 3, ["20"] * 3, [True] * 3, [float("inf")] * 3])
def test_layer_of_the_rows_that_is_no_whole_number_is_refused(layers: list[Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"in column 'activation_layer'; expected whole numbers"):
        vectors_layer(write_vectors(tmp_path / "v.parquet", random_vectors(3), activation_layer=layers))


@pytest.mark.parametrize("names", [["a", None, None], ["a", "", " "], [1.0, float("nan"), float("nan")]])
def test_rows_without_a_document_in_the_column_asked_for_are_refused(names: list[Any], tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "v.parquet", random_vectors(3), item=names)
    with pytest.raises(DataError, match=r"names no document in column 'item' of 2 rows \(1, 2\)"):
        documents_of(path, 3, tmp_path / "cache", "item")


@pytest.mark.parametrize("column", ["activation_vector", "nested"])
def test_document_column_of_lists_or_structs_is_refused(column: str, tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "v.parquet", random_vectors(3), nested=[{"a": 1}] * 3)
    with pytest.raises(DataError, match=rf"column '{column}' of .* is of type .*; expected text or numbers"):
        documents_of(path, 3, tmp_path / "cache", column)


TEXT_KEYS = ("chat_template", "add_generation_prompt", "add_special_tokens", "enable_thinking")
MADE_WITH: list[dict[str, Any]] = [
    *({key: value} for key in TEXT_KEYS for value in (True, False)),
    {
        "min_position": 50, "text_column": "text", "tokenizer": "a/b", "torch_dtype": "bfloat16", "git_commit": "abc",
        "device": "cuda",
        "created_at": "2026-03-13", "extractor": "hook", "hook_point": "resid_post", "num_vectors": 100_000, "wall_time": 3.5,
        "transformers_version": "4.57.1",
    },
]  # fmt: skip


@pytest.mark.parametrize("made", MADE_WITH, ids=lambda made: "-".join(map(str, next(iter(made.items())))))
def test_sidecar_that_says_of_which_text_the_vectors_are_is_read(made: dict[str, Any], tmp_path: Path) -> None:
    found = read_vectors_sidecar(sidecar(tmp_path / "v.parquet", extraction={"layer_index": 20, **made}))
    assert found is not None and found.layer == 20 and found.notes == ()


def test_sidecar_of_vectors_notes_a_directory_of_training(tmp_path: Path) -> None:
    extraction = {"base_model": "checkpoints/sft_av", "layer_index": 20}
    found = read_vectors_sidecar(sidecar(tmp_path / "v.parquet", extraction=extraction, base_model="a/b", hidden_size=8))
    assert found is not None and (found.base_model, found.d_model) == ("a/b", 8)
    assert ["extraction.base_model='checkpoints/sft_av'" in note.text for note in found.notes] == [True]


def test_layer_of_the_rows_is_read_and_compared_with_the_sidecar(tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "v.parquet", random_vectors(3), activation_layer=[20, 20, 20])
    assert vectors_layer(path) == 20
    assert vectors_layer(sidecar(path, extraction={"layer_index": 20})) == 20
    with pytest.raises(DataError, match=r"sidecar of .* says layer 21 and its column 'activation_layer' says 20"):
        vectors_layer(sidecar(path, extraction={"layer_index": 21}))
    with pytest.raises(DataError, match=r"several layers \(20, 21 in column"):
        vectors_layer(write_vectors(tmp_path / "w.parquet", random_vectors(3), activation_layer=[21, 20, 21]))
    assert vectors_layer(write_vectors(tmp_path / "x.parquet", random_vectors(3))) is None
