"""Which draws start next: the backlog of batches, prompts whose draws have not all started, and draws that share a slot."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ksweep.inference.request import DrawBatch, DrawInFlight, group_by_activation

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float


class Backlog:
    """Draws that are not finished: of the batches taken so far, and of those still to come."""

    def __init__(self, batches: Iterator[tuple[int, DrawBatch]]) -> None:
        """Take no batch yet; `batches` are numbered."""
        self._batches = batches
        self._unfinished: dict[int, tuple[DrawBatch, dict[int, None]]] = {}
        """Batches with unfinished draws, and the indices of those draws' requests."""
        self._waiting: deque[list[DrawInFlight]] = deque()
        """Draws of activations whose prompt has not run."""

    def has_more(self) -> bool:
        """Return whether an activation is waiting; takes the next batch if none is."""
        while not self._waiting:
            number, batch = next(self._batches, (0, None))
            if batch is None:
                return False
            indices = range(len(batch.requests))
            self._unfinished[number] = batch, dict.fromkeys(indices)
            self._waiting.extend(group_by_activation(number, batch, indices))
        return True

    def take(self, num_draws: int, num_activations: int) -> list[list[DrawInFlight]]:
        """Return the draws of the next activations: at most `num_activations` of them, with at most `num_draws` draws together.

        The first activation is returned however many draws it has.
        """
        taken: list[list[DrawInFlight]] = []
        free = num_draws
        while free > 0 and len(taken) < num_activations:
            # The next batch is not taken where its first activation would hardly fit.
            if taken and not self._waiting and len(taken[-1]) > free:
                break
            if not self.has_more() or (taken and len(self._waiting[0]) > free):
                break
            taken.append(self._waiting.popleft())
            free -= len(taken[-1])
        return taken

    def mark_finished(self, draw: DrawInFlight) -> None:
        """Record that a draw is finished, so that no retry takes it again."""
        _, unfinished = self._unfinished[draw.batch_number]
        del unfinished[draw.index]
        if not unfinished:
            del self._unfinished[draw.batch_number]

    def requeue_unfinished(self) -> None:
        """Let every unfinished draw of the batches taken so far wait again."""
        self._waiting = deque(
            draws
            for number, (batch, unfinished) in self._unfinished.items()
            for draws in group_by_activation(number, batch, unfinished)
        )


@dataclass
class PromptQueue:
    """Prompts that have run, with the draws still to start from them."""

    keys_and_values: list[tuple[torch.Tensor, torch.Tensor]]
    """Of every block, without the prefix that all prompts share: [activation, key_head, token, head_dim]."""
    logits: Float[torch.Tensor, "activation vocabulary"]
    length: int
    """Tokens of a prompt behind the shared prefix."""
    waiting: deque[tuple[int, list[DrawInFlight]]]
    """The index of each prompt with draws to start, and these draws."""

    def take(self, free: int) -> list[tuple[int, list[DrawInFlight]]]:
        """Return draws for `free` slots, whole activations so that their draws share slots; only the first may be cut."""
        taken: list[tuple[int, list[DrawInFlight]]] = []
        while free > 0 and self.waiting and (len(self.waiting[0][1]) <= free or not taken):
            prompt, draws = self.waiting.popleft()
            if rest := draws[free:]:
                self.waiting.appendleft((prompt, rest))
            taken.append((prompt, draws[:free]))
            free -= len(draws[:free])
        return taken


def group_by_text(draws: Sequence[DrawInFlight], counts: Sequence[int], going_on: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Group the draws that go on by the slot they shared and the token they took: each group shares a slot from now on.

    Args:
        draws: ordered by slot.
        counts: number of draws in each slot.
        going_on: indices of draws that have not ended.

    Returns:
        Each group's slot so far, and the indices of its draws.
    """
    slot_of = [slot for slot, count in enumerate(counts) for _ in range(count)]
    groups: dict[tuple[int, int], list[int]] = {}
    for i in going_on:
        groups.setdefault((slot_of[i], draws[i].token_ids[-1]), []).append(i)
    return [(slot, group) for (slot, _), group in groups.items()]
