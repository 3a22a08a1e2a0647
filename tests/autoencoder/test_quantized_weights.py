"""Weights that are stored quantised, against plain ones of the same numbers; and adapters of embeddings and heads."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ksweep.activations.base_model import BaseModel, check_model
from ksweep.activations.hidden_states import BlockReader
from ksweep.autoencoder.nla.checkpoint import inspect_nla
from ksweep.autoencoder.nla.models import load_nla_reconstructor, load_nla_verbalizer
from ksweep.utils.errors import CheckpointError
from ksweep.utils.safetensors_header import bytes_of_weights
from tests.tiny_models import Family, TinyPair, edit_weights, make_pair, prefilled

UP = "model.layers.1.mlp.up_proj.weight"
TILE, LARGEST_FP8 = 32, 448.0


def fine_grained(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FP8 in square tiles, as DeepSeek-V3 stores it: stored weight, its scales, and the numbers that they stand for."""
    rows, columns = (size // TILE for size in weight.shape)
    scale = weight.view(rows, TILE, columns, TILE).abs().amax((1, 3)) / LARGEST_FP8
    spread = scale.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
    stored = (weight / spread).to(torch.float8_e4m3fn)
    return stored, scale, stored.float() * spread


def by_row(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FP8 with a scale per row, as compressed-tensors stores it; it multiplies in the scale's dtype."""
    scale = (weight.abs().amax(1, keepdim=True) / LARGEST_FP8).bfloat16()
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return stored, scale, (stored.to(scale.dtype) * scale).float()


METHODS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "fp8": (
        fine_grained,
        "_scale_inv",
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [TILE, TILE], "fmt": "e4m3"},
    ),
    "compressed-tensors": (
        by_row,
        "_scale",
        {
            "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
                }
            },
        },
    ),
}  # fmt: skip
INSTALLED = {"fp8": True, "compressed-tensors": importlib.util.find_spec("compressed_tensors") is not None}


def say_quantized(path: Path, quantization: dict[str, Any]) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def quantize(path: Path, method: str, plain: Path | None) -> None:
    """Store the projections of a model quantised; `plain` gets the numbers that they stand for."""
    change, suffix, quantization = METHODS[method]
    state, same = {}, {}
    for name, weight in load_file(path / "model.safetensors").items():
        state[name] = same[name] = weight
        if name.endswith("_proj.weight"):
            state[name], state[name + suffix], same[name] = change(weight)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    say_quantized(path, quantization)
    if plain is not None:
        save_file(same, plain / "model.safetensors", metadata={"format": "pt"})


def needs(method: str) -> None:
    if not INSTALLED[method]:
        pytest.skip(f"{method} is not installed")


@pytest.mark.parametrize("method", METHODS)
@torch.inference_mode()
def test_quantised_pair_and_base_equal_plain_ones_of_the_same_numbers(method: str, tmp_path: Path) -> None:
    needs(method)
    stored, plain = (make_pair(tmp_path / name, "qwen2", d_model=64) for name in ("stored", "plain"))
    for role in ("av", "ar"):
        quantize(getattr(stored, role), method, getattr(plain, role))
    vectors = torch.randn(2, 64, generator=torch.Generator().manual_seed(5))
    found, expected = (prefilled(load_nla_verbalizer(pair.av, dtype="float32"), vectors).logits for pair in (stored, plain))
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    found, expected = (
        load_nla_reconstructor(pair.ar, dtype="float32").reconstruct_texts(["a few words"]) for pair in (stored, plain)
    )
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert check_model(BaseModel(stored.av), 1) == ()
    readers = [BlockReader(str(pair.av), 1, dtype="float32") for pair in (stored, plain)]
    found, expected = (reader.outputs([[5, 6, 7]]) for reader in readers)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_quantised_weights_that_lack_a_scale_are_refused_before_loading(tmp_path: Path) -> None:
    av = make_pair(tmp_path, "qwen2", d_model=64).av
    quantize(av, "fp8", None)
    inspect_nla(av, "av")
    edit_weights(av, change=lambda state: state.pop(UP))
    with pytest.raises(CheckpointError, match=UP):
        inspect_nla(av, "av")


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"quantised by gptq, which cannot be computed back"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"quantised by bitsandbytes in 8 bits, which cannot"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"not installed: pip install bitsandbytes"),
        (METHODS["compressed-tensors"][2], r"not installed: pip install compressed-tensors"),
    ],
)
def test_quantisation_that_cannot_be_had_is_refused_before_loading(
    quantization: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    absent = ("bitsandbytes", "compressed_tensors")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name in absent else find_spec(name, *of))
    av = make_pair(tmp_path, "qwen2").av
    say_quantized(av, quantization)
    with pytest.raises(CheckpointError, match=message):
        inspect_nla(av, "av")


@torch.inference_mode()
def test_four_bit_weights_give_what_transformers_computes_with_them(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    av = make_pair(tmp_path, "qwen2", d_model=64).av
    whole = bytes_of_weights(av, "float32")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(av, quantization_config=nf4, device_map="cpu", dtype=torch.float32).save_pretrained(av)
    assert whole <= bytes_of_weights(av, "float32") < 1.2 * whole  # with the scales
    plain = AutoModelForCausalLM.from_pretrained(av, dtype=torch.float32)
    verbalizer = load_nla_verbalizer(av, dtype="float32")
    assert type(verbalizer.model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    embeds = plain.get_input_embeddings()(torch.tensor([verbalizer.prompt_ids])).clone()
    vector = torch.randn(1, 64, generator=torch.Generator().manual_seed(5))
    embeds[:, verbalizer.injection_position] = 20.0 * torch.nn.functional.normalize(vector)
    expected = plain(inputs_embeds=embeds).logits[:, -1]
    assert torch.allclose(prefilled(verbalizer, vector).logits, expected, rtol=1e-4, atol=1e-4)
    edit_weights(av, change=lambda state: state.update({UP: state[UP][:-1]}))
    with pytest.raises(CheckpointError, match="in another shape"):
        inspect_nla(av, "av")


def adapt_embeddings(pair: TinyPair) -> Any:
    """Put an adapter with the head and the embeddings among its targets on the base, as the AV; return PEFT's own model."""
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(pair.base, dtype=torch.float32)
    torch.manual_seed(7)
    targets = ["q_proj", "lm_head", "embed_tokens"]
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"))
    adapted.save_pretrained(str(pair.av))
    config = json.loads((pair.av / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(pair.base)}
    (pair.av / "adapter_config.json").write_text(json.dumps(config))
    return adapted.eval()


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])  # a head of its own; the embeddings' weight
@torch.inference_mode()
def test_adapter_of_head_and_embeddings_equals_the_unmerged_one(family: Family, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, family, adapters=True)
    adapted = adapt_embeddings(pair)
    av = load_nla_verbalizer(pair.av, dtype="float32")
    embeds = adapted.get_input_embeddings()(torch.tensor([av.prompt_ids])).clone()
    vector = torch.randn(1, 32, generator=torch.Generator().manual_seed(5))
    embeds[:, av.injection_position] = 20.0 * torch.nn.functional.normalize(vector)
    expected = adapted(inputs_embeds=embeds).logits[:, -1]
    assert torch.allclose(prefilled(av, vector).logits, expected, rtol=1e-4, atol=1e-4)
