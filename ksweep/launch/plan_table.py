"""Print what a sweep's command shows before it computes: the plan, what was submitted, what failed."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from rich.box import HEAVY_HEAD, SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ksweep.config.sweep import Sweep
from ksweep.launch.hardware import num_gpus, resolve_cluster
from ksweep.launch.plan import Estimate, Step, estimate
from ksweep.launch.slurm import commands
from ksweep.utils.console import WIDE_COLUMNS, bytes_text, columns, console, duration_text, remark, say, say_exactly


def print_plan(
    sweep: Sweep, steps: Sequence[Step], shape: str = "", cells_of_jobs: Sequence[int] = (), *, as_json: bool = False
) -> None:
    """Print each cell's state, reason, draws to sample, estimated disk and time; then the totals and the jobs."""
    gpus, sums = num_gpus(sweep.resources), estimate(steps)
    if as_json:
        _print_objects(sweep, steps, sums, gpus, shape, cells_of_jobs)
        return
    out = console()
    out.print(_plan_table(sweep, steps, gpus, out))
    for line in _sums(sweep, steps, sums, gpus, shape, cells_of_jobs):
        out.print(line)


def _print_objects(
    sweep: Sweep, steps: Sequence[Step], sums: Estimate, gpus: int, shape: str, cells_of_jobs: Sequence[int]
) -> None:
    """Print a JSON object for each cell, then one with the totals."""
    for step in steps:
        fields = {name: value for name, value in asdict(step).items() if name != "keys"}
        say_exactly(json.dumps({**fields, "gpu_hours": _hours(step.seconds, gpus)}))
    total = {
        "sweep": sweep.name, "cells": len(steps), "states": Counter(step.state for step in steps), "job": shape,
        "cells_of_jobs": list(cells_of_jobs), **asdict(sums), "gpu_hours": _hours(sums.seconds, gpus),
        "most_gpu_hours": _most_hours(sweep, cells_of_jobs),
    }  # fmt: skip
    say_exactly(json.dumps(total))


def _plan_table(sweep: Sweep, steps: Sequence[Step], gpus: int, out: Console) -> Table:
    wide = out.width >= WIDE_COLUMNS
    counts = Counter(step.state for step in steps)
    others = "".join(f", {number} {state}" for state, number in sorted(counts.items()) if state != "missing")
    title = f"{sweep.name}: {counts['missing']} of {len(steps)} cells to run{others}"
    table = columns(out, title=title, title_justify="left", box=HEAVY_HEAD if wide else SIMPLE_HEAD, pad_edge=wide)
    for name in ("cell", "state", "why"):
        table.add_column(name, overflow="fold")
    for name in (*(("activations",) if wide else ()), "draws", "disk", "GPU-hours" if gpus else "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for step in steps:
        key = f"@{step.cell_key[:8]}"
        numbers = [f"{step.activations_to_extract:,}"] if wide else []
        numbers += [_draws(step), bytes_text(step.draw_bytes + step.activation_bytes), _time(step.seconds, gpus)]
        if step.state != "missing":
            numbers = [""] * len(numbers)
        table.add_row(f"{step.title} {key}" if wide else f"{step.title}\n{key}", step.state, step.reason, *numbers)
    return table


def _draws(step: Step) -> str:
    """Return the draws to sample, and those that are only to be scored."""
    if not step.draws_to_score:
        return f"{step.draws_to_sample:,}"
    sampled = f"{step.draws_to_sample:,} + " if step.draws_to_sample else ""
    return f"{sampled}score {step.draws_to_score:,}"


def _sums(
    sweep: Sweep, steps: Sequence[Step], sums: Estimate, gpus: int, shape: str, cells_of_jobs: Sequence[int]
) -> Iterator[str]:
    """Yield lines on the total work, its text, its cost, and the number of jobs."""
    yield (
        f"to extract: {sums.activations:,} activations; to sample: {sums.draws:,} draws; {_only_scored(sums)}"
        f"disk about {bytes_text(sums.activation_bytes + sums.draw_bytes)} "
        f"({bytes_text(sums.activation_bytes)} activations, {bytes_text(sums.draw_bytes)} draws); "
        f"time {duration_text(sums.seconds)} on one rank" + _source(sums)
    )
    yield from dict.fromkeys(text for step in steps if (text := step.text_yield) and step.state == "missing")
    if gpus and cells_of_jobs:
        limit = f"{_most_hours(sweep, cells_of_jobs):,.1f} if every job goes to its time limit ({sweep.resources.time}) once"
        yield f"GPU-hours: {_time(sums.seconds, gpus)}; {limit}"
    if cells_of_jobs:
        yield f"jobs: {len(cells_of_jobs)}{_arrays(sweep, len(cells_of_jobs))}, {_each(cells_of_jobs)}"
    if shape:
        yield f"a job: {shape}"


def _only_scored(sums: Estimate) -> str:
    return f"to score only: {sums.draws_to_score:,} draws; " if sums.draws_to_score else ""


def _source(sums: Estimate) -> str:
    if sums.num_unknown == 0:
        return " (from the newest run of this pair)" if sums.seconds else ""
    partial_time = f"; {duration_text(sums.known_seconds)} for {sums.num_known} of {sums.num_known + sums.num_unknown} cells"
    return f" (no earlier run of this pair to estimate it from{partial_time if sums.num_known else ''})"


def _each(cells: Sequence[int]) -> str:
    """Return "3 cells each", or "2 to 4 cells each"."""
    low, high = min(cells), max(cells)
    return f"{low} cell{'s' * (low != 1)} each" if low == high else f"{low} to {high} cells each"


def _arrays(sweep: Sweep, num_jobs: int) -> str:
    if resolve_cluster(sweep.resources) != "slurm" or num_jobs == 1:
        return ""
    arrays = math.ceil(num_jobs / commands.max_array_size())
    return f" in {arrays} array{'s' * (arrays != 1)}"


def _most_hours(sweep: Sweep, cells_of_jobs: Sequence[int]) -> float:
    """Return the GPU-hours if every job uses its whole time limit once."""
    resources = sweep.resources
    return len(cells_of_jobs) * resources.nodes * num_gpus(resources) * resources.minutes / 60


def _hours(seconds: float | None, gpus: int) -> float | None:
    """Return rank-seconds as GPU-hours: a rank has one GPU."""
    return None if seconds is None or not gpus else seconds / 3600


def _time(seconds: float | None, gpus: int) -> str:
    hours = _hours(seconds, gpus)
    return duration_text(seconds) if hours is None else f"{hours:,.2f}"


def print_failed_cells(steps: Sequence[Step]) -> None:
    """Print the cells that failed and are not run again unasked."""
    for step in steps:
        remark(f"failed: {step.title} @{step.cell_key[:8]}: {step.reason}")


def print_submitted(sweep: Sweep, steps: Sequence[Step], submitted: int, attached: int) -> None:
    """Print what was submitted to Slurm, what was submitted before, and how to see more of it."""
    counts = Counter(step.state for step in steps)
    counted = ", ".join(
        f"{counts[state]} {state}" for state in ("done", "running", "waiting", "missing", "failed") if counts[state]
    )
    say(f"{sweep.name}: {len(steps)} cells ({counted}); submitted {submitted} jobs, {attached} were there already")
    say(
        f"they need this command no longer: `ksweep watch {sweep.name}` shows them, "
        "the same command shows results once they are there"
    )
