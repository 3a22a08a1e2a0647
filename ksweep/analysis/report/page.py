"""The report of a sweep as one HTML file that includes its scripts, charts and tables."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ksweep.analysis import charts
from ksweep.analysis.charts.style import ScriptJson
from ksweep.analysis.report.conclusions import answer, difference, held_out_best_sentence, largest_common_k, ranked, with_interval
from ksweep.analysis.report.data import ReportData, read_report_data
from ksweep.analysis.results_table import SHOWN_KS, noted, warnings
from ksweep.registry.query import TableRow
from ksweep.stats.interval_text import baseline_text, effective_text, interval_text
from ksweep.utils.errors import RequestError
from ksweep.utils.files import publish_output

GOOD, BAD = (0, 114, 178), (213, 94, 0)
"""Okabe-Ito blue and vermilion: better and worse than FVE 0."""
MOST_SHOWN = 8
"""Cells shown in charts where more would be indistinguishable: those with the highest FVE."""

OWN_NOTES = {"gain": "FVE at the largest K less FVE at K = 1, paired"}
"""Notes for controls whose own notes differ by cell."""
WIDTHS = [{"targets": [i], "width": w} for i, w in enumerate(("12%", "6%", "7%", "34%", "22%", "6%", "13%"))]
"""Widths of the columns of the browsable table."""


def write_report(registry: Path, sweep: str, path: Path | None = None) -> Path:
    """Write the report of a sweep as one HTML file and return its path.

    Args:
        registry: directory of the registry.
        sweep: name of a sweep of which at least one cell has finished.
        path: file to write; None writes charts/<sweep>/report.html in the registry.

    Raises:
        RequestError: no cell of such a sweep has finished, or `path` is a directory. RunError: nothing can be written there.
    """
    if path is not None and path.is_dir():
        raise RequestError(f"{path} is a directory: give the name of a file in it, e.g. {path / 'report.html'}")
    facts = read_report_data(registry, sweep)
    target = path or registry / "charts" / sweep / "report.html"
    content = page(facts, held_out_best_sentence(registry, facts)).encode()
    publish_output(target, content, "name a file elsewhere, with -o FILE")
    return target


def page(facts: ReportData, held_out: str = "") -> str:
    """Return the HTML of the page; `held_out` is a sentence on the best cell's FVE on held-out documents."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("ksweep.analysis.report", ""), undefined=StrictUndefined,
        autoescape=select_autoescape(["html", "j2"]),
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "duration": duration, "words": words}
    return environment.get_template("page.html.j2").render(
        facts=facts,
        made=datetime.now(UTC),
        level=next((row["level"] for row in facts.curves.to_pylist() if row["level"]), None),
        answer=[*answer(facts), *([held_out] if held_out else [])],
        curves=curve_table(facts),
        differences=difference_table(facts),
        controls=control_table(facts),
        warnings=warnings(facts.curves),
        notes=noted(facts.runs),
        charts={name: json.dumps(chart.to_dict(), cls=ScriptJson) for name, chart in drawn(facts).items()},
        chart_scripts=_chart_scripts(),
        table_scripts=_table_scripts(),
        explanations=explanation_table(facts.explanations),
        packages=_of_runs(facts.runs, "packages"),
        engine=_of_runs(facts.runs, "engine"),
    )


def drawn(facts: ReportData) -> dict[str, Any]:
    """Return the charts for which this sweep has data, by name."""
    colours = charts.palette(run["label"] for run in facts.runs)
    best = [row["label"] for row in ranked(facts, largest_common_k(facts.curves))]
    few = set(best[:MOST_SHOWN])
    curves, groups = facts.curves, _several([row for row in facts.groups if row["label"] in few])
    errors = facts.errors.filter(pc.is_in(facts.errors["label"], pa.array(sorted(few))))
    by_name = {
        "fve_by_k": _try(lambda: charts.fve_by_k(curves, colours=colours)),
        "fve_by_temperature": _try(lambda: charts.fve_by_temperature(curves)) if _varies(curves, "temperature") else None,
        "fve_by_step": _try(lambda: charts.fve_by_step(curves)) if _varies(curves, "step") else None,
        "equal_compute": _try(lambda: charts.fve_by_k(curves, axis="tokens", colours=colours)) if _costs(curves) else None,
        "differences": _try(lambda: charts.compare(_near(facts, few), reference=_reference(facts, best), colours=colours)),
        "groups_own": _try(lambda: charts.by_group(groups, against="own", colours=colours)),
        "groups_overall": _try(lambda: charts.by_group(_overall(groups), against="overall", colours=colours)),
        "errors": _try(lambda: charts.error_distribution(errors, colours=colours)),
        "norms": _try(lambda: charts.norm_distribution(facts.norms)),
        "throughput": _try(lambda: charts.throughput(facts.runs, colours=colours)),
    }
    return {name: chart for name, chart in by_name.items() if chart is not None}


def _several(groups: Sequence[TableRow]) -> list[TableRow]:
    """Leave out breakdowns that put all activations into one group."""
    parts: dict[str, set[str]] = {}
    for row in groups:
        parts.setdefault(row["breakdown"], set()).add(row["part"])
    return [row for row in groups if len(parts[row["breakdown"]]) > 1]


def _overall(groups: Sequence[TableRow]) -> list[TableRow]:
    """Return the rows with a named baseline, overall or own; runs of earlier versions have a single one that is neither."""
    return [row for row in groups if row["against"] is not None]


def _try(make: Callable[[], Any]) -> Any:
    """Return a chart, or None if there is no data for it."""
    try:
        return make()
    except RequestError:
        return None


def _varies(curves: pa.Table, name: str) -> bool:
    return len(set(curves[name].to_pylist()) - {None}) > 1


def _costs(curves: pa.Table) -> bool:
    """Return whether cells differ in tokens per draw, so that a chart by tokens differs from one by K."""
    ends = [row["tokens"] / row["k"] for row in curves.to_pylist() if row["tokens"]]
    return len(ends) == len(curves) and max(ends) > 1.05 * min(ends)


def _near(facts: ReportData, few: set[str]) -> list[TableRow]:
    return [row for row in facts.differences if {row["label"], row["other_label"]} <= few]


def _reference(facts: ReportData, best: Sequence[str]) -> str | None:
    """Return the label of the best cell with several K, from which differences are shown."""
    labels = facts.curves["label"].to_pylist()
    compared = {row["label"] for row in facts.differences}
    return next((label for label in best[:MOST_SHOWN] if labels.count(label) > 1 and label in compared), None)


def curve_table(facts: ReportData) -> tuple[list[str], list[list[str]], str | list[list[str]]]:
    """Return heads and rows, a row per cell: FVE with interval at some K, the control at the largest, failures; and N, documents
    and baseline, as text if all cells share them, else a row per cell."""
    rows = facts.curves.to_pylist()
    every = sorted({r["k"] for r in rows})
    ks = [k for k in every if k in SHOWN_KS or k == every[-1]]
    heads = ["cell", *(f"K = {k}" for k in ks), f"shuffled, K = {every[-1]}", "failed draws"]
    body, about = [], []
    for run in facts.runs:
        points_by_k = {r["k"]: r for r in rows if r["run_id"] == run["run_id"]}
        last = points_by_k[max(points_by_k)]
        points = [with_interval(points_by_k[k]) if k in points_by_k else "" for k in ks]
        body.append([run["label"], *points, number(last["shuffled_fve"]), number(run["failure_rate"], ".1%")])
        about.append([run["label"], *_measured_on(last)])
    n, documents, baseline = about[0][1:]
    same = all(row[1:] == about[0][1:] for row in about)
    parts = [f"N = {n} activations", f"{documents} documents" if documents else "", f"baseline {baseline}" if baseline else ""]
    return *_without_empty(heads, body), ", ".join(filter(None, parts)) if same else about


def _measured_on(row: TableRow) -> list[str]:
    """Return N, the number of documents and the baseline as text."""
    baseline = "" if row["baseline"] is None else baseline_text(row).removeprefix("baseline ")
    documents = f"{number(row['num_documents'], ',')}{effective_text(row['num_documents'], row['effective_documents'])}"
    return [number(row["num_activations"], ","), documents, baseline]


def _without_empty(heads: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Leave out columns that are empty for all cells."""
    kept = [i for i in range(len(heads)) if any(row[i] for row in rows)]
    return [heads[i] for i in kept], [[row[i] for i in kept] for row in rows]


def difference_table(facts: ReportData) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows, a row per cell: its paired difference from the best cell at K = 1 and the largest common K."""
    most = largest_common_k(facts.curves)
    ks = sorted({1, most})
    best = ranked(facts, most)[0]
    body = []
    for run in facts.runs:
        differences = [None if run["run_id"] == best["run_id"] else difference(facts, run, best, k) for k in ks]
        if any(differences):
            body.append([run["label"], *(cell for row in differences for cell in _difference_cells(row))])
    return ["cell", *(head for k in ks for head in (f"K = {k}", "clear"))], body


def _difference_cells(row: TableRow | None) -> list[str]:
    if row is None or row["difference_low"] is None:
        return ["", ""]
    low, high = row["difference_low"], row["difference_high"]
    interval = interval_text(row, "difference_low", "difference_high", sign="+")
    return [f"{row['difference']:+.3f} {interval}", "yes" if low > 0 or high < 0 else "no"]


def control_table(facts: ReportData) -> tuple[list[str], list[list[str]], dict[str, str]]:
    """Return heads and rows, a row per cell and a column per control; and a note on each control."""
    names = sorted({row["control"] for row in facts.controls})
    values = {(row["label"], row["control"]): row["value"] for row in facts.controls}
    labels = list(dict.fromkeys(row["label"] for row in facts.controls))
    notes_of = {name: {row["note"] for row in facts.controls if row["control"] == name} for name in names}
    common_notes = {name: (next(iter(notes)) if len(notes) == 1 else OWN_NOTES.get(name)) for name, notes in notes_of.items()}
    notes = {name: note for name, note in common_notes.items() if note}
    return ["cell", *names], [[label, *(number(values.get((label, n))) for n in names)] for label in labels], notes


def explanation_table(rows: Sequence[TableRow]) -> str:
    """Return the HTML of a table to search and sort in the browser, with explanations coloured by the variance they explain."""
    from itables import to_html_datatable

    columns: dict[str, list[Any]] = {
        "cell": [html.escape(r["label"]) for r in rows],
        "draw": [r["which"] for r in rows],
        "explained": [_explained(r) for r in rows],
        "text up to the activation": [html.escape(r["context"] or "") + '<b class="here">▮</b>' for r in rows],
        "explanation": [_coloured(r) for r in rows],
        "error": [None if r["error"] is None else round(r["error"], 4) for r in rows],
        "where": [_where(r) for r in rows],
    }
    table = pa.table(columns)
    return str(
        to_html_datatable(
            table, connected=False, allow_html=True, table_id="explanations", maxBytes=0, maxRows=0, classes="display compact",
            column_filters="header", pageLength=15, lengthMenu=[15, 50, 200], autoWidth=False, showIndex=False,
            order=[], style="width:100%;max-width:100%", columnDefs=WIDTHS,
        )
    )  # fmt: skip


def _where(row: TableRow) -> str:
    """Return document, token and activation as text, as far as they are known."""
    parts = [] if row["document"] is None else [html.escape(row["document"])]
    parts += [] if row["position"] is None else [f"token {row['position']}"]
    return ", ".join([*parts, f"activation {row['activation']}"])


def _explained(row: TableRow) -> float | None:
    """Return 1 - error / baseline of a draw; None for a failed draw."""
    return None if row["error"] is None or not row["baseline"] else round(1 - row["error"] / row["baseline"], 3)


def _coloured(row: TableRow) -> str:
    text = html.escape(row["explanation"] or "")
    share = _explained(row)
    if share is None:
        return f'<span class="failed" title="{html.escape(row["parse"])}">{text}</span>'
    red, green, blue = GOOD if share >= 0 else BAD
    strength = min(1.0, abs(share)) * 0.4
    return f'<span class="said" style="background: rgba({red}, {green}, {blue}, {strength:.2f})">{text}</span>'


def number(value: float | None, form: str = ".3f") -> str:
    """Return a number as text; empty if it is unknown."""
    return "" if value is None else format(value, form)


def duration(seconds: float) -> str:
    """Return seconds as human-readable text."""
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def words(value: Any) -> str:
    """Return a setting as text."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(words, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _of_runs(runs: Iterable[TableRow], column: str) -> dict[str, str]:
    """Return name -> value of a column of maps over all runs; several values where runs differ."""
    values: dict[str, set[str]] = {}
    for run in runs:
        for name, version in dict(run[column] or {}).items():
            if version is not None:  # not installed there
                values.setdefault(name, set()).add(version)
    return {name: ", ".join(sorted(versions)) for name, versions in sorted(values.items())}


@cache
def _chart_scripts() -> str:
    """Return Vega, Vega-Lite and Vega-Embed, as bundled with vl-convert."""
    import vl_convert

    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")).replace("</script", "<\\/script")


@cache
def _table_scripts() -> str:
    """Return DataTables, as bundled with itables."""
    from itables.javascript import generate_init_offline_itables_html

    bundle = resources.files("itables") / "html" / "dt_bundle.js"
    return str(generate_init_offline_itables_html(str(bundle)))
