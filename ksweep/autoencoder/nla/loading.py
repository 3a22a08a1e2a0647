"""Weights of a pair into models: full checkpoints or adapters over a base, text-only or inside a multimodal wrapper.

Nothing missing, nothing extra, nothing broken: what transformers would report or fill at random is an error here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from ksweep.autoencoder.nla.checkpoint import ADAPTER, HEAD, CheckpointInfo
from ksweep.autoencoder.safetensors_header import BLOCK_TENSOR, NOT_TEXT, WRAPPED, text_names
from ksweep.autoencoder.transformers_models import LIBRARY_ERRORS, cut_blocks, is_sane, quiet
from ksweep.inference.device_map import place_model
from ksweep.utils.errors import CheckpointError
from ksweep.utils.text import some_of

FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")


LM_HEADS = ("lm_head", "embed_out")


LARGEST_HEAD_WEIGHT = 1e4
"""Trained heads stay near the identity; half-saved ones in the wild held 3e38 or NaN in half of their rows."""


def load_nla_tokenizer(info: CheckpointInfo) -> Any:
    """The checkpoint's own tokenizer, or its base's."""
    with quiet(), _explained(info, "its tokenizer"):
        config = AutoConfig.from_pretrained(info.weights)  # an adapter's directory may hold a tokenizer and no config.json
        return AutoTokenizer.from_pretrained(info.tokenizer, config=config)


def load_av_model(info: CheckpointInfo, dtype: torch.dtype, devices: Sequence[torch.device]) -> Any:
    """The AV: a transformers causal LM, frozen, adapters merged, its generation_config emptied of sampling values."""
    with quiet(), _explained(info, "its weights"):
        model = _merged(info, dtype) if info.is_adapter else _load(info, AutoModelForCausalLM, dtype)
    model.generation_config = transformers.GenerationConfig()
    # logits_to_keep hands lm_head a strided [row, 1, d] slice, which torch multiplies as a batch, weights copied for each row.
    model.get_output_embeddings().register_forward_pre_hook(lambda _module, args: (args[0].contiguous(), *args[1:]))
    return _ready(model, info, devices)


def load_ar_model(info: CheckpointInfo, dtype: torch.dtype, devices: Sequence[torch.device]) -> Any:
    """The AR's blocks 0..L without lm_head, the final norm an Identity: last_hidden_state is the output of block L."""
    with quiet(), _explained(info, "its weights"):
        if info.is_adapter:
            causal = _merged(info, dtype)
            model = getattr(causal, causal.base_model_prefix)
        else:
            model = _load(info, AutoModel, dtype)
    norm = next((name for name in FINAL_NORMS if hasattr(model, name)), None)
    blocks = getattr(model, "layers", getattr(model, "h", None))
    if norm is None or blocks is None or len(blocks) != info.num_layers:
        raise CheckpointError(
            f"AR {info.path} is a {type(model).__name__}: expected {info.num_layers} blocks in .layers or .h, and a final norm "
            f"in .{', .'.join(FINAL_NORMS)}. Use a Qwen2, Llama or Gemma-3 text model."
        )
    setattr(model, norm, torch.nn.Identity())
    return _ready(model, info, devices)


def load_ar_head(info: CheckpointInfo, dtype: torch.dtype, device: torch.device) -> torch.nn.Linear:
    """The AR's value head: reconstruction = W h, no bias.

    Raises:
        CheckpointError: a weight that is not finite, or too large to be one.
    """
    weight = load_file(info.path / HEAD)["weight"]
    broken = ~(weight.abs() < LARGEST_HEAD_WEIGHT)  # NaN compares false
    if count := int(broken.sum()):
        row, column = broken.nonzero()[0].tolist()
        raise CheckpointError(
            f"{info.path / HEAD}: {count} of {weight.numel()} weights are NaN, infinite or larger than "
            f"{LARGEST_HEAD_WEIGHT:g}, the first at [{row}, {column}] "
            f"({float(weight[row, column])}). The head was saved half (a known fault of sharded saving): get an intact file."
        )
    head = torch.nn.Linear(info.d_model, info.d_model, bias=False, dtype=dtype)
    head.weight.data.copy_(weight)
    return head.requires_grad_(False).to(device)


def _load(info: CheckpointInfo, auto: Any, dtype: torch.dtype) -> Any:
    """transformers' loader, its report taken as errors."""
    whole = AutoConfig.from_pretrained(info.weights)
    config = whole.get_text_config()
    if info.num_layers < config.num_hidden_layers:
        cut_blocks(config, info.num_layers)
    model, report = auto.from_pretrained(
        info.weights,
        config=config,
        dtype=dtype,
        attn_implementation="sdpa",
        key_mapping=WRAPPED,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that they come back in the report, with their names
        local_files_only=True,
    )
    _check_report(info, report, is_wrapped=config is not whole)
    return model


def _check_report(info: CheckpointInfo, report: Mapping[str, Any], is_wrapped: bool) -> None:
    """Raises CheckpointError for every tensor that is missing, extra or of another shape, less those an AR never applies."""
    prefixes = ("", "model.", "transformer.", "gpt_neox.")
    norms = {f"{prefix}{name}.{part}" for prefix in prefixes for name in FINAL_NORMS for part in ("weight", "bias")}
    heads = {f"{name}.{part}" for name in LM_HEADS for part in ("weight", "bias")}
    unused = norms | heads if info.role == "ar" else set()
    missing = set(report["missing_keys"]) - unused
    extra = {name for name in report["unexpected_keys"] if not (is_wrapped and NOT_TEXT.match(name))}
    if info.is_adapter:
        extra = {name for name in extra if not _above(name, info.num_layers)}
    extra -= unused
    mismatched = {str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"]} - unused
    found = (("lacks", missing), ("has unexpected", extra), ("has, in another shape than config.json implies,", mismatched))
    if problems := [f"{what} {some_of(names)}" for what, names in found if names]:
        raise CheckpointError(
            f"the weights in {info.weights} do not fit its config.json: it {'; it '.join(problems)}. Weights that are "
            "missing would be random, and extra ones left out. Download the checkpoint again, or save it as config.json says."
        )


def _above(name: str, num_layers: int) -> bool:
    match = BLOCK_TENSOR.match(name)
    return match is not None and int(match[2]) >= num_layers


def _merged(info: CheckpointInfo, dtype: torch.dtype) -> Any:
    """Base (cut to the AR's blocks) with its adapter merged in.

    Added in float32 and rounded to `dtype` once, so that small updates are not rounded twice; that takes twice the memory of a
    bfloat16 model while it loads.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    model = _load(info, AutoModelForCausalLM, torch.float32)
    wrapped = PeftModel(model, PeftConfig.from_pretrained(str(info.path)))
    expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    given = _adapter_state(load_file(info.path / ADAPTER))
    _check_adapter(info, expected, given)
    set_peft_model_state_dict(wrapped, given)
    merged = wrapped.merge_and_unload(safe_merge=True)
    for parameter in merged.parameters():  # .to(dtype) would round the rotary frequencies too
        parameter.data = parameter.data.to(dtype)
    return merged


def _adapter_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Adapter weights, named as over a text-only causal LM; they may have been made over its backbone or a multimodal wrapper."""
    prefix = "base_model.model."
    names = text_names(name.removeprefix(prefix) for name in state)
    whole = ("model.", "transformer.", "gpt_neox.", *(f"{head}." for head in LM_HEADS))
    full = (name if name.startswith(whole) else f"model.{name}" for name in names)
    kept = (tensor for name, tensor in state.items() if not NOT_TEXT.match(name.removeprefix(prefix)))
    return {prefix + name: tensor for name, tensor in zip(full, kept, strict=True)}


def _check_adapter(info: CheckpointInfo, expected: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> None:
    expected, given = _unprefixed(expected), _unprefixed(given)
    shapes = {name for name in expected.keys() & given.keys() if expected[name].shape != given[name].shape}
    broken = {name for name, tensor in given.items() if not is_sane(tensor)}
    found = (
        ("lacks", expected.keys() - given.keys()),
        ("has unexpected", given.keys() - expected.keys()),
        ("has, in another shape than adapter_config.json and the base imply,", shapes),
        ("has NaN, infinite or absurdly large values in", broken),
    )
    if problems := [f"{what} {some_of(names)}" for what, names in found if names]:
        raise CheckpointError(
            f"the adapter {info.path / ADAPTER} does not fit its adapter_config.json over {info.base} ({info.num_layers} "
            f"blocks): it {'; it '.join(problems)}. "
            "An AR's adapter is made over the base cut to L + 1 blocks. Use the adapter and base that belong together."
        )


def _unprefixed(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}


def _ready(model: Any, info: CheckpointInfo, devices: Sequence[torch.device]) -> Any:
    """Frozen, in evaluation mode, on its devices, every weight finite."""
    model = place_model(model.requires_grad_(False).eval(), devices)
    broken = [name for name, parameter in model.named_parameters() if not is_sane(parameter)]
    if broken:
        raise CheckpointError(
            f"{info.role.upper()} {info.path} has NaN, infinite or absurdly large weights (as {model.dtype}) in "
            f"{some_of(broken)}. Get an intact checkpoint; "
            "if it was intact as bfloat16, do not load it as float16."
        )
    return model


@contextmanager
def _explained(info: CheckpointInfo, what: str) -> Iterator[None]:
    """Library errors become one paragraph that names the checkpoint; running out of memory stays what it is."""
    try:
        yield
    except (CheckpointError, torch.OutOfMemoryError):
        raise
    except LIBRARY_ERRORS as error:
        reason = " ".join(str(error).split())[:400]
        if "does not support an attention implementation" in reason:
            raise CheckpointError(
                f"{info.role.upper()} {info.path} is a {info.config.get('model_type')} model, which transformers "
                f"{transformers.__version__} runs without its sdpa attention only. AVs and ARs are run with it, so that pairs "
                "over such models are not supported yet. Use a pair over a Qwen2, Qwen3, Llama or Gemma-3 model."
            ) from error
        raise CheckpointError(
            f"{info.role.upper()} {info.path}: {what} cannot be loaded by transformers {transformers.__version__} "
            f"({type(error).__name__}: {reason}). "
            "Check that the files are whole, and that this architecture is one it knows."
        ) from error
