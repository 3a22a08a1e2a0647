"""Find vectors in a data set of the hub: the Parquet files of one split, and the sidecars that say what they are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ksweep.utils.errors import CheckpointError, DataError
from ksweep.utils.hub_repository import HubSource, download_dataset
from ksweep.utils.planning_pass import once_per_pass
from ksweep.utils.text import some_of

HUB_VECTORS = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(:(?P<name>[\w./-]+))?(@(?P<revision>[\w./-]+))?")
SIDECAR = "nla_meta.yaml"
_PART = re.compile(r"(?:^|[-_.])(?:\d+(?:-of-\d+)?$|\d{5,}(?![A-Za-z\d]).*)")
"""What tells the parts of a split apart: train-0, train-00001-of-00005-0123456789abcdef, 0000."""


@once_per_pass
def hub_parts(source: str) -> tuple[Path, tuple[Path, ...]]:
    """Download one split of a hub data set with its sidecars; return the folder of the data set and the split's Parquet files.

    Raises:
        DataError: it cannot be had, it has no such split, or several and the source names none.
    """
    match = HUB_VECTORS.fullmatch(source)
    assert match
    chosen: list[str] = []

    def choose(names: list[str]) -> list[str]:
        chosen.extend(_of_one_split(source, names, match["name"]))
        return [*chosen, *_sidecars(chosen, names)]

    try:
        folder, _ = download_dataset(HubSource(match["repo"], match["revision"], "", "dataset"), "vectors", choose)
    except CheckpointError as error:
        raise DataError(str(error)) from error
    return folder, tuple(folder / name for name in chosen)


def _of_one_split(source: str, names: Sequence[str], asked: str | None) -> list[str]:
    """Return the Parquet files of the split that a source names, in order."""
    files = sorted(name for name in names if name.endswith(".parquet"))
    found = [name for name in files if asked is None or _is_of(name, asked)]
    if not found:
        raise DataError(
            f"hub data set {source} has no Parquet files{'' if asked is None else f' of {asked!r}'}: {some_of(files)}"
        )
    splits = sorted({"/".join(_split(name)) or "(its root)" for name in found})
    if len(splits) > 1:
        raise DataError(
            f"hub data set {source} has {len(splits)} splits ({some_of(splits)}), and vectors are of one: name it, as "
            f"owner/name:{splits[0]}"
        )
    return found


def _is_of(name: str, asked: str) -> bool:
    """Return whether the names of a split, or of one file, hold those that are asked for, one behind the other."""
    wanted = asked.strip("/").split("/")
    whole = (*PurePosixPath(name).parts[:-1], PurePosixPath(name).stem)
    return any(list(parts[i : i + len(wanted)]) == wanted for parts in (_split(name), whole) for i in range(len(parts)))


def _split(name: str) -> tuple[str, ...]:
    """Return the folders of a file and the name that it shares with the other parts of its split."""
    path = PurePosixPath(name)
    stem = _PART.sub("", path.stem)
    return (*path.parts[:-1], stem) if stem else path.parts[:-1]


def _sidecars(chosen: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the sidecars of files, and those of the folders that they are in."""
    folders = {folder for name in chosen for folder in PurePosixPath(name).parents}
    wanted = {f"{name}.{SIDECAR}" for name in chosen} | {str(folder / SIDECAR) for folder in folders}
    return sorted(wanted & set(names))
