"""Stored queries: `ksweep sql @best_temperature`. Each is a SQL file whose first comment line states its question.

Users put their own into `<registry>/queries/`; these take precedence over the package's. A query reads its variables with
`getvariable('cell')`, which is NULL when unset, so that the same file runs unchanged in the duckdb command.
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
    """A stored query."""

    name: str
    sql: str

    @property
    def question(self) -> str:
        """The question that the query answers: the first line of its comment."""
        return self.sql.partition("\n")[0].removeprefix("--").strip()

    @property
    def variables(self) -> list[str]:
        """Names of the variables that the query reads: cell, rank, ..."""
        return list(dict.fromkeys(VARIABLE.findall(self.sql)))


def queries(root: Path) -> dict[str, NamedQuery]:
    """Return all stored queries by name."""
    folders: list[Traversable] = [resources.files("ksweep.registry") / "queries", root / "queries"]
    by_name = {}
    for folder in folders:
        for file in folder.iterdir() if folder.is_dir() else ():
            if file.name.endswith(".sql"):
                name = file.name.removesuffix(".sql")
                by_name[name] = NamedQuery(name, file.read_text(encoding="utf-8"))
    return dict(sorted(by_name.items()))


def query_named(root: Path, name: str) -> NamedQuery:
    """Return the stored query of this name.

    Raises:
        RequestError: there is none of this name.
    """
    by_name = queries(root)
    if name in by_name:
        return by_name[name]
    similar = get_close_matches(name, by_name, n=1)
    hint = f"; did you mean @{similar[0]}?" if similar else "."
    names = ", ".join("@" + n for n in by_name)
    raise RequestError(f"no query @{name}{hint} There are {names}; queries of your own go into {root}/queries/")


def variables_of(query: NamedQuery, given: list[str]) -> dict[str, str]:
    """Return the values of variables from name=value arguments.

    Raises:
        RequestError: an argument is not of this form, or the query reads no such variable.
    """
    values = {}
    for argument in given:
        name, equals, value = argument.partition("=")
        if not equals or name not in query.variables:
            expected = ", ".join(f"{n}=..." for n in query.variables) or "no variables"
            raise RequestError(f"{argument!r} does not fit @{query.name}, which takes {expected}")
        values[name] = value
    return values
