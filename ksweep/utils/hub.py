"""Find checkpoints and digest their contents: a path or hub id -> a local path, a path -> a digest."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from ksweep.utils.errors import CheckpointError
from ksweep.utils.files import home, named_path, publish
from ksweep.utils.hub_repository import SPELLING, HubSource, download, hub_readings, needed_files
from ksweep.utils.planning_pass import once_per_pass

log = logging.getLogger(__name__)

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?$")
SNAPSHOT = re.compile(
    r"(?P<root>.*/(?P<kind>models|datasets)--(?P<repo>[^/]+--[^/]+)/snapshots/(?P<commit>[^/]+))(?:/(?P<folder>.+))?"
)
"""A path in the cache of the hub."""
LOCAL_FOLDERS_ABOVE = 2


CONTENT_SUFFIXES = (".safetensors", ".bin", ".pt", ".json", ".yaml", ".model", ".txt", ".jinja", ".parquet", ".jsonl", ".arrow")
"""Files of a checkpoint directory that change what it computes. README, LICENSE and pictures do not."""


DATASETS_CACHE = re.compile(r"cache-.*\.arrow")
"""Files that `datasets` writes into a saved data set when someone maps or filters it; reading the data set ignores them."""


MODEL_LOADING = threading.RLock()
"""Held while transformers loads weights: it swaps methods of its classes for that time, and two threads at once leave them
swapped (weights are then never tied again in this process; seen with transformers 5.23)."""


def resolve(source: str, what: str = "model") -> Path:
    """Return the local directory or file of a path or hub id. A hub id is downloaded first unless the hub cache has it.

    A hub id is owner/name, with @revision, /folder or both behind it (docs/checkpoints.md).

    Raises:
        CheckpointError: the path does not exist, or the hub id cannot be downloaded.
    """
    path = named_path(source)
    if path.exists():
        return path.resolve()
    if home() in path.parents:
        raise CheckpointError(
            f"no {what} at {source!r} yet: `make demo-model` (python scripts/fetch_demo_model.py) puts the demo's base there"
        )
    if source.startswith((".", "/", "~")) or _is_mistyped_path(source) or not hub_readings(source):
        raise CheckpointError(
            f"no {what} at {source!r}: expected an existing path, or a hub id such as {SPELLING}. "
            "Check the spelling, and that a relative path starts from the current directory."
        )
    return download(source, what)


def _is_mistyped_path(source: str) -> bool:
    """Return whether a text of three or more parts begins with a directory that is here: owner/name/folder is one on the hub."""
    first, *others = source.split("/")
    return len(others) > 1 and "@" not in source and Path(first).is_dir()


@once_per_pass
def without_revision(source: str) -> str:
    """Return a hub id without its revision: "owner/name", or "owner/name/folder"; a path is returned as it is."""
    if "@" not in source or os.path.exists(source):
        return source
    readings = hub_readings(source)
    return str(replace(readings[0], revision=None)) if readings else source


def repository_root(path: Path) -> Path | None:
    """Return the directory of the hub's cache that holds the whole repository of a model in it (`.../snapshots/<commit>`).

    None for any other path.
    """
    match = SNAPSHOT.fullmatch(str(path))
    return Path(match["root"]) if match and match["kind"] == "models" else None


def is_named_after(hub_id: str, path: Path) -> bool:
    """Return whether a directory is named after a model, as .../NAME or as the hub's .../models--OWNER--NAME/snapshots/REVISION.

    Parent directories are not compared: training outputs often lie below a directory with the base's name.
    """
    name, parts = hub_id.partition("@")[0].rpartition("/")[2].lower(), path.absolute().parts
    if len(parts) > 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].lower().rpartition("--")[2] == name
    return path.absolute().name.lower() == name


def folders_upwards(path: Path) -> list[Path]:
    """Return the folder of a checkpoint and those above it in which its sidecar may lie, nearest first.

    `next((f / NAME for f in folders_upwards(path) if (f / NAME).is_file()), None)` finds a sidecar. In a repository of the hub
    the last one is its root. Of a local path at most two are above it, as in `run/iter_000100/critic`; none is a home directory.

    Args:
        path: what `resolve` returned; of a file, its folder is the first.
    """
    folder = path.parent if path.is_file() else path
    if (root := repository_root(path)) is not None:
        return [f for f in (folder, *folder.parents) if f == root or root in f.parents]
    above = [f for f in folder.parents[:LOCAL_FOLDERS_ABOVE] if f not in (Path.home(), Path(f.anchor))]
    return [folder, *above]


def hub_spelling(path: Path) -> str | None:
    """Return where a path in the hub's cache comes from: "owner/name@commit/folder" of a model, "datasets/owner/name@commit".

    None for any other path.
    """
    match = SNAPSHOT.fullmatch(str(path))
    if match is None:
        return None
    repo, is_model = match["repo"].replace("--", "/"), match["kind"] == "models"
    return str(HubSource(repo, match["commit"], match["folder"] or "")) if is_model else f"datasets/{repo}@{match['commit']}"


@contextmanager
def noted_revisions() -> Iterator[set[str]]:
    """Collect `hub_spelling` of everything from the hub whose content is digested, or noted, in the context."""
    revisions: set[str] = set()
    token = _revisions.set(revisions)
    try:
        yield revisions
    finally:
        _revisions.reset(token)


_revisions: ContextVar[set[str] | None] = ContextVar("revisions", default=None)


def note_revision(spelling: str | None) -> None:
    """Add the spelling of something from the hub to the `noted_revisions` of the context; None adds nothing."""
    if (revisions := _revisions.get()) is not None and spelling is not None:
        revisions.add(spelling)


def content_digest(path: Path, with_subdirectories: bool = True, leave_out: Sequence[str] = ()) -> str:
    """Return the SHA-256 over names and contents of a checkpoint's files, 32 hex digits. File digests are remembered on disk.

    Args:
        leave_out: patterns of names of files that do not count, such as `NEVER_NEEDED`.
    """
    note_revision(hub_spelling(path))
    if path.is_file():
        return _file_digest(path)[:32]
    files = _content_files(path)
    if not with_subdirectories:
        files = [p for p in files if p.parent == path]
    files = [p for p in files if not any(fnmatchcase(p.name, pattern) for pattern in leave_out)]
    if not files:
        raise CheckpointError(f"{path} holds no model files ({', '.join(CONTENT_SUFFIXES[:3])}, ...): is it the right directory?")
    lines = [f"{p.relative_to(path).as_posix()} {_file_digest(p)}" for p in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def _content_files(path: Path) -> list[Path]:
    """Return the files of a checkpoint or data set, sorted; in a hub repository without those of checkpoints in folders below."""
    if repository_root(path) is not None:
        there = (p for p in (*path.glob("*"), *path.glob("*/*")) if p.is_file())
        return [path / name for name in needed_files(p.relative_to(path).as_posix() for p in there)]
    content = (
        p for p in path.rglob("*") if p.is_file() and p.suffix in CONTENT_SUFFIXES and not DATASETS_CACHE.fullmatch(p.name)
    )
    return sorted(p for p in content if ".cache" not in p.relative_to(path).parts)  # hub clients keep their metadata there


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
