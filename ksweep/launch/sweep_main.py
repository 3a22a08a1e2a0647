"""A sweep from the command line to the chart: overrides, plan, jobs, ingest, table, pictures."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ksweep.analysis import results_table
from ksweep.config.overrides import apply_overrides, parse_overrides
from ksweep.config.spec import Cell
from ksweep.config.sweep import Sweep
from ksweep.evaluation.identity import CellKeys, resolve_cells, sweep_keys
from ksweep.launch import hardware, plan_table, run_locally, run_on_slurm
from ksweep.launch import local_executor as launch
from ksweep.launch.job import logs_directory
from ksweep.launch.job_spec import group_by_autoencoder
from ksweep.launch.plan import Step
from ksweep.launch.preflight import check_disk_space, check_writable, plan_cells, with_num_ranks
from ksweep.launch.reconcile import finalize_earlier_jobs
from ksweep.launch.slurm import sbatch
from ksweep.launch.slurm.commands import SlurmError
from ksweep.launch.survey import survey_jobs
from ksweep.registry import sweeps
from ksweep.registry.query import finished_runs
from ksweep.utils.errors import RequestError, RunError, StoreError
from ksweep.utils.files import locked
from ksweep.utils.notes import notes_of
from ksweep.utils.planning_pass import planning_pass

log = logging.getLogger(__name__)


def sweep_main(sweep: Sweep, arguments: Sequence[str] | None = None) -> None:
    """Run a sweep as its file's main: parse, plan, run what is missing, show. Exits with 0, 1 (failed) or 2 (bad request)."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        code = _main(sweep, sys.argv[1:] if arguments is None else arguments)
    except RequestError as error:
        code = _complain(error, 2)
    except (RunError, StoreError) as error:
        code = _complain(error, 1)
    except KeyboardInterrupt:
        code = _complain(RunError("interrupted: finished units are kept; the same command continues from there"), 1)
    raise SystemExit(code)


def _complain(error: Exception, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


def _main(sweep: Sweep, arguments: Sequence[str]) -> int:
    options, rest = _parser(sweep).parse_known_args(arguments)
    if unknown := [a for a in rest if a.startswith("-")]:
        _parser(sweep).error(
            f"unknown option {unknown[0]}; options are --base PATH, --checkpoint-data, --config FILE, --dry-run, --json, "
            "--no-charts, --retry, --retry-cell KEY, --wait; settings are key=value"
        )
    if options.json and not options.dry_run:
        _parser(sweep).error("--json goes with --dry-run: `ksweep ls --json` and `ksweep sql --json` tell of results")
    sweep = apply_overrides(sweep, _settings(sweep, options, rest))
    to_slurm = hardware.resolve_cluster(sweep.resources) == "slurm"
    silence: SlurmError | None = None
    if to_slurm:
        try:
            sweep = run_on_slurm.with_slurm_resources(sweep)
        except SlurmError as error:
            silence = error
    with planning_pass():
        cells = resolve_cells(sweep.cells())
        keys = sweep_keys(sweep, cells)
        for note in notes_of(*keys):
            log.warning("%s: %s", note.about, note.text)
        if silence is not None:
            return _without_slurm(sweep, cells, keys, options, silence)
        if options.dry_run:
            return _dry_run(sweep, cells, keys, options)
    check_writable(sweep)
    return (_submit if to_slurm else _run)(sweep, cells, keys, options)


def _dry_run(sweep: Sweep, cells: Sequence[Cell], keys: Sequence[CellKeys], options: argparse.Namespace) -> int:
    """Print the plan; start and write nothing."""
    steps = plan_cells(sweep, cells, keys, survey_jobs(logs_directory(sweep.registry)), retry=options.retry)
    missing = [(cell, step) for cell, step in zip(cells, steps, strict=True) if step.state == "missing"]
    sweep, together = with_num_ranks(sweep, missing), group_by_autoencoder(sweep, missing)
    plan_table.print_plan(
        sweep, steps, shape=_shape(sweep), cells_of_jobs=[len(group) for group in together], as_json=options.json
    )
    check_disk_space(sweep, steps)
    return 0


def _run(sweep: Sweep, cells: Sequence[Cell], keys: Sequence[CellKeys], options: argparse.Namespace) -> int:
    """Run the missing cells on this machine, then show all results."""
    if hardware.resolve_cluster(sweep.resources) == "local":
        launch.validate_local_resources(sweep.resources)
    steps = plan_cells(sweep, cells, keys, finalize_earlier_jobs(sweep, keys, wait=True), retry=options.retry)
    check_disk_space(sweep, steps)
    _keep_question(sweep, keys)
    missing = [(cell, step) for cell, step in zip(cells, steps, strict=True) if step.state == "missing"]
    plan_table.print_failed_cells([step for step in steps if step.state == "failed"])
    if missing:
        run_locally.run_missing_cells(with_num_ranks(sweep, missing), missing)
    return _show(sweep, keys, steps, options)


def _submit(sweep: Sweep, cells: Sequence[Cell], keys: Sequence[CellKeys], options: argparse.Namespace) -> int:
    """Submit the missing cells; show all results if no job is live, or with --wait once every job has ended."""
    # Two commands at once would both find the same cells missing.
    with locked(logs_directory(sweep.registry) / "submitting", "another command", aloud=True):
        jobs = finalize_earlier_jobs(sweep, keys, wait=False)
        steps = plan_cells(sweep, cells, keys, jobs, retry=options.retry)
        check_disk_space(sweep, steps)
        _keep_question(sweep, keys)
        missing = [(cell, step) for cell, step in zip(cells, steps, strict=True) if step.state == "missing"]
        started = run_on_slurm.submit_missing_cells(sweep, missing, jobs.live_jobs) if missing else []
    plan_table.print_failed_cells([step for step in steps if step.state == "failed"])
    attached = {job.id: job for step in steps for job in [jobs.live_job_by_cell.get(step.cell_key)] if job is not None}
    under_way = [*started, *attached.values()]
    if under_way and not options.wait:
        plan_table.print_submitted(sweep, steps, len(started), len(attached))
        return 1 if any(step.state == "failed" for step in steps) else 0
    if under_way:
        run_on_slurm.wait_for_slurm_jobs(under_way, sweep)
    return _show(sweep, keys, steps, options)


def _without_slurm(
    sweep: Sweep, cells: Sequence[Cell], keys: Sequence[CellKeys], options: argparse.Namespace, silence: SlurmError
) -> int:
    """Show the results that exist, which needs no Slurm. Returns 1 if cells are missing, or a plan was asked for."""
    steps = plan_cells(sweep, cells, keys, survey_jobs(logs_directory(sweep.registry)), retry=[])
    done = sum(step.state == "done" for step in steps)
    left = len(steps) - done
    print(
        f"Slurm does not answer ({silence})" + (f": {left} of {len(steps)} cells are left as they are" if left else ""),
        file=sys.stderr,
    )
    if options.dry_run:
        return 1
    if done:
        results_table.print_results(sweep, [key.cell for key in keys], computed=0, charts=not options.no_charts)
        if sweep.export_json and not left:
            _export(sweep, keys)
    return 1 if left else 0


def _keep_question(sweep: Sweep, keys: Sequence[CellKeys]) -> None:
    """Record the sweep's question in the registry, even if other sweeps have computed every cell."""
    cells = [(key.cell, key.label) for key in keys]
    sweeps.write_sweep_record(sweep.registry, sweeps.make_sweep_record(sweep.name, sweep.question, cells))


def _show(sweep: Sweep, keys: Sequence[CellKeys], steps: Sequence[Step], options: argparse.Namespace) -> int:
    """Show the results of the cells that have some, and return the exit code."""
    failed = [step for step in steps if step.state == "failed"]
    if len(failed) == len(steps):
        return 1
    computed = sum(step.state == "missing" for step in steps)
    results_table.print_results(sweep, [key.cell for key in keys], computed=computed, charts=not options.no_charts)
    if sweep.export_json and not failed:
        _export(sweep, keys)
    return 1 if failed else 0


def _settings(sweep: Sweep, options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the settings from the command line and the configuration file, by dotted key."""
    base = [] if options.base is None else [f"autoencoder.base={json.dumps(options.base)}"]
    given = parse_overrides([*base, *arguments], options.config)
    if not options.checkpoint_data:
        return given
    from ksweep.autoencoder.tae.training_data import with_checkpoint_data

    return with_checkpoint_data(sweep, given)


def _export(sweep: Sweep, keys: Sequence[CellKeys]) -> None:
    """Export the newest run of each cell in the reference's JSON schema."""
    from ksweep.registry.tae_export import export_run, write_json

    runs, target = finished_runs(Path(sweep.registry)), Path(sweep.export_json)
    for key, label in zip(keys, sweep.labels(), strict=True):
        path = target if len(keys) == 1 else target.with_name(f"{target.stem} {label}{target.suffix}".replace("/", "_"))
        write_json(path, export_run(sweep.registry, runs[key.cell]))
        print(f"exported: {path}")


def _parser(sweep: Sweep) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [key=value ...] [--base PATH] [--checkpoint-data] [--config FILE] [--dry-run] [--retry] [--wait] "
        "[--no-charts] [--json]",
        description=sweep.question or sweep.name,
        epilog="Settings are dotted fields of the spec, e.g. sampling.num_draws=32 sampling.seed=1; a list makes an axis, "
        "e.g. sampling.temperature=[0.5,1.0].",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--base", metavar="PATH", help="base model (path or hub id) of the autoencoder, as autoencoder.base=PATH; also of the "
        "activations, where a talkative autoencoder names one model for both",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint-data", action="store_true", help="take text, positions and norm filter from the configuration in "
        "autoencoder.checkpoint; key=value settings win over it",
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE", help="YAML laid over the spec before key=value settings")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, run nothing")
    parser.add_argument("--json", action="store_true", help="with --dry-run: the plan as JSON, an object a cell and the sums")
    parser.add_argument("--retry", action="store_const", const=[""], default=[], help="run cells again that failed")
    parser.add_argument("--retry-cell", action="append", dest="retry", metavar="KEY", help="run this one again, if it failed")
    parser.add_argument("--wait", action="store_true", help="on Slurm: stay until every job has ended, then show the results")
    parser.add_argument("--no-charts", action="store_true", help="write no pictures")
    return parser


def _shape(sweep: Sweep) -> str:
    """Return human-readable resources of a job."""
    cluster = hardware.resolve_cluster(sweep.resources)
    gpus = hardware.num_gpus(sweep.resources)
    return f"{cluster}: {sbatch.job_shape_text(replace(sweep.resources, gpus=gpus))}"
