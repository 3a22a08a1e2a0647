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

REPAIRS = {
    "draws": "its draws are sampled and scored again",
    "part": "its draws are scored again",
    "metric": "none: compute or import the scores again",
    "identity.json": "none: restore it, or compute or import the scores again",
    "chosen": "none: `ksweep choose` records it again",
}
"""What is computed again in place of a damaged file, by what it holds."""
COLUMNS = ("what", "path", "reason", "cells", "repair")


def verify_command(
    repair: Annotated[
        bool, typer.Option("--repair", help="Set damaged files aside, so that the sweep's command computes them again.")
    ] = False,
    registry: RegistryOption = Path("registry"),
    vector_cache: VectorCacheOption = Path("vector_cache"),
    as_json: JsonOption = False,
) -> None:
    """Verify parts of draws and scores, run records and shards of activations. Exits with 1 if damaged files remain."""
    from ksweep.registry.database import check_parts, connect, ingest_landings
    from ksweep.registry.part_checks import set_damaged_aside
    from ksweep.registry.run_record import damaged_runs

    # 1. Read everything, also what has passed before.
    here = registry.resolve()
    parts, records = check_parts(here, again=True), damaged_runs(here)
    with connect(registry) as connection:
        rows = [_row_of_part(connection, part, here) for part in parts if part.path.parent not in records]
    rows += [
        {"what": "run record", "path": str(path), "reason": reason, "cells": [],
         "repair": "none: restore it, or remove it and run the sweep again, which takes its stored draws"}
        for path, reason in records.items()
    ]  # fmt: skip
    rows += _rows_of_shards(vector_cache, repair=repair)
    # 2. Set aside what can be computed again.
    if repair:
        set_damaged_aside(here, parts)
        ingest_landings(registry)
    # 3. Show it.
    shown = rows if as_json else [row | {"cells": ", ".join(row["cells"]) or "none"} for row in rows]
    if rows or as_json:
        print_rows(shown, as_json=as_json, names=COLUMNS)
    else:
        print_text(f"every part and run record of {registry} and every shard of {vector_cache} is what was written")
    left = len(records) + len(check_parts(here)) if repair else len(rows)
    if left:
        raise StoreError(f"damaged: {left}" + ("" if repair else "; --repair sets aside those that can be computed again"))


def _row_of_part(connection: Any, part: DamagedPart, registry: Path) -> OutputRow:
    """Return a row of the table: the cells are those whose runs were recorded over the part."""
    what, *keys, name = part.path.relative_to(registry).parts
    kind = name.partition("-")[0] if what == "scores" else what
    draws_key = keys[0] if what in ("draws", "scores") else None
    scores_key = keys[1] if kind == "part" else None
    cells = connection.execute(
        "SELECT DISTINCT cell FROM v_latest WHERE draws_key = $1 AND coalesce(scores_key = $2, true) ORDER BY cell",
        [draws_key, scores_key],
    ).fetchall()
    return {
        "what": what, "path": str(part.path), "reason": part.reason, "cells": [cell for (cell,) in cells],
        "repair": REPAIRS[kind] if part.is_readable else "none: make the file readable",
    }  # fmt: skip


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
