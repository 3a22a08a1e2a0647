"""What is drawn, and what comes of it: orders, rows under way, draws. Shared by the sampler and its plain oracle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ksweep.inference import gumbel_sampling
from ksweep.utils.errors import RequestError, RunError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from ksweep.inference.backend import FinishReason


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


@dataclass(frozen=True, kw_only=True, eq=False)
class Order:
    """Draws that belong together, all sampled alike."""

    vectors: Float[torch.Tensor, "activation d_model"]
    requests: Sequence[Request]
    """Their rows are rows of `vectors`."""
    temperature: float
    seed: int

    def __post_init__(self) -> None:
        """Raises RequestError: a draw of a vector that is not there."""
        rows, n = [request.row for request in self.requests], len(self.vectors)
        if rows and not 0 <= min(rows) <= max(rows) < n:
            raise RequestError(f"draws were asked for of rows {min(rows)} to {max(rows)}, but there are {n} vectors")


@dataclass
class Row:
    """A request while it is decoded."""

    number: int
    """Of its order in the stream."""
    order: Order
    index: int
    """Place of the request in its order."""
    token_ids: list[int] = field(default_factory=list)
    log_probability: float = 0.0

    @property
    def request(self) -> Request:
        """What was asked for."""
        return self.order.requests[self.index]

    def draw(self, finish: FinishReason) -> Draw:
        """What came of it."""
        return Draw(self.request, tuple(self.token_ids), finish, self.log_probability)


@dataclass(frozen=True)
class Options:
    """What all orders of a stream have in common; see `decoding.stream`."""

    top_p: float
    max_new_tokens: int
    should_stop: Callable[[], bool]
    on_step: Callable[[int], None]
    on_room: Callable[[int, int], None]

    def ask_to_stop(self) -> None:
        """Raises StopRequested."""
        if self.should_stop():
            raise StopRequested


class StopRequested(Exception):
    """`should_stop` said so."""


def append(rows: Sequence[Row], live: Iterable[int], sampled: gumbel_sampling.Sample) -> None:
    """Adds a step's tokens to the live rows: the one transfer to the host (float64 holds token ids and float32 exactly)."""
    tokens, log_probabilities = torch.stack([sampled.token_ids.double(), sampled.log_probabilities.double()]).tolist()
    for i in live:
        if not math.isfinite(log_probabilities[i]):
            raise RunError(_not_finite(rows[i].request, len(rows[i].token_ids)))
        rows[i].token_ids.append(int(tokens[i]))
        rows[i].log_probability += log_probabilities[i]


def finish_of(row: Row, stop_token_ids: frozenset[int], max_new_tokens: int) -> FinishReason | None:
    """Why a row ends here, or None; a stop token in the last place still counts as "stop"."""
    if row.token_ids[-1] in stop_token_ids:
        return "stop"
    return "length" if len(row.token_ids) >= max_new_tokens else None


def noise_keys(rows: Sequence[Row], device: torch.device) -> Int[torch.Tensor, " row"]:
    """What the noise of each row is counted from."""
    seeds, requests = [row.order.seed for row in rows], [row.request for row in rows]
    return gumbel_sampling.row_keys(seeds, [r.activation_key for r in requests], [r.draw for r in requests], device)


def by_activation(number: int, order: Order, indices: Iterable[int]) -> list[list[Row]]:
    """Rows for requests of an order, those of an activation together, activations in the order of their first one."""
    together: dict[int, list[Row]] = {}
    for index in indices:
        together.setdefault(order.requests[index].row, []).append(Row(number, order, index))
    return list(together.values())


def _not_finite(request: Request, step: int) -> str:
    return (
        f"the verbalizer's logits are not finite for draw {request.draw} of the activation in row {request.row} "
        f"(key {request.activation_key}), at token {step}; nothing was sampled from them. Check that vector for NaN or extreme "
        "values, try autoencoder.dtype=bfloat16 or float32 if it is float16, and otherwise suspect damaged weights."
    )


def too_large(max_new_tokens: int) -> str:
    """What to say when a single row runs out of memory."""
    return (
        f"a single draw of up to {max_new_tokens} tokens does not fit into the accelerator's memory. Lower "
        "sampling.max_new_tokens, choose a smaller autoencoder.dtype, or use a GPU with more memory."
    )
