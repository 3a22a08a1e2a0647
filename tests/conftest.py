"""Options, time limits and the place of temporary files of all tests."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

MEMORY_DISK, ENOUGH_BYTES = Path("/dev/shm"), 4 << 30

# Beside other work an example may take any time.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `make quick` run a few cases of every parametrised test."""
    parser.addoption("--cases", type=int, metavar="N", help="of every parametrised test run at most N >= 2 cases, spread evenly")


def pytest_configure(config: pytest.Config) -> None:
    """Keep temporary files in memory where there is room: tests flush thousands of small files, each 7 ms on a disk."""
    if MEMORY_DISK.is_dir() and os.access(MEMORY_DISK, os.W_OK) and shutil.disk_usage(MEMORY_DISK).free > ENOUGH_BYTES:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY_DISK))


@pytest.hookimpl(trylast=True)  # of the cases that -m and -k have left
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep at most N cases of a test under `--cases N`: the first, the last, and those evenly between; the same in every run."""
    limit = config.getoption("--cases")
    if limit is None:
        return
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    kept = {
        same[i * (len(same) - 1) // (limit - 1)] if len(same) > limit else same[i]
        for same in cases.values()
        for i in range(min(limit, len(same)))
    }
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture
def forked_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork each Python that the test starts, instead of importing torch and transformers in each anew."""
    from tests.forked import forks_python

    forks_python(monkeypatch)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which tests `-m "not ..."` leaves out, and why they are marked."""
    for line in config.getini("markers"):
        marker, _, reason = line.partition(": ")
        if f"not {marker}" in config.option.markexpr:
            terminalreporter.write_line(f"left out: {marker} ({reason})")
    if (limit := config.getoption("--cases")) is not None:
        terminalreporter.write_line(f"left out: of parametrised tests all but {limit} cases (--cases)")
