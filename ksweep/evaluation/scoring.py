"""Units of work: explanations drawn, parsed, reconstructed and scored, as rows of the draws store."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from ksweep import stats
from ksweep.config.spec import Sampling, Scoring
from ksweep.evaluation import running_fve
from ksweep.registry.draws import SCHEMA, Unit

if TYPE_CHECKING:
    from ksweep.activations.store import ActivationTable
    from ksweep.autoencoder.base import Explanation, Reconstructor, Verbalizer
    from ksweep.inference.engine import Draw, Order
    from ksweep.stats import ScoringKind


@dataclass
class UnitWork:
    """What one cell's units ask of the sampler, and what becomes of their draws; on one rank."""

    sampling: Sampling
    vectors: ActivationTable
    av: Verbalizer
    ar: Reconstructor
    batch_size: int | None
    device: str
    scoring: ScoringKind = "normalised"
    asked: Scoring = field(default_factory=Scoring)
    """Baseline and failure policy of the FVE that a watcher sees."""
    others: np.ndarray | None = None
    so_far: running_fve.FveSoFar | None = None

    @property
    def fve_so_far(self) -> dict[str, float]:
        """For whoever watches; empty while there is nothing to tell."""
        return {} if self.so_far is None else self.so_far.numbers

    def order(self, unit: Unit) -> Order:
        """What a unit asks the sampler for."""
        from ksweep.inference.engine import Order, Request, as_vectors

        keys = self.vectors.column("activation_key", unit.first_row, unit.last_row)
        requests = [
            Request(row=row, activation_key=int(keys[row]), draw=k)
            for row in range(unit.last_row - unit.first_row)
            for k in range(unit.first_draw, unit.last_draw)
        ]
        inputs = self.av.inputs(as_vectors(self._targets(unit)), self._known("position", unit))
        return Order(vectors=inputs, requests=requests, temperature=self.sampling.temperature, seed=self.sampling.seed)

    def scored(self, unit: Unit, draws: list[Draw]) -> pa.Table:
        """A unit whose draws have all ended, parsed, reconstructed and scored: rows of the draws store."""
        targets = self._targets(unit)
        draws = sorted(draws, key=lambda d: (d.request.row, d.request.draw))
        texts = [self.av.decode(d.text_token_ids) for d in draws]
        parsed = [self.av.parse(text, d.finish) for text, d in zip(texts, draws, strict=True)]
        owners = np.array([d.request.row for d in draws])
        good = np.array([i for i, (explanation, _) in enumerate(parsed) if explanation is not None], dtype=int)
        explanations = self._explanations(unit, [draws[i] for i in good], [parsed[i][0] or "" for i in good])
        reconstructions = np.asarray(self.ar.reconstruct(explanations, self.scored_at_once), dtype=np.float64)
        scores = self._score(unit, targets, owners, good, reconstructions)
        self._keep_in_view(unit, scores["error"], owners)
        kept: list[np.ndarray | None] = [None] * len(draws)
        keep = self._to_keep(unit, scores["error"])
        for i, vector in zip(good, reconstructions, strict=True):
            kept[i] = vector if keep[i] else None
        return self._table(unit, draws, texts, parsed, scores, kept)

    def _targets(self, unit: Unit) -> np.ndarray:
        """[activation, d_model] what its explanations are to come back to."""
        return self.vectors.vectors(unit.first_row, unit.last_row)

    @property
    def scored_at_once(self) -> int:
        """Rows that the AR reads in a batch. More are slower on a CPU (256 texts of 22 tokens: 3.7 s by 64, 4.4 s by 256)."""
        return self.batch_size or (64 if self.device == "cpu" else 512)

    def _to_keep(self, unit: Unit, errors: np.ndarray) -> np.ndarray:
        """Whether a draw's reconstruction is kept: see SCHEMA of the draws store."""
        by_activation = errors.reshape(unit.last_row - unit.first_row, unit.last_draw - unit.first_draw)
        keep = np.zeros(by_activation.shape, dtype=bool) if self.scoring == "normalised" else running_minima(by_activation)
        if unit.first_draw == 0:
            keep[:, 0] = True
        return keep.reshape(-1)

    def _known(self, column: Literal["position", "token_id"], unit: Unit) -> list[int | None]:
        """A number of each of a unit's activations; None where it is unknown."""
        values = self.vectors.column(column, unit.first_row, unit.last_row)
        return [None if value is None else int(value) for value in values]

    def _explanations(self, unit: Unit, draws: list[Draw], texts: list[str]) -> list[Explanation]:
        """What the AR is given of each draw."""
        from ksweep.autoencoder.base import Explanation

        tokens, positions = self._known("token_id", unit), self._known("position", unit)
        return [
            Explanation(text, d.text_token_ids, tokens[d.request.row], positions[d.request.row])
            for d, text in zip(draws, texts, strict=True)
        ]

    def _keep_in_view(self, unit: Unit, errors: np.ndarray, owners: np.ndarray) -> None:
        """The FVE so far, for whoever watches."""
        if self.so_far is None:
            last = min(len(self.vectors), running_fve.BASELINE_ACTIVATIONS)
            documents = self.vectors.column("document", 0, last)
            self.so_far = running_fve.start(self.vectors.vectors(0, last), documents, self.scoring, self.asked)
        self.so_far.add(errors, owners, self.vectors.column("document", unit.first_row, unit.last_row))

    def _score(
        self, unit: Unit, targets: np.ndarray, owners: np.ndarray, good: np.ndarray, reconstructions: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Error, cosine and norm of each draw, and its error against another activation; NaN where the draw failed."""
        n = len(owners)
        scores = {name: np.full(n, np.nan) for name in ("error", "cosine", "norm", "shuffled_error")}
        others = self._others()[unit.first_row : unit.last_row]
        scores["shuffled_activation"] = others[owners]
        if len(good):
            mine = owners[good]
            scores["error"][good] = stats.reconstruction_errors(reconstructions, targets[mine], self.scoring)
            scores["cosine"][good] = stats.cosines(reconstructions, targets[mine])
            scores["norm"][good] = np.linalg.norm(reconstructions, axis=1)
            known = others[mine] >= 0
            partners = self.vectors.take(others[mine][known])
            scores["shuffled_error"][good[known]] = stats.reconstruction_errors(reconstructions[known], partners, self.scoring)
        return scores

    def _others(self) -> np.ndarray:
        """The target of the shuffled control for each activation; -1 for those of the first document."""
        if self.others is None:
            self.others = neighbours(self.vectors.column("document", 0, len(self.vectors)))
        return self.others

    def _table(
        self,
        unit: Unit,
        draws: list[Draw],
        texts: list[str],
        parsed: list[Any],
        scores: dict[str, np.ndarray],
        kept: list[np.ndarray | None],
    ) -> pa.Table:
        owners = [d.request.row for d in draws]
        rows = {name: self.vectors.column(name, unit.first_row, unit.last_row) for name in ("row_id", "document", "position")}
        rows["context"] = self.vectors.column("window", unit.first_row, unit.last_row)
        others = scores["shuffled_activation"].astype(np.int64)
        columns = {
            "activation": [unit.first_row + row for row in owners],
            "draw": [d.request.draw for d in draws],
            **{name: [values[row] for row in owners] for name, values in rows.items()},
            "token_ids": [list(d.token_ids) for d in draws],
            "num_tokens": [len(d.token_ids) for d in draws],
            "text": texts,
            "explanation": [explanation for explanation, _ in parsed],
            "finish": [d.finish for d in draws],
            "parse": [outcome for _, outcome in parsed],
            **{name: _nullable(scores[name]) for name in ("error", "cosine", "norm", "shuffled_error")},
            "log_probability": [d.log_probability for d in draws],
            "shuffled_activation": pa.array(others, mask=others < 0),
            "reconstruction": kept,
        }
        return pa.table({f.name: pa.array(columns[f.name], type=f.type) for f in SCHEMA}, schema=SCHEMA)


def _nullable(values: np.ndarray) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))


def running_minima(errors: np.ndarray) -> np.ndarray:
    """[activation, draw]: whether a draw's error is below that of every earlier one. A failure's never is, nor counts."""
    best = np.fmin.accumulate(errors, axis=1)
    before = np.hstack([np.full((len(errors), 1), np.inf), np.where(np.isnan(best[:, :-1]), np.inf, best[:, :-1])])
    below: np.ndarray = errors < before
    return below


def neighbours(documents: np.ndarray) -> np.ndarray:
    """For each activation one of the document before its own; -1 for those of the first document.

    Nothing behind an activation plays a part, so its target stays the same however a run grows.
    """
    changes = [i for i in range(1, len(documents)) if documents[i] != documents[i - 1]]
    starts = [0, *changes]
    out = np.full(len(documents), -1, dtype=np.int64)
    for run, (start, end) in enumerate(zip(starts, [*changes, len(documents)], strict=True)):
        if run:
            before = starts[run - 1]
            out[start:end] = before + np.arange(end - start) % (start - before)
    return out
