"""Score work units: the explanations of stored draws reconstructed and compared, as rows of the scores store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa

from ksweep import stats
from ksweep.config.spec import Scoring
from ksweep.evaluation.running_fve import BASELINE_ACTIVATIONS, RunningFve
from ksweep.registry.scores import RECONSTRUCTION_SCHEMA
from ksweep.registry.work_units import WorkUnit

if TYPE_CHECKING:
    from ksweep.activations.store import ActivationTable
    from ksweep.autoencoder.base import Explanation, Reconstructor
    from ksweep.stats import ScoringKind


@dataclass(kw_only=True)
class UnitScoring:
    """How the units of one cell are scored on this rank."""

    vectors: ActivationTable
    ar: Reconstructor
    batch_size: int | None
    device: str
    scoring: Scoring
    """Baseline and failure policy of the running FVE."""
    scoring_kind: ScoringKind
    keeps_reconstructions: bool
    """Whether reconstructions that are the best of their activation so far are stored."""
    _partners: np.ndarray | None = None
    _running_fve: RunningFve | None = None

    @property
    def running_fve_numbers(self) -> dict[str, float]:
        """The FVE of the draws scored so far, for heartbeats; empty while it is unknown."""
        return {} if self._running_fve is None else self._running_fve.numbers

    @property
    def texts_at_once(self) -> int:
        """Batch size of the AR. Larger ones are slower on a CPU (256 texts of 22 tokens: 3.7 s by 64, 4.4 s by 256)."""
        return self.batch_size or (64 if self.device == "cpu" else 512)

    def table(self, unit: WorkUnit, draws: pa.Table) -> pa.Table:
        """Reconstruct and score the draws of a unit. Returns rows of the scores store.

        Args:
            unit: which draws they are.
            draws: rows of the draws store, ordered by activation and draw.
        """
        # 1. Reconstruct an activation from each explanation that parsed.
        owners = draws["activation"].to_numpy() - unit.first_row
        successes = np.flatnonzero(draws["explanation"].is_valid().to_numpy())
        explanations = self._explanations(unit, owners[successes], draws.take(pa.array(successes)))
        reconstructions = np.asarray(self.ar.reconstruct(explanations, self.texts_at_once), dtype=np.float64)
        # 2. Score the reconstructions, and add them to the running FVE.
        scores = self._scores(unit, owners, successes, reconstructions)
        self._update_running_fve(unit, scores["error"], owners)
        # 3. Keep the reconstructions that statistics will need.
        kept: list[np.ndarray | None] = [None] * len(owners)
        is_kept = self._is_kept(unit, scores["error"])
        for i, vector in zip(successes, reconstructions, strict=True):
            kept[i] = vector if is_kept[i] else None
        partners = scores["shuffled_activation"].astype(np.int64)
        columns = {
            **{name: draws[name] for name in ("activation", "draw")},
            **{name: _nullable(scores[name]) for name in ("error", "cosine", "norm", "shuffled_error")},
            "shuffled_activation": pa.array(partners, mask=partners < 0),
            "reconstruction": pa.array(kept, RECONSTRUCTION_SCHEMA.field("reconstruction").type),
        }
        return pa.table({name: columns[name] for name in RECONSTRUCTION_SCHEMA.names}, schema=RECONSTRUCTION_SCHEMA)

    def _explanations(self, unit: WorkUnit, owners: np.ndarray, draws: pa.Table) -> list[Explanation]:
        """Return the AR's input for each draw, without its stop token."""
        from ksweep.autoencoder.base import Explanation

        tokens, positions = self._numbers_of("token_id", unit), self._numbers_of("position", unit)
        texts, ids, ends = (draws[name].to_pylist() for name in ("explanation", "token_ids", "finish"))
        return [
            Explanation(text, tuple(sampled[:-1] if end == "stop" else sampled), tokens[row], positions[row])
            for text, sampled, end, row in zip(texts, ids, ends, owners.tolist(), strict=True)
        ]

    def _targets(self, unit: WorkUnit) -> np.ndarray:
        """Return the activations of a unit, [activation, d_model]."""
        return self.vectors.vectors(unit.first_row, unit.last_row)

    def _numbers_of(self, column: Literal["position", "token_id"], unit: WorkUnit) -> list[int | None]:
        """Return a column of numbers, one for each activation of a unit; None where a number is unknown."""
        values = self.vectors.column(column, unit.first_row, unit.last_row)
        return [None if value is None else int(value) for value in values]

    def _scores(
        self, unit: WorkUnit, owners: np.ndarray, successes: np.ndarray, reconstructions: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Return each draw's error, cosine, norm, and error against another document's activation; NaN where it failed."""
        targets, partners = self._targets(unit), self._shuffled_partners()[unit.first_row : unit.last_row]
        scores = {name: np.full(len(owners), np.nan) for name in ("error", "cosine", "norm", "shuffled_error")}
        scores["shuffled_activation"] = partners[owners]
        if len(successes):
            rows = owners[successes]
            scores["error"][successes] = stats.reconstruction_errors(reconstructions, targets[rows], self.scoring_kind)
            scores["cosine"][successes] = stats.cosines(reconstructions, targets[rows])
            scores["norm"][successes] = np.linalg.norm(reconstructions, axis=1)
            paired = partners[rows] >= 0
            other_targets = self.vectors.take(partners[rows][paired])
            shuffled_errors = stats.reconstruction_errors(reconstructions[paired], other_targets, self.scoring_kind)
            scores["shuffled_error"][successes[paired]] = shuffled_errors
        return scores

    def _shuffled_partners(self) -> np.ndarray:
        if self._partners is None:
            self._partners = shuffled_partners(self.vectors.column("document", 0, len(self.vectors)))
        return self._partners

    def _update_running_fve(self, unit: WorkUnit, errors: np.ndarray, owners: np.ndarray) -> None:
        if self._running_fve is None:
            last = min(len(self.vectors), BASELINE_ACTIVATIONS)
            documents = self.vectors.column("document", 0, last)
            self._running_fve = RunningFve.start(self.vectors.vectors(0, last), documents, self.scoring_kind, self.scoring)
        self._running_fve.add(errors, owners, self.vectors.column("document", unit.first_row, unit.last_row))

    def _is_kept(self, unit: WorkUnit, errors: np.ndarray) -> np.ndarray:
        """Return for each draw whether its reconstruction is stored: see RECONSTRUCTION_SCHEMA of the scores store."""
        by_activation = errors.reshape(unit.last_row - unit.first_row, unit.last_draw - unit.first_draw)
        kept = running_minima(by_activation) if self.keeps_reconstructions else np.zeros(by_activation.shape, dtype=bool)
        if unit.first_draw == 0:
            kept[:, 0] = True
        return kept.reshape(-1)


def _nullable(values: np.ndarray) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))


def running_minima(errors: np.ndarray) -> np.ndarray:
    """Return whether each draw's error is below that of every earlier draw; a failure (NaN) is not, and is ignored."""
    best = np.fmin.accumulate(errors, axis=1)
    before = np.hstack([np.full((len(errors), 1), np.inf), np.where(np.isnan(best[:, :-1]), np.inf, best[:, :-1])])
    below: np.ndarray = errors < before
    return below


def shuffled_partners(documents: np.ndarray) -> np.ndarray:
    """Return for each activation the index of one of the document before its own; -1 for those of the first document.

    The partner depends on nothing behind the activation, so it stays the same when a run grows.
    """
    changes = [i for i in range(1, len(documents)) if documents[i] != documents[i - 1]]
    starts = [0, *changes]
    partners = np.full(len(documents), -1, dtype=np.int64)
    for number, (start, end) in enumerate(zip(starts, [*changes, len(documents)], strict=True)):
        if number:
            before = starts[number - 1]
            partners[start:end] = before + np.arange(end - start) % (start - before)
    return partners
