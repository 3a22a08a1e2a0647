"""A finished sweep of two temperatures, a browser to open its report in."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ksweep import Resources, Sweep
from tests.made_once import made_once
from tests.registry.real_runs import real  # noqa: F401  # a fixture
from tests.tiny_sweeps import run, talking_pair, tiny_cell

if TYPE_CHECKING:
    from playwright.sync_api import Browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return made_once(tmp_path_factory, "reported", _sweep)


def _sweep(place: Path) -> Sweep:
    (place / "tiny").mkdir()
    done = Sweep(
        name="tiny",
        question="Does <b>warmth</b> & noise help?",
        cell=tiny_cell(talking_pair(place / "tiny", num_rows=60), num_replicates=100),
        resources=Resources(cluster="inprocess", gpus=0),
        registry=str(place / "registry"),
        vector_cache=str(place / "vector_cache"),
    )
    assert run(done, "sampling.temperature=[0.7,1.3]") == 0
    return done


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium; KSWEEP_CHROMIUM_INSTALL=1 gets one by apt-get where there is none."""
    from playwright.sync_api import sync_playwright

    path = _browser()
    if path is None:
        pytest.skip("no Chromium here: install one, or set KSWEEP_CHROMIUM_INSTALL=1 where apt-get can")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])  # as root it refuses to start with one
        yield opened
        opened.close()


def _browser() -> str | None:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None and os.environ.get("KSWEEP_CHROMIUM_INSTALL") == "1" and shutil.which("apt-get"):
        quiet = {"env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, "capture_output": True, "check": False}
        with open("/tmp/ksweep-apt.lock", "a") as lock:  # scripts/slurm_testbed.sh may be installing beside this
            fcntl.flock(lock, fcntl.LOCK_EX)
            subprocess.run(["apt-get", "-qq", "update"], **quiet)  # type: ignore[call-overload]
            install = ["apt-get", "-y", "-qq", "install", "--no-install-recommends", "chromium"]
            subprocess.run(install, **quiet)  # type: ignore[call-overload]
        found = next(filter(None, map(shutil.which, BROWSERS)), None)
    return found


def pytest_report_header() -> list[str]:
    return [f"browser: {next(filter(None, map(shutil.which, BROWSERS)), 'none')}"]


def written(sweep: Sweep, folder: Path) -> Path:
    from ksweep.analysis.report import write_report

    return write_report(Path(sweep.registry), sweep.name, folder / "report.html")
