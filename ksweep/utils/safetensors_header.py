"""Which tensors a model directory holds, by its safetensors headers alone: no weights are read, no torch is needed."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ksweep.utils.errors import CheckpointError
from ksweep.utils.files import read_json
from ksweep.utils.model_sizes import block_types
from ksweep.utils.sidecar_keys import abbreviated
from ksweep.utils.tensor_headers import Tensor, read_header
from ksweep.utils.text import some_of

WRAPPED = {r"^(?:model\.)?language_model\.(?:model\.)?(?!lm_head)": "model.", r"^language_model\.lm_head\.": "lm_head."}
"""Names of the text model inside a multimodal wrapper (two spellings in use) -> its own names; given to transformers as well."""
NOT_TEXT = re.compile(r"^(?:model\.)?(?:vision_tower|vision_model|multi_modal_projector|visual)\.")
BLOCK_TENSOR = re.compile(r"^(.*\b(?:layers|h|blocks)\.)(\d+)\.(.+)$")

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""Files of a LoRA adapter that PEFT has saved."""
EXPERT_TENSOR = re.compile(r"^(.*\.experts\.)(\d+)(\..+)$")


def model_tensors(directory: Path) -> dict[str, Tensor]:
    """Return every tensor of the model in a directory: model.safetensors, or the shards that its index lists.

    Raises:
        CheckpointError: no safetensors weights, a shard missing, or an index that does not fit its shards.
    """
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        single = directory / "model.safetensors"
        if not single.exists():
            raise CheckpointError(
                f"{directory} holds neither model.safetensors nor {index.name}. Weights in another format (.bin, .pt) must be "
                "saved as safetensors first; "
                "a hub snapshot may be incomplete."
            )
        return read_header(single)
    weight_map = read_json(index, "weight index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map. Download the index again.")
    return _sharded(directory, index, {str(k): str(v) for k, v in weight_map.items()})


def _sharded(directory: Path, index: Path, weight_map: Mapping[str, str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{index} lists {abbreviated(name)}, expected the name of a file beside it. Download it again.")
        if not (directory / name).exists():
            raise CheckpointError(f"{index} lists {name}, which is not in {directory}. Download the missing shard.")
        tensors.update(read_header(directory / name))
    if absent := sorted(weight_map.keys() - tensors.keys()):
        raise CheckpointError(
            f"{index} lists tensors that no shard holds: {some_of(absent)}. Index and shards are of different checkpoints, or "
            "incomplete."
        )
    return tensors


def text_names(names: Iterable[str]) -> list[str]:
    """Return tensor names as the bare text model spells them, without those of vision parts."""
    out = []
    for name in names:
        if NOT_TEXT.match(name):
            continue
        for pattern, replacement in WRAPPED.items():
            name = re.sub(pattern, replacement, name)
        out.append(name)
    return out


def check_names(names: Iterable[str], where: Path) -> None:
    """Check what can be told by the names of tensors alone: none is there under two spellings, and no expert lacks any.

    transformers puts the experts of a block into one tensor, and does not say which of them it misses.

    Raises:
        CheckpointError: with the names that are there twice, or missing.
    """
    names = text_names(names)
    check_spellings(names, where)
    experts: dict[tuple[str, str], set[int]] = defaultdict(set)
    for match in filter(None, map(EXPERT_TENSOR.match, names)):
        experts[match[1], match[3]].add(int(match[2]))
    count = 1 + max((max(numbers) for numbers in experts.values()), default=0)
    if missing := [f"{block}{i}{part}" for (block, part), has in experts.items() for i in range(count) if i not in has]:
        raise CheckpointError(
            f"{where} lacks {some_of(missing)}, of {count} experts in every block that has experts. Download the checkpoint "
            "again."
        )


def check_spellings(names: Iterable[str], where: Path) -> None:
    """Raise CheckpointError if a name is there twice, once all are those of the text model: one of the two tensors would win."""
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise CheckpointError(
            f"{where} holds the same tensors under two spellings: {some_of(twice)}. Keep one of them, without language_model. or "
            ".default. in its name."
        )


def check_attention(config: Mapping[str, Any], where: Path) -> None:
    """Check that every block keeps keys and values, which draws are forked from.

    Raises:
        CheckpointError: other blocks (linear attention, convolutions, state spaces), which are not supported yet.
    """
    types = block_types(config, int(config["num_hidden_layers"]))
    if others := sorted(set(types) - {"attention"}):
        count = sum(block_type in others for block_type in types)
        raise CheckpointError(
            f"{where} is a {config.get('model_type')} model: {count} of its {len(types)} blocks are of the kind "
            f"{', '.join(others)}, which keeps no keys and values. Drawing and scoring go on from shared ones, so that such "
            "models are not supported yet as AV or AR. Use a pair over a model with attention in every block."
        )


def bytes_of_weights(model: Path, dtype: str, num_blocks: int | None = None) -> int:
    """Return the memory that the weights of a language model take in a dtype, from the headers of its files.

    Bytes hold two of 4 bits. Vision parts are not counted, nor are blocks from `num_blocks` on.
    """
    used = [tensor for name, tensor in model_tensors(model).items() if not (NOT_TEXT.match(name) or _is_above(name, num_blocks))]
    num_weights = sum(math.prod(tensor.shape) * (1 + (tensor.dtype == "U8")) for tensor in used)
    return (4 if dtype == "float32" else 2) * num_weights


def _is_above(name: str, num_blocks: int | None) -> bool:
    block = BLOCK_TENSOR.match(name)
    return num_blocks is not None and block is not None and int(block[2]) >= num_blocks
