"""Attention of one query per row over a `KVCache`, and which models can use it.

The models run unchanged: the attention function is registered with transformers' AttentionInterface, and what a block's cache
returns in the place of keys is a `Past`. The queries of all rows meet the shared prompt in one matrix product, and those of one
row that share a key head meet its slot in another, where transformers' attention multiplies a vector by a matrix for every head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface

from ksweep.inference.kv_cache import KVCache, Past

if TYPE_CHECKING:
    from jaxtyping import Float, Int

ATTENTION = "ksweep_slots"

HAS_FLOAT32_RESULTS = hasattr(torch.ops.aten.bmm, "dtype") and torch.version.hip is None
"""Whether this torch (2.8 or newer, for CUDA) multiplies bfloat16 with float32 results; others need copies in float32."""

ARCHITECTURES = frozenset({"gemma2", "gemma3", "gemma3_text", "gpt2", "llama", "mistral", "qwen2", "qwen3"})
"""Models whose attention is what `slot_attention` computes: softmax of scaled, perhaps capped scores over the whole past."""


def slot_attention(
    module: Any,
    query: Float[torch.Tensor, "row head one head_dim"],
    key: Any,
    value: Any,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Float[torch.Tensor, "row one head head_dim"], None]:
    """Attend with one query per row to a `Past` (passed as `key`), scores and softmax in float32 as in the models' own functions.

    The arguments and the None for weights are those of transformers' attention functions.
    """
    past: Past = key
    n, heads, _, head_dim = query.shape
    key_heads, width = past.keys.shape[1:3]
    group = heads // key_heads
    scaling = head_dim**-0.5 if scaling is None else scaling
    # 1. Scores, of each row with its own slot and of all rows with the shared prompt.
    grouped = query.reshape(n * key_heads, group, head_dim)
    scores = float32_product(grouped.to(past.keys.dtype), past.keys.flatten(0, 1).transpose(1, 2))
    scores = scores.view(n, key_heads, group, width)
    if past.shared_keys is not None:
        scores = torch.cat([_shared_scores(query, past.shared_keys), scores], dim=-1)
    # 2. Weights: one softmax over both.
    scores = scores.mul_(scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores[..., -width:].masked_fill_(past.mask[:, None, None], float("-inf"))
    weights = scores.softmax(-1).to(past.values.dtype)
    # 3. Weighted values, again in two products.
    own_weights = weights[..., -width:].reshape(n * key_heads, group, width)
    out = float32_product(own_weights, past.values.flatten(0, 1)).view(n, key_heads, group, -1)
    if past.shared_values is not None:
        shared_weights = weights[..., :-width].transpose(0, 1).reshape(key_heads, n * group, -1)
        out = out + float32_product(shared_weights, past.shared_values).view(key_heads, n, group, -1).transpose(0, 1)
    return out.to(query.dtype).reshape(n, 1, heads, -1), None


def _shared_scores(query: torch.Tensor, shared_keys: torch.Tensor) -> Float[torch.Tensor, "row key_head group shared"]:
    """Multiply all rows' queries with the shared prompt's keys, in one product per key head."""
    n, heads, _, head_dim = query.shape
    key_heads = len(shared_keys)
    group = heads // key_heads
    by_key_head = query.to(shared_keys.dtype).view(n, key_heads, group, head_dim).transpose(0, 1)
    scores = float32_product(by_key_head.reshape(key_heads, n * group, head_dim), shared_keys)
    return scores.view(key_heads, n, group, -1).transpose(0, 1)


def float32_product(
    first: Float[torch.Tensor, "batch i j"], second: Float[torch.Tensor, "batch j k"]
) -> Float[torch.Tensor, "batch i k"]:
    """Multiply matrices of one dtype; the results are float32 where a product of bfloat16 or float16 would be rounded to these.

    Rounded to bfloat16, scores of a standard deviation of 4 put weights off by 5 %, and attention by several times as much as
    torch's fused kernels are (scripts/gpu/attention_error.py).
    """
    if first.dtype not in (torch.bfloat16, torch.float16):
        return torch.bmm(first, second)
    if first.device.type == "cuda" and HAS_FLOAT32_RESULTS:
        return torch.bmm(first, second, out_dtype=torch.float32)
    return torch.bmm(first.float(), second.float())


AttentionInterface.register(ATTENTION, slot_attention)


@contextmanager
def use_slot_attention(model: Any) -> Iterator[None]:
    """Let the model attend to a `KVCache` while this is open.

    transformers builds no mask for an attention function that it does not know. Given none, GPT-2 would look for padding in every
    step, on the host, so its pad token is hidden too.
    """
    config = model.get_decoder().config.get_text_config()
    before = config._attn_implementation, getattr(config, "pad_token_id", None)
    config._attn_implementation, config.pad_token_id = ATTENTION, None
    try:
        yield
    finally:
        config._attn_implementation, config.pad_token_id = before


def next_logits(
    model: Any, cache: KVCache, tokens: Int[torch.Tensor, " row"], positions: Int[torch.Tensor, "row 1"]
) -> Float[torch.Tensor, "row vocabulary"]:
    """Return the logits after each row's token and write the token's keys and values to its slot.

    The hidden state of a single position is contiguous, so lm_head folds it into one 2-D product (measured 1.0-1.1x of a 2-D
    input). A slice out of several positions does not fold: 12x in float32 and 340x in bfloat16 for the last of 9.

    Args:
        positions: what the cache's `begin_step` returned.
    """
    with use_slot_attention(model):
        output = model(input_ids=tokens[:, None], position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits: torch.Tensor = output.logits[:, -1]
    return logits


def supports_slots(model: Any, length: int) -> bool:
    """Return whether rows of up to `length` tokens, prompt included, can be decoded in slots.

    The architecture must be in `ARCHITECTURES`, no sliding window may be shorter than the rows, and a cap on scores must be one
    that the model's own attention applies (transformers' SDPA omits Gemma-2's).
    """
    config = model.get_decoder().config.get_text_config()
    if config.model_type not in ARCHITECTURES or getattr(config, "reorder_and_upcast_attn", False):
        return False
    if getattr(config, "attn_logit_softcapping", None) is not None and config._attn_implementation != "eager":
        return False
    window = getattr(config, "sliding_window", None)
    return window is None or length <= window


def numerics(model: Any) -> dict[str, str]:
    """Describe for the run record how a model runs: its dtype, its attention, and whether TF32 is on."""
    return {
        "attention": str(model.get_decoder().config.get_text_config()._attn_implementation),
        "tf32": "on" if torch.backends.cuda.matmul.allow_tf32 else "off",
        "dtype": str(model.dtype).removeprefix("torch."),
    }
