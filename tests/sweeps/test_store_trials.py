"""Both stores under what happens to them: kill -9, two at once, full disks, stop signals, growth. Real processes throughout.

    pytest tests/sweeps/test_store_trials.py -s                     # two kills of each store; prints what was seen
    KSWEEP_TRIALS=30 pytest tests/sweeps/test_store_trials.py -s    # that many kills, a third as many races, larger growth

Growth is from 16 to 64 draws and from 1,000 to 4,000 activations where there are 30 trials or more.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ksweep import Activations, Autoencoder, Cell, Resources, Sampling, Scoring, Sweep, connect, sweep_main
from ksweep.activations import ensure
from ksweep.activations.vector_source import VECTOR_ROWS_PER_UNIT
from ksweep.registry.cell_draws import CellDraws
from tests.activations.helpers import passages, random_vectors, shard_files, spec, vector_spec, write_jsonl, write_vectors
from tests.tiny_models import TinyPair, make_base, make_pair

ROOT = Path(__file__).parents[2]
TRIALS = int(os.environ.get("KSWEEP_TRIALS", "2"))
FULL = TRIALS >= 30
NUM_UNITS = 60
pytestmark = [pytest.mark.slow, pytest.mark.trials, pytest.mark.timeout(3600), pytest.mark.usefixtures("forked_python")]


def python(
    script: str, *arguments: object, environment: Mapping[str, str] | None = None, **options: object
) -> subprocess.Popen[str]:
    """A process of its own group that runs a script."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environment or {})}
    return subprocess.Popen(command, env=variables, text=True, start_new_session=True, **options)  # type: ignore[call-overload,no-any-return]


# ---- activations

FILL = """
import sys, time
from ksweep.activations import store
from ksweep.activations.caching import ensure
from ksweep.config.spec import Activations
computed = []
publish_unit = store.ActivationStore.publish_unit
vectors, root, count, start, most = sys.argv[1:]
def publish_and_wait(*all):
    computed.append(all[1])
    shard = publish_unit(*all)
    while len(computed) >= int(most):  # to be killed
        time.sleep(1)
    return shard
store.ActivationStore.publish_unit = publish_and_wait
time.sleep(max(0, float(start) - time.time()))
ensure(Activations(vectors=vectors, num_activations=int(count), rows="first"), None, root)
print(len(computed))
"""
"""Fills; after `most` units it waits and computes no more."""


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A file of many units, and the shards of an undisturbed fill."""
    place = tmp_path_factory.mktemp("vectors")
    path = write_vectors(place / "v.parquet", random_vectors(NUM_UNITS * VECTOR_ROWS_PER_UNIT), row_group_size=8000)
    return path, shard_files(ensure(vector_spec(path, NUM_UNITS * VECTOR_ROWS_PER_UNIT), None, place / "cache").directory)


def published(root: Path) -> int:
    return len(list(root.rglob("shard-*.json")))


def test_kill_9_while_filling_vectors_leaves_whole_shards_and_the_next_run_carries_on(
    vectors: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    path, expected = vectors
    resumed = left_parts = 0
    for trial in range(TRIALS):
        root, rng = tmp_path / str(trial), random.Random(trial)
        enough = 1 + rng.randrange(NUM_UNITS - 3)
        filler = python(FILL, path, root, NUM_UNITS * VECTOR_ROWS_PER_UNIT, 0, enough + 2, stdout=subprocess.DEVNULL)
        while published(root) < enough:
            assert filler.poll() is None
            time.sleep(0.0005)
        time.sleep(rng.random() * 0.01)
        filler.kill()
        filler.wait()
        whole = published(root)
        stated = [json.loads(p.read_text())["file"] for p in root.rglob("shard-*.json")]
        assert all(expected[name] == content for name, content in shard_files(root).items() if name in stated)
        left_parts += len(list(root.rglob("*.part")))
        again = python(FILL, path, root, NUM_UNITS * VECTOR_ROWS_PER_UNIT, 0, NUM_UNITS + 1, stdout=subprocess.PIPE)
        assert int(again.communicate()[0]) == NUM_UNITS - whole, "only what was missing is computed"
        assert shard_files(root) == expected
        resumed += 0 < whole < NUM_UNITS
    print(
        f"\nactivations from vectors: {TRIALS} kills, {resumed} resumed in the middle, {left_parts} *.part left; all bytes equal"
    )
    assert resumed == TRIALS


EXTRACT = """
import time
from ksweep.activations import ensure, store
from ksweep.config.spec import Activations
computed = []
publish_unit = store.ActivationStore.publish_unit
def publish_and_wait(*all):
    computed.append(all[1])
    shard = publish_unit(*all)
    while len(computed) >= {most}:  # to be killed
        time.sleep(1)
    return shard
store.ActivationStore.publish_unit = publish_and_wait
{call}
"""


def test_kill_9_while_a_model_extracts_leaves_whole_shards_and_the_next_run_carries_on(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", num_layers=3, d_model=16)
    text = write_jsonl(tmp_path / "rows.jsonl", passages(64 * 10 * TRIALS, low=20))
    count = 64 * 10 * TRIALS - 100
    request = spec(base, text, count)
    expected = shard_files(ensure(request, 1, tmp_path / "undisturbed").directory)
    call = f"ensure({request!r}, 1, {str(tmp_path / 'killed')!r})"
    resumed, rng = 0, random.Random(0)
    for _ in range(TRIALS):
        before, enough = published(tmp_path / "killed"), rng.randrange(8)
        filler = python(EXTRACT.format(call=call, most=enough + 2))
        while published(tmp_path / "killed") < before + enough + 1:
            assert filler.poll() is None
            time.sleep(0.0005)
        time.sleep(rng.random() * 0.03)
        filler.kill()
        filler.wait()
        resumed += before > 0
        left = shard_files(tmp_path / "killed")
        assert all(expected[name] == content for name, content in left.items()) and published(tmp_path / "killed") > before
    killed_at = published(tmp_path / "killed")
    table = ensure(request, 1, tmp_path / "killed")
    assert shard_files(table.directory) == expected
    print(
        f"\nactivations of a model: {TRIALS} kills, {resumed} resumed; {killed_at} of {len(expected)} shards after the last; "
        "all bytes equal"
    )


def test_two_processes_that_fill_one_key_at_once_share_the_work(vectors: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    path, expected = vectors
    twice = []
    for trial in range(max(1, TRIALS // 3)):
        root, start = tmp_path / str(trial), time.time() + 1.5
        fillers = [
            python(FILL, path, root, NUM_UNITS * VECTOR_ROWS_PER_UNIT, start, NUM_UNITS + 1, stdout=subprocess.PIPE)
            for _ in range(2)
        ]
        computed = [int(filler.communicate()[0]) for filler in fillers]
        assert shard_files(root) == expected and not list(root.rglob("*.part"))
        assert sum(computed) <= 2 * NUM_UNITS
        twice.append(sum(computed) - NUM_UNITS)
    print(f"\ntwo fillers of {NUM_UNITS} units at once: units computed twice {twice}")
    # Side by side from the front it would be nearly all of them, every time.
    assert np.median(twice) < NUM_UNITS / 2


# ---- draws


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    folder = tmp_path_factory.mktemp("tiny")
    write_jsonl(folder / "text.jsonl", passages(8000, low=20), document=[f"d{i // 3}" for i in range(8000)])
    return make_pair(folder, "qwen2", talks=True)


@pytest.fixture(scope="module")
def undisturbed(pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """What all the others must be a part of: a smaller run has the first activations and the first draws of a larger one."""
    sweep = tiny_sweep(pair, tmp_path_factory.mktemp("undisturbed"), max(640, 128 * TRIALS + 128), 16)
    run(sweep)
    return sweep


def tiny_sweep(
    pair: TinyPair, place: Path, num_activations: int, num_draws: int, cluster: str = "inprocess", tasks: int = 1
) -> Sweep:
    return Sweep(
        name="tiny",
        cell=Cell(
            autoencoder=Autoencoder(av=str(pair.av), ar=str(pair.ar), dtype="float32"),
            activations=Activations(
                model=str(pair.base), text=str(pair.base.parent / "text.jsonl"), num_activations=num_activations,
                min_position=10, dtype="float32",
            ),
            sampling=Sampling(num_draws=num_draws, max_new_tokens=20),
            scoring=Scoring(num_replicates=50),
        ),
        resources=Resources(cluster=cluster, gpus=0, tasks=tasks),  # type: ignore[arg-type]
        registry=str(place / "registry"),
        vector_cache=str(place / "vector_cache"),
    )  # fmt: skip


def run(sweep: Sweep) -> None:
    """In this process, without a word: what the trials print is theirs."""
    silence = io.StringIO()
    with redirect_stdout(silence), redirect_stderr(silence), pytest.raises(SystemExit) as end:
        sweep_main(sweep, ["--no-charts", "--retry"])  # a cell at which a rank was killed is not run again unasked
    assert end.value.code == 0


def launched(sweep: Sweep, before: str = "", **environment: str) -> subprocess.Popen[str]:
    script = (
        f"{before}\nfrom ksweep import *\nfrom ksweep.config.spec import *\nsweep_main({sweep!r}, ['--no-charts', '--retry'])"
    )
    return python(script, environment=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


WAITING = """
import os, time
if "SUBMITIT_LOCAL_GLOBALID" in os.environ:  # a rank, not its launcher
    from ksweep.registry.draws import DrawsStore
    from ksweep.launch.worker.heartbeat import HeartbeatThread
    published, asked = [], []
    publish, handle_stop_signal = DrawsStore.publish, HeartbeatThread.handle_stop_signal
    def publish_and_wait(self, unit, table):
        answer = publish(self, unit, table)
        published.append(unit)
        while len(published) >= int(os.environ["MOST_PARTS"]) and not asked:
            time.sleep(0.01)
        return answer
    DrawsStore.publish = publish_and_wait
    HeartbeatThread.handle_stop_signal = lambda self, *signal: (asked.append(signal), handle_stop_signal(self, *signal))[1]
"""
"""sitecustomize of the ranks: once a rank has published so many parts of draws it waits, before it scores the last, until it is
asked to stop, or killed."""


def waiting(sweep: Sweep, place: Path, most_parts: int) -> subprocess.Popen[str]:
    """The sweep's launcher, with ranks that never come to the end of their work."""
    (place / "hooks").mkdir(exist_ok=True)
    (place / "hooks" / "sitecustomize.py").write_text(WAITING)
    return launched(sweep, PYTHONPATH=f"{place / 'hooks'}{os.pathsep}{ROOT}", MOST_PARTS=str(most_parts))


def parts(sweep: Sweep) -> list[Path]:
    return list(Path(sweep.registry).glob("draws/*/part-0*.parquet"))


def ranks_at_work(sweep: Sweep) -> list[psutil.Process]:
    found = []
    for path in Path(sweep.registry).parent.glob("logs/*/attempt-*/rank-*.json"):
        beat = json.loads(path.read_text())
        if psutil.pid_exists(beat["pid"]) and abs(psutil.Process(beat["pid"]).create_time() - beat["process_started"]) < 1:
            found.append(psutil.Process(beat["pid"]))
    return found


def drawn(sweep: Sweep, num_activations: int, num_draws: int) -> pa.Table:
    [directory] = Path(sweep.registry).glob("scores/[!_]*/*")
    table = CellDraws(Path(sweep.registry), directory.parent.name, directory.name).read(num_activations, num_draws)
    assert table is not None and table.num_rows == num_activations * num_draws
    return table


def assert_same(one: pa.Table, two: pa.Table) -> float:
    """Texts equal to the letter, errors to 1e-5; returns the largest difference of an error."""
    for name in ("activation", "draw", "token_ids", "text", "explanation", "finish", "parse", "row_id", "document"):
        assert one[name].to_pylist() == two[name].to_pylist(), name
    differences = []
    for name in ("error", "cosine", "shuffled_error"):
        a, b = (np.array(t[name].to_pylist(), dtype=float) for t in (one, two))
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)
        differences.append(float(np.nanmax(np.abs(a - b))))
    return max(differences)


@pytest.mark.parametrize("ranks", [1, 2])
def test_kill_9_of_ranks_while_drawing_leaves_whole_parts_of_both_stores_and_the_next_run_carries_on(
    pair: TinyPair, undisturbed: Sweep, tmp_path: Path, ranks: int
) -> None:
    count = 64 * (2 * TRIALS + 2) * ranks  # a trial leaves two parts of a rank at most, the first one three
    other = tiny_sweep(pair, tmp_path / "killed", count, 16, cluster="local")
    other = replace(other, resources=replace(other.resources, tasks=ranks))
    rng, kills, resumed, left, unscored = random.Random(0), 0, 0, 0, 0
    for trial in range(TRIALS):
        before, enough = len(parts(other)), rng.randrange(2) + (trial == 0)
        launcher = waiting(other, tmp_path, enough + 1)
        # Every second time the ranks are killed where they wait, between draws and scores; else at any moment.
        between = trial % 2 == 0
        if between:
            enough = (enough + 1) * ranks
        # Every rank has begun: one that has not would outlive the kills.
        while not (len(parts(other)) >= before + enough and sum(drawing(other)) == ranks):
            assert launcher.poll() is None, launcher.communicate()
            time.sleep(0.002)
        time.sleep(0 if between else rng.random() * 0.7)
        victims = ranks_at_work(other)
        for victim in victims:
            victim.kill()
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.communicate()
        kills += bool(victims)
        resumed += before > 0
        scores = list(Path(other.registry).glob("scores/*/*/part-0*.parquet"))
        # "part-A-of-B" scores the draws A of the part B.
        scored_parts = {f"part-{part.stem.rpartition('-of-')[2].removeprefix('part-')}.parquet" for part in scores}
        assert {part.name for part in parts(other)} >= scored_parts, "a unit is scored once its draws are published"
        num_rows = {}
        for part in [*parts(other), *scores]:
            first, last, low, high = map(int, part.stem.removeprefix("part-").partition("-of-")[0].split("-"))
            assert pq.read_table(part, partitioning=None).num_rows == (last - first) * (high - low)
            num_rows[part] = (last - first) * (high - low)
        unscored += sum(num_rows[part] for part in parts(other)) > sum(num_rows[part] for part in scores)
        left += len(list(Path(other.registry).rglob(".*.part")))
    after = len(parts(other))
    run(replace(other, resources=Resources(cluster="inprocess", gpus=0)))
    first = min(count, undisturbed.cell.activations.num_activations)
    worst = assert_same(drawn(other, count, 16).slice(0, first * 16), drawn(undisturbed, first, 16))
    assert not list(Path(other.registry).rglob("*.damaged-*"))
    print(
        f"\ndraws on {ranks} ranks: {kills} kills of {TRIALS}, {unscored} between draws and scores, {resumed} resumed, "
        f"{left} *.part left, {after} of {count // 64} parts after the last; texts equal, "
        f"largest difference of an error {worst:.1e}"
    )
    assert kills == TRIALS and resumed == TRIALS - 1 and unscored >= (TRIALS + 1) // 2


def drawing(sweep: Sweep) -> Iterator[bool]:
    """Whether a living rank says that it is drawing (or about to)."""
    alive = {process.pid for process in ranks_at_work(sweep)}
    for path in Path(sweep.registry).parent.glob("logs/*/attempt-*/rank-*.json"):
        beat = json.loads(path.read_text())
        yield beat["pid"] in alive and beat["phase"].endswith(("drawing", "loading models", "scoring"))


COUNTING = """
import atexit, json, sys
from ksweep.registry.draws import DrawsStore
counted = []
publish = DrawsStore.publish
DrawsStore.publish = lambda self, unit, table: (counted.append(unit.num_draws), publish(self, unit, table))[1]
atexit.register(lambda: print(f"drawn {sum(counted)}", file=sys.stderr))
"""


@pytest.mark.parametrize("shape", ["the same cell", "overlapping cells"])
def test_two_sweeps_that_draw_under_one_key_at_once_share_the_work(
    pair: TinyPair, undisturbed: Sweep, tmp_path: Path, shape: str
) -> None:
    twice = []
    for trial in range(max(1, TRIALS // 3)):
        place = tmp_path / str(trial)
        one = tiny_sweep(pair, place, 640, 16)
        two = one if shape == "the same cell" else tiny_sweep(pair, place, 1000, 8)
        both = [launched(sweep, COUNTING) for sweep in (one, two)]
        said = [process.communicate()[1] for process in both]
        assert [process.returncode for process in both] == [0, 0], said
        computed = sum(int(text.rpartition("drawn ")[2]) for text in said)
        assert_same(drawn(one, 640, 16), drawn(undisturbed, 640, 16))
        needed = 640 * 16 + (0 if shape == "the same cell" else 360 * 8)
        overlap = 640 * 16 if shape == "the same cell" else 640 * 8
        with connect(one.registry) as connection:
            assert connection.execute("SELECT count(*), count(DISTINCT (activation, draw)) FROM draws").fetchone() == (
                needed,
                needed,
            )
        assert needed <= computed <= needed + overlap
        twice.append(computed - needed)
    print(f"\n{shape}: draws taken twice {twice} of {overlap} wanted by both")


# ---- signals


def test_stop_signals_leave_whole_parts_and_another_number_of_ranks_carries_on(
    pair: TinyPair, undisturbed: Sweep, tmp_path: Path
) -> None:
    sweep = tiny_sweep(pair, tmp_path, 640, 16, cluster="local")
    for stops, (name, ranks) in enumerate([("SIGTERM", 1), ("SIGUSR2", 2), ("Ctrl-C", 1)], start=1):
        before = len(parts(sweep))
        launcher = waiting(replace(sweep, resources=replace(sweep.resources, tasks=ranks)), tmp_path, 1)
        while len(parts(sweep)) <= before:
            assert launcher.poll() is None, launcher.communicate()
            time.sleep(0.01)
        if name == "Ctrl-C":
            os.killpg(launcher.pid, signal.SIGINT)  # a terminal sends it to every process in front
        else:
            for process in ranks_at_work(sweep):
                process.send_signal(getattr(signal, name))
        began = time.monotonic()
        error = launcher.communicate()[1]
        seconds, after = time.monotonic() - began, len(parts(sweep))
        assert launcher.returncode == 1 and "the same command continues" in error and "Traceback" not in error
        assert not list(Path(sweep.registry).rglob(".*.part")) and before < after < 10
        with connect(sweep.registry) as connection:
            assert connection.execute("SELECT status FROM runs").fetchall() == [("stopped",)] * stops, "a stop is no failure"
        print(f"\n{name}: {ranks} ranks stopped after {seconds:.1f} s, {before} parts before, {after} after")
    again = launched(replace(sweep, resources=replace(sweep.resources, tasks=2)))
    assert again.communicate() and again.returncode == 0
    assert_same(drawn(sweep, 640, 16), drawn(undisturbed, 640, 16))


# ---- growth


def test_growth_costs_what_is_new_and_gives_what_a_run_from_scratch_gives(pair: TinyPair, tmp_path: Path) -> None:
    small, many, few_draws, draws = (1000, 4000, 16, 64) if FULL else (100, 400, 4, 16)
    requests = {"draws": [(small, few_draws), (small, draws)], "activations": [(small, few_draws), (many, few_draws)]}
    run(tiny_sweep(pair, tmp_path / "warm", 10, 2))  # imports and digests are nobody's growth
    for kind, (first, second) in requests.items():
        seconds = []
        for place, request in [("grown", first), ("grown", second), ("at once", second)]:
            began = time.perf_counter()
            run(tiny_sweep(pair, tmp_path / kind / place, *request))
            seconds.append(time.perf_counter() - began)
        grown, at_once = (tiny_sweep(pair, tmp_path / kind / place, *second) for place in ("grown", "at once"))
        worst = assert_same(drawn(grown, *second), drawn(at_once, *second))
        with connect(grown.registry) as connection:
            [(sampled,)] = connection.execute("SELECT num_draws_sampled FROM runs ORDER BY finished DESC LIMIT 1").fetchall()
            curve = connection.execute(
                "SELECT k, fve FROM curves WHERE num_activations = ? AND num_draws = ? ORDER BY k", second
            ).fetchall()
        with connect(at_once.registry) as connection:
            np.testing.assert_allclose(curve, connection.execute("SELECT k, fve FROM curves ORDER BY k").fetchall(), atol=1e-5)
        assert sampled == second[0] * second[1] - first[0] * first[1]
        print(
            f"\n{first[0]:,} x {first[1]} -> {second[0]:,} x {second[1]} (activations x draws): {seconds[0]:.1f} s, then "
            f"{seconds[1]:.1f} s for {sampled:,} new draws; from scratch {seconds[2]:.1f} s; texts equal, "
            f"errors within {worst:.1e}"
        )


WRITES = """
import sys
from pathlib import Path
from ksweep.analysis.report.page import write_report
from ksweep.registry.database import rebuild_database
while True:
    rebuild_database(sys.argv[1])
    write_report(Path(sys.argv[1]), "tiny", Path(sys.argv[2]))
    print("written", flush=True)
"""


def test_kill_9_of_who_builds_the_database_and_the_report_leaves_both_whole(pair: TinyPair, tmp_path: Path) -> None:
    sweep = tiny_sweep(pair, tmp_path, 40, 8)
    run(sweep)
    page, question = tmp_path / "report.html", "SELECT * FROM curves ORDER BY ALL"
    with connect(sweep.registry) as connection:
        curves = connection.execute(question).fetchall()
    rng, left = random.Random(0), 0
    for _ in range(TRIALS):
        process = python(WRITES, sweep.registry, page, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == "written\n", process.communicate()
        time.sleep(rng.random() * 1.5)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        text = page.read_text()
        assert text.startswith("<!DOCTYPE html>") and text.rstrip().endswith("</html>")
        with duckdb.connect(str(Path(sweep.registry) / "ksweep.duckdb"), read_only=True) as database:
            assert database.execute(question).fetchall() == curves
        left += len([*tmp_path.rglob(".*.part"), *tmp_path.rglob(".*.next")])
    with connect(sweep.registry) as connection:
        assert connection.execute(question).fetchall() == curves
    print(f"\ndatabase and report: {TRIALS} kills, each time both whole; {left} unfinished files seen")


# ---- full disks

IN_SMALL_DISK = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"'


def on_small_disk(size: str, place: Path, script: str, *arguments: object) -> dict[str, object]:
    """Run a script where `place` is a disk of that size, seen by it alone; what it prints last is JSON."""
    place.mkdir()
    command = ["unshare", "-rm", "sh", "-c", IN_SMALL_DISK, "sh", size, str(place), sys.executable, "-c", script, str(place)]
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    if "mount:" in done.stderr or "unshare:" in done.stderr:
        pytest.skip(f"no mounts here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


FILL_A_SMALL_DISK = """
import json, sys
from pathlib import Path
from ksweep.activations import ensure
from ksweep.utils.errors import RunError
from ksweep.config.spec import Activations
place, vectors, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
(place / "ballast").write_bytes(bytes(3_000_000))
request = Activations(vectors=vectors, num_activations=count, rows="first")
try:
    ensure(request, None, place / "cache")
except RunError as error:
    message = str(error)
left = [p.name for p in place.rglob("*.part")]
there = len(list(place.rglob("shard-*.json")))
(place / "ballast").unlink()
table = ensure(request, None, place / "cache")
names = sorted(p.name for p in table.directory.glob("shard-*.arrow"))
print(json.dumps({"message": message, "left": left, "there": there, "names": names}))
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_full_disk_while_filling_is_told_and_leaves_whole_shards(tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "v.parquet", random_vectors(20 * VECTOR_ROWS_PER_UNIT))
    expected = ensure(vector_spec(path, 20 * VECTOR_ROWS_PER_UNIT), None, tmp_path / "cache").directory
    said = on_small_disk("4m", tmp_path / "disk", FILL_A_SMALL_DISK, path, 20 * VECTOR_ROWS_PER_UNIT)
    print(f"\n{said['message']}")
    assert "no space left" in str(said["message"]) and f"The {said['there']} shards written so far are whole" in str(
        said["message"]
    )
    assert said["left"] == [] and 0 < int(str(said["there"])) < 20
    assert said["names"] == sorted(p.name for p in expected.glob("shard-*.arrow")), "names hold the checksum of the content"


DRAW_ON_A_SMALL_DISK = """
import contextlib, io, json, os, shutil, sys
from pathlib import Path
from ksweep import *
from ksweep.config.spec import *
place = Path(sys.argv[1])
sweep = eval(sys.argv[2])
from ksweep.registry.draws import DrawsStore
publish = DrawsStore.publish
def publish_and_fill(self, unit, table):
    answer = publish(self, unit, table)
    if not (place / "ballast").exists():
        (place / "ballast").write_bytes(bytes(shutil.disk_usage(place).free - 40_000))
    return answer
def run():
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            sweep_main(sweep, ["--no-charts"])
        except SystemExit as end:
            return end.code, said.getvalue()
DrawsStore.publish = publish_and_fill
code, message = run()
DrawsStore.publish = publish
left = [p.name for p in place.rglob("*.part")]
there = len(list(place.glob("registry/draws/*/part-0*")))
(place / "ballast").unlink()
again, _ = run()
shutil.copytree(place / "registry", sys.argv[3])
print()
print(json.dumps({"code": code, "message": message, "left": left, "there": there, "again": again}))
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_full_disk_while_drawing_is_told_and_leaves_whole_parts(pair: TinyPair, undisturbed: Sweep, tmp_path: Path) -> None:
    sweep = replace(tiny_sweep(pair, tmp_path / "disk", 640, 16), vector_cache=undisturbed.vector_cache)
    said = on_small_disk("40m", tmp_path / "disk", DRAW_ON_A_SMALL_DISK, repr(sweep), tmp_path / "copy" / "registry")
    print(f"\n{said['message']}")
    assert said["code"] == 1 and "is full" in str(said["message"]) and "Traceback" not in str(said["message"])
    assert said["left"] == [] and 0 < int(str(said["there"])) < 10 and said["again"] == 0
    assert_same(drawn(replace(sweep, registry=str(tmp_path / "copy" / "registry")), 640, 16), drawn(undisturbed, 640, 16))
