"""Work units: rectangles of activations x draws that are computed and published at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ACTIVATIONS_PER_WORK_UNIT = 64
DRAWS_PER_WORK_UNIT = 64
MAX_WORK_UNIT_SIZE = 1024
"""Largest work unit: number of activations, draws of each, and draws in all. Towards the end of a job of several ranks units are
smaller. A unit is published whole or not at all. Draws of one activation share a prefix, in drawing and in scoring, so a unit
extends over draws first."""


@dataclass(frozen=True, order=True)
class WorkUnit:
    """Draws that are computed and published at once: activations [first_row, last_row) x draws [first_draw, last_draw)."""

    first_row: int
    last_row: int
    first_draw: int
    last_draw: int

    @classmethod
    def of_grid(cls, num_activations: int, num_draws: int) -> WorkUnit:
        """Return the rectangle of the first draws of the first activations."""
        return WorkUnit(0, num_activations, 0, num_draws)

    @property
    def num_draws(self) -> int:
        """Number of draws in the rectangle."""
        return (self.last_row - self.first_row) * (self.last_draw - self.first_draw)

    @property
    def span(self) -> str:
        """The rectangle as it stands in file names; names sort as units do."""
        return f"{self.first_row:08d}-{self.last_row:08d}-{self.first_draw:05d}-{self.last_draw:05d}"

    def index(self) -> tuple[slice, slice]:
        """Return the index of the rectangle in an array [activation, draw]."""
        return slice(self.first_row, self.last_row), slice(self.first_draw, self.last_draw)

    def meets(self, num_activations: int, num_draws: int) -> bool:
        """Return whether the rectangle has any of the first draws of the first activations."""
        return self.first_row < num_activations and self.first_draw < num_draws


def missing_work_units(exists: np.ndarray) -> list[WorkUnit]:
    """Return the draws that are False in `exists` [activation, draw] as work units, on a grid that the number of draws fixes.

    Jobs that share draws but request different numbers of them may compute the same draw in units of different shapes; one of the
    two is then dropped. That is rare, and cheaper than small units for all.
    """
    draws = min(DRAWS_PER_WORK_UNIT, exists.shape[1])
    rows = min(ACTIVATIONS_PER_WORK_UNIT, MAX_WORK_UNIT_SIZE >> max(0, draws - 1).bit_length())  # a divisor of the 64
    units: list[WorkUnit] = []
    for row in range(0, exists.shape[0], rows):
        for draw in range(0, exists.shape[1], DRAWS_PER_WORK_UNIT):
            units += missing_rectangles(exists[row : row + rows, draw : draw + DRAWS_PER_WORK_UNIT], row, draw)
    return units


def missing_rectangles(exists: np.ndarray, row: int, draw: int) -> list[WorkUnit]:
    """Return what is False in a block [activation, draw] as few rectangles: neighbouring rows with the same gaps are joined.

    `row` and `draw` are the indices of the block's first activation and draw.
    """
    units: list[WorkUnit] = []
    for i, present in enumerate(exists):
        for first, last in _runs(~present):
            for index, unit in enumerate(units):
                if unit.last_row == row + i and (unit.first_draw, unit.last_draw) == (draw + first, draw + last):
                    units[index] = WorkUnit(unit.first_row, row + i + 1, unit.first_draw, unit.last_draw)
                    break
            else:
                units.append(WorkUnit(row + i, row + i + 1, draw + first, draw + last))
    return units


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
