"""How fast is the extraction of activations, compared with the full model and output_hidden_states=True?

    python scripts/bench_extraction.py                       # 64 passages of the demo, block 20 of 30
    python scripts/bench_extraction.py --passages 16 --repeats 3

The other side is how the reference sweep does it: every block and the head run over every token, all hidden states are kept,
batches are 16 rows in file order padded to the longest; then the layer's states are taken at the wanted positions.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch
from bench_common import LAYER, alternate, parser, rate, report
from transformers import AutoModelForCausalLM

from ksweep.activations.hidden_states import BlockReader
from ksweep.config.presets import DEMO, demo_model


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    reader = BlockReader(demo_model(), LAYER, options.dtype)
    whole = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=getattr(torch, options.dtype)).eval()
    with (DEMO / "passages.jsonl").open() as lines:
        texts = [json.loads(line)["text"] for _, line in zip(range(options.passages), lines, strict=False)]
    rows = reader.tokenize(texts, options.max_length)
    wanted = positions(rows, options.positions)
    sides = {
        f"output_hidden_states=True, {options.batch_size} rows per batch": lambda: hidden_states(
            whole, rows, wanted, options.batch_size
        ),
        "ours": lambda: len(reader.vectors(rows, wanted)),
    }
    rates = alternate({name: rate(side) for name, side in sides.items()}, options.repeats)
    tokens = sum(map(len, rows))
    title = f"{len(rows)} rows, {tokens} tokens, {sum(map(len, wanted))} activations of block {LAYER}; {options.threads} threads"
    report(f"{title}, {options.dtype}", "activations/s", rates, next(iter(sides)))


def arguments() -> argparse.Namespace:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--passages", type=int, default=64)
    options.add_argument("--positions", type=int, default=4, help="positions in each row, its last among them")
    options.add_argument("--max-length", type=int, default=256)
    options.add_argument("--batch-size", type=int, default=16, help="batch size of the full model")
    return options.parse_args()


def positions(rows: list[list[int]], count: int) -> list[list[int]]:
    """Return random positions of each row and its last one, so that no row can be cut short."""
    generator = np.random.default_rng(0)
    return [sorted({*generator.integers(0, len(row), count - 1).tolist(), len(row) - 1}) if row else [] for row in rows]


@torch.inference_mode()
def hidden_states(model: torch.nn.Module, rows: list[list[int]], wanted: list[list[int]], batch_size: int) -> int:
    num_vectors = 0
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in batch])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch])
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[LAYER + 1]
        num_vectors += sum(len(states[i, places].float().numpy()) for i, places in enumerate(wanted[start : start + batch_size]))
    return num_vectors


if __name__ == "__main__":
    main()
