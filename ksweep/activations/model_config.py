"""Depth, width and context of a model from its config.json: enough to plan and to leave blocks out. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ksweep.activations.positions import most_per_row
from ksweep.config.spec import Activations
from ksweep.utils.errors import CheckpointError, RequestError, SpecError
from ksweep.utils.files import read_json
from ksweep.utils.model_sizes import LARGEST_SIZES, language_model

CUTTABLE = frozenset({
    "gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "olmo", "olmo2", "phi", "phi3",
    "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "starcoder2",
})  # fmt: skip
"""Architectures whose lower blocks do not depend on the block count. Others (Gemma 3n shares caches counted from the top) are
loaded whole and stopped at the block."""

MAX_ACTIVATIONS_PER_UNIT = 16_384
"""Most activations in a unit: 64 long rows with every position would be a gigabyte."""

TEXT_ROWS_PER_UNIT = 64


def text_config(path: Path, layer: int | None = None) -> dict[str, Any]:
    """Return the language model's part of config.json, with depth as `num_hidden_layers` and width as `hidden_size`.

    Raises:
        CheckpointError: no config.json, or one without depth or width. RequestError: `layer` is beyond the last block.
    """
    if not path.is_dir():
        raise CheckpointError(f"base model {path} is a file; expected a directory with config.json, weights and tokenizer")
    config = language_model(read_json(path / "config.json", "model configuration"))
    depth, width = config.get("num_hidden_layers"), config.get("hidden_size")
    if not isinstance(depth, int) or not isinstance(width, int):
        raise CheckpointError(f"{path / 'config.json'} does not say how many blocks there are or how wide: a language model?")
    for name, largest in LARGEST_SIZES.items():
        if not 1 <= config[name] <= largest:
            raise CheckpointError(
                f"{path / 'config.json'} has {name}={config[name]}, expected a whole number from 1 to {largest:,}: is it the "
                "configuration of a language model?"
            )
    if layer is not None and not 0 <= layer < depth:
        raise RequestError(
            f"layer {layer} of base model {path} does not exist: it has {depth} blocks, so activations.layer is 0 to {depth - 1} "
            f"(the output of block {depth - 1} is hidden_states[{depth}])"
        )
    return config


def positions_limit(config: dict[str, Any], activations: Activations) -> int:
    """Return the number of tokens that rows are cut to: max_length, or the model's context if that is shorter.

    Raises:
        SpecError: min_position leaves nothing.
    """
    context = config.get("max_position_embeddings")
    limit = min(activations.max_length, context) if isinstance(context, int) else activations.max_length
    if activations.candidates == "not_special" and activations.min_position >= limit:
        raise SpecError(
            f"activations.min_position={activations.min_position} leaves nothing: rows are cut to {limit} tokens "
            f"(max_length={activations.max_length}, context of the model {context})"
        )
    return limit


def rows_per_unit(activations: Activations, max_length: int) -> int:
    """Return the rows of text in a unit: 64, or fewer if a row can give very many activations."""
    return max(1, min(TEXT_ROWS_PER_UNIT, MAX_ACTIVATIONS_PER_UNIT // most_per_row(activations, max_length)))


def cut_to_blocks(config: Any, num_blocks: int) -> None:
    """Lower the number of blocks in a transformers text configuration, with its per-block lists, if that is known to be safe."""
    if config.model_type not in CUTTABLE:
        return
    depth = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if "layer" in name and isinstance(value, (list, tuple)) and len(value) == depth:
            setattr(config, name, list(value[:num_blocks]))
    config.num_hidden_layers = num_blocks
