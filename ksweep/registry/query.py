"""Queries on the registry: SQL of users, finished and failed runs, curves by name, the speed of earlier runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from ksweep.registry.database import DatabaseError, connect
from ksweep.utils.errors import RequestError

WRITING_STATEMENTS = ("COPY", "COPY_DATABASE", "EXPORT", "ATTACH", "LOAD")
"""Statements of DuckDB (INSTALL is a LOAD) that reach beyond the database, which is opened for reading; stored questions are
files that may come with somebody else's registry."""
TableRow = dict[str, Any]
"""Column name -> value."""


def run_query(root: Path, question: str, variables: Mapping[str, str] | None = None) -> pa.Table:
    """Return the result of a SQL query; it reads `variables` with getvariable.

    Raises:
        RequestError: DuckDB does not accept the query, it writes files, or it returns no rows and columns.
    """
    with connect(root) as connection:
        try:
            question.encode()  # of half a surrogate pair DuckDB says that the arguments have wrong types
            _refuse_writing(statement.type.name for statement in connection.extract_statements(question))
            for name, value in (variables or {}).items():
                connection.execute(f"SET VARIABLE {name} = ?", [value])
            answer = connection.sql(question)
            if answer is not None:
                return answer.to_arrow_table()
        except (DatabaseError, UnicodeEncodeError) as error:
            raise RequestError(f"DuckDB does not accept that: {error}") from error
    raise RequestError(f"{question!r} has no answer: ask with SELECT or FROM, e.g. ksweep sql 'from curves'")


def _refuse_writing(kinds: Iterable[str]) -> None:
    if writing := [kind for kind in kinds if kind in WRITING_STATEMENTS]:
        raise RequestError(
            f"a query reads, and {writing[0].replace('_', ' ')} writes files or loads code: ask with SELECT or FROM; `ksweep sql "
            "... --parquet FILE` and --csv keep the answer, and ksweep.connect() takes any SQL"
        )


def finished_runs(root: Path) -> dict[str, str]:
    """Return cell key -> newest finished run; empty where there is no registry yet."""
    if not root.is_dir():
        return {}
    with connect(root) as connection:
        return dict(connection.execute("SELECT cell_key, run_id FROM v_latest").fetchall())


def failed_runs(root: Path) -> dict[str, tuple[str, str]]:
    """Return cell key -> (error class, message) of cells whose newest run failed or was stopped."""
    if not root.is_dir():
        return {}
    question = """
        SELECT cell_key, coalesce(error_class, status), coalesce(error_message, '') FROM runs
        QUALIFY row_number() OVER (PARTITION BY cell_key ORDER BY finished DESC, run_id DESC) = 1 AND status <> 'finished'
    """
    with connect(root) as connection:
        return {key: (kind, message) for key, kind, message in connection.execute(question).fetchall()}


def runs_since(root: Path, moment: datetime) -> dict[str, str]:
    """Return cell key -> status of the runs that ended after a moment."""
    if not root.is_dir():
        return {}
    question = "SELECT cell_key, status FROM runs WHERE finished >= ? ORDER BY finished"
    with connect(root) as connection:
        return dict(connection.execute(question, [moment.astimezone(UTC).replace(tzinfo=None)]).fetchall())


def run_named(root: Path, name: str) -> str:
    """Return the run with this id, or the newest finished run of the cell, label or one-cell sweep of this name.

    A unique prefix of a run id or of a cell's key (with or without the @ in front of it) is enough.

    Raises:
        RequestError: nothing has the name, or several cells share it.
    """
    exact = "SELECT run_id FROM runs WHERE run_id = $1 UNION SELECT run_id FROM v_latest WHERE $1 IN (cell, label, sweep)"
    begins = (
        "SELECT run_id FROM runs WHERE starts_with(run_id, $1) UNION "
        "SELECT run_id FROM v_latest WHERE starts_with(cell_key, ltrim($1, '@'))"
    )
    with connect(root) as connection:
        run_ids = connection.execute(exact, [name]).fetchall()
        if not run_ids and name.strip("@"):
            run_ids = connection.execute(begins, [name]).fetchall()
    if len(run_ids) == 1:
        return str(run_ids[0][0])
    if not run_ids:
        raise RequestError(f"no run, cell, label or sweep {name!r} in {root}: `ksweep ls` lists them")
    raise RequestError(
        f"{len(run_ids)} runs are called {name!r}; name one of them: {', '.join(sorted(run for (run,) in run_ids))}"
    )


REFERENCE_METRICS = ("variance_recovery", "mse_variance_recovery", "r_squared")
"""Quantities of the reference sweep that can be shown as a curve."""


def named_curves(root: Path, names: Sequence[str], metric: str | None = None) -> pa.Table:
    """Return the curves of cells, labels, sweeps (all their cells) or run ids, in the order given, from the newest finished runs.

    Args:
        root: the registry.
        names: cells, labels, sweeps or run ids; none means every curve.
        metric: "fve" or a quantity of the reference sweep, from the runs that have it; None takes the number that each run holds.

    Raises:
        RequestError: nothing has one of the names, or no run has the metric.
    """
    if metric not in (None, "fve", *REFERENCE_METRICS):
        raise RequestError(f"metric={metric!r} is not one of fve, {', '.join(REFERENCE_METRICS)}")
    with connect(root) as connection:
        connection.register("asked", pa.table({"name": pa.array(names, pa.string()), "place": pa.array(range(len(names)))}))
        everything = "(SELECT run_id, label, 0 AS place, 0 AS within FROM v_latest)" if not names else _NAMED_RUNS
        unknown = connection.sql(f"SELECT name FROM asked WHERE place NOT IN (SELECT place FROM {_NAMED_RUNS})").fetchall()
        if unknown:
            raise RequestError(f"no finished run, cell, label or sweep {unknown[0][0]!r} in {root}: `ksweep ls` lists them")
        values = _REFERENCE_CURVES if metric in REFERENCE_METRICS else _CURVES
        curves = connection.sql(values.format(runs=everything), params={"metric": metric}).to_arrow_table()
    if not curves.num_rows:
        raise RequestError(f"none of these runs has {metric or 'a curve'}; only checkpoints have {', '.join(REFERENCE_METRICS)}")
    return curves


_NAMED_RUNS = """(
    SELECT run_id, arg_min(label, place) AS label, min(place) AS place, min(within) AS within FROM (
        SELECT run_id, label, place, 0 AS within FROM v_latest JOIN asked ON name IN (run_id, cell, label)
        UNION ALL SELECT c.run_id, c.label, asked.place, c.place FROM v_sweep_cells AS c JOIN asked ON name = c.sweep
        WHERE c.run_id IS NOT NULL
    ) GROUP BY run_id
)"""
_CURVES = """
    SELECT n.label, c.* EXCLUDE (label) REPLACE (step_in(n.label, c.step) AS step)
    FROM {runs} AS n JOIN curves AS c USING (run_id)
    WHERE $metric IS NULL OR metric = $metric ORDER BY n.place, n.within, c.finished, c.run_id, c.k
"""
_REFERENCE_CURVES = """
    SELECT q.cell, n.label, q.quantity AS metric, q.k, q.value AS fve, q.low AS fve_low, q.high AS fve_high, c.level,
           q.num_activations, c.num_documents, c.baseline, c.baseline_kind, q.temperature, NULL::DOUBLE AS shuffled_fve,
           q.sweep, q.run_id
    FROM {runs} AS n JOIN reference_quantities AS q USING (run_id) LEFT JOIN curves AS c USING (run_id, k)
    WHERE q.quantity = $metric AND q.role IS NULL ORDER BY n.place, n.within, c.finished, q.run_id, q.k
"""


def seconds_per_draw(root: Path, autoencoder: str) -> float | None:
    """Return rank-seconds per draw of the newest run that sampled with this AV or checkpoint; None where there is none."""
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


def seconds_per_score(root: Path, ar: str) -> float | None:
    """Return rank-seconds per draw of the newest run that only scored, with this AR or checkpoint; None where there is none."""
    if not root.is_dir():
        return None
    question = """
        SELECT seconds['scoring'] * num_ranks / num_draws_scored FROM runs
        WHERE ? IN (ar, checkpoint) AND num_draws_sampled = 0 AND num_draws_scored > 0 AND seconds['scoring'] IS NOT NULL
        ORDER BY finished DESC LIMIT 1
    """
    with connect(root) as connection:
        row = connection.execute(question, [ar]).fetchone()
    return None if row is None else float(row[0])


def curves_of(root: Path, labels: Mapping[str, str]) -> pa.Table:
    """Return the curves of some cells, in the order and under the labels given (cell key -> label)."""
    wanted = pa.table({"cell_key": list(labels), "wanted": list(labels.values()), "place": range(len(labels))})
    with connect(root) as connection:
        connection.register("wanted_cells", wanted)
        return connection.sql(
            """
            SELECT w.wanted AS label, c.* EXCLUDE (label) REPLACE (step_in(w.wanted, c.step) AS step), r.tokens_per_second,
                   r.distinct_text_fraction, r.cjk_fraction, r.notes
            FROM wanted_cells AS w JOIN curves AS c USING (cell_key) JOIN runs AS r USING (run_id) ORDER BY w.place, c.k
            """
        ).to_arrow_table()


def controls_of(root: Path, labels: Mapping[str, str]) -> pa.Table:
    """Return the controls of some cells in the same way; the shuffled control is part of the curves."""
    wanted = pa.table({"cell_key": list(labels), "wanted": list(labels.values()), "place": range(len(labels))})
    with connect(root) as connection:
        connection.register("wanted_cells", wanted)
        return connection.sql(
            """
            SELECT w.wanted AS label, c.control, c.value, c.num_activations, c.note
            FROM wanted_cells AS w JOIN controls AS c USING (cell_key) ORDER BY w.place, c.control
            """
        ).to_arrow_table()
