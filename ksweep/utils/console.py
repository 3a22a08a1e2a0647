"""Standard output, and numbers as people read them. Light: every command starts with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    pass

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPE_WIDTH = 100_000


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


WIDE_COLUMNS = 110
"""Narrower terminals leave out failures and speed."""
