"""A sweep from the command line to the chart: overrides, plan, jobs, ingest, table, pictures."""

from __future__ import annotations

import argparse
import json
import logging
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ksweep import terminal
from ksweep.activations.fill import plan as plan_activations
from ksweep.draws import DRAWS_PER_UNIT, DrawsStore
from ksweep.errors import DiskFullError, RequestError, RunError, SpecError, StoreError
from ksweep.evaluate import land_lost
from ksweep.keys import Keys, cell_keys, complete_all, inspect_file
from ksweep.launch import submit as launch
from ksweep.launch.job import Ending, create, jobs_at_work
from ksweep.launch.plan import Facts, Step, plan
from ksweep.launch.watch import Watch
from ksweep.overrides import given_settings, lay_over
from ksweep.provenance import provenance
from ksweep.registry.questions import finished_runs, seconds_per_draw
from ksweep.spec import Autoencoder, Cell, Sweep

ENTRY = "ksweep.evaluate:run_job"
POLL_SECONDS = 0.3
PATIENCE_SECONDS = 20.0
"""How long ranks may take to notice that one of them has failed before they are killed."""
DATABASE_BYTES = 8_000_000
"""Room for the database, its next version beside it, and job logs."""
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
            f"unknown option {unknown[0]}; options are --base PATH, --checkpoint-data, --config FILE, --dry-run, --no-charts; "
            "settings are key=value"
        )
    sweep = lay_over(sweep, _settings(sweep, options, rest))
    cells = complete_all(sweep.cells())
    keys = [cell_keys(cell) for cell in cells]
    if options.dry_run:
        steps = _plan(sweep, cells, keys)
        terminal.print_plan(sweep, steps)
        _refuse_full_disk(sweep, steps)
        return 0
    _refuse_places(sweep)
    _wait_for_earlier_jobs(sweep, cells)
    steps = _plan(sweep, cells, keys)
    _refuse_full_disk(sweep, steps)
    missing = [cell for cell, step in zip(cells, steps, strict=True) if step.state != "done"]
    if missing:
        _run(sweep, missing)
    terminal.show(sweep, keys, computed=len(missing), charts=not options.no_charts)
    if sweep.export_json:
        _export(sweep, keys)
    return 0


def _settings(sweep: Sweep, options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """What was asked for, by whole key."""
    base = [] if options.base is None else [f"autoencoder.base={json.dumps(options.base)}"]
    given = given_settings([*base, *arguments], options.config)
    if not options.checkpoint_data:
        return given
    from ksweep.checkpoint_data import with_checkpoint_data

    return with_checkpoint_data(sweep, given)


def _export(sweep: Sweep, keys: Sequence[Keys]) -> None:
    """The newest run of each cell in the reference's JSON schema."""
    from ksweep.registry.reference_json import export_run, write_json

    runs, target = finished_runs(Path(sweep.registry)), Path(sweep.export_json)
    for key, label in zip(keys, sweep.labels(), strict=True):
        path = target if len(keys) == 1 else target.with_name(f"{target.stem} {label}{target.suffix}".replace("/", "_"))
        write_json(path, export_run(sweep.registry, runs[key.cell]))
        print(f"exported: {path}")


def _parser(sweep: Sweep) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [key=value ...] [--base PATH] [--checkpoint-data] [--config FILE] [--dry-run] [--no-charts]",
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
    parser.add_argument("--no-charts", action="store_true", help="write no pictures")
    return parser


def _plan(sweep: Sweep, cells: Sequence[Cell], keys: Sequence[Keys]) -> list[Step]:
    """What is there for each cell, and so what is to be done; reads names and manifests only."""
    finished = finished_runs(Path(sweep.registry))
    planned: dict[str, list[tuple[int, int]]] = {}
    facts = []
    for cell, key in zip(cells, keys, strict=True):
        facts.append(_facts(sweep, cell, key, finished.get(key.cell), planned.setdefault(key.draws, [])))
        if key.cell not in finished:
            planned[key.draws].append((cell.activations.num_activations, cell.sampling.effective_num_draws))
    return plan(facts)


def _facts(sweep: Sweep, cell: Cell, keys: Keys, finished_run: str | None, planned: Sequence[tuple[int, int]]) -> Facts:
    """`planned`: (activations, draws) that earlier cells of the sweep will have drawn under the same key."""
    registry = Path(sweep.registry)
    wanted = (cell.activations.num_activations, cell.sampling.effective_num_draws)
    there = DrawsStore(registry / "draws", keys.draws).coverage(*wanted)
    for num_activations, num_draws in planned:
        there[:num_activations, :num_draws] = True
    needed = plan_activations(cell.activations, keys.layer, Path(sweep.vector_cache))
    return Facts(
        cell_key=keys.cell,
        activations_key=keys.activations,
        label=keys.label,
        finished_run=finished_run,
        activations_present=needed.present,
        activations_wanted=cell.activations.num_activations,
        draws_present=int(there.sum()),
        draws_wanted=wanted[0] * wanted[1],
        bytes_per_activation=needed.bytes_needed // max(1, needed.missing),
        bytes_per_draw=BYTES_PER_DRAW + _bytes_of_reconstructions(cell),
        seconds_per_draw=seconds_per_draw(registry, cell.autoencoder.source),
    )


def _bytes_of_reconstructions(cell: Cell) -> int:
    """What a draw of a checkpoint takes besides: of n draws of a unit those that are the best so far, 1 + 1/2 + ... + 1/n."""
    if cell.autoencoder.checkpoint is None:
        return 0
    n = min(cell.sampling.effective_num_draws, DRAWS_PER_UNIT)
    return int(4 * inspect_file(cell.autoencoder).d_model * sum(1 / i for i in range(1, n + 1)) / n)


def _refuse_places(sweep: Sweep) -> None:
    """Directories that cannot be written are a mistake in the request, told before anything runs."""
    for key, place in (("registry", Path(sweep.registry)), ("vector_cache", Path(sweep.vector_cache))):
        try:
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            raise SpecError(f"{key}={place} cannot be written ({error.strerror}): give a directory that can") from error


def _refuse_full_disk(sweep: Sweep, steps: list[Step]) -> None:
    """The two stores may lie on two disks; each must hold what goes there."""
    draws, activations = sum(s.draw_bytes for s in steps), sum(s.activation_bytes for s in steps)
    registry, cache = Path(sweep.registry), Path(sweep.vector_cache)
    together = _existing(registry).stat().st_dev == _existing(cache).stat().st_dev
    needs = {registry: draws + DATABASE_BYTES + (activations if together else 0), cache: activations}
    for place, needed in needs.items():
        free = shutil.disk_usage(_existing(place)).free
        if any(step.state != "done" for step in steps) and needed > free:
            raise DiskFullError(
                f"this sweep needs about {terminal.bytes_text(needed)} in {place.absolute()}, where "
                f"{terminal.bytes_text(free)} are free: nothing was started. Free some room, ask for fewer draws or activations, "
                "or set registry= and vector_cache= to a larger disk."
            )


def _existing(place: Path) -> Path:
    """A directory, or where it will be created: a dry run creates nothing."""
    place = place.absolute()
    return next(path for path in (place, *place.parents) if path.exists())


def _wait_for_earlier_jobs(sweep: Sweep, cells: Sequence[Cell]) -> None:
    """A job whose launcher is gone may still be at work on these cells: see it through instead of computing twice."""
    wanted = [json.loads(json.dumps(asdict(cell))) for cell in cells]
    for job in jobs_at_work(_logs(sweep)):
        if not any(cell in wanted for cell in job.spec()["argument"]["cells"]):
            continue
        print(f"job {job.id} of an earlier command is still at work on this sweep: waiting for it", file=sys.stderr)
        with Watch() as watch:
            while job.at_work():
                watch.show_ranks(job.heartbeats())
                time.sleep(POLL_SECONDS)


def _logs(sweep: Sweep) -> Path:
    return Path(os.path.abspath(sweep.registry)).parent / "logs"


def _run(sweep: Sweep, missing: list[Cell]) -> None:
    """Submit the missing cells and wait for them; on this machine one job after another, on Slurm all at once."""
    groups = _groups(sweep, missing)
    with Watch() as watch:
        if launch.resolve_cluster(sweep.resources) == "slurm":
            _wait([_submit(sweep, group, watch) for group in groups], sweep, watch)
        else:
            for group in groups:
                _wait([_submit(sweep, group, watch)], sweep, watch)


def _groups(sweep: Sweep, cells: list[Cell]) -> list[list[Cell]]:
    """Cells that share an autoencoder go to one job, so that models are loaded once."""
    sharing: dict[Autoencoder, list[Cell]] = {}
    for cell in cells:
        sharing.setdefault(cell.autoencoder, []).append(cell)
    most = sweep.resources.cells_per_job or len(cells)
    return [same[start : start + most] for same in sharing.values() for start in range(0, len(same), most)]


def _submit(sweep: Sweep, cells: list[Cell], watch: Watch) -> launch.Submitted:
    argument = {
        "cells": [asdict(cell) for cell in cells],
        "sweep": sweep.name,
        "registry": os.path.abspath(sweep.registry),
        "vector_cache": os.path.abspath(sweep.vector_cache),
        "batch_size": sweep.resources.batch_size,
        "resources": {**asdict(sweep.resources), "extra": dict(sweep.resources.extra)},
        "origin": provenance(),
        "order": secrets.randbelow(2**31),
    }
    job = create(_logs(sweep), ENTRY, argument, launch.num_ranks(sweep.resources), launch.num_gpus(sweep.resources))
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
        submitted.job.release()
        ending = endings[submitted.job.id]
        if ending.status == "failed":
            with suppress(RunError, StoreError, OSError):  # what ended the job is told below; this must not hide it
                argument, begun = submitted.job.spec()["argument"], submitted.job.started()
                land_lost(argument, ending.kind, ending.message, ending.traceback, begun)
        launch.raise_for(ending, submitted.job)
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
