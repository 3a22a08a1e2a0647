"""Call functions that need torch and transformers from a process that has not loaded them.

A launcher plans without them: their import takes seconds and half a gigabyte. What only they can tell it asks here. A process
that has them loaded (a rank, a notebook) answers for itself; another starts a child process, which answers until nobody has
asked for a while.
"""

from __future__ import annotations

import importlib
import os
import pickle
import select
import subprocess
import sys
from contextlib import suppress
from threading import Lock
from typing import Any, BinaryIO, NoReturn

from ksweep.utils.errors import CheckpointError

HEAVY_PACKAGE = "transformers"
IDLE_SECONDS = 30.0
"""After which a child without questions ends."""
ANSWER_SECONDS = 600.0
"""After which a child that does not answer is given up; loading its packages takes minutes where the disk is slow."""

_child: subprocess.Popen[bytes] | None = None
_lock = Lock()
"""One question at a time: answers have no names."""


def call_heavy(function: str, argument: Any) -> Any:
    """Return what the function "package.module:name" returns for an argument; both can be pickled.

    Raises:
        ChildProcessError: the child process ended without an answer, or gave none in `ANSWER_SECONDS`.
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
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)(argument)


def _ask(function: str, argument: Any) -> Any:
    """Return the child's answer; a child that had ended before is replaced once."""
    global _child
    for attempt in range(2):
        if _child is None or _child.poll() is not None:
            _child = subprocess.Popen(
                [sys.executable, "-m", "ksweep.utils.heavy_calls"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        assert _child.stdin is not None and _child.stdout is not None
        with suppress(BrokenPipeError, EOFError, pickle.UnpicklingError):  # the last: it was killed in the middle of an answer
            pickle.dump((function, argument), _child.stdin)
            _child.stdin.flush()
            if not select.select([_child.stdout], [], [], ANSWER_SECONDS)[0]:
                _give_up()
            return pickle.load(_child.stdout)
        code, _child = _child.wait(), None
        if attempt:
            raise ChildProcessError(f"the process that was to load {HEAVY_PACKAGE} ended with exit status {code}")
    raise AssertionError


def _give_up() -> NoReturn:
    """End a child that does not answer.

    Raises:
        ChildProcessError: always.
    """
    global _child
    assert _child is not None
    _child.kill()
    with suppress(subprocess.TimeoutExpired):  # one that waits for a disk that is gone does not end
        _child.wait(5)
    _child = None
    raise ChildProcessError(f"the process that was to load {HEAVY_PACKAGE} has not answered in {ANSWER_SECONDS:g} s")


def _answer(questions: BinaryIO, answers: BinaryIO) -> None:
    """Answer questions until their pipe is closed, or none has come for `IDLE_SECONDS`."""
    while select.select([questions], [], [], IDLE_SECONDS)[0]:
        try:
            function, argument = pickle.load(questions)
        except EOFError:
            return
        try:
            answer = _call(function, argument)
        except Exception as error:
            answer = error
        answers.write(_sendable(answer))
        answers.flush()


def _sendable(answer: Any) -> bytes:
    """Return an answer in pickled form, or an error with its text where it cannot be pickled and read again."""
    try:
        pickle.loads(sent := pickle.dumps(answer))
    except Exception as error:  # objects raise what they like
        return pickle.dumps(CheckpointError(str(answer if isinstance(answer, Exception) else error)))
    return sent


def main() -> None:
    """Answer the process that started this one; what libraries print goes nowhere."""
    # Unbuffered, so that `select` sees a question that a buffer would hold.
    answers, questions = os.fdopen(os.dup(1), "wb"), os.fdopen(0, "rb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _answer(questions, answers)


if __name__ == "__main__":
    main()
