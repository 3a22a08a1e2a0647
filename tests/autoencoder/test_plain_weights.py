"""An AV as a plain checkpoint for engines that load weights themselves: which files they get, and what lies in a merged copy."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ksweep.autoencoder.nla import loading, plain_weights
from ksweep.autoencoder.nla.checkpoint import CheckpointInfo, inspect_nla
from ksweep.autoencoder.nla.models import NlaVerbalizer, load_nla_prompter, load_nla_verbalizer
from ksweep.autoencoder.nla.plain_weights import COPY_MARKER, merged_copies, plain_directory, remove_copy
from ksweep.utils.errors import DiskFullError
from tests.tiny_models import Family, make_pair

COPIED = [("qwen2", True), ("gemma3_multimodal", False), ("gemma3_multimodal", True)]
"""Adapters, and the language part of a multimodal model; full weights of a language model alone are used where they are."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KSWEEP_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def av_of(tmp_path: Path, family: Family, adapters: bool) -> CheckpointInfo:
    return inspect_nla(make_pair(tmp_path, family, adapters=adapters).av, "av")


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma3"])
def test_full_weights_of_a_language_model_are_used_where_they_are(tmp_path: Path, home: Path, family: Family) -> None:
    info = av_of(tmp_path, family, adapters=False)
    assert plain_directory(info, "float32") == info.path and not (home / "merged").exists()


@pytest.mark.parametrize("classes", [None, ["Qwen2ForSequenceClassification"], ["Qwen2Model"]])
def test_full_weights_that_are_not_said_to_be_a_causal_lm_are_copied(tmp_path: Path, classes: list[str] | None) -> None:
    pair = make_pair(tmp_path, "qwen2")
    config = json.loads((pair.av / "config.json").read_text())
    (pair.av / "config.json").write_text(json.dumps(config | {"architectures": classes}))
    directory = plain_directory(inspect_nla(pair.av, "av"), "float32")
    assert directory != pair.av and json.loads((directory / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]


@pytest.mark.parametrize(("family", "adapters"), COPIED)
def test_a_copy_is_written_once_and_holds_what_the_built_in_engine_runs(
    tmp_path: Path, family: Family, adapters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = av_of(tmp_path, family, adapters)
    directory = plain_directory(info, "float32")
    config = json.loads((directory / "config.json").read_text())
    assert "text_config" not in config and config["architectures"] == [
        "Gemma3ForCausalLM" if family.startswith("gemma3") else "Qwen2ForCausalLM"
    ]
    copied = weights_of(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32))
    expected = weights_of(load_nla_verbalizer(info, dtype="float32").model)
    assert copied.keys() == expected.keys() and all(torch.equal(copied[name], expected[name]) for name in expected)
    monkeypatch.setattr(loading, "save_av_model", lambda *_: pytest.fail("written a second time"))
    assert plain_directory(info, "float32") == directory
    assert [(copy.directory, copy.av) for copy in merged_copies()] == [(directory, str(info.path))]


@pytest.mark.parametrize("family", ["qwen2", "gemma3_multimodal"])
def test_prompts_need_the_embeddings_alone(tmp_path: Path, family: Family) -> None:
    """Gemma's module multiplies the rows by sqrt(d_model), and its copy must too."""
    info = av_of(tmp_path, family, adapters=True)
    whole, light = load_nla_verbalizer(info, dtype="bfloat16"), load_nla_prompter(info, dtype="bfloat16", devices=("cpu",))
    vectors = torch.randn(3, info.d_model, generator=torch.Generator().manual_seed(0))
    assert light.model is None and torch.equal(light.prompts(vectors).embeddings, whole.prompts(vectors).embeddings)
    assert (light.prompt_length, light.stop_token_ids) == (whole.prompt_length, whole.stop_token_ids)
    assert light.files is not None and (light.files.dtype, light.files.devices) == ("bfloat16", ("cpu",))
    assert sum(p.numel() for p in light.embeddings.parameters()) == whole.embeddings.weight.numel()
    assert isinstance(light, NlaVerbalizer) and light.decode([3, 4]) == whole.decode([3, 4])


def test_other_weights_and_another_dtype_have_copies_of_their_own(tmp_path: Path) -> None:
    info = av_of(tmp_path, "qwen2", adapters=True)
    other = inspect_nla(make_pair(tmp_path / "other", "qwen2", adapters=True, seed=9).av, "av")
    moved = inspect_nla(shutil.copytree(info.path, tmp_path / "moved"), "av", base=str(info.base))
    directories = [plain_directory(*args) for args in ((info, "float32"), (other, "float32"), (info, "bfloat16"))]
    assert len(set(directories)) == 3 and plain_directory(moved, "float32") == directories[0]


def test_a_copy_that_is_not_whole_is_written_again(tmp_path: Path) -> None:
    info = av_of(tmp_path, "qwen2", adapters=True)
    directory = plain_directory(info, "float32")
    weights = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(weights[:-4])
    assert plain_directory(info, "float32") == directory and (directory / "model.safetensors").read_bytes() == weights
    (directory / COPY_MARKER).unlink()
    assert plain_directory(info, "float32") == directory and (directory / COPY_MARKER).exists()


def test_a_writer_that_died_leaves_nothing_that_is_used(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = av_of(tmp_path, "qwen2", adapters=True)

    def half(_info: Any, _dtype: str, directory: Path) -> None:
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loading, "save_av_model", half)
        with pytest.raises(KeyboardInterrupt):
            plain_directory(info, "float32")
    assert merged_copies() == [] and len(list((home / "merged").glob(".*.part"))) == 1
    plain_directory(info, "float32")
    assert len(merged_copies()) == 1 and not list((home / "merged").glob(".*.part"))


def test_another_process_may_be_faster_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = av_of(tmp_path, "qwen2", adapters=True)
    save = loading.save_av_model

    def slowly(*arguments: Any) -> None:
        save(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(loading, "save_av_model", save)
            plain_weights._write_copy(info, "float32", directory, is_alone=False)

    directory = plain_directory(info, "float32")
    shutil.rmtree(directory)
    monkeypatch.setattr(loading, "save_av_model", slowly)
    assert plain_directory(info, "float32") == directory and len(merged_copies()) == 1
    assert not list(directory.parent.glob(".*.part"))


def test_without_room_nothing_is_written(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = av_of(tmp_path, "qwen2", adapters=True)
    monkeypatch.setattr(plain_weights.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(DiskFullError, match="KSWEEP_HOME to a larger disk"):
        plain_directory(info, "float32")
    assert not list((home / "merged").glob("*/"))


def test_copies_are_listed_most_recently_used_first_and_removed(tmp_path: Path) -> None:
    info = av_of(tmp_path, "qwen2", adapters=True)
    directories = [plain_directory(info, dtype) for dtype in ("float32", "bfloat16")]
    os.utime(directories[1] / COPY_MARKER, (1, 1))
    copies = merged_copies()
    assert [(copy.directory, copy.dtype) for copy in copies] == [(directories[0], "float32"), (directories[1], "bfloat16")]
    assert copies[0].bytes == sum(file.stat().st_size for file in directories[0].iterdir() if file.name != COPY_MARKER)
    plain_directory(info, "bfloat16")
    assert merged_copies()[0].dtype == "bfloat16"
    remove_copy(copies[0])
    assert [copy.dtype for copy in merged_copies()] == ["bfloat16"] and not directories[0].exists()
