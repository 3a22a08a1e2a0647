"""The database is an index of the landing files: up to date, rebuildable, and in nobody's way."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pytest

from ksweep.registry import database, draws
from ksweep.registry.database import connect, ingest_landings, rebuild_database
from ksweep.registry.run_record import write_run
from ksweep.utils.errors import RequestError
from ksweep.utils.notes import Note
from tests.registry.landed_runs import controls_of, curve_of, publish_draws, record_of, signed, spec_of

TABLES = (
    "runs",
    "run_curves",
    "run_controls",
    "quarantine",
    "curves",
    "curve_history",
    "controls",
    "v_temperature",
    "v_failures",
    "run_metrics",
    "run_examples",
    "metrics",
    "examples",
    "cells",
    "v_compare",
    "v_gain",
    "v_throughput",
)


def rows(root: Path, query: str) -> list[tuple[Any, ...]]:
    with connect(root) as connection:
        return connection.execute(query).fetchall()


def everything(root: Path) -> dict[str, list[tuple[Any, ...]]]:
    with connect(root) as connection:
        return {table: sorted(connection.execute(f"SELECT * FROM {table}").fetchall(), key=repr) for table in TABLES}


def land_three(root: Path) -> None:
    for i, temperature in enumerate((0.4, 0.7, 1.0)):
        write_run(root, record_of(f"r{i}", temperature=temperature), curve_of(0.3 + 0.1 * i), controls_of())


def test_ingest_twice_changes_nothing_the_second_time(root: Path) -> None:
    land_three(root)
    first, before = ingest_landings(root), (root / "ksweep.duckdb").stat().st_ino
    second = ingest_landings(root)
    assert (first.num_new, first.num_runs, first.changed) == (3, 3, True)
    assert (second.num_new, second.num_runs, second.changed) == (0, 3, False)
    assert (root / "ksweep.duckdb").stat().st_ino == before, "no new file for nothing"
    assert rows(root, "SELECT count(*) FROM run_curves") == [(12,)]


@pytest.mark.slow
def test_rebuild_equals_step_by_step_ingest_row_for_row(root: Path) -> None:
    for step in ("a", "b"):
        write_run(root, record_of(f"{step}1", temperature=0.4, minutes=ord(step)), curve_of(), controls_of())
        write_run(root, record_of(f"{step}2", status="failed", error_type="RunError", error_message="x"))
        (root / "landing" / f"{step}3").mkdir()
        ingest_landings(root)
    step_by_step = everything(root)
    assert len(step_by_step["runs"]) == 4 and len(step_by_step["quarantine"]) == 2
    assert rebuild_database(root).rebuilt == "asked for"
    assert everything(root) == step_by_step


@pytest.mark.slow
def test_curves_show_one_row_per_cell_and_k_of_the_newest_finished_run(root: Path) -> None:
    write_run(root, record_of("old", minutes=0), curve_of(0.30))
    write_run(root, record_of("new", minutes=5), curve_of(0.50))
    write_run(root, record_of("broken", minutes=9, status="failed", error_type="RunError", error_message="x"))
    assert rows(root, "SELECT k, fve, run_id FROM curves ORDER BY k") == [
        (1, 0.50, "new"), (2, 0.51, "new"), (3, 0.52, "new"), (4, 0.53, "new"),
    ]  # fmt: skip
    assert rows(root, "SELECT count(*) FROM curve_history") == [(8,)]
    assert rows(root, "SELECT run_id, superseded FROM v_failures") == [("broken", False)]


def test_run_row_carries_spec_times_counts_and_maps(root: Path) -> None:
    write_run(root, record_of("r1", temperature=0.7), curve_of())
    query = (
        "SELECT temperature, av, text_source, finished::VARCHAR, num_failed_draws, failures['cut off'], seconds['sampling'], "
        "packages['torch'], argv[1], spec->>'$.sampling.temperature', resources->'$.tasks', layer, d_model, revisions FROM runs"
    )
    assert rows(root, query) == [
        (0.7, "demo/av", "held_out.jsonl", "2026-11-22 12:00:00", 40, 30, 210.5, "2.13.0",
         "experiments/temp_sweep.py", "0.7", "2", 20, None, ["owner/nla-av@0f1e2d", "owner/nla-ar@3c4b5a"]),
    ]  # fmt: skip


def test_the_step_of_a_run_is_that_of_its_label_or_the_only_one_of_its_paths(root: Path) -> None:
    steps = {
        ("temperature=0.7, step=500", "runs/iter_0000900/av", "demo/ar"): 500,
        ("temperature=0.7", "runs/iter_0000900/av", "runs/iter_900/ar"): 900,
        ("temperature=0.7", "demo/av", "owner/name@v1/iter_400"): 400,
        ("temperature=0.7", None, "x_step9.pt"): 9,
        ("temperature=0.7", "runs/iter_1/av", "runs/iter_2/ar"): None,
        ("temperature=0.7", "demo/av", "demo/ar"): None,
        ("temperature=0.7", "owner/step3", "demo/ar"): None,  # a repository, by the record's revisions
        ("temperature=0.7", "runs/step3", "demo/ar"): 3,
    }
    for number, (label, av, ar) in enumerate(steps):
        spec = spec_of(0.7, 4)
        spec["autoencoder"] |= {"av": av, "ar": ar} if av else {"av": None, "ar": None, "checkpoint": ar}
        write_run(root, record_of(f"r{number}", label=label, spec=spec, revisions=("owner/step3@0f1e2d",)), curve_of())
    found = rows(root, "SELECT run_id, step FROM runs ORDER BY run_id")
    assert found == [(f"r{number}", step) for number, step in enumerate(steps.values())]
    assert rows(root, "SELECT DISTINCT step FROM curves WHERE run_id = 'r0'") == [(500,)]


def test_v_temperature_places_temperatures_within_a_setting(root: Path) -> None:
    land_three(root)
    write_run(root, record_of("other", temperature=0.4, num_draws=2), curve_of(0.9, num_draws=2))
    found = rows(
        root, "SELECT temperature, place, count() OVER (PARTITION BY setting) FROM v_temperature WHERE k = 1 ORDER BY fve"
    )
    assert found == [(0.4, 3, 3), (0.7, 2, 3), (1.0, 1, 3), (0.4, 1, 1)], "two draws are another setting"


def test_v_draw_failures_gives_counts_and_rates_by_cause(root: Path) -> None:
    write_run(root, record_of("r1"), curve_of())  # 100 activations x 4 draws
    found = rows(root, "SELECT cause, num_failed_draws, failure_rate FROM v_draw_failures ORDER BY cause")
    assert found == [("cut off", 30, 0.075), ("empty", 10, 0.025)]


def test_damaged_landing_is_quarantined_named_and_looked_at_again_when_repaired(root: Path) -> None:
    land_three(root)
    curve = root / "landing" / "r1" / "curve.parquet"
    whole = curve.read_bytes()
    curve.write_bytes(whole[:-1])
    report = ingest_landings(root)
    assert (report.num_runs, [q.run_id for q in report.quarantined]) == (2, ["r1"])
    assert "r1/curve.parquet is not what was written" in report.quarantined[0].reason
    assert rows(root, "SELECT run_id, reason FROM quarantine") == [("r1", report.quarantined[0].reason)]
    assert ingest_landings(root).changed is False, "it is not read again while it stays as it is"
    curve.write_bytes(whole)
    os.utime(curve, ns=(0, 0))
    report = ingest_landings(root)
    assert (report.num_runs, report.quarantined) == (3, ())
    assert rows(root, "SELECT count(*) FROM quarantine") == [(0,)]


def test_record_whose_types_do_not_fit_is_quarantined(root: Path) -> None:
    land_three(root)
    path = root / "landing" / "r1" / "record.json"
    path.write_text(signed(json.loads(path.read_text()) | {"num_ranks": "two"}))
    report = ingest_landings(root)
    assert (report.num_runs, [q.run_id for q in report.quarantined]) == (2, ["r1"])


def test_half_written_landing_and_stray_files_do_not_harm(root: Path) -> None:
    land_three(root)
    (root / "landing" / ".r9.0123.part").mkdir()
    (root / "landing" / "notes.txt").write_text("mine")
    report = ingest_landings(root)
    assert (report.num_runs, [q.run_id for q in report.quarantined]) == (3, ["notes.txt"])


def test_removed_landing_disappears(root: Path) -> None:
    land_three(root)
    ingest_landings(root)
    shutil.rmtree(root / "landing" / "r1")
    report = ingest_landings(root)
    assert (report.num_removed, report.num_runs) == (1, 2)
    assert rows(root, "SELECT DISTINCT run_id FROM run_curves ORDER BY 1") == [("r0",), ("r2",)]
    assert rows(root, "SELECT DISTINCT run_id FROM run_controls ORDER BY 1") == [("r0",), ("r2",)]


@pytest.mark.slow
def test_open_reader_keeps_its_snapshot_and_a_new_connection_sees_new_rows(root: Path) -> None:
    write_run(root, record_of("r0", temperature=0.4), curve_of())
    with connect(root) as reader:
        write_run(root, record_of("r1", temperature=0.7), curve_of())
        assert ingest_landings(root).num_new == 1
        with connect(root) as later:
            assert later.execute("SELECT count(*) FROM runs").fetchone() == (2,)
        assert reader.execute("SELECT count(*) FROM runs").fetchone() == (1,)
        assert reader.execute("SELECT count(*) FROM curves").fetchone() == (4,)


@contextmanager
def held_open_by_another_process(path: Path, read_only: bool) -> Iterator[None]:
    code = "import duckdb, sys; c = duckdb.connect(sys.argv[1], read_only=sys.argv[2] == '1'); print(c.sql('from runs')); input()"
    command = [sys.executable, "-u", "-c", code, str(path), str(int(read_only))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.communicate("\n", timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("read_only", [True, False], ids=["reading", "writing"])
def test_another_process_holding_the_file_blocks_neither_ingest_nor_connect(root: Path, read_only: bool) -> None:
    write_run(root, record_of("r0", temperature=0.4), curve_of())
    ingest_landings(root)
    with held_open_by_another_process(root / "ksweep.duckdb", read_only):
        assert rows(root, "SELECT count(*) FROM runs") == [(1,)], "nothing to do, and the file is locked: a copy is read"
        write_run(root, record_of("r1", temperature=0.7), curve_of())
        assert ingest_landings(root).num_new == 1
        assert rows(root, "SELECT count(*) FROM runs") == [(2,)]


def test_connection_is_read_only(root: Path) -> None:
    ingest_landings(root)
    with connect(root) as connection, pytest.raises(duckdb.Error, match="read-only"):
        connection.execute("DELETE FROM runs")


def test_connect_brings_the_database_up_to_date(root: Path) -> None:
    land_three(root)
    assert rows(root, "SELECT count(*) FROM v_latest") == [(3,)]


def test_connect_without_a_registry_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no registry at .*nowhere"):
        connect(tmp_path / "nowhere")


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"not a database" * 500])
def test_unreadable_database_is_built_again(root: Path, content: bytes) -> None:
    land_three(root)
    (root / "ksweep.duckdb").write_bytes(content)
    report = ingest_landings(root)
    assert report.num_runs == 3 and report.rebuilt is not None and "could not be read" in report.rebuilt


@pytest.mark.slow
def test_database_of_another_schema_is_built_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    land_three(root)
    ingest_landings(root)
    monkeypatch.setattr(database, "SPEC_COLUMNS", {"temperature": "sampling.temperature"})
    report = ingest_landings(root)
    assert report.rebuilt == "it was made by another version of ksweep"
    assert rows(root, "SELECT temperature, av FROM runs ORDER BY 1") == [(0.4, None), (0.7, None), (1.0, None)]


def of_an_older_version(root: Path) -> None:
    """Same name, tables that look alike and mean something else."""
    (root / "ksweep.duckdb").unlink(missing_ok=True)
    with duckdb.connect(str(root / "ksweep.duckdb")) as connection:
        connection.execute("CREATE TABLE meta (key VARCHAR PRIMARY KEY, value VARCHAR NOT NULL)")
        connection.execute("INSERT INTO meta VALUES ('schema', '0123456789abcdef0123456789abcdef'), ('root', ?)", [str(root)])
        connection.execute("CREATE TABLE runs (run_id VARCHAR PRIMARY KEY, cell VARCHAR, fve DOUBLE)")
        connection.execute("INSERT INTO runs VALUES ('r0', 'wrong', 0.9), ('r1', 'wrong', 0.9), ('r2', 'wrong', 0.9)")
        connection.execute("CREATE TABLE quarantine (run_id VARCHAR, reason VARCHAR, signature VARCHAR)")


@pytest.mark.slow
def test_database_of_an_older_version_is_built_again_and_never_misread(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    land_three(root)
    ingest_landings(root)
    expected = everything(root)
    of_an_older_version(root)
    assert ingest_landings(root).rebuilt == "it was made by another version of ksweep"
    assert everything(root) == expected
    of_an_older_version(root)

    def refuse(*_: object) -> None:  # tests run as root, whom permissions do not stop
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(database, "_publish_next", refuse)
    assert everything(root) == expected, "of a copy, where the registry cannot be written"


def _land_some(root: Path, process: int) -> None:
    for i in range(3):
        write_run(root, record_of(f"p{process}-{i}", temperature=0.1 + process), curve_of(), controls_of())


@pytest.mark.trials
@pytest.mark.slow
def test_ten_processes_landing_while_two_ingest_lose_nothing(root: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_land_some, args=(root, i)) for i in range(10)]
    for writer in writers:
        writer.start()
    code = "import sys; from ksweep.registry.database import ingest_landings\nfor _ in range(5): ingest_landings(sys.argv[1])"
    ingesters = [subprocess.Popen([sys.executable, "-c", code, str(root)]) for _ in range(2)]
    for writer in writers:
        writer.join(240)
        assert writer.exitcode == 0
    assert [p.wait(240) for p in ingesters] == [0, 0]
    report = ingest_landings(root)
    assert (report.num_runs, report.quarantined) == (30, ())
    assert rows(root, "SELECT count(*), count(DISTINCT run_id) FROM run_curves") == [(120, 30)]
    assert not list(root.glob(".*.next*"))


@pytest.mark.slow
def test_killed_ingester_leaves_no_lock_and_nothing_in_the_registry(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    land_three(root)
    # Of one that was killed while it copied its database into the registry, and of one on another machine that does so now.
    old, new = root / ".ksweep.duckdb.old.next", root / ".ksweep.duckdb.new.next"
    for leftover in (old, new):
        leftover.write_bytes(b"half")
    os.utime(old, (0, 0))
    code = (
        "import sys, time; from ksweep.registry import database as d; real = d._fill\n"
        "def fill(*a): real(*a); print('filled', flush=True); time.sleep(600)\n"
        "d._fill = fill; d.ingest_landings(sys.argv[1])"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "filled\n"
        process.kill()
        assert not (root / "ksweep.duckdb").exists()
    with caplog.at_level(logging.WARNING):
        assert ingest_landings(root).num_runs == 3
    assert not caplog.messages, "a dead holder is not waited for"
    assert list(root.glob(".ksweep.duckdb.*")) == [new]


@pytest.mark.slow
def test_ingesters_that_do_not_see_one_anothers_locks_add_no_row_twice_and_stop_nobody(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines on a network file system without locks: the other publishes between this one's look and its own."""
    land_three(root)
    ingest_landings(root)
    write_run(root, record_of("late", temperature=0.9), curve_of())
    monkeypatch.setattr(database, "_lock", lambda root: contextlib.nullcontext())
    plan, publish_next, elsewhere = database._plan, database._publish_next, []

    def other_is_first(root: Path, *arguments: object, **options: object) -> object:
        found = plan(root, *arguments, **options)  # type: ignore[arg-type]
        if not elsewhere:
            elsewhere.append(True)
            ingest_landings(root)
        return found

    def other_is_first_again(root: Path, *arguments: object) -> None:
        if len(elsewhere) == 1:
            elsewhere.append(True)
            write_run(root, record_of("later", temperature=1.1), curve_of())
            ingest_landings(root)
        publish_next(root, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(database, "_plan", other_is_first)
    monkeypatch.setattr(database, "_publish_next", other_is_first_again)
    ingest_landings(root)
    assert len(elsewhere) == 2
    assert ingest_landings(root).num_runs == 5 and ingest_landings(root).quarantined == ()
    assert rows(root, "SELECT count(*), count(DISTINCT run_id) FROM run_curves") == [(20, 5)]


def test_draws_before_the_first_draw_are_an_empty_table_with_types(root: Path) -> None:
    with connect(root) as connection:
        assert connection.execute("SELECT count(*) FROM draws").fetchone() == (0,)
        names = {name: kind for name, kind, *_ in connection.execute("DESCRIBE draws").fetchall()}
    assert (names["error"], names["token_ids"], names["explanation"]) == ("DOUBLE", "INTEGER[]", "VARCHAR")
    assert set(draws.DRAWS_FILE_SCHEMA.names) - set(names) == {"reconstruction"}


@pytest.mark.slow
def test_tokens_by_role_are_rows_with_shares_and_unknown_formats_have_none(root: Path) -> None:
    stats = {"counts": {"user": 6, "assistant": 2, "pad": 4, "total": 12}, "proportions": {}, "total_sequences": 2}
    notes = (Note("layer", "why not"),)
    write_run(root, record_of("r1", temperature=0.5, token_stats=stats, selected_token_stats=stats, notes=notes), curve_of())
    write_run(root, record_of("r2", temperature=0.7), curve_of())
    found = rows(root, "SELECT run_id, tokens, role, num_tokens, share FROM v_token_roles ORDER BY tokens, num_tokens")
    one = [("assistant", 2, 0.25), ("pad", 4, None), ("user", 6, 0.75)]
    assert found == [("r1", tokens, *row) for tokens in ("all", "evaluated") for row in one]
    assert rows(root, "SELECT token_roles['user'], notes FROM runs ORDER BY run_id") == [
        (6, [{"about": "layer", "text": "why not"}]), (None, []),
    ]  # fmt: skip


@pytest.mark.slow
def test_draws_are_ranked_by_error_with_failures_last_and_named_by_cell(root: Path) -> None:
    record = record_of("r1", temperature=0.7)
    write_run(root, record, curve_of())
    assert record.draws_key is not None
    publish_draws(root, record.draws_key, [[0.5, None, 0.2, 0.4], [None, 0.9, 0.9, 0.1], [None, None, None, None]])
    publish_draws(root, "of_a_running_cell", [[0.3]])
    found = rows(root, "SELECT activation, draw FROM draws WHERE cell IS NOT NULL ORDER BY activation, rank")
    assert found == [(0, 2), (0, 3), (0, 0), (0, 1), (1, 3), (1, 1), (1, 2), (1, 0), (2, 0), (2, 1), (2, 2), (2, 3)]
    assert rows(root, "SELECT cell, explanation FROM best_draws ORDER BY cell NULLS LAST, activation") == [
        (record.cell, "0.2"), (record.cell, "1.3"), (None, "0.0"),
    ]  # fmt: skip


def test_draws_of_cells_that_share_them_appear_once_under_the_newest(root: Path) -> None:
    small, large = record_of("r1", num_draws=2), record_of("r2", num_draws=4, minutes=5)
    assert small.draws_key == large.draws_key and small.cell_key != large.cell_key
    write_run(root, small, curve_of(num_draws=2))
    write_run(root, large, curve_of(num_draws=4))
    publish_draws(root, large.draws_key or "", [[0.5, 0.4, 0.3, 0.2]])
    assert rows(root, "SELECT DISTINCT cell, count(*) OVER () FROM draws") == [(large.cell, 4)]


def test_draws_that_two_sweeps_took_at_once_count_once(root: Path) -> None:
    # One asked for 2 activations x 2 draws, the other for 1 x 4: parts that overlap in two draws.
    publish_draws(root, "key", [[0.5, 0.4], [0.9, None]])
    publish_draws(root, "key", [[0.5, 0.4, 0.1, 0.3]])
    assert len(list(root.glob("draws/key/part-*"))) == 2
    assert rows(root, "SELECT activation, draw, error, rank FROM draws ORDER BY 1, 2") == [
        (0, 0, 0.5, 4), (0, 1, 0.4, 3), (0, 2, 0.1, 1), (0, 3, 0.3, 2), (1, 0, 0.9, 1), (1, 1, None, 2),
    ]  # fmt: skip
    assert rows(root, "SELECT activation, error FROM best_draws ORDER BY 1") == [(0, 0.1), (1, 0.9)]


@pytest.mark.slow
def test_draws_and_query_of_the_readme_work_from_any_directory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    land_three(root)
    publish_draws(root, "key", [[0.5, 0.4]])
    ingest_landings(root)
    for directory in (root.parent, root, Path("/")):
        monkeypatch.chdir(directory)
        path = os.path.relpath(root / "ksweep.duckdb")
        with duckdb.connect(path, read_only=True) as connection:
            query = "select cell, k, fve, fve_low, fve_high from curves order by 1, 2"
            assert len(connection.execute(query).fetchall()) == 12
            assert connection.execute("select count(*) from draws").fetchone() == (2,)


@pytest.mark.slow
def test_draws_are_found_again_after_the_registry_moved(root: Path) -> None:
    land_three(root)
    publish_draws(root, "key", [[0.5, 0.4]])
    ingest_landings(root)
    moved = root.rename(root.with_name("we[i]rd 'place*"))
    assert rows(moved, "SELECT count(*) FROM draws") == [(2,)]
    assert rows(moved, "SELECT count(*) FROM runs") == [(3,)]


@pytest.mark.slow
def test_every_table_view_and_column_has_a_comment(root: Path) -> None:
    bare = (
        "SELECT table_name, column_name FROM duckdb_columns() WHERE database_name = 'ksweep' AND comment IS NULL "
        "UNION ALL SELECT table_name, NULL FROM duckdb_tables() WHERE database_name = 'ksweep' AND comment IS NULL "
        "UNION ALL SELECT view_name, NULL FROM duckdb_views() WHERE database_name = 'ksweep' AND NOT internal AND comment IS NULL"
    )
    assert rows(root, bare) == []
    meaning = "SELECT comment FROM duckdb_columns() WHERE table_name = '{}' AND column_name = 'error'"
    assert rows(root, meaning.format("curves")) == rows(root, meaning.format("run_curves"))
    assert rows(root, meaning.format("best_draws")) == rows(root, meaning.format("draws"))


@pytest.mark.slow
def test_file_stays_readable_by_duckdb_1_4(root: Path, tmp_path: Path) -> None:
    land_three(root)
    ingest_landings(root)
    write_run(root, record_of("later", temperature=1.3), curve_of())
    ingest_landings(root)  # adding to a file must not raise its version either
    copy = shutil.copyfile(root / "ksweep.duckdb", tmp_path / "copy.duckdb")
    with duckdb.connect() as connection:
        connection.execute(f"ATTACH '{copy}' AS written")
        (tags,) = connection.execute("SELECT tags FROM duckdb_databases() WHERE database_name = 'written'").fetchone() or ({},)
    assert tags["storage_version"].startswith("v1.4.0"), "1.4.0 and 1.5.6 opened such a file when this was written"


@pytest.mark.slow
def test_registry_that_cannot_be_written_is_read_up_to_date_from_a_copy(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(root, record_of("r0", temperature=0.4), curve_of())
    ingest_landings(root)
    write_run(root, record_of("r1", temperature=0.7), curve_of())

    def refuse(*_: object) -> None:  # tests run as root, whom permissions do not stop
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(database, "_publish_next", refuse)
    published = (root / "ksweep.duckdb").read_bytes()
    assert rows(root, "SELECT run_id FROM runs ORDER BY 1") == [("r0",), ("r1",)]
    assert (root / "ksweep.duckdb").read_bytes() == published


@pytest.mark.slow
def test_rows_that_another_host_has_ingested_are_not_inserted_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(root, record_of("r0", temperature=0.4), curve_of())
    ingest_landings(root)
    earlier, stat = (root / "ksweep.duckdb").stat(), Path.stat
    write_run(root, record_of("r1", temperature=0.7), curve_of())
    ingest_landings(root)
    write_run(root, record_of("r2", temperature=1.0), curve_of())

    def cached(path: Path, **options: bool) -> os.stat_result:  # as NFS, for up to 60 s after another host's rename
        return earlier if path.name == "ksweep.duckdb" else stat(path, **options)

    monkeypatch.setattr(Path, "stat", cached)
    assert rows(root, "SELECT run_id FROM runs ORDER BY run_id") == [("r0",), ("r1",), ("r2",)]


@pytest.mark.slow
def test_importing_ksweep_loads_neither_duckdb_nor_altair() -> None:
    code = "import sys, ksweep; print([m for m in ('duckdb', 'altair', 'pyarrow', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
