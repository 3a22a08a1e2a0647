"""The plain sampler, which the fast one (`decoding.py`) is held against, and which draws where that one cannot.

The prompt runs once per activation and is forked K ways; the rows of a group all have the same length, so there is no padding, no
mask and no position to get wrong; rows that end leave, and their places stay empty until the group is done.

Memory: each fork holds its own copy of the prompt's keys and values, `batch_size` of them at most, beside one copy per
activation of the group; transformers' DynamicCache holds one layer twice while it grows. Out of memory halves the batch and
goes on, with draws as of another batch size: see `decoding.stream`.
"""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from ksweep.inference import gumbel_sampling, memory
from ksweep.inference.backend import Prefill
from ksweep.inference.request import Draw, Options, Order, Row, append, by_activation, finish_of, noise_keys, too_large
from ksweep.utils.errors import RunError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from ksweep.inference.backend import PromptedModel

log = logging.getLogger(__name__)

LIVE_SHARE = 0.9
"""Rows that have ended are dropped from the batch once fewer than this share of it is live. Measured on a CPU (256 rows, lengths
geometric with mean 14 of at most 32): 2.1x the speed of never dropping, 2.0x at 0.75, 1.8x at 0.5, no more at 1.0."""


# The decorator leaves inference mode at every yield; a `with` around a yield would put the caller into it as well.
@torch.inference_mode()
def draw_plainly(
    verbalizer: PromptedModel,
    orders: Iterator[tuple[int, Order]],
    options: Options,
    batch_size: int,
    prefill_batch_size: int,
    fixed: bool,
) -> Iterator[tuple[int, Draw]]:
    """Order after order, and group after group; of one that does not fit into memory, what it has not yielded yet is tried again
    at half the size, and so is all that follows. `fixed` is for the other sampler: nothing is measured here."""
    options.on_room(batch_size, prefill_batch_size)
    for number, order in orders:
        waiting = deque(by_activation(number, order, range(len(order.requests))))
        while waiting:
            group = _next_group(waiting, batch_size)
            finished = set()
            try:
                for index, draw in _draw_group(verbalizer, order, group, options, batch_size, prefill_batch_size):
                    finished.add(index)
                    yield number, draw
                continue
            except RuntimeError as error:
                if not memory.is_out_of_memory(error):
                    raise
                if batch_size == 1:
                    raise RunError(too_large(options.max_new_tokens)) from error
            # Out here the handler is left, and with it the failed attempt's tensors are free.
            missing = [row.index for row in group if row.index not in finished]
            waiting.extendleft(reversed(by_activation(number, order, missing)))
            batch_size = min(batch_size, len(group)) // 2 or 1
            prefill_batch_size = min(prefill_batch_size, batch_size)
            memory.release(verbalizer.model.device)
            options.on_room(batch_size, prefill_batch_size)
            log.warning("out of memory while drawing; going on with at most %d rows at once", batch_size)


def _draw_group(
    verbalizer: PromptedModel, order: Order, group: Sequence[Row], options: Options, batch_size: int, prefill_batch_size: int
) -> Iterator[tuple[int, Draw]]:
    """Prompts of the group's activations once, then their forks: at once, unless one activation has more than batch_size.
    Yields draws with the index of their request."""
    activations = list(dict.fromkeys(row.request.row for row in group))
    place = {activation: i for i, activation in enumerate(activations)}
    vectors = order.vectors[torch.tensor(activations, device=order.vectors.device)]
    prompts = _prefill(verbalizer, vectors, prefill_batch_size)
    for start in range(0, len(group), batch_size):
        rows = list(group[start : start + batch_size])
        origin = torch.tensor([place[row.request.row] for row in rows], device=prompts.logits.device)
        yield from _decode(verbalizer, _fork(prompts.cache, origin), prompts.logits[origin], rows, options)


def _decode(
    verbalizer: PromptedModel, cache: Any, logits: Float[torch.Tensor, "row vocabulary"], rows: list[Row], options: Options
) -> Iterator[tuple[int, Draw]]:
    """One token per row and step until every row has ended; `live` are the rows of the batch that have not."""
    order, keys = rows[0].order, noise_keys(rows, logits.device)
    live = list(range(len(rows)))
    for step in range(options.max_new_tokens):
        options.ask_to_stop()
        sampled = gumbel_sampling.sample(
            logits, gumbel_sampling.step_keys(keys, step), temperature=order.temperature, top_p=options.top_p
        )
        append(rows, live, sampled)
        options.on_step(len(live))
        going_on = []
        for i in live:
            finish = finish_of(rows[i], verbalizer.stop_token_ids, options.max_new_tokens)
            if finish is None:
                going_on.append(i)
            else:
                yield rows[i].index, rows[i].draw(finish)
        live = going_on
        if not live:
            return
        tokens = sampled.token_ids
        if len(live) < LIVE_SHARE * len(rows):
            kept = torch.tensor(live, device=tokens.device)
            _select(cache, kept)
            tokens, keys = tokens[kept], keys[kept]
            rows, live = [rows[i] for i in live], list(range(len(live)))
        logits = _next_logits(verbalizer.model, tokens, cache)


def _next_logits(model: Any, tokens: Int[torch.Tensor, " row"], cache: Any) -> Float[torch.Tensor, "row vocabulary"]:
    """Logits after one more token per row; the cache grows in place.

    The hidden state of a single position is contiguous, so lm_head folds it into one 2-D product (measured 1.0-1.1x of a 2-D
    input). A slice out of several positions does not fold: 12x in float32 and 340x in bfloat16 for the last of 9.
    """
    output = model(input_ids=tokens[:, None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cast("torch.Tensor", output.logits)[:, -1]


def _prefill(verbalizer: PromptedModel, vectors: Float[torch.Tensor, "activation d_model"], prefill_batch_size: int) -> Prefill:
    """The prompt of every vector, as one Prefill."""
    parts = [verbalizer.prefill(batch) for batch in torch.split(vectors, prefill_batch_size)]
    lengths = {part.prompt_length for part in parts}
    assert len(lengths) == 1, f"prompts of one verbalizer differ in length: {sorted(lengths)} tokens"
    _check_cache(parts[0].cache)
    if len(parts) == 1:
        return parts[0]
    for layers in zip(*(part.cache.layers for part in parts), strict=True):
        layers[0].keys = torch.cat([layer.keys for layer in layers])
        layers[0].values = torch.cat([layer.values for layer in layers])
        for layer in layers[1:]:
            layer.keys = layer.values = None
    return Prefill(parts[0].cache, torch.cat([part.logits for part in parts]), parts[0].prompt_length)


def _fork(cache: Any, origin: Int[torch.Tensor, " row"]) -> Any:
    """A new cache whose row i is a copy of row origin[i]; `cache` stays as it is, ready for more forks."""
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    _select(forked, origin)
    return forked


def _select(cache: Any, rows: Int[torch.Tensor, " row"]) -> None:
    """Keeps these rows of every layer, in place, each on the device of its block."""
    for layer in cache.layers:
        layer.batch_select_indices(rows.to(layer.keys.device))


def _check_cache(cache: Any) -> None:
    """Forking copies keys and values; a layer with other state (recurrent, quantised, static) would be forked by halves."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    known = (DynamicLayer, DynamicSlidingWindowLayer)
    others = sorted({type(layer).__name__ for layer in cache.layers if type(layer) not in known})
    if others:
        raise RunError(
            f"the verbalizer's model keeps its past in layers of type {', '.join(others)}; draws can be forked only where every "
            "layer is full or sliding-window attention in a DynamicCache (Llama, Qwen2, Gemma-3, ...). Use an AV of that kind."
        )


def _next_group(waiting: deque[list[Row]], batch_size: int) -> list[Row]:
    """Takes as many whole activations as fit into batch_size rows, and at least one: so no prompt is ever run twice."""
    group = list(waiting.popleft())
    while waiting and len(group) + len(waiting[0]) <= batch_size:
        group += waiting.popleft()
    return group
