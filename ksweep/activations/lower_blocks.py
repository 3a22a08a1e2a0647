"""Load the blocks of a base model up to L, with the LoRA adapter over it; or check, without contents, that they can be loaded."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ksweep.activations.base_model import BaseModel, adapter_config
from ksweep.activations.model_config import cut_to_blocks, text_config
from ksweep.inference.device_map import streaming_options
from ksweep.inference.lora import PREFIX, lora_over
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
from ksweep.utils.safetensors_header import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_spellings, model_tensors, text_names
from ksweep.utils.text import some_of

BLOCK = re.compile(r"(?:layers|h|blocks)\.(\d+)\.")
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def load_decoder(files: BaseModel, layer: int, dtype: torch.dtype, devices: Sequence[torch.device] | None) -> Any:
    """Return the module that runs blocks 0 to `layer`, with its adapter; the whole decoder of an architecture that cannot be cut.

    Args:
        devices: that it is for; a single GPU gets the weights straight from the files. None: it is left without contents.

    Raises:
        RequestError: the layer does not exist.
        CheckpointError: the model lacks weights, cannot be loaded, or its adapter does not fit it.
    """
    backbone = _load_backbone(files.weights, layer, dtype, devices)
    if files.adapter is not None:
        _put_adapter(backbone, files.adapter, layer, devices is None)
    decoder = decoder_of(backbone)
    if (streams := getattr(decoder.config.get_text_config(), "altup_num_inputs", 1)) > 1:
        raise CheckpointError(
            f"base model {files.weights} is a {type(decoder).__name__}, whose blocks put out {streams} streams where others have "
            "one residual stream. Use another base model."
        )
    return decoder


def check_lower_blocks(question: tuple[BaseModel, int]) -> None:
    """Check that activations of a model and layer can be computed: by the headers of its weights, before a job is submitted.

    Raises:
        RequestError: as loading would.
    """
    files, layer = question
    load_model_tokenizer(files.tokenizer)
    blocks_of(load_decoder(files, layer, torch.float32, None))


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


def _load_backbone(path: Path, layer: int, dtype: torch.dtype, devices: Sequence[torch.device] | None) -> Any:
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
            if devices is not None:
                options |= streaming_options(devices) if method is None else {}
            else:
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
    """Put a LoRA adapter on a backbone in place; weights of blocks above `layer`, of the head and of vision parts are left out.

    Raises:
        CheckpointError: some of its weights belong nowhere or are missing, or none changes anything.
    """
    from peft import inject_adapter_in_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    def is_used(name: str) -> bool:
        block = BLOCK.search(name)
        return not name.startswith(("lm_head", "embed_out")) and (block is None or int(block[1]) <= layer)

    # 1. Take the weights that are used.
    stored = load_file(directory / ADAPTER_WEIGHTS)
    model = decoder_of(backbone) if backbone.config is not backbone.config.get_text_config() else backbone
    names = _own_names(stored, model.base_model_prefix, directory)
    used = {own: stored[name] for own, name in names.items() if is_used(own)}
    if not any(weight.any() for name, weight in used.items() if "lora_B" in name or "lora_embedding_B" in name):
        raise CheckpointError(
            f"{directory} changes nothing up to block {layer}: its lora_B are zero or missing there. Is it trained?"
        )
    # 2. Put them on the modules that its configuration means, by their names here.
    modules = dict(model.named_modules())
    parts = [(own.partition(".lora_"), name.partition(".lora_")[0].removeprefix(PREFIX)) for own, name in names.items()]
    ranks = {
        module: stored[names[f"{module}.lora_{tensor}"]].shape[0]
        for (module, _, tensor), _ in parts
        if tensor in ("A.weight", "embedding_A") and (is_used(f"{module}.") or module in modules)
    }
    spelled = {module: theirs for (module, lora, _), theirs in parts if lora}
    config = lora_over(model, adapter_config(directory), ranks, spelled, directory / ADAPTER_CONFIG)
    config.modules_to_save, config.inference_mode = None, True
    try:
        inject_adapter_in_model(config, model, low_cpu_mem_usage=lay_out)
        result = set_peft_model_state_dict(model, used, low_cpu_mem_usage=lay_out)
    except Exception as error:  # peft raises what its parts raise
        raise CheckpointError(f"{directory} does not fit the model under it ({str(error)[:300]}): is that its base?") from error
    # 3. Every one must have a place, and every place up to `layer` one.
    if strange := [*result.unexpected_keys, *(name for name in result.missing_keys if "lora_" in name and is_used(name))]:
        raise CheckpointError(
            f"{directory} does not fit the model under it: {len(strange)} of its weights have no place there or are missing, "
            f"among them {some_of(strange)}. Set activations.adapter_base to its base, or get the whole file"
        )


def _own_names(names: Iterable[str], prefix: str, directory: Path) -> dict[str, str]:
    """Return the name in an adapter's file of each of its weights, by the name that it has over the backbone alone.

    The adapter may have been trained over a backbone, a model with a head, or a multimodal one.

    Args:
        names: as its file has them.
        prefix: attribute of the model with a head that holds the backbone.
    """
    pairs = [(text.removeprefix(f"{prefix}."), name) for name in names for text in text_names([name.removeprefix(PREFIX)])]
    check_spellings([text for text, _ in pairs], directory / ADAPTER_WEIGHTS)
    return dict(pairs)
