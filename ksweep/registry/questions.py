"""What the launcher asks the registry: which cells have finished, how fast the last run was, the curves to show."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa

from ksweep.errors import RequestError
from ksweep.registry.database import DatabaseError, connect


def ask(root: Path, question: str) -> pa.Table:
    """The answer to any SQL question.

    Raises:
        RequestError: DuckDB does not accept the question.
    """
    with connect(root) as connection:
        try:
            answer = connection.sql(question)
            if answer is not None:
                return answer.to_arrow_table()
        except DatabaseError as error:
            raise RequestError(f"DuckDB does not accept that: {error}") from error
    raise RequestError(f"{question!r} has no answer: ask with SELECT or FROM, e.g. ksweep sql 'from curves'")


def finished_runs(root: Path) -> dict[str, str]:
    """Newest finished run of each cell key; empty where there is no registry yet."""
    if not root.is_dir():
        return {}
    with connect(root) as connection:
        return dict(connection.execute("SELECT cell_key, run_id FROM v_latest").fetchall())


def runs_since(root: Path, moment: datetime) -> dict[str, str]:
    """Cell key -> status of the runs that ended after a moment."""
    if not root.is_dir():
        return {}
    question = "SELECT cell_key, status FROM runs WHERE finished >= ? ORDER BY finished"
    with connect(root) as connection:
        return dict(connection.execute(question, [moment.astimezone(UTC).replace(tzinfo=None)]).fetchall())


def run_named(root: Path, name: str) -> str:
    """The run of that id, else the newest finished run of the cell or label of that name.

    Raises:
        RequestError: there is none, or several cells share the label.
    """
    with connect(root) as connection:
        found = connection.execute(
            "SELECT run_id FROM runs WHERE run_id = $1 UNION SELECT run_id FROM v_latest WHERE cell = $1 OR label = $1",
            [name],
        ).fetchall()
    if len(found) == 1:
        return str(found[0][0])
    if not found:
        raise RequestError(f"no run, cell or label {name!r} in {root}: `ksweep ls` lists them")
    raise RequestError(f"{len(found)} runs are called {name!r}; name one of them: {', '.join(sorted(run for (run,) in found))}")


def seconds_per_draw(root: Path, autoencoder: str) -> float | None:
    """Of the newest run that sampled with this AV or checkpoint, times its ranks; None where there is none."""
    if not root.is_dir():
        return None
    question = """
        SELECT seconds['drawing'] * num_ranks / num_draws_sampled FROM runs
        WHERE ? IN (av, checkpoint) AND num_draws_sampled > 0
          AND seconds['drawing'] IS NOT NULL ORDER BY finished DESC LIMIT 1
    """
    with connect(root) as connection:
        row = connection.execute(question, [autoencoder]).fetchone()
    return None if row is None else float(row[0])


def curves_of(root: Path, labels: Mapping[str, str]) -> pa.Table:
    """The curves of some cells, in the order and under the labels given (cell key -> label)."""
    wanted = pa.table({"cell_key": list(labels), "wanted": list(labels.values()), "place": range(len(labels))})
    with connect(root) as connection:
        connection.register("wanted_cells", wanted)
        return connection.sql(
            """
            SELECT w.wanted AS label, c.* EXCLUDE (label), r.tokens_per_second, r.distinct_text_fraction, r.cjk_fraction
            FROM wanted_cells AS w JOIN curves AS c USING (cell_key) JOIN runs AS r USING (run_id) ORDER BY w.place, c.k
            """
        ).to_arrow_table()


def controls_of(root: Path, labels: Mapping[str, str]) -> pa.Table:
    """The controls of some cells, likewise; the shuffled one is part of the curves."""
    wanted = pa.table({"cell_key": list(labels), "wanted": list(labels.values()), "place": range(len(labels))})
    with connect(root) as connection:
        connection.register("wanted_cells", wanted)
        return connection.sql(
            """
            SELECT w.wanted AS label, c.control, c.value, c.num_activations, c.note
            FROM wanted_cells AS w JOIN controls AS c USING (cell_key) ORDER BY w.place, c.control
            """
        ).to_arrow_table()
