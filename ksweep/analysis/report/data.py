"""The data of a sweep's report, read from the registry as plain rows, independent of HTML."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ksweep.analysis.diff import flatten
from ksweep.registry.cell_draws import stored_draws
from ksweep.registry.database import connect
from ksweep.registry.query import TableRow
from ksweep.registry.work_units import ACTIVATIONS_PER_WORK_UNIT
from ksweep.utils.cell_names import distinct_names
from ksweep.utils.errors import RequestError

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

EXPLANATIONS = 1500
"""Rows of the browsable table: about a megabyte, which a browser searches without a pause."""
DRAWS_READ = 400_000
"""Draws read over all cells, in whole blocks of activations: a page does not need all of ten million."""
FEWEST_READ = 4000
"""Draws read of each cell at least, whatever the number of cells."""
SHOWN_TEXT = 700
"""Characters of a text or an explanation that are shown."""
SHOWN_ATTEMPTS = 40


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """The newest version of a sweep, with the newest finished run of each of its cells."""

    sweep: str
    question: str
    asked: TableRow | None
    """Time, command line and commit of the sweep; None for sweeps of versions that did not record it, and imported ones."""
    cells: list[TableRow]
    """Every cell of the sweep, in its order: label, status, run_id."""
    runs: list[TableRow]
    """The runs of the cells that have finished, in the order of the cells, under the labels of the sweep."""
    curves: pa.Table
    differences: list[TableRow]
    """Paired differences between these cells, as v_compare has them."""
    groups: list[TableRow]
    controls: list[TableRow]
    draw_failures: list[TableRow]
    """Failed draws by cell and cause."""
    failed_runs: list[TableRow]
    """Newest run of each cell without a result."""
    attempts: list[TableRow]
    """Ranks of the jobs of these cells that did not finish or were requeued, newest first."""
    num_attempts: int
    """Number of such ranks, shown or not."""
    norms: pa.Table
    """label, norm: norm of each activation, of each set of activations once."""
    errors: pa.Table
    """label, activation, error of the draws that were read."""
    sampled: str
    """Which part of the draws was read, as text; empty if all were."""
    explanations: list[TableRow]
    """Best, median and worst draw of some activations of each cell."""
    num_shown: int
    """Activations among `explanations`, of each cell."""

    @property
    def common(self) -> TableRow:
        """Settings that all cells share, by dotted name."""
        specs = self._specs
        return {name: value for name, value in specs[0].items() if all(s.get(name) == value for s in specs)}

    @property
    def varied(self) -> list[str]:
        """Settings in which the cells differ, by dotted name."""
        return sorted({name for spec in self._specs for name in spec} - set(self.common))

    @property
    def unfinished(self) -> list[TableRow]:
        """Cells without a result."""
        return [cell for cell in self.cells if cell["run_id"] is None]

    @property
    def _specs(self) -> list[TableRow]:
        return [_settings(run) for run in self.runs]

    def setting(self, run: TableRow, name: str) -> Any:
        """Return a setting of one cell by its dotted name."""
        return _settings(run).get(name)


def _settings(run: TableRow) -> TableRow:
    """Return a run's settings by dotted name ({"sampling.temperature": 0.7}), without those that were left open (None)."""
    return {name: value for name, value in flatten(json.loads(run["spec"])) if value not in (None, {})}


def read_report_data(registry: Path, sweep: str) -> ReportData:
    """Read everything that a report of a sweep shows.

    Raises:
        RequestError: no cell of such a sweep has finished.
    """
    with connect(registry) as connection:
        cells = _rows(connection, "SELECT * FROM v_sweep_cells WHERE sweep = ? ORDER BY place", sweep)
        if not any(cell["run_id"] for cell in cells):
            sweeps = _rows(connection, "SELECT DISTINCT sweep FROM v_sweep_cells WHERE run_id IS NOT NULL ORDER BY sweep")
            there = ", ".join(row["sweep"] for row in sweeps) or "none"
            raise RequestError(f"no cell of a sweep {sweep!r} has finished in {registry}; sweeps there: {there}")
        cells = [cell | {"label": name} for cell, name in zip(cells, distinct_names(cells), strict=True)]
        connection.register("mine", pa.Table.from_pylist([cell for cell in cells if cell["run_id"]]))
        runs = _rows(connection, _RUNS)
        asked = _rows(connection, "SELECT * FROM v_sweeps WHERE sweep = ?", sweep)
        attempts = _rows(connection, _ATTEMPTS, sweep)
        ids = [run["run_id"] for run in runs]
        facts = ReportData(
            sweep=sweep, question=asked[0]["question"] if asked else "", asked=next(iter(asked), None), cells=cells, runs=runs,
            curves=_arrow(connection, _CURVES), differences=_rows(connection, _DIFFERENCES, ids),
            groups=_rows(connection, _GROUPS), controls=_rows(connection, _CONTROLS),
            draw_failures=_rows(connection, _DRAW_FAILURES), failed_runs=_rows(connection, _FAILED_RUNS, sweep),
            attempts=attempts[:SHOWN_ATTEMPTS], num_attempts=len(attempts),
            norms=_norms(connection), errors=_ERRORS.empty_table(), sampled="", explanations=[], num_shown=0,
        )  # fmt: skip
        return _with_draws(facts, connection, registry)


def _rows(connection: DuckDBPyConnection, question: str, *values: Any) -> list[TableRow]:
    rows: list[TableRow] = _arrow(connection, question, *values).to_pylist()
    return rows


def _arrow(connection: DuckDBPyConnection, question: str, *values: Any) -> pa.Table:
    return connection.sql(question, params=list(values)).to_arrow_table()


def _norms(connection: DuckDBPyConnection) -> pa.Table:
    """Return the norms of the sweep's activations, read from the files of its runs only."""
    parts = []
    for row in _rows(connection, _NORMS_OF_SETS):
        norms = _arrow(connection, "SELECT norm FROM activations WHERE run_id = ? AND norm IS NOT NULL", row["run_id"])
        parts.append(norms.append_column("label", pa.array([row["label"]] * len(norms), pa.string())))
    return (
        pa.concat_tables(parts) if parts else pa.table({"norm": pa.array([], pa.float64()), "label": pa.array([], pa.string())})
    )


# Draws


def _with_draws(facts: ReportData, connection: DuckDBPyConnection, registry: Path) -> ReportData:
    """Add errors and explanations from as many draws as the page needs."""
    runs = [run for run in facts.runs if run["draws_key"] and run["num_draws"]]
    num_shown = max(1, EXPLANATIONS // (3 * max(1, len(runs))))
    most = max(FEWEST_READ, DRAWS_READ // max(1, len(runs)))
    errors, explanations, read, there = [facts.errors], list[TableRow](), 0, 0
    for run in runs:
        draws = _draws_of(registry, run, most)
        if draws is None:
            continue
        connection.register("stored_draws", draws)
        connection.execute(_READ, [run["num_activations"], run["num_draws"], SHOWN_TEXT])
        errors.append(_arrow(connection, _READ_ERRORS, run["label"]).cast(_ERRORS))
        explanations += _explanations(connection, run, num_shown)
        read, there = read + errors[-1].num_rows, there + run["num_activations"] * run["num_draws"]
    sampled = f"{read:,} of {there:,} draws, whole blocks of activations evenly spaced" if read < there else ""
    return replace(facts, errors=pa.concat_tables(errors), explanations=explanations, num_shown=num_shown, sampled=sampled)


def _draws_of(registry: Path, run: TableRow, most: int) -> pa.Table | None:
    """Read a run's draws: all, or about `most` in evenly spaced blocks of activations; None if there are none."""
    store = stored_draws(registry, run["draws_key"], run["scores_key"])
    parts = [part for part in store.scored_parts() if part.meets(run["num_activations"], run["num_draws"])]
    blocks = sorted({part.first_row // ACTIVATIONS_PER_WORK_UNIT for part in parts})
    wanted = max(1, most // (ACTIVATIONS_PER_WORK_UNIT * run["num_draws"]))
    chosen = {blocks[index] for index in _evenly(len(blocks), wanted)} if blocks else set()
    wanted = [part for part in parts if part.first_row // ACTIVATIONS_PER_WORK_UNIT in chosen]
    tables = (store.read_scored(part, _READ_COLUMNS) for part in wanted)
    there = [table.replace_schema_metadata() for table in tables if table is not None]
    return pa.concat_tables(there) if there else None


def _explanations(connection: DuckDBPyConnection, run: TableRow, most: int) -> Iterator[TableRow]:
    """Yield the best, median and worst draw of up to `most` activations of a cell, best reconstructed activation first."""
    order = _arrow(connection, _BY_BEST_ERROR)["activation"].to_numpy()
    chosen = order[_evenly(len(order), most)]
    connection.register("chosen", pa.table({"activation": chosen, "place": np.arange(len(chosen))}))
    for row in _rows(connection, _EXPLANATIONS):
        yield row | {"label": run["label"], "baseline": run["baseline"]}


def _evenly(count: int, most: int) -> Sequence[int]:
    """Return up to `most` of `count` indices, evenly spaced, with the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))  # type: ignore[return-value]


_ERRORS = pa.schema([("label", pa.string()), ("activation", pa.int64()), ("error", pa.float64())])
_READ_COLUMNS = ("error", "parse", "document", "position", "context", "explanation", "text")
_READ = """
    CREATE OR REPLACE TEMP TABLE read_draws AS
    WITH numbered AS (SELECT *, row_number() OVER () AS place FROM stored_draws)
    SELECT activation, draw, error, parse, document, position, right(context, $3) AS context,
           left(coalesce(explanation, text), $3) AS explanation
    FROM numbered WHERE activation < $1 AND draw < $2
    QUALIFY row_number() OVER (PARTITION BY activation, draw ORDER BY place) = 1
"""
"""A draw that two concurrent sweeps both sampled counts once, as in the view draws."""
_READ_ERRORS = "SELECT ? AS label, activation, error FROM read_draws ORDER BY activation, draw"
_BY_BEST_ERROR = "SELECT activation FROM read_draws GROUP BY activation ORDER BY min(error) NULLS LAST, activation"
_EXPLANATIONS = """
    WITH ranked AS (
        SELECT d.*, c.place, row_number() OVER (PARTITION BY activation ORDER BY d.error NULLS LAST, d.draw) AS rank,
               count(*) OVER (PARTITION BY activation) AS num_draws
        FROM read_draws AS d JOIN chosen AS c USING (activation)
    )
    SELECT activation, document, position, context, explanation, error, parse, draw, rank,
           CASE WHEN rank = 1 THEN 'best' WHEN rank = num_draws THEN 'worst' ELSE 'median' END AS which
    FROM ranked WHERE rank IN (1, (num_draws + 1) // 2, num_draws) ORDER BY place, rank
"""


# Runs. `mine` are the finished cells of the sweep: their labels are those of the sweep, the runs' own may be of another.

_RUNS = "SELECT m.label, r.* EXCLUDE (label) FROM mine AS m JOIN runs AS r USING (run_id) ORDER BY m.place"
_CURVES = """
    SELECT m.label, c.* EXCLUDE (label), r.tokens_per_second, r.distinct_text_fraction, r.cjk_fraction,
           r.mean_tokens * c.k AS tokens
    FROM mine AS m JOIN curves AS c USING (run_id) JOIN runs AS r USING (run_id) ORDER BY m.place, c.k
"""
_DIFFERENCES = """
    SELECT a.label, b.label AS other_label, v.* EXCLUDE (label, other_label)
    FROM v_compare AS v JOIN mine AS a USING (run_id) JOIN mine AS b ON b.run_id = v.other_run_id
    -- Said twice, since a list goes into the view and a join does not: the replicates of other runs need not be read.
    WHERE list_contains($1, v.run_id) AND list_contains($1, v.other_run_id) ORDER BY a.place, b.place, v.k
"""
_GROUPS = """
    SELECT m.label, g.* EXCLUDE (label) FROM mine AS m JOIN metrics AS g USING (run_id) WHERE breakdown <> 'all'
    ORDER BY m.place, breakdown = 'norm', breakdown, g.place, g.against
"""
_CONTROLS = """
    SELECT m.label, c.control, c.k, c.value, c.note FROM mine AS m JOIN controls AS c USING (run_id) ORDER BY c.control, m.place
"""
_DRAW_FAILURES = """
    SELECT m.label, f.cause, f.num_failed_draws, f.failure_rate FROM mine AS m JOIN v_draw_failures AS f USING (run_id)
    ORDER BY m.place, f.num_failed_draws DESC
"""
_FAILED_RUNS = """
    SELECT c.label, f.status, f.error_class, f.error_type, f.error_message, f.host, f.finished
    FROM v_sweep_cells AS c JOIN v_failures AS f USING (cell_key) WHERE c.sweep = ? AND c.run_id IS NULL
    QUALIFY row_number() OVER (PARTITION BY cell_key ORDER BY f.finished DESC) = 1 ORDER BY c.place
"""
_ATTEMPTS = """
    SELECT a.job, a.start, a.rank, a.num_ranks, a.label, a.host, a.gpu, a.device, a.phase, a.ended, a.status, a.error_class,
           a.error_type, a.message, a.requeued, a.why, a.traceback
    FROM attempts AS a
    WHERE (a.sweep = $1 OR a.cell_key IN (SELECT cell_key FROM v_sweep_cells WHERE sweep = $1))
      AND (a.status <> 'finished' OR a.requeued IS NOT NULL)
    ORDER BY a.job DESC, a.start DESC, a.rank
"""
_NORMS_OF_SETS = """
    WITH run_of_set AS (
        SELECT arg_max(run_id, num_activations) AS run_id, activations_key,
               concat_ws(' layer ', any_value(parse_filename(coalesce(model, vectors))), layer) AS label
        FROM runs JOIN (SELECT run_id FROM mine) USING (run_id) WHERE activations_key IS NOT NULL GROUP BY activations_key, layer
    )
    SELECT run_id, CASE WHEN count(*) OVER (PARTITION BY label) = 1 THEN label
                        ELSE concat(label, ' @', left(activations_key, 8)) END AS label FROM run_of_set
"""
