"""Draws explanations: the prompt runs once per activation, is forked K ways, and every row is sampled with its own keyed
noise.

This is the plain sampler, the one that others are held against: the rows of a group all have the same length, so there is no
padding, no mask and no position to get wrong; rows that end leave, and their places stay empty until the group is done. It
never calls `generate()`, so nothing of a checkpoint's generation_config (repetition penalty, top_k, ...) reaches the draws.

Memory: each fork holds its own copy of the prompt's keys and values, `batch_size` of them at most, beside one copy per
activation of the group; transformers' DynamicCache holds one layer twice while it grows. Out of memory on a GPU halves the
batch and goes on; the draws are the same.
"""

from __future__ import annotations

import copy
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from ksweep.autoencoder import noise
from ksweep.autoencoder.protocol import Prefill
from ksweep.errors import RequestError, RunError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from ksweep.autoencoder.protocol import FinishReason, Verbalizer

log = logging.getLogger(__name__)

LIVE_SHARE = 0.9
"""Rows that have ended are dropped from the batch once fewer than this share of it is live. Measured on a CPU (256 rows, lengths
geometric with mean 14 of at most 32): 2.1x the speed of never dropping, 2.0x at 0.75, 1.8x at 0.5, no more at 1.0."""


@dataclass(frozen=True)
class Request:
    """One draw to be taken."""

    row: int
    """Row of the vectors."""
    activation_key: int
    """64 bits that stand for the activation itself, wherever it lies (a hash of its provenance): its noise starts from them."""
    draw: int
    """k: which of the activation's draws, counted from 0."""


@dataclass(frozen=True)
class Draw:
    """One sampled explanation, as tokens."""

    request: Request
    token_ids: tuple[int, ...]
    """Every token sampled, the stop token included where there is one: the tokens that were paid for."""
    finish: FinishReason
    log_probability: float
    """Sum over token_ids of the model's own log probabilities (temperature 1, no top_p), each float32."""

    @property
    def text_token_ids(self) -> tuple[int, ...]:
        """token_ids without the stop token."""
        return self.token_ids[:-1] if self.finish == "stop" else self.token_ids


@dataclass
class _Row:
    """A request while it is decoded."""

    index: int
    """Place of the request in what was asked for."""
    request: Request
    token_ids: list[int]
    log_probability: float = 0.0


@dataclass(frozen=True)
class _Options:
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    should_stop: Callable[[], bool]
    on_step: Callable[[int], None]


class _StopRequested(Exception):
    """`should_stop` said so."""


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
    _check(vectors, requests, batch_size, prefill_batch_size, max_new_tokens)
    options = _Options(temperature, top_p, max_new_tokens, seed, should_stop or (lambda: False), on_step or (lambda _: None))
    return _draw_all(verbalizer, vectors, requests, options, batch_size, prefill_batch_size)


# The decorator leaves inference mode at every yield; a `with` around a yield would put the caller into it as well.
@torch.inference_mode()
def _draw_all(
    verbalizer: Verbalizer,
    vectors: Float[torch.Tensor, "activation d_model"],
    requests: Sequence[Request],
    options: _Options,
    batch_size: int,
    prefill_batch_size: int,
) -> Iterator[Draw]:
    """Group after group; of one that does not fit into memory, what it has not yielded yet is tried again at half the size."""
    waiting = deque(_by_activation(requests, range(len(requests))))
    while waiting:
        group = _next_group(waiting, batch_size)
        finished = set()
        try:
            for index, explanation in _draw_group(verbalizer, vectors, requests, group, options, batch_size, prefill_batch_size):
                finished.add(index)
                yield explanation
            continue
        except _StopRequested:
            return
        except torch.OutOfMemoryError as error:
            if batch_size == 1:
                raise RunError(_too_large(options.max_new_tokens)) from error
        # Out here the handler is left, and with it the failed attempt's tensors are free.
        waiting.extendleft(reversed(_by_activation(requests, (index for index in group if index not in finished))))
        batch_size = min(batch_size, len(group)) // 2 or 1
        prefill_batch_size = min(prefill_batch_size, batch_size)
        torch.cuda.empty_cache()
        log.warning("out of memory while drawing; going on with at most %d rows at once", batch_size)


def _draw_group(
    verbalizer: Verbalizer,
    vectors: Float[torch.Tensor, "activation d_model"],
    requests: Sequence[Request],
    group: Sequence[int],
    options: _Options,
    batch_size: int,
    prefill_batch_size: int,
) -> Iterator[tuple[int, Draw]]:
    """Prompts of the group's activations once, then their forks: at once, unless one activation has more than batch_size."""
    activations = list(dict.fromkeys(requests[index].row for index in group))
    place = {row: i for i, row in enumerate(activations)}
    prompts = _prefill(verbalizer, vectors[torch.tensor(activations, device=vectors.device)], prefill_batch_size)
    for start in range(0, len(group), batch_size):
        rows = [_Row(index, requests[index], []) for index in group[start : start + batch_size]]
        origin = torch.tensor([place[row.request.row] for row in rows], device=prompts.logits.device)
        yield from _decode(verbalizer, _fork(prompts.cache, origin), prompts.logits[origin], rows, options)


def _decode(
    verbalizer: Verbalizer,
    cache: Any,
    logits: Float[torch.Tensor, "row vocabulary"],
    rows: list[_Row],
    options: _Options,
) -> Iterator[tuple[int, Draw]]:
    """One token per row and step until every row has ended; `live` are the rows of the batch that have not."""
    keys = _keys(rows, options.seed, logits.device)
    live = list(range(len(rows)))
    for step in range(options.max_new_tokens):
        if options.should_stop():
            raise _StopRequested
        sampled = noise.sample(logits, noise.step_keys(keys, step), temperature=options.temperature, top_p=options.top_p)
        _append(rows, live, sampled, step)
        options.on_step(len(live))
        going_on = []
        for i in live:
            finish = _finish(rows[i].token_ids, verbalizer.stop_token_ids, options.max_new_tokens)
            if finish is None:
                going_on.append(i)
            else:
                yield rows[i].index, Draw(rows[i].request, tuple(rows[i].token_ids), finish, rows[i].log_probability)
        live = going_on
        if not live:
            return
        tokens = sampled.token_ids
        if len(live) < LIVE_SHARE * len(rows):
            kept = torch.tensor(live, device=tokens.device)
            cache.batch_select_indices(kept)
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


def _append(rows: Sequence[_Row], live: Sequence[int], sampled: noise.Sample, step: int) -> None:
    """Adds a step's tokens to the live rows: the one transfer to the host (float64 holds token ids and float32 exactly)."""
    tokens, log_probabilities = torch.stack([sampled.token_ids.double(), sampled.log_probabilities.double()]).tolist()
    for i in live:
        if not math.isfinite(log_probabilities[i]):
            raise RunError(_not_finite(rows[i].request, step))
        rows[i].token_ids.append(int(tokens[i]))
        rows[i].log_probability += log_probabilities[i]


def _finish(token_ids: Sequence[int], stop_token_ids: frozenset[int], max_new_tokens: int) -> FinishReason | None:
    """Why a row ends here, or None; a stop token in the last place still counts as "stop"."""
    if token_ids[-1] in stop_token_ids:
        return "stop"
    return "length" if len(token_ids) >= max_new_tokens else None


def _keys(rows: Sequence[_Row], seed: int, device: torch.device) -> Int[torch.Tensor, " row"]:
    requests = [row.request for row in rows]
    return noise.row_keys(seed, [r.activation_key for r in requests], [r.draw for r in requests], device)


def _prefill(verbalizer: Verbalizer, vectors: Float[torch.Tensor, "activation d_model"], prefill_batch_size: int) -> Prefill:
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
    forked.batch_select_indices(origin)
    return forked


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


def _by_activation(requests: Sequence[Request], indices: Iterable[int]) -> list[list[int]]:
    """Indices of the requests of each activation, activations in the order of their first one."""
    together: dict[int, list[int]] = {}
    for index in indices:
        together.setdefault(requests[index].row, []).append(index)
    return list(together.values())


def _next_group(waiting: deque[list[int]], batch_size: int) -> list[int]:
    """Takes as many whole activations as fit into batch_size rows, and at least one: so no prompt is ever run twice."""
    group = list(waiting.popleft())
    while waiting and len(group) + len(waiting[0]) <= batch_size:
        group += waiting.popleft()
    return group


def _not_finite(request: Request, step: int) -> str:
    return (
        f"the verbalizer's logits are not finite for draw {request.draw} of the activation in row {request.row} "
        f"(key {request.activation_key}), at token {step}; nothing was sampled from them. Check that vector for NaN or extreme "
        "values, try autoencoder.dtype=bfloat16 or float32 if it is float16, and otherwise suspect damaged weights."
    )


def _too_large(max_new_tokens: int) -> str:
    return (
        f"a single draw of up to {max_new_tokens} tokens does not fit into the accelerator's memory. Lower "
        "sampling.max_new_tokens, choose a smaller autoencoder.dtype, or use a GPU with more memory."
    )


def _check(
    vectors: torch.Tensor, requests: Sequence[Request], batch_size: int, prefill_batch_size: int, max_new_tokens: int
) -> None:
    sizes = {"batch_size": batch_size, "prefill_batch_size": prefill_batch_size, "max_new_tokens": max_new_tokens}
    for name, value in sizes.items():
        if value < 1:
            raise RequestError(f"{name}={value} must be at least 1")
    rows = [request.row for request in requests]
    if rows and not 0 <= min(rows) <= max(rows) < len(vectors):
        raise RequestError(f"draws were asked for of rows {min(rows)} to {max(rows)}, but there are {len(vectors)} vectors")
