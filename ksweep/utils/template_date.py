"""Keep the date in a chat template fixed: some write that of the day on which they are rendered."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

from ksweep.utils.errors import CheckpointError

TEMPLATE_DATE = date(2024, 7, 26)
"""What a template that writes today's date gets: the default of Llama 3.1. Otherwise vectors would differ from day to day."""


def dated(template: str, directory: Path) -> str:
    """Return the template with TEMPLATE_DATE in place of today's date.

    Raises:
        CheckpointError: the format of the date is not a literal.
    """
    calls = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
    template = calls.sub(lambda call: repr(TEMPLATE_DATE.strftime(call[2])), template)
    if "strftime_now(" in template:
        raise CheckpointError(
            f"the chat template of {directory} writes today's date in a way that cannot be fixed (strftime_now), so the same "
            "request would give other vectors tomorrow: render the conversations to a column of text"
        )
    return template
