"""Rows of both stores, written and read without a cell."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ksweep.registry.cell_draws import CellDraws
from ksweep.registry.draws import DRAWS_FILE_SCHEMA
from ksweep.registry.scores import scored_unit
from ksweep.registry.work_units import WorkUnit
from ksweep.utils.fingerprint import fingerprint


def rows_of(unit: WorkUnit, **known: list[Any]) -> pa.Table:
    """Draws with their scores; columns that are not given are null."""
    pairs = [(a, k) for a in range(unit.first_row, unit.last_row) for k in range(unit.first_draw, unit.last_draw)]
    known |= {"activation": [a for a, _ in pairs], "draw": [k for _, k in pairs]}
    columns = {f.name: pa.array(known.get(f.name, [None] * len(pairs)), f.type) for f in DRAWS_FILE_SCHEMA}
    return pa.table(columns, schema=DRAWS_FILE_SCHEMA)


def publish_unit(store: CellDraws, unit: WorkUnit, rows: pa.Table) -> None:
    """Publish draws and their scores."""
    store.publish_scores(scored_unit(unit), rows, store.publish_draws(unit, rows))


def joined_parts(registry: Path | str) -> list[dict[str, Any]]:
    """Every draw with its scores by activation and draw, where there is one key of each; read without anything of ksweep."""
    said, worth = (_rows(sorted(Path(registry).glob(pattern))) for pattern in ("draws/*/part-0*", "scores/*/*/part-0*"))
    assert said.keys() == worth.keys()
    return [said[pair] | worth[pair] for pair in sorted(said)]


def _rows(paths: list[Path]) -> dict[tuple[int, int], dict[str, Any]]:
    rows = [row for path in paths for row in pq.ParquetFile(path).read().to_pylist()]
    return {(row["activation"], row["draw"]): row for row in rows}


def write_earlier_part(directory: Path, rows: pa.Table) -> None:
    """Write draws with their scores as one part without a label, as earlier versions did."""
    ends = [(min(values), max(values) + 1) for values in (rows["activation"].to_pylist(), rows["draw"].to_pylist())]
    (first_row, last_row), (first_draw, last_draw) = ends
    directory.mkdir(parents=True, exist_ok=True)
    name = f"part-{first_row:08d}-{last_row:08d}-{first_draw:05d}-{last_draw:05d}.parquet"
    pq.write_table(rows.cast(DRAWS_FILE_SCHEMA), directory / name, compression="zstd", write_page_checksum=True)


Row = dict[str, Any]


def make_earlier(registry: Path | str, change: Callable[[Row], Row] = lambda row: row) -> None:
    """Turn a registry into what an earlier version would have left: one directory and one key for draws and scores together.

    `change` changes rows on the way. Every set of draws must have one set of scores.
    """
    root = Path(registry)
    earlier = {}
    for scores in root.glob("scores/[!_]*/*"):
        draws = root / "draws" / scores.parent.name
        said, worth = (json.loads((path / "identity.json").read_text()) for path in (draws, scores))
        of_ar = {name: value for name, value in worth["scores"].items() if name not in ("metric", "dtype")}
        said.pop("digest", None)
        identity = said | {"draws": said["draws"] | of_ar}
        key = earlier[draws.name] = fingerprint(identity["draws"])
        target = root / "draws" / key
        for path in sorted(scores.glob("part-*")):
            rows = _rows([draws / path.name]), _rows([path])
            joined = [change(rows[0][pair] | rows[1][pair]) for pair in sorted(rows[1])]
            write_earlier_part(target, pa.Table.from_pylist(joined, schema=DRAWS_FILE_SCHEMA))
        (target / "identity.json").write_text(json.dumps(identity))
        for path in [*draws.glob("note-*"), *scores.glob("note-*")]:
            shutil.copy(path, target / path.name)
        for path in scores.glob("controls.json"):
            (target / path.name).write_text(json.dumps(json.loads(path.read_text())["value"]))
        shutil.rmtree(draws)
    shutil.rmtree(root / "scores")
    for path in root.glob("landing/*/record.json"):
        record = json.loads(path.read_text())
        record["draws_bytes"] = (record.get("draws_bytes") or 0) + (record.pop("scores_bytes", 0) or 0)
        for name in ("scores_key", "num_draws_scored", "digest"):
            record.pop(name, None)
        path.write_text(json.dumps(record | {"draws_key": earlier.get(record["draws_key"], record["draws_key"])}))
    (root / "ksweep.duckdb").unlink(missing_ok=True)
