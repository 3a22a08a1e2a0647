"""Shared by all charts: rows from a connection or a table, colours, font sizes, output files."""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import altair as alt
import pyarrow as pa

from ksweep.stats.interval_text import effective_text
from ksweep.utils.cell_names import distinct_names
from ksweep.utils.errors import RequestError
from ksweep.utils.files import publish_output
from ksweep.utils.text import CONTROLS

FVE = "FVE (fraction of variance explained)"
K = "K (draws the best is taken from)"
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D00")
"""Ordered by contrast; the yellow, too faint for a line on white, is darkened."""
ORDERED = ("#2C1160", "#8C2981", "#DE4968", "#F08A3C")
"""Colours of magma from dark to light, also in grey print, up to the lightest that is easy to see on white."""
GREY = "#7A7A7A"
INK = "#222222"
DIM = "#555555"
DASHES = ([1, 0], [6, 2], [2, 2], [8, 2, 2, 2])
WIDTH, HEIGHT, CONTROL_HEIGHT = 460, 290, 80
CHART_FORMATS = ("html", "png", "pdf", "svg")


CELLS = """
    WITH newest AS (
        SELECT * FROM runs
        QUALIFY row_number() OVER (PARTITION BY cell_key ORDER BY status = 'finished' DESC, finished DESC, run_id DESC) = 1
    )
    SELECT place, label, cell, sweep, run_id, cell_key FROM v_sweep_cells WHERE sweep = $sweep
    UNION ALL
    SELECT row_number() OVER (ORDER BY finished, run_id), label, cell, sweep,
           CASE WHEN status = 'finished' THEN run_id END, cell_key
    FROM newest WHERE $sweep IS NULL
    ORDER BY place
"""
"""The cells of a sweep, whichever sweep computed them, under their labels in it; without a sweep all cells."""
NAMED = "named_cells"
"""Table that queries join, a row per cell: cell_key, run_id (newest finished run), label (unique name), place."""

Rows = list[dict[str, Any]]
Colours = Mapping[str, str]


def save(chart: Any, path_stem: Path | str, formats: Sequence[str] = ("html", "png", "pdf")) -> list[Path]:
    """Write `<path_stem>.<format>` for each format and return the paths. The HTML includes its scripts and opens offline."""
    unknown = [f for f in formats if f not in CHART_FORMATS]
    if unknown:
        raise RequestError(f"a chart cannot be saved as {unknown[0]!r}; formats are {', '.join(CHART_FORMATS)}")
    written = []
    for name in formats:
        path = Path(f"{path_stem}.{name}")
        publish_output(path, _rendered(chart, name), "give a path elsewhere")
        written.append(path)
    return written


def _rendered(chart: Any, name: str) -> bytes:
    if name == "html":
        return str(chart.to_html(inline=True, json_kwds={"cls": ScriptJson})).encode()
    import vl_convert

    # Of a character that XML cannot hold vl-convert ends the whole process.
    given = {"vl_spec": _printable(chart.to_dict()), "vl_version": "_".join(alt.SCHEMA_VERSION.split(".")[:2])}
    if name == "svg":
        return str(vl_convert.vegalite_to_svg(**given)).encode()
    return bytes(vl_convert.vegalite_to_png(**given, scale=2) if name == "png" else vl_convert.vegalite_to_pdf(**given))


class ScriptJson(json.JSONEncoder):
    """Encodes JSON that may stand in a script element of a page: no text in it ends the element or begins a comment."""

    def encode(self, o: Any) -> str:
        """Return the JSON, with "<" as an escape."""
        return super().encode(o).replace("<", "\\u003c")


def _printable(value: Any) -> Any:
    """Return a spec with a replacement character for each control character of its titles, labels and data.

    An escape would not do: Vega evaluates descriptions of axes as expressions, in which it would be the character again.
    """
    if isinstance(value, str):
        try:
            # Rows are JSON within the spec, see `data`.
            return json.dumps(_printable(json.loads(value))) if value[:2] == "[{" else CONTROLS.sub("\ufffd", value)
        except ValueError:
            return CONTROLS.sub("\ufffd", value)
    if isinstance(value, list):
        return [_printable(part) for part in value]
    return {_printable(name): _printable(part) for name, part in value.items()} if isinstance(value, dict) else value


# Rows


def query_table(source: Any, question: str, sweep: str | None = None) -> Any:
    """Return the result of a query on a connection, or the given relation or table, as an Arrow table.

    Raises:
        RequestError: the database lacks a table or column of the query.
    """
    if not hasattr(source, "cursor"):
        return source.to_arrow_table() if hasattr(source, "to_arrow_table") else source
    try:
        source.register(NAMED, _named(source, sweep))
        return source.sql(question).to_arrow_table()
    except Exception as error:
        if type(error).__name__ not in ("CatalogException", "BinderException"):  # naming them would be importing duckdb
            raise
        raise RequestError(
            f"this database cannot answer ({str(error).splitlines()[0]}): give a connection of ksweep.connect(), or a table"
        ) from error
    finally:
        source.unregister(NAMED)


def _named(connection: Any, sweep: str | None) -> pa.Table:
    cells = connection.sql(CELLS, params={"sweep": sweep}).to_arrow_table().to_pylist()
    done = [cell for cell in cells if cell["run_id"] is not None]
    # A cell without a result must not lengthen the names of those that have one.
    names = dict(zip((cell["cell_key"] for cell in cells), distinct_names(cells), strict=True))
    names |= zip((cell["cell_key"] for cell in done), distinct_names(done), strict=True)
    return pa.table(
        {
            "cell_key": pa.array([cell["cell_key"] for cell in cells], pa.string()),
            "run_id": pa.array([cell["run_id"] for cell in cells], pa.string()),
            "label": pa.array([names[cell["cell_key"]] for cell in cells], pa.string()),
            "place": pa.array(range(len(cells)), pa.int64()),
        }
    )


def named_rows(rows: Rows, sides: Sequence[str] = ("",), *, runs: bool = True) -> Rows:
    """Return rows with a unique label for each cell, as far as their columns identify cell and run.

    Args:
        sides: prefixes of the columns that name a cell: "other_" for the other one of a difference.
        runs: whether several runs of a cell get names of their own; otherwise they share its name.
    """
    columns = ("label", "sweep", "cell", "run_id") if runs else ("label", "sweep", "cell")
    cells = {tuple(row.get(f"{side}{name}") for name in columns): None for row in rows for side in sides}
    names = dict(zip(cells, distinct_names([dict(zip(columns, cell, strict=True)) for cell in cells]), strict=True))
    labels = [{f"{side}label": names[tuple(row.get(f"{side}{name}") for name in columns)] for side in sides} for row in rows]
    return [row | new for row, new in zip(rows, labels, strict=True)]


def refuse_ties(rows: Rows, *columns: str) -> None:
    """Check that each cell has one row per point.

    Raises:
        RequestError: two rows have the same values in these columns.
    """
    seen = set()
    for row in rows:
        point = tuple(row.get(name) for name in columns)
        if point in seen:
            where = "".join(f", {name} = {value}" for name, value in zip(columns[1:], point[1:], strict=True))
            raise RequestError(
                f"two rows of the table are of {row['label']!r}{where}: one mark cannot stand for both. Give each cell a "
                "label of its own, keep the columns cell and run_id, which tell them apart, or pass the rows of one of them"
            )
        seen.add(point)


def rows_of(table: Any, needed: Iterable[str], used: Iterable[str], sides: Sequence[str] = ("",), *, runs: bool = True) -> Rows:
    """Return plain rows of an Arrow table or a list of dicts, labelled by `named_rows`; NaN becomes None."""
    rows = table.to_pylist() if hasattr(table, "to_pylist") else [dict(r) for r in table]
    if not rows:
        raise RequestError("there is nothing to draw: the table has no rows; has a cell of this sweep finished?")
    if missing := [name for name in needed if name not in rows[0]]:
        raise RequestError(f"the table lacks {', '.join(missing)}; a chart takes the columns of the registry's `curves`")
    return [{name: _plain(r.get(name)) for name in used} for r in named_rows(rows, sides, runs=runs)]


def _plain(value: Any) -> Any:
    if isinstance(value, Decimal):  # what a literal such as 0.95 is in DuckDB
        return float(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def data(rows: Rows) -> alt.InlineData:
    """Return rows as inline data of a chart; as text, because Altair validates lists value by value, many times."""
    return alt.InlineData(values=json.dumps(rows, cls=ScriptJson), format=alt.JsonDataFormat(type="json"))


def labels_of(rows: Rows) -> list[str]:
    """Return the labels in the order of their first appearance."""
    return list(dict.fromkeys(r["label"] for r in rows))


# Colours


def palette(labels: Iterable[str]) -> dict[str, str]:
    """Return a colour for each label, independent of their order: dark to light by temperature or step, else Okabe-Ito.

    The scale from dark to light is for labels that differ in nothing but one of these.

    Pass the palette of a whole sweep as `colours` to every chart of it: a cell then has the same colour in all of them, also in
    those that show a few cells.
    """
    names = sorted(set(labels), key=natural)
    for number_in, without in ((_temperature, without_temperature), (step_in, without_step)):
        numbers = [number_in(name) for name in names]
        distinct = sorted({n for n in numbers if n is not None})
        if len({without(name) for name in names}) == 1 and len(distinct) == len(names) > 1:
            scale = spread(len(distinct))
            return {name: scale[distinct.index(n)] for name, n in zip(names, numbers, strict=True) if n is not None}
    return {name: OKABE_ITO[i % len(OKABE_ITO)] for i, name in enumerate(names)}


def natural(name: str) -> list[Any]:
    """Return a sort key by which checkpoint-9 precedes checkpoint-10 and 0.5 precedes 0.75."""
    return [float(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+(?:\.\d+)?)", name))]


def _temperature(label: str) -> float | None:
    match = re.search(r"(?:temperature|T)=(\d+(?:\.\d+)?)", label)
    return float(match[1]) if match else None


def step_in(label: str, default: int | None = None) -> int | None:
    """Return the training step in a label, "step=500"; `default` where there is none."""
    match = re.search(r"\bstep=(\d+)", label)
    return int(match[1]) if match else default


def without_temperature(label: str) -> str:
    """Return a label without its temperature: "layer=20" for "temperature=0.7, layer=20"."""
    return _without(label, "temperature=", "T=")


def without_step(label: str) -> str:
    """Return a label without its training step: "layer=20" for "step=500, layer=20"."""
    return _without(label, "step=")


def _without(label: str, *names: str) -> str:
    return " ".join(part for part in label.replace(",", " ").split() if not part.startswith((*names, "@")))


def colour(labels: Sequence[str], colours: Colours | None, **legend_: Any) -> alt.Color:
    """Return the colour encoding of labels; with a legend if there are several."""
    scale = alt.Scale(domain=list(labels), range=colours_for(labels, colours))
    return alt.Color("label:N", sort=list(labels), scale=scale, legend=legend(None, **legend_) if len(labels) > 1 else None)


def colours_for(labels: Sequence[str], colours: Colours | None) -> list[str]:
    """Return the colour of each label, from a palette of their own where `colours` lacks one."""
    own = palette(labels)
    return [(colours or own).get(label, own[label]) for label in labels]


def dash(labels: Sequence[str], colours: Colours | None) -> Any:
    """Return the dash encoding: solid lines while colours are distinct, other dashes where colours repeat."""
    shown = colours_for(labels, colours)
    if len(set(shown)) == len(labels):
        return alt.StrokeDashValue([1, 0])
    seen: dict[str, int] = {}
    dashes = []
    for name in shown:
        dashes.append(DASHES[seen.get(name, 0) % len(DASHES)])
        seen[name] = seen.get(name, 0) + 1
    return alt.StrokeDash("label:N", sort=list(labels), scale=alt.Scale(domain=list(labels), range=dashes), legend=None)


def ordinal_colour(field: str, title: str, values: list[int]) -> alt.Color:
    """Return a colour encoding from dark to light for ordered numbers."""
    scale = alt.Scale(domain=values, range=spread(len(values)))
    return alt.Color(f"{field}:O", title=title, sort=values, scale=scale, legend=legend(title))


def legend(title: str | None, **more: Any) -> alt.Legend:
    """Return a legend to the right of the chart, with strokes by default."""
    strokes = {"symbolType": "stroke", "symbolStrokeWidth": 2.5, "symbolSize": 250, "symbolOpacity": 1}
    return alt.Legend(title=title, orient="right", **(strokes | more))


def spread(count: int) -> list[str]:
    """Return `count` colours, evenly spaced along ORDERED."""
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


# Words


def finished(chart: Any, title: str, subtitle: Sequence[str]) -> alt.TopLevelMixin:
    """Return the chart with title, subtitle and font sizes for print."""
    heading = alt.TitleParams(wrapped(title), subtitle=list(subtitle), anchor="start", frame="group", offset=12)
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


def wrapped(title: str, width: int = 72) -> list[str]:
    """Return the title in lines of similar length that fit above a chart."""
    num_lines = math.ceil(len(title) / width)
    return textwrap.wrap(title, min(width, math.ceil(len(title) / num_lines) + 8)) if title else []


def value_of(rows: Rows, name: str, form: str) -> str:
    """Return the value of a column as text, or its range where cells differ."""
    values = sorted({r[name] for r in rows if r.get(name) is not None})
    if not values:
        return ""
    low, high = form.format(values[0]), form.format(values[-1])
    return low if low == high else f"{low} to {high}"


def facts(rows: Rows) -> list[str]:
    """Return a line with baseline, N and documents; no line if none of them is known."""
    kinds = " or ".join(dict.fromkeys(r["baseline_kind"] for r in rows if r.get("baseline_kind")))
    baseline = value_of(rows, "baseline", "{:.4g}")
    parts = [
        f"Baseline {baseline}{f' ({kinds})' if kinds else ''}" if baseline else "",
        f"N = {value_of(rows, 'num_activations', '{:,}')} activations" if value_of(rows, "num_activations", "{}") else "",
        f"{value_of(rows, 'num_documents', '{:,}')} documents{_effective(rows)}" if value_of(rows, "num_documents", "{}") else "",
    ]
    return [", ".join(f for f in parts if f)] if any(parts) else []


def _effective(rows: Rows) -> str:
    """Return " (26.3 effective)" where documents have uneven sizes."""
    uneven = any(effective_text(r.get("num_documents"), r.get("effective_documents")) for r in rows)
    return f" ({value_of(rows, 'effective_documents', '{:.1f}')} effective)" if uneven else ""


def span(values: Iterable[float | None]) -> tuple[float, float]:
    """Return the smallest and the largest of the values that are not None."""
    numbers = [v for v in values if v is not None]
    return min(numbers), max(numbers)
