"""Charts of FVE by K, by temperature and by training step, and of differences between cells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import altair as alt

from ksweep.analysis.charts.style import (
    CONTROL_HEIGHT,
    FVE,
    GREY,
    HEIGHT,
    NAMED,
    WIDTH,
    Colours,
    K,
    Rows,
    colour,
    dash,
    data,
    facts,
    finished,
    labels_of,
    natural,
    ordinal_colour,
    palette,
    query_table,
    refuse_ties,
    rows_of,
    span,
    step_in,
    value_of,
    without_step,
    without_temperature,
)
from ksweep.stats.interval_text import interval_text
from ksweep.utils.errors import RequestError

CURVES_QUERY = f"""
    SELECT n.label, c.* EXCLUDE (label), r.mean_tokens * c.k AS tokens
    FROM curves AS c JOIN {NAMED} AS n USING (run_id) JOIN runs AS r USING (run_id) ORDER BY n.place, c.k
"""
COMPARISONS_QUERY = f"""
    SELECT n.label, o.label AS other_label, c.* EXCLUDE (label, other_label)
    FROM v_compare AS c JOIN {NAMED} AS n USING (run_id) JOIN {NAMED} AS o ON o.run_id = c.other_run_id
    ORDER BY n.place, o.place, c.k
"""
TOKENS = "Tokens sampled per activation (mean length of a draw times K)"
LIGHT = 0.4
"""Opacity of what lies beyond K = N/2."""
DODGE = 7
"""Pixels between the error bars of neighbouring K at one temperature or step."""


def fve_by_k(
    source: Any,
    *,
    sweep: str | None = None,
    axis: Literal["k", "tokens"] = "k",
    colours: Colours | None = None,
    title: str | None = None,
) -> alt.TopLevelMixin:
    """Chart FVE against K on a log axis: a line and an interval band per label; the shuffled control is dashed.

    A control far from the curves gets a panel of its own below, so that it does not flatten them. Beyond K = N/2 curves are
    lighter; a second, paler band is drawn where the table has a simultaneous band (`compare.curves_of_cells`).

    Args:
        source: connection, relation or table.
        sweep: with a connection, the sweep to show; None shows all cells.
        axis: "tokens" compares cells at equal cost; the table needs a column of that name.
        colours: see `palette`.
        title: above the chart.
    """
    rows = rows_of(query_table(source, CURVES_QUERY, sweep), ("label", "k", "fve", *([axis] if axis != "k" else [])), _USED)
    refuse_ties(rows, "label", "k")
    rows = [r | {"interval": interval_text(r)} for r in rows]
    shuffled = [r for r in rows if r.get("shuffled_fve") is not None]
    colouring = colour(labels_of(rows), colours)
    near = not shuffled or _near(rows)
    top = _x(rows, axis, titled=near)
    main = _curves(rows, colouring, top, controls=shuffled if near else [], value=_value_title(rows), colours=colours)
    main = main.properties(width=WIDTH, height=HEIGHT)
    if not near:
        below = _control_lines(shuffled, _x(rows, axis, titled=True), title="shuffled FVE")
        main = alt.vconcat(main, below.properties(width=WIDTH, height=CONTROL_HEIGHT), spacing=14)
    note = "Grey: best of K draws of another activation (control)." if shuffled else None
    by = "tokens sampled" if axis == "tokens" else "number of draws"
    return finished(main, title or f"{_value_name(rows)} by {by}", _subtitle(rows, note))


def fve_by_temperature(
    source: Any, ks: Sequence[int] | None = None, *, sweep: str | None = None, title: str | None = None
) -> alt.TopLevelMixin:
    """Chart FVE against sampling temperature: a line with error bars per K; panels where cells differ in other settings too.

    Args:
        source: connection, relation or table.
        ks: values of K to draw; None takes 1, 4, 16, ... up to the largest that every temperature has.
        sweep: with a connection, the sweep to show.
        title: above the chart.
    """
    table = rows_of(query_table(source, CURVES_QUERY, sweep), ("label", "k", "fve", "temperature"), _USED)
    rows = [r | {"group": without_temperature(r["label"])} for r in table]
    chosen = sorted(set(ks)) if ks is not None else _powers_of_four([r for r in rows if r["temperature"] is not None])
    return _by_setting(rows, "temperature", chosen, "Sampling temperature", title or "FVE by sampling temperature")


def fve_by_step(
    source: Any, ks: Sequence[int] | None = None, *, sweep: str | None = None, title: str | None = None
) -> alt.TopLevelMixin:
    """Chart FVE against the training step of the checkpoints: a training curve with error bars per K; panels as for temperatures.

    Args:
        source: connection, relation or table.
        ks: values of K to draw; None takes 1 and the largest that every step has.
        sweep: with a connection, the sweep to show.
        title: above the chart.
    """
    table = rows_of(query_table(source, CURVES_QUERY, sweep), ("label", "k", "fve", "step"), _USED)
    # A cell that another sweep computed has the label of this one, which says the step that varies here.
    rows = [r | {"step": step_in(r["label"], r["step"]), "group": without_step(r["label"])} for r in table]
    chosen = sorted(set(ks)) if ks is not None else _ends(_common_ks(rows, "step"))
    return _by_setting(rows, "step", chosen, "Training step of the checkpoints", title or "FVE by training step")


def _by_setting(rows: Rows, setting: str, ks: Sequence[int], axis: str, heading: str) -> alt.TopLevelMixin:
    """Chart FVE against a numeric column: a line with error bars per K, and a panel per group of rows."""
    # Error bars are of single K here, so the band over all K is dropped, and with it its line in the subtitle.
    nothing = {"band_low": None, "band_high": None}
    rows = [{**r, **nothing, "few": _few(r)} for r in rows if r[setting] is not None and r["k"] in ks]
    rows = [r | {"interval": interval_text(r)} for r in rows]
    if not rows:
        raise RequestError(f"no row of the table has a {setting} and one of K = {list(ks)}; name others with ks=")
    _check_one_cell_per_point(rows, setting)
    groups = list(dict.fromkeys(r["group"] for r in rows))
    colouring = ordinal_colour("k", "K", sorted({r["k"] for r in rows}))
    width = WIDTH if len(groups) == 1 else WIDTH * 0.6
    chart = _setting_lines(rows, setting, axis, colouring).properties(width=width, height=HEIGHT)
    if len(groups) > 1:
        columns = next(c for c in (3, 2, 1) if len(groups) % c == 0)  # an empty place would show axes of nothing
        chart = chart.facet(facet=alt.Facet("group:N", title=None, sort=groups), columns=columns, data=data(rows))
    else:
        chart = chart.properties(data=data(rows))
    return finished(chart, heading, _subtitle(rows, None))


def compare(
    source: Any,
    *,
    reference: str | None = None,
    sweep: str | None = None,
    colours: Colours | None = None,
    title: str | None = None,
) -> alt.TopLevelMixin:
    """Chart paired differences in FVE against K, with pointwise intervals, and a paler simultaneous band where the table has one.

    Args:
        source: connection, relation or table with the columns of `v_compare` or of `compare.compare`.
        reference: label that is subtracted; None takes the table's own where it has one, else the first by name of those with the
            most K (greedy has one).
        sweep: with a connection, the sweep to show.
        colours: see `palette`; a cell has the colour it has elsewhere.
        title: above the chart.
    """
    needed = ("label", "other_label", "k", "difference", "difference_low", "difference_high")
    rows = rows_of(query_table(source, COMPARISONS_QUERY, sweep), needed, _COMPARED, sides=("", "other_"))
    table = [r for r in rows if r["k"] is not None]
    names = sorted({r[name] for r in table for name in ("label", "other_label")}, key=natural)
    base = _reference(table, names) if reference is None else reference
    if base not in names:
        raise RequestError(f"no cell is called {base!r}; the reference is one of {', '.join(names)}")
    rows = [r for r in table if base in (r["label"], r["other_label"])]
    mirrored = {(r["label"], r["other_label"], r["k"]) for r in rows}
    # v_compare has every pair in both orders: one of the two is turned round.
    rows = [r for r in rows if r["other_label"] == base or (r["other_label"], base, r["k"]) not in mirrored]
    rows = [_turned(r, base) for r in rows]
    refuse_ties(rows, "label", "k")
    rows.sort(key=lambda r: (natural(r["label"]), r["k"]))
    left_out = [name for name in names if name not in {base, *labels_of(rows)}]
    colours = colours or palette(names)  # with the reference among them, as in the charts that show it
    chart = _curves(
        rows, colour(labels_of(rows), colours), _x(rows, "k", titled=True), [], "Difference in FVE", colours, zero=True
    )
    interval = value_of(rows, "level", "{:.0%}") or "95%"
    lines = [f"Paired over the same activations; {interval} intervals over documents, for each K by itself.", *_about_lines(rows)]
    lines += [f"The table has no difference from {base} for {', '.join(left_out)}."] if left_out else []
    heading = title or (f"{rows[0]['label']} less {base}" if len(labels_of(rows)) == 1 else f"FVE less that of {base}")
    return finished(chart.properties(width=WIDTH, height=HEIGHT), heading, [*lines, *facts(rows)])


def _reference(table: Rows, names: Sequence[str]) -> str:
    """Return the cell that every row is compared with; in a table of all pairs, the first by name of those with the most K."""
    others = {r["other_label"] for r in table}
    if len(others) == 1:
        return str(others.pop())
    num_ks = {name: len({r["k"] for r in table if name in (r["label"], r["other_label"])}) for name in names}
    return max(names, key=lambda name: num_ks[name])


def _turned(row: dict[str, Any], base: str) -> dict[str, Any]:
    """Return a difference as the other cell's FVE above that of `base`, with the column names of a curve."""
    names = ("difference", "difference_low", "difference_high", "band_low", "band_high")
    value, low, high, band_low, band_high = (row[name] for name in names)
    if row["label"] == base:
        value, low, high, band_low, band_high = (
            None if v is None else -v for v in (value, high, low, band_high, band_low)
        )  # fmt: skip
    label = row["other_label"] if row["label"] == base else row["label"]
    turned = row | {"label": label, "fve": value, "fve_low": low, "fve_high": high, "band_low": band_low, "band_high": band_high}
    return turned | {"interval": interval_text(turned)}


# Rows


_USED = (
    "label", "metric", "k", "fve", "fve_low", "fve_high", "level", "temperature", "step", "baseline", "baseline_kind",
    "num_activations", "num_documents", "effective_documents", "num_draws", "num_replicates", "shuffled_fve", "few_subsets",
    "band_low", "band_high", "tokens",
)  # fmt: skip
_COMPARED = (
    "label", "other_label", "k", "difference", "difference_low", "difference_high", "band_low", "band_high", "level",
    "num_replicates", "few_subsets", "num_activations", "num_documents", "effective_documents", "baseline", "baseline_kind",
)  # fmt: skip


def _powers_of_four(rows: Rows) -> list[int]:
    """Return the powers of four that every temperature has, and the largest K that all have; greedy has one draw."""
    common = _common_ks([r for r in rows if r["temperature"] > 0] or rows, "temperature")
    return sorted(k for k in common if (_is_power_of_two(k) and k.bit_length() % 2) or k == max(common))


def _common_ks(rows: Rows, setting: str) -> set[int]:
    """Return the K that every value of a column has."""
    of_value: dict[float, set[int]] = {}
    for r in rows:
        if r[setting] is not None:
            of_value.setdefault(r[setting], set()).add(r["k"])
    return set.intersection(*of_value.values()) if of_value else set()


def _ends(ks: set[int]) -> list[int]:
    return sorted({min(ks), max(ks)}) if ks else []


def _is_power_of_two(k: int) -> bool:
    return k & (k - 1) == 0


def _check_one_cell_per_point(rows: Rows, setting: str) -> None:
    """Raise RequestError where two cells of one panel share K and the value of a column.

    style.refuse_ties compares labels; these may differ in the value or key, which the name of a panel leaves out.
    """
    seen = set()
    for r in rows:
        point = (r["group"], r["k"], r[setting])
        if point in seen:
            raise RequestError(
                f"two cells named {r['group'] or r['label']!r} share {setting} {r[setting]:g}: a line through both would "
                "mean nothing. Give them labels that differ, or pass the rows of one of them."
            )
        seen.add(point)


# Scales and axes


def _k_axis(rows: Rows) -> list[int]:
    """Return the K axis with ticks at powers of two, and at the largest K unless its label would touch its neighbour's."""
    ks = sorted({r["k"] for r in rows})
    ticks = [2**i for i in range(ks[-1].bit_length()) if ks[0] <= 2**i <= ks[-1]]
    return ticks if ticks and ks[-1] / ticks[-1] < 1.4 else [*ticks, ks[-1]]


def k_scale(rows: Rows) -> alt.X:
    """Return the log axis of K."""
    return _x(rows, "k", titled=True)


def _x(rows: Rows, axis: str, *, titled: bool) -> alt.X:
    """Log axis of K or of tokens."""
    ticks = _k_axis(rows) if axis == "k" else _round_ticks(rows)
    low, high = (ticks[0], ticks[-1]) if axis == "k" else span(r["tokens"] for r in rows)
    margin = (high / low) ** 0.02 if high > low else 1.5
    scale = alt.Scale(type="log", base=2, domain=[low / margin, high * margin], nice=False)
    name = K if axis == "k" else TOKENS
    form = "d" if axis == "k" else ",d"
    shape = alt.Axis(values=ticks, format=form, labels=titled, ticks=titled, title=name if titled else None, grid=False)
    return alt.X(f"{axis}:Q", scale=scale, axis=shape)


def _round_ticks(rows: Rows) -> list[int]:
    """Return 1, 2, 5, 10, 20, 50, ... within the range of tokens; only powers of ten where these would be crowded."""
    low, high = span(r["tokens"] for r in rows)
    steps = (1, 2, 5) if high / low < 1000 else (1,)
    return [step * 10**power for power in range(12) for step in steps if low <= step * 10**power <= high] or [round(low)]


def _y(field: str, title: str, values: Sequence[float] = (), **axis: Any) -> alt.Y:
    """Return an axis that fits its data; `minExtent` keeps the titles of panels below each other in line."""
    scale = alt.Scale(zero=False, nice=True, padding=6)
    if len(set(values)) == 1:  # the default for a single value is a range of one, which says nothing
        scale = alt.Scale(domain=[values[0] - 0.05, values[0] + 0.05], nice=True)
    return alt.Y(f"{field}:Q", title=title, scale=scale, axis=alt.Axis(minExtent=44, **axis))


def _shown(rows: Rows) -> tuple[float, float]:
    """Return the range of values that curves and intervals span."""
    return span(r[name] for r in rows for name in ("fve", "fve_low", "fve_high"))


def _near(rows: Rows) -> bool:
    """Return whether the control fits into the panel without taking most of its height."""
    low, high = _shown(rows)
    all_low, all_high = span([low, high, *(r["shuffled_fve"] for r in rows)])
    return all_high - all_low <= 2 * (high - low)


# Layers


def _curves(
    rows: Rows, colour: alt.Color, x: alt.X, controls: Rows, value: str, colours: Colours | None, *, zero: bool = False
) -> alt.LayerChart:
    """Return lines with bands; `value` is the axis title, the same in every layer, as Vega would list all that differ."""
    y = _y("fve", value)
    layers: list[Any] = [_zero_line(value)] if zero or _crosses_zero(rows, controls) else []
    if controls:
        layers.append(_control_lines(controls, x, title=value, beside_curves=True))
    strength = 0.16 if len(labels_of(rows)) <= 5 else 0.08
    if any(r["band_low"] is not None for r in rows):
        band = alt.Chart(data(rows)).mark_area(opacity=strength / 2)
        layers.append(band.encode(x, alt.Y("band_low:Q", title=value), alt.Y2("band_high"), colour))
    dashes = dash(labels_of(rows), colours)
    for part, opacity in ((_in_full(rows), 1.0), (_beyond_half(rows), LIGHT)):
        if part:
            base = alt.Chart(data(part))
            area = base.mark_area(opacity=strength * opacity)
            layers.append(area.encode(x, alt.Y("fve_low:Q", title=value), alt.Y2("fve_high"), colour))
            line = base.mark_line(strokeWidth=2, opacity=opacity)
            layers.append(line.encode(x, y, colour, dashes, tooltip=_tooltip()))
    layers += _points(rows, x, y, colour, value)
    return alt.layer(*layers)


def _few(row: dict[str, Any]) -> bool:
    """Return whether K > N/2: all choices of K draws then share most of them."""
    if row["few_subsets"] is not None:
        return bool(row["few_subsets"])
    return row.get("num_draws") is not None and bool(2 * row["k"] > row["num_draws"] > 1)


def _in_full(rows: Rows) -> Rows:
    return [r for r in rows if not _few(r)]


def _beyond_half(rows: Rows) -> Rows:
    """Return the lighter part of each curve, which begins at the last point of the full part, so that they join."""
    last = {r["label"]: r for r in rows if not _few(r)}
    few = [r for r in rows if _few(r)]
    return [
        r for label in labels_of(few) for r in ([last[label]] if label in last else []) + [f for f in few if f["label"] == label]
    ]


def _about_lines(rows: Rows) -> list[str]:
    """Return a sentence on what lighter lines and paler bands mean, where there are any."""
    lines = ["Lighter: K > N/2, few effective subsets."] if any(map(_few, rows)) else []
    lines += ["Paler band: holds for all K at once."] if any(r["band_low"] is not None for r in rows) else []
    return [" ".join(lines)] if lines else []


def _points(rows: Rows, x: alt.X, y: alt.Y, colour: alt.Color, value: str) -> list[alt.Chart]:
    """Return a dot at each power of two and at the end of a curve; a bar where a cell has a single K and so no band."""
    last = {r["label"]: r["k"] for r in sorted(rows, key=lambda r: int(r["k"]))}
    num_ks = Counter(r["label"] for r in rows)
    single = [r for r in rows if num_ks[r["label"]] == 1]
    dots = [r for r in rows if num_ks[r["label"]] > 1 and (_is_power_of_two(r["k"]) or r["k"] == last[r["label"]])]
    layers = [
        alt.Chart(data(some)).mark_point(filled=True, size=34, opacity=opacity).encode(x, y, colour, tooltip=_tooltip())
        for some, opacity in ((_in_full(dots), 1), ([r for r in dots if _few(r)], LIGHT))
        if some or opacity == 1
    ]
    if single:
        alone = alt.Chart(data(single))
        layers.append(alone.mark_rule(strokeWidth=2).encode(x, alt.Y("fve_low:Q", title=value), alt.Y2("fve_high"), colour))
        diamonds = alone.mark_point(filled=True, shape="diamond", size=110, opacity=1, stroke="white", strokeWidth=1)
        layers.append(diamonds.encode(x, y, colour, tooltip=_tooltip()))
    return layers


def _control_lines(rows: Rows, x: alt.X, title: str, *, beside_curves: bool = False) -> alt.LayerChart:
    """Return grey dashed lines, one per label: in the label's colour a control would draw too much attention."""
    axis = {} if beside_curves else {"tickCount": 3}
    y = _y("shuffled_fve", title, [r["shuffled_fve"] for r in rows] if axis else (), **axis)
    tooltip = [alt.Tooltip("label:N"), alt.Tooltip("k:Q", title="K"), alt.Tooltip("shuffled_fve:Q", format=".4f")]
    lines = alt.Chart(data(rows)).encode(x, y, alt.Detail("label:N"), tooltip=tooltip)
    marks = [lines.mark_line(color=GREY, strokeDash=[5, 3], strokeWidth=1.3)]
    if len({r["k"] for r in rows}) == 1:
        marks.append(lines.mark_point(color=GREY, size=30))
    return alt.layer(*marks)


def _zero_line(value: str) -> alt.Chart:
    return alt.Chart(data([{"zero": 0}])).mark_rule(color="#999999", strokeWidth=1).encode(alt.Y("zero:Q", title=value))


def _crosses_zero(rows: Rows, controls: Rows) -> bool:
    low, high = span([*_shown(rows), *(r["shuffled_fve"] for r in controls)])
    return low < 0 < high


def _setting_lines(rows: Rows, setting: str, title: str, colour: alt.Color) -> alt.LayerChart:
    values = sorted({r[setting] for r in rows})
    margin = 0.06 * ((values[-1] - values[0]) or 1)
    domain = [values[0] - margin, values[-1] + margin]
    axis = alt.Axis(values=values if len(values) <= 12 else alt.Undefined, grid=False, labelOverlap="greedy")
    x = alt.X(f"{setting}:Q", title=title, scale=alt.Scale(domain=domain, nice=False), axis=axis)
    y = _y("fve", FVE)
    lighter = alt.Opacity("few:O", scale=alt.Scale(domain=[False, True], range=[1, LIGHT]), legend=None)
    layers: list[Any] = [_zero_line(FVE)] if _crosses_zero(rows, []) else []
    ks = sorted({r["k"] for r in rows})
    for i, k in enumerate(ks):
        aside = DODGE * (i - (len(ks) - 1) / 2)  # or the error bars of all K would lie on one another
        base = alt.Chart().transform_filter(alt.datum.k == k).encode(x, lighter)
        layers.append(
            base.mark_rule(strokeWidth=1.4, xOffset=aside).encode(alt.Y("fve_low:Q", title=FVE), alt.Y2("fve_high"), colour)
        )
        for end in ("fve_low", "fve_high"):
            tick = base.mark_tick(thickness=1.4, size=DODGE, orient="horizontal", xOffset=aside)
            layers.append(tick.encode(alt.Y(f"{end}:Q", title=FVE), colour))
        layers.append(base.mark_line(strokeWidth=2, xOffset=aside).encode(y, colour))
        layers.append(base.mark_point(filled=True, size=44, xOffset=aside).encode(y, colour, tooltip=_tooltip()))
    return alt.layer(*layers)


def _tooltip() -> list[Any]:
    fve, interval = alt.Tooltip("fve:Q", format=".4f"), alt.Tooltip("interval:N")
    return [alt.Tooltip("label:N"), alt.Tooltip("k:Q", title="K"), fve, interval]


# Words


def _subtitle(rows: Rows, note: str | None) -> list[str]:
    """Return selection, scoring, baseline and N as text, which a reader needs to compare the numbers with others."""
    interval = value_of(rows, "level", "{:.0%}")
    has_interval = any(r["fve_low"] is not None for r in rows)
    lines = ["Oracle selection by the AR: the reconstructor that scores also picks the best draw."]
    others = sorted({r["metric"] for r in rows if r.get("metric") not in (None, "fve")})
    lines += [f"{_listed(rows, others)}."] if others else []
    about = f"{interval + ' intervals' if interval else 'Intervals'}: bootstrap over {_resampled(rows)}." if has_interval else ""
    lines += [" ".join(part for part in (about, note) if part)] if about or note else []
    return [*lines, *_about_lines(rows), *facts(rows)]


def _value_name(rows: Rows) -> str:
    """Return the name of the quantity that the curves show, if all show the same."""
    shown = {r.get("metric") or "fve" for r in rows}
    return "FVE" if shown == {"fve"} else shown.pop() if len(shown) == 1 else "Fraction of variance"


def _value_title(rows: Rows) -> str:
    name = _value_name(rows)
    return FVE if name == "FVE" else name


def _resampled(rows: Rows) -> str:
    """Return what the bootstrap resampled: documents; single activations in curves imported from the reference sweep."""
    imported = {r.get("metric") not in (None, "fve") for r in rows if r["fve_low"] is not None}
    single = "single activations"
    return "documents" if imported == {False} else single if imported == {True} else f"documents (imported curves: {single})"


def _listed(rows: Rows, metrics: list[str]) -> str:
    """Return a sentence on curves that show a quantity other than FVE."""
    of = {m: list(dict.fromkeys(r["label"] for r in rows if r.get("metric") == m)) for m in metrics}
    whole = len(metrics) == 1 and all(r.get("metric") in metrics for r in rows)
    return "; ".join(
        f"{'Shown' if whole or len(labels) > 3 else ', '.join(labels)}: {m} of the reference sweep" for m, labels in of.items()
    )
