"""Helpers of every family for transformers models: find and cut blocks, check weights, silence load reports."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers

from ksweep.utils.errors import CheckpointError
from ksweep.utils.hub import MODEL_LOADING

LARGEST_WEIGHT = 1e9
LIBRARY_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError)


def blocks_of(model: Any) -> torch.nn.ModuleList:
    """Return the blocks of a language model, first to last.

    Raises:
        CheckpointError: the model keeps its blocks under another name.
    """
    decoder = model.get_decoder()
    blocks = getattr(decoder, "layers", getattr(decoder, "h", None))
    if not isinstance(blocks, torch.nn.ModuleList):
        raise CheckpointError(
            f"a {type(decoder).__name__} keeps its blocks neither in .layers nor in .h, where they are looked for. Use a "
            "checkpoint over GPT-2, Gemma-2, Gemma-3, Qwen2 or Llama."
        )
    return blocks


def cut_blocks(config: Any, num_layers: int) -> None:
    """Lower num_hidden_layers, and cut every list that has one entry per block to match."""
    whole = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == whole:
            setattr(config, name, value[:num_layers])
    config.num_hidden_layers = num_layers


def is_sane(tensor: torch.Tensor) -> bool:
    """Return whether every weight is finite and none is larger than `LARGEST_WEIGHT`."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
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


__all__ = ["LIBRARY_ERRORS", "blocks_of", "cut_blocks", "is_sane", "quiet", "torch_dtype"]
