"""A cell while it is evaluated on this rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ksweep.evaluation.distributed import Ranks
from ksweep.registry.draws import DrawsStore, Unit
from ksweep.utils.timing import Clock

if TYPE_CHECKING:
    import pyarrow as pa

    from ksweep.activations.store import ActivationTable
    from ksweep.config.spec import Cell
    from ksweep.evaluation.identity import Keys
    from ksweep.utils.notes import Note


@dataclass(eq=False)
class Begun:
    """A cell that is being measured."""

    cell: Cell
    keys: Keys
    clock: Clock
    vectors: ActivationTable
    store: DrawsStore
    before: np.ndarray
    """[activation, draw] what need not be drawn for it: it is there, or an earlier cell of the job draws it."""
    units: list[Unit]
    """What is to be drawn for it."""
    notes: tuple[Note, ...] = ()
    """What checks of its checkpoints and activations say."""
    done: int = 0
    """Draws that this rank has finished."""
    unpublished: int = 0
    """Tokens of those of them whose unit is still under way."""

    @property
    def wanted(self) -> tuple[int, int]:
        """Activations, and draws of each."""
        return self.before.shape[0], self.before.shape[1]

    @property
    def num_missing(self) -> int:
        """Draws to be taken, by all ranks."""
        return sum(unit.num_draws for unit in self.units)

    def num_tokens_drawn(self, draws: pa.Table) -> int:
        """Of these draws of it, as far as they were drawn for it, by whichever rank."""
        new = ~self.before[draws["activation"].to_numpy(), draws["draw"].to_numpy()]
        return int(draws["num_tokens"].to_numpy()[new].sum())

    def num_tokens_seen(self) -> int:
        """Of what has been published for it so far."""
        draws = self.store.read_seen(*self.wanted, ["num_tokens"])
        return 0 if draws is None else self.num_tokens_drawn(draws)

    def is_whole(self) -> bool:
        """Whether all its draws are to be seen."""
        return bool(self.store.coverage(*self.wanted).all())


class AtHand:
    """Which cell a rank is at: it is told to whoever watches, and blamed if the rank fails."""

    def __init__(self, ranks: Ranks) -> None:
        """None yet."""
        self.ranks, self.clock = ranks, Clock()

    def turn_to(self, keys: Keys, clock: Clock) -> None:
        """From now on this one."""
        if clock is not self.clock:
            self.clock = clock
            self.ranks.begin_cell(keys.cell, clock.seconds)
