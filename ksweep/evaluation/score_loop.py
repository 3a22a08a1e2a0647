"""The score loop of a rank: claim blocks of a cell's grid and score the stored draws in them that have no scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ksweep.evaluation.cell_run import CellRun, CurrentCell
from ksweep.evaluation.distributed import Ranks, claim_indices
from ksweep.evaluation.draw_loop import split_units
from ksweep.evaluation.scoring import UnitScoring
from ksweep.registry.work_units import WorkUnit, missing_work_units


@dataclass
class ScoreLoop:
    """One rank's part of scoring what is drawn. No AV is needed."""

    ranks: Ranks
    current: CurrentCell

    def run(self, work: Mapping[CellRun, UnitScoring], queue: str) -> Iterator[CellRun]:
        """Score and publish this rank's part of the unscored draws; yields the cell of each unit as it is published.

        Ranks claim blocks of the grid, the same on every rank whatever each sees on disk, and look into a block when they have
        claimed it. Another job may score or draw meanwhile.

        Args:
            work: how each cell's units are scored.
            queue: name of the queue that the ranks share, the same on every rank; each pass needs its own.

        Raises:
            Stopped: a stop was requested.
        """
        if not work:
            return
        blocks = [(run, unit) for run in work for unit in missing_work_units(np.zeros(run.grid, dtype=bool))]
        pieces = split_units(blocks, self.ranks.world_size)
        # 1. See what is scored already, so that those blocks are passed over without listing directories again.
        scored = {run: run.store.coverage(*run.grid).scored for run in work}
        # 2. Claim blocks, and score what they lack.
        for index in claim_indices(self.ranks, queue, len(pieces)):
            run, block = pieces[index]
            if not scored[run][block.index()].all():
                yield from (run for _ in self.score(run, work[run], block))

    def score(self, run: CellRun, scoring: UnitScoring, block: WorkUnit) -> Iterator[None]:
        """Score the unscored draws in a block of a cell's grid, and yield after each unit."""
        for unit in run.store.unscored(block):
            self.current.switch_to(run.keys, run.clock)
            with run.clock("scoring"):
                self._report(run, scoring)
                draws = run.store.read_unit(unit)
                if draws is None:  # set aside as damaged a moment ago: a later start draws it again
                    continue
                run.store.publish_scores(unit, scoring.table(unit, draws), draws)
                run.num_scored += unit.num_draws
                self._report(run, scoring)
            yield

    def _report(self, run: CellRun, scoring: UnitScoring) -> None:
        self.ranks.report(f"{run.keys.label}: scoring", run.num_scored, run.num_unscored, **scoring.running_fve_numbers)
