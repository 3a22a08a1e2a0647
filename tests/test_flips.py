"""One flipped bit in any file that a number depends on: nobody is given another number in silence, and nobody a traceback.

    pytest tests/test_flips.py -s                     # a few flips of each kind of file; prints the table
    KSWEEP_TRIALS=30 pytest tests/test_flips.py -s    # 50 of each

After each flip everything is asked that a user asks: every view by SQL, results and paired differences, the data of the report,
the plan of the same sweep, the vectors, which of them are in use, the jobs; after every second flip with the index deleted, so
that all is read from the files. Seeded: the same flips in every run of as many trials. A view with a row for each thing that was
stored may lack rows and values, never have another value; what is derived from several rows may differ where a message names the
damage. 300 flips of a part of draws through SQL: tests/registry/test_part_checks.py.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from ksweep import Resources, Sweep
from ksweep.activations import ensure
from ksweep.analysis.report.data import read_report_data
from ksweep.analysis.results import results_of_sweep
from ksweep.cli import main
from ksweep.registry import database
from ksweep.registry.chosen_files import record_chosen
from ksweep.registry.database import connect
from ksweep.registry.run_record import activations_in_use
from ksweep.utils.command_exit import failure_text
from tests.forked import forks_python
from tests.tiny_sweeps import run, talking_pair, tiny_cell

pytestmark = [pytest.mark.slow, pytest.mark.trials, pytest.mark.timeout(7200)]
FLIPS = max(2, int(os.environ.get("KSWEEP_TRIALS", "1")) * 5 // 3)

KINDS = {
    "draws": "registry/draws/[!_]*/part-*.parquet",
    "identity of draws": "registry/draws/[!_]*/identity.json",
    "scores": "registry/scores/[!_]*/*/part-*.parquet",
    "identity of scores": "registry/scores/[!_]*/*/identity.json",
    "scores of a metric": "registry/scores/[!_]*/*/metric-*.parquet",
    "controls of an AR": "registry/scores/[!_]*/*/controls.json",
    "run record": "registry/landing/*/record.json",
    "curve": "registry/landing/*/curve.parquet",
    "controls": "registry/landing/*/controls.parquet",
    "groups": "registry/landing/*/metrics.parquet",
    "examples": "registry/landing/*/examples.parquet",
    "activations of a run": "registry/landing/*/activations.parquet",
    "evaluated activations": "registry/activations/*/*.parquet",
    "attempts": "registry/attempts/*.json",
    "sweep record": "registry/sweeps/*.json",
    "choice": "registry/chosen/[!e]*.parquet",
    "database": "registry/ksweep.duckdb",
    "digests of the database": "registry/ksweep.duckdb.digests",
    "list of checked parts": "registry/ksweep.duckdb.parts",
    "parts without rows": "registry/*/_schema/**/*.*",
    "vectors": "vector_cache/*/shard-*.arrow",
    "JSON of vectors": "vector_cache/*/shard-*.json",
    "manifest of vectors": "vector_cache/*/manifest.json",
    "remembered digests": "home/digests/*",
    "job.json": "logs/*/job.json",
    "outcome": "logs/*/attempt-*/ended-*.json",
}
KEYS = {
    "runs": ("run_id",), "run_curves": ("run_id", "metric", "k"), "run_controls": ("run_id", "control", "k"),
    "run_metrics": ("run_id", "breakdown", "part", "against", "k"), "run_examples": ("run_id", "rank", "number"),
    "activations": ("run_id", "activation"), "texts": ("draws_key", "activation", "draw"),
    "draws": ("draws_key", "activation", "draw"), "draw_scores": ("draws_key", "metric_key", "name", "activation", "draw"),
    "attempts": ("job", "start", "rank"), "sweeps": ("sweep_id",), "sweep_cells": ("sweep_id", "place"),
    "chosen_curves": ("run_id", "chosen_by", "reported", "k"), "stored_metrics": ("draws_key", "metric", "name"),
}  # fmt: skip
"""Tables and views with a row for each thing that is stored -> columns that name it."""
CLASSES = ("same answer", "left out or made again, and said", "computed again", "refused in a sentence", "SILENT", "TRACEBACK")
table: dict[str, Counter[str]] = defaultdict(Counter)


@dataclass
class Place:
    """A finished sweep of two cells with a metric and a choice, and a copy of all its files."""

    path: Path
    sweep: Sweep

    @property
    def registry(self) -> Path:
        return self.path / "registry"

    def restore(self) -> None:
        """Put back every file as it was."""
        for name in ("registry", "vector_cache", "logs", "home"):
            shutil.rmtree(self.path / name)
            shutil.copytree(self.path / "copy" / name, self.path / name, symlinks=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    path = tmp_path_factory.mktemp("flips")
    (path / "tiny").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setenv("KSWEEP_HOME", str(path / "home"))
        forks_python(patch)
        cell = tiny_cell(talking_pair(path / "tiny", num_rows=60), num_replicates=20)
        cell = replace(cell, scoring=replace(cell.scoring, metrics=("text",)))
        sweep = Sweep(
            name="tiny", cell=cell, resources=Resources(cluster="local", gpus=0, tasks=1), registry=str(path / "registry"),
            vector_cache=str(path / "vector_cache"),
        )  # fmt: skip
        assert run(sweep, "sampling.temperature=[0.5,0.7]") == 0
        record_chosen(path / "registry", results_of_sweep("tiny", path / "registry").chosen("text.num_words"))
        connect(path / "registry").close()
        for name in ("registry", "vector_cache", "logs", "home"):
            shutil.copytree(path / name, path / "copy" / name, symlinks=True)
        yield Place(path, sweep)
    print("\n" + shown())


def shown() -> str:
    head = f"{'':<26}" + "".join(f"{name:>34}" for name in CLASSES)
    return "\n".join(
        [head, *(f"{kind:<26}" + "".join(f"{counts[name]:>34}" for name in CLASSES) for kind, counts in table.items())]
    )


# What a user asks


def answers(place: Place, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Return what each reader answers, or the exception that it raises."""
    questions: dict[str, Callable[[], Any]] = {
        "SQL": lambda: every_view(place.registry),
        "results": lambda: results(place.registry),
        "report": lambda: report(place.registry),
        "plan": lambda: plan(place, capsys),
        "vectors": lambda: vectors(place),
        "vectors in use": lambda: activations_in_use(place.registry),
        "jobs": lambda: jobs(place, capsys),
    }
    answered: dict[str, Any] = {}
    for name, question in questions.items():
        try:
            answered[name] = question()
        except Exception as error:
            answered[name] = error
    return answered


def every_view(registry: Path) -> dict[str, list[dict[str, Any]]]:
    with connect(registry) as connection:
        names = "SELECT table_name FROM information_schema.tables WHERE table_catalog = 'ksweep' ORDER BY 1"
        views = [name for (name,) in connection.execute(names).fetchall() if name not in ("meta", "quarantine")]
        return {view: connection.sql(f"FROM {view} ORDER BY ALL").to_arrow_table().to_pylist() for view in views}


def results(registry: Path) -> list[Any]:
    found = results_of_sweep("tiny", registry)
    return [found.missing, *(rows.to_pylist() for rows in (found.curves, found.compare(), found.chosen("text.num_words")))]


def report(registry: Path) -> dict[str, Any]:
    facts = read_report_data(registry, "tiny")
    values = {field.name: getattr(facts, field.name) for field in fields(facts)}
    return {name: value.to_pylist() if isinstance(value, pa.Table) else value for name, value in values.items()}


def plan(place: Place, capsys: pytest.CaptureFixture[str]) -> list[Any]:
    capsys.readouterr()
    code = run(place.sweep, "sampling.temperature=[0.5,0.7]", "--dry-run", "--json")
    printed = capsys.readouterr()
    if code != 0:
        raise Said(printed.err)
    return [(cell["label"], cell["state"]) for cell in map(json.loads, printed.out.splitlines()) if "label" in cell]


def vectors(place: Place) -> list[Any]:
    held = ensure(place.sweep.cell.activations, 1, place.path / "vector_cache")
    return [held.vectors().tobytes(), *(held.column(name).tolist() for name in ("row_id", "document", "position", "window"))]


def jobs(place: Place, capsys: pytest.CaptureFixture[str]) -> list[Any]:
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("sys.argv", ["ksweep", "ls", "--json"])
        main()
    printed = capsys.readouterr()
    if end.value.code != 0:
        raise Said(printed.err)
    return [{name: row.get(name) for name in ("job", "state", "why")} for row in map(json.loads, printed.out.splitlines())]


class Said(Exception):
    """What a command printed before it ended with a failure."""


# What has become of the answers


def class_of(before: dict[str, Any], after: dict[str, Any], said: str) -> str:
    """Return the worst class of what the readers were given after a flip."""
    texts = [str(one) if isinstance(one, Said) else failure_text(one) for one in after.values() if isinstance(one, Exception)]
    if any("That is a bug" in text for text in (*texts, said)):
        return "TRACEBACK"
    answered = {name: value for name, value in after.items() if not isinstance(value, Exception)}
    if "SQL" in answered and contradictions(before["SQL"], answered["SQL"]):
        return "SILENT"
    differ = [name for name, value in answered.items() if value != before[name]]
    if set(differ) - {"plan"} and not said:
        return "SILENT"
    if texts:
        return "refused in a sentence"
    if "plan" in differ:
        return "computed again"
    return "left out or made again, and said" if differ or said else "same answer"


def contradictions(before: dict[str, list[dict[str, Any]]], after: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return rows of what was stored that have another value than before, or were not there."""
    found = []
    for view, keys in KEYS.items():
        whole = {tuple(row[key] for key in keys): row for row in before[view]}
        for row in after[view]:
            stored = whole.get(tuple(row[key] for key in keys))
            if stored is None and view == "draw_scores" and row["value"] is None:
                continue  # a draw whose scores are left out
            if stored is None:
                found.append(f"{view}: {row}")
                continue
            # `rank` counts rows; the cell of draws is that of the newest run that is left.
            other = {name for name in row if row[name] not in (None, stored[name]) and name not in ("rank", "cell")}
            found += [f"{view}: {name} {row[name]!r} instead of {stored[name]!r}" for name in other]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_gives_nobody_another_number_in_silence_and_nobody_a_traceback(
    place: Place, kind: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    rng, faults = random.Random(kind), []
    place.restore()
    before = answers(place, capsys)
    assert not [one for one in before.values() if isinstance(one, Exception)], before
    assert before["plan"] == [("temperature=0.5", "done"), ("temperature=0.7", "done")]
    for number in range(FLIPS):
        place.restore()
        if number % 2 and kind not in ("database", "digests of the database"):  # all is read from the files again
            (place.registry / "ksweep.duckdb").unlink()
        path = rng.choice(sorted(path for path in place.path.glob(KINDS[kind]) if path.is_file()))
        bit = rng.randrange(8 * path.stat().st_size)
        flip(path, bit)
        database._warn_of.cache_clear()
        caplog.clear()
        after = answers(place, capsys)
        said = "\n".join(line for line in caplog.text.splitlines() if "Could not verify that" not in line)
        worst = class_of(before, after, said)
        table[kind][worst] += 1
        if worst in ("SILENT", "TRACEBACK"):
            faults.append(explained(path, bit, before, after, said))
    assert not faults, "\n\n".join(faults)


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def explained(path: Path, bit: int, before: dict[str, Any], after: dict[str, Any], said: str) -> str:
    lines = [f"{path}, bit {bit}", f"said: {said!r}"]
    for name, value in after.items():
        if isinstance(value, Exception):
            lines.append(f"{name}: {type(value).__name__}: {value}")
        elif value != before[name]:
            views = [view for view in value if value[view] != before[name].get(view)] if isinstance(value, dict) else []
            lines.append(f"{name} differs {views}")
    if not isinstance(after["SQL"], Exception):
        lines += contradictions(before["SQL"], after["SQL"])[:5]
    return "\n".join(lines)
