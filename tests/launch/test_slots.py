"""GPUs of this machine are lent to one job at a time, and come back when their holder is dead."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ksweep.launch import slots


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSWEEP_HOME", str(tmp_path))


def test_gpus_are_lent_once_and_waited_for_together() -> None:
    assert slots.take((0, 1, 2), 2, "first") == (0, 1)
    assert slots.take((0, 1, 2), 2, "second") is None
    assert slots.take((0, 1, 2), 1, "third") == (2,)
    assert slots.holders((0, 1, 2)) == {0: "first", 1: "first", 2: "third"}
    slots.release((0, 1))
    assert slots.take((0, 1, 2), 2, "second") == (0, 1)


def test_only_the_gpus_that_are_visible_are_lent() -> None:
    assert slots.take((5, 7), 1, "a") == (5,)
    assert slots.take((5,), 1, "b") is None
    assert slots.take((5, 7), 1, "c") == (7,)


def test_a_dead_holder_holds_nothing() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert slots.take((0,), 1, "job") == (0,)
    slots.hand_on((0,), "job", process.pid)
    assert slots.take((0,), 1, "other") is None
    process.kill()
    process.wait()
    assert slots.take((0,), 1, "other") == (0,)


def test_two_launchers_at_once_never_share_a_gpu(tmp_path: Path) -> None:
    code = "from ksweep.launch import slots; import sys; print(slots.take(range(8), 1, sys.argv[1])); input()"
    several = [
        subprocess.Popen([sys.executable, "-c", code, str(i)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for i in range(4)
    ]
    try:
        taken = [process.stdout.readline().strip() for process in several if process.stdout]
    finally:
        for process in several:
            process.communicate("\n")
    assert len(set(taken)) == 4 and None not in taken
