"""A forked Python is, for whoever starts it, what a new one is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import ForkedPython, forks_python

SAYS = """
import os, sys, signal
print(sys.argv[1:], os.getcwd(), os.environ["WHO"], os.getppid(), input(), __name__, len(os.environ))
files = {os.path.realpath(f"/proc/self/fd/{n}") for n in range(3, 200) if os.path.exists(f"/proc/self/fd/{n}")}
print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, files - {os.devnull}, file=sys.stderr)
sys.exit(3)
"""


@pytest.mark.parametrize("kind", [subprocess.Popen, ForkedPython])
@pytest.mark.parametrize("program", ["-c", "-m", "file"])
def test_a_program_sees_and_says_the_same(kind: type[subprocess.Popen[str]], program: str, tmp_path: Path) -> None:
    (tmp_path / "says.py").write_text(SAYS)
    command = {"-c": ["-c", SAYS], "-m": ["-m", "says"], "file": [str(tmp_path / "says.py")]}[program]
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        process = kind(
            [sys.executable, *command, "a", "b c"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, cwd=tmp_path, env={"WHO": "child", "PYTHONPATH": str(tmp_path), "LC_CTYPE": "C.UTF-8"},
        )  # fmt: skip
        out, told = process.communicate("hello\n", timeout=120)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert out == f"['a', 'b c'] {tmp_path} child {os.getpid()} hello __main__ 3\n", told
    assert told == "True set()\n" and process.returncode == 3


def test_arrow_survives_a_fork_of_a_fork() -> None:
    """Once it has made a pipe for signals, as reading CSV does."""
    reads = "import io, pyarrow.csv as c; assert c.read_csv(io.BytesIO(b'a\\n1')).num_rows == 1"
    inner = f"import subprocess, sys; sys.exit(subprocess.Popen([sys.executable, '-c', {reads!r}]).wait())"
    with pytest.MonkeyPatch.context() as patch:
        forks_python(patch)
        exec(reads)
        assert subprocess.Popen([sys.executable, "-c", inner]).wait(timeout=120) == 0


@pytest.mark.parametrize("kind", [subprocess.Popen, ForkedPython])
def test_errors_signals_and_files_are_those_of_a_process(kind: type[subprocess.Popen[str]], tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        raises = kind([sys.executable, "-c", "print('x'); 1 / 0"], stdout=log, stderr=subprocess.STDOUT, text=True)
        assert raises.wait(timeout=120) == 1
    assert (tmp_path / "log").read_text().startswith("x\n") and "ZeroDivisionError" in (tmp_path / "log").read_text()
    waits = kind(
        [sys.executable, "-c", "print('on', flush=True); input()"], stdin=-1, stdout=-1, text=True, start_new_session=True
    )
    assert waits.stdout is not None and waits.stdout.readline() == "on\n" and waits.poll() is None
    assert os.getsid(waits.pid) == waits.pid
    waits.kill()
    assert waits.wait(timeout=120) == -signal.SIGKILL
    waits.communicate()
