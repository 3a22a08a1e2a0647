"""Before anything runs: gather the facts of each cell from the stores, plan, and check directories and disk space."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ksweep.activations.caching import plan_activations
from ksweep.activations.vector_source import are_of_one_document
from ksweep.autoencoder.family import family_of
from ksweep.config.spec import Cell
from ksweep.config.sweep import Sweep
from ksweep.evaluation.identity import CellKeys, one_document_error
from ksweep.launch import hardware
from ksweep.launch.job_spec import group_by_av
from ksweep.launch.plan import CellFacts, Step, plan_steps
from ksweep.launch.survey import JobSurvey
from ksweep.registry.cell_draws import CellDraws
from ksweep.registry.query import failed_runs, finished_runs, seconds_per_draw, seconds_per_score
from ksweep.registry.work_units import DRAWS_PER_WORK_UNIT
from ksweep.utils import machine
from ksweep.utils.console import bytes_text
from ksweep.utils.errors import DiskFullError, SpecError
from ksweep.utils.text import bounded_repr

DATABASE_BYTES = 8_000_000
"""Room for the database, its next version beside it, and job logs."""
BYTES_PER_DRAW = 660
"""Measured on the demo: a draw of 20 tokens with its texts takes 0.3 to 0.7 kB in Parquet; 200 tokens about 1.5."""
BYTES_PER_SCORE = 40
"""Four floats and an index, which compress little: measured 37 to 52."""


def plan_cells(
    sweep: Sweep, cells: Sequence[Cell], keys: Sequence[CellKeys], jobs: JobSurvey, *, retry: Sequence[str]
) -> list[Step]:
    """Plan each cell from what exists for it; reads only names and manifests."""
    finished, failed = finished_runs(Path(sweep.registry)), failed_runs(Path(sweep.registry))
    planned: list[tuple[CellKeys, tuple[int, int]]] = []
    facts = []
    for cell, key in zip(cells, keys, strict=True):
        fact = _gather_facts(sweep, cell, key, finished.get(key.cell), planned)
        facts.append(replace(fact, job=jobs.live_job_on(key.cell), failure=failed.get(key.cell) or jobs.failures.get(key.cell)))
        if fact.finished_run is None:
            planned.append((key, (cell.activations.num_activations, cell.sampling.effective_num_draws)))
    return plan_steps(facts, retry=retry)


def _gather_facts(
    sweep: Sweep, cell: Cell, keys: CellKeys, finished_run: str | None, planned: Sequence[tuple[CellKeys, tuple[int, int]]]
) -> CellFacts:
    """Gather what exists for a cell; `planned` has the keys and the (activations, draws) of earlier cells that will run."""
    if finished_run is None:
        _check_several_documents(cell, keys)
    registry = Path(sweep.registry)
    wanted = (cell.activations.num_activations, cell.sampling.effective_num_draws)
    store = CellDraws(registry, keys.draws, keys.scores, keys.combined)
    coverage = store.coverage_with_earlier(*wanted)
    if finished_run is not None and store.has_lost(*wanted):
        finished_run = None
    is_given = family_of(cell.autoencoder).draws_are_given
    if is_given:
        coverage.drawn[:] = True
    for other, (num_activations, num_draws) in planned:
        if other.draws == keys.draws:
            coverage.drawn[:num_activations, :num_draws] = True
            if other.scores == keys.scores:
                coverage.scored[:num_activations, :num_draws] = True
    needed = plan_activations(cell.activations, keys.layer, Path(sweep.vector_cache))
    return CellFacts(
        cell_key=keys.cell,
        activations_key=keys.stored_activations,
        label=keys.label,
        title=keys.title,
        keys=keys,
        finished_run=finished_run,
        activations_present=needed.present,
        activations_wanted=cell.activations.num_activations,
        draws_present=int(coverage.drawn.sum()),
        scores_present=int(coverage.scored.sum()),
        draws_wanted=wanted[0] * wanted[1],
        bytes_per_activation=needed.bytes_needed // max(1, needed.missing),
        text_yield=needed.text_yield,
        bytes_per_draw=BYTES_PER_DRAW,
        bytes_to_copy=store.bytes_to_take_over(*wanted),
        bytes_per_score=BYTES_PER_SCORE + _bytes_of_reconstructions(cell) + is_given * BYTES_PER_DRAW,
        seconds_per_draw=seconds_per_draw(registry, cell.autoencoder.source),
        seconds_per_score=seconds_per_score(registry, cell.autoencoder.ar or cell.autoencoder.checkpoint or ""),
    )


def _check_several_documents(cell: Cell, keys: CellKeys) -> None:
    """Raise before submission what a run would raise for vectors of one document; documents of a text are not known yet."""
    given = cell.activations
    if cell.scoring.baseline_kind != "between documents" or given.vectors is None or given.row_id_column:
        return
    if are_of_one_document(given):
        raise one_document_error(cell, keys.name)


def _bytes_of_reconstructions(cell: Cell) -> int:
    """Return the mean bytes of reconstructions per draw: of n draws of a unit, 1 + 1/2 + ... + 1/n are the best so far."""
    n = min(cell.sampling.effective_num_draws, DRAWS_PER_WORK_UNIT)
    return int(family_of(cell.autoencoder).reconstruction_bytes() * sum(1 / i for i in range(1, n + 1)) / n)


def check_vector_cache(sweep: Sweep, steps: Sequence[Step], reason: str) -> None:
    """Check that no activations are to be extracted into a cache that cannot be written, for a reason.

    Raises:
        SpecError: some are.
    """
    if missing := max((step.activations_to_extract for step in steps), default=0):
        raise SpecError(
            f"vector_cache={sweep.vector_cache} cannot be written ({reason}) and lacks {missing:,} of the activations: "
            "give a directory that can"
        )


def unwritable(directory: Path) -> str | None:
    """Return why no file can be written in a directory, which is created if it does not exist; None if one can."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return None
    except OSError as error:
        return error.strerror or str(error)


def check_export(sweep: Sweep) -> None:
    """Check that results can be exported to where the sweep says; nothing is written.

    Raises:
        SpecError: `export_json` is a directory, or lies in none that can be written.
    """
    if not sweep.export_json:
        return
    path = Path(sweep.export_json)
    try:
        directory = _existing(path.parent)
        if path.is_dir():
            raise SpecError(f"export_json={path} is a directory: give the name of a file in it, e.g. {path / 'results.json'}")
        if _is_loop(path):
            raise SpecError(f"export_json={path}: a symbolic link on the way to it leads nowhere; give another file")
        if not (directory.is_dir() and os.access(directory, os.W_OK | os.X_OK)):
            raise SpecError(f"export_json={path}: {directory} cannot be written; give a file in a directory that can")
    except OSError as error:
        raise SpecError(f"export_json={bounded_repr(str(path))} cannot be written: {error.strerror}") from error


def check_disk_space(sweep: Sweep, steps: list[Step]) -> None:
    """Check that each store's disk has room for what goes there; the two may lie on two disks.

    Raises:
        DiskFullError: a disk has too little room.
    """
    draws, activations = sum(s.draw_bytes for s in steps), sum(s.activation_bytes for s in steps)
    registry, cache = Path(sweep.registry), Path(sweep.vector_cache)
    together = _existing(registry).stat().st_dev == _existing(cache).stat().st_dev
    needs = {registry: draws + DATABASE_BYTES + (activations if together else 0), cache: activations}
    for directory, needed in needs.items():
        free = shutil.disk_usage(_existing(directory)).free
        if any(step.state != "done" for step in steps) and needed > free:
            raise DiskFullError(
                f"this sweep needs about {bytes_text(needed)} in {directory.absolute()}, where "
                f"{bytes_text(free)} are free: nothing was started. Free some room, ask for fewer draws or activations, "
                "or set registry= and vector_cache= to a larger disk."
            )


def with_num_ranks(sweep: Sweep, missing: Sequence[tuple[Cell, Step]]) -> Sweep:
    """Return the sweep with the number of ranks of a job on this machine's CPUs filled in, if `tasks` leaves it open.

    Every job gets as many as the one with the most draws; memory is budgeted for the largest autoencoder.
    """
    resources = sweep.resources
    if (
        hardware.resolve_cluster(resources) != "local"
        or hardware.num_gpus(resources)
        or resources.tasks is not None
        or not missing
    ):
        return sweep
    groups = group_by_av(sweep, missing)
    most_draws = max(sum(step.draws_to_sample + step.draws_to_score for _, step in group) for group in groups)
    weights = max(family_of(autoencoder).weight_bytes() for autoencoder in {cell.autoencoder for cell, _ in missing})
    ranks = machine.num_cpu_ranks(most_draws, weights, resources.cpus_per_task)
    # Jobs that the user wants side by side share the cores.
    ranks = max(1, ranks // min(resources.max_parallel_jobs or 1, len(groups)))
    return replace(sweep, resources=replace(resources, tasks=ranks))


def _is_loop(path: Path) -> bool:
    """Return whether a parent is a symbolic link that leads nowhere, or in a circle."""
    return any(parent.is_symlink() and not parent.exists() for parent in path.absolute().parents)


def _existing(directory: Path) -> Path:
    """Return the directory, or the nearest parent that exists: a dry run creates nothing."""
    directory = directory.absolute()
    return next(path for path in (directory, *directory.parents) if path.exists())
