"""What a sweep says on the terminal: the plan before, the table and the places of the pictures after."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ksweep.keys import Keys
from ksweep.launch.plan import Step
from ksweep.registry.database import DATABASE
from ksweep.registry.questions import controls_of, curves_of
from ksweep.spec import Sweep
from ksweep.stats.bootstrap import FEW_DOCUMENTS

if TYPE_CHECKING:
    import pyarrow as pa

SHOWN_KS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
FAILURES_TO_MENTION = 0.2
CUT_OFF_TO_MENTION = 0.1
DISTINCT_TO_MENTION = 0.2
CJK_TO_MENTION = 0.5
WIDE_COLUMNS = 110
"""Narrower terminals leave out failures and speed."""
PIPE_WIDTH = 100_000
LABEL_COLUMN = 24
"""Labels longer than this are folded where the width is short."""
COLUMN = 19
"""Characters that one K takes: "[-0.123, -0.123]" and its border."""


def console() -> Console:
    """Standard output, text taken as it is (no markup, no emoji codes); in a pipe no colour and nothing cut."""
    plain = Console(markup=False, emoji=False, highlight=False)
    return plain if plain.is_terminal else Console(markup=False, emoji=False, highlight=False, width=PIPE_WIDTH, no_color=True)


def print_plan(sweep: Sweep, steps: Sequence[Step], shape: str = "") -> None:
    """Each cell: its state and why, draws to sample, estimated disk and time; then the shape of a job and the sums."""
    out = console()
    table = Table(
        title=f"{sweep.name}: {sum(s.state == 'missing' for s in steps)} of {len(steps)} cells to run", title_justify="left"
    )
    for name in ("cell", "state", "why"):
        table.add_column(name)
    for name in ("activations", "draws", "disk", "time"):
        table.add_column(name, justify="right")
    for step in steps:
        table.add_row(
            f"{step.label} @{step.cell_key[:8]}", step.state, step.reason, f"{step.activations_to_extract:,}",
            f"{step.draws_to_sample:,}", bytes_text(step.draw_bytes + step.activation_bytes), _seconds(step.seconds),
        )  # fmt: skip
    out.print(table)
    seconds = [s.seconds for s in steps]
    total = sum(s for s in seconds if s is not None) if None not in seconds else None
    activations, draws = sum(s.activation_bytes for s in steps), sum(s.draw_bytes for s in steps)
    out.print(
        f"to extract: {sum(s.activations_to_extract for s in steps):,} activations; "
        f"to sample: {sum(s.draws_to_sample for s in steps):,} draws; "
        f"disk about {bytes_text(activations + draws)} ({bytes_text(activations)} activations, {bytes_text(draws)} draws); "
        f"time {_seconds(total)} on one rank"
        + (" (no earlier run of this pair to estimate it from)" if total is None else _gpu_hours(sweep, total))
    )
    if shape:
        out.print(f"a job: {shape}", soft_wrap=True)


def _gpu_hours(sweep: Sweep, seconds: float) -> str:
    hours = "" if sweep.resources.gpus == 0 else f", {seconds / 3600:.2f} GPU-hours"
    return f"{hours} (from the newest run of this pair)"


def say_failed(steps: Sequence[Step]) -> None:
    """Cells that failed and are not run again unasked."""
    for step in steps:
        print(f"failed: {step.label} @{step.cell_key[:8]}: {step.reason}", file=sys.stderr)


def say_submitted(sweep: Sweep, steps: Sequence[Step], submitted: int, attached: int) -> None:
    """What was handed to Slurm, what is there already, and how to see more of it."""
    counts = Counter(step.state for step in steps)
    counted = ", ".join(
        f"{counts[state]} {state}" for state in ("done", "running", "waiting", "missing", "failed") if counts[state]
    )
    print(f"{sweep.name}: {len(steps)} cells ({counted}); submitted {submitted} jobs, {attached} were there already")
    print(
        f"they need this command no longer: `ksweep watch {sweep.name}` shows them, "
        "the same command shows results once they are there"
    )


def show(sweep: Sweep, keys: Sequence[Keys], *, computed: int, charts: bool) -> None:
    """Bring the database up to date, print the table, write the pictures."""
    registry = Path(sweep.registry)
    labels = dict(zip([k.cell for k in keys], sweep.labels(), strict=True))
    table = curves_of(registry, labels)
    out = console()
    out.print(results_table(sweep, table, out.width))
    for line in _footnotes(table):
        out.print(line)
    out.print(_controls_line(controls_of(registry, labels)))
    for line in warnings(table):
        out.print(f"warning: {line}")
    if charts:
        for path in write_charts(sweep, table, registry / "charts" / sweep.name):
            out.print(f"chart: {path}", soft_wrap=True)
    out.print(f"computed {computed} of {len(keys)} cells; registry: {registry / DATABASE}", soft_wrap=True)


def results_table(sweep: Sweep, curves: pa.Table, width: int = 160) -> Table:
    """A row a cell: FVE with its interval at as many K as the width has room for, the control, failures."""
    rows = curves.to_pylist()
    ks = sorted({r["k"] for r in rows})
    label_width = max(len(r["label"]) for r in rows)
    wide = width >= WIDE_COLUMNS
    beside = 16 + (24 if wide else 0)  # the control; failures and speed
    most = max(2, (width - min(label_width, LABEL_COLUMN) - 4 - beside) // COLUMN)
    shown = _spread([k for k in ks if k in SHOWN_KS or k == ks[-1]], most)
    table = Table(title=f"{sweep.name}: FVE, best of K draws (oracle selection by the AR)", title_justify="left", show_lines=True)
    table.add_column("cell", overflow="fold")
    for k in shown:
        table.add_column(f"K={k}", justify="right", no_wrap=True)
    for name in (f"shuffled\nK={ks[-1]}", "failed", "tokens/s")[: 3 if wide else 1]:
        table.add_column(name, justify="right", no_wrap=True)
    for label in dict.fromkeys(r["label"] for r in rows):
        mine = {r["k"]: r for r in rows if r["label"] == label}
        last = mine[max(mine)]
        beside_it = [
            _number(last["shuffled_fve"], ".3f"),
            _number(last["failure_rate"], ".1%"),
            _number(last["tokens_per_second"], ",.0f"),
        ]
        table.add_row(Text(label), *(_fve(mine.get(k)) for k in shown), *beside_it[: 3 if wide else 1])
    return table


def _spread(values: list[int], most: int) -> list[int]:
    """At most so many of the values, the first and the last among them."""
    if len(values) <= most:
        return values
    if most < 2:
        return values[-1:]
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def write_charts(sweep: Sweep, curves: pa.Table, folder: Path) -> list[Path]:
    """FVE by K, and by temperature where that varies; HTML, PNG and PDF."""
    from ksweep import charts

    written = charts.save(charts.fve_by_k(curves, title=sweep.question or sweep.name), folder / "fve_by_k")
    if len(set(curves["temperature"].to_pylist())) > 1:
        written += charts.save(charts.fve_by_temperature(curves), folder / "fve_by_temperature")
    return written


def _footnotes(curves: pa.Table) -> list[str]:
    """Baseline, its kind and N stand beside every FVE: one line for each set of cells that share them."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for row in {r["label"]: r for r in curves.to_pylist()}.values():
        facts = tuple(row[name] for name in ("level", "num_documents", "num_activations", "baseline", "baseline_kind"))
        groups.setdefault(facts, []).append(row["label"])
    lines = []
    for (level, documents, activations, baseline, kind), labels in groups.items():
        which = "" if len(groups) == 1 else f"{', '.join(labels)}: "
        lines.append(
            f"{which}{level:.0%} intervals: bootstrap over {documents} documents; N = {activations} activations; "
            f"baseline {baseline:.4f} ({kind}); shuffled: draws of another activation"
        )
    return lines


def warnings(curves: pa.Table) -> list[str]:
    """What a reader of the numbers should know before believing them, a line each."""
    lines = []
    for row in {r["label"]: r for r in curves.to_pylist()}.values():
        label = row["label"]
        if row["failure_rate"] > FAILURES_TO_MENTION:
            lines.append(f"{label}: {row['failure_rate']:.0%} of the draws failed; a failed draw uses up one of the K")
        if (row["cut_off_rate"] or 0) > CUT_OFF_TO_MENTION:
            cut_off = f"{row['cut_off_rate']:.0%}"
            lines.append(f"{label}: {cut_off} of the draws ran into max_new_tokens: raise sampling.max_new_tokens")
        if row["num_draws"] > 1 and row["distinct_text_fraction"] < DISTINCT_TO_MENTION:
            lines.append(f"{label}: only {row['distinct_text_fraction']:.0%} of the texts are distinct: more draws bring little")
        if (row["cjk_fraction"] or 0) > CJK_TO_MENTION:
            lines.append(f"{label}: most explanations are Chinese or Japanese text, as when an injection does not reach the AV")
        if row["num_documents"] < FEW_DOCUMENTS:
            lines.append(f"{label}: {row['num_documents']} documents are few for a bootstrap over documents; intervals are rough")
    return lines


def _controls_line(controls: pa.Table) -> str:
    """Controls that do not depend on K, each once where all cells share it, else as a range."""
    values: dict[str, list[float]] = {}
    for row in controls.to_pylist():
        values.setdefault(row["control"], []).append(row["value"])
    spans = {name: (min(v), max(v)) for name, v in values.items()}
    words = [f"{name} {a:.3f}" if round(a, 3) == round(b, 3) else f"{name} {a:.3f} to {b:.3f}" for name, (a, b) in spans.items()]
    return "controls: " + ", ".join(words)


def _fve(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["fve_low"] is None:
        return f"{row['fve']:.3f}"
    return f"{row['fve']:.3f}\n[{row['fve_low']:.3f}, {row['fve_high']:.3f}]"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def bytes_text(count: int) -> str:
    """A number of bytes as people read it."""
    if count < 1000:
        return f"{count} B"
    power = min(4, int(math.log10(count) // 3))
    return f"{count / 1000**power:.1f} {['B', 'kB', 'MB', 'GB', 'TB'][power]}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:.0f} s" if value < 120 else f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"
