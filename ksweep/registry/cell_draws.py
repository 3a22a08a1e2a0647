"""The draws of a cell with their scores: what exists in both stores, what is missing, and the two joined."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ksweep.registry.draws import DRAWS_SCHEMA, DrawsStore
from ksweep.registry.earlier_draws import EarlierDraws, earlier_draws
from ksweep.registry.part_labels import read_label
from ksweep.registry.part_store import as_grid, stored_reconstructions, within_grid
from ksweep.registry.scores import RECONSTRUCTION, RECONSTRUCTION_SCHEMA, ScoredUnit, ScoresStore, scored_unit
from ksweep.registry.work_units import WorkUnit, missing_rectangles
from ksweep.utils.notes import Note

_CONTROLS = "controls.json"
KEY_COLUMNS = ("activation", "draw")
SCORE_COLUMNS = tuple(name for name in RECONSTRUCTION_SCHEMA.names if name not in KEY_COLUMNS)


@dataclass(frozen=True, eq=False)
class Coverage:
    """Which draws of a grid exist and which of these are scored, boolean [activation, draw]."""

    drawn: np.ndarray
    scored: np.ndarray

    def to_bytes(self) -> bytes:
        """Return both arrays, compressed."""
        return zlib.compress(np.packbits([self.drawn, self.scored]).tobytes())

    @classmethod
    def from_bytes(cls, data: bytes, grid: tuple[int, int]) -> Coverage:
        """Return what `to_bytes` has packed of a grid [activation, draw]."""
        bits = np.unpackbits(np.frombuffer(zlib.decompress(data), dtype=np.uint8), count=2 * grid[0] * grid[1])
        drawn, scored = bits.astype(bool).reshape(2, *grid)
        return cls(drawn, scored)


class CellDraws:
    """The draws of one key and their reconstruction scores by one AR."""

    def __init__(self, registry: Path, draws_key: str, scores_key: str, combined_key: str = "") -> None:
        """Open both stores; no directory is created before something is published.

        `combined_key` is the key under which earlier versions stored both together.
        """
        self.draws = DrawsStore(registry / "draws", draws_key)
        self.scores = ScoresStore(registry / "scores", draws_key, scores_key)
        self.combined_key = combined_key
        self._last_read: tuple[WorkUnit, tuple[str, ...], pa.Table] | None = None

    @property
    def path(self) -> Path:
        """Directory of the draws."""
        return self.draws.path

    # What exists

    def coverage(self, num_activations: int, num_draws: int) -> Coverage:
        """Return which draws are stored and which are scored."""
        parts = self.draws.parts()
        return self._coverage(parts, _owners(parts, num_activations, num_draws))

    def _coverage(self, parts: Sequence[WorkUnit], owners: np.ndarray) -> Coverage:
        scored, number = np.zeros(owners.shape, dtype=bool), {part: i for i, part in enumerate(parts)}
        for unit in self.scores.parts():
            if unit.of in number:
                scored[unit.index()] |= owners[unit.index()] == number[unit.of]
        return Coverage(owners >= 0, scored)

    def coverage_with_earlier(self, num_activations: int, num_draws: int) -> Coverage:
        """Return the coverage as it will be after `take_over_earlier`."""
        coverage = self.coverage(num_activations, num_draws)
        for store in self._earlier():
            stored = store.coverage(num_activations, num_draws)
            coverage.drawn[stored] = True
            if self._has_these_scores(store):
                coverage.scored[stored] = True
        return coverage

    def is_complete(self, num_activations: int, num_draws: int) -> bool:
        """Return whether every draw is visible on disk with its scores."""
        return bool(self.coverage(num_activations, num_draws).scored.all())

    def has_lost(self, num_activations: int, num_draws: int) -> bool:
        """Return whether draws or scores of a cell that was complete have gone without anybody's intent.

        That is where a part was set aside as damaged, and where another job's part has since come to count for some draws. What a
        user has deleted is not looked for.
        """
        coverage = self.coverage_with_earlier(num_activations, num_draws)
        if coverage.scored.all():
            return False
        scored, known = np.zeros_like(coverage.scored), set(self.draws.parts())
        for unit in self.scores.parts():
            if unit.of in known:
                scored[unit.index()] = True
        damaged = self.draws.has_damaged() or self.scores.has_damaged() or any(store.has_damaged() for store in self._earlier())
        return damaged or bool(scored.all())

    def still_missing(self, unit: WorkUnit) -> list[WorkUnit]:
        """Return the draws of a unit that are still missing: another sweep may have published some meanwhile."""
        return self.draws.still_missing(unit)

    def unscored(self, within: WorkUnit) -> list[ScoredUnit]:
        """Return the stored draws within a rectangle that have no scores, by the part that they lie in."""
        parts = self.draws.parts()
        owners = _owners(parts, within.last_row, within.last_draw)
        missing = ~self._coverage(parts, owners).scored
        missing[: within.first_row] = missing[:, : within.first_draw] = False
        units = []
        for number, part in enumerate(parts):
            block = missing[part.index()] & (owners[part.index()] == number)
            units += [scored_unit(unit, part) for unit in missing_rectangles(~block, part.first_row, part.first_draw)]
        return units

    def scored_parts(self) -> list[ScoredUnit]:
        """Return the units that are stored with their scores, in the order of the parts that they lie in.

        Of several units with a draw the first is that of the part that counts, if that one is scored.
        """
        return sorted(self.scores.parts(), key=lambda unit: (unit.of, unit))

    def bytes_on_disk(self) -> tuple[int, int]:
        """Return the size of the draws and of their scores in bytes."""
        return self.draws.bytes_on_disk(), self.scores.bytes_on_disk()

    # Publishing

    def describe(self, identity: Mapping[str, Any]) -> None:
        """Write beside each store what its key is hashed from."""
        self.draws.describe({name: identity[name] for name in ("activations", "draws", "layer")})
        self.scores.describe(RECONSTRUCTION.description(self.draws.key, identity["scores"]))

    def publish_draws(self, unit: WorkUnit, table: pa.Table) -> pa.Table:
        """Publish the draws of a unit, and return the stored ones: those of another job if it has published the unit first."""
        while (published := self.draws.publish(unit, table)) is None:
            stored = self.draws.read_part(unit)
            if stored is not None:
                return stored
        return published

    def publish_scores(self, unit: ScoredUnit, table: pa.Table, draws: pa.Table) -> None:
        """Publish the scores of a unit. Without effect where another job has meanwhile set the draws aside as damaged.

        `draws` are those that were scored, as `publish_draws` or `read_unit` returned them: the part may have been drawn again
        since.
        """
        label, scored = self.draws.read_label(unit.of), read_label(draws.schema)
        if label is not None and scored is not None and scored.digest == label.digest:
            self.scores.publish(unit, table, label.digest)

    def take_over_earlier(self, num_activations: int, num_draws: int) -> None:
        """Copy those draws of earlier versions that are missing here, and their scores if this AR gave them."""
        for store, parts in self._lacking_from_earlier(num_activations, num_draws, are_taken=True):
            with_scores = self._has_these_scores(store)
            for part in parts:
                if (table := store.read_part(part)) is not None:
                    self._take_over(part, table, with_scores)
            self.draws.keep_notes(store.notes)
            if with_scores and self.controls() is None and (controls := store.read_json(_CONTROLS)) is not None:
                self.publish_controls(controls)

    def bytes_to_take_over(self, num_activations: int, num_draws: int) -> int:
        """Return the size in bytes of the parts of earlier versions that `take_over_earlier` will copy."""
        lacking = self._lacking_from_earlier(num_activations, num_draws)
        return sum(store.size_of(part) for store, parts in lacking for part in parts)

    def _lacking_from_earlier(
        self, num_activations: int, num_draws: int, *, are_taken: bool = False
    ) -> Iterator[tuple[EarlierDraws, list[WorkUnit]]]:
        """Yield each earlier directory with those of its parts that have something which no store before it has.

        With `are_taken` the caller takes the parts over before it asks for the next directory; a damaged one is then looked for
        there.
        """
        coverage = None
        for store in self._earlier():
            if coverage is None or are_taken:
                coverage = self.coverage(num_activations, num_draws)
            wanted = coverage.scored if self._has_these_scores(store) else coverage.drawn
            parts = []
            for part in store.parts_meeting(num_activations, num_draws):
                if not wanted[part.index()].all():
                    parts.append(part)
                    wanted[part.index()] = coverage.drawn[part.index()] = True
            yield store, parts

    def _take_over(self, part: WorkUnit, table: pa.Table, with_scores: bool) -> None:
        # A part of that name may hold the draws of another earlier directory, which in bfloat16 may be other texts.
        draws = self.draws.labelled_draws(table)
        self.draws.publish(part, draws)
        if with_scores:
            self.publish_scores(scored_unit(part), table, draws)

    def _earlier(self) -> list[EarlierDraws]:
        """Return the directories of earlier versions with these draws, those with these scores first."""
        stores = earlier_draws(self.draws.path.parent, self.draws.key, self.combined_key)
        return sorted(stores, key=lambda store: not self._has_these_scores(store))

    def _has_these_scores(self, store: EarlierDraws) -> bool:
        keys = store.split_keys
        return store.key == self.combined_key or (keys is not None and keys.scores == self.scores.keys["scores"])

    # Reading

    def read(self, num_activations: int, num_draws: int, columns: Sequence[str] | None = None) -> pa.Table | None:
        """Return the first draws of the first activations, ordered by activation and draw; None if some are missing.

        Draws without scores count as missing if a column of scores is asked for. A damaged part is set aside with a warning.
        """
        names = (*DRAWS_SCHEMA.names, *SCORE_COLUMNS) if columns is None else columns
        if not set(names) & set(SCORE_COLUMNS):
            return self.draws.read(num_activations, num_draws, names)
        if not self.is_complete(num_activations, num_draws):
            return None
        units = [unit for unit in self.scored_parts() if unit.meets(num_activations, num_draws)]
        tables = [self.read_scored(unit, names) for unit in units]
        rows = within_grid([table for table in tables if table is not None], num_activations, num_draws)
        return None if rows is None else as_grid(rows, num_activations, num_draws)

    def read_scored(self, unit: ScoredUnit, columns: Iterable[str]) -> pa.Table | None:
        """Return the draws of a unit with their scores; None if either is missing or damaged, or if the scores are of others."""
        names = [name for name in columns if name not in KEY_COLUMNS]
        scores = self.scores.read_part(unit, [name for name in names if name in SCORE_COLUMNS])
        draws = None if scores is None else self._read_draws(unit.of, tuple(name for name in names if name not in SCORE_COLUMNS))
        if scores is None or draws is None:
            return None
        label, label_of_draws = read_label(scores.schema), read_label(draws.schema)
        if label is None or label_of_draws is None or label.scored != label_of_draws.digest:
            self.scores.set_aside(unit, "it scores other draws than are stored")
            return None
        # Rows of a part are ordered by activation and draw.
        width = unit.of.last_draw - unit.of.first_draw
        row = (scores["activation"].to_numpy() - unit.of.first_row) * width + scores["draw"].to_numpy() - unit.of.first_draw
        joined = draws.take(pa.array(row))
        for name in names:
            if name in SCORE_COLUMNS:
                joined = joined.append_column(name, scores[name])
        return joined.select([*KEY_COLUMNS, *names])

    def _read_draws(self, part: WorkUnit, columns: tuple[str, ...]) -> pa.Table | None:
        """Read a part of the draws store; the last one is kept, as several units of scores may lie in one."""
        if self._last_read is None or self._last_read[:2] != (part, columns):
            table = self.draws.read_part(part, columns)
            if table is None:
                return None
            self._last_read = (part, columns, table)
        return self._last_read[2]

    def read_unit(self, unit: ScoredUnit) -> pa.Table | None:
        """Return the stored draws of a unit that is to be scored; None if its part has been set aside meanwhile."""
        table = self._read_draws(unit.of, tuple(DRAWS_SCHEMA.names))
        if table is None:
            return None
        activation, draw = table["activation"].to_numpy(), table["draw"].to_numpy()
        inside = (unit.first_row <= activation) & (activation < unit.last_row)
        return table.filter(pa.array(inside & (unit.first_draw <= draw) & (draw < unit.last_draw)))

    def reconstructions(
        self, activations: np.ndarray, draws: np.ndarray, d_model: int, parts: Sequence[ScoredUnit] | None = None
    ) -> np.ndarray:
        """Return the reconstruction of each (activation, draw), float32 [pair, d_model]; NaN where none is kept.

        `parts` saves listing the directory again in each of many calls.
        """
        return stored_reconstructions(self.scores, self.scored_parts() if parts is None else parts, activations, draws, d_model)

    def set_damaged_aside(self, num_activations: int, num_draws: int) -> None:
        """Read every part of these draws and scores once and set damaged ones aside, so that their rows count as missing."""
        self.draws.clear_leftovers()
        self.scores.clear_leftovers()
        for part in self.draws.parts_meeting(num_activations, num_draws):
            self.draws.read_part(part)
        for unit in self.scores.parts_meeting(num_activations, num_draws):
            if self.draws.read_label(unit.of) is None:
                self.scores.set_aside(unit, "the draws that it scores are gone")
            else:
                self.read_scored(unit, SCORE_COLUMNS)

    @property
    def notes(self) -> tuple[Note, ...]:
        """Notes on the AV and the AR."""
        return tuple(dict.fromkeys((*self.draws.notes, *self.scores.notes)))

    def controls(self) -> dict[str, Any] | None:
        """Return controls that are measured once per AR, such as the error of an empty text; None if there are none yet."""
        controls = self.scores.read_json(_CONTROLS)
        return controls if isinstance(controls, dict) else None

    def publish_controls(self, controls: Mapping[str, Any]) -> None:
        """Write controls beside the scores."""
        self.scores.publish_json(_CONTROLS, controls)


def _owners(parts: Sequence[WorkUnit], num_activations: int, num_draws: int) -> np.ndarray:
    """Return the index of the part that counts for each draw, int64 [activation, draw]; -1 for draws that are not stored.

    Two jobs that draw at once may both publish a draw, in units of different shapes. In bfloat16 its two texts may differ: the
    first part counts for every reader and every AR.
    """
    owners = np.full((num_activations, num_draws), -1)
    for number, part in reversed(list(enumerate(parts))):
        owners[part.index()] = number
    return owners


def stored_draws(registry: Path, draws_key: str, scores_key: str | None) -> CellDraws | EarlierDraws:
    """Return the draws and scores that a run was recorded over. Runs of earlier versions have no key of scores."""
    if scores_key is None:
        return EarlierDraws(registry / "draws", draws_key)
    return CellDraws(registry, draws_key, scores_key)
