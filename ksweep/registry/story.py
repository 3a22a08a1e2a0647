"""All that the registry knows of one run, and what tells two runs apart. Plain values: who shows them decides how."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ksweep import stats
from ksweep.breakdown import NUM_EXAMPLES, kept_ks
from ksweep.draws import DrawsStore
from ksweep.registry.database import connect
from ksweep.registry.landing import Landed, read
from ksweep.registry.questions import run_named

Row = dict[str, Any]
NUM_REPLICATES = 2000

PROVENANCE = ("git_commit", "git_dirty", "host", "device", "num_ranks", "argv")
COUNTS = (
    "num_activations", "num_documents", "num_draws", "baseline", "baseline_kind", "failure_rate", "cut_off_rate",
    "distinct_text_fraction", "cjk_fraction", "mean_tokens", "fve_over_successes", "tokens_per_second",
)  # fmt: skip
"""Numbers of a run that are laid side by side."""


# One run


def story(root: Path, name: str) -> Row:
    """One run: the row of `runs`, its spec, curve, controls, groups, examples.

    Raises:
        RequestError: nothing is called so.
    """
    run_id = run_named(root, name)
    with connect(root) as connection:

        def rows(question: str, *values: Any) -> list[Row]:
            found: list[Row] = connection.sql(question, params=list(values)).to_arrow_table().to_pylist()
            return found

        [run] = rows("SELECT * EXCLUDE (t_quantile) FROM runs WHERE run_id = ?", run_id)
        curve = "SELECT * EXCLUDE (run_id, influence) FROM run_curves WHERE run_id = ? ORDER BY k"
        told = {
            "run": {name: _plain(value) for name, value in run.items()},
            "spec": json.loads(run["spec"]),
            "curve": rows(curve, run_id),
            "controls": rows("SELECT * EXCLUDE (run_id) FROM run_controls WHERE run_id = ? ORDER BY control, k", run_id),
            "groups": rows(
                "SELECT * EXCLUDE (run_id, place) FROM run_metrics WHERE run_id = ? "
                "QUALIFY k = max(k) OVER () ORDER BY breakdown, place, k", run_id,
            ),
            "examples": rows("SELECT * EXCLUDE (run_id) FROM run_examples WHERE run_id = ? ORDER BY rank, number", run_id)
            or rows(_EXAMPLES_FROM_DRAWS, NUM_EXAMPLES, run_id),
        }  # fmt: skip
    told["run"]["spec"], told["run"]["resources"] = told["spec"], json.loads(run["resources"] or "null")
    return told


def _plain(value: Any) -> Any:
    """DuckDB's maps arrive as lists of pairs."""
    if isinstance(value, list) and value and all(isinstance(pair, tuple) for pair in value):
        return dict(value)
    return value


# For runs that landed before examples were kept. The best draw of each activation; one without any success is worst of all.
_EXAMPLES_FROM_DRAWS = """
WITH run AS (SELECT ? AS few, * FROM v_latest WHERE run_id = ?), firsts AS (
    SELECT d.* EXCLUDE (rank), run.few
    FROM draws AS d JOIN run ON d.draws_key = run.draws_key AND d.activation < run.num_activations AND d.draw < run.num_draws
    QUALIFY row_number() OVER (PARTITION BY d.activation ORDER BY d.error NULLS LAST, d.draw) = 1
), best AS (
    SELECT *, row_number() OVER (ORDER BY error NULLS LAST, activation) - 1 AS place, count(*) OVER () AS n FROM firsts
), cut AS (SELECT *, least(few, greatest(1, n // 3)) AS m FROM best), named AS (
    SELECT 'best' AS rank, place + 1 AS number, * FROM cut WHERE place < m
    UNION ALL SELECT 'median', place - (n - m) // 2 + 1, * FROM cut WHERE place >= (n - m) // 2 AND place < (n - m) // 2 + m
    UNION ALL SELECT 'worst', n - place, * FROM cut WHERE place >= n - m
)
SELECT rank, number, activation, draw, error, cosine, explanation, text, parse, context, document, position FROM named
ORDER BY rank, number
"""


# Two runs


@dataclass(frozen=True, eq=False)
class OfEach:
    """Best-of-K errors of each activation of a run."""

    names: list[tuple[str | None, int | None, int]]
    """Row of text, token position, and how often the two have stood before: the same activation in another run."""
    documents: np.ndarray
    ks: list[int]
    errors: np.ndarray
    """[activation, k]"""
    distances: np.ndarray
    baseline_is_measured: bool
    """Whether the distances are those of the activations, not one constant for all."""


def compare(root: Path, first: str, second: str, level: float = 0.95) -> Row:
    """What differs between two runs: in the spec, in where it ran, in the counts, and the paired differences of their FVE.

    Raises:
        RequestError: a name that nothing has.
    """
    one, other = (read(root / "landing" / run_named(root, name)) for name in (first, second))
    a, b = one.record, other.record
    numbers, note = _paired(root, one, other, level)
    return {
        "runs": [{"run_id": r.run_id, "cell": r.cell, "status": r.status, "finished": r.finished.isoformat()} for r in (a, b)],
        "same": {
            "cell": a.cell_key == b.cell_key,
            "draws": a.draws_key is not None and a.draws_key == b.draws_key,
            "activations": a.activations_key is not None and a.activations_key == b.activations_key,
        },
        "spec": list(_differences(a.spec, b.spec)),
        "provenance": [
            *_differences(*({name: getattr(r, name) for name in PROVENANCE} for r in (a, b))),
            *_differences(*({"packages": r.packages, "engine": r.engine} for r in (a, b))),
        ],
        "counts": list(_differences(*({name: getattr(r, name) for name in COUNTS} for r in (a, b)))),
        "numbers": numbers,
        "note": note,
        "level": level,
    }


def flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted names."""
    for name, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from flat(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", inner


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Row]:
    ours, theirs = dict(flat(a)), dict(flat(b))
    for name in dict.fromkeys([*ours, *theirs]):
        if ours.get(name) != theirs.get(name):
            yield {"name": name, "a": _listed(ours.get(name)), "b": _listed(theirs.get(name))}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _paired(root: Path, a: Landed, b: Landed, level: float) -> tuple[list[Row], str]:
    """FVE of a less FVE of b at every K that both have, and how it was paired or why not."""
    curves = [{row["k"]: row for row in run.curve.to_pylist()} if run.curve is not None else {} for run in (a, b)]
    values = {k: (curves[0][k]["fve"], curves[1][k]["fve"]) for k in sorted(curves[0].keys() & curves[1].keys())}
    rows: list[Row] = [
        {"k": k, "a": ours, "b": theirs, "difference": ours - theirs, "low": None, "high": None}
        for k, (ours, theirs) in values.items()
    ]
    first, second = _of_each(root, a), _of_each(root, b)
    if first is None or second is None:
        return rows, "no paired interval: the errors of single activations are kept neither with the run nor as draws"
    here, there = _common(first, second)
    if not len(here):
        return rows, "no paired interval: the runs have no activation (row of text and position) in common"
    measured = {row["k"]: row for row in _bootstrap(first, second, here, there, level)}
    merged = [measured.get(row["k"], row) for row in rows]
    return merged, _said(first, second, len(here), len(set(first.documents[here].tolist())), level)


def _said(a: OfEach, b: OfEach, num_common: int, num_documents: int, level: float) -> str:
    some = "" if num_common == len(a.names) == len(b.names) else f" (of {len(a.names)} and {len(b.names)})"
    given = "" if a.baseline_is_measured and b.baseline_is_measured else "; the baseline is taken as given"
    return (
        f"paired over the {num_common} activations{some} of {num_documents} documents that both have: {level:.0%} bootstrap over "
        f"documents, for powers of two and the largest K{given}"
    )


def _common(a: OfEach, b: OfEach) -> tuple[np.ndarray, np.ndarray]:
    """Where the activations that both have stand in each."""
    theirs = {name: i for i, name in enumerate(b.names)}
    pairs = [(i, theirs[name]) for i, name in enumerate(a.names) if name in theirs]
    here, there = (np.array([pair[side] for pair in pairs], dtype=int) for side in (0, 1))
    return here, there


def _bootstrap(a: OfEach, b: OfEach, here: np.ndarray, there: np.ndarray, level: float) -> Iterator[Row]:
    for k in sorted(set(a.ks) & set(b.ks)):
        ours, theirs = _curve(a, here, k, level), _curve(b, there, k, level)
        interval = stats.paired_difference(ours, theirs, level)
        low, high = float(interval.low[0]), float(interval.high[0])
        known = np.isfinite(low) and np.isfinite(high)
        yield {
            "k": k, "a": float(ours.fve[0]), "b": float(theirs.fve[0]), "difference": float(interval.estimate[0]),
            "low": low if known else None, "high": high if known else None,
        }  # fmt: skip


def _curve(run: OfEach, rows: np.ndarray, k: int, level: float) -> stats.FveCurve:
    """The best of k counts as the one draw of a curve: its replicates are those of every other."""
    errors, distances = run.errors[rows, run.ks.index(k)][:, None], run.distances[rows]
    baseline = stats.Baseline(
        value=float(distances.mean()), kind="evaluated set", num_activations=len(rows), scoring="raw", distances=distances
    )
    return stats.fve_curve(errors, run.documents[rows], baseline, ks=(1,), num_replicates=NUM_REPLICATES, level=level)


def _of_each(root: Path, run: Landed) -> OfEach | None:
    """From the landed file; of runs from before there was one, from the draws."""
    if run.activations is not None:
        table = run.activations
        ks = table["ks"][0].as_py()
        errors = np.asarray(table["errors"].combine_chunks().flatten()).reshape(-1, len(ks))
        distances = table["distance"].to_numpy()
        documents = np.asarray(table["document"].to_pylist(), dtype=object)
        measured = run.record.baseline_kind == "evaluated set"
        return OfEach(_names(table), documents, ks, errors, distances, measured)
    return _from_draws(root, run)


def _from_draws(root: Path, run: Landed) -> OfEach | None:
    record = run.record
    if run.curve is None or record.draws_key is None or not record.num_activations or not record.num_draws or not record.baseline:
        return None
    draws = DrawsStore(root / "draws", record.draws_key).read(
        record.num_activations, record.num_draws, ["row_id", "position", "document", "error"]
    )
    if draws is None:
        return None
    scoring: Mapping[str, Any] = record.spec.get("scoring", {})
    ks = kept_ks(run.curve["k"].to_pylist())
    best_of = stats.prefix_of_k_errors if scoring.get("selection") == "prefix" else stats.best_of_k_errors
    failed = scoring.get("failed_error")
    errors = best_of(
        draws["error"].to_numpy().reshape(record.num_activations, -1), ks, stats.ORTHOGONAL_ERROR if failed is None else failed
    )
    of_each = draws.select(["row_id", "position", "document"]).take(list(range(0, draws.num_rows, record.num_draws)))
    documents = np.asarray(of_each["document"].to_pylist(), dtype=object)
    return OfEach(_names(of_each), documents, ks, errors, np.full(record.num_activations, record.baseline), False)


def _names(table: pa.Table) -> list[tuple[str | None, int | None, int]]:
    before: Counter[tuple[str | None, int | None]] = Counter()
    names = []
    for place in zip(table["row_id"].to_pylist(), table["position"].to_pylist(), strict=True):
        names.append((*place, before[place]))
        before[place] += 1
    return names
