"""Call functions that need torch and transformers from a process that has not loaded them.

A launcher plans without them: their import takes seconds and half a gigabyte. What only they can tell it asks here. A process
that has them loaded (a rank, a notebook) answers for itself; another starts a child process, which answers until nobody has
asked for a while.
"""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from threading import Lock
from typing import IO, Any

from ksweep.utils.errors import CheckpointError

HEAVY_PACKAGE = "transformers"
IDLE_SECONDS = 30.0
"""After which a child without questions ends."""
ANSWER_SECONDS = 600.0
"""After which a child that does not answer is given up; loading its packages takes minutes where the disk is slow."""
START = "import sys; sys.path += [p for p in sys.argv[1:] if p not in sys.path]; import ksweep.utils.heavy_calls as h; h.main()"
"""What a child runs, with the path of its parent: it finds what that finds, but installed packages before files of the same name
in the working directory (`peft.py`)."""


@dataclass
class _Child:
    """A process that answers questions; questions and answers are sent with their length before them."""

    process: subprocess.Popen[bytes]
    connection: Connection
    errors: IO[bytes]
    """What it wrote on standard error."""

    def end(self, seconds: float | None = None) -> str:
        """Wait for its end, at most so long, and return its exit status and the last line on standard error."""
        self.connection.close()  # no further question
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").split("\n")
        last = next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
        return f"{self.process.returncode}{last and f' ({last})'}"


_child: _Child | None = None
_lock = Lock()
"""One question at a time: answers have no names."""


def call_heavy(function: str, argument: Any) -> Any:
    """Return what the function "package.module:name" returns for an argument; both can be pickled.

    Raises:
        ChildProcessError: the function cannot be imported, or the child process cannot be started, ended without an answer, or
            gave none in `ANSWER_SECONDS`.
        CheckpointError: what the function returned or raised cannot be sent; the message is that of what it raised.
        Whatever else the function raises.
    """
    if HEAVY_PACKAGE in sys.modules:
        return _call(function, argument)
    with _lock:
        answer = _ask(function, argument)
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _call(function: str, argument: Any) -> Any:
    name, _, attribute = function.partition(":")
    try:
        module = importlib.import_module(name)
    except Exception as error:  # packages raise what they like where they do not fit each other
        raise ChildProcessError(f"{name} cannot be imported ({type(error).__name__}: {error})") from error
    return getattr(module, attribute)(argument)


def _ask(function: str, argument: Any) -> Any:
    """Return the child's answer; a child that had ended before is replaced once."""
    global _child
    question, status = pickle.dumps((function, argument)), ""
    for _ in range(2):
        child = _child = _started() if _child is None or _child.process.poll() is not None else _child
        with suppress(OSError, EOFError, pickle.UnpicklingError):  # it was killed, perhaps in the middle of an answer
            child.connection.send_bytes(question)
            if child.connection.poll(ANSWER_SECONDS):
                return pickle.loads(child.connection.recv_bytes())
            child.process.kill()
            status = f"has not answered in {ANSWER_SECONDS:g} s"
        _child, ended = None, child.end(5 if status else None)  # one that waits for a disk that is gone does not end
        if status:
            break
    raise ChildProcessError(f"the process that was to load {HEAVY_PACKAGE} {status or f'ended with exit status {ended}'}")


def _started() -> _Child:
    """Start a child process.

    Raises:
        ChildProcessError: it cannot be started.
    """
    ours, its = Pipe()
    try:
        errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the child)
        command = [sys.executable, "-P", "-c", START, *sys.path]
        process = subprocess.Popen(command, stdin=its.fileno(), stdout=subprocess.DEVNULL, stderr=errors)
    except OSError as error:
        raise ChildProcessError(f"no process that could load {HEAVY_PACKAGE} can be started ({error})") from error
    its.close()
    return _Child(process, ours, errors)


def _answer(connection: Connection) -> None:
    """Answer questions until the connection is closed, or none has come for `IDLE_SECONDS`."""
    while connection.poll(IDLE_SECONDS):
        try:
            function, argument = pickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionError):
            return
        try:
            answer = _call(function, argument)
        except Exception as error:
            answer = error
        connection.send_bytes(_sendable(answer))


def _sendable(answer: Any) -> bytes:
    """Return an answer in pickled form, or an error with its text where it cannot be pickled and read again."""
    try:
        pickle.loads(sent := pickle.dumps(answer))
    except Exception as error:  # objects raise what they like
        return pickle.dumps(CheckpointError(str(answer if isinstance(answer, Exception) else error)))
    return sent


def main() -> None:
    """Answer the process that started this one, over what is its standard input until then."""
    connection = Connection(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    _answer(connection)
