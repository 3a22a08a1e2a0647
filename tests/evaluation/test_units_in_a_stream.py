"""Units of a cell drawn in one stream: published whole as they end, lost nowhere when the job stops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ksweep import Cell
from ksweep.evaluation.context import RunContext
from ksweep.evaluation.distributed import Solo, Stopped
from ksweep.evaluation.evaluate import evaluate
from ksweep.evaluation.identity import cell_keys
from ksweep.evaluation.models import Models
from ksweep.inference.engine import _Stream
from ksweep.registry.draws import DrawsStore, WorkUnit
from tests.tiny_sweeps import talking_pair, tiny_cell

COLUMNS = ["activation", "draw", "token_ids", "text", "explanation", "finish"]


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Cell:
    """40 activations x 40 draws: units of 16, 16 and 8 draws each."""
    cell = tiny_cell(talking_pair(tmp_path_factory.mktemp("pair"), num_rows=60), num_replicates=20)
    return replace(cell, sampling=replace(cell.sampling, num_draws=40))


def place_in(folder: Path, batch_size: int | None = None) -> RunContext:
    return RunContext(registry=folder / "registry", vector_cache=folder / "vectors", batch_size=batch_size)


def draws_of(cell: Cell, place: RunContext) -> pa.Table:
    table = DrawsStore(place.registry / "draws", cell_keys(cell).draws).read(40, 40, COLUMNS)
    assert table is not None
    return table


def draws_under_way(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Their number at every step from now on."""
    found: list[int] = []
    step = _Stream._step

    def watched(self: _Stream) -> Any:
        found.append(len(self.rows))
        return step(self)

    monkeypatch.setattr(_Stream, "_step", watched)
    return found


def test_a_stop_in_the_middle_of_a_stream_keeps_whole_units_and_loses_no_draw(cell: Cell, tmp_path: Path) -> None:
    undisturbed, place = place_in(tmp_path / "a"), place_in(tmp_path / "b", batch_size=48)
    evaluate([cell], undisturbed, Solo(), Models("cpu"))
    ranks = Solo()

    def stop_late(phase: str, done: int, total: int, **numbers: float) -> None:
        ranks.stop = "drawing" in phase and done > 900

    ranks.on_report = stop_late
    with pytest.raises(Stopped):
        evaluate([cell], place, ranks, Models("cpu"))
    parts = list((place.registry / "draws").rglob("part-*.parquet"))
    assert 0 < len(parts) < 3 and all(pq.read_table(part).num_rows in (40 * 16, 40 * 8) for part in parts)
    evaluate([cell], place, Solo(), Models("cpu"))
    assert draws_of(cell, place) == draws_of(cell, undisturbed)


def test_rows_of_the_next_unit_fill_the_places_of_the_last(cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = draws_under_way(monkeypatch)
    published: list[int] = []
    publish = DrawsStore.publish

    def remember(self: DrawsStore, unit: WorkUnit, table: Any) -> None:
        published.append(len(rows))
        publish(self, unit, table)

    monkeypatch.setattr(DrawsStore, "publish", remember)
    evaluate([cell], place_in(tmp_path, batch_size=64), Solo(), Models("cpu"))
    assert len(published) == 3
    assert min(rows[: published[1]]) > 64 // 2, "rows stay busy while units end"
    assert rows[-1] < 64 // 4, "and run out once, at the end"
