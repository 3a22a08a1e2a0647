"""One sweep of two hosts on a disk that each sees late and out of order, and sweeps on disks that are slow or fail.

A host is a process tree with a name, process ids and a mount of its own. Needs FUSE (apt-get install fuse3) and the right to
mount; KSWEEP_FUSE_INSTALL=1 installs it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ksweep import Resources, Sweep
from ksweep.registry.database import check_parts, connect
from tests.tiny_sweeps import ask, run, talking_pair, tiny_cell

ROOT = Path(__file__).parents[2]
TEXTS = "SELECT draws_key, activation, draw, text, token_ids FROM draws ORDER BY ALL"
CURVES = "SELECT k, fve, fve_low, fve_high FROM curves ORDER BY ALL"
pytestmark = [pytest.mark.slow, pytest.mark.trials]

HOST = """
host=$1 python=$2 disk=$3 backing=$4 mount=$5 program=$6
shift 6
hostname "$host"
"$python" "$disk" "$backing" "$mount" "$@" 2> "$backing/../$host.disk" &
for _ in $(seq 300); do mountpoint -q "$mount" && break; sleep 0.1; done
mountpoint -q "$mount" || { cat "$backing/../$host.disk" >&2; exit 77; }
"$python" -c "$program"
code=$?
umount "$mount"
wait
exit $code
"""


@pytest.fixture(scope="module", autouse=True)
def fuse() -> None:
    if shutil.which("fusermount3") is None and os.environ.get("KSWEEP_FUSE_INSTALL") == "1":
        for command in (["apt-get", "-qq", "update"], ["apt-get", "-qq", "install", "-y", "fuse3"]):
            subprocess.run(command, check=False, capture_output=True)
    if shutil.which("fusermount3") is None:
        pytest.skip("no FUSE here: apt-get install fuse3, or KSWEEP_FUSE_INSTALL=1 where apt-get can")
    done = subprocess.run(["unshare", "--mount", "--uts", "--pid", "--fork", "true"], capture_output=True, text=True)
    if done.returncode != 0 or not os.access("/dev/fuse", os.W_OK):
        pytest.skip(f"no namespaces or no /dev/fuse here: {done.stderr.strip()}")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Two cells of 40 activations with 40 draws each: six units a cell."""
    folder = tmp_path_factory.mktemp("shared")
    cell = tiny_cell(talking_pair(folder, 40), num_replicates=50)
    cell = replace(cell, sampling=replace(cell.sampling, num_draws=40))
    return Sweep(
        name="shared", cell=cell, axes={"sampling.temperature": (0.7, 1.0)}, resources=Resources(cluster="inprocess", gpus=0),
        registry=str(folder / "alone" / "registry"), vector_cache=str(folder / "alone" / "vectors"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(sweep: Sweep) -> Sweep:
    """The sweep on an ordinary disk, which nobody else uses."""
    assert run(sweep) == 0
    return sweep


def placed(sweep: Sweep, place: Path) -> Sweep:
    return replace(sweep, registry=str(place / "registry"), vector_cache=str(place / "vectors"))


class SharedPlace:
    """A backing directory, and the path at which every host has it mounted."""

    def __init__(self, folder: Path, sweep: Sweep) -> None:
        self.backing, self.mount = folder / "backing", folder / "mount"
        self.backing.mkdir()
        self.mount.mkdir()
        self.sweep, self.seen_directly = placed(sweep, self.mount), placed(sweep, self.backing)

    def start(self, host: str, *options: str) -> subprocess.Popen[str]:
        """Run the sweep on a host of this name."""
        program = (
            f"from ksweep import *\nfrom ksweep.config.spec import *\nsweep_main({self.sweep!r}, ['--no-charts', '--retry'])"
        )
        disk = ROOT / "tests" / "disks" / "shared_disk.py"
        words = [host, sys.executable, disk, self.backing, self.mount, program, *options]
        return subprocess.Popen(
            ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", HOST, "sh", *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, sweep: Sweep) -> SharedPlace:
    return SharedPlace(tmp_path, sweep)


def ends(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code and standard error of each."""
    return [(process.returncode, error) for process in processes for _, error in [process.communicate(timeout=600)]]


def assert_as_alone(place: SharedPlace, alone: Sweep, *, can_remove: bool = True) -> int:
    """Everything is there once, whole and equal, and no leftovers; returns how many draws were sampled twice."""
    found = place.seen_directly
    assert check_parts(Path(found.registry)) == ()
    assert not (can_remove and list(place.backing.rglob("*.part")))
    assert ask(found, TEXTS) == ask(alone, TEXTS)
    np.testing.assert_allclose(ask(found, CURVES), ask(alone, CURVES), atol=1e-5)
    with connect(found.registry) as connection:
        assert connection.execute("FROM quarantine").fetchall() == []
        [(sampled,)] = connection.execute("SELECT sum(num_draws_sampled) FROM runs").fetchall()
    return int(sampled) - 2 * 1600


@pytest.mark.parametrize("delay", [0.5])
def test_two_hosts_that_see_one_another_late_end_one_sweep_right(place: SharedPlace, alone: Sweep, delay: float) -> None:
    hosts = [place.start(f"host-{i}", "--delay", str(delay), "--seed", str(i)) for i in range(2)]
    for code, error in ends(hosts):
        assert code == 0 and "Traceback" not in error, error
    twice = assert_as_alone(place, alone)
    print(f"\ndelay {delay} s: {twice} draws of 3200 sampled twice")


def test_a_host_that_is_switched_off_leaves_what_another_carries_on(place: SharedPlace, alone: Sweep) -> None:
    first = place.start("host-0", "--delay", "0.5")
    while not (parts := list(place.backing.glob("registry/draws/*/part-0*"))):
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)  # and with it the whole tree, its disk too
    first.communicate()
    [(code, error)] = ends([place.start("host-1", "--delay", "0.5", "--seed", "1")])
    assert code == 0 and "Traceback" not in error, error
    assert len(parts) < 12
    # A file that the first host was writing when it was killed stays until it is an hour old: it may be another's.
    assert_as_alone(place, alone, can_remove=False)


def test_a_slow_disk_changes_nothing(place: SharedPlace, alone: Sweep) -> None:
    [(code, error)] = ends([place.start("host-0", "--slow", "0.001")])
    assert code == 0, error
    assert assert_as_alone(place, alone) == 0


def test_a_disk_with_errors_is_told_in_a_sentence_and_loses_nothing_that_was_published(place: SharedPlace, alone: Sweep) -> None:
    outcomes: list[tuple[int, str]] = []
    published: set[Path] = set()
    for attempt in range(30):
        [(code, error)] = ends([place.start("host-0", "--failing", "0.01", "--seed", str(attempt))])
        outcomes.append((code, error))
        assert "Traceback" not in error and code in (0, 1), error
        now = {path.relative_to(place.backing) for path in place.backing.glob("registry/*/**/part-0*")}
        assert published <= now
        published = now
        if code == 0:
            break
    failed = [error for code, error in outcomes if code]
    assert outcomes[-1][0] == 0, failed[-1]
    assert failed, "the disk never failed"
    said: Any = [[line for line in error.splitlines() if line.startswith("error: ")] for error in failed]
    assert all(len(lines) == 1 and "Input/output error" in lines[0] for lines in said), said
    assert_as_alone(place, alone, can_remove=False)
    print(f"\n{len(failed)} commands ended with an error of the disk before one ended well")
