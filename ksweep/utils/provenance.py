"""Provenance of a result: commit, machine, packages, command."""

from __future__ import annotations

import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("ksweep", "torch", "transformers", "peft", "numpy", "pyarrow", "duckdb", "submitit")


def provenance() -> dict[str, Any]:
    """Return facts about this process that do not change the numbers but help to explain them."""
    commit, dirty = git_state(Path(__file__).parent)
    return {
        "argv": sys.argv,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "git_commit": commit,
        "git_dirty": dirty,
        "packages": {name: _version(name) for name in PACKAGES},
    }


def git_state(path: Path) -> tuple[str | None, bool | None]:
    """Return the commit of the checkout around a path, and whether tracked files differ from it; None outside a checkout."""
    commit = _git(path, "rev-parse", "HEAD")
    if commit is None:
        return None, None
    return commit, bool(_git(path, "status", "--porcelain", "--untracked-files=no"))


def _git(path: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(path), *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
