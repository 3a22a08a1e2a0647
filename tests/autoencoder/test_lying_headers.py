"""A header that lies is refused by the launcher in every file whose weights a rank would load, with file and tensor."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ksweep.activations.caching import activations_key
from ksweep.autoencoder.nla.checkpoint import inspect_nla
from ksweep.autoencoder.tae.checkpoint import inspect_tae
from ksweep.utils.errors import CheckpointError
from tests.activations.helpers import spec, write_jsonl
from tests.autoencoder.test_tae_refusals import copy_case
from tests.tiny_models import FIXTURES, make_pair
from tests.utils.test_tensor_headers import header_of, with_header


def lie(path: Path) -> str:
    """Make the header of a file say another shape of its first tensor, and return that tensor's name."""
    name = min(name for name in header_of(path) if name != "__metadata__")
    with_header(path, lambda header: header[name].update(shape=[7, *header[name]["shape"]]))
    return name


def with_own_base(checkpoint: Path) -> Path:
    """A checkpoint with a copy of its base instead of a link to the fixture, which is not to be changed."""
    base = checkpoint.parent / "base"
    original = base.resolve()
    base.unlink()
    shutil.copytree(original, base)
    return checkpoint


def refused_by(path: Path, name: str, error: CheckpointError) -> bool:
    return str(path) in str(error) and repr(name) in str(error)


@pytest.mark.parametrize(
    ("role", "file"),
    [("av", "nla-av/model.safetensors"), ("ar", "nla-ar/model.safetensors"), ("ar", "nla-ar/value_head.safetensors")],
)
def test_lying_header_of_full_weights_is_refused_at_inspection(role: str, file: str, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(FIXTURES / "qwen2_text", tmp_path / "pair"))
    name = lie(directory / file)
    with pytest.raises(CheckpointError) as caught:
        inspect_nla(directory / f"nla-{role}", role)  # type: ignore[arg-type]
    assert refused_by(directory / file, name, caught.value)


@pytest.mark.parametrize("role", ["av", "ar"])
@pytest.mark.parametrize("of_base", [False, True])
def test_lying_header_of_an_adapter_or_its_base_is_refused_at_inspection(role: str, of_base: bool, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, adapters=True)
    directory = pair.av if role == "av" else pair.ar
    inspect_nla(directory, role, str(pair.base))  # type: ignore[arg-type]
    path = pair.base / "model.safetensors" if of_base else directory / "adapter_model.safetensors"
    name = lie(path)
    with pytest.raises(CheckpointError) as caught:
        inspect_nla(directory, role, str(pair.base))  # type: ignore[arg-type]
    assert refused_by(path, name, caught.value)


@pytest.mark.parametrize("case", ["gpt2_patch_all", "gemma3_patch_two"])
def test_lying_header_of_a_base_of_tae_files_is_refused_at_inspection(case: str, tmp_path: Path) -> None:
    checkpoint = with_own_base(copy_case(case, tmp_path))
    path = inspect_tae(checkpoint).base / "model.safetensors"
    name = lie(path)
    with pytest.raises(CheckpointError) as caught:
        inspect_tae(checkpoint)
    assert refused_by(path, name, caught.value)


def test_lying_header_of_the_model_of_the_activations_is_refused_while_planning(tmp_path: Path) -> None:
    base = Path(shutil.copytree(FIXTURES / "qwen2_text" / "base", tmp_path / "base"))
    activations = spec(base, write_jsonl(tmp_path / "t.jsonl", ["one two three four"]), 2)
    activations_key(activations, 1)
    name = lie(base / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        activations_key(activations, 1)
    assert refused_by(base / "model.safetensors", name, caught.value)


def test_index_that_names_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(FIXTURES / "qwen2_text", tmp_path / "pair")) / "nla-av"
    (directory / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../elsewhere.safetensors"}}')
    with pytest.raises(CheckpointError, match="expected the name of a file beside it"):
        inspect_nla(directory, "av")
