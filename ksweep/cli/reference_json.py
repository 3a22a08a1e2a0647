"""`ksweep import-json` and `ksweep export`: read and write results in the JSON schema of the reference sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from ksweep.cli.output import RegistryOption
from ksweep.utils.console import remark, say, say_exactly
from ksweep.utils.errors import RequestError


def import_json_command(
    files: list[Path],
    registry: RegistryOption = Path("registry"),
    metric: Annotated[
        str, typer.Option(help="Number of the curve: variance_recovery or mse_variance_recovery.")
    ] = "variance_recovery",
) -> None:
    """Import result files of the reference sweep into the registry, so that old and new curves share a chart."""
    from ksweep.cli.db import print_ingest_report
    from ksweep.registry.database import ingest_landings
    from ksweep.registry.tae_import import import_files

    registry.mkdir(parents=True, exist_ok=True)
    for imported in import_files(registry, files, cast(Any, metric)):
        say(f"{imported.path}: {imported.run_id}{'' if imported.landed else ' (already in the registry)'}")
        for note in imported.notes:
            remark(f"  note: {note}")
    print_ingest_report(ingest_landings(registry))


def export_command(
    run: Annotated[str, typer.Argument(help="Run id, or name of a cell, a label or a sweep of one cell (its newest run).")],
    as_json: Annotated[bool, typer.Option("--json", help="In the reference sweep's JSON schema (the default).")] = False,
    vectors: Annotated[
        Path | None,
        typer.Option(help="Write the reconstruction of each activation's best draw here (.safetensors), with a table of rows."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where the AR reads the texts again: cpu, cuda:0, ...")] = "cpu",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; without, standard output.")] = None,
    registry: RegistryOption = Path("registry"),
) -> None:
    """Write a run in the JSON schema of the reference sweep, or the reconstructions of its best draws as vectors."""
    from ksweep.registry.query import run_named

    if vectors is not None:
        if as_json or output is not None:
            raise RequestError(f"--vectors {vectors} names its own file: leave out --json and --output")
        _export_vectors(registry, run_named(registry, run), vectors, device)
        return
    from ksweep.registry.tae_export import export_run, write_json

    document = export_run(registry, run_named(registry, run))
    if output is None:
        say_exactly(json.dumps(document, allow_nan=False))
    else:
        write_json(output, document)
        say(output)


def _export_vectors(registry: Path, run_id: str, path: Path, device: str) -> None:
    """Write the reconstructions of a run's best draws, and say what they are."""
    from ksweep.activations.vector_files import write_vectors
    from ksweep.evaluation.best_reconstructions import best_reconstructions

    if path.suffix != ".safetensors":
        raise RequestError(f"--vectors {path} must end in .safetensors")
    best = best_reconstructions(registry, run_id, (device,))
    tensors = {"reconstructions": best.vectors} | ({} if best.scaled is None else {"scaled": best.scaled})
    table = write_vectors(path, tensors, best.rows, {"run_id": run_id, "format": "pt"})
    scaled = "scaled: with the norms of the activations" if best.scaled is not None else "norms of the activations are not known"
    computed = "the AR read the texts again" if not best.num_stored else f"{best.num_stored} of them were stored"
    say(f"{path}: {len(best.vectors)} reconstructions of best draws, as the AR gives them ({computed}); {scaled}")
    say(f"{table}: their documents, positions, draws, explanations and errors")
    if best.num_failed:
        remark(f"{best.num_failed} activations are left out: all of their draws failed")
