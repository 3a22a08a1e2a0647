"""What is known of each evaluated activation: `registry/activations/<key>/<scoring>-<number>.parquet`, a row an activation.

Written once when the first run over these activations lands and shared by all later ones. With the draws it holds all that a
comparison of cells or a breakdown into groups needs, so that neither vectors nor models have to be there a year later.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ksweep import stats
from ksweep.utils.files import publish

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
"""What each of the first `num_activations` adds to a baseline, in the space where `scoring` (normalised or raw) takes
differences; the mean of a column is the baseline's value. `distance`: squared distance per dimension from the mean. `between`:
its part of the baseline between documents (stats.between_documents_baseline). `..._in_...`: the same within the activation's own
group; null where the group is not known or, between documents, has one document. The version is raised when a column changes
its meaning: a file of another one is written anew by the next run."""

GROUPINGS = {"role": "role", "position": "position_bucket", "norm": "norm_quarter"}
"""What activations are grouped by, and the column that says so."""

BASELINE_COLUMNS: dict[stats.BaselineKind, str] = {"between documents": "between", "distance from mean": "distance"}
"""Where the parts of a measured baseline stand; with `_in_<group>` behind it those within groups."""

BUCKET_STARTS = (0, 32, 64, 128, 256, 512, 1024)


MetadataColumn = Literal["row_id", "document", "position", "role", "norm"]


class EvaluatedActivations(Protocol):
    """The activations of a cell, as a store of activations hands them out."""

    @property
    def key(self) -> str:
        """Key of the activations."""

    def __len__(self) -> int: ...

    def vectors(self, start: int, stop: int) -> np.ndarray:
        """[activation, d_model] float32, raw."""

    def column(self, name: MetadataColumn) -> np.ndarray:
        """[activation] one value each."""


def write_metadata(registry: Path, vectors: EvaluatedActivations, kind: stats.ScoringKind) -> pa.Table:
    """What is known of these activations, kept for later readers unless it is there already."""
    kept = read_metadata(registry, vectors.key, kind, len(vectors))
    if kept is not None and (kept.schema.metadata or {}).get(b"version") == METADATA_SCHEMA.metadata[b"version"]:
        return kept
    table, sink = metadata_table(vectors, kind), pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    publish(_path(registry, vectors.key, kind, len(vectors)), sink.getvalue().to_pybytes())
    return table


def read_metadata(registry: Path, key: str, kind: stats.ScoringKind, num_activations: int) -> pa.Table | None:
    """The rows of the first activations under a key; None where no run has described just these.

    Files of earlier versions lack columns.
    """
    path = _path(registry, key, kind, num_activations)
    if not path.exists():
        return None
    return pq.read_table(path, page_checksum_verification=True, partitioning=None)


def baseline_of(
    known: pa.Table, kind: stats.BaselineKind, scoring: stats.ScoringKind, group: str | None = None
) -> stats.Baseline | None:
    """A measured baseline of these activations, or with `group` (a key of GROUPINGS) the parts within groups, NaN where unknown.

    None where it is not known: between documents, of a single one or described by an earlier version.
    """
    column = BASELINE_COLUMNS[kind] if group is None else f"{BASELINE_COLUMNS[kind]}_in_{group}"
    if column not in known.column_names:
        return None
    parts = known[column].to_numpy(zero_copy_only=False).astype(np.float64)
    if group is None and np.isnan(parts).any():
        return None
    value = float(np.nanmean(parts)) if np.isfinite(parts).any() else float("nan")
    return stats.Baseline(value=value, kind=kind, num_activations=len(known), scoring=scoring, distances=parts)


def metadata_table(vectors: EvaluatedActivations, kind: stats.ScoringKind) -> pa.Table:
    """The rows, from the vectors themselves.

    Raises:
        ValueError: vectors without variance.
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


def position_bucket(position: int) -> str:
    """ "32 to 63" for a token position of 40."""
    at = bisect.bisect_right(BUCKET_STARTS, position) - 1
    end = BUCKET_STARTS[at + 1] if at + 1 < len(BUCKET_STARTS) else None
    return f"{BUCKET_STARTS[at]} and later" if end is None else f"{BUCKET_STARTS[at]} to {end - 1}"


def natural_sorted(groups: Iterable[str]) -> list[str]:
    """Names of groups as a reader expects them: numbers by their value."""
    return sorted(groups, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def _within(targets: np.ndarray, groups: Sequence[str | None], kind: stats.ScoringKind) -> list[float | None]:
    known = np.array([g is not None for g in groups])
    found: list[float | None] = [None] * len(groups)
    if known.any():
        names = [g for g in groups if g is not None]
        for row, value in zip(
            np.flatnonzero(known), stats.within_group_distances(targets[known], names, kind).tolist(), strict=True
        ):
            found[row] = value
    return found


def _between(
    targets: np.ndarray, groups: Sequence[str | None], documents: Sequence[str], kind: stats.ScoringKind
) -> list[float | None]:
    """Each activation's part of the baseline between the documents of its group."""
    names, ids = np.array([g or "" for g in groups], dtype=object), np.asarray(documents, dtype=object)
    found: list[float | None] = [None] * len(groups)
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
            found[row] = part
    return found


def _path(registry: Path, key: str, kind: stats.ScoringKind, num_activations: int) -> Path:
    return registry / "activations" / key / f"{kind}-{num_activations}.parquet"
