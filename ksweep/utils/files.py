"""Write files that readers see whole or not at all, clear what killed writers left behind, and lock. No torch here."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ksweep.utils.console import remark
from ksweep.utils.errors import CheckpointError, DataError, RequestError, RunError
from ksweep.utils.plain_values import PlainValueError, bounded_json, bounded_json_row
from ksweep.utils.text import bounded_repr

if TYPE_CHECKING:
    from filelock import BaseFileLock

log = logging.getLogger(__name__)

NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
"""Error numbers of file systems without hard links."""

READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
"""Error numbers of a directory that one may read and not write."""

LEFTOVER_AGE = 3600.0
"""Seconds after which no living process writes to a *.part file any more."""

LARGEST_JSON, LARGEST_LINE = 32 << 20, 64 << 20
"""Bytes of a JSON file of somebody else, and of a line of .jsonl. The weight index of the largest public models has 15 MB."""

LOCAL_FILE_SYSTEMS = ("ext", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "f2fs", "apfs", "hfs", "ramfs", "rootfs", "vfat", "ntfs")


def named_path(source: str | Path, refuse: type[RequestError] = CheckpointError) -> Path:
    """Return the path that a text of a user or of a file names, with ~ replaced by the home directory.

    Raises:
        The error of `refuse`: no file can have such a name, as one of 300 letters, or one in the home directory of nobody.
    """
    try:
        path = Path(source).expanduser()
        path.exists()
    except PermissionError:
        return path
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise refuse(f"{bounded_repr(source)} cannot name a file ({reason}). Check the spelling.") from error
    return path


def home() -> Path:
    """Return the directory of downloads, remembered digests and GPU leases: $KSWEEP_HOME, or ~/.cache/ksweep."""
    return Path(os.environ.get("KSWEEP_HOME") or Path.home() / ".cache" / "ksweep")


def flush_to_disk(path: Path) -> None:
    """Flush a file, or the names in a directory, so that a power cut does not undo them."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(path: Path, data: bytes, *, durable: bool = True, mode: int = 0o666) -> None:
    """Write a file under a temporary name, flush it, and rename it to `path`: readers see all of it or none.

    `durable=False` skips the flush to disk, for files that are worth nothing after a crash (heartbeats). `mode` has the
    permissions that the file gets at most; the umask takes from them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(temporary, umask_permissions() & mode)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def publish_output(path: Path, data: bytes, advice: str) -> None:
    """Publish a file that people asked for.

    Raises:
        RunError: one may not write there; `advice` says what to do.
    """
    try:
        publish(path, data)
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise
        raise RunError(f"{path} cannot be written ({error.strerror}): {advice}") from error


def publish_once(path: Path, data: bytes) -> bool:
    """Publish a file unless it exists, and return whether this call did. Of several concurrent writers the first wins.

    On a file system without hard links the last of several concurrent writers wins.
    """
    if path.exists():
        return False
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    publish(temporary, data)
    try:
        return link_once(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def link_once(temporary: Path, path: Path) -> bool:
    """Give a complete file its name unless that exists, and return whether this call did. The caller removes `temporary`.

    On a file system without hard links the last of several concurrent writers wins.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        os.replace(temporary, path)
    return True


def json_names(folder: Path) -> set[str]:
    """Return the names of a folder's JSON files without ".json". Files still being written begin with a dot and are left out."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return set()
    return {name.removesuffix(".json") for name in names if name.endswith(".json") and not name.startswith(".")}


def leftovers(directory: Path, older_than: float = LEFTOVER_AGE) -> Iterator[Path]:
    """Yield the *.part files that killed processes left in a directory, once they are older than `older_than` seconds."""
    for path in directory.glob(".*.part"):
        with suppress(OSError):  # another process has removed it
            if time.time() - path.stat().st_mtime > older_than:
                yield path


def clear_leftovers(directory: Path) -> None:
    """Remove the `leftovers` of a directory."""
    for path in leftovers(directory):
        with suppress(OSError):
            path.unlink()


@contextmanager
def locked(path: Path, holder: str, *, patience: float | None = None, aloud: bool = False) -> Iterator[bool]:
    """Lock a file while the body runs, and yield whether the lock is held. The kernel frees the lock of a process that dies.

    The lock is not held where the file system has no locks (Lustre without `-o flock` says ENOSYS, others EOPNOTSUPP), or when
    another process has held it for `patience` seconds: running the body twice at once must then be harmless.

    Args:
        holder: who else may hold the lock, for messages: "another command".
        aloud: print to standard error that this process waits.

    Raises:
        OSError: this process may not write the file, or there is no space for it.
    """
    from filelock import FileLock  # brings asyncio along: a quarter of a second on a slow core

    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():  # whoever may create files there may lock, whatever this user's umask is
        path.touch()
        with suppress(PermissionError):  # another user has made it between the two looks
            path.chmod(0o600 | (path.parent.stat().st_mode & 0o066))
    path.open("a").close()  # any error after this one is about locks
    lock = FileLock(path, fallback_to_soft=False)  # a marker file instead of a lock would outlive a process that dies
    held = _acquire(lock, path, holder, patience, aloud)
    try:
        yield held
    finally:
        lock.release()


def _acquire(lock: BaseFileLock, path: Path, holder: str, patience: float | None, aloud: bool) -> bool:
    from filelock import Timeout

    try:
        if aloud:
            with suppress(Timeout):
                lock.acquire(blocking=False)
                return True
            remark(f"{holder} is at work in {path.parent}: waiting for it")
        lock.acquire(timeout=-1 if patience is None else patience)
    except Timeout:
        log.warning("%s has held %s for %.0f s: continuing beside it", holder, path, patience)
        return False
    except OSError as error:
        _warn_once(f"{path.parent} cannot be locked ({error.strerror}): start one command at a time there")
        return False
    return True


@lru_cache
def _warn_once(message: str) -> None:
    log.warning("%s", message)


def on_local_disk(path: Path) -> bool:
    """Return whether a path lies on a disk of this machine, where what another process has written is visible at once."""
    import psutil

    resolved = path.resolve()
    mounts = [m for m in psutil.disk_partitions(all=True) if resolved.is_relative_to(m.mountpoint)]
    kind = max(mounts, key=lambda m: len(m.mountpoint)).fstype if mounts else ""
    return kind.startswith(LOCAL_FILE_SYSTEMS)


def umask_permissions() -> int:
    """Return the mode that open() would give a new file: `tempfile` makes files private, and registries are shared."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def read_json(path: Path, what: str) -> dict[str, object]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: it cannot be read, is not JSON, is not an object, or is out of the bounds of `ksweep.utils.plain_values`;
            the message names `what` and the path.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_JSON + 1)
        if len(data) > LARGEST_JSON:
            raise PlainValueError(f"it has more than {LARGEST_JSON >> 20} MB")
        value = bounded_json(data)
    except OSError as error:
        raise CheckpointError(f"{what} {path} cannot be read: {error.strerror}") from error
    except PlainValueError as error:
        raise CheckpointError(f"{what} {path} is refused: {error}. Is it the right file?") from error
    except ValueError as error:
        raise CheckpointError(f"{what} {path} is not valid JSON ({error}); is the file whole?") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} {path} holds a {type(value).__name__}, expected a JSON object")
    return value


def json_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the objects of a .jsonl file; blank lines are passed over.

    Raises:
        DataError: a line is no JSON object, or is out of the bounds of `ksweep.utils.plain_values`; the message has its number.
    """
    with path.open("rb") as file:
        lines = iter(lambda: file.readline(LARGEST_LINE + 1), b"")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                if len(line) > LARGEST_LINE:
                    raise PlainValueError(f"it has more than {LARGEST_LINE >> 20} MB")
                record = bounded_json_row(line)
            except UnicodeDecodeError as error:
                raise DataError(f"line {number} of {path} is not UTF-8 ({error.reason}): convert the file first") from error
            except PlainValueError as error:
                raise DataError(f"line {number} of {path} is refused: {error}. Correct or drop it.") from error
            except (ValueError, RecursionError) as error:
                raise DataError(f"line {number} of {path} is not JSON ({error}); expected one object a line") from error
            if not isinstance(record, dict):
                what = type(record).__name__
                raise DataError(f"line {number} of {path} is a {what}; expected an object such as {{'text': '...'}}")
            yield record
