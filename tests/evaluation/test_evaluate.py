"""Cells drawn in one stream: recorded as they end, with the numbers of jobs of their own, and nothing lost when the job stops."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ksweep import Cell, connect
from ksweep.evaluation.cell_run import CellRun, CurrentCell
from ksweep.evaluation.context import RunContext
from ksweep.evaluation.distributed import Solo, Stopped
from ksweep.evaluation.evaluate import evaluate, group_by_stream
from ksweep.evaluation.identity import cell_keys
from ksweep.evaluation.models import Models
from ksweep.evaluation.prepare import prepare_cell
from ksweep.evaluation.recording import CellRecorder
from ksweep.inference.engine import _SlotDecoder
from ksweep.registry.cell_draws import CellDraws, Coverage
from ksweep.registry.draws import DrawsStore
from ksweep.registry.work_units import WorkUnit
from ksweep.utils.timing import Clock
from tests.tiny_sweeps import talking_pair, tiny_cell

TEMPERATURES = (0.7, 1.0, 0.0)
COLUMNS = ["activation", "draw", "token_ids", "text", "explanation", "finish"]


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Cell:
    """40 activations x 8 draws."""
    return tiny_cell(talking_pair(tmp_path_factory.mktemp("pair"), num_rows=60), num_replicates=20)


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(("cpu",))


@pytest.fixture(scope="module")
def cells(cell: Cell) -> list[Cell]:
    """40 activations: 320 draws, 320 draws, 40 greedy ones."""
    return [replace(cell, sampling=replace(cell.sampling, temperature=t)) for t in TEMPERATURES]


def context_in(folder: Path, batch_size: int | None = None) -> RunContext:
    return RunContext(registry=folder / "registry", vector_cache=folder.parent / "vectors", batch_size=batch_size)


def draws_of(cell: Cell, context: RunContext) -> pa.Table:
    keys = cell_keys(cell)
    table = CellDraws(context.registry, keys.draws, keys.scores).read(40, cell.sampling.effective_num_draws, COLUMNS)
    assert table is not None
    return table


def ask(context: RunContext, question: str) -> list[tuple[Any, ...]]:
    with connect(context.registry) as connection:
        return connection.execute(question).fetchall()


@dataclass
class Watched:
    """What was seen of an evaluation while it went on."""

    context: RunContext
    rows: list[int] = field(default_factory=list)
    """Rows in flight at each step of the sampler."""
    published_at: list[int] = field(default_factory=list)
    """Number of the step after which each unit was published."""
    recorded_before: list[int] = field(default_factory=list)
    """Runs that had been recorded when each unit was published."""
    shares: list[tuple[float, int, list[int]]] = field(default_factory=list)
    """Of each cell: its share of the time, its tokens, and those of each cell still waiting."""
    seconds: float = 0.0


def watch(cells: list[Cell], context: RunContext, models: Models) -> Watched:
    watched, step, publish, share = Watched(context), _SlotDecoder._step, DrawsStore.publish, CellRecorder._time_share

    def count_rows(self: _SlotDecoder) -> Any:
        watched.rows.append(len(self.draws))
        return step(self)

    def note_publication(self: DrawsStore, unit: WorkUnit, table: pa.Table) -> pa.Table | None:
        watched.published_at.append(len(watched.rows))
        watched.recorded_before.append(len(list((context.registry / "landing").glob("*"))))
        return publish(self, unit, table)

    def note_share(recorder: CellRecorder, run: CellRun, draws: pa.Table) -> float:
        assert run.unpublished_tokens == 0
        others = [other.num_published_tokens() + other.unpublished_tokens for other in recorder.waiting if other is not run]
        watched.shares.append((share(recorder, run, draws), run.num_new_tokens(draws), others))
        return watched.shares[-1][0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_SlotDecoder, "_step", count_rows)
        patch.setattr(DrawsStore, "publish", note_publication)
        patch.setattr(CellRecorder, "_time_share", note_share)
        began = time.monotonic()
        evaluate(cells, context, Solo(), models)
        watched.seconds = time.monotonic() - began
    return watched


# --- cells in a stream ---


@pytest.fixture(scope="module")
def together(cells: list[Cell], models: Models, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """Three cells in one stream of 32 rows."""
    return watch(cells, context_in(tmp_path_factory.mktemp("together") / "a", batch_size=32), models)


@pytest.mark.slow
def test_cells_in_one_stream_have_the_draws_and_curves_of_jobs_of_their_own(
    cells: list[Cell], models: Models, together: Watched, tmp_path: Path
) -> None:
    apart = context_in(tmp_path / "apart")
    for cell in cells:
        [run_id] = evaluate([cell], apart, Solo(), models)
        assert (apart.registry / "landing" / run_id).is_dir()
        assert draws_of(cell, together.context) == draws_of(cell, apart)
    curves = "SELECT cell, k, fve, fve_low, fve_high, error FROM curves ORDER BY cell, k"
    found, expected = ask(together.context, curves), ask(apart, curves)
    assert [row[:2] for row in found] == [row[:2] for row in expected] and len(found) == 17
    np.testing.assert_allclose([row[2:] for row in found], [row[2:] for row in expected], atol=1e-5)


def test_the_first_rows_of_a_cell_fill_the_slots_that_the_last_of_another_leave(together: Watched) -> None:
    # 680 draws of up to 20 tokens in 32 slots: fewer than half are busy in the last 20 steps only.
    assert min(together.rows[:-20]) > 16


def test_a_cell_is_recorded_while_the_next_is_being_drawn(together: Watched) -> None:
    assert together.recorded_before[:2] == [0, 1]


def test_time_spent_together_is_split_by_tokens_and_nothing_is_lost(together: Watched) -> None:
    rows = ask(
        together.context,
        "SELECT seconds['drawing'], num_tokens_sampled, tokens_per_second, [engine['tf32'], engine['cuda_graphs']], "
        "seconds['waiting'] FROM runs",
    )
    assert len(rows) == 3 and all(row[3] == ["off", "off"] for row in rows)
    for drawing, tokens, rate, _, waiting in rows:
        assert rate == pytest.approx(tokens / (drawing + (waiting or 0.0)))
    assert all(row[0] > 0 for row in rows) and sum(row[0] for row in rows) < together.seconds


def test_tokens_of_pending_units_count_when_time_is_split(together: Watched) -> None:
    """The first cell is recorded when the slots it left have long been drawing the next one."""
    assert len(together.shares) == 3 and any(sum(others) for _, _, others in together.shares)
    assert all(share == own / (own + sum(others)) for share, own, others in together.shares)


@pytest.mark.slow
def test_cells_of_one_draws_key_in_a_stream_leave_out_what_another_draws(cell: Cell, models: Models, tmp_path: Path) -> None:
    def asking(activations: int, draws: int) -> Cell:
        return replace(
            cell, activations=replace(cell.activations, num_activations=activations),
            sampling=replace(cell.sampling, num_draws=draws),
        )  # fmt: skip

    context = context_in(tmp_path / "a")
    evaluate([asking(20, 8), asking(40, 4), asking(40, 8)], context, Solo(), models)
    found = ask(context, "SELECT num_activations, num_draws, num_draws_sampled, num_draws_reused FROM runs ORDER BY 1, 2")
    assert found == [(20, 8, 160, 0), (40, 4, 80, 80), (40, 8, 80, 240)]


@pytest.mark.slow
def test_a_failure_is_attributed_to_the_cell_whose_unit_was_being_published(
    cells: list[Cell], models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, second = context_in(tmp_path / "a", batch_size=32), cell_keys(cells[1])
    publish = DrawsStore.publish

    def fail(self: DrawsStore, unit: WorkUnit, table: pa.Table) -> pa.Table | None:
        if self.key == second.draws:
            raise OSError("no")
        return publish(self, unit, table)

    monkeypatch.setattr(DrawsStore, "publish", fail)
    reported: list[tuple[str, Mapping[str, float]]] = []
    with pytest.raises(OSError, match="no"):
        evaluate(cells, context, Solo(on_cell=lambda key, seconds: reported.append((key, seconds))), models)
    key, seconds = reported[-1]
    assert key == second.cell and seconds["drawing"] > 0
    assert ask(context, "SELECT cell_key FROM runs") == [(cell_keys(cells[0]).cell,)]


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


# --- units of a cell ---


@pytest.fixture(scope="module")
def many(cell: Cell) -> Cell:
    """40 activations x 40 draws: units of 16, 16 and 8 activations."""
    return replace(cell, sampling=replace(cell.sampling, num_draws=40))


@pytest.fixture(scope="module")
def undisturbed(many: Cell, models: Models, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    return watch([many], context_in(tmp_path_factory.mktemp("undisturbed") / "a", batch_size=64), models)


@pytest.mark.slow
def test_rows_of_the_next_unit_fill_the_slots_of_the_last(undisturbed: Watched) -> None:
    rows, published_at = undisturbed.rows, undisturbed.published_at
    assert len(published_at) == 3
    assert min(rows[: published_at[1]]) > 64 // 2, "rows stay busy while units end"
    assert rows[-1] < 64 // 4, "and run out once, at the end"


@pytest.mark.slow
def test_a_stop_in_the_middle_of_a_stream_keeps_whole_units_and_loses_no_draw(
    many: Cell, models: Models, undisturbed: Watched, tmp_path: Path
) -> None:
    context, ranks = context_in(tmp_path / "a", batch_size=48), Solo()

    def stop_late(phase: str, done: int, total: int, **numbers: float) -> None:
        ranks.stop = "drawing" in phase and done > 900

    ranks.on_report = stop_late
    with pytest.raises(Stopped):
        evaluate([many], context, ranks, models)
    parts = list((context.registry / "draws").rglob("part-*.parquet"))
    assert 0 < len(parts) < 3 and all(pq.read_table(part).num_rows in (40 * 16, 40 * 8) for part in parts)
    evaluate([many], context, Solo(), models)
    assert draws_of(many, context) == draws_of(many, undisturbed.context)


class SecondRank(Solo):
    """Rank 1 of 2, which receives what rank 0 has listed."""

    def from_first_rank(self, name: str, value: bytes) -> bytes:
        assert value == b"", "only rank 0 lists"
        return self.listed

    listed = b""


def test_every_rank_draws_what_rank_0_has_listed_whatever_it_sees_itself(
    cells: list[Cell], models: Models, tmp_path: Path
) -> None:
    context = context_in(tmp_path)
    evaluate([cells[0]], context, Solo(), models)
    second = SecondRank(rank=1, world_size=2)
    grid = (cells[0].activations.num_activations, cells[0].sampling.num_draws)
    drawn, scored = np.ones(grid, dtype=bool), np.ones(grid, dtype=bool)
    drawn[3, 1] = scored[3:5, 1] = False  # its own disk has all of them
    second.listed = Coverage(drawn, scored).to_bytes()
    run = prepare_cell(cells[0], [], context, second, CurrentCell(second))
    assert run.units == [WorkUnit(3, 4, 1, 2)] and run.num_unscored == 2
