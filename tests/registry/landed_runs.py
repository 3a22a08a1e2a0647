"""Runs as they would land, without a model behind them."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from ksweep.registry.draws import DRAWS_FILE_SCHEMA
from ksweep.registry.run_record import RunRecord
from ksweep.utils.fingerprint import fingerprint, json_digest
from tests.stored_rows import write_earlier_part

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


def spec_of(temperature: float = 0.7, num_draws: int = 4) -> dict[str, Any]:
    return {
        "autoencoder": {"av": "demo/av", "ar": "demo/ar", "base": None, "dtype": "bfloat16"},
        "activations": {"model": "SmolLM2", "text": "held_out.jsonl", "vectors": None, "positions": "random"},
        "sampling": {"temperature": temperature, "top_p": 1.0, "max_new_tokens": 64, "seed": 0, "num_draws": num_draws},
        "scoring": {"ks": None, "baseline": None},
    }


def record_of(run_id: str, *, temperature: float = 0.7, num_draws: int = 4, minutes: int = 0, **changes: Any) -> RunRecord:
    """A finished run at noon plus some minutes."""
    spec = spec_of(temperature, num_draws)
    cell_key = fingerprint(spec)
    plain = {
        "run_id": run_id,
        "cell": f"demo T={temperature:g} @{cell_key[:8]}",
        "label": f"temperature={temperature:g}",
        "cell_key": cell_key,
        "draws_key": fingerprint(temperature),
        "sweep": "temp_sweep",
        "spec": spec,
        "resources": {"gpus": 0, "tasks": 2},
        "status": "finished",
        "started": NOON + timedelta(minutes=minutes - 1),
        "finished": NOON + timedelta(minutes=minutes),
        "seconds": {"sampling": 210.5, "scoring": 14.25},
        "packages": {"torch": "2.13.0"},
        "argv": ("experiments/temp_sweep.py", "sampling.seed=0"),
        "revisions": ("owner/nla-av@0f1e2d", "owner/nla-ar@3c4b5a"),
        "num_activations": 100,
        "num_documents": 40,
        "num_draws": num_draws,
        "layer": 20,
        "failures": {"cut off": 30, "empty": 10},
        "baseline": 0.73,
        "baseline_kind": "evaluated set",
    }
    return RunRecord(**(plain | changes))


def curve_of(fve: float = 0.3, num_draws: int = 4) -> pa.Table:
    """FVE that rises by 0.01 per K."""
    ks = list(range(1, num_draws + 1))
    values = [round(fve + 0.01 * (k - 1), 4) for k in ks]
    return pa.table(
        {
            "k": ks,
            "fve": values,
            "fve_low": [v - 0.02 for v in values],
            "fve_high": [v + 0.02 for v in values],
            "level": [0.95] * num_draws,
            "error": [0.73 * (1 - v) for v in values],
            "cosine": [1 - 0.365 * (1 - v) for v in values],
            "num_activations": [100] * num_draws,
            "num_documents": [40] * num_draws,
            "baseline": [0.73] * num_draws,
            "baseline_kind": ["evaluated set"] * num_draws,
            "shuffled_fve": [v - 0.5 for v in values],
        }
    )


def controls_of() -> pa.Table:
    return pa.table(
        {
            "control": ["empty_text", "mean_vector", "retrieval_top1"],
            "value": [-0.4, 0.0, 0.61],
            "num_activations": [100, 100, 100],
            "note": ["FVE of the AR's answer to an empty text", "FVE of the mean", "fraction of draws"],
        }
    )


def publish_draws(root: Path, key: str, errors: list[list[float | None]]) -> None:
    """A part as earlier versions wrote it, draws and scores together, from errors[activation][draw]; None is a failed draw."""
    cells = [(i, j, error) for i, row in enumerate(errors) for j, error in enumerate(row)]
    known = {
        "activation": [i for i, _, _ in cells],
        "draw": [j for _, j, _ in cells],
        "error": [error for _, _, error in cells],
        "text": [f"<explanation>{i}.{j}</explanation>" for i, j, _ in cells],
        "explanation": [None if error is None else f"{i}.{j}" for i, j, error in cells],
        "parse": ["no closing tag" if error is None else "ok" for _, _, error in cells],
    }
    columns = [pa.array(known.get(f.name, [None] * len(cells)), f.type) for f in DRAWS_FILE_SCHEMA]
    write_earlier_part(root / "draws" / key, pa.table(columns, schema=DRAWS_FILE_SCHEMA))


def signed(record: dict[str, Any]) -> str:
    """A changed record with the digest that belongs to it."""
    return json.dumps(record | {"digest": json_digest(record)})
