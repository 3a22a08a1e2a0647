"""Load measured cells with their draws, and check what several cells share: activations, baseline, scoring."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ksweep import stats
from ksweep.config.spec import Scoring
from ksweep.registry import activation_metadata
from ksweep.registry.cell_draws import stored_draws
from ksweep.registry.database import connect
from ksweep.utils.cell_names import distinct_names
from ksweep.utils.errors import RequestError


@dataclass(frozen=True, kw_only=True, eq=False)
class MeasuredCell:
    """A finished run of a cell, with its draws."""

    run_id: str
    cell: str
    label: str
    sweep: str
    temperature: float | None
    step: int | None
    """Training step of its checkpoints, as in `runs`."""
    activations_key: str
    draws_key: str
    scores_key: str | None
    """None for runs of earlier versions, whose draws_key is of draws and scores together."""
    num_activations: int
    num_draws: int
    baseline_value: float
    baseline_kind: stats.BaselineKind
    scoring: Scoring
    kind: stats.ScoringKind
    registry: Path
    vector_cache: Path | None = field(default=None, repr=False)
    """Vectors to compute distances from, for runs recorded before the registry kept distances."""

    @cached_property
    def draws(self) -> pa.Table:
        """Document, error and number of tokens of each draw, ordered by activation and draw."""
        store = stored_draws(self.registry, self.draws_key, self.scores_key)
        table = store.read(self.num_activations, self.num_draws, ["document", "error", "num_tokens"])
        if table is None:
            raise RequestError(
                f"draws of {self.cell} are missing in {store.path}: run its sweep again, only what is missing is sampled"
            )
        return table

    @cached_property
    def errors(self) -> np.ndarray:
        """Error of each draw, [activation, draw]; NaN where the draw failed."""
        return np.asarray(self.draws["error"].to_numpy()).reshape(self.num_activations, self.num_draws)

    @cached_property
    def num_tokens(self) -> np.ndarray:
        """Length of each draw in tokens, [activation, draw], failed draws included."""
        return np.asarray(self.draws["num_tokens"].to_numpy()).reshape(self.num_activations, self.num_draws)

    @cached_property
    def documents(self) -> np.ndarray:
        """Document of each activation."""
        documents = self.draws["document"].take(pa.array(np.arange(self.num_activations) * self.num_draws))
        return np.asarray(documents.to_pylist(), dtype=object)

    def metadata(self, num_activations: int) -> pa.Table | None:
        """Return documents, groups and distances of the first activations; None where nothing has them."""
        if not self.activations_key:  # a record that does not say over which activations it ran
            return None
        table = activation_metadata.read_metadata(self.registry, self.activations_key, self.kind, num_activations)
        if table is not None:
            return table
        path = activation_metadata.metadata_path(self.registry, self.activations_key, self.kind, num_activations)
        is_damaged = path.exists()
        # A store is addressed by content: where it has the key, it has the vectors.
        vector_cache = self.registry.parent / "vector_cache" if self.vector_cache is None and is_damaged else self.vector_cache
        if vector_cache is None or not vector_cache.is_dir():
            return None
        from ksweep.activations.store import ActivationStore

        store = ActivationStore(vector_cache, self.activations_key, {})
        if store.available() < num_activations:
            return None
        vectors = store.open(num_activations)
        if is_damaged:
            with suppress(OSError):  # a registry that is only read
                path.unlink()
                return activation_metadata.write_metadata(self.registry, vectors, self.kind)
        return activation_metadata.metadata_table(vectors, self.kind)


@dataclass(frozen=True)
class CommonGround:
    """The first activations that several cells share, and the baseline of these activations."""

    num_activations: int
    baseline: stats.Baseline
    baseline_kind: stats.BaselineKind
    """How the value of the baseline was obtained, also where `baseline` carries it as a constant."""
    note: str | None = None
    """A limitation of the intervals."""


def load_cells(registry: Path | str, names: Sequence[str] = (), *, vector_cache: Path | str | None = None) -> list[MeasuredCell]:
    """Return the newest finished runs of the named cells, in the order of the names; without names those of all cells.

    A name is a cell, a label, a sweep (all its cells) or a run id.

    Raises:
        RequestError: nothing in the registry has one of the names.
    """
    root = Path(registry)
    requested = pa.table({"name": pa.array(list(names), pa.string()), "place": pa.array(range(len(names)), pa.int64())})
    with connect(root) as connection:
        connection.register("requested", requested)
        rows = connection.sql(_NAMED if names else _ALL).to_arrow_table().to_pylist()
    matched = {index for row in rows for index in row.pop("places", ())}
    if unknown := [name for index, name in enumerate(names) if index not in matched]:
        raise RequestError(f"no finished run, cell, label or sweep {unknown[0]!r} in {registry}: `ksweep ls` lists them")
    cells = [_cell(row, root, None if vector_cache is None else Path(vector_cache)) for row in rows]
    labels = distinct_names([{name: getattr(cell, name) for name in ("label", "sweep", "cell", "run_id")} for cell in cells])
    return [replace(cell, label=label) for cell, label in zip(cells, labels, strict=True)]


_COLUMNS = """r.run_id, r.cell, r.label, r.sweep, r.temperature, step_in(r.label, r.step) AS step, r.activations_key, r.draws_key,
              r.scores_key, r.num_activations, r.num_draws, r.baseline, r.baseline_kind, r.scoring_kind, r.spec"""
_ALL = f"SELECT {_COLUMNS} FROM v_latest AS r WHERE draws_key IS NOT NULL ORDER BY r.finished, r.run_id"
_NAMED = f"""
    WITH latest AS (SELECT run_id FROM v_latest), named AS (
        SELECT run_id, label, place, 0 AS within FROM runs JOIN requested
        ON name = run_id OR (name IN (cell, label) AND run_id IN (FROM latest))
        UNION ALL SELECT c.run_id, c.label, requested.place, c.place FROM v_sweep_cells AS c JOIN requested ON name = c.sweep
    ), first AS (
        SELECT run_id, arg_min(label, place) AS label, min(place) AS place, min(within) AS within, list(place) AS places
        FROM named GROUP BY run_id
    )
    SELECT {_COLUMNS.replace("r.label", "first.label")}, first.places FROM first JOIN runs AS r USING (run_id)
    WHERE status = 'finished' AND draws_key IS NOT NULL
    ORDER BY first.place, first.within, r.finished, r.run_id
"""
"""The cells of a sweep are those that it was last asked for, in its order."""


def _cell(row: dict[str, Any], root: Path, vector_cache: Path | None) -> MeasuredCell:
    """Build a cell from a row of `runs`."""
    spec = json.loads(row.pop("spec"))
    scoring = {name: value for name, value in spec["scoring"].items() if name in Scoring.__dataclass_fields__}
    if scoring.get("ks") is not None:
        scoring["ks"] = tuple(scoring["ks"])
    # Older records call the distance from the mean "evaluated set".
    baseline_kind = row.pop("baseline_kind").replace("evaluated set", "distance from mean")
    return MeasuredCell(
        baseline_value=row.pop("baseline"), baseline_kind=baseline_kind, scoring=Scoring(**scoring),
        kind=row.pop("scoring_kind"), registry=root, vector_cache=vector_cache, **row,
    )  # fmt: skip


def cell_named(cells: Sequence[MeasuredCell], name: str) -> MeasuredCell:
    """Return the cell with this label, name or run id.

    Raises:
        RequestError: none of the cells has it, or several do.
    """
    matches = [cell for cell in cells if name in (cell.label, cell.cell, cell.run_id)]
    if len(matches) != 1:
        raise RequestError(
            f"{len(matches)} of these cells are called {name!r}; the reference is one of {', '.join(c.label for c in cells)}"
        )
    return matches[0]


def common_level(cells: Sequence[MeasuredCell], level: float | None) -> float:
    """Return `level`, or where it is None the nominal coverage that the intervals of all cells share.

    Raises:
        RequestError: the cells have intervals of different levels.
    """
    levels = sorted({cell.scoring.level for cell in cells}) if level is None else [level]
    if len(levels) > 1:
        raise RequestError(f"the cells have intervals of {' and '.join(f'{x:.0%}' for x in levels)}: name one level")
    return levels[0]


def common_ground(cells: Sequence[MeasuredCell]) -> CommonGround:
    """Return the activations and the baseline that cells share.

    Raises:
        RequestError: the cells are over different activations, or their FVEs do not mean the same.
    """
    first = cells[0]
    for cell in cells[1:]:
        _check_comparable(first, cell)
    smallest = min(cells, key=lambda cell: cell.num_activations)
    n, kind = smallest.num_activations, first.baseline_kind
    if kind == "stated constant":
        return CommonGround(n, stats.stated_baseline(first.baseline_value, scoring=first.kind), kind)
    metadata = smallest.metadata(n)
    baseline = None if metadata is None else activation_metadata.baseline_of(metadata, kind, first.kind)
    if baseline is None:
        value = smallest.baseline_value
        fixed = stats.Baseline(value=value, kind="stated constant", num_activations=None, scoring=first.kind)
        return CommonGround(n, fixed, kind, _FIXED_BASELINE)
    return CommonGround(n, baseline, kind)


_FIXED_BASELINE = (
    "the intervals treat the baseline as a constant: the distances that it is the mean of were not kept when these cells ran, "
    "and their vectors are not available"
)

MEANING = ("baseline", "failed_error", "selection")
"""Fields of the scoring that change what an FVE means; seed and number of replicates change only its interval."""


def _check_comparable(a: MeasuredCell, b: MeasuredCell) -> None:
    """Raise RequestError for two cells whose FVEs must not be subtracted."""
    if not a.activations_key or not b.activations_key:
        unknown = b if a.activations_key else a
        raise RequestError(
            f"the run of {unknown.label} does not say over which activations it ran, so it cannot be paired with another: "
            "compare their curves side by side (fve_by_k), or run its sweep again"
        )
    if a.activations_key != b.activations_key:
        raise RequestError(
            f"{a.label} and {b.label} are over different activations ({a.activations_key[:8]} and {b.activations_key[:8]}: "
            "another text, model, layer, positions or seed), so activations cannot be paired and a paired difference means "
            "nothing. Compare their curves side by side (fve_by_k), or run both over the same activations"
        )
    if a.kind != b.kind:
        raise RequestError(
            f"{a.label} has {a.kind} errors and {b.label} {b.kind} ones: their FVEs measure different things and cannot be "
            "subtracted"
        )
    for name in ("baseline", "failed_error", "selection", "seed", "num_replicates"):
        value, other_value = (_scoring_value(cell, name) for cell in (a, b))
        if value != other_value:
            why = "their FVEs do not mean the same" if name in MEANING else "they do not share their bootstrap replicates"
            raise RequestError(
                f"{a.label} has scoring.{name}={value} and {b.label} {other_value}: {why}. Run the sweep of one of them again "
                "with the other's value; stored draws are reused, only the statistics are computed again"
            )


def _scoring_value(cell: MeasuredCell, name: str) -> str:
    """Return a field of the scoring as text; a measured baseline is named by the kind that the run's version used."""
    value = getattr(cell.scoring, name)
    return cell.baseline_kind if name == "baseline" and cell.scoring.stated_baseline is None else str(value)
