"""Turn what a command raises into one sentence and an exit code. Both mains, that of `ksweep` and that of a sweep file, use it.

A command imports what it needs when it runs, so errors of DuckDB and Arrow are recognised by the module of their class.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import cast

from ksweep.utils.console import VisibleFormatter, remark
from ksweep.utils.errors import RequestError, RunError, StoreError, classify
from ksweep.utils.files import home
from ksweep.utils.version import VERSION

CIRCUMSTANCES = (OSError, OverflowError, MemoryError, UnicodeError)
"""Built-in exceptions that files, disks, memory or values cause, and not a mistake in the code."""
NO_PATH = ("embedded null byte", "embedded null character", "Symlink loop from")
"""Beginnings of what Python says of a path where the system is not asked, in a ValueError or RuntimeError."""
LIBRARIES_OF_FILES = ("duckdb", "_duckdb", "pyarrow")
"""Packages whose exceptions say that a file could not be read or written."""


def exit_code_of(command: Callable[[], int | None], *, interrupted: str = "interrupted") -> int:
    """Run a command and return its exit code: 0 or its own, 2 for a mistake in the request, 1 for a failure.

    A failure is one sentence. Of an exception that nothing explains, a bug, the traceback goes to a file that the sentence names.

    Args:
        command: what to run; None counts as 0.
        interrupted: what Ctrl-C means for what the command has done so far.
    """
    if logging.lastResort is not None:  # it prints warnings where no handler is set up
        logging.lastResort.setFormatter(VisibleFormatter())
    with suppress(AttributeError, ValueError):  # a stream that cannot have the character a name has shows its number
        cast(io.TextIOWrapper, sys.stdout).reconfigure(errors="backslashreplace")
    try:
        return command() or 0
    except KeyboardInterrupt:
        return _complain(interrupted, 1)
    except BrokenPipeError:  # the reader of a pipe has ended, as `head` does
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _complain(failure_text(error), 2 if isinstance(error, RequestError) else 1)


def failure_text(error: Exception) -> str:
    """Return one sentence about an exception. Of a bug, the traceback is written to a file that the sentence names."""
    if isinstance(error, (RequestError, RunError, StoreError)):
        return _text_of(error)
    if _is_out_of_memory(error):
        return f"out of memory ({_text_of(error)}): ask for less at once, or run where there is more"
    if isinstance(error, OSError):
        return _os_error_text(error)
    if isinstance(error, (ValueError, RuntimeError)) and _text_of(error).startswith(NO_PATH):
        return f"a file name that no file system has: {_first_line(error)}"
    if isinstance(error, CIRCUMSTANCES) or _is_of_files(error):
        return f"{type(error).__name__}: {_first_line(error)}"
    return _bug_text(error)


def _complain(message: str, code: int) -> int:
    remark(f"error: {message}")
    return code


def _os_error_text(error: OSError) -> str:
    """Return what the system says, and of which files."""
    if error.errno is None or not error.strerror:
        return f"{type(error).__name__}: {_first_line(error)}"
    paths = " -> ".join(os.fsdecode(path) for path in (error.filename, error.filename2) if isinstance(path, (str, bytes)))
    return f"{paths or type(error).__name__}: {error.strerror}"


def _is_out_of_memory(error: Exception) -> bool:
    try:
        return classify(error) == "out of memory"
    except ValueError:  # its text cannot be written
        return False


def _is_of_files(error: Exception) -> bool:
    """Return whether DuckDB or Arrow raised it; their classes are not imported for that."""
    return any(base.__module__.partition(".")[0] in LIBRARIES_OF_FILES for base in type(error).__mro__)


def _bug_text(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    report = "".join(traceback.format_exception(error))
    header = f"ksweep {VERSION}, Python {sys.version.split()[0]}\n{sys.argv}\n\n"
    return (
        f"unexpected {type(error).__name__}: {_first_line(error)}{where}. That is a bug in ksweep, or in a part of your own "
        f"that the spec names; its traceback is in {_write_report(header + report)}"
    )


def _write_report(text: str) -> Path:
    """Write a file that only its owner can read, below the ksweep home or where temporary files go, and return its path."""
    name = f"{time.strftime('%Y%m%dT%H%M%S')}-"
    for directory in (_tracebacks, tempfile.gettempdir):
        try:
            folder = Path(directory())
            folder.mkdir(parents=True, exist_ok=True)
            handle, path = tempfile.mkstemp(dir=folder, prefix=name, suffix=".txt")
            with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            return Path(path)
        except (OSError, RuntimeError):  # a read-only home, no home, a full disk
            continue
    return Path(os.devnull)


def _tracebacks() -> str:
    return str(home() / "tracebacks")


def _text_of(error: Exception) -> str:
    try:
        return str(error) or type(error).__name__
    except ValueError:  # a number of more than 4300 digits
        return type(error).__name__


def _first_line(error: Exception) -> str:
    line = next(iter(_text_of(error).splitlines()), "")
    return line if len(line) <= 500 else f"{line[:500]} ..."
