"""A sweep file's main: arguments to overrides, then `run_sweep`, then the table of results, charts and the exit code."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ksweep.analysis import results_table
from ksweep.config.overrides import apply_overrides, parse_overrides
from ksweep.config.sweep import Sweep
from ksweep.launch import plan_table
from ksweep.launch.preflight import check_disk_space, check_export
from ksweep.launch.run_sweep import ResolvedSweep, SweepJobs, identify_cells, planned, resolve_sweep, run_missing, wait_for
from ksweep.launch.slurm.commands import SlurmError
from ksweep.registry.query import finished_runs
from ksweep.utils.command_exit import exit_code_of
from ksweep.utils.console import VisibleFormatter, remark, say
from ksweep.utils.planning_pass import planning_pass
from ksweep.utils.text import visible


def sweep_main(sweep: Sweep, arguments: Sequence[str] | None = None) -> None:
    """Run a sweep as its file's main: parse, plan, run what is missing, show. Exits with 0, 1 (failed) or 2 (bad request)."""
    run_sweep_command(lambda: sweep, sys.argv[1:] if arguments is None else arguments)


def run_sweep_command(sweep: Callable[[], Sweep], arguments: Sequence[str]) -> None:
    """Do what `sweep_main` does with a sweep that is built first; a mistake in what it is built from is a bad request as well."""
    lines = logging.StreamHandler()
    lines.setFormatter(VisibleFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[lines])
    kept = "interrupted: finished units are kept; the same command continues from there"
    raise SystemExit(exit_code_of(lambda: _main(sweep(), arguments), interrupted=kept))


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
    with planning_pass():
        try:
            resolved = resolve_sweep(sweep)
        except SlurmError as silence:
            return _without_slurm(identify_cells(sweep), options, silence)
        if options.dry_run:
            return _dry_run(resolved, options)
    jobs = run_missing(resolved, retry=options.retry, on_plan=lambda plan: plan_table.print_failed_cells(plan.failed))
    if jobs.on_their_way and not options.wait:
        plan_table.print_submitted(resolved.sweep, jobs.plan.steps, len(jobs.submitted), len(jobs.attached))
        return 1 if jobs.plan.failed else 0
    wait_for(jobs)
    return _show(jobs, options)


def _dry_run(resolved: ResolvedSweep, options: argparse.Namespace) -> int:
    """Print the plan; start and write nothing."""
    check_export(resolved.sweep)
    plan = planned(resolved, retry=options.retry)
    plan.show(as_json=options.json)
    check_disk_space(resolved.sweep, list(plan.steps))
    return 0


def _without_slurm(resolved: ResolvedSweep, options: argparse.Namespace, silence: SlurmError) -> int:
    """Show the results that exist, which needs no Slurm. Returns 1 if cells are missing, or a plan was asked for."""
    steps = planned(resolved).steps
    done = sum(step.state == "done" for step in steps)
    left = len(steps) - done
    remark(f"Slurm does not answer ({silence})" + (f": {left} of {len(steps)} cells are left as they are" if left else ""))
    if options.dry_run:
        return 1
    if done:
        _print_results(resolved, options, computed=0)
        if resolved.sweep.export_json and not left:
            _export(resolved)
    return 1 if left else 0


def _show(jobs: SweepJobs, options: argparse.Namespace) -> int:
    """Show the results of the cells that have some, and return the exit code."""
    plan = jobs.plan
    if len(plan.failed) == len(plan.steps):
        return 1
    _print_results(plan.resolved, options, computed=jobs.num_computed)
    if plan.resolved.sweep.export_json and not plan.failed:
        _export(plan.resolved)
    return 1 if plan.failed else 0


def _print_results(resolved: ResolvedSweep, options: argparse.Namespace, *, computed: int) -> None:
    cell_keys = [key.cell for key in resolved.keys]
    results_table.print_results(resolved.sweep, cell_keys, computed=computed, charts=not options.no_charts)


def _settings(sweep: Sweep, options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the settings from the command line and the configuration file, by dotted key."""
    base = [] if options.base is None else [f"autoencoder.base={json.dumps(options.base)}"]
    given = parse_overrides([*base, *arguments], options.config)
    if not options.checkpoint_data:
        return given
    from ksweep.autoencoder.tae.training_data import with_checkpoint_data

    return with_checkpoint_data(sweep, given)


def _export(resolved: ResolvedSweep) -> None:
    """Export the newest run of each cell in the reference's JSON schema."""
    from ksweep.registry.tae_export import export_run, write_json

    sweep = resolved.sweep
    runs, target = finished_runs(Path(sweep.registry)), Path(sweep.export_json)
    for key, label in zip(resolved.keys, sweep.labels(), strict=True):
        path = target if len(resolved.keys) == 1 else target.with_name(f"{target.stem} {label}{target.suffix}".replace("/", "_"))
        write_json(path, export_run(sweep.registry, runs[key.cell]))
        say(f"exported: {path}")


class _Parser(argparse.ArgumentParser):
    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message(visible(message), file)


def _parser(sweep: Sweep) -> argparse.ArgumentParser:
    parser = _Parser(
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
