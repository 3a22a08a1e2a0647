"""Draws explanations: every activation's prompt runs once, is forked K ways, and every row is sampled with its own keyed noise.

What the prompts have in common runs once per process; a row that ends leaves its slot at once, and free slots are refilled with
the next draws (continuous batching). It never calls `generate()`, so nothing of a checkpoint's generation_config (repetition
penalty, top_k, ...) reaches the draws. Where a model's past cannot lie in slots, the plain sampler draws the same.

Memory: `batch_size` slots of prompt rest and new tokens, and the prompts of `prefill_batch_size` activations. Out of memory on a
GPU halves both and goes on; the draws are the same.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ksweep.autoencoder import noise, slots
from ksweep.autoencoder.plain import draw_plainly
from ksweep.autoencoder.requests import (
    Draw,
    Options,
    Request,
    Row,
    StopRequested,
    append,
    by_activation,
    check,
    finish_of,
    noise_keys,
    too_large,
)
from ksweep.errors import RunError

if TYPE_CHECKING:
    from jaxtyping import Float

    from ksweep.autoencoder.protocol import Verbalizer

__all__ = ["Draw", "Request", "as_vectors", "draw"]

log = logging.getLogger(__name__)

REFILL_SHARE = 0.25
"""Free slots are refilled once they are this share of all: a prompt costs little more for many activations than for one."""

FIRST_TOKENS = 64
"""Rows whose first token is sampled at once: their logits are copies of their prompt's."""


def as_vectors(vectors: np.ndarray) -> Float[torch.Tensor, "activation d_model"]:
    """A tensor of its own, so that a memory map stays untouched."""
    return torch.from_numpy(np.array(vectors, dtype=np.float32))


def draw(
    verbalizer: Verbalizer,
    vectors: Float[torch.Tensor, "activation d_model"],
    requests: Sequence[Request],
    *,
    temperature: float,
    top_p: float = 1.0,
    max_new_tokens: int,
    seed: int,
    batch_size: int = 512,
    prefill_batch_size: int = 64,
    should_stop: Callable[[], bool] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Iterator[Draw]:
    """Takes every requested draw once; yields them as they finish, in no particular order.

    A draw depends on its vector, activation key, number k, the seed and the sampling options, and on nothing else: any batch
    size, order, subset or number of ranks gives the same tokens, up to ties that the rounding of the logits decides.
    Temperature 0 is greedy: all draws of an activation are equal.

    batch_size bounds the rows decoded at once, prefill_batch_size the prompts run at once. `should_stop` is asked before
    every step: once true no more draws come, and those under way are lost. `on_step` hears after every step how many tokens
    were sampled.
    """
    check(vectors, requests, batch_size, prefill_batch_size, max_new_tokens)
    options = Options(temperature, top_p, max_new_tokens, seed, should_stop or (lambda: False), on_step or (lambda _: None))
    sampler = _draw_all if slots.fits(verbalizer.model, verbalizer.prompt_length + max_new_tokens) else draw_plainly
    return sampler(verbalizer, vectors, requests, options, batch_size, prefill_batch_size)


# The decorator leaves inference mode at every yield; a `with` around a yield would put the caller into it as well.
@torch.inference_mode()
def _draw_all(
    verbalizer: Verbalizer,
    vectors: Float[torch.Tensor, "activation d_model"],
    requests: Sequence[Request],
    options: Options,
    batch_size: int,
    prefill_batch_size: int,
) -> Iterator[Draw]:
    """One stream; if it does not fit into memory, what it has not yielded yet is tried again in half as many slots."""
    missing = dict.fromkeys(range(len(requests)))
    while missing:
        waiting = deque(by_activation(requests, missing))
        num_slots = min(batch_size, len(missing))
        try:
            for index, explanation in _Stream(
                verbalizer, vectors, requests, waiting, options, num_slots, prefill_batch_size
            ).draws():
                del missing[index]
                yield explanation
            continue
        except StopRequested:
            return
        except torch.OutOfMemoryError as error:
            if num_slots == 1:
                raise RunError(too_large(options.max_new_tokens)) from error
        # Out here the handler is left, and with it the failed attempt's tensors are free.
        batch_size = num_slots // 2
        prefill_batch_size = min(prefill_batch_size, batch_size)
        torch.cuda.empty_cache()
        log.warning("out of memory while drawing; going on with at most %d rows at once", batch_size)


@dataclass
class _Prompts:
    """Prompts that have run, and the draws that are still to be forked from them."""

    keys_and_values: list[tuple[torch.Tensor, torch.Tensor]]
    """Of every block, without what all prompts have in common: [activation, key_head, token, head_dim]."""
    logits: Float[torch.Tensor, "activation vocabulary"]
    length: int
    """Tokens of a prompt behind the common ones."""
    pending: deque[tuple[Row, int]]
    """Draws, and which of the prompts each belongs to."""


@dataclass
class _Stream:
    """Rows under way in slots; more come in as places fall free."""

    verbalizer: Verbalizer
    vectors: Float[torch.Tensor, "activation d_model"]
    requests: Sequence[Request]
    waiting: deque[list[int]]
    """Activations whose prompt has not run: the indices of their requests."""
    options: Options
    num_slots: int
    prefill_batch_size: int
    rows: list[Row] = field(default_factory=list)
    """Of slots 0, 1, 2, ..."""
    prompts: _Prompts | None = None
    prefix: Any = None
    cache: Any = None
    tokens: Any = None
    """[row] last token of each, on the device."""
    keys: Any = None
    """[row] what each row's noise is counted from."""

    def draws(self) -> Iterator[tuple[int, Draw]]:
        """Every draw with the index of its request, as they end."""
        self.prefix = self.verbalizer.prefix()
        while self.rows or self.waiting or self._has_pending():
            free = self.num_slots - len(self.rows)
            if free >= max(1, REFILL_SHARE * self.num_slots):
                yield from self._refill(free)
            if self.rows:
                yield from self._step()

    def _has_pending(self) -> bool:
        return self.prompts is not None and bool(self.prompts.pending)

    def _refill(self, free: int) -> Iterator[tuple[int, Draw]]:
        """First tokens of as many draws as there is room for; those that end with it never take a slot."""
        while free and (self.waiting or self._has_pending()):
            if not self._has_pending():
                self.prompts = self._next_prompts(free)
            assert self.prompts is not None
            taken = [self.prompts.pending.popleft() for _ in range(min(free, FIRST_TOKENS, len(self.prompts.pending)))]
            going_on: int = yield from self._first_tokens(self.prompts, [row for row, _ in taken], [place for _, place in taken])
            free -= going_on

    def _next_prompts(self, free: int) -> _Prompts:
        """Run the prompts of the next activations, enough of them to fill the free slots."""
        self._ask_to_stop()
        activations: list[list[int]] = []
        while self.waiting and len(activations) < self.prefill_batch_size and sum(map(len, activations)) < free:
            activations.append(self.waiting.popleft())
        own = torch.tensor([self.requests[indices[0]].row for indices in activations], device=self.vectors.device)
        prefill = self.verbalizer.prefill(self.vectors[own], self.prefix)
        common = 0 if self.prefix is None else self.prefix.get_seq_length()
        pending = [(Row(i, self.requests[i], []), place) for place, indices in enumerate(activations) for i in indices]
        past = [(layer.keys[:, :, common:], layer.values[:, :, common:]) for layer in prefill.cache.layers]
        return _Prompts(past, prefill.logits, prefill.prompt_length - common, deque(pending))

    def _first_tokens(self, prompts: _Prompts, rows: list[Row], places: list[int]) -> Generator[tuple[int, Draw], None, int]:
        """Sample from the prompts' logits and put the rows that go on into slots; returns how many did."""
        device = prompts.logits.device
        origin, keys = torch.tensor(places, device=device), noise_keys(rows, self.options.seed, device)
        sampled = self._sample(prompts.logits[origin], keys, 0)
        ended, alive = self._append(rows, sampled)
        yield from ended
        if not alive:
            return 0
        kept = torch.tensor(alive, device=device)
        if self.cache is None:
            capacity = prompts.length + self.options.max_new_tokens
            self.cache = slots.SlotCache(self.prefix, len(prompts.keys_and_values), self.num_slots, capacity)
        forks = origin[kept]  # keys and values lie on the device of their block
        self.cache.put([(k[forks.to(k.device)], v[forks.to(v.device)]) for k, v in prompts.keys_and_values], prompts.length)
        self._extend([rows[i] for i in alive], sampled.token_ids[kept], keys[kept])
        return len(alive)

    def _extend(self, rows: list[Row], tokens: torch.Tensor, keys: torch.Tensor) -> None:
        self.tokens = torch.cat([self.tokens, tokens]) if self.rows else tokens
        self.keys = torch.cat([self.keys, keys]) if self.rows else keys
        self.rows += rows

    def _step(self) -> Iterator[tuple[int, Draw]]:
        """One more token of every row; rows that end leave their slots."""
        self._ask_to_stop()
        taken = torch.tensor([len(row.token_ids) for row in self.rows], device=self.tokens.device)
        sampled = self._sample(self._next_logits(), self.keys, taken)
        ended, alive = self._append(self.rows, sampled)
        self.tokens = sampled.token_ids
        if len(alive) < len(self.rows):
            order = self.cache.keep(alive)
            kept = torch.tensor(order, device=self.tokens.device, dtype=torch.long)
            self.rows, self.tokens, self.keys = [self.rows[i] for i in order], self.tokens[kept], self.keys[kept]
        yield from ended

    def _next_logits(self) -> Float[torch.Tensor, "row vocabulary"]:
        """Logits after each row's last token, whose keys and values go into its slot.

        The hidden state of a single position is contiguous, so lm_head folds it into one 2-D product (measured 1.0-1.1x of a 2-D
        input). A slice out of several positions does not fold: 12x in float32 and 340x in bfloat16 for the last of 9.
        """
        model, positions = self.verbalizer.model, self.cache.begin_step(self.tokens.device)
        with slots.attending(model):
            output = model(
                input_ids=self.tokens[:, None], position_ids=positions, past_key_values=self.cache, use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
        self.cache.end_step()
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def _sample(self, logits: torch.Tensor, keys: torch.Tensor, step: int | torch.Tensor) -> noise.Sample:
        options = self.options
        return noise.sample(logits, noise.step_keys(keys, step), temperature=options.temperature, top_p=options.top_p)

    def _append(self, rows: list[Row], sampled: noise.Sample) -> tuple[list[tuple[int, Draw]], list[int]]:
        """Add a token to each row; the draws that end with it, and the rows that go on."""
        append(rows, range(len(rows)), sampled)
        self.options.on_step(len(rows))
        ended, alive = [], []
        for i, row in enumerate(rows):
            finish = finish_of(row.token_ids, self.verbalizer.stop_token_ids, self.options.max_new_tokens)
            if finish is None:
                alive.append(i)
            else:
                ended.append((row.index, Draw(row.request, tuple(row.token_ids), finish, row.log_probability)))
        return ended, alive

    def _ask_to_stop(self) -> None:
        if self.options.should_stop():
            raise StopRequested
