"""Prepare cells: identify them, extract their activations, list missing draws and scores, load the models."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ksweep.autoencoder.family import family_of
from ksweep.autoencoder.norms import norm_notes
from ksweep.config.spec import Cell
from ksweep.evaluation.cell_run import CellRun, CurrentCell
from ksweep.evaluation.context import RunContext
from ksweep.evaluation.distributed import Ranks, Stopped
from ksweep.evaluation.given_texts import publish_texts, text_notes
from ksweep.evaluation.identity import CellKeys, cell_keys, one_document_error, resolve_cell
from ksweep.evaluation.models import Models, check_as_planned
from ksweep.evaluation.scoring import UnitScoring
from ksweep.evaluation.unit_drawing import UnitDrawing
from ksweep.registry.cell_draws import CellDraws, Coverage
from ksweep.registry.work_units import missing_work_units
from ksweep.utils.errors import DataError
from ksweep.utils.notes import Note, notes_of
from ksweep.utils.timing import Clock

if TYPE_CHECKING:
    from ksweep.activations.store import ActivationTable

log = logging.getLogger(__name__)

NUM_NORMS_CHECKED = 2048
"""Activations whose norms are compared with those of the training."""


def prepare_cell(cell: Cell, earlier: Sequence[CellRun], context: RunContext, ranks: Ranks, current: CurrentCell) -> CellRun:
    """Identify a cell, extract its activations, and list the draws and scores that it still needs.

    What is stored, or due for one of the `earlier` cells of the job, is not needed.

    Raises:
        DataError: the activations changed after the cell was identified, or all of them are of one document and the baseline
            needs several.
    """
    # 1. Identify the cell as its launcher did.
    clock = Clock()
    cell, keys = _identify(cell, context)
    current.switch_to(keys, clock)
    # 2. Extract its activations, together with the other ranks.
    vectors = _extract_activations(cell, keys, context, ranks, clock)
    _check_activations(cell, keys, vectors)
    notes = (*keys.notes, *vectors.notes, *_norm_notes(cell, vectors))
    # 3. Set damaged files aside, so that their draws count as missing, and take over draws of earlier versions and given texts.
    store = CellDraws(context.registry, keys.draws, keys.scores, keys.combined)
    grid = (len(vectors), cell.sampling.effective_num_draws)
    family = family_of(cell.autoencoder)
    if ranks.rank == 0:
        if family.draws_are_given:
            check_as_planned(family, keys)
            notes += text_notes(family.given_texts, vectors, grid[1])
        log_notes(keys, notes)
        store.set_damaged_aside(*grid)
        store.describe(keys.identity)
        store.take_over_earlier(*grid)
        if family.draws_are_given:
            publish_texts(family, vectors, store, grid[1])
    ranks.barrier()
    # 4. List the missing draws and scores. Rank 0 does it for all: listings of a network directory differ from host to host, and
    #    another job may publish meanwhile.
    stored = store.coverage(*grid).to_bytes() if ranks.rank == 0 else b""
    coverage = Coverage.from_bytes(ranks.from_first_rank(f"coverage/{len(earlier)}", stored), grid)
    for other in earlier:
        if other.keys.draws == keys.draws:
            coverage.drawn[: other.grid[0], : other.grid[1]] = True
            if other.keys.scores == keys.scores:
                coverage.scored[: other.grid[0], : other.grid[1]] = True
    units = missing_work_units(coverage.drawn)
    return CellRun(cell, keys, clock, vectors, store, coverage.drawn, coverage.scored, units, notes)


def _identify(cell: Cell, context: RunContext) -> tuple[Cell, CellKeys]:
    """Return the resolved cell and its keys: those of job.json, or, of a job without them, those that the files give now."""
    if (keys := context.keys.get(cell)) is not None:
        return cell, keys
    names, resolved = context.names.get(cell), resolve_cell(cell)
    keys = cell_keys(resolved)
    return resolved, keys if names is None else keys.with_names(*names)


def _extract_activations(cell: Cell, keys: CellKeys, context: RunContext, ranks: Ranks, clock: Clock) -> ActivationTable:
    from ksweep.activations.caching import ensure
    from ksweep.activations.store import TransformedTable

    def progress(done: int, total: int) -> None:
        ranks.report("activations", done, total)
        if ranks.should_stop():
            raise Stopped(f"stopped with {done} of {total} activations extracted")

    with clock("activations"):
        vectors = ensure(
            cell.activations, keys.layer, context.vector_cache, rank=ranks.rank, world_size=ranks.world_size,
            barrier=ranks.barrier, device=ranks.devices, progress=progress,
        )  # fmt: skip
        if vectors.key != keys.stored_activations:
            raise DataError(f"the text or the model of {keys.name} changed while its activations were extracted: run it again")
        family = family_of(cell.autoencoder)
        return vectors if family.space is None else TransformedTable(vectors, keys.activations, family.transform())


def _check_activations(cell: Cell, keys: CellKeys, vectors: ActivationTable) -> None:
    if cell.scoring.baseline_kind == "between documents" and vectors.num_documents() < 2:
        raise one_document_error(cell, keys.name)


def _norm_notes(cell: Cell, vectors: ActivationTable) -> Iterator[Note]:
    """Compare the norms of the first activations with those that the autoencoder was trained on."""
    trained = family_of(cell.autoencoder).training_norm()
    source = cell.activations.vectors or f"{cell.activations.model} on {cell.activations.text}"
    return norm_notes(vectors.vectors(0, min(len(vectors), NUM_NORMS_CHECKED)), trained, source)


def load_for_drawing(runs: Sequence[CellRun], ranks: Ranks, models: Models, current: CurrentCell) -> dict[CellRun, UnitDrawing]:
    """Load the AV, and return how the cells that lack draws are drawn; empty, with nothing loaded, where none does."""
    missing = [run for run in runs if run.units]
    if not missing:
        return {}
    with _loading(missing[0], ranks, current):
        av = models.verbalizer(missing[0].cell.autoencoder, missing[0].cell.sampling.engine)
    if ranks.rank == 0:
        for run in missing:
            run.store.draws.keep_notes(notes_of(av))
        log_notes(missing[0].keys, notes_of(av))
    return {run: UnitDrawing(sampling=run.cell.sampling, vectors=run.vectors, av=av) for run in missing}


def load_for_scoring(
    runs: Sequence[CellRun], context: RunContext, ranks: Ranks, models: Models, current: CurrentCell
) -> dict[CellRun, UnitScoring]:
    """Load the AR that the cells share, and return how they are scored; empty, with nothing loaded, for no cells."""
    if not runs:
        return {}
    autoencoder = runs[0].cell.autoencoder
    family = family_of(autoencoder)
    with _loading(runs[0], ranks, current):
        ar = models.reconstructor(autoencoder)
    if ranks.rank == 0:
        for run in runs:
            run.store.scores.keep_notes(notes_of(ar))
        log_notes(runs[0].keys, notes_of(ar))
    return {
        run: UnitScoring(
            vectors=run.vectors, ar=ar, batch_size=context.batch_size, device=ranks.devices[0], scoring=run.cell.scoring,
            scoring_kind=family.scoring_kind, keeps_reconstructions=family.has_reference_quantities,
        )
        for run in runs
    }  # fmt: skip


@contextmanager
def _loading(run: CellRun, ranks: Ranks, current: CurrentCell) -> Iterator[None]:
    current.switch_to(run.keys, run.clock)
    with run.clock("loading"):
        ranks.report(f"{run.keys.label}: loading models", 0, 0)
        yield


def log_notes(keys: CellKeys, notes: Iterable[Note]) -> None:
    """Log each note as a warning under the name of the cell."""
    for note in notes:
        log.warning("%s: %s: %s", keys.name, note.about, note.text)
