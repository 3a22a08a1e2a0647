"""What does a registry bear? Many ranks publish, readers read, one process ingests, one writes reports: what is lost, what grows?

    python scripts/load_registry.py                                       # 50 ranks, 2 readers, 10 minutes
    python scripts/load_registry.py --minutes 1 --ranks 8 --place /dev/shm

A rank is a process without models. In each round it publishes a part of draws with its scores under a key of its own, one under
a key that it shares with others (whoever is first counts, all score it), a part of a metric of each, and records a run with a
curve, controls and errors of its activations; then it waits some `--pause` seconds, as for the next draws. A reader connects and
asks what can only grow and is never half of a part or of a run; a report of ten cells is written again and again. Last,
everything is asked for by SQL and every file is read again. Exits with 1 if anything is missing, damaged, in quarantine or left
over.

Memory is the resident size of a process at the end of each tenth of the time (each minute of ten); "flat" is its growth in the
second half, by least squares.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from bench_registry import draws_of, run_record

from ksweep.analysis.report import write_report
from ksweep.registry.cell_draws import CellDraws
from ksweep.registry.database import check_parts, connect, ingest_landings
from ksweep.registry.metric_scores import MetricScores, digest_of_texts
from ksweep.registry.run_record import damaged_runs, new_run_id, write_run
from ksweep.registry.scores import MetricLayout, scored_unit
from ksweep.registry.work_units import WorkUnit
from ksweep.utils.fingerprint import fingerprint

ACTIVATIONS, DRAWS = 16, 16
"""Of a part: 256 draws."""
SCORES_KEY, METRIC_KEY = "5" * 32, "6" * 32
NUM_SHARED, CELLS_OF_A_SWEEP = 4, 10
WORDS = MetricLayout(metric="words", columns={"num_words": ("words of the explanation", "neither")})
POINTS, CONTROLS = 5, 3
"""Rows of each run."""
fork = multiprocessing.get_context("fork")


@dataclass
class Load:
    """A load that is under way."""

    root: Path
    notes: Path
    """Directory in which each process says what it did."""
    pause: float

    @property
    def is_over(self) -> bool:
        return (self.notes / "stop").exists()

    def note(self, name: str, content: Any) -> None:
        (self.notes / f"{name}.json").write_text(json.dumps(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--ranks", type=int, default=50)
    parser.add_argument("--readers", type=int, default=2)
    parser.add_argument("--pause", type=float, default=10.0, help="seconds that a rank waits between two rounds")
    parser.add_argument("--place", type=Path, help="where the registry is created; without, a temporary directory")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="load-registry-", dir=options.place))
    try:
        load = Load(place / "registry", place / "notes", options.pause)
        load.root.mkdir()
        load.notes.mkdir()
        memory = run(load, options.minutes * 60, options.ranks, options.readers)
        faults = check(load, options.ranks)
        report(load, memory, options.minutes * 60)
        print("nothing is lost" if not faults else "\n".join(["FAULTS:", *faults]))
    finally:
        shutil.rmtree(place)
    sys.exit(1 if faults else 0)


# Processes


def run(load: Load, seconds: float, num_ranks: int, num_readers: int) -> dict[str, list[float]]:
    """Start everything, stop it after so many seconds, and return the memory of those that read, MB at each tenth."""
    ranks = [started(f"rank {i}", publish_rounds, load, i) for i in range(num_ranks)]
    others = [started(f"reader {i}", again_and_again, load, f"reader {i}", Reader(load.root)) for i in range(num_readers)]
    others.append(started("ingester", again_and_again, load, "ingester", lambda: ingest_landings(load.root)))
    others.append(started("reporter", again_and_again, load, "reporter", lambda: write_a_report(load)))
    memory: dict[str, list[float]] = {process.name: [] for process in others}
    for _ in range(10):
        time.sleep(seconds / 10)
        for process in others:
            if process.is_alive():
                memory[process.name].append(psutil.Process(process.pid).memory_info().rss / 1e6)
    (load.notes / "stop").touch()
    for process in (*ranks, *others):
        process.join()
    for process in (*ranks, *others):
        if process.exitcode != 0:
            raise SystemExit(f"{process.name} ended with exit code {process.exitcode}")
    return memory


def started(name: str, act: Callable[..., None], *arguments: Any) -> ForkProcess:
    process = fork.Process(target=act, args=arguments, name=name)
    process.start()
    return process


def again_and_again(load: Load, name: str, act: Callable[[], Any]) -> None:
    times = []
    while not load.is_over:
        began = time.perf_counter()
        act()
        times.append(time.perf_counter() - began)
        time.sleep(load.pause / 10)
    load.note(name, times)


def publish_rounds(load: Load, rank: int) -> None:
    """Publish until the load is over, and note how many rounds that were."""
    generator, rounds = np.random.default_rng(rank), 0
    while not load.is_over:
        unit = WorkUnit(rounds * ACTIVATIONS, (rounds + 1) * ACTIVATIONS, 0, DRAWS)
        errors = generator.gamma(4.0, 0.15, (ACTIVATIONS, DRAWS))
        for key in (own_key(rank), shared_key(rank)):
            publish_part(load.root, key, unit, rows_of(unit, errors, generator))
        record_run(load.root, rank, errors)
        rounds += 1
        time.sleep(load.pause * 2 * generator.random())
    load.note(f"rank {rank}", rounds)


def own_key(rank: int) -> str:
    return run_record(rank, ACTIVATIONS).draws_key or ""


def shared_key(rank: int) -> str:
    return fingerprint(f"shared {rank % NUM_SHARED}")


def rows_of(unit: WorkUnit, errors: np.ndarray, generator: np.random.Generator) -> pa.Table:
    rows = draws_of(errors, generator)
    return rows.set_column(0, rows.schema.field(0), pa.array(rows["activation"].to_numpy() + unit.first_row))


def publish_part(root: Path, key: str, unit: WorkUnit, rows: pa.Table) -> None:
    """Publish a part of draws unless another rank was first, the scores of what is stored, and a metric of it."""
    store, metric = CellDraws(root, key, SCORES_KEY), MetricScores(root, key, METRIC_KEY, WORDS)
    draws = store.publish_draws(unit, rows)
    store.publish_scores(scored_unit(unit), rows, draws)
    if unit.first_row == 0:
        metric.record({"load": 1})
    texts = digest_of_texts(metric.texts, unit)
    assert texts is not None
    metric.publish_values(unit, draws, {"num_words": np.full(len(draws), 20.0)}, texts)


def record_run(root: Path, rank: int, errors: np.ndarray) -> None:
    """Record a run of the rank's cell over the first part of its draws."""
    record, ks = run_record(rank, ACTIVATIONS), np.array([1, 2, 4, 8, 16])
    now = datetime.now(UTC)
    record = replace(
        record, run_id=new_run_id(record.cell_key), sweep=f"sweep {rank // CELLS_OF_A_SWEEP}", finished=now,
        started=now - timedelta(minutes=1),
    )  # fmt: skip
    fve = 1 - np.array([errors[:, :k].min(axis=1).mean() for k in ks])
    curve = pa.table(
        {
            "metric": ["fve"] * POINTS, "k": ks, "fve": fve, "fve_low": fve - 0.02, "fve_high": fve + 0.02,
            "level": [0.95] * POINTS, "error": 1 - fve,
            "num_activations": [ACTIVATIONS] * POINTS, "num_documents": [ACTIVATIONS] * POINTS,
            "baseline": [1.0] * POINTS, "replicates": [(f + np.linspace(-0.05, 0.05, 200)).tolist() for f in fve],
        }
    )  # fmt: skip
    controls = pa.table({"control": ["empty_text", "mean_vector", "retrieval_top1"], "value": [-0.4, 0.0, 0.61]})
    activations = pa.table({"activation": range(ACTIVATIONS), "norm": errors[:, 0], "errors": errors.tolist()})
    write_run(root, record, curve, controls, activations=activations)


class Reader:
    """Asks what can only grow, and what is never half; each call is one connection."""

    def __init__(self, root: Path) -> None:
        self.root, self.seen, self.calls = root, (0, 0, 0), 0

    def __call__(self) -> None:
        key = own_key(0) if self.calls % 2 else shared_key(0)
        with connect(self.root) as connection:
            runs, points, controls = one_row(
                connection, "SELECT (FROM runs SELECT count(*)), (FROM run_curves SELECT count(*)), count(*) FROM run_controls"
            )
            assert (points, controls) == (POINTS * runs, CONTROLS * runs), "half a run"
            draws, scored = one_row(connection, f"SELECT count(*), count(error) FROM draws WHERE draws_key = '{key}'")
            assert draws % (ACTIVATIONS * DRAWS) == 0 and scored % (ACTIVATIONS * DRAWS) == 0, "half a part"
        before = self.seen[self.calls % 2 + 1]
        assert runs >= self.seen[0] and draws >= before, "less than before"
        self.seen = (runs, self.seen[1], draws) if self.calls % 2 else (runs, draws, self.seen[2])
        self.calls += 1


def one_row(connection: Any, question: str) -> tuple[Any, ...]:
    row: tuple[Any, ...] = connection.execute(question).fetchone()
    return row


def write_a_report(load: Load) -> None:
    with connect(load.root) as connection:
        [num_runs] = one_row(connection, "SELECT count(*) FROM runs WHERE sweep = 'sweep 0'")
    if num_runs:
        page = write_report(load.root, "sweep 0", load.notes / "report.html")
        assert page.read_text().rstrip().endswith("</html>")


# What came of it


def check(load: Load, num_ranks: int) -> list[str]:
    """Return what is lost, damaged or left over, as sentences."""
    rounds = {rank: json.loads((load.notes / f"rank {rank}.json").read_text()) for rank in range(num_ranks)}
    parts = {own_key(rank): number for rank, number in rounds.items()}
    for rank, number in rounds.items():
        parts[shared_key(rank)] = max(parts.get(shared_key(rank), 0), number)
    num_runs = sum(rounds.values())
    report = ingest_landings(load.root)
    with connect(load.root) as connection:
        drawn = connection.execute("SELECT draws_key, count(*), count(error) FROM draws GROUP BY ALL").fetchall()
        words = connection.execute(
            "SELECT draws_key, count(value) FROM draw_scores WHERE metric = 'words' GROUP BY ALL"
        ).fetchall()
        tables = [one_row(connection, f"SELECT count(*) FROM {table}")[0] for table in ("runs", "run_curves", "activations")]
    expected = {key: number * ACTIVATIONS * DRAWS for key, number in parts.items()}
    left = [path for path in load.root.rglob(".*") if path.name != ".ingest.lock"]
    aside = list(load.root.rglob("*damaged*"))
    found = {
        "draws and their scores": (sorted(drawn), sorted((key, number, number) for key, number in expected.items())),
        "scores of the metric": (dict(words), expected),
        "runs, points, activations": (tables, [num_runs, POINTS * num_runs, ACTIVATIONS * num_runs]),
        "quarantine": (report.quarantined, ()),
        "damaged parts": (check_parts(load.root, again=True), ()),
        "damaged runs": (damaged_runs(load.root), {}),
        "left over or set aside": (left + aside, []),
    }
    return [f"{what}: {got} instead of {wanted}" for what, (got, wanted) in found.items() if got != wanted]


def report(load: Load, memory: dict[str, list[float]], seconds: float) -> None:
    num_runs = len(list((load.root / "landing").iterdir()))
    num_parts = sum(1 for _ in load.root.rglob("*-0*.parquet"))
    rates = num_runs / seconds, num_parts / seconds
    print(f"{num_runs} runs, {rates[0]:.1f} a second; {num_parts} parts of draws and scores, {rates[1]:.1f} a second")
    print(
        f"{'':<12}{'calls':>7}{'median':>10}{'last tenth':>12}{'slowest':>10}   memory at each tenth, MB; growth in the last half"
    )
    for name, sizes in memory.items():
        times = json.loads((load.notes / f"{name}.json").read_text())
        late = times[-max(1, len(times) // 10) :]
        print(
            f"{name:<12}{len(times):>7}{np.median(times):>8.2f} s{np.median(late):>10.2f} s{max(times):>8.2f} s   "
            f"{' '.join(f'{size:.0f}' for size in sizes)}; {growth(sizes[len(sizes) // 2 :]):+.1f} MB"
        )


def growth(sizes: Sequence[float]) -> float:
    """Return by how much sizes rise from the first to the last, by least squares."""
    return float(np.polyfit(np.arange(len(sizes)), sizes, 1)[0] * (len(sizes) - 1)) if len(sizes) > 1 else 0.0


if __name__ == "__main__":
    main()
