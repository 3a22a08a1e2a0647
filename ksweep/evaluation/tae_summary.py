"""Compute the reference sweep's own quantities from a checkpoint's stored draws, block by block: no model, little memory.

Their best of K is the best of the first K draws, whatever `scoring.selection` says for the cell's curve. Stored errors decide
which draw that is; its reconstruction is read from the scores store (see RECONSTRUCTION_SCHEMA), for `ACTIVATIONS_PER_WORK_UNIT`
activations at a time.
Formulas: `stats/tae_metrics.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ksweep.registry.cell_draws import CellDraws
from ksweep.registry.scores import ScoredUnit
from ksweep.registry.work_units import ACTIVATIONS_PER_WORK_UNIT
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
"""float64 values [activation, K, d] processed at once: 128 MiB, and as much again for each of a few intermediate results."""

REPLICATE_VALUES = 2**26
"""float64 values [K, replicate, d] that the bootstrap holds at once: 512 MiB; further values of K are computed in turn."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredDraws:
    """The draws of a cell and the activations that they explain."""

    store: CellDraws
    activations: np.ndarray
    """[activation, d_model] float32, not scaled."""
    errors: np.ndarray
    """[activation, draw] mean squared error of each draw."""
    roles: Sequence[str | None] | None = None
    """Role of each activation's token; None where the chat format is unknown."""


@dataclass(frozen=True)
class TaeSummary:
    """The reference sweep's quantities of one cell."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """Rows of REFERENCE_SCHEMA; an unknown quantity has none."""
    notes: tuple[Note, ...] = ()
    """Why quantities are unknown."""


def reference_quantities(draws: StoredDraws, ks: Sequence[int], num_replicates: int = 0) -> TaeSummary:
    """Compute every quantity for each K and role, and with replicates their bootstrap intervals over single vectors."""
    num_failed = int((~np.isfinite(draws.errors)).sum())
    if num_failed:
        return TaeSummary(notes=_notes([f"no quantities of the reference sweep: {num_failed} draws have no finite error"]))
    sums, parts = ReferenceSums(tuple(ks)), draws.store.scored_parts()
    for chunk in _chunks(draws, ks, parts):
        sums.add(chunk)
    n = len(draws.activations)
    num_incomplete = n - sums.residuals.count
    can_bootstrap = not num_incomplete and n >= FEWEST_FOR_INTERVALS
    intervals = _intervals(draws, sums, parts, num_replicates) if num_replicates and can_bootstrap else None
    notes = [_missing_reconstructions(draws, num_incomplete)] if num_incomplete else []
    if num_replicates and not can_bootstrap:
        why = "reconstructions are missing" if num_incomplete else f"{n} activations; at least {FEWEST_FOR_INTERVALS} are needed"
        notes.append(f"no intervals over single vectors (scoring.reference_replicates={num_replicates}): {why}")
    return TaeSummary(reference_rows(sums, intervals), _notes(notes))


def _notes(texts: Sequence[str]) -> tuple[Note, ...]:
    return tuple(Note(REFERENCE_QUANTITIES, text) for text in texts)


def _intervals(
    draws: StoredDraws, sums: ReferenceSums, parts: Sequence[ScoredUnit], num_replicates: int
) -> dict[str, list[ReferenceInterval]]:
    """Compute the intervals of all values of K, for as many of these at a time as fit into memory."""
    ks_at_once = max(1, REPLICATE_VALUES // (num_replicates * draws.activations.shape[1]))
    intervals: dict[str, list[ReferenceInterval]] = {}
    for start in range(0, len(sums.ks), ks_at_once):
        some = sums.of(sums.ks[start : start + ks_at_once])
        for name, added in reference_intervals(some, _chunks(draws, some.ks, parts), num_replicates=num_replicates).items():
            intervals.setdefault(name, []).extend(added)
    return intervals


def _chunks(draws: StoredDraws, ks: Sequence[int], parts: Sequence[ScoredUnit]) -> Iterator[Chunk]:
    """Yield all activations with the best of their first K draws, in order unless reconstructions are missing."""
    n, d_model = draws.activations.shape
    chosen = prefix_of_k_draws(draws.errors, ks)
    step = max(1, CHUNK_VALUES // (len(ks) * d_model))
    for first in range(0, n, ACTIVATIONS_PER_WORK_UNIT):
        block = np.arange(first, min(first + ACTIVATIONS_PER_WORK_UNIT, n))
        reconstructions, index = _reconstructions(draws, block, chosen[block], parts)
        incomplete = np.isnan(reconstructions).any(axis=1)[index].any(axis=1)
        for rows in _split(block[~incomplete], step):
            yield _chunk(draws, rows, reconstructions[index[rows - first]], None)
        for rows in _split(block[incomplete], step):
            squared = np.take_along_axis(draws.errors[rows], chosen[rows], axis=1) * d_model
            yield _chunk(draws, rows, None, squared)


def _split(rows: np.ndarray, step: int) -> list[np.ndarray]:
    return [rows[start : start + step] for start in range(0, len(rows), step)]


def _chunk(draws: StoredDraws, rows: np.ndarray, reconstructions: np.ndarray | None, squared: np.ndarray | None) -> Chunk:
    roles = None if draws.roles is None else [draws.roles[row] for row in rows]
    return Chunk(activations=draws.activations[rows], reconstructions=reconstructions, squared_errors=squared, roles=roles)


def _reconstructions(
    draws: StoredDraws, block: np.ndarray, chosen: np.ndarray, parts: Sequence[ScoredUnit]
) -> tuple[np.ndarray, np.ndarray]:
    """Read the distinct reconstructions [pair, d] of a block, NaN where missing, and their index by [activation, K]."""
    num_draws = draws.errors.shape[1]
    pairs, index = np.unique(block[:, None] * num_draws + chosen, return_inverse=True)
    reconstructions = draws.store.reconstructions(pairs // num_draws, pairs % num_draws, draws.activations.shape[1], parts)
    return reconstructions, index.reshape(chosen.shape)


def _missing_reconstructions(draws: StoredDraws, num_incomplete: int) -> str:
    return (
        f"variance_recovery is not known: of {num_incomplete} of {len(draws.activations)} activations the scores store lacks a "
        "reconstruction that it needs, because the draws were scored by a version that did not store it. Quantities that follow "
        f"from errors alone are computed. To compute it too, move {draws.store.scores.path} away and run the cell again"
    )
