"""`ksweep verify`: read all that a number depends on, and say what is damaged, what depends on it, and what a repair computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ksweep.cli.output import JsonOption, OutputRow, RegistryOption, VectorCacheOption, print_rows, print_text
from ksweep.utils.errors import StoreError

if TYPE_CHECKING:
    from ksweep.registry.part_checks import DamagedPart

COLUMNS = ("what", "path", "reason", "cells", "repair")


def verify_command(
    repair: Annotated[
        bool, typer.Option("--repair", help="Set damaged files aside, so that the sweep's command computes them again.")
    ] = False,
    registry: RegistryOption = Path("registry"),
    vector_cache: VectorCacheOption = Path("vector_cache"),
    as_json: JsonOption = False,
) -> None:
    """Verify parts of draws and scores, run records and shards of activations. Exit code 1 if something is damaged and stays."""
    from ksweep.registry.database import check_parts, connect, ingest_landings
    from ksweep.registry.part_checks import set_damaged_aside
    from ksweep.registry.run_record import damaged_runs

    # 1. Read everything, also what has passed before.
    parts = check_parts(registry.resolve(), again=True)
    records = damaged_runs(registry)
    with connect(registry) as connection:
        rows = [_row_of_part(connection, part) for part in parts]
    rows += [
        {"what": "run record", "path": str(path), "reason": reason, "cells": [],
         "repair": "none: restore it, or remove it and run the sweep again, which takes its stored draws"}
        for path, reason in records.items()
    ]  # fmt: skip
    rows += _rows_of_shards(vector_cache, repair=repair)
    # 2. Set aside what can be computed again.
    if repair:
        set_damaged_aside(registry.resolve(), parts)
        ingest_landings(registry)
    # 3. Show it.
    shown = rows if as_json else [row | {"cells": ", ".join(row["cells"]) or "none"} for row in rows]
    if rows or as_json:
        print_rows(shown, as_json=as_json, names=COLUMNS)
    else:
        print_text(f"every part and run record of {registry} and every shard of {vector_cache} is what was written")
    left = len(records) if repair else len(rows)
    if left:
        raise StoreError(f"{left} damaged files" + ("" if repair else "; --repair sets aside those that can be computed again"))


def _row_of_part(connection: Any, part: DamagedPart) -> OutputRow:
    """Return a row of the table: the cells are those whose runs were recorded over the part."""
    what, draws_key = part.path.parts[-3:-1] if part.path.parts[-3] == "draws" else ("scores", part.path.parts[-3])
    scores_key = None if what == "draws" else part.path.parts[-2]
    cells = connection.execute(
        "SELECT DISTINCT cell FROM v_latest WHERE draws_key = $1 AND coalesce(scores_key = $2, true) ORDER BY cell",
        [draws_key, scores_key],
    ).fetchall()
    redone = {"draws": "its draws are sampled and scored again", "scores": "its draws are scored again"}[what]
    return {"what": what, "path": str(part.path), "reason": part.reason, "cells": [cell for (cell,) in cells], "repair": redone}


def _rows_of_shards(vector_cache: Path, *, repair: bool) -> Iterator[OutputRow]:
    from ksweep.activations import maintenance

    for entry in maintenance.entries(vector_cache) if vector_cache.is_dir() else ():
        for unit, reason in maintenance.damaged_shards(entry).items():
            yield {
                "what": "activations", "path": str(entry.directory), "reason": f"shard {unit}: {reason}", "cells": [],
                "repair": "its activations are extracted again",
            }  # fmt: skip
        if repair:
            maintenance.verify(entry)
