"""Distributions of errors and norms, and FVE by group. Counted here, in NumPy: the chart gets a row a bin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import altair as alt
import numpy as np
import pyarrow as pa

from ksweep.charts.style import (
    FVE,
    HEIGHT,
    WIDTH,
    Colours,
    Rows,
    colour,
    dash,
    data,
    finished,
    labels_of,
    natural,
    rows_of,
    table_of,
    value_of,
)
from ksweep.errors import RequestError

NUM_BINS = 60
SHOWN = 0.995
"""Share of the values that the axis reaches to: the last few of a heavy tail would squeeze all others to the left."""
MOST_PARTS = 30

ERRORS = """
    SELECT c.label, d.activation, d.error FROM draws AS d JOIN v_latest AS c USING (draws_key)
    WHERE ($sweep IS NULL OR c.sweep = $sweep) AND d.activation < c.num_activations AND d.draw < c.num_draws
"""
NORMS = """
    WITH one AS (
        SELECT arg_max(run_id, num_activations) AS run_id, any_value(parse_filename(coalesce(model, vectors))) AS model, layer
        FROM v_latest WHERE $sweep IS NULL OR sweep = $sweep GROUP BY activations_key, layer
    )
    SELECT concat(one.model, ' layer ', one.layer) AS label, a.norm FROM activations AS a JOIN one USING (run_id)
"""
GROUPS = """
    SELECT m.*, c.level FROM metrics AS m LEFT JOIN (SELECT run_id, any_value(level) AS level FROM curves GROUP BY run_id) AS c
    USING (run_id) WHERE ($sweep IS NULL OR sweep = $sweep) AND breakdown <> 'all' ORDER BY m.run_id, place
"""
HELD_AGAINST = {
    "own": "distances from the mean of the group itself",
    "overall": "that of all activations",
    None: "the group's distances from the mean of all activations",
}
BREAKDOWNS = {
    "role": "Role of the token",
    "position": "Position in the text, tokens",
    "norm": "Length of the activation",
    "document": "Document",
}


def error_distribution(
    source: Any, *, sweep: str | None = None, colours: Colours | None = None, title: str | None = None
) -> alt.TopLevelMixin:
    """How errors spread: of all draws (solid) and, where the table says which activation a draw is of, of the best ones (dashed).

    Table: a row a draw with `label, error` (null where the draw failed) and `activation`.
    """
    values = _columns(table_of(source, ERRORS, sweep), ("label", "error"))
    edges = _edges(values["error"])
    rows: Rows = []
    for label, inside in _by_label(values["label"]):
        errors = values["error"][inside]
        rows += _histogram(errors, edges, {"label": label, "what": "all draws"})
        if "activation" in values:
            rows += _histogram(_best(values["activation"][inside], errors), edges, {"label": label, "what": "best draw"})
    rows.sort(key=lambda r: natural(r["label"]))
    failed, total = int(np.isnan(values["error"]).sum()), len(values["error"])
    said = f"{total:,} draws, {failed / total:.2%} of them failed and without an error"
    lines = [f"{said}; {_beyond(values['error'], edges):.2%} lie beyond the axis."]
    lines += ["Solid: every draw. Dashed: the best draw of each activation."] if "activation" in values else []
    lines += _tail_line(values)
    chart = _outlines(rows, colours, "Error of a draw (mean squared difference per dimension)", "Share of draws, per bin")
    return finished(chart, title or "Errors of draws", lines)


def norm_distribution(
    source: Any, *, sweep: str | None = None, colours: Colours | None = None, title: str | None = None
) -> alt.TopLevelMixin:
    """How long activations are; with a connection, each set of activations once. Table: `label, norm`, a row each."""
    values = _columns(table_of(source, NORMS, sweep), ("label", "norm"))
    edges = _edges(values["norm"], from_zero=False)
    rows: Rows = []
    for label, inside in _by_label(values["label"]):
        rows += _histogram(values["norm"][inside], edges, {"label": label})
    rows.sort(key=lambda r: natural(r["label"]))
    low, middle, high = np.nanquantile(values["norm"], [0.01, 0.5, 0.99])
    line = (
        f"{len(values['norm']):,} activations; median {middle:.4g}, 1 % below {low:.4g}, 1 % above {high:.4g}, "
        f"longest {np.nanmax(values['norm']):.4g}."
    )
    lines = [line, f"Beyond the axis: {_beyond(values['norm'], edges):.2%}."]
    chart = _outlines(rows, colours, "Length of the activation (L2 norm)", "Share of activations, per bin")
    return finished(chart, title or "Lengths of activations", lines)


def by_group(
    source: Any,
    *,
    breakdown: Literal["role", "position", "norm", "document"] | None = None,
    k: int | None = None,
    against: Literal["own", "overall"] = "own",
    sweep: str | None = None,
    colours: Colours | None = None,
    title: str | None = None,
) -> alt.TopLevelMixin:
    """FVE within groups of activations: a dot with its interval for each group and cell.

    Args:
        source: connection, relation, or table with the columns of `metrics` or of `compare.groups_of_cells`.
        breakdown: None shows all that the table has, below one another.
        k: None takes the largest that every cell has.
        against: which baseline, where the table has both.
        sweep: with a connection, the sweep to show.
        colours: see `palette`.
        title: above the chart.
    """
    needed = ("label", "breakdown", "part", "k", "fve", "fve_low", "fve_high")
    rows = rows_of(table_of(source, GROUPS, sweep), needed, (*needed, "place", "against", "level", "num_activations", "baseline"))
    rows = [r for r in rows if breakdown in (None, r["breakdown"]) and r["fve"] is not None]
    rows = [r for r in rows if r["against"] in (None, against)]
    common = set.intersection(*({r["k"] for r in rows if r["label"] == label} for label in labels_of(rows))) if rows else set()
    chosen = k if k is not None else max(common, default=None)
    rows = [r for r in rows if r["k"] == chosen]
    if not rows:
        raise RequestError(f"no group of the table has breakdown={breakdown}, K = {chosen}, against={against}")
    left_out = ""
    panels = []
    for name in dict.fromkeys(r["breakdown"] for r in rows):
        inside, left_out = _bounded([r for r in rows if r["breakdown"] == name])
        panels.append(_dots(inside, str(name), colours))
    interval = f"{value_of(rows, 'level', '{:.0%}') or '95%'} intervals over documents."
    lines = [f"Best of K = {chosen} draws, oracle selection by the AR. {interval}"]
    lines += [f"Baseline: {HELD_AGAINST[rows[0]['against']]}.", *([left_out] if left_out else [])]
    chart = panels[0] if len(panels) == 1 else alt.vconcat(*panels, spacing=16)
    return finished(chart, title or "FVE by group of activations", lines)


# Counting


def _columns(table: Any, needed: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns as arrays, with NaN for null; labels and activations as they are."""
    if not isinstance(table, pa.Table):
        table = pa.Table.from_pylist(list(table))
    if not table.num_rows:
        raise RequestError("there is nothing to draw: the table has no rows; has a cell of this sweep finished?")
    if missing := [name for name in needed if name not in table.column_names]:
        raise RequestError(f"the table lacks {', '.join(missing)}; the chart takes {', '.join(needed)}, a row for each")
    names = [name for name in (*needed, "activation") if name in table.column_names]
    return {
        name: table[name].combine_chunks().dictionary_encode() if name == "label" else _numbers(table[name]) for name in names
    }


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(column.to_numpy(), dtype=np.float64)


def _by_label(labels: Any) -> Iterator[tuple[str, np.ndarray]]:
    codes = labels.indices.to_numpy()
    for code, name in enumerate(labels.dictionary.to_pylist()):
        yield name, codes == code


def _edges(values: np.ndarray, *, from_zero: bool = True) -> np.ndarray:
    """Bins up to where nearly all values lie; what lies beyond is told in words."""
    known = values[np.isfinite(values)]
    if not len(known):
        raise RequestError("every value is missing: there is no distribution to draw")
    low, high = (np.quantile(known, 1 - SHOWN) if not from_zero else known.min()), np.quantile(known, SHOWN)
    return np.linspace(low, high if high > low else low + 1e-6 + abs(low) * 1e-3, NUM_BINS + 1)


def _beyond(values: np.ndarray, edges: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(((known < edges[0]) | (known > edges[-1])).mean())


def _histogram(values: np.ndarray, edges: np.ndarray, same: dict[str, Any]) -> Rows:
    """Share of the values in each bin, of all finite ones, with a row at both ends so that the outline closes."""
    known = values[np.isfinite(values)]
    shares = np.histogram(known, edges)[0] / max(1, len(known))
    return [same | {"start": float(edge), "share": float(share)} for edge, share in zip(edges, [*shares, 0.0], strict=True)]


def _best(activations: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Smallest error of each activation; NaN where all its draws failed."""
    _, place = np.unique(activations, return_inverse=True)
    best = np.full(place.max() + 1, np.inf)
    np.fmin.at(best, place, errors)
    return np.where(np.isinf(best), np.nan, best)


def _tail_line(values: dict[str, Any]) -> list[str]:
    """How much of the error of all draws the worst 1 % of activations hold, over the cells."""
    if "activation" not in values:
        return []
    shares = []
    for _, inside in _by_label(values["label"]):
        errors, known = values["error"][inside], np.isfinite(values["error"][inside])
        _, place = np.unique(values["activation"][inside][known], return_inverse=True)
        mean = np.sort(np.bincount(place, weights=errors[known]) / np.bincount(place)) if known.any() else np.ones(1)
        worst = max(1, round(0.01 * len(mean)))
        shares.append({"share": mean[-worst:].sum() / mean.sum() if mean.sum() else 0.0})
    return [f"The worst 1 % of activations hold {value_of(shares, 'share', '{:.1%}')} of the error (mean over draws)."]


def _bounded(rows: Rows) -> tuple[Rows, str]:
    """At most so many groups, those with the lowest and the highest FVE, and what was left out."""
    mean: dict[str, list[float]] = {}
    for r in rows:
        mean.setdefault(r["part"], []).append(r["fve"])
    if len(mean) <= MOST_PARTS:
        return rows, ""
    ranked = sorted(mean, key=lambda part: sum(mean[part]) / len(mean[part]))
    kept = {*ranked[: MOST_PARTS // 2], *ranked[-MOST_PARTS // 2 :]}
    order = {part: i for i, part in enumerate(ranked)}
    said = f"The {MOST_PARTS // 2} lowest and {MOST_PARTS // 2} highest of {len(mean):,} groups."
    return [r | {"place": order[r["part"]]} for r in rows if r["part"] in kept], said


# Marks


def _outlines(rows: Rows, colours: Colours | None, x_title: str, y_title: str) -> alt.LayerChart:
    labels = labels_of(rows)
    colouring = colour(labels, colours)
    x = alt.X("start:Q", title=x_title, scale=alt.Scale(zero=False, nice=False), axis=alt.Axis(grid=False, tickCount=7))
    y = alt.Y("share:Q", title=y_title, axis=alt.Axis(format="%", tickCount=5, minExtent=44))
    layers = []
    for what in dict.fromkeys(r.get("what") for r in rows):
        base = alt.Chart(data([r for r in rows if r.get("what") == what])).encode(x, y, colouring)
        dashes = alt.StrokeDashValue([4, 3]) if what == "best draw" else dash(labels, colours)
        if what != "best draw" and len(labels) <= 4:
            y_plain = alt.Y("share:Q", title=y_title, stack=None)
            layers.append(base.mark_area(interpolate="step-after", opacity=0.12).encode(y=y_plain))
        layers.append(base.mark_line(interpolate="step-after", strokeWidth=1.6).encode(strokeDash=dashes))
    return alt.layer(*layers).properties(width=WIDTH, height=HEIGHT)


def _dots(rows: Rows, breakdown: str, colours: Colours | None) -> alt.LayerChart:
    labels = labels_of(rows)
    parts = sorted(dict.fromkeys(r["part"] for r in rows), key=lambda p: min(r["place"] or 0 for r in rows if r["part"] == p))
    sizes = {p: max(r["num_activations"] or 0 for r in rows if r["part"] == p) for p in parts}
    named = {p: f"{p}  (N = {sizes[p]:,})" if sizes[p] else p for p in parts}
    base = alt.Chart(data([r | {"named": named[r["part"]]} for r in rows]))
    colouring = colour(labels, colours, symbolType="circle", symbolStrokeWidth=0, symbolSize=70)
    y = alt.Y("named:N", sort=list(named.values()), title=BREAKDOWNS.get(breakdown, breakdown), axis=alt.Axis(grid=True))
    offset = alt.YOffset("label:N", sort=labels, scale=alt.Scale(paddingOuter=0.5))
    x = alt.X("fve:Q", title=FVE, scale=alt.Scale(zero=False, padding=8))
    tooltip = [alt.Tooltip(n) for n in ("label:N", "part:N", "num_activations:Q")] + [alt.Tooltip("fve:Q", format=".4f")]
    bars = base.mark_rule(strokeWidth=1.6).encode(alt.X("fve_low:Q", title=FVE), alt.X2("fve_high"), y, offset, colouring)
    dots = base.mark_point(filled=True, size=52, opacity=1).encode(x, y, offset, colouring, tooltip=tooltip)
    step = alt.Step(max(20, 9 * len(labels)), **{"for": "position"})
    return alt.layer(bars, dots).properties(width=WIDTH, height=step)
