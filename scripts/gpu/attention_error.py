"""How exact is the attention of a decoded token? `python scripts/gpu/attention_error.py`, on any machine.

Errors against float64 in bfloat16 slots: with scores rounded to bfloat16 before the softmax, as products of bfloat16 give them;
with the float32 results that `slot_attention` asks for; and of torch's fused attention. 32 rows, 28 heads on 4 key heads, 111
shared and 96 own places, as in the released Qwen pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import gpu_common  # noqa: F401  # where ksweep is
import torch
from torch.nn import functional

from ksweep.inference import attention
from ksweep.inference.kv_cache import Past

ROWS, HEADS, KEY_HEADS, WIDTH, SHARED, OWN = 32, 28, 4, 128, 111, 96


def main() -> None:
    torch.manual_seed(0)
    print("| scores' std | largest | bfloat16 scores | ours | SDPA | worst weight above 0.05 with bfloat16 scores |")
    print("|---|---|---|---|---|---|")
    for scale in (1, 2, 4, 8):
        print(row(scale), flush=True)


def row(scale: float) -> str:
    query = (torch.randn(ROWS, HEADS, 1, WIDTH) * scale).bfloat16()
    keys, values = (torch.randn(ROWS, KEY_HEADS, OWN, WIDTH).bfloat16() for _ in range(2))
    shared_keys, shared_values = (torch.randn(1, KEY_HEADS, SHARED, WIDTH).bfloat16() for _ in range(2))
    past = Past(
        shared_keys[0].transpose(1, 2).contiguous(), shared_values[0], keys, values, torch.zeros(ROWS, OWN, dtype=torch.bool)
    )
    whole_keys, whole_values = (
        torch.cat([shared.expand(ROWS, -1, -1, -1), own], 2) for shared, own in ((shared_keys, keys), (shared_values, values))
    )
    # 1. The exact scores, weights and values, in float64.
    scores = query.double() @ whole_keys.double().repeat_interleave(HEADS // KEY_HEADS, 1).transpose(-1, -2) * WIDTH**-0.5
    weights = scores.softmax(-1)
    exact = (weights @ whole_values.double().repeat_interleave(HEADS // KEY_HEADS, 1)).transpose(1, 2)
    # 2. The three ways.
    ours = attention.slot_attention(None, query, past, past, None)[0]
    with bfloat16_scores():
        rounded = attention.slot_attention(None, query, past, past, None)[0]
    fused = functional.scaled_dot_product_attention(query, whole_keys, whole_values, enable_gqa=True).transpose(1, 2)
    errors = [float((found.double() - exact).norm() / exact.norm()) for found in (rounded, ours, fused)]
    # 3. The weights that rounded scores would have.
    wrong = (scores / WIDTH**-0.5).bfloat16().double().mul(WIDTH**-0.5).softmax(-1)
    worst = float(((wrong - weights).abs() / weights)[weights > 0.05].max())
    columns = (
        f"{float(scores.std()):.1f}",
        f"{float(scores.abs().max()):.0f}",
        *(f"{error:.1e}" for error in errors),
        f"{worst:.1%}",
    )
    return f"| {' | '.join(columns)} |"


@contextmanager
def bfloat16_scores() -> Iterator[None]:
    """Let products have results of their own dtype, as torch's have unless they are asked for float32."""
    with patch.object(attention, "float32_product", lambda first, second: torch.bmm(first, second).float()):
        yield


if __name__ == "__main__":
    main()
