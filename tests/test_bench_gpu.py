"""The GPU benchmark where there is none: it says so, and its code runs on a processor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("forked_python")
ROOT = Path(__file__).parents[1]


def bench(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "scripts" / "bench_gpu.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=840, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_bench_gpu_without_a_gpu_says_so_and_measures_nothing() -> None:
    assert "no GPU is visible" in (said := bench()) and "tokens/s" not in said


@pytest.mark.trials
@pytest.mark.slow
def test_bench_gpu_tiny_reports_drawing_against_both_ceilings_scoring_and_extraction() -> None:
    said = bench("--tiny", "--repeats", "1", "--dtype", "float32")
    lines = [line.split("|") for line in said.splitlines() if line.startswith("| ")]
    table = ["generate()", "8 draws", "16 draws"]
    assert [line[1].strip() for line in lines] == ["", *table, "", *table], "32 tokens each, natural lengths"
    measured = [line for line in lines if line[1].strip()]
    assert all(float(line[2].split()[0].replace(",", "")) > 0 and line[5].strip().split()[0].endswith("%") for line in measured)
    assert "texts/s" in said and "activations/s" in said and "GB/s copied" in said
