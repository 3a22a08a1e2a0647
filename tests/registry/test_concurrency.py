"""Many processes on one registry at once: what lands is never lost, nobody waits, and a killed ingester harms nothing."""

from __future__ import annotations

import multiprocessing
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

from ksweep.registry.database import connect, ingest_landings
from ksweep.registry.run_record import write_run
from tests.registry.landed_runs import controls_of, curve_of, record_of

NUM_LANDERS = 50
RUNS_EACH = 2

READ = """
import sys, pathlib
from ksweep.registry.database import connect
root, stop, seen, reads = sys.argv[1], pathlib.Path(sys.argv[2]), 0, 0
print("ready", flush=True)
while True:
    with connect(root) as c:
        runs, = c.execute("SELECT count(*) FROM runs").fetchone()
        points, owners = c.execute("SELECT count(*), count(DISTINCT run_id) FROM run_curves").fetchone()
    assert runs >= seen and points == 4 * owners and owners == runs, (seen, runs, points, owners)
    seen, reads = runs, reads + 1
    if stop.exists():
        break
print(reads)
"""
"""A reader: what it sees only grows, and is never half of an ingest."""

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


def land_some(root: Path, process: int, num_runs: int) -> None:
    for i in range(num_runs):
        write_run(root, record_of(f"p{process:03d}-{i}", temperature=0.1 + process), curve_of(), controls_of())


@contextmanager
def in_the_background(code: str, root: Path, stop: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", code, str(root), str(stop)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process


def count_of(process: subprocess.Popen[str]) -> int:
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0
    return int(out)


@pytest.mark.slow
def test_fifty_processes_landing_while_two_read_and_one_ingests_lose_nothing(root: Path, tmp_path: Path) -> None:
    stop = tmp_path / "stop"
    landers = [
        multiprocessing.get_context("fork").Process(target=land_some, args=(root, i, RUNS_EACH)) for i in range(NUM_LANDERS)
    ]
    with (
        in_the_background(READ, root, stop) as one,
        in_the_background(READ, root, stop) as other,
        in_the_background(INGEST, root, stop) as ingester,
    ):
        for lander in landers:
            lander.start()
        for lander in landers:
            lander.join(240)
        stop.touch()
        counts = [count_of(process) for process in (one, other, ingester)]
    assert [lander.exitcode for lander in landers] == [0] * NUM_LANDERS
    report = ingest_landings(root)
    assert (report.num_runs, report.quarantined) == (NUM_LANDERS * RUNS_EACH, ())
    with connect(root) as connection:
        assert connection.execute("SELECT count(*), count(DISTINCT run_id) FROM run_curves").fetchone() == (400, 100)
        assert connection.execute("SELECT count(*), count(DISTINCT run_id) FROM run_controls").fetchone() == (300, 100)
    assert min(counts) > 0
    assert not list(root.glob(".*.next*"))
    print(f"{NUM_LANDERS} processes landed {report.num_runs} runs; reads: {counts[0]} and {counts[1]}; ingests: {counts[2]}")


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
