"""Charts of the speed of runs and of the progress of a sweep."""

from __future__ import annotations

from typing import Any

import altair as alt

from ksweep.analysis.charts.style import (
    INK,
    NAMED,
    WIDTH,
    Colours,
    Rows,
    colour,
    data,
    finished,
    labels_of,
    natural,
    query_table,
    refuse_ties,
    rows_of,
)
from ksweep.utils.errors import RequestError

SPEEDS_QUERY = f"""
    SELECT n.label, r.cell, tokens_per_second, num_ranks, device, finished FROM runs AS r JOIN {NAMED} AS n USING (cell_key)
    WHERE status = 'finished' AND tokens_per_second IS NOT NULL
    QUALIFY row_number() OVER (PARTITION BY cell_key ORDER BY finished DESC) <= 20 ORDER BY finished DESC
"""
PROGRESS_QUERY = f"""
    WITH newest AS (
        SELECT r.*, n.label AS name,
               coalesce((spec->>'$.activations.num_activations')::BIGINT, num_activations) AS wanted_activations,
               CASE WHEN temperature = 0 THEN 1 ELSE (spec->>'$.sampling.num_draws')::BIGINT END AS wanted_draws
        FROM runs AS r JOIN {NAMED} AS n USING (cell_key) WHERE draws_key IS NOT NULL
        QUALIFY row_number() OVER (PARTITION BY cell_key ORDER BY finished DESC, r.run_id DESC) = 1
    )
    SELECT n.name AS label, n.cell, n.status AS state, wanted_activations * wanted_draws AS total,
           (SELECT count(*) FROM texts AS d
            WHERE d.draws_key = n.draws_key AND d.activation < wanted_activations AND d.draw < wanted_draws) AS done
    FROM newest AS n ORDER BY n.finished
"""
STATE_COLOURS = {"finished": "#009E73", "running": "#0072B2", "waiting": "#CCCCCC", "stopped": "#E69F00", "failed": "#D55E00"}
SPEED = "Tokens sampled per second, all ranks together"
MOST_LABELS = 40


def throughput(
    source: Any, *, sweep: str | None = None, colours: Colours | None = None, title: str | None = None
) -> alt.TopLevelMixin:
    """Chart tokens sampled per second: a dot per run, a row per cell; from a connection the last 20 runs of each.

    Table: `label, tokens_per_second` and, where known, `num_ranks, device`.
    """
    used = ("label", "tokens_per_second", "num_ranks", "device")
    rows = [
        r
        for r in rows_of(query_table(source, SPEEDS_QUERY, sweep), used[:2], used, runs=False)
        if r["tokens_per_second"] is not None
    ]
    if not rows:
        raise RequestError("no run of the table sampled anything: all draws were there already")
    labels = sorted(labels_of(rows)[:MOST_LABELS], key=natural)
    left_out = len(labels_of(rows)) - len(labels)
    rows = [r for r in rows if r["label"] in labels][: 20 * MOST_LABELS]
    base = alt.Chart(data(rows))
    hues = colour(labels, colours)
    hues["legend"] = None
    y = alt.Y("label:N", sort=labels, title=None, axis=alt.Axis(grid=True))
    shape = alt.Axis(tickCount=6)
    x = alt.X("tokens_per_second:Q", title=SPEED, scale=alt.Scale(zero=True, nice=6), axis=shape)
    tooltip = [alt.Tooltip("label:N"), alt.Tooltip("tokens_per_second:Q", format=",.0f"), "device:N", "num_ranks:Q"]
    dots = base.mark_point(filled=True, size=60, opacity=0.8).encode(x, y, hues, tooltip=tooltip)
    devices = sorted({f"{r['num_ranks'] or 1} x {r['device']}" for r in rows if r["device"]})
    lines = [
        f"{len(rows):,} runs" + (f" on {', '.join(devices[:3])}{' and others' if len(devices) > 3 else ''}." if devices else ".")
    ]
    lines += [f"{left_out} cells of earlier runs are left out."] if left_out else []
    return finished(dots.properties(width=WIDTH, height=alt.Step(24)), title or "Speed of sampling", lines)


def progress(source: Any, *, sweep: str | None = None, title: str | None = None) -> alt.TopLevelMixin:
    """Chart the draws of each cell that exist, of those requested, coloured by the state of its newest run.

    A connection has the cells with a recorded run. Table: `label, done, total, state` (finished, running, waiting, stopped,
    failed).
    """
    used = ("label", "done", "total", "state")
    rows = [r for r in rows_of(query_table(source, PROGRESS_QUERY, sweep), used, used) if r["total"]]
    refuse_ties(rows, "label")
    if not rows:
        raise RequestError("no cell of the table says how many draws were requested: there is no progress to show")
    shown = _unfinished_first(rows)
    all_done, all_wanted = sum(min(r["done"], r["total"]) for r in rows), sum(r["total"] for r in rows)
    bars: Rows = [
        r | {"share": min(1.0, r["done"] / r["total"]), "whole": 1, "text": f"{r['done']:,} / {r['total']:,}"} for r in shown
    ]
    base = alt.Chart(data(bars))
    y = alt.Y(
        "label:N",
        sort=[r["label"] for r in shown],
        title=None,
        axis=alt.Axis(grid=False, ticks=False, domain=False, labelPadding=8),
    )
    there = "Draws that are there, of those wanted"
    shape = alt.Axis(format="%", grid=False, tickCount=5)
    x = alt.X("share:Q", title=there, scale=alt.Scale(domain=[0, 1]), axis=shape)
    states = [s for s in STATE_COLOURS if any(r["state"] == s for r in shown)]
    scale = alt.Scale(domain=states, range=[STATE_COLOURS[s] for s in states])
    hues = alt.Color("state:N", scale=scale, legend=alt.Legend(title=None, orient="top", symbolType="square", offset=4))
    behind = base.mark_bar(color="#EEEEEE", height=14).encode(alt.X("whole:Q", title=there), y)
    front = base.mark_bar(height=14).encode(x, y, hues)
    words = base.mark_text(align="left", dx=6, fontSize=11, color=INK).encode(alt.XDatum(1), y, alt.Text("text:N"))
    lines = [f"{all_done:,} of {all_wanted:,} draws ({all_done / all_wanted:.1%}), {len(rows)} cells."]
    lines += [f"{len(rows) - len(shown)} further cells are counted but not drawn."] if len(rows) > len(shown) else []
    chart = alt.layer(behind, front, words).properties(width=WIDTH, height=alt.Step(24))
    return finished(chart, title or "Progress", lines)


def _unfinished_first(rows: Rows) -> Rows:
    """Return at most MOST_LABELS cells, unfinished ones first."""
    ranked = sorted(rows, key=lambda r: (r["state"] == "finished", natural(r["label"])))
    return sorted(ranked[:MOST_LABELS], key=lambda r: natural(r["label"]))
