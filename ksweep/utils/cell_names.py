"""Names of cells: distinct short texts for values, and a distinct name for each cell wherever several are shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

HALVES = ("av", "ar", "nla-av", "nla-ar", "actor", "critic", "nla-actor", "nla-critic")
"""Directory names that say which half of a pair is inside, but not which pair."""

NAME_FORMS = {"{label}": ("label",), "{label} ({sweep})": ("sweep",), "{cell}": ("cell",), "{cell} {run_id}": ("cell", "run_id")}
"""Forms of names, the shortest first, and the facts that each needs of every cell."""


def distinct_names(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a name for each cell, in the shortest form that keeps them distinct: label; label and sweep; cell; cell and run.

    Args:
        cells: `label` and, if available, `sweep`, `cell` (unique to a cell) and `run_id` of each; the same cell may come twice.
            Cells that agree in all of these get the same name.
    """
    things = [(cell.get("cell"), cell.get("run_id"), cell["label"]) for cell in cells]
    names = [str(cell["label"]) for cell in cells]
    for form, needed in NAME_FORMS.items():
        if all(cell.get(name) is not None for cell in cells for name in needed):
            names = [form.format_map(cell) for cell in cells]
            if _tells_apart(names, things):
                break
    return names


def short_names(paths: Sequence[str]) -> list[str]:
    """Return paths and hub ids cut to the last parts that keep them distinct, without a directory that only says "av" or "ar"."""
    whole = [path.rstrip("/").split("/") for path in paths]
    bare = [parts[:-1] if len(parts) > 1 and parts[-1].lower() in HALVES else parts for parts in whole]
    for candidates in (bare, whole):
        for length in range(1, max(map(len, candidates)) + 1):
            names = ["/".join(parts[-length:]) for parts in candidates]
            if _tells_apart(names, paths):
                return names
    return list(paths)


def _tells_apart(names: Sequence[str], things: Sequence[Any]) -> bool:
    """Return whether no name stands for two different things."""
    return len(set(zip(names, things, strict=True))) == len(set(names))


def duplicate_names(names: Sequence[str]) -> list[str]:
    """Return the names that occur more than once, in order."""
    return [name for name, count in Counter(names).items() if count > 1]
