"""A real Slurm for these tests: up before the first, down after the last; where it cannot be had, skips say why.

Most of these tests wait most of the time. Those marked `beside`, which take a `place` and leave the cluster as a whole alone, are
begun together at the start, a few at a time, each in a thread; their place in the order is where their outcome is asked for.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ksweep import Resources, Sweep
from tests.slurm.bed import ANYWHERE, NODES, Bed, Place, only
from tests.slurm.story import Story
from tests.tiny_models import TinyPair
from tests.tiny_sweeps import talking_pair, tiny_cell

CANNOT = 77
AT_ONCE = 5
BEGUN = pytest.StashKey[dict[str, tuple[Place, "Future[None]"]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "beside: runs beside other tests of tests/slurm; takes a `place`")


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
    bed = Bed(folder, settings | {"MAX_ARRAY": "9", "NODES": str(NODES), "GRACE": "15"})
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


@pytest.fixture(scope="package")
def plain(pair: TinyPair, bed: Bed) -> Sweep:
    """A cell of 40 activations with 8 draws each; its place is given by `place`."""
    return Sweep(
        name="tiny",
        cell=tiny_cell(pair, num_replicates=100),
        resources=Resources(cluster="slurm", gpus=0, mem_gb=8, time=60, extra=only(ANYWHERE)),
    )  # fmt: skip


@pytest.fixture(scope="package", autouse=True)
def side_by_side(request: pytest.FixtureRequest, bed: Bed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Begins every selected test that is marked `beside`."""
    items = [i for i in request.session.items if isinstance(i, pytest.Function) and i.get_closest_marker("beside")]
    begun = request.session.stash.setdefault(BEGUN, {})
    pool = ThreadPoolExecutor(AT_ONCE)
    plain = request.getfixturevalue("plain") if items else None
    for item in items:
        place = _place(item, tmp_path_factory.mktemp("place"), bed, plain)
        given = item.callspec.params if hasattr(item, "callspec") else {}
        begun[item.nodeid] = (place, pool.submit(item.obj, place, **given))
    yield
    for place, _ in begun.values():
        for process in place.begun:
            process.kill()
    pool.shutdown(cancel_futures=True)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    begun = pyfuncitem.session.stash.get(BEGUN, {}).get(pyfuncitem.nodeid)
    if begun is None:
        return None
    begun[1].result()
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    report = yield
    place = getattr(item, "funcargs", {}).get("place")
    if report.when == "call" and isinstance(place, Place):
        place.story.write(place.path / "registry", failed=report.failed)
    return report


@pytest.fixture
def place(request: pytest.FixtureRequest, bed: Bed, plain: Sweep, tmp_path: Path) -> Place:
    begun = request.session.stash[BEGUN].get(request.node.nodeid)
    return begun[0] if begun else _place(request.node, tmp_path, bed, plain)


def _place(item: Any, path: Path, bed: Bed, plain: Sweep) -> Place:
    title = (item.obj.__doc__ or item.originalname.removeprefix("test_").replace("_", " ")).strip().splitlines()[0]
    return Place(path, bed, plain, Story(title, item.name))


def pytest_report_header() -> list[str]:
    there = subprocess.run(["sh", "-c", "command -v slurmctld"], capture_output=True, text=True, check=False).stdout.strip()
    return [f"slurm: {there or 'not installed'}"]
