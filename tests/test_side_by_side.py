"""What `make test-all` runs its two halves with."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = [sys.executable, str(Path(__file__).with_name("side_by_side.py"))]


@pytest.mark.parametrize(
    ("background", "front", "code"),
    [("true", "true", 0), ("false", "true", 1), ("true", "sh -c 'exit 3'", 3), ("false", "sh -c 'exit 3'", 3)],
)
def test_failure_of_either_command_is_the_exit_code(background: str, front: str, code: int) -> None:
    assert subprocess.run([*COMMAND, background, front], capture_output=True).returncode == code


def test_output_of_the_background_comes_last_and_whole() -> None:
    done = subprocess.run([*COMMAND, "printf 'a\\nb\\n'", "sh -c 'sleep 0.2; echo front'"], capture_output=True, text=True)
    assert 0 < done.stdout.index("\nfront\n") < done.stdout.index("\na\nb\n")


WAITS = """
import pathlib, sys, time
pathlib.Path(sys.argv[1], "begun").touch()
try:
    time.sleep(60)
except KeyboardInterrupt:
    pathlib.Path(sys.argv[1], "torn down").touch()
"""


@pytest.mark.slow
def test_an_interrupt_lets_both_tear_down(tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text(WAITS)
    folders = [tmp_path / "behind", tmp_path / "ahead"]
    for folder in folders:
        folder.mkdir()
    process = subprocess.Popen([*COMMAND, *(shlex.join([sys.executable, f"{tmp_path}/waits.py", str(f)]) for f in folders)])
    while not all((folder / "begun").exists() for folder in folders):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert all((folder / "torn down").exists() for folder in folders)
