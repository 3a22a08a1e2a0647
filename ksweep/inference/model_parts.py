"""Parts of transformers models by what they are and not by their class: the decoder, its blocks, its final norm, its attention.

Llama, Qwen, Gemma, Mistral, GPT-NeoX: layers | GPT-2, Falcon: h | MPT: blocks | OPT: decoder.layers | Mamba: layers
"""

from __future__ import annotations

from typing import Any

import torch

from ksweep.utils.errors import CheckpointError

FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "embedding_norm")
"""Names of final norms, for decoders that hold several norms beside their blocks. LFM2 calls its last one embedding_norm."""


def decoder_of(model: Any) -> Any:
    """Return the module of a language model that runs its blocks."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def blocks_of(model: Any) -> torch.nn.ModuleList:
    """Return the blocks of a language model, first to last: the outermost list of as many modules as its configuration says.

    Raises:
        CheckpointError: there is no such list.
    """
    decoder = decoder_of(model)
    depth = decoder.config.get_text_config().num_hidden_layers
    lists = {name: module for name, module in decoder.named_modules() if isinstance(module, torch.nn.ModuleList)}
    names = [name for name, blocks in lists.items() if len(blocks) == depth]
    if not names:
        raise CheckpointError(
            f"a {type(decoder).__name__} has no list of {depth} blocks, as its config.json says (lists of modules: "
            f"{', '.join(f'{name} [{len(blocks)}]' for name, blocks in list(lists.items())[:5]) or 'none'}), so its layers "
            "cannot be found. Use a checkpoint over another architecture (docs/families.md lists those that were checked)."
        )
    blocks: torch.nn.ModuleList = lists[min(names, key=lambda name: name.count("."))]
    return blocks


def final_norm_of(model: Any) -> str | None:
    """Return the attribute of `decoder_of(model)` that holds the norm behind the last block; None if there is none.

    Raises:
        CheckpointError: several norms could be it.
    """
    norms = [name for name, module in decoder_of(model).named_children() if "norm" in type(module).__name__.lower()]
    named = [name for name in norms if name in FINAL_NORMS] if len(norms) > 1 else norms
    if len(named) > 1 or (norms and not named):
        raise CheckpointError(
            f"a {type(decoder_of(model)).__name__} holds the norms {', '.join(norms)}; expected one final norm, e.g. "
            f"{', '.join(FINAL_NORMS)}. Use a checkpoint over another architecture (docs/families.md)."
        )
    return named[0] if named else None


def attention_for(model_class: type[Any], config: Any) -> str:
    """Return the attention that a class of models runs with: torch's own, or eager where transformers has no other for it.

    Gemma-2 caps its scores and gpt-oss has sinks, which only their eager attention computes. transformers before 5.20 would run
    Gemma-2 by torch's own all the same, without the cap.
    """
    caps_scores = getattr(config, "attn_logit_softcapping", None) is not None
    return "sdpa" if getattr(model_class, "_supports_sdpa", False) and not caps_scores else "eager"


def keep_head_input_contiguous(model: Any) -> None:
    """Let a causal LM copy what it gives to its head where that is a slice, as `logits_to_keep` makes of several tokens.

    Of a strided [row, 1, d_model] torch would run a batched product and copy the weights for every row.
    """
    model.get_output_embeddings().register_forward_pre_hook(lambda _module, args: (args[0].contiguous(), *args[1:]))
