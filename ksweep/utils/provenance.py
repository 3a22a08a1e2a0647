"""Provenance of a result: commit, new files of the checkout, machine, packages, command."""

from __future__ import annotations

import platform
import re
import socket
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

PACKAGES = ("ksweep", "torch", "transformers", "peft", "numpy", "pyarrow", "duckdb", "submitit")

TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{40,}|glpat-[\w-]{20,}|sk-(?=[\w-]*[A-Z])(?=[\w-]*\d)[\w-]{32,}|xox[abprs]-[\w-]{20,}"
    r"|AKIA[A-Z0-9]{16})|(?<=://)[^\s/@:$]*:[^\s/$]+(?=@(?!sha256:))"
)
"""Tokens of the Hugging Face Hub, GitHub, GitLab, OpenAI, Anthropic, Slack, AWS by their prefixes; user:password in a URL, but
not variables ($USER:$PASSWORD@) or the digest of a container (image:tag@sha256:...)."""
KEY_FILES = re.compile(
    r"(.*\.(pem|key|p12|pfx|jks|kdbx|gpg|asc|env|netrc)|(id_(rsa|dsa|ecdsa|ed25519)|credentials?|secrets?|passwords?|tokens?)(\.(?!py$).*)?)",
    re.IGNORECASE,
)
"""Names of files that hold keys: they are never taken for a package's data."""


@dataclass(frozen=True)
class NewFiles:
    """Files of a checkout that git neither tracks nor ignores; names are relative to its top."""

    code: tuple[str, ...]
    """What a job may import: Python modules, and other files within packages."""
    others: tuple[str, ...]


def provenance() -> dict[str, Any]:
    """Return facts about this process that do not change the numbers but help to explain them."""
    commit, dirty = git_state(Path(__file__).parent)
    return {
        "argv": [without_tokens(word) for word in sys.argv],
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "git_commit": commit,
        "git_dirty": dirty,
        "packages": {name: _version(name) for name in PACKAGES},
    }


def without_tokens(text: str) -> str:
    """Return a text with "***" in place of tokens and passwords that their form gives away: others read what is recorded."""
    return TOKEN.sub("***", text)


def git_state(path: Path) -> tuple[str | None, bool | None]:
    """Return the commit of the checkout around a path, and whether its code differs from it; None outside a checkout.

    Code differs where tracked files do, and where there are new files that a job may import.
    """
    commit = _git(path, "rev-parse", "HEAD")
    changed = _git(path, "status", "--porcelain", "--untracked-files=no")
    top = _git(path, "rev-parse", "--show-toplevel")
    if commit is None or changed is None or top is None:
        return commit, None
    names = _git(Path(top), "ls-files", "-z", "--others", "--exclude-standard")
    return commit, None if names is None else bool(changed or new_files(Path(top), names.split("\0")).code)


def new_files(top: Path, names: Collection[str]) -> NewFiles:
    """Sort the untracked files of a checkout into code, which a job may import, and others.

    Code is a Python module anywhere, and any file below a directory with an `__init__.py`, but for dotfiles and files with names
    of key files (`KEY_FILES`). Another repository within the checkout, which git names with a slash at the end, is none.
    """
    code = tuple(name for name in names if name and not name.endswith("/") and _is_code(top, PurePosixPath(name)))
    return NewFiles(code, tuple(name for name in names if name and name not in set(code)))


def _is_code(top: Path, name: PurePosixPath) -> bool:
    if any(part.startswith(".") for part in name.parts) or KEY_FILES.fullmatch(name.name):
        return False
    return name.suffix == ".py" or any((top / folder / "__init__.py").is_file() for folder in name.parents)


def _git(path: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(path), *arguments], capture_output=True, timeout=10, check=True, errors="surrogateescape"
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
