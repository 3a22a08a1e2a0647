"""Landing files -> `registry/ksweep.duckdb`, an index that anyone may delete. The only module that imports duckdb.

DuckDB allows one writing process or many readers of a file, and an open notebook is a reader. So the file at that name is never
written: ingest builds the next one beside it and renames it into place. Open readers keep the snapshot they opened, nobody waits.

* Which landing directories are new is a comparison of names; nothing is read twice, and nothing to do costs one short read.
* Directories are read one by one: a bad one goes to the table `quarantine` with its reason; looked at again when it changes.
* A removed landing directory disappears from the database: the files are what is true.
* One ingester at a time, by flock on `registry/.ingest.lock`, which a dead process cannot hold. Where a file system has no such
  locks two ingesters are harmless: each builds from the same immutable files; what the later rename lacks the next ingest adds.
* The views over registry/draws hold its absolute path, because DuckDB resolves relative paths from the working directory of
  whoever asks. When the registry has moved, the next ingest or connect writes the new path.
* The storage version is pinned so that duckdb 1.4, and the `duckdb` command of PyPI's duckdb-cli (1.5), read the file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC
from importlib import resources
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from ksweep.registry import attempts, sweeps
from ksweep.registry.draws import DRAWS_SCHEMA
from ksweep.registry.run_record import ACTIVATIONS_FILE, ACTIVATIONS_SCHEMA, LandedRun, LandingError, RunRecord, read_run
from ksweep.stats.bootstrap import ASYMMETRY, interval_reach
from ksweep.utils.errors import DiskFullError, RequestError, StoreError
from ksweep.utils.files import locked, publish
from ksweep.utils.fingerprint import canonical_json

log = logging.getLogger(__name__)

DatabaseError = duckdb.Error
"""What DuckDB raises, for those who ask through a connection from here."""

DATABASE = "ksweep.duckdb"
ATTEMPTS_PREFIX = f"{attempts.ATTEMPTS_FOLDER}/"
"""What the name of a job's file begins with, beside the names of runs."""
SWEEPS_PREFIX = f"{sweeps.SWEEPS_FOLDER}/"
"""What that of a sweep's asking begins with."""
STORAGE_VERSION = "v1.4.0"
ROOM_TO_BUILD = 4_000_000
"""Bytes below which a failure to build the next file is put down to the disk."""
RUNS_PER_INSERT = 500
"""Landing directories held in memory at once."""
LOCK_TIMEOUT = 120.0
"""Seconds to wait for another ingester; one that takes longer is stuck, and going on without the lock is harmless."""

SPEC_COLUMNS = {
    "temperature": "sampling.temperature",
    "top_p": "sampling.top_p",
    "max_new_tokens": "sampling.max_new_tokens",
    "sampling_seed": "sampling.seed",
    "av": "autoencoder.av",
    "ar": "autoencoder.ar",
    "checkpoint": "autoencoder.checkpoint",
    "base": "autoencoder.base",
    "dtype": "autoencoder.dtype",
    "model": "activations.model",
    "text_source": "activations.text",
    "vectors": "activations.vectors",
    "positions": "activations.positions",
}
"""Columns of `runs` that are read out of the spec, and where they stand in it."""

ROLE_COLUMNS = {"token_roles": "token_stats", "selected_token_roles": "selected_token_stats"}
"""Columns of `runs` with counts by role, and the field of the record that has them."""

RUN_TABLES = {
    "run_curves": "curve",
    "run_controls": "controls",
    "run_reference": "reference",
    "run_metrics": "metrics",
    "run_examples": "examples",
}
"""Tables beside `runs`, and the table of a landed run whose rows go there."""

COMMENT_SOURCES = {
    "best_draws": ("draws",),
    "controls": ("run_controls", "runs"),
    "metrics": ("run_metrics", "runs"),
    "examples": ("run_examples", "runs"),
    "v_throughput": ("runs",),
    "v_compare": ("v_pairs", "run_curves", "runs"),
    "v_latest": ("runs",),
    "v_sweeps": ("sweeps",),
    "v_sweep_cells": ("sweep_cells", "runs"),
    "reference_quantities": ("run_reference", "runs"),
}
"""Where the columns of a view get their comments from; for views that are not named here, run_curves and then runs."""


@dataclass(frozen=True)
class Quarantined:
    """A landing directory that was not believed."""

    run_id: str
    path: Path
    reason: str


@dataclass(frozen=True)
class IngestReport:
    """What an ingest did."""

    database: Path
    num_new: int = 0
    """Runs added."""
    num_removed: int = 0
    """Runs whose landing directory is gone."""
    num_runs: int = 0
    """Runs in the database now."""
    quarantined: tuple[Quarantined, ...] = ()
    """Every directory in quarantine now, not only the new ones."""
    rebuilt: str | None = None
    """Why the database was built from nothing; None when it was added to."""
    changed: bool = False
    """Whether a new database file was published."""
    seconds: float = 0.0


def ingest_landings(root: Path | str) -> IngestReport:
    """Bring `<root>/ksweep.duckdb` up to date with the landing files; safe to call at any time, from any number of processes.

    Raises:
        RequestError: there is no such directory.
    """
    began = time.perf_counter()
    root = _existing(root)
    _keep_typed_empty_parts(root)
    plan = _plan(root)
    if plan.work:
        with _lock(root):
            plan = _plan(root)  # whoever held the lock may have done it
            if plan.work:
                _publish_next(root, plan)
                return _report(root, plan, began, changed=True)
    return _report(root, plan, began, changed=False)


def rebuild_database(root: Path | str) -> IngestReport:
    """Build the database from the landing files alone, whatever is there now."""
    began = time.perf_counter()
    root = _existing(root)
    _keep_typed_empty_parts(root)
    with _lock(root):
        plan = _plan(root, from_nothing="asked for")
        _publish_next(root, plan)
        return _report(root, plan, began, changed=True)


def connect(root: Path | str = "registry") -> duckdb.DuckDBPyConnection:
    """A read-only connection to an up-to-date database: `connect().sql("from curves")`. Holding it open blocks nobody.

    It keeps the snapshot it was opened on; connect again to see later runs. A registry that cannot be written is read as it is.
    """
    root_here = _existing(root)
    database = root_here / DATABASE
    try:
        ingest_landings(root)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not database.exists():
            raise
        if (reason := _state(root_here)[1]) is not None:
            raise StoreError(
                f"{database} cannot be used ({reason}) and its directory cannot be written: its owner runs `ksweep db ingest`"
            ) from error
        log.warning("%s cannot be brought up to date (%s): reading it as it is", database, error.strerror)
    return _open(database)


# What is missing


@dataclass(frozen=True)
class _State:
    """What the present database holds."""

    run_ids: frozenset[str]
    files: frozenset[str]
    """attempts/<job> and sweeps/<id> that are in it."""
    quarantined: Mapping[str, Quarantined]
    signatures: Mapping[str, str]
    root: str


@dataclass(frozen=True)
class _Plan:
    """What separates the database from the landing files."""

    new: tuple[str, ...]
    removed: tuple[str, ...]
    """Run ids, attempts/<job> and sweeps/<id>, in quarantine or not, whose rows have to go."""
    rebuilt: str | None
    moved: bool
    """Whether the registry lies elsewhere than the views say."""

    @property
    def work(self) -> bool:
        return bool(self.new or self.removed or self.rebuilt or self.moved)


def _plan(root: Path, from_nothing: str | None = None) -> _Plan:
    landed = _landed(root)
    state, reason = (None, from_nothing) if from_nothing else _state(root)
    if state is None:
        return _Plan(tuple(sorted(landed)), (), reason, False)
    changed = {name for name in state.quarantined if name in landed and _signature(root, name) != state.signatures[name]}
    told = state.run_ids | state.files | state.quarantined.keys()
    known = told - changed
    removed = (told - landed) | changed
    return _Plan(tuple(sorted(landed - known)), tuple(sorted(removed)), None, state.root != str(root))


def _landed(root: Path) -> set[str]:
    """Names under landing/, attempts/<job>, sweeps/<id>; those that begin with a dot are still being written."""
    told = {f"{ATTEMPTS_PREFIX}{job}" for job in attempts.jobs_with_attempts(root)} | {
        f"{SWEEPS_PREFIX}{name}" for name in sweeps.sweep_record_ids(root)
    }
    try:
        return told | {name for name in os.listdir(root / "landing") if not name.startswith(".")}
    except FileNotFoundError:
        return told


def _state(root: Path) -> tuple[_State | None, str | None]:
    """What the database holds; or None and why it has to be built from nothing."""
    database = root / DATABASE
    if not database.exists():
        return None, "there was none"
    try:
        with _open(database) as connection:
            return _read_state(root, connection)
    except duckdb.Error as error:
        return None, f"it could not be read: {str(error).splitlines()[0]}"


def _read_state(root: Path, connection: duckdb.DuckDBPyConnection) -> tuple[_State | None, str | None]:
    meta = dict(connection.execute("SELECT key, value FROM meta").fetchall())
    if meta.get("schema") != _schema_fingerprint():
        return None, "it was made by another version of ksweep"
    run_ids = frozenset(name for (name,) in connection.execute("SELECT run_id FROM runs").fetchall())
    rows = connection.execute("SELECT run_id, reason, signature FROM quarantine ORDER BY run_id").fetchall()
    files = "SELECT DISTINCT $1 || job FROM attempts UNION ALL SELECT $2 || sweep_id FROM sweeps"
    others = frozenset(name for (name,) in connection.execute(files, [ATTEMPTS_PREFIX, SWEEPS_PREFIX]).fetchall())
    quarantined = {name: Quarantined(name, _path(root, name), reason) for name, reason, _ in rows}
    return _State(run_ids, others, quarantined, {name: signature for name, _, signature in rows}, meta["root"]), None


def _signature(root: Path, name: str) -> str:
    """Names, sizes and times of what lies in a landing directory: changes when somebody repairs it."""
    path = _path(root, name)
    found = sorted([path, *path.glob("*")])
    return " ".join(f"{p.name}:{s.st_size}:{s.st_mtime_ns}" for p in found if (s := p.stat()))


def _path(root: Path, name: str) -> Path:
    """Where a landed name lies."""
    return root / f"{name}.json" if name.startswith((ATTEMPTS_PREFIX, SWEEPS_PREFIX)) else root / "landing" / name


# Building the next file


def _publish_next(root: Path, plan: _Plan) -> None:
    next_file = root / f".{DATABASE}.{secrets.token_hex(8)}.next"
    try:
        if not plan.rebuilt:
            shutil.copyfile(root / DATABASE, next_file)
        _fill(next_file, root, plan)
        _fsync(next_file)
        os.replace(next_file, root / DATABASE)
        _fsync(root)
    except (duckdb.Error, OSError) as error:
        if shutil.disk_usage(root).free < ROOM_TO_BUILD or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"no room for the next {DATABASE} in {root}: landed runs are safe. Free some room and run `ksweep db ingest`."
            ) from error
        raise
    finally:
        next_file.unlink(missing_ok=True)
        Path(f"{next_file}.wal").unlink(missing_ok=True)


def _fill(database: Path, root: Path, plan: _Plan) -> None:
    with duckdb.connect() as connection:
        connection.execute(f"ATTACH {_quoted(database)} AS ksweep (STORAGE_VERSION '{STORAGE_VERSION}')")
        connection.execute("USE ksweep")
        connection.begin()  # one flush to disk instead of one per statement
        if plan.rebuilt:
            connection.execute(_sql("schema.sql"))
        _forget(connection, plan.removed)
        for start in range(0, len(plan.new), RUNS_PER_INSERT):
            _insert(connection, root, plan.new[start : start + RUNS_PER_INSERT])
        if plan.rebuilt or plan.moved:
            _make_views(connection, root)
        facts = {"schema": _schema_fingerprint(), "root": str(root)}
        connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", list(facts.items()))
        connection.commit()
        connection.execute("USE memory")
        connection.execute("DETACH ksweep")  # writes everything into the one file


def _forget(connection: duckdb.DuckDBPyConnection, run_ids: Sequence[str]) -> None:
    for table in ("runs", *RUN_TABLES, "quarantine") if run_ids else ():
        connection.execute(f"DELETE FROM {table} WHERE run_id IN (SELECT unnest(?))", [list(run_ids)])
    if jobs := [name.removeprefix(ATTEMPTS_PREFIX) for name in run_ids if name.startswith(ATTEMPTS_PREFIX)]:
        connection.execute("DELETE FROM attempts WHERE job IN (SELECT unnest(?))", [jobs])
    if asked := [name.removeprefix(SWEEPS_PREFIX) for name in run_ids if name.startswith(SWEEPS_PREFIX)]:
        for table in ("sweeps", "sweep_cells"):
            connection.execute(f"DELETE FROM {table} WHERE sweep_id IN (SELECT unnest(?))", [asked])


def _insert(connection: duckdb.DuckDBPyConnection, root: Path, names: Iterable[str]) -> None:
    tables = ("runs", *RUN_TABLES, "attempts", "sweeps", "sweep_cells")
    schemas = {table: _arrow_schema(connection, table) for table in tables if table not in RUN_TABLES}
    schema = schemas["runs"]
    rows: dict[str, list[pa.Table]] = {table: [] for table in tables}
    bad = []
    for name in names:
        try:
            if name.startswith(ATTEMPTS_PREFIX):
                rows["attempts"].append(_attempt_rows(_path(root, name), schemas["attempts"]))
                continue
            if name.startswith(SWEEPS_PREFIX):
                for table, found in _sweep_rows(_path(root, name)).items():
                    rows[table].append(_typed(found, schemas[table]))
                continue
            landed = read_run(root / "landing" / name, of_each=False)
            rows["runs"].append(_run_row(landed, schema))
        except (LandingError, pa.ArrowException, TypeError, ValueError) as error:
            bad.append({"run_id": name, "reason": str(error), "signature": _signature(root, name)})
            log.warning("landing %s is not believed: %s", _path(root, name), error)
            continue
        for table, attribute in RUN_TABLES.items():
            found = getattr(landed, attribute)
            rows[table] += [] if found is None else [_with_run_id(found, name)]
    for table, parts in rows.items():
        if parts:
            _append(connection, table, pa.concat_tables(parts).combine_chunks())
    if bad:
        _append(connection, "quarantine", pa.Table.from_pylist(bad))


def _append(connection: duckdb.DuckDBPyConnection, table: str, rows: pa.Table) -> None:
    connection.register("landed_rows", rows)
    connection.execute(f"INSERT INTO {table} BY NAME SELECT * FROM landed_rows")
    connection.unregister("landed_rows")


def _run_row(landed: LandedRun, schema: pa.Schema) -> pa.Table:
    """A row of `runs`, with its types checked: what does not fit raises here, not in the middle of an insert."""
    record = landed.record
    row = {f.name: getattr(record, f.name, None) for f in schema}
    row |= {column: _at(record.spec, path) for column, path in SPEC_COLUMNS.items()}
    row |= {name: getattr(record, name).replace(tzinfo=None) for name in ("started", "finished")}
    row |= {name: list(getattr(record, name).items()) for name in ("failures", "seconds", "packages", "engine")}
    row |= {column: _role_counts(getattr(record, name)) for column, name in ROLE_COLUMNS.items()}
    row |= {"spec": canonical_json(record.spec), "resources": canonical_json(record.resources)}
    row["notes"] = [asdict(note) for note in record.notes]
    row["interval_reach"] = _interval_reach(record)
    row["num_failed_draws"] = sum(record.failures.values()) if record.status == "finished" else None
    return pa.table([pa.array([row[f.name]], f.type) for f in schema], schema=schema)


def _attempt_rows(path: Path, schema: pa.Schema) -> pa.Table:
    """Rows of `attempts`, with their types checked."""
    rows = [asdict(attempt) for attempt in attempts.read_attempts(path)]
    for row in rows:
        row |= {name: row[name] and row[name].astimezone(UTC).replace(tzinfo=None) for name in ("began", "ended")}
    return _typed(rows, schema)


def _sweep_rows(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of `sweeps` and `sweep_cells`."""
    asking, sweep_id = sweeps.read_sweep_record(path), path.stem
    row = asdict(asking) | {"sweep_id": sweep_id, "asked": asking.asked.astimezone(UTC).replace(tzinfo=None)}
    cells = [asdict(cell) | {"sweep_id": sweep_id, "sweep": asking.sweep} for cell in asking.cells]
    return {"sweeps": [row | {"number": sweeps.record_number(sweep_id), "num_cells": len(cells)}], "sweep_cells": cells}


def _typed(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows with the types of a table: what does not fit raises here, not in the middle of an insert."""
    return pa.table([pa.array([row[f.name] for row in rows], f.type) for f in schema], schema=schema)


def _interval_reach(record: RunRecord) -> float | None:
    effective, level = record.effective_documents, _at(record.spec, "scoring.level")
    return interval_reach(effective, level) if effective and effective > 1 and level else None


def _role_counts(stats: Mapping[str, Any] | None) -> list[tuple[str, int]] | None:
    counts = (stats or {}).get("counts")
    return None if counts is None else list(counts.items())


def _at(spec: Mapping[str, Any], path: str) -> Any:
    value: Any = spec
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _with_run_id(table: pa.Table, run_id: str) -> pa.Table:
    return table.append_column("run_id", pa.array([run_id] * len(table), pa.string()))


def _arrow_schema(connection: duckdb.DuckDBPyConnection, table: str) -> pa.Schema:
    """The Arrow schema of a table: schema.sql is the one place where types are written."""
    empty = connection.sql(f"SELECT * FROM {table} LIMIT 0").to_arrow_table()
    return pa.schema([pa.field(f.name, getattr(f.type, "storage_type", f.type)) for f in empty.schema])


def _make_views(connection: duckdb.DuckDBPyConnection, root: Path) -> None:
    old = connection.execute("SELECT view_name FROM duckdb_views() WHERE NOT internal AND database_name = 'ksweep'").fetchall()
    for (name,) in old:
        connection.execute(f"DROP VIEW {name}")
    for (name,) in connection.execute("SELECT function_name FROM duckdb_functions() WHERE database_name = 'ksweep'").fetchall():
        connection.execute(f"DROP MACRO {name}")
    views = _sql("views.sql")
    # Not the directories that begin with a dot: those are being written. One of draws/_schema has no rows, and is always there.
    for place, pattern in {"DRAWS_PARTS": "draws/*/part-*.parquet", "ACTIVATIONS": f"*/[!.]*/{ACTIVATIONS_FILE}"}.items():
        views = views.replace(f"'{place}'", _quoted(f"{_glob_escaped(root)}/{pattern}"))
    views = views.replace("'ASYMMETRY'", str(ASYMMETRY))
    connection.execute(views)
    _inherit_comments(connection)


def _keep_typed_empty_parts(root: Path) -> None:
    """Parts without rows, so that the views have their columns before the first draw and the first run."""
    for name, schema in {"part-empty.parquet": DRAWS_SCHEMA, "activations.parquet": ACTIVATIONS_SCHEMA}.items():
        path = root / "draws" / "_schema" / name
        if not (path.exists() and pq.read_schema(path).equals(schema)):
            sink = pa.BufferOutputStream()
            pq.write_table(schema.empty_table(), sink)
            publish(path, sink.getvalue().to_pybytes())


def _inherit_comments(connection: duckdb.DuckDBPyConnection) -> None:
    """A column of a view without a comment of its own means what the column of that name means where the view takes it from."""
    columns = connection.execute(
        "SELECT table_name, column_name, comment FROM duckdb_columns() WHERE database_name = 'ksweep' AND schema_name = 'main'"
    ).fetchall()
    comments = {(table, column): comment for table, column, comment in columns if comment}
    views = connection.execute("SELECT view_name FROM duckdb_views() WHERE database_name = 'ksweep' AND NOT internal").fetchall()
    for table, column, comment in columns:
        found = [c for source in COMMENT_SOURCES.get(table, ("run_curves", "runs")) if (c := comments.get((source, column)))]
        if (table,) in views and not comment and found:
            connection.execute(f"COMMENT ON COLUMN {table}.{column} IS {_quoted(found[0])}")


# Files, locks and text


def _open(database: Path) -> duckdb.DuckDBPyConnection:
    """A connection of its own in which the database is attached for reading and in use.

    Not `duckdb.connect(path)`, which within a process may hand out the instance that an earlier notebook cell still holds.
    """
    try:
        return _attached(database)
    except duckdb.IOException:
        # Somebody opened the file for writing (the duckdb command does unless told -readonly) and locked it: read a copy.
        with tempfile.TemporaryDirectory(prefix="ksweep-") as directory:
            return _attached(Path(shutil.copyfile(database, Path(directory) / DATABASE)))


def _attached(database: Path) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect()
    try:
        connection.execute(f"ATTACH {_quoted(database)} AS ksweep (READ_ONLY)")
        connection.execute("USE ksweep")
    except BaseException:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def _lock(root: Path) -> Iterator[None]:
    """One ingester at a time. Given back by the kernel when its holder dies; left out where the file system has no locks."""
    with locked(root / ".ingest.lock", "another ingester", patience=LOCK_TIMEOUT) as held:
        if held:
            for leftover in root.glob(f".{DATABASE}.*.next*"):  # of an ingester that was killed
                leftover.unlink(missing_ok=True)
        yield


def _existing(root: Path | str) -> Path:
    path = Path(root).expanduser()
    if not path.is_dir():
        raise RequestError(
            f"no registry at {path}: expected a directory that a sweep has written to; check the path or run a sweep first"
        )
    return path.resolve()


def _report(root: Path, plan: _Plan, began: float, *, changed: bool) -> IngestReport:
    state, reason = _state(root)
    if state is None:
        raise StoreError(f"the database {root / DATABASE} that was just built cannot be used: {reason}")
    bad = tuple(state.quarantined.values())
    return IngestReport(
        database=root / DATABASE,
        num_new=len(set(plan.new) & state.run_ids) if changed else 0,
        num_removed=len({n for n in plan.removed if not n.startswith((ATTEMPTS_PREFIX, SWEEPS_PREFIX))} - set(plan.new))
        if changed
        else 0,
        num_runs=len(state.run_ids),
        quarantined=bad,
        rebuilt=plan.rebuilt if changed else None,
        changed=changed,
        seconds=time.perf_counter() - began,
    )


def _sql(name: str) -> str:
    return resources.files("ksweep.registry").joinpath(name).read_text(encoding="utf-8")


def _schema_fingerprint() -> str:
    """Changes with anything that changes what the database would hold: a database made otherwise is built again."""
    intervals = str((ASYMMETRY, interval_reach(10.0, 0.95)))
    schemas = [repr(SPEC_COLUMNS), str(DRAWS_SCHEMA), str(ACTIVATIONS_SCHEMA)]
    text = "\n".join([_sql("schema.sql"), _sql("views.sql"), *schemas, intervals])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _quoted(value: object) -> str:
    return "'" + str(value).replace("'", "''") + "'"


def _glob_escaped(path: Path) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in str(path))


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
