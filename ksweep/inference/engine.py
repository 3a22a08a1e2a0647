"""Draws explanations: every activation's prompt runs once, and every draw is sampled with its own keyed noise.

The beginning that all prompts share runs once per stream. The draws of an activation share a slot for as long as their tokens
are the same, and fork where these differ: an explanation's opening words, the first choices at a low temperature, and everything
at temperature 0 are computed once for all draws. A draw that ends leaves its slot at once, and free slots are refilled with the
next draws (continuous batching), of the next batch where the current one has none left. `generate()` is never called, so nothing
of a checkpoint's generation_config (repetition penalty, top_k, ...) reaches the draws. For models that slots do not support the
naive engine takes the same draws.

Memory: a slot for every draw in flight, for its prompt's own part and its new tokens, and the prompts of `prefill_batch_size`
activations. Running out of memory halves both and continues, with draws as of another batch size: see `BuiltinEngine`.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from ksweep.inference import attention, cuda_graphs, gumbel_sampling, kv_cache, memory
from ksweep.inference.backend import DEFAULT_ENGINE, engine_for
from ksweep.inference.naive_engine import NaiveEngine, say_once
from ksweep.inference.prefill import lacks_model, prefill, prefill_prefix, prompts_of
from ksweep.inference.request import (
    DecodingOptions,
    Draw,
    DrawBatch,
    DrawInFlight,
    Request,
    append_tokens,
    draw_too_large_message,
    finish_reason,
    noise_keys,
    until_stopped,
)
from ksweep.inference.scheduler import Backlog, PromptQueue, group_by_text
from ksweep.utils.errors import RunError

if TYPE_CHECKING:
    from jaxtyping import Float

    from ksweep.inference.prompts import FinishReason, PromptedModel

__all__ = ["BuiltinEngine", "DecodingOptions", "Draw", "DrawBatch", "Request", "draw", "vectors_as_tensor"]

log = logging.getLogger(__name__)

MEMORY_SHARE = 0.5
"""Share of the free memory for slots; the rest is for the prompts, the logits and a step's own tensors."""

REFILL_SHARE = 0.25
"""New draws start once this share of the slots is free: a prompt costs little more for many activations than for one."""


def vectors_as_tensor(vectors: np.ndarray) -> Float[torch.Tensor, "activation d_model"]:
    """Copy vectors to a float32 tensor, so that a memory map stays untouched."""
    return torch.from_numpy(np.array(vectors, dtype=np.float32))


def draw(
    verbalizer: PromptedModel,
    vectors: Float[torch.Tensor, "activation d_model"],
    requests: Sequence[Request],
    *,
    temperature: float,
    seed: int,
    engine: str = DEFAULT_ENGINE,
    **options: Any,
) -> Iterator[Draw]:
    """Take the draws of a single batch; the other options are those of `DecodingOptions`.

    Raises:
        RequestError: an option is out of range, or the engine cannot draw from this AV.
    """
    batch = DrawBatch(vectors=vectors, requests=requests, temperature=temperature, seed=seed)
    decoding = DecodingOptions(**{"num_draws": max(1, len(requests))} | options)
    return (finished for _, finished in engine_for(engine, verbalizer).generate(verbalizer, [batch], decoding))


class BuiltinEngine:
    """Draws in slots (see the module's docstring); where slots do not support a model, the naive engine takes the same draws.

    A draw depends on its vector, activation key, number k, the seed and the sampling options. In float32 any batch size, order,
    subset, company or number of ranks gives the same tokens, bit for bit. In bfloat16 another batch size rounds the logits
    differently, and where two tokens are nearly tied it takes the other: 15, 17 and 29 % of the demo pair's draws have other
    tokens at T = 0.4, 0.8 and 1.2 (on a CPU). Temperature 0 is greedy: all draws of an activation are equal.
    """

    identity: ClassVar[dict[str, str]] = {}

    def supports(self, verbalizer: PromptedModel) -> str | None:
        """Return why this engine cannot draw from an AV, or None if it can."""
        return lacks_model(verbalizer)

    def generate(
        self, verbalizer: PromptedModel, batches: Iterable[DrawBatch], options: DecodingOptions
    ) -> Iterator[tuple[int, Draw]]:
        """Yield every draw of every batch once, as it finishes, in no particular order, with its batch's number.

        The next batch is taken only when slots would otherwise stay empty, so draws of several batches are in flight at once.
        """
        if not self._uses_slots(verbalizer, options.max_new_tokens):
            say_once(f"drawing by the naive engine, which is slower: {_why_no_slots(verbalizer, options.max_new_tokens)}")
            return NaiveEngine().generate(verbalizer, batches, options)
        memory.keep_freed_memory(verbalizer.model.device)
        return until_stopped(_draw_in_slots(verbalizer, enumerate(batches), options))

    def numerics(self, verbalizer: PromptedModel, max_new_tokens: int) -> dict[str, str]:
        """Return attention, dtype, sampler and use of CUDA graphs for the run record."""
        if not self._uses_slots(verbalizer, max_new_tokens):
            return NaiveEngine().numerics(verbalizer, max_new_tokens)
        of_model = attention.numerics(verbalizer.model)
        return of_model | {
            "attention": f"{of_model['attention']}, {attention.ATTENTION} while decoding",
            "sampler": "slots",
            "cuda_graphs": cuda_graphs.cuda_graphs_state(verbalizer.model),
        }

    @staticmethod
    def _uses_slots(verbalizer: PromptedModel, max_new_tokens: int) -> bool:
        return attention.supports_slots(verbalizer.model, verbalizer.prompt_length + max_new_tokens)


def _why_no_slots(verbalizer: PromptedModel, max_new_tokens: int) -> str:
    model, length = type(verbalizer.model).__name__, verbalizer.prompt_length + max_new_tokens
    if not attention.supports_slots(verbalizer.model, 1):
        return f"the built-in engine has no fast path for {model}. The draws are the same; nothing has to be changed"
    return (
        f"prompt and explanation may have {length} tokens ({max_new_tokens} of them new), more than the sliding window of "
        f"{model}. A smaller sampling.max_new_tokens would be faster"
    )


def _slots_in_memory(prompts: PromptQueue, capacity: int) -> Iterator[int]:
    """Yield how many slots the free memory of each device holds, where that is known; keys and values lie with their blocks."""
    for device in {keys.device for keys, _ in prompts.keys_and_values} | {prompts.logits.device}:
        if (free_bytes := memory.free_device_bytes(device)) is not None:
            held = [(keys, values) for keys, values in prompts.keys_and_values if keys.device == device]
            logits = prompts.logits[0].nbytes if device == prompts.logits.device else 0
            yield int(MEMORY_SHARE * free_bytes / (kv_cache.bytes_per_slot(held, capacity) + logits))


# The decorator leaves inference mode at every yield; a `with` around a yield would put the caller into it as well.
@torch.inference_mode()
def _draw_in_slots(
    verbalizer: PromptedModel, batches: Iterator[tuple[int, DrawBatch]], options: DecodingOptions
) -> Iterator[tuple[int, Draw]]:
    """Yield every draw of the batches; retry with half as many slots when memory runs out."""
    most_draws, prefill_batch_size, prefix = options.most_draws, options.prefill_batch_size, None
    backlog = Backlog(batches)
    while backlog.has_more():
        # 1. Draw until the backlog is empty or memory runs out. What has been yielded is never drawn again.
        decoder = _SlotDecoder(verbalizer, backlog, options, most_draws, prefill_batch_size, prefix=prefix)
        try:
            for ended, finish in decoder.run():
                backlog.mark_finished(ended)
                yield ended.batch_number, ended.finished(finish)
            continue
        except RuntimeError as error:
            if not memory.is_out_of_memory(error):
                raise
            if decoder.num_slots == 1:
                raise RunError(draw_too_large_message(options.max_new_tokens)) from error
        # 2. Free the attempt's tensors: the handler is left, so no traceback holds them any more.
        most_draws, prefill_batch_size, prefix = decoder.num_slots // 2, max(1, prefill_batch_size // 2), decoder.prefix
        del decoder
        memory.release_cached_memory(verbalizer.model.device)
        # 3. Start the unfinished draws over, at half the size.
        backlog.requeue_unfinished()
        log.warning("out of memory while drawing; continuing with at most %d draws at once", most_draws)


@dataclass
class _SlotDecoder:
    """The draw loop: one attempt to empty a backlog with a given number of slots."""

    verbalizer: PromptedModel
    backlog: Backlog
    options: DecodingOptions
    num_slots: int
    """Most draws in flight."""
    prefill_batch_size: int
    draws: list[DrawInFlight] = field(default_factory=list)
    """Draws in flight, ordered by slot. There are never more of them than slots, so a fork always finds a free one."""
    counts: list[int] = field(default_factory=list)
    """[slot] number of draws that share it: those of an activation whose tokens are the same so far."""
    prompts: PromptQueue | None = None
    prefix: Any = None
    """transformers cache of the beginning that all prompts share."""
    cache: Any = None
    recorded_steps: cuda_graphs.RecordedSteps | None = None
    """None where steps cannot be recorded."""
    tokens: Any = None
    """[slot] last token, on the device."""
    keys: Any = None
    """[draw] noise keys, on the device."""

    def run(self) -> Iterator[tuple[DrawInFlight, FinishReason]]:
        """Yield every draw of the backlog as it ends, and why it ended."""
        while True:
            # 1. Start new draws once enough slots are free.
            free = self.num_slots - len(self.draws)
            if free >= max(1, REFILL_SHARE * self.num_slots):
                yield from self._refill(free)
            # 2. Stop when nothing is in flight: then the backlog is empty too.
            if not self.draws:
                return
            # 3. Sample one more token of every draw.
            yield from self._step()

    def _refill(self, free: int) -> Iterator[tuple[DrawInFlight, FinishReason]]:
        """Start draws in up to `free` slots. Yields those that end with their first token; they never occupy a slot."""
        while free > 0:
            # 1. Run the next prompts once all draws of the last ones have started.
            if self.prompts is None or not self.prompts.waiting:
                self.prompts = None
                if not (activations := self.backlog.take(free, self.prefill_batch_size)):
                    return
                self.prompts = self._run_prompts(activations)
                self._allocate_slots(self.prompts)
                free = min(free, self.num_slots - len(self.draws))
            # 2. Let an activation wait until there are slots for all of its draws: parts of it would share less.
            if self.draws and free < len(self.prompts.waiting[0][1]) <= REFILL_SHARE * self.num_slots:
                return
            # 3. Sample first tokens; draws that go on occupy slots.
            started: int = yield from self._start(self.prompts, self.prompts.take(free))
            free -= started

    def _run_prompts(self, activations: list[list[DrawInFlight]]) -> PromptQueue:
        """Run the prompts of some activations, behind the prefix that they share."""
        self.options.raise_if_stopping()
        vectors = torch.stack([draws[0].batch.vectors[draws[0].request.row] for draws in activations])
        prompts, model = prompts_of(self.verbalizer, vectors), self.verbalizer.model
        if self.prefix is None:
            self.prefix = prefill_prefix(model, prompts)
        run, shared = prefill(model, prompts, self.prefix, shares_first_blocks=True), prompts.shared_length
        own = [(layer.keys[:, :, shared:], layer.values[:, :, shared:]) for layer in run.cache.layers]
        return PromptQueue(own, run.logits, self.verbalizer.prompt_length - shared, deque(enumerate(activations)))

    def _allocate_slots(self, prompts: PromptQueue) -> None:
        """Create the cache with the first prompts, whose keys and values tell how large a slot is."""
        if self.cache is not None:
            return
        capacity = prompts.length + self.options.max_new_tokens
        if self.options.batch_size is None:
            self.num_slots = max(1, min([self.num_slots, *_slots_in_memory(prompts, capacity)]))
        self.options.on_batch_sizes(self.num_slots, self.prefill_batch_size)
        self.cache = kv_cache.KVCache(self.prefix, len(prompts.keys_and_values), self.num_slots, capacity)
        model = self.verbalizer.model
        if cuda_graphs.supports_cuda_graphs(model):
            self.recorded_steps = cuda_graphs.RecordedSteps(model, self.cache, cuda_graphs.cuda_recorder(model.device))

    def _start(
        self, prompts: PromptQueue, taken: list[tuple[int, list[DrawInFlight]]]
    ) -> Generator[tuple[DrawInFlight, FinishReason], None, int]:
        """Sample first tokens from the prompts' logits and put the draws that go on into slots. Returns their number."""
        device = prompts.logits.device
        draws, counts = [draw for _, group in taken for draw in group], [len(group) for _, group in taken]
        prompt_of = torch.tensor([prompt for prompt, _ in taken], device=device)
        keys = noise_keys(draws, device)
        sampler = self._sampler(draws, counts, keys, 0)
        sampled, ended, going_on = self._append(draws, partial(sampler, prompts.logits[prompt_of]))
        yield from ended
        if not going_on:
            return 0
        groups = group_by_text(draws, counts, going_on)
        origin = prompt_of[torch.tensor([row for row, _ in groups], device=device)]  # the prompt of each new slot
        past = [(k[origin.to(k.device)], v[origin.to(v.device)]) for k, v in prompts.keys_and_values]  # on each block's device
        self.cache.append_rows(past, prompts.length)
        self._add_slots(draws, keys, sampled.token_ids, [group for _, group in groups])
        return len(going_on)

    def _add_slots(self, draws: list[DrawInFlight], keys: torch.Tensor, tokens: torch.Tensor, groups: list[list[int]]) -> None:
        """Assign groups of these draws to new slots behind those in use."""
        before = self.draws, self.counts, self.keys, self.tokens
        self._set_slots(draws, keys, tokens, groups)
        if before[0]:
            self.draws, self.counts = before[0] + self.draws, before[1] + self.counts
            self.keys, self.tokens = torch.cat([before[2], self.keys]), torch.cat([before[3], self.tokens])

    def _set_slots(self, draws: list[DrawInFlight], keys: torch.Tensor, tokens: torch.Tensor, groups: list[list[int]]) -> None:
        """Assign groups of these draws to slots 0, 1, 2, ..., replacing what was assigned before."""
        kept = [i for group in groups for i in group]
        self.draws, self.counts = [draws[i] for i in kept], [len(group) for group in groups]
        self.keys = keys[torch.tensor(kept, device=keys.device, dtype=torch.long)]
        self.tokens = tokens[torch.tensor([group[0] for group in groups], device=tokens.device, dtype=torch.long)]

    def _step(self) -> Iterator[tuple[DrawInFlight, FinishReason]]:
        """Sample one more token of every draw. Yields the draws that end with it."""
        self.options.raise_if_stopping()
        # 1. Sample from each slot's logits, once for every draw in it, and find the draws that end.
        steps = torch.tensor([len(draw.token_ids) for draw in self.draws], device=self.tokens.device)
        sampler = self._sampler(self.draws, self.counts, self.keys, steps)
        sampled, ended, going_on = self._append(self.draws, partial(sampler, self._next_logits()))
        # 2. Free the slots of those that ended, and fork slots whose draws took different tokens.
        groups = group_by_text(self.draws, self.counts, going_on)
        if len(going_on) == len(groups) == len(self.draws) == len(self.counts):
            self.tokens = sampled.token_ids  # nothing was shared and nothing ended: every draw keeps its slot
        else:
            order = self.cache.select([slot for slot, _ in groups])
            self._set_slots(self.draws, self.keys, sampled.token_ids, [groups[i][1] for i in order])
        yield from ended

    def _next_logits(self) -> Float[torch.Tensor, "slot vocabulary"]:
        """Return the logits after each slot's last token, whose keys and values are written to the slot."""
        if self.recorded_steps is not None:
            return self.recorded_steps.logits(self.tokens)
        positions = self.cache.begin_step(self.tokens.device)
        logits = attention.next_logits(self.verbalizer.model, self.cache, self.tokens, positions)
        self.cache.end_step()
        return logits

    def _sampler(
        self, draws: list[DrawInFlight], counts: list[int], keys: torch.Tensor, step: int | torch.Tensor
    ) -> Callable[..., gumbel_sampling.Sample]:
        """Return a function from logits, one row per slot, to a token of every draw.

        It is made before the logits are computed, so that its inputs are copied to the device first: a copy waits for all that
        the device was given before it. The draws of a slot belong to one batch.
        """
        temperatures = [draws[end - 1].batch.temperature for end in itertools.accumulate(counts)]
        temperature = temperatures[0] if len(set(temperatures)) == 1 else torch.tensor(temperatures, device=keys.device)
        return partial(
            gumbel_sampling.sample, keys=gumbel_sampling.step_keys(keys, step), temperature=temperature,
            top_p=self.options.top_p, shared_rows=gumbel_sampling.shared_rows(counts, keys.device),
        )  # fmt: skip

    def _append(
        self, draws: list[DrawInFlight], sample: Callable[..., gumbel_sampling.Sample]
    ) -> tuple[gumbel_sampling.Sample, list[tuple[DrawInFlight, FinishReason]], list[int]]:
        """Append a token to each draw. Returns the tokens, the draws that end with them, and the indices of those that go on."""
        sampled = append_tokens(draws, range(len(draws)), sample)
        self.options.on_step(len(draws))
        ended, going_on = [], []
        for i, draw in enumerate(draws):
            finish = finish_reason(draw, self.verbalizer.stop_token_ids, self.options.max_new_tokens)
            if finish is None:
                going_on.append(i)
            else:
                ended.append((draw, finish))
        return sampled, ended, going_on
