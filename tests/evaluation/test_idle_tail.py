"""Ranks that take units from a shared queue: every draw once, and no rank idle for long at the end."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest

from ksweep.evaluation.distributed import Ranks, Solo, claim_indices
from ksweep.evaluation.draw_loop import split_units
from ksweep.inference.engine import REFILL_SHARE
from ksweep.inference.request import MOST_DRAWS
from ksweep.registry.work_units import WorkUnit, missing_work_units

MOST_TOKENS = 64


def cut(units: list[WorkUnit], num_ranks: int) -> list[WorkUnit]:
    """`split_units` of one cell's units, in another order than that of their rows."""
    order = np.random.default_rng(0).permutation(len(units))
    return [unit for _, unit in split_units([(cast("Any", None), units[i]) for i in order], num_ranks)]


@dataclass
class PretendRank:
    """Continuous batching in pretended time, with steps of given cost: refills as engine._SlotDecoder does where no draws share a
    slot."""

    mine: Iterator[int]
    pieces: list[WorkUnit]
    num_slots: int
    speed: float
    lengths: np.random.Generator
    rows: list[tuple[int, int]] = field(default_factory=list)
    """Tokens that each row under way has still to go, and its piece."""
    waiting: deque[tuple[int, int]] = field(default_factory=deque)
    ended: Counter[int] = field(default_factory=Counter)
    clock: float = 0.0

    def step(self) -> bool:
        """One more token of every row; whether there was one."""
        if self.num_slots - len(self.rows) >= max(1, REFILL_SHARE * self.num_slots):
            self._refill()
        if not self.rows:
            return False
        self.clock += (20.0 + len(self.rows)) / self.speed  # a step of n rows costs 20 + n, as on a CPU
        for left, index in self.rows:
            if left == 1:
                self._end(index)
        self.rows = [(left - 1, index) for left, index in self.rows if left > 1]
        return True

    def _end(self, index: int) -> None:
        self.ended[index] += 1
        if self.ended[index] == self.pieces[index].num_draws:
            self.clock += 7.0 * self.ended[index] / self.speed  # scored: a third of what drawing 22 tokens takes

    def _refill(self) -> None:
        while len(self.rows) < self.num_slots:
            if not self.waiting:
                if (index := next(self.mine, None)) is None:
                    return
                drawn = self.lengths.geometric(1 / 22, self.pieces[index].num_draws)
                self.waiting.extend((length, index) for length in np.minimum(drawn, MOST_TOKENS).tolist())
                self.clock += 4.0 * (self.pieces[index].last_row - self.pieces[index].first_row) / self.speed  # prompts
            self.rows.append(self.waiting.popleft())


def idle_share(num_activations: int, num_draws: int, speeds: tuple[float, ...], seed: int) -> float:
    """Of all the time that all ranks have, from the start until the last one ends, the part in which one has nothing to do."""
    cut_units = cut(missing_work_units(np.zeros((num_activations, num_draws), dtype=bool)), len(speeds))
    slots = min(MOST_DRAWS, -(-num_activations * num_draws // len(speeds)))
    ranks = cast("Ranks", Solo(world_size=len(speeds)))
    lengths = np.random.default_rng(seed)
    under_way = [PretendRank(claim_indices(ranks, "queue", len(cut_units)), cut_units, slots, speed, lengths) for speed in speeds]
    queue = [(0.0, number) for number in range(len(speeds))]
    while queue:  # whoever is earliest goes on, so units are taken in the order of time
        _, number = heapq.heappop(queue)
        if under_way[number].step():
            heapq.heappush(queue, (under_way[number].clock, number))
    ends = [rank.clock for rank in under_way]
    return 1 - sum(ends) / (len(ends) * max(ends))


@pytest.mark.slow
@pytest.mark.parametrize(("num_activations", "num_draws"), [(200, 64), (500, 16), (1000, 64), (100, 64)])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_idle_tail_of_usual_runs_stays_under_five_percent(num_activations: int, num_draws: int, num_ranks: int) -> None:
    found = [idle_share(num_activations, num_draws, (1.0,) * num_ranks, seed) for seed in range(5)]
    assert np.mean(found) < 0.05, found


@pytest.mark.parametrize(("num_activations", "num_draws", "num_ranks"), [(40, 8, 2), (100, 8, 2), (100, 8, 4), (200, 8, 4)])
def test_idle_tail_of_a_run_that_fits_into_the_slots_at_once_stays_under_a_tenth(
    num_activations: int, num_draws: int, num_ranks: int
) -> None:
    found = [idle_share(num_activations, num_draws, (1.0,) * num_ranks, seed) for seed in range(5)]
    assert np.mean(found) < 0.1, found


@pytest.mark.slow
def test_idle_tail_with_a_rank_at_two_thirds_of_the_speed_stays_under_five_percent() -> None:
    found = [idle_share(500, 64, (1.0, 0.67), seed) for seed in range(5)]
    assert np.mean(found) < 0.05, found


@pytest.mark.parametrize("num_ranks", [1, 2, 7])
def test_pieces_hold_every_missing_draw_once_in_the_order_of_their_units(num_ranks: int) -> None:
    there = np.random.default_rng(0).random((150, 40)) < 0.3
    units = missing_work_units(there)
    found = cut(units, num_ranks)
    counted: Counter[tuple[int, int]] = Counter()
    for unit in found:
        counted.update((a, k) for a in range(unit.first_row, unit.last_row) for k in range(unit.first_draw, unit.last_draw))
    assert counted == Counter(map(tuple, np.argwhere(~there).tolist()))
    if num_ranks == 1:
        assert len(found) == len(units)


def test_pieces_of_a_long_run_are_whole_units_but_for_its_end() -> None:
    units = missing_work_units(np.zeros((6400, 64), dtype=bool))
    found = cut(units, 8)
    assert [unit.num_draws for unit in found[:300]] == [1024] * 300
    assert found[-1].num_draws == 64 and len(found) < len(units) + 250
