"""Everything that the registry holds on one run, as plain values for `ksweep show` in text and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ksweep.registry.database import connect
from ksweep.registry.query import TableRow, run_named
from ksweep.registry.run_record import NUM_EXAMPLES


def run_details(root: Path, name: str) -> TableRow:
    """Return the row of a run in `runs`, its spec, curve, controls, groups and examples.

    Raises:
        RequestError: nothing has the name.
    """
    run_id = run_named(root, name)
    with connect(root) as connection:

        def rows(question: str, *values: Any) -> list[TableRow]:
            result: list[TableRow] = connection.sql(question, params=list(values)).to_arrow_table().to_pylist()
            return result

        [run] = rows("SELECT * EXCLUDE (interval_reach) FROM runs WHERE run_id = ?", run_id)
        curve = "SELECT * EXCLUDE (run_id, replicates) FROM run_curves WHERE run_id = ? ORDER BY k"
        details = {
            "run": {name: _plain(value) for name, value in run.items()},
            "spec": json.loads(run["spec"]),
            "curve": rows(curve, run_id),
            "controls": rows("SELECT * EXCLUDE (run_id) FROM run_controls WHERE run_id = ? ORDER BY control, k", run_id),
            "groups": rows(
                "SELECT * EXCLUDE (run_id, place) FROM run_metrics WHERE run_id = ? "
                "QUALIFY k = max(k) OVER () ORDER BY breakdown, place, against DESC, k", run_id,
            ),
            "examples": rows("SELECT * EXCLUDE (run_id) FROM run_examples WHERE run_id = ? ORDER BY rank, number", run_id)
            or rows(_EXAMPLES_FROM_DRAWS, NUM_EXAMPLES, run_id),
        }  # fmt: skip
    details["run"]["spec"], details["run"]["resources"] = details["spec"], json.loads(run["resources"] or "null")
    return details


def _plain(value: Any) -> Any:
    """Return a DuckDB map, which arrives as a list of pairs, as a dict."""
    if isinstance(value, list) and value and all(isinstance(pair, tuple) for pair in value):
        return dict(value)
    return value


# Examples of runs recorded before examples were kept: the best draw of each activation; one whose draws all failed is worst.
_EXAMPLES_FROM_DRAWS = """
WITH run AS (SELECT ? AS few, * FROM v_latest WHERE run_id = ?), firsts AS (
    SELECT d.* EXCLUDE (rank), run.few
    FROM draws AS d JOIN run ON d.draws_key = run.draws_key AND d.scores_key IS NOT DISTINCT FROM run.scores_key
     AND d.activation < run.num_activations AND d.draw < run.num_draws
    QUALIFY row_number() OVER (PARTITION BY d.activation ORDER BY d.error NULLS LAST, d.draw) = 1
), best AS (
    SELECT *, row_number() OVER (ORDER BY error NULLS LAST, activation) - 1 AS place, count(*) OVER () AS n FROM firsts
), cut AS (SELECT *, least(few, greatest(1, n // 3)) AS m FROM best), named AS (
    SELECT 'best' AS rank, place + 1 AS number, * FROM cut WHERE place < m
    UNION ALL SELECT 'median', place - (n - m) // 2 + 1, * FROM cut WHERE place >= (n - m) // 2 AND place < (n - m) // 2 + m
    UNION ALL SELECT 'worst', n - place, * FROM cut WHERE place >= n - m
)
SELECT rank, number, activation, draw, error, cosine, explanation, text, parse, context, document, position FROM named
ORDER BY rank, number
"""
