"""Record each cell of a stream as soon as its scored draws are visible, and charge it with its share of the common time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from ksweep.activations.caching import ensure
from ksweep.autoencoder.family import family_of
from ksweep.config.spec import Cell
from ksweep.evaluation.cell_record import record_cell
from ksweep.evaluation.cell_run import CellRun, CurrentCell
from ksweep.evaluation.cell_statistics import compute_statistics
from ksweep.evaluation.context import RunContext
from ksweep.evaluation.distributed import Ranks, Stopped
from ksweep.evaluation.draw_loop import DrawLoop
from ksweep.evaluation.metrics import compute_metric, metric_named
from ksweep.evaluation.models import Models
from ksweep.evaluation.prepare import log_notes
from ksweep.evaluation.summary import SUMMARISED
from ksweep.registry.cell_draws import CellDraws
from ksweep.utils.errors import RunError
from ksweep.utils.timing import Clock

LISTING_SECONDS = 90.0
"""NFS may cache a directory listing for up to 60 s (acdirmax), whatever other nodes write into the directory meanwhile."""


@dataclass
class CellRecorder:
    """Records the cells of a stream in their order. Only rank 0 does; on other ranks its methods do nothing."""

    waiting: list[CellRun]
    context: RunContext
    ranks: Ranks
    models: Models
    loop: DrawLoop
    current: CurrentCell
    shared_clock: Clock
    """Time that the waiting cells have spent together."""
    score_rest: Callable[[CellRun], None]
    """Scores on this rank what is drawn of a cell and has no scores."""
    numerics: dict[str, str] = field(default_factory=dict)
    """How this rank's AV computed texts, if it has been freed since."""
    run_ids: list[str] = field(default_factory=list)

    def record_completed(self) -> None:
        """Record leading cells whose draws are all visible on disk with their scores."""
        while self.ranks.rank == 0 and self.waiting and self.waiting[0].is_complete():
            self._record(self.waiting[0])

    def record_remaining(self) -> None:
        """Record all cells that are left, once every rank has published its draws."""
        while self.ranks.rank == 0 and self.waiting:
            self._record(self.waiting[0])

    def _record(self, run: CellRun) -> None:
        self.current.switch_to(run.keys, run.clock)
        # 1. Compute the cell's statistics from all its draws.
        with run.clock("statistics"):
            self.ranks.report(f"{run.keys.label}: statistics", 0, 0)
            draws = read_all_draws(run.store, run.grid, self.ranks)
            if draws is None:  # another job has drawn some, or another rank's were not visible when scores were due
                self.score_rest(run)
                draws = run.store.read(*run.grid, SUMMARISED)
            if draws is None:
                raise RunError(
                    f"draws of {run.keys.name} are missing right after they were published: is another program changing "
                    f"{run.store.path}?"
                )
            empty_text = _empty_text_reconstruction(run.cell, run.store, self.models)
            statistics = compute_statistics(run.cell, run.vectors, run.store, draws, empty_text, self.context.registry)
            log_notes(run.keys, statistics.reference.notes)
            if run.cell.scoring.metrics:
                self._compute_metrics(run)
        # 2. Charge it with its part of the time that the waiting cells have spent together.
        run.clock.take(self.shared_clock, self._time_share(run, draws))
        # 3. Write its run record.
        numerics = self.numerics or self.models.numerics(run.cell.sampling)
        engine = (numerics | self.loop.batch_settings()) if run.units else {}
        self.run_ids.append(record_cell(run, self.context, self.ranks, statistics, draws, engine))
        self.waiting.remove(run)

    def _compute_metrics(self, run: CellRun) -> None:
        def activations(num: int) -> np.ndarray:
            """Return the first activations, also some beyond the cell's: parts of draws are scored whole."""
            wanted = replace(run.cell.activations, num_activations=num)
            vectors = ensure(wanted, run.keys.layer, self.context.vector_cache, device=self.ranks.devices).vectors()
            family = family_of(run.cell.autoencoder)
            return vectors if family.space is None else family.transform()(vectors)

        for name in run.cell.scoring.metrics:
            compute_metric(metric_named(name), self.context.registry, run.keys.draws, run.grid, activations)

    def _time_share(self, run: CellRun, draws: pa.Table) -> float:
        """Return a cell's share of the tokens drawn for all waiting cells.

        Other ranks are assumed to have as many unpublished tokens as this one.
        """
        own = run.num_new_tokens(draws)
        others = (
            other.num_published_tokens() + self.ranks.world_size * other.unpublished_tokens
            for other in self.waiting
            if other is not run
        )
        return own / max(1, own + sum(others))


def read_all_draws(store: CellDraws, grid: tuple[int, int], ranks: Ranks) -> pa.Table | None:
    """Read every draw of a grid [activation, draw] with its scores, or return None where some are missing.

    With several ranks it waits up to LISTING_SECONDS for what ranks on other nodes have just published.

    Raises:
        Stopped: a stop was requested meanwhile.
    """
    deadline = time.monotonic() + (LISTING_SECONDS if ranks.world_size > 1 else 0.0)
    while not store.is_complete(*grid) and time.monotonic() < deadline:
        if ranks.should_stop():
            raise Stopped("stopped before the draws of every rank were visible")
        time.sleep(1.0)
    return store.read(*grid, SUMMARISED)


def _empty_text_reconstruction(cell: Cell, store: CellDraws, models: Models) -> np.ndarray | None:
    """Return the AR's reconstruction [d_model] of an empty text, computed once per scores key; None if the AR cannot read one."""
    controls = store.controls()
    if controls is None:
        from ksweep.autoencoder.base import Explanation

        ar = models.reconstructor(cell.autoencoder)
        vector = np.asarray(ar.reconstruct([Explanation("")]))[0].tolist() if ar.reads_empty_text else None
        controls = {"empty_text": vector}
        store.publish_controls(controls)
    return None if controls["empty_text"] is None else np.asarray(controls["empty_text"])
