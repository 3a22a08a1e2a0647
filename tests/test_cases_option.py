"""`--cases N`, with which `make quick` runs a few cases of every parametrised test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__)


@pytest.mark.parametrize("number", range(9))
def test_parametrised(number: int) -> None:
    """Nine cases for the tests below to choose from."""
    assert number in range(9)


def collected(*options: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", str(FILE), *options]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=FILE.parents[1]).stdout
    return [line.partition("::")[2] for line in out.splitlines() if "::" in line]


@pytest.mark.slow
def test_cases_keeps_the_first_the_last_and_those_between() -> None:
    names = collected("--cases", "3")
    assert [name for name in names if "[" in name] == [f"test_parametrised[{number}]" for number in (0, 4, 8)]
    assert "test_cases_keeps_the_first_the_last_and_those_between" in names


@pytest.mark.slow
def test_cases_chooses_among_those_that_other_options_have_left() -> None:
    assert collected("--cases", "2", "-k", "parametrised and not 8") == ["test_parametrised[0]", "test_parametrised[7]"]


@pytest.mark.slow
def test_without_the_option_every_case_runs() -> None:
    assert len([name for name in collected() if "[" in name]) == 9
