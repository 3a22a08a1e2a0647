"""`ksweep score`: what texts that somebody already has are worth to an AR. No AV is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ksweep.utils.errors import SpecError

if TYPE_CHECKING:
    from ksweep.autoencoder.texts_file import TextsFile
    from ksweep.config.spec import Activations
    from ksweep.config.sweep import Sweep

TRUNCATIONS = {"tokens": "first", "last_tokens": "last"}
"""What --truncate counts, and which tokens of a text it keeps."""
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Settings key=value and options of a sweep (--dry-run, --wait, ...) go to `sweep_main`."""


def score_command(
    context: typer.Context,
    texts: Annotated[
        str, typer.Argument(help="JSONL or Parquet: row_id, text, and position where a row has several activations.")
    ],
    ar: Annotated[str | None, typer.Option(help="AR that reads the texts: directory, hub id, or package.module:name.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Instead of --ar: a talkative autoencoder, whose encoder reads.")] = None,
    text: Annotated[str | None, typer.Option(help="Text that the activations are from, with --model.")] = None,
    model: Annotated[str | None, typer.Option(help="Model that the activations are from: path or hub id.")] = None,
    vectors: Annotated[
        str | None, typer.Option(help="Parquet file of activations. Not needed if TEXTS has a column activation_vector.")
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column of the texts; without, explanation, else text.")] = None,
    truncate: Annotated[
        str | None, typer.Option(help="tokens=8,16,32: FVE of the first 8, 16, 32 tokens and of whole texts; last_tokens=...")
    ] = None,
    groups: Annotated[str | None, typer.Option(help="Columns of TEXTS to break the FVE down by: language,style.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the sweep; without, that of the file.")] = None,
) -> None:
    """Score texts that exist, as draws are scored. Settings key=value, --dry-run, --wait and so on are those of a sweep."""
    from ksweep.autoencoder.texts_file import read_texts_file
    from ksweep.launch.sweep_main import run_sweep_command

    def sweep() -> Sweep:
        from ksweep.config.spec import Autoencoder, Cell, Scoring
        from ksweep.config.sweep import Sweep
        from ksweep.config.validation import as_name

        file = read_texts_file(texts, column)
        limits, kept = _truncation(truncate)
        autoencoder: dict[str, Any] = {"texts": texts, "texts_column": column, "ar": ar, "checkpoint": checkpoint}
        cell = Cell(
            autoencoder=Autoencoder(**autoencoder, max_text_tokens=limits[0], kept_tokens=kept),
            activations=_activations(file, text, model, vectors),
            scoring=Scoring(groups=tuple(filter(None, (groups or "").split(",")))),
        )
        return Sweep(
            name=name or as_name(file.path.stem),
            question=f"How much of the activations do the texts of {file.path.name} hold?",
            cell=cell,
            axes={} if truncate is None else {"autoencoder.max_text_tokens": limits},
        )

    run_sweep_command(sweep, context.args)


def _activations(file: TextsFile, text: str | None, model: str | None, vectors: str | None) -> Activations:
    """Return activations of the text or file of vectors that the command names; without either, those in the file of texts."""
    from ksweep.autoencoder.texts_file import ROW_ID, VECTOR
    from ksweep.config.spec import Activations

    if text is None and vectors is None and VECTOR not in file.columns:
        raise SpecError(
            f"{file.path} has no column {VECTOR!r}: give the activations as --text FILE --model MODEL, or as --vectors "
            "FILE.parquet. Settings such as activations.min_position=24 must be those that the activations of the texts had"
        )
    num_activations = max(2, len(file.texts))  # one has no variance to explain; key=value settings come later
    if text is not None or vectors is not None:
        return Activations(text=text, model=model, vectors=vectors, num_activations=num_activations, rows="first")
    if file.path.suffix.lower() != ".parquet":
        raise SpecError(
            f"{file.path} has a column {VECTOR!r}, and vectors are read from Parquet alone: write the file as .parquet"
        )
    row_id = ROW_ID if ROW_ID in file.columns else None
    return Activations(vectors=str(file.path), row_id_column=row_id, num_activations=num_activations, rows="first")


def _truncation(truncate: str | None) -> tuple[tuple[int | None, ...], Any]:
    """Return the token limits of `--truncate tokens=8,16,32`, None last for whole texts, and which end is kept."""
    if truncate is None:
        return (None,), "first"
    unit, _, numbers = truncate.partition("=")
    parts: Sequence[str] = numbers.replace("[", "").replace("]", "").split(",")
    if unit not in TRUNCATIONS or not all(part.strip().isdecimal() and int(part) for part in parts):
        raise SpecError(
            f"--truncate {truncate!r} is not understood: expected tokens=8,16,32 (the first tokens of each text) or "
            "last_tokens=8,16,32"
        )
    return (*sorted({int(part) for part in parts}), None), TRUNCATIONS[unit]
