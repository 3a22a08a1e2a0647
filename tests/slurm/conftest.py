"""A real Slurm for these tests: up before the first, down after the last; where it cannot be had, skips say why."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ksweep import Resources, Sweep
from tests.slurm.bed import Bed
from tests.tiny_models import TinyPair
from tests.tiny_sweeps import talking_pair, tiny_cell

CANNOT = 77


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="package")
def bed() -> Iterator[Bed]:
    """The cluster, gone before the tests of other packages: cluster=auto would submit theirs to it.

    KSWEEP_SLURM_BED names one that is up already and stays up (to write tests by).
    """
    own = os.environ.get("KSWEEP_SLURM_BED")
    folder = Path(own or tempfile.mkdtemp(prefix="ksweep-slurm-"))
    # Elements of an array are numbered below MaxArraySize: nine, so that a sweep of twelve needs two arrays.
    settings = {name: os.environ.get(f"KSWEEP_SLURM_{name}", "0") for name in ("CGROUP", "INSTALL")}
    bed = Bed(folder, settings | {"MAX_ARRAY": "9", "NODES": "4", "GRACE": "15"})
    done = bed.script("up", check=False)
    if done.returncode == CANNOT:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert "already up" in bed.script("up").stderr
    before = {name: os.environ.get(name) for name in bed.environment()}
    os.environ.update(bed.environment())
    yield bed
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    if own is None:
        bed.script("down")
        assert not folder.exists() and str(folder) not in Path("/etc/hosts").read_text()


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    return talking_pair(tmp_path_factory.mktemp("tiny"), num_rows=80)


@pytest.fixture(scope="session")
def plain(pair: TinyPair) -> Sweep:
    """A cell of 40 activations with 8 draws each; its place is given by `sweep`."""
    return Sweep(
        name="tiny",
        cell=tiny_cell(pair, num_replicates=100),
        resources=Resources(cluster="slurm", gpus=0, mem_gb=1, time=60),
    )  # fmt: skip


@pytest.fixture
def sweep(plain: Sweep, bed: Bed, tmp_path: Path) -> Sweep:
    return replace(plain, registry=str(tmp_path / "registry"), vector_cache=str(tmp_path / "vector_cache"))


def pytest_report_header() -> list[str]:
    there = subprocess.run(["sh", "-c", "command -v slurmctld"], capture_output=True, text=True, check=False).stdout.strip()
    return [f"slurm: {there or 'not installed'}"]
