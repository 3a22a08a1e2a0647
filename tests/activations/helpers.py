"""Small texts and vector files for the activation tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ksweep.config.spec import Activations

SENTENCE = "the river canal lock keeper wrote of stone oak iron gates spring flood council market bread winter road and bell"


def passages(count: int, seed: int = 0, low: int = 5, high: int = 60) -> list[str]:
    """Rows of nonsense of very different lengths."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(SENTENCE.split(), size=rng.integers(low, high))) + "." for _ in range(count)]


def write_jsonl(path: Path, texts: list[str], **columns: list[Any]) -> Path:
    rows = [{"text": text} | {name: values[i] for name, values in columns.items()} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_vectors(
    path: Path, vectors: np.ndarray, *, fixed: bool = True, row_group_size: int = 700, **columns: list[Any]
) -> Path:
    n, d = vectors.shape
    flat = pa.array(vectors.reshape(-1))
    lists = pa.FixedSizeListArray.from_arrays(flat, d) if fixed else pa.ListArray.from_arrays(np.arange(0, n * d + 1, d), flat)
    pq.write_table(pa.table({"activation_vector": lists, **columns}), path, row_group_size=row_group_size)
    return path


def random_vectors(count: int, d_model: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, d_model)).astype(np.float32)


def spec(model: Path, text: Path, count: int, **fields: Any) -> Activations:
    """A request on a tiny model: float32, positions from 4 on."""
    defaults: dict[str, Any] = {"rows": "first", "min_position": 4, "dtype": "float32", "max_length": 128}
    return Activations(model=str(model), text=str(text), num_activations=count, **(defaults | fields))


def vector_spec(vectors: Path, count: int, **fields: Any) -> Activations:
    return Activations(vectors=str(vectors), num_activations=count, **({"rows": "first"} | fields))


def shard_files(directory: Path) -> dict[str, bytes]:
    """Data files of a store and what is in them."""
    return {path.name: path.read_bytes() for path in sorted(directory.rglob("shard-*.arrow"))}
