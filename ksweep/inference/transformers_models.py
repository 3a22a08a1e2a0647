"""Helpers of every family for transformers models: load or lay out, cut blocks, check weights, silence load reports."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

from ksweep.inference.device_map import place_model
from ksweep.inference.model_parts import attention_for, blocks_of
from ksweep.inference.quantized_weights import BITSANDBYTES, ask_for_plain_weights, unpacked, with_plain_weights
from ksweep.utils.errors import CheckpointError
from ksweep.utils.hub import MODEL_LOADING
from ksweep.utils.safetensors_header import WRAPPED
from ksweep.utils.tensor_headers import Tensor
from ksweep.utils.text import some_of

LARGEST_WEIGHT = 1e9
OWN_CODE: dict[str, Any] = {"trust_remote_code": False}
"""What every loader of transformers gets: it runs its own code alone."""
LIBRARY_ERRORS = (
    OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ImportError, ArithmeticError, AssertionError,
    StrictDataclassError, re.error,
)  # fmt: skip
"""What transformers, torch and peft raise of files that are not as they should be; the last of a config.json's values."""

TORCH_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I16": "int16",
    "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
"""Dtypes of weights as safetensors spells them, and as torch does."""


def read_model_config(directory: Path) -> Any:
    """Return the configuration in a directory, of a class of transformers' own.

    Raises:
        CheckpointError: its model is one of program code that lies beside it, which is never run.
    """
    with no_foreign_code(directory):
        return transformers.AutoConfig.from_pretrained(directory, **OWN_CODE)


def read_tokenizer(directory: Path, config: Any = None) -> Any:
    """Return the tokenizer in a directory, of a class of transformers' own; raises as `read_model_config`.

    Args:
        config: of the model that it is of; None reads the one beside it.
    """
    with no_foreign_code(directory):
        return transformers.AutoTokenizer.from_pretrained(directory, config=config, local_files_only=True, **OWN_CODE)


@contextmanager
def no_foreign_code(directory: Path) -> Iterator[None]:
    """Say of a model whose files want program code of their own to be run (`auto_map`) that it is not.

    Without `OWN_CODE` transformers asks on the terminal, and advises an option that ksweep does not have.
    """
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise CheckpointError(
            f"{directory} wants program code of its own to be run (auto_map in its config.json or tokenizer_config.json), which "
            f"ksweep never does, and transformers {transformers.__version__} does not know its architecture without. Use a model "
            "that transformers knows, or the same one converted to it."
        ) from error


def load_or_lay_out(
    auto: Any,
    directory: Path,
    config: Any,
    whole_config: Any,
    dtype: torch.dtype,
    headers: Mapping[str, Tensor] | None = None,
    streaming: Mapping[str, Any] | None = None,
) -> tuple[Any, Mapping[str, Any]]:
    """Return a model of a configuration with the weights of a directory, and transformers' report on missing and other tensors.

    With `headers`, the same is done on the meta device with tensors of these names, shapes and dtypes: no weight is read and no
    memory taken, and the report is the one that loading would give.

    Args:
        auto: AutoModelForCausalLM, or AutoModel for a backbone without head.
        config: the language model's part of `whole_config`, perhaps cut.
        dtype: what weights are converted to.
        headers: of the safetensors files in the directory.
        streaming: `streaming_options` of the devices; weights that are stored quantised are read to the host all the same.
    """
    # 1. Take the model's class, and how its weights are stored.
    method = ask_for_plain_weights(config, whole_config, directory)
    with torch.device("meta"), no_foreign_code(directory):
        empty = auto.from_config(config, **OWN_CODE)
    options: dict[str, Any] = {"pretrained_model_name_or_path": directory, "local_files_only": True}
    options |= streaming or {} if method is None else {}
    if headers is not None:
        options, method = options_to_lay_out(empty, config, method, on_meta(headers))
    # 2. Load the weights, or lay them out.
    model_class = type(empty)
    model, report = model_class.from_pretrained(
        **options,
        config=config,
        dtype=dtype,
        attn_implementation=attention_for(model_class, config),
        key_mapping=WRAPPED,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that the report lists them by name
        **OWN_CODE,
    )
    return with_plain_weights(model, method, dtype), report


def options_to_lay_out(
    empty: Any, config: Any, method: str | None, tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Any], str | None]:
    """Return the arguments of `from_pretrained` that take weights from tensors without contents, and how these are stored.

    Args:
        empty: the model on the meta device.
        config: its configuration, which is changed.
        method: how the weights are stored, as `ask_for_plain_weights` returns it.
    """
    if method == BITSANDBYTES:
        del config.quantization_config
        tensors, method = unpacked(tensors, _own_shapes(empty)), None
    return {"pretrained_model_name_or_path": None, "device_map": "meta", "state_dict": dict(tensors)}, method


def _own_shapes(model: Any) -> dict[str, torch.Size]:
    """Return the shapes of a model's tensors, by their names in it, in its causal LM, and in earlier multimodal ones."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    earlier = {name.replace("language_model.", "language_model.model.", 1): shape for name, shape in shapes.items()}
    return {f"{model.base_model_prefix}.{name}": shape for name, shape in shapes.items()} | earlier | shapes


def on_meta(headers: Mapping[str, Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors without contents, as headers of safetensors files describe them.

    Raises:
        CheckpointError: a dtype that no model here has.
    """
    if unknown := next(
        (f"{name} ({tensor.dtype})" for name, tensor in headers.items() if tensor.dtype not in TORCH_DTYPES), None
    ):
        raise CheckpointError(f"tensor {unknown} has a dtype that cannot be loaded; expected one of {', '.join(TORCH_DTYPES)}")
    return {
        name: torch.empty(tensor.shape, dtype=getattr(torch, TORCH_DTYPES[tensor.dtype]), device="meta")
        for name, tensor in headers.items()
    }


def cut_blocks(config: Any, num_layers: int) -> None:
    """Lower num_hidden_layers, and cut every list that has one entry per block to match.

    Raises:
        CheckpointError: tables of embeddings for every block would have to be cut as well (Gemma-3n, Gemma-4 E2B and E4B).
    """
    whole = config.num_hidden_layers
    if getattr(config, "hidden_size_per_layer_input", None):
        raise CheckpointError(
            f"the first {num_layers} of {whole} blocks of a {config.model_type} model with embeddings for every block cannot be "
            "used alone, as adapters and heads over a base need them. Use an AR of full weights, saved with its blocks alone."
        )
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == whole:
            setattr(config, name, value[:num_layers])
    config.num_hidden_layers = num_layers


def placed(model: Any, devices: Sequence[torch.device], name: str) -> Any:
    """Return a model frozen, in evaluation mode and on its devices, where its weights are looked at.

    Raises:
        CheckpointError: a weight is not finite or implausibly large.
    """
    model = place_model(model.requires_grad_(False).eval(), devices)
    if broken := [parameter for parameter, weights in model.named_parameters() if not is_sane(weights)]:
        raise CheckpointError(
            f"{name} has NaN, infinite or absurdly large weights (as {model.dtype}) in {some_of(broken)}. Get intact weights; do "
            "not load bfloat16 weights as float16, which overflows."
        )
    return model


def is_sane(tensor: torch.Tensor) -> bool:
    """Return whether every weight is finite and none is larger than `LARGEST_WEIGHT`; one without contents is sane."""
    if tensor.is_meta or not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor.detach())
    return bool((low > -LARGEST_WEIGHT) & (high < LARGEST_WEIGHT))  # NaN spreads, and compares false


@contextmanager
def quiet() -> Iterator[None]:
    """Silence load reports, which our own checks replace, and progress bars where the output is no terminal."""
    logging: Any = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        with MODEL_LOADING, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft calls what transformers has renamed
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def torch_dtype(name: str | torch.dtype) -> torch.dtype:
    """Return the torch dtype of a name such as "bfloat16"."""
    return (
        name
        if isinstance(name, torch.dtype)
        else {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]
    )


__all__ = [
    "LIBRARY_ERRORS",
    "blocks_of",
    "cut_blocks",
    "is_sane",
    "load_or_lay_out",
    "on_meta",
    "options_to_lay_out",
    "placed",
    "quiet",
    "torch_dtype",
]
