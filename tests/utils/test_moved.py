"""Module names of earlier versions: the same modules, in imports, from the package, and behind `python -m`."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import ksweep
from ksweep.utils.moved import MOVED

ROOT = Path(__file__).parents[2]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=840, cwd=ROOT, env=environment)


@pytest.mark.parametrize(("earlier", "now"), MOVED.items())
def test_an_earlier_name_is_the_same_module(earlier: str, now: str) -> None:
    module = importlib.import_module(earlier)
    assert module is importlib.import_module(now) and sys.modules[earlier] is sys.modules[now]
    assert module.__name__ == now and module.__spec__ is not None and module.__spec__.name == now


def test_earlier_names_are_found_whichever_way_they_are_asked_for() -> None:
    from ksweep.presets import demo_pair

    from ksweep import charts, presets
    from ksweep.analysis import charts as charts_now
    from ksweep.config.presets import demo_pair as demo_pair_now

    assert charts is charts_now and demo_pair is demo_pair_now and presets.demo_pair is demo_pair
    assert ksweep.compare is importlib.import_module("ksweep.analysis.compare")


def test_a_module_inside_a_moved_package_is_no_second_copy() -> None:
    assert importlib.import_module("ksweep.charts.curves") is importlib.import_module("ksweep.analysis.charts.curves")


@pytest.mark.parametrize("name", ["ksweep.chart", "ksweep.presets_", "ksweep.launch.states", "ksweep.charts.nothing"])
def test_an_unknown_name_is_no_module(name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match="No module named"):
        importlib.import_module(name)


def test_an_unknown_attribute_of_the_package_is_none() -> None:
    with pytest.raises(AttributeError, match="no attribute 'chart'"):
        _ = ksweep.chart


def test_the_options_table_is_printed_under_both_names() -> None:
    earlier, now = (python("-m", name, "--table") for name in ("ksweep.legacy", "ksweep.config.reference_options"))
    assert earlier.returncode == now.returncode == 0 and earlier.stderr == now.stderr == ""
    assert earlier.stdout == now.stdout == (ROOT / "docs" / "options.md").read_text()


def test_the_start_of_a_rank_runs_under_both_names_without_the_current_directory() -> None:
    """Jobs of an earlier version have `python -P -m ksweep.launch.start SUBMISSION` in their script."""
    for name in ("ksweep.launch.start", "ksweep.launch.worker.start"):
        ended = python("-P", "-m", name, "/no/submission")
        assert ended.returncode == 1 and "No such file or directory: '/no/submission/jobs.json'" in ended.stderr


def test_import_ksweep_stays_light_and_loads_no_moved_module() -> None:
    code = (
        f"import sys, ksweep; print([m for m in ('torch', 'duckdb', 'pyarrow', 'submitit', *{list(MOVED)}) if m in sys.modules])"
    )
    assert python("-c", code).stdout == "[]\n"
