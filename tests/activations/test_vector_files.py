"""Vectors in every kind of file are the same activations; ranges, parts, names of columns and tensors."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from ksweep.activations import activations_key, ensure, vector_files
from ksweep.activations.row_order import row_number
from ksweep.activations.vector_files import VECTOR_COLUMN, VectorFile, open_vectors, vector_paths
from ksweep.activations.vector_source import VectorUnits, are_of_one_document, vectors_layer
from ksweep.utils.errors import DataError
from ksweep.utils.files import publish
from ksweep.utils.hub import noted_revisions
from ksweep.utils.npz_files import read_npz_array
from ksweep.utils.planning_pass import planning_pass
from tests.activations.helpers import random_vectors, vector_spec, write_vectors
from tests.hub_server import Hub, HubRepository, serving_hub, use_hub

VECTORS = random_vectors(30)
DOCUMENTS = [f"d{i // 3}" for i in range(30)]


def lists(kind: pa.DataType, values: np.ndarray = VECTORS) -> pa.Array:
    return pa.array([row.tolist() for row in values.astype(kind.value_type.to_pandas_dtype())], kind)


def parts(folder: Path) -> Path:
    folder.mkdir()
    for i in range(3):
        piece = slice(10 * i, 10 * i + 10)
        write_vectors(folder / f"part-{i}.parquet", VECTORS[piece], row_group_size=4, doc_id=DOCUMENTS[piece])
    return folder


def write(folder: Path, kind: str) -> tuple[str, str | None]:
    """The vectors in a file of a kind: what names it, and which column or tensor to state."""
    path = folder / f"v.{kind.partition(' ')[0]}"
    if kind == "npy":
        np.save(path, VECTORS.astype(np.float64))
    elif kind == "npz":
        np.savez(path, W_dec=VECTORS, W_enc=VECTORS.T, b_dec=VECTORS[0])
    elif kind == "pt tensor":
        torch.save(torch.tensor(VECTORS), path)
    elif kind == "pt named":
        torch.save({"acts": torch.tensor(VECTORS), "note": "hi"}, path)
    elif kind == "safetensors":
        save_file({"activations": torch.tensor(VECTORS), "b_dec": torch.zeros(8)}, path)
    elif kind == "safetensors sae":
        save_file({"W_enc": torch.tensor(VECTORS).T.contiguous(), "W_dec": torch.tensor(VECTORS)}, path)
    elif kind == "parquet named":
        pq.write_table(pa.table({"act_L42": lists(pa.list_(pa.float32(), 8)), "act_L62": lists(pa.list_(pa.float32()))}), path)
        return str(path), "act_L42"
    elif kind == "parquet only":
        pq.write_table(pa.table({"resid": lists(pa.large_list(pa.float64())), "doc_id": DOCUMENTS}), path)
    elif kind == "directory":
        return str(parts(folder / "parts")), None
    elif kind == "pattern":
        parts(folder / "parts")
        return str(folder / "parts" / "part-*.parquet"), None
    return str(path), None


KINDS = [
    "npy", "npz", "pt tensor", "pt named", "safetensors", "safetensors sae", "parquet named", "parquet only",
    "directory", "pattern",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", ["first", "random"])
def test_vectors_of_every_kind_are_those_that_were_written(kind: str, rows: str, tmp_path: Path) -> None:
    source, column = write(tmp_path, kind)
    table = ensure(vector_spec(Path(source), 30, vector_column=column, rows=rows), None, tmp_path / "cache")
    places = [int(row.removeprefix("row:")) for row in table.column("row_id")]
    assert sorted(places) == list(range(30)) and (places == list(range(30))) == (rows == "first")
    assert np.array_equal(table.vectors(), VECTORS[places])


@pytest.mark.parametrize("kind", KINDS)
def test_a_range_of_rows_keeps_their_names(kind: str, tmp_path: Path) -> None:
    source, column = write(tmp_path, kind)
    request = vector_spec(Path(f"{source}@[7:25]"), 18, vector_column=column)
    table = ensure(request, None, tmp_path / "cache")
    assert table.column("row_id").tolist() == [f"row:{i}" for i in range(7, 25)]
    assert np.array_equal(table.vectors(), VECTORS[7:25])
    with pytest.raises(DataError, match=r"num_activations=19, but .*@\[7:25\] has 18 rows"):
        ensure(vector_spec(Path(f"{source}@[7:25]"), 19, vector_column=column), None, tmp_path / "cache")
    whole = activations_key(vector_spec(Path(source), 2, vector_column=column), None)[0]
    assert whole == activations_key(vector_spec(Path(f"{source}@[:99]"), 2, vector_column=column), None)[0] != table.key


def test_half_and_brain_floats_are_their_exact_values(tmp_path: Path) -> None:
    exact = {torch.float16: VECTORS.astype(np.float16), torch.bfloat16: torch.tensor(VECTORS).bfloat16().float().numpy()}
    for dtype, values in exact.items():
        save_file({"vectors": torch.tensor(VECTORS).to(dtype)}, tmp_path / "v.safetensors")
        table = ensure(vector_spec(tmp_path / "v.safetensors", 30), None, tmp_path / str(dtype))
        assert np.array_equal(table.vectors(), values.astype(np.float32))
    pq.write_table(pa.table({"activation_vector": lists(pa.list_(pa.float16()))}), tmp_path / "v.parquet")
    table = ensure(vector_spec(tmp_path / "v.parquet", 30), None, tmp_path / "half")
    assert np.array_equal(table.vectors(), exact[torch.float16].astype(np.float32))


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_an_array_has_documents_positions_and_contexts_from_the_table_beside_it(kind: str, tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", VECTORS)
    columns: dict[str, list[Any]] = {
        "doc_id": DOCUMENTS, "n_raw_tokens": [i + 1 for i in range(30)], "role": ["user"] * 30,
        "detokenized_text_truncated": [f"text {i}" for i in range(30)], "activation_layer": [20] * 30,
    }  # fmt: skip
    if kind == "parquet":
        pq.write_table(pa.table(columns), tmp_path / "v.npy.rows.parquet")
    else:
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        (tmp_path / "v.npy.rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    request = vector_spec(tmp_path / "v.npy", 30)
    table = ensure(request, None, tmp_path / "cache")
    assert table.column("document").tolist() == DOCUMENTS and table.column("position").tolist() == list(range(30))
    assert (table.column("window")[7], table.column("role")[7], vectors_layer(tmp_path / "v.npy")) == ("text 7", "user", 20)
    pq.write_table(pa.table({"doc_id": DOCUMENTS[:29]}), tmp_path / "v.npy.rows.parquet")
    with pytest.raises(DataError, match=r"v\.npy\.rows\.parquet has 29 rows and .* has 30"):
        ensure(request, None, tmp_path / "cache")


def test_random_rows_over_several_units_are_a_sample_that_grows(tmp_path: Path) -> None:
    vectors = random_vectors(5000, d_model=4)
    path = write_vectors(tmp_path / "v.parquet", vectors, row_group_size=300, doc_id=[f"d{i // 50}" for i in range(5000)])
    few, more = (ensure(vector_spec(path, n, rows="random"), None, tmp_path / "cache") for n in (200, 3000))
    places = [int(row.removeprefix("row:")) for row in more.column("row_id")]
    assert len(set(places)) == 3000 and np.array_equal(more.vectors(), vectors[places])
    assert np.array_equal(few.vectors(), more.vectors()[:200])
    assert few.num_documents() > 70  # of 100; the first 200 rows are of 4
    assert more.column("document").tolist() == [f"d{i // 50}" for i in places]


def test_named_activations_in_random_order_are_each_taken_once(tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "v.parquet", VECTORS[[i // 2 for i in range(30)]], name=[f"n{i // 2}" for i in range(30)])
    table = ensure(vector_spec(path, 15, rows="random", row_id_column="name"), None, tmp_path / "cache")
    names = table.column("row_id").tolist()
    assert sorted(names) == sorted(f"n{i}" for i in range(15)) and names != [f"n{i}" for i in range(15)]
    assert np.array_equal(table.vectors(), VECTORS[[int(name[1:]) for name in names]])


def test_one_document_is_told_of_the_rows_that_are_taken(tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "v.parquet", VECTORS, doc_id=["one"] * 25 + ["two"] * 5)
    assert are_of_one_document(vector_spec(path, 20)) and not are_of_one_document(vector_spec(path, 20, rows="random"))


@pytest.mark.slow
@pytest.mark.parametrize(("file", "rows_read", "most"), [("parquet", 7 + 10 + 10, 10 * 1024), ("npy", 3 * 1024, 30_000)])
def test_of_random_rows_no_more_units_and_row_groups_are_read_than_are_taken(
    file: str, rows_read: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, path = random_vectors(30_000, d_model=2), tmp_path / f"v.{file}"
    if file == "npy":
        np.save(path, vectors)
    else:
        write_vectors(path, vectors, row_group_size=10)
    read: list[int] = []
    tables = VectorFile._tables

    def counted(*arguments: Any) -> Iterator[tuple[int, pa.Table]]:
        for first, table in tables(*arguments):
            read.append(len(table))
            yield first, table

    with open_vectors(f"{path}@[100:25000]") as whole:
        order = np.array([3, 4, 20_000, 24_899])
        monkeypatch.setattr(VectorFile, "_tables", counted)
        found = pa.concat_tables(whole.rows_at(["activation_vector"], order))
    assert np.array_equal(np.stack(found["activation_vector"].to_numpy()), vectors[order + 100])
    assert sum(read) == rows_read
    read.clear()
    next(VectorUnits(vector_spec(path, 5, rows="random")).units([0]))
    assert sum(read) <= most  # one unit of 1,024 random rows, which are in at most as many row groups of 10


def test_the_order_of_random_rows_is_computed_once_for_all_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, hashed = write_vectors(tmp_path / "v.parquet", VECTORS, doc_id=["one"] * 15 + ["two"] * 15), []
    monkeypatch.setattr("ksweep.activations.vector_source.row_number", lambda *a: (hashed.append(a), row_number(*a))[1])
    with planning_pass():
        told = [are_of_one_document(vector_spec(path, n, rows="random")) for n in (1, 2, 10, 29)]
        assert told[0] and not told[3] and len(hashed) == 30
    hashed.clear()
    assert not are_of_one_document(vector_spec(path, 30, rows="random")) and not hashed  # all rows: in any order


def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": lists(pa.list_(pa.float32())), "b": lists(pa.list_(pa.float32()))}), tmp_path / "two.parquet")
    np.save(tmp_path / "ints.npy", np.arange(6).reshape(3, 2))
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "cut.npy").write_bytes((lambda b: (np.save(b, VECTORS), b.getvalue()[:300])[1])(io.BytesIO()))
    (tmp_path / "empty").mkdir()
    write_vectors(parts(tmp_path / "mixed") / "part-3.parquet", random_vectors(3, d_model=5), doc_id=["d"] * 3)
    cases = {
        "two.parquet": "vectors are in a, b: choose one with activations.vector_column",
        "ints.npy": r"is an array \(3, 2\) of int64; expected floats",
        "objects.npy": "cannot be read as an array",
        "cut.npy": "cannot be read as an array",
        "empty": "no file of vectors at",
        "no-*.parquet": "no file of vectors at",
        "mixed": "part-3.parquet has other columns or types than",
        "two.parquet@[-5:]": r"expected a range of rows as @\[START:STOP\], counted from 0",
        "two.parquet@[0:10:2]": r"expected a range of rows as @\[START:STOP\]",
        "two.parquet@[40:50]": "no rows from 40 to 50: it has 30|has no column",
    }
    for name, words in cases.items():
        with pytest.raises(DataError, match=words):
            open_vectors(tmp_path / name)
    with pytest.raises(DataError, match=r"no column or tensor 'c'; it has a, b"):
        open_vectors(tmp_path / "two.parquet", "c")


@pytest.fixture
def data_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Data set owner/acts at v1: vectors of split test, of train in two parts, of one with a longer name; sidecars."""
    test, first, second = (path.read_bytes() for path in sorted(parts(tmp_path / "hub").iterdir()))
    layer = b"kind: nla_dataset\nextraction:\n  layer_index: 20\n"
    files = {
        "README.md": b"", "data/test-0.parquet": test, "data/train-0.parquet": first, "data/train-1.parquet": second,
        "data/train_long-0.parquet": test, "data/train-0.parquet.nla_meta.yaml": layer, "nla_meta.yaml": b"# all\n" + layer,
    }  # fmt: skip
    with serving_hub() as hub:
        hub.repositories["datasets/owner/acts"] = HubRepository({"v1": files, "main": {"a/0000.parquet": test}})
        use_hub(monkeypatch, hub.endpoint, str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        yield hub


def test_a_split_of_a_hub_data_set_is_its_parquet_files_with_their_sidecars(data_hub: Hub) -> None:
    with open_vectors("owner/acts:train@v1@[5:]") as file:
        table = pa.concat_tables(file.batches(["activation_vector", "doc_id"]))
    assert data_hub.asked_files() == {
        "data/train-0.parquet", "data/train-1.parquet", "data/train-0.parquet.nla_meta.yaml", "nla_meta.yaml"
    }  # fmt: skip
    assert np.array_equal(np.stack(table["activation_vector"].to_numpy()), VECTORS[15:30])
    assert vectors_layer("owner/acts:train@v1@[5:]") == vectors_layer("owner/acts:data/test@v1") == 20
    with open_vectors("owner/acts") as file:
        assert file.num_rows == 10


def test_splits_of_a_hub_data_set_are_not_mixed(data_hub: Hub) -> None:
    with pytest.raises(DataError, match=r"has 3 splits \(data/test, data/train, data/train_long\).*as owner/name:data/test"):
        open_vectors("owner/acts@v1")
    with pytest.raises(DataError, match=r"has no Parquet files of 'validation': data/test-0\.parquet"):
        open_vectors("owner/acts:validation@v1")
    with pytest.raises(DataError, match=r"'owner/acts@v9'.*404"):
        open_vectors("owner/acts@v9")


@pytest.mark.parametrize(
    ("names", "are_one"),
    [
        ("acts-0 acts-1 acts-2", True),
        ("0001 0002", True),
        ("train-00003-of-00005 train-00004-of-00005", True),
        ("part-00000-a1b2-c000.snappy part-00001-ffee-c000.snappy", True),
        ("layer_20 layer_42", False),
        ("layer-20 layer-21", False),
        ("layer_0 layer_1", False),
        ("acts-L0 acts-L1", False),
        ("layer20/0000 layer21/0000", False),
        ("step_100 step_200", False),
        ("acts-20 acts-42", False),
        ("acts-2 acts-3", False),
        ("train-00000-of-00002 train-00000-of-00003", False),
        ("acts acts-0", False),
    ],
)
def test_numbers_tell_parts_apart_only_where_they_count_parts(data_hub: Hub, tmp_path: Path, names: str, are_one: bool) -> None:
    files = {f"{name}.parquet": (tmp_path / "hub" / f"part-{i}.parquet").read_bytes() for i, name in enumerate(names.split())}
    data_hub.repositories["datasets/owner/acts"].revisions["main"] = files
    for name, content in files.items():
        publish(tmp_path / "here" / name, content)
    for source in (str(tmp_path / "here"), "owner/acts"):
        if are_one:
            assert len(vector_paths(source)) == len(files)
        else:
            with pytest.raises(DataError, match=r"name it|name one of them"):
                vector_paths(source)
    last = names.split()[-1]
    assert [str(path).endswith(f"{last}.parquet") for path in vector_paths(f"owner/acts:{last}")] == [True], "one file"
    assert len(vector_paths(f"{tmp_path}/here/{'*/' * last.count('/')}*.parquet")) == len(files)


def test_a_branch_that_moves_changes_nothing_within_a_process_and_its_commit_is_noted(data_hub: Hub, tmp_path: Path) -> None:
    repository, many = data_hub.repositories["datasets/owner/acts"], 5000
    big = write_vectors(tmp_path / "big.parquet", random_vectors(many))
    repository.revisions["main"] = files = {"train-0.parquet": big.read_bytes()}
    with noted_revisions() as revisions:
        key, _ = activations_key(vector_spec(Path("owner/acts"), many), None)
    assert revisions == {spelled := f"datasets/owner/acts@{HubRepository.commit(files)}"}
    repository.revisions["main"] = {"train-0.parquet": b"another"}
    asked = len(data_hub.requests)
    table = ensure(vector_spec(Path("owner/acts"), many), None, tmp_path / "cache of vectors")
    assert table.key == key and len(table.vectors()) == many and len(data_hub.requests) == asked
    repository.revisions["then"] = files
    assert activations_key(vector_spec(Path(spelled), many), None)[0] == key, "what a record says can be typed"


def test_a_hub_that_does_not_answer_leaves_the_vectors_in_its_cache(
    data_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_vectors("owner/acts:train@v1").__exit__()
    use_hub(monkeypatch, "http://127.0.0.1:1", str(tmp_path / "cache"))
    with open_vectors("owner/acts:train@v1") as file:
        assert file.num_rows == 20
    with pytest.raises(DataError, match="is only partly in the hub's cache"):
        open_vectors("owner/acts:test@v1")


def test_several_arrays_are_not_read_as_one(tmp_path: Path) -> None:
    np.save(tmp_path / "a0.npy", VECTORS[:5])
    pq.write_table(pa.table({"doc_id": DOCUMENTS[:5]}), tmp_path / "a0.npy.rows.parquet")
    with open_vectors(tmp_path / "a*") as file:
        assert file.num_rows == 5 and file.names == ["activation_vector", "doc_id"]
    np.save(tmp_path / "a1.npy", VECTORS[:7])
    write_vectors(tmp_path / "b0.parquet", VECTORS)
    for pattern in ("a*.npy", "[ab]0*"):
        for read in (open_vectors, vector_paths):
            with pytest.raises(DataError, match=r"is 2 files, an array among them \(a0\.npy\)"):
                read(f"{tmp_path}/{pattern}")


def test_floats_of_either_byte_order_are_read_and_other_arrays_refused(tmp_path: Path) -> None:
    for dtype in ("<f2", ">f2", ">f4", ">f8"):
        np.save(tmp_path / "v.npy", VECTORS.astype(dtype))
        table = ensure(vector_spec(tmp_path / "v.npy", 30), None, tmp_path / dtype)
        assert np.array_equal(table.vectors(), VECTORS.astype(dtype).astype(np.float32))
    for array in (VECTORS.astype(np.longdouble), VECTORS[:, :0]):
        np.save(tmp_path / "v.npy", array)
        with pytest.raises(DataError, match="expected floats of 16, 32 or 64 bits"):
            open_vectors(tmp_path / "v.npy")


def test_an_archive_may_be_small_and_is_measured_by_its_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "v.npz", vectors=np.ones((4096, 64), np.float32), W_enc=np.zeros((64, 10_000)))
    unpacked = []
    monkeypatch.setattr(vector_files, "read_npz_array", lambda path, name: (unpacked.append(name), read_npz_array(path, name))[1])
    with open_vectors(tmp_path / "v.npz") as file:  # 64 times smaller than what it holds
        assert (file.num_rows, file.d_model, unpacked) == (4096, 64, [])
        assert sum(table.num_rows for table in file.batches([VECTOR_COLUMN])) == 4096 and unpacked == ["vectors"]
    monkeypatch.setattr(vector_files, "MOST_UNPACKED_BYTES", 4096 * 64 * 4 - 1)
    with pytest.raises(DataError, match=r"takes 1,048,576 bytes of memory .* \(at most 1,048,575\): save it as \.npy"):
        open_vectors(tmp_path / "v.npz")


def test_tensors_that_are_no_floats_are_no_vectors(tmp_path: Path) -> None:
    torch.save({"acts": torch.ones(4, 3), "input_ids": torch.ones(4, 3, dtype=torch.int64)}, tmp_path / "both.pt")
    with open_vectors(tmp_path / "both.pt") as file:
        assert file.column == "acts"
    for kind in (torch.int64, torch.bool, torch.complex64):
        torch.save(torch.ones(4, 3).to(kind), tmp_path / "one.pt")
        with pytest.raises(DataError, match=rf"of {str(kind).removeprefix('torch.')}; expected floats"):
            open_vectors(tmp_path / "one.pt")


def test_lines_beside_an_array_may_have_different_keys(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", VECTORS[:3])
    lines = tmp_path / "v.npy.rows.jsonl"
    lines.write_text('{"n": 5}\n{"n": 6, "doc_id": "a"}\n{"doc_id": "b"}\n')
    with open_vectors(tmp_path / "v.npy") as file:
        assert file.table(["n", "doc_id"]).to_pydict() == {"n": [5, 6, None], "doc_id": [None, "a", "b"]}
    lines.write_text('{"n": 5}\n{"n": "six"}\n{}\n')
    with pytest.raises(DataError, match=r"'n' of .*v\.npy\.rows\.jsonl is of several types"):
        open_vectors(tmp_path / "v.npy")


def test_a_directory_with_an_array_and_its_table_is_that_array(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", VECTORS[:3])
    pq.write_table(pa.table({"doc_id": ["a", "b", "c"]}), tmp_path / "v.npy.rows.parquet")
    with open_vectors(tmp_path) as file:
        assert file.num_rows == 3 and file.names == ["activation_vector", "doc_id"]
