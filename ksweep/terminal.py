"""What a sweep says on the terminal: the plan before, the table and the places of the pictures after."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import HEAVY_HEAD, SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ksweep.console import baseline_text, columns, console, duration_text, effective_text, interval_text
from ksweep.console import bytes_text as bytes_text
from ksweep.keys import Keys
from ksweep.launch import slurm
from ksweep.launch.plan import Estimate, Step, estimate
from ksweep.launch.submit import num_gpus, resolve_cluster
from ksweep.registry.database import DATABASE
from ksweep.registry.questions import controls_of, curves_of
from ksweep.spec import Sweep
from ksweep.stats.bootstrap import FEW_DOCUMENTS

if TYPE_CHECKING:
    import pyarrow as pa

SHOWN_KS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
FAILURES_TO_MENTION = 0.2
CUT_OFF_TO_MENTION = 0.1
DISTINCT_TO_MENTION = 0.2
CJK_TO_MENTION = 0.5
WIDE_COLUMNS = 110
"""Narrower terminals leave out failures and speed."""
LABEL_COLUMN = 24
"""Labels longer than this are folded where the width is short."""
COLUMN = 19
"""Characters that one K takes: "[-0.123, -0.123]" and its border."""


def print_plan(
    sweep: Sweep, steps: Sequence[Step], shape: str = "", cells_of_jobs: Sequence[int] = (), *, as_json: bool = False
) -> None:
    """Each cell: its state and why, draws to sample, estimated disk and time; then the jobs and the sums."""
    gpus, sums = num_gpus(sweep.resources), estimate(steps)
    if as_json:
        _print_objects(sweep, steps, sums, gpus, shape, cells_of_jobs)
        return
    out = console()
    out.print(_plan_table(sweep, steps, gpus, out))
    for line in _sums(sweep, sums, gpus, shape, cells_of_jobs):
        out.print(line)


def _print_objects(
    sweep: Sweep, steps: Sequence[Step], sums: Estimate, gpus: int, shape: str, cells_of_jobs: Sequence[int]
) -> None:
    """An object a cell, then one with the sums."""
    for step in steps:
        print(json.dumps({**asdict(step), "gpu_hours": _hours(step.seconds, gpus)}))
    total = {
        "sweep": sweep.name, "cells": len(steps), "states": Counter(step.state for step in steps), "job": shape,
        "cells_of_jobs": list(cells_of_jobs), **asdict(sums), "gpu_hours": _hours(sums.seconds, gpus),
        "most_gpu_hours": _most_hours(sweep, cells_of_jobs),
    }  # fmt: skip
    print(json.dumps(total))


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
        numbers += [f"{step.draws_to_sample:,}", bytes_text(step.draw_bytes + step.activation_bytes), _time(step.seconds, gpus)]
        if step.state != "missing":
            numbers = [""] * len(numbers)
        table.add_row(f"{step.title} {key}" if wide else f"{step.title}\n{key}", step.state, step.reason, *numbers)
    return table


def _sums(sweep: Sweep, sums: Estimate, gpus: int, shape: str, cells_of_jobs: Sequence[int]) -> Iterator[str]:
    """What is to be done, what it takes, and in how many jobs."""
    yield (
        f"to extract: {sums.activations:,} activations; to sample: {sums.draws:,} draws; "
        f"disk about {bytes_text(sums.activation_bytes + sums.draw_bytes)} "
        f"({bytes_text(sums.activation_bytes)} activations, {bytes_text(sums.draw_bytes)} draws); "
        f"time {duration_text(sums.seconds)} on one rank" + _source(sums)
    )
    if gpus and cells_of_jobs:
        limit = f"{_most_hours(sweep, cells_of_jobs):,.1f} if every job goes to its time limit ({sweep.resources.time}) once"
        yield f"GPU-hours: {_time(sums.seconds, gpus)}; {limit}"
    if cells_of_jobs:
        yield f"jobs: {len(cells_of_jobs)}{_arrays(sweep, len(cells_of_jobs))}, {_each(cells_of_jobs)}"
    if shape:
        yield f"a job: {shape}"


def _source(sums: Estimate) -> str:
    if sums.num_unknown == 0:
        return " (from the newest run of this pair)" if sums.seconds else ""
    known = f"; {duration_text(sums.known_seconds)} for {sums.num_known} of {sums.num_known + sums.num_unknown} cells"
    return f" (no earlier run of this pair to estimate it from{known if sums.num_known else ''})"


def _each(cells: Sequence[int]) -> str:
    """ "3 cells each", or "2 to 4 cells each"."""
    low, high = min(cells), max(cells)
    return f"{low} cell{'s' * (low != 1)} each" if low == high else f"{low} to {high} cells each"


def _arrays(sweep: Sweep, num_jobs: int) -> str:
    if resolve_cluster(sweep.resources) != "slurm" or num_jobs == 1:
        return ""
    arrays = math.ceil(num_jobs / slurm.max_array_size())
    return f" in {arrays} array{'s' * (arrays != 1)}"


def _most_hours(sweep: Sweep, cells_of_jobs: Sequence[int]) -> float:
    """GPU-hours if every job takes its whole time limit once."""
    resources = sweep.resources
    return len(cells_of_jobs) * resources.nodes * num_gpus(resources) * resources.minutes / 60


def _hours(seconds: float | None, gpus: int) -> float | None:
    """GPU-hours: a rank has one GPU."""
    return None if seconds is None or not gpus else seconds / 3600


def _time(seconds: float | None, gpus: int) -> str:
    hours = _hours(seconds, gpus)
    return duration_text(seconds) if hours is None else f"{hours:,.2f}"


def say_failed(steps: Sequence[Step]) -> None:
    """Cells that failed and are not run again unasked."""
    for step in steps:
        print(f"failed: {step.title} @{step.cell_key[:8]}: {step.reason}", file=sys.stderr)


def say_submitted(sweep: Sweep, steps: Sequence[Step], submitted: int, attached: int) -> None:
    """What was handed to Slurm, what is there already, and how to see more of it."""
    counts = Counter(step.state for step in steps)
    counted = ", ".join(
        f"{counts[state]} {state}" for state in ("done", "running", "waiting", "missing", "failed") if counts[state]
    )
    print(f"{sweep.name}: {len(steps)} cells ({counted}); submitted {submitted} jobs, {attached} were there already")
    print(
        f"they need this command no longer: `ksweep watch {sweep.name}` shows them, "
        "the same command shows results once they are there"
    )


def show(sweep: Sweep, keys: Sequence[Keys], *, computed: int, charts: bool) -> None:
    """Bring the database up to date, print the table, write the pictures."""
    registry = Path(sweep.registry)
    labels = dict(zip([k.cell for k in keys], sweep.labels(), strict=True))
    table = curves_of(registry, labels)
    out = console()
    out.print(results_table(sweep, table, out))
    for line in _footnotes(table):
        out.print(line)
    out.print(_controls_line(controls_of(registry, labels)))
    for line in warnings(table):
        out.print(f"warning: {line}")
    for line in noted(table.to_pylist()):
        out.print(Text(f"note on {line}"))
    if charts:
        for path in write_charts(sweep, table, registry / "charts" / sweep.name):
            out.print(f"chart: {path}", soft_wrap=True)
    out.print(f"computed {computed} of {len(keys)} cells; registry: {registry / DATABASE}", soft_wrap=True)


def results_table(sweep: Sweep, curves: pa.Table, out: Console) -> Table:
    """A row a cell: FVE with its interval at as many K as the width has room for, the control, failures."""
    rows, width = curves.to_pylist(), out.width
    ks = sorted({r["k"] for r in rows})
    label_width = max(len(r["label"]) for r in rows)
    wide = width >= WIDE_COLUMNS
    beside = 16 + (24 if wide else 0)  # the control; failures and speed
    most = max(2, (width - min(label_width, LABEL_COLUMN) - 4 - beside) // COLUMN)
    shown = _spread([k for k in ks if k in SHOWN_KS or k == ks[-1]], most)
    title = f"{sweep.name}: FVE, best of K draws (oracle selection by the AR)"
    table = columns(out, title=title, title_justify="left", show_lines=True)
    table.add_column("cell", overflow="fold")
    for k in shown:
        table.add_column(f"K={k}", justify="right", no_wrap=True)
    for name in (f"shuffled{chr(10) if out.is_terminal else ' '}K={ks[-1]}", "failed", "tokens/s")[: 3 if wide else 1]:
        table.add_column(name, justify="right", no_wrap=True)
    for label in dict.fromkeys(r["label"] for r in rows):
        mine = {r["k"]: r for r in rows if r["label"] == label}
        last = mine[max(mine)]
        beside_it = [
            _number(last["shuffled_fve"], ".3f"),
            _number(last["failure_rate"], ".1%"),
            _number(last["tokens_per_second"], ",.0f"),
        ]
        table.add_row(Text(label), *(_fve(mine.get(k)) for k in shown), *beside_it[: 3 if wide else 1])
    return table


def _spread(values: list[int], most: int) -> list[int]:
    """At most so many of the values, the first and the last among them."""
    if len(values) <= most:
        return values
    if most < 2:
        return values[-1:]
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def write_charts(sweep: Sweep, curves: pa.Table, folder: Path) -> list[Path]:
    """FVE by K, and by temperature where that varies; HTML, PNG and PDF."""
    from ksweep import charts

    written = charts.save(charts.fve_by_k(curves, title=sweep.question or sweep.name), folder / "fve_by_k")
    if len(set(curves["temperature"].to_pylist())) > 1:
        written += charts.save(charts.fve_by_temperature(curves), folder / "fve_by_temperature")
    return written


def _footnotes(curves: pa.Table) -> list[str]:
    """Baseline, its kind and N stand beside every FVE: one line for each set of cells that share them."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for row in {r["label"]: r for r in curves.to_pylist()}.values():
        names = ("level", "num_documents", "effective_documents", "num_activations")
        facts = (*(row[name] for name in names), baseline_text(row))
        groups.setdefault(facts, []).append(row["label"])
    lines = []
    for (level, documents, effective, activations, baseline), labels in groups.items():
        which = "" if len(groups) == 1 else f"{', '.join(labels)}: "
        lines.append(
            f"{which}{level:.0%} intervals: bootstrap over {documents} documents{effective_text(documents, effective)}; "
            f"N = {activations} activations; {baseline}; shuffled: draws of another activation"
        )
    return lines


def warnings(curves: pa.Table) -> list[str]:
    """What a reader of the numbers should know before believing them, a line each."""
    lines = []
    for row in {r["label"]: r for r in curves.to_pylist()}.values():
        label = row["label"]
        if (row["failure_rate"] or 0) > FAILURES_TO_MENTION:
            lines.append(f"{label}: {row['failure_rate']:.0%} of the draws failed; a failed draw uses up one of the K")
        if (row["cut_off_rate"] or 0) > CUT_OFF_TO_MENTION:
            cut_off = f"{row['cut_off_rate']:.0%}"
            lines.append(f"{label}: {cut_off} of the draws ran into max_new_tokens: raise sampling.max_new_tokens")
        if (row["num_draws"] or 0) > 1 and (row["distinct_text_fraction"] or 1) < DISTINCT_TO_MENTION:
            lines.append(f"{label}: only {row['distinct_text_fraction']:.0%} of the texts are distinct: more draws bring little")
        if (row["cjk_fraction"] or 0) > CJK_TO_MENTION:
            lines.append(f"{label}: most explanations are Chinese or Japanese text, as when an injection does not reach the AV")
        effective = row["effective_documents"] or row["num_documents"]
        if effective is not None and effective < FEW_DOCUMENTS:
            lines.append(
                f"{label}: {row['num_documents']} documents{effective_text(row['num_documents'], effective)} are few for a "
                f"bootstrap over documents: below {FEW_DOCUMENTS} in effect intervals may cover less than they say"
            )
    return lines


def noted(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each note of some runs once, with its subject, and the labels of its runs where not all have it."""
    of: dict[tuple[str, str], list[str]] = {}
    labels = dict.fromkeys(row["label"] for row in rows)
    for row in {row["label"]: row for row in rows}.values():
        for note in row.get("notes") or ():
            of.setdefault((note["about"], note["text"]), []).append(row["label"])
    return [
        f"{about}: {text}" if len(having) == len(labels) else f"{about} ({', '.join(having)}): {text}"
        for (about, text), having in of.items()
    ]


def _controls_line(controls: pa.Table) -> str:
    """Controls that do not depend on K, each once where all cells share it, else as a range."""
    values: dict[str, list[float]] = {}
    for row in controls.to_pylist():
        values.setdefault(row["control"], []).append(row["value"])
    spans = {name: (min(v), max(v)) for name, v in values.items()}
    words = [f"{name} {a:.3f}" if round(a, 3) == round(b, 3) else f"{name} {a:.3f} to {b:.3f}" for name, (a, b) in spans.items()]
    return "controls: " + ", ".join(words)


def _fve(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['fve']:.3f}\n{interval_text(row)}".rstrip()


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
