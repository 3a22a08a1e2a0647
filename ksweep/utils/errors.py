"""The two ways a run can go wrong, the exit code each one gets, and the class that a record calls it by."""

from __future__ import annotations

import errno
import re
from typing import Literal, get_args


class RequestError(ValueError):
    """A mistake in what was asked for: a mistyped option, a missing file, the wrong checkpoint. Exit code 2.

    The message is one paragraph: what came, what was expected, what to do.
    """


class SpecError(RequestError):
    """A spec, an override or a configuration file that cannot mean anything."""


class CheckpointError(RequestError):
    """A checkpoint that is not what it was given as, or that is damaged."""


class DataError(RequestError):
    """Text or vectors that cannot be used: missing, empty, ragged, not finite."""


class StoreError(RuntimeError):
    """A damaged or half-written file in one of the stores."""


class RunError(RuntimeError):
    """A failure while running: a dead rank, a full disk, a job that was lost. Exit code 1."""


class DiskFullError(RunError):
    """No room left; nothing half-written stays."""


ErrorClass = Literal[
    "bad input",
    "out of memory",
    "NaN",
    "time limit",
    "disk full",
    "dead rank",
    "node failure",
    "preempted",
    "timeout",
    "cancelled",
    "stopped",
    "killed",
    "lost",
    "setup",
    "failure",
    "bug",
]
"""Why a run, a job or a rank ended before its time. What is to be done about it follows from the class, not the Python type.

time limit: starts that reach their limit without publishing anything. timeout: killed at its limit. stopped: asked to. killed:
its processes are gone. lost: Slurm knows nothing of it any more. setup: it ended in the
shell lines before Python. failure: what ksweep refuses while running. bug: the rest.
"""
ERROR_CLASSES: tuple[str, ...] = get_args(ErrorClass)

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_NO_MEMORY = re.compile(r"out of memory|can(?:no|')t allocate memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)
_NOT_A_NUMBER = re.compile(r"\bNaNs?\b|(?:not|non-) ?finite|contains either `inf`", re.IGNORECASE)


def classify(error: BaseException) -> ErrorClass:
    """The class of a failure, for people, the plan and the exit code; a cause that was given (`raise ... from`) counts too."""
    found = _class_of(error)
    if found in ("failure", "bug") and error.__cause__ is not None:
        deeper = classify(error.__cause__)
        return deeper if deeper in ("disk full", "out of memory", "NaN") else found
    return found


def _class_of(error: BaseException) -> ErrorClass:
    code = getattr(error, "errno", None)
    if isinstance(error, RequestError):
        return "bad input"
    if isinstance(error, DiskFullError) or code in _FULL_DISK:
        return "disk full"
    # PyTorch raises a RuntimeError for what its allocators on the CPU and cuBLAS cannot have.
    torchs = isinstance(error, RuntimeError) and not isinstance(error, StoreError)
    if isinstance(error, MemoryError) or code == errno.ENOMEM or "OutOfMemory" in type(error).__name__:
        return "out of memory"
    if torchs and _NO_MEMORY.search(str(error)):
        return "out of memory"
    if isinstance(error, FloatingPointError) or (torchs and _NOT_A_NUMBER.search(str(error))):
        return "NaN"
    return "failure" if isinstance(error, (RunError, StoreError)) else "bug"


def class_of_type(name: str) -> str:
    """The class behind a Python type, or behind a class, as records hold it that were written when one field had both."""
    if name in ERROR_CLASSES:
        return name
    if name in {kind.__name__ for kind in (RequestError, SpecError, CheckpointError, DataError)}:
        return "bad input"
    if name == DiskFullError.__name__:
        return "disk full"
    if name == "MemoryError" or "OutOfMemory" in name:
        return "out of memory"
    return "failure" if name.endswith(("RunError", "StoreError", "LandingError")) else "bug"
