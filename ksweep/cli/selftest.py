"""Self-test of the engine on this machine: draws of a tiny random model, checked against plain decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ksweep.autoencoder.base import ParseOutcome
from ksweep.inference.engine import Draw, Request, draw
from ksweep.inference.prompts import FinishReason, Prompts

WIDTH, VOCABULARY, PROMPT, STOP = 32, 64, (5, 6, 0, 7), 1
INJECT_AT = 2
NUM_ACTIVATIONS, NUM_DRAWS, MAX_TOKENS = 4, 5, 12


class TinyVerbalizer:
    """A random two-block Llama whose prompt has a vector in place of one token's embedding."""

    d_model = WIDTH
    stop_token_ids = frozenset({STOP})
    prompt_length = len(PROMPT)
    edits_blocks = False

    def __init__(self, device: str, dtype: torch.dtype = torch.float32) -> None:
        """Create the same weights on every device: on the CPU in float32, then moved."""
        from transformers import LlamaConfig, LlamaForCausalLM

        state = torch.get_rng_state()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.2, bos_token_id=0, eos_token_id=STOP,
        )  # fmt: skip
        self.model: Any = LlamaForCausalLM(config).eval().to(device, dtype)
        torch.set_rng_state(state)

    def prompts(self, vectors: torch.Tensor) -> Prompts:
        """Return the prompts with the vectors in place."""
        tokens = torch.tensor(PROMPT, device=self.model.device).expand(len(vectors), -1)
        embeddings: torch.Tensor = self.model.get_input_embeddings()(tokens).clone()
        embeddings[:, INJECT_AT] = vectors.to(embeddings)
        return Prompts(embeddings, INJECT_AT)

    def inputs(self, vectors: torch.Tensor, positions: Sequence[int | None]) -> torch.Tensor:
        """Return the vectors unchanged."""
        return vectors

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the token ids as text, as there is no tokenizer."""
        return " ".join(map(str, token_ids))

    def parse(self, text: str, finish: FinishReason) -> tuple[str | None, ParseOutcome]:
        """Accept every text as an explanation."""
        return text, "ok"


def failures(device: str) -> list[str]:
    """Return what is wrong with drawing on this device, as text; empty if nothing is.

    Tokens are compared exactly: none of them changes where logits are off by 3e-3, and float32 is off by 1e-5.
    """
    av, exact = TinyVerbalizer(device), TinyVerbalizer(device, torch.float64)
    vectors = torch.from_numpy(3 * np.random.default_rng(0).normal(size=(NUM_ACTIVATIONS, WIDTH)).astype(np.float32))
    greedy = _drawn_tokens(av, vectors, temperature=0.0, batch_size=64, num_draws=1)
    plain = {(row, 0): _greedy_without_cache(exact, vectors[row]) for row in range(NUM_ACTIVATIONS)}
    together = _drawn_tokens(av, vectors, temperature=1.0, batch_size=64, num_draws=NUM_DRAWS)
    alone = _drawn_tokens(av, vectors, temperature=1.0, batch_size=1, num_draws=NUM_DRAWS)
    problems = []
    if greedy != plain:
        problems.append("greedy text from the forked cache differs from plain decoding without one")
    if together != alone:
        problems.append("draws depend on the batch size")
    if len(set(plain.values())) == 1:
        problems.append("every vector gives the same text: the vector does not reach the model")
    if len(set(together.values())) < len(together) // 2:
        problems.append("draws repeat one another: the noise is not random")
    return problems


def _drawn_tokens(
    av: TinyVerbalizer, vectors: torch.Tensor, *, temperature: float, batch_size: int, num_draws: int
) -> dict[tuple[int, int], tuple[int, ...]]:
    requests = [Request(row=row, activation_key=row + 1, draw=k) for row in range(len(vectors)) for k in range(num_draws)]
    drawn: list[Draw] = list(
        draw(av, vectors, requests, temperature=temperature, max_new_tokens=MAX_TOKENS, seed=0, batch_size=batch_size)
    )
    return {(d.request.row, d.request.draw): tuple(d.token_ids) for d in drawn}


@torch.inference_mode()
def _greedy_without_cache(av: TinyVerbalizer, vector: torch.Tensor) -> tuple[int, ...]:
    """Decode in float64, running the whole sequence again for each token."""
    sequence = av.prompts(vector[None]).embeddings
    tokens: list[int] = []
    while len(tokens) < MAX_TOKENS and (not tokens or tokens[-1] != STOP):
        token = av.model(inputs_embeds=sequence, use_cache=False).logits[0, -1].argmax()
        tokens.append(int(token))
        sequence = torch.cat([sequence, av.model.get_input_embeddings()(token[None, None])], dim=1)
    return tuple(tokens)
