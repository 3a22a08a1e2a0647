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
LARGEST_SIZES = {"num_hidden_layers": 10_000, "hidden_size": 1 << 20}
"""Sizes beyond those of any model, for which lists of blocks would fill the memory."""
LARGEST_BY_WORD = {"expert": 1 << 14, "layer": 10_000, "head": 1 << 20, "dim": 1 << 24, "size": 1 << 26, "rank": 1 << 24}
"""Largest whole number under a key with this word in it; tables and lists of so many entries are made of them, also where no
weight is read. Vocabularies have 10^5 to 10^6 entries, experts are at most some hundred."""
BLOCK_TYPES = ("layer_types", "layers_block_type", "block_types")


def language_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the language model's part of a config.json, its sizes under their usual names where the file states them."""
    text = config.get("text_config")
    model = dict(text if isinstance(text, dict) else config)
    for name, others in SIZE_NAMES.items():
        size = next((model[spelling] for spelling in (name, *others) if model.get(spelling) is not None), None)
        if size is not None:
            model[name] = size
    return model


def implausible_size(config: Mapping[str, Any]) -> tuple[str, int] | None:
    """Return the first size in a config.json that is beyond those of any model, with its key; None where all are plausible."""
    for key, value in config.items():
        if isinstance(value, dict) and (found := implausible_size(value)) is not None:
            return found
        for number in value if isinstance(value, list) else [value]:
            limits = [limit for word, limit in LARGEST_BY_WORD.items() if word in str(key)]
            if limits and isinstance(number, int) and not isinstance(number, bool) and abs(number) > max(limits):
                return str(key), number
    return None


def block_types(config: Mapping[str, Any], num_blocks: int) -> list[str]:
    """Return how each block mixes tokens: "attention" (full, sliding or chunked), or the configuration's own word for it."""
    stated: list[Any] = next((config[name] for name in BLOCK_TYPES if isinstance(config.get(name), list)), [])
    types = ["attention" if _is_attention(str(kind)) else str(kind) for kind in stated[:num_blocks]]
    return types if len(types) == num_blocks else ["attention"] * num_blocks


def _is_attention(block_type: str) -> bool:
    return block_type == "attention" or (block_type.endswith("_attention") and "linear" not in block_type)
