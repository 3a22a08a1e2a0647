"""Property tests have no time limit for an example: beside other work one may take any time."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which tests `-m "not ..."` leaves out, and why they are marked."""
    for line in config.getini("markers"):
        marker, _, reason = line.partition(": ")
        if f"not {marker}" in config.option.markexpr:
            terminalreporter.write_line(f"left out: {marker} ({reason})")
