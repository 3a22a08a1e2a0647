"""Are vLLM's texts those of the built-in engine, and how fast does each draw? The demo pair on a CPU, both engines in one run.

    make vllm-environment
    .venv-vllm/bin/python scripts/bench_vllm.py --dtype float32                  # parity, then rates
    .venv-vllm/bin/python scripts/bench_vllm.py --prompt-tokens 87 --draws 16 64 --dtype bfloat16

Parity: greedy texts of both, and the log probabilities of sampled texts under the built-in engine's model, taken in one pass over
prompt and text. Rates are of tokens up to and with the stop token, sides in turn; vLLM runs without torch.compile, as
sampling.engine=vllm has it on a CPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from bench_common import add_prompt_tokens, alternate, demo_pair, held_out, lengthened, parser, rate, report

from ksweep.autoencoder.nla.family import NlaPair
from ksweep.autoencoder.nla.models import NlaVerbalizer, load_nla_prompter, load_nla_verbalizer
from ksweep.inference.engine import Draw, Request, draw


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--activations", type=int, default=32)
    options.add_argument("--draws", type=int, nargs="*", default=[16], help="K for the rates; none leaves them out")
    options.add_argument("--tokens", type=int, default=32, help="of a text of fixed length; half of the most of a natural one")
    add_prompt_tokens(options)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        info, _ = NlaPair(lengthened(demo_pair(), given.prompt_tokens, Path(folder))).pair
        avs = {
            "builtin": load_nla_verbalizer(info, dtype=given.dtype),
            "vllm": load_nla_prompter(info, dtype=given.dtype, devices=("cpu",)),
        }
        vectors = held_out(given.activations)
        print(f"{given.threads} threads, {given.dtype}, prompt of {avs['vllm'].prompt_length} tokens")
        print(parity(avs, vectors, given.tokens), flush=True)
        for k in given.draws:
            for fixed in (True, False):
                sides = {
                    name: rate(lambda av=av, name=name, k=k, fixed=fixed: tokens_drawn(av, vectors, name, k, fixed, given.tokens))
                    for name, av in avs.items()
                }
                title = f"{len(vectors)} activations x {k} draws, {f'{given.tokens} tokens each' if fixed else 'natural lengths'}"
                report(title, "tokens/s", alternate(sides, given.repeats), "vllm")


def drawn(av: NlaVerbalizer, vectors: torch.Tensor, engine: str, k: int, temperature: float, tokens: int) -> list[Draw]:
    requests = [Request(row, row * 7919, i) for row in range(len(vectors)) for i in range(k)]
    found = draw(av, vectors, requests, engine=engine, temperature=temperature, max_new_tokens=tokens, seed=0)
    return sorted(found, key=lambda one: (one.request.row, one.request.draw))


def tokens_drawn(av: NlaVerbalizer, vectors: torch.Tensor, engine: str, k: int, fixed: bool, tokens: int) -> int:
    stops, av.stop_token_ids = av.stop_token_ids, frozenset() if fixed else av.stop_token_ids
    try:
        return sum(len(one.token_ids) for one in drawn(av, vectors, engine, k, 1.0, tokens if fixed else 2 * tokens))
    finally:
        av.stop_token_ids = stops


def parity(avs: dict[str, NlaVerbalizer], vectors: torch.Tensor, tokens: int) -> str:
    """A row of a table: greedy texts that are equal, and largest differences of log probabilities."""
    ours, theirs = (drawn(av, vectors, name, 1, 0.0, 2 * tokens) for name, av in avs.items())
    equal = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.token_ids == b.token_ids]
    greedy = max((abs(a.log_probability - b.log_probability) for a, b in equal), default=float("nan"))
    sampled = drawn(avs["vllm"], vectors, "vllm", 4, 1.0, 2 * tokens)
    exact = log_probabilities(avs["builtin"], vectors, sampled)
    off = [abs(one.log_probability - value) for one, value in zip(sampled, exact, strict=True)]
    return (
        f"greedy texts equal: {len(equal)} of {len(ours)}; their log probabilities differ by at most {greedy:.2g}; those of "
        f"{len(sampled)} texts sampled at T=1 from the built-in engine's model by at most {max(off):.2g}"
    )


@torch.inference_mode()
def log_probabilities(av: NlaVerbalizer, vectors: torch.Tensor, texts: Sequence[Draw]) -> list[float]:
    """Sums of the tokens' log probabilities, each text in one pass behind its prompt."""
    sums = []
    for one in texts:
        prompt = av.prompts(vectors[one.request.row : one.request.row + 1]).embeddings
        text = av.embeddings(torch.tensor([one.token_ids]))
        logits = av.model(inputs_embeds=torch.cat([prompt, text], dim=1), use_cache=False).logits[0, av.prompt_length - 1 : -1]
        sums.append(float(logits.float().log_softmax(-1)[range(len(one.token_ids)), one.token_ids].sum()))
    return sums


if __name__ == "__main__":
    main()
