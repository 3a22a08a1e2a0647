"""`--cases N`, with which `make quick` runs a few cases of every parametrised test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__)


@pytest.mark.parametrize("number", range(9))
def test_parametrised(number: int) -> None:
    """Nine cases for the tests below to choose from."""
    assert number in range(9)


@pytest.mark.heavy(3)
@pytest.mark.parametrize("number", range(8))
def test_heavy(number: int) -> None:
    """Eight cases, of which three are run unless KSWEEP_TRIALS asks for all."""
    assert number in range(8)


def collected(*options: str, trials: str | None = None) -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", str(FILE), *options]
    others = {name: value for name, value in os.environ.items() if name != "KSWEEP_TRIALS"}
    environment = others if trials is None else others | {"KSWEEP_TRIALS": trials}
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=FILE.parents[1], env=environment).stdout
    return [line.partition("::")[2] for line in out.splitlines() if "::" in line]


@pytest.mark.slow
def test_cases_keeps_the_first_the_last_and_those_between() -> None:
    names = collected("--cases", "3")
    assert [name for name in names if "_parametrised[" in name] == [f"test_parametrised[{number}]" for number in (0, 4, 8)]
    assert "test_cases_keeps_the_first_the_last_and_those_between" in names


@pytest.mark.slow
def test_cases_chooses_among_those_that_other_options_have_left() -> None:
    assert collected("--cases", "2", "-k", "parametrised and not 8") == ["test_parametrised[0]", "test_parametrised[7]"]


@pytest.mark.slow
def test_without_the_option_every_case_runs() -> None:
    assert len([name for name in collected() if "_parametrised[" in name]) == 9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "trials", "numbers"), [((), None, (0, 3, 7)), ((), "1", range(8)), (("--cases", "2"), None, (0, 7))]
)
def test_heavy_cases_are_spread_unless_trials_are_asked_for(options: tuple[str, ...], trials: str | None, numbers: Any) -> None:
    names = collected("-k", "test_heavy and not spread", *options, trials=trials)
    assert names == [f"test_heavy[{number}]" for number in numbers]
