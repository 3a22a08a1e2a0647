"""An AV as a plain checkpoint, for engines that load weights themselves: its own directory, or a copy with its adapters merged.

Copies lie in $KSWEEP_HOME/merged/<key>, where the key is hashed from the AV's digest and the dtype: a copy is written once, under
another name until it is whole, and any number of sweeps read it. `ksweep cache merged` lists and removes them.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksweep.autoencoder.nla.checkpoint import CheckpointInfo, digest_nla
from ksweep.utils.console import bytes_text
from ksweep.utils.errors import DiskFullError
from ksweep.utils.files import flush_to_disk, home, locked, publish, read_json
from ksweep.utils.fingerprint import fingerprint
from ksweep.utils.safetensors_header import bytes_of_weights

COPY_VERSION = 1
"""Raised when the same AV would give other weights in its copy."""
COPY_MARKER = "merged.json"
"""Written last: what the copy is of, and the size of each of its files."""
PLAIN_NAMES = ("model.", "lm_head.")
"""How the names of a causal LM's tensors begin where no multimodal wrapper holds it."""


@dataclass(frozen=True)
class MergedCopy:
    """A copy under $KSWEEP_HOME/merged."""

    directory: Path
    av: str
    """The AV's directory when it was written."""
    dtype: str
    bytes: int
    last_used: float
    """Seconds since 1970."""


def plain_directory(info: CheckpointInfo, dtype: str) -> Path:
    """Return a directory with config.json and plain safetensors of an AV's language model.

    That is the AV's own directory, unless it is an adapter, quantised, or the language part of a multimodal model: then a copy
    whose numbers are those that `load_av_model` gives. Writing it takes twice the host memory of a bfloat16 model.

    Raises:
        DiskFullError: there is no room for the copy.
    """
    if is_plain(info):
        return info.weights
    directory = home() / "merged" / fingerprint({"av": digest_nla(info), "dtype": dtype, "version": COPY_VERSION})
    if not _is_whole(directory):
        with locked(directory.parent / "lock", "another rank or job that merges an AV", aloud=True) as is_alone:
            if not _is_whole(directory):
                _write_copy(info, dtype, directory, is_alone)
    with suppress(OSError):
        os.utime(directory / COPY_MARKER)
    return directory


def is_plain(info: CheckpointInfo) -> bool:
    """Return whether an AV's own directory holds plain weights of a causal LM under their usual names."""
    config = read_json(info.weights / "config.json", "model configuration")
    classes = config.get("architectures")
    is_causal_lm = isinstance(classes, list) and len(classes) == 1 and str(classes[0]).endswith("ForCausalLM")
    has_plain_names = all(name.startswith(PLAIN_NAMES) for name in info.tensors)
    return not info.is_adapter and is_causal_lm and has_plain_names and not {"text_config", "quantization_config"} & config.keys()


def merged_copies() -> list[MergedCopy]:
    """Return the copies on this machine, most recently used first."""
    copies = []
    for marker in (home() / "merged").glob(f"*/{COPY_MARKER}"):
        with suppress(OSError, KeyError, ValueError, TypeError):  # removed meanwhile, or damaged
            said = json.loads(marker.read_text())
            size = sum(map(int, said["files"].values()))
            copies.append(MergedCopy(marker.parent, str(said["av"]), str(said["dtype"]), size, marker.stat().st_mtime))
    return sorted(copies, key=lambda copy: -copy.last_used)


def remove_copy(copy: MergedCopy) -> None:
    """Remove a copy: it is renamed first, so that no engine takes half of it for the whole."""
    aside = copy.directory.with_name(f".{copy.directory.name}.{time.time_ns()}.part")
    copy.directory.rename(aside)
    shutil.rmtree(aside)


def _is_whole(directory: Path) -> bool:
    """Return whether every file of a copy is there in the size that was written."""
    with suppress(OSError, ValueError, KeyError, AttributeError):
        files: Mapping[str, Any] = json.loads((directory / COPY_MARKER).read_text())["files"]
        return all((directory / name).stat().st_size == size for name, size in files.items())
    return False


def _write_copy(info: CheckpointInfo, dtype: str, directory: Path, is_alone: bool) -> None:
    """Write an AV's merged weights beside their place, and rename them into it.

    Args:
        is_alone: whether no living process writes copies, so that what killed ones left can be removed.
    """
    from ksweep.autoencoder.nla.loading import save_av_model

    # 1. Clear what is not whole, and check that there is room.
    for left in (*(_left_behind(directory.parent) if is_alone else ()), *([directory] if directory.exists() else [])):
        shutil.rmtree(left, ignore_errors=True)
    needed, free = bytes_of_weights(info.weights, dtype), shutil.disk_usage(directory.parent).free
    if needed > free:
        raise DiskFullError(
            f"the merged weights of AV {info.path} take {bytes_text(needed)} in {directory.parent}, where {bytes_text(free)} are "
            "free: free some room (`ksweep cache merged` lists such copies), or set KSWEEP_HOME to a larger disk"
        )
    # 2. Write and flush.
    part = directory.with_name(f".{directory.name}.{time.time_ns()}.part")
    save_av_model(info, dtype, part)
    written = sorted(path for path in part.iterdir() if path.is_file())
    for path in written:
        flush_to_disk(path)
    said = {
        "av": str(info.path), "av_digest": digest_nla(info), "dtype": dtype,
        "files": {path.name: path.stat().st_size for path in written},
    }  # fmt: skip
    publish(part / COPY_MARKER, json.dumps(said, indent=2).encode())
    # 3. Give it its name, unless another process has been faster where there are no locks.
    try:
        part.rename(directory)
    except OSError:
        if not _is_whole(directory):
            raise
        shutil.rmtree(part, ignore_errors=True)
    flush_to_disk(directory.parent)


def _left_behind(parent: Path) -> Iterator[Path]:
    return (path for path in parent.glob(".*.part") if path.is_dir())
