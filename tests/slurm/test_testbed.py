"""The test bed itself: whatever happened to it, `down` leaves nothing."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.slurm.bed import Bed, Place, until

pytestmark = pytest.mark.beside


def another(place: Place, name: str, apart: int, **options: str) -> Bed:
    """A second bed, on ports of its own."""
    port = int(os.environ.get("PORT", "16817")) + apart
    return Bed(place.path / name, {"PORT": str(port), "NODES": "1", "PREFIX": "spare", **options})


def left_of(bed: Bed) -> list[str]:
    """Processes that know of a bed, and lines in /etc/hosts, and cgroups."""
    found = [line for line in Path("/etc/hosts").read_text().splitlines() if str(bed.folder) in line]
    found += [str(path) for path in Path("/sys/fs/cgroup").glob("*/slurm_spare*")]
    for process in psutil.process_iter():
        try:
            told = " ".join([*process.cmdline(), *process.environ().values()])
        except psutil.Error:
            continue
        if str(bed.folder) in told:
            found.append(f"{process.pid} {' '.join(process.cmdline())}")
    return found


def test_down_after_a_kill_of_slurmctld_leaves_no_process_no_file_no_host(place: Place) -> None:
    bed = another(place, "killed", 63)
    try:
        bed.script("up")
        own = {**os.environ, **bed.environment()}
        subprocess.run(["sbatch", "-Q", "--output=/dev/null", "--wrap=setsid sleep 1000"], env=own, check=True)
        listed = ["squeue", "-h", "-t", "RUNNING"]
        until("the job", lambda: subprocess.run(listed, env=own, capture_output=True, text=True, check=True).stdout)
        assert left_of(bed)
        bed.script("controller", "kill")
    finally:
        bed.script("down")
    assert left_of(bed) == [] and not bed.folder.exists()


def test_an_up_that_fails_leaves_its_logs_and_down_then_nothing(place: Place) -> None:
    bed = another(place, "failed", 2)  # its slurmctld finds slurmdbd of the bed of these tests at its port
    done = bed.script("up", check=False)
    assert done.returncode == 1 and "logs are kept" in done.stderr, done.stderr
    assert left_of(bed) == [] and (bed.folder / "log").is_dir()
    bed.script("down")
    assert not bed.folder.exists()
