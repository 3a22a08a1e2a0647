"""What cells are called: texts that tell values apart, and one name a cell wherever several are shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

HALVES = ("av", "ar", "nla-av", "nla-ar", "actor", "critic", "nla-actor", "nla-critic")
"""Directories that say which half of a pair they hold, and not which pair."""


KINDS = {"{label}": ("label",), "{label} ({sweep})": ("sweep",), "{cell}": ("cell",), "{cell} {run_id}": ("cell", "run_id")}
"""Kinds of names, the shortest first, and what must be known of the cells for them."""


def told_apart(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each cell, of the shortest kind that tells all of them apart: label, label and sweep, own name, that and run.

    Args:
        cells: `label` and, where known, `sweep`, `cell` (unique to a cell) and `run_id` of each; the same cell may come twice.
            Cells that are alike in all of these keep one name.
    """
    things = [(cell.get("cell"), cell.get("run_id"), cell["label"]) for cell in cells]
    names = [str(cell["label"]) for cell in cells]
    for form, needed in KINDS.items():
        if all(cell.get(name) is not None for cell in cells for name in needed):
            names = [form.format_map(cell) for cell in cells]
            if _tells_apart(names, things):
                break
    return names


def short_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path or hub id that tells it from the others, without a directory that only says "av" or "ar"."""
    whole = [path.rstrip("/").split("/") for path in paths]
    bare = [parts[:-1] if len(parts) > 1 and parts[-1].lower() in HALVES else parts for parts in whole]
    for candidates in (bare, whole):
        for length in range(1, max(map(len, candidates)) + 1):
            names = ["/".join(parts[-length:]) for parts in candidates]
            if _tells_apart(names, paths):
                return names
    return list(paths)


def _tells_apart(names: Sequence[str], things: Sequence[Any]) -> bool:
    """Whether no name stands for two things."""
    return len(set(zip(names, things, strict=True))) == len(set(names))


def repeated(names: Sequence[str]) -> list[str]:
    """Names that stand for more than one thing, in their order."""
    return [name for name, count in Counter(names).items() if count > 1]
