"""`ksweep choose`: best-of-K chosen by one score and reported in another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ksweep.cli.output import JsonOption, RegistryOption, print_rows, print_text, table_curve
from ksweep.utils.console import remark
from ksweep.utils.errors import RequestError
from ksweep.utils.files import READ_ONLY

SHOWN = ("k", "value", "value_low", "value_high", "oracle", "difference", "difference_low", "difference_high", "share_with_value")


def choose_command(
    names: Annotated[
        list[str] | None, typer.Argument(help="Cells, labels, sweeps or run ids; without, every finished cell.")
    ] = None,
    by: Annotated[
        str, typer.Option(help="What chooses: error, the label of a cell with another AR over the same draws, or a metric.")
    ] = "error",
    report: Annotated[str, typer.Option(help="What is reported of the chosen draws, named in the same way.")] = "error",
    level: Annotated[float | None, typer.Option(help="Coverage of the intervals; without, that of the cells.")] = None,
    registry: RegistryOption = Path("registry"),
    as_json: JsonOption = False,
) -> None:
    """Choose the best of K draws by one score and report another: ksweep choose temp_sweep --by judge. Lands in chosen_curves."""
    from ksweep.analysis.cells import load_cells
    from ksweep.analysis.choosing import chosen_curves
    from ksweep.registry.chosen_files import record_chosen

    if level is not None and not 0 < level < 1:
        raise RequestError(f"--level {level} is not a coverage: give a number between 0 and 1, such as 0.95")
    table = chosen_curves(load_cells(registry, names or []), by, report, level=level)
    try:
        record_chosen(registry, table)
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise
        # Somebody else's registry: what was chosen is shown all the same.
        remark(f"not recorded in chosen_curves: {registry} cannot be written ({error.strerror})")
    rows = table.to_pylist()
    if as_json:
        print_rows(rows, as_json=True)
        return
    measure = "FVE" if rows[0]["measure"] == "fve" else f"mean {report}"
    print_text(f"{measure} of the draw that {by} chooses among K; oracle: the reported score itself chooses")
    shown = [
        row for label in dict.fromkeys(r["label"] for r in rows) for row in table_curve([r for r in rows if r["label"] == label])
    ]
    print_rows([{"cell": row["label"], **{name: row[name] for name in SHOWN}} for row in shown], about=_about(rows[0]))
    for label, share in {row["label"]: row["share_with_choice"] for row in rows}.items():
        if share is not None and share < 1:
            print_text(f"{label}: {1 - share:.1%} of the draws that did not fail have no score to choose by")
    first = rows[0]
    print_text(
        f"{first['level']:.0%} intervals: bootstrap over {first['num_documents']} documents; the difference from the oracle is "
        "paired. In SQL: from chosen_curves"
    )


def _about(row: dict[str, object]) -> dict[str, object]:
    return {name: row[name] for name in ("level", "num_replicates")}
