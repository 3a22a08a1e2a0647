"""How many texts change when only rounding does? `python scripts/gpu/token_flips.py`, on any machine; the demo AV, T = 0.8.

In bfloat16 another batch size, kernel or GPU rounds the logits another way, and where two tokens are nearly tied the keyed
sampler takes the other. Three roundings of the same weights: bfloat16 with float32 scores in attention, the same with bfloat16
scores, and float32 products.
"""

from __future__ import annotations

from contextlib import nullcontext
from unittest.mock import patch

import torch
from attention_error import bfloat16_scores
from bench_common import held_out, load_pair
from gpu_common import requests, texts_of

from ksweep.inference import kv_cache
from ksweep.inference.engine import draw

ACTIVATIONS, DRAWS, TOKENS = 8, 8, 40


def main() -> None:
    torch.set_num_threads(1)
    vectors, found = held_out(ACTIVATIONS), {}
    for name, in_float32, rounding in (
        ("bfloat16, float32 scores", False, nullcontext()),
        ("bfloat16, bfloat16 scores", False, bfloat16_scores()),
        ("float32 products of the same weights", True, nullcontext()),
    ):
        av, _ = load_pair("bfloat16")
        if in_float32:
            av.model.float()
        with rounding, patch.object(kv_cache, "_attention_dtype", lambda tensor: tensor):
            drawn = draw(
                av, vectors, requests(range(ACTIVATIONS), DRAWS), temperature=0.8, max_new_tokens=TOKENS, seed=0,
                batch_size=ACTIVATIONS * DRAWS,
            )  # fmt: skip
            found[name] = texts_of(list(drawn))
    first = next(iter(found.values()))
    print(f"{len(first)} texts of {sum(map(len, first.values())) / len(first):.0f} tokens")
    print("| | other texts | one flip in |\n|---|---|---|")
    for name, texts in found.items():
        other = [key for key in first if first[key] != texts[key]]
        tokens = sum(common_tokens(first[key], texts[key]) for key in first)
        print(f"| {name} | {len(other)} | {f'{tokens / len(other):.0f} tokens' if other else '-'} |")


def common_tokens(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """Return how many tokens two texts have in common before they differ."""
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))


if __name__ == "__main__":
    main()
