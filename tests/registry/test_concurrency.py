"""Many processes on one registry at once: what lands is never lost, nobody waits, and a killed ingester harms nothing."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ksweep.registry.database import ingest_landings
from ksweep.registry.run_record import write_run
from tests.registry.landed_runs import controls_of, curve_of, record_of

LOAD = Path(__file__).parents[2] / "scripts" / "load_registry.py"

INGEST = """
import sys, pathlib
from ksweep.registry.database import ingest_landings
root, stop, n = sys.argv[1], pathlib.Path(sys.argv[2]), 0
print("ready", flush=True)
while True:
    ingest_landings(root)
    n += 1
    if stop.exists():
        break
print(n)
"""
"""An ingester: often a reader, who ingests as well, has been quicker and there is nothing left to do."""


@contextmanager
def in_the_background(code: str, root: Path, stop: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", code, str(root), str(stop)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process


@pytest.mark.slow
@pytest.mark.trials
def test_twenty_ranks_publishing_while_two_read_one_ingests_and_one_reports_lose_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(LOAD), "--minutes", "0.08", "--ranks", "20", "--pause", "2", "--place", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("nothing is lost\n") and "is damaged" not in done.stderr
    assert [line.split("  ")[0] for line in done.stdout.splitlines()[2:-1]] == ["reader 0", "reader 1", "ingester", "reporter"]
    assert not list(tmp_path.iterdir())


@pytest.mark.trials
@pytest.mark.slow
def test_a_reader_that_holds_the_file_keeps_its_snapshot_while_thirty_ingests_go_on(root: Path) -> None:
    write_run(root, record_of("first"), curve_of())
    code = (
        "import sys; from ksweep.registry.database import connect; c = connect(sys.argv[1]); print('open', flush=True)\n"
        "for _ in sys.stdin: print(c.execute('SELECT count(*) FROM runs').fetchone()[0],"
        " c.execute('SELECT count(*) FROM curve_history').fetchone()[0], flush=True)"
    )
    command = [sys.executable, "-c", code, str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdin is not None and reader.stdout is not None and reader.stdout.readline() == "open\n"
        for i in range(30):
            write_run(root, record_of(f"later-{i}", temperature=1.0 + i), curve_of())
            assert ingest_landings(root).num_runs == i + 2
            reader.stdin.write("again\n")
            reader.stdin.flush()
            assert reader.stdout.readline() == "1 4\n"
        reader.stdin.close()
    assert reader.returncode == 0


@pytest.mark.trials
@pytest.mark.slow
def test_an_ingester_killed_at_any_moment_leaves_a_good_database(root: Path, tmp_path: Path) -> None:
    chance, num_kills, before = random.Random(0), 10, 0
    for kill in range(num_kills):
        for i in range(3):
            write_run(root, record_of(f"k{kill:02d}-{i}", temperature=0.1 + kill), curve_of(), controls_of())
        with in_the_background(INGEST, root, tmp_path / "never") as ingester:
            time.sleep(chance.random() * 0.2)
            os.kill(ingester.pid, signal.SIGKILL)
        if (root / "ksweep.duckdb").exists():  # what stands there is whole, however far the next one had come
            import duckdb

            with duckdb.connect(str(root / "ksweep.duckdb"), read_only=True) as connection:
                runs, points = connection.execute("SELECT count(*), (SELECT count(*) FROM run_curves) FROM runs").fetchone() or (
                    0,
                    0,
                )
            assert runs >= before and points == 4 * runs and runs % 3 == 0
            before = runs
    assert ingest_landings(root).num_runs == 3 * num_kills
    assert not list(root.glob(".ksweep.duckdb.*"))
