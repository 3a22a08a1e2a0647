"""Series of checkpoints of one training: the step that a path states, and the paths that a pattern stands for."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from ksweep.utils.errors import CheckpointError
from ksweep.utils.hub_repository import WEIGHTS, HubSource, hub_readings, listed, needed_files
from ksweep.utils.text import natural_sorted, some_of

_STEP = r"(?:iter(?:ation)?|(?:global_?)?step|checkpoint|ckpt)s?[_/-]?(\d+)"
STEP = re.compile(rf"(?<![a-z]){_STEP}(?=[/_@.-]|$)(?![\d.]*\d)", re.IGNORECASE)
"""A step anywhere in one of a series' paths: iter_0000500, step400, checkpoint-300, checkpoints/200, a_step100_b."""
_LAST_IN_PART = re.compile(rf"(?:^|[/@_.-]){_STEP}(?:[_-]epoch[_-]?\d+_?)?(?P<suffix>(?:\.[a-z]\w*)*)(?=/|$)", re.IGNORECASE)
"""A step that is a part of a path, or ends one: av_step400, x_step900.pt. In `step3-7b-av` it is the name of a model."""
_REPOSITORY = re.compile(r"[^/@]+/[^/@]+")
EPOCH = re.compile(r"epoch[_-]?\d+", re.IGNORECASE)
"""What follows from the step: checkpoint_step900_epoch2_.pt."""
UNFINISHED = (".tmp", ".old", ".part", ".bak")
"""Endings of directories that a training is writing, or has replaced."""


def step_of(source: str, repositories: Collection[str] = ()) -> int | None:
    """Return the training step that a path or hub id states, from its last part that is or ends in one; None if no part does.

    In `owner/name` of a hub id, and in the first two parts of a path that could be one, a step after other words is part of a
    name (`owner/model-iter3`). In those of `repositories`, which are known to be of the hub, every step is (`owner/step3`).
    """
    match = _REPOSITORY.match(source)
    behind = source[match.end() :] if match is not None and match[0] in repositories else source
    found = [match[1] for match in _LAST_IN_PART.finditer(behind) if not _is_in_name(match)]
    return int(found[-1]) if found else None


def _is_in_name(match: re.Match[str]) -> bool:
    source, before = match.string, match.string[: match.start()]
    is_hub_id = "/" in source and not source.startswith((".", "/", "~"))
    return is_hub_id and match[0][0] in "_.-" and not match["suffix"] and "@" not in before and before.count("/") < 2


def step_in_series(source: str) -> int | None:
    """Return the last step in a path or hub id that a pattern has found, wherever it stands in a part; None if there is none."""
    found = STEP.findall(source)
    return int(found[-1]) if found else None


def steps_of(sources: Sequence[str]) -> list[int] | None:
    """Return the steps of checkpoints of one series: sources that differ in nothing but step and epoch. None for any others."""
    found = [list(STEP.finditer(source)) for source in sources]
    if not all(found):
        return None
    steps = [int(matches[-1][1]) for matches in found]
    frames = {source[: m[-1].start(1)] + "*" + source[m[-1].end(1) :] for source, m in zip(sources, found, strict=True)}
    frames = {EPOCH.sub("epoch", frame) for frame in frames}
    return steps if len(frames) == 1 and len(set(steps)) == len(steps) else None


def is_pattern(source: str | None) -> bool:
    """Return whether a source stands for several: it has *, ? or [...], and is not the name of something that is here."""
    return source is not None and glob.has_magic(source) and not os.path.lexists(source.replace("\0", ""))


def members(pattern: str, what: str) -> list[str]:
    """Return the paths or hub ids that a pattern stands for, by step: `runs/iter_*/av`, `owner/name@revision/iter_*`.

    Local paths come before the hub. Directories that a training is still writing (`*.tmp`, `*.part`) are left out, and files
    beside them (`iter_0000500.log`); only a talkative autoencoder's checkpoint may be a file.

    Raises:
        CheckpointError: nothing matches, or the hub cannot be asked.
    """
    if "\0" in pattern:  # glob does not take it
        raise CheckpointError(f"no {what} matches {pattern!r}: a path has no null character")
    here = [path for path in glob.glob(os.path.expanduser(pattern)) if not _is_unfinished(path)]
    checkpoints = [path for path in here if os.path.isdir(path) or (what == "checkpoint" and path.endswith(".pt"))]
    if here and not checkpoints:
        raise CheckpointError(
            f"no {what} matches {pattern!r}, only files do ({some_of(here)}): an AV and an AR are directories, a checkpoint may "
            "be a .pt file too. Write a pattern of these"
        )
    found = checkpoints or _members_on_hub(pattern, what)
    return sorted(natural_sorted(found), key=lambda source: (step_in_series(source) is None, step_in_series(source) or 0))


def _members_on_hub(pattern: str, what: str) -> list[str]:
    first = pattern.split("/")[0]
    if pattern.startswith((".", "/", "~")) or Path(first).is_dir() or not hub_readings(pattern):
        raise CheckpointError(
            f"no {what} matches {pattern!r}: expected a pattern of existing paths (runs/iter_*/av) or of folders of a hub "
            "repository (owner/name/iter_*/av, owner/name@revision/iter_*)"
        )
    place, names = listed(pattern, what)
    every = {str(path) for name in names for path in (PurePosixPath(name), *PurePosixPath(name).parents)}
    matching = [path for path in every if _matches(path, place.folder) and not _is_unfinished(path)]
    whole = [path for path in matching if needed_files(names, path)]
    if not whole:
        folders = some_of({str(PurePosixPath(name).parent) for name in names if name.endswith(WEIGHTS)} - {"."}) or "none"
        raise CheckpointError(
            f"no {what} matches {pattern!r}: {len(matching)} folders of {place.repo} have such a name, and none of them holds a "
            f"checkpoint itself. Its folders with weights: {folders}. Write a pattern of these."
        )
    return [str(HubSource(place.repo, place.revision, path)) for path in whole]


def _is_unfinished(path: str) -> bool:
    return any(part.endswith(UNFINISHED) for part in path.split("/"))


def _matches(path: str, pattern: str) -> bool:
    """Return whether a path matches part by part, as in a shell: * does not span a slash."""
    parts, patterns = path.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))
