"""Scores that come from outside: draws are exported with their ids, a judge or a person scores them, the scores are imported.

A row of a file of scores names its draw by draws_key, activation and draw, as the export does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ksweep.registry.metric_scores import MetricScores, digest_of_texts, read_texts, stored_metrics, texts_of
from ksweep.registry.part_labels import column_digest
from ksweep.registry.part_store import within_grid
from ksweep.registry.scores import RECONSTRUCTION, Better, MetricLayout
from ksweep.utils.errors import RequestError

IDS = ("draws_key", "activation", "draw")
EXPORTED = ("row_id", "document", "position", "context", "explanation")
FILE_TYPES = (".parquet", ".jsonl", ".csv")


@dataclass(frozen=True, kw_only=True)
class WantedDraws:
    """Draws that are to be exported."""

    draws_key: str
    scores_key: str | None
    num_activations: int
    num_draws: int


def export_draws(registry: Path, wanted: Sequence[WantedDraws]) -> pa.Table:
    """Return the draws with an explanation, each once, with the ids by which their scores are imported.

    Of several cells over the same draws the first gives `scores_key`, and the largest decides how many draws there are.
    """
    tables = []
    for draws_key in dict.fromkeys(cell.draws_key for cell in wanted):
        cells = [cell for cell in wanted if cell.draws_key == draws_key]
        grid = max(cell.num_activations for cell in cells), max(cell.num_draws for cell in cells)
        table = read_draws(registry, draws_key, *grid)
        table = table.filter(pc.is_valid(table["explanation"]))
        ids = {"draws_key": draws_key, "scores_key": cells[0].scores_key}
        for name, value in reversed(ids.items()):
            table = table.add_column(0, name, pa.array([value] * len(table), pa.string()))
        tables.append(table)
    return pa.concat_tables(tables)


def read_draws(registry: Path, draws_key: str, num_activations: int | None = None, num_draws: int | None = None) -> pa.Table:
    """Return the stored draws of a key by activation and draw, each once, with their text and where it comes from."""
    store = texts_of(registry, draws_key)
    parts = store.parts()
    num_activations = max((part.last_row for part in parts), default=0) if num_activations is None else num_activations
    num_draws = max((part.last_draw for part in parts), default=0) if num_draws is None else num_draws
    tables = [read_texts(store, part, EXPORTED) for part in parts if part.meets(num_activations, num_draws)]
    rows = within_grid([table for table in tables if table is not None], num_activations, num_draws)
    if rows is None:
        raise RequestError(f"there are no draws {draws_key} in {registry}")
    number = rows["activation"].to_numpy() * num_draws + rows["draw"].to_numpy()
    return rows.take(pa.array(np.unique(number, return_index=True)[1])).select(["activation", "draw", *EXPORTED])


@dataclass(frozen=True, kw_only=True)
class ImportedScores:
    """What was imported."""

    num_scores: int
    num_draws: int
    """Stored draws with an explanation, of the draws keys that have scores."""
    draws_keys: tuple[str, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Reason -> number of rows of the file that were left out."""
    replaced: tuple[str, ...] = ()
    """Draws keys that had other scores under this name; they stay on disk, and the new ones count."""


def read_scores_file(path: Path) -> pa.Table:
    """Read a file of scores: Parquet, JSON lines or CSV.

    Raises:
        RequestError: it is none of these, or cannot be read.
    """
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path, partitioning=None)
        if path.suffix == ".jsonl":
            from pyarrow import json

            return json.read_json(path)
        if path.suffix == ".csv":
            from pyarrow import csv

            # Keys of hex digits alone must not become numbers.
            return csv.read_csv(path, convert_options=csv.ConvertOptions(column_types={"draws_key": pa.string()}))
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise RequestError(f"{path} cannot be read: {error}") from error
    raise RequestError(f"{path}: scores are read from {', '.join(FILE_TYPES)}; what came ends in {path.suffix or 'nothing'}")


def import_scores(registry: Path, scores: pa.Table, name: str, *, column: str | None = None, better: Better) -> ImportedScores:
    """Store the scores of a file as the metric `name`.

    Args:
        registry: directory of the registry.
        scores: rows with draws_key, activation, draw and the score, in any order. With a column `explanation` it is checked that
            the text that was scored is the stored one.
        name: name of the metric: "judge".
        column: column of the scores; None takes "score". It is the metric's column.
        better: which scores are better.

    Raises:
        RequestError: a column is missing, a score is no number, a draw has two scores, or no row is of a stored draw.
    """
    column = "score" if column is None else column
    values = _checked_values(scores, name, column)
    layout = MetricLayout(metric=name, columns={column: (f"imported from a file, its column {column}", better)})
    left_out: Counter[str] = Counter({"without a score": int(np.isnan(values).sum())})
    keys = np.asarray(scores["draws_key"].cast(pa.string()).to_pylist(), dtype=object)
    checked: dict[str, tuple[pa.Table, np.ndarray]] = {}
    for draws_key in dict.fromkeys(keys[~np.isnan(values)].tolist()):
        rows = np.flatnonzero((keys == draws_key) & ~np.isnan(values))
        if draws_key is None or not texts_of(registry, draws_key).parts():
            left_out["of draws that are not in this registry"] += len(rows)
            continue
        of_key = scores.take(pa.array(rows))
        stored = read_draws(registry, draws_key)
        grid = _scores_by_draw(stored, of_key, values[rows], draws_key, left_out)
        if not np.isnan(grid).all():
            checked[draws_key] = stored, grid
    reasons = {reason: count for reason, count in left_out.items() if count}
    if not checked:
        raise RequestError(
            f"no row of the scores is of a draw of {registry} ({counted(reasons) or 'there are no rows'}): "
            f"`ksweep scores export` writes draws with their ids ({', '.join(IDS)})"
        )
    replaced = [key for key, (stored, grid) in checked.items() if _store(registry, key, layout, stored, grid)]
    return ImportedScores(
        num_scores=sum(int((~np.isnan(grid)).sum()) for _, grid in checked.values()),
        num_draws=sum(len(stored) - stored["explanation"].null_count for stored, _ in checked.values()),
        draws_keys=tuple(checked), left_out=reasons, replaced=tuple(replaced),
    )  # fmt: skip


def counted(reasons: Mapping[str, int]) -> str:
    """Return rows by reason in words: "2 rows without a score, 1 of draws that are not in this registry"."""
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items())


def _checked_values(scores: pa.Table, name: str, column: str) -> np.ndarray:
    """Return the score of each row; NaN where it has none."""
    if name == RECONSTRUCTION.metric or not name.isidentifier():
        raise RequestError(f"scores cannot be called {name!r}: take one word that is not {RECONSTRUCTION.metric!r}, e.g. judge")
    if missing := [needed for needed in (*IDS, column) if needed not in scores.column_names]:
        raise RequestError(
            f"the scores have no column {', '.join(missing)}; they have {', '.join(scores.column_names)}. A row needs "
            f"{', '.join(IDS)} and the score (--column)"
        )
    try:
        values = pc.cast(scores[column], pa.float64()).to_numpy()
        for number in ("activation", "draw"):
            pc.cast(scores[number], pa.int64())
    except pa.ArrowException as error:
        raise RequestError(f"the scores hold something that is no number: {error}") from error
    if infinite := int(np.isinf(values).sum()):
        raise RequestError(f"{infinite} scores are infinite; leave a score empty where there is none")
    return np.asarray(values)


def _scores_by_draw(stored: pa.Table, scores: pa.Table, values: np.ndarray, draws_key: str, left_out: Counter[str]) -> np.ndarray:
    """Return the score of each stored draw of a key, NaN where it has none; rows that fit none are counted."""
    ids = zip(stored["activation"].to_pylist(), stored["draw"].to_pylist(), strict=True)
    place = {pair: index for index, pair in enumerate(ids)}
    texts = stored["explanation"].to_pylist()
    given = scores["explanation"].to_pylist() if "explanation" in scores.column_names else None
    result = np.full(len(stored), np.nan)
    pairs = zip(*(pc.cast(scores[name], pa.int64()).to_pylist() for name in ("activation", "draw")), strict=True)
    for row, pair in enumerate(pairs):
        index = place.get(pair)
        if index is None or texts[index] is None:
            left_out["of draws that are not stored or have no explanation"] += 1
        elif given is not None and given[row] != texts[index]:
            left_out["of another text than the stored one"] += 1
        elif np.isnan(result[index]) or result[index] == values[row]:
            result[index] = values[row]
        else:
            raise RequestError(
                f"draw {pair[1]} of activation {pair[0]} (draws {draws_key[:8]}) has two scores, {result[index]:g} and "
                f"{values[row]:g}: a file has one score a draw"
            )
    return result


def _store(registry: Path, draws_key: str, layout: MetricLayout, stored: pa.Table, values: np.ndarray) -> bool:
    """Publish scores beside every part that has any; return whether another content of this name was stored before."""
    ids = {name: pa.chunked_array([stored[name].combine_chunks()]) for name in ("activation", "draw")}
    content = {**ids, "value": pa.chunked_array([pa.array(values)])}
    [better] = [better for _, better in layout.columns.values()]
    digests = {name: column_digest(array) for name, array in content.items()}
    identity: dict[str, Any] = {"imported": digests, "better": better, "columns": list(layout.columns)}
    key = layout.key(identity)
    before = [metric.metric_key for metric in stored_metrics(registry, draws_key) if metric.layout.metric == layout.metric]
    store = MetricScores(registry, draws_key, key, layout)
    score = dict(zip(zip(stored["activation"].to_pylist(), stored["draw"].to_pylist(), strict=True), values, strict=True))
    for part in store.texts.parts():
        draws, digest = read_texts(store.texts, part, ("explanation",)), digest_of_texts(store.texts, part)
        if draws is not None and digest is not None:
            pairs = zip(draws["activation"].to_pylist(), draws["draw"].to_pylist(), strict=True)
            [column] = layout.columns
            store.publish_values(part, draws, {column: np.array([score[pair] for pair in pairs])}, digest)
    store.record(identity)
    return bool(before) and before != [key]
