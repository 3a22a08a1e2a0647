"""Given texts as draws: match the texts of a file with activations, and publish them in the draws store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pyarrow as pa

from ksweep.activations.group_columns import check_number_of_groups
from ksweep.autoencoder.base import CutText, Family
from ksweep.autoencoder.texts_file import ActivationName, TextsFile, name_text
from ksweep.registry.cell_draws import CellDraws
from ksweep.registry.draws import DRAWS_SCHEMA
from ksweep.registry.work_units import WorkUnit
from ksweep.utils.errors import DataError
from ksweep.utils.notes import Note

if TYPE_CHECKING:
    from ksweep.activations.store import ActivationTable

NUM_NAMED = 5
"""Activations that a message names."""


def activation_names(texts: TextsFile, vectors: ActivationTable, first: int = 0, last: int | None = None) -> list[ActivationName]:
    """Return the name that each activation has in a file of texts."""
    last = len(vectors) if last is None else last
    row_ids = vectors.column("row_id", first, last).tolist()
    if not texts.has_positions:
        return [(row_id, None) for row_id in row_ids]
    positions = vectors.column("position", first, last)
    return [(row_id, None if position is None else int(position)) for row_id, position in zip(row_ids, positions, strict=True)]


def text_notes(texts: TextsFile, vectors: ActivationTable, num_draws: int) -> tuple[Note, ...]:
    """Return notes on activations with too few texts, and on texts of activations that are not evaluated.

    Raises:
        DataError: no activation has a text, or a name in the file stands for several activations.
    """
    names = activation_names(texts, vectors)
    if not texts.has_positions and len(set(names)) < len(names):
        again = next(name for i, name in enumerate(names) if name in names[:i])
        raise DataError(
            f"{texts.path} names activations by row id alone, and {name_text(again)} has several of them, at different "
            "positions: add a column position, or take one position of each row (activations.positions_per_document=1)"
        )
    without = [name for name in names if name not in texts.texts]
    if len(without) == len(names):
        raise DataError(
            f"none of the {len(names)} activations has a text in {texts.path}: its texts are of {_some(list(texts.texts))}, and "
            f"the activations are {_some(names)}. Extract the activations as where the texts are from (text, positions, "
            "min_position, max_length, seed), or correct row_id and position in the file."
        )
    notes = []
    if without:
        notes.append(f"{len(without)} of {len(names)} activations have no text and count as failures: {_some(without)}.")
    fewer = [name for name in names if len(texts.texts.get(name, ())) in range(1, num_draws)]
    if fewer:
        notes.append(
            f"{len(fewer)} activations have fewer than {num_draws} texts, and the missing ones count as failures: {_some(fewer)}."
        )
    evaluated = set(names)
    if unused := [name for name in texts.texts if name not in evaluated]:
        num_texts = sum(len(texts.texts[name]) for name in unused)
        notes.append(f"{num_texts} texts of {len(unused)} activations that are not evaluated were left out: {_some(unused)}.")
    return tuple(Note("texts", text) for text in notes)


def publish_texts(family: Family, vectors: ActivationTable, store: CellDraws, num_draws: int) -> None:
    """Publish the texts that the draws store lacks: draw k of an activation is its k-th text in the order of the file."""
    for unit in store.draws.missing(len(vectors), num_draws):
        store.publish_draws(unit, _texts_table(family, vectors, unit))


def groups_of_texts(texts: TextsFile, column: str, vectors: ActivationTable) -> list[str | None]:
    """Return the value of a column of the file at each activation; None where it has no text.

    Raises:
        DataError: texts of one activation have different values, or there are too many values.
    """
    values = texts.group_values(column)
    of_activations = [values.get(name) for name in activation_names(texts, vectors)]
    check_number_of_groups(column, of_activations, str(texts.path))
    return of_activations


def _texts_table(family: Family, vectors: ActivationTable, unit: WorkUnit) -> pa.Table:
    """Return a unit's texts as rows of the draws store, ordered by activation and draw."""
    span = (unit.first_row, unit.last_row)
    texts = family.given_texts
    given = [
        (row, draw, of_activation[draw] if draw < len(of_activation) else None)
        for row, name in enumerate(activation_names(texts, vectors, *span))
        for of_activation in [texts.texts.get(name, ())]
        for draw in range(unit.first_draw, unit.last_draw)
    ]
    cut = _cut(family, [text for _, _, text in given])
    metadata = {name: vectors.column(name, *span) for name in ("row_id", "document", "position")}
    metadata["context"] = vectors.column("window", *span)
    columns = {
        "activation": [unit.first_row + row for row, _, _ in given],
        "draw": [draw for _, draw, _ in given],
        **{name: [values[row] for row, _, _ in given] for name, values in metadata.items()},
        "token_ids": [[] if text is None else list(text.token_ids) for text in cut],
        "num_tokens": [0 if text is None else text.num_tokens for text in cut],
        "text": [text or "" for _, _, text in given],
        "explanation": [None if text is None else text.text for text in cut],
        "finish": [
            "length" if text is not None and text.token_ids else "stop" for text in cut
        ],  # after "stop" comes a stop token
        "parse": ["empty" if text is None else "ok" for text in cut],
        "log_probability": [None] * len(given),
    }
    return pa.table({f.name: pa.array(columns[f.name], type=f.type) for f in DRAWS_SCHEMA}, schema=DRAWS_SCHEMA)


def _cut(family: Family, texts: Sequence[str | None]) -> list[CutText | None]:
    """Return texts as the AR reads them; None for those of which nothing is left."""
    present = [i for i, text in enumerate(texts) if text is not None and text.strip()]
    cut: list[CutText | None] = [None] * len(texts)
    for i, text in zip(present, family.cut_texts([texts[i] or "" for i in present]), strict=True):
        cut[i] = text if text.text else None
    return cut


def _some(names: Sequence[ActivationName]) -> str:
    return ", ".join(map(name_text, names[:NUM_NAMED])) + (", ..." if len(names) > NUM_NAMED else "")
