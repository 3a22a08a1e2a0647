"""Errors: what the user asked for (exit code 2) or what failed while running (exit code 1), and the class in the run record."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

ErrorClass = Literal[
    "bad input",
    "out of memory",
    "NaN",
    "time limit",
    "disk full",
    "disk error",
    "dead rank",
    "node failure",
    "preempted",
    "timeout",
    "cancelled",
    "stopped",
    "killed",
    "lost",
    "setup",
    "never submitted",
    "failure",
    "bug",
]
"""Why a run, a job or a rank ended early. State and retry policy follow from this class, not from the Python type."""
ERROR_CLASSES: tuple[str, ...] = get_args(ErrorClass)


@dataclass(frozen=True)
class EndClass:
    """What follows from a class of ends."""

    state: Literal["failed", "stopped"]
    retried: bool
    """Whether the next command runs the cells again unasked: neither the request nor the code is to blame."""
    meaning: str


END_CLASSES: dict[ErrorClass, EndClass] = {
    "bad input": EndClass("failed", False, "the request cannot be carried out"),
    "out of memory": EndClass("failed", False, "a model or an array did not fit, or Slurm killed a rank for its memory"),
    "NaN": EndClass("failed", False, "a model returned values that are not finite"),
    "time limit": EndClass("failed", False, "several starts reached their time limit without publishing a draw"),
    "disk full": EndClass("failed", True, "no space was left on a disk"),
    "disk error": EndClass("failed", True, "a disk or a network file system refused to read or write"),
    "dead rank": EndClass("failed", False, "a rank that had begun its cell ended without writing an outcome"),
    "setup": EndClass("failed", False, "it ended before any rank began: in the `setup` lines, at srun, or while Python started"),
    "failure": EndClass("failed", False, "an error that ksweep raises while running"),
    "bug": EndClass("failed", False, "any other exception"),
    "killed": EndClass("stopped", True, "a rank ended without writing an outcome before it had begun a cell"),
    "node failure": EndClass("stopped", True, "its node failed, or its machine was restarted"),
    "preempted": EndClass("stopped", True, "Slurm preempted it and did not requeue it"),
    "timeout": EndClass("stopped", True, "it was killed at its time limit"),
    "cancelled": EndClass("stopped", True, "somebody cancelled it"),
    "stopped": EndClass("stopped", True, "its ranks were asked to stop, and did after their work units"),
    "lost": EndClass("stopped", True, "Slurm no longer knows it, or its directory is gone"),
    "never submitted": EndClass("stopped", True, "its launcher ended before it had started it"),
}
"""One row for each class, shown in docs/slurm.md."""


def end_state(error_class: str) -> Literal["failed", "stopped"]:
    """Return the state of a job that ended with a class; one that this version does not know is a failure."""
    return END_CLASSES[error_class].state if error_class in END_CLASSES else "failed"


class RequestError(ValueError):
    """A mistake in the request: a mistyped option, a missing file, the wrong checkpoint. Exit code 2.

    The message is a paragraph: what came, what was expected, what to do.
    """

    kind: ClassVar[ErrorClass] = "bad input"


class SpecError(RequestError):
    """A spec, an override or a configuration file that is invalid or contradicts itself."""


class CheckpointError(RequestError):
    """A checkpoint of the wrong kind, or a damaged one."""


class DataError(RequestError):
    """Unusable text or vectors: missing, empty, ragged, not finite."""


class StoreError(RuntimeError):
    """A damaged or half-written file in one of the stores."""

    kind: ClassVar[ErrorClass] = "failure"


class RunError(RuntimeError):
    """A failure while running: a dead rank, a full disk, a lost job. Exit code 1."""

    kind: ClassVar[ErrorClass] = "failure"


class DiskFullError(RunError):
    """No space left on the disk; no half-written file stays."""

    kind: ClassVar[ErrorClass] = "disk full"


class DiskError(RunError):
    """A disk or a network file system refused to read or write; no half-written file stays."""

    kind: ClassVar[ErrorClass] = "disk error"


class NotFiniteError(RunError):
    """A model returned values that are NaN or infinite."""

    kind: ClassVar[ErrorClass] = "NaN"


_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_REFUSED_BY_DISK = (errno.EIO, errno.ESTALE, errno.EROFS)
_NO_MEMORY = re.compile(r"out of memory|can(?:no|')t allocate memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)
_NOT_A_NUMBER = re.compile(r"contains either `inf`", re.IGNORECASE)


def classify(error: BaseException) -> ErrorClass:
    """Return the class of a failure; of a generic one, the class of its cause (`raise ... from`) where that is more specific."""
    error_class = _class_of(error)
    if error_class in ("failure", "bug") and error.__cause__ is not None:
        of_cause = classify(error.__cause__)
        return of_cause if of_cause in ("disk full", "disk error", "out of memory", "NaN") else error_class
    return error_class


def _class_of(error: BaseException) -> ErrorClass:
    """Return the class that an exception's own type or error number states."""
    if (code := getattr(error, "errno", None)) in _FULL_DISK:
        return "disk full"
    if isinstance(error, (RequestError, RunError, StoreError)):
        return error.kind
    if isinstance(error, OSError) and code in _REFUSED_BY_DISK:
        return "disk error"
    if isinstance(error, MemoryError) or code == errno.ENOMEM or type(error).__name__ == "OutOfMemoryError":  # torch's
        return "out of memory"
    if isinstance(error, FloatingPointError):
        return "NaN"
    return _class_of_torch_error(str(error)) if isinstance(error, RuntimeError) else "bug"


def _class_of_torch_error(message: str) -> ErrorClass:
    """Return the class of a RuntimeError of PyTorch, which has no types for a full CPU allocator, a full cuBLAS, and NaN."""
    if _NO_MEMORY.search(message):
        return "out of memory"
    return "NaN" if _NOT_A_NUMBER.search(message) else "bug"


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
