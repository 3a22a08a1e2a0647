"""Options, time limits and the place of temporary files of all tests."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

LEFT_OUT = pytest.StashKey[int]()
"""Number of cases that the marker `heavy` left out."""
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
    """Keep some cases of a test, the first, the last and those evenly between, the same in every run: N under `--cases N`, and of
    a test marked `heavy(N)` N unless KSWEEP_TRIALS asks for all.
    """
    limit, asked_for_all = config.getoption("--cases"), "KSWEEP_TRIALS" in os.environ
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    kept: set[pytest.Item] = set()
    for same in cases.values():
        marker = same[0].get_closest_marker("heavy")
        most = [limit or len(same), len(same) if marker is None or asked_for_all else marker.args[0]]
        kept |= set(_spread(same, min(most)))
    config.stash[LEFT_OUT] = len(items) - len(kept) if limit is None else 0
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def _spread(items: Sequence[pytest.Item], most: int) -> list[pytest.Item]:
    """Return at most `most` items, the first and the last among them if there are two."""
    if len(items) <= most:
        return list(items)
    return [items[i * (len(items) - 1) // max(1, most - 1)] for i in range(most)]


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
    if number := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"left out: {number} cases of tests that are marked heavy (KSWEEP_TRIALS=1 runs all)")
    if (limit := config.getoption("--cases")) is not None:
        terminalreporter.write_line(f"left out: of parametrised tests all but {limit} cases (--cases)")
