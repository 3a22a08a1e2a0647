"""Python processes that are forked from this one, which has torch and transformers loaded, instead of started anew.

A rank imports for six seconds of CPU time before it works for half a second. A forked one is a real process too: its own pid,
environment, working directory, files and signals, killed and waited for like any other. What it shares is what this process
has imported and patched. `pytest.mark.usefixtures("forked_python")` forks what a test starts: launchers, controllers of local
jobs, and their ranks. Not for tests of imports, of memory, or of what libraries do when they are loaded.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import logging
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import ksweep.evaluation.evaluate  # noqa: F401  # what a rank imports

ASKED = (
    "preexec_fn", "close_fds", "pass_fds", "cwd", "env", "startupinfo", "creationflags", "shell", "p2cread", "p2cwrite",
    "c2pread", "c2pwrite", "errread", "errwrite", "restore_signals", "gid", "gids", "uid", "umask", "start_new_session",
    "process_group",
)  # fmt: skip
"""What `subprocess.Popen._execute_child` is called with, after the program."""


class ForkedPython(subprocess.Popen):  # type: ignore[type-arg]
    """`subprocess.Popen([sys.executable, ...])` without the start of an interpreter; other programs are started as usual.

    With threads of OpenMP in this process, which no fork survives, Python is started anew as well.
    """

    def _execute_child(self, args: Any, executable: Any, *rest: Any) -> None:
        if args[0] != sys.executable or torch.get_num_threads() > 1:
            super()._execute_child(args, executable, *rest)  # type: ignore[misc]
            return
        asked = dict(zip(ASKED, rest, strict=True))
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                code = _run([os.fspath(each) for each in args[1:]], asked)
            finally:
                os._exit(code)
        self._child_created = True
        self._close_pipe_fds(*(asked[name] for name in ASKED[8:14]))  # type: ignore[attr-defined]


def _run(arguments: Sequence[str], asked: dict[str, Any]) -> int:
    """Become what a new interpreter with these arguments would be, run it, and return its exit code."""
    # 1. Files, session, signals, environment: what exec would give.
    if asked["start_new_session"]:
        os.setsid()
    for number, name in enumerate(("p2cread", "c2pwrite", "errwrite")):
        if asked[name] != -1:
            os.dup2(asked[name], number)
    # Let go of every other file, and keep its number: Arrow closes pipes of its own after each fork, and aborts where it cannot.
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2:
            with suppress(OSError):  # that of the listing
                os.dup2(nothing, number, inheritable=False)
    faulthandler.disable()
    for each in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if callable(signal.getsignal(each)):
            signal.signal(each, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked["env"] is not None:
        os.environ.clear()
        os.environ.update(asked["env"])
    if asked["cwd"] is not None:
        os.chdir(asked["cwd"])
    # 2. State of this process that a new one would not have. What its frames hold must not be collected: it would close files.
    gc.freeze()
    atexit._clear()
    warnings.resetwarnings()
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)
    # closefd: a process forked from this one replaces them, and what they were must not close its files.
    sys.stdin, sys.stdout, sys.stderr = (open(n, "r" if n == 0 else "w", buffering=1, closefd=False) for n in (0, 1, 2))  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    added = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
    sys.path[:0] = added
    # 3. The program, and its end as the interpreter would end it.
    try:
        for hooks in (Path(path) / "sitecustomize.py" for path in added):
            if hooks.exists():
                runpy.run_path(str(hooks))
        _run_program(arguments)
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _run_program(arguments: Sequence[str]) -> None:
    rest = list(arguments)
    while rest[0] in ("-u", "-P"):
        rest.pop(0)
    sys.argv = rest
    if rest[0] == "-c":
        sys.argv = ["-c", *rest[2:]]
        exec(compile(rest[1], "<string>", "exec"), {"__name__": "__main__"})
    elif rest[0] == "-m":
        sys.argv = rest[1:]
        runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(rest[0]).parent))
        runpy.run_path(rest[0], run_name="__main__")


def forks_python(patch: pytest.MonkeyPatch) -> None:
    """Let everything that starts Python through subprocess, and what that starts in turn, fork it."""
    patch.setattr(subprocess, "Popen", ForkedPython)
