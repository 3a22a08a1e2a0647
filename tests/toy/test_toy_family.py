"""A third family runs through the whole system for one line in the table of families."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ksweep import Autoencoder, Resources, Sweep
from ksweep.autoencoder import family
from ksweep.utils.errors import SpecError
from tests.tiny_sweeps import ask, run, talking_pair, tiny_cell
from tests.toy.family import ToyFamily


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """A sweep over a .toy file, with its family in the table."""
    monkeypatch.setattr(family, "FAMILIES", (ToyFamily, *family.FAMILIES))
    pair = talking_pair(tmp_path, 60)
    (tmp_path / "my.toy").write_text(json.dumps({"model": str(pair.base), "layer": 1}))
    cell = tiny_cell(pair, num_replicates=20)
    cell = replace(
        cell,
        autoencoder=Autoencoder(checkpoint=str(tmp_path / "my.toy"), dtype="float32"),
        activations=replace(cell.activations, model=None),
        sampling=replace(cell.sampling, num_draws=2, max_new_tokens=4),
    )
    return Sweep(
        name="toy", cell=cell, resources=Resources(cluster="inprocess", gpus=0), registry=str(tmp_path / "registry"),
        vector_cache=str(tmp_path / "vector_cache"),
    )  # fmt: skip


@pytest.mark.slow
def test_toy_family_is_planned_drawn_scored_and_recorded(toy: Sweep) -> None:
    assert run(toy) == 0
    [row] = ask(toy, "select cell, layer, scoring_kind, num_activations, num_draws, baseline, status from runs")
    assert row[0].startswith("my L1 T=1 @")
    assert row[1:5] == (1, "normalised", 40, 2) and 0 < row[5] <= 2 and row[6] == "finished"
    assert ask(toy, "select count(*) from run_curves where fve < 1") == [(2,)]


def test_toy_family_is_scored_as_it_states(toy: Sweep) -> None:
    toy = replace(toy, cell=replace(toy.cell, scoring=replace(toy.cell.scoring, baseline=3.0)))
    assert run(toy) == 2  # normalised errors have no such baseline


def test_spec_that_no_family_claims_is_refused_with_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "FAMILIES", (ToyFamily,))
    with pytest.raises(SpecError, match="ToyFamily"):
        family.family_of(Autoencoder(av="av", ar="ar"))


def test_no_other_room_asks_which_family_it_is() -> None:
    """Where a family is asked for by name or by the field that it claims; config checks fields that exclude one another."""
    package = Path(family.__file__).parents[1]
    names = (
        "checkpoint is None",
        "checkpoint is not None",
        "checkpoint IS NULL",
        "NlaPair",
        "TaeFile",
        '== "raw"',
        '== "normalised"',
    )
    asks = {
        f"{path.relative_to(package)}: {name}"
        for path in [*package.rglob("*.py"), *package.rglob("*.sql")]
        if path.relative_to(package).parts[0] not in ("autoencoder", "config", "stats", "demo")
        for name in names
        if name in path.read_text()
    }
    # Named by what it is, not by whose it is: the registry's word for the space of a record's errors.
    assert asks <= {'registry/tae_export.py: == "normalised"', 'evaluation/summary.py: == "normalised"'}


def test_family_needs_no_torch_to_be_planned() -> None:
    code = "import sys; from ksweep.autoencoder.family import FAMILIES; assert 'torch' not in sys.modules; print(len(FAMILIES))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
