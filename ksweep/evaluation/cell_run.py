"""The evaluation of one cell on this rank: what it needs, and how far it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ksweep.evaluation.distributed import Ranks
from ksweep.registry.cell_draws import CellDraws
from ksweep.registry.work_units import WorkUnit
from ksweep.utils.timing import Clock

if TYPE_CHECKING:
    import pyarrow as pa

    from ksweep.activations.store import ActivationTable
    from ksweep.config.spec import Cell
    from ksweep.evaluation.identity import CellKeys
    from ksweep.utils.notes import Note


@dataclass(eq=False)
class CellRun:
    """A cell that this rank is evaluating, with its activations, its draws and its progress."""

    cell: Cell
    keys: CellKeys
    clock: Clock
    vectors: ActivationTable
    store: CellDraws
    covered: np.ndarray
    """[activation, draw] True where the draw is stored already, or an earlier cell of the job draws it."""
    scored: np.ndarray
    """[activation, draw] True where the draw has scores already, or an earlier cell of the job scores it."""
    units: list[WorkUnit]
    """Work units that are drawn for this cell, by all ranks together."""
    notes: tuple[Note, ...] = ()
    """Notes from the checks of its checkpoints and activations."""
    num_drawn: int = 0
    """Draws that this rank has finished."""
    num_scored: int = 0
    """Draws that this rank has scored apart from drawing."""
    unpublished_tokens: int = 0
    """Tokens of finished draws whose unit is still in flight on this rank."""

    @property
    def grid(self) -> tuple[int, int]:
        """Number of activations, and of draws of each."""
        return self.covered.shape[0], self.covered.shape[1]

    @property
    def num_missing(self) -> int:
        """Draws to be taken, by all ranks."""
        return sum(unit.num_draws for unit in self.units)

    @property
    def num_unscored(self) -> int:
        """Draws to be scored, by all ranks."""
        return int((~self.scored).sum())

    def num_new_tokens(self, draws: pa.Table) -> int:
        """Count the tokens of those draws in the table that were drawn for this cell, by whichever rank."""
        new = ~self.covered[draws["activation"].to_numpy(), draws["draw"].to_numpy()]
        return int(draws["num_tokens"].to_numpy()[new].sum())

    def num_published_tokens(self) -> int:
        """Count the tokens that have been published for this cell so far."""
        draws = self.store.draws.read_seen(*self.grid, ["num_tokens"])
        return 0 if draws is None else self.num_new_tokens(draws)

    def is_complete(self) -> bool:
        """Return whether all draws are visible on disk with their scores."""
        return self.store.is_complete(*self.grid)


class CurrentCell:
    """The cell that a rank is working on: heartbeats name it, and a failure of the rank is recorded as its failure."""

    def __init__(self, ranks: Ranks) -> None:
        """Start without a current cell."""
        self.ranks, self.clock = ranks, Clock()

    def switch_to(self, keys: CellKeys, clock: Clock) -> None:
        """Attribute heartbeats and time to this cell."""
        if clock is not self.clock:
            self.clock = clock
            self.ranks.begin_cell(keys.cell, clock.seconds)
