"""Standard output and standard error, and human-readable numbers. Light to import: every command starts with it.

What is printed comes from elsewhere too: documents, explanations, names, messages, logs. `say`, `remark`, `console` and
`VisibleFormatter` show control characters as text such as `\\x1b`, so that none of them steers the terminal. JSON and CSV go
through `say_exactly`.
"""

from __future__ import annotations

import io
import logging
import math
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from ksweep.utils.text import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPE_WIDTH = 100_000

_captured: ContextVar[io.StringIO | None] = ContextVar("captured", default=None)


def say(text: object, end: str = "\n") -> None:
    """Print to standard output, with control characters visible."""
    print(visible(str(text)), end=end, flush=True)  # noqa: T201


def remark(text: object) -> None:
    """Print to standard error, with control characters visible."""
    print(visible(str(text)), file=sys.stderr, flush=True)  # noqa: T201


def say_exactly(text: str) -> None:
    """Print a line for programs, such as JSON, to standard output as it is."""
    print(text, flush=True)  # noqa: T201


class VisibleFormatter(logging.Formatter):
    """Formats log records with control characters visible."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        return visible(super().format(record))


def console(*, stderr: bool = False) -> Console:
    """Return standard output (or error) for unmodified text (no markup, no emoji codes) with control characters visible.

    In a pipe it has no colour and breaks no lines.
    """
    from ksweep.utils.visible_console import VisibleConsole

    if (file := _captured.get()) is not None:
        # In a notebook rich would show its output below the cell instead of writing it.
        return VisibleConsole(width=PIPE_WIDTH, no_color=True, file=file, force_jupyter=False, force_terminal=False)
    plain = VisibleConsole(stderr=stderr)
    return plain if plain.is_terminal else VisibleConsole(stderr=stderr, width=PIPE_WIDTH, no_color=True)


def columns(out: Console, **on_a_terminal: Any) -> Table:
    """Return an empty table. In a pipe, for grep and cut, it has no borders: columns are two spaces apart."""
    from rich.table import Table

    if out.is_terminal:
        return Table(**on_a_terminal)
    kept = {name: value for name, value in on_a_terminal.items() if name in ("title", "title_justify", "show_header")}
    return Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, **kept)


def printed_text(show: Callable[[], object]) -> str:
    """Return what a function prints to `console()`, as text without colour."""
    text = io.StringIO()
    token = _captured.set(text)
    try:
        show()
    finally:
        _captured.reset(token)
    return text.getvalue().rstrip("\n")


def bytes_text(count: int) -> str:
    """Return a number of bytes with a unit: "1.2 GB"."""
    if count < 1000:
        return f"{count} B"
    power = min(4, int(math.log10(count) // 3))
    return f"{count / 1000**power:.1f} {['B', 'kB', 'MB', 'GB', 'TB'][power]}"


def duration_text(value: float | None) -> str:
    """Return a duration with a unit: "90 s", "12 min", "3.5 h"."""
    if value is None:
        return "unknown"
    return f"{value:.0f} s" if value < 120 else f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def ago_text(seconds: float) -> str:
    """Return an age in at most four characters: 40s, 12m, 5h, 3d."""
    for size, name, most in ((1, "s", 120), (60, "m", 7200), (3600, "h", 172_800)):
        if seconds < most:
            return f"{max(0.0, seconds) / size:.0f}{name}"
    return f"{seconds / 86_400:.0f}d"


WIDE_COLUMNS = 110
"""Terminal width below which tables leave out failures and speed."""
