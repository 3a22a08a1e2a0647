"""Whole sweeps on the files of tests/fixtures/tae, run as a user does, and questions about what they left."""

from __future__ import annotations

from pathlib import Path

import pytest

from ksweep import Activations, Autoencoder, Cell, Resources, Sampling, Scoring, Sweep, sweep_main

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures" / "tae"
CASES = sorted(path.parent.name for path in FIXTURES.glob("*/expected.json"))
WORDS = "the of and to in is was he for it with as his on be at by had".split()  # noqa: SIM905
NUM_ACTIVATIONS, NUM_DRAWS = 24, 4


def checkpoint(case: str) -> Path:
    return next((FIXTURES / case).glob("*.pt"))


def sweep_over(text: Path, folder: Path) -> Sweep:
    """Of a pair that does not exist: what the command line puts in its place must be all that counts."""
    return Sweep(
        name="tae",
        cell=Cell(
            autoencoder=Autoencoder(av="/nowhere/av", ar="/nowhere/ar", base="/nowhere/base", dtype="float32"),
            activations=Activations(
                model="/nowhere/base", layer=17, text=str(text), num_activations=NUM_ACTIVATIONS,
                rows="first", min_position=8, max_length=100, dtype="float32",
            ),
            sampling=Sampling(num_draws=NUM_DRAWS),
            scoring=Scoring(num_replicates=50),
        ),
        resources=Resources(cluster="inprocess", gpus=0),
        registry=str(folder / "registry"),
        vector_cache=str(folder / "vector_cache"),
    )  # fmt: skip


def run(sweep: Sweep, case: str, *arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        sweep_main(sweep, ["--no-charts", f"autoencoder.checkpoint={checkpoint(case)}", *arguments])
    assert isinstance(end.value.code, int)
    return end.value.code
