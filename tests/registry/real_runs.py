"""A registry that real sweeps of a tiny pair have filled, and its raw numbers, read without anything of ksweep."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ksweep import Resources, Sweep
from ksweep.registry.run_record import read_run, write_run
from tests.made_once import made_once
from tests.tiny_sweeps import run, talking_pair, tiny_cell

TEMPERATURES = (0.5, 0.7, 1.0)
KS = (1, 2, 4, 8)
OTHER_COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Real:
    """Two sweeps over the same activations and a run that failed; one cell is there twice, by other code, a little off."""

    root: Path
    cache: Path
    runs: dict[float, str] = field(default_factory=dict)
    """Temperature -> the run that measured it."""

    def record(self, temperature: float) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.root / "landing" / self.runs[temperature] / "record.json").read_text())
        return found

    def draws(self, temperature: float) -> list[dict[str, Any]]:
        """In order of activation and draw."""
        said, worth = (self._rows(directory) for directory in self.directories(temperature))
        assert said.keys() == worth.keys()
        return [said[pair] | worth[pair] for pair in sorted(said)]

    def directories(self, temperature: float) -> tuple[Path, Path]:
        """Of the draws and of their scores."""
        keys = [self.record(temperature)[name] for name in ("draws_key", "scores_key")]
        return self.root / "draws" / keys[0], self.root / "scores" / keys[0] / keys[1]

    @staticmethod
    def _rows(directory: Path) -> dict[tuple[int, int], dict[str, Any]]:
        rows = [row for part in directory.glob("part-*.parquet") for row in pq.ParquetFile(part).read().to_pylist()]
        return {(row["activation"], row["draw"]): row for row in rows}

    def errors(self, temperature: float) -> np.ndarray:
        """[activation, draw], a failed one counts 2."""
        values = [2.0 if row["error"] is None else row["error"] for row in self.draws(temperature)]
        return np.array(values).reshape(40, 8)

    def best_of(self, temperature: float, k: int) -> np.ndarray:
        """[activation]: mean over every choice of k draws of the smallest error. Failures last: none exceeds 2 here by more."""
        known = np.array([np.inf if row["error"] is None else row["error"] for row in self.draws(temperature)]).reshape(40, 8)
        smallest = np.stack([known[:, list(chosen)].min(axis=1) for chosen in combinations(range(8), k)])
        found: np.ndarray = np.where(np.isinf(smallest), 2.0, smallest).mean(axis=0)
        return found

    def documents(self) -> np.ndarray:
        return np.array([row["document"] for row in self.draws(TEMPERATURES[0])[::8]])

    def scaled(self) -> np.ndarray:
        """[activation, d]: the vectors, scaled to norm sqrt(d)."""
        [store] = {self.record(t)["activations_key"] for t in TEMPERATURES}
        tables = [pa.ipc.open_file(pa.memory_map(str(p))).read_all() for p in sorted((self.cache / store).glob("*.arrow"))]
        vectors = np.array(pa.concat_tables(tables)["vector"].to_pylist())[:40]
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) * np.sqrt(vectors.shape[1])

    def between(self, rows: np.ndarray | None = None) -> float:
        """Half the mean squared distance, per dimension, over every pair of activations of different documents."""
        rows = np.arange(40) if rows is None else np.flatnonzero(rows)
        scaled, documents = self.scaled()[rows], self.documents()[rows]
        pairs = [(i, j) for i, j in combinations(range(len(rows)), 2) if documents[i] != documents[j]]
        return float(np.mean([np.square(scaled[i] - scaled[j]).mean() / 2 for i, j in pairs]))

    def fve(self, temperature: float, k: int) -> float:
        return float(1 - self.best_of(temperature, k).mean() / self.between())


def make(place: Path) -> Real:
    """Runs the sweeps; takes a few seconds."""
    (place / "tiny").mkdir()
    pair = talking_pair(place / "tiny", num_rows=60)
    sweep = Sweep(
        name="tiny", cell=tiny_cell(pair, num_replicates=200), resources=Resources(cluster="inprocess", gpus=0),
        registry=str(place / "registry"), vector_cache=str(place / "vector_cache"),
    )  # fmt: skip
    assert run(sweep, "sampling.temperature=[0.5,0.7]") == 0
    assert run(replace(sweep, name="again"), "sampling.temperature=[0.7,1.0]") == 0
    _fail(replace(sweep, name="broken"), pair.d_model, place / "vectors.parquet")
    real = Real(Path(sweep.registry), Path(sweep.vector_cache))
    for path in (real.root / "landing").iterdir():
        record = read_run(path).record
        if record.status == "finished":
            real.runs[record.spec["sampling"]["temperature"]] = record.run_id
    _measure_again(real, 0.7)
    return real


def _fail(sweep: Sweep, d_model: int, path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(50, d_model)).astype(np.float32)
    vectors[30, 3] = np.nan
    pq.write_table(pa.table({"activation_vector": pa.FixedSizeListArray.from_arrays(vectors.ravel(), d_model)}), path)
    assert run(sweep, f"activations.vectors={path}") == 2


def _measure_again(real: Real, temperature: float) -> None:
    """As if another machine had measured the cell first: other commit, every FVE off by 0.001 times K."""
    landed = read_run(real.root / "landing" / real.runs[temperature])
    assert landed.curve is not None
    record = replace(landed.record, run_id="20260101T000000-earlier", git_commit=OTHER_COMMIT, finished=landed.record.started)
    ks, values = landed.curve["k"].to_pylist(), landed.curve["fve"].to_pylist()
    off = pa.array([fve + 0.001 * k for k, fve in zip(ks, values, strict=True)])
    curve = landed.curve.set_column(landed.curve.schema.get_field_index("fve"), "fve", off)
    tables = {"metrics": landed.metrics, "examples": landed.examples, "activations": landed.activations}
    write_run(real.root, record, curve, landed.controls, **tables)


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Real:
    """Made once; tests only read it."""
    return made_once(tmp_path_factory, "real", make)
