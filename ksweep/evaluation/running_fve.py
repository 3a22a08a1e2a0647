"""FVE while a cell is being drawn: what a watcher is shown; the numbers of record come from all draws at the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ksweep import stats

if TYPE_CHECKING:
    from ksweep.config.spec import Scoring
    from ksweep.stats import ScoringKind

BASELINE_ACTIVATIONS = 2048
"""The baseline is taken over the first so many: close enough to watch by, and quick."""
REPLICATES = 200


@dataclass
class FveSoFar:
    """Mean errors of the activations that this rank has finished, and the FVE at K = 1 that they come to."""

    asked: Scoring
    baseline: stats.Baseline | None = None
    errors: list[np.ndarray] = field(default_factory=list)
    documents: list[np.ndarray] = field(default_factory=list)
    numbers: dict[str, float] = field(default_factory=dict)
    """fve, fve_low, fve_high for the heartbeat; empty while there is nothing to tell."""

    def add(self, errors: np.ndarray, owners: np.ndarray, documents: np.ndarray) -> None:
        """A unit: [draw] errors (NaN: failed), the row of each within the unit, the document of each row."""
        if self.baseline is None:
            return
        filled = np.where(np.isnan(errors), self.asked.failed_error, errors)
        counts = np.bincount(owners, minlength=len(documents))
        sums = np.bincount(owners, weights=filled, minlength=len(documents))
        self.errors.append(sums[counts > 0] / counts[counts > 0])
        self.documents.append(np.asarray(documents, dtype=object)[counts > 0])
        self.numbers = self._numbers(self.baseline)

    def _numbers(self, baseline: stats.Baseline) -> dict[str, float]:
        errors, documents = np.concatenate(self.errors), np.concatenate(self.documents)
        if len(errors) < 2:
            return {}
        curve = stats.fve_curve(
            errors[:, None], documents, baseline, ks=(1,), num_replicates=REPLICATES, seed=self.asked.seed, level=self.asked.level
        )
        found = {"fve": curve.fve[0], "fve_low": curve.fve_low[0], "fve_high": curve.fve_high[0]}
        return {name: float(value) for name, value in found.items()} if np.isfinite(list(found.values())).all() else {}


def start(vectors: np.ndarray, documents: np.ndarray, kind: ScoringKind, scoring: Scoring) -> FveSoFar:
    """Nothing yet, with the baseline that the cell asks for; vectors without any variance have no FVE to show."""
    value = scoring.stated_baseline
    try:
        if value is None:
            value = stats.measured_baseline(scoring.baseline_kind, vectors, documents, kind).value
    except ValueError:
        return FveSoFar(scoring)
    # Taken as known: its own spread would have to be resampled with the documents that are still to come.
    known = stats.Baseline(value=value, kind="stated constant", num_activations=None, scoring=kind)
    return FveSoFar(scoring, known)
