"""Errors: what the user asked for (exit code 2) or what failed while running (exit code 1), and the class in the run record."""

from __future__ import annotations

import errno
import re
from typing import Literal, get_args


class RequestError(ValueError):
    """A mistake in the request: a mistyped option, a missing file, the wrong checkpoint. Exit code 2.

    The message is a paragraph: what came, what was expected, what to do.
    """


class SpecError(RequestError):
    """A spec, an override or a configuration file that is invalid or contradicts itself."""


class CheckpointError(RequestError):
    """A checkpoint of the wrong kind, or a damaged one."""


class DataError(RequestError):
    """Unusable text or vectors: missing, empty, ragged, not finite."""


class StoreError(RuntimeError):
    """A damaged or half-written file in one of the stores."""


class RunError(RuntimeError):
    """A failure while running: a dead rank, a full disk, a lost job. Exit code 1."""


class DiskFullError(RunError):
    """No space left on the disk; no half-written file stays."""


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
"""Why a run, a job or a rank ended early. The retry policy follows from this class, not from the Python type.

time limit: several starts reached their limit without publishing a draw. timeout: killed at its limit. stopped: asked to stop.
killed: its processes are gone. lost: Slurm no longer knows the job. setup: ended in the shell lines before Python. failure: an
error that ksweep raises while running. bug: any other exception.
"""
ERROR_CLASSES: tuple[str, ...] = get_args(ErrorClass)

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_NO_MEMORY = re.compile(r"out of memory|can(?:no|')t allocate memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)
_NOT_A_NUMBER = re.compile(r"\bNaNs?\b|(?:not|non-) ?finite|contains either `inf`", re.IGNORECASE)


def classify(error: BaseException) -> ErrorClass:
    """Return the class of a failure; of a generic one, the class of its cause (`raise ... from`) where that is more specific."""
    error_class = _class_of(error)
    if error_class in ("failure", "bug") and error.__cause__ is not None:
        of_cause = classify(error.__cause__)
        return of_cause if of_cause in ("disk full", "out of memory", "NaN") else error_class
    return error_class


def _class_of(error: BaseException) -> ErrorClass:
    code = getattr(error, "errno", None)
    if isinstance(error, RequestError):
        return "bad input"
    if isinstance(error, DiskFullError) or code in _FULL_DISK:
        return "disk full"
    # PyTorch raises a RuntimeError when its CPU allocator or cuBLAS runs out of memory.
    may_be_torchs = isinstance(error, RuntimeError) and not isinstance(error, StoreError)
    if isinstance(error, MemoryError) or code == errno.ENOMEM or "OutOfMemory" in type(error).__name__:
        return "out of memory"
    if may_be_torchs and _NO_MEMORY.search(str(error)):
        return "out of memory"
    if isinstance(error, FloatingPointError) or (may_be_torchs and _NOT_A_NUMBER.search(str(error))):
        return "NaN"
    return "failure" if isinstance(error, (RunError, StoreError)) else "bug"


def class_of_type(name: str) -> str:
    """Return the class for a Python type name or a class: records of earlier versions have either in the same field."""
    if name in ERROR_CLASSES:
        return name
    if name in {kind.__name__ for kind in (RequestError, SpecError, CheckpointError, DataError)}:
        return "bad input"
    if name == DiskFullError.__name__:
        return "disk full"
    if name == "MemoryError" or "OutOfMemory" in name:
        return "out of memory"
    return "failure" if name.endswith(("RunError", "StoreError", "LandingError")) else "bug"
