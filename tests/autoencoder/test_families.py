"""Every model family against full-context transformers, and what its own class says that a checkpoint lacks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from ksweep.activations.model_config import text_config
from ksweep.autoencoder.nla.checkpoint import inspect_nla
from ksweep.utils.errors import CheckpointError
from tests.tiny_families import FAMILIES, check_family, make_family_pair
from tests.tiny_models import edit_weights

TABLE = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
EVERY_DAY = ("Qwen3.5", "Gemma 2", "GPT-NeoX, Pythia", "OPT-350m")
"""Linear attention; eager attention; a final norm with a bias; refused."""


@pytest.mark.parametrize("family", [pytest.param(name, marks=() if name in EVERY_DAY else pytest.mark.slow) for name in FAMILIES])
def test_family_is_what_the_table_says(family: str, tmp_path: Path) -> None:
    row = check_family(tmp_path, family)
    assert row.line() in TABLE
    assert all(f"* {reason}\n" in TABLE for reason in row.reasons)


@pytest.mark.parametrize(
    ("family", "name", "missing"),
    [
        ("GLM-4-MoE", "model.layers.2.mlp.gate.weight", r"model\.layers\.2\.mlp\.gate\.weight"),
        ("GLM-4-MoE", "model.layers.2.mlp.experts.1.up_proj.weight", r"model\.layers\.2\.mlp\.experts\.1\.up_proj\.weight"),
        ("Qwen3.5", "model.layers.0.linear_attn.conv1d.weight", r"model\.layers\.0\.linear_attn\.conv1d\.weight"),
        ("GPT-2", "transformer.h.1.ln_1.bias", r"transformer\.h\.1\.ln_1\.bias"),
    ],
)
def test_weight_that_only_some_blocks_have_is_missed_by_name(family: str, name: str, missing: str, tmp_path: Path) -> None:
    av = make_family_pair(tmp_path, family).av
    inspect_nla(av, "av")
    edit_weights(av, change=lambda state: state.pop(name))
    with pytest.raises(CheckpointError, match=f"(lacks|has, in another shape than config.json implies,) {missing}"):
        inspect_nla(av, "av")


def test_absent_block_of_experts_is_missed_by_name(tmp_path: Path) -> None:
    av = make_family_pair(tmp_path, "GLM-4-MoE").av
    edit_weights(av, change=lambda state: [state.pop(name) for name in list(state) if ".layers.2." in name])
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.2\.input_layernorm\.weight"):
        inspect_nla(av, "av")


def test_architecture_that_transformers_does_not_know_is_refused_before_loading(tmp_path: Path) -> None:
    av = make_family_pair(tmp_path, "Llama").av
    config = (av / "config.json").read_text()
    (av / "config.json").write_text(config.replace('"model_type": "llama"', '"model_type": "deepseek_v9"'))
    with pytest.raises(CheckpointError, match=r"its weights cannot be loaded by transformers .*deepseek_v9"):
        inspect_nla(av, "av")


@pytest.mark.parametrize("name", ["vocab_size", "intermediate_size"])
@pytest.mark.parametrize(
    ("size", "message"),
    [(50_000_000, r"in another shape than config\.json implies"), (10**12, "=1000000000000, more than any model has")],
    ids=["large", "absurd"],
)
def test_wrong_size_in_config_is_refused_without_taking_memory(size: int, message: str, name: str, tmp_path: Path) -> None:
    av = make_family_pair(tmp_path, "Llama").av
    config = json.loads((av / "config.json").read_text())
    (av / "config.json").write_text(json.dumps(config | {name: size}))
    with pytest.raises(CheckpointError, match=message):
        inspect_nla(av, "av")


def test_sizes_of_a_model_are_the_same_under_either_name(tmp_path: Path) -> None:
    av = make_family_pair(tmp_path, "GPT-2").av
    info, read = inspect_nla(av, "av"), text_config(av)
    assert "hidden_size" not in AutoConfig.from_pretrained(av).to_dict()
    for name, size in (("num_hidden_layers", 4), ("hidden_size", 32), ("max_position_embeddings", 512)):
        assert info.config[name] == read[name] == size
