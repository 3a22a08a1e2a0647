"""Score work units: explanations parsed, reconstructed and compared, as rows of the draws store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from ksweep import stats
from ksweep.config.spec import Sampling, Scoring
from ksweep.evaluation.running_fve import BASELINE_ACTIVATIONS, RunningFve
from ksweep.registry.draws import DRAWS_SCHEMA, WorkUnit

if TYPE_CHECKING:
    from ksweep.activations.store import ActivationTable
    from ksweep.autoencoder.base import Explanation, Reconstructor, Verbalizer
    from ksweep.inference.engine import Draw, DrawBatch
    from ksweep.stats import ScoringKind


@dataclass(kw_only=True)
class UnitWork:
    """How the units of one cell are drawn and scored on this rank."""

    sampling: Sampling
    vectors: ActivationTable
    av: Verbalizer
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

    def draw_batch(self, unit: WorkUnit) -> DrawBatch:
        """Return what the engine needs to draw a unit: the AV's inputs and a request for each draw."""
        from ksweep.inference.engine import DrawBatch, Request, vectors_as_tensor

        keys = self.vectors.column("activation_key", unit.first_row, unit.last_row)
        requests = [
            Request(row=row, activation_key=int(keys[row]), draw=k)
            for row in range(unit.last_row - unit.first_row)
            for k in range(unit.first_draw, unit.last_draw)
        ]
        inputs = self.av.inputs(vectors_as_tensor(self._targets(unit)), self._numbers_of("position", unit))
        return DrawBatch(vectors=inputs, requests=requests, temperature=self.sampling.temperature, seed=self.sampling.seed)

    def score_unit(self, unit: WorkUnit, draws: list[Draw]) -> pa.Table:
        """Parse, reconstruct and score the draws of a unit. Returns rows of the draws store, ordered by activation and draw."""
        # 1. Decode and parse the texts.
        draws = sorted(draws, key=lambda draw: (draw.request.row, draw.request.draw))
        texts = [self.av.decode(draw.text_token_ids) for draw in draws]
        parsed = [self.av.parse(text, draw.finish) for text, draw in zip(texts, draws, strict=True)]
        # 2. Reconstruct an activation from each explanation that parsed.
        owners = np.array([draw.request.row for draw in draws])
        successes = np.array([i for i, (explanation, _) in enumerate(parsed) if explanation is not None], dtype=int)
        explanations = self._explanations(unit, [draws[i] for i in successes], [parsed[i][0] or "" for i in successes])
        reconstructions = np.asarray(self.ar.reconstruct(explanations, self.texts_at_once), dtype=np.float64)
        # 3. Score the reconstructions, and add them to the running FVE.
        scores = self._scores(unit, owners, successes, reconstructions)
        self._update_running_fve(unit, scores["error"], owners)
        # 4. Keep the reconstructions that statistics will need.
        kept: list[np.ndarray | None] = [None] * len(draws)
        is_kept = self._is_kept(unit, scores["error"])
        for i, vector in zip(successes, reconstructions, strict=True):
            kept[i] = vector if is_kept[i] else None
        return self._table(unit, draws, texts, parsed, scores, kept)

    def _targets(self, unit: WorkUnit) -> np.ndarray:
        """Return the activations of a unit, [activation, d_model]."""
        return self.vectors.vectors(unit.first_row, unit.last_row)

    def _numbers_of(self, column: Literal["position", "token_id"], unit: WorkUnit) -> list[int | None]:
        """Return a column of numbers, one for each activation of a unit; None where a number is unknown."""
        values = self.vectors.column(column, unit.first_row, unit.last_row)
        return [None if value is None else int(value) for value in values]

    def _explanations(self, unit: WorkUnit, draws: list[Draw], texts: list[str]) -> list[Explanation]:
        """Return the AR's input for each draw."""
        from ksweep.autoencoder.base import Explanation

        tokens, positions = self._numbers_of("token_id", unit), self._numbers_of("position", unit)
        return [
            Explanation(text, draw.text_token_ids, tokens[draw.request.row], positions[draw.request.row])
            for draw, text in zip(draws, texts, strict=True)
        ]

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
        """Return for each draw whether its reconstruction is stored: see DRAWS_SCHEMA of the draws store."""
        by_activation = errors.reshape(unit.last_row - unit.first_row, unit.last_draw - unit.first_draw)
        kept = running_minima(by_activation) if self.keeps_reconstructions else np.zeros(by_activation.shape, dtype=bool)
        if unit.first_draw == 0:
            kept[:, 0] = True
        return kept.reshape(-1)

    def _table(
        self,
        unit: WorkUnit,
        draws: list[Draw],
        texts: list[str],
        parsed: list[Any],
        scores: dict[str, np.ndarray],
        kept: list[np.ndarray | None],
    ) -> pa.Table:
        owners = [draw.request.row for draw in draws]
        metadata = {name: self.vectors.column(name, unit.first_row, unit.last_row) for name in ("row_id", "document", "position")}
        metadata["context"] = self.vectors.column("window", unit.first_row, unit.last_row)
        partners = scores["shuffled_activation"].astype(np.int64)
        columns = {
            "activation": [unit.first_row + row for row in owners],
            "draw": [draw.request.draw for draw in draws],
            **{name: [values[row] for row in owners] for name, values in metadata.items()},
            "token_ids": [list(draw.token_ids) for draw in draws],
            "num_tokens": [len(draw.token_ids) for draw in draws],
            "text": texts,
            "explanation": [explanation for explanation, _ in parsed],
            "finish": [draw.finish for draw in draws],
            "parse": [outcome for _, outcome in parsed],
            **{name: _nullable(scores[name]) for name in ("error", "cosine", "norm", "shuffled_error")},
            "log_probability": [draw.log_probability for draw in draws],
            "shuffled_activation": pa.array(partners, mask=partners < 0),
            "reconstruction": kept,
        }
        return pa.table({f.name: pa.array(columns[f.name], type=f.type) for f in DRAWS_SCHEMA}, schema=DRAWS_SCHEMA)


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
