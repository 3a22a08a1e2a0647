"""Pairs trained on whitened activations: the transform, its file, and the space that errors and FVE are of."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ksweep import Resources, Sweep
from ksweep.activations import ensure
from ksweep.autoencoder.base import Explanation
from ksweep.autoencoder.family import family_of
from ksweep.autoencoder.nla.checkpoint import inspect_half
from ksweep.autoencoder.nla.whitening import WhiteningStated, find_statistics
from ksweep.config.spec import Cell
from ksweep.evaluation.identity import cell_keys
from ksweep.utils.errors import CheckpointError, DataError
from tests.autoencoder.test_layouts import sidecar
from tests.tiny_sweeps import ask, run, talking_pair, tiny_cell


def statistics(path: Path, d_model: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, str]:
    """Write a symmetric transform as its trainer does: sha256 over mean, then W, little-endian float64."""
    random = np.random.default_rng(seed)
    half = random.normal(size=(d_model, d_model)) / d_model**0.5
    mean, w = random.normal(size=d_model) * 0.1, np.eye(d_model) + 0.5 * (half + half.T)
    np.savez(path, mean=mean, w=w, w_inv=np.linalg.inv(w), eigenvalues=np.ones(d_model), shrinkage=0.0, n_samples=1000)
    return mean, w, hashlib.sha256(mean.astype("<f8").tobytes() + w.astype("<f8").tobytes()).hexdigest()


def whitened(root: Path, sha256: str, halves: tuple[str, ...] = ("av", "ar"), **changes: Any) -> None:
    block = {"method": "whitened_zca_v1", "stats_path": "/cluster/whitening_stats.npz", "stats_sha256": sha256, "shrinkage": 0.0}
    for half in halves:
        sidecar(half, extraction__norm="whitened_zca_v1", extraction__whitening=block | changes)(root)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Cell]:
    made = talking_pair(tmp_path, num_rows=24)
    made.av.rename(tmp_path / "av")
    made.ar.rename(tmp_path / "ar")
    cell = tiny_cell(made, num_replicates=50)
    return tmp_path, replace(cell, autoencoder=replace(cell.autoencoder, av=str(tmp_path / "av"), ar=str(tmp_path / "ar")))


@pytest.mark.slow
def test_errors_baseline_and_keys_are_those_of_whitened_vectors(pair: tuple[Path, Cell]) -> None:
    """By hand: activations are whitened, then compared with what the AR makes of the texts, and with one another."""
    root, cell = pair
    sweep = Sweep(
        name="space", cell=cell, resources=Resources(cluster="inprocess", gpus=0), registry=str(root / "registry"),
        vector_cache=str(root / "cache"),
    )  # fmt: skip
    mean, w, sha256 = statistics(root / "whitening_stats.npz", 32)
    whitened(root, sha256)
    assert run(sweep) == 0
    [(key, baseline, notes)] = ask(sweep, "select activations_key, baseline, notes::varchar from runs")
    raw = ensure(cell.activations, 1, root / "cache")
    assert key != raw.key and "not comparable with those of raw vectors" in notes
    vectors = (raw.vectors().astype(np.float64) - mean) @ w
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    documents = raw.column("document")
    others = documents[:, None] != documents[None, :]
    assert baseline == pytest.approx(1 - (unit @ unit.T)[others].mean(), rel=1e-5)
    rows = ask(
        sweep, "select activation, error, explanation from draws where error is not null order by activation, draw limit 40"
    )
    out = family_of(cell.autoencoder).load_reconstructor(("cpu",)).reconstruct([Explanation(text) for _, _, text in rows]).numpy()
    cosines = (out / np.linalg.norm(out, axis=1, keepdims=True) * unit[[activation for activation, _, _ in rows]]).sum(axis=1)
    assert len(rows) == 40 and np.allclose([error for _, error, _ in rows], 2 - 2 * cosines, atol=1e-4)


def test_rounding_of_activations_before_they_are_whitened_is_noted(pair: tuple[Path, Cell]) -> None:
    root, cell = pair
    *_, sha256 = statistics(root / "whitening_stats.npz", 32)
    whitened(root, sha256)
    for dtype, count in (("bfloat16", 1), ("float32", 0)):
        keys = cell_keys(replace(cell, activations=replace(cell.activations, dtype=dtype)))  # type: ignore[arg-type]
        assert sum("amplifies their rounding" in note.text for note in keys.notes) == count
        assert any("groups by norm, are those of the raw vectors" in note.text for note in keys.notes)


def test_statistics_of_the_spec_are_taken_and_must_be_those_stated(pair: tuple[Path, Cell]) -> None:
    root, cell = pair
    *_, sha256 = statistics(root / "elsewhere.npz", 32)
    statistics(root / "others.npz", 32, seed=1)
    whitened(root, sha256)
    with pytest.raises(CheckpointError, match=r"is neither beside nor above it.* Set autoencoder\.whitening"):
        family_of(cell.autoencoder).draws_identity()
    named = family_of(replace(cell.autoencoder, whitening=str(root / "elsewhere.npz")))
    assert named.transform()(np.ones((2, 32), dtype=np.float32)).shape == (2, 32)
    with pytest.raises(CheckpointError, match="the pair was trained with those of"):  # while planning
        family_of(replace(cell.autoencoder, whitening=str(root / "others.npz"))).draws_identity()
    with pytest.raises(CheckpointError, match="there is no such file"):
        family_of(replace(cell.autoencoder, whitening=str(root / "nothing.npz"))).draws_identity()


def test_statistics_of_another_pair_beside_the_checkpoint_do_not_hide_its_own(pair: tuple[Path, Cell]) -> None:
    root, cell = pair
    *_, sha256 = statistics(root / "whitening_stats.npz", 32)
    whitened(root, sha256, layer_index=-1, stats_path=f"/cluster/{'x' * 300}.npz")
    statistics(root / "av" / "whitening_stats.npz", 32, seed=1)
    family = family_of(cell.autoencoder)
    assert inspect_half(family.autoencoder, "av").whitening == root / "whitening_stats.npz"
    statistics(root / "whitening_stats.npz", 32, seed=2)
    with pytest.raises(CheckpointError, match=r"av/whitening_stats\.npz: mean and w have sha256"):
        inspect_half(family.autoencoder, "av")
    whitened(root, sha256, layer_index=3)
    with pytest.raises(CheckpointError, match=r"names different layers: .*extraction\.whitening\.layer_index=3"):
        inspect_half(family.autoencoder, "av")


@pytest.mark.parametrize(("factor", "message"), [(0.0, "nothing but zeros"), (1e39, "infinite numbers")])
def test_transform_that_leaves_no_vector_is_refused_while_planning(factor: float, message: str, tmp_path: Path) -> None:
    mean, w = np.ones(8), np.eye(8) * factor
    np.savez(tmp_path / "w.npz", mean=mean, w=w)
    stated = WhiteningStated(None, hashlib.sha256(mean.tobytes() + w.tobytes()).hexdigest())
    with pytest.raises(CheckpointError, match=f"w makes {message} of a vector"):
        find_statistics(stated, tmp_path, str(tmp_path / "w.npz"), 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b"PK\x03\x04 cut off"), "cannot be read as statistics"),
        (lambda path: np.savez(path, mean=np.zeros(32)), "cannot be read as statistics"),
        (lambda path: np.savez(path, mean=np.zeros(31), w=np.eye(31)), r"mean has shape \[31\]"),
        (lambda path: np.savez(path, mean=np.array([object()]), w=np.eye(32)), "cannot be read as statistics"),
        (lambda path: np.savez_compressed(path, mean=np.zeros(32), w=np.zeros((5000, 5000))), r"w \[5000, 5000\]"),
    ],
    ids=["no archive", "no w", "another width", "objects", "a bomb"],
)
def test_damaged_statistics_are_refused_in_a_sentence(write: Any, message: str, pair: tuple[Path, Cell]) -> None:
    root, cell = pair
    write(root / "whitening_stats.npz")
    whitened(root, "0" * 64)
    with pytest.raises(CheckpointError, match=message):
        family_of(cell.autoencoder).draws_identity()


def test_halves_of_two_spaces_do_not_belong_together(pair: tuple[Path, Cell]) -> None:
    root, cell = pair
    *_, sha256 = statistics(root / "whitening_stats.npz", 32)
    whitened(root, sha256, halves=("av",))
    with pytest.raises(DataError, match=r"the AV was trained on vectors whitened with .*, the AR on raw vectors"):
        family_of(cell.autoencoder).draws_identity()


def test_unknown_key_of_a_transform_is_refused_by_name(pair: tuple[Path, Cell]) -> None:
    root, cell = pair
    whitened(root, "0" * 64, rotate=True)
    with pytest.raises(CheckpointError, match=r"extraction\.whitening\.rotate, which is not known"):
        family_of(cell.autoencoder).draws_identity()
