"""Keep the date in a chat template fixed: some write that of the day on which they are rendered."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

from ksweep.utils.errors import CheckpointError

TEMPLATE_DATE = date(2024, 7, 26)
"""What a template that writes today's date gets: the default of Llama 3.1. Otherwise vectors would differ from day to day."""

CALL = re.compile(
    r"""\bstrftime_now(?P<space>\s*)\(\s*(?P<quote>['"])(?P<form>(?:\\.|(?!(?P=quote)).)*)(?P=quote)\s*\)""", re.DOTALL
)


def dated(template: str, directory: Path) -> str:
    """Return the template with TEMPLATE_DATE in place of today's date.

    Raises:
        CheckpointError: the date is written other than by a call with its format. transformers hands no function of ours to a
            template, so such a one cannot be kept from today's date.
    """
    fixed = CALL.sub(lambda call: repr(TEMPLATE_DATE.strftime(_as_jinja_reads(call["form"]))), template)
    # A template may ask whether there is a date, and mention it in a comment.
    if re.search(r"\bstrftime_now\b(?!\s+is\s+(?:not\s+)?defined\b)", re.sub(r"\{#.*?#\}", "", fixed, flags=re.DOTALL)):
        raise CheckpointError(
            f"the chat template of {directory} writes today's date in a way that cannot be fixed (strftime_now), so the same "
            "request would give other vectors tomorrow: render the conversations to a column of text"
        )
    return fixed


def was_misdated(template: str) -> bool:
    """Return whether earlier versions left the date in a template as it was, or took escapes in its format for letters."""
    return any(call["space"] or "\\" in call["form"] for call in CALL.finditer(template))


def _as_jinja_reads(literal: str) -> str:
    """Return the text that a literal of a template stands for (`Lexer.wrap` of Jinja)."""
    return literal.encode("ascii", "backslashreplace").decode("unicode-escape", "replace")
