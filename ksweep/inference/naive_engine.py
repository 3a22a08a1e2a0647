"""The naive engine: the oracle of the engine in slots, and the one that draws where a model's past cannot be kept in slots.

The prompt runs once per activation and its cache is copied for every draw. The rows of a group all have the same length, so there
is no padding, no mask and no position to get wrong; rows that end leave, and are not replaced before the group is done.

A model whose past is neither keys and values nor the states of linear attention runs the whole context again for every token
(`_WholeContext`).

Memory: each row holds its own copy of the prompt's keys and values, `batch_size` of them at most, beside one copy per
activation of the group; transformers' DynamicCache holds one layer twice while it grows. Running out of memory halves the batch
and continues, with draws as of another batch size: see `engine.BuiltinEngine`.
"""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from ksweep.inference import attention, gumbel_sampling, memory
from ksweep.inference.prefill import Prefill, editing_blocks, lacks_model, prefill, prompts_of
from ksweep.inference.request import (
    DecodingOptions,
    Draw,
    DrawBatch,
    DrawInFlight,
    append_tokens,
    draw_too_large_message,
    finish_reason,
    group_by_activation,
    noise_keys,
    until_stopped,
)
from ksweep.utils.errors import RunError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from ksweep.inference.prompts import PromptedModel

log = logging.getLogger(__name__)

MIN_LIVE_SHARE = 0.9
"""Rows that have ended are dropped from the batch once fewer than this share of it is live. Measured on a CPU (256 rows, lengths
geometric with mean 14 of at most 32): 2.1x the speed of never dropping, 2.0x at 0.75, 1.8x at 0.5, no more at 1.0."""


class NaiveEngine:
    """Copies each prompt's cache for every draw, and decodes groups of draws one after the other; see the module's docstring."""

    identity: ClassVar[dict[str, str]] = {"engine": "naive", "version": "1", "noise": "keyed"}

    def supports(self, verbalizer: PromptedModel) -> str | None:
        """Return why this engine cannot draw from an AV, or None if it can."""
        return lacks_model(verbalizer)

    def generate(
        self, verbalizer: PromptedModel, batches: Iterable[DrawBatch], options: DecodingOptions
    ) -> Iterator[tuple[int, Draw]]:
        """Yield every draw with its batch's number, one batch after the other."""
        memory.keep_freed_memory(verbalizer.model.device)
        return until_stopped(_draw_naively(verbalizer, enumerate(batches), options))

    def numerics(self, verbalizer: PromptedModel, max_new_tokens: int) -> dict[str, str]:
        """Return attention, dtype and sampler for the run record."""
        return {**attention.numerics(verbalizer.model), "sampler": "plain", "cuda_graphs": "off"}


# The decorator leaves inference mode at every yield; a `with` around a yield would put the caller into it as well.
@torch.inference_mode()
def _draw_naively(
    verbalizer: PromptedModel, batches: Iterator[tuple[int, DrawBatch]], options: DecodingOptions
) -> Iterator[tuple[int, Draw]]:
    """Yield every draw with its batch's number, one batch after the other and one group of activations after the other.

    A group that runs out of memory is retried at half the size, and so is everything after it; what was yielded is not drawn
    again.
    """
    batch_size, prefill_batch_size = options.most_draws, options.prefill_batch_size
    options.on_batch_sizes(batch_size, prefill_batch_size)
    for number, batch in batches:
        waiting = deque(group_by_activation(number, batch, range(len(batch.requests))))
        while waiting:
            # 1. Draw a group of activations.
            group = _next_group(waiting, batch_size)
            finished = set()
            try:
                for index, draw in _draw_group(verbalizer, batch, group, options, batch_size, prefill_batch_size):
                    finished.add(index)
                    yield number, draw
                continue
            except RuntimeError as error:
                if not memory.is_out_of_memory(error):
                    raise
                if batch_size == 1:
                    raise RunError(draw_too_large_message(options.max_new_tokens)) from error
            # 2. Out of memory: put its unfinished draws back in front. The handler is left, so no traceback holds tensors.
            unfinished = [draw.index for draw in group if draw.index not in finished]
            waiting.extendleft(reversed(group_by_activation(number, batch, unfinished)))
            # 3. Continue at half the size.
            batch_size = min(batch_size, len(group)) // 2 or 1
            prefill_batch_size = min(prefill_batch_size, batch_size)
            memory.release_cached_memory(verbalizer.model.device)
            options.on_batch_sizes(batch_size, prefill_batch_size)
            log.warning("out of memory while drawing; continuing with at most %d rows at once", batch_size)


def _draw_group(
    verbalizer: PromptedModel,
    batch: DrawBatch,
    group: Sequence[DrawInFlight],
    options: DecodingOptions,
    batch_size: int,
    prefill_batch_size: int,
) -> Iterator[tuple[int, Draw]]:
    """Run the prompts of a group's activations once and decode copies of them. Yields draws with the index of their request.

    Only an activation with more than `batch_size` draws makes a group larger than that; its draws are decoded in parts.
    """
    activations = list(dict.fromkeys(draw.request.row for draw in group))
    prompt_of = {activation: i for i, activation in enumerate(activations)}
    vectors = batch.vectors[torch.tensor(activations, device=batch.vectors.device)]
    prompts = _prefill(verbalizer, vectors, prefill_batch_size)
    for start in range(0, len(group), batch_size):
        draws = list(group[start : start + batch_size])
        origin = torch.tensor([prompt_of[draw.request.row] for draw in draws], device=prompts.logits.device)
        yield from _decode(verbalizer, _fork(prompts.cache, origin), prompts.logits[origin], draws, options)


def _decode(
    verbalizer: PromptedModel,
    cache: Any,
    logits: Float[torch.Tensor, "row vocabulary"],
    draws: list[DrawInFlight],
    options: DecodingOptions,
) -> Iterator[tuple[int, Draw]]:
    """Decode draws, one row each, until all have ended. Yields each with the index of its request."""
    batch, keys = draws[0].batch, noise_keys(draws, logits.device)
    live = list(range(len(draws)))
    """Rows of the model's batch whose draw has not ended."""
    for step in range(options.max_new_tokens):
        options.raise_if_stopping()
        # 1. Sample a token of every row, ended ones included; only live ones get theirs.
        sample = partial(
            gumbel_sampling.sample, logits, gumbel_sampling.step_keys(keys, step), temperature=batch.temperature,
            top_p=options.top_p,
        )  # fmt: skip
        sampled = append_tokens(draws, live, sample)
        options.on_step(len(live))
        # 2. Yield the draws that end.
        going_on = []
        for i in live:
            finish = finish_reason(draws[i], verbalizer.stop_token_ids, options.max_new_tokens)
            if finish is None:
                going_on.append(i)
            else:
                yield draws[i].index, draws[i].finished(finish)
        live = going_on
        if not live:
            return
        # 3. Drop ended rows from the batch once there are enough of them.
        tokens = sampled.token_ids
        if len(live) < MIN_LIVE_SHARE * len(draws):
            kept = torch.tensor(live, device=tokens.device)
            cache = _select(cache, kept)
            tokens, keys = tokens[kept], keys[kept]
            draws, live = [draws[i] for i in live], list(range(len(live)))
        # 4. Run the model on the new tokens.
        logits = _next_logits(verbalizer.model, tokens, cache)


@dataclass
class _WholeContext:
    """Stands in for the cache of a model whose past cannot be copied: prompts and tokens so far, which run whole at each step."""

    verbalizer: PromptedModel
    vectors: Float[torch.Tensor, "row d_model"]
    token_ids: Int[torch.Tensor, "row token"]

    def select(self, rows: Int[torch.Tensor, " row"]) -> _WholeContext:
        """Return a context with these rows, which may repeat."""
        return replace(self, vectors=self.vectors[rows.to(self.vectors.device)], token_ids=self.token_ids[rows])

    def next_logits(self, tokens: Int[torch.Tensor, " row"]) -> Float[torch.Tensor, "row vocabulary"]:
        """Append a token to every row, and return the logits behind it."""
        self.token_ids = torch.cat([self.token_ids, tokens[:, None]], dim=1)
        model, prompts = self.verbalizer.model, prompts_of(self.verbalizer, self.vectors)
        texts = model.get_input_embeddings()(self.token_ids).to(prompts.embeddings)
        with editing_blocks(prompts.edits):
            output = model(inputs_embeds=torch.cat([prompts.embeddings, texts], dim=1), use_cache=False, logits_to_keep=1)
        return cast("torch.Tensor", output.logits)[:, -1]


def _next_logits(model: Any, tokens: Int[torch.Tensor, " row"], cache: Any) -> Float[torch.Tensor, "row vocabulary"]:
    """Return the logits after one more token per row; the cache grows in place. lm_head is fast: see `attention.next_logits`."""
    if isinstance(cache, _WholeContext):
        return cache.next_logits(tokens)
    output = model(input_ids=tokens[:, None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cast("torch.Tensor", output.logits)[:, -1]


def _prefill(verbalizer: PromptedModel, vectors: Float[torch.Tensor, "activation d_model"], prefill_batch_size: int) -> Prefill:
    """Run the prompt of every vector, `prefill_batch_size` at a time, and return them as one Prefill."""
    parts = [prefill(verbalizer.model, prompts_of(verbalizer, batch)) for batch in torch.split(vectors, prefill_batch_size)]
    logits = torch.cat([part.logits for part in parts])
    if not can_be_copied(parts[0].cache):
        say_once(f"the whole context runs again for every token: a {type(verbalizer.model).__name__} has no past that is copied")
        no_tokens = torch.empty(len(vectors), 0, dtype=torch.long, device=logits.device)
        return Prefill(_WholeContext(verbalizer, vectors, no_tokens), logits)
    if len(parts) > 1:
        for layers in zip(*(part.cache.layers for part in parts), strict=True):
            _join(layers)
    return Prefill(parts[0].cache, logits)


@cache
def say_once(remark: str) -> None:
    """Log a remark as a warning, once in a process."""
    log.warning(remark)


def can_be_copied(past: Any) -> bool:
    """Return whether `_fork` copies all that a transformers cache keeps: keys, values and the states of linear attention."""
    from transformers import cache_utils

    names = ("Dynamic", "DynamicSlidingWindow", "LinearAttention", "LinearAttentionAndFullAttention",
             "LinearAttentionAndSlidingWindowAttention", "Dummy")  # fmt: skip
    kinds = [getattr(cache_utils, f"{name}Layer", None) for name in names]  # transformers before 5.20 has no DummyLayer
    return past is not None and all(type(layer) in kinds for layer in past.layers)


def _join(layers: Sequence[Any]) -> None:
    """Put the rows of several layers of one block into the first, and free them in the others."""
    first = layers[0]
    for name, value in list(vars(first).items()):
        values = [getattr(layer, name) for layer in layers]
        for layer in layers[1:]:
            setattr(layer, name, None)
        if isinstance(value, torch.Tensor) and value.ndim:
            setattr(first, name, torch.cat(values))
        elif isinstance(value, dict):  # number of a state -> the state
            states = {key: [other[key] for other in values] for key in value}
            setattr(first, name, {k: torch.cat(s) if isinstance(s[0], torch.Tensor) else s[0] for k, s in states.items()})


def _fork(cache: Any, origin: Int[torch.Tensor, " row"]) -> Any:
    """Return a new cache whose row i is a copy of row origin[i]; `cache` is unchanged and can be forked again."""
    if isinstance(cache, _WholeContext):
        return cache.select(origin)
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in forked.layers:
        for name, value in list(vars(layer).items()):
            if isinstance(value, dict):
                setattr(layer, name, dict(value))
    return _select(forked, origin)


def _select(cache: Any, rows: Int[torch.Tensor, " row"]) -> Any:
    """Return the cache with these rows of every layer alone, in place, each on the device of its block."""
    if isinstance(cache, _WholeContext):
        return cache.select(rows)
    for layer in cache.layers:
        layer.reorder_cache(rows)
    return cache


def _next_group(waiting: deque[list[DrawInFlight]], batch_size: int) -> list[DrawInFlight]:
    """Take as many whole activations as fit into `batch_size` rows, and at least one: so no prompt runs twice."""
    group = list(waiting.popleft())
    while waiting and len(group) + len(waiting[0]) <= batch_size:
        group += waiting.popleft()
    return group
