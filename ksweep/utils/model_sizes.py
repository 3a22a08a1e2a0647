"""Depth, width and context of a language model, under whichever name its config.json gives them; and the kinds of its blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SIZE_NAMES = {
    "num_hidden_layers": ("n_layer", "num_layers", "n_layers"),
    "hidden_size": ("n_embd", "d_model"),
    "max_position_embeddings": ("n_positions",),
}
"""The usual name, and those of GPT-2, MPT and others."""
BLOCK_TYPES = ("layer_types", "layers_block_type", "block_types")


def language_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part of a config.json, with its sizes under the usual names where it says them at all."""
    text = config.get("text_config")
    found = dict(text if isinstance(text, dict) else config)
    for name, others in SIZE_NAMES.items():
        said = next((found[other] for other in (name, *others) if found.get(other) is not None), None)
        if said is not None:
            found[name] = said
    return found


def block_types(config: Mapping[str, Any], num_blocks: int) -> list[str]:
    """What each block mixes tokens by: "attention" (full, sliding or chunked), or as the configuration calls it."""
    said: list[Any] = next((config[name] for name in BLOCK_TYPES if isinstance(config.get(name), list)), [])
    types = ["attention" if _is_attention(str(one)) else str(one) for one in said[:num_blocks]]
    return types if len(types) == num_blocks else ["attention"] * num_blocks


def _is_attention(block_type: str) -> bool:
    return block_type == "attention" or (block_type.endswith("_attention") and "linear" not in block_type)
