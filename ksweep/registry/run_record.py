"""Records of runs: `landing/<run>/` with record.json, curve.parquet, controls.parquet, metrics.parquet (by group),
examples.parquet (explanations), activations.parquet (errors by activation), and for checkpoints reference.parquet and
norms.parquet. Written once, never changed.

The directory is filled under another name, flushed, and renamed into place, so that readers see all of it or nothing. record.json
carries the size and SHA-256 of the other files: a truncated or altered file is refused by name, not read as numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ksweep.registry.part_store import read_identity
from ksweep.utils.errors import RequestError, StoreError, class_of_type
from ksweep.utils.files import flush_to_disk, publish
from ksweep.utils.fingerprint import json_digest
from ksweep.utils.notes import REFERENCE_QUANTITIES, Note

Status = Literal["finished", "failed", "stopped"]

CURVE_FILE = "curve.parquet"
CONTROLS_FILE = "controls.parquet"
REFERENCE_FILE = "reference.parquet"
NORMS_FILE = "norms.parquet"
METRICS_FILE = "metrics.parquet"
EXAMPLES_FILE = "examples.parquet"
ACTIVATIONS_FILE = "activations.parquet"
RUN_RECORD_FORMAT = 1
"""Increased when the meaning of a file changes; a reader refuses later formats."""
NUM_EXAMPLES = 5
"""Examples that a run stores of its best activations, of its median and of its worst ones."""


class LandingError(StoreError):
    """A recorded file or directory that is incomplete, damaged, or not what its name says."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run of one cell: its spec, how it went, and its results. None means unknown, never zero."""

    run_id: str
    cell: str
    """Display name, unique to the cell: "demo T=0.7 @3fa9c1d2"."""
    label: str
    """The settings in which the cell differs from the others of its sweep, for legends: "temperature=0.7"."""
    cell_key: str
    draws_key: str | None = None
    scores_key: str | None = None
    """None in records of earlier versions: draws_key is then of draws and scores together."""
    activations_key: str | None = None
    sweep: str
    spec: Mapping[str, Any]
    """The cell as JSON."""
    revisions: tuple[str, ...] = ()
    """Checkpoints and models that come from the model hub, with their commits: "owner/name@commit/folder"."""
    resources: Mapping[str, Any] = field(default_factory=dict)

    status: Status
    job: str | None = None
    """Job that the run was part of; attempts/<job>.json has a record of each of its ranks."""
    start: int | None = None
    """Start of the job during which the run ended, 0-based."""
    error_class: str | None = None
    """ksweep.utils.errors.ErrorClass: decides whether a plan runs the cell again."""
    error_type: str | None = None
    """Python type of the first error, where it was an exception."""
    error_message: str | None = None
    tracebacks: tuple[str, ...] = ()
    """Report of each rank that did not finish: node, GPU, class, message, traceback, last log lines, as text."""

    started: datetime
    finished: datetime
    """When the run ended, whatever its status. Both in UTC."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall-clock seconds per phase of the slowest rank: {"sampling": 210.5, "scoring": 14.2}."""

    host: str | None = None
    device: str | None = None
    num_ranks: int | None = None
    git_commit: str | None = None
    git_dirty: bool | None = None
    """Whether its code differed from the commit: changed tracked files, or new ones that a job may import."""
    argv: tuple[str, ...] = ()
    packages: Mapping[str, str] = field(default_factory=dict)
    """Versions by package name."""
    engine: Mapping[str, str] = field(default_factory=dict)
    """How this run computed its draws, as far as that can change draws in bfloat16: see runs.engine in schema.sql."""

    num_activations: int | None = None
    num_documents: int | None = None
    effective_documents: float | None = None
    """Effective number of documents: (sum n)^2 / sum n^2, n the activations of each document."""
    d_model: int | None = None
    layer: int | None = None
    """Block of the base model whose output was verbalised, 0-based; a None in the spec is resolved here."""
    num_draws: int | None = None
    """Draws per activation."""
    num_draws_sampled: int | None = None
    """Draws that did not exist when this run began, over all activations: this run or another job sampled them."""
    num_draws_reused: int | None = None
    num_draws_scored: int | None = None
    """Draws that had no scores when this run began, newly sampled ones included."""
    num_tokens_sampled: int | None = None
    tokens_per_second: float | None = None

    failures: Mapping[str, int] = field(default_factory=dict)
    """Failed draws of the cell by cause, sampled by this run or before: {"no closing tag": 12}."""
    failure_rate: float | None = None
    """Fraction of the cell's draws that failed."""
    cut_off_rate: float | None = None
    """Fraction of draws that reached max_new_tokens; None where all explanations have the same length."""
    distinct_text_fraction: float | None = None
    """Number of distinct explanations of an activation over its number of draws, mean over activations."""
    cjk_fraction: float | None = None
    """Fraction of explanations that are mostly Chinese or Japanese: a known symptom of an injection that did not reach the AV."""
    mean_tokens: float | None = None
    """Mean length of a draw, tokens."""
    draws_bytes: int | None = None
    """Disk space of all draws of draws_key when the run ended; cells that share draws repeat the same number."""
    scores_bytes: int | None = None
    """Disk space of all scores of draws_key and scores_key; earlier versions counted them in draws_bytes."""
    fve_over_successes: float | None = None
    """FVE at K = 1 over successful draws only."""
    scoring_kind: str | None = None
    """"normalised" or "raw": the space in which errors and baseline are taken."""
    baseline: float | None = None
    baseline_kind: str | None = None
    """"between documents", "distance from mean" (in older records "evaluated set") or "stated constant"."""
    baseline_from_mean: float | None = None
    """Mean squared distance of the activations from their mean: the baseline of the public code."""
    baseline_num_activations: int | None = None
    """Activations that the baseline was measured on; None for a stated constant."""

    token_stats: Mapping[str, Any] | None = None
    """Roles of all tokens of the rows of text that were read: {"counts": {"user": 12, ..., "total": 40}, "proportions":
    {...}, "total_sequences": 3}. None where the chat format is unknown."""
    selected_token_stats: Mapping[str, Any] | None = None
    """Roles of the tokens at the evaluated positions, with "total_positions"."""
    notes: tuple[Note, ...] = ()
    """Warnings of checks that did not refuse the run, and reasons why a quantity is unknown that could have been measured."""

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            raise ValueError(f"status={self.status!r} is not one of {', '.join(get_args(Status))}")
        if not self.run_id or self.run_id.startswith(".") or Path(self.run_id).name != self.run_id:
            raise ValueError(f"run_id={self.run_id!r} must be a plain directory name that does not start with a dot")
        for name in ("started", "finished"):
            if getattr(self, name).tzinfo is None:
                raise ValueError(f"{name}={getattr(self, name)} has no time zone; use datetime.now(UTC)")
            object.__setattr__(self, name, getattr(self, name).astimezone(UTC))
        if self.scoring_kind is None:  # earlier versions knew two families, which this field distinguishes
            checkpoint = (self.spec.get("autoencoder") or {}).get("checkpoint")
            object.__setattr__(self, "scoring_kind", "raw" if checkpoint else "normalised")

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RunRecord:
        """Build a record from a parsed record.json, ignoring keys that this version does not know."""
        values = {f.name: value[f.name] for f in fields(cls) if f.name in value}
        values |= {name: tuple(values[name]) for name in ("argv", "tracebacks", "revisions") if name in values}
        # Earlier versions kept these fields of the engine among the packages.
        packages, engine = dict(values.get("packages", {})), dict(values.get("engine", {}))
        engine |= {name: packages.pop(name) for name in ("attention", "tf32", "cuda_graphs") if name in packages}
        values |= {"packages": packages, "engine": engine}
        values |= {"notes": tuple(map(_note, values.get("notes", ())))}
        values |= {name: datetime.fromisoformat(values[name]) for name in ("started", "finished") if name in values}
        if "error_class" not in values and values.get("error_type"):  # written when one field held class or type
            values |= {"error_class": class_of_type(values["error_type"])}
            values |= {"error_type": None} if values["error_class"] == values["error_type"] else {}
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for record.json; NaN and infinity become null."""
        value = asdict(self) | {"started": self.started.isoformat(), "finished": self.finished.isoformat()}
        return {name: _finite(v) for name, v in value.items()}


CURVE_SCHEMA = pa.schema(
    [
        pa.field("metric", pa.string()),
        pa.field("k", pa.int32(), nullable=False),
        pa.field("fve", pa.float64(), nullable=False),
        pa.field("fve_low", pa.float64()),
        pa.field("fve_high", pa.float64()),
        pa.field("level", pa.float64()),
        pa.field("error", pa.float64()),
        pa.field("cosine", pa.float64()),
        pa.field("failure_rate", pa.float64()),
        pa.field("fve_over_successes", pa.float64()),
        pa.field("num_activations", pa.int64(), nullable=False),
        pa.field("num_documents", pa.int64()),
        pa.field("effective_documents", pa.float64()),
        pa.field("num_draws", pa.int32()),
        pa.field("baseline", pa.float64()),
        pa.field("baseline_kind", pa.string()),
        pa.field("shuffled_fve", pa.float64()),
        pa.field("band_low", pa.float64()),
        pa.field("band_high", pa.float64()),
        pa.field("replicates", pa.list_(pa.float32())),
    ]
)
"""One row per K; schema.sql explains each column (table run_curves)."""

CONTROLS_SCHEMA = pa.schema(
    [
        pa.field("control", pa.string(), nullable=False),
        pa.field("k", pa.int32()),
        pa.field("value", pa.float64()),
        pa.field("num_activations", pa.int64()),
        pa.field("note", pa.string()),
    ]
)
"""One row per control: "empty_text", "mean_vector" (an FVE), "retrieval_top1" (a fraction). `note` explains the value."""

REFERENCE_SCHEMA = pa.schema(
    [
        pa.field("quantity", pa.string(), nullable=False),
        pa.field("role", pa.string()),
        pa.field("k", pa.int32(), nullable=False),
        pa.field("value", pa.float64()),
        pa.field("num_activations", pa.int64()),
        pa.field("spread", pa.float64()),
        pa.field("bias", pa.float64()),
        pa.field("std", pa.float64()),
        pa.field("low", pa.float64()),
        pa.field("high", pa.float64()),
        pa.field("bca_low", pa.float64()),
        pa.field("bca_high", pa.float64()),
    ]
)
"""Quantities of the reference sweep: one row per quantity, role (null: all activations) and K; see table run_reference."""

METRICS_SCHEMA = pa.schema(
    [
        pa.field("breakdown", pa.string(), nullable=False),
        pa.field("part", pa.string(), nullable=False),
        pa.field("place", pa.int32(), nullable=False),
        pa.field("against", pa.string()),
        pa.field("k", pa.int32(), nullable=False),
        pa.field("fve", pa.float64()),
        pa.field("fve_low", pa.float64()),
        pa.field("fve_high", pa.float64()),
        pa.field("level", pa.float64()),
        pa.field("error", pa.float64()),
        pa.field("median_error", pa.float64()),
        pa.field("worst_share", pa.float64()),
        pa.field("baseline", pa.float64()),
        pa.field("baseline_kind", pa.string()),
        pa.field("failure_rate", pa.float64()),
        pa.field("all_failed_rate", pa.float64()),
        pa.field("num_activations", pa.int64(), nullable=False),
        pa.field("num_documents", pa.int64()),
        pa.field("effective_documents", pa.float64()),
    ]
)
"""One row per group of activations and K; see table run_metrics."""

EXAMPLES_SCHEMA = pa.schema(
    [
        pa.field("rank", pa.string(), nullable=False),
        pa.field("number", pa.int32(), nullable=False),
        pa.field("activation", pa.int64(), nullable=False),
        pa.field("draw", pa.int32(), nullable=False),
        pa.field("error", pa.float64()),
        pa.field("cosine", pa.float64()),
        pa.field("explanation", pa.string()),
        pa.field("text", pa.string()),
        pa.field("parse", pa.string()),
        pa.field("context", pa.string()),
        pa.field("document", pa.string()),
        pa.field("position", pa.int32()),
    ]
)
"""The best draw of a few activations where the run is best, middling and worst; see table run_examples."""

ACTIVATIONS_SCHEMA = pa.schema(
    [
        pa.field("activation", pa.int64(), nullable=False),
        pa.field("row_id", pa.string()),
        pa.field("document", pa.string()),
        pa.field("position", pa.int32()),
        pa.field("role", pa.string()),
        pa.field("norm", pa.float64()),
        pa.field("distance", pa.float64()),
        pa.field("num_failed", pa.int32()),
        pa.field("ks", pa.list_(pa.int32())),
        pa.field("errors", pa.list_(pa.float64())),
    ]
)
"""One row per activation, not copied into the database: the view activations reads the files."""

NORMS_SCHEMA = pa.schema([pa.field("activation", pa.int64(), nullable=False), pa.field("norm", pa.float64())])
"""Norm of each activation of a checkpoint's run: activation_norms of the reference's JSON. Not in the database."""


@dataclass(frozen=True)
class LandedRun:
    """The record and the tables of a run, read from its directory and checked."""

    record: RunRecord
    curve: pa.Table | None
    """CURVE_SCHEMA; None unless the run finished."""
    controls: pa.Table | None
    """CONTROLS_SCHEMA, or None."""
    reference: pa.Table | None = None
    """REFERENCE_SCHEMA, or None."""
    norms: pa.Table | None = None
    """NORMS_SCHEMA, or None."""
    metrics: pa.Table | None = None
    """METRICS_SCHEMA, or None."""
    examples: pa.Table | None = None
    """EXAMPLES_SCHEMA, or None."""
    activations: pa.Table | None = None
    """ACTIVATIONS_SCHEMA, or None."""


def new_run_id(cell_key: str) -> str:
    """Return a run id: UTC time, first digits of the cell key, and random digits, so that ids of the same second differ."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{cell_key[:8]}-{secrets.token_hex(4)}"


def write_run(
    registry_root: Path | str,
    record: RunRecord,
    curve: pa.Table | None = None,
    controls: pa.Table | None = None,
    reference: pa.Table | None = None,
    norms: pa.Table | None = None,
    metrics: pa.Table | None = None,
    examples: pa.Table | None = None,
    activations: pa.Table | None = None,
) -> Path:
    """Write the record and the tables of a run into `<registry_root>/landing/<run_id>/`, all of them or nothing.

    Raises:
        ValueError: a finished run has no curve, an unfinished run has one, or a table has wrong columns.
        StoreError: the run has been written already.
    """
    _check_status_and_curve(record, curve)
    given = {
        CURVE_FILE: (curve, CURVE_SCHEMA),
        CONTROLS_FILE: (controls, CONTROLS_SCHEMA),
        REFERENCE_FILE: (reference, REFERENCE_SCHEMA),
        NORMS_FILE: (norms, NORMS_SCHEMA),
        METRICS_FILE: (metrics, METRICS_SCHEMA),
        EXAMPLES_FILE: (examples, EXAMPLES_SCHEMA),
        ACTIVATIONS_FILE: (activations, ACTIVATIONS_SCHEMA),
    }
    tables = {name: _cast(table, schema, Path(name).stem) for name, (table, schema) in given.items() if table is not None}
    if CURVE_FILE in tables:
        _checked_curve(tables[CURVE_FILE])
    landing = Path(registry_root) / "landing"
    landing.mkdir(parents=True, exist_ok=True)
    target = landing / record.run_id
    temporary = landing / f".{record.run_id}.{secrets.token_hex(8)}.part"
    temporary.mkdir()
    try:
        digests = {name: _write_parquet(temporary / name, table) for name, table in tables.items()}
        text = json.dumps({"format": RUN_RECORD_FORMAT, "files": digests} | record.to_json(), allow_nan=False)
        content = json.loads(text)
        content["digest"] = json_digest(content)
        publish(temporary / "record.json", json.dumps(content, indent=1).encode())
        flush_to_disk(temporary)
        _rename_into(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    flush_to_disk(landing)
    return target


def read_run(path: Path | str, *, of_each: bool = True) -> LandedRun:
    """Read the directory of a run and check its files against the digests in its record.

    Args:
        path: the directory.
        of_each: whether to read tables with a row for each activation too; the database is built without them.

    Raises:
        LandingError: a file is missing, damaged or of a later format, or the directory was renamed.
    """
    path = Path(path)
    raw = _record_json(path)
    try:
        record = RunRecord.from_json(raw)
    except (TypeError, ValueError, AttributeError) as error:
        raise LandingError(f"record.json of {path.name} is not a run record: {error}") from error
    if record.run_id != path.name:
        raise LandingError(f"{path.name}/record.json is the record of {record.run_id}: was the directory renamed or copied?")
    try:
        curve = _stated_table(path / CURVE_FILE, raw["files"], CURVE_SCHEMA)
        controls = _stated_table(path / CONTROLS_FILE, raw["files"], CONTROLS_SCHEMA)
        reference = _stated_table(path / REFERENCE_FILE, raw["files"], REFERENCE_SCHEMA)
        metrics = _stated_table(path / METRICS_FILE, raw["files"], METRICS_SCHEMA)
        examples = _stated_table(path / EXAMPLES_FILE, raw["files"], EXAMPLES_SCHEMA)
        _check_status_and_curve(record, curve)
        checked = None if curve is None else _checked_curve(curve)
        landed = LandedRun(record, checked, controls, reference, metrics=metrics, examples=examples)
        if not of_each:
            return landed
        norms = _stated_table(path / NORMS_FILE, raw["files"], NORMS_SCHEMA)
        return replace(landed, norms=norms, activations=_stated_table(path / ACTIVATIONS_FILE, raw["files"], ACTIVATIONS_SCHEMA))
    except ValueError as error:
        raise LandingError(f"{path.name}: {error}") from error


def damage_of_table(path: Path) -> str | None:
    """Return how a file of a run differs from what the run's record says; None if it does not."""
    try:
        stated = _record_json(path.parent)["files"].get(path.name)
        if stated is None:
            return "the run's record does not name it"
        _read_parquet(path, stated)
    except LandingError as error:
        return str(error)
    return None


def damaged_runs(registry_root: Path | str) -> dict[Path, str]:
    """Read every run with all its files, and return the directories that fail their checks, with the reason."""
    damaged = {}
    for path in sorted((Path(registry_root) / "landing").glob("[!.]*")):
        try:
            read_run(path)
        except LandingError as error:
            damaged[path] = str(error)
    return damaged


def activations_in_use(registry_root: Path | str) -> set[str]:
    """Return the keys of activations that a run or a set of draws uses, draws of interrupted sweeps included.

    Raises:
        RequestError: the registry has no runs, so that everything would count as unused. LandingError: a record cannot be read.
    """
    landing = Path(registry_root) / "landing"
    runs = [path for path in landing.glob("*/") if not path.name.startswith(".")]
    if not runs:
        raise RequestError(f"no runs in {landing}, so no activations would count as used: check --registry")
    records = [_record_json(path) for path in runs]
    drawn = [_identity_json(path) for path in Path(registry_root).glob("draws/*/identity.json")]
    return {key for key in [*(record.get("activations_key") for record in records), *drawn] if key}


def _identity_json(path: Path) -> str:
    """Return the key of the activations that a set of draws belongs to."""
    try:
        return str(read_identity(path)["draws"]["activations"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LandingError(f"{path} does not say which activations its draws are of ({error}): damaged?") from error


def _record_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads((path / "record.json").read_bytes())
    except OSError as error:
        raise LandingError(f"{path.name}/record.json cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise LandingError(f"{path.name}/record.json is not valid JSON ({error}): cut short or altered") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("format"), int) or not isinstance(raw.get("files"), dict):
        raise LandingError(f"{path.name}/record.json has no format and file list: not written by ksweep")
    if raw["format"] > RUN_RECORD_FORMAT:
        raise LandingError(f"{path.name} has format {raw['format']}, this ksweep reads up to {RUN_RECORD_FORMAT}: update ksweep")
    if raw.get("digest", digest := json_digest(raw)) != digest:  # records of earlier versions have none
        raise LandingError(f"{path.name}/record.json is not what was written: its digest does not match, so a value was altered")
    return raw


def _read_parquet(path: Path, stated: Mapping[str, Any]) -> pa.Table:
    name = f"{path.parent.name}/{path.name}"
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != stated["sha256"]:
            raise LandingError(f"{name} is not what was written ({len(data)} bytes, {stated['bytes']} expected, or altered)")
        # On files this small read_table takes three times as long.
        return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
    except OSError as error:
        raise LandingError(f"{name} cannot be read: {error.strerror or error}") from error
    except (pa.ArrowException, KeyError, TypeError) as error:
        raise LandingError(f"{name} cannot be read: {error}") from error


def _stated_table(path: Path, files: Mapping[str, Any], schema: pa.Schema) -> pa.Table | None:
    """Read a table if the record lists it; columns of later versions are ignored."""
    if path.name not in files:
        return None
    table = _read_parquet(path, files[path.name])
    return _cast(table.select([name for name in table.column_names if name in schema.names]), schema, path.name, trusted=True)


def _cast(table: pa.Table, schema: pa.Schema, what: str, *, trusted: bool = False) -> pa.Table:
    """Return the table with the columns and types of the schema; NaN, which SQL sorts above every number, becomes null."""
    missing, extra = set(schema.names) - set(table.column_names), set(table.column_names) - set(schema.names)
    missing -= {f.name for f in schema if f.nullable}
    if missing or extra:
        raise ValueError(
            f"{what} must have the columns {', '.join(schema.names)}; "
            f"missing: {sorted(missing) or 'none'}, not known: {sorted(extra) or 'none'}"
        )
    # Files that `write_run` wrote have these types already: casting them again took a third of the time of an ingest.
    columns = table.columns if table.schema.equals(schema) and trusted else [_column(table, f) for f in schema]
    for f, column in zip(schema, columns, strict=True):
        if not f.nullable and column.null_count:
            raise ValueError(f"{what} has {column.null_count} empty or NaN values in {f.name!r}, which is always known")
    return pa.table(columns, schema=schema)


def _column(table: pa.Table, f: pa.Field) -> pa.ChunkedArray:
    if f.name not in table.column_names:
        return pa.chunked_array([pa.nulls(len(table), f.type)])
    column = table[f.name].cast(f.type)
    return pc.if_else(pc.is_finite(column), column, None) if pa.types.is_floating(f.type) else column


def _checked_curve(curve: pa.Table) -> pa.Table:
    ks = curve["k"].to_pylist()
    if not ks or min(ks) < 1 or ks != sorted(set(ks)):
        raise ValueError(f"a curve has one row per K, ascending from K >= 1; got K = {ks[:20]}")
    return curve


def _check_status_and_curve(record: RunRecord, curve: pa.Table | None) -> None:
    if (record.status == "finished") != (curve is not None):
        raise ValueError(f"a {record.status} run {'needs a' if curve is None else 'has no'} curve (run {record.run_id})")


def _note(value: Mapping[str, Any] | str) -> Note:
    """Parse a note of record.json; notes of earlier versions are plain text about quantities of the reference sweep."""
    return Note(REFERENCE_QUANTITIES, value) if isinstance(value, str) else Note(value["about"], value["text"])


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


def _write_parquet(path: Path, table: pa.Table) -> dict[str, Any]:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    publish(path, data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _rename_into(temporary: Path, target: Path) -> None:
    try:
        os.rename(temporary, target)  # fails on an existing directory that is not empty
    except OSError as error:
        if target.exists():
            raise StoreError(f"run {target.name} is already recorded in {target.parent}; a retry is a new run") from error
        raise
