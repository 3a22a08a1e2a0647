"""How fast are explanations drawn, beside transformers' generate() over the same model, prompts and vectors?

    python scripts/bench_drawing.py                          # every comparison, 5 rounds
    python scripts/bench_drawing.py --draws 16 --lengths natural --repeats 2 --activations 16 --generated 32
    python scripts/bench_drawing.py --profile                # where our time goes, and the ceiling of its matrix products

Three sides, in turn: ours; generate(inputs_embeds) as the reference sweep uses it, the K copies of one vector as a batch; and
generate() over batches of any vectors, at the batch size that suits it best (tried first). Only useful tokens count: those up to
and with a row's own stop token. "Fixed" makes every text 32 tokens long, "natural" lets each end where the AV ends it, and says
first how long such texts are. `--prompt-tokens 87` is the length of released pairs' prompts; what stands before the demo's own 5
tokens was sought so that its AV goes on writing explanations, of which one in five or six has no end (`bench_common.PREFIX`).
Rates of generate() come from fewer activations than ours: its batches are alike and follow one another, so its rate does not
depend on their number.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from bench_common import add_prompt_tokens, alternate, held_out, load_pair, parser, rate, report
from transformers import GenerationConfig

from ksweep.autoencoder.injection import scaled
from ksweep.autoencoder.nla.models import NlaVerbalizer
from ksweep.autoencoder.prompting import ReplaceEmbedding
from ksweep.inference import attention as slots
from ksweep.inference.engine import Request, draw

TRIED = (16, 32, 64, 128, 256, 512)
MATRIX_PRODUCTS = ("aten::mm", "aten::addmm")
"""Those of the model's weights; batched ones are attention's."""


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    av, _ = load_pair(options.dtype, options.prompt_tokens)
    vectors = held_out(options.activations)
    print(f"{options.threads} threads, {options.dtype}, prompt of {av.prompt_length} tokens, {options.temperature=}")
    if options.profile:
        profile(av, vectors, options)
        return
    if "natural" in options.lengths:
        print(natural_lengths(av, vectors, options))
    for lengths in options.lengths:
        for k in options.draws:
            compare(av, vectors, k, lengths == "fixed", options)


def arguments() -> argparse.Namespace:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--activations", type=int, default=64)
    options.add_argument("--draws", type=int, nargs="+", default=[16, 64])
    options.add_argument("--lengths", nargs="+", choices=("fixed", "natural"), default=["fixed", "natural"])
    options.add_argument("--tokens", type=int, default=32, help="of a text of fixed length; half of the most of a natural one")
    add_prompt_tokens(options)
    options.add_argument("--temperature", type=float, default=1.0)
    options.add_argument("--batch-size", type=int, default=None, help="ours; what memory allows without")
    options.add_argument("--generated", type=int, default=128, help="rows that generate() is timed over in a round, at least")
    options.add_argument("--profile", action="store_true")
    return options.parse_args()


def natural_lengths(av: NlaVerbalizer, vectors: torch.Tensor, options: argparse.Namespace) -> str:
    """How long the texts are that the AV writes, over four of each activation, and how many it ends itself as it should."""
    drawn = list(
        draw(av, vectors, requests(len(vectors), 4), temperature=options.temperature, max_new_tokens=2 * options.tokens, seed=0)
    )
    lengths = sorted(len(one.token_ids) for one in drawn)
    ended = sum(one.finish == "stop" for one in drawn) / len(drawn)
    parsed = sum(av.parse(av.decode(one.text_token_ids), one.finish)[1] == "ok" for one in drawn) / len(drawn)
    spread = f"mean {statistics.mean(lengths):.1f}, median {statistics.median(lengths):.0f}, largest {lengths[-1]}"
    return f"natural lengths: {spread} tokens; {ended:.0%} end themselves, {parsed:.0%} are explanations"


def requests(activations: int, k: int) -> list[Request]:
    return [Request(row, row * 7919, i) for row in range(activations) for i in range(k)]


def compare(av: NlaVerbalizer, vectors: torch.Tensor, k: int, fixed: bool, options: argparse.Namespace) -> None:
    tuned = best_batch_size(av, vectors, fixed, options)
    sides = {
        "generate(), the copies of one vector a batch": lambda: generated(av, vectors, k, k, fixed, options),
        f"generate(), {tuned} rows a batch": lambda: generated(av, vectors, k, tuned, fixed, options),
        "ours": lambda: ours(av, vectors, k, fixed, options),
    }
    rates = alternate({name: rate(side) for name, side in sides.items()}, options.repeats)
    title = f"{len(vectors)} activations x {k} draws, " + (f"{options.tokens} tokens each" if fixed else "natural lengths")
    for against in list(sides)[:2]:
        report(title, "useful tokens/s", rates, against)


def ours(av: NlaVerbalizer, vectors: torch.Tensor, k: int, fixed: bool, options: argparse.Namespace) -> int:
    """Tokens drawn."""
    stops, av.stop_token_ids = av.stop_token_ids, frozenset() if fixed else av.stop_token_ids
    try:
        drawn = draw(
            av, vectors, requests(len(vectors), k), temperature=options.temperature,
            max_new_tokens=options.tokens if fixed else 2 * options.tokens, seed=0, batch_size=options.batch_size,
        )  # fmt: skip
        return sum(len(one.token_ids) for one in drawn)
    finally:
        av.stop_token_ids = stops


@torch.inference_mode()
def generated(av: NlaVerbalizer, vectors: torch.Tensor, k: int, batch_size: int, fixed: bool, options: argparse.Namespace) -> int:
    """Useful tokens of generate() over as many batches as hold `options.generated` rows."""
    stops = sorted(av.stop_token_ids)
    config = GenerationConfig(
        do_sample=True, temperature=options.temperature, max_new_tokens=options.tokens if fixed else 2 * options.tokens,
        top_k=0, eos_token_id=None if fixed else stops, pad_token_id=stops[0],
    )  # fmt: skip
    useful = done = 0
    for rows in torch.split(torch.arange(len(vectors)).repeat_interleave(k), batch_size):
        embedded = prompts(av, vectors[rows])
        mask = torch.ones(embedded.shape[:2], dtype=torch.long, device=embedded.device)
        tokens = av.model.generate(inputs_embeds=embedded, attention_mask=mask, generation_config=config)
        useful += sum(useful_tokens(row, frozenset() if fixed else av.stop_token_ids) for row in tokens.tolist())
        if (done := done + len(rows)) >= options.generated:
            break
    return useful


def prompts(av: NlaVerbalizer, vectors: torch.Tensor) -> torch.Tensor:
    assert isinstance(av.prompting.injection, ReplaceEmbedding)
    embedded = av.model.get_input_embeddings()(torch.tensor(av.prompt_ids, device=av.model.device)).repeat(len(vectors), 1, 1)
    embedded[:, av.injection_position] = scaled(vectors, av.prompting.injection.scale).to(embedded)
    return embedded


def useful_tokens(row: list[int], stops: frozenset[int]) -> int:
    return next((i + 1 for i, token in enumerate(row) if token in stops), len(row))


def best_batch_size(av: NlaVerbalizer, vectors: torch.Tensor, fixed: bool, options: argparse.Namespace) -> int:
    """The one at which generate() makes the most useful tokens a second, each tried once over whole batches."""
    found = {}
    for size in TRIED:
        if size <= options.generated * 2 or size == TRIED[0]:
            found[size] = rate(lambda size=size: generated(av, vectors, 16, size, fixed, options))()
    print("generate() by rows a batch, tokens/s:", ", ".join(f"{size}: {value:.0f}" for size, value in found.items()), flush=True)
    return max(found, key=lambda size: found[size])


def profile(av: NlaVerbalizer, vectors: torch.Tensor, options: argparse.Namespace) -> None:
    """Share of our time by what it is spent on, and how near the matrix products are to what they reach by themselves."""
    attend, rows = slots.slot_attention, list[int]()
    first = next(module for module in av.model.modules() if isinstance(module, torch.nn.Linear))

    def watched(*given: object, **named: object) -> object:
        with torch.profiler.record_function("attention"):
            return attend(*given, **named)

    slots.AttentionInterface.register(slots.ATTENTION, watched)
    try:
        work: Callable[[], int] = lambda: ours(av, vectors, options.draws[0], options.lengths[0] == "fixed", options)  # noqa: E731
        work()
        handle = first.register_forward_pre_hook(lambda _, given: rows.append(given[0].numel() // first.in_features))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            began = time.perf_counter()
            tokens = work()
            total = time.perf_counter() - began
        handle.remove()
    finally:
        slots.AttentionInterface.register(slots.ATTENTION, attend)
    averages = {event.key: event for event in found.key_averages()}
    products = sum(averages[name].self_cpu_time_total for name in MATRIX_PRODUCTS if name in averages) / 1e6
    attention = averages["attention"].cpu_time_total / 1e6
    print(
        f"{tokens} tokens in {total:.1f} s: matrix products {products / total:.1%}, attention {attention / total:.1%}, ", end=""
    )
    print(f"all else {1 - (products + attention) / total:.1%}. By operation, those of attention among them:")
    for event in sorted(averages.values(), key=lambda event: -event.self_cpu_time_total)[:20]:
        print(f"  {event.key:<40}{event.self_cpu_time_total / 1e6 / total:6.1%}{event.count:8}")
    ceiling(av, max(rows), sum(rows), products)


@torch.inference_mode()
def ceiling(av: NlaVerbalizer, most: int, total: int, seconds: float) -> None:
    """The model's own weights, each times as many rows of noise as in the largest step, one after the other and nothing else."""
    rows = min(most, 512)
    layers = [module for module in av.model.modules() if isinstance(module, torch.nn.Linear)]
    inputs = {layer.in_features: torch.randn(rows, layer.in_features, dtype=layer.weight.dtype) for layer in layers}

    def once() -> int:
        for layer in layers:
            torch.nn.functional.linear(inputs[layer.in_features], layer.weight, layer.bias)
        return rows

    rates = sorted(rate(once)() for _ in range(9))
    best = total / rates[-1]
    print(
        f"the same products by themselves, {rows} rows at once, best of 9: {best:.2f} s for the {total} rows of the run, in which"
    )
    print(f"  they took {seconds:.2f} s: {best / seconds:.0%} of the ceiling")


if __name__ == "__main__":
    main()
