"""How fast is the registry with thousands of runs and millions of draws?

    python scripts/bench_registry.py                              # 5,000 runs, 10 million draws; needs 2 GB of disk in --place
    python scripts/bench_registry.py --runs 500 --draws 1000000 --repeats 3

Creates a registry of sweeps of ten temperatures each. Twenty runs and their draws are really written (parts of 64 activations x
16 draws); the others are copies of their files with their own records, cells and keys. Then reports median times of: building
the database from nothing, adding one run, an ingest with nothing to do, rebuilding, every stored question, v_compare queried in
several ways, and the views over the draws. Files are in the page cache. Processor seconds are given beside wall-clock seconds,
because they vary less on a busy machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ksweep import stats
from ksweep.config.spec import Scoring
from ksweep.evaluation.breakdown import break_down
from ksweep.registry.activation_metadata import METADATA_SCHEMA as KNOWN
from ksweep.registry.activation_metadata import position_bucket
from ksweep.registry.cell_draws import CellDraws
from ksweep.registry.database import connect, ingest_landings, rebuild_database
from ksweep.registry.draws import DRAWS_FILE_SCHEMA
from ksweep.registry.part_labels import labelled, read_label
from ksweep.registry.run_record import RunRecord, write_run
from ksweep.registry.scores import scored_unit
from ksweep.registry.stored_queries import queries
from ksweep.registry.work_units import WorkUnit
from ksweep.stats.best_of_k import kept_ks
from ksweep.utils.fingerprint import fingerprint

TEMPERATURES = tuple(round(0.3 + 0.1 * i, 1) for i in range(10))
NUM_DRAWS = 16
NUM_DOCUMENTS = 100
KS = tuple(range(1, NUM_DRAWS + 1))
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
WORDS = (
    "a",
    "text",
    "about",
    "cooking",
    "that",
    "goes",
    "on",
    "for",
    "a",
    "while",
    "and",
    "turns",
    "to",
    "bread",
    "in",
    "Lisbon",
)
NUM_MODELS = 20
"""Runs that are really written, not copied."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5000)
    parser.add_argument("--draws", type=int, default=10_240_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--place", type=Path, help="where the files are created; without, a temporary directory")
    parser.add_argument("--keep", type=Path, help="create the registry here, or use the one that exists here, and keep it")
    options = parser.parse_args()
    place = options.keep or Path(tempfile.mkdtemp(prefix="bench-registry-", dir=options.place))
    try:
        if not (place / "landing").is_dir():
            make(place, options.runs, options.draws)
        report(place, options.repeats)
    finally:
        if not options.keep:
            shutil.rmtree(place)


# Files


def make(root: Path, num_runs: int, num_draws: int) -> None:
    began = time.perf_counter()
    num_activations = max(64, num_draws // num_runs // NUM_DRAWS // 64 * 64)
    models = [make_run(root, run, num_activations) for run in range(NUM_MODELS)]
    for run in range(NUM_MODELS, num_runs):
        copy_run(root, models[run % NUM_MODELS], run, num_activations)
    print(f"made: {num_runs} runs, {num_runs * num_activations * NUM_DRAWS:,} draws, {time.perf_counter() - began:.0f} s")


def copy_run(root: Path, model: RunRecord, number: int, num_activations: int) -> None:
    """Copy the files of a run to those of another run that differs only in its record."""
    record = run_record(number, num_activations)
    source, place = root / "landing" / model.run_id, root / "landing" / record.run_id
    shutil.copytree(source, place)
    files = json.loads((source / "record.json").read_text())["files"]
    (place / "record.json").write_text(json.dumps({"format": 1, "files": files} | record.to_json()))
    for store in ("draws", "scores"):
        copy = Path(shutil.copytree(root / store / (model.draws_key or ""), root / store / (record.draws_key or "")))
        for path in copy.rglob("part-*.parquet"):
            table = pq.read_table(path, partitioning=None)
            label = read_label(table.schema)
            assert label is not None
            label = replace(label, keys={**label.keys, "draws": copy.name})
            pq.write_table(labelled(table, label), path, compression="zstd", write_page_checksum=True)


def make_run(root: Path, number: int, num_activations: int) -> RunRecord:
    generator = np.random.default_rng(number)
    errors = generator.gamma(4.0, 0.15, (num_activations, NUM_DRAWS))
    errors[generator.random(errors.shape) < 0.01] = np.nan
    draws = draws_of(errors, generator)
    baseline = stats.Baseline(
        value=1.0, kind="between documents", num_activations=num_activations, distances=np.ones(num_activations)
    )
    columns = columns_of(num_activations)
    curve = stats.fve_curve(errors, columns["document"], baseline, ks=KS)
    found = break_down(draws, known_of(columns, generator), baseline, Scoring(), KS, columns["window"].tolist())
    record = run_record(number, num_activations)
    store = CellDraws(root, record.draws_key or "", record.scores_key or "")
    for first in range(0, num_activations, 64):
        unit, rows = WorkUnit(first, first + 64, 0, NUM_DRAWS), draws.slice(first * NUM_DRAWS, 64 * NUM_DRAWS)
        store.publish_scores(scored_unit(unit), rows, store.publish_draws(unit, rows))
    rows = [
        {
            "metric": "fve", "k": k, "fve": curve.fve[i], "fve_low": curve.fve_low[i], "fve_high": curve.fve_high[i],
            "level": 0.95, "error": curve.error[i], "num_activations": num_activations, "num_documents": curve.num_documents,
            "num_draws": NUM_DRAWS, "baseline": 1.0, "baseline_kind": "between documents", "shuffled_fve": -0.4 + k / 100,
            "effective_documents": curve.effective_documents, "failure_rate": curve.failure_rate[i],
            "replicates": curve.replicates[:, i].tolist() if k in kept_ks(KS) else None,
        }
        for i, k in enumerate(KS)
    ]  # fmt: skip
    controls = pa.table({"control": ["empty_text", "mean_vector", "retrieval_top1"], "value": [-0.4, 0.0, 0.61]})
    write_run(
        root, record, pa.Table.from_pylist(rows), controls,
        metrics=pa.Table.from_pylist(found.metrics), examples=found.examples, activations=found.activations,
    )  # fmt: skip
    return record


def known_of(columns: dict[str, np.ndarray], generator: np.random.Generator) -> pa.Table:
    n = len(columns["document"])
    norms = generator.gamma(9.0, 8.0, n)
    found = {name: columns[name].tolist() for name in ("row_id", "document", "position", "role")} | {
        "activation": range(n), "norm": norms, "position_bucket": [position_bucket(p) for p in columns["position"].tolist()],
        "norm_quarter": [f"quarter {q + 1} of 4" for q in stats.quantile_groups(norms)],
        **{name: np.ones(n) for name in KNOWN.names if name.startswith(("distance", "between"))},
    }  # fmt: skip
    return pa.table([pa.array(found.get(f.name, pa.nulls(n)), f.type) for f in KNOWN], schema=KNOWN)


def columns_of(num_activations: int) -> dict[str, np.ndarray]:
    row = np.arange(num_activations)
    return {
        "row_id": np.array([f"text.jsonl:{i}" for i in row], dtype=object),
        "document": np.array([f"document {i % NUM_DOCUMENTS}" for i in row], dtype=object),
        "position": np.array([int(i * 7 % 600) for i in row], dtype=object),
        "role": np.array([("user", "assistant")[i % 2] for i in row], dtype=object),
        "window": np.array([f"{i} " + " ".join(WORDS * 2) for i in row], dtype=object),
    }


def draws_of(errors: np.ndarray, generator: np.random.Generator) -> pa.Table:
    num_activations = len(errors)
    activation = np.repeat(np.arange(num_activations), NUM_DRAWS)
    flat, n = errors.ravel(), errors.size
    texts = [" ".join(generator.choice(WORDS, 20)) for _ in range(100)]
    said = [texts[i] for i in generator.integers(100, size=n)]
    columns = {name: np.repeat(values, NUM_DRAWS).tolist() for name, values in columns_of(num_activations).items()}
    known = {
        "activation": activation, "draw": np.tile(np.arange(NUM_DRAWS), num_activations),
        "error": pa.array(flat, from_pandas=True), "cosine": pa.array(1 - flat / 2, from_pandas=True), "text": said,
        "num_tokens": np.full(n, 20),
        "explanation": pa.array(said, mask=np.isnan(flat)), "parse": np.where(np.isnan(flat), "no closing tag", "ok"),
        "finish": ["stop"] * n, "context": columns["window"], "token_ids": [list(range(20))] * n,
        "row_id": columns["row_id"], "document": columns["document"], "position": columns["position"],
    }  # fmt: skip
    return pa.table([pa.array(known.get(f.name, pa.nulls(n)), type=f.type) for f in DRAWS_FILE_SCHEMA], schema=DRAWS_FILE_SCHEMA)


def run_record(number: int, num_activations: int) -> RunRecord:
    sweep, place = divmod(number, len(TEMPERATURES))
    temperature, name = TEMPERATURES[place], f"demo L{sweep} T={TEMPERATURES[place]:g}"
    spec = {
        "autoencoder": {"av": "demo/av", "ar": "demo/ar", "dtype": "bfloat16"},
        "activations": {"model": "SmolLM2", "text": f"held_out_{sweep}.jsonl", "positions": "random"},
        "sampling": {"temperature": temperature, "top_p": 1.0, "max_new_tokens": 64, "seed": 0, "num_draws": NUM_DRAWS},
        "scoring": asdict(Scoring()),
    }
    key = fingerprint(spec)
    num_draws = num_activations * NUM_DRAWS
    return RunRecord(
        run_id=f"20260101T{number:06d}-{key[:8]}", cell=f"{name} @{key[:8]}", label=name, cell_key=key, draws_key=key[::-1],
        scores_key="5" * 32,
        activations_key=fingerprint(sweep), sweep=f"sweep {sweep}", spec=spec, status="finished",
        started=NOON + timedelta(minutes=number), finished=NOON + timedelta(minutes=number + 1), host=f"node{number % 8}",
        device="NVIDIA H100", num_ranks=1, git_commit="1" * 40, git_dirty=False, packages={"torch": "2.13.0"},
        seconds={"drawing": 100.0, "waiting": 1.0, "statistics": 2.0}, num_activations=num_activations,
        num_documents=min(NUM_DOCUMENTS, num_activations), num_draws=NUM_DRAWS, layer=sweep, d_model=2048,
        num_draws_sampled=num_draws, num_draws_reused=0, num_tokens_sampled=num_draws * 20, tokens_per_second=3000.0 + number % 7,
        mean_tokens=20.0 + temperature, draws_bytes=100_000, failures={"no closing tag": 7}, failure_rate=0.01, baseline=1.0,
        baseline_kind="between documents", effective_documents=float(min(NUM_DOCUMENTS, num_activations)),
    )  # fmt: skip


# Times


def report(root: Path, repeats: int) -> None:
    (root / "ksweep.duckdb").unlink(missing_ok=True)
    first = timed("build from nothing", lambda: ingest_landings(root), 1)
    print(f"  runs in the database: {first.num_runs}; not believed: {len(first.quarantined)}")
    print(f"  database: {(root / 'ksweep.duckdb').stat().st_size / 1e6:.0f} MB")
    timed("nothing to do", lambda: ingest_landings(root), repeats)
    timed("connect, nothing to do", lambda: connect(root).close(), repeats)
    extra = itertools.count(10**6 + 10 * len(list((root / "landing").iterdir())), 10)  # numbers that no earlier report has used
    added: list[RunRecord] = []

    def add() -> None:
        added.append(make_run(root, next(extra), 64))

    timed("add one run", lambda: ingest_landings(root), repeats, before=add)
    timed("rebuild_database", lambda: rebuild_database(root), 1)
    with connect(root) as connection:
        run, cell, other, key = connection.execute(
            "SELECT a.run_id, a.cell, b.cell, a.draws_key FROM v_latest AS a JOIN v_latest AS b USING (activations_key) "
            "WHERE a.temperature = 0.3 AND b.temperature = 1.0 ORDER BY a.run_id LIMIT 1"
        ).fetchone() or ("", "", "", "")
        ask = {f"@{name}": query.sql for name, query in queries(root).items()}
        ask |= {
            "v_compare, two cells": f"FROM v_compare WHERE cell = '{cell}' AND other_cell = '{other}'",
            "v_compare, one cell with all others": f"FROM v_compare WHERE cell = '{cell}'",
            "v_compare, all pairs at one K, counted": "SELECT count(*), sum(difference_low) FROM v_compare WHERE k = 16",
            "v_compare, all pairs, counted": "SELECT count(*), sum(difference_low) FROM v_compare",
            "draws of one key": f"FROM draws WHERE draws_key = '{key}'",
            "texts of one key": f"FROM texts WHERE draws_key = '{key}'",
            "best draws of one key": f"FROM best_draws WHERE draws_key = '{key}'",
            "draws of one cell": f"SELECT avg(error) FROM draws WHERE cell = '{cell}'",
            "activations of one run": f"FROM activations WHERE run_id = '{run}'",
            "mean error of all draws, by key": "SELECT draws_key, avg(error) FROM draws GROUP BY draws_key",
            "best draws, all": "SELECT count(*), avg(error) FROM best_draws",
        }
        for name, question in ask.items():
            timed(name, lambda question=question: connection.execute(question).fetchall(), repeats)  # type: ignore[misc]


def timed(name: str, act: Callable[[], Any], repeats: int, before: Callable[[], Any] = lambda: None) -> Any:
    wall, processor, result = [], [], None
    for _ in range(repeats):
        before()
        began, worked = time.perf_counter(), time.process_time()
        result = act()
        wall.append(time.perf_counter() - began)
        processor.append(time.process_time() - worked)
    size = f"{len(result):>9,} rows" if isinstance(result, list) else ""
    print(f"{name:<42}{statistics.median(wall):8.3f} s wall{statistics.median(processor):8.3f} s processor{size}", flush=True)
    return result


if __name__ == "__main__":
    main()
