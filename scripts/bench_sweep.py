"""How long does a whole sweep take, compared with the reference's algorithm: new draws for every K, one vector at a time?

    python scripts/bench_sweep.py                                      # 200 activations, 3 temperatures, K = 1 .. 64
    python scripts/bench_sweep.py --activations 24 --most-draws 8 --reference-activations 2 --repeats 1
    python scripts/bench_sweep.py --prompt-tokens 87                   # prompts as long as those of released pairs, on both sides

Our side is the sweep as a user runs it, in its own process: planning, loading, extraction, drawing, scoring, 2,000 bootstrap
replicates, recording. The other side is the algorithm alone, with models already loaded: generate() over the K copies of a
vector, then the full model over the K texts, for every temperature and K. It runs for a few activations and is scaled up to
all, and its extraction and statistics are left out; both favour it. How our time divides comes from the sweep's own run
records. A longer prompt is in the template of a copy of the AV; its text was searched for so that the AV still writes
explanations (`bench_common.PREFIX`).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from bench_common import NATURAL_LIMIT, add_prompt_tokens, demo_sweep, held_out, load_pair, parser
from bench_drawing import prompts
from bench_scoring import read_by_all_of_it
from transformers import AutoModelForCausalLM, GenerationConfig

from ksweep import Sweep, connect, sweep_main
from ksweep.autoencoder.nla.models import NlaReconstructor, NlaVerbalizer
from ksweep.config.presets import demo_model

TEMPERATURES = (0.4, 0.8, 1.2)
PHASES = "SELECT one.key, sum(one.value) FROM (SELECT unnest(map_entries(seconds)) AS one FROM runs) GROUP BY one.key"
TEXTS = "SELECT avg(num_tokens), avg((finish = 'stop')::INTEGER), avg((parse = 'ok')::INTEGER) FROM draws"


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.measure:
        sweep_main(the_sweep(options, options.measure), ["--no-charts"])
    av, ar = load_pair(options.dtype, options.prompt_tokens)
    whole = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=getattr(torch, options.dtype)).eval()
    ours, reference, phases = [], [], []
    for _ in range(options.repeats):
        seconds, phase_seconds, texts = measure_ours(options)
        ours.append(seconds)
        phases.append(phase_seconds)
        reference.append(measure_reference(av, ar, whole, options))
        print(f"ours {ours[-1]:.0f} s, the reference's algorithm {reference[-1]:.0f} s", flush=True)
    ratios = [b / a for a, b in zip(ours, reference, strict=True)]
    print(f"{options.activations} activations, {len(TEMPERATURES)} temperatures, K to {options.most_draws}, ", end="")
    print(f"prompt of {av.prompt_length} tokens; {texts}")
    print(f"ours: median {statistics.median(ours):.0f} s")
    report_phases(phases, ours)
    print(
        f"the reference's algorithm, scaled up from {options.reference_activations}: median {statistics.median(reference):.0f} s"
    )
    print(f"ratio: median {statistics.median(ratios):.1f}x, {min(ratios):.1f}x to {max(ratios):.1f}x")


def arguments() -> argparse.Namespace:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--activations", type=int, default=200)
    options.add_argument("--most-draws", type=int, default=64, help="largest K; K goes up in powers of two")
    options.add_argument("--reference-activations", type=int, default=3)
    add_prompt_tokens(options)
    options.add_argument("--measure", type=Path, help="run our sweep alone, into this directory")
    return options.parse_args()


def ks(options: argparse.Namespace) -> list[int]:
    return [2**i for i in range(options.most_draws.bit_length())]


def the_sweep(options: argparse.Namespace, place: Path) -> Sweep:
    axes = {"sampling.temperature": TEMPERATURES}
    return demo_sweep(place, options.activations, options.most_draws, 2000, options.prompt_tokens, axes=axes)


def measure_ours(options: argparse.Namespace) -> tuple[float, dict[str, float], str]:
    """Return the seconds from start to end, the seconds of each phase, and a line about the texts."""
    with tempfile.TemporaryDirectory() as place:
        flags = [
            *("--activations", str(options.activations), "--most-draws", str(options.most_draws)),
            *("--prompt-tokens", str(options.prompt_tokens)),
        ]
        command = [sys.executable, __file__, "--measure", place, "--threads", str(options.threads), *flags]
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
        with connect(Path(place) / "registry") as connection:
            phases = connection.execute(PHASES).fetchall()
            [(tokens, ended, parsed)] = connection.execute(TEXTS).fetchall()
    return seconds, dict(phases), f"{tokens:.1f} tokens per text, {ended:.0%} end by themselves, {parsed:.0%} are explanations"


def report_phases(phases: Sequence[Mapping[str, float]], ours: Sequence[float]) -> None:
    """Print the median of each phase over the rounds, longest first; the rest is what no run record has."""
    names = sorted({name for phase_seconds in phases for name in phase_seconds}, key=lambda name: -phases[0].get(name, 0.0))
    rows = {name: [phase_seconds.get(name, 0.0) for phase_seconds in phases] for name in names}
    rest = "start, planning, loading, and everything else"
    rows[rest] = [total - sum(phase_seconds.values()) for total, phase_seconds in zip(ours, phases, strict=True)]
    print("| ours, by phase | s | share |\n|---|---|---|")
    for name, values in rows.items():
        share = statistics.median(value / total for value, total in zip(values, ours, strict=True))
        print(f"| {name} | {statistics.median(values):.1f} | {share:.1%} |")


def measure_reference(av: NlaVerbalizer, ar: NlaReconstructor, whole: torch.nn.Module, options: argparse.Namespace) -> float:
    few = held_out(options.reference_activations)
    torch.manual_seed(0)
    began = time.perf_counter()
    for temperature in TEMPERATURES:
        for k in ks(options):
            for vector in few:
                texts = sampled(av, vector.expand(k, -1), temperature)
                read_by_all_of_it(whole, ar, texts, k)
    return (time.perf_counter() - began) * options.activations / len(few)


@torch.inference_mode()
def sampled(av: NlaVerbalizer, vectors: torch.Tensor, temperature: float) -> list[str]:
    embedded, stops = prompts(av, vectors), sorted(av.stop_token_ids)
    config = GenerationConfig(
        do_sample=True, temperature=temperature, max_new_tokens=NATURAL_LIMIT, top_k=0, eos_token_id=stops, pad_token_id=stops[0]
    )
    mask = torch.ones(embedded.shape[:2], dtype=torch.long)
    rows = av.model.generate(inputs_embeds=embedded, attention_mask=mask, generation_config=config).tolist()
    return [av.parse(av.decode(row), "stop")[0] or "" for row in rows]


if __name__ == "__main__":
    main()
