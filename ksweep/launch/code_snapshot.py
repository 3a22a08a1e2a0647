"""Snapshots of the code that jobs run: a copy of the working tree at submission, one per commit and difference from it.

logs/code/<commit>-<digest>/       the files: tracked ones and new ones that git does not ignore
logs/code/<commit>-<digest>.json   written last: the copy is complete
logs/code/<commit>-<digest>.diff   the difference from the commit
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ksweep.utils.errors import RunError
from ksweep.utils.files import publish

MAX_UNTRACKED_BYTES = 500_000_000
"""More bytes of new files than this are data, which git should be told to ignore, and not code."""


@dataclass(frozen=True)
class CodeSnapshot:
    """Where a job imports its code from, and which commit and difference that is."""

    path: Path
    commit: str
    diff: Path | None
    """The difference to the commit, new files included; None where there is none."""


def snapshot_code(logs: Path, package: Path | None = None) -> CodeSnapshot | None:
    """Snapshot the checkout that a package (this one) lies in, unless that snapshot exists; None outside a checkout.

    Raises:
        RunError: new files that git does not ignore are too large to be code.
    """
    root = _root(package or Path(__file__).parents[1])
    if root is None:
        return None
    ignore = logs / ".gitignore"
    if not ignore.exists():  # wherever logs lie, they are not code
        publish(ignore, b"*\n")
    commit = _git(root, "rev-parse", "HEAD").decode().strip()
    new = _names(root, "--others", "--exclude-standard")
    _check_untracked_size(root, new)
    diff = _difference(root, new)
    key = f"{commit[:12]}-{hashlib.sha256(diff).hexdigest()[:12]}"
    directory = logs / "code" / key
    marker, patch = directory.with_name(f"{key}.json"), directory.with_name(f"{key}.diff")
    if not marker.exists():
        if diff:
            publish(patch, diff)
        files = [name for name in [*_names(root, "--cached"), *new] if (root / name).is_symlink() or (root / name).is_file()]
        _copy(root, files, directory)
        publish(marker, json.dumps({"commit": commit, "files": len(files)}).encode())
    return CodeSnapshot(directory, commit, patch if diff else None)


def _root(path: Path) -> Path | None:
    try:
        top = Path(_git(path, "rev-parse", "--show-toplevel").decode().strip())
    except (OSError, subprocess.SubprocessError):
        return None
    # An installed package may lie inside somebody's checkout (a virtual environment), without being part of it.
    tracked = subprocess.run(
        ["git", "-C", str(top), "ls-files", "--error-unmatch", str(path / "__init__.py")], capture_output=True, check=False
    )
    return top if tracked.returncode == 0 else None


def _difference(root: Path, new: list[str]) -> bytes:
    """Return changes to tracked files, and all of new ones, as a patch that git can apply."""
    parts = [_git(root, "diff", "--binary", "HEAD")]
    for name in new:
        done = subprocess.run(
            ["git", "-C", str(root), "diff", "--binary", "--no-index", "--", "/dev/null", name], capture_output=True, check=False
        )
        parts.append(done.stdout)
    return b"".join(parts)


def _copy(root: Path, files: list[str], directory: Path) -> None:
    """Copy files to another name, then rename: an interrupted copy is never mistaken for a whole one."""
    staged = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}")
    try:
        for name in files:
            target = staged / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target, follow_symlinks=False)
        if directory.exists():  # without its marker: left by a copy that was cut short between the two
            shutil.rmtree(directory)
        os.replace(staged, directory)
    except OSError:
        if not directory.is_dir():  # another launcher may have put its own, equal one there
            raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _check_untracked_size(root: Path, new: list[str]) -> None:
    sizes = {name: (root / name).lstat().st_size for name in new}
    if sum(sizes.values()) > MAX_UNTRACKED_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        raise RunError(
            f"{root} has {sum(sizes.values()) / 1e9:.1f} GB of new files that git does not ignore (largest: {largest}), and jobs "
            "run a copy of the working tree: name data in .gitignore, or move it away"
        )


def _names(root: Path, *options: str) -> list[str]:
    return [name for name in _git(root, "ls-files", "-z", *options).decode().split("\0") if name]


def _git(root: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, timeout=120, check=True).stdout
