"""What is derived stops nobody: whatever lies in a registry, the good runs are read, and damaged derived files are made again."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest

from ksweep.registry.activation_metadata import metadata_path, metadata_table, read_metadata, write_metadata
from ksweep.registry.database import connect, ingest_landings, rebuild_database
from ksweep.registry.run_record import write_run
from tests.registry.landed_runs import controls_of, curve_of, publish_draws, record_of, signed, spec_of


def good_runs(root: Path) -> list[str]:
    with connect(root) as connection:
        return [run for (run,) in connection.execute("SELECT DISTINCT run_id FROM curves ORDER BY 1").fetchall()]


def land(root: Path, *names: str) -> None:
    for i, name in enumerate(names):
        write_run(root, record_of(name, temperature=0.1 * (i + 1)), curve_of(), controls_of())


def rewrite(root: Path, name: str, **changes: Any) -> None:
    path = root / "landing" / name / "record.json"
    path.write_text(signed(json.loads(path.read_text()) | changes))


def with_seed(root: Path, name: str) -> None:
    spec = spec_of()
    rewrite(root, name, spec=spec | {"sampling": spec["sampling"] | {"seed": 2**64}})


def with_deep_json(root: Path, name: str) -> None:
    (root / "landing" / name / "record.json").write_text("[" * 100_000)


def with_pipe(root: Path, name: str) -> None:
    (root / "landing" / name / "record.json").unlink()
    os.mkfifo(root / "landing" / name / "record.json")


BAD_LANDINGS = {
    "a seed that no column holds": (with_seed, "OverflowError"),
    "a value that the table must have": (lambda root, name: rewrite(root, name, cell=None), "NOT NULL constraint failed"),
    "100,000 brackets": (with_deep_json, "is not valid JSON (maximum recursion"),
    "a named pipe": (with_pipe, "neither a file nor a directory"),
    "lone surrogates": (lambda root, name: rewrite(root, name, cell="\udcff"), "surrogates not allowed"),
    "a number of 5,000 digits": (
        lambda root, name: (root / "landing" / name / "record.json").write_text('{"format": ' + "9" * 5000 + "}"),
        "4300 digits",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", BAD_LANDINGS)
def test_a_bad_landing_is_quarantined_by_name_and_stops_no_other_reader(
    root: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage, reason = BAD_LANDINGS[what]
    land(root, "bad", "good")
    damage(root, "bad")
    report = ingest_landings(root)
    assert [q.run_id for q in report.quarantined] == ["bad"] and reason in report.quarantined[0].reason
    assert f"{root / 'landing' / 'bad'} is quarantined" in caplog.text
    assert good_runs(root) == ["good"]
    assert not ingest_landings(root).changed


def test_a_name_that_is_not_text_is_left_out(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    land(root, "good")
    os.mkdir(os.fsencode(root / "landing") + b"/\xff")
    os.makedirs(root / "attempts")
    (root / "attempts" / os.fsdecode(b"\xfe.json")).write_text("{}")
    assert good_runs(root) == ["good"]
    assert "2 files have names that are not text" in caplog.text


EMPTY_PARTS = (
    "draws/_schema/part-empty.parquet",
    "draws/_schema/activations.parquet",
    "scores/_schema/_schema/part-empty.parquet",
    "scores/_schema/_schema/metric-empty.parquet",
    "scores/_schema/_schema/identity.json",
    "chosen/empty.parquet",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", EMPTY_PARTS)
def test_a_damaged_part_without_rows_is_written_again_and_said(root: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    land(root, "good")
    ingest_landings(root)
    path = root / name
    whole, rng = path.read_bytes(), random.Random(18)
    flips = []
    for _ in range(10):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        flips.append(bytes(flipped))
    for damaged in (b"", whole[: len(whole) // 2], whole[:-1], b"PAR1" * 100, *flips):
        path.write_bytes(damaged)
        caplog.clear()
        ingest_landings(root)
        assert path.read_bytes() == whole or b"parquet-cpp-arrow" not in damaged, "kept only as another pyarrow's"
        assert (f"{path} is written again" in caplog.text) == (path.read_bytes() == whole)
    with connect(root) as connection:
        assert connection.execute("SELECT count(*) FROM draws").fetchall() == [(0,)]
        assert connection.execute("SELECT count(*) FROM chosen_curves").fetchall() == [(0,)]


@pytest.mark.slow
def test_a_block_that_flips_in_the_database_is_noticed_rebuilt_and_said(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    land(root, "a", "b")
    ingest_landings(root)
    file, rng = root / "ksweep.duckdb", random.Random(14)
    for _ in range(3):
        data = bytearray(file.read_bytes())
        start = rng.randrange(len(data) - 512)
        data[start : start + 512] = bytes(byte ^ 0xFF for byte in data[start : start + 512])
        file.write_bytes(data)
        caplog.clear()
        assert good_runs(root) == ["a", "b"]
        assert f"{file} is built again from the registry's files" in caplog.text


@pytest.mark.slow
def test_a_database_that_another_program_has_changed_is_not_copied_into_the_next(root: Path) -> None:
    land(root, "a")
    ingest_landings(root)
    with duckdb.connect(str(root / "ksweep.duckdb")) as connection:
        connection.execute("UPDATE run_curves SET fve = 0.99")
    land(root, "b")
    assert ingest_landings(root).rebuilt is not None
    with connect(root) as connection:
        assert connection.execute("SELECT max(fve) FROM run_curves").fetchone() == (pytest.approx(0.33),)


@pytest.mark.slow
def test_a_write_ahead_log_of_a_killed_program_is_removed_and_the_database_readable_by_all(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    land(root, "a")
    ingest_landings(root)
    kill = (
        "import duckdb, os, sys; c = duckdb.connect(sys.argv[1]); c.execute('CREATE TABLE mine (x INT)'); "
        "c.execute('INSERT INTO mine VALUES (1)'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", kill, str(root / "ksweep.duckdb")], check=False)
    assert (root / "ksweep.duckdb.wal").exists()
    assert ingest_landings(root).rebuilt == "another program has written to it (ksweep.duckdb.wal lies beside it)"
    assert "is built again" in caplog.text
    assert not (root / "ksweep.duckdb.wal").exists()
    with duckdb.connect(str(root / "ksweep.duckdb"), read_only=True) as connection:  # as the duckdb command opens it
        assert connection.execute("SELECT count(*) FROM runs").fetchone() == (1,)
    (root / "ksweep.duckdb.wal").write_bytes(b"of no database")
    rebuild_database(root)
    assert not (root / "ksweep.duckdb.wal").exists()


@pytest.mark.slow
def test_a_database_of_an_earlier_version_without_a_digest_is_read_and_only_built_again_with_new_runs(root: Path) -> None:
    land(root, "a")
    ingest_landings(root)
    (root / "ksweep.duckdb.digests").unlink()
    assert not ingest_landings(root).changed
    land(root, "b")
    assert ingest_landings(root).rebuilt == "it has no digest"
    assert (root / "ksweep.duckdb.digests").exists()
    land(root, "c")
    assert ingest_landings(root).rebuilt is None


def test_readers_between_the_two_renames_of_a_publication_see_a_good_database(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    land(root, "a")
    ingest_landings(root)
    before = (root / "ksweep.duckdb").read_bytes()
    land(root, "b")
    publish_draws(root, record_of("b").draws_key or "", [[0.5]])
    ingest_landings(root)
    (root / "ksweep.duckdb").write_bytes(before)  # the next digests are there, the next database is not yet
    assert ingest_landings(root).rebuilt is None


def test_messages_of_damage_go_to_the_log_once(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    land(root, "a")
    ingest_landings(root)
    (root / "ksweep.duckdb").write_bytes(b"no database")
    with caplog.at_level(logging.WARNING):
        ingest_landings(root)
        ingest_landings(root)
    assert caplog.text.count("is built again") == 1


class Vectors:
    """Twelve activations of four documents, as a store provides them."""

    key = "k" * 32

    def __len__(self) -> int:
        return 12

    def vectors(self, start: int, stop: int) -> np.ndarray:
        return np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)[start:stop]

    def column(self, name: str) -> np.ndarray:
        text = np.array([f"{name} {i % 4}" for i in range(12)], dtype=object)
        return np.arange(12) if name in ("position", "norm") else text


def test_evaluated_activations_that_are_damaged_are_computed_again_and_said(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected, rng = metadata_table(Vectors(), "raw"), random.Random(15)
    path = metadata_path(root, Vectors.key, "raw", 12)
    assert write_metadata(root, Vectors(), "raw").equals(expected)
    whole = path.read_bytes()
    flips = []
    for _ in range(50):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        flips.append(bytes(flipped))
    noticed = 0
    for damaged in (b"", whole[:-1], whole[: len(whole) // 2], *flips):
        path.write_bytes(damaged)
        caplog.clear()
        kept = read_metadata(root, Vectors.key, "raw", 12)
        assert kept is None or kept.equals(expected), "never other numbers"
        assert (f"{path} is left out" in caplog.text) == (kept is None)
        noticed += kept is None
        assert write_metadata(root, Vectors(), "raw").equals(expected)
        assert kept is not None or path.read_bytes() == whole
    assert noticed > 30


def test_metadata_of_other_activations_are_not_believed_and_those_of_an_earlier_version_are(root: Path) -> None:
    path = metadata_path(root, Vectors.key, "raw", 12)
    table = write_metadata(root, Vectors(), "raw")
    for other in (metadata_path(root, "o" * 32, "raw", 12), metadata_path(root, Vectors.key, "normalised", 12)):
        other.parent.mkdir(exist_ok=True)
        shutil.copy(path, other)
    assert read_metadata(root, "o" * 32, "raw", 12) is None
    assert read_metadata(root, Vectors.key, "normalised", 12) is None
    pq.write_table(table.replace_schema_metadata({"version": "1"}).drop_columns(["between", "scoring"]), path)
    earlier = read_metadata(root, Vectors.key, "raw", 12)
    assert earlier is not None and earlier["distance"].equals(table["distance"])
    pq.write_table(table.replace_schema_metadata({"version": "1"}).slice(1), path)
    assert read_metadata(root, Vectors.key, "raw", 12) is None
