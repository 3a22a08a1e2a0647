"""The conclusions of a sweep in sentences: the best cell, its lead, and whether the lead is distinguishable from 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from ksweep.analysis.report.data import ReportData
from ksweep.registry.query import TableRow
from ksweep.stats.interval_text import interval_text
from ksweep.utils.errors import RequestError

MOST_DRAWS_READ = 2_000_000
"""Number of draws above which the held-out choice, which reads the error of every draw, is left out."""


def largest_common_k(curves: pa.Table) -> int:
    """Return the largest K that all cells have; without a common K the largest of any cell."""
    ks: dict[str, set[int]] = {}
    for run, k in zip(curves["run_id"].to_pylist(), curves["k"].to_pylist(), strict=True):
        ks.setdefault(run, set()).add(k)
    return max(set.intersection(*ks.values()) or set.union(*ks.values()))


def ranked(facts: ReportData, k: int) -> list[TableRow]:
    """Return the rows of all cells at one K, the highest FVE first."""
    return sorted((row for row in facts.curves.to_pylist() if row["k"] == k), key=lambda row: -row["fve"])


def answer(facts: ReportData) -> list[str]:
    """Return sentences on the best cell at the largest common K, its lead over the next, and the best cell at K = 1."""
    k = largest_common_k(facts.curves)
    points = ranked(facts, k)
    best = points[0]
    sentences = [
        f"{best['label']} reaches {_name(facts)} of {with_interval(best)} {f'at best of {k} draws' if k > 1 else 'with one draw'}"
    ]
    sentences[0] += f", {_one_draw(facts, best)}." if k > 1 and _one_draw(facts, best) else "."
    sentences += [_gap(facts, best, point, k) for point in points[1:2]]
    first = ranked(facts, 1)
    if k > 1 and len(first) > 1 and first[0]["run_id"] != best["run_id"]:
        sentences.append(f"With a single draw {first[0]['label']} is highest, at {with_interval(first[0])}.")
    return sentences


def _name(facts: ReportData) -> str:
    shown = {row["metric"] for row in facts.curves.select(["metric"]).to_pylist()} - {None}
    return "an FVE" if shown == {"fve"} else f"a {shown.pop()}" if len(shown) == 1 else "a value"


def _one_draw(facts: ReportData, best: TableRow) -> str:
    fves = [row["fve"] for row in facts.curves.to_pylist() if row["run_id"] == best["run_id"] and row["k"] == 1]
    return f"{fves[0]:.3f} with a single draw" if fves else ""


def _gap(facts: ReportData, best: TableRow, other: TableRow, k: int) -> str:
    """Return a sentence on the lead over the next cell, paired where both are over the same activations."""
    row = difference(facts, best, other, k)
    if row is None or row["difference_low"] is None:
        return f"Next is {other['label']} with {with_interval(other)}; no paired difference is known."
    value = f"{row['difference']:.3f} {interval_text(row, 'difference_low', 'difference_high')}"
    if row["difference_low"] <= 0:
        return f"Not distinguishable from {other['label']}: paired difference {value}."
    return f"That is {value} above {other['label']}, the next (paired)."


def difference(facts: ReportData, row: TableRow, other: TableRow, k: int) -> TableRow | None:
    """Return the paired difference of two runs at one K; None if there is none."""
    pair = (row["run_id"], other["run_id"], k)
    return next((d for d in facts.differences if (d["run_id"], d["other_run_id"], d["k"]) == pair), None)


def held_out_best_sentence(registry: Path, facts: ReportData) -> str:
    """Return a sentence with the FVE of the best cell on documents that it was not chosen on; empty if it cannot be computed."""
    from ksweep.analysis.compare import best_held_out, load_cells

    total = sum((run["num_activations"] or 0) * (run["num_draws"] or 0) for run in facts.runs)
    if len(facts.runs) < 2 or total > MOST_DRAWS_READ or any(run["draws_key"] is None for run in facts.runs):
        return ""
    k = largest_common_k(facts.curves)
    try:
        [best] = best_held_out(load_cells(registry, [run["run_id"] for run in facts.runs]), ks=[k]).to_pylist()
    except RequestError:  # other activations, a single document: there is nothing to choose on
        return ""
    return (
        f"Chosen on one half of the documents and measured on the other, the best cell has {with_interval(best)} at K = {k}: "
        "an estimate without the bias of the choice."
    )


def with_interval(row: Any) -> str:
    """Return FVE and, if there is one, its interval as text."""
    return f"{row['fve']:.3f} {interval_text(row)}".rstrip()
