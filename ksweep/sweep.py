"""A sweep from the command line to the chart: overrides, plan, jobs, ingest, table, pictures."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ksweep import terminal
from ksweep.activations.fill import plan as plan_activations
from ksweep.draws import DrawsStore
from ksweep.errors import RequestError, RunError, StoreError
from ksweep.keys import Keys, cell_keys
from ksweep.launch import submit as launch
from ksweep.launch.job import Ending, create
from ksweep.launch.plan import Facts, Step, plan
from ksweep.launch.watch import Watch
from ksweep.overrides import apply_overrides
from ksweep.provenance import provenance
from ksweep.registry.questions import finished_runs, seconds_per_draw
from ksweep.spec import Cell, Sweep

ENTRY = "ksweep.evaluate:run_job"
POLL_SECONDS = 0.3
PATIENCE_SECONDS = 20.0
"""How long ranks may take to notice that one of them has failed before they are killed."""
BYTES_PER_DRAW = 700
"""Measured on the demo: a draw of 20 tokens with its texts takes 0.3 to 0.7 kB in Parquet; 200 tokens about 1.5."""


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
        code = _complain(RunError("interrupted: what was whole is kept; the same command carries on from there"), 1)
    raise SystemExit(code)


def _complain(error: Exception, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


def _main(sweep: Sweep, arguments: Sequence[str]) -> int:
    options, rest = _parser(sweep).parse_known_args(arguments)
    if unknown := [a for a in rest if a.startswith("-")]:
        _parser(sweep).error(
            f"unknown option {unknown[0]}; options are --dry-run, --config FILE, --no-charts; settings are key=value"
        )
    sweep = apply_overrides(sweep, rest, options.config)
    cells = sweep.cells()
    keys = [cell_keys(cell) for cell in cells]
    finished = finished_runs(Path(sweep.registry))
    steps = plan([_facts(sweep, cell, key, finished.get(key.cell)) for cell, key in zip(cells, keys, strict=True)])
    if options.dry_run:
        terminal.print_plan(sweep, steps)
        return 0
    _refuse_full_disk(sweep, steps)
    missing = [(cell, key) for cell, key, step in zip(cells, keys, steps, strict=True) if step.state != "done"]
    if missing:
        _run(sweep, missing)
    terminal.show(sweep, keys, computed=len(missing), charts=not options.no_charts)
    return 0


def _parser(sweep: Sweep) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [key=value ...] [--config FILE] [--dry-run] [--no-charts]",
        description=sweep.question or sweep.name,
        epilog="Settings are dotted fields of the spec, e.g. sampling.num_draws=32 sampling.seed=1; a list makes an axis, "
        "e.g. sampling.temperature=[0.5,1.0].",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML laid over the spec before key=value settings")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, run nothing")
    parser.add_argument("--no-charts", action="store_true", help="write no pictures")
    return parser


def _facts(sweep: Sweep, cell: Cell, keys: Keys, finished_run: str | None) -> Facts:
    """Look up what is there for a cell; reads names and manifests only."""
    registry = Path(sweep.registry)
    draws = DrawsStore(registry / "draws", keys.draws)
    wanted = (cell.activations.num_activations, cell.sampling.effective_num_draws)
    needed = plan_activations(cell.activations, keys.layer, Path(sweep.vector_cache))
    return Facts(
        cell_key=keys.cell,
        activations_key=keys.activations,
        label=keys.label,
        finished_run=finished_run,
        activations_present=needed.present,
        activations_wanted=cell.activations.num_activations,
        draws_present=int(draws.coverage(*wanted).sum()),
        draws_wanted=wanted[0] * wanted[1],
        activation_bytes=needed.bytes_needed,
        bytes_per_draw=BYTES_PER_DRAW,
        seconds_per_draw=seconds_per_draw(registry, cell.autoencoder.av),
    )


def _refuse_full_disk(sweep: Sweep, steps: list[Step]) -> None:
    needed = sum(step.disk_bytes for step in steps)
    place = next(p for p in (Path(sweep.registry).absolute(), *Path(sweep.registry).absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise RunError(
            f"this sweep needs about {needed / 1e9:.2f} GB and {place} has {free / 1e9:.2f} GB free: nothing was started. "
            "Free some room, ask for fewer draws or activations, or set registry= and vector_cache= to a larger disk."
        )


def _run(sweep: Sweep, missing: list[tuple[Cell, Keys]]) -> None:
    """Submit the missing cells and wait for them; on this machine one job after another, on Slurm all at once."""
    groups = _groups(sweep, [cell for cell, _ in missing])
    with Watch() as watch:
        if launch.resolve_cluster(sweep.resources) == "slurm":
            _wait([_submit(sweep, group, watch) for group in groups], sweep, watch)
        else:
            for group in groups:
                _wait([_submit(sweep, group, watch)], sweep, watch)


def _groups(sweep: Sweep, cells: list[Cell]) -> list[list[Cell]]:
    """Cells that share an autoencoder go to one job, so that models are loaded once."""
    groups: list[list[Cell]] = []
    most = sweep.resources.cells_per_job or len(cells)
    for cell in cells:
        if groups and groups[-1][0].autoencoder == cell.autoencoder and len(groups[-1]) < most:
            groups[-1].append(cell)
        else:
            groups.append([cell])
    return groups


def _submit(sweep: Sweep, cells: list[Cell], watch: Watch) -> launch.Submitted:
    argument = {
        "cells": [asdict(cell) for cell in cells],
        "sweep": sweep.name,
        "registry": os.path.abspath(sweep.registry),
        "vector_cache": os.path.abspath(sweep.vector_cache),
        "batch_size": sweep.resources.batch_size,
        "resources": {**asdict(sweep.resources), "extra": dict(sweep.resources.extra)},
        "origin": provenance(),
    }
    logs = Path(os.path.abspath(sweep.registry)).parent / "logs"
    job = create(logs, ENTRY, argument, launch.num_ranks(sweep.resources))
    watch.show(f"job {job.id}: starting", 0, 0)
    return launch.submit(job, sweep.resources, sweep.name, watch.show)


def _wait(jobs: list[launch.Submitted], sweep: Sweep, watch: Watch) -> None:
    """Until every job has ended; the first failure is raised after the others have ended too."""
    ranks = launch.num_ranks(sweep.resources)
    endings: dict[str, Ending] = {}
    interrupted = 0
    while len(endings) < len(jobs):
        try:
            for submitted in jobs:
                if submitted.job.id not in endings:
                    _look(submitted, ranks, endings, watch)
            time.sleep(0 if len(endings) == len(jobs) else POLL_SECONDS)
        except KeyboardInterrupt:
            interrupted += 1
            for submitted in jobs:
                submitted.stop() if interrupted == 1 else submitted.kill()
            if interrupted > 1:
                raise
    for submitted in jobs:
        submitted.kill()
        launch.raise_for(endings[submitted.job.id], submitted.job)
    if any(ending.status == "stopped" for ending in endings.values()):
        raise RunError("stopped: finished units are kept; the same command carries on from there")


def _look(submitted: launch.Submitted, ranks: int, endings: dict[str, Ending], watch: Watch) -> None:
    watch.show_ranks(submitted.job.heartbeats())
    ending = launch.outcome(submitted, ranks)
    if ending is None and any(e.status == "failed" for e in submitted.job.endings()):
        ending = _give_up(submitted, ranks)
    if ending is not None:
        endings[submitted.job.id] = ending


def _give_up(submitted: launch.Submitted, ranks: int) -> Ending | None:
    """One rank has failed: the others notice by their watchdog; those that hang are killed."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        ending = launch.outcome(submitted, ranks)
        if ending is not None:
            return ending
        time.sleep(POLL_SECONDS)
    submitted.kill()
    return next(e for e in submitted.job.endings() if e.status == "failed")
