"""How many operations does a step of drawing launch? `python scripts/gpu/launches.py [LAYERS DRAWS TEMPERATURE]`, on any machine.

Operations that would be kernels or copies on a GPU, by phase, counted over a tiny model of so many blocks while it draws on the
CPU as a GPU would: slots in bfloat16, 256 rows a sampling. What a graph holds costs one launch; everything else is launched from
Python while the GPU has nothing to do.
"""

from __future__ import annotations

import argparse

import torch
from gpu_common import LaunchCount, Setting, counted_launches, large_verbalizer, requests

from ksweep.inference.engine import draw

TOKENS, COPIES = 40, 16


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, kind, usual in (("layers", int, 28), ("draws", int, 64), ("temperature", float, 0.8)):
        options.add_argument(name, type=kind, nargs="?", default=usual)
    given = options.parse_args()
    torch.set_num_threads(1)
    for top_p in (1.0, 0.9):
        steps, count = launches(given.layers, given.draws, given.temperature, top_p)
        print(f"\n{given.layers} blocks, {given.draws} draws at once, T = {given.temperature}, top_p = {top_p}: {steps} steps")
        # One check of new vectors a refill is counted too: they are on the host anyway.
        print(f"host waits a step: {sum(count.waits.values()) / steps:.1f} {dict(count.waits) or ''}")
        print("| phase | operations a step | most of them |\n|---|---|---|")
        for phase, names in count.launches.items():
            most = ", ".join(f"{name} {number / steps:.1f}" for name, number in names.most_common(6))
            print(f"| {phase} | {sum(names.values()) / steps:.1f} | {most} |")


def launches(layers: int, draws: int, temperature: float, top_p: float = 1.0, tokens: int = TOKENS) -> tuple[int, LaunchCount]:
    """Draw twice as many texts as are in flight. Returns the number of steps, and what they launched."""
    av = large_verbalizer(Setting(True, torch.device("cpu")), layers=layers)
    activations = max(1, 2 * draws // COPIES)
    vectors, steps = torch.randn(activations, av.d_model), list[int]()
    wanted = requests(range(activations), min(COPIES, draws))
    list(draw(av, vectors[:1], wanted[:1], temperature=1.0, max_new_tokens=2, seed=0))  # the AV's check of its first vector
    with counted_launches() as count:
        list(
            draw(
                av, vectors, wanted, temperature=temperature, top_p=top_p, max_new_tokens=tokens, seed=0, batch_size=draws,
                on_step=steps.append,
            )
        )  # fmt: skip
    return len(steps), count


if __name__ == "__main__":
    main()
