"""Questions to a child process: answers, exceptions, and a child that has ended. The functions here need nothing heavy."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import errno, os, sys
from ksweep.utils import heavy_calls
from ksweep.utils.heavy_calls import call_heavy

print(call_heavy("os.path:basename", "/some/file"), heavy_calls._child.pid != os.getpid())
try:
    call_heavy("os:listdir", "/nowhere/at/all")
except FileNotFoundError as error:
    print(error.errno == errno.ENOENT)
print(call_heavy("builtins:print", "what libraries say is no answer"))
first = heavy_calls._child
first.kill()
first.wait()
print(call_heavy("os.path:basename", "/other/file"), heavy_calls._child is first)
try:
    call_heavy("os:_exit", 3)
except ChildProcessError as error:
    print(error)
print(call_heavy("os.path:basename", "/third/file"))
sys.modules["transformers"] = os  # loaded here: this process answers for itself
print(call_heavy("os:getpgid", 0) == os.getpgid(0), heavy_calls._child.poll(), call_heavy("builtins:id", first) == id(first))
"""


def test_child_answers_raises_and_is_replaced() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [
        "file True",
        "True",
        "None",
        "file False",
        "the process that was to load transformers ended with exit status 3",
        "file",
        "True None True",
    ]


def test_child_without_questions_ends() -> None:
    script = "import ksweep.utils.heavy_calls as calls, sys; calls.IDLE_SECONDS = 0.2; sys.argv = ['x']; calls.main()"
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.wait(timeout=60) == 0
