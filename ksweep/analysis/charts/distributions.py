"""Charts of distributions of errors and norms, and of FVE by group. NumPy counts the values: a chart gets a row per bin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import altair as alt
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ksweep.analysis.charts.style import (
    FVE,
    HEIGHT,
    NAMED,
    WIDTH,
    Colours,
    Rows,
    colour,
    dash,
    data,
    finished,
    labels_of,
    natural,
    query_table,
    refuse_ties,
    rows_of,
    span,
    value_of,
)
from ksweep.utils.cell_names import distinct_names
from ksweep.utils.errors import RequestError

ERROR = "Error (mean squared difference per dimension)"
MOST_BINS, FEWEST_BINS = 60, 12
TAIL = 0.005
"""Fraction of values at each end that may be outliers and are then left out, since they would compress the rest of the axis."""
MOST_PARTS = 30

ERRORS_QUERY = f"""
    SELECT n.label, d.activation, d.error
    FROM draws AS d JOIN v_latest AS c ON d.draws_key = c.draws_key AND d.scores_key IS NOT DISTINCT FROM c.scores_key
    JOIN {NAMED} AS n ON n.run_id = c.run_id
    WHERE d.activation < c.num_activations AND d.draw < c.num_draws
"""
NORMS_QUERY = f"""
    WITH one AS (
        SELECT arg_max(c.run_id, num_activations) AS run_id, any_value(parse_filename(coalesce(model, vectors))) AS model, layer,
               activations_key
        FROM v_latest AS c JOIN {NAMED} AS n ON n.run_id = c.run_id GROUP BY activations_key, layer
    ), called AS (
        SELECT run_id, concat(model, ' layer ', layer, CASE WHEN count(*) OVER (PARTITION BY model, layer) > 1
                              THEN concat(' @', left(activations_key, 8)) END) AS label
        FROM one
    )
    SELECT called.label, a.norm FROM activations AS a JOIN called USING (run_id)
"""
GROUPS_QUERY = f"""
    SELECT n.label, m.* EXCLUDE (label) FROM metrics AS m JOIN {NAMED} AS n USING (run_id)
    WHERE breakdown <> 'all' ORDER BY n.place, m.place
"""
HELD_AGAINST = {
    "own": "own (that of the activations of the group alone)",
    "overall": "overall (that of all activations)",
    None: "the group's distances from the mean of all activations (run of an earlier version)",
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
    """Chart the distribution of errors of all draws and, where the table names their activations, of the best draws below.

    Table: a row per draw with `label, error` (null where the draw failed) and `activation`.
    """
    values = _columns(query_table(source, ERRORS_QUERY, sweep), ("label", "error"))
    edges = _edges(values["error"], _fewest(values))
    panels: dict[str, Rows] = {}
    for label, inside in sorted(_by_label(values["label"]), key=lambda found: natural(found[0])):
        errors, same = values["error"][inside], {"label": label}
        panels.setdefault("Share of draws", []).extend(_histogram(errors, edges, same))
        if "activation" in values:
            best = _best(values["activation"][inside], errors)
            panels.setdefault("Share of best draws", []).extend(_histogram(best, edges, same))
    failed, total = int(np.isnan(values["error"]).sum()), len(values["error"])
    failures = f"{total:,} draws, {failed / total:.2%} of them failed and without an error"
    lines = [f"{failures}{_beyond(values['error'], edges)}."]
    lines += ["Below: the best draw of each activation."] if "activation" in values else []
    lines += _tail_line(values)
    height = HEIGHT if len(panels) == 1 else 170
    charts = [
        _outlines(rows, colours, ERROR if i == len(panels) - 1 else None, name, height)
        for i, (name, rows) in enumerate(panels.items())
    ]
    chart = charts[0] if len(charts) == 1 else alt.vconcat(*charts, spacing=10).resolve_scale(x="shared")
    return finished(chart, title or "Errors of draws", lines)


def norm_distribution(
    source: Any, *, sweep: str | None = None, colours: Colours | None = None, title: str | None = None
) -> alt.TopLevelMixin:
    """Chart the norms of activations; with a connection, each set of activations once. Table: `label, norm`, a row each."""
    values = _columns(query_table(source, NORMS_QUERY, sweep), ("label", "norm"))
    edges = _edges(values["norm"], _fewest(values))
    rows: Rows = []
    for label, inside in _by_label(values["label"]):
        rows += _histogram(values["norm"][inside], edges, {"label": label})
    rows.sort(key=lambda r: natural(r["label"]))
    low, middle, high = np.nanquantile(values["norm"], [0.01, 0.5, 0.99])
    line = (
        f"{len(values['norm']):,} activations; median {middle:.4g}, 1 % below {low:.4g}, 1 % above {high:.4g}, "
        f"longest {np.nanmax(values['norm']):.4g}{_beyond(values['norm'], edges)}."
    )
    chart = _outlines(rows, colours, "Length of the activation (L2 norm)", "Share of activations", HEIGHT)
    return finished(chart, title or "Lengths of activations", [line])


def by_group(
    source: Any,
    *,
    breakdown: str | None = None,
    k: int | None = None,
    against: Literal["own", "overall"] = "own",
    sweep: str | None = None,
    colours: Colours | None = None,
    title: str | None = None,
) -> alt.TopLevelMixin:
    """Chart FVE within groups of activations: a dot with its interval for each group and cell.

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
    rows = rows_of(
        query_table(source, GROUPS_QUERY, sweep), needed, (*needed, "place", "against", "level", "num_activations", "baseline")
    )
    rows = [r for r in rows if breakdown in (None, r["breakdown"]) and r["fve"] is not None]
    rows = [r for r in rows if r["against"] in (None, against)]
    refuse_ties(rows, "label", "breakdown", "part", "k")
    common = set.intersection(*({r["k"] for r in rows if r["label"] == label} for label in labels_of(rows))) if rows else set()
    chosen = k if k is not None else max(common, default=None)
    rows = [r for r in rows if r["k"] == chosen]
    if not rows:
        raise RequestError(f"no group of the table has breakdown={breakdown}, K = {chosen}, against={against}")
    left_out, panels = "", []
    names = list(dict.fromkeys(str(r["breakdown"]) for r in rows))
    domain = span(r[name] for r in rows for name in ("fve", "fve_low", "fve_high"))
    for name in names:
        inside, note = _bounded([r for r in rows if r["breakdown"] == name])
        left_out = note or left_out
        panels.append(_dots(inside, name, colours, domain, last=name == names[-1]))
    has_interval = any(r["fve_low"] is not None for r in rows)
    interval = f"{value_of(rows, 'level', '{:.0%}') or '95%'} intervals over documents." if has_interval else ""
    lines = [f"Best of K = {chosen} draws, oracle selection by the AR. {interval}".strip()]
    lines += [f"Baseline: {HELD_AGAINST[rows[0]['against']]}.", *([left_out] if left_out else [])]
    chart = panels[0] if len(panels) == 1 else alt.vconcat(*panels, spacing=16)
    named = f", {rows[0]['against']} baseline" if rows[0]["against"] else ""
    return finished(chart, title or f"FVE by group of activations{named}", lines)


# Counting


def _columns(table: Any, needed: Sequence[str]) -> dict[str, np.ndarray]:
    """Return columns as arrays, with NaN for null; labels and activations as they are."""
    if not isinstance(table, pa.Table):
        table = pa.Table.from_pylist(list(table))
    if not table.num_rows:
        raise RequestError("there is nothing to draw: the table has no rows; has a cell of this sweep finished?")
    if missing := [name for name in needed if name not in table.column_names]:
        raise RequestError(f"the table lacks {', '.join(missing)}; the chart takes {', '.join(needed)}, a row for each")
    names = [name for name in (*needed, "activation") if name in table.column_names]
    table = _named(table.select([name for name in table.column_names if name in {*names, *CELL_COLUMNS, "draw"}]))
    return {
        name: table[name].combine_chunks().dictionary_encode() if name == "label" else _numbers(table[name]) for name in names
    }


CELL_COLUMNS = ("label", "sweep", "cell", "run_id")
"""Columns that identify the cell and run of a row."""


def _named(table: pa.Table) -> pa.Table:
    """Return the table with a unique label for each of its cells, as far as its columns identify cell and run.

    Raises:
        RequestError: a draw occurs twice under one label.
    """
    columns = [name for name in CELL_COLUMNS if name in table.column_names]
    cells = table.select(columns).group_by(columns).aggregate([]).to_pylist()
    if len({cell["label"] for cell in cells}) < len(cells):
        # A join would not match what is null, such as the sweep of imported rows.
        names = dict(zip((tuple(cell.values()) for cell in cells), distinct_names(cells), strict=True))
        keys = zip(*(table[name].to_pylist() for name in columns), strict=True)
        labels = pa.array([names[key] for key in keys], pa.string())
        table = table.set_column(table.column_names.index("label"), "label", labels)
    draws = [name for name in ("label", "activation", "draw") if name in table.column_names]
    if len(draws) == 3 and len(again := table.group_by(draws).aggregate([([], "count_all")]).filter(pc.field("count_all") > 1)):
        refuse_ties([row for row in again.slice(0, 1).to_pylist() for _ in range(2)], *draws)
    return table


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(column.to_numpy(), dtype=np.float64)


def _by_label(labels: Any) -> Iterator[tuple[str, np.ndarray]]:
    codes = labels.indices.to_numpy()
    for code, name in enumerate(labels.dictionary.to_pylist()):
        yield name, codes == code


def _fewest(values: dict[str, Any]) -> int:
    """Return the number of values in the smallest distribution."""
    parts = [inside for _, inside in _by_label(values["label"])]
    return min(len(np.unique(values["activation"][p])) if "activation" in values else int(p.sum()) for p in parts)


def _edges(values: np.ndarray, fewest: int) -> np.ndarray:
    """Return edges of bins, more bins for more values (Rice's rule); outliers are left out, and the subtitle says how many."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        raise RequestError("every value is missing: there is no distribution to draw")
    first, last = np.quantile(finite, [TAIL, 1 - TAIL])
    margin = 0.5 * (last - first)
    low, high = finite[finite >= first - margin].min(), finite[finite <= last + margin].max()
    num_bins = int(np.clip(2 * fewest ** (1 / 3), FEWEST_BINS, MOST_BINS))
    return np.linspace(low, high if high > low else low + 1e-6 + abs(low) * 1e-3, num_bins + 1)


def _beyond(values: np.ndarray, edges: np.ndarray) -> str:
    """Return the fraction of values beyond the axis as text."""
    finite = values[np.isfinite(values)]
    share = float(((finite < edges[0]) | (finite > edges[-1])).mean())
    return f"; {share:.2%} lie beyond the axis" if share else ""


def _histogram(values: np.ndarray, edges: np.ndarray, same: dict[str, Any]) -> Rows:
    """Return the fraction of finite values in each bin, with a row at both ends so that the outline closes."""
    finite = values[np.isfinite(values)]
    shares = np.histogram(finite, edges)[0] / max(1, len(finite))
    return [same | {"start": float(edge), "share": float(share)} for edge, share in zip(edges, [*shares, 0.0], strict=True)]


def _best(activations: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Return the smallest error of each activation; NaN where all its draws failed."""
    _, row = np.unique(activations, return_inverse=True)
    best = np.full(row.max() + 1, np.inf)
    np.fmin.at(best, row, errors)
    return np.where(np.isinf(best), np.nan, best)


def _tail_line(values: dict[str, Any]) -> list[str]:
    """Return a line on the fraction of the error that the worst 1 % of activations hold."""
    if "activation" not in values:
        return []
    shares = []
    for _, inside in _by_label(values["label"]):
        errors, finite = values["error"][inside], np.isfinite(values["error"][inside])
        _, row = np.unique(values["activation"][inside][finite], return_inverse=True)
        mean = np.sort(np.bincount(row, weights=errors[finite]) / np.bincount(row)) if finite.any() else np.ones(1)
        worst = max(1, round(0.01 * len(mean)))
        shares.append({"share": mean[-worst:].sum() / mean.sum() if mean.sum() else 0.0})
    return [f"The worst 1 % of activations hold {value_of(shares, 'share', '{:.1%}')} of the error (mean over draws)."]


def _bounded(rows: Rows) -> tuple[Rows, str]:
    """Return at most MOST_PARTS groups, those with the lowest and the highest FVE, and a sentence on those left out."""
    mean: dict[str, list[float]] = {}
    for r in rows:
        mean.setdefault(r["part"], []).append(r["fve"])
    if len(mean) <= MOST_PARTS:
        return rows, ""
    ranked = sorted(mean, key=lambda part: sum(mean[part]) / len(mean[part]))
    kept = {*ranked[: MOST_PARTS // 2], *ranked[-MOST_PARTS // 2 :]}
    order = {part: i for i, part in enumerate(ranked)}
    note = f"The {MOST_PARTS // 2} lowest and {MOST_PARTS // 2} highest of {len(mean):,} groups."
    return [r | {"place": order[r["part"]]} for r in rows if r["part"] in kept], note


# Marks


def _outlines(rows: Rows, colours: Colours | None, x_title: str | None, y_title: str, height: int) -> alt.LayerChart:
    labels = labels_of(rows)
    shape = alt.Axis(grid=False, tickCount=7, labels=x_title is not None)
    x = alt.X("start:Q", title=x_title, scale=alt.Scale(zero=False, nice=False), axis=shape)
    y = alt.Y("share:Q", title=y_title, stack=None, axis=alt.Axis(format="%", tickCount=5, minExtent=44))
    base = alt.Chart(data(rows)).encode(x, y, colour(labels, colours))
    lines = base.mark_line(interpolate="step-after", strokeWidth=1.8).encode(strokeDash=dash(labels, colours))
    areas = [base.mark_area(interpolate="step-after", opacity=0.12)] if len(labels) <= 4 else []
    return alt.layer(*areas, lines).properties(width=WIDTH, height=height)


def _dots(rows: Rows, breakdown: str, colours: Colours | None, domain: tuple[float, float], *, last: bool) -> alt.LayerChart:
    labels = labels_of(rows)
    order = {r["part"]: (r["place"] if r["place"] is not None else 0) for r in rows}
    sizes = {p: max(r["num_activations"] or 0 for r in rows if r["part"] == p) for p in order}
    named = {p: f"{p}  (N = {sizes[p]:,})" if sizes[p] else p for p in sorted(order, key=lambda p: (order[p], natural(p)))}
    base = alt.Chart(data([r | {"named": named[r["part"]]} for r in rows]))
    hues = colour(labels, colours, symbolType="circle", symbolStrokeWidth=0, symbolSize=70)
    y = alt.Y("named:N", sort=list(named.values()), title=None, axis=alt.Axis(grid=True, minExtent=120))
    offset = alt.YOffset("label:N", sort=labels, scale=alt.Scale(paddingOuter=0.5))
    axis = alt.Axis(tickCount=6, labels=last, ticks=last)
    x_title = FVE if last else None
    x = alt.X("fve:Q", title=x_title, scale=alt.Scale(domain=domain, zero=False, nice=6), axis=axis)
    tooltip = [alt.Tooltip(n) for n in ("label:N", "part:N", "num_activations:Q")] + [alt.Tooltip("fve:Q", format=".4f")]
    bars = base.mark_rule(strokeWidth=1.6).encode(alt.X("fve_low:Q", title=x_title), alt.X2("fve_high"), y, offset, hues)
    dots = base.mark_point(filled=True, size=52, opacity=1).encode(x, y, offset, hues, tooltip=tooltip)
    step = alt.Step(max(20, 9 * len(labels)), **{"for": "position"})
    words = {"fontSize": 12.5, "fontWeight": "normal"}
    heading = alt.TitleParams(BREAKDOWNS.get(breakdown, breakdown), anchor="start", frame="group", offset=4, **words)
    return alt.layer(bars, dots).properties(width=WIDTH, height=step, title=heading)
