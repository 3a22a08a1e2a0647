"""Snapshots of the code that jobs run: a copy of the working tree at submission, one per commit and difference from it.

logs/code/<commit>-<digest>/       the files: tracked ones, and new ones that a job may import; modes are kept
logs/code/<commit>-<digest>.json   written last: the copy is complete; names the new files in it, and counts those left out
logs/code/<commit>-<digest>.diff   the difference of tracked files from the commit

Files that git neither tracks nor ignores may hold anything, a `.env` with tokens for instance: see `provenance.new_files`.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import stat
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ksweep.launch.ownership import is_own
from ksweep.utils.errors import RunError
from ksweep.utils.files import publish
from ksweep.utils.provenance import new_files

MAX_UNTRACKED_BYTES = 500_000_000
"""More bytes of new files than this are data, which git should be told to ignore, and not code."""


@dataclass(frozen=True)
class CodeSnapshot:
    """Where a job imports its code from, and which commit and difference that is."""

    path: Path
    commit: str
    diff: Path | None
    """The difference of tracked files from the commit; None where there is none."""
    new: tuple[str, ...] = ()
    """New files in the copy."""
    num_left_out: int = 0
    """Other new files, which the copy does not have."""


def snapshot_code(logs: Path, package: Path | None = None) -> CodeSnapshot | None:
    """Snapshot the checkout that a package (this one) lies in, unless that snapshot exists; None outside a checkout.

    Raises:
        RunError: new files within packages are too large to be code.
    """
    root = _root(package or Path(__file__).parents[1])
    if root is None:
        return None
    ignore = logs / ".gitignore"
    if not ignore.exists():  # wherever logs lie, they are not code
        publish(ignore, b"*\n")
    commit = _git(root, "rev-parse", "HEAD").decode().strip()
    new = new_files(root, _names(root, "--others", "--exclude-standard"))
    _check_size(root, new.code)
    diff = _git(root, "diff", "--binary", "HEAD")
    directory = _own_directory(logs / "code" / f"{commit[:12]}-{_digest(root, diff, new.code)}")
    key = directory.name
    marker, patch = directory.with_name(f"{key}.json"), directory.with_name(f"{key}.diff")
    if not (marker.exists() and directory.exists()):
        if diff:
            publish(patch, diff, mode=_mode_of_diff(root))
        files = [name for name in [*_names(root, "--cached"), *new.code] if (root / name).is_symlink() or (root / name).is_file()]
        _copy(root, files, directory)
        facts = {"commit": commit, "files": len(files), "new": new.code, "left_out": len(new.others)}
        publish(marker, json.dumps(facts).encode())
    return CodeSnapshot(directory, commit, patch if diff else None, new.code, len(new.others))


def _own_directory(directory: Path) -> Path:
    """Return a directory's name, or another one where somebody else has taken it: their files are not to be run."""
    others = [directory.with_name(f"{directory.name}-{end}") for end in (os.geteuid(), secrets.token_hex(4))]
    return next(own for own in (directory, *others) if not os.path.lexists(own) or is_own(own))


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


def _digest(root: Path, diff: bytes, new: Sequence[str]) -> str:
    """Return a digest of what the copy has beside the commit: changes to tracked files, and new files."""
    digest = hashlib.sha256(diff)
    for name in new:
        path = root / name
        content = os.fsencode(os.readlink(path)) if path.is_symlink() else path.read_bytes()
        digest.update(os.fsencode(f"\0{name}\0{path.lstat().st_mode}\0") + hashlib.sha256(content).digest())
    return digest.hexdigest()[:12]


def _mode_of_diff(root: Path) -> int:
    """Return the permissions that every changed file has: the difference must not be more readable than they are."""
    mode = 0o666
    for name in _git(root, "diff", "--name-only", "-z", "HEAD").split(b"\0"):
        path = root / os.fsdecode(name)
        if name and path.is_file():
            mode &= path.stat().st_mode
    return mode | 0o600


def _copy(root: Path, files: Sequence[str], directory: Path) -> None:
    """Copy files with their modes to another name, then rename: an interrupted copy is never mistaken for a whole one."""
    staged = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}")
    try:
        staged.mkdir(parents=True, mode=0o700)  # nobody else looks in before the modes are those of the tree
        folders = {Path(): None}
        for name in files:
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, staged / name, follow_symlinks=False)
            folders |= dict.fromkeys(Path(name).parents)
        for folder in folders:
            os.chmod(staged / folder, stat.S_IMODE((root / folder).stat().st_mode) | stat.S_IRWXU)
        if directory.exists():  # without its marker: left by a copy that was cut short between the two
            shutil.rmtree(directory)
        os.replace(staged, directory)
    except OSError:
        if not directory.is_dir():  # another launcher may have put its own, equal one there
            raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _check_size(root: Path, new: Sequence[str]) -> None:
    sizes = {name: (root / name).lstat().st_size for name in new}
    if sum(sizes.values()) > MAX_UNTRACKED_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        raise RunError(
            f"{root} has {sum(sizes.values()) / 1e9:.1f} GB of new files within its packages (largest: {largest}), and "
            "jobs run a copy of them: name data in .gitignore, or move it away"
        )


def _names(root: Path, *options: str) -> list[str]:
    return [os.fsdecode(name) for name in _git(root, "ls-files", "-z", *options).split(b"\0") if name]


def _git(root: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, timeout=120, check=True).stdout
