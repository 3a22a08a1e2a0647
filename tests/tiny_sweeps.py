"""A small cell of a tiny pair that talks, run as a user does, and questions about what it left."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from ksweep import Activations, Autoencoder, Cell, Sampling, Scoring, Sweep, connect, sweep_main
from tests.tiny_models import TinyPair, make_pair

WORDS = ("the of and to in is was he for it with as his on be at by had not are but from or have an they one you were").split()  # noqa: SIM905


def talking_pair(folder: Path, num_rows: int) -> TinyPair:
    """A pair, and text.jsonl beside its base: rows of 40 words, three a document."""
    source = random.Random(0)
    lines = [f'{{"text": "{" ".join(source.choices(WORDS, k=40))}", "document": "d{i // 3}"}}' for i in range(num_rows)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    return make_pair(folder, "qwen2", talks=True)


def tiny_cell(pair: TinyPair, num_replicates: int) -> Cell:
    """40 activations with 8 draws each."""
    return Cell(
        autoencoder=Autoencoder(av=str(pair.av), ar=str(pair.ar), dtype="float32"),
        activations=Activations(
            model=str(pair.base), text=str(pair.base.parent / "text.jsonl"), num_activations=40, rows="first",
            positions_per_document=2, min_position=10, dtype="float32",
        ),
        sampling=Sampling(num_draws=8, max_new_tokens=20),
        scoring=Scoring(num_replicates=num_replicates),
    )  # fmt: skip


def run(sweep: Sweep, *arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        sweep_main(sweep, ["--no-charts", *arguments])
    assert isinstance(end.value.code, int)
    return end.value.code


def ask(sweep: Sweep, question: str) -> list[tuple[Any, ...]]:
    with connect(sweep.registry) as connection:
        return connection.execute(question).fetchall()
