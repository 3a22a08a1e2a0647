"""Configurations of LoRAs whose values are refused, and those that are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ksweep.utils.errors import CheckpointError
from ksweep.utils.lora_config import check_lora_config, named_base

WHERE = Path("adapter_config.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "IA3"), ("use_rslora", "false"), ("use_rslora", 1), ("use_dora", "no"), ("fan_in_fan_out", 0),
        ("lora_alpha", 0), ("lora_alpha", -8), ("lora_alpha", True), ("lora_alpha", "16"), ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")), ("r", 0), ("r", 4.0), ("r", True), ("rank_pattern", {"q_proj": 0}), ("rank_pattern", [4]),
        ("alpha_pattern", {"q_proj": "8"}), ("alpha_pattern", {"q_proj": 0}), ("target_modules", 5), ("target_modules", ["q", 1]),
        ("exclude_modules", {"q": 1}), ("modules_to_save", 5), ("modules_to_save", ["(.+)+!"]), ("layers_to_transform", "2"),
        ("layers_to_transform", [True]), ("layers_pattern", "(.+)+!"), ("bias", "some"), ("use_qalora", True),
        ("alora_invocation_tokens", [1, 2]), ("layer_replication", [[0, 2]]), ("arrow_config", {"top_k": 2}), ("scale_by", 2),
    ],
)  # fmt: skip
def test_value_that_peft_would_take_for_another_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"has {key}="):
        check_lora_config({"peft_type": "LORA", "r": 4, key: value}, WHERE)


def test_values_of_every_version_of_peft_are_accepted() -> None:
    """Newer versions write keys that this one does not know, with their defaults."""
    later = {"of_a_later_version": None, "another": False, "a_third": {}, "and": []}
    usual = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj"], "bias": "none",
        "init_lora_weights": "gaussian", "lora_dropout": 0.1, "qalora_group_size": 16, "megatron_core": "megatron.core",
        "rank_pattern": {}, "alpha_pattern": {"q_proj": 2.5}, "layers_to_transform": [0, 1], "layers_pattern": "layers",
        "modules_to_save": ["lm_head"], "exclude_modules": None, "lora_bias": False, "loftq_config": {}, "inference_mode": True,
    }  # fmt: skip
    check_lora_config(usual | later, WHERE)


@pytest.mark.parametrize(
    ("source", "revision", "base"),
    [
        ("owner/name", "abc123", "owner/name@abc123"), ("owner/name", None, "owner/name"), ("owner/name", "main", "owner/name"),
        ("owner/name@v1", "abc", "owner/name@v1"), ("/cluster/base", "abc", "/cluster/base"), ("", "abc", None), (5, None, None),
    ],
)  # fmt: skip
def test_base_of_an_adapter_is_of_the_revision_that_it_was_trained_over(source: Any, revision: Any, base: str | None) -> None:
    assert named_base({"base_model_name_or_path": source, "revision": revision}, WHERE) == base


def test_revision_that_is_no_text_is_refused() -> None:
    with pytest.raises(CheckpointError, match="has revision=5, expected text"):
        named_base({"base_model_name_or_path": "owner/name", "revision": 5}, WHERE)
