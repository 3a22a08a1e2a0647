"""A LoRA's configuration in the names of the model at hand: modules, ranks and scales are those of PEFT where it was trained."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from ksweep.inference import lora
from ksweep.inference.lora import lora_over
from ksweep.utils.errors import CheckpointError

WHERE = Path("adapter_config.json")
WRAPPER = "model.language_model."


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        self.self_attn.q_proj, self.self_attn.v_proj, self.mlp.up_proj = (nn.Linear(8, 8) for _ in range(3))
        self.norm = nn.LayerNorm(8)


def text_model() -> nn.Module:
    """Modules named as in a causal LM: model.layers.0.self_attn.q_proj, lm_head."""
    causal = nn.Module()
    causal.model = nn.Module()
    causal.model.embed_tokens, causal.model.layers = nn.Embedding(5, 8), nn.ModuleList(Block() for _ in range(12))
    causal.lm_head = nn.Linear(8, 5)
    return causal


def wrapped() -> nn.Module:
    """The same inside a multimodal wrapper: model.language_model.layers.0.self_attn.q_proj."""
    outer, causal = nn.Module(), text_model()
    outer.model = nn.Module()
    outer.model.language_model, outer.lm_head = causal.model, causal.lm_head
    outer.model.vision_tower = nn.Module()
    outer.model.vision_tower.q_proj = nn.Linear(8, 8)
    return outer


def adapted(model: nn.Module, config: LoraConfig) -> dict[str, tuple[int, float]]:
    """Rank and scale of every module that PEFT puts an adapter on."""
    inject_adapter_in_model(config, model)
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "scaling")}
    return {name: (layer.r["default"], layer.scaling["default"]) for name, layer in layers.items()}


CONFIGS: dict[str, dict[str, Any]] = {
    "names": {"target_modules": ["q_proj", "up_proj"]},
    "a whole name": {"target_modules": ["model.layers.1.self_attn.q_proj", "lm_head"]},
    "a pattern": {"target_modules": r".*\.self_attn\.(q_proj|v_proj)"},
    "head and embeddings": {"target_modules": ["lm_head", "embed_tokens", "v_proj"]},
    "without some": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.[0-3]\..*"},
    "without names": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    "some blocks": {"target_modules": ["q_proj"], "layers_to_transform": [0, 11]},
    "one block": {"target_modules": ["q_proj"], "layers_to_transform": 3, "layers_pattern": "layers"},
    "ranks": {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "up_proj": 3}},
    "scales": {"target_modules": ["q_proj", "up_proj"], "alpha_pattern": {"layers.1.self_attn.q_proj": 2, "up_proj": 0.5}},
    "scales by root": {"target_modules": ["q_proj"], "alpha_pattern": {"q_proj": 3}, "use_rslora": True},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_modules_ranks_and_scales_are_those_of_peft(name: str) -> None:
    stated = {"r": 4, "lora_alpha": 8} | CONFIGS[name]
    expected = adapted(text_model(), LoraConfig(**stated))
    ranks = {module: rank for module, (rank, _) in expected.items()}
    model = text_model()
    assert adapted(model, lora_over(model, stated, ranks, {module: module for module in ranks}, WHERE)) == expected


@pytest.mark.parametrize(
    "targets",
    [r".*language_model.*\.self_attn\.(q_proj|v_proj)", r"model\.language_model\.layers\.\d\..*q_proj", ["q_proj"]],
)
def test_pattern_of_a_wrapper_chooses_the_same_modules_of_the_text_model(targets: Any) -> None:
    stated = {"r": 4, "lora_alpha": 8, "target_modules": targets, "exclude_modules": r".*vision_tower.*"}
    expected = adapted(wrapped(), LoraConfig(**stated))
    spelled = {name.replace(WRAPPER, "model."): name for name in expected}
    model = text_model()
    found = adapted(model, lora_over(model, stated, dict.fromkeys(spelled, 4), spelled, WHERE))
    assert {spelled[name]: value for name, value in found.items()} == expected
    first = next(iter(spelled))
    with pytest.raises(CheckpointError, match=f"the file lacks {first}"):  # one that the pattern chooses, and the file has not
        lora_over(text_model(), stated, dict.fromkeys(spelled.keys() - {first}, 4), spelled, WHERE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 3_000_000}, "says rank 3000000, and .* a lora_A of rank 4"),
        ({"rank_pattern": {"q_proj": 300_000}}, "says rank 300000"),
        ({"target_modules": None, "r": 3_000_000}, "says rank 3000000"),
        ({"target_modules": "all-linear", "r": 3_000_000}, "says rank 3000000"),
        ({"target_modules": "("}, r"'\(', which is no pattern"),
        ({"exclude_modules": "(a"}, "which is no pattern"),
        ({"alpha_pattern": {"(": 2}}, "which is no pattern"),
        ({"target_modules": ["up_proj"]}, "the file lacks .*up_proj.*; it has unexpected .*q_proj"),
        ({"alpha_pattern": {"model.language_model.layers.0.self_attn.q_proj": 2}}, "alpha_pattern has .*language_model"),
        ({"rank_pattern": {"k_proj": 4}}, "rank_pattern has k_proj, which no module of the adapter is called"),
    ],
)
def test_configuration_that_does_not_fit_its_tensors_is_refused_before_anything_is_built(
    changes: dict[str, Any], message: str
) -> None:
    model = text_model()
    ranks = {f"model.layers.{i}.self_attn.q_proj": 4 for i in range(12)}
    stated = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | changes
    started = time.process_time()
    with pytest.raises(CheckpointError, match=message):
        lora_over(model, stated, ranks, {name: name for name in ranks}, WHERE)
    assert time.process_time() - started < 2 and not any("lora" in name for name, _ in model.named_parameters())


def test_pattern_that_takes_for_ever_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "PATTERN_SECONDS", 0.05)
    model, ranks = text_model(), {"model.layers.0.self_attn.q_proj": 4}
    stated = {"r": 4, "target_modules": r"(.|..|...)+[!?]"}
    with pytest.raises(CheckpointError, match=r"a pattern that takes more than 0\.05 s"):
        lora_over(model, stated, ranks, {name: name for name in ranks}, WHERE)
