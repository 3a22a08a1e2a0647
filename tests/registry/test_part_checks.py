"""What SQL reads was checked: no flipped bit, no misplaced part becomes a number."""

from __future__ import annotations

import errno
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ksweep.registry import database, part_checks
from ksweep.registry.cell_draws import CellDraws
from ksweep.registry.chosen_files import CHOSEN_SCHEMA, record_chosen
from ksweep.registry.database import check_parts, connect
from ksweep.registry.metric_scores import MetricScores, digest_of_texts
from ksweep.registry.part_checks import CHECKED, damaged_parts, set_damaged_aside
from ksweep.registry.run_record import ACTIVATIONS_SCHEMA, write_run
from ksweep.registry.scores import MetricLayout, scored_unit
from ksweep.registry.work_units import WorkUnit
from ksweep.utils.errors import StoreError
from tests.registry.landed_runs import curve_of, record_of
from tests.stored_rows import publish_unit, rows_of, write_earlier_part

UNITS = (WorkUnit(0, 8, 0, 8), WorkUnit(8, 16, 0, 8))
ASKED = "SELECT activation, draw, text, error, cosine FROM draws ORDER BY ALL"


def stored(registry: Path, draws_key: str = "draws-key", error: float = 0.5) -> CellDraws:
    """Two parts of draws with their scores."""
    store = CellDraws(registry, draws_key, "scores-key")
    for unit in UNITS:
        pairs = [(a, k) for a in range(unit.first_row, unit.last_row) for k in range(8)]
        texts = [f"{draws_key} {a} {k}" for a, k in pairs]
        publish_unit(store, unit, rows_of(unit, text=texts, error=[error + a + k / 10 for a, k in pairs], cosine=[0.25] * 64))
    return store


def answer(registry: Path) -> list[tuple[object, ...]]:
    with connect(registry) as connection:
        return connection.execute(ASKED).fetchall()


TRIALS = int(os.environ.get("KSWEEP_TRIALS", "2"))


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.trials
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["draws", "scores"])
def test_rows_of_a_part_with_a_flipped_bit_are_left_out_and_the_part_is_named(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = stored(tmp_path)
    whole, rng = answer(tmp_path), random.Random(kind)
    directory = store.draws.path if kind == "draws" else store.scores.path
    path = sorted(directory.glob("part-*"))[1]
    content = path.read_bytes()
    for _ in range(10 * TRIALS):
        flip(path, rng.randrange(8 * len(content)))
        shown = answer(tmp_path)
        scored = [row for row in shown if row[3] is not None]
        # Where the draws are damaged their scores have no row either; where the scores are, the draws are shown without.
        assert shown == whole or (scored == whole[:64] and len(shown) == (64 if kind == "draws" else 128))
        if shown != whole:
            assert path.name in caplog.text and "`ksweep verify`" in caplog.text
        path.write_bytes(content)
        caplog.clear()
        database._warn_of.cache_clear()
    assert answer(tmp_path) == whole


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new"), [(b"cosine", b"cosinm"), (b"text", b"uext"), (b"row_id", b"row_ie")])
def test_a_part_with_a_renamed_column_is_left_out(tmp_path: Path, old: bytes, new: bytes) -> None:
    store = stored(tmp_path)
    whole, path = answer(tmp_path), sorted(store.draws.path.glob("part-*"))[1]
    data = path.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    path.write_bytes(data[:footer] + data[footer:].replace(old, new))
    assert answer(tmp_path) == whole[:64]


def test_a_part_under_another_key_is_left_out(tmp_path: Path) -> None:
    cold, hot = stored(tmp_path, "cold"), stored(tmp_path, "hot", error=3.0)
    whole = answer(tmp_path)
    part = sorted(cold.draws.path.glob("part-*"))[0]
    shutil.copy(part, hot.draws.path / part.name)
    shown = answer(tmp_path)
    assert shown == [row for row in whole if not (str(row[2]).startswith("hot") and int(str(row[0])) < 8)]
    assert {one.path for one in check_parts(tmp_path)} == {
        hot.draws.path / part.name,
        hot.scores.path / part.name,  # scores of the draws that were there
    }
    assert "written for" in min(check_parts(tmp_path)).reason


@pytest.mark.slow
def test_a_part_that_is_cut_or_empty_does_not_keep_sql_from_reading_the_others(tmp_path: Path) -> None:
    store = stored(tmp_path, draws_key="0")  # before draws/_schema in the order of names
    whole = answer(tmp_path)
    for path in (sorted(store.draws.path.glob("part-*"))[0], sorted(store.scores.path.glob("part-*"))[0]):
        content = path.read_bytes()
        for left in (content[:-20], b""):
            path.write_bytes(left)
            assert [row for row in answer(tmp_path) if row[3] is not None] == whole[64:]
        path.write_bytes(content)


def test_each_state_of_a_file_is_read_once_also_by_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, read = stored(tmp_path), []
    damage = part_checks._damage
    monkeypatch.setattr(part_checks, "_damage", lambda *all: (read.append(all[1]), damage(*all))[1])
    assert check_parts(tmp_path) == () and len(read) == 4
    assert check_parts(tmp_path) == () and len(read) == 4
    part_checks._listed.clear()  # as in another process
    assert check_parts(tmp_path) == () and len(read) == 4
    path = sorted(store.draws.path.glob("part-*"))[0]
    path.write_bytes(path.read_bytes())
    assert check_parts(tmp_path) == () and len(read) == 6, "the part and its scores"


def test_of_a_list_of_checked_parts_only_what_another_process_appends_is_read(tmp_path: Path) -> None:
    stored(tmp_path)
    assert check_parts(tmp_path) == ()
    listed = tmp_path / CHECKED
    first = part_checks._passed(tmp_path)
    assert len(first) == 4
    with listed.open("ab") as file:
        file.write(part_checks._lines({"another": "1"}) + b"half a l")
    parsed: list[bytes] = []
    digest = part_checks.xxhash.xxh3_64_hexdigest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part_checks.xxhash, "xxh3_64_hexdigest", lambda data: (parsed.append(data), digest(data))[1])
        assert part_checks._passed(tmp_path) == {**first, "another": "1"} and len(parsed) == 1
    with listed.open("ab") as file:
        file.write(b"ine\n" + part_checks._lines({"a third": "1", "another": ""}))
    assert part_checks._passed(tmp_path) == {**first, "another": "", "a third": "1"}
    for anew in ({"alone": "1"}, {f"part {i}": "1" for i in range(40)}):  # shorter and longer, in place
        listed.write_bytes(part_checks._lines(anew))
        assert part_checks._passed(tmp_path) == anew


@pytest.mark.slow
def test_a_flipped_list_of_checked_parts_costs_reading_and_nothing_else(tmp_path: Path) -> None:
    store = stored(tmp_path)
    assert check_parts(tmp_path) == ()
    listed, content = tmp_path / CHECKED, (tmp_path / CHECKED).read_bytes()
    path = sorted(store.draws.path.glob("part-*"))[1]
    flip(path, 8 * 400)
    assert [one.path for one in check_parts(tmp_path)] == [path]
    rng = random.Random(0)
    for _ in range(50):
        listed.write_bytes(content)
        part_checks._listed.clear()  # as in another process
        flip(listed, rng.randrange(8 * len(content)))
        assert [one.path for one in check_parts(tmp_path)] == [path]


def test_repair_sets_aside_what_is_damaged_so_that_its_draws_are_missing(tmp_path: Path) -> None:
    store = stored(tmp_path)
    path = sorted(store.draws.path.glob("part-*"))[1]
    flip(path, 8 * 400)
    set_damaged_aside(tmp_path, check_parts(tmp_path))
    assert check_parts(tmp_path) == () and not path.exists()
    assert store.coverage(16, 8).drawn.sum() == store.coverage(16, 8).scored.sum() == 64
    assert answer(tmp_path)[-1][0] == 7
    publish_unit(store, UNITS[1], rows_of(UNITS[1], text=["again"] * 64))
    assert len(answer(tmp_path)) == 128


def test_parts_of_earlier_versions_are_checked_by_their_pages_and_names(tmp_path: Path) -> None:
    directory = tmp_path / "draws" / "earlier"
    for unit in UNITS:
        write_earlier_part(directory, rows_of(unit, text=["a"] * 64, error=[0.5] * 64))
    assert len(answer(tmp_path)) == 128 and check_parts(tmp_path) == ()
    first, second = sorted(directory.glob("part-*"))
    shutil.copy(first, second)
    assert [one.path for one in check_parts(tmp_path)] == [second]
    assert len(answer(tmp_path)) == 64


def test_a_json_file_beside_the_parts_counts_only_as_it_was_written(tmp_path: Path) -> None:
    store = stored(tmp_path)
    store.publish_controls({"empty_text": 1.5, "gain": None})
    assert store.controls() == {"empty_text": 1.5, "gain": None}
    path, rng = store.scores.path / "controls.json", random.Random(0)
    content = path.read_bytes()
    for _ in range(100):
        path.write_bytes(content)
        flip(path, rng.randrange(8 * len(content)))
        assert store.controls() in (None, {"empty_text": 1.5, "gain": None})


ASKED_OF_OTHERS = ("FROM activations ORDER BY ALL", "FROM chosen_curves ORDER BY ALL", "FROM stored_metrics ORDER BY ALL")


def other_answers(registry: Path) -> list[list[tuple[object, ...]]]:
    with connect(registry) as connection:
        return [connection.execute(question).fetchall() for question in ASKED_OF_OTHERS]


@pytest.fixture
def others(tmp_path: Path) -> list[Path]:
    """Files of the other views: activations of a run, a recorded choice, the identity of a metric; each of two kinds alike."""
    for i in range(2):
        name = f"run{i}"
        activations = pa.Table.from_pylist(
            [{"activation": a, "row_id": f"r{a}", "norm": 1.0, "ks": [1], "errors": [0.5]} for a in range(4)], ACTIVATIONS_SCHEMA
        )
        write_run(tmp_path, record_of(name, temperature=0.5 + i), curve_of(), activations=activations)
        row = {"cell": name, "label": name, "chosen_by": "error", "reported": "judge", "k": 1, "value": 0.5, "run_id": name}
        record_chosen(tmp_path, pa.Table.from_pylist([row], CHOSEN_SCHEMA))
        layout = MetricLayout(metric=f"judge{i}", columns={"score": ("what a judge says", "higher")})
        MetricScores(tmp_path, "draws-key", f"metric{i}", layout).record({"from": "a judge"})
    patterns = ("landing/run1/activations.parquet", "chosen/[0-9a-f]*.parquet", "scores/draws-key/metric1/identity.json")
    return [sorted(tmp_path.glob(pattern))[-1] for pattern in patterns]


@pytest.mark.trials
@pytest.mark.slow
@pytest.mark.parametrize("view", range(3))
def test_flips_in_the_files_of_the_other_views_leave_out_their_rows_and_stop_nobody(
    tmp_path: Path, others: list[Path], view: int
) -> None:
    whole, rng, left_out = other_answers(tmp_path), random.Random(view), 0
    path = others[view]
    content = path.read_bytes()
    for _ in range(6 * TRIALS):
        flip(path, rng.randrange(8 * len(content)))
        shown = other_answers(tmp_path)
        assert shown[:view] + shown[view + 1 :] == whole[:view] + whole[view + 1 :]
        assert shown[view] == whole[view] or set(map(str, shown[view])) < set(map(str, whole[view]))
        left_out += shown[view] != whole[view]
        path.write_bytes(content)
    assert left_out > TRIALS and other_answers(tmp_path) == whole


def test_scores_without_a_column_that_their_identity_names_are_refused_in_a_sentence(tmp_path: Path) -> None:
    store, layout = stored(tmp_path), MetricLayout(metric="judge", columns={"score": ("what a judge says", "higher")})
    draws = store.draws.read_part(UNITS[0])
    scores = MetricScores(tmp_path, "draws-key", "metric", layout)
    texts = digest_of_texts(scores.texts, UNITS[0])
    assert draws is not None and texts is not None
    scores.publish_values(UNITS[0], draws, {"score": np.arange(64.0)}, texts)
    assert scores.values(8, 8)[0]["score"].ravel().tolist() == list(range(64))
    # As the identity of an earlier version, which has no digest, with a flipped bit.
    other = MetricScores(tmp_path, "draws-key", "metric", MetricLayout(metric="judge", columns={"scorm": ("", "higher")}))
    with pytest.raises(StoreError, match=r"has no value of 'scorm' for each draw, which identity\.json"):
        other.values(8, 8)


def test_bit_rot_that_verify_has_found_is_left_out_from_then_on(tmp_path: Path) -> None:
    store = stored(tmp_path)
    whole, path = answer(tmp_path), sorted(store.draws.path.glob("part-*"))[1]
    flip(path, 8 * 400)
    # The time of change of an inode cannot be set back: the list is made to hold the new one, as if the disk had flipped the bit.
    part_checks._remember(tmp_path, {str(path.relative_to(tmp_path)): str(part_checks._state(path))})
    assert check_parts(tmp_path) == ()
    assert [one.path for one in check_parts(tmp_path, again=True)] == [path]
    assert answer(tmp_path) == whole[:64]


def test_a_part_of_another_key_is_found_also_beside_a_first_part_that_cannot_be_read(tmp_path: Path) -> None:
    cold, hot = stored(tmp_path, "cold"), stored(tmp_path, "hot")
    first, second = sorted(hot.draws.path.glob("part-*"))
    first.write_bytes(first.read_bytes()[:-20])
    shutil.copy(sorted(cold.draws.path.glob("part-*"))[1], second)
    assert {one.path for one in check_parts(tmp_path)} >= {first, second}


def test_a_file_that_the_disk_refuses_stops_nobody_and_is_never_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stored(tmp_path)
    refused, whole = sorted(store.draws.path.glob("part-*"))[0], answer(tmp_path)
    os.utime(refused)
    read_table = pq.read_table

    def refuse(path: Path, **options: object) -> pa.Table:
        if path == refused:
            raise OSError(errno.EIO, "Input/output error")
        return read_table(path, **options)

    monkeypatch.setattr(pq, "read_table", refuse)
    [one] = [one for one in check_parts(tmp_path) if one.path == refused]
    assert not one.is_readable and "Input/output error" in one.reason
    set_damaged_aside(tmp_path, check_parts(tmp_path))
    assert refused.exists() and [row for row in answer(tmp_path) if row[3] is not None] == whole[64:]


def test_a_part_that_is_replaced_or_set_aside_while_it_is_read_is_not_damaged(tmp_path: Path) -> None:
    store = stored(tmp_path)
    replaced, gone = sorted(store.scores.path.glob("part-*"))
    draws = store.draws.read_part(UNITS[0])
    assert draws is not None
    changes = {
        replaced: lambda: store.publish_scores(scored_unit(UNITS[0]), rows_of(UNITS[0], error=[3.0] * 64), draws),
        gone: gone.unlink,
    }

    def read_by_sql(path: Path) -> pa.Table | str:
        """Another job is quicker than the second look at the file."""
        if (change := changes.pop(path, None)) is not None:
            change()
        return pq.read_table(path, partitioning=None) if path.exists() else "No files found"

    assert damaged_parts(tmp_path, read_by_sql) == () and not changes
    assert [row[3] for row in answer(tmp_path)] == [3.0] * 64 + [None] * 64


def test_names_that_no_store_gives_are_damaged(tmp_path: Path) -> None:
    store = stored(tmp_path)
    path = sorted(store.draws.path.glob("part-*"))[0]
    for name in ("part-0-8-0-8.parquet", f"{path.stem}-of-{path.stem.removeprefix('part-')}.parquet"):
        shutil.copy(path, store.draws.path / name)
    assert [one.reason for one in check_parts(tmp_path)] == ["its name is none that ksweep gives"] * 2


@pytest.mark.slow
def test_the_list_of_checked_parts_does_not_grow_with_every_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_checks, "MANY", 5)
    store = stored(tmp_path)
    path = sorted(store.draws.path.glob("part-*"))[0]
    for _ in range(20):
        os.utime(path)
        assert check_parts(tmp_path, again=True) == ()
    assert (tmp_path / CHECKED).read_bytes().count(b"\n") < 20


@pytest.mark.slow
def test_a_database_that_cannot_be_brought_up_to_date_is_read_without_what_is_damaged_by_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stored(tmp_path)
    whole = answer(tmp_path)
    flip(sorted(store.draws.path.glob("part-*"))[1], 8 * 400)
    for code in (errno.EROFS, errno.ENOSPC):

        def refuse(*_: object, code: int = code) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(database, "_publish_next", refuse)
        assert answer(tmp_path) == whole[:64]
