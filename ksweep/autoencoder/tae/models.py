"""Load talkative-autoencoder checkpoints: one .pt file with a decoder (AV) and an encoder (AR) over one base model.

    info = inspect_tae("checkpoints/run_17")                          # the file with the highest step
    av = load_tae_verbalizer(info, device="cuda")
    ar = load_tae_reconstructor(info, device="cuda", sharing=av)          # one base in memory if both use the same weights

Decoder and encoder run over the checkpoint's `model_name`; activations come from `info.activations_model`, its
`orig_model_name`, which may be another model. The README of tests/fixtures/tae describes formats and arithmetic, `layout.py`
shapes and names.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ksweep.autoencoder.base import Explanation
from ksweep.autoencoder.tae.base_model import load_base_tokenizer, load_decoder_model, load_encoder_model
from ksweep.autoencoder.tae.checkpoint import TaeInfo, digest_tae, highest_step, inspect_tae, is_tae
from ksweep.autoencoder.tae.decoder import TaeVerbalizer
from ksweep.autoencoder.tae.encoder import BEFORE_BLOCKS, TaeReconstructor, text_prompt
from ksweep.autoencoder.tae.layout import base_state
from ksweep.inference.device_map import Devices, as_devices
from ksweep.inference.transformers_models import torch_dtype

if TYPE_CHECKING:
    from ksweep.config.spec import EncoderPrompt

__all__ = [
    "Explanation",
    "TaeInfo",
    "TaeReconstructor",
    "TaeVerbalizer",
    "digest_tae",
    "highest_step",
    "inspect_tae",
    "is_tae",
    "load_tae_reconstructor",
    "load_tae_verbalizer",
]


def load_tae_verbalizer(
    checkpoint: TaeInfo | Path | str,
    *,
    base: str | None = None,
    dtype: str = "bfloat16",
    device: Devices = "cpu",
) -> TaeVerbalizer:
    """Load the decoder.

    Args:
        checkpoint: what `inspect_tae` returned, a .pt file, or a directory of .pt files.
        base: see `inspect_tae`.
        dtype: compute precision, "bfloat16", "float16" or "float32"; weights are converted to it.
        device: one device, or several that its blocks are spread over.

    Raises:
        CheckpointError: the message says in one paragraph what is wrong.
    """
    info = _inspected(checkpoint, base)
    model = load_decoder_model(info.base, base_state(info.states["decoder"]), torch_dtype(dtype), as_devices(device), info.path)
    return TaeVerbalizer(info, model, load_base_tokenizer(info.base))


def load_tae_reconstructor(
    checkpoint: TaeInfo | Path | str,
    *,
    base: str | None = None,
    dtype: str = "bfloat16",
    device: Devices = "cpu",
    sharing: TaeVerbalizer | None = None,
    encoder_prompt: EncoderPrompt = "learned",
) -> TaeReconstructor:
    """Load the encoder; arguments and errors as for `load_tae_verbalizer`.

    Args:
        sharing: decoder whose model is reused if that gives the same numbers: same checkpoint, dtype and device, and neither half
            has base weights in the file. Otherwise the base is loaded up to the read-out block.
        encoder_prompt: "text" replaces the trained prompt by the token embeddings of the file's soft_prompt_init_text.
    """
    info = _inspected(checkpoint, base)
    prompt = text_prompt(info, load_base_tokenizer(info.base)) if encoder_prompt == "text" else None
    devices = as_devices(device)
    if sharing is not None and _can_share(info, sharing, torch_dtype(dtype), devices[0]):
        return TaeReconstructor(info, sharing.model, prompt=prompt)
    stored = base_state(info.states["encoder"])
    model, table = load_encoder_model(info.base, _num_blocks(info), stored, torch_dtype(dtype), devices, info.path)
    return TaeReconstructor(info, model, _decoder_table(info, model, table), prompt)


def _decoder_table(info: TaeInfo, model: Any, base_table: torch.Tensor) -> torch.Tensor:
    """Return the token embeddings of the decoder's base: those in the file, else those of the base directory."""
    stored = base_state(info.states["decoder"])
    if not stored:
        return base_table
    weight = model.get_input_embeddings().weight
    name = next(name for name, parameter in model.named_parameters() if parameter is weight)
    tables = [tensor for key, tensor in stored.items() if key.endswith(f".{name}") and tensor.shape == weight.shape]
    return tables[0] if tables else base_table


def _num_blocks(info: TaeInfo) -> int:
    """Return the number of blocks that the encoder runs."""
    layer = info.encoder.output_layer
    return 1 if layer == BEFORE_BLOCKS else info.num_layers if layer < 0 else layer + 1


def _can_share(info: TaeInfo, verbalizer: TaeVerbalizer, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether the encoder gives the same numbers over the decoder's model."""
    model = verbalizer.model
    same = (verbalizer.info.path, verbalizer.info.base) == (info.path, info.base)
    on_device = model.device.type == device.type and device.index in (None, model.device.index)
    return same and not info.decoder.has_base and not info.encoder.has_base and model.dtype == dtype and on_device


def _inspected(checkpoint: TaeInfo | Path | str, base: str | None) -> TaeInfo:
    return checkpoint if isinstance(checkpoint, TaeInfo) else inspect_tae(checkpoint, base=base)
