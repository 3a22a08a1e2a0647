"""Evaluate cells from start to finish: what every rank of a job runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ksweep.config.spec import Activations, Autoencoder, Cell, cell_from_dict
from ksweep.evaluation.cell_run import CellRun, CurrentCell
from ksweep.evaluation.context import RunContext
from ksweep.evaluation.distributed import Ranks
from ksweep.evaluation.draw_loop import DrawLoop
from ksweep.evaluation.models import Models
from ksweep.evaluation.prepare import load_models, prepare_cell
from ksweep.evaluation.recording import CellRecorder
from ksweep.utils.timing import Clock


def run_job(argument: dict[str, Any], ranks: Ranks) -> list[str]:
    """Evaluate every cell of a job; the entry point of each rank. Rank 0 returns the ids of the runs that it recorded."""
    # 1. Read from the job where results go and which cells are evaluated.
    context = RunContext.from_argument(argument)
    cells = [cell_from_dict(value) for value in argument["cells"]]
    # 2. Evaluate together the cells whose draws one stream of the AV can take; models stay loaded from group to group.
    models = Models(ranks.devices, {cell.autoencoder: keys for cell, keys in context.keys.items()})
    return [run_id for group in group_by_stream(cells) for run_id in evaluate(group, context, ranks, models)]


def group_by_stream(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Group the cells that one stream can draw: same AV, activations (but for their number), engine, top_p and max_new_tokens."""
    groups: dict[tuple[Autoencoder, Activations, str, float, int], list[Cell]] = {}
    for cell in cells:
        activations, sampling = replace(cell.activations, num_activations=1), cell.sampling
        stream = (cell.autoencoder, activations, sampling.engine, sampling.top_p, sampling.max_new_tokens)
        groups.setdefault(stream, []).append(cell)
    return list(groups.values())


def evaluate(cells: Sequence[Cell], context: RunContext, ranks: Ranks, models: Models) -> list[str]:
    """Evaluate cells that one stream can draw. Rank 0 returns the ids of the runs that it recorded.

    A failure is only raised here: the command that finalizes the job sees every rank's outcome and records it.
    """
    current, shared_clock = CurrentCell(ranks), Clock()
    # 1. Identify each cell, extract its activations, and list its missing draws.
    runs: list[CellRun] = []
    for cell in cells:
        runs.append(prepare_cell(cell, runs, context, ranks, current))
    ranks.barrier()  # no rank publishes draws before every rank has listed the missing ones
    loop = DrawLoop(context.batch_size, ranks, current)
    recorder = CellRecorder(list(runs), context, ranks, models, loop, current, shared_clock)
    try:
        # 2. Record the cells whose draws are all stored already.
        recorder.record_completed()
        # 3. Load AV and AR, unless nothing is missing.
        work = load_models([run for run in runs if run.units], context, ranks, models, current)
        # 4. Draw, score and publish work units; record a cell as soon as all its draws are visible.
        for _ in shared_clock.each("drawing", loop.run(work, context.unit_order_seed)):
            recorder.record_completed()
        # 5. Wait until the other ranks have published their units.
        with shared_clock("waiting"):
            ranks.barrier()
        # 6. Record the remaining cells.
        recorder.record_remaining()
    finally:
        current.clock.take(shared_clock)
    return recorder.run_ids
