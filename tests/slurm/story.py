"""What a test did, what the user saw, and what the registry says: kept as it happens, for a report in Markdown.

KSWEEP_SLURM_REPORT=FILE pytest tests/slurm appends the story of each sweep to FILE.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ksweep import Resources, Sweep, connect

RUNS = """SELECT status, error_class AS class, host, num_ranks, num_draws_sampled AS sampled, num_draws_reused AS reused,
       error_message AS message FROM runs ORDER BY finished"""
ATTEMPTS = "SELECT * FROM attempts ORDER BY ALL"


@dataclass
class Story:
    """One test's."""

    title: str
    test: str
    events: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def ran(self, sweep: Sweep, arguments: Sequence[str], began: float, code: int, out: str, err: str) -> None:
        """A user's command has ended."""
        said = f"{err.rstrip()}\n{out.rstrip()}".strip()
        self._add(
            f"# {_resources(sweep.resources)}\n$ python experiment.py {shlex.join(arguments)}".rstrip(),
            f"{said}\n[exit code {code}]",
        )

    def did(self, words: str, said: str = "") -> None:
        """Something else was done, or happened."""
        self._add(f"$ {words}" if words and not words.startswith("#") else words, said.strip())

    def _add(self, words: str, said: str, began: float | None = None) -> None:
        now = time.monotonic()
        at = f"{now - self.began:.0f} s" if began is None else f"{began - self.began:.0f} to {now - self.began:.0f} s"
        self.events.append(f"[{at}] {words}" + (f"\n{said}" if said else ""))

    def write(self, registry: Path, *, failed: bool) -> None:
        """Append it to the report, if one was asked for."""
        report = os.environ.get("KSWEEP_SLURM_REPORT")
        if not report or not self.events:
            return
        lines = [f"## {self.title}", f"`{self.test}`" + (" **failed**" if failed else ""), "", "```text"]
        lines += ["\n\n".join(_short(event, registry.parent) for event in self.events), "```", ""]
        if (registry / "ksweep.duckdb").exists():
            lines += [_table(registry, question) for question in (RUNS, ATTEMPTS)]
        with Path(report).open("a") as file:
            file.write("\n".join(lines) + "\n\n")


def _resources(resources: Resources) -> str:
    """What was said of them, beyond the defaults."""
    plain = Resources()
    said = {f.name: value for f in fields(Resources) if (value := getattr(resources, f.name)) != getattr(plain, f.name)}
    return "Resources(" + ", ".join(f"{name}={value!r}" for name, value in said.items()) + ")"


def _short(text: str, place: Path) -> str:
    return re.sub(r"[ \t]+$", "", text.replace(str(place), "."), flags=re.MULTILINE)


def _table(registry: Path, question: str) -> str:
    with connect(registry) as connection:
        table = question.split(" FROM ")[1].split()[0]
        there = connection.execute("SELECT count(*) FROM information_schema.tables WHERE table_name = ?", [table]).fetchone()
        if there is None or not there[0]:
            return ""
        found = connection.execute(question)
        names = [column[0] for column in found.description or []]
        rows = [[_cell(value, registry.parent) for value in row] for row in found.fetchall()]
    head = [f"Registry, `{table}`:", "", f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows), ""])


def _cell(value: Any, place: Path) -> str:
    text = "" if value is None else _short(str(value), place)
    return re.sub(r"\s+", " ", text).replace("|", "\\|")[:160]
