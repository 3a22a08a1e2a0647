"""Repositories of the model hub: how a source names a folder in one, which files it needs, and their download.

A source is `owner/name`, `owner/name@revision`, `owner/name/folder` or `owner/name@revision/folder`. A folder holds one
checkpoint: its own files are downloaded, and the sidecars in the folders above it.
"""

from __future__ import annotations

import errno
import glob
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from ksweep.utils.errors import CheckpointError
from ksweep.utils.planning_pass import once_per_pass
from ksweep.utils.text import some_of

log = logging.getLogger(__name__)

_REPOSITORY = r"[A-Za-z0-9][\w.-]*/[\w.-]+"
_SOURCE = re.compile(rf"(?P<repo>{_REPOSITORY})(?:@(?P<revision>[\w.-]+(?:/[^@/]+)*)|/(?P<folder>[^@/]+(?:/[^@/]+)*))?/?")
_FOLDER_FIRST = re.compile(rf"({_REPOSITORY})/([^@]+)@([^@]+)")
_ADDRESS = re.compile(rf"(?:https?://[^/]+/|hf://(?:models/)?)({_REPOSITORY})(?:/(?:tree|blob|resolve)/([^/]+)(/.+)?)?/?")

COMMIT = re.compile(r"[0-9a-f]{40}")
SPELLING = "owner/name, owner/name@revision, owner/name/folder or owner/name@revision/folder"

SIDECARS = ("nla_meta.yaml", "nla_config.json", "*.npz")
"""Files above a checkpoint's folder that may say how it is used; the last are transforms of whitened activations."""
MODEL_SUFFIXES = (".safetensors", ".bin", ".pt", ".json", ".yaml", ".model", ".txt", ".jinja", ".npz", ".tiktoken")
"""Files of a folder that can change what a model computes. README, licence, pictures, logs, GGUF and ONNX cannot."""
WEIGHTS = (".safetensors", ".bin", ".pt")
FOLDERS_OF_TEMPLATES = ("additional_chat_templates",)
NEVER_NEEDED = ("optim*", "scheduler.*", "rng_state*", "training_args.bin", "run_config*", "trainer_state.json")
"""What training leaves behind beside the weights."""
REPETITIONS = (
    (
        ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
        ("pytorch_model*.bin", "model*.bin", "*model.bin.index*.json", "consolidated*.safetensors", "consolidated*.pt",
         "consolidated*.index.json"),
    ),
    (("adapter_model.safetensors",), ("adapter_model.bin",)),
    (
        ("model.safetensors", "model-?????-of-?????.safetensors"),
        ("model.*.safetensors", "model-*.*.safetensors", "model.safetensors.index.*.json"),
    ),
    (
        ("pytorch_model.bin", "pytorch_model-?????-of-?????.bin"),
        ("pytorch_model.*.bin", "pytorch_model-*.*.bin", "pytorch_model.bin.index.*.json"),
    ),
)  # fmt: skip
"""Where a folder has one of the first, the second are the same weights once more: other formats, and variants (model.fp16)."""


@dataclass(frozen=True)
class HubSource:
    """A repository of the hub, a revision, and a folder or file in it."""

    repo: str
    revision: str | None
    """Branch, tag or commit; None is the default branch."""
    folder: str
    """Relative to the root, which is ""."""
    repo_type: Literal["model", "dataset"] = "model"

    def __str__(self) -> str:
        return self.repo + f"@{self.revision}" * (self.revision is not None) + f"/{self.folder}" * bool(self.folder)


def hub_readings(source: str) -> list[HubSource]:
    """Return what a source can mean on the hub, the likeliest first; nothing where it names no repository.

    A revision may have slashes (`refs/pr/1`, a branch `feature/x`), so `owner/name@a/b` is folder b of revision a, or else
    revision a/b. Git has no branch a beside a branch a/b, so at most one of them exists.

    Raises:
        CheckpointError: it is spelled in another way than ksweep reads; the message has the right one.
    """
    for pattern, order in ((_FOLDER_FIRST, (0, 2, 1)), (_ADDRESS, (0, 1, 2))):
        if match := pattern.fullmatch(source):
            repo, revision, folder = (match.groups()[i] for i in order)
            right = HubSource(repo, revision, (folder or "").strip("/"))
            raise CheckpointError(
                f"{source!r} is a place on the model hub in another spelling: write {str(right)!r} ({SPELLING})"
            )
    match = _SOURCE.fullmatch(source)
    if match is None or any(part in (".", "..") for part in source.split("/")):
        return []
    if match["revision"] is None:
        return [HubSource(match["repo"], None, match["folder"] or "")]
    parts = match["revision"].split("/")
    first = 3 if parts[0] == "refs" and len(parts) > 2 else 1
    return [HubSource(match["repo"], "/".join(parts[:i]), "/".join(parts[i:])) for i in range(first, len(parts) + 1)]


def needed_files(names: Iterable[str], folder: str = "") -> list[str]:
    """Return the files of a repository that the checkpoint in one of its folders needs, sorted.

    These are the folder's own files, without those of its folders (other checkpoints), and the sidecars above it. Of several
    formats of the same weights only safetensors are taken, and no variants (`model.fp16.safetensors`) beside them.

    Args:
        names: every file of the repository, relative to its root.
        folder: the checkpoint's folder or file; "" is the root.
    """
    paths = [PurePosixPath(name) for name in names]
    place = PurePosixPath(folder)
    above = [path for path in paths if path.parent in place.parents and _matches(path, SIDECARS)]
    if place in paths:
        return sorted(map(str, {place, *above}))
    places = (place, *(place / name for name in FOLDERS_OF_TEMPLATES))
    own = [path for path in paths if path.parent in places and path.suffix in MODEL_SUFFIXES and not _matches(path, NEVER_NEEDED)]
    for kept, repeated in REPETITIONS:
        if any(_matches(path, kept) for path in own):
            own = [path for path in own if not _matches(path, repeated)]
    return sorted(map(str, {*own, *above})) if own else []


def _matches(path: PurePosixPath, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path.name, pattern) for pattern in patterns)


@once_per_pass
def download(source: str, what: str) -> Path:
    """Return the local folder or file of a source on the hub, once the files that it needs are there.

    Files in the hub's cache are not downloaded again. A connection that breaks is taken up where it broke; after an interrupted
    download files that had arrived whole are kept. If the hub cannot be reached, the cache is used.

    Raises:
        CheckpointError: it cannot be had; the message says what to do.
    """
    with _explained(source, what):
        place, names, cached = _located(source, what)
        needed = needed_files(names, place.folder)
        if not needed:
            raise CheckpointError(f"{what} {source!r}: {_nothing_there(place, names)}")
        snapshot = cached or _snapshot(place, needed)
    _refuse_incomplete(f"{what} {source!r}", snapshot, needed, is_cached=cached is not None)
    return snapshot / place.folder


def download_dataset(place: HubSource, what: str, choose: Callable[[list[str]], list[str]]) -> tuple[Path, list[str]]:
    """Return the local folder of a data set on the hub, and which of its files are there; as `download` does.

    Args:
        choose: returns the files that are needed, from all files of the data set. What it raises is passed on.

    Raises:
        CheckpointError: it cannot be had; the message says what to do.
    """
    with _explained(str(place), what, place):
        names, cached = _listing(place)
    needed = choose(names)
    with _explained(str(place), what, place):
        snapshot = cached or _snapshot(place, needed)
    _refuse_incomplete(f"{what} {str(place)!r}", snapshot, needed, is_cached=cached is not None)
    return snapshot, needed


def _snapshot(place: HubSource, needed: Iterable[str]) -> Path:
    from huggingface_hub import snapshot_download

    exact = [glob.escape(name) for name in needed]
    return Path(snapshot_download(place.repo, repo_type=place.repo_type, revision=place.revision, allow_patterns=exact))


def _refuse_incomplete(what: str, snapshot: Path, needed: Sequence[str], *, is_cached: bool) -> None:
    missing = [name for name in needed if not (snapshot / name).exists()]
    if missing and not is_cached:
        raise CheckpointError(f"{what} changed on the hub while it was downloaded: run the same command again.")
    if missing:
        raise CheckpointError(
            f"{what} is only partly in the hub's cache ({snapshot}), and the hub cannot be reached: {len(missing)} of "
            f"{len(needed)} files are missing ({some_of(missing)}). Run the same command where it can be reached (without "
            "HF_HUB_OFFLINE): what is there is kept, and the download goes on."
        )


def listed(source: str, what: str) -> tuple[HubSource, list[str]]:
    """Return what a source means on the hub, and every file of its repository at that revision, relative to the root.

    Raises:
        CheckpointError: the repository cannot be had; the message says what to do.
    """
    with _explained(source, what):
        place, names, _ = _located(source, what)
    return place, names


def _located(source: str, what: str) -> tuple[HubSource, list[str], Path | None]:
    """Return the reading of a source whose revision exists, with `_listing` of it."""
    from huggingface_hub.errors import RevisionNotFoundError  # heavy; only when a hub id is given

    readings = hub_readings(source)
    for reading in readings:
        with suppress(RevisionNotFoundError):
            return reading, *_listing(reading)
    revisions = " or ".join(repr(reading.revision or "main") for reading in readings)
    raise CheckpointError(
        f"{what} {source!r}: repository {readings[0].repo} of the model hub has no revision {revisions}. Give a branch, tag or "
        f"commit of {_page(readings[0])}, as owner/name@revision or owner/name@revision/folder."
    )


@contextmanager
def _explained(source: str, what: str, place: HubSource | None = None) -> Iterator[None]:
    """Turn what the hub's client raises into a CheckpointError; a full or failing disk stays what it is."""
    from huggingface_hub import errors

    try:
        yield
    except (errors.HTTPError, errors.LocalEntryNotFoundError, OSError, ValueError) as error:
        if isinstance(error, CheckpointError) or getattr(error, "errno", None) in _OF_THE_DISK:
            raise
        reason = _reason(error, place or hub_readings(source)[0])
        text = f"{what} {source!r} is neither a local path nor available from the model hub: {reason}"
        raise CheckpointError(text) from error


def _listing(source: HubSource) -> tuple[list[str], Path | None]:
    """Return a repository's files, and its cached snapshot if the hub cannot be reached.

    Raises:
        huggingface_hub.errors.RevisionNotFoundError, and what the hub answers if nothing is cached.
    """
    from huggingface_hub import HfApi, errors

    if COMMIT.fullmatch(source.revision or "") and (names := _remembered_names(source, source.revision)) is not None:
        return names, None  # a commit does not change, so that a job with a pinned one needs no network
    try:
        siblings = HfApi().repo_info(source.repo, repo_type=source.repo_type, revision=source.revision).siblings
        return [file.rfilename for file in siblings or ()], None
    except errors.RevisionNotFoundError:
        raise
    except (errors.HTTPError, errors.OfflineModeIsEnabled) as error:
        cached = _cached_snapshot(source)
        if cached is None:
            raise
        if not isinstance(error, errors.OfflineModeIsEnabled):
            log.warning("the model hub does not answer (%s): %s is taken from its cache, %s", _brief(error), source, cached)
        return _cached_names(source, cached), cached


def _cached_snapshot(source: HubSource) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                source.repo, repo_type=source.repo_type, revision=source.revision, local_files_only=True, allow_patterns=[]
            )
        )
    except LocalEntryNotFoundError:
        return None


def _cached_names(source: HubSource, snapshot: Path) -> list[str]:
    """Return the files that the snapshot has on the hub, as far as its client remembered them; else those that are there."""
    there = (path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())
    return list(there) if (names := _remembered_names(source, snapshot.name)) is None else names


def _remembered_names(source: HubSource, commit: str | None) -> list[str] | None:
    """Return the files of a commit that the client listed before; None where it did not, or is of a version that forgets them."""
    try:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:
        return None
    try:
        return [file.path for file in get_cached_repo_tree(source.repo, repo_type=source.repo_type, revision=commit)]
    except CachedRepoTreeNotFoundError:
        return None


# What to say


_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE)


def _reason(error: Exception, source: HubSource) -> str:
    """Return why a repository cannot be had, and what to do."""
    from huggingface_hub import constants, errors

    repo, kind = source.repo, "--repo-type dataset " if source.repo_type == "dataset" else ""
    place = f"--include '{source.folder}/*' " if source.folder else ""
    local = "or pass a local directory" if not kind else "or pass local files"
    status = getattr(getattr(error, "response", None), "status_code", None)
    chain = [error, error.__cause__, error.__context__]
    if any(isinstance(e, errors.GatedRepoError) for e in chain):
        return (
            f"{repo} is gated. Accept its conditions at {_page(source)}, log in with that account (hf auth login, or HF_TOKEN), "
            f"wait for its owners if they approve each request; {local}."
        )
    if any(isinstance(e, errors.RepositoryNotFoundError) for e in chain) or (status == 401 and not _refuses_token(error)):
        return (
            f"there is no repository {repo}, or it is private and you are not logged in as somebody who may read it. Check the "
            f"spelling at {_page(source)}, log in (hf auth login, or HF_TOKEN), {local}."
        )
    if any(isinstance(e, errors.OfflineModeIsEnabled) for e in chain) or constants.HF_HUB_OFFLINE:
        revision = f"--revision {source.revision} " if source.revision else ""
        return (
            f"HF_HUB_OFFLINE is set, and {source} is not in the cache ({constants.HF_HUB_CACHE}). Unset it, or download where "
            f"there is a network (hf download {repo} {kind}{revision}{place}--cache-dir DIR) and set HF_HUB_CACHE to DIR; "
            f"{local}."
        )
    if status in (401, 403):
        return (
            f"the hub refuses the token (HTTP {status}). Log in again (hf auth login, or HF_TOKEN) with one that may read {repo}."
        )
    if status is not None:
        return f"the hub answers HTTP {status} ({_brief(error)}). Try again later, {local}."
    if "Consistency check" in str(error) or type(error).__name__ in _INTERRUPTED:
        return (
            f"the download was interrupted ({_brief(error)}). Run the same command again: files that have arrived are kept, and "
            "only the others are downloaded."
        )
    again = "run the same command again (files that have arrived are kept)"
    return f"{_brief(error)}. Check the network and HF_ENDPOINT ({constants.ENDPOINT}) and {again}, {local}."


def _refuses_token(error: Any) -> bool:
    """Return whether a 401 is about the token; the hub also answers 401 for what does not exist or is private."""
    return "Invalid credentials" in error.response.headers.get("X-Error-Message", "")


_INTERRUPTED = ("RemoteProtocolError", "ReadError", "ReadTimeout", "IncompleteRead", "ChunkedEncodingError")
"""Errors of httpx once a transfer has begun."""


def _brief(error: BaseException) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:200]}"


def _page(source: HubSource) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{'datasets/' * (source.repo_type == 'dataset')}{source.repo}"


def _nothing_there(source: HubSource, names: Sequence[str]) -> str:
    """Return what lies where no file of a checkpoint does."""
    place = PurePosixPath(source.folder)
    paths = [PurePosixPath(name) for name in names]
    below = sorted({str(path.parent) for path in paths if place in path.parents and needed_files(names, str(path.parent))})
    if below:
        inside = HubSource(source.repo, source.revision, below[0])
        return f"this folder holds no checkpoint itself; its folders do: {some_of(below)}. Name one of them: {str(inside)!r}."
    folders = {str(path.parent) for path in paths if path.suffix in WEIGHTS and not _matches(path, NEVER_NEEDED)}
    listed = some_of(folder if folder != "." else "its root" for folder in folders) or "none"
    return f"the repository has no model files there. Folders with weights: {listed}."
