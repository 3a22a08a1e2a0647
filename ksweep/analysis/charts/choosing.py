"""Chart of best-of-K chosen by one score and reported in another, beside the oracle's curve."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import altair as alt

from ksweep.analysis.charts.curves import k_scale
from ksweep.analysis.charts.style import (
    FVE,
    HEIGHT,
    NAMED,
    WIDTH,
    Colours,
    Rows,
    colour,
    data,
    facts,
    finished,
    labels_of,
    query_table,
    refuse_ties,
    rows_of,
    value_of,
)
from ksweep.utils.errors import RequestError

CHOSEN_QUERY = f"""
    SELECT n.label, c.* EXCLUDE (label) FROM chosen_curves AS c JOIN {NAMED} AS n USING (run_id) ORDER BY n.place, c.k
"""
ORACLE = "oracle: the reported score chooses"
_USED = (
    "label", "chosen_by", "reported", "k", "measure", "value", "value_low", "value_high", "oracle", "oracle_low", "oracle_high",
    "level", "num_activations", "num_documents", "effective_documents", "baseline", "baseline_kind",
)  # fmt: skip


def chosen(
    source: Any,
    *,
    by: str | None = None,
    report: str | None = None,
    sweep: str | None = None,
    colours: Colours | None = None,
    title: str | None = None,
) -> alt.TopLevelMixin:
    """Chart what the chosen draws are worth against K: a solid line and a band per label; the oracle's curve is dashed.

    Args:
        source: connection, or a table with the columns of `chosen_curves`.
        by: the choosing score to show, where the source has several.
        report: the reported score to show, where the source has several.
        sweep: with a connection, the sweep to show.
        colours: see `palette`.
        title: above the chart.

    Raises:
        RequestError: the source has curves of several choosing or reported scores, or none.
    """
    rows = rows_of(query_table(source, CHOSEN_QUERY, sweep), ("label", "chosen_by", "reported", "k", "value"), _USED)
    rows = [r for r in rows if by in (None, r["chosen_by"]) and report in (None, r["reported"])]
    by, report = (_only(name, (r[name] for r in rows)) for name in ("chosen_by", "reported"))
    refuse_ties(rows, "label", "k")
    lines = [r | {"curve": f"chosen by {by}", "low": r["value_low"], "high": r["value_high"]} for r in rows]
    best = [
        r | {"curve": ORACLE, "value": r["oracle"], "low": r["oracle_low"], "high": r["oracle_high"]}
        for r in rows
        if r["oracle"] is not None
    ]
    is_fve = rows[0]["measure"] == "fve"
    value = FVE if is_fve else f"mean {report} of the chosen draw"
    chart = _layers([*lines, *best], [f"chosen by {by}", ORACLE], value, colours).properties(width=WIDTH, height=HEIGHT)
    level = value_of(rows, "level", "{:.0%}") or "95%"
    about = ["Dashed: the oracle, where the reported score itself chooses.", f"{level} intervals: bootstrap over documents."]
    heading = title or f"{'FVE' if is_fve else report} of the best of K, chosen by {by}"
    if is_fve and report != "error":
        heading += f", reported by {report}"
    return finished(chart, heading, [*about, *facts(rows)])


def _only(name: str, values: Iterable[str]) -> str:
    names = list(dict.fromkeys(values))
    if len(names) != 1:
        has = f"curves of several scores ({', '.join(names)})" if names else "no such curve"
        raise RequestError(f"the table has {has}: pass the rows of one {name}, or name it (by=, report=)")
    return names[0]


def _layers(rows: Rows, curves: list[str], value: str, colours: Colours | None) -> alt.LayerChart:
    """Return bands and lines; the dash says which curve it is, the colour which cell."""
    x, colouring = k_scale(rows), colour(labels_of(rows), colours)
    scale = alt.Scale(domain=curves, range=[[1, 0], [5, 3]])
    legend = alt.Legend(
        title=None, orient="right", symbolType="stroke", symbolStrokeWidth=2, symbolSize=250, symbolStrokeColor="#222222"
    )
    dashes = alt.StrokeDash("curve:N", sort=curves, scale=scale, legend=legend)
    y = alt.Y("value:Q", title=value, scale=alt.Scale(zero=False, nice=True, padding=6))
    base = alt.Chart(data(rows))
    detail = alt.Detail("curve:N")
    band = base.mark_area(opacity=0.14).encode(x, alt.Y("low:Q", title=value), alt.Y2("high"), colouring, detail)
    number = [alt.Tooltip(f"{name}:Q", format=".4f") for name in ("value", "low", "high")]
    tooltip = [alt.Tooltip("label:N"), alt.Tooltip("curve:N"), alt.Tooltip("k:Q", title="K"), *number]
    line = base.mark_line(strokeWidth=2).encode(x, y, colouring, dashes, tooltip=tooltip)
    points = base.mark_point(filled=True, size=26, opacity=1).encode(x, y, colouring, detail, tooltip=tooltip)
    return alt.layer(band, line, points)
