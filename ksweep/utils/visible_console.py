"""rich's console for text from elsewhere: neither markup nor control characters in it have an effect."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from ksweep.utils.text import visible


class VisibleConsole(Console):
    """A console without markup, emoji codes and highlighting, which shows control characters as text."""

    def __init__(self, **options: Any) -> None:
        """Take rich's options."""
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a text before it is laid out, so that columns are wide enough."""
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield what is written; a `Text` has passed by `render_str`."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))
