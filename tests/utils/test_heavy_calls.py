"""Questions to a child process: answers, exceptions, and a child that has ended. The functions here need nothing heavy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import errno, os, sys
from ksweep.utils import heavy_calls
from ksweep.utils.heavy_calls import call_heavy

print(call_heavy("os.path:basename", "/some/file"), heavy_calls._child.process.pid != os.getpid())
try:
    call_heavy("os:listdir", "/nowhere/at/all")
except FileNotFoundError as error:
    print(error.errno == errno.ENOENT)
print(call_heavy("builtins:print", "what libraries say is no answer"))
print(call_heavy("builtins:len", "x" * 1_000_000), len(call_heavy("builtins:bytes", 1_000_000)))
first = heavy_calls._child.process
first.kill()
first.wait()
print(call_heavy("os.path:basename", "/other/file"), heavy_calls._child.process is first)
try:
    call_heavy("os:_exit", 3)
except ChildProcessError as error:
    print(error)
print(call_heavy("os.path:basename", "/third/file"))
sys.modules["transformers"] = os  # loaded here: this process answers for itself
child = heavy_calls._child.process
print(call_heavy("os:getpgid", 0) == os.getpgid(0), child.poll(), call_heavy("builtins:id", first) == id(first))
"""


def test_child_answers_raises_and_is_replaced() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [
        "file True",
        "True",
        "None",
        "1000000 1000000",
        "file False",
        "the process that was to load transformers ended with exit status 3",
        "file",
        "True None True",
    ]


def test_child_without_questions_ends() -> None:
    script = "import ksweep.utils.heavy_calls as calls; calls.IDLE_SECONDS = 0.2; calls.main()"
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.wait(timeout=60) == 0


FUNCTIONS = """
import os, struct, sys, threading

def count(log):
    with open(log, "a") as file:
        file.write("asked ")

def locked(log):
    count(log)
    error = ValueError("this checkpoint is odd")
    error.lock = threading.Lock()
    raise error

class OfTwo(Exception):
    def __init__(self, what, why):
        super().__init__(f"{what} {why}")

def of_two(log):
    count(log)
    raise OfTwo("this one", "too")

def truncated(fd):
    os.write(fd, struct.pack("!i", 100) + b"x" * 50)
    print("Fatal error: killed while it answered\\n", file=sys.stderr, flush=True)
    os._exit(9)
"""

ODD_ANSWERS = """
import os
from ksweep.utils import heavy_calls
from ksweep.utils.heavy_calls import call_heavy

def said(function, argument):
    try:
        return call_heavy(function, argument)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

call_heavy("os.path:basename", "/a")
first = heavy_calls._child
print(said("functions:locked", "log"), said("functions:of_two", "log"), open("log").read(), first is heavy_calls._child, sep="|")
sockets = f"/proc/{first.process.pid}/fd/"
[answers] = [int(fd) for fd in os.listdir(sockets) if int(fd) > 2 and os.readlink(sockets + fd).startswith("socket:")]
print(said("functions:truncated", answers))
print(said("nowhere_at_all:function", 0))
heavy_calls.ANSWER_SECONDS = 0.3
print(said("time:sleep", 60))
heavy_calls.ANSWER_SECONDS = 600
print(said("os.path:basename", "/b/c"))
"""


def test_answers_that_cannot_be_sent_or_read_or_do_not_come_are_errors(tmp_path: Path) -> None:
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run([sys.executable, "-c", ODD_ANSWERS], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=50)
    assert run.stdout.splitlines() == [
        "CheckpointError: this checkpoint is odd|CheckpointError: this one too|asked asked |True",
        "ChildProcessError: the process that was to load transformers ended with exit status 9 "
        "(Fatal error: killed while it answered)",
        "ChildProcessError: nowhere_at_all cannot be imported (ModuleNotFoundError: No module named 'nowhere_at_all')",
        "ChildProcessError: the process that was to load transformers has not answered in 0.3 s",
        "c",
    ], run.stderr


THREADS = """
from concurrent.futures import ThreadPoolExecutor
from ksweep.utils.heavy_calls import call_heavy

with ThreadPoolExecutor(8) as pool:
    names = [str(i) for i in range(400)]
    print(list(pool.map(lambda name: call_heavy("os.path:basename", "/" + name), names)) == names)
"""


def test_threads_get_their_own_answers() -> None:
    run = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, timeout=50)
    assert run.stdout == "True\n", run.stderr


def test_files_in_the_working_directory_shadow_no_package_and_modules_of_the_parent_are_found(tmp_path: Path) -> None:
    (tmp_path / "pickle.py").write_text("raise SystemExit('not the package')")
    (tmp_path / "peft.py").write_text("FROM = 'the working directory'")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "beside.py").write_text("answer = len")
    script = (
        "import sys; sys.path.remove(''); from ksweep.utils.heavy_calls import call_heavy; sys.path += ['', 'own']\n"
        "print(call_heavy('beside:answer', 'abc'), call_heavy('importlib.util:find_spec', 'peft').origin)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=50)
    number, origin = run.stdout.split()
    assert number == "3" and Path(origin).name == "__init__.py", run.stderr
