"""Draw work units: what the engine is asked for, and its draws as rows of the draws store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from ksweep.config.spec import Sampling
from ksweep.registry.draws import DRAWS_SCHEMA
from ksweep.registry.work_units import WorkUnit

if TYPE_CHECKING:
    from ksweep.activations.store import ActivationTable
    from ksweep.autoencoder.base import Verbalizer
    from ksweep.inference.engine import Draw, DrawBatch


@dataclass(frozen=True, kw_only=True)
class UnitDrawing:
    """How the units of one cell are drawn on this rank."""

    sampling: Sampling
    vectors: ActivationTable
    av: Verbalizer

    def batch(self, unit: WorkUnit) -> DrawBatch:
        """Return what the engine needs to draw a unit: the AV's inputs and a request for each draw."""
        from ksweep.inference.engine import DrawBatch, Request, vectors_as_tensor

        span = (unit.first_row, unit.last_row)
        keys = self.vectors.column("activation_key", *span)
        positions = [None if value is None else int(value) for value in self.vectors.column("position", *span)]
        requests = [
            Request(row=row, activation_key=int(keys[row]), draw=k)
            for row in range(unit.last_row - unit.first_row)
            for k in range(unit.first_draw, unit.last_draw)
        ]
        inputs = self.av.inputs(vectors_as_tensor(self.vectors.vectors(*span)), positions)
        return DrawBatch(vectors=inputs, requests=requests, temperature=self.sampling.temperature, seed=self.sampling.seed)

    def table(self, unit: WorkUnit, draws: list[Draw]) -> pa.Table:
        """Decode and parse the draws of a unit. Returns rows of the draws store, ordered by activation and draw."""
        draws = sorted(draws, key=lambda draw: (draw.request.row, draw.request.draw))
        texts = [self.av.decode(draw.text_token_ids) for draw in draws]
        parsed = [self.av.parse(text, draw.finish) for text, draw in zip(texts, draws, strict=True)]
        owners = [draw.request.row for draw in draws]
        span = (unit.first_row, unit.last_row)
        metadata = {name: self.vectors.column(name, *span) for name in ("row_id", "document", "position")}
        metadata["context"] = self.vectors.column("window", *span)
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
            "log_probability": [draw.log_probability for draw in draws],
        }
        return pa.table({f.name: pa.array(columns[f.name], type=f.type) for f in DRAWS_SCHEMA}, schema=DRAWS_SCHEMA)
