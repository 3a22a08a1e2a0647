"""The reference sweep's own quantities of a checkpoint's stored draws, block by block: no model and little memory is needed.

By their definition the best of K is that of the first K draws, whatever the cell's `scoring.selection` makes of its curve. Which
draw that is follows from stored errors; its reconstruction is in the draws store (see its SCHEMA), and one of `ROWS_PER_UNIT`
activations at a time is read. Formulas: `stats/reference.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ksweep.registry.draws import ROWS_PER_UNIT, DrawsStore, Unit
from ksweep.stats.tae_metrics import (
    FEWEST_FOR_INTERVALS,
    Chunk,
    ReferenceInterval,
    ReferenceSums,
    prefix_of_k_draws,
    reference_intervals,
    reference_rows,
)
from ksweep.utils.notes import REFERENCE_QUANTITIES, Note

CHUNK_VALUES = 2**24
"""float64 values [activation, K, d] taken in at once: 128 MiB, and as much again for each of a few intermediate steps."""

REPLICATE_VALUES = 2**26
"""float64 values [K, replicate, d] of the bootstrap held at once, 512 MiB; more values of K are taken in turn."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredDraws:
    """What the quantities are computed from."""

    store: DrawsStore
    activations: np.ndarray
    """[activation, d_model] float32, as they are."""
    errors: np.ndarray
    """[activation, draw] mean squared error of each draw."""
    roles: Sequence[str | None] | None = None
    """Role of each activation's token; None where no chat format is known."""


@dataclass(frozen=True)
class Quantities:
    """What came of it."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """Of REFERENCE_SCHEMA; what is not known has no row."""
    notes: tuple[Note, ...] = ()
    """Why something is not known."""


def reference_quantities(draws: StoredDraws, ks: Sequence[int], num_replicates: int = 0) -> Quantities:
    """Every quantity for each K and role; with replicates, intervals over single vectors too."""
    without = int((~np.isfinite(draws.errors)).sum())
    if without:
        return Quantities(notes=_notes([f"no quantities of the reference sweep: {without} draws have no finite error"]))
    sums, parts = ReferenceSums(tuple(ks)), draws.store.parts()
    for chunk in _chunks(draws, ks, parts):
        sums.add(chunk)
    n = len(draws.activations)
    lacking = n - sums.residuals.count
    possible = not lacking and n >= FEWEST_FOR_INTERVALS
    intervals = _intervals(draws, sums, parts, num_replicates) if num_replicates and possible else None
    notes = [_without_reconstructions(draws, lacking)] if lacking else []
    if num_replicates and not possible:
        why = "reconstructions are lacking" if lacking else f"{n} activations; at least {FEWEST_FOR_INTERVALS} are needed"
        notes.append(f"no intervals over single vectors (scoring.reference_replicates={num_replicates}): {why}")
    return Quantities(reference_rows(sums, intervals), _notes(notes))


def _notes(texts: Sequence[str]) -> tuple[Note, ...]:
    return tuple(Note(REFERENCE_QUANTITIES, text) for text in texts)


def _intervals(
    draws: StoredDraws, sums: ReferenceSums, parts: Sequence[Unit], num_replicates: int
) -> dict[str, list[ReferenceInterval]]:
    """Intervals of all values of K, as many of these at a time as fit into memory."""
    most = max(1, REPLICATE_VALUES // (num_replicates * draws.activations.shape[1]))
    found: dict[str, list[ReferenceInterval]] = {}
    for start in range(0, len(sums.ks), most):
        some = sums.of(sums.ks[start : start + most])
        for name, intervals in reference_intervals(some, _chunks(draws, some.ks, parts), num_replicates=num_replicates).items():
            found.setdefault(name, []).extend(intervals)
    return found


def _chunks(draws: StoredDraws, ks: Sequence[int], parts: Sequence[Unit]) -> Iterator[Chunk]:
    """All activations, each with the best of its first K draws; in order where no reconstruction is absent."""
    n, d_model = draws.activations.shape
    chosen = prefix_of_k_draws(draws.errors, ks)
    step = max(1, CHUNK_VALUES // (len(ks) * d_model))
    for first in range(0, n, ROWS_PER_UNIT):
        block = np.arange(first, min(first + ROWS_PER_UNIT, n))
        made, which = _reconstructions(draws, block, chosen[block], parts)
        absent = np.isnan(made).any(axis=1)[which].any(axis=1)
        for rows in _cut(block[~absent], step):
            yield _chunk(draws, rows, made[which[rows - first]], None)
        for rows in _cut(block[absent], step):
            squared = np.take_along_axis(draws.errors[rows], chosen[rows], axis=1) * d_model
            yield _chunk(draws, rows, None, squared)


def _cut(rows: np.ndarray, step: int) -> list[np.ndarray]:
    return [rows[start : start + step] for start in range(0, len(rows), step)]


def _chunk(draws: StoredDraws, rows: np.ndarray, made: np.ndarray | None, squared: np.ndarray | None) -> Chunk:
    roles = None if draws.roles is None else [draws.roles[row] for row in rows]
    return Chunk(activations=draws.activations[rows], reconstructions=made, squared_errors=squared, roles=roles)


def _reconstructions(
    draws: StoredDraws, block: np.ndarray, chosen: np.ndarray, parts: Sequence[Unit]
) -> tuple[np.ndarray, np.ndarray]:
    """The distinct reconstructions [pair, d] that a block needs, NaN where absent, and which of them each row and K has."""
    num_draws = draws.errors.shape[1]
    pairs, which = np.unique(block[:, None] * num_draws + chosen, return_inverse=True)
    made = draws.store.reconstructions(pairs // num_draws, pairs % num_draws, draws.activations.shape[1], parts)
    return made, which.reshape(chosen.shape)


def _without_reconstructions(draws: StoredDraws, lacking: int) -> str:
    return (
        f"variance_recovery is not known: of {lacking} of {len(draws.activations)} activations the draws store lacks a "
        "reconstruction that it needs, because the draws are from before these were kept. Everything that follows from errors is "
        f"there. To have it, move {draws.store.path} away and run the cell again"
    )
