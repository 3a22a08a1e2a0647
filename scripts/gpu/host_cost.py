"""What does the host do between two steps? `python scripts/gpu/host_cost.py [DRAWS K]`, on any machine.

Thread CPU time of a step's Python and list work at so many draws in flight: the model and the slots' tensors are left out, the
vocabulary has 512 tokens so that sampling costs next to nothing, and each token ends a text with probability 1/130. A GPU waits
for this between two replays.
"""

from __future__ import annotations

import argparse
import time
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from gpu_common import requests

from ksweep.inference import engine, gumbel_sampling, kv_cache
from ksweep.inference.request import DecodingOptions, DrawBatch, DrawInFlight, noise_keys

VOCABULARY, MEAN_TEXT, STEPS = 512, 130, 12


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("draws", type=int, nargs="*", default=[64, 256, 768])
    options.add_argument("--k", type=int, default=16)
    given = options.parse_args()
    torch.set_num_threads(1)
    print("| draws in flight | ms a step | of it sampling | the host's own |\n|---|---|---|---|")
    for draws in given.draws:
        whole, sampling = step_cost(draws, given.k)
        print(f"| {draws} | {whole:.2f} | {sampling:.2f} | {whole - sampling:.2f} |", flush=True)


def step_cost(draws: int, k: int) -> tuple[float, float]:
    """Return the milliseconds of a step, and how many of them sampling takes."""
    decoder = running_decoder(draws, k)
    logits, sampling = torch.randn(draws, VOCABULARY), [0.0]

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.thread_time()
        try:
            return gumbel_sample(*args, **kwargs)
        finally:
            sampling[0] += time.thread_time() - began

    gumbel_sample = gumbel_sampling.sample
    with (
        patch.object(gumbel_sampling, "sample", timed),
        patch.object(engine._SlotDecoder, "_next_logits", lambda self: logits[: len(self.counts)]),
    ):
        began = time.thread_time()
        for _ in range(STEPS):
            torch.tensor(decoder.cache.lengths)  # what a recorded step's inputs are filled with
            list(decoder._step())
            decoder.cache.end_step()
        return 1e3 * (time.thread_time() - began) / STEPS, 1e3 * sampling[0] / STEPS


def running_decoder(draws: int, k: int) -> Any:
    """Return a decoder with texts of 20 tokens in every slot, and a cache that keeps books and no tensors."""
    wanted = requests(range(draws // k), k)
    batch = DrawBatch(vectors=torch.zeros(draws // k, 4), requests=wanted, temperature=1.0, seed=0)
    texts = np.random.default_rng(0).integers(1, VOCABULARY, (len(batch.requests), 20))
    in_flight = [DrawInFlight(0, batch, index, token_ids=texts[index].tolist()) for index in range(len(batch.requests))]
    av = SimpleNamespace(stop_token_ids=frozenset(range(0, VOCABULARY, MEAN_TEXT)))
    decoder = engine._SlotDecoder(av, None, DecodingOptions(max_new_tokens=10**6), draws, 64)  # type: ignore[arg-type]
    decoder.draws, decoder.counts = in_flight, [1] * len(in_flight)
    decoder.keys, decoder.tokens = noise_keys(in_flight, torch.device("cpu")), torch.zeros(len(in_flight), dtype=torch.long)
    decoder.cache = kv_cache.KVCache(None, 1, draws, 200)
    decoder.cache.lengths = [50] * len(in_flight)
    part = torch.zeros(draws, 1, 50, 1)
    decoder.cache.layers[0].write_prompts(0, part, part)
    return decoder


if __name__ == "__main__":
    main()
