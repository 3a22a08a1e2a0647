"""Find checkpoints and digest their contents: a path or hub id -> a local path, a path -> a digest."""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from contextlib import suppress
from pathlib import Path

from ksweep.utils.errors import CheckpointError
from ksweep.utils.files import home, publish
from ksweep.utils.planning_pass import once_per_pass

log = logging.getLogger(__name__)

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?$")


CONTENT_SUFFIXES = (".safetensors", ".bin", ".pt", ".json", ".yaml", ".model", ".txt", ".jinja", ".parquet", ".jsonl", ".arrow")
"""Files of a checkpoint directory that change what it computes. README, LICENSE and pictures do not."""


DATASETS_CACHE = re.compile(r"cache-.*\.arrow")
"""Files that `datasets` writes into a saved data set when someone maps or filters it; reading the data set ignores them."""


MODEL_LOADING = threading.RLock()
"""Held while transformers loads weights: it swaps methods of its classes for that time, and two threads at once leave them
swapped (weights are then never tied again in this process; seen with transformers 5.23)."""


def resolve(source: str, what: str = "model") -> Path:
    """Return the local directory or file of a path or hub id. A hub id is downloaded first unless the hub cache has it.

    Raises:
        CheckpointError: the path does not exist, or the hub id cannot be downloaded.
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


@once_per_pass
def without_revision(source: str) -> str:
    """Return a hub id without its revision; a path is returned as it is."""
    is_hub_id = HUB_ID.match(source) is not None and not Path(source).exists()
    return source.partition("@")[0] if is_hub_id else source


def _hub_snapshot(source: str, what: str) -> Path:
    from huggingface_hub import snapshot_download  # heavy; only when a hub id is given
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repo, _, revision = source.partition("@")
    ignore = ["*.gguf", "*.onnx", "*.msgpack", "*.h5", "original/*"]
    try:
        return Path(snapshot_download(repo, revision=revision or None, ignore_patterns=ignore))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{what} {source!r} is neither a local path nor available from the model hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0][:200]}). Check the spelling, log in for gated models (hf auth login), "
            "or pass a local directory."
        ) from error


def content_digest(path: Path) -> str:
    """Return the SHA-256 over names and contents of a checkpoint's files, 32 hex digits. File digests are remembered on disk."""
    if path.is_file():
        return _file_digest(path)[:32]
    content = (
        p for p in path.rglob("*") if p.is_file() and p.suffix in CONTENT_SUFFIXES and not DATASETS_CACHE.fullmatch(p.name)
    )
    files = sorted(p for p in content if ".cache" not in p.relative_to(path).parts)  # hub clients keep their metadata there
    if not files:
        raise CheckpointError(f"{path} holds no model files ({', '.join(CONTENT_SUFFIXES[:3])}, ...): is it the right directory?")
    lines = [f"{p.relative_to(path).as_posix()} {_file_digest(p)}" for p in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def _file_digest(path: Path) -> str:
    stat = path.stat()
    # ctime changes on every rewrite, also when a copy tool sets mtime back.
    key = hashlib.sha256(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}".encode()).hexdigest()[:32]
    remembered = home() / "digests" / key
    with suppress(FileNotFoundError):
        if (value := _remembered_digest(remembered)) is not None:
            return value
    with path.open("rb") as file:
        value = hashlib.file_digest(file, "sha256").hexdigest()
    with suppress(OSError):  # with a read-only home the file is hashed again next time
        publish(remembered, _digest_entry(key, value).encode())
    return value


def _remembered_digest(entry: Path) -> str | None:
    """Return the digest in an entry of the cache; None if it is damaged, or without the checksum that earlier versions left out.

    Raises:
        FileNotFoundError: there is no such entry.
    """
    try:
        text = entry.read_text(encoding="ascii")
    except FileNotFoundError:
        raise
    except (OSError, ValueError):
        text = ""
    value = text.partition(" ")[0]
    if text == _digest_entry(entry.name, value):
        return value
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        log.warning("%s is damaged: the file that it is the digest of is read and digested again", entry)
    return None


def _digest_entry(key: str, value: str) -> str:
    """Return what is remembered of a file: its digest, and a checksum over that and the name of the entry."""
    return f"{value} {hashlib.sha256(f'{key} {value}'.encode()).hexdigest()[:16]}"
