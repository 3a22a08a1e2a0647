"""What the speed benchmarks share: the demo's models and vectors, sides timed in turn, a table of ratios."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ksweep import Cell, Sampling, Scoring, Sweep
from ksweep.activations.fill import ensure
from ksweep.autoencoder import nla
from ksweep.autoencoder.decoding import as_vectors
from ksweep.keys import inspect_pair
from ksweep.presets import demo_pair, held_out_passages

LAYER = 20
NATURAL_LIMIT = 64
"""Tokens that a text of natural length may have."""


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    return parser


def load_pair(dtype: str) -> tuple[nla.NlaVerbalizer, nla.NlaReconstructor]:
    """The demo pair, on this machine's CPU."""
    av, ar = inspect_pair(demo_pair())
    return nla.load_verbalizer(av, dtype=dtype), nla.load_reconstructor(ar, dtype=dtype)


def held_out(count: int) -> torch.Tensor:
    """[activation, d_model]: real activations, so that explanations have their natural lengths."""
    with tempfile.TemporaryDirectory() as folder:
        table = ensure(held_out_passages(num_activations=count), LAYER, folder)
        return as_vectors(table.vectors(0, count))


def demo_sweep(place: Path, num_activations: int, num_draws: int, num_replicates: int, **more: Any) -> Sweep:
    """A sweep of the demo pair as a user has it, texts of natural length; `more` are its other fields."""
    return Sweep(
        name="bench",
        cell=Cell(
            autoencoder=demo_pair(),
            activations=held_out_passages(num_activations=num_activations),
            sampling=Sampling(num_draws=num_draws, max_new_tokens=NATURAL_LIMIT),
            scoring=Scoring(num_replicates=num_replicates),
        ),
        registry=str(place / "registry"),
        vector_cache=str(place / "vectors"),
        **more,
    )


def alternate(sides: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """What every side returns, one after the other, round after round; one round before that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(repeats + 1):
        for name, side in sides.items():
            value = side()
            if round_:
                found[name].append(value)
    return found


def report(title: str, unit: str, rates: Mapping[str, Sequence[float]], against: str) -> None:
    """Median rate of each side, and the median over rounds of its ratio to `against`."""
    print(f"\n{title}\n| | {unit}, median (lowest to highest) | against {against}, median (lowest to highest) |\n|---|---|---|")
    for name, values in rates.items():
        ratios = [one / other for one, other in zip(values, rates[against], strict=True)]
        print(f"| {name} | {spread(values, '.0f')} | {spread(ratios, '.2f')} |", flush=True)


def spread(values: Sequence[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def rate(count: Callable[[], int]) -> Callable[[], float]:
    """A side that does some work and says how much; the rate in units a second."""

    def timed() -> float:
        began = time.perf_counter()
        done = count()
        return done / (time.perf_counter() - began)

    return timed
