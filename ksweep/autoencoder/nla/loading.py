"""Load the models of a pair: full weights or adapters over a base, text-only or inside a multimodal wrapper.

Missing, unexpected and non-finite weights are errors here; transformers would only report them, or fill them at random.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from ksweep.autoencoder.nla.checkpoint import CheckpointInfo
from ksweep.autoencoder.nla.weight_files import HEAD_KEY, LAYER_MEANS, Adapter
from ksweep.inference import memory
from ksweep.inference.device_map import streaming_options
from ksweep.inference.lora import PREFIX, lora_over
from ksweep.inference.model_parts import blocks_of, decoder_of, final_norm_of, keep_head_input_contiguous
from ksweep.inference.transformers_models import (
    LIBRARY_ERRORS,
    cut_blocks,
    is_sane,
    load_or_lay_out,
    on_meta,
    placed,
    quiet,
    read_model_config,
    read_tokenizer,
    torch_dtype,
)
from ksweep.utils.errors import CheckpointError
from ksweep.utils.safetensors_header import BLOCK_TENSOR, NOT_TEXT, check_spellings, model_tensors, text_names
from ksweep.utils.tensor_headers import read_header
from ksweep.utils.text import some_of
from ksweep.utils.torch_file import read_checkpoint

LM_HEADS = ("lm_head", "embed_out")
BEHIND_BLOCKS = ("project_out", "altup_unembed_projections")
"""Modules of OPT-350m and Gemma-3n without which what their last block puts out is no vector of the model's width."""
LARGEST_HEAD_WEIGHT = 1e4
"""Upper bound of a head's weights. Trained heads stay near the identity; incompletely saved public ones held 3e38 or NaN in half
of their rows."""


def load_nla_tokenizer(info: CheckpointInfo) -> Any:
    """Load the checkpoint's own tokenizer, or its base's."""
    with quiet(), _explained(info, "its tokenizer"):
        config = read_model_config(info.weights)  # an adapter's directory may hold a tokenizer and no config.json
        return read_tokenizer(info.tokenizer, config)


def load_av_model(info: CheckpointInfo, dtype: torch.dtype, devices: Sequence[torch.device]) -> Any:
    """Load the AV as a frozen transformers causal LM, with its adapter merged and no sampling values in its generation_config."""
    with quiet(), _explained(info, "its weights"):
        model = _av_model(info, dtype, devices)
    model.generation_config = transformers.GenerationConfig()
    keep_head_input_contiguous(model)
    return placed(model, devices, f"AV {info.path}")


def save_av_model(info: CheckpointInfo, dtype: str, directory: Path) -> None:
    """Write the AV's language model as plain safetensors with its config.json, its adapters merged, as `load_av_model` has it."""
    model = load_av_model(info, torch_dtype(dtype), [torch.device("cpu")])
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    # Not the model's own save_pretrained: it gives the tensors back the names that they had in a multimodal wrapper.
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - {name for name, _ in model.named_parameters()}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    save_torch_state_dict(state, directory)


def load_embeddings(directory: Path, dtype: torch.dtype) -> torch.nn.Module:
    """Load the module that embeds the tokens of a causal LM, whose other weights are read for one block at most."""
    with quiet():
        config = read_model_config(directory).get_text_config()
        cut_blocks(config, 1)
        model, _ = load_or_lay_out(AutoModel, directory, config, config, dtype, None)
    embeddings: torch.nn.Module = model.get_input_embeddings().requires_grad_(False)
    return embeddings


def load_ar_model(info: CheckpointInfo, dtype: torch.dtype, devices: Sequence[torch.device]) -> Any:
    """Load the AR's blocks 0 to L, without lm_head.

    The final norm is replaced by an Identity, so that last_hidden_state is the output of block L, unless the AR was trained
    with it.

    Raises:
        CheckpointError: the weights do not fit, or the architecture has no blocks that can be found.
    """
    with quiet(), _explained(info, "its weights"):
        return placed(_ar_model(info, dtype, devices), devices, f"AR {info.path}")


def lay_out_model(info: CheckpointInfo) -> Any:
    """Return the model of an AV or AR on the meta device, without contents: by its headers alone.

    Raises:
        CheckpointError: as loading would.
    """
    with quiet(), _explained(info, "its weights"):
        return (_ar_model if info.role == "ar" else _av_model)(info, torch.float32, None)


def _av_model(info: CheckpointInfo, dtype: torch.dtype, devices: Sequence[torch.device] | None) -> Any:
    """Return the AV's causal LM; without `devices` it is left without contents.

    Raises:
        CheckpointError: a vector cannot take the place of a token's embedding.
    """
    # 1. Load it.
    model = _merged(info, dtype, devices) if info.is_adapter else _load(info, AutoModelForCausalLM, dtype, devices)
    # 2. Check that one embedding, as wide as the vectors, is all that a token brings.
    blocks_of(model)
    width = model.get_input_embeddings().embedding_dim
    reasons = (
        (width != info.d_model, f"its token embeddings are {width} wide, not {info.d_model}"),
        (
            getattr(decoder_of(model).config, "hidden_size_per_layer_input", None),
            "each of its blocks reads a second embedding of every token, which a vector does not have",
        ),
    )
    if reason := next((reason for holds, reason in reasons if holds), None):
        raise CheckpointError(
            f"AV {info.path} is a {info.config.get('model_type')} model that vectors cannot be injected into: {reason}. Use "
            "an AV over another model (docs/families.md)."
        )
    return model


def _ar_model(info: CheckpointInfo, dtype: torch.dtype, devices: Sequence[torch.device] | None) -> Any:
    """Return the AR's blocks without head, and with the final norm only if it was trained so; contents as for `_av_model`."""
    # 1. Load the backbone.
    if info.is_adapter:
        causal = _merged(info, dtype, devices)
        model = getattr(causal, causal.base_model_prefix)
    else:
        model = _load(info, AutoModel, dtype, devices)
    # 2. Take what follows the last block away.
    decoder, norm, depth = decoder_of(model), final_norm_of(model), len(blocks_of(model))
    behind = next((name for name in BEHIND_BLOCKS if getattr(decoder, name, None) is not None), None)
    if depth != info.num_layers or behind is not None:
        raise CheckpointError(
            f"AR {info.path} is a {type(model).__name__} of {depth} blocks{f' and {behind} behind them' if behind else ''}; "
            f"expected {info.num_layers} blocks and nothing but a norm behind them. Use a pair over another model "
            "(docs/families.md)."
        )
    if norm is not None and not info.files.keeps_final_norm:
        setattr(decoder, norm, torch.nn.Identity())
    return model


def load_ar_head(info: CheckpointInfo, dtype: torch.dtype, device: torch.device) -> torch.nn.Linear | None:
    """Load the AR's value head W, without bias: reconstruction = W h. Returns None for an AR that is read without one.

    A head whose input is normalised first runs in float32 at least, as its trainer runs it.

    Raises:
        CheckpointError: a weight is not finite or implausibly large.
    """
    if info.files.head is None:
        return None
    file, key = info.files.head.file, info.files.head.key
    weight = load_file(file)[key]
    broken = ~(weight.abs() < LARGEST_HEAD_WEIGHT)  # NaN compares false
    if count := int(broken.sum()):
        row, column = broken.nonzero()[0].tolist()
        raise CheckpointError(
            f"{file}: {count} of {weight.numel()} weights are NaN, infinite or larger than "
            f"{LARGEST_HEAD_WEIGHT:g}, the first at [{row}, {column}] "
            f"({float(weight[row, column])}). The head was saved incompletely, a known fault of sharded saving. Get an intact "
            "file."
        )
    own = torch.float32 if info.ar_prompting.normalises and dtype != torch.float64 else dtype
    head = torch.nn.Linear(info.d_model, info.d_model, bias=False, dtype=own)
    head.weight.data.copy_(weight)
    return head.requires_grad_(False).to(device)


def load_layer_mean(info: CheckpointInfo) -> torch.Tensor | None:
    """Return the mean that an AR for all layers of nla-at-home was trained without, [d_model] float32; None for every other AR.

    Raises:
        CheckpointError: layer_means.pt is missing, or holds no such vector of the layer.
    """
    if not info.sidecar.subtracts_mean:
        return None
    file = info.path / LAYER_MEANS
    if not file.exists():
        raise CheckpointError(
            f"AR {info.path} gives vectors less the mean of their layer (training.mean_subtract), and {LAYER_MEANS} is not "
            "beside it. Copy the file that its trainer saved."
        )
    means = read_checkpoint(file)
    mean = dict[Any, Any](means).get(info.layer)
    if not isinstance(mean, torch.Tensor) or mean.shape != (info.d_model,) or not is_sane(mean):
        raise CheckpointError(
            f"{file} holds no finite vector of {info.d_model} numbers for layer {info.layer}. It is damaged, or of another AR."
        )
    return mean.float()


def _load(info: CheckpointInfo, auto: Any, dtype: torch.dtype, devices: Sequence[torch.device] | None) -> Any:
    """Load full weights with transformers, cut to the blocks in use; problems that transformers reports are errors.

    Without `devices` they are left without contents; otherwise they go straight to a GPU that has room for them.
    """
    # 1. Take the language model's configuration, cut to the blocks in use.
    whole_config = read_model_config(info.weights)
    config = whole_config.get_text_config()
    if info.num_layers < config.num_hidden_layers:
        cut_blocks(config, info.num_layers)
    # 2. Load the weights, or lay them out.
    headers = model_tensors(info.weights)
    num_bytes = dtype.itemsize * sum(math.prod(header.shape) for header in headers.values())
    given = (headers, None) if devices is None else (None, streaming_options(devices, num_bytes))
    model, report = load_or_lay_out(auto, info.weights, config, whole_config, dtype, *given)
    # 3. Refuse missing, unexpected and misshapen tensors.
    _check_report(info, model, report, is_wrapped=config is not whole_config)
    return model


def _check_report(info: CheckpointInfo, model: Any, report: Mapping[str, Any], is_wrapped: bool) -> None:
    """Check transformers' report on loading.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape; those that an AR never applies are ignored.
    """
    unused = _unused_by_ar(info, model) if info.role == "ar" else set()
    missing = set(report["missing_keys"]) - unused
    extra = {name for name in report["unexpected_keys"] if not (is_wrapped and NOT_TEXT.match(name))}
    if info.base is not None:  # whose upper blocks may be left out
        extra = {name for name in extra if not _is_above(name, info.num_layers)}
    extra -= unused
    mismatched = {str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"]} - unused
    faults = (("lacks", missing), ("has unexpected", extra), ("has, in another shape than config.json implies,", mismatched))
    if problems := [f"{fault} {some_of(names)}" for fault, names in faults if names]:
        raise CheckpointError(
            f"the weights in {info.weights} do not fit its config.json ({info.num_layers} blocks): it {'; it '.join(problems)}. "
            "Missing weights would be random, and unexpected ones ignored. Download the checkpoint again, or save it as "
            "config.json says."
        )


def _unused_by_ar(info: CheckpointInfo, model: Any) -> set[str]:
    """Return the names of heads and of a final norm that is not applied, with and without the prefix that a causal LM gives."""
    decoder, norm, backbone = decoder_of(model), final_norm_of(model), model.base_model_prefix
    place = next((name for name, module in model.named_modules() if module is decoder), "")
    norms = {f"{prefix}{norm}" for prefix in ("", f"{place}.", f"{backbone}.", f"{backbone}.{place}.")}
    names = {*LM_HEADS, *(() if info.files.keeps_final_norm else norms)}
    return {f"{name}.{part}" for name in names for part in ("weight", "bias")}


def _is_above(name: str, num_layers: int) -> bool:
    match = BLOCK_TENSOR.match(name)
    return match is not None and int(match[2]) >= num_layers


def _merged(info: CheckpointInfo, dtype: torch.dtype, devices: Sequence[torch.device] | None) -> Any:
    """Load an adapter's base, cut to the blocks in use, and merge the adapters into it, one after the other.

    Without `devices` this only checks that they fit.

    The sum is taken in float32 and rounded to `dtype` once, so that small updates are not rounded twice. Loading takes twice the
    memory of a bfloat16 model, of the GPU if it has that much.
    """
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    lay_out = devices is None
    model = _load(info, AutoModelForCausalLM, torch.float32, devices)
    backbone = model.base_model_prefix
    for adapter in info.adapters:
        state = on_meta(read_header(adapter.file)) if lay_out else load_file(adapter.file)
        names = _own_names(adapter, state, backbone)
        named = {PREFIX + own: state[name] for own, name in names.items()}
        # 1. Wrap the model as the adapter's configuration says.
        _untie(model, named)
        wrapped = PeftModel(model, _lora_config(adapter, model, names, named, info.num_layers))
        # 2. Check the adapter's tensors by name, shape and content.
        expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        expected |= _embedding_copies(wrapped, expected, named)
        given = {name: tensor for name, tensor in named.items() if not _is_above(name, info.num_layers)}
        _check_adapter(info, adapter, expected, given)
        _check_trained(info, adapter, [name for own, name in names.items() if PREFIX + own in given])
        # 3. Merge them into the model.
        if not lay_out:
            set_peft_model_state_dict(wrapped, given)
        model = wrapped.merge_and_unload(safe_merge=not lay_out)
    for parameter in model.parameters():  # .to(dtype) would round the rotary frequencies too
        parameter.data = parameter.data.to(dtype)
    if not lay_out and model.device.type == "cuda":
        memory.release_cached_memory(model.device)
    return model


def _untie(model: Any, adapter: Mapping[str, torch.Tensor]) -> None:
    """Give the head a weight of its own where it shares that of the token embeddings and an adapter changes one of the two."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = tuple(f"{PREFIX}{name}." for name, module in model.named_modules() if module in (embedding, head))
    if head.weight is embedding.weight and any(name.startswith(names) for name in adapter):
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False


def _embedding_copies(
    wrapped: Any, expected: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the base weights of embeddings and heads that PEFT saves beside an adapter of theirs, where a file holds them."""
    own = wrapped.state_dict()
    adapted = {name.partition(".lora_")[0] for name in expected}
    copies = {f"{name}.base_layer.weight" for name in adapted}
    return {name: own[name] for name in copies & given.keys() & own.keys()}


def _lora_config(
    adapter: Adapter, model: Any, names: Mapping[str, str], named: Mapping[str, torch.Tensor], num_layers: int
) -> Any:
    """Return peft's configuration of an adapter over a model, once ranks and modules are those of its tensors."""
    parts = [(own.partition(".lora_"), name.removeprefix(PREFIX).partition(".lora_")[0]) for own, name in names.items()]
    ranks = {
        module: named[f"{PREFIX}{module}.lora_{tensor}"].shape[0]
        for (module, _, tensor), _ in parts
        if tensor in ("A.weight", "embedding_A") and not _is_above(f"{module}.", num_layers)
    }
    spelled = {module: theirs for (module, lora, _), theirs in parts if lora}
    return lora_over(model, adapter.configuration(), ranks, spelled, adapter.directory / adapter.config_name)


def _own_names(adapter: Adapter, names: Iterable[str], backbone: str) -> dict[str, str]:
    """Return the name in an adapter's file of each of its tensors, by the name that it has over a text-only causal LM.

    The adapter may have been trained over the backbone alone or over a multimodal wrapper, whose vision parts are left out.

    Args:
        names: as its file has them.
        backbone: the causal LM's attribute that holds the model without head.

    Raises:
        CheckpointError: two tensors are the same one.
    """

    def plain(name: str) -> str:
        if adapter.is_peft:
            return name.removeprefix(PREFIX)
        # EasyNLA saves the modules of its own class: backbone.model.layers.0.mlp.up_proj.lora_A.default.weight
        return name.removeprefix("backbone.").replace(".default.weight", ".weight")

    whole = (f"{backbone}.", *(f"{head}." for head in LM_HEADS))
    pairs = [(text, name) for name in names if adapter.is_peft or name != HEAD_KEY for text in text_names([plain(name)])]
    full = [(text if text.startswith(whole) else f"{backbone}.{text}", name) for text, name in pairs]
    check_spellings([text for text, _ in full], adapter.file)
    return dict(full)


def _check_adapter(
    info: CheckpointInfo, adapter: Adapter, expected: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]
) -> None:
    expected, given = _unprefixed(expected), _unprefixed(given)
    shapes = {name for name in expected.keys() & given.keys() if expected[name].shape != given[name].shape}
    broken = {name for name, tensor in given.items() if not is_sane(tensor)}
    faults = (
        ("lacks", expected.keys() - given.keys()),
        ("has unexpected", given.keys() - expected.keys()),
        ("has, in another shape than its configuration and the base imply,", shapes),
        ("has NaN, infinite or absurdly large values in", broken),
    )
    if problems := [f"{fault} {some_of(names)}" for fault, names in faults if names]:
        raise CheckpointError(
            f"the adapter {adapter.file} does not fit its {adapter.config_name} over {info.base} ({info.num_layers} "
            f"blocks): it {'; it '.join(problems)}. "
            "An AR's adapter covers the first L + 1 blocks of its base. Use the adapter and base that belong together."
        )


def _check_trained(info: CheckpointInfo, adapter: Adapter, names: Iterable[str]) -> None:
    """Check that some of these tensors of an adapter's file change something; only those that must be are read."""
    seconds = [name for name in names if "lora_B" in name or "lora_embedding_B" in name]
    with safe_open(adapter.file, "pt") as file:
        changes = any(file.get_tensor(name).any() for name in seconds)
    if info.layout != "kitft" and not changes:
        raise CheckpointError(
            f"{adapter.file}: every lora_B is zero, so the adapter changes nothing: it was saved before training, or its "
            "weights were lost. Get the trained adapter."
        )


def _unprefixed(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}


@contextmanager
def _explained(info: CheckpointInfo, what: str) -> Iterator[None]:
    """Turn library errors into a CheckpointError that names the checkpoint; out-of-memory errors pass through."""
    try:
        yield
    except (CheckpointError, torch.OutOfMemoryError):
        raise
    except LIBRARY_ERRORS as error:
        reason = " ".join(str(error).split())[:400]
        raise CheckpointError(
            f"{info.role.upper()} {info.path}: {what} cannot be loaded by transformers {transformers.__version__} "
            f"({type(error).__name__}: {reason}). "
            "Check that the files are complete, and that transformers supports this architecture."
        ) from error
