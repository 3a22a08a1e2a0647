"""Sizes in a config.json: those of real models pass, those that would fill the memory are named."""

from __future__ import annotations

from typing import Any

import pytest

from ksweep.utils.model_sizes import implausible_size

LARGE = {
    "vocab_size": 262_208, "hidden_size": 16_384, "intermediate_size": 65_536, "num_hidden_layers": 126, "head_dim": 576,
    "n_routed_experts": 384, "max_position_embeddings": 10_485_760, "rope_theta": 500_000_000, "eos_token_id": [128_001, 128_008],
    "text_config": {"num_experts": 512, "q_lora_rank": 1536}, "sliding_window": None, "tie_word_embeddings": False,
}  # fmt: skip


def test_sizes_of_the_largest_models_are_plausible() -> None:
    assert implausible_size(LARGE) is None


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"head_dim": 2**32}, "head_dim"),
        ({"num_experts": 10**6}, "num_experts"),
        ({"text_config": {"vocab_size": 10**12}}, "vocab_size"),
        ({"conv_dim": [64, 2**40]}, "conv_dim"),
        ({"hidden_size": -(2**40)}, "hidden_size"),
    ],
)
def test_size_beyond_any_model_is_found_with_its_key(change: dict[str, Any], found: str) -> None:
    size = implausible_size(LARGE | change)
    assert size is not None and size[0] == found
