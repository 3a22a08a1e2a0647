"""Metadata of evaluated activations: `registry/activations/<key>/<scoring>-<number>.parquet`, a row per activation.

The first run over these activations writes the file and all later runs share it. Together with the draws it holds everything that
a comparison of cells or a breakdown into groups needs, so that neither vectors nor models have to exist a year later. A file has
its keys and a digest of each column in its schema's metadata; one that is damaged counts as missing, and is written again by the
next run or comparison that has the vectors.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ksweep import stats
from ksweep.registry.part_labels import label_of, labelled, read_label
from ksweep.utils.files import publish

log = logging.getLogger(__name__)

METADATA_SCHEMA = pa.schema(
    [
        ("activations_key", pa.string()),
        ("num_activations", pa.int64()),
        ("scoring", pa.string()),
        ("activation", pa.int64()),
        ("row_id", pa.string()),
        ("document", pa.string()),
        ("position", pa.int32()),
        ("role", pa.string()),
        ("norm", pa.float64()),
        ("position_bucket", pa.string()),
        ("norm_quarter", pa.string()),
        ("distance", pa.float64()),
        ("distance_in_role", pa.float64()),
        ("distance_in_position", pa.float64()),
        ("distance_in_norm", pa.float64()),
        ("between", pa.float64()),
        ("between_in_role", pa.float64()),
        ("between_in_position", pa.float64()),
        ("between_in_norm", pa.float64()),
    ],
    metadata={"version": "2"},
)
"""One row for each of the first `num_activations` activations. The columns from `distance` on are contributions to a baseline, in
the space where `scoring` (normalised or raw) takes differences: the mean of a column is the value of the baseline. `distance`:
squared distance per dimension from the mean. `between`: contribution to stats.between_documents_baseline.
`..._in_...`: the same within the activation's own group; null where the group is unknown or, between documents, has one document.
The version is raised when a column changes its meaning: the next run then writes the file again."""

GROUPINGS = {"role": "role", "position": "position_bucket", "norm": "norm_quarter"}
"""Grouping -> column with the name of each activation's group."""

BASELINE_COLUMNS: dict[stats.BaselineKind, str] = {"between documents": "between", "distance from mean": "distance"}
"""Kind of a measured baseline -> column of contributions to it; with `_in_<grouping>` appended, those within groups."""

BUCKET_STARTS = (0, 32, 64, 128, 256, 512, 1024)


MetadataColumn = Literal["row_id", "document", "position", "role", "norm"]


class EvaluatedActivations(Protocol):
    """The activations of a cell, as a store of activations provides them."""

    @property
    def key(self) -> str:
        """Key of the activations."""

    def __len__(self) -> int: ...

    def vectors(self, start: int, stop: int) -> np.ndarray:
        """Return raw float32 vectors, [activation, d_model]."""

    def column(self, name: MetadataColumn) -> np.ndarray:
        """Return one value for each activation."""


def write_metadata(registry: Path, vectors: EvaluatedActivations, kind: stats.ScoringKind) -> pa.Table:
    """Return the metadata of these activations, written to the registry unless it is there already, and whole."""
    kept = read_metadata(registry, vectors.key, kind, len(vectors))
    if kept is not None and (kept.schema.metadata or {}).get(b"version") == METADATA_SCHEMA.metadata[b"version"]:
        return kept
    table, sink = metadata_table(vectors, kind), pa.BufferOutputStream()
    label = label_of(table, _keys(vectors.key, kind, len(vectors)), table.column_names)
    version_and_label = {**METADATA_SCHEMA.metadata, **labelled(table, label).schema.metadata}
    pq.write_table(table.replace_schema_metadata(version_and_label), sink, compression="zstd", write_page_checksum=True)
    publish(metadata_path(registry, vectors.key, kind, len(vectors)), sink.getvalue().to_pybytes())
    return table


def read_metadata(registry: Path, key: str, kind: stats.ScoringKind, num_activations: int) -> pa.Table | None:
    """Return the metadata of the first activations under a key; None where no run has written it for exactly this number.

    A damaged file, or one of other activations, counts as missing, and is named in a warning. Files of earlier versions lack
    columns.
    """
    path = metadata_path(registry, key, kind, num_activations)
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
        damage = _damage(table, _keys(key, kind, num_activations))
    except FileNotFoundError:
        return None
    except (pa.ArrowException, OSError, ValueError) as error:
        damage = f"it cannot be read ({next(iter(str(error).splitlines()), '')})"
    if damage is None:
        return table
    log.warning("%s is left out, and written again by what has the vectors: %s", path, damage)
    return None


def _damage(table: pa.Table, keys: Mapping[str, str]) -> str | None:
    """Return how a table contradicts its label or its place; None if they agree."""
    label = read_label(table.schema)
    if label is not None:
        if missing := set(label.columns) - set(table.column_names):
            return f"its columns {', '.join(sorted(missing))} are missing"
        return label.mismatch(table, keys)
    num_rows = int(keys["num_activations"])  # earlier versions wrote no label, and fewer columns
    for name, value in {"activations_key": keys["activations"], "num_activations": num_rows, "scoring": keys["scoring"]}.items():
        if name in table.column_names and table[name].to_pylist() != [value] * num_rows:
            return f"its column {name} is not {value} in each of {num_rows} rows"
    return None if len(table) == num_rows else f"it has {len(table)} rows"


def _keys(key: str, kind: stats.ScoringKind, num_activations: int) -> dict[str, str]:
    return {"activations": key, "scoring": kind, "num_activations": str(num_activations)}


def baseline_of(
    metadata: pa.Table, kind: stats.BaselineKind, scoring: stats.ScoringKind, group: str | None = None
) -> stats.Baseline | None:
    """Return a measured baseline of these activations, or with `group` (a key of GROUPINGS) contributions within groups.

    Contributions are NaN where unknown. Returns None where the baseline is unknown: between documents, for a single document or
    a file of an earlier version.
    """
    column = BASELINE_COLUMNS[kind] if group is None else f"{BASELINE_COLUMNS[kind]}_in_{group}"
    if column not in metadata.column_names:
        return None
    parts = metadata[column].to_numpy(zero_copy_only=False).astype(np.float64)
    if group is None and np.isnan(parts).any():
        return None
    value = float(np.nanmean(parts)) if np.isfinite(parts).any() else float("nan")
    return stats.Baseline(value=value, kind=kind, num_activations=len(metadata), scoring=scoring, distances=parts)


def metadata_table(vectors: EvaluatedActivations, kind: stats.ScoringKind) -> pa.Table:
    """Compute the metadata from the vectors.

    Raises:
        ValueError: the vectors have no variance.
    """
    targets, n = vectors.vectors(0, len(vectors)), len(vectors)
    norms = vectors.column("norm").astype(np.float64)
    positions = [None if p is None else int(p) for p in vectors.column("position").tolist()]
    documents = [str(d) for d in vectors.column("document").tolist()]
    groups: dict[str, list[str | None]] = {
        "role": vectors.column("role").tolist(),
        "position": [None if p is None else position_bucket(p) for p in positions],
        "norm": [f"quarter {q + 1} of 4" for q in stats.quantile_groups(norms)],
    }
    columns = {
        "activations_key": [vectors.key] * n,
        "num_activations": [n] * n,
        "scoring": [kind] * n,
        "activation": range(n),
        "row_id": vectors.column("row_id").tolist(),
        "document": documents,
        "position": positions,
        "norm": norms,
        **{GROUPINGS[name]: values for name, values in groups.items()},
        "distance": stats.within_group_distances(targets, ["all"] * n, kind),
        "between": _between(targets, ["all"] * n, documents, kind),
    }
    for name, values in groups.items():
        columns[f"distance_in_{name}"] = _within(targets, values, kind)
        columns[f"between_in_{name}"] = _between(targets, values, documents, kind)
    return pa.table([pa.array(columns[f.name], f.type) for f in METADATA_SCHEMA], schema=METADATA_SCHEMA)


def group_column(by: str) -> str:
    """Return the column of the metadata that names each activation's group."""
    return GROUPINGS.get(by, by if by == "document" else f"group_{by}")


def with_groups(
    metadata: pa.Table, vectors: EvaluatedActivations, groups: Mapping[str, Sequence[str | None]], kind: stats.ScoringKind
) -> pa.Table:
    """Return metadata with further groupings by name: each activation's group, and its part of the baseline within it."""
    if not groups:
        return metadata
    targets, documents = vectors.vectors(0, len(vectors)), metadata["document"].to_pylist()
    for name, values in groups.items():
        metadata = metadata.append_column(group_column(name), pa.array(values, pa.string()))
        metadata = metadata.append_column(f"distance_in_{name}", pa.array(_within(targets, values, kind), pa.float64()))
        metadata = metadata.append_column(
            f"between_in_{name}", pa.array(_between(targets, values, documents, kind), pa.float64())
        )
    return metadata


def position_bucket(position: int) -> str:
    """Return the name of a position's group: "32 to 63" for a token position of 40."""
    bucket = bisect.bisect_right(BUCKET_STARTS, position) - 1
    end = BUCKET_STARTS[bucket + 1] if bucket + 1 < len(BUCKET_STARTS) else None
    return f"{BUCKET_STARTS[bucket]} and later" if end is None else f"{BUCKET_STARTS[bucket]} to {end - 1}"


def _within(targets: np.ndarray, groups: Sequence[str | None], kind: stats.ScoringKind) -> list[float | None]:
    has_group = np.array([g is not None for g in groups])
    distances: list[float | None] = [None] * len(groups)
    if has_group.any():
        names = [g for g in groups if g is not None]
        for row, value in zip(
            np.flatnonzero(has_group), stats.within_group_distances(targets[has_group], names, kind).tolist(), strict=True
        ):
            distances[row] = value
    return distances


def _between(
    targets: np.ndarray, groups: Sequence[str | None], documents: Sequence[str], kind: stats.ScoringKind
) -> list[float | None]:
    """Return each activation's part of the baseline between the documents of its group."""
    names, ids = np.array([g or "" for g in groups], dtype=object), np.asarray(documents, dtype=object)
    distances: list[float | None] = [None] * len(groups)
    for group in {g for g in groups if g is not None}:
        rows = np.flatnonzero(names == group)
        # A slice of the map where the group is everything: no copy of all vectors.
        inside = targets if len(rows) == len(targets) else targets[rows]
        try:
            parts = stats.between_documents_baseline(inside, ids[rows], kind).distances
        except ValueError:  # one document, or no variance: such a group has no baseline of its own
            continue
        assert parts is not None
        for row, part in zip(rows.tolist(), parts.tolist(), strict=True):
            distances[row] = part
    return distances


def metadata_path(registry: Path, key: str, kind: stats.ScoringKind, num_activations: int) -> Path:
    """Return where the metadata of the first activations under a key lies."""
    return registry / "activations" / key / f"{kind}-{num_activations}.parquet"
