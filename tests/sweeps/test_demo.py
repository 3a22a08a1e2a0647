"""The bundled pair on real text, from the experiment file to the registry. Needs its base model: make demo-model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ksweep import connect
from ksweep.config.presets import DEMO, demo_model

ROOT = Path(__file__).parents[2]


@pytest.mark.trials
@pytest.mark.demo
@pytest.mark.slow
def test_the_demo_pair_explains_held_out_text_far_above_every_control(tmp_path: Path) -> None:
    if not (Path(demo_model()) / "model.safetensors").exists():
        pytest.skip(f"no base model at {demo_model()}: `make demo-model` fetches it")
    command = [
        sys.executable, str(ROOT / "experiments" / "temp_sweep.py"), "sampling.temperature=0.7", "sampling.num_draws=8",
        "activations.num_activations=32", "autoencoder.dtype=float32", "activations.dtype=float32",
        f"registry={tmp_path / 'registry'}",
        f"vector_cache={tmp_path / 'vectors'}", "cluster=local",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=840, check=False)
    assert done.returncode == 0, done.stderr
    assert "K=8" in done.stdout and (tmp_path / "registry" / "charts" / "temp_sweep" / "fve_by_k.png").stat().st_size > 10_000
    with connect(tmp_path / "registry") as connection:
        curve = dict(connection.execute("SELECT k, fve FROM curves").fetchall())
        shuffled = max(x for (x,) in connection.execute("SELECT shuffled_fve FROM curves").fetchall())
        controls = dict(connection.execute("SELECT control, value FROM controls").fetchall())
        [(failure_rate, notes)] = connection.execute("SELECT failure_rate, notes FROM runs").fetchall()
    # 128 activations gave 0.52 at K = 1 and 0.69 at K = 8; 32 of them leave about 0.05 of noise.
    assert curve[1] > 0.3 and curve[8] > curve[1] + 0.05
    assert shuffled < 0 and controls["empty_text"] < 0 and controls["mean_vector"] < 0
    assert controls["retrieval_top1"] > 0.5 and failure_rate < 0.1
    assert notes == [], "the pair is run on the layer, model and lengths that it was trained on"


def test_the_held_out_passages_are_many_and_from_many_documents() -> None:
    import json

    rows = [json.loads(line) for line in (DEMO / "passages.jsonl").read_text().splitlines()]
    assert len(rows) >= 300 and len({row["document"] for row in rows}) >= 50
    assert len({row["id"] for row in rows}) == len(rows) and len({row["text"] for row in rows}) == len(rows)
