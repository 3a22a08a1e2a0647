"""The stores of draws and scores: what is there, what is missing, what is damaged, what belongs together."""

from __future__ import annotations

import os
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksweep.evaluation.distributed import Solo
from ksweep.evaluation.recording import read_all_draws
from ksweep.registry import part_store as module
from ksweep.registry.cell_draws import CellDraws, Coverage
from ksweep.registry.database import connect
from ksweep.registry.draws import DrawsStore
from ksweep.registry.part_labels import column_digest
from ksweep.registry.part_store import PartStore
from ksweep.registry.scores import scored_unit
from ksweep.registry.work_units import MAX_WORK_UNIT_SIZE, WorkUnit, missing_work_units
from ksweep.utils.errors import RunError
from tests.stored_rows import publish_unit, rows_of

GRIDS = st.tuples(st.integers(1, 70), st.integers(1, 20))
"""Number of activations, and of draws of each."""


def rows(unit: WorkUnit) -> pa.Table:
    """Draws whose text says which draw it is."""
    pairs = [(a, k) for a in range(unit.first_row, unit.last_row) for k in range(unit.first_draw, unit.last_draw)]
    return rows_of(unit, text=[f"{a}/{k}" for a, k in pairs], error=[a + k / 100 for a, k in pairs])


def path_of(store: PartStore[Any], part: WorkUnit) -> Path:
    return store.path / store.file_name(part)


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
    part = path_of(store, WorkUnit(0, 64, 0, 16))
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
    path_of(store, WorkUnit(0, 64, 0, 16)).rename(path_of(store, WorkUnit(64, 128, 0, 16)))
    assert store.read(128, 16) is None
    assert store.missing(128, 16) == [WorkUnit(0, 64, 0, 16), WorkUnit(64, 128, 0, 16)]


def test_a_part_that_another_job_has_set_aside_meanwhile_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, gone = DrawsStore(tmp_path, "k"), WorkUnit(64, 70, 0, 16)
    fill(store, 64, 16)
    monkeypatch.setattr(DrawsStore, "parts", lambda self: [WorkUnit(0, 64, 0, 16), gone])  # listed before it went
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
    cell = CellDraws(tmp_path, "k", "s")
    store = cell.draws
    fill(store, 2, 2)
    old, young = store.path / ".old.part", store.path / ".young.part"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    cell.set_damaged_aside(2, 2)
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
    return rows_of(unit, reconstruction=[[a, k, a + k] if (a, k) in kept else None for a, k in pairs])


def test_reconstructions_are_found_in_whatever_part_they_are_and_nan_where_none_was_kept(tmp_path: Path) -> None:
    store = CellDraws(tmp_path, "k", "s")
    kept = {(0, 0), (3, 2), (70, 0), (70, 17), (65, 5), (63, 18)}
    for num_activations, num_draws in ((66, 3), (80, 19)):  # parts of irregular shape
        for unit in store.draws.missing(num_activations, num_draws):
            publish_unit(store, unit, kept_rows(unit, kept))
    assert len(store.scored_parts()) > 4
    activations, draws = np.array([70, 3, 63, 0, 70, 3, 500]), np.array([17, 2, 18, 0, 1, 2, 0])
    found = store.reconstructions(activations, draws, 3)
    expected = [[a, k, a + k] if (a, k) in kept else [np.nan] * 3 for a, k in zip(activations, draws, strict=True)]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array(expected))


def test_reconstructions_of_a_damaged_part_are_nan_and_it_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, unit = CellDraws(tmp_path, "k", "s"), WorkUnit(0, 2, 0, 1)
    publish_unit(store, unit, kept_rows(unit, {(0, 0), (1, 0)}))
    path_of(store.scores, scored_unit(unit)).write_bytes(b"")
    assert np.isnan(store.reconstructions(np.array([0, 1]), np.array([0, 0]), 3)).all()
    assert "is damaged" in caplog.text and store.scored_parts() == [] and len(store.draws.parts()) == 1


def test_draws_that_another_node_has_published_are_waited_for(tmp_path: Path) -> None:
    store, unit = CellDraws(tmp_path, "key", "s"), WorkUnit(0, 3, 0, 2)
    assert read_all_draws(store, (3, 2), Solo()) is None
    late = threading.Timer(0.3, lambda: publish_unit(store, unit, rows(unit)))
    late.start()
    found = read_all_draws(store, (3, 2), Solo(world_size=2))
    late.join()
    assert found is not None and found.num_rows == 6


# --- draws and scores ---


def test_a_part_that_another_job_has_published_first_stays_and_is_the_one_to_score(tmp_path: Path) -> None:
    store, unit = CellDraws(tmp_path, "k", "s"), WorkUnit(0, 1, 0, 2)
    first, second = (rows_of(unit, text=[name, name]) for name in ("first", "second"))
    assert store.publish_draws(unit, first)["text"].to_pylist() == ["first", "first"]
    assert store.publish_draws(unit, second)["text"].to_pylist() == ["first", "first"]


def test_draws_are_complete_once_they_are_scored(tmp_path: Path) -> None:
    store, unit = CellDraws(tmp_path, "k", "s"), WorkUnit(0, 4, 0, 2)
    draws = store.publish_draws(unit, rows(unit))
    assert store.coverage(4, 2).drawn.all() and not store.is_complete(4, 2)
    assert store.read(4, 2, ["text", "error"]) is None
    texts = store.read(4, 2, ["text"])
    assert texts is not None and texts["text"].to_pylist() == [f"{a}/{k}" for a in range(4) for k in range(2)]
    store.publish_scores(scored_unit(unit), rows(unit), draws)
    joined = store.read(3, 2, ["text", "error"])
    assert store.is_complete(4, 2) and joined is not None
    assert joined.select(["text", "error"]).to_pylist()[3:] == [
        {"text": "1/1", "error": 1.01}, {"text": "2/0", "error": 2.0}, {"text": "2/1", "error": 2.01}
    ]  # fmt: skip
    assert CellDraws(tmp_path, "k", "other").read(4, 2, ["error"]) is None, "another AR has scored nothing"


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.integers(1, 70), st.integers(1, 20)), min_size=1, max_size=3),
    st.tuples(st.integers(1, 70), st.integers(1, 20)),
)
@settings(max_examples=20, deadline=None)
def test_scoring_what_is_drawn_covers_each_draw_once_within_the_grid(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[int, int]], grid: tuple[int, int]
) -> None:
    store = CellDraws(tmp_path_factory.mktemp("d"), "k", "s")
    for num_activations, num_draws in drawn:
        fill(store.draws, num_activations, num_draws)
    units = store.unscored(WorkUnit.of_grid(*grid))
    stored = {(a, k) for n, d in drawn for a in range(min(n, grid[0])) for k in range(min(d, grid[1]))}
    assert sum(unit.num_draws for unit in units) == len(stored)
    for unit in units:
        table = store.read_unit(unit)
        assert table is not None and table.num_rows == unit.num_draws
        store.publish_scores(unit, rows(unit), table)
    coverage = store.coverage(*grid)
    assert (coverage.scored == coverage.drawn).all() and store.unscored(WorkUnit.of_grid(*grid)) == []
    if coverage.scored.all():
        joined = store.read(*grid, ["text", "error"])
        assert joined is not None
        pairs = [(a, k) for a in range(grid[0]) for k in range(grid[1])]
        assert joined["text"].to_pylist() == [f"{a}/{k}" for a, k in pairs]
        assert joined["error"].to_pylist() == [a + k / 100 for a, k in pairs]


@pytest.mark.parametrize("damage", ["flip", "truncate", "another key", "no label", "another digest"])
def test_a_part_of_scores_that_is_damaged_or_misplaced_is_set_aside_and_its_draws_scored_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    store, other, unit = CellDraws(tmp_path, "k", "s"), CellDraws(tmp_path, "k", "other"), WorkUnit(0, 8, 0, 4)
    for cell in (store, other):
        publish_unit(cell, unit, rows(unit))
    path = path_of(store.scores, scored_unit(unit))
    data, table = bytearray(path.read_bytes()), pq.read_table(path, partitioning=None)
    if damage == "another key":
        shutil.copy(path_of(other.scores, scored_unit(unit)), path)
    elif damage == "no label":
        pq.write_table(table.replace_schema_metadata(), path)
    elif damage == "another digest":
        pq.write_table(table.set_column(2, "error", pa.array([0.0] * 32)).replace_schema_metadata(table.schema.metadata), path)
    else:
        errors = pq.ParquetFile(path).metadata.row_group(0).column(2)
        data[errors.data_page_offset + errors.total_compressed_size - 3] ^= 1
        path.write_bytes(bytes(data) if damage == "flip" else bytes(data[:-20]))
    store.set_damaged_aside(8, 4)
    assert "scores part" in caplog.text and "scored again" in caplog.text
    assert store.unscored(WorkUnit.of_grid(8, 4)) == [scored_unit(unit)] and store.coverage(8, 4).drawn.all()
    assert other.is_complete(8, 4)


def test_scores_of_draws_that_are_gone_or_others_are_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, unit = CellDraws(tmp_path, "k", "s"), WorkUnit(0, 2, 0, 2)
    publish_unit(store, unit, rows(unit))
    path_of(store.draws, unit).unlink()
    assert not store.coverage(2, 2).scored.any()
    store.publish_draws(unit, rows_of(unit, text=["other"] * 4))
    assert store.read(2, 2, ["error"]) is None and "scores other draws" in caplog.text
    publish_unit(store, unit, rows(unit))
    path_of(store.draws, unit).unlink()
    CellDraws(tmp_path, "k", "s").set_damaged_aside(2, 2)
    assert "are gone" in caplog.text and store.scored_parts() == []


def test_a_part_of_draws_in_the_directory_of_another_key_is_set_aside(tmp_path: Path) -> None:
    store, other, unit = DrawsStore(tmp_path, "k"), DrawsStore(tmp_path, "other"), WorkUnit(0, 2, 0, 2)
    store.publish(unit, rows(unit))
    other.path.mkdir()
    shutil.copy(path_of(store, unit), path_of(other, unit))
    assert other.read(2, 2) is None and other.parts() == [] and store.read(2, 2) is not None


@pytest.mark.parametrize(
    ("one", "two", "equal"),
    [
        (pa.array(["ab", "c"]), pa.array(["a", "bc"]), False),
        (pa.array([None, ""]), pa.array(["", None]), False),
        (pa.array([1.5, None]), pa.array([1.5, 0.0]), False),
        (pa.array([[1], [2, 3]]), pa.array([[1, 2], [3]]), False),
        (pa.array([[1], None]), pa.array([[1], []]), False),
        (pa.array(["x", "a", None, "b"]).slice(1), pa.array(["a", None, "b"]), True),
    ],
)
def test_digests_of_a_column_tell_values_apart_and_ignore_how_they_are_stored(one: pa.Array, two: pa.Array, equal: bool) -> None:
    digests = [column_digest(pa.chunked_array(chunks)) for chunks in ([one], [two], [one[:1], one[1:]])]
    assert (digests[0] == digests[1]) is equal and digests[2] == digests[0]


def test_with_damaged_draws_everybodys_scores_of_them_are_set_aside(tmp_path: Path) -> None:
    unit = WorkUnit(0, 2, 0, 2)
    stores = [CellDraws(tmp_path, "draws-key", key) for key in ("one", "two")]
    for store in stores:
        publish_unit(store, unit, rows(unit))
    part = path_of(stores[0].draws, unit)
    part.write_bytes(part.read_bytes()[:-9])
    stores[0].set_damaged_aside(2, 2)
    assert [store.scored_parts() for store in stores] == [[], []] and stores[0].draws.parts() == []
    assert len(list((tmp_path / "scores").glob("*/*/part-*.damaged-*"))) == 2
    stores[0].publish_draws(unit, rows(unit))
    assert not stores[1].is_complete(2, 2), "scores of the texts of before are not those of what is sampled again"


def test_scores_of_texts_that_were_sampled_again_meanwhile_are_not_published(tmp_path: Path) -> None:
    unit = WorkUnit(0, 2, 0, 2)
    store, other = (CellDraws(tmp_path, "draws-key", "scores-key") for _ in range(2))
    store.publish_draws(unit, rows(unit))
    stale = store.read_unit(scored_unit(unit))
    assert stale is not None
    other.draws.set_aside(unit, "a test says so")
    other.publish_draws(unit, rows_of(unit, text=["another"] * 4))
    store.publish_scores(scored_unit(unit), rows(unit), stale)
    assert not other.is_complete(2, 2)
    fresh = other.read_unit(scored_unit(unit))
    other.publish_scores(scored_unit(unit), rows(unit), fresh)
    assert other.is_complete(2, 2)


def two_texts_of_one_draw(registry: Path) -> tuple[CellDraws, CellDraws]:
    """Two ARs' scores of draws in two overlapping parts, whose texts differ: each AR has first scored another part."""
    early, late = WorkUnit(0, 2, 0, 4), WorkUnit(1, 3, 0, 2)
    one, two = (CellDraws(registry, "draws-key", key) for key in ("one", "two"))
    one_draws = one.publish_draws(late, rows_of(late, text=["late"] * 4))
    one.publish_scores(scored_unit(late), rows_of(late, error=[9.0] * 4), one_draws)
    two_draws = two.publish_draws(early, rows_of(early, text=["early"] * 8))
    two.publish_scores(scored_unit(early), rows_of(early, error=[0.5] * 8), two_draws)
    return one, two


def test_of_two_parts_with_a_draw_the_first_counts_for_every_scorer(tmp_path: Path) -> None:
    one, two = two_texts_of_one_draw(tmp_path)
    grid = WorkUnit.of_grid(3, 2)
    assert one.coverage(3, 2).scored.tolist() == [[False, False], [False, False], [True, True]]
    assert two.coverage(3, 2).scored.tolist() == [[True, True], [True, True], [False, False]]
    for store in (one, two):
        assert store.read(3, 2, ["text", "error"]) is None
        for unit in store.unscored(grid):
            draws = store.read_unit(unit)
            assert draws is not None
            store.publish_scores(unit, rows_of(unit, error=[float(len(text)) for text in draws["text"].to_pylist()]), draws)
        assert store.is_complete(3, 2)
    tables = [store.read(3, 2, ["text", "error"]) for store in (one, two)]
    assert [t["text"].to_pylist() for t in tables if t is not None] == [["early"] * 4 + ["late"] * 2] * 2
    assert [t["error"].to_pylist() for t in tables if t is not None] == [[5.0] * 4 + [9.0] * 2, [0.5] * 4 + [4.0] * 2]


def test_scores_of_a_part_that_no_longer_counts_are_lost_and_what_a_user_deleted_is_not(tmp_path: Path) -> None:
    one, _ = two_texts_of_one_draw(tmp_path / "two")
    late = WorkUnit(2, 3, 0, 2)
    assert not one.has_lost(3, 2), "it never had scores of the first activations"
    for unit in one.unscored(WorkUnit(0, 1, 0, 2)):
        draws = one.read_unit(unit)
        assert draws is not None
        one.publish_scores(unit, rows_of(unit), draws)
    assert one.has_lost(3, 2) and one.coverage(3, 2).scored.sum() == 4

    deleted = CellDraws(tmp_path / "deleted", "draws-key", "one")
    publish_unit(deleted, late, rows(late))
    path_of(deleted.draws, late).unlink()
    assert not deleted.has_lost(3, 2)
    deleted.draws.path.joinpath("part-x.parquet.damaged-1").touch()
    assert deleted.has_lost(3, 2)


def test_sql_too_takes_the_first_of_two_parts_with_a_draw_for_every_scorer(tmp_path: Path) -> None:
    two_texts_of_one_draw(tmp_path)
    with connect(tmp_path) as connection:
        rows_of_activation_1 = connection.execute(
            "SELECT scores_key, text, error FROM draws WHERE activation = 1 AND draw < 2 ORDER BY ALL"
        ).fetchall()
        counts = connection.execute("SELECT count(*), count(DISTINCT (activation, draw)) FROM draws").fetchone()
    assert rows_of_activation_1 == [("two", "early", 0.5)] * 2, "scores of the other text of a draw are not those of its text"
    assert counts == (10, 10)


@given(st.integers(1, 9), st.integers(1, 9), st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_what_exists_travels_between_ranks_as_bytes(num_activations: int, num_draws: int, rng: random.Random) -> None:
    grid = (num_activations, num_draws)
    drawn, scored = (np.array([[rng.random() < 0.5 for _ in range(num_draws)] for _ in range(num_activations)]) for _ in "ds")
    same = Coverage.from_bytes(Coverage(drawn, scored).to_bytes(), grid)
    assert (same.drawn == drawn).all() and (same.scored == scored).all() and same.drawn.dtype == bool
