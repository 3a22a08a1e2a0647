"""The store: written once, read many times, extended, shared, damaged, killed."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ksweep.activations import ActivationStore, activation_key, activations_key, ensure, estimate_bytes, plan_activations
from ksweep.activations import store as store_module
from ksweep.activations.caching import fill
from ksweep.activations.source import ActivationUnit, to_bfloat16_bits, to_float32
from ksweep.activations.vector_source import VECTOR_ROWS_PER_UNIT
from ksweep.config.spec import Activations
from ksweep.utils.errors import DataError, RunError, SpecError, StoreError
from tests.activations.helpers import passages, random_vectors, shard_files, spec, vector_spec, write_jsonl, write_vectors


def make_unit(vectors: np.ndarray, first: int = 0, is_last: bool = False) -> ActivationUnit:
    n = len(vectors)
    return ActivationUnit(
        vectors=vectors,
        row_ids=[f"row:{first + i}" for i in range(n)],
        documents=[f"doc-{(first + i) // 2}" for i in range(n)],
        positions=list(range(n)),
        token_ids=list(range(n)),
        windows=["text"] * n,
        roles=[None] * n,
        num_rows=n,
        num_skipped=0,
        is_last=is_last,
    )


def small_store(root: Path, vectors: np.ndarray, dtype: str = "float32", rows: int = 10) -> ActivationStore:
    store = ActivationStore(root, "k" * 32, {"kind": "test"})
    for index in range(0, len(vectors), rows):
        part = vectors[index : index + rows]
        store.write_unit(index // rows, make_unit(part, index, index + rows >= len(vectors)), dtype)
    return store


# ---- formats and reading


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_vectors_survive_storage_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    exact = torch.from_numpy(random_vectors(35, 6)).to(getattr(torch, dtype))
    stored = exact.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else exact.numpy()
    table = small_store(tmp_path, stored, dtype).open(35)
    assert np.array_equal(table.vectors(), exact.float().numpy())
    assert np.array_equal(np.concatenate(list(table.stored())), stored)
    assert table.dtype == dtype and table.d_model == 6


def test_bfloat16_rounding_equals_that_of_torch() -> None:
    values = np.concatenate([random_vectors(1000, 8).ravel(), np.float32([0, -0.0, 1e-40, 3e38, 1.00390625, 1.01171875])])
    expected = torch.from_numpy(values).to(torch.bfloat16)
    assert np.array_equal(to_bfloat16_bits(values), expected.view(torch.int16).numpy().view(np.uint16))
    assert np.array_equal(to_float32(to_bfloat16_bits(values)), expected.float().numpy())


def test_ranges_and_random_rows_equal_those_of_the_array(tmp_path: Path) -> None:
    vectors = random_vectors(95)
    table = small_store(tmp_path, vectors).open(90)
    assert len(table) == 90
    for start, stop in [(0, 90), (5, 25), (10, 10), (88, 200), (0, 1)]:
        assert np.array_equal(table.vectors(start, stop), vectors[:90][start:stop])
    rows = np.random.default_rng(0).integers(0, 90, size=50)
    assert np.array_equal(table.take(rows), vectors[rows])
    for index in (0, 9, 10, 55, 89):
        assert np.array_equal(table.row(index), vectors[index])
    for read in (lambda: table.take([90]), lambda: table.row(90)):
        with pytest.raises(IndexError, match=r"90 is outside 0\.\.89"):
            read()
    with pytest.raises(IndexError, match=r"-1 is outside 0\.\.89"):
        table.row(-1)


def test_ranges_over_shards_without_rows_equal_those_of_the_array(tmp_path: Path) -> None:
    store, vectors = ActivationStore(tmp_path, "k", {}), random_vectors(9)
    for unit, (low, high) in enumerate([(0, 0), (0, 4), (4, 4), (4, 4), (4, 9), (9, 9)]):
        store.write_unit(unit, make_unit(vectors[low:high], low), "float32")
    table = store.open(9)
    for start in range(10):
        for stop in range(start, 10):
            assert np.array_equal(table.vectors(start, stop), vectors[start:stop])
    assert all(np.array_equal(table.row(i), vectors[i]) for i in range(9))


def as_tensor(view: np.ndarray) -> torch.Tensor:
    """A stored view as a tensor over the same memory."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(view.view(np.int16)).view(torch.bfloat16) if view.dtype == np.uint16 else torch.from_numpy(view)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_stored_vectors_are_views_into_the_file_for_numpy_and_torch(tmp_path: Path, dtype: str) -> None:
    exact = torch.from_numpy(random_vectors(20)).to(getattr(torch, dtype))
    table = small_store(
        tmp_path, exact.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else exact.numpy(), dtype
    ).open(20)
    views = list(table.stored())
    tensors = [as_tensor(view) for view in views]
    assert all(not view.flags.owndata and not view.flags.writeable for view in views)
    assert [tensor.data_ptr() for tensor in tensors] == [view.__array_interface__["data"][0] for view in views]
    assert torch.cat(tensors).dtype == exact.dtype and torch.equal(torch.cat(tensors), exact)
    one = as_tensor(next(table.stored(13, 14)))[0]
    assert torch.equal(one, exact[13]) and one.data_ptr() == table.row(13).__array_interface__["data"][0]


def test_more_shards_than_may_be_open_are_read_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MOST_OPEN_SHARDS", 2)
    vectors = random_vectors(50)
    table = small_store(tmp_path, vectors).open(50)
    views = list(table.stored())  # views outlive the shard they were taken from
    assert np.array_equal(table.take(np.arange(49, -1, -1)), vectors[::-1]) and np.array_equal(np.concatenate(views), vectors)


def test_columns_say_where_each_activation_comes_from(tmp_path: Path) -> None:
    vectors = random_vectors(20)
    table = small_store(tmp_path, vectors).open(20)
    assert table.column("row_id", 9, 12).tolist() == ["row:9", "row:10", "row:11"]
    assert table.column("position", 9, 12).tolist() == [9, 0, 1] and table.num_documents() == 10
    assert table.column("activation_key")[10] == activation_key("row:10", 0)
    assert np.allclose(table.column("norm"), np.linalg.norm(vectors, axis=1))
    assert table.column("row_id", 3, 3).tolist() == []


def test_activation_key_is_stable_and_spread() -> None:
    # printf "row:0|7" | sha256sum | cut -c1-16 | xxd -r -p | od -An -t d8; must never change, or every draw would.
    assert activation_key("row:0", 7) == 1008199544857999522
    keys = {activation_key(f"row:{i}", p) for i in range(100) for p in range(20)}
    assert len(keys) == 2000 and min(keys) < -(2**62) and max(keys) > 2**62


def test_opening_more_than_there_is_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds 20 activations and 21 were asked for"):
        small_store(tmp_path, random_vectors(20)).open(21)


def test_gap_ends_what_is_available(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, "k", {})
    for unit in (0, 1, 3):
        store.write_unit(unit, make_unit(random_vectors(10)), "float32")
    assert store.available() == 20
    assert store.missing_units(45, most_per_unit=10) == [2, 4]
    assert store.missing_units(20, most_per_unit=10) == []


def test_missing_units_never_asks_for_more_than_is_certainly_needed(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, "k", {})
    assert store.missing_units(25, most_per_unit=10) == [0, 1, 2]
    store.write_unit(0, make_unit(random_vectors(2)), "float32")  # fewer than it could have held
    assert store.missing_units(25, most_per_unit=10) == [1, 2, 3]
    store.write_unit(1, make_unit(random_vectors(3), is_last=True), "float32")
    assert store.missing_units(25, most_per_unit=10) == []


def test_the_first_to_publish_a_unit_is_the_one_that_counts(tmp_path: Path) -> None:
    # Two kinds of GPU may differ in the last bit; what was published first has perhaps been read already.
    first, second = random_vectors(5, seed=1), random_vectors(5, seed=2)
    shards = [ActivationStore(tmp_path, "k", {}).write_unit(0, make_unit(v), "float32") for v in (first, second)]
    assert shards[0] == shards[1] and len(shard_files(tmp_path)) == 1
    assert np.array_equal(ActivationStore(tmp_path, "k", {}).open(5).vectors(), first)


def test_a_unit_is_published_again_when_its_directory_is_removed_between_its_two_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, publish_once = ActivationStore(tmp_path, "k", {}), store_module.publish_once

    def after_removal(path: Path, data: bytes) -> bool:  # as `ksweep cache gc --force` of another process
        monkeypatch.setattr(store_module, "publish_once", publish_once)
        store.directory.rename(tmp_path / "aside")
        return publish_once(path, data)

    monkeypatch.setattr(store_module, "publish_once", after_removal)
    vectors = random_vectors(5)
    store.write_unit(0, make_unit(vectors), "float32")
    assert np.array_equal(ActivationStore(tmp_path, "k", {}).open(5).vectors(), vectors)


# ---- ensure: have it or compute it


@pytest.mark.slow
def test_second_request_computes_nothing_and_a_larger_one_only_the_rest(base: Path, text: Path, tmp_path: Path) -> None:
    small = ensure(spec(base, text, 40), 1, tmp_path / "a")
    before = shard_files(tmp_path / "a")
    again = ensure(spec(base, text, 30), 1, tmp_path / "a")
    assert shard_files(tmp_path / "a") == before and len(before) == 1
    assert np.array_equal(again.vectors(), small.vectors(0, 30))
    grown = ensure(spec(base, text, 150), 1, tmp_path / "a")
    after = shard_files(tmp_path / "a")
    assert len(after) == 3 and {name: after[name] for name in before} == before
    at_once = ensure(spec(base, text, 150), 1, tmp_path / "b")
    assert shard_files(tmp_path / "b") == after and grown.key == at_once.key
    assert at_once.column("document")[0] == "book-0" and "row:10" not in at_once.column("row_id").tolist()


def test_activations_of_a_row_depend_on_that_row_alone(base: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    lines = text.read_text().splitlines()
    other.write_text("\n".join([*lines[:5], json.dumps({"text": "Something else, much longer than before. " * 5}), *lines[6:70]]))
    one, two = (ensure(spec(base, path, 55, positions_per_document=1), 1, tmp_path / "c") for path in (text, other))
    same = [i for i, row in enumerate(one.column("row_id")) if row != "row:5"]
    assert one.column("row_id").tolist() == two.column("row_id").tolist()
    assert np.abs(one.take(same) - two.take(same)).max() < 1e-5
    assert one.column("position")[same].tolist() == two.column("position")[same].tolist()


def test_manifest_says_what_is_there_and_is_rebuilt_when_deleted(base: Path, text: Path, tmp_path: Path) -> None:
    table = ensure(spec(base, text, 180), 1, tmp_path)
    path = table.directory / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["key"] == table.key and manifest["identity"]["layer"] == 1 and manifest["source"]["text"] == str(text)
    assert (manifest["num_activations"], manifest["source_rows"], manifest["skipped_rows"]) == (180, 200, 20)
    assert manifest["is_whole_source"] and manifest["num_documents"] == table.num_documents() == 67
    norms = np.linalg.norm(table.vectors(), axis=1)
    assert manifest["norms"]["p50"] == pytest.approx(np.median(norms)) and manifest["norms"]["num_not_finite"] == 0
    assert sum(shard["rows"] for shard in manifest["shards"]) == 180 and manifest["producers"][0]["torch"] == torch.__version__
    path.unlink()
    ensure(spec(base, text, 10), 1, tmp_path)
    assert json.loads(path.read_text()) == manifest


def test_too_little_text_says_how_much_there_is(base: Path, text: Path, tmp_path: Path) -> None:
    for _ in range(2):  # the first time the text is read to its end, the second time the store knows
        with pytest.raises(DataError, match=r"num_activations=181, but .* gives 180 \(200 rows, 20 of them without"):
            ensure(spec(base, text, 181), 1, tmp_path)
    with pytest.raises(DataError, match="gives 180"):
        plan_activations(spec(base, text, 181), 1, tmp_path)
    with pytest.raises(DataError, match=r"no row of .* has an allowed position: lower activations.min_position \(now 450"):
        ensure(spec(base, text, 5, min_position=450, max_length=1000), 1, tmp_path)


def test_plan_counts_what_is_there_and_the_bytes_of_the_rest(base: Path, text: Path, tmp_path: Path) -> None:
    before = plan_activations(spec(base, text, 60, dtype="bfloat16"), 1, tmp_path / "c")
    assert (before.present, before.missing, before.d_model) == (0, 60, 16) and not (tmp_path / "c").exists()
    assert before.bytes_needed == estimate_bytes(60, 16, "bfloat16")
    ensure(spec(base, text, 60, dtype="bfloat16"), 1, tmp_path / "c")
    after = plan_activations(spec(base, text, 100, dtype="bfloat16"), 1, tmp_path / "c")
    assert (after.key, after.present, after.missing) == (before.key, 100, 0)  # whole units: 116 are there


def test_byte_estimate_is_close_to_what_a_fill_takes(tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "v.parquet", random_vectors(1000, 64), detokenized_text_truncated=["words " * 40] * 1000)
    table = ensure(vector_spec(path, 1000), None, tmp_path / "c")
    assert sum(map(len, shard_files(table.directory).values())) == pytest.approx(estimate_bytes(1000, 64, "float32"), rel=0.15)


@pytest.mark.slow
def test_planning_and_reading_need_no_torch(base: Path, text: Path, tmp_path: Path) -> None:
    ensure(spec(base, text, 20), 1, tmp_path)
    code = (
        "import sys; from ksweep.activations import ensure, plan_activations; from ksweep.config.spec import Activations\n"
        f"a = Activations(model={str(base)!r}, text={str(text)!r}, num_activations=20, rows='first', min_position=4, "
        "max_length=128, dtype='float32')\n"
        f"assert plan_activations(a, 1, {str(tmp_path)!r}).missing == 0\n"
        f"assert ensure(a, 1, {str(tmp_path)!r}).vectors().shape == (20, 16)\n"
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"num_activations": 7}, True),
        ({"stride": 3}, True),
        ({"seed": 1}, False),
        ({"seed": 1, "positions": "last"}, False),
        ({"rows": "first"}, False),
        ({"dtype": "bfloat16"}, False),
        ({"min_position": 5}, False),
        ({"positions": "last"}, False),
        ({"positions_per_document": 2}, False),
        ({"max_length": 100}, False),
    ],
)
def test_key_holds_what_changes_the_content_and_nothing_else(base: Path, text: Path, change: dict[str, Any], same: bool) -> None:
    fields = {"num_activations": 9, "min_position": 4, "dtype": "float32", "max_length": 128}
    one, two = (Activations(model=str(base), text=str(text), **(fields | extra)) for extra in ({}, change))
    assert (activations_key(one, 1)[0] == activations_key(two, 1)[0]) == same
    assert activations_key(one, 1)[0] != activations_key(one, 2)[0]


def test_key_does_not_hold_where_model_and_text_lie(base: Path, text: Path, tmp_path: Path) -> None:
    moved = [tmp_path / "model", tmp_path / "text.jsonl"]
    moved[0].symlink_to(base)
    moved[1].write_bytes(text.read_bytes())
    assert activations_key(spec(base, text, 5), 1) == activations_key(spec(moved[0], moved[1], 5), 1)


def test_layer_that_nobody_knows_is_asked_for(base: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"activations\.layer is not known"):
        plan_activations(spec(base, text, 5), None, tmp_path)


# ---- several ranks, several jobs


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_gives_the_same_bytes(base: Path, text: Path, tmp_path: Path, world_size: int) -> None:
    alone = ensure(spec(base, text, 170), 1, tmp_path / "alone")
    barrier, tables = threading.Barrier(world_size), {}

    def rank(number: int) -> None:
        tables[number] = ensure(
            spec(base, text, 170), 1, tmp_path / "ranks", rank=number, world_size=world_size, barrier=barrier.wait
        )

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shard_files(tmp_path / "ranks") == shard_files(tmp_path / "alone")
    assert all(np.array_equal(table.vectors(), alone.vectors()) for table in tables.values()) and len(tables) == world_size


def test_rank_takes_over_from_one_that_is_gone(tmp_path: Path) -> None:
    from ksweep.activations.vector_source import VectorUnits

    vectors = random_vectors(3 * VECTOR_ROWS_PER_UNIT)
    source = VectorUnits(vector_spec(write_vectors(tmp_path / "v.parquet", vectors), 2))
    store = ActivationStore(tmp_path, "k", {})
    fill(store, source, len(vectors), rank=1, world_size=2, patience=0.1)  # rank 0 never comes
    assert np.array_equal(store.open(len(vectors)).vectors(), vectors)


FILLER = """
import sys
from ksweep.activations import ensure
from ksweep.config.spec import Activations
ensure(Activations(vectors=sys.argv[1], num_activations=int(sys.argv[3]), rows="first"), None, sys.argv[2])
"""


def start_filler(vectors: Path, root: Path, count: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", FILLER, str(vectors), str(root), str(count)], stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, dict[str, bytes]]:
    """A file of 30 units, its vectors, and the shards of an undisturbed fill."""
    directory, vectors = tmp_path_factory.mktemp("many"), random_vectors(30 * VECTOR_ROWS_PER_UNIT)
    path = write_vectors(directory / "v.parquet", vectors, row_group_size=8000)
    table = ensure(vector_spec(path, len(vectors)), None, directory / "cache")
    return path, vectors, shard_files(table.directory)


@pytest.mark.slow
def test_two_processes_fill_one_key_at_once(many: tuple[Path, np.ndarray, dict[str, bytes]], tmp_path: Path) -> None:
    path, vectors, expected = many
    fillers = [start_filler(path, tmp_path, len(vectors)) for _ in range(2)]
    assert [filler.wait(240) for filler in fillers] == [0, 0], [filler.stderr.read() for filler in fillers if filler.stderr]
    assert shard_files(tmp_path) == expected and not list(tmp_path.rglob("*.part"))
    assert np.array_equal(ensure(vector_spec(path, len(vectors)), None, tmp_path).vectors(), vectors)


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(4))
def test_kill_9_at_a_random_moment_leaves_whole_shards_only(
    many: tuple[Path, np.ndarray, dict[str, bytes]], tmp_path: Path, trial: int
) -> None:
    path, vectors, expected = many
    rng = random.Random(trial)
    filler, shards = start_filler(path, tmp_path, len(vectors)), rng.randrange(0, 30)
    while filler.poll() is None and len(list(tmp_path.rglob("shard-*.json"))) < shards:
        time.sleep(0.0005)
    time.sleep(rng.random() * 0.005)
    filler.send_signal(signal.SIGKILL)
    filler.wait()
    left = shard_files(tmp_path)
    assert all(expected[name] == content for name, content in left.items())
    table = ensure(vector_spec(path, len(vectors)), None, tmp_path)
    assert shard_files(tmp_path) == expected and np.array_equal(table.vectors(), vectors)


@pytest.mark.slow
def test_stop_between_units_keeps_the_whole_ones_and_drops_the_rest(base: Path, text: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop_after_two(done: int, total: int) -> None:
        if done >= 100:
            raise Stop

    with pytest.raises(Stop):
        ensure(spec(base, text, 170), 1, tmp_path / "a", progress=stop_after_two)
    kept = shard_files(tmp_path / "a")
    assert len(kept) == 2 and not list((tmp_path / "a").rglob("*.part"))
    ensure(spec(base, text, 170), 1, tmp_path / "a")
    ensure(spec(base, text, 170), 1, tmp_path / "b")
    whole = shard_files(tmp_path / "a")
    assert whole == shard_files(tmp_path / "b") and {name: whole[name] for name in kept} == kept


def test_leftovers_of_a_killed_process_are_removed_once_they_are_old(tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "v.parquet", random_vectors(5))
    directory = ensure(vector_spec(path, 5), None, tmp_path / "c").directory
    old, young = directory / ".shard-00001-ab.arrow.x.part", directory / ".shard-00002-ab.arrow.x.part"
    for leftover in (old, young):
        leftover.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    ensure(vector_spec(path, 5), None, tmp_path / "c")
    assert not old.exists() and young.exists()


# ---- damage


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def delete(path: Path) -> None:
    path.unlink()


def shard_json(path: Path) -> Path:
    return path.with_name(path.name.rpartition("-")[0] + ".json")


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, delete])
@pytest.mark.parametrize("of", ["data", "json"])
def test_damaged_shard_is_set_aside_and_computed_again(
    base: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any, of: str
) -> None:
    table = ensure(spec(base, text, 150), 1, tmp_path)
    expected, vectors = shard_files(table.directory), table.vectors()
    victim = sorted(table.directory.glob("shard-00001-*.arrow"))[0]
    damage(victim if of == "data" else shard_json(victim))
    with caplog.at_level(logging.WARNING):
        repaired = ensure(spec(base, text, 150), 1, tmp_path)
    assert np.array_equal(repaired.vectors(), vectors) and shard_files(table.directory) == expected
    if (damage, of) != (delete, "json"):
        assert "shard 1" in caplog.text and "set aside" in caplog.text and list(table.directory.glob("*.damaged-*"))


def test_damage_behind_a_gap_is_found_before_it_is_used(tmp_path: Path) -> None:
    vectors = random_vectors(3 * VECTOR_ROWS_PER_UNIT)
    path = write_vectors(tmp_path / "v.parquet", vectors)
    directory = ensure(vector_spec(path, len(vectors)), None, tmp_path / "c").directory
    flip_a_byte(next(directory.glob("shard-00002-*.arrow")))
    (directory / "shard-00000.json").unlink()
    assert np.array_equal(ensure(vector_spec(path, len(vectors)), None, tmp_path / "c").vectors(), vectors)


def test_damage_beyond_a_request_is_set_aside_and_stops_nobody(tmp_path: Path) -> None:
    vectors = random_vectors(3 * VECTOR_ROWS_PER_UNIT)
    path = write_vectors(tmp_path / "v.parquet", vectors)
    directory = ensure(vector_spec(path, len(vectors)), None, tmp_path / "c").directory
    flip_a_byte(next(directory.glob("shard-00001-*.arrow")))
    (directory / "manifest.json").unlink()
    assert np.array_equal(ensure(vector_spec(path, 5), None, tmp_path / "c").vectors(), vectors[:5])
    assert json.loads((directory / "manifest.json").read_text())["num_activations"] == VECTOR_ROWS_PER_UNIT
    assert len(list(directory.glob("shard-00001*.damaged-*"))) == 2
    assert np.array_equal(ensure(vector_spec(path, len(vectors)), None, tmp_path / "c").vectors(), vectors)


def test_manifest_counts_vectors_that_are_not_finite(tmp_path: Path) -> None:
    vectors = random_vectors(30)
    vectors[3, 2], vectors[7, 0] = np.nan, np.inf
    store = small_store(tmp_path, vectors)
    store.write_manifest()
    norms = json.loads((store.directory / "manifest.json").read_text())["norms"]
    expected = np.linalg.norm(np.delete(vectors, [3, 7], axis=0).astype(np.float64), axis=1)
    assert norms["num_not_finite"] == 2 and norms["mean"] == pytest.approx(expected.mean())
    assert [norms[f"p{p:02d}"] for p in (1, 5, 25, 50, 75, 95, 99)] == pytest.approx(
        np.percentile(expected, [1, 5, 25, 50, 75, 95, 99]).tolist()
    )


def test_damage_during_a_run_is_an_error_and_never_read(tmp_path: Path) -> None:
    store = small_store(tmp_path, random_vectors(20))
    table = store.open(20)
    flip_a_byte(next(store.directory.glob("shard-00001-*.arrow")))
    assert len(table.vectors(0, 10)) == 10
    with pytest.raises(StoreError, match=r"shard 1 .* checksum .* set aside: run again"):
        table.vectors(5, 15)
    assert store.available() == 10


@pytest.mark.parametrize("found", ["other rows", "another key"])
def test_shard_that_is_not_what_its_json_says_is_never_read(tmp_path: Path, found: str) -> None:
    vectors = random_vectors(20)
    store = small_store(tmp_path, vectors)
    statement = store.directory / "shard-00001.json"
    if found == "other rows":  # one bit: the rows behind would all be shifted
        statement.write_text(statement.read_text().replace('"rows": 10', '"rows": 11'))
    else:
        other = tmp_path / ("m" * 32)
        store.directory.rename(other)
        store = ActivationStore(tmp_path, other.name, {})
    assert 1 in ActivationStore(tmp_path, store.key, {}).verify([1])
    assert store.available() <= 10


def test_json_of_a_later_version_is_read(tmp_path: Path) -> None:
    store = small_store(tmp_path, random_vectors(20))
    statement = store.directory / "shard-00001.json"
    statement.write_text(json.dumps(json.loads(statement.read_text()) | {"colour": "blue"}))
    assert ActivationStore(tmp_path, store.key, {}).available() == 20


def test_shard_that_another_job_has_computed_anew_is_not_set_aside(tmp_path: Path) -> None:
    store = small_store(tmp_path, random_vectors(20))
    table = store.open(20)
    other = ActivationStore(tmp_path, store.key, {})
    other.quarantine(1, "a trial")
    (store.directory / json.loads(next(store.directory.glob("shard-00001.json.damaged-*")).read_text())["file"]).unlink()
    other.write_unit(1, make_unit(random_vectors(10, seed=1), 10, is_last=True), "float32")  # another device, other last bits
    with pytest.raises(StoreError, match="shard 1"):
        table.vectors(10, 20)
    assert store.verify([1]) == [] and len(store.open(20)) == 20


def test_too_many_open_files_damage_nothing(tmp_path: Path) -> None:
    store = small_store(tmp_path, random_vectors(20))
    limit, handles = resource.getrlimit(resource.RLIMIT_NOFILE), []
    table = store.open(20)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limit[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                handles.append(os.open("/dev/null", os.O_RDONLY))
        with pytest.raises(StoreError, match="need not be damaged"):
            table.vectors()
        with pytest.raises(StoreError, match="need not be damaged"):
            store.shards()
    finally:
        for handle in handles:
            os.close(handle)
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert store.available() == 20 and not list(store.directory.glob("*.damaged-*"))


def test_text_that_changes_during_a_fill_is_not_mixed_in(base: Path, tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "t.jsonl", passages(200))
    changed: list[int] = []

    def change(done: int, total: int) -> None:
        if done and not changed:
            changed.append(done)
            text.write_text(text.read_text().replace("river", "brook"))

    with pytest.raises(DataError, match="has changed since this run began"):
        ensure(spec(base, text, 150), 1, tmp_path / "c", progress=change)
    assert changed and len(shard_files(tmp_path / "c")) == 1


def test_manifest_that_cannot_be_written_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = small_store(tmp_path, random_vectors(20))

    def refused(path: Path, data: bytes) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(store_module, "publish", refused)
    store.write_manifest()
    assert len(store.open(20)) == 20


# ---- a full disk


def test_full_disk_says_how_much_is_needed_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_vectors(tmp_path / "v.parquet", random_vectors(3 * VECTOR_ROWS_PER_UNIT))
    ensure(vector_spec(path, 5), None, tmp_path / "c")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(
            RunError, match=r"no space left in .*: the next shard needs [\d,]+ bytes and [\d,]+ are free. The 1 sh"
        ):
            ensure(vector_spec(path, 3 * VECTOR_ROWS_PER_UNIT), None, tmp_path / "c")
    assert len(shard_files(tmp_path / "c")) == 1 and not list((tmp_path / "c").rglob("*.part"))
    assert len(ensure(vector_spec(path, 3 * VECTOR_ROWS_PER_UNIT), None, tmp_path / "c")) == 3 * VECTOR_ROWS_PER_UNIT


def test_directory_that_cannot_be_written_is_a_run_error(tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "v.parquet", random_vectors(5))
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(RunError, match="cannot write activations"):
        ensure(vector_spec(path, 5), None, tmp_path / "file")
