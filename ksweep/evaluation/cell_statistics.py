"""Compute every statistic of a cell from its stored draws; no model is needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa

from ksweep.activations.group_columns import group_values
from ksweep.autoencoder.family import family_of
from ksweep.config.spec import Cell
from ksweep.evaluation.breakdown import Breakdown, break_down
from ksweep.evaluation.given_texts import groups_of_texts
from ksweep.evaluation.identity import columns_of_activations
from ksweep.evaluation.summary import RETRIEVAL_POOL, Summary, summarise
from ksweep.evaluation.tae_summary import StoredDraws, TaeSummary, reference_quantities
from ksweep.registry import activation_metadata
from ksweep.registry.cell_draws import CellDraws
from ksweep.utils.errors import DataError

if TYPE_CHECKING:
    from ksweep.activations.chat_roles import TokenRole
    from ksweep.activations.store import ActivationTable


@dataclass(frozen=True, kw_only=True, eq=False)
class CellStatistics:
    """Every statistic of a cell that its run record and tables hold."""

    summary: Summary
    reference: TaeSummary
    """The reference sweep's own quantities; empty for an NLA pair."""
    tokens: dict[str, Any]
    """token_stats and selected_token_stats of the run record."""
    norms: np.ndarray
    """[activation] norm of each activation."""
    d_model: int
    breakdown: Breakdown


def compute_statistics(
    cell: Cell, vectors: ActivationTable, store: CellDraws, draws: pa.Table, empty_text: np.ndarray | None, registry: Path
) -> CellStatistics:
    """Compute the statistics of a cell, and write the metadata of its activations into the registry.

    Args:
        cell: what was evaluated.
        vectors: its activations.
        store: reconstructions are read from it.
        draws: every draw, ordered by activation and draw, with the columns SUMMARISED.
        empty_text: [d_model] the AR's reconstruction of an empty text; None where it cannot read one.
        registry: root of the registry.

    Raises:
        DataError: the activations allow no statistics: all are equal, or too few.
    """
    targets = vectors.vectors(0, len(vectors))
    family, roles = family_of(cell.autoencoder), vectors.column("role").tolist()
    kind = family.scoring_kind
    pool = np.arange(min(len(targets), RETRIEVAL_POOL))
    first_draws = store.reconstructions(pool, np.zeros_like(pool), targets.shape[1])
    reference = TaeSummary()
    try:
        summary = summarise(draws, targets, cell.scoring, cell.ks, empty_text, first_draws, kind)
        groups = _group_values(cell, vectors)
        metadata = activation_metadata.write_metadata(registry, vectors, kind)
        metadata = activation_metadata.with_groups(metadata, vectors, groups, kind)
        windows = vectors.column("window").tolist()
        breakdown = break_down(draws, metadata, summary.baseline, cell.scoring, cell.ks, windows, cell.scoring.groups)
        if family.has_reference_quantities:
            errors = draws["error"].to_numpy().reshape(len(targets), -1)
            stored = StoredDraws(store=store, activations=targets, errors=errors, roles=roles)
            reference = reference_quantities(stored, cell.ks, cell.scoring.reference_replicates)
    except ValueError as error:  # equal vectors or too few of them: the request, not the code, is at fault
        raise DataError(str(error)) from error
    return CellStatistics(
        summary=summary, reference=reference, tokens=_token_stats(vectors, roles),
        norms=np.linalg.norm(targets.astype(np.float64), axis=1), d_model=targets.shape[1], breakdown=breakdown,
    )  # fmt: skip


def _group_values(cell: Cell, vectors: ActivationTable) -> dict[str, list[str | None]]:
    """Return the value of each column of scoring.groups at each activation, from given texts or from beside the activations."""
    family = family_of(cell.autoencoder)
    beside = columns_of_activations(cell, family)
    values = group_values(cell.activations, beside, vectors.column("row_id").tolist())
    for column in [column for column in cell.scoring.groups if column not in beside]:
        values[column] = groups_of_texts(family.given_texts, column, vectors)
    return {column: values[column] for column in cell.scoring.groups}


def _token_stats(vectors: ActivationTable, roles: list[str | None]) -> dict[str, Any]:
    """Count roles over all tokens that were read and over the evaluated positions; None where the chat format is unknown."""
    from ksweep.activations.chat_roles import count_roles, role_proportions

    stats: dict[str, Any] = {"token_stats": None, "selected_token_stats": None}
    if (counts := vectors.role_counts()) is not None:
        sequences = {"total_sequences": vectors.num_source_rows()}
        stats["token_stats"] = {"counts": counts, "proportions": role_proportions(counts)} | sequences
    if selected := [cast("TokenRole", role) for role in roles if role is not None]:
        counts = count_roles(selected)
        positions = {"total_positions": len(roles)}
        stats["selected_token_stats"] = {"counts": counts, "proportions": role_proportions(counts)} | positions
    return stats
