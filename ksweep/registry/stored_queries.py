"""Questions that have a name: `ksweep sql @best_temperature`. One SQL file each, which opens with the question in a comment.

A user's own lie in `<registry>/queries/` and win over those of the package. What may be set from outside a question reads with
`getvariable('cell')`, NULL when nobody sets it, so that the same file runs in the duckdb command as it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from ksweep.utils.errors import RequestError

VARIABLE = re.compile(r"getvariable\('(\w+)'\)")


@dataclass(frozen=True)
class NamedQuery:
    """A question and its SQL."""

    name: str
    sql: str

    @property
    def question(self) -> str:
        """The comment's first line."""
        return self.sql.partition("\n")[0].removeprefix("--").strip()

    @property
    def variables(self) -> list[str]:
        """What may be set: cell, rank, ..."""
        return list(dict.fromkeys(VARIABLE.findall(self.sql)))


def queries(root: Path) -> dict[str, NamedQuery]:
    """All named questions, by name."""
    places: list[Traversable] = [resources.files("ksweep.registry") / "queries", root / "queries"]
    found = {}
    for place in places:
        for file in place.iterdir() if place.is_dir() else ():
            if file.name.endswith(".sql"):
                name = file.name.removesuffix(".sql")
                found[name] = NamedQuery(name, file.read_text(encoding="utf-8"))
    return dict(sorted(found.items()))


def query_named(root: Path, name: str) -> NamedQuery:
    """One of them.

    Raises:
        RequestError: there is none of that name.
    """
    known = queries(root)
    if name in known:
        return known[name]
    near = get_close_matches(name, known, n=1)
    meant = f"; did you mean @{near[0]}?" if near else ""
    raise RequestError(f"no query @{name}{meant} There are {', '.join('@' + n for n in known)}; own ones go to {root}/queries/")


def variables_of(query: NamedQuery, given: list[str]) -> dict[str, str]:
    """Values from name=value arguments.

    Raises:
        RequestError: not of that form, or the query does not ask for it.
    """
    values = {}
    for argument in given:
        name, equals, value = argument.partition("=")
        if not equals or name not in query.variables:
            known = ", ".join(f"{n}=..." for n in query.variables) or "nothing to set"
            raise RequestError(f"{argument!r} does not fit @{query.name}, which takes {known}")
        values[name] = value
    return values
