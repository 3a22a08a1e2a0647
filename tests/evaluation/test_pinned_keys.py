"""Keys of cells as they were computed at commit e6a6435: a run that was finished then must still be seen as finished."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ksweep import Activations, Autoencoder, Cell, Sampling, Scoring
from ksweep.evaluation.identity import cell_keys, resolve_cell

FIXTURES = Path(__file__).parents[1] / "fixtures"

PINNED = {
    "qwen2 pair": ("4cc180b4b9e3dbbbe287405d49a6c9f2", "04aad5b93968ade05c377594deac8c4f"),
    "gemma3 pair": ("f4c9b1380906f328711c9b0012377f6e", "18d1c9f943535285faf8a19d8f818589"),
    "greedy, prefix, stated baseline": ("4cc180b4b9e3dbbbe287405d49a6c9f2", "bb0f4de1ddfff37eacc56806acf7dcdf"),
    "gemma3_patch_two": ("0ca88d690339f6ba34990e66e0456c79", "714563aa12da55fc5ce1149bd28c4e69"),
    "gpt2_patch_all": ("acf79018f3eba346cae0e38543a1ec5c", "ada9cbb0d8e7e40895de93f9b24df92e"),
}
"""Name of a cell -> (activations key, cell key)."""


def pinned_cell(name: str, folder: Path) -> Cell:
    """A cell on checkpoints of tests/fixtures and a text whose bytes never change."""
    text = folder / "rows.jsonl"
    row = '{{"text": "row {} of a text that has a few words more", "document": "d{}"}}\n'
    text.write_text("".join(row.format(i, i // 2) for i in range(12)))
    activations = Activations(text=str(text), num_activations=6, rows="first", min_position=4)
    if (case := FIXTURES / "tae" / name).is_dir():
        [file] = case.glob("*.pt")
        return Cell(
            autoencoder=Autoencoder(checkpoint=str(file), dtype="float32"),
            activations=replace(activations, max_length=100),
            sampling=Sampling(temperature=0.8),
        )
    case = FIXTURES / "nla" / ("gemma3_text" if name == "gemma3 pair" else "qwen2_text")
    dtype = "float32" if name == "gemma3 pair" else "bfloat16"
    cell = Cell(
        autoencoder=Autoencoder(av=str(case / "nla-av"), ar=str(case / "nla-ar"), dtype=dtype),
        activations=replace(activations, model=str(case / "base")),
    )
    if name.startswith("greedy"):
        scoring = Scoring(selection="prefix", baseline=0.7335, ks=(1,))
        return replace(cell, sampling=Sampling(temperature=0, max_new_tokens=40), scoring=scoring)
    return cell


@pytest.mark.parametrize("name", PINNED)
def test_keys_of_earlier_runs_hold(name: str, tmp_path: Path) -> None:
    keys = cell_keys(resolve_cell(pinned_cell(name, tmp_path)))
    assert (keys.activations, keys.cell) == PINNED[name]
