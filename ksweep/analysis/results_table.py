"""The output of a sweep's command once its cells are computed: a table of FVE by K, footnotes, warnings, charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ksweep.config.sweep import Sweep
from ksweep.registry.database import DATABASE
from ksweep.registry.query import controls_of, curves_of
from ksweep.stats.bootstrap import FEW_DOCUMENTS
from ksweep.stats.interval_text import baseline_text, effective_text, interval_text
from ksweep.utils.console import WIDE_COLUMNS, columns, console, remark
from ksweep.utils.errors import RunError
from ksweep.utils.text import visible

if TYPE_CHECKING:
    import pyarrow as pa

SHOWN_KS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
FAILURES_TO_MENTION = 0.2
CUT_OFF_TO_MENTION = 0.1
DISTINCT_TO_MENTION = 0.2
CJK_TO_MENTION = 0.5
LABEL_COLUMN = 24
"""Longer labels are folded in a narrow terminal."""
CHARACTERS_PER_K = 19
"""Width of one column: "[-0.123, -0.123]" and its border."""


def print_results(sweep: Sweep, cell_keys: Sequence[str], *, computed: int, charts: bool) -> None:
    """Print the table of results with its footnotes and warnings, and write the charts."""
    registry = Path(sweep.registry)
    labels = dict(zip(cell_keys, sweep.labels(), strict=True))
    table = print_curves(sweep.name, registry, labels)
    out = console()
    if charts:
        try:
            for path in write_charts(sweep, table, registry / "charts" / sweep.name):
                out.print(f"chart: {path}", soft_wrap=True)
        except RunError as error:  # a finished sweep of somebody else
            remark(f"{error}, as `ksweep plot {sweep.name} -o PATH` does")
    out.print(f"computed {computed} of {len(cell_keys)} cells; registry: {registry / DATABASE}", soft_wrap=True)


def print_curves(name: str, registry: Path, labels: Mapping[str, str]) -> pa.Table:
    """Print the curves of cells (cell key -> label) with footnotes, controls and warnings, and return them."""
    table, out = curves_of(registry, labels), console()
    out.print(results_table(name, table, out))
    for line in _footnotes(table):
        out.print(line)
    out.print(_controls_line(controls_of(registry, labels)))
    for line in warnings(table):
        out.print(f"warning: {line}")
    for line in noted(table.to_pylist()):
        out.print(f"note on {line}")
    return table


def results_table(name: str, curves: pa.Table, out: Console) -> Table:
    """Return a table with a row per cell: FVE and interval at as many K as fit, the shuffled control, failures, speed."""
    rows, width = curves.to_pylist(), out.width
    ks = sorted({r["k"] for r in rows})
    label_width = max(len(visible(r["label"])) for r in rows)
    wide = width >= WIDE_COLUMNS
    beside = 16 + (24 if wide else 0)  # the control; failures and speed
    most = max(2, (width - min(label_width, LABEL_COLUMN) - 4 - beside) // CHARACTERS_PER_K)
    shown = _spread([k for k in ks if k in SHOWN_KS or k == ks[-1]], most)
    title = f"{name}: FVE, best of K draws (oracle selection by the AR)"
    table = columns(out, title=title, title_justify="left", show_lines=True)
    table.add_column("cell", overflow="fold")
    for k in shown:
        table.add_column(f"K={k}", justify="right", no_wrap=True)
    for name in (f"shuffled{chr(10) if out.is_terminal else ' '}K={ks[-1]}", "failed", "tokens/s")[: 3 if wide else 1]:
        table.add_column(name, justify="right", no_wrap=True)
    for label in dict.fromkeys(r["label"] for r in rows):
        by_k = {r["k"]: r for r in rows if r["label"] == label}
        last = by_k[max(by_k)]
        beside_it = [
            _number(last["shuffled_fve"], ".3f"),
            _number(last["failure_rate"], ".1%"),
            _number(last["tokens_per_second"], ",.0f"),
        ]
        table.add_row(Text(visible(label)), *(_fve(by_k.get(k)) for k in shown), *beside_it[: 3 if wide else 1])
    return table


def _spread(values: list[int], most: int) -> list[int]:
    """Return at most `most` of the values, evenly spaced, with the first and the last."""
    if len(values) <= most:
        return values
    if most < 2:
        return values[-1:]
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def write_charts(sweep: Sweep, curves: pa.Table, folder: Path) -> list[Path]:
    """Write charts of FVE by K, and by temperature and step where these vary, as HTML, PNG and PDF; return their paths."""
    from ksweep.analysis import charts

    written = charts.save(charts.fve_by_k(curves, title=sweep.question or sweep.name), folder / "fve_by_k")
    if len(set(curves["temperature"].to_pylist())) > 1:
        written += charts.save(charts.fve_by_temperature(curves), folder / "fve_by_temperature")
    if len(set(curves["step"].to_pylist()) - {None}) > 1:
        written += charts.save(charts.fve_by_step(curves), folder / "fve_by_step")
    return written


def _footnotes(curves: pa.Table) -> list[str]:
    """Return lines with baseline, its kind, N and documents, one for each set of cells that share them."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for row in {r["label"]: r for r in curves.to_pylist()}.values():
        names = ("level", "num_documents", "effective_documents", "num_activations")
        facts = (*(row[name] for name in names), baseline_text(row))
        groups.setdefault(facts, []).append(row["label"])
    lines = []
    for (level, documents, effective, activations, baseline), labels in groups.items():
        which = "" if len(groups) == 1 else f"{', '.join(labels)}: "
        lines.append(
            f"{which}{level:.0%} intervals: bootstrap over {documents} documents{effective_text(documents, effective)}; "
            f"N = {activations} activations; {baseline}; shuffled: draws of another activation"
        )
    return lines


def warnings(curves: pa.Table) -> list[str]:
    """Return warnings on the reliability of the numbers, a line each: failures, cut-off texts, repeated texts, few documents."""
    lines = []
    for row in {r["label"]: r for r in curves.to_pylist()}.values():
        label = row["label"]
        if (row["failure_rate"] or 0) > FAILURES_TO_MENTION:
            lines.append(f"{label}: {row['failure_rate']:.0%} of the draws failed; a failed draw uses up one of the K")
        if (row["cut_off_rate"] or 0) > CUT_OFF_TO_MENTION:
            cut_off = f"{row['cut_off_rate']:.0%}"
            lines.append(f"{label}: {cut_off} of the draws ran into max_new_tokens: raise sampling.max_new_tokens")
        if (row["num_draws"] or 0) > 1 and (row["distinct_text_fraction"] or 1) < DISTINCT_TO_MENTION:
            lines.append(f"{label}: only {row['distinct_text_fraction']:.0%} of the texts are distinct: more draws bring little")
        if (row["cjk_fraction"] or 0) > CJK_TO_MENTION:
            lines.append(f"{label}: most explanations are Chinese or Japanese text, as when an injection does not reach the AV")
        effective = row["effective_documents"] or row["num_documents"]
        if effective is not None and effective < FEW_DOCUMENTS:
            lines.append(
                f"{label}: {row['num_documents']} documents{effective_text(row['num_documents'], effective)} are few for a "
                f"bootstrap over documents: with fewer than {FEW_DOCUMENTS} effective documents, intervals may cover less than "
                "their nominal level"
            )
    return lines


def noted(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return each note of the runs once, with its subject, and the labels of its runs unless all have it."""
    labels_with: dict[tuple[str, str], list[str]] = {}
    labels = dict.fromkeys(row["label"] for row in rows)
    for row in {row["label"]: row for row in rows}.values():
        for note in row.get("notes") or ():
            labels_with.setdefault((note["about"], note["text"]), []).append(row["label"])
    return [
        f"{about}: {text}" if len(noted_runs) == len(labels) else f"{about} ({', '.join(noted_runs)}): {text}"
        for (about, text), noted_runs in labels_with.items()
    ]


def _controls_line(controls: pa.Table) -> str:
    """Return a line of the controls that do not depend on K: a value if all cells share it, else a range."""
    values: dict[str, list[float]] = {}
    for row in controls.to_pylist():
        values.setdefault(row["control"], []).append(row["value"])
    spans = {name: (min(v), max(v)) for name, v in values.items()}
    words = [f"{name} {a:.3f}" if round(a, 3) == round(b, 3) else f"{name} {a:.3f} to {b:.3f}" for name, (a, b) in spans.items()]
    return "controls: " + ", ".join(words)


def _fve(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['fve']:.3f}\n{interval_text(row)}".rstrip()


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
