"""`ksweep scores`: scores of draws beside the AR's error: list, compute, export texts for a judge, import what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ksweep.cli.output import JsonOption, RegistryOption, VectorCacheOption, print_rows, print_text, write_parquet
from ksweep.utils.errors import RequestError

if TYPE_CHECKING:
    import numpy as np

    from ksweep.analysis.cells import MeasuredCell
    from ksweep.registry.scores import Better

scores_group = typer.Typer(no_args_is_help=True, help="Scores of draws beside the AR's error: text metrics, a judge, a person.")
NamesArgument = Annotated[
    list[str] | None, typer.Argument(help="Cells, labels, sweeps or run ids; without, every finished cell.")
]

_STORED = """
    SELECT m.metric, m.name, m.better, m.description, list(DISTINCT r.cell ORDER BY r.cell) AS cells, m.recorded, m.draws_key,
           m.metric_key
    FROM stored_metrics AS m LEFT JOIN v_latest AS r USING (draws_key) GROUP BY ALL ORDER BY m.metric, m.draws_key, m.name
"""


@scores_group.command("ls")
def scores_ls_command(registry: RegistryOption = Path("registry"), as_json: JsonOption = False) -> None:
    """List the metrics that are stored, and the cells whose draws they score. Every cell has the AR's error: it is left out."""
    from ksweep.registry.query import run_query

    rows = run_query(registry, _STORED)
    names = ["metric", "name", "better", "cells", "recorded", "description"]
    if not rows and not as_json:
        print_text(
            "no scores but the AR's: `ksweep scores compute text` computes those of texts, `ksweep scores import` takes others"
        )
        return
    print_rows(rows.to_pylist(), as_json=as_json, names=names)


@scores_group.command("compute")
def scores_compute_command(
    metric: Annotated[str, typer.Argument(help="text, or a metric of your own as package.module:name.")],
    names: NamesArgument = None,
    registry: RegistryOption = Path("registry"),
    vector_cache: VectorCacheOption = Path("vector_cache"),
) -> None:
    """Compute a metric for draws that are stored already; only what is missing is computed."""
    from ksweep.analysis.cells import load_cells
    from ksweep.evaluation.metrics import compute_metric, metric_named

    scorer = metric_named(metric, "metric")
    for cell in load_cells(registry, names or []):
        grid = (cell.num_activations, cell.num_draws)
        count = compute_metric(scorer, registry, cell.draws_key, grid, _activations_of(cell, vector_cache))
        print_text(f"{cell.label}: {scorer.name} of {count} draws computed{'' if count else ', all were stored already'}")


def _activations_of(cell: MeasuredCell, vector_cache: Path) -> Callable[[int], np.ndarray]:
    def first_activations(num: int) -> np.ndarray:
        from ksweep.activations.store import ActivationStore

        return ActivationStore(vector_cache, cell.activations_key, {}).open(num).vectors()

    return first_activations


@scores_group.command("export")
def scores_export_command(
    output: Annotated[Path, typer.Option("--output", "-o", help="Parquet file to write.")],
    names: NamesArgument = None,
    registry: RegistryOption = Path("registry"),
) -> None:
    """Write draws with their ids, explanation and context, for a judge or a person to score."""
    from ksweep.analysis.cells import load_cells
    from ksweep.registry.outside_scores import WantedDraws, export_draws

    cells = load_cells(registry, names or [])
    wanted = [
        WantedDraws(
            draws_key=cell.draws_key, scores_key=cell.scores_key, num_activations=cell.num_activations, num_draws=cell.num_draws
        )
        for cell in cells
    ]
    table = export_draws(registry, wanted)
    write_parquet(output, table)
    print_text("each is a draw with an explanation: add a column `score`, and `ksweep scores import` takes it back")


@scores_group.command("import")
def scores_import_command(
    file: Annotated[Path, typer.Argument(help="Parquet, .jsonl or .csv with draws_key, activation, draw and the score.")],
    name: Annotated[str, typer.Option("--as", help="Name of the metric: judge.")],
    higher_is_better: Annotated[
        bool | None, typer.Option("--higher-is-better/--lower-is-better", help="Without either, neither is.")
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column of the scores; without, `score`.")] = None,
    registry: RegistryOption = Path("registry"),
) -> None:
    """Import scores from outside, a judge's or a person's. Of scores imported again under the same name the last ones count."""
    from ksweep.evaluation.metrics import METRICS
    from ksweep.registry.outside_scores import counted, import_scores, read_scores_file

    if name in METRICS:
        raise RequestError(f"--as {name}: ksweep computes a metric of this name itself; give the scores another one, e.g. judge")
    better: Better = "neither" if higher_is_better is None else "higher" if higher_is_better else "lower"
    try:
        done = import_scores(registry, read_scores_file(file), name, column=column, better=better)
    except (RequestError, UnicodeDecodeError) as error:
        raise RequestError(str(error) if str(file) in str(error) else f"{file}: {error}") from error
    print_text(
        f"{name}: {done.num_scores} scores of {done.num_draws} draws ({len(done.draws_keys)} draws keys), {better} is better"
    )
    if done.left_out:
        print_text(f"left out: {counted(done.left_out)}")
    if done.replaced:
        keys = ", ".join(key[:8] for key in done.replaced)
        print_text(f"draws {keys} had other scores called {name}: those imported now count, the earlier ones stay on disk")
