"""Batches of requests, draws in flight and finished draws, common to both engines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ksweep.inference import gumbel_sampling
from ksweep.utils.errors import NotFiniteError, RequestError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from ksweep.inference.prompts import FinishReason


@dataclass(frozen=True)
class Request:
    """One draw to take."""

    row: int
    """Row of the batch's vectors."""
    activation_key: int
    """64 bits that identify the activation itself, wherever it is stored (a hash of its provenance). Seeds the draw's noise."""
    draw: int
    """k: which of the activation's draws, counted from 0."""


@dataclass(frozen=True)
class Draw:
    """One sampled explanation, as tokens."""

    request: Request
    token_ids: tuple[int, ...]
    """Every token sampled, including the stop token where there is one: the tokens that were paid for."""
    finish: FinishReason
    log_probability: float
    """Sum over token_ids of the model's own log probabilities (temperature 1, no top_p), each float32."""

    @property
    def text_token_ids(self) -> tuple[int, ...]:
        """`token_ids` without the stop token."""
        return self.token_ids[:-1] if self.finish == "stop" else self.token_ids


@dataclass(frozen=True, kw_only=True, eq=False)
class DrawBatch:
    """Requests that are sampled alike and belong together, such as those of one work unit."""

    vectors: Float[torch.Tensor, "activation d_model"]
    requests: Sequence[Request]
    temperature: float
    seed: int

    def __post_init__(self) -> None:
        """Raise RequestError if a request names a row that `vectors` does not have."""
        rows, n = [request.row for request in self.requests], len(self.vectors)
        if rows and not 0 <= min(rows) <= max(rows) < n:
            raise RequestError(f"draws were requested for rows {min(rows)} to {max(rows)}, but there are {n} vectors")


@dataclass
class DrawInFlight:
    """A draw that is being decoded."""

    batch_number: int
    """Number of its batch in the stream."""
    batch: DrawBatch
    index: int
    """Index of its request in the batch."""
    token_ids: list[int] = field(default_factory=list)
    log_probability: float = 0.0

    @property
    def request(self) -> Request:
        """The request that it answers."""
        return self.batch.requests[self.index]

    def finished(self, finish: FinishReason) -> Draw:
        """Return the finished draw."""
        return Draw(self.request, tuple(self.token_ids), finish, self.log_probability)


MOST_DRAWS = 768
"""Draws in flight where memory allows and no batch size is given: some 500 slots, as draws that begin alike share them.
Measured on 1 thread of a CPU, 48 activations x 16 draws: tokens a second 625 at 384, 644 at 512, 655 and 667 at 768."""


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """Settings and callbacks that all batches of a stream share.

    Raises:
        RequestError: a size is below 1.
    """

    max_new_tokens: int
    top_p: float = 1.0
    batch_size: int | None = None
    """Most draws in flight. None: as many as memory allows, up to `MOST_DRAWS`."""
    num_draws: int | None = None
    """The number of draws to expect, if known: no more slots are made, and a batch that another rank could start with is not
    taken early."""
    prefill_batch_size: int = 64
    """Most prompts run at once."""
    should_stop: Callable[[], bool] = lambda: False
    """Called before every step; once it returns true the stream ends, and draws in flight are lost."""
    on_step: Callable[[int], None] = lambda _: None
    """Called after every step with the number of tokens sampled."""
    on_batch_sizes: Callable[[int, int], None] = lambda *_: None
    """Called with the most draws in flight and prompts at once, whenever these are set."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_draws", "prefill_batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"{name}={value} must be at least 1")

    @property
    def most_draws(self) -> int:
        """Most draws in flight, memory permitting."""
        most = self.batch_size or MOST_DRAWS
        return most if self.num_draws is None else min(most, self.num_draws)

    def raise_if_stopping(self) -> None:
        """Raise StopRequested if the caller wants to stop."""
        if self.should_stop():
            raise StopRequested


class StopRequested(Exception):
    """Ends a stream because `should_stop` returned true."""


def until_stopped(draws: Iterator[tuple[int, Draw]]) -> Iterator[tuple[int, Draw]]:
    """Yield the draws of a stream; end it quietly where StopRequested is raised."""
    try:
        yield from draws
    except StopRequested:
        return


def append_tokens(
    draws: Sequence[DrawInFlight], indices: Iterable[int], sample: Callable[..., gumbel_sampling.Sample]
) -> gumbel_sampling.Sample:
    """Sample a step's tokens and append them to the draws at `indices`. Returns the sample.

    Args:
        sample: `gumbel_sampling.sample` of the step's logits. It is called without waits of the host for the device; in the rare
            step in which a nucleus could not be told so, which the step's one transfer shows, it is called again with waits.

    Raises:
        NotFiniteError: logits were NaN or infinite.
    """
    sampled = sample()
    tokens, log_probabilities = _on_host(sampled)
    if gumbel_sampling.UNDECIDED in tokens:
        sampled = sample(may_wait=True)
        tokens, log_probabilities = _on_host(sampled)
    for i in indices:
        if not math.isfinite(log_probabilities[i]):
            raise NotFiniteError(not_finite_message(draws[i].request, len(draws[i].token_ids)))
        draws[i].token_ids.append(int(tokens[i]))
        draws[i].log_probability += log_probabilities[i]
    return sampled


def _on_host(sampled: gumbel_sampling.Sample) -> list[list[float]]:
    """Return tokens and log probabilities, in one transfer: float64 holds token ids and float32 exactly."""
    together: list[list[float]] = torch.stack([sampled.token_ids.double(), sampled.log_probabilities.double()]).tolist()
    return together


def finish_reason(draw: DrawInFlight, stop_token_ids: frozenset[int], max_new_tokens: int) -> FinishReason | None:
    """Return why a draw ends with its last token, None if it goes on. A stop token in the last place still counts as "stop"."""
    if draw.token_ids[-1] in stop_token_ids:
        return "stop"
    return "length" if len(draw.token_ids) >= max_new_tokens else None


def noise_keys(draws: Sequence[DrawInFlight], device: torch.device) -> Int[torch.Tensor, " draw"]:
    """Return the key that each draw's noise is computed from."""
    seeds, requests = [draw.batch.seed for draw in draws], [draw.request for draw in draws]
    return gumbel_sampling.draw_keys(seeds, [r.activation_key for r in requests], [r.draw for r in requests], device)


def group_by_activation(batch_number: int, batch: DrawBatch, indices: Iterable[int]) -> list[list[DrawInFlight]]:
    """Create draws for these requests of a batch, grouped by activation, in the order of each activation's first request."""
    groups: dict[int, list[DrawInFlight]] = {}
    for index in indices:
        groups.setdefault(batch.requests[index].row, []).append(DrawInFlight(batch_number, batch, index))
    return list(groups.values())


def not_finite_message(request: Request, step: int) -> str:
    """Return the message for logits that are not finite at a token of a draw."""
    return (
        f"the verbalizer's logits are not finite for draw {request.draw} of the activation in row {request.row} "
        f"(key {request.activation_key}), at token {step}; nothing was sampled from them. Check that vector for NaN or extreme "
        "values, try autoencoder.dtype=bfloat16 or float32 if it is float16, and otherwise suspect damaged weights."
    )


def draw_too_large_message(max_new_tokens: int) -> str:
    """Return the message for a single draw that runs out of memory."""
    return (
        f"a single draw of up to {max_new_tokens} tokens does not fit into the accelerator's memory. Lower "
        "sampling.max_new_tokens, choose a smaller autoencoder.dtype, or use a GPU with more memory."
    )
