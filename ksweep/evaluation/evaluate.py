"""Cells from start to finish: what every rank of a job runs. Read it like a method section."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ksweep.autoencoder.family import family_of
from ksweep.autoencoder.norms import norm_notes
from ksweep.config.spec import Activations, Autoencoder, Cell, cell_from_dict
from ksweep.evaluation.cell_run import AtHand, Begun
from ksweep.evaluation.context import Place
from ksweep.evaluation.distributed import Ranks, Stopped
from ksweep.evaluation.draw_loop import Drawing
from ksweep.evaluation.identity import Keys, cell_keys, complete, one_document_error
from ksweep.evaluation.models import Models
from ksweep.evaluation.recording import land, measure, names_in
from ksweep.evaluation.scoring import UnitWork
from ksweep.evaluation.summary import SUMMARISED
from ksweep.registry.draws import DrawsStore, units_of
from ksweep.utils.errors import DataError, RunError
from ksweep.utils.notes import Note, notes_of
from ksweep.utils.timing import Clock

if TYPE_CHECKING:
    from ksweep.activations.store import ActivationTable

log = logging.getLogger(__name__)

NORMS_LOOKED_AT = 2048
"""Activations whose lengths are compared with those of the training."""
LISTING_SECONDS = 90.0
"""NFS remembers the listing of a directory for up to 60 s (acdirmax), whatever other nodes do in it meanwhile."""


def run_job(argument: dict[str, Any], ranks: Ranks) -> list[str]:
    """Every cell of a job; the entry point of each rank. Returns the runs that were landed (rank 0)."""
    place = Place(
        registry=Path(argument["registry"]),
        vector_cache=Path(argument["vector_cache"]),
        batch_size=argument["batch_size"],
        sweep=argument["sweep"],
        resources=argument["resources"],
        origin=argument["origin"],
        order=argument.get("order", 0),
        names=names_in(argument),
    )
    models = Models(ranks.devices)
    groups = in_groups([cell_from_dict(value) for value in argument["cells"]])
    return [run for cells in groups for run in evaluate(cells, place, ranks, models)]


def in_groups(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that one stream can draw: they share the AV, what it explains and when a text ends, but for how many."""
    together: dict[tuple[Autoencoder, Activations, float, int], list[Cell]] = {}
    for cell in cells:
        explained, sampling = replace(cell.activations, num_activations=1), cell.sampling
        together.setdefault((cell.autoencoder, explained, sampling.top_p, sampling.max_new_tokens), []).append(cell)
    return list(together.values())


def evaluate(cells: Sequence[Cell], place: Place, ranks: Ranks, models: Models) -> list[str]:
    """Measure cells that one stream can draw; rank 0 lands the run of each as soon as its draws are there, and returns their ids.

    How a cell failed is told by who sees the end of every rank.
    """
    at_hand, together = AtHand(ranks), Clock()
    begun: list[Begun] = []
    for cell in cells:
        begun.append(_begin(cell, begun, place, ranks, at_hand))
    ranks.barrier()  # nobody publishes before everyone has counted
    drawing = Drawing({}, place.batch_size, ranks, at_hand)
    landing = _Landing(list(begun), place, ranks, models, drawing, at_hand, together)
    try:
        landing.whole_ones()
        drawing.work = _work([cell for cell in begun if cell.units], place, ranks, models, at_hand)
        for _ in together.each("drawing", drawing.run(place.order)):
            landing.whole_ones()
        with together("waiting"):
            ranks.barrier()
        landing.all_of_them()
    finally:
        at_hand.clock.take(together)
    return landing.landed


def _begin(cell: Cell, earlier: Sequence[Begun], place: Place, ranks: Ranks, at_hand: AtHand) -> Begun:
    """A cell with its activations, and what is left to draw for it once the earlier cells of its group have their draws."""
    clock, names, cell = Clock(), place.names.get(cell), complete(cell)
    keys = cell_keys(cell) if names is None else cell_keys(cell).called(*names)
    at_hand.turn_to(keys, clock)
    vectors = _activations(cell, keys, place, ranks, clock)
    if vectors.key != keys.activations:
        raise DataError(f"text or model of {keys.name} changed while it was begun: run again to use them as they are now")
    if cell.scoring.baseline_kind == "between documents" and vectors.num_documents() < 2:
        raise one_document_error(cell, keys.name)
    store = DrawsStore(place.registry / "draws", keys.draws)
    wanted = (len(vectors), cell.sampling.effective_num_draws)
    notes = (*keys.notes, *_norm_notes(cell, vectors))
    if ranks.rank == 0:
        _log_notes(keys, notes)
        store.set_damaged_aside(*wanted)
        store.describe(keys.identity)
    ranks.barrier()
    before = store.coverage(*wanted)
    for other in earlier:
        if other.keys.draws == keys.draws:
            before[: other.before.shape[0], : other.before.shape[1]] = True
    return Begun(cell, keys, clock, vectors, store, before, units_of(before), notes)


def _norm_notes(cell: Cell, vectors: ActivationTable) -> Iterator[Note]:
    """What the lengths of the first activations say."""
    trained = family_of(cell.autoencoder).training_norm()
    source = cell.activations.vectors or f"{cell.activations.model} on {cell.activations.text}"
    return norm_notes(vectors.vectors(0, min(len(vectors), NORMS_LOOKED_AT)), trained, source)


def _log_notes(keys: Keys, notes: Iterable[Note]) -> None:
    for note in notes:
        log.warning("%s: %s: %s", keys.name, note.about, note.text)


def _activations(cell: Cell, keys: Keys, place: Place, ranks: Ranks, clock: Clock) -> ActivationTable:
    from ksweep.activations.caching import ensure

    def progress(done: int, total: int) -> None:
        ranks.report("activations", done, total)
        if ranks.should_stop():
            raise Stopped(f"stopped with {done} of {total} activations extracted")

    with clock("activations"):
        return ensure(
            cell.activations, keys.layer, place.vector_cache, rank=ranks.rank, world_size=ranks.world_size,
            barrier=ranks.barrier, device=ranks.devices, progress=progress,
        )  # fmt: skip


def _work(missing: Sequence[Begun], place: Place, ranks: Ranks, models: Models, at_hand: AtHand) -> dict[Begun, UnitWork]:
    """What is to be done for each cell that lacks draws, with the models loaded."""
    if not missing:
        return {}
    first, autoencoder = missing[0], missing[0].cell.autoencoder
    at_hand.turn_to(first.keys, first.clock)
    with first.clock("loading"):
        ranks.report(f"{first.keys.label}: loading models", 0, 0)
        av, ar = models.verbalizer(autoencoder), models.reconstructor(autoencoder)
    if ranks.rank == 0:
        for cell in missing:
            cell.store.keep_notes(notes_of(av, ar))
        _log_notes(first.keys, notes_of(av, ar))
    return {
        one: UnitWork(
            one.cell.sampling, one.vectors, av, ar, place.batch_size, ranks.devices[0], autoencoder.scoring_kind, one.cell.scoring
        )
        for one in missing
    }


@dataclass
class _Landing:
    """Cells of a group, landed by rank 0 in their order."""

    waiting: list[Begun]
    place: Place
    ranks: Ranks
    models: Models
    drawing: Drawing
    at_hand: AtHand
    together: Clock
    """What the cells that wait have spent together."""
    landed: list[str] = field(default_factory=list)

    def whole_ones(self) -> None:
        """The first cells, as far as every draw of theirs is to be seen."""
        while self.ranks.rank == 0 and self.waiting and self.waiting[0].is_whole():
            self._land(self.waiting[0])

    def all_of_them(self) -> None:
        """The rest, when every rank has done its part."""
        while self.ranks.rank == 0 and self.waiting:
            self._land(self.waiting[0])

    def _land(self, one: Begun) -> None:
        self.at_hand.turn_to(one.keys, one.clock)
        with one.clock("statistics"):
            self.ranks.report(f"{one.keys.label}: statistics", 0, 0)
            draws = _all_draws(one.store, one.wanted, self.ranks)
            if draws is None:
                raise RunError(
                    f"draws of {one.keys.name} are missing right after they were taken: is {one.store.path} being changed by "
                    "someone?"
                )
            empty = _empty_text(one.cell, one.store, self.models)
            found = measure(one.cell, one.vectors, one.store, draws, empty, self.place.registry)
            _log_notes(one.keys, found.reference.notes)
        one.clock.take(self.together, self._share(one, draws))
        engine = (self.models.numerics(one.cell.sampling.max_new_tokens) | self.drawing.batches()) if one.units else {}
        self.landed.append(land(one, self.place, self.ranks, found, draws, engine))
        self.waiting.remove(one)

    def _share(self, one: Begun, draws: pa.Table) -> float:
        """Part of the time spent together that a cell is charged with: that of its tokens among all that are drawn.

        Other ranks are taken to have as much under way as this one.
        """
        mine = one.num_tokens_drawn(draws)
        others = (c.num_tokens_seen() + self.ranks.world_size * c.unpublished for c in self.waiting if c is not one)
        return mine / max(1, mine + sum(others))


def _all_draws(store: DrawsStore, wanted: tuple[int, int], ranks: Ranks) -> pa.Table | None:
    """Every draw; what a rank on another node has just published may for a while not be listed here."""
    deadline = time.monotonic() + (LISTING_SECONDS if ranks.world_size > 1 else 0.0)
    while not store.coverage(*wanted).all() and time.monotonic() < deadline:
        if ranks.should_stop():
            raise Stopped("stopped before the draws of every rank were to be seen")
        time.sleep(1.0)
    return store.read(*wanted, SUMMARISED)


def _empty_text(cell: Cell, store: DrawsStore, models: Models) -> np.ndarray | None:
    """What the AR makes of an empty text, if it can read one; measured once per draws key."""
    controls = store.controls()
    if controls is None:
        from ksweep.autoencoder.base import Explanation

        ar = models.reconstructor(cell.autoencoder)
        vector = np.asarray(ar.reconstruct([Explanation("")]))[0].tolist() if ar.reads_empty_text else None
        controls = {"empty_text": vector}
        store.publish_controls(controls)
    return None if controls["empty_text"] is None else np.asarray(controls["empty_text"])
