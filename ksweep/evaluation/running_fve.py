"""FVE while a cell is being drawn, for heartbeats; the recorded numbers are computed from all draws at the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ksweep import stats

if TYPE_CHECKING:
    from ksweep.config.spec import Scoring
    from ksweep.stats import ScoringKind

BASELINE_ACTIVATIONS = 2048
"""The baseline is measured over this many activations, the first ones: close enough to watch by, and quick."""
REPLICATES = 200


@dataclass
class RunningFve:
    """The FVE at K = 1 over the activations that this rank has finished."""

    scoring: Scoring
    baseline: stats.Baseline | None = None
    errors: list[np.ndarray] = field(default_factory=list)
    """Mean errors of activations, an array for each unit."""
    documents: list[np.ndarray] = field(default_factory=list)
    numbers: dict[str, float] = field(default_factory=dict)
    """fve, fve_low, fve_high for the heartbeat; empty while they are unknown."""

    @classmethod
    def start(cls, vectors: np.ndarray, documents: np.ndarray, kind: ScoringKind, scoring: Scoring) -> RunningFve:
        """Return an empty FVE with the baseline that the cell asks for, or with none for vectors without variance."""
        value = scoring.stated_baseline
        try:
            if value is None:
                value = stats.measured_baseline(scoring.baseline_kind, vectors, documents, kind).value
        except ValueError:
            return cls(scoring)
        # Treated as a constant: its own spread would have to be resampled with documents that are not drawn yet.
        return cls(scoring, stats.Baseline(value=value, kind="stated constant", num_activations=None, scoring=kind))

    def add(self, errors: np.ndarray, owners: np.ndarray, documents: np.ndarray) -> None:
        """Add a unit.

        Args:
            errors: [draw] error of each draw, NaN where it failed.
            owners: [draw] row of its activation within the unit.
            documents: [activation] document of each row.
        """
        if self.baseline is None:
            return
        filled = np.where(np.isnan(errors), self.scoring.failed_error, errors)
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
            errors[:, None], documents, baseline, ks=(1,), num_replicates=REPLICATES, seed=self.scoring.seed,
            level=self.scoring.level,
        )  # fmt: skip
        numbers = {"fve": float(curve.fve[0]), "fve_low": float(curve.fve_low[0]), "fve_high": float(curve.fve_high[0])}
        return numbers if np.isfinite(list(numbers.values())).all() else {}
