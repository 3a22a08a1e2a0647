"""Differences between two runs: spec, provenance, counts, and FVE, paired as in `ksweep.analysis.compare`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksweep.analysis.compare import common_ground, compare, load_cells
from ksweep.registry.query import TableRow, run_named
from ksweep.registry.run_record import LandedRun, read_run
from ksweep.stats.interval_text import effective_text
from ksweep.utils.errors import RequestError

PROVENANCE_FIELDS = ("git_commit", "git_dirty", "host", "device", "num_ranks", "argv")
COUNT_FIELDS = (
    "num_activations", "num_documents", "effective_documents", "num_draws", "baseline", "baseline_kind", "baseline_from_mean",
    "failure_rate", "cut_off_rate", "distinct_text_fraction", "cjk_fraction", "mean_tokens", "fve_over_successes",
    "tokens_per_second",
)  # fmt: skip
"""Fields of a run record that are compared as counts and rates."""


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """FVE of two runs at each K, and how they were paired or why not."""

    rows: list[TableRow]
    """k, a, b, difference, low, high; low and high are None where nothing is paired."""
    note: str
    level: float | None = None
    refused: bool = False
    """Whether the two FVEs must not be subtracted: `rows` is empty then."""


def diff_runs(root: Path, first: str, second: str, level: float | None = None) -> TableRow:
    """Return the differences between two runs in spec, provenance and counts, and the paired differences of their FVE.

    `level` is the nominal coverage of the intervals; None takes that of the runs.

    Raises:
        RequestError: nothing has one of the names.
    """
    first_run, second_run = (read_run(root / "landing" / run_named(root, name), of_each=False) for name in (first, second))
    a, b = first_run.record, second_run.record
    numbers = _numbers(root, first_run, second_run, level)
    return {
        "runs": [{"run_id": r.run_id, "cell": r.cell, "status": r.status, "finished": r.finished.isoformat()} for r in (a, b)],
        "same": {
            "cell": a.cell_key == b.cell_key,
            "draws": a.draws_key is not None and a.draws_key == b.draws_key,
            "scores": a.draws_key is not None and (a.draws_key, a.scores_key) == (b.draws_key, b.scores_key),
            "activations": a.activations_key is not None and a.activations_key == b.activations_key,
        },
        "spec": list(_differences(a.spec, b.spec)),
        "provenance": [
            *_differences(*({name: getattr(r, name) for name in PROVENANCE_FIELDS} for r in (a, b))),
            *_differences(*({"packages": r.packages, "engine": r.engine} for r in (a, b))),
        ],
        "counts": list(_differences(*({name: getattr(r, name) for name in COUNT_FIELDS} for r in (a, b)))),
        "numbers": numbers.rows,
        "note": numbers.note,
        "refused": numbers.refused,
        "level": numbers.level,
    }


def flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings under dotted names; an empty mapping is a value."""
    for name, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from flatten(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", inner


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[TableRow]:
    of_a, of_b = dict(flatten(a)), dict(flatten(b))
    for name in dict.fromkeys([*of_a, *of_b]):
        if of_a.get(name) != of_b.get(name):
            yield {"name": name, "a": _listed(of_a.get(name)), "b": _listed(of_b.get(name))}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _numbers(root: Path, a: LandedRun, b: LandedRun, level: float | None) -> Numbers:
    """Return FVE of a minus FVE of b at every K that both have."""
    runs = [a.record.run_id, b.record.run_id]
    if runs[0] == runs[1]:
        return Numbers(rows=[], note="both names are of one run: there is no difference")
    if lacking := [run.record.run_id for run in (a, b) if run.curve is None]:
        return Numbers(rows=[], note=f"no FVE to compare: {', '.join(lacking)} did not finish")
    if lacking := [run.record.run_id for run in (a, b) if run.record.draws_key is None]:
        note = f"not subtracted: {', '.join(lacking)} has no draws here, so whether both are over the same activations is unknown"
        return Numbers(rows=[row | {"difference": None} for row in _side_by_side(a, b)], note=note)
    cells = load_cells(root, runs)
    try:
        common_ground(cells)
    except RequestError as error:
        return Numbers(rows=[], note=str(error), refused=True)
    try:
        table = compare(cells, reference=runs[1], level=level).to_pylist()
    except RequestError as error:  # draws that are missing, levels that differ
        return Numbers(rows=_side_by_side(a, b), note=f"no paired interval: {error}")
    rows = [
        {
            "k": row["k"], "a": row["fve"], "b": row["other_fve"], "difference": row["difference"],
            "low": row["difference_low"], "high": row["difference_high"], "num_replicates": cells[0].scoring.num_replicates,
        }
        for row in table if row["k"] is not None
    ]  # fmt: skip
    return Numbers(rows=rows, note=_note(table[0], a, b), level=table[0]["level"])


def _side_by_side(a: LandedRun, b: LandedRun) -> list[TableRow]:
    """Return the recorded values at every K that both have, without an interval."""
    curves = [{} if run.curve is None else {row["k"]: row["fve"] for row in run.curve.to_pylist()} for run in (a, b)]
    return [
        {"k": k, "a": curves[0][k], "b": curves[1][k], "difference": curves[0][k] - curves[1][k], "low": None, "high": None}
        for k in sorted(curves[0].keys() & curves[1].keys())
    ]


def _note(row: TableRow, a: LandedRun, b: LandedRun) -> str:
    """Return a sentence on what the two runs were paired over."""
    sizes = {run.record.num_activations for run in (a, b)}
    some = "" if sizes == {row["num_activations"]} else f" (of {a.record.num_activations} and {b.record.num_activations})"
    note = (
        f"paired over the {row['num_activations']} activations{some} that both runs share ({row['num_documents']} documents"
        f"{effective_text(row['num_documents'], row['effective_documents']).replace(' (', ', ').rstrip(')')}); "
        f"{row['level']:.0%} bootstrap intervals over documents; baseline {row['baseline']:.4f} ({row['baseline_kind']})"
    )
    return note if row["note"] is None else f"{note}; {row['note']}"
