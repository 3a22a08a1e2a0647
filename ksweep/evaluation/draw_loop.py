"""Draws of several cells in one stream of one AV: taken unit by unit, shared among the ranks, published as they end."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from ksweep.evaluation.cell_run import AtHand, Begun
from ksweep.evaluation.distributed import Ranks, Stopped, share
from ksweep.registry.draws import Unit

if TYPE_CHECKING:
    from ksweep.evaluation.scoring import UnitWork
    from ksweep.inference.engine import Draw, Order


PIECES_LEFT = 4
"""A piece of work is at most this part of a rank's share of what is left. Idle tails on 4 ranks in the simulation of the tests,
where a rank takes 768 draws at once: 200 activations x 64 draws 10 % in whole units, 2 % at 1, 2, 4, 8; 200 x 8, where a rank
takes all of its share at once, 29 %, 21 %, 8 % and 4 %. At 4 a long run ends in 20 to 30 small parts a rank."""


@dataclass
class _Open:
    """A unit under way."""

    cell: Begun
    unit: Unit
    draws: list[Draw] = field(default_factory=list)


@dataclass
class Drawing:
    """One rank's part of a stream. Cells differ in temperature, seed and activations, and share all else of the sampling.

    Cells follow one another, but the first rows of one fill the places that the last rows of another have left. The cell at hand
    is that of the oldest unit under way, and while a unit is scored, its own.
    """

    work: dict[Begun, UnitWork]
    batch_size: int | None
    ranks: Ranks
    at_hand: AtHand
    tokens: int = 0
    room: list[tuple[int, int]] = field(default_factory=list)
    """Draws in flight and prompts at once at most; a further entry where memory ran out and they were halved."""
    began: float = field(default_factory=time.monotonic)

    def run(self, order: int) -> Iterator[Begun]:
        """Draw, score and publish this rank's part of all that is missing; the cell of each unit as it is published.

        A stop is looked for at every step of the sampler and before every batch of prompts: it takes one of these at most, or,
        where a unit has just ended, its scoring.

        Args:
            order: seed of the order in which units are taken.

        Raises:
            Stopped: a stop was asked for; units that were under way are lost.
        """
        from ksweep.inference.engine import stream

        if not self.work:
            return
        ranks, (first, work) = self.ranks, next(iter(self.work.items()))
        sampling = first.cell.sampling
        begun: dict[int, _Open] = {}
        for number, draw in stream(
            work.av, self._orders(self._mine(order), begun), top_p=sampling.top_p, max_new_tokens=sampling.max_new_tokens,
            batch_size=self.batch_size, num_draws=-(-sum(cell.num_missing for cell in self.work) // ranks.world_size),
            should_stop=ranks.should_stop, on_room=lambda draws, prompts: self.room.append((draws, prompts)),
        ):  # fmt: skip
            one = begun[number]
            one.draws.append(draw)
            self._count(one.cell, len(draw.token_ids))
            self._report(next(iter(begun.values())).cell)
            if len(one.draws) == one.unit.num_draws:
                del begun[number]
                self._publish(one)
                yield one.cell
        if begun:
            lost = sum(len(one.draws) for one in begun.values())
            raise Stopped(f"stopped in the middle of {len(begun)} units: their {lost} finished draws are taken again")

    def batches(self) -> dict[str, str]:
        """How much this rank computes at once, for the record: in bfloat16 it decides how logits are rounded."""
        asked = {"batch_size": "auto" if self.batch_size is None else str(self.batch_size)}
        if not self.room:  # other ranks have drawn everything
            return asked
        draws, prompts = (" then ".join(map(str, dict.fromkeys(each))) for each in zip(*self.room, strict=True))
        texts = next(iter(self.work.values())).scored_at_once
        return asked | {"draws_in_flight": draws, "prompts_at_once": prompts, "texts_at_once": str(texts)}

    def _mine(self, order: int) -> Iterator[tuple[Begun, Unit]]:
        """Units that fall to this rank; of each what nobody has drawn meanwhile."""
        ranks, cells = self.ranks, list(self.work)
        # Cells of two jobs may share draws: in orders of their own they seldom take the same unit, and each leaves out what
        # the other has done.
        shuffled = [(cell, cell.units[i]) for cell in cells for i in np.random.default_rng(order).permutation(len(cell.units))]
        cut = pieces(shuffled, ranks.world_size)
        # The same cells may come twice in a job: the queue belongs to these and to what they found.
        queue = f"draws/{cells[0].keys.cell}/{sum(int(cell.before.sum()) for cell in cells)}"
        for index in share(ranks, queue, len(cut)):
            cell, unit = cut[index]
            yield from ((cell, part) for part in cell.store.still_missing(unit))

    def _orders(self, units: Iterable[tuple[Begun, Unit]], begun: dict[int, _Open]) -> Iterator[Order]:
        for number, (cell, unit) in enumerate(units):
            begun[number] = _Open(cell, unit)
            yield self.work[cell].order(unit)

    def _count(self, cell: Begun, tokens: int) -> None:
        cell.done += 1
        cell.unpublished += tokens
        self.tokens += tokens

    def _publish(self, one: _Open) -> None:
        self.at_hand.turn_to(one.cell.keys, one.cell.clock)
        one.cell.store.publish(one.unit, self.work[one.cell].scored(one.unit, one.draws))
        one.cell.unpublished -= sum(len(draw.token_ids) for draw in one.draws)
        self._report(one.cell)

    def _report(self, cell: Begun) -> None:
        """How far the cell at hand is; tokens a second are those of the stream."""
        self.at_hand.turn_to(cell.keys, cell.clock)
        rate = self.tokens / max(1e-9, time.monotonic() - self.began)
        numbers = self.work[cell].fve_so_far
        self.ranks.report(f"{cell.keys.label}: drawing", cell.done, cell.num_missing, tokens_per_second=rate, **numbers)


def pieces(units: Sequence[tuple[Begun, Unit]], num_ranks: int) -> list[tuple[Begun, Unit]]:
    """Units as ranks take them: whole at first, of fewer activations towards the end (guided self-scheduling, Polychronopoulos
    and Kuck 1987). Every rank comes to the same list."""
    if num_ranks == 1:
        return list(units)
    left = sum(unit.num_draws for _, unit in units)
    cut = []
    for cell, unit in units:
        draws, row = unit.last_draw - unit.first_draw, unit.first_row
        while row < unit.last_row:
            rows = min(unit.last_row - row, max(1, left // (PIECES_LEFT * num_ranks * draws)))
            cut.append((cell, replace(unit, first_row=row, last_row=row + rows)))
            row, left = row + rows, left - rows * draws
    return cut
