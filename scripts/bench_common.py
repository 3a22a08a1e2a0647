"""Parts shared by the speed benchmarks: the demo's models and vectors, a longer AV prompt, alternating timing, tables."""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from ksweep import Autoencoder, Cell, Sampling, Scoring, Sweep
from ksweep.activations.caching import ensure
from ksweep.autoencoder.nla import models as nla
from ksweep.autoencoder.nla.family import NlaPair
from ksweep.autoencoder.nla.loading import load_nla_tokenizer
from ksweep.autoencoder.nla.prompts import av_prompt
from ksweep.config.presets import demo_pair, held_out_passages
from ksweep.inference.engine import vectors_as_tensor

LAYER = 20
NATURAL_LIMIT = 64
"""Most tokens of a text of natural length."""


PREFIX = (
    "■■■■■■ yourself the Fried †■ exhibition■■■ jellyfish Pang chromos strenOUTOUTOUTOUT strenOUTOUT Pang Pang"
    " stren■■OUTOUTOUTOUTOUTOUTOUTOUTOUTOUTOUTOUT Pang Pang Pang stip trol trump cass trump trump trump trump trump trump"
    " trump trump trump trump<|endoftext|> trump trump trump trump trump trump trump trump"
)
"""A prefix that makes the demo AV's prompt as long as a released pair's. Its 82 tokens were exchanged one by one until the
distributions after it were closest to those after the AV's own prompt (0.24 nats per token; ordinary text: 0.5 and more).

On 48 activations x 4 draws held out from the search, at temperature 1: 27.3 tokens per text (own prompt: 18.0), medians 20 and
17, 84 % end by themselves (99 %), 82 % are explanations (98 %); at 0.8 22.9 (17.2), 93 % and 92 %. With ordinary text instead:
50 tokens, 36 %. So the texts are real explanations, but one in six does not end.
"""


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    return parser


def add_prompt_tokens(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        default=0,
        help="length of the AV's prompt, up to 87 (that of released pairs); without, its own 5",
    )


def load_pair(dtype: str, prompt_tokens: int = 0) -> tuple[nla.NlaVerbalizer, nla.NlaReconstructor]:
    """Load the demo pair on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        av, ar = NlaPair(lengthened(demo_pair(), prompt_tokens, Path(folder))).pair
        return nla.load_nla_verbalizer(av, dtype=dtype), nla.load_nla_reconstructor(ar, dtype=dtype)


def lengthened(pair: Autoencoder, prompt_tokens: int, place: Path) -> Autoencoder:
    """Return the pair with `prompt_tokens` in its AV's prompt: a copy of the AV under `place` with PREFIX in its template.

    Shorter prompts get the end of PREFIX. The loader checks the marker and its neighbours in the copy as in any AV.
    """
    info, _ = NlaPair(pair).pair
    tokenizer = load_nla_tokenizer(info)
    words = tokenizer.encode(PREFIX, add_special_tokens=False)
    own = len(av_prompt(info, tokenizer).ids)
    if prompt_tokens <= own:
        return pair
    if prompt_tokens > own + len(words):
        raise SystemExit(f"--prompt-tokens {prompt_tokens}: at most {own + len(words)}")
    copy = Path(shutil.copytree(pair.av or "", place / "av"))
    sidecar = yaml.safe_load((copy / "nla_meta.yaml").read_text(encoding="utf-8"))
    sidecar["prompt_templates"]["av"] = tokenizer.decode(words[own - prompt_tokens :]) + sidecar["prompt_templates"]["av"]
    (copy / "nla_meta.yaml").write_text(yaml.safe_dump(sidecar), encoding="utf-8")
    made = replace(pair, av=str(copy))
    length = len(av_prompt(NlaPair(made).pair[0], tokenizer).ids)
    if length != prompt_tokens:
        raise SystemExit(f"--prompt-tokens {prompt_tokens}: the prefix merges to {length} tokens; try another number, or 87")
    return made


def held_out(count: int) -> torch.Tensor:
    """Return real activations [activation, d_model], so that explanations have their natural lengths."""
    with tempfile.TemporaryDirectory() as folder:
        table = ensure(held_out_passages(num_activations=count), LAYER, folder)
        return vectors_as_tensor(table.vectors(0, count))


def demo_sweep(
    place: Path, num_activations: int, num_draws: int, num_replicates: int, prompt_tokens: int = 0, **more: Any
) -> Sweep:
    """Return a sweep of the demo pair with texts of natural length, as a user runs it; `more` are other fields of the sweep."""
    return Sweep(
        name="bench",
        cell=Cell(
            autoencoder=lengthened(demo_pair(), prompt_tokens, place),
            activations=held_out_passages(num_activations=num_activations),
            sampling=Sampling(num_draws=num_draws, max_new_tokens=NATURAL_LIMIT),
            scoring=Scoring(num_replicates=num_replicates),
        ),
        registry=str(place / "registry"),
        vector_cache=str(place / "vectors"),
        **more,
    )


def alternate(sides: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Run all sides in turn for `repeats` rounds after one warm-up round. Return the values of each side."""
    values: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(repeats + 1):
        for name, side in sides.items():
            value = side()
            if round_:
                values[name].append(value)
    return values


def report(title: str, unit: str, rates: Mapping[str, Sequence[float]], against: str) -> None:
    """Print the median rate of each side, and the median over rounds of its ratio to `against`."""
    print(f"\n{title}\n| | {unit}, median (lowest to highest) | against {against}, median (lowest to highest) |\n|---|---|---|")
    for name, values in rates.items():
        ratios = [value / other for value, other in zip(values, rates[against], strict=True)]
        print(f"| {name} | {spread(values, '.0f')} | {spread(ratios, '.2f')} |", flush=True)


def spread(values: Sequence[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def rate(count: Callable[[], int]) -> Callable[[], float]:
    """Turn a function that returns how many units it has done into one that returns units per second."""

    def timed() -> float:
        began = time.perf_counter()
        done = count()
        return done / (time.perf_counter() - began)

    return timed
