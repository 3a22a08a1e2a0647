"""How fast are drawing, scoring and extraction on this GPU, beside generate() and beside what the GPU could do at most?

    python scripts/bench_gpu.py                              # a pair of the shape of Qwen2.5-7B, layer 20, bfloat16
    python scripts/bench_gpu.py --draws 64 256 --repeats 3
    python scripts/bench_gpu.py --tiny                       # the same code over a model of a few kB, on a CPU too

Weights are random, in the exact shape of the released AV, AR and base model: nothing is downloaded, and a product of random
numbers takes as long as any other. Prompts are 125 tokens long, texts 128, or of natural lengths: each token is the last one
with probability 1/128. The other side of drawing is generate(inputs_embeds) as the reference sweep uses it: the 16 copies of
one vector as a batch. The same draws without CUDA graphs stand beside ours; graphs are recorded anew for each stream of draws,
for every number of rows that comes up often, of which there are many with natural lengths.

Two ceilings, with the peaks measured on the spot. A step cannot be shorter than reading every weight once takes at the rate of a
large copy, nor than the products of its rows take at the rate of a large bfloat16 product. The bound at a number of rows is the
lower of the two; reading the past of the rows, which takes more as there are more of them, is not in it.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from bench_common import alternate, parser, rate, spread
from bench_drawing import generated, ours
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from ksweep.activations.hidden_states import BlockReader
from ksweep.autoencoder.nla.models import NlaReconstructor, NlaVerbalizer
from ksweep.autoencoder.nla.prompts import AvPrompt
from ksweep.autoencoder.prompting import ArPrompting, AvPrompting, ReplaceEmbedding
from ksweep.inference import cuda_graphs
from ksweep.inference.model_parts import keep_head_input_contiguous

LAYER = 20
COPIES = 16
FILLS = 4
"""Times that every slot is filled in a round; once in a tiny one."""
PROMPT, INJECTED_AT = 125, 111
"""Tokens of the released Qwen AV's prompt, and the place of the vector."""
TEMPLATE, TEXT = 10, 140
"""Tokens of the AR's prompt before a text, and of a text with what comes after it."""


def main() -> None:
    options = arguments()
    options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.device.type == "cpu" and not options.tiny:
        print("no GPU is visible to torch on this machine: nothing was measured. `--tiny` runs the same code on its processor.")
        return
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if options.device.type == "cuda" else "processor"
    print(f"{name}, torch {torch.__version__}, {options.dtype}, TF32 {'on' if torch.backends.cuda.matmul.allow_tf32 else 'off'}")
    peaks = measured_peaks(options)
    with torch.inference_mode():
        report_drawing(options, *peaks)
        report_scoring(options)
        report_extraction(options)


def arguments() -> argparse.Namespace:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--draws", type=int, nargs="+", default=[64, 256, 768], help="draws in flight")
    options.add_argument("--tokens", type=int, default=128, help="of a text of fixed length; half of the most of a natural one")
    options.add_argument("--activations", type=int, default=128)
    options.add_argument("--generated", type=int, default=64, help="rows that generate() is timed over in a round")
    options.add_argument("--texts", type=int, default=2048)
    options.add_argument("--passages", type=int, default=256)
    options.add_argument("--temperature", type=float, default=1.0)
    options.add_argument("--layers", type=int, help="blocks of the AV; without, as many as the model has")
    options.add_argument("--tiny", action="store_true", help="a model of a few kB, on the CPU where there is no GPU")
    options = options.parse_args()
    if options.tiny:
        options.draws, options.activations, options.generated, options.texts, options.passages = [8, 16], 4, 8, 16, 2
        options.tokens = 32
    return options


def config(tiny: bool, num_layers: int | None = None) -> Qwen2Config:
    """Of Qwen2.5-7B; or something with the same proportions of heads that fits anywhere."""
    shape: dict[str, Any] = {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
    }  # fmt: skip
    if tiny:
        shape |= {
            "vocab_size": 512, "hidden_size": 56, "intermediate_size": 128, "num_hidden_layers": 23, "num_attention_heads": 7,
            "num_key_value_heads": 1,
        }  # fmt: skip
    if num_layers is not None:
        shape["num_hidden_layers"] = num_layers
    return Qwen2Config(**shape, tie_word_embeddings=False)


def made(kind: type, options: argparse.Namespace, num_layers: int | None = None) -> Any:
    """A model with random weights, made where it is to be and in its precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, options.dtype))
    try:
        with options.device:
            return kind(config(options.tiny, num_layers)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


# What the device can do


def measured_peaks(options: argparse.Namespace) -> tuple[float, float]:
    """Bytes and floating point operations a second: the best of some large copies, and of some large products."""
    dtype, size = getattr(torch, options.dtype), 256 if options.tiny else 8192
    source = torch.randn(size * size, dtype=dtype, device=options.device)  # zeros are copied faster than data
    target = torch.empty_like(source)
    left, right = (torch.randn(size, size, dtype=dtype, device=options.device) for _ in range(2))
    copied = 2 * source.nbytes / best(lambda: target.copy_(source), options)
    multiplied = 2 * size**3 / best(lambda: left @ right, options)
    print(f"peaks measured: {copied / 1e9:,.0f} GB/s copied, {multiplied / 1e12:,.2f} TFLOP/s in {size} x {size} products")
    return copied, multiplied


def best(work: Callable[[], object], options: argparse.Namespace, times: int = 20) -> float:
    """Seconds of the quickest of some runs."""
    found = []
    for _ in range(times):
        synchronize(options)
        began = time.perf_counter()
        work()
        synchronize(options)
        found.append(time.perf_counter() - began)
    return min(found)


def synchronize(options: argparse.Namespace) -> None:
    if options.device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(options: argparse.Namespace) -> str:
    """Since the last call."""
    if options.device.type == "cpu":
        return "not known"
    found = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return f"{found / 1e9:.1f} GB"


# What is measured


def report_drawing(options: argparse.Namespace, bandwidth: float, flops: float) -> None:
    av = verbalizer(options)
    vectors = torch.randn(options.activations, av.d_model)
    print(f"\ndrawing, {PROMPT} tokens of prompt")
    for fixed in (True, False):
        sides: dict[str, Callable[[], float]] = {
            "generate()": rate(lambda fixed=fixed: generated(av, vectors, COPIES, COPIES, fixed, options))
        }
        at_once = {"generate()": COPIES}
        for n in options.draws:
            for recorded in (True, False) if cuda_graphs.supports_cuda_graphs(av.model) else (False,):
                name = f"{n} draws, graphs" if recorded else f"{n} draws"
                sides[name] = rate(lambda n=n, r=recorded, fixed=fixed: drawn(av, vectors, n, r, fixed, options))
                at_once[name] = n
        peak_memory(options)
        rates = alternate(sides, options.repeats)
        lengths = f"{options.tokens} tokens each" if fixed else "natural lengths"
        print(f"\n{lengths}; memory at peak {peak_memory(options)}; CUDA graphs {cuda_graphs.cuda_graphs_state(av.model)}")
        print("| | tokens/s, median (lowest to highest) | against generate() | bound, tokens/s | of the bound |")
        print("|---|---|---|---|---|")
        for name, values in rates.items():
            bound = rate_bound(av.model, at_once[name], bandwidth, flops)
            ratios = [one / other for one, other in zip(values, rates["generate()"], strict=True)]
            share = [one / bound for one in values]
            columns = spread(values, ",.0f"), spread(ratios, ".2f"), f"{bound:,.0f}", spread(share, ".1%")
            print(f"| {name} | {' | '.join(columns)} |", flush=True)


def rate_bound(model: Any, rows: int, bandwidth: float, flops: float) -> float:
    """Tokens a second that no step of so many rows can pass: every weight is read once, every row multiplied with it."""
    used = [p for name, p in model.named_parameters() if "embed_tokens" not in name]
    products = sum(p.numel() for p in used if p.ndim == 2)
    return rows / max(sum(p.nbytes for p in used) / bandwidth, 2 * products * rows / flops)


def drawn(
    av: NlaVerbalizer, vectors: torch.Tensor, at_once: int, recorded: bool, fixed: bool, options: argparse.Namespace
) -> int:
    """Tokens, steps as CUDA graphs or as usual, of `FILLS` times as many draws as are in flight."""
    mine = argparse.Namespace(**vars(options) | {"batch_size": at_once})
    with patch.dict(os.environ, {cuda_graphs.CUDA_GRAPHS_VARIABLE: "1" if recorded else "0"}):
        return ours(av, vectors, max(1, -(-(1 if options.tiny else FILLS) * at_once // len(vectors))), fixed, mine)


def report_scoring(options: argparse.Namespace) -> None:
    ar, texts = reconstructor(options), [str(i) for i in range(options.texts)]
    peak_memory(options)
    rates = alternate({"ours": rate(lambda: len(ar.reconstruct_texts(texts, 512)))}, options.repeats)
    print(
        f"\nscoring: {spread(rates['ours'], ',.0f')} texts/s of {TEMPLATE} + {TEXT} tokens; memory at peak {peak_memory(options)}"
    )


def report_extraction(options: argparse.Namespace) -> None:
    reader, generator = block_reader(options), np.random.default_rng(0)
    rows = [generator.integers(0, 500, length).tolist() for length in generator.integers(64, 257, options.passages)]
    wanted = [sorted({*generator.integers(0, len(row), 3).tolist(), len(row) - 1}) for row in rows]
    peak_memory(options)
    rates = alternate({"ours": rate(lambda: len(reader.vectors(rows, wanted)))}, options.repeats)
    print(f"extraction: {spread(rates['ours'], ',.0f')} activations/s, 4 of each 64 to 256 tokens; ", end="")
    print(f"memory at peak {peak_memory(options)}")


# Models of which only the shape matters


def verbalizer(options: argparse.Namespace) -> NlaVerbalizer:
    model = made(Qwen2ForCausalLM, options, options.layers)
    # Random weights hardly prefer a token: each that is a multiple of this many ends a text.
    ends = frozenset(range(0, model.config.vocab_size, options.tokens))
    keep_head_input_contiguous(model)
    prompting = AvPrompting(injection=ReplaceEmbedding(model.config.hidden_size**0.5), template="{injection_char}", marker="x")
    prompt = AvPrompt(tuple(range(1, PROMPT + 1)), INJECTED_AT)
    return NlaVerbalizer(info(model), prompting, model, None, prompt, ends)


def reconstructor(options: argparse.Namespace) -> NlaReconstructor:
    model = made(Qwen2Model, options, LAYER + 1)
    width = model.config.hidden_size
    head = torch.nn.Linear(width, width, bias=False, dtype=model.dtype, device=options.device).requires_grad_(False)
    return NlaReconstructor(info(model), ArPrompting(template="{explanation}"), model, head, RandomPrompts())


def info(model: Any) -> Any:
    return SimpleNamespace(path="random weights", layer=LAYER, d_model=model.config.hidden_size)


class RandomPrompts:
    """Texts are numbers; each stands for random tokens behind a common template, a quarter shorter or longer than the others."""

    common = tuple(range(1, TEMPLATE + 1))

    def ids(self, texts: list[str]) -> list[list[int]]:
        return [list(self.common) + self._text(int(text)) for text in texts]

    def read_position(self, row: list[int]) -> int:
        return len(row) - 1

    def _text(self, seed: int) -> list[int]:
        generator = np.random.default_rng(seed)
        return generator.integers(0, 500, generator.integers(TEXT - TEXT // 4, TEXT + TEXT // 4 + 1)).tolist()


def block_reader(options: argparse.Namespace) -> BlockReader:
    """Without the files and the tokenizer that one is otherwise made from."""
    reader = BlockReader.__new__(BlockReader)
    reader.decoder, reader.device, reader.dtype = made(Qwen2Model, options, LAYER + 1), options.device, options.dtype
    reader.block = reader.decoder.layers[LAYER]
    return reader


if __name__ == "__main__":
    main()
