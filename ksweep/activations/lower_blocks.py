"""Load the blocks of a base model up to L, with the LoRA adapter over it; or check, without contents, that they can be loaded."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ksweep.activations.base_model import BaseModel, adapter_config
from ksweep.activations.model_config import cut_to_blocks, text_config
from ksweep.inference.model_parts import blocks_of, decoder_of
from ksweep.inference.quantized_weights import ask_for_plain_weights, with_plain_weights
from ksweep.inference.transformers_models import (
    OWN_CODE,
    no_foreign_code,
    on_meta,
    options_to_lay_out,
    quiet,
    read_model_config,
    read_tokenizer,
)
from ksweep.utils.errors import CheckpointError, RequestError
from ksweep.utils.files import read_json
from ksweep.utils.safetensors_header import ADAPTER_CONFIG, ADAPTER_WEIGHTS, model_tensors
from ksweep.utils.text import some_of

BLOCK = re.compile(r"(?:layers|h|blocks)\.(\d+)\.")
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def load_decoder(files: BaseModel, layer: int, dtype: torch.dtype, lay_out: bool = False) -> Any:
    """Return the module that runs blocks 0 to `layer`, with its adapter; the whole decoder of an architecture that cannot be cut.

    Args:
        lay_out: leave it on the meta device, without contents.

    Raises:
        RequestError: the layer does not exist.
        CheckpointError: the model lacks weights, cannot be loaded, or its adapter does not fit it.
    """
    backbone = _load_backbone(files.weights, layer, dtype, lay_out)
    if files.adapter is not None:
        _put_adapter(backbone, files.adapter, layer, lay_out)
    return decoder_of(backbone)


def check_lower_blocks(question: tuple[BaseModel, int]) -> None:
    """Check that activations of a model and layer can be computed: by the headers of its weights, before a job is submitted.

    Raises:
        RequestError: as loading would.
    """
    files, layer = question
    load_model_tokenizer(files.tokenizer)
    blocks_of(load_decoder(files, layer, torch.float32, lay_out=True))


def load_model_tokenizer(path: Path) -> Any:
    """Load the tokenizer of the model that activations come from.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    try:
        tokenizer = read_tokenizer(path)
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises whatever the damaged file happens to cause
        raise CheckpointError(f"base model {path} has no usable tokenizer ({type(error).__name__}: {error})") from error
    # Gemma's is "left" by default; positions are indices from the left.
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def _load_backbone(path: Path, layer: int, dtype: torch.dtype, lay_out: bool) -> Any:
    """Load the model without its head, and without the blocks above `layer` where that is safe. No weight in use is random."""
    from transformers import AutoModel

    text_config(path, layer)
    try:
        config = read_model_config(path)
        cut_to_blocks(config.get_text_config(), layer + 1)
        method = ask_for_plain_weights(config, config, path)
        load: Any = AutoModel
        options: dict[str, Any] = {"pretrained_model_name_or_path": path}
        with quiet(), no_foreign_code(path):
            if lay_out:
                with torch.device("meta"):
                    load = type(empty := AutoModel.from_config(config, **OWN_CODE))
                options, method = options_to_lay_out(empty, config, method, _tensors(path))
            model, info = load.from_pretrained(
                **options, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **OWN_CODE
            )
    except RequestError:
        raise
    except Exception as error:  # as above
        raise CheckpointError(
            f"base model {path} cannot be loaded ({type(error).__name__}: {str(error)[:500]}): "
            "expected a transformers causal language model with all its weight files"
        ) from error
    _refuse_random_weights(model, info, path)
    return with_plain_weights(model, method, dtype)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a model on the meta device: of its safetensors files or, where it has none, of its .bin files.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    index = path / PICKLED_INDEX
    if any(path.glob("model*.safetensors*")) or not (index.exists() or (path / PICKLED).exists()):
        return on_meta(model_tensors(path))
    named = read_json(index, "weight index").get("weight_map") if index.exists() else {"": PICKLED}
    tensors: dict[str, torch.Tensor] = {}
    for name in sorted({str(name) for name in named.values()} if isinstance(named, dict) else ()):
        if Path(name).name != name or not (path / name).exists():
            raise CheckpointError(f"{index} lists {name}, which is not in {path}. Download the missing shard.")
        tensors |= torch.load(path / name, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path / name))
    return tensors


def _refuse_random_weights(model: Any, info: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError for a weight that transformers filled at random: absent from the files, or of another shape there.

    Unused weights may be absent: the final norm, and the vision tower of a multimodal wrapper.
    """
    decoder = decoder_of(model)
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")

    def used(keys: Iterable[str]) -> list[str]:
        inside = [key.removeprefix(prefix).lstrip(".") for key in keys if key.startswith(prefix)]
        return sorted(key for key in inside if not re.match(r"(norm|final_layernorm|final_layer_norm|ln_f)\.", key))

    if missing := used(info["missing_keys"]):
        raise CheckpointError(
            f"base model {path} lacks {len(missing)} weights, among them {', '.join(missing[:3])}: "
            "they would be random. Is a weight file missing, or is this an adapter or a checkpoint of another architecture?"
        )
    if wrong := used(key for key, *_ in info["mismatched_keys"]):
        raise CheckpointError(
            f"base model {path} has {len(wrong)} weights of another shape than config.json says, among them "
            f"{', '.join(wrong[:3])}: do weights and config.json belong together?"
        )


def _put_adapter(backbone: Any, directory: Path, layer: int, lay_out: bool) -> None:
    """Put a LoRA adapter on a backbone in place; weights of blocks above `layer` and of the head are left out.

    Raises:
        CheckpointError: some of its weights belong nowhere or are missing, or none changes anything.
    """
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    def is_used(name: str) -> bool:
        block = BLOCK.search(name)
        return not name.startswith(("lm_head", "embed_out")) and (block is None or int(block[1]) <= layer)

    # 1. Take the weights that are used.
    weights = {_present_name(name): weight for name, weight in load_file(directory / ADAPTER_WEIGHTS).items()}
    used = {name: weight for name, weight in weights.items() if is_used(name)}
    if not any(weight.any() for name, weight in used.items() if "lora_B" in name or "lora_embedding_B" in name):
        raise CheckpointError(
            f"{directory} changes nothing up to block {layer}: its lora_B are zero or missing there. Is it trained?"
        )
    # 2. Put them where they belong, among modules that have the names of training.
    adapter_config(directory)
    config = LoraConfig.from_pretrained(str(directory))
    config.modules_to_save, config.inference_mode = None, True
    try:
        trained = _as_trained(backbone, used)
        inject_adapter_in_model(config, trained, low_cpu_mem_usage=lay_out)
        result = set_peft_model_state_dict(trained, used, low_cpu_mem_usage=lay_out)
    except Exception as error:  # peft raises what its parts raise
        raise CheckpointError(f"{directory} does not fit the model under it ({str(error)[:300]}): is that its base?") from error
    # 3. Every one must have a place, and every place up to `layer` one.
    if strange := result.unexpected_keys:
        raise CheckpointError(
            f"{directory} does not fit the model under it: {len(strange)} of its weights have no place there, among them "
            f"{some_of(strange)}. Set activations.adapter_base to its base"
        )
    if unfilled := [name for name in result.missing_keys if "lora_" in name and is_used(name)]:
        raise CheckpointError(
            f"{directory} does not fit the model under it: {ADAPTER_CONFIG} puts an adapter on modules for which "
            f"{ADAPTER_WEIGHTS} has no weights ({len(unfilled)}, among them {some_of(unfilled)}). Is the file whole, and "
            "activations.adapter_base its base?"
        )


def _present_name(name: str) -> str:
    """Return the name of an adapter's weight without PEFT's prefix, and as transformers now names parts of a multimodal model."""
    return re.sub(r"^language_model\.model\.", "model.language_model.", name.removeprefix("base_model.model."))


def _as_trained(backbone: Any, names: Iterable[str]) -> nn.Module:
    """Return the model that an adapter was trained over, by the names of its weights, around the backbone that is there.

    Its own head has no contents. It is a language model alone or in a multimodal one, or a backbone.
    """
    from transformers import AutoModelForCausalLM

    if backbone.config is not backbone.config.get_text_config() and not any("language_model." in name for name in names):
        backbone = decoder_of(backbone)
    if not any(name.startswith(f"{backbone.base_model_prefix}.") for name in names):
        return backbone  # type: ignore[no-any-return]
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(backbone.config, **OWN_CODE)
    setattr(whole, backbone.base_model_prefix, backbone)
    return whole  # type: ignore[no-any-return]
