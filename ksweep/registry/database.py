"""Build `registry/ksweep.duckdb`, an index over the registry's files that can be deleted at any time. Alone imports duckdb.

DuckDB allows one writing process or many readers of a file, and an open notebook is a reader. The file in use is therefore never
written: ingest builds the next file beside it and renames it into place. Open readers keep their snapshot, and nobody waits.

* New files are found by comparing names. No file is read twice, and an ingest without new files costs one short read.
* Files are read one by one. One that cannot be read or inserted, for whatever reason, goes into the table `quarantine` with the
  reason, and is read again when it changes.
* The digest of a published file lies beside it. A database that is not what was published, or that another program has written
  to (it leaves a .wal), is built from nothing, and never copied into the next one.
* A run whose directory was removed disappears from the database: the files are the truth.
* One process ingests at a time, by a lock on `registry/.ingest.lock` that the kernel releases when its holder dies. On a file
  system without locks two ingesters do no harm: both build from the same immutable files, and the next ingest adds the rest.
* Views over registry/draws contain its absolute path, because DuckDB resolves relative paths against the working directory of the
  reader. When the registry has moved, the next ingest or connect writes the new path.
* The storage version is pinned so that duckdb 1.4, and the `duckdb` command of PyPI's duckdb-cli (1.5), read the file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC
from functools import cache, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from ksweep.registry import attempts, sweeps
from ksweep.registry.chosen_files import CHOSEN_FILE_SCHEMA
from ksweep.registry.draws import DRAWS_FILE_SCHEMA
from ksweep.registry.part_checks import DamagedPart, damaged_parts
from ksweep.registry.run_record import ACTIVATIONS_FILE, ACTIVATIONS_SCHEMA, LandedRun, LandingError, RunRecord, read_run
from ksweep.registry.scores import LONG_SCHEMA, RECONSTRUCTION_SCHEMA
from ksweep.stats.bootstrap import ASYMMETRY, interval_reach
from ksweep.utils.checkpoint_series import step_of
from ksweep.utils.errors import DiskFullError, RequestError, RunError, StoreError
from ksweep.utils.files import LEFTOVER_AGE, READ_ONLY, flush_to_disk, locked, publish
from ksweep.utils.fingerprint import canonical_json

log = logging.getLogger(__name__)

DatabaseError = duckdb.Error
"""Base class of DuckDB's errors, for callers that must not import duckdb."""

DATABASE = "ksweep.duckdb"
ATTEMPTS_PREFIX = f"{attempts.ATTEMPTS_FOLDER}/"
"""Prefix of the names of jobs' files, which are listed beside the names of runs."""
SWEEPS_PREFIX = f"{sweeps.SWEEPS_FOLDER}/"
"""Prefix of the names of sweeps' files."""
DIGESTS = f"{DATABASE}.digests"
"""File beside the database with the digests of the latest published ones, newest first: the next database's is written before
the file gets its name, so that a reader in between accepts either."""
WRITE_AHEAD_LOG = f"{DATABASE}.wal"
STORAGE_VERSION = "v1.4.0"
ROOM_TO_BUILD = 4_000_000
"""With less free space, in bytes, a failure to build the next file is reported as a full disk."""
LONGEST_REASON = 1000
"""Most characters of a reason in quarantine."""
KEPT_DIGESTS = 4
RUNS_PER_INSERT = 500
"""Runs held in memory at once."""
NO_DATABASE, NO_DIGEST, ON_REQUEST = "there was none", "it has no digest", "asked for"
OTHER_VERSION = "it was made by another version of ksweep"
"""Why a database is built from nothing, where nothing is wrong."""
LOCK_TIMEOUT = 120.0
"""Seconds to wait for another ingester; one that takes longer is stuck, and ingesting without the lock does no harm."""

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
"""Column of `runs` -> path of its value in the spec."""

ROLE_COLUMNS = {"token_roles": "token_stats", "selected_token_roles": "selected_token_stats"}
"""Column of `runs` with counts by role -> field of the run record."""

RUN_TABLES = {
    "run_curves": "curve",
    "run_controls": "controls",
    "run_reference": "reference",
    "run_metrics": "metrics",
    "run_examples": "examples",
}
"""Table of the database -> table of a recorded run whose rows it holds."""

COMMENT_SOURCES = {
    "best_draws": ("draws",),
    "texts": ("draws",),
    "draw_scores": ("draws",),
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
"""View -> tables whose column comments it inherits; other views inherit from run_curves, then runs."""


@dataclass(frozen=True)
class Quarantined:
    """A recorded file or directory that failed its checks."""

    run_id: str
    path: Path
    reason: str


@dataclass(frozen=True)
class IngestReport:
    """Result of an ingest."""

    database: Path
    num_new: int = 0
    """Runs added."""
    num_removed: int = 0
    """Runs removed because their directories are gone."""
    num_runs: int = 0
    """Runs in the database after the ingest."""
    quarantined: tuple[Quarantined, ...] = ()
    """Everything in quarantine after the ingest, not only the new entries."""
    rebuilt: str | None = None
    """Why the database was built from nothing; None if the ingest added to the existing one."""
    changed: bool = False
    """Whether a new database file was published."""
    seconds: float = 0.0


def ingest_landings(root: Path | str) -> IngestReport:
    """Bring `<root>/ksweep.duckdb` up to date with the registry's files. Any number of processes may call it at any time.

    Raises:
        RequestError: there is no such directory.
    """
    began = time.perf_counter()
    root = _existing(root)
    _write_empty_parts(root)
    # 1. compare the names of files with those in the database; usually nothing is new
    plan = _plan(root)
    if plan.has_work:
        with _lock(root), _own_copy(root) as next_file:
            # 2. compare again, with a copy of the database: the previous holder of the lock may have ingested the same files
            plan = _plan(root, damaged=plan.damaged, database=next_file)
            if plan.has_work:
                # 3. bring the copy up to date and rename it into place
                if plan.rebuilt not in (None, NO_DATABASE, OTHER_VERSION, NO_DIGEST):
                    log.warning("%s is built again from the registry's files: %s", root / DATABASE, plan.rebuilt)
                _publish_next(root, plan, next_file)
                return _report(root, plan, began, changed=True)
    return _report(root, plan, began, changed=False)


def rebuild_database(root: Path | str) -> IngestReport:
    """Build the database from the registry's files, whatever it holds now."""
    began = time.perf_counter()
    root = _existing(root)
    _write_empty_parts(root)
    with _lock(root), _own_copy(root) as next_file:
        plan = _plan(root, from_nothing=ON_REQUEST)
        _publish_next(root, plan, next_file)
        return _report(root, plan, began, changed=True)


def connect(root: Path | str = "registry") -> duckdb.DuckDBPyConnection:
    """Return a read-only connection to an up-to-date database: `connect().sql("from curves")`. An open one blocks nobody.

    It keeps the snapshot that it was opened on; connect again to see later runs. Where the registry cannot be written, a copy of
    this process's own is brought up to date.
    """
    root_here = _existing(root)
    try:
        ingest_landings(root)
    except (OSError, DiskFullError) as error:
        code = error.errno if isinstance(error, OSError) else errno.ENOSPC
        if code not in (*READ_ONLY, errno.ENOSPC, errno.EDQUOT):
            raise
        log.warning("%s cannot be brought up to date (%s): a copy is", root_here / DATABASE, os.strerror(code))
        return _up_to_date_copy(root_here)
    return _open(root_here / DATABASE)


def _up_to_date_copy(root: Path) -> duckdb.DuckDBPyConnection:
    """Return a connection to what the next ingest would publish."""
    if not (root / "draws" / "_schema").exists():
        raise StoreError(f"{root} has no database yet and cannot be written: its owner runs `ksweep db ingest`")
    with _own_copy(root) as next_file:
        plan = _plan(root, database=next_file)
        if plan.has_work:
            _bring_up_to_date(next_file, root, plan)
        return _attached(next_file)


# What is new


@dataclass(frozen=True)
class _State:
    """What the current database holds."""

    run_ids: frozenset[str]
    files: frozenset[str]
    """attempts/<job> and sweeps/<id> in the database."""
    quarantined: Mapping[str, Quarantined]
    signatures: Mapping[str, str]
    root: str
    damaged: tuple[str, ...]
    """Parts that the views leave out."""


@dataclass(frozen=True)
class _Plan:
    """How the database differs from the registry's files."""

    new: tuple[str, ...]
    removed: tuple[str, ...]
    """Run ids, attempts/<job> and sweeps/<id>, in quarantine or not, whose rows are to be deleted."""
    rebuilt: str | None
    damaged: tuple[str, ...]
    """Parts that fail their check."""
    views_differ: bool
    """Whether the registry has moved, or other parts are damaged, since both were written into the views."""

    @property
    def has_work(self) -> bool:
        return bool(self.new or self.removed or self.rebuilt or self.views_differ)


def _plan(
    root: Path, from_nothing: str | None = None, damaged: tuple[str, ...] | None = None, database: Path | None = None
) -> _Plan:
    """Compare the registry's files with the database, or with a copy of it; `damaged` saves checking parts again."""
    on_disk = _names_on_disk(root)
    state, reason = (None, from_nothing) if from_nothing else _state(root, database)
    damaged = _damaged_paths(root) if damaged is None else damaged
    if state is None:
        return _Plan(tuple(sorted(on_disk)), (), reason, damaged, False)
    repaired = {name for name in state.quarantined if name in on_disk and _signature(root, name) != state.signatures[name]}
    in_database = state.run_ids | state.files | state.quarantined.keys()
    new = on_disk - (in_database - repaired)
    removed = (in_database - on_disk) | repaired
    views_differ = (state.root, state.damaged) != (str(root), damaged)
    plan = _Plan(tuple(sorted(new)), tuple(sorted(removed)), None, damaged, views_differ)
    # What an earlier version published has no digest: it is read as it is, but not copied into the next one.
    return _plan(root, NO_DIGEST, damaged) if plan.has_work and not _published_digests(root) else plan


def check_parts(root: Path, *, again: bool = False) -> tuple[DamagedPart, ...]:
    """Return the parts of draws and scores that fail their check; `again` reads also files that have passed it before."""
    connections: list[duckdb.DuckDBPyConnection] = []

    def read_by_sql(path: Path) -> pa.Table | str:
        """Return the rows of a part as the views read them, or why DuckDB cannot."""
        if not connections:  # making one takes longer than reading a part
            connections.append(duckdb.connect())
        try:
            return connections[0].sql(f"FROM read_parquet({_quoted(_glob_escaped(path))})").to_arrow_table()
        except (duckdb.OutOfMemoryException, duckdb.InternalException) as error:
            raise RunError(f"DuckDB cannot read {path}: {error}") from error
        except duckdb.Error as error:
            return str(error).splitlines()[0]

    try:
        return damaged_parts(root, read_by_sql, again=again)
    finally:
        for connection in connections:
            connection.close()


def _damaged_paths(root: Path) -> tuple[str, ...]:
    """Return the paths of damaged parts, with a warning of each."""
    parts = check_parts(root)
    for part in parts:
        _warn_of(part)
    return tuple(str(part.path) for part in parts)


@cache
def _warn_of(part: DamagedPart) -> None:
    """Warn of a damaged part, once in this process."""
    kind = "damaged" if part.is_readable else "unreadable"
    log.warning("%s is %s (%s): its rows are left out. `ksweep verify` says what to do", part.path, kind, part.reason)


def _names_on_disk(root: Path) -> set[str]:
    """Run ids, attempts/<job> and sweeps/<id>, without names that begin with a dot: those are still being written."""
    names = {f"{ATTEMPTS_PREFIX}{job}" for job in attempts.jobs_with_attempts(root)} | {
        f"{SWEEPS_PREFIX}{name}" for name in sweeps.sweep_record_ids(root)
    }
    with contextlib.suppress(FileNotFoundError):
        names |= {name for name in os.listdir(root / "landing") if not name.startswith(".")}
    if unreadable := {name for name in names if not _is_text(name)}:
        log.warning(
            "%s: %d files have names that are not text and are left out, such as %a", root, len(unreadable), min(unreadable)
        )
    return names - unreadable


def _state(root: Path, database: Path | None = None) -> tuple[_State | None, str | None]:
    """Return what the database, or a copy of it, holds, or None and the reason why it must be built from nothing."""
    database = database or root / DATABASE
    try:
        file = database.stat()
    except FileNotFoundError:
        return None, NO_DATABASE
    if (root / WRITE_AHEAD_LOG).exists():
        return None, f"another program has written to it ({WRITE_AHEAD_LOG} lies beside it)"
    try:
        return _state_of_file(root, database, (file.st_dev, file.st_ino, file.st_mtime_ns, file.st_size), _schema_fingerprint())
    except (duckdb.Error, KeyError, ValueError) as error:
        return None, f"it could not be read: {_one_line(error)}"


@lru_cache(maxsize=2)  # of the latest files: each holds a name of every run
def _state_of_file(root: Path, database: Path, file: tuple[int, ...], schema: str) -> tuple[_State | None, str | None]:
    """Return what this database file holds. A published file never changes, so it is read once: `connect` took 170 ms, now 38."""
    with _open(database) as connection:
        state, reason = _read_state(root, connection)
    published = _published_digests(root)
    if state is not None and published and _file_digest(database) not in published:
        return None, "it is not what was written: another program or the disk has changed it"
    return state, reason


def _published_digests(root: Path) -> list[str]:
    """Return the digests of the latest published databases; none where an earlier version has published the only one."""
    try:
        return (root / DIGESTS).read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return []


def _file_digest(path: Path) -> str:
    """Return a digest of a file: 0.09 s for 100 MB on a busy core."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


def _read_state(root: Path, connection: duckdb.DuckDBPyConnection) -> tuple[_State | None, str | None]:
    meta = dict(connection.execute("SELECT key, value FROM meta").fetchall())
    if meta.get("schema") != _schema_fingerprint():
        return None, OTHER_VERSION
    run_ids = frozenset(name for (name,) in connection.execute("SELECT run_id FROM runs").fetchall())
    rows = connection.execute("SELECT run_id, reason, signature FROM quarantine ORDER BY run_id").fetchall()
    files = "SELECT DISTINCT $1 || job FROM attempts UNION ALL SELECT $2 || sweep_id FROM sweeps"
    others = frozenset(name for (name,) in connection.execute(files, [ATTEMPTS_PREFIX, SWEEPS_PREFIX]).fetchall())
    quarantined = {name: Quarantined(name, _path(root, name), reason) for name, reason, _ in rows}
    damaged = tuple(json.loads(meta.get("damaged_parts", "[]")))
    return _State(run_ids, others, quarantined, {name: signature for name, _, signature in rows}, meta["root"], damaged), None


def _signature(root: Path, name: str) -> str:
    """Return names, sizes and modification times of a run's files, which change when someone repairs it."""
    path = _path(root, name)
    paths = sorted([path, *path.glob("*")])
    return " ".join(f"{p.name}:{s.st_size}:{s.st_mtime_ns}" for p in paths if (s := p.stat()))


def _path(root: Path, name: str) -> Path:
    """Return the path of the file or directory with this name."""
    return root / f"{name}.json" if name.startswith((ATTEMPTS_PREFIX, SWEEPS_PREFIX)) else root / "landing" / name


# Building the next file


@contextlib.contextmanager
def _own_copy(root: Path) -> Iterator[Path]:
    """Yield the path of a copy of the database, if there is one, in a directory of this process alone: the next is built there.

    Where the file system has no locks, an ingester on another machine may replace the database, or take this one's work for a
    leftover, at any time: what is compared and built must be this process's own. It lies on the machine's own disk where there
    is room, since DuckDB writes many small pieces.
    """
    database = root / DATABASE
    size = database.stat().st_size if database.exists() else 0
    own = Path(tempfile.gettempdir())
    place = own if shutil.disk_usage(own).free > 3 * size + ROOM_TO_BUILD else root
    with tempfile.TemporaryDirectory(prefix=".ksweep-", dir=place) as directory:
        copied = Path(directory) / DATABASE
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(database, copied)
        yield copied


def _publish_next(root: Path, plan: _Plan, next_file: Path) -> None:
    """Bring a copy of the database up to date and rename it into the database's place.

    Raises:
        DiskFullError: there is no space for it.
    """
    staged = root / f".{DATABASE}.{secrets.token_hex(8)}.next"
    try:
        _bring_up_to_date(next_file, root, plan)
        shutil.copyfile(next_file, staged)
        flush_to_disk(staged)
        digests = [_file_digest(next_file), *_published_digests(root)[: KEPT_DIGESTS - 1]]
        publish(root / DIGESTS, "\n".join(digests).encode())
        os.replace(staged, root / DATABASE)
        (root / WRITE_AHEAD_LOG).unlink(missing_ok=True)  # it belongs to no database any more
        flush_to_disk(root)
    except (duckdb.Error, OSError) as error:
        if shutil.disk_usage(root).free < ROOM_TO_BUILD or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"no room for the next {DATABASE} in {root}, or in {next_file.parent} where it is built: recorded runs are safe. "
                "Free some space and run `ksweep db ingest`."
            ) from error
        raise
    finally:
        staged.unlink(missing_ok=True)


def _bring_up_to_date(next_file: Path, root: Path, plan: _Plan) -> None:
    """Bring a copy of the database up to date; files whose rows DuckDB does not take go into quarantine."""
    try:
        _build(next_file, root, plan, refused={})
    except (duckdb.Error, pa.ArrowException):
        # DuckDB refuses rows of a file that reads well: quarantine that one, and build without it.
        if not (refused := _refused_rows(root, plan.new)):
            raise
        _build(next_file, root, plan, refused=refused)


def _build(next_file: Path, root: Path, plan: _Plan, *, refused: Mapping[str, str]) -> None:
    """Bring a database file up to date, in one transaction; files in `refused` (name -> reason) go into quarantine."""
    Path(f"{next_file}.wal").unlink(missing_ok=True)
    if plan.rebuilt:
        next_file.write_bytes(_empty_database(_schema_fingerprint()))
    _fill(next_file, root, plan, refused)


def _refused_rows(root: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the files whose rows DuckDB does not take, each tried by itself in a database of its own, with its reason."""
    refused: dict[str, str] = {}
    for name in names:
        with duckdb.connect() as connection:
            connection.execute(_sql("schema.sql"))
            try:
                _insert(connection, root, [name], {})
            except (duckdb.Error, pa.ArrowException) as error:
                refused[name] = _one_line(error)
    return refused


@lru_cache(maxsize=1)
def _empty_database(schema: str) -> bytes:
    """Return a database file with all that is the same in every registry of this version: its 600 comments alone take 0.4 s."""
    with tempfile.TemporaryDirectory(prefix="ksweep-") as directory:
        file = Path(directory) / DATABASE
        with _writing(file) as connection:
            connection.execute(_sql("schema.sql"))
            connection.execute(_sql("views.sql").replace("'ASYMMETRY'", str(ASYMMETRY)))
            _inherit_comments(connection)
            connection.execute("INSERT INTO meta VALUES ('schema', ?)", [schema])
        return file.read_bytes()


def _fill(database: Path, root: Path, plan: _Plan, refused: Mapping[str, str]) -> None:
    """Bring a copy of the database up to date."""
    with _writing(database) as connection:
        # 1. rows: delete those of removed files, insert those of new files
        _delete_rows(connection, plan.removed)
        for start in range(0, len(plan.new), RUNS_PER_INSERT):
            _insert(connection, root, plan.new[start : start + RUNS_PER_INSERT], refused)
        # 2. views that contain the registry's path
        if plan.rebuilt or plan.views_differ:
            _make_file_views(connection, root, plan.damaged)
        meta = {"root": str(root), "damaged_parts": json.dumps(plan.damaged)}
        connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", list(meta.items()))


@contextlib.contextmanager
def _writing(database: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open a database file for writing, in one transaction; it is whole and in one file when the block ends."""
    with duckdb.connect() as connection:
        connection.execute(f"ATTACH {_quoted(database)} AS ksweep (STORAGE_VERSION '{STORAGE_VERSION}')")
        connection.execute("USE ksweep")
        connection.begin()  # one flush to disk instead of one per statement
        yield connection
        connection.commit()
        connection.execute("USE memory")
        connection.execute("DETACH ksweep")  # writes everything into the one file


def _delete_rows(connection: duckdb.DuckDBPyConnection, names: Sequence[str]) -> None:
    """Delete all rows of the files with these names."""
    for table in ("runs", *RUN_TABLES, "quarantine") if names else ():
        connection.execute(f"DELETE FROM {table} WHERE run_id IN (SELECT unnest(?))", [list(names)])
    if jobs := [name.removeprefix(ATTEMPTS_PREFIX) for name in names if name.startswith(ATTEMPTS_PREFIX)]:
        connection.execute("DELETE FROM attempts WHERE job IN (SELECT unnest(?))", [jobs])
    if sweep_ids := [name.removeprefix(SWEEPS_PREFIX) for name in names if name.startswith(SWEEPS_PREFIX)]:
        for table in ("sweeps", "sweep_cells"):
            connection.execute(f"DELETE FROM {table} WHERE sweep_id IN (SELECT unnest(?))", [sweep_ids])


def _insert(connection: duckdb.DuckDBPyConnection, root: Path, names: Iterable[str], refused: Mapping[str, str]) -> None:
    """Read the files of these names and insert their rows; damaged ones, and those in `refused`, go into quarantine."""
    plain_tables = ("runs", "attempts", "sweeps", "sweep_cells")
    schemas = {table: _arrow_schema(connection, table) for table in plain_tables}
    rows: dict[str, list[pa.Table]] = {table: [] for table in (*plain_tables, *RUN_TABLES)}
    quarantined = []
    for name in names:
        try:
            if name in refused:
                raise LandingError(f"the database does not take its rows: {refused[name]}")
            for table, part in _read_rows(root, name, schemas).items():
                rows[table].append(part)
        except Exception as error:  # whatever it is: one bad file must not stop every other reader
            reason = str(error) if isinstance(error, LandingError) else f"{type(error).__name__}: {error}"
            reason = reason.encode(errors="replace").decode()[:LONGEST_REASON]
            quarantined.append({"run_id": name, "reason": reason, "signature": _signature(root, name)})
            log.warning("%s is quarantined: %s", _path(root, name), reason)
    for table, parts in rows.items():
        if parts:
            _append(connection, table, pa.concat_tables(parts).combine_chunks())
    if quarantined:
        _append(connection, "quarantine", pa.Table.from_pylist(quarantined))


def _read_rows(root: Path, name: str, schemas: Mapping[str, pa.Schema]) -> dict[str, pa.Table]:
    """Return the rows of one file or run by table.

    Raises:
        LandingError: the file is damaged. Others: a value has the wrong type.
    """
    path = _path(root, name)
    for file in [path, *path.glob("*")]:
        if not (file.is_file() or file.is_dir()):  # reading a named pipe would wait for ever
            raise LandingError(f"{file.name} is neither a file nor a directory")
    if name.startswith(ATTEMPTS_PREFIX):
        return {"attempts": _attempt_rows(path, schemas["attempts"])}
    if name.startswith(SWEEPS_PREFIX):
        return {table: _typed(rows, schemas[table]) for table, rows in _sweep_rows(path).items()}
    run = read_run(path, of_each=False)
    tables = {table: getattr(run, attribute) for table, attribute in RUN_TABLES.items()}
    of_run = {table: _with_run_id(rows, name) for table, rows in tables.items() if rows is not None}
    return {"runs": _run_row(run, schemas["runs"])} | of_run


def _append(connection: duckdb.DuckDBPyConnection, table: str, rows: pa.Table) -> None:
    connection.register("landed_rows", rows)
    connection.execute(f"INSERT INTO {table} BY NAME SELECT * FROM landed_rows")
    connection.unregister("landed_rows")


def _run_row(run: LandedRun, schema: pa.Schema) -> pa.Table:
    """Return a row of `runs` with the types of the table, so that a wrong type raises here and not in the middle of an insert."""
    record = run.record
    row = {f.name: getattr(record, f.name, None) for f in schema}
    row |= {column: _at(record.spec, path) for column, path in SPEC_COLUMNS.items()}
    row |= {name: getattr(record, name).replace(tzinfo=None) for name in ("started", "finished")}
    row |= {name: list(getattr(record, name).items()) for name in ("failures", "seconds", "packages", "engine")}
    row |= {column: _role_counts(getattr(record, name)) for column, name in ROLE_COLUMNS.items()}
    row |= {"spec": canonical_json(record.spec), "resources": canonical_json(record.resources)}
    row["notes"] = [asdict(note) for note in record.notes]
    row["step"] = _step(record)
    row["interval_reach"] = _interval_reach(record)
    row["num_failed_draws"] = sum(record.failures.values()) if record.status == "finished" else None
    return pa.table([pa.array([row[f.name]], f.type) for f in schema], schema=schema)


def _attempt_rows(path: Path, schema: pa.Schema) -> pa.Table:
    """Return the rows of `attempts` in one file, with the types of the table."""
    rows = [asdict(attempt) for attempt in attempts.read_attempts(path)]
    for row in rows:
        row |= {name: row[name] and row[name].astimezone(UTC).replace(tzinfo=None) for name in ("began", "ended")}
    return _typed(rows, schema)


def _sweep_rows(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of `sweeps` and `sweep_cells` in one file."""
    record, sweep_id = sweeps.read_sweep_record(path), path.stem
    row = asdict(record) | {"sweep_id": sweep_id, "asked": record.asked.astimezone(UTC).replace(tzinfo=None)}
    cells = [asdict(cell) | {"sweep_id": sweep_id, "sweep": record.sweep} for cell in record.cells]
    return {"sweeps": [row | {"number": sweeps.record_number(sweep_id), "num_cells": len(cells)}], "sweep_cells": cells}


def _typed(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Return rows with the types of a table, so that a wrong type raises here and not in the middle of an insert."""
    return pa.table([pa.array([row[f.name] for row in rows], f.type) for f in schema], schema=schema)


def _step(record: RunRecord) -> int | None:
    """Return the step in a run's label, or else the only one that the paths of its checkpoints state."""
    if in_label := re.findall(r"(?:^|, )step=(\d+)(?=,|$)", record.label):
        return int(in_label[0])
    paths = (_at(record.spec, f"autoencoder.{name}") for name in ("av", "ar", "checkpoint"))
    repositories = {spelling.partition("@")[0] for spelling in record.revisions}
    steps = {step_of(path, repositories) for path in paths if isinstance(path, str)} - {None}
    return steps.pop() if len(steps) == 1 else None


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
    """Return the Arrow schema of a table: types are declared in schema.sql alone."""
    empty = connection.sql(f"SELECT * FROM {table} LIMIT 0").to_arrow_table()
    return pa.schema([pa.field(f.name, getattr(f.type, "storage_type", f.type)) for f in empty.schema])


def _make_file_views(connection: duckdb.DuckDBPyConnection, root: Path, damaged: Sequence[str]) -> None:
    views = _sql("file_views.sql")
    names = re.findall(r"^CREATE VIEW (\w+)", views, re.MULTILINE)
    for name in reversed(names):
        connection.execute(f"DROP VIEW IF EXISTS {name}")
    # Directories that begin with a dot are still being written. draws/_schema has parts without rows, so that files always match.
    # They come first: DuckDB takes the columns from the first file, also where that is left out as damaged.
    patterns = {
        "DRAWS_PARTS": ["draws/_schema/part-empty.parquet", "draws/*/part-*.parquet"],
        "SCORES_PARTS": ["scores/_schema/_schema/part-empty.parquet", "scores/*/*/part-*.parquet"],
        "METRIC_PARTS": ["scores/_schema/_schema/metric-empty.parquet", "scores/*/*/metric-*.parquet"],
        "METRIC_IDENTITIES": ["scores/*/*/identity.json"],
        "CHOSEN": ["chosen/empty.parquet", "chosen/[!.]*.parquet"],
        "ACTIVATIONS": ["draws/_schema/activations.parquet", f"*/[!.]*/{ACTIVATIONS_FILE}"],
    }
    for placeholder, files in patterns.items():
        listed = ", ".join(_quoted(f"{_glob_escaped(root)}/{pattern}") for pattern in files)
        views = views.replace(f"'{placeholder}'", f"[{listed}]")
    views = views.replace("'IS_WHOLE'", f"filename NOT IN ({', '.join(map(_quoted, damaged))})" if damaged else "true")
    connection.execute(views)
    _inherit_comments(connection, names)


def _write_empty_parts(root: Path) -> None:
    """Write parts without rows, so that the views have their columns before the first draw and the first run."""
    schemas = {
        "draws/_schema/part-empty.parquet": DRAWS_FILE_SCHEMA,
        "draws/_schema/activations.parquet": ACTIVATIONS_SCHEMA,
        "scores/_schema/_schema/part-empty.parquet": RECONSTRUCTION_SCHEMA,
        "scores/_schema/_schema/metric-empty.parquet": LONG_SCHEMA,
        "chosen/empty.parquet": CHOSEN_FILE_SCHEMA,
    }
    identity = root / "scores" / "_schema" / "_schema" / "identity.json"
    with contextlib.suppress(FileNotFoundError):
        if identity.read_bytes() != b"{}":
            log.warning("%s is written again: it is not what was written", identity)
            identity.unlink()
    if not identity.exists():
        publish(identity, b"{}")
    for name, schema in schemas.items():
        path = root / name
        if (damage := _damage_of_empty_part(path, schema)) is not None:
            if damage:
                log.warning("%s is written again: %s", path, damage)
            publish(path, _empty_part(schema))


@lru_cache(maxsize=16)
def _empty_part(schema: pa.Schema) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    return bytes(sink.getvalue().to_pybytes())


def _damage_of_empty_part(path: Path, schema: pa.Schema) -> str | None:
    """Return why a part without rows must be written ("": there is none, or one of another schema); None if it is as written."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return ""
    if data == _empty_part(schema):
        return None
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        table = file.read(use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        return f"it could not be read ({_one_line(error)})"
    if not table.schema.equals(schema):
        return ""
    # Another version of pyarrow writes other bytes, and says so.
    ours = pq.ParquetFile(pa.BufferReader(_empty_part(schema))).metadata.created_by
    return "it is not what was written" if table.num_rows or file.metadata.created_by == ours else None


def _inherit_comments(connection: duckdb.DuckDBPyConnection, names: Sequence[str] | None = None) -> None:
    """Give each column of these views (None: of all) that has no comment that of the same column in COMMENT_SOURCES."""
    columns = connection.execute(
        "SELECT table_name, column_name, comment FROM duckdb_columns() WHERE database_name = 'ksweep' AND schema_name = 'main'"
    ).fetchall()
    comments = {(table, column): comment for table, column, comment in columns if comment}
    views = connection.execute("SELECT view_name FROM duckdb_views() WHERE database_name = 'ksweep' AND NOT internal").fetchall()
    views = [(name,) for (name,) in views if names is None or name in names]
    for table, column, comment in columns:
        candidates = [c for source in COMMENT_SOURCES.get(table, ("run_curves", "runs")) if (c := comments.get((source, column)))]
        if (table,) in views and not comment and candidates:
            connection.execute(f"COMMENT ON COLUMN {table}.{column} IS {_quoted(candidates[0])}")


# Files, locks and text


def _open(database: Path) -> duckdb.DuckDBPyConnection:
    """Return a new connection in which the database is attached read-only and in use.

    Not `duckdb.connect(path)`, which within a process may return the instance that an earlier notebook cell still holds.
    """
    try:
        return _attached(database)
    except duckdb.IOException:
        # Another process has opened the file for writing (the duckdb command does without -readonly) and locked it: read a copy.
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
    """Hold the ingest lock; the kernel releases it when its holder dies. Without effect on file systems without locks."""
    with locked(root / ".ingest.lock", "another ingester", patience=LOCK_TIMEOUT) as held:
        if held:
            # Left by an ingester that was killed; younger ones may be those of another machine that is at work.
            for leftover in [*root.glob(f".{DATABASE}.*.next*"), *root.glob(".ksweep-*")]:
                with contextlib.suppress(OSError):
                    if time.time() - leftover.stat().st_mtime > LEFTOVER_AGE:
                        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
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
    """Return a hash of everything that decides what the database holds; a database with another one is built again."""
    intervals = str((ASYMMETRY, interval_reach(10.0, 0.95)))
    schemas = [repr(SPEC_COLUMNS), str(DRAWS_FILE_SCHEMA), str(RECONSTRUCTION_SCHEMA), str(LONG_SCHEMA), str(ACTIVATIONS_SCHEMA)]
    schemas.append(str(CHOSEN_FILE_SCHEMA))
    text = "\n".join([*map(_sql, ("schema.sql", "views.sql", "file_views.sql")), *schemas, intervals])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _is_text(name: str) -> bool:
    """Return whether a file name is valid UTF-8; Python gives other bytes as lone surrogates, which no database takes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _one_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).encode(errors="replace").decode()[:LONGEST_REASON]


def _quoted(value: object) -> str:
    return "'" + str(value).replace("'", "''") + "'"


def _glob_escaped(path: Path) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in str(path))
