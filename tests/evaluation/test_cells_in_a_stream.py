"""Cells of a job that share an AV: drawn in one stream, each landed once it is whole, with the numbers of a job of its own."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ksweep import Cell, Resources, Sweep, connect
from ksweep.evaluation.context import RunContext
from ksweep.evaluation.distributed import Solo
from ksweep.evaluation.evaluate import evaluate, group_by_stream
from ksweep.evaluation.identity import cell_keys
from ksweep.evaluation.models import Models
from ksweep.evaluation.recorder import Recorder
from ksweep.registry.draws import DrawsStore, WorkUnit
from ksweep.utils.timing import Clock
from tests.evaluation.test_units_in_a_stream import draws_under_way
from tests.tiny_sweeps import ask, run, talking_pair, tiny_cell

TEMPERATURES = (0.7, 1.0, 0.0)
COLUMNS = ["activation", "draw", "token_ids", "text", "explanation", "finish"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Cell:
    return tiny_cell(talking_pair(tmp_path_factory.mktemp("pair"), num_rows=60), num_replicates=20)


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(("cpu",))


@pytest.fixture
def cells(cell: Cell) -> list[Cell]:
    """40 activations: 320 draws, 320 draws, 40 greedy ones."""
    return [replace(cell, sampling=replace(cell.sampling, temperature=t)) for t in TEMPERATURES]


def place_in(folder: Path, batch_size: int | None = None) -> RunContext:
    return RunContext(registry=folder / "registry", vector_cache=folder.parent / "vectors", batch_size=batch_size)


def draws_of(cell: Cell, place: RunContext) -> pa.Table:
    store = DrawsStore(place.registry / "draws", cell_keys(cell).draws)
    table = store.read(40, cell.sampling.effective_num_draws, COLUMNS)
    assert table is not None
    return table


def ask_place(place: RunContext, question: str) -> list[tuple[Any, ...]]:
    with connect(place.registry) as connection:
        return connection.execute(question).fetchall()


def test_cells_in_one_stream_have_the_draws_and_curves_of_jobs_of_their_own(
    cells: list[Cell], models: Models, tmp_path: Path
) -> None:
    apart, together = place_in(tmp_path / "apart"), place_in(tmp_path / "together", batch_size=100)
    for cell in cells:
        evaluate([cell], apart, Solo(), models)
    assert len(evaluate(cells, together, Solo(), models)) == 3
    for cell in cells:
        assert draws_of(cell, together) == draws_of(cell, apart)
    curves = "SELECT cell, k, fve, fve_low, fve_high, error FROM curves ORDER BY cell, k"
    found, expected = ask_place(together, curves), ask_place(apart, curves)
    assert [row[:2] for row in found] == [row[:2] for row in expected] and len(found) == 17
    np.testing.assert_allclose([row[2:] for row in found], [row[2:] for row in expected], atol=1e-5)


def test_the_first_rows_of_a_cell_fill_the_places_that_the_last_of_another_leave(
    cells: list[Cell], models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = draws_under_way(monkeypatch)
    evaluate(cells[:2], place_in(tmp_path / "a", batch_size=32), Solo(), models)
    # 640 draws of up to 20 tokens at 32 places: fewer than half are busy in the last 20 steps only.
    assert min(rows[:-20]) > 16


def test_a_cell_is_landed_while_the_next_is_being_drawn(
    cells: list[Cell], models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, landed_before = place_in(tmp_path / "a", batch_size=32), list[int]()
    publish = DrawsStore.publish

    def remember(self: DrawsStore, unit: WorkUnit, table: pa.Table) -> None:
        landed_before.append(len(list((place.registry / "landing").glob("*"))) if place.registry.exists() else 0)
        publish(self, unit, table)

    monkeypatch.setattr(DrawsStore, "publish", remember)
    evaluate(cells, place, Solo(), models)
    assert landed_before[:2] == [0, 1]


def test_cells_of_one_draws_key_in_a_stream_leave_out_what_another_draws(cell: Cell, models: Models, tmp_path: Path) -> None:
    def asking(activations: int, draws: int) -> Cell:
        return replace(
            cell, activations=replace(cell.activations, num_activations=activations),
            sampling=replace(cell.sampling, num_draws=draws),
        )  # fmt: skip

    place = place_in(tmp_path / "a")
    evaluate([asking(20, 8), asking(40, 4), asking(40, 8)], place, Solo(), models)
    found = ask_place(place, "SELECT num_activations, num_draws, num_draws_sampled, num_draws_reused FROM runs ORDER BY 1, 2")
    assert found == [(20, 8, 160, 0), (40, 4, 80, 80), (40, 8, 80, 240)]


def test_a_failure_is_blamed_on_the_cell_whose_unit_was_at_hand(
    cells: list[Cell], models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, second = place_in(tmp_path / "a", batch_size=32), cell_keys(cells[1])
    publish = DrawsStore.publish

    def fail(self: DrawsStore, unit: WorkUnit, table: pa.Table) -> None:
        if self.key == second.draws:
            raise OSError("no")
        publish(self, unit, table)

    monkeypatch.setattr(DrawsStore, "publish", fail)
    told: list[tuple[str, Mapping[str, float]]] = []
    with pytest.raises(OSError, match="no"):
        evaluate(cells, place, Solo(on_cell=lambda key, seconds: told.append((key, seconds))), models)
    key, seconds = told[-1]
    assert key == second.cell and seconds["drawing"] > 0
    assert ask_place(place, "SELECT cell_key FROM runs") == [(cell_keys(cells[0]).cell,)]


def test_time_spent_together_is_split_by_tokens_and_nothing_is_lost(cells: list[Cell], models: Models, tmp_path: Path) -> None:
    place = place_in(tmp_path / "a", batch_size=1000)  # every draw is under way at once, the cells end together
    began = time.monotonic()
    evaluate(cells, place, Solo(), models)
    elapsed = time.monotonic() - began
    rows = ask_place(
        place,
        "SELECT seconds['drawing'], num_tokens_sampled, tokens_per_second, [engine['tf32'], engine['cuda_graphs']], "
        "seconds['waiting'] FROM runs",
    )
    assert len(rows) == 3 and all(row[3] == ["off", "off"] for row in rows)
    for drawing, tokens, rate, _, waiting in rows:
        assert rate == pytest.approx(tokens / (drawing + (waiting or 0.0)))
    assert all(row[0] > 0 for row in rows) and sum(row[0] for row in rows) < elapsed


def test_tokens_of_units_under_way_count_when_time_is_split(
    cells: list[Cell], models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first cell is landed when the places it left have long been drawing the next one."""
    place, seen = place_in(tmp_path / "a", batch_size=200), list[tuple[float, int, list[int]]]()
    split = Recorder._time_share

    def watched(recorder: Any, run: Any, draws: Any) -> float:
        others = [other.num_published_tokens() + other.unpublished_tokens for other in recorder.waiting if other is not run]
        seen.append((split(recorder, run, draws), run.num_new_tokens(draws), others))
        assert run.unpublished_tokens == 0
        return seen[-1][0]

    monkeypatch.setattr(Recorder, "_time_share", watched)
    evaluate(cells, place, Solo(), models)
    assert len(seen) == 3 and any(sum(others) for _, _, others in seen)
    assert all(share == mine / (mine + sum(others)) for share, mine, others in seen)


def test_a_clock_hands_over_shares_that_add_up() -> None:
    whole, one, other = Clock(), Clock(), Clock()
    whole.add({"drawing": 8.0, "waiting": 1.0})
    one.take(whole, 0.25)
    whole.add({"drawing": 4.0})
    other.take(whole)
    assert one.seconds == {"drawing": 2.0, "waiting": 0.25}
    assert other.seconds == {"drawing": 10.0, "waiting": 0.75}
    assert whole.seconds == {"drawing": 0.0, "waiting": 0.0}


def test_groups_hold_what_a_stream_can_draw_in_the_order_of_their_first_cell(cell: Cell) -> None:
    hot = replace(cell, sampling=replace(cell.sampling, temperature=1.3, seed=5))
    nucleus = replace(cell, sampling=replace(cell.sampling, top_p=0.9))
    longer = replace(cell, sampling=replace(cell.sampling, max_new_tokens=21))
    other = replace(cell, activations=replace(cell.activations, min_position=11))
    fewer = replace(cell, activations=replace(cell.activations, num_activations=5))
    assert group_by_stream([cell, nucleus, hot, longer, other, fewer]) == [[cell, hot, fewer], [nucleus], [longer], [other]]


@pytest.mark.slow
def test_two_ranks_draw_cells_in_one_stream_as_one_rank_draws_each(
    cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    one = Sweep(
        name="tiny", cell=cell, axes={"sampling.temperature": TEMPERATURES}, registry=str(tmp_path / "one"),
        vector_cache=str(tmp_path / "vectors"), resources=Resources(cluster="inprocess", gpus=0, cells_per_job=1),
    )  # fmt: skip
    two = replace(one, registry=str(tmp_path / "two"), resources=Resources(cluster="local", gpus=0, tasks=2))
    assert run(one) == 0 and run(two) == 0
    texts = "SELECT draws_key, activation, draw, text, token_ids FROM draws ORDER BY 1, 2, 3"
    assert ask(one, texts) == ask(two, texts)
    assert ask(two, "SELECT status, num_ranks FROM runs") == [("finished", 2)] * 3
    curves = "SELECT fve, fve_low, error FROM curves ORDER BY cell, k"
    np.testing.assert_allclose(ask(two, curves), ask(one, curves), atol=1e-5)
