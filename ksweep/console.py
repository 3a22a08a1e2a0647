"""Standard output, and numbers as people read them. Light: every command starts with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPE_WIDTH = 100_000
USUAL_REPLICATES = 2000
"""Bootstrap replicates of rows that do not say how many: the default of scoring.num_replicates."""


def console() -> Console:
    """Standard output, text taken as it is (no markup, no emoji codes); in a pipe no colour and nothing cut."""
    from rich.console import Console

    plain = Console(markup=False, emoji=False, highlight=False)
    return plain if plain.is_terminal else Console(markup=False, emoji=False, highlight=False, width=PIPE_WIDTH, no_color=True)


def columns(out: Console, **on_a_terminal: Any) -> Table:
    """A table to be filled; in a pipe, where people grep and cut, without its borders: columns two blanks apart."""
    from rich.table import Table

    if out.is_terminal:
        return Table(**on_a_terminal)
    kept = {name: value for name, value in on_a_terminal.items() if name in ("title", "title_justify", "show_header")}
    return Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, **kept)


def bytes_text(count: int) -> str:
    """A number of bytes as people read it."""
    if count < 1000:
        return f"{count} B"
    power = min(4, int(math.log10(count) // 3))
    return f"{count / 1000**power:.1f} {['B', 'kB', 'MB', 'GB', 'TB'][power]}"


def duration_text(value: float | None) -> str:
    """A length of time as people read it."""
    if value is None:
        return "unknown"
    return f"{value:.0f} s" if value < 120 else f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def ago_text(seconds: float) -> str:
    """How long ago something was, in at most four characters: 40s, 12m, 5h, 3d."""
    for size, name, most in ((1, "s", 120), (60, "m", 7200), (3600, "h", 172_800)):
        if seconds < most:
            return f"{max(0.0, seconds) / size:.0f}{name}"
    return f"{seconds / 86_400:.0f}d"


def interval_text(row: Mapping[str, Any], low: str = "fve_low", high: str = "fve_high", *, sign: str = "") -> str:
    """ "[0.48, 0.57]": an interval with the decimals that hold; empty where it is not known."""
    if row.get(low) is None or row.get(high) is None:
        return ""
    form = f"{sign}z.{decimals_of_interval(row, low, high)}f"  # z: no -0.00
    return f"[{row[low]:{form}}, {row[high]:{form}}]"


def decimals_of_interval(row: Mapping[str, Any], low: str = "fve_low", high: str = "fve_high") -> int:
    """Decimals that hold for the ends of an interval: another seed of the bootstrap changes the last one by at most one."""
    from ksweep.stats.bootstrap import interval_decimals

    return interval_decimals(row[low], row[high], row.get("num_replicates") or USUAL_REPLICATES, row.get("level") or 0.95)


def effective_text(num_documents: int | None, effective_documents: float | None) -> str:
    """ " (26.3 effective)" behind a number of documents of uneven sizes; nothing where sizes are equal or it is not known."""
    if num_documents is None or effective_documents is None or f"{effective_documents:.1f}" == f"{num_documents:.1f}":
        return ""
    return f" ({effective_documents:.1f} effective)"


def baseline_text(row: Mapping[str, Any]) -> str:
    """ "baseline 0.4420 (between documents; distance from mean: 0.4359)": its kind, and the public code's where it is another."""
    kind, from_mean = row["baseline_kind"], row.get("baseline_from_mean")
    also = "" if from_mean is None or kind == "distance from mean" else f"; distance from mean: {from_mean:.4f}"
    return f"baseline {row['baseline']:.4f} ({kind}{also})"
