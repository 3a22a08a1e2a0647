"""The two ways a run can go wrong, and the exit code each one gets."""

from __future__ import annotations


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
