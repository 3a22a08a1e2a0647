"""A sweep from the command line to the chart: overrides, plan, jobs, ingest, table, pictures."""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ksweep import terminal
from ksweep.activations.fill import plan as plan_activations
from ksweep.draws import DRAWS_PER_UNIT, DrawsStore
from ksweep.errors import DiskFullError, RequestError, RunError, SpecError, StoreError
from ksweep.keys import Keys, cell_keys, complete_all, inspect_file
from ksweep.launch import slots, snapshot, states, submission
from ksweep.launch import submit as launch
from ksweep.launch.job import Ending, Job, create
from ksweep.launch.plan import Facts, Step, plan
from ksweep.launch.watch import Watch
from ksweep.overrides import given_settings, lay_over
from ksweep.provenance import provenance
from ksweep.reconcile import book, book_ended, land_ending
from ksweep.registry.questions import failed_runs, finished_runs, seconds_per_draw
from ksweep.spec import Autoencoder, Cell, Sweep

ENTRY = "ksweep.evaluate:run_job"
POLL_SECONDS = 0.3
SLURM_POLL_SECONDS = 2.0
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
            f"unknown option {unknown[0]}; options are --base PATH, --checkpoint-data, --config FILE, --dry-run, --no-charts, "
            "--retry, --wait; settings are key=value"
        )
    sweep = lay_over(sweep, _settings(sweep, options, rest))
    on_slurm = launch.resolve_cluster(sweep.resources) == "slurm"
    if on_slurm:
        sweep = _for_slurm(sweep)
    cells = complete_all(sweep.cells())
    keys = [cell_keys(cell) for cell in cells]
    if options.dry_run:
        steps = _plan(sweep, cells, keys, states.survey(_logs(sweep)), retry=options.retry)
        terminal.print_plan(sweep, steps, shape=_shape(sweep))
        _refuse_full_disk(sweep, steps)
        return 0
    _refuse_places(sweep)
    return (_on_slurm if on_slurm else _here)(sweep, cells, keys, options)


def _for_slurm(sweep: Sweep) -> Sweep:
    """The sweep with what a job takes where that was left open; what the cluster has not is refused, in a dry run too."""
    resources = submission.with_users_defaults(sweep.resources)
    if resources.gpus is None:
        resources = replace(resources, gpus=min(1, submission.most_gpus(resources)))
    submission.refuse(resources)
    return replace(sweep, resources=resources)


def _here(sweep: Sweep, cells: Sequence[Cell], keys: Sequence[Keys], options: argparse.Namespace) -> int:
    """Run what is missing on this machine, then show everything."""
    if launch.resolve_cluster(sweep.resources) == "local":
        launch.refuse_here(sweep.resources)
    steps = _plan(sweep, cells, keys, _reconcile(sweep, keys, wait=True), retry=options.retry)
    _refuse_full_disk(sweep, steps)
    missing = [(cell, step) for cell, step in zip(cells, steps, strict=True) if step.state == "missing"]
    terminal.say_failed([step for step in steps if step.state == "failed"])
    if missing:
        _run(sweep, missing)
    return _show(sweep, keys, steps, options)


def _on_slurm(sweep: Sweep, cells: Sequence[Cell], keys: Sequence[Keys], options: argparse.Namespace) -> int:
    """Submit what is missing; show everything if nothing is under way any more, or with --wait once it has ended."""
    with _alone(_logs(sweep)):
        jobs = _reconcile(sweep, keys, wait=False)
        steps = _plan(sweep, cells, keys, jobs, retry=options.retry)
        _refuse_full_disk(sweep, steps)
        missing = [(cell, step) for cell, step in zip(cells, steps, strict=True) if step.state == "missing"]
        started = _submit_to_slurm(sweep, missing) if missing else []
    terminal.say_failed([step for step in steps if step.state == "failed"])
    attached = {job.id: job for step in steps for job in [jobs.at_work.get(step.cell_key)] if job is not None}
    under_way = [*started, *attached.values()]
    if under_way and not options.wait:
        terminal.say_submitted(sweep, steps, len(started), len(attached))
        return 1 if any(step.state == "failed" for step in steps) else 0
    if under_way:
        _wait_on_slurm(under_way, sweep)
    return _show(sweep, keys, steps, options)


def _show(sweep: Sweep, keys: Sequence[Keys], steps: Sequence[Step], options: argparse.Namespace) -> int:
    """Results of the cells that have some; the exit code."""
    failed = [step for step in steps if step.state == "failed"]
    if len(failed) == len(steps):
        return 1
    computed = sum(step.state == "missing" for step in steps)
    terminal.show(sweep, keys, computed=computed, charts=not options.no_charts)
    if sweep.export_json and not failed:
        _export(sweep, keys)
    return 1 if failed else 0


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
        usage="%(prog)s [key=value ...] [--base PATH] [--checkpoint-data] [--config FILE] [--dry-run] [--retry] [--wait] "
        "[--no-charts]",
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
    parser.add_argument("--retry", action="store_true", help="run cells again that failed")
    parser.add_argument("--wait", action="store_true", help="on Slurm: stay until every job has ended, then show the results")
    parser.add_argument("--no-charts", action="store_true", help="write no pictures")
    return parser


def _plan(sweep: Sweep, cells: Sequence[Cell], keys: Sequence[Keys], jobs: states.Survey, *, retry: bool) -> list[Step]:
    """What is there for each cell, and so what is to be done; reads names and manifests only."""
    finished, failed = finished_runs(Path(sweep.registry)), failed_runs(Path(sweep.registry))
    planned: dict[str, list[tuple[int, int]]] = {}
    facts = []
    for cell, key in zip(cells, keys, strict=True):
        fact = _facts(sweep, cell, key, finished.get(key.cell), planned.setdefault(key.draws, []))
        facts.append(replace(fact, job=jobs.at_work_on(key.cell), failure=failed.get(key.cell) or jobs.failures.get(key.cell)))
        if key.cell not in finished:
            planned[key.draws].append((cell.activations.num_activations, cell.sampling.effective_num_draws))
    return plan(facts, retry=retry)


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


def _reconcile(sweep: Sweep, keys: Sequence[Keys], *, wait: bool) -> states.Survey:
    """What earlier commands left: submissions are settled, ended jobs booked, and what is still at work is known.

    With `wait` (on this machine) a job that is at work on these cells is seen through, instead of computing twice.
    """
    logs, wanted = _logs(sweep), {key.cell for key in keys}
    for line in submission.settle(logs):
        print(line, file=sys.stderr)
    told: set[str] = set()
    with Watch() as watch:
        while True:
            survey = book_ended(logs)
            ours = {job.id: job for key, job in survey.at_work.items() if key in wanted}
            patient = [i for i in ours if survey.verdicts[i].look_again or (wait and survey.verdicts[i].state != "unknown")]
            if not patient:
                return survey
            for name in patient:
                if name not in told:
                    told.add(name)
                    what = (
                        "seems to be gone: making sure"
                        if survey.verdicts[name].look_again
                        else "is still at work on this sweep: waiting"
                    )
                    print(f"job {name} of an earlier command {what} ({survey.verdicts[name].reason})", file=sys.stderr)
                watch.show_ranks(ours[name].heartbeats())
            time.sleep(POLL_SECONDS if wait else SLURM_POLL_SECONDS)


@contextmanager
def _alone(logs: Path) -> Iterator[None]:
    """One command at a time looks what is missing and submits it: two at once would both find the same."""
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / "submitting").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another command is submitting to {logs}: waiting for it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # Lustre is often mounted without locks; jobs given twice leave out each other's draws
            print(f"warning: {logs} cannot be locked ({error.strerror}): start one command at a time", file=sys.stderr)
        yield


def _logs(sweep: Sweep) -> Path:
    return Path(os.path.abspath(sweep.registry)).parent / "logs"


Missing = Sequence[tuple[Cell, Step]]


def _run(sweep: Sweep, missing: Missing) -> None:
    """Start the missing cells on this machine and wait for them: on CPUs one job after another, on GPUs as they become free."""
    waiting: list[list[tuple[Cell, Step]]] = _groups(sweep, missing)
    running: list[tuple[launch.Submitted, tuple[int, ...]]] = []
    failure: Exception | None = None
    gpus = launch.num_gpus(sweep.resources) if launch.resolve_cluster(sweep.resources) == "local" else 0
    most = sweep.resources.max_parallel_jobs or (len(waiting) if gpus else 1)
    with Watch() as watch:
        while waiting or running:
            while waiting and len(running) < most:
                job = _create(sweep, waiting[0], "local")
                numbers = _gpus_for(job, gpus, watch, wait=not running)
                if numbers is None:
                    shutil.rmtree(job.path)
                    break
                waiting.pop(0)
                watch.show(f"job {job.id}: starting", 0, 0)
                submitted = launch.submit(
                    job, sweep.resources, sweep.resources.job_name or sweep.name, watch.show, numbers or None
                )
                if numbers:
                    slots.hand_on(numbers, job.id, int(submitted.handle.job_id))
                running.append((submitted, numbers))
            try:
                _wait([s for s, _ in running], sweep, watch, first=bool(waiting))
            except (RequestError, RunError, StoreError) as error:
                # The jobs beside it go on to their end; none is started any more.
                failure = failure or error
                waiting.clear()
            for submitted, numbers in [r for r in running if r[0].job.noted("settled") is not None]:
                slots.release(numbers)
                running.remove((submitted, numbers))
    if failure is not None:
        raise failure


def _gpus_for(job: Job, count: int, watch: Watch, *, wait: bool) -> tuple[int, ...] | None:
    """Free GPUs for a job, waiting for those of other launchers; without `wait` None where none are free now."""
    if count == 0:
        return ()
    there = launch.visible_numbers()
    if len(there) < count:  # named by UUID: submitit counts them itself
        return ()
    while (taken := slots.take(there, count, job.id)) is None and wait:
        held = ", ".join(f"GPU {n}: job {name}" for n, name in slots.holders(there).items())
        watch.show(f"waiting for {count} of {len(there)} GPUs ({held})", 0, 0)
        time.sleep(SLURM_POLL_SECONDS)
    return taken


def _groups(sweep: Sweep, missing: Missing) -> list[list[tuple[Cell, Step]]]:
    """Cells that share an autoencoder go to one job, so that models are loaded once."""
    sharing: dict[Autoencoder, list[tuple[Cell, Step]]] = {}
    for cell, step in missing:
        sharing.setdefault(cell.autoencoder, []).append((cell, step))
    most = sweep.resources.cells_per_job or len(missing)
    return [same[start : start + most] for same in sharing.values() for start in range(0, len(same), most)]


def _create(sweep: Sweep, group: Missing, cluster: str) -> Job:
    argument = {
        "cells": [asdict(cell) for cell, _ in group],
        "sweep": sweep.name,
        "registry": os.path.abspath(sweep.registry),
        "vector_cache": os.path.abspath(sweep.vector_cache),
        "batch_size": sweep.resources.batch_size,
        "resources": {**asdict(sweep.resources), "extra": dict(sweep.resources.extra)},
        "origin": {**provenance(), "directory": os.getcwd()},
        "order": secrets.randbelow(2**31),
    }
    resources = sweep.resources
    return create(
        _logs(sweep), ENTRY, argument, launch.num_ranks(resources), launch.num_gpus(resources), cluster=cluster,
        cells=[(step.cell_key, step.label) for _, step in group],
    )  # fmt: skip


def _submit_to_slurm(sweep: Sweep, missing: Missing) -> list[Job]:
    """Hand the missing cells to Slurm: an array with an element for each job, which runs the code as it is now."""
    logs = _logs(sweep)
    resources = sweep.resources
    code = snapshot.take(logs)
    jobs = [_create(sweep, group, "slurm") for group in _groups(sweep, missing)]
    if code is not None:
        for job in jobs:
            job.note("code", {"path": str(code.path), "commit": code.commit, "diff": str(code.diff) if code.diff else None})
    try:
        submission.submit(logs, jobs, resources, sweep.name, code.path if code else None)
    except SpecError:
        # Refused before anything was handed over. After any other failure the next command finds out what Slurm has of them.
        for job in jobs:
            shutil.rmtree(job.path)
        raise
    return jobs


def _wait_on_slurm(jobs: Sequence[Job], sweep: Sweep) -> None:
    """Until every job has ended; then each is booked, and the first failure raised. The jobs do not need this process."""
    live = {job.id: job for job in jobs}
    ended: list[tuple[Job, states.Verdict]] = []
    with Watch() as watch:
        try:
            while live:
                found = states.verdicts(list(live.values()))
                for name, verdict in found.items():
                    if verdict.state not in states.LIVE:
                        ended.append((live.pop(name), verdict))
                watch.show_jobs(found, {job.id: job.heartbeats() for job in live.values()})
                time.sleep(SLURM_POLL_SECONDS if live else 0)
        except KeyboardInterrupt:
            raise RunError(
                f"no longer waiting: {len(live)} jobs go on without this command. `ksweep watch {sweep.name}` shows them, "
                f"`ksweep cancel {sweep.name}` ends them, the same command attaches to them again"
            ) from None
    for job, verdict in ended:
        book(job, verdict)
    for job, verdict in ended:
        if verdict.state == "failed":
            launch.raise_for(verdict.ending or Ending(rank=0, status="failed", kind=verdict.kind, message=verdict.reason), job)
    if any(verdict.state == "stopped" for _, verdict in ended):
        reasons = "; ".join(sorted({v.reason for _, v in ended if v.state == "stopped"}))
        raise RunError(f"stopped ({reasons}): finished units are kept; the same command carries on from there")


def _shape(sweep: Sweep) -> str:
    """What a job takes, in words."""
    cluster = launch.resolve_cluster(sweep.resources)
    gpus = launch.num_gpus(sweep.resources)
    return f"{cluster}: {submission.shape(replace(sweep.resources, gpus=gpus))}"


def _wait(jobs: list[launch.Submitted], sweep: Sweep, watch: Watch, *, first: bool = False) -> None:
    """Until every job of this machine has ended (with `first`, until one has); then the first failure is raised."""
    ranks = launch.num_ranks(sweep.resources)
    endings: dict[str, Ending] = {}
    interrupted = 0
    while len(endings) < (min(1, len(jobs)) if first and not interrupted else len(jobs)):
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
    ended = [s for s in jobs if s.job.id in endings]
    for submitted in ended:
        submitted.kill()
        submitted.job.release()
        ending = endings[submitted.job.id]
        if ending.status == "failed":
            land_ending(submitted.job, ending)
        submitted.job.note("settled", {"state": ending.status, "reason": ending.message, "kind": ending.kind})
    for submitted in ended:
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
