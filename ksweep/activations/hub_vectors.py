"""Find vectors in a data set of the hub: the Parquet files of one split, and the sidecars that say what they are."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path, PurePosixPath

from ksweep.utils.errors import CheckpointError, DataError
from ksweep.utils.hub import hub_spelling, note_revision
from ksweep.utils.hub_repository import HubSource, download_dataset
from ksweep.utils.text import some_of

HUB_VECTORS = re.compile(r"(?:datasets/)?(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(:(?P<name>[\w./-]+))?(@(?P<revision>[\w./-]+))?")
SIDECAR = "nla_meta.yaml"
_PART = re.compile(r"(?:^|[-_.])(?:(\d+)(?:-of-(\d+))?$|(\d{5,})(?![A-Za-z\d])(?:-of-(\d+))?.*)")
"""What tells the parts of a split apart: train-0, train-00001-of-00005-0123456789abcdef, 0000."""
_NO_PART = re.compile(r"(?<![a-z])(?:layer|l|step|iter|iteration|epoch|checkpoint|ckpt|seed)s?[-_.]?(\d+)", re.IGNORECASE)
"""A number in a name that counts no parts: layer_20, L20, step-100."""


def hub_parts(source: str) -> tuple[Path, tuple[Path, ...]]:
    """Download one split of a hub data set with its sidecars; return the folder of the data set and the split's Parquet files.

    A process asks the hub once for each source: a branch that moves meanwhile changes nothing.

    Raises:
        DataError: it cannot be had, it has no such split, or several and the source names none.
    """
    from huggingface_hub import constants

    folder, parts = _downloaded(source, constants.ENDPOINT, constants.HF_HUB_CACHE)
    note_revision(hub_spelling(folder))
    return folder, parts


@cache
def _downloaded(source: str, endpoint: str, cache_directory: str) -> tuple[Path, tuple[Path, ...]]:
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


def by_split(names: Iterable[str]) -> dict[str, list[str]]:
    """Return files, in order, by their folder and their name without the number of the part."""
    splits: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        splits["/".join(_split(name))].append(name)
    return splits


def are_parts(names: Sequence[str]) -> bool:
    """Return whether files of one split are the parts of one table, or the only one.

    Parts are counted from 0 or 1 without a gap, or named as `-00000-of-00002`. layer-0 and layer-1 are two tables.
    """
    found = [match for name in names if (match := _PART.search(PurePosixPath(name).stem))]
    if len(names) == 1 or len(found) < len(names) or count_other_things(names):
        return len(names) == 1
    numbers = sorted(int(match[1] or match[3]) for match in found)
    totals = {match[2] or match[4] for match in found}
    if totals != {None}:
        return len(totals) == 1 and len(set(numbers)) == len(numbers)
    return numbers[0] in (0, 1) and numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def count_other_things(names: Iterable[str]) -> bool:
    """Return whether files differ in a layer, step, epoch or seed."""
    return len({tuple(_NO_PART.findall(name)) for name in names}) > 1


def _of_one_split(source: str, names: Sequence[str], asked: str | None) -> list[str]:
    """Return the Parquet files of the split that a source names, in order."""
    files = sorted(name for name in names if name.endswith(".parquet"))
    found = [name for name in files if asked is None or _is_of(name, asked)]
    if not found:
        raise DataError(
            f"hub data set {source} has no Parquet files{'' if asked is None else f' of {asked!r}'}: {some_of(files)}"
        )
    splits: dict[str, list[str]] = {}
    for split, inside in by_split(found).items():
        splits |= {split: inside} if are_parts(inside) else {name.removesuffix(".parquet"): [name] for name in inside}
    if len(splits) > 1:
        raise DataError(
            f"hub data set {source} has {len(splits)} splits ({some_of(name or '(its root)' for name in splits)}), and vectors "
            f"are of one: name it, as owner/name:{next(filter(None, splits))}"
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
