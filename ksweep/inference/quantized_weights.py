"""Weights that are stored quantised: what is loaded are plain ones, as an adapter or an engine's own attention needs them.

FP8 (compressed-tensors and fine-grained), MXFP4 (gpt-oss) and 4-bit bitsandbytes are computed back while they are loaded. Vectors
and texts are those of the stored numbers in full arithmetic: kernels that multiply in FP8 would round once more.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ksweep.utils.errors import CheckpointError

ON_LOADING = ("compressed-tensors", "fp8", "mxfp4")
"""Methods that transformers computes back itself when it is asked to."""
BITSANDBYTES = "bitsandbytes"


def ask_for_plain_weights(config: Any, whole_config: Any, where: Path) -> str | None:
    """Make transformers load plain weights with a configuration, and return how they are stored; None for plain ones.

    Args:
        config: the language model's part of `whole_config`, which is changed.
        whole_config: of the checkpoint; a multimodal one states the method, not its text part.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: the method is another, or its package is not installed.
    """
    stated = getattr(whole_config, "quantization_config", None) or getattr(config, "quantization_config", None)
    if stated is None:
        return None
    values = dict(stated if isinstance(stated, Mapping) else stated.to_dict())
    method = str(values.get("quant_method") or (BITSANDBYTES if values.get("load_in_4bit") else None))
    if method not in (*ON_LOADING, BITSANDBYTES) or (method == BITSANDBYTES and not values.get("load_in_4bit")):
        raise CheckpointError(
            f"{where}: its weights are quantised by {method}{' in 8 bits' if method == BITSANDBYTES else ''}, which cannot be "
            f"computed back; expected one of {', '.join(ON_LOADING)}, or 4-bit {BITSANDBYTES}. Use the checkpoint with plain "
            "weights."
        )
    package = {"compressed-tensors": "compressed_tensors", BITSANDBYTES: BITSANDBYTES}.get(method)
    if package is not None and importlib.util.find_spec(package) is None:
        raise CheckpointError(
            f"{where}: its weights are quantised by {method}, a package that is not installed: pip install {method}"
        )
    config.quantization_config = values | ({} if method == BITSANDBYTES else {"dequantize": True})
    return method


def with_plain_weights(model: Any, method: str | None, dtype: torch.dtype) -> Any:
    """Return a loaded model with plain weights; only those of bitsandbytes are not plain yet."""
    return model.dequantize(dtype=dtype) if method == BITSANDBYTES else model


def unpacked(packed: Mapping[str, torch.Tensor], own_shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Return tensors of 4-bit bitsandbytes, without contents, as the plain ones that they stand for.

    A weight of n numbers is stored as n / 2 bytes, beside `weight.absmax`, `weight.quant_map` and others. A weight that is packed
    from another number of numbers keeps its shape, and so does not fit.
    """
    names = {name.removesuffix(".absmax") for name in packed if name.endswith(".absmax")}
    plain = {name: tensor for name, tensor in packed.items() if not any(name.startswith(f"{of}.") for of in names)}
    for name in names & plain.keys() & own_shapes.keys():
        if math.prod(own_shapes[name]) == 2 * plain[name].numel():
            plain[name] = torch.empty(own_shapes[name], device="meta")
    return plain
