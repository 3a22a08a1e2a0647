"""The draws store: what is there, what is missing, what is damaged."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksweep.evaluation.distributed import Solo
from ksweep.evaluation.recording import read_all_draws
from ksweep.registry import draws as module
from ksweep.registry.draws import DRAWS_SCHEMA, MAX_WORK_UNIT_SIZE, DrawsStore, WorkUnit, missing_work_units
from ksweep.utils.errors import RunError


def rows(unit: WorkUnit) -> pa.Table:
    """Draws whose text says which draw it is."""
    pairs = [(a, k) for a in range(unit.first_row, unit.last_row) for k in range(unit.first_draw, unit.last_draw)]
    known = {
        "activation": [a for a, _ in pairs],
        "draw": [k for _, k in pairs],
        "text": [f"{a}/{k}" for a, k in pairs],
        "error": [a + k / 100 for a, k in pairs],
    }
    return pa.table(
        {f.name: pa.array(known.get(f.name, [None] * len(pairs)), type=f.type) for f in DRAWS_SCHEMA}, schema=DRAWS_SCHEMA
    )


def fill(store: DrawsStore, num_activations: int, num_draws: int) -> int:
    units = store.missing(num_activations, num_draws)
    for unit in units:
        store.publish(unit, rows(unit))
    return sum(u.num_draws for u in units)


def test_a_new_store_misses_everything_on_the_grid(tmp_path: Path) -> None:
    units = DrawsStore(tmp_path, "k").missing(130, 20)
    assert units == [WorkUnit(row, min(130, row + 32), 0, 20) for row in range(0, 130, 32)]


@pytest.mark.parametrize(
    ("num_draws", "rows", "draws"), [(1, 64, 1), (16, 64, 16), (17, 32, 17), (32, 32, 32), (64, 16, 64), (200, 16, 64)]
)
def test_units_hold_the_draws_of_an_activation_together(num_draws: int, rows: int, draws: int) -> None:
    first = missing_work_units(np.zeros((130, num_draws), dtype=bool))[0]
    assert first == WorkUnit(0, rows, 0, draws) and first.num_draws <= MAX_WORK_UNIT_SIZE


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(1, 150), st.integers(1, 40)), min_size=1, max_size=4))
@settings(max_examples=25, deadline=None)
def test_growing_and_shrinking_takes_each_draw_once(
    tmp_path_factory: pytest.TempPathFactory, requests: list[tuple[int, int]]
) -> None:
    store = DrawsStore(tmp_path_factory.mktemp("d"), "k")
    have = np.zeros((150, 40), dtype=bool)
    for num_activations, num_draws in requests:
        expected = int((~have[:num_activations, :num_draws]).sum())
        assert fill(store, num_activations, num_draws) == expected
        have[:num_activations, :num_draws] = True
        table = store.read(num_activations, num_draws, ["text"])
        assert table is not None
        assert table["text"].to_pylist() == [f"{a}/{k}" for a in range(num_activations) for k in range(num_draws)]


def test_reading_what_is_not_all_there_gives_none(tmp_path: Path) -> None:
    store = DrawsStore(tmp_path, "k")
    assert store.read(1, 1) is None
    fill(store, 10, 4)
    assert store.read(10, 5) is None and store.read(11, 4) is None and store.read(10, 4) is not None


def test_a_damaged_part_is_set_aside_named_and_missing_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = DrawsStore(tmp_path, "k")
    fill(store, 70, 16)
    before = store.read(70, 16)
    part = store.path / WorkUnit(0, 64, 0, 16).file_name
    for damage in ("flip", "truncate", "empty"):
        data = bytearray(part.read_bytes())
        if damage == "flip":
            data[len(data) // 3] ^= 1
        part.write_bytes({"flip": bytes(data), "truncate": bytes(data[: len(data) // 2]), "empty": b""}[damage])
        assert store.read(70, 16) is None
        assert "is damaged" in caplog.text and part.name in caplog.text
        assert store.missing(70, 16) == [WorkUnit(0, 64, 0, 16)]
        fill(store, 70, 16)
        assert store.read(70, 16) == before


def test_a_part_that_was_renamed_by_hand_is_set_aside_and_missing_again(tmp_path: Path) -> None:
    store = DrawsStore(tmp_path, "k")
    fill(store, 64, 16)
    (store.path / WorkUnit(0, 64, 0, 16).file_name).rename(store.path / WorkUnit(64, 128, 0, 16).file_name)
    store.set_damaged_aside(128, 16)
    assert store.missing(128, 16) == [WorkUnit(0, 64, 0, 16), WorkUnit(64, 128, 0, 16)]


def test_a_part_that_another_job_has_set_aside_meanwhile_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, gone = DrawsStore(tmp_path, "k"), WorkUnit(64, 70, 0, 16)
    fill(store, 64, 16)
    monkeypatch.setattr(DrawsStore, "parts", lambda self: [WorkUnit(0, 64, 0, 16), gone])  # listed before it went
    store.set_damaged_aside(70, 16)
    assert store.read(70, 16) is None and store.read(64, 16) is not None


def test_what_another_sweep_has_drawn_meanwhile_is_left_out_of_a_unit(tmp_path: Path) -> None:
    store = DrawsStore(tmp_path, "k")
    unit = WorkUnit(0, 64, 0, 16)
    assert store.still_missing(unit) == [unit]
    fill(store, 10, 4)
    assert store.still_missing(unit) == [WorkUnit(0, 10, 4, 16), WorkUnit(10, 64, 0, 16)]
    fill(store, 70, 16)
    assert store.still_missing(unit) == []


def test_what_a_killed_writer_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    store = DrawsStore(tmp_path, "k")
    fill(store, 2, 2)
    old, young = store.path / ".old.part", store.path / ".young.part"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    store.set_damaged_aside(2, 2)
    assert not old.exists() and young.exists() and store.read(2, 2) is not None


def test_what_a_killed_writer_left_is_not_is_not_taken_for_a_part(tmp_path: Path) -> None:
    store = DrawsStore(tmp_path, "k")
    fill(store, 2, 2)
    (store.path / ".abc.part").write_bytes(b"half")
    (store.path / "part-00000002-00000004-00000-00002.parquet.tmp").write_bytes(b"half")
    assert store.parts() == [WorkUnit(0, 2, 0, 2)]


def test_a_full_disk_is_a_run_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    store = DrawsStore(tmp_path, "k")
    unit = WorkUnit(0, 1, 0, 1)

    def on_full_device(dir: Path, prefix: str, suffix: str) -> tuple[int, str]:
        return os.open("/dev/full", os.O_WRONLY), str(Path(dir) / "full.part")

    monkeypatch.setattr(module.tempfile, "mkstemp", on_full_device)
    with pytest.raises(RunError, match="is full"):
        store.publish(unit, rows(unit))
    assert list(store.path.iterdir()) == []


def kept_rows(unit: WorkUnit, kept: set[tuple[int, int]]) -> pa.Table:
    """Draws of which some have their reconstruction, (activation, draw, activation + draw)."""
    pairs = [(a, k) for a in range(unit.first_row, unit.last_row) for k in range(unit.first_draw, unit.last_draw)]
    vectors = [[a, k, a + k] if (a, k) in kept else None for a, k in pairs]
    table = rows(unit)
    at = table.schema.get_field_index("reconstruction")
    return table.set_column(at, DRAWS_SCHEMA.field(at), pa.array(vectors, DRAWS_SCHEMA.field(at).type))


def test_reconstructions_are_found_in_whatever_part_they_are_and_nan_where_none_was_kept(tmp_path: Path) -> None:
    store = DrawsStore(tmp_path, "k")
    kept = {(0, 0), (3, 2), (70, 0), (70, 17), (65, 5), (63, 18)}
    for num_activations, num_draws in ((66, 3), (80, 19)):  # parts of irregular shape
        for unit in store.missing(num_activations, num_draws):
            store.publish(unit, kept_rows(unit, kept))
    assert len(store.parts()) > 4
    activations, draws = np.array([70, 3, 63, 0, 70, 3, 500]), np.array([17, 2, 18, 0, 1, 2, 0])
    found = store.reconstructions(activations, draws, 3)
    expected = [[a, k, a + k] if (a, k) in kept else [np.nan] * 3 for a, k in zip(activations, draws, strict=True)]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array(expected))


def test_reconstructions_of_a_damaged_part_are_nan_and_it_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, unit = DrawsStore(tmp_path, "k"), WorkUnit(0, 2, 0, 1)
    store.publish(unit, kept_rows(unit, {(0, 0), (1, 0)}))
    (store.path / unit.file_name).write_bytes(b"")
    assert np.isnan(store.reconstructions(np.array([0, 1]), np.array([0, 0]), 3)).all()
    assert "is damaged" in caplog.text and store.parts() == []


def test_draws_that_another_node_has_published_are_waited_for(tmp_path: Path) -> None:
    store = DrawsStore(tmp_path, "key")
    assert read_all_draws(store, (3, 2), Solo()) is None
    late = threading.Timer(0.3, lambda: fill(store, 3, 2))
    late.start()
    found = read_all_draws(store, (3, 2), Solo(world_size=2))
    late.join()
    assert found is not None and found.num_rows == 6
