"""Activations of a LoRA adapter over the base: those of the adapted model, noted, under a key of their own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ksweep import Autoencoder, Cell
from ksweep.activations import activations_key, ensure, plan_activations
from ksweep.activations.base_model import BaseModel, check_model, locate_model
from ksweep.activations.hidden_states import BlockReader
from ksweep.evaluation.identity import cell_keys
from ksweep.utils.errors import CheckpointError, SpecError
from tests.activations.helpers import passages, spec, write_jsonl
from tests.tiny_families import block_output, save_family_model
from tests.tiny_models import TinyPair, make_base, make_pair, merge_adapters

LAYER = 1
IDS = [[5, 6, 7, 8, 9, 10]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    return make_pair(tmp_path_factory.mktemp("pair"), "qwen2", adapters=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("text") / "rows.jsonl", passages(20, low=20))


def adapter_of(pair: TinyPair, folder: Path, change: object = None, **config: object) -> Path:
    """The AV's adapter as the fine-tune of the base that somebody else has made."""
    folder.mkdir()
    weights = load_file(pair.av / "adapter_model.safetensors")
    save_file(
        {name: change(name, w) if callable(change) else w for name, w in weights.items()}, folder / "adapter_model.safetensors"
    )
    stated = json.loads((pair.av / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(pair.base)} | config
    (folder / "adapter_config.json").write_text(json.dumps(stated))
    return folder


@pytest.mark.slow
def test_activations_of_an_adapter_are_those_of_the_merged_model(pair: TinyPair, text: Path, tmp_path: Path) -> None:
    merged = merge_adapters(pair, tmp_path / "merged").av
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(pair.base / name, merged / name)
    tuned = spec(adapter_of(pair, tmp_path / "tuned"), text, 20)
    tables = [
        ensure(request, LAYER, tmp_path / "cache") for request in (tuned, spec(merged, text, 20), spec(pair.base, text, 20))
    ]
    assert len({table.key for table in tables}) == 3
    assert [t.column("position").tolist() for t in tables[1:]] == [tables[0].column("position").tolist()] * 2
    of_adapter, of_merged, of_base = (table.vectors() for table in tables)
    assert np.abs(of_adapter - of_merged).max() < 1e-4 < 0.01 < np.abs(of_adapter - of_base).max()


def test_that_activations_are_of_a_fine_tune_is_noted_with_the_run(pair: TinyPair, text: Path, tmp_path: Path) -> None:
    tuned = adapter_of(pair, tmp_path / "tuned")
    cell = Cell(autoencoder=Autoencoder(av=str(pair.av), ar=str(pair.ar), dtype="float32"), activations=spec(tuned, text, 10))
    notes = [note.text for note in cell_keys(cell).notes if note.about == "base model"]
    assert f"The activations come from {tuned}, a LoRA adapter over {pair.base}: a fine-tune of that model." in notes
    plain = cell_keys(replace(cell, activations=spec(pair.base, text, 10)))
    assert not any("LoRA adapter over" in note.text for note in plain.notes)


def test_an_adapter_that_does_not_fit_is_refused(pair: TinyPair, text: Path, tmp_path: Path) -> None:
    def zero(name: str, weight: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(weight) if "lora_B" in name else weight

    cases = {
        "zero": (adapter_of(pair, tmp_path / "zero", zero), "changes nothing up to block 1"),
        "kind": (adapter_of(pair, tmp_path / "kind", peft_type="IA3"), "adapter of type 'IA3', expected LORA"),
        "saved": (adapter_of(pair, tmp_path / "saved", modules_to_save=["embed_tokens"]), "replaces whole modules"),
        "lost": (adapter_of(pair, tmp_path / "lost", base_model_name_or_path="/nowhere"), "Set activations.adapter_base"),
        "unnamed": (adapter_of(pair, tmp_path / "unnamed", base_model_name_or_path=None), "names no base model"),
        "targets": (adapter_of(pair, tmp_path / "targets", target_modules=["q_proj"]), r"has unexpected layers\.0\.mlp\.up_proj"),
        "more": (
            adapter_of(pair, tmp_path / "more", target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]),
            r"lacks layers\.0\.self_attn\.k_proj",
        ),
    }
    for adapter, words in cases.values():
        request = spec(adapter, text, 4)
        with pytest.raises(CheckpointError, match=words):
            check_model(locate_model(request), LAYER)
        with pytest.raises(CheckpointError, match=words):
            ensure(request, LAYER, tmp_path / "cache")
    moved = spec(cases["lost"][0], text, 4, adapter_base=str(pair.base))
    assert plan_activations(moved, LAYER, tmp_path / "cache").missing == 4
    with pytest.raises(SpecError, match=r"and activations.model=.* is none"):
        plan_activations(spec(pair.base, text, 4, adapter_base="other"), LAYER, tmp_path / "cache")
    plan_activations(spec(pair.base, text, 4, adapter_base=str(pair.base)), LAYER, tmp_path / "cache")  # beside adapters of it
    assert activations_key(moved, LAYER)[0] != activations_key(spec(pair.base, text, 4), LAYER)[0]


def tuned(base: Path, folder: Path, targets: str | list[str]) -> tuple[BaseModel, torch.Tensor]:
    """An adapter of random numbers that peft saves over a base, and what block 0 of the two puts out for IDS."""
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=targets)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(folder))
    with block_output(model.base_model.model, 0) as outputs, torch.inference_mode():
        model(input_ids=torch.tensor(IDS))
    return BaseModel(base, folder, str(base)), outputs[0]


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("SmolLM3", ["q_proj", "down_proj"]),  # whose blocks above L stay
        ("OPT", ["q_proj", "fc1"]),
        ("GPT-NeoX, Pythia", ["query_key_value"]),
        ("Qwen3", r"model\.layers\.\d+\.self_attn\.[qv]_proj"),
        ("Falcon", [f"transformer.h.{i}.self_attention.dense" for i in range(3)]),
    ],
)
def test_an_adapter_of_every_family_gives_what_peft_gives(family: str, targets: str | list[str], tmp_path: Path) -> None:
    save_family_model(tmp_path / "base", family, num_layers=3, seed=1)
    files, expected = tuned(tmp_path / "base", tmp_path / "adapter", targets)
    assert check_model(files, 0) == ()
    found, plain = (BlockReader(model, 0, "float32").outputs(IDS) for model in (files, str(files.weights)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, plain, atol=0.01)


@pytest.mark.parametrize("spelled", ["model.", "model.language_model.", "language_model.model."])
def test_an_adapter_over_the_text_part_of_a_multimodal_base_is_taken(spelled: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "gemma3_multimodal")
    text_config = AutoConfig.from_pretrained(base).get_text_config()
    text_config.architectures = None
    AutoModelForCausalLM.from_config(text_config).save_pretrained(tmp_path / "text")
    weights = {f"language_model.{name}": w for name, w in load_file(tmp_path / "text" / "model.safetensors").items()}
    save_file(load_file(base / "model.safetensors") | weights, base / "model.safetensors")
    files, expected = tuned(tmp_path / "text", tmp_path / "adapter", ["up_proj"])
    file, config = tmp_path / "adapter" / "adapter_model.safetensors", tmp_path / "adapter" / "adapter_config.json"
    save_file(
        {name.replace("base_model.model.model.", f"base_model.model.{spelled}"): w for name, w in load_file(file).items()}, file
    )
    stated = {"target_modules": rf"{spelled}layers\.\d+\.mlp\.up_proj"}
    config.write_text(json.dumps(json.loads(config.read_text()) | stated))
    over = replace(files, weights=base)
    assert check_model(over, 0) == ()
    torch.testing.assert_close(BlockReader(over, 0, "float32").outputs(IDS), expected, rtol=1e-5, atol=1e-5)
