"""`ksweep export --vectors`: what the AR makes of best draws has the errors that were recorded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from ksweep import Resources, Sweep, connect
from ksweep.activations import ActivationStore
from ksweep.activations.vector_files import open_vectors
from ksweep.cli import app
from tests import tae_sweeps
from tests.tiny_sweeps import run, talking_pair, tiny_cell


def export(sweep: Sweep, path: Path) -> str:
    result = CliRunner().invoke(app, ["export", sweep.name, "--vectors", str(path), "--registry", sweep.registry])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def recorded(sweep: Sweep) -> tuple[np.ndarray, np.ndarray]:
    """Activations that have a draw with an error, and the smallest of each."""
    with connect(sweep.registry) as connection:
        rows = connection.execute(
            "SELECT activation, min(error) FROM draws WHERE error IS NOT NULL GROUP BY 1 ORDER BY 1"
        ).fetchall()
    return np.array([row[0] for row in rows]), np.array([row[1] for row in rows])


def activations(sweep: Sweep, count: int) -> np.ndarray:
    [directory] = Path(sweep.vector_cache).iterdir()
    vectors: np.ndarray = ActivationStore(directory.parent, directory.name, {}).open(count).vectors()
    return vectors


@pytest.mark.slow
def test_best_reconstructions_of_a_pair_have_the_recorded_errors_and_an_ar_that_changed_is_refused(tmp_path: Path) -> None:
    pair = talking_pair(tmp_path, 40)
    cell = tiny_cell(pair, 50)
    sweep = Sweep(
        name="tiny",
        cell=replace(cell, activations=replace(cell.activations, num_activations=12)),
        resources=Resources(cluster="inprocess", gpus=0),
        registry=str(tmp_path / "registry"),
        vector_cache=str(tmp_path / "cache"),
    )
    assert run(sweep) == 0
    # 1. Their errors, 2(1 - cos), and their norms.
    said = export(sweep, tmp_path / "best.safetensors")
    which, errors = recorded(sweep)
    targets, tensors = activations(sweep, 12)[which], load_file(tmp_path / "best.safetensors")
    found, scaled = (tensors[name].astype(np.float64) for name in ("reconstructions", "scaled"))
    norms = np.linalg.norm(targets, axis=1)
    cosines = (found * targets).sum(1) / np.linalg.norm(found, axis=1) / norms
    assert np.allclose(2 * (1 - cosines), errors, atol=1e-5)
    assert np.allclose(np.linalg.norm(scaled, axis=1), norms, rtol=1e-5)
    assert ("are left out" in said) == (len(which) < 12)
    # 2. The table beside them; both can be read as vectors.
    with open_vectors(tmp_path / "best.safetensors") as file:
        rows = file.table(["activation", "error", "doc_id", "activation_layer", "draw", "explanation"])
        assert (file.column, file.num_rows) == ("reconstructions", len(which))
    assert rows["activation"].to_pylist() == which.tolist() and np.allclose(rows["error"].to_numpy(), errors)
    assert set(rows["activation_layer"].to_pylist()) == {pair.layer} and None not in rows["explanation"].to_pylist()
    # 3. Another AR at the same place.
    head = pair.ar / "value_head.safetensors"
    save_file({name: 2 * weight for name, weight in load_file(head).items()}, head)
    with pytest.raises(Exception, match="is not the one that scored its"):
        export(sweep, tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


@pytest.mark.slow
def test_best_reconstructions_of_a_talkative_autoencoder_are_the_stored_ones(tmp_path: Path) -> None:
    words = tae_sweeps.WORDS
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(" ".join(words[(i + j) % len(words)] for j in range(30)) for i in range(30)))
    sweep = tae_sweeps.sweep_over(text, tmp_path)
    base = tae_sweeps.FIXTURES / "gpt2_patch_all" / "base"
    assert (
        tae_sweeps.run(sweep, "gpt2_patch_all", f"autoencoder.base={base}", "activations.model=null", "activations.layer=null")
        == 0
    )
    said = export(sweep, tmp_path / "best.safetensors")
    which, errors = recorded(sweep)
    found = load_file(tmp_path / "best.safetensors")["reconstructions"].astype(np.float64)
    targets = activations(sweep, tae_sweeps.NUM_ACTIVATIONS)[which]
    assert f"{len(which)} of them were stored" in said
    assert np.allclose(np.square(found - targets).mean(1), errors, rtol=1e-5)
