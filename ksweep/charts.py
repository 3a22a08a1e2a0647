"""Curves as pictures for a paper: an Arrow table in, an Altair chart out. The only module that imports altair.

Each chart takes a table with the columns of the registry's `curves` (`label, k, fve, fve_low, fve_high, temperature, baseline,
baseline_kind, num_activations, num_documents, shuffled_fve` and, where known, `level`), a DuckDB relation over it, or a list of
dicts, and keeps the order in which labels first appear. Colours are those of Okabe and Ito, which people with colour-blindness
tell apart; a scale runs from dark to light where only the temperature differs.
"""

from __future__ import annotations

import io
import json
import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import altair as alt

from ksweep.errors import RequestError
from ksweep.files import publish

FVE = "FVE (fraction of variance explained)"
K = "K (draws the best is taken from)"
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D00")
"""Their order puts the strongest contrasts first; their yellow, too faint for a line on white, is darkened."""
ORDERED = ("#2C1160", "#8C2981", "#DE4968", "#F08A3C")
"""Along magma, dark to light, also in grey print; ends where a line on white is still easy to see."""
GREY = "#7A7A7A"
INK = "#222222"
DIM = "#555555"
DASHES = ([1, 0], [6, 2], [2, 2], [8, 2, 2, 2])
WIDTH, HEIGHT, CONTROL_HEIGHT = 460, 290, 80
FORMATS = ("html", "png", "pdf", "svg")

Rows = list[dict[str, Any]]


def fve_by_k(table: Any, *, title: str | None = None) -> alt.TopLevelMixin:
    """FVE against K on a log axis: a line and an interval band per label, and what draws of another activation reach, dashed.

    Where the control lies far from the curves it gets a panel of its own below, so that it does not flatten them.
    """
    rows = _rows(table, ("label", "k", "fve"))
    shuffled = [r for r in rows if r.get("shuffled_fve") is not None]
    colour = _colour(rows)
    ks = _k_axis(rows)
    near = not shuffled or _near(rows)
    main = _curves(rows, colour, _k(ks, titled=near), controls=shuffled if near else [], value=_value_title(rows))
    main = main.properties(width=WIDTH, height=HEIGHT)
    if not near:
        below = _control_lines(shuffled, _k(ks, titled=True), title="shuffled FVE")
        main = alt.vconcat(main, below.properties(width=WIDTH, height=CONTROL_HEIGHT), spacing=14)
    note = "Grey: best of K draws of another activation (control)." if shuffled else None
    return _finished(main, rows, title or f"{_value_name(rows)} by number of draws", note)


def fve_by_temperature(table: Any, ks: Sequence[int] | None = None, *, title: str | None = None) -> alt.TopLevelMixin:
    """FVE against sampling temperature: a line with error bars per K; panels where cells differ in more than temperature.

    Args:
        table: as for every chart.
        ks: values of K to draw; None takes 1, 4, 16, ... up to the largest that every temperature has.
        title: above the chart.
    """
    rows = [r for r in _rows(table, ("label", "k", "fve", "temperature")) if r["temperature"] is not None]
    chosen = sorted(set(ks)) if ks is not None else _powers_of_four(rows)
    rows = [{**r, "group": _without_temperature(r["label"])} for r in rows if r["k"] in chosen]
    if not rows:
        raise RequestError(f"no row of the table has a temperature and one of K = {list(chosen)}; name others with ks=")
    _refuse_ties(rows)
    groups = list(dict.fromkeys(r["group"] for r in rows))
    colour = _ordinal_colour("k", "K", sorted({r["k"] for r in rows}))
    chart = _temperature_lines(rows, colour).properties(width=WIDTH if len(groups) == 1 else WIDTH * 0.6, height=HEIGHT)
    if len(groups) > 1:
        columns = next(c for c in (3, 2, 1) if len(groups) % c == 0)  # an empty place would show axes of nothing
        chart = chart.facet(facet=alt.Facet("group:N", title=None, sort=groups), columns=columns, data=_data(rows))
    else:
        chart = chart.properties(data=_data(rows))
    return _finished(chart, rows, title or "FVE by sampling temperature", None)


def save(chart: Any, path_stem: Path | str, formats: Sequence[str] = ("html", "png", "pdf")) -> list[Path]:
    """Write `<path_stem>.<format>` for each format and name them. The HTML carries its scripts and opens without a network."""
    unknown = [f for f in formats if f not in FORMATS]
    if unknown:
        raise RequestError(f"a chart cannot be saved as {unknown[0]!r}; formats are {', '.join(FORMATS)}")
    written = []
    for name in formats:
        path = Path(f"{path_stem}.{name}")
        publish(path, _rendered(chart, name))
        written.append(path)
    return written


def _rendered(chart: Any, name: str) -> bytes:
    if name == "html":
        return str(chart.to_html(inline=True)).encode()
    if name == "svg":
        text = io.StringIO()
        chart.save(text, format="svg")
        return text.getvalue().encode()
    binary = io.BytesIO()
    chart.save(binary, format=name, **({"scale_factor": 2} if name == "png" else {}))
    return binary.getvalue()


# Rows


def _rows(table: Any, needed: Iterable[str]) -> Rows:
    """Plain rows of an Arrow table, a DuckDB relation or a list of dicts; NaN becomes None."""
    if hasattr(table, "to_arrow_table"):
        table = table.to_arrow_table()
    rows = table.to_pylist() if hasattr(table, "to_pylist") else [dict(r) for r in table]
    if not rows:
        raise RequestError("there is nothing to draw: the table has no rows; has a cell of this sweep finished?")
    if missing := [name for name in needed if name not in rows[0]]:
        raise RequestError(f"the table lacks {', '.join(missing)}; a chart takes the columns of the registry's `curves`")
    return [{name: _plain(r.get(name)) for name in _USED} for r in rows]


_USED = (
    "label", "metric", "k", "fve", "fve_low", "fve_high", "level", "temperature", "baseline", "baseline_kind",
    "num_activations", "num_documents", "shuffled_fve",
)  # fmt: skip


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _data(rows: Rows) -> alt.InlineData:
    """The rows inside the chart, so that it is complete; as text, because Altair checks lists value by value, many times."""
    return alt.InlineData(values=json.dumps(rows), format=alt.JsonDataFormat(type="json"))


def _labels(rows: Rows) -> list[str]:
    return list(dict.fromkeys(r["label"] for r in rows))


def _without_temperature(label: str) -> str:
    """What is left of "temperature=0.7, layer=20" or "pair L20 T=0.7" when the temperature is taken out."""
    parts = [p for p in label.replace(",", " ").split() if not p.startswith(("temperature=", "T=", "@"))]
    return " ".join(parts)


def _powers_of_four(rows: Rows) -> list[int]:
    """1, 4, 16, ... that every temperature has, and the largest K that every one has."""
    of_temperature: dict[float, set[int]] = {}
    for r in rows:
        of_temperature.setdefault(r["temperature"], set()).add(r["k"])
    sampled = [ks for t, ks in of_temperature.items() if t > 0] or list(of_temperature.values())
    common = set.intersection(*sampled) if sampled else set()
    return sorted(k for k in common if (_is_power_of_two(k) and k.bit_length() % 2) or k == max(common))


def _is_power_of_two(k: int) -> bool:
    return k & (k - 1) == 0


def _refuse_ties(rows: Rows) -> None:
    seen = set()
    for r in rows:
        point = (r["group"], r["k"], r["temperature"])
        if point in seen:
            raise RequestError(
                f"two cells named {r['group'] or r['label']!r} share temperature {r['temperature']:g}: a line through both would "
                "mean nothing. Give them labels that differ, or pass the rows of one of them."
            )
        seen.add(point)


# Scales and axes


def _colour(rows: Rows) -> alt.Color:
    """One colour a label, by order; from dark to light where labels are temperatures."""
    labels = _labels(rows)
    legend = _legend(None) if len(labels) > 1 else None
    return alt.Color("label:N", sort=labels, scale=alt.Scale(domain=labels, range=_colours(rows, labels)), legend=legend)


def _ordinal_colour(field: str, title: str, values: list[int]) -> alt.Color:
    scale = alt.Scale(domain=values, range=_spread(len(values)))
    return alt.Color(f"{field}:O", title=title, sort=values, scale=scale, legend=_legend(title))


def _legend(title: str | None) -> alt.Legend:
    return alt.Legend(title=title, orient="right", symbolType="stroke", symbolStrokeWidth=2.5, symbolSize=250, symbolOpacity=1)


def _colours(rows: Rows, labels: list[str]) -> list[str]:
    temperature = {r["label"]: r["temperature"] for r in rows}
    ordered = sorted({t for t in temperature.values() if t is not None})
    if len({_without_temperature(label) for label in labels}) == 1 and len(ordered) == len(labels) > 1:
        scale = _spread(len(ordered))
        return [scale[ordered.index(temperature[label])] for label in labels]
    return [OKABE_ITO[i % len(OKABE_ITO)] for i in range(len(labels))]


def _spread(count: int) -> list[str]:
    """`count` colours, evenly spaced along ORDERED."""
    if count == 1:
        return [ORDERED[0]]
    return [_between(i * (len(ORDERED) - 1) / (count - 1)) for i in range(count)]


def _between(position: float) -> str:
    low = min(int(position), len(ORDERED) - 2)
    share = position - low
    pairs = zip(_rgb(ORDERED[low]), _rgb(ORDERED[low + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * share):02X}" for a, b in pairs)


def _rgb(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def _dash(rows: Rows) -> Any:
    """Solid lines while colours suffice; after that colours come again with another dash."""
    labels = _labels(rows)
    dashes = [DASHES[(i // len(OKABE_ITO)) % len(DASHES)] for i in range(len(labels))]
    if len(labels) <= len(OKABE_ITO) or len(set(_colours(rows, labels))) == len(labels):
        return alt.StrokeDashValue([1, 0])
    return alt.StrokeDash("label:N", sort=labels, scale=alt.Scale(domain=labels, range=dashes), legend=None)


def _k_axis(rows: Rows) -> list[int]:
    """Ticks: powers of two, and the largest K unless its label would touch its neighbour's."""
    ks = sorted({r["k"] for r in rows})
    ticks = [2**i for i in range(ks[-1].bit_length()) if ks[0] <= 2**i <= ks[-1]]
    return ticks if ticks and ks[-1] / ticks[-1] < 1.4 else [*ticks, ks[-1]]


def _k(ticks: list[int], *, titled: bool) -> alt.X:
    margin = (ticks[-1] / ticks[0]) ** 0.02 if len(ticks) > 1 else 1.5
    scale = alt.Scale(type="log", base=2, domain=[ticks[0] / margin, ticks[-1] * margin], nice=False)
    axis = alt.Axis(values=ticks, format="d", labels=titled, ticks=titled, title=K if titled else None, grid=False)
    return alt.X("k:Q", scale=scale, axis=axis)


def _y(field: str, title: str, values: Sequence[float] = (), **axis: Any) -> alt.Y:
    """An axis that fits its data; `minExtent` keeps the titles of panels below each other in line."""
    scale = alt.Scale(zero=False, nice=True, padding=6)
    if len(set(values)) == 1:  # the default for a single value is a range of one, which says nothing
        scale = alt.Scale(domain=[values[0] - 0.05, values[0] + 0.05], nice=True)
    return alt.Y(f"{field}:Q", title=title, scale=scale, axis=alt.Axis(minExtent=44, **axis))


def _span(values: Iterable[float | None]) -> tuple[float, float]:
    known = [v for v in values if v is not None]
    return min(known), max(known)


def _shown(rows: Rows) -> tuple[float, float]:
    """The range that curves and intervals take up."""
    return _span(r[name] for r in rows for name in ("fve", "fve_low", "fve_high"))


def _near(rows: Rows) -> bool:
    """Whether the control fits into the panel of the curves without taking most of its height."""
    low, high = _shown(rows)
    all_low, all_high = _span([low, high, *(r["shuffled_fve"] for r in rows)])
    return all_high - all_low <= 2 * (high - low)


# Layers


def _curves(rows: Rows, colour: alt.Color, x: alt.X, controls: Rows, value: str) -> alt.LayerChart:
    """`value` is the title of the axis, the same in every layer: Vega would list all that differ."""
    base = alt.Chart(_data(rows))
    y = _y("fve", value)
    layers: list[Any] = [_zero_line(value)] if _crosses_zero(rows, controls) else []
    if controls:
        layers.append(_control_lines(controls, x, title=value, beside_curves=True))
    band = base.mark_area(opacity=0.16 if len(_labels(rows)) <= 5 else 0.08)
    layers.append(band.encode(x, alt.Y("fve_low:Q", title=value), alt.Y2("fve_high"), colour))
    layers.append(base.mark_line(strokeWidth=2).encode(x, y, colour, _dash(rows), tooltip=_tooltip()))
    layers += _points(rows, x, y, colour, value)
    return alt.layer(*layers)


def _points(rows: Rows, x: alt.X, y: alt.Y, colour: alt.Color, value: str) -> list[alt.Chart]:
    """A dot at each power of two and at the end of a curve; a bar where a cell has a single K and so no band."""
    last = {r["label"]: r["k"] for r in sorted(rows, key=lambda r: int(r["k"]))}
    num_ks = Counter(r["label"] for r in rows)
    single = [r for r in rows if num_ks[r["label"]] == 1]
    dots = [r for r in rows if num_ks[r["label"]] > 1 and (_is_power_of_two(r["k"]) or r["k"] == last[r["label"]])]
    layers = [alt.Chart(_data(dots)).mark_point(filled=True, size=34, opacity=1).encode(x, y, colour, tooltip=_tooltip())]
    if single:
        alone = alt.Chart(_data(single))
        layers.append(alone.mark_rule(strokeWidth=2).encode(x, alt.Y("fve_low:Q", title=value), alt.Y2("fve_high"), colour))
        diamonds = alone.mark_point(filled=True, shape="diamond", size=110, opacity=1, stroke="white", strokeWidth=1)
        layers.append(diamonds.encode(x, y, colour, tooltip=_tooltip()))
    return layers


def _control_lines(rows: Rows, x: alt.X, title: str, *, beside_curves: bool = False) -> alt.LayerChart:
    """Grey and dashed, a line a label; the label's colour would ask for attention that a control does not deserve."""
    axis = {} if beside_curves else {"tickCount": 3}
    y = _y("shuffled_fve", title, [r["shuffled_fve"] for r in rows] if axis else (), **axis)
    tooltip = [alt.Tooltip("label:N"), alt.Tooltip("k:Q", title="K"), alt.Tooltip("shuffled_fve:Q", format=".4f")]
    lines = alt.Chart(_data(rows)).encode(x, y, alt.Detail("label:N"), tooltip=tooltip)
    marks = [lines.mark_line(color=GREY, strokeDash=[5, 3], strokeWidth=1.3)]
    if len({r["k"] for r in rows}) == 1:
        marks.append(lines.mark_point(color=GREY, size=30))
    return alt.layer(*marks)


def _zero_line(value: str) -> alt.Chart:
    return alt.Chart(_data([{"zero": 0}])).mark_rule(color="#999999", strokeWidth=1).encode(alt.Y("zero:Q", title=value))


def _crosses_zero(rows: Rows, controls: Rows) -> bool:
    low, high = _span([*_shown(rows), *(r["shuffled_fve"] for r in controls)])
    return low < 0 < high


def _temperature_lines(rows: Rows, colour: alt.Color) -> alt.LayerChart:
    temperatures = sorted({r["temperature"] for r in rows})
    margin = 0.06 * ((temperatures[-1] - temperatures[0]) or 1)
    domain = [temperatures[0] - margin, temperatures[-1] + margin]
    axis = alt.Axis(values=temperatures if len(temperatures) <= 12 else alt.Undefined, grid=False)
    x = alt.X("temperature:Q", title="Sampling temperature", scale=alt.Scale(domain=domain, nice=False), axis=axis)
    y = _y("fve", FVE)
    base = alt.Chart().encode(x)
    layers: list[Any] = [_zero_line(FVE)] if _crosses_zero(rows, []) else []
    layers.append(base.mark_rule(strokeWidth=1.4).encode(alt.Y("fve_low:Q", title=FVE), alt.Y2("fve_high"), colour))
    layers += [
        base.mark_tick(thickness=1.4, size=8, orient="horizontal", opacity=1).encode(alt.Y(f"{end}:Q", title=FVE), colour)
        for end in ("fve_low", "fve_high")
    ]
    layers.append(base.mark_line(strokeWidth=2).encode(y, colour))
    layers.append(base.mark_point(filled=True, size=44, opacity=1).encode(y, colour, tooltip=_tooltip()))
    return alt.layer(*layers)


def _tooltip() -> list[Any]:
    numbers = [alt.Tooltip(f"{name}:Q", format=".4f") for name in ("fve", "fve_low", "fve_high")]
    return [alt.Tooltip("label:N"), alt.Tooltip("k:Q", title="K"), *numbers]


# Words


def _finished(chart: Any, rows: Rows, title: str, note: str | None) -> alt.TopLevelMixin:
    """Title, subtitle and type sizes for print."""
    heading = alt.TitleParams(_wrapped(title), subtitle=_subtitle(rows, note), anchor="start", frame="group", offset=12)
    styled = chart.properties(title=heading, padding={"left": 8, "right": 12, "top": 8, "bottom": 8})
    return (
        styled.configure(font="Helvetica, Arial, Liberation Sans, sans-serif", background="white")
        .configure_title(fontSize=15, fontWeight=600, color=INK, subtitleFontSize=11.5, subtitleColor=DIM, subtitlePadding=5)
        .configure_axis(
            labelFontSize=12, titleFontSize=13, titleFontWeight="normal", titleColor=INK, labelColor=INK, gridColor="#E8E8E8",
            domainColor="#666666", tickColor="#666666", titlePadding=8, titleLimit=0, labelLimit=0,
        )
        .configure_legend(labelFontSize=12, titleFontSize=12, labelColor=INK, labelLimit=0, titleLimit=0, rowPadding=4)
        .configure_header(labelFontSize=12.5, labelColor=INK, labelLimit=0)
        .configure_view(stroke=None)
    )  # fmt: skip


def _wrapped(title: str, width: int = 72) -> list[str]:
    """Lines of about the same length, none longer than fits above a chart."""
    num_lines = math.ceil(len(title) / width)
    return textwrap.wrap(title, min(width, math.ceil(len(title) / num_lines) + 8)) if title else []


def _subtitle(rows: Rows, note: str | None) -> list[str]:
    """How it was selected and scored, and on what: what a reader needs to compare the numbers with others."""
    interval = _of(rows, "level", "{:.0%}")
    has_interval = any(r["fve_low"] is not None for r in rows)
    lines = ["Oracle selection by the AR: the reconstructor that scores also picks the best draw."]
    others = sorted({r["metric"] for r in rows if r.get("metric") not in (None, "fve")})
    lines += [f"{_listed(rows, others)}."] if others else []
    about = f"{interval + ' intervals' if interval else 'Intervals'}: bootstrap over {_resampled(rows)}." if has_interval else ""
    lines += [" ".join(part for part in (about, note) if part)] if about or note else []
    kinds = " or ".join(dict.fromkeys(r["baseline_kind"] for r in rows if r["baseline_kind"]))
    facts = [
        f"Baseline {_of(rows, 'baseline', '{:.4g}')}{f' ({kinds})' if kinds else ''}" if _of(rows, "baseline", "{:.4g}") else "",
        f"N = {_of(rows, 'num_activations', '{:,}')} activations" if _of(rows, "num_activations", "{}") else "",
        f"{_of(rows, 'num_documents', '{:,}')} documents" if _of(rows, "num_documents", "{}") else "",
    ]
    return [*lines, ", ".join(f for f in facts if f)] if any(facts) else lines


def _value_name(rows: Rows) -> str:
    """What the curves show, where all show the same."""
    shown = {r.get("metric") or "fve" for r in rows}
    return "FVE" if shown == {"fve"} else shown.pop() if len(shown) == 1 else "Fraction of variance"


def _value_title(rows: Rows) -> str:
    name = _value_name(rows)
    return FVE if name == "FVE" else name


def _resampled(rows: Rows) -> str:
    """What the bootstrap drew: documents; single activations in curves imported from the reference sweep."""
    imported = {r.get("metric") not in (None, "fve") for r in rows if r["fve_low"] is not None}
    single = "single activations"
    return "documents" if imported == {False} else single if imported == {True} else f"documents (imported curves: {single})"


def _listed(rows: Rows, metrics: list[str]) -> str:
    """Which curves show another number than FVE."""
    of = {m: list(dict.fromkeys(r["label"] for r in rows if r.get("metric") == m)) for m in metrics}
    whole = len(metrics) == 1 and all(r.get("metric") in metrics for r in rows)
    return "; ".join(
        f"{'Shown' if whole or len(labels) > 3 else ', '.join(labels)}: {m} of the reference sweep" for m, labels in of.items()
    )


def _of(rows: Rows, name: str, form: str) -> str:
    """The value of a column, or its range where cells differ."""
    values = sorted({r[name] for r in rows if r[name] is not None})
    if not values:
        return ""
    low, high = form.format(values[0]), form.format(values[-1])
    return low if low == high else f"{low} to {high}"
