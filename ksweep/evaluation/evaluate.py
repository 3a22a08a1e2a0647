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
from ksweep.evaluation.memory_plan import draws_before_scoring
from ksweep.evaluation.models import Models
from ksweep.evaluation.prepare import load_for_drawing, load_for_scoring, prepare_cell
from ksweep.evaluation.recording import CellRecorder
from ksweep.evaluation.score_loop import ScoreLoop
from ksweep.registry.work_units import WorkUnit
from ksweep.utils.timing import Clock


def run_job(argument: dict[str, Any], ranks: Ranks) -> list[str]:
    """Evaluate every cell of a job; the entry point of each rank. Rank 0 returns the ids of the runs that it recorded."""
    # 1. Read from the job where results go and which cells are evaluated.
    context = RunContext.from_argument(argument)
    cells = [cell_from_dict(value) for value in argument["cells"]]
    # 2. Evaluate together the cells whose draws one stream of the AV can take; models stay loaded from group to group.
    models = Models(ranks.devices, {cell.autoencoder: keys for cell, keys in context.keys.items()})
    runs: list[CellRun] = []
    return [run_id for group in group_by_stream(cells) for run_id in evaluate(group, context, ranks, models, runs)]


def group_by_stream(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Group the cells that one stream can draw and score.

    They have the same AV, AR, activations (but for their number), engine, top_p and max_new_tokens. Groups with the same AV
    follow one another, so that it stays loaded; those after the first find their common draws stored.
    """
    groups: dict[tuple[Autoencoder, Activations, str, float, int], list[Cell]] = {}
    for cell in cells:
        activations, sampling = replace(cell.activations, num_activations=1), cell.sampling
        stream = (cell.autoencoder, activations, sampling.engine, sampling.top_p, sampling.max_new_tokens)
        groups.setdefault(stream, []).append(cell)
    first_of_av: dict[tuple[Any, ...], int] = {}
    for group in groups.values():
        first_of_av.setdefault(group[0].autoencoder.av_values, len(first_of_av))
    return sorted(groups.values(), key=lambda group: first_of_av[group[0].autoencoder.av_values])


def evaluate(
    cells: Sequence[Cell], context: RunContext, ranks: Ranks, models: Models, runs_before: list[CellRun] | None = None
) -> list[str]:
    """Evaluate cells that one stream can draw. Rank 0 returns the ids of the runs that it recorded.

    A failure is only raised here: the command that finalizes the job sees every rank's outcome and records it.

    Args:
        cells: the cells, all of one autoencoder.
        context: where results go.
        ranks: the ranks of the job.
        models: the models of the job.
        runs_before: cells that the job has evaluated before, whose draws exist; those of this call are added.
    """
    current, shared_clock = CurrentCell(ranks), Clock()
    # 1. Identify each cell, extract its activations, and list its missing draws and scores.
    before = [] if runs_before is None else runs_before
    stream = len(before)  # the same on every rank; the same cells may come twice in a job
    for cell in cells:
        before.append(prepare_cell(cell, before, context, ranks, current))
    runs = before[stream:]
    loop, score_loop = DrawLoop(context.batch_size, ranks, current), ScoreLoop(ranks, current)

    def score_rest(run: CellRun) -> None:
        scoring = load_for_scoring([run], context, ranks, models, current)[run]
        for _ in score_loop.score(run, scoring, WorkUnit.of_grid(*run.grid)):
            pass

    recorder = CellRecorder(list(runs), context, ranks, models, loop, current, shared_clock, score_rest)
    try:
        # 2. Record the cells whose draws and scores are all stored already.
        recorder.record_completed()
        # 3. Load AV and AR, as far as something is missing. In phases the AR is loaded when the AV has been freed.
        unscored = [run for run in runs if run.num_unscored]
        phases = draws_before_scoring(runs, context.phases, ranks, stream)
        if phases and any(run.units for run in runs):
            models.release_reconstructor()  # of an earlier stream, or of step 2
        drawing = load_for_drawing(runs, ranks, models, current)
        scoring = {} if phases and drawing else load_for_scoring(unscored, context, ranks, models, current)
        # 4. Score draws that exist already; record a cell as soon as all its draws are visible with their scores.
        for _ in score_loop.run(scoring, f"scores before drawing/{stream}"):
            recorder.record_completed()
        # 5. Draw and publish work units, and score each.
        for _ in shared_clock.each("drawing", loop.run(drawing, scoring, f"draws/{stream}", context.unit_order_seed)):
            recorder.record_completed()
        # 6. Wait until the other ranks have published their units.
        with shared_clock("waiting"):
            ranks.barrier()
        # 7. Score what is drawn and not scored: everything in phases, else what other jobs have drawn meanwhile.
        if phases and drawing:
            recorder.numerics = models.numerics(runs[0].cell.sampling)
            drawing.clear()
            loop.forget_models()
            models.release_verbalizer()
            scoring = load_for_scoring(unscored, context, ranks, models, current)
        if drawing or phases:
            for _ in score_loop.run(scoring, f"scores after drawing/{stream}"):
                recorder.record_completed()
        with shared_clock("waiting"):
            ranks.barrier()
        # 8. Record the remaining cells.
        recorder.record_remaining()
    finally:
        current.clock.take(shared_clock)
    return recorder.run_ids
