"""Files: path or hub id -> local directory, directory -> content digest, bytes -> a file that is whole or absent.

No torch here: the launcher plans with these before any model is loaded.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import psutil

from ksweep.utils.errors import CheckpointError

log = logging.getLogger(__name__)

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?$")

CONTENT_SUFFIXES = (".safetensors", ".bin", ".pt", ".json", ".yaml", ".model", ".txt", ".jinja", ".parquet", ".jsonl", ".arrow")
"""Files of a checkpoint directory that change what it computes. README, LICENSE and pictures do not."""


DATASETS_CACHE = re.compile(r"cache-.*\.arrow")
"""What `datasets` leaves in a saved data set when someone maps or filters it, and does not read with it."""

MODEL_LOADING = threading.RLock()
"""Held while transformers loads weights: it swaps methods of its classes meanwhile, and two threads at once leave them
swapped (weights are then never tied again in this process; seen with transformers 5.23)."""


def home() -> Path:
    """Where downloads, remembered digests and what was compiled are kept: $KSWEEP_HOME, or ~/.cache/ksweep."""
    return Path(os.environ.get("KSWEEP_HOME") or Path.home() / ".cache" / "ksweep")


def resolve(source: str, what: str = "model") -> Path:
    """Local directory or file of a path or hub id; a hub id is downloaded (or found in the hub cache) first.

    Raises:
        CheckpointError: nothing at the path, and not a hub id that can be had.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path.resolve()
    if home() in path.parents:
        raise CheckpointError(
            f"no {what} at {source!r} yet: `make demo-model` (python scripts/fetch_demo_model.py) puts the demo's base there"
        )
    if source.startswith((".", "/", "~")) or not HUB_ID.match(source):
        raise CheckpointError(
            f"no {what} at {source!r}: expected an existing path, or a hub id such as owner/name or owner/name@revision. "
            "Check the spelling, and that a relative path starts from the current directory."
        )
    return _hub_snapshot(source, what)


def _hub_snapshot(source: str, what: str) -> Path:
    from huggingface_hub import snapshot_download  # heavy; only when a hub id is given
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repo, _, revision = source.partition("@")
    ignore = ["*.gguf", "*.onnx", "*.msgpack", "*.h5", "original/*"]
    try:
        return Path(snapshot_download(repo, revision=revision or None, ignore_patterns=ignore))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{what} {source!r} is neither a local path nor to be had from the model hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0][:200]}). Check the spelling, log in for gated models (hf auth login), "
            "or pass a local directory."
        ) from error


def digest(path: Path) -> str:
    """SHA-256 over the names and contents of what matters at a path, as 32 hex digits. Remembered by (path, size, mtime)."""
    if path.is_file():
        return _file_digest(path)[:32]
    found = (p for p in path.rglob("*") if p.is_file() and p.suffix in CONTENT_SUFFIXES and not DATASETS_CACHE.fullmatch(p.name))
    files = sorted(p for p in found if ".cache" not in p.relative_to(path).parts)  # where hub clients keep their notes
    if not files:
        raise CheckpointError(f"{path} holds no model files ({', '.join(CONTENT_SUFFIXES[:3])}, ...): is it the right directory?")
    lines = [f"{p.relative_to(path).as_posix()} {_file_digest(p)}" for p in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def _file_digest(path: Path) -> str:
    stat = path.stat()
    # ctime changes on every rewrite, also when a copy tool sets mtime back.
    key = hashlib.sha256(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}".encode()).hexdigest()[:32]
    remembered = home() / "digests" / key
    with suppress(OSError):
        text = remembered.read_text()
        if re.fullmatch(r"[0-9a-f]{64}", text):
            return text
    with path.open("rb") as file:
        value = hashlib.file_digest(file, "sha256").hexdigest()
    with suppress(OSError):  # a read-only home only costs the time of hashing again
        publish(remembered, value.encode())
    return value


def publish(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a file beside its place, flush it, and rename it into it: readers see all of it or none.

    `durable=False` leaves out the flush to disk, for what is worth nothing after a crash (heartbeats).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(temporary, readable_by_colleagues())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
"""What a file system says that has no hard links."""


def publish_once(path: Path, data: bytes) -> None:
    """Write a file that is never written again, all of it or nothing; of several who write it the first wins."""
    if path.exists():
        return
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    publish(temporary, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def json_names(folder: Path) -> set[str]:
    """Names of the JSON files of a folder, without their ending; what is still being written begins with a dot."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return set()
    return {name.removesuffix(".json") for name in names if name.endswith(".json") and not name.startswith(".")}


LOCK_POLL_SECONDS = 0.05

LEFTOVER_AGE = 3600.0
"""Seconds after which a *.part file belongs to nobody alive."""


def leftovers(directory: Path, older_than: float = LEFTOVER_AGE) -> Iterator[Path]:
    """What processes that were killed while writing have left here, once it is old enough to be nobody's."""
    for path in directory.glob(".*.part"):
        with suppress(OSError):  # someone else was quicker
            if time.time() - path.stat().st_mtime > older_than:
                yield path


def clear_leftovers(directory: Path) -> None:
    """Remove them."""
    for path in leftovers(directory):
        with suppress(OSError):
            path.unlink()


@contextmanager
def locked(path: Path, holder: str, *, patience: float | None = None, aloud: bool = False) -> Iterator[bool]:
    """Hold the lock of a file, which the kernel takes from a process that dies; whether it is held.

    It is not where the file system has no locks (Lustre without `-o flock` says ENOSYS, others EOPNOTSUPP), or where somebody
    has held it for `patience` seconds: what is done under it must then be harmless to do twice. `holder` names who holds it,
    for messages; with `aloud` people are told that they wait.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        yield _lock(file.fileno(), path, holder, patience, aloud)


def _lock(handle: int, path: Path, holder: str, patience: float | None, aloud: bool) -> bool:
    deadline = None if patience is None else time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if deadline is not None and time.monotonic() > deadline:
                log.warning("%s has held %s for %.0f s: going on beside it", holder, path, patience)
                return False
            if aloud:
                print(f"{holder} is at work in {path.parent}: waiting for it", file=sys.stderr)
                aloud = False
            time.sleep(LOCK_POLL_SECONDS)
        except OSError as error:
            _say_once(f"{path.parent} cannot be locked ({error.strerror}): start one command at a time there")
            return False


@lru_cache
def _say_once(words: str) -> None:
    log.warning("%s", words)


LOCAL_FILE_SYSTEMS = ("ext", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "f2fs", "apfs", "hfs", "ramfs", "rootfs", "vfat", "ntfs")


def on_local_disk(path: Path) -> bool:
    """Whether a path lies on a disk of this machine, where what another process has written is seen at once."""
    place = path.resolve()
    mounts = [m for m in psutil.disk_partitions(all=True) if place.is_relative_to(m.mountpoint)]
    kind = max(mounts, key=lambda m: len(m.mountpoint)).fstype if mounts else ""
    return kind.startswith(LOCAL_FILE_SYSTEMS)


def readable_by_colleagues() -> int:
    """The mode a file would have had from open(): temporary files are made private, and registries are shared."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def read_json(path: Path, what: str) -> dict[str, object]:
    """A JSON object from a file, or a CheckpointError that names it."""
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{what} {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{what} {path} is not valid JSON ({error}); is the file whole?") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} {path} holds a {type(value).__name__}, expected a JSON object")
    return value
