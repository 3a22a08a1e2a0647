"""The draw loop of a rank: claim work units, draw them in one stream, publish each as it ends, and score it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from ksweep.evaluation.cell_run import CellRun, CurrentCell
from ksweep.evaluation.distributed import Ranks, Stopped, claim_indices
from ksweep.registry.scores import scored_unit
from ksweep.registry.work_units import WorkUnit
from ksweep.utils.errors import RunError

if TYPE_CHECKING:
    from ksweep.evaluation.scoring import UnitScoring
    from ksweep.evaluation.unit_drawing import UnitDrawing
    from ksweep.inference.engine import Draw, DrawBatch


PIECES_PER_SHARE = 4
"""A piece of work is at most this part of a rank's share of the draws that are left. Idle tails on 4 ranks in the simulation of
the tests, where a rank has 768 draws in flight: 200 activations x 64 draws 10 % in whole units, 2 % at 1, 2, 4, 8; 200 x 8, where
a rank draws all of its share at once, 29 %, 21 %, 8 % and 4 %. At 4 a long run ends in 20 to 30 small pieces a rank."""


@dataclass
class _PendingUnit:
    """A claimed work unit whose draws are in flight."""

    run: CellRun
    unit: WorkUnit
    draws: list[Draw] = field(default_factory=list)

    def is_complete(self) -> bool:
        return len(self.draws) == self.unit.num_draws


@dataclass
class DrawLoop:
    """One rank's part of a stream of cells that share the AV, engine, top_p and max_new_tokens.

    Cells follow one another, but the first rows of one fill the slots that the last rows of another have left. The current cell
    is that of the oldest pending unit, and while a unit is scored, the unit's own.
    """

    batch_size: int | None
    ranks: Ranks
    current: CurrentCell
    work: Mapping[CellRun, UnitDrawing] = field(default_factory=dict)
    scoring: Mapping[CellRun, UnitScoring] = field(default_factory=dict)
    batch_limits: list[tuple[int, int]] = field(default_factory=list)
    """Most draws and prompts in flight; a further entry for each time memory ran out and they were halved."""
    num_tokens: int = 0
    started: float = field(default_factory=time.monotonic)

    def run(
        self, work: Mapping[CellRun, UnitDrawing], scoring: Mapping[CellRun, UnitScoring], queue: str, order_seed: int
    ) -> Iterator[CellRun]:
        """Draw and publish this rank's part of all missing draws; yields the cell of each unit as it is published.

        Draws are published before they are scored: a job that ends in between has lost nothing, and its next start only scores.
        A stop request is checked at every step of the sampler and before every batch of prompts, so stopping takes one of these,
        or, where a unit has just ended, its scoring.

        Args:
            work: how each cell's units are drawn.
            scoring: how they are scored; cells that it lacks are scored later (`ScoreLoop`).
            queue: name of the queue that the ranks share, the same on every rank; each stream needs its own.
            order_seed: seed of the order in which units are claimed.

        Raises:
            Stopped: a stop was requested; the draws of pending units are lost.
            RunError: the engine left out draws.
        """
        if not work:
            return
        self.work, self.scoring, self.started = work, scoring, time.monotonic()
        pending: dict[int, _PendingUnit] = {}
        # 1. Claim units as the engine asks for more draws (`_stream` pulls from `_claim_units`).
        # 2. Collect the draws as they end, in any order.
        for number, draw in self._stream(self._draw_batches(queue, order_seed, pending)):
            unit = pending[number]
            unit.draws.append(draw)
            self._count_draw(unit.run, len(draw.token_ids))
            self._report(next(iter(pending.values())).run)
            # 3. Publish a unit when its last draw has ended, and score it.
            if unit.is_complete():
                del pending[number]
                self._publish(unit)
                yield unit.run
        # 4. The engine ends early only when a stop was requested.
        if pending and not self.ranks.should_stop():
            num_left = sum(unit.unit.num_draws - len(unit.draws) for unit in pending.values())
            engine = next(iter(work)).cell.sampling.engine
            raise RunError(
                f"sampling.engine={engine} ended without {num_left} of the draws that it was asked for: an engine yields one "
                "draw for each request, or ends early when should_stop() returns true"
            )
        if pending:
            num_lost = sum(len(unit.draws) for unit in pending.values())
            raise Stopped(f"stopped in the middle of {len(pending)} units: their {num_lost} finished draws are taken again")

    def batch_settings(self) -> dict[str, str]:
        """Return this rank's batch sizes for the run record: in bfloat16 they decide how logits are rounded."""
        requested = {"batch_size": "auto" if self.batch_size is None else str(self.batch_size)}
        if not self.batch_limits:  # other ranks have drawn everything
            return requested
        draws, prompts = (" then ".join(map(str, dict.fromkeys(each))) for each in zip(*self.batch_limits, strict=True))
        scoring = next(iter(self.scoring.values()), None)
        texts = {} if scoring is None else {"texts_at_once": str(scoring.texts_at_once)}
        return requested | {"draws_in_flight": draws, "prompts_at_once": prompts} | texts

    def forget_models(self) -> None:
        """Drop the references to AV and AR, so that their memory can be freed."""
        self.work, self.scoring = {}, {}

    def _stream(self, batches: Iterable[DrawBatch]) -> Iterator[tuple[int, Draw]]:
        from ksweep.inference.backend import engine_for
        from ksweep.inference.request import DecodingOptions

        run, work = next(iter(self.work.items()))
        num_draws = -(-sum(other.num_missing for other in self.work) // self.ranks.world_size)
        options = DecodingOptions(
            top_p=run.cell.sampling.top_p, max_new_tokens=run.cell.sampling.max_new_tokens,
            batch_size=self.batch_size, num_draws=num_draws, should_stop=self.ranks.should_stop,
            on_batch_sizes=lambda draws, prompts: self.batch_limits.append((draws, prompts)),
        )  # fmt: skip
        return engine_for(run.cell.sampling.engine, work.av).generate(work.av, batches, options)

    def _draw_batches(self, queue: str, order_seed: int, pending: dict[int, _PendingUnit]) -> Iterator[DrawBatch]:
        for number, (run, unit) in enumerate(self._claim_units(queue, order_seed)):
            pending[number] = _PendingUnit(run, unit)
            yield self.work[run].batch(unit)

    def _claim_units(self, queue: str, order_seed: int) -> Iterator[tuple[CellRun, WorkUnit]]:
        """Yield the work units this rank claims, minus draws another rank has already published."""
        runs = list(self.work)
        # Cells of two jobs may share draws. In orders of their own the jobs seldom claim the same unit, and each leaves out the
        # draws that the other has published.
        permutations = [np.random.default_rng(order_seed).permutation(len(run.units)) for run in runs]
        shuffled = [(run, run.units[i]) for run, order in zip(runs, permutations, strict=True) for i in order]
        pieces = split_units(shuffled, self.ranks.world_size)
        for index in claim_indices(self.ranks, queue, len(pieces)):
            run, unit = pieces[index]
            yield from ((run, part) for part in run.store.still_missing(unit))

    def _count_draw(self, run: CellRun, num_tokens: int) -> None:
        run.num_drawn += 1
        run.unpublished_tokens += num_tokens
        self.num_tokens += num_tokens

    def _publish(self, pending: _PendingUnit) -> None:
        run, unit = pending.run, pending.unit
        self.current.switch_to(run.keys, run.clock)
        draws = run.store.publish_draws(unit, self.work[run].table(unit, pending.draws))
        if run in self.scoring:
            run.store.publish_scores(scored_unit(unit), self.scoring[run].table(unit, draws), draws)
        run.unpublished_tokens -= sum(len(draw.token_ids) for draw in pending.draws)
        self._report(run)

    def _report(self, run: CellRun) -> None:
        """Make the cell current and report its progress; tokens per second are those of the whole stream."""
        self.current.switch_to(run.keys, run.clock)
        rate = self.num_tokens / max(1e-9, time.monotonic() - self.started)
        fve = self.scoring[run].running_fve_numbers if run in self.scoring else {}
        self.ranks.report(f"{run.keys.label}: drawing", run.num_drawn, run.num_missing, tokens_per_second=rate, **fve)


def split_units(units: Sequence[tuple[CellRun, WorkUnit]], num_ranks: int) -> list[tuple[CellRun, WorkUnit]]:
    """Split units into the pieces that ranks claim: whole units at first, of fewer activations towards the end.

    This is guided self-scheduling (Polychronopoulos and Kuck 1987). Every rank computes the same list.
    """
    if num_ranks == 1:
        return list(units)
    num_left = sum(unit.num_draws for _, unit in units)
    pieces = []
    for run, unit in units:
        draws, row = unit.last_draw - unit.first_draw, unit.first_row
        while row < unit.last_row:
            rows = min(unit.last_row - row, max(1, num_left // (PIECES_PER_SHARE * num_ranks * draws)))
            pieces.append((run, replace(unit, first_row=row, last_row=row + rows)))
            row, num_left = row + rows, num_left - rows * draws
    return pieces
