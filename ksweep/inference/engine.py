"""Draws explanations: every activation's prompt runs once, and every draw is sampled with its own keyed noise.

What the prompts have in common runs once per process. The draws of an activation share a row of the batch for as long as their
tokens are the same, and fork where they part: an explanation's opening words, the first choices at a low temperature, and all of
it at temperature 0 are computed once for all draws. A row whose draws have ended leaves its slot at once, and room is refilled
with the next draws (continuous batching), of the next order where this one has none left. It never calls `generate()`, so nothing
of a checkpoint's generation_config (repetition penalty, top_k, ...) reaches the draws. Where a model's past cannot lie in slots,
the plain sampler draws the same.

Memory: a slot for every draw under way, of its prompt's own part and its new tokens, and the prompts of `prefill_batch_size`
activations. Running out of it halves both and goes on, with draws as of another batch size: see `stream`.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ksweep.inference import cuda_graphs, gumbel_sampling, kv_cache, memory
from ksweep.inference.naive_engine import draw_plainly
from ksweep.inference.request import (
    Draw,
    Options,
    Order,
    Request,
    Row,
    StopRequested,
    append,
    by_activation,
    finish_of,
    noise_keys,
    too_large,
)
from ksweep.utils.errors import RequestError, RunError

if TYPE_CHECKING:
    from jaxtyping import Float

    from ksweep.inference.backend import FinishReason, PromptedModel

__all__ = ["Draw", "Order", "Request", "as_vectors", "draw", "stream"]

log = logging.getLogger(__name__)

MOST_DRAWS = 768
"""Under way at once where memory allows and nothing else is asked for: some 500 rows, as draws that begin alike share them.
Measured on 1 thread of a CPU, 48 activations x 16 draws: tokens a second 625 at 384, 644 at 512, 655 and 667 at 768."""

MEMORY_SHARE = 0.5
"""Of the free memory, what slots may take; the rest is for the prompts, the logits and a step's own tensors."""

REFILL_SHARE = 0.25
"""More draws begin once there is room for this share of all: a prompt costs little more for many activations than for one."""


def as_vectors(vectors: np.ndarray) -> Float[torch.Tensor, "activation d_model"]:
    """A tensor of its own, so that a memory map stays untouched."""
    return torch.from_numpy(np.array(vectors, dtype=np.float32))


def draw(
    verbalizer: PromptedModel,
    vectors: Float[torch.Tensor, "activation d_model"],
    requests: Sequence[Request],
    *,
    temperature: float,
    top_p: float = 1.0,
    max_new_tokens: int,
    seed: int,
    batch_size: int | None = None,
    prefill_batch_size: int = 64,
    should_stop: Callable[[], bool] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Iterator[Draw]:
    """`stream` of a single order."""
    order = Order(vectors=vectors, requests=requests, temperature=temperature, seed=seed)
    drawn = stream(
        verbalizer, [order], top_p=top_p, max_new_tokens=max_new_tokens, batch_size=batch_size, num_draws=max(1, len(requests)),
        prefill_batch_size=prefill_batch_size, should_stop=should_stop, on_step=on_step,
    )  # fmt: skip
    return (one for _, one in drawn)


def stream(
    verbalizer: PromptedModel,
    orders: Iterable[Order],
    *,
    top_p: float = 1.0,
    max_new_tokens: int,
    batch_size: int | None = None,
    num_draws: int | None = None,
    prefill_batch_size: int = 64,
    should_stop: Callable[[], bool] | None = None,
    on_step: Callable[[int], None] | None = None,
    on_room: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, Draw]]:
    """Takes every draw of every order once; yields them as they finish, in no particular order, with their order's number.

    A draw is made of its vector, activation key, number k, the seed and the sampling options. In float32 any batch size, order,
    subset, company or number of ranks gives the same tokens, bit for bit. In bfloat16 another batch size rounds the logits
    otherwise, and where two tokens are nearly tied it takes the other: 15, 17 and 29 % of the demo pair's draws have other tokens
    at T = 0.4, 0.8 and 1.2 (on a CPU). Temperature 0 is greedy: all draws of an activation are equal.

    An order is asked for only when rows would otherwise stay idle, so rows of several are under way at once.

    Args:
        batch_size: most draws under way at once; None: as many as memory allows, up to `MOST_DRAWS`.
        num_draws: how many are to be expected, where that is known: room is made for no more, and an order that another rank
            could begin with is not taken early.
        prefill_batch_size: most prompts run at once.
        should_stop: asked before every step: once true no more draws come, and those under way are lost.
        on_step: hears after every step how many tokens were sampled.
        on_room: hears how many draws may be in flight and how many prompts run at once, whenever that is settled.
    """
    sizes = {
        "batch_size": batch_size,
        "num_draws": num_draws,
        "prefill_batch_size": prefill_batch_size,
        "max_new_tokens": max_new_tokens,
    }
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise RequestError(f"{name}={value} must be at least 1")
    options = Options(
        top_p, max_new_tokens, should_stop or (lambda: False), on_step or (lambda _: None), on_room or (lambda *_: None)
    )
    memory.keep_freed(verbalizer.model.device)
    fits = kv_cache.fits(verbalizer.model, verbalizer.prompt_length + max_new_tokens)
    sampler = _draw_all if fits else draw_plainly
    most_rows = batch_size or MOST_DRAWS
    if num_draws is not None:
        most_rows = min(most_rows, num_draws)
    return _until_stopped(sampler(verbalizer, enumerate(orders), options, most_rows, prefill_batch_size, batch_size is not None))


def _until_stopped(draws: Iterator[tuple[int, Draw]]) -> Iterator[tuple[int, Draw]]:
    try:
        yield from draws
    except StopRequested:
        return


# The decorator leaves inference mode at every yield; a `with` around a yield would put the caller into it as well.
@torch.inference_mode()
def _draw_all(
    verbalizer: PromptedModel,
    orders: Iterator[tuple[int, Order]],
    options: Options,
    most_rows: int,
    prefill_batch_size: int,
    fixed: bool,
) -> Iterator[tuple[int, Draw]]:
    """One stream; if it does not fit into memory, what it has not yielded yet is tried again in half as many slots."""
    backlog = _Backlog(orders)
    while backlog.has_more():
        attempt = _Stream(verbalizer, backlog, options, most_rows, prefill_batch_size, fixed)
        try:
            for row, finish in attempt.ended():
                backlog.settle(row)
                yield row.number, row.draw(finish)
            continue
        except RuntimeError as error:
            if not memory.is_out_of_memory(error):
                raise
            if attempt.num_slots == 1:
                raise RunError(too_large(options.max_new_tokens)) from error
        # Out here the handler is left; with the attempt, its tensors are free.
        most_rows, prefill_batch_size = attempt.num_slots // 2, max(1, prefill_batch_size // 2)
        del attempt
        memory.release(verbalizer.model.device)
        backlog.start_again()
        log.warning("out of memory while drawing; going on with at most %d draws at once", most_rows)


class _Backlog:
    """What is still to be drawn: of the orders that were taken, and those to come."""

    def __init__(self, orders: Iterator[tuple[int, Order]]) -> None:
        self._orders = orders
        self._open: dict[int, tuple[Order, dict[int, None]]] = {}
        """Orders of which draws are missing, and the indices of their requests."""
        self._waiting: deque[list[Row]] = deque()
        """Draws of activations whose prompt has not run."""

    def has_more(self) -> bool:
        """Whether an activation is waiting; asks for the next order if there is none."""
        while not self._waiting:
            number, order = next(self._orders, (0, None))
            if order is None:
                return False
            self._open[number] = order, dict.fromkeys(range(len(order.requests)))
            self._waiting.extend(by_activation(number, order, range(len(order.requests))))
        return True

    def take(self, num_draws: int, num_activations: int) -> list[list[Row]]:
        """The draws of the next activations: as many as have num_draws draws, the first one whatever it has; num_activations at
        most."""
        taken: list[list[Row]] = []
        left = num_draws
        while left > 0 and len(taken) < num_activations:
            # The next order is not asked for where its first activation would hardly fit.
            if taken and not self._waiting and len(taken[-1]) > left:
                break
            if not self.has_more() or (taken and len(self._waiting[0]) > left):
                break
            taken.append(self._waiting.popleft())
            left -= len(taken[-1])
        return taken

    def settle(self, row: Row) -> None:
        """A draw is done."""
        _, missing = self._open[row.number]
        del missing[row.index]
        if not missing:
            del self._open[row.number]

    def start_again(self) -> None:
        """Whatever is not done waits again."""
        self._waiting = deque(
            rows for number, (order, missing) in self._open.items() for rows in by_activation(number, order, missing)
        )


@dataclass
class _Prompts:
    """Prompts that have run, and the draws that are still to begin from them."""

    keys_and_values: list[tuple[torch.Tensor, torch.Tensor]]
    """Of every block, without what all prompts have in common: [activation, key_head, token, head_dim]."""
    logits: Float[torch.Tensor, "activation vocabulary"]
    length: int
    """Tokens of a prompt behind the common ones."""
    pending: deque[tuple[int, list[Row]]]
    """Of each prompt, its place and its draws."""

    def take(self, room: int) -> list[tuple[int, list[Row]]]:
        """Draws of the next prompts, those of a prompt together so that they share rows; only the first may have to be cut."""
        taken: list[tuple[int, list[Row]]] = []
        while room > 0 and self.pending and (len(self.pending[0][1]) <= room or not taken):
            place, rows = self.pending.popleft()
            if rest := rows[room:]:
                self.pending.appendleft((place, rest))
            taken.append((place, rows[:room]))
            room -= len(rows[:room])
        return taken


@dataclass
class _Stream:
    """Draws under way in slots; more come in as places fall free."""

    verbalizer: PromptedModel
    backlog: _Backlog
    options: Options
    num_slots: int
    prefill_batch_size: int
    fixed: bool
    """Whether there are num_slots whatever memory is free; otherwise perhaps fewer."""
    rows: list[Row] = field(default_factory=list)
    """Of slots 0, 1, 2, ..., those that share a slot one after the other: never more than there are slots, so that a fork always
    finds one."""
    counts: list[int] = field(default_factory=list)
    """[slot] how many of the rows share it: draws of an activation whose tokens are the same so far."""
    prompts: _Prompts | None = None
    prefix: Any = None
    cache: Any = None
    steps: cuda_graphs.Steps | None = None
    """Where steps can be recorded."""
    tokens: Any = None
    """[slot] last token of each, on the device."""
    keys: Any = None
    """[row] what each row's noise is counted from."""

    def ended(self) -> Iterator[tuple[Row, FinishReason]]:
        """Every row as it ends, and why."""
        self.prefix = self.verbalizer.prefix()
        while True:
            room = self.num_slots - len(self.rows)
            if room >= max(1, REFILL_SHARE * self.num_slots):
                yield from self._refill(room)
            if not self.rows:
                return
            yield from self._step()

    def _refill(self, room: int) -> Iterator[tuple[Row, FinishReason]]:
        """First tokens of as many draws as there is room for; those that end with it never take a slot."""
        while room > 0:
            if self.prompts is None or not self.prompts.pending:
                self.prompts = None
                if not (activations := self.backlog.take(room, self.prefill_batch_size)):
                    return
                self.prompts = self._run_prompts(activations)
                room = min(room, self._room(self.prompts) - len(self.rows))
            if self.rows and room < len(self.prompts.pending[0][1]) <= REFILL_SHARE * self.num_slots:
                return  # parts of an activation share less: it waits for the next time, when there is room for all of it
            going_on: int = yield from self._first_tokens(self.prompts, self.prompts.take(room))
            room -= going_on

    def _run_prompts(self, activations: list[list[Row]]) -> _Prompts:
        """The prompts of some activations, behind what they have in common."""
        self.options.ask_to_stop()
        vectors = torch.stack([rows[0].order.vectors[rows[0].request.row] for rows in activations])
        prefill = self.verbalizer.prefill(vectors, self.prefix)
        common = 0 if self.prefix is None else self.prefix.get_seq_length()
        past = [(layer.keys[:, :, common:], layer.values[:, :, common:]) for layer in prefill.cache.layers]
        return _Prompts(past, prefill.logits, prefill.prompt_length - common, deque(enumerate(activations)))

    def _room(self, prompts: _Prompts) -> int:
        """Slots that there are; makes them with the first prompts, which say how large they are."""
        if self.cache is None:
            capacity = prompts.length + self.options.max_new_tokens
            free = None if self.fixed else memory.free_bytes(prompts.logits.device)
            if free is not None:
                row = kv_cache.bytes_per_row(prompts.keys_and_values, capacity) + prompts.logits[0].nbytes
                self.num_slots = max(1, min(self.num_slots, int(MEMORY_SHARE * free / row)))
            self.options.on_room(self.num_slots, self.prefill_batch_size)
            self.cache = kv_cache.SlotCache(self.prefix, len(prompts.keys_and_values), self.num_slots, capacity)
            model = self.verbalizer.model
            self.steps = (
                cuda_graphs.Steps(model, self.cache, cuda_graphs.cuda_recorder(model.device)) if cuda_graphs.fits(model) else None
            )
        return self.num_slots

    def _first_tokens(
        self, prompts: _Prompts, taken: list[tuple[int, list[Row]]]
    ) -> Generator[tuple[Row, FinishReason], None, int]:
        """Sample from the prompts' logits and put what goes on into slots; returns how many draws do."""
        device = prompts.logits.device
        rows, counts = [row for _, theirs in taken for row in theirs], [len(theirs) for _, theirs in taken]
        places = torch.tensor([place for place, _ in taken], device=device)
        keys = noise_keys(rows, device)
        sampled = self._sampler(rows, counts, keys, 0)(prompts.logits[places])
        ended, alive = self._append(rows, sampled)
        yield from ended
        if not alive:
            return 0
        branches = _branches(rows, counts, alive)
        origin = places[torch.tensor([slot for slot, _ in branches], device=device)]  # a place for every branch
        past = [(k[origin.to(k.device)], v[origin.to(v.device)]) for k, v in prompts.keys_and_values]  # of their block's device
        self.cache.put(past, prompts.length)
        self._extend(rows, keys, sampled.token_ids, [theirs for _, theirs in branches])
        return len(alive)

    def _extend(self, rows: list[Row], keys: torch.Tensor, tokens: torch.Tensor, branches: list[list[int]]) -> None:
        """Slots for branches of these rows, behind those there are."""
        before = self.rows, self.counts, self.keys, self.tokens
        self._settle(rows, keys, tokens, branches)
        if before[0]:
            self.rows, self.counts = before[0] + self.rows, before[1] + self.counts
            self.keys, self.tokens = torch.cat([before[2], self.keys]), torch.cat([before[3], self.tokens])

    def _settle(self, rows: list[Row], keys: torch.Tensor, tokens: torch.Tensor, branches: list[list[int]]) -> None:
        """Slots 0, 1, 2, ... hold these branches of the rows, and nothing else."""
        kept = [i for theirs in branches for i in theirs]
        self.rows, self.counts = [rows[i] for i in kept], [len(theirs) for theirs in branches]
        self.keys = keys[torch.tensor(kept, device=keys.device, dtype=torch.long)]
        self.tokens = tokens[torch.tensor([theirs[0] for theirs in branches], device=tokens.device, dtype=torch.long)]

    def _step(self) -> Iterator[tuple[Row, FinishReason]]:
        """One more token of every row; rows that end leave, rows that part from those they share a slot with get their own."""
        self.options.ask_to_stop()
        taken = torch.tensor([len(row.token_ids) for row in self.rows], device=self.tokens.device)
        sampler = self._sampler(self.rows, self.counts, self.keys, taken)
        sampled = sampler(self._next_logits())
        ended, alive = self._append(self.rows, sampled)
        branches = _branches(self.rows, self.counts, alive)
        if len(alive) == len(branches) == len(self.rows) == len(self.counts):
            self.tokens = sampled.token_ids  # nothing was shared and nothing ended: every row keeps its slot
        else:
            order = self.cache.select([slot for slot, _ in branches])
            self._settle(self.rows, self.keys, sampled.token_ids, [branches[i][1] for i in order])
        yield from ended

    def _next_logits(self) -> Float[torch.Tensor, "row vocabulary"]:
        """Logits after each row's last token, whose keys and values go into its slot."""
        if self.steps is not None:
            return self.steps.logits(self.tokens)
        positions = self.cache.begin_step(self.tokens.device)
        logits = kv_cache.next_logits(self.verbalizer.model, self.cache, self.tokens, positions)
        self.cache.end_step()
        return logits

    def _sampler(
        self, rows: list[Row], counts: list[int], keys: torch.Tensor, step: int | torch.Tensor
    ) -> Callable[[torch.Tensor], gumbel_sampling.Sample]:
        """What takes a token of every row from logits, of which the i-th are for counts[i] rows, all of one order. What comes
        from the host is sent before the logits are computed: a copy waits for all that the device was given before."""
        temperatures = [rows[end - 1].order.temperature for end in itertools.accumulate(counts)]
        own = temperatures[0] if len(set(temperatures)) == 1 else torch.tensor(temperatures, device=keys.device)
        return partial(
            gumbel_sampling.sample, keys=gumbel_sampling.step_keys(keys, step), temperature=own, top_p=self.options.top_p,
            sharing=gumbel_sampling.sharing(counts, keys.device),
        )  # fmt: skip

    def _append(self, rows: list[Row], sampled: gumbel_sampling.Sample) -> tuple[list[tuple[Row, FinishReason]], list[int]]:
        """Add a token to each row; the rows that end with it, and the places of those that go on."""
        append(rows, range(len(rows)), sampled)
        self.options.on_step(len(rows))
        ended, alive = [], []
        for i, row in enumerate(rows):
            finish = finish_of(row, self.verbalizer.stop_token_ids, self.options.max_new_tokens)
            if finish is None:
                alive.append(i)
            else:
                ended.append((row, finish))
        return ended, alive


def _branches(rows: Sequence[Row], counts: Sequence[int], alive: Sequence[int]) -> list[tuple[int, list[int]]]:
    """The rows that go on, those together that shared a slot and took the same token now; and each branch's slot."""
    slot_of = [slot for slot, count in enumerate(counts) for _ in range(count)]
    together: dict[tuple[int, int], list[int]] = {}
    for i in alive:
        together.setdefault((slot_of[i], rows[i].token_ids[-1]), []).append(i)
    return [(slot, theirs) for (slot, _), theirs in together.items()]
