"""Whose a job is. What somebody else's job directory says is shown; it is not run, not obeyed, and nothing is written for it."""

from __future__ import annotations

import json
import os
import pwd
import stat
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from ksweep.launch.job import Job, logs_directory, read_or

ROOT_UID = 0
"""Root's files are trusted, as OpenSSH trusts them: root can run anything as anybody."""
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def is_own(path: Path) -> bool:
    """Return whether a file or directory is this user's or root's. A link is its own owner's, wherever it leads.

    Where a file system gives all files one owner (NFS with all_squash), those of others count as own: nobody can tell.

    Raises:
        OSError: there is no such file.
    """
    uid = path.lstat().st_uid
    # Not in the directory itself, which may be somebody else's, but in that of logs (or of submissions) above it.
    return uid in (os.geteuid(), ROOT_UID) or uid == _uid_of_new_files(path.parent.parent)


def may_cancel(job: Job) -> bool:
    """Return whether this user may cancel a job: an own one; as root, who may be the same person, one of anybody on this machine.

    `is_signalled` says which processes of it root signals.

    Raises:
        OSError: the job's directory is gone.
    """
    return is_own(job.path / "job.json") or (os.geteuid() == ROOT_UID and read_or(job.slurm_id, "") is None)


def may_finalize(job: Job) -> bool:
    """Return whether this user may record a job's end: that of an own job; as root that of any whose registry is beside its logs.

    Raises:
        OSError: the job's directory is gone.
    """
    if is_own(job.path / "job.json"):
        return True
    registry = read_or(lambda: str(job.spec()["argument"]["registry"]), "")
    beside = bool(registry) and logs_directory(registry).resolve() == job.path.parent.resolve()
    return os.geteuid() == ROOT_UID and beside


def is_signalled(job: Job, pid: int) -> bool:
    """Return whether a process that a job names may be signalled: of another user's job only the processes of that user."""
    path = job.path / "job.json"
    try:
        return is_own(path) or os.stat(f"/proc/{pid}").st_uid == path.lstat().st_uid
    except OSError:
        return False


def owner_of(path: Path) -> str:
    """Return the name of a file's owner."""
    return _user_name(path.lstat().st_uid)


def spec_and_doubt(job: Job) -> tuple[dict[str, Any], str]:
    """Return the content of job.json, and why it may not be what this user wrote; empty where it is.

    Content and owner are those of one open file: it cannot be exchanged between two looks.
    """
    with (job.path / "job.json").open("rb") as file:
        of_file, spec = os.fstat(file.fileno()), json.loads(file.read())
    if of_file.st_uid not in (os.geteuid(), ROOT_UID):
        return spec, f"belongs to {_user_name(of_file.st_uid)}"
    if of_file.st_mode & OTHERS_WRITE:
        return spec, f"can be changed by others (job.json has mode {stat.S_IMODE(of_file.st_mode):o})"
    return spec, ""


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


@cache
def _uid_of_new_files(directory: Path) -> int | None:
    """Return the owner that a new file of this process gets in a directory; None where it may not write."""
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            return os.fstat(file.fileno()).st_uid
    except OSError:
        return None
