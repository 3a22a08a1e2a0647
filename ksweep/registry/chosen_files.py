"""Recorded curves of best-of-K chosen by one score and reported in another: `registry/chosen/<key>.parquet`, never changed."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ksweep.registry.part_labels import label_of, labelled, read_label
from ksweep.utils.files import publish
from ksweep.utils.fingerprint import fingerprint

CHOSEN_SCHEMA = pa.schema(
    [
        ("cell", pa.string()),
        ("label", pa.string()),
        ("chosen_by", pa.string()),
        ("reported", pa.string()),
        ("k", pa.int32()),
        ("measure", pa.string()),
        ("value", pa.float64()),
        ("value_low", pa.float64()),
        ("value_high", pa.float64()),
        ("oracle", pa.float64()),
        ("oracle_low", pa.float64()),
        ("oracle_high", pa.float64()),
        ("difference", pa.float64()),
        ("difference_low", pa.float64()),
        ("difference_high", pa.float64()),
        ("level", pa.float64()),
        ("share_with_choice", pa.float64()),
        ("share_with_value", pa.float64()),
        ("num_draws", pa.int32()),
        ("num_activations", pa.int64()),
        ("num_documents", pa.int64()),
        ("effective_documents", pa.float64()),
        ("num_replicates", pa.int64()),
        ("baseline", pa.float64()),
        ("baseline_kind", pa.string()),
        ("note", pa.string()),
        ("run_id", pa.string()),
        ("draws_key", pa.string()),
        ("chosen_by_key", pa.string()),
        ("reported_key", pa.string()),
    ]
)
"""A row for each cell and K; the comments of the view `chosen_curves` say what the columns mean."""

CHOSEN_FILE_SCHEMA = CHOSEN_SCHEMA.append(pa.field("recorded", pa.timestamp("us")))


def record_chosen(registry: Path, rows: pa.Table) -> Path:
    """Write the rows of CHOSEN_SCHEMA under a key that is hashed from them, and return the file.

    The same rows again are written with the present time: of several answers to one question the last one counts.
    """
    key = fingerprint(rows.to_pylist())
    path = registry / "chosen" / f"{key}.parquet"
    now = pa.array([datetime.now(UTC).replace(tzinfo=None)] * len(rows), pa.timestamp("us"))
    sink = pa.BufferOutputStream()
    table = rows.cast(CHOSEN_SCHEMA).append_column("recorded", now)
    label = label_of(table, {"chosen": key}, CHOSEN_FILE_SCHEMA.names)
    pq.write_table(labelled(table, label), sink, compression="zstd", write_page_checksum=True)
    publish(path, sink.getvalue().to_pybytes())
    return path


def damage_of_chosen(path: Path, by_sql: pa.Table) -> str | None:
    """Return what is wrong with a file, of which SQL sees these rows; None if it is whole."""
    try:
        label = read_label(pq.read_schema(path))
        if missing := set(CHOSEN_FILE_SCHEMA.names).difference(by_sql.column_names):
            return f"it has no column {min(missing)}"
        # Files of earlier versions have no label.
        return None if label is None else label.mismatch(by_sql, {"chosen": path.stem})
    except (OSError, ValueError, TypeError, pa.ArrowException) as error:
        return str(error).splitlines()[0]
