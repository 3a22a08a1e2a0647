"""The answer of a sweep in words: the best cell, by how much, and whether that can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from ksweep.analysis.report.data import ReportData
from ksweep.registry.query import TableRow
from ksweep.stats.interval_text import interval_text
from ksweep.utils.errors import RequestError

MOST_DRAWS_READ = 2_000_000
"""Choosing on one half of the documents and measuring on the other reads the error of every draw."""


def largest_common_k(curves: pa.Table) -> int:
    """The largest K that every cell has; the largest of any where they share none."""
    ks: dict[str, set[int]] = {}
    for run, k in zip(curves["run_id"].to_pylist(), curves["k"].to_pylist(), strict=True):
        ks.setdefault(run, set()).add(k)
    return max(set.intersection(*ks.values()) or set.union(*ks.values()))


def ranked(facts: ReportData, k: int) -> list[TableRow]:
    """The points at one K, the highest first."""
    return sorted((row for row in facts.curves.to_pylist() if row["k"] == k), key=lambda row: -row["fve"])


def answer(facts: ReportData) -> list[str]:
    """What came out, a sentence each: the best cell at the largest K that all have, how far the next is, K = 1."""
    k = largest_common_k(facts.curves)
    points = ranked(facts, k)
    best = points[0]
    said = [
        f"{best['label']} reaches {_name(facts)} of {with_interval(best)} {f'at best of {k} draws' if k > 1 else 'with one draw'}"
    ]
    said[0] += f", {_one_draw(facts, best)}." if k > 1 and _one_draw(facts, best) else "."
    said += [_gap(facts, best, point, k) for point in points[1:2]]
    first = ranked(facts, 1)
    if k > 1 and len(first) > 1 and first[0]["run_id"] != best["run_id"]:
        said.append(f"With a single draw {first[0]['label']} is highest, at {with_interval(first[0])}.")
    return said


def _name(facts: ReportData) -> str:
    shown = {row["metric"] for row in facts.curves.select(["metric"]).to_pylist()} - {None}
    return "an FVE" if shown == {"fve"} else f"a {shown.pop()}" if len(shown) == 1 else "a value"


def _one_draw(facts: ReportData, best: TableRow) -> str:
    found = [row["fve"] for row in facts.curves.to_pylist() if row["run_id"] == best["run_id"] and row["k"] == 1]
    return f"{found[0]:.3f} with a single draw" if found else ""


def _gap(facts: ReportData, best: TableRow, other: TableRow, k: int) -> str:
    """How far the next cell is, paired where the two are over the same activations."""
    row = difference(facts, best, other, k)
    if row is None or row["difference_low"] is None:
        return f"Next is {other['label']} with {with_interval(other)}; no paired difference is known."
    value = f"{row['difference']:.3f} {interval_text(row, 'difference_low', 'difference_high')}"
    if row["difference_low"] <= 0:
        return f"Not distinguishable from {other['label']}: paired difference {value}."
    return f"That is {value} above {other['label']}, the next (paired)."


def difference(facts: ReportData, one: TableRow, other: TableRow, k: int) -> TableRow | None:
    """The paired difference of two runs at one K."""
    pair = (one["run_id"], other["run_id"], k)
    return next((row for row in facts.differences if (row["run_id"], row["other_run_id"], row["k"]) == pair), None)


def held_out_best_sentence(registry: Path, facts: ReportData) -> str:
    """What choosing the best cell is worth on documents that it was not chosen on; empty where that cannot be had."""
    from ksweep.analysis.compare import best_held_out, load_cells

    total = sum((run["num_activations"] or 0) * (run["num_draws"] or 0) for run in facts.runs)
    if len(facts.runs) < 2 or total > MOST_DRAWS_READ or any(run["draws_key"] is None for run in facts.runs):
        return ""
    k = largest_common_k(facts.curves)
    try:
        [found] = best_held_out(load_cells(registry, [run["run_id"] for run in facts.runs]), ks=[k]).to_pylist()
    except RequestError:  # other activations, a single document: there is nothing to choose on
        return ""
    return (
        f"Chosen on one half of the documents and measured on the other, the best cell has {with_interval(found)} at K = {k}: "
        "the value that the choice has not flattered."
    )


def with_interval(row: Any) -> str:
    """A value and, where it has one, its interval."""
    return f"{row['fve']:.3f} {interval_text(row)}".rstrip()
