"""Run a sweep from Python: plan it, run what is missing, return its results. `sweep_main` prints what these functions return.

results = ksweep.run(sweep, gpus=8)          # shows progress; raises where a command would exit
results.curves, results.draws, results.compare(), results.chart(), results.report()
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ksweep.analysis.results import Results, results_of_cells
from ksweep.config.overrides import apply_overrides
from ksweep.config.series import expand_series
from ksweep.config.spec import Cell
from ksweep.config.sweep import Sweep, known_keys
from ksweep.evaluation.identity import CellKeys, resolve_cells, sweep_keys
from ksweep.launch import hardware, local_executor, plan_table, run_locally, run_on_slurm
from ksweep.launch.gpu_support import check_local_gpus
from ksweep.launch.job import Job, logs_directory
from ksweep.launch.job_spec import MissingCells, create_job_for_cells, group_by_av
from ksweep.launch.plan import Step
from ksweep.launch.preflight import check_disk_space, check_export, check_vector_cache, plan_cells, unwritable, with_num_ranks
from ksweep.launch.reconcile import finalize_earlier_jobs
from ksweep.launch.slurm import sbatch
from ksweep.launch.survey import JobSurvey, survey_jobs
from ksweep.registry import sweeps
from ksweep.utils.console import printed_text
from ksweep.utils.errors import SpecError
from ksweep.utils.files import locked
from ksweep.utils.notes import notes_of
from ksweep.utils.planning_pass import planning_pass

log = logging.getLogger(__name__)

ALL: tuple[str, ...] = ("",)
"""Key prefixes of the failed cells to run again: every one."""


@dataclass(frozen=True)
class ResolvedSweep:
    """A sweep whose cells are resolved and identified; nothing is started."""

    sweep: Sweep
    cells: Sequence[Cell]
    keys: Sequence[CellKeys]


@dataclass(frozen=True)
class SweepPlan:
    """What exists of each cell of a sweep, and what would be run. `print(plan)` shows the table of a dry run."""

    resolved: ResolvedSweep
    steps: Sequence[Step]
    """A step a cell: its state, the reason, what is left to extract and to sample, the estimated disk and time."""

    @property
    def missing(self) -> MissingCells:
        """The cells that would be run, each with its step."""
        return [(cell, step) for cell, step in zip(self.resolved.cells, self.steps, strict=True) if step.state == "missing"]

    @property
    def failed(self) -> list[Step]:
        """The cells whose last run failed and that are not run again unasked."""
        return [step for step in self.steps if step.state == "failed"]

    def show(self, *, as_json: bool = False) -> None:
        """Print the plan and the jobs that would run it, as a table or as JSON objects."""
        sweep = with_num_ranks(self.resolved.sweep, self.missing)
        groups = group_by_av(sweep, self.missing)
        plan_table.print_plan(
            sweep, self.steps, shape=_job_shape(sweep), cells_of_jobs=[len(group) for group in groups], as_json=as_json
        )

    def __str__(self) -> str:
        return printed_text(self.show)

    __repr__ = __str__


@dataclass(frozen=True)
class SweepJobs:
    """What was done for a sweep: its plan before, and on Slurm the jobs that compute its cells now."""

    plan: SweepPlan
    """The last one, where it was planned anew because another command computed some of its cells."""
    num_computed: int = 0
    """Number of cells that this command's own jobs compute."""
    submitted: Sequence[Job] = ()
    attached: Sequence[Job] = ()
    """Jobs of earlier commands that compute cells of this sweep."""

    @property
    def on_their_way(self) -> list[Job]:
        """Jobs that had not ended when this was returned."""
        return [*self.submitted, *self.attached]


def plan_sweep(sweep: Sweep, **resources: Any) -> SweepPlan:
    """Return what exists of a sweep and what would be run. Nothing is started or written.

    Args:
        sweep: the sweep.
        resources: fields of `Resources` that replace those of the sweep, for example `gpus=8`.

    Raises:
        RequestError: the spec or a file that it names is not usable; the message says what to do.
    """
    with planning_pass():
        return planned(resolve_sweep(with_resources(sweep, resources)))


def run_sweep(sweep: Sweep, *, retry: bool = False, wait: bool = True, **resources: Any) -> Results:
    """Run what is missing of a sweep, with its progress on standard error, and return its results.

    Interrupted, it keeps finished work units; the same call continues from there.

    Args:
        sweep: the sweep.
        retry: run cells again whose last run failed. Without it they are left out of the results, with a warning.
        wait: on Slurm, stay until every job has ended; False returns the results that exist once the jobs are submitted.
        resources: fields of `Resources` that replace those of the sweep, for example `gpus=8, cluster="slurm"`.

    Raises:
        RequestError: the spec or a file that it names is not usable.
        RunError, StoreError: a cell failed, or the run was interrupted.
    """
    with planning_pass():
        resolved = resolve_sweep(with_resources(sweep, resources))
    jobs = run_missing(resolved, retry=ALL if retry else (), on_plan=_warn_of_failed_cells)
    if wait:
        wait_for(jobs)
    return results_of_cells(resolved.sweep, [key.cell for key in resolved.keys])


def with_resources(sweep: Sweep, resources: Mapping[str, Any]) -> Sweep:
    """Return the sweep with other values for fields of `Resources`.

    Raises:
        SpecError: there is no such field, or it cannot have such a value.
    """
    fields = [key.partition(".")[2] for key in known_keys() if key.startswith("resources.")]
    if unknown := [name for name in resources if name not in fields]:
        raise SpecError(
            f"{unknown[0]!r} is not one of the resources ({', '.join(fields)}): what is measured is said by the sweep itself, "
            "for example with dataclasses.replace"
        )
    return apply_overrides(sweep, {f"resources.{name}": value for name, value in resources.items()})


def resolve_sweep(sweep: Sweep) -> ResolvedSweep:
    """Complete the resources, resolve and identify every cell, and log what the checks of checkpoints and activations note.

    Raises:
        RequestError: the spec or a file that it names is not usable.
        SlurmError: the sweep is to run on Slurm, which does not answer.
    """
    if hardware.resolve_cluster(sweep.resources) == "slurm":
        sweep = run_on_slurm.with_slurm_resources(sweep)
    return identify_cells(sweep)


def identify_cells(sweep: Sweep) -> ResolvedSweep:
    """Find the checkpoints of series, resolve and identify every cell; the resources stay as they are."""
    sweep = expand_series(sweep)
    cells = resolve_cells(sweep.cells())
    keys = sweep_keys(sweep, cells)
    for note in notes_of(*keys):
        log.warning("%s: %s", note.about, note.text)
    return ResolvedSweep(sweep, cells, keys)


def _warn_of_failed_cells(plan: SweepPlan) -> None:
    for step in plan.failed:
        log.warning(
            "%s @%s failed in an earlier run and is left as it is (%s): retry=True runs it again",
            step.title, step.cell_key[:8], step.reason,
        )  # fmt: skip


def run_missing(resolved: ResolvedSweep, *, retry: Sequence[str], on_plan: Callable[[SweepPlan], None]) -> SweepJobs:
    """Run the missing cells on this machine to their end, or submit them to Slurm.

    Args:
        resolved: the sweep.
        retry: beginnings of the keys of failed cells to run again; "" for all.
        on_plan: called with the plan before anything is started, and again if cells of it have failed in another command.

    Raises:
        RequestError, RunError, StoreError: the first failure.
    """
    check_export(resolved.sweep)
    if (reason := unwritable(Path(resolved.sweep.registry))) is not None:
        return _nothing_missing(resolved, retry, on_plan, reason)
    if (reason := unwritable(Path(resolved.sweep.vector_cache))) is not None:  # before earlier jobs are finalized
        check_vector_cache(resolved.sweep, [step for _, step in planned(resolved, retry=retry).missing], reason)
    cluster = hardware.resolve_cluster(resolved.sweep.resources)
    if cluster == "slurm":
        return _submit_missing(resolved, retry, on_plan)
    if cluster == "local":
        local_executor.validate_local_resources(resolved.sweep.resources)
    return _run_missing_here(resolved, retry, on_plan)


def _nothing_missing(
    resolved: ResolvedSweep, retry: Sequence[str], on_plan: Callable[[SweepPlan], None], reason: str
) -> SweepJobs:
    """Return the plan of a sweep whose registry cannot be written.

    Raises:
        SpecError: a cell of it is missing.
    """
    directory = Path(resolved.sweep.registry)
    refusal = f"registry={directory} cannot be written ({reason})"
    if not directory.is_dir():
        raise SpecError(f"{refusal}: give a directory that can")
    plan = planned(resolved, retry=retry)
    on_plan(plan)
    if plan.missing:
        raise SpecError(f"{refusal} and lacks {len(plan.missing)} of {len(plan.steps)} cells: give a directory that can")
    return SweepJobs(plan)


def _run_missing_here(resolved: ResolvedSweep, retry: Sequence[str], on_plan: Callable[[SweepPlan], None]) -> SweepJobs:
    claimed: set[str] = set()
    failed: Sequence[Step] | None = None
    while True:
        # 1. Wait for jobs of other commands on these cells, then plan.
        plan = planned(resolved, finalize_earlier_jobs(resolved.sweep, resolved.keys, wait=True), retry)
        if plan.failed != failed:
            on_plan(plan)
        failed = plan.failed
        _before_start(plan)
        # 2. Run what is missing; where another command has begun some of it at the same moment, begin anew.
        sweep = with_num_ranks(resolved.sweep, plan.missing)
        claim_cells = partial(_claim_cells, sweep, retry, claimed)
        if run_locally.run_missing_cells(sweep, plan.missing, claim_cells, partial(_claims, sweep)):
            return SweepJobs(plan, num_computed=len(claimed))


def _claim_cells(sweep: Sweep, retry: Sequence[str], claimed: set[str], group: MissingCells) -> Job | None:
    """Create the job of a group of cells; None if another command has begun or finished one of them since they were planned.

    To be called under `_claims`: a job can be seen by other commands once it is created, and no two may look at the same moment.
    """
    logs, keys = logs_directory(sweep.registry), [step.keys for _, step in group if step.keys is not None]
    steps = plan_cells(sweep, [cell for cell, _ in group], keys, survey_jobs(logs), retry=retry)
    if any(step.state != "missing" for step in steps):
        return None
    job = create_job_for_cells(sweep, group, "local")
    claimed.update(step.cell_key for _, step in group)
    return job


def _claims(sweep: Sweep) -> AbstractContextManager[bool]:
    """Lock the claims to cells: two commands at once would both find the same ones missing."""
    return locked(_claims_lock(logs_directory(sweep.registry)), "another command", aloud=True)


def _claims_lock(logs: Path) -> Path:
    """Return the file that is locked while cells are claimed; of a user who may not write that of others, a file of that user."""
    shared = logs / "submitting"
    return shared if not shared.exists() or os.access(shared, os.W_OK) else logs / f"submitting-{os.geteuid()}"


def _submit_missing(resolved: ResolvedSweep, retry: Sequence[str], on_plan: Callable[[SweepPlan], None]) -> SweepJobs:
    sweep = resolved.sweep
    with _claims(sweep):
        survey = finalize_earlier_jobs(sweep, resolved.keys, wait=False)
        plan = planned(resolved, survey, retry)
        on_plan(plan)
        _before_start(plan)
        submitted = run_on_slurm.submit_missing_cells(sweep, plan.missing, survey.live_jobs) if plan.missing else []
    attached = {job.id: job for step in plan.steps for job in [survey.live_job_by_cell.get(step.cell_key)] if job is not None}
    return SweepJobs(plan, len(plan.missing), submitted, list(attached.values()))


def wait_for(jobs: SweepJobs) -> None:
    """Wait until every job on Slurm has ended, and finalize each.

    Raises:
        RunError, StoreError: the first failure, once all have ended.
    """
    if jobs.on_their_way:
        run_on_slurm.wait_for_slurm_jobs(jobs.on_their_way, jobs.plan.resolved.sweep)


def planned(resolved: ResolvedSweep, survey: JobSurvey | None = None, retry: Sequence[str] = ()) -> SweepPlan:
    """Plan every cell from what exists for it, and from what the jobs of earlier commands do."""
    sweep = resolved.sweep
    survey = survey_jobs(logs_directory(sweep.registry)) if survey is None else survey
    return SweepPlan(resolved, plan_cells(sweep, resolved.cells, resolved.keys, survey, retry=retry))


def _before_start(plan: SweepPlan) -> None:
    """Check disks and GPUs, and record the question, even if other sweeps have computed every cell."""
    sweep = plan.resolved.sweep
    check_disk_space(sweep, list(plan.steps))
    if plan.missing:
        check_local_gpus(sweep.resources)
    cells = [(key.cell, key.label) for key in plan.resolved.keys]
    sweeps.write_sweep_record(sweep.registry, sweeps.make_sweep_record(sweep.name, sweep.question, cells))


def _job_shape(sweep: Sweep) -> str:
    """Return the resources of a job as text."""
    cluster, gpus = hardware.resolve_cluster(sweep.resources), hardware.num_gpus(sweep.resources)
    return f"{cluster}: {sbatch.job_shape_text(replace(sweep.resources, gpus=gpus))}"
