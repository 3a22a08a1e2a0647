"""Cells beside one another: paired differences, the best of several, groups, tails. Reads draws, never a model.

    cells = load_cells("registry", ["temp_sweep"])      # newest finished runs of cells, labels, sweeps or run ids
    compare(cells)                    # every pair, every K, pointwise interval and band; and each at its own best K
    compare(cells, reference="temperature=1")
    best_held_out(cells, ks=(1, 16))  # which cell is best, without the winner's curse
    curves_of_cells(cells)            # curves with bands, gains per doubling, tokens, median and trimmed FVE
    groups_of_cells(cells, "role")    # FVE within groups

Everything comes back as an Arrow table for SQL and charts. The maths is in `ksweep.stats`.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from ksweep import stats
from ksweep.config.spec import Autoencoder, Scoring
from ksweep.registry import activation_metadata
from ksweep.registry.database import connect
from ksweep.registry.draws import DrawsStore
from ksweep.registry.group_rows import group_rows
from ksweep.utils.cell_names import told_apart
from ksweep.utils.errors import RequestError

log = logging.getLogger(__name__)

Grouping = Literal["role", "position", "norm", "document"]

COMPARISON_SCHEMA = pa.schema(
    [
        ("cell", pa.string()),
        ("label", pa.string()),
        ("run_id", pa.string()),
        ("other_cell", pa.string()),
        ("other_label", pa.string()),
        ("other_run_id", pa.string()),
        ("k", pa.int32()),
        ("own_k", pa.int32()),
        ("other_k", pa.int32()),
        ("fve", pa.float64()),
        ("other_fve", pa.float64()),
        ("difference", pa.float64()),
        ("difference_low", pa.float64()),
        ("difference_high", pa.float64()),
        ("band_low", pa.float64()),
        ("band_high", pa.float64()),
        ("level", pa.float64()),
        ("few_subsets", pa.bool_()),
        ("tokens", pa.float64()),
        ("other_tokens", pa.float64()),
        ("num_activations", pa.int64()),
        ("num_documents", pa.int64()),
        ("effective_documents", pa.float64()),
        ("baseline", pa.float64()),
        ("baseline_kind", pa.string()),
        ("note", pa.string()),
    ]
)
"""A row for each pair and K that both have, and one whose `k` is null: each cell at the K where it is highest (own_k, other_k).
difference = fve - other_fve, named as in the registry's v_compare; difference_low/high hold for one K named beforehand,
band_low/high for all K of the pair at once. few_subsets: K > N/2 of either cell. tokens: sampled per activation for that K."""

BEST_SCHEMA = pa.schema(
    [
        ("k", pa.int32()),
        ("best", pa.string()),
        ("best_temperature", pa.float64()),
        ("chosen_on_first_half", pa.string()),
        ("chosen_on_second_half", pa.string()),
        ("naive_fve", pa.float64()),
        ("fve", pa.float64()),
        ("fve_low", pa.float64()),
        ("fve_high", pa.float64()),
        ("level", pa.float64()),
        ("num_cells", pa.int32()),
        ("num_activations", pa.int64()),
        ("num_documents", pa.int64()),
        ("effective_documents", pa.float64()),
        ("baseline", pa.float64()),
        ("baseline_kind", pa.string()),
    ]
)
"""A row for each K. best: highest FVE over all documents, the cell to use. fve: chosen on one half of the documents, measured on
the other, both ways, pooled; naive_fve, of `best` where it was chosen, is biased upwards."""

GROUP_SCHEMA = pa.schema(
    [
        ("cell", pa.string()),
        ("label", pa.string()),
        ("run_id", pa.string()),
        ("temperature", pa.float64()),
        ("breakdown", pa.string()),
        ("part", pa.string()),
        ("place", pa.int32()),
        ("against", pa.string()),
        ("k", pa.int32()),
        ("fve", pa.float64()),
        ("fve_low", pa.float64()),
        ("fve_high", pa.float64()),
        ("level", pa.float64()),
        ("error", pa.float64()),
        ("median_error", pa.float64()),
        ("worst_share", pa.float64()),
        ("failure_rate", pa.float64()),
        ("all_failed_rate", pa.float64()),
        ("num_activations", pa.int64()),
        ("num_documents", pa.int64()),
        ("effective_documents", pa.float64()),
        ("baseline", pa.float64()),
        ("baseline_kind", pa.string()),
    ]
)
"""Columns as in the registry's table metrics. against: overall (the baseline of all activations of the cell) or own (of the
activations of the group alone)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MeasuredCell:
    """A finished run with its draws."""

    run_id: str
    cell: str
    label: str
    sweep: str
    temperature: float | None
    activations_key: str
    draws_key: str
    num_activations: int
    num_draws: int
    baseline_value: float
    baseline_kind: stats.BaselineKind
    scoring: Scoring
    kind: stats.ScoringKind
    registry: Path
    vector_cache: Path | None = field(default=None, repr=False)
    """Where distances are computed from for runs that predate keeping them in the registry."""

    @cached_property
    def draws(self) -> pa.Table:
        """Document, error and tokens of each draw, ordered by activation and draw."""
        store = DrawsStore(self.registry / "draws", self.draws_key)
        table = store.read(self.num_activations, self.num_draws, ["document", "error", "num_tokens"])
        if table is None:
            raise RequestError(
                f"draws of {self.cell} are missing in {store.path}: run its sweep again, only what is missing is sampled"
            )
        return table

    @cached_property
    def errors(self) -> np.ndarray:
        """[activation, draw], NaN where the draw failed."""
        return np.asarray(self.draws["error"].to_numpy()).reshape(self.num_activations, self.num_draws)

    @cached_property
    def num_tokens(self) -> np.ndarray:
        """[activation, draw] length of each draw; failed ones too."""
        return np.asarray(self.draws["num_tokens"].to_numpy()).reshape(self.num_activations, self.num_draws)

    @cached_property
    def documents(self) -> np.ndarray:
        """Document of each activation."""
        first = self.draws["document"].take(pa.array(np.arange(self.num_activations) * self.num_draws))
        return np.asarray(first.to_pylist(), dtype=object)

    def known(self, num_activations: int) -> pa.Table | None:
        """What is known of the first activations beside their draws; from the vectors where the registry lacks it."""
        found = activation_metadata.read_metadata(self.registry, self.activations_key, self.kind, num_activations)
        if found is None and self.vector_cache is not None:
            from ksweep.activations.store import ActivationStore

            store = ActivationStore(self.vector_cache, self.activations_key, {})
            if store.available() >= num_activations:
                return activation_metadata.metadata_table(store.open(num_activations), self.kind)
        return found


@dataclass(frozen=True)
class Common:
    """What two cells share: the activations that both have, and what their errors are held against."""

    num_activations: int
    baseline: stats.Baseline
    kind: stats.BaselineKind
    """Where the baseline's value comes from."""
    note: str | None = None
    """What to know about the intervals."""


def load_cells(registry: Path | str, names: Sequence[str] = (), *, vector_cache: Path | str | None = None) -> list[MeasuredCell]:
    """Newest finished runs of the cells, labels or sweeps of these names, and runs by id, in the order asked; no name: all.

    Raises:
        RequestError: a name that nothing has.
    """
    root = Path(registry)
    asked = pa.table({"name": pa.array(list(names), pa.string()), "place": pa.array(range(len(names)), pa.int64())})
    with connect(root) as connection:
        connection.register("asked", asked)
        rows = connection.sql(_NAMED if names else _ALL).to_arrow_table().to_pylist()
    found = {place for row in rows for place in row.pop("places", ())}
    if unknown := [name for place, name in enumerate(names) if place not in found]:
        raise RequestError(f"no finished run, cell, label or sweep {unknown[0]!r} in {registry}: `ksweep ls` lists them")
    cells = [_cell(row, root, None if vector_cache is None else Path(vector_cache)) for row in rows]
    labels = told_apart([{name: getattr(cell, name) for name in ("label", "sweep", "cell", "run_id")} for cell in cells])
    return [replace(cell, label=label) for cell, label in zip(cells, labels, strict=True)]


def compare(cells: Sequence[MeasuredCell], reference: str | None = None, *, level: float | None = None) -> pa.Table:
    """Paired differences of every two cells, or of each cell from `reference` (a label, cell or run id); COMPARISON_SCHEMA.

    Over the activations that both have, with the replicates of their curves. `level`: None takes the cells' own.

    Raises:
        RequestError: cells over different activations, whose FVEs do not mean the same, or that were not resampled alike.
    """
    if reference is None:
        pairs = list(itertools.combinations(cells, 2))
    else:
        base = _the_one(cells, reference)
        pairs = [(cell, base) for cell in cells if cell is not base]
    if not pairs:
        raise RequestError(f"a comparison needs two cells; there is {', '.join(c.label for c in cells) or 'none'}")
    level, memory = _level(cells, level), dict[Any, stats.FveCurve]()
    return pa.Table.from_pylist([row for a, b in pairs for row in _pair(a, b, level, memory)], schema=COMPARISON_SCHEMA)


def best_held_out(cells: Sequence[MeasuredCell], ks: Sequence[int] | None = None, *, level: float | None = None) -> pa.Table:
    """Which cell is best at each K, and what that is worth on documents it was not chosen on; BEST_SCHEMA.

    Cells with fewer than K draws take no part at that K. `ks`: by default 1, 2, 4, ... that two cells have. `level`: None takes
    the cells' own.
    """
    shared, level = common_ground(cells), _level(cells, level)
    n, documents = shared.num_activations, cells[0].documents[: shared.num_activations]
    if len(set(documents)) < 2:
        raise RequestError("all activations are of one document: there is no half to choose on and half to measure on")
    most = sorted(c.num_draws for c in cells)[-2] if len(cells) > 1 else 0
    rows = []
    for k in ks if ks is not None else [2**i for i in range(most.bit_length())]:
        able = [c for c in cells if c.num_draws >= k]
        if len(able) < 2:
            raise RequestError(f"fewer than two of these cells have {k} draws: there is nothing to choose between at K = {k}")
        found = stats.held_out_best(
            [c.errors[:n] for c in able], documents, shared.baseline, k, failed_error=cells[0].scoring.failed_error,
            num_replicates=cells[0].scoring.num_replicates, seed=cells[0].scoring.seed, level=level,
            selection=cells[0].scoring.selection,
        )  # fmt: skip
        rows.append(
            {
                **_numbers(found.curve)[0],
                "baseline_kind": shared.kind,
                "k": k,
                "best": able[found.best].label,
                "best_temperature": able[found.best].temperature,
                "chosen_on_first_half": able[found.chosen[1]].label,
                "chosen_on_second_half": able[found.chosen[0]].label,
                "naive_fve": found.naive_fve,
                "num_cells": len(able),
            }
        )
    return _table(rows, BEST_SCHEMA)


def curves_of_cells(cells: Sequence[MeasuredCell]) -> pa.Table:
    """Curves as the registry has them, recomputed from the draws, with what charts and papers want beside them.

    Columns beyond those of `curves`: band_low, band_high (hold for all K), few_subsets, tokens (per activation),
    gain_per_doubling with its interval (FVE at this K less that at K/2), and fve_median, fve_trimmed, worst_share (stats.Tails).
    """
    return pa.Table.from_pylist([row for cell in cells for row in _curve_rows(cell)])


def groups_of_cells(cells: Sequence[MeasuredCell], by: Grouping, ks: Sequence[int] | None = None) -> pa.Table:
    """FVE within groups of activations, against both baselines; GROUP_SCHEMA. `ks`: by default 1 and the number of draws.

    Documents are held against the overall baseline only: one has too few activations for a baseline of its own.
    """
    return _table([row for cell in cells for row in _group_rows(cell, by, ks)], GROUP_SCHEMA)


def common_ground(cells: Sequence[MeasuredCell]) -> Common:
    """The activations and the baseline that cells share.

    Raises:
        RequestError: they share none, or their errors are not of one kind.
    """
    first = cells[0]
    for cell in cells[1:]:
        _refuse_unlike(first, cell)
    smallest = min(cells, key=lambda cell: cell.num_activations)
    n, kind = smallest.num_activations, first.baseline_kind
    if kind == "stated constant":
        return Common(n, stats.stated_baseline(first.baseline_value, scoring=first.kind), kind)
    known = smallest.known(n)
    baseline = None if known is None else activation_metadata.baseline_of(known, kind, first.kind)
    if baseline is None:
        value = smallest.baseline_value
        taken = stats.Baseline(value=value, kind="stated constant", num_activations=None, scoring=first.kind)
        return Common(n, taken, kind, _KNOWN_BASELINE)
    return Common(n, baseline, kind)


_KNOWN_BASELINE = (
    "the baseline is taken as known in the intervals: the distances it is the mean of were not kept when these cells ran, and "
    "their vectors are not at hand"
)


# Finding cells

_COLUMNS = """r.run_id, r.cell, r.label, r.sweep, r.temperature, r.activations_key, r.draws_key, r.num_activations, r.num_draws,
              r.baseline, r.baseline_kind, r.spec"""
_ALL = f"SELECT {_COLUMNS} FROM v_latest AS r WHERE draws_key IS NOT NULL ORDER BY r.finished, r.run_id"
_NAMED = f"""
    WITH latest AS (SELECT run_id FROM v_latest), named AS (
        SELECT run_id, label, place, 0 AS within FROM runs JOIN asked
        ON name = run_id OR (name IN (cell, label) AND run_id IN (FROM latest))
        UNION ALL SELECT c.run_id, c.label, asked.place, c.place FROM v_sweep_cells AS c JOIN asked ON name = c.sweep
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
    spec = json.loads(row.pop("spec"))
    scoring = {name: value for name, value in spec["scoring"].items() if name in Scoring.__dataclass_fields__}
    if scoring.get("ks") is not None:
        scoring["ks"] = tuple(scoring["ks"])
    kind = Autoencoder(**spec["autoencoder"]).scoring_kind
    # What older records call the evaluated set is the distance from its mean.
    baseline_kind = row.pop("baseline_kind").replace("evaluated set", "distance from mean")
    return MeasuredCell(
        baseline_value=row.pop("baseline"), baseline_kind=baseline_kind, scoring=Scoring(**scoring), kind=kind, registry=root,
        vector_cache=vector_cache, **row,
    )  # fmt: skip


def _the_one(cells: Sequence[MeasuredCell], name: str) -> MeasuredCell:
    found = [cell for cell in cells if name in (cell.label, cell.cell, cell.run_id)]
    if len(found) != 1:
        raise RequestError(
            f"{len(found)} of these cells are called {name!r}; the reference is one of {', '.join(c.label for c in cells)}"
        )
    return found[0]


def _refuse_unlike(a: MeasuredCell, b: MeasuredCell) -> None:
    if a.activations_key != b.activations_key:
        raise RequestError(
            f"{a.label} and {b.label} are over different activations ({a.activations_key[:8]} and {b.activations_key[:8]}: "
            "another text, model, layer, positions or seed), so no activation of one belongs to one of the other: a paired "
            "difference means nothing. Compare their curves side by side (fve_by_k), or run both over the same activations"
        )
    if a.kind != b.kind:
        raise RequestError(
            f"{a.label} has {a.kind} errors and {b.label} {b.kind} ones: their FVEs measure different things and cannot be "
            "subtracted"
        )
    for name in ("baseline", "failed_error", "selection", "seed", "num_replicates"):
        one, other = (_scoring(cell, name) for cell in (a, b))
        if one != other:
            why = "their FVEs do not mean the same" if name in MEANING else "they do not share their bootstrap replicates"
            raise RequestError(
                f"{a.label} has scoring.{name}={one} and {b.label} {other}: {why}. Run the sweep of one of them again with the "
                "other's; stored draws are used, only the statistics are computed anew"
            )


MEANING = ("baseline", "failed_error", "selection")
"""Fields of the scoring that change what an FVE is; seed and number of replicates change its interval alone."""


def _level(cells: Sequence[MeasuredCell], level: float | None) -> float:
    levels = sorted({cell.scoring.level for cell in cells}) if level is None else [level]
    if len(levels) > 1:
        raise RequestError(f"the cells have intervals of {' and '.join(f'{x:.0%}' for x in levels)}: name one level")
    return levels[0]


def _scoring(cell: MeasuredCell, name: str) -> str:
    """A field of the scoring in words; of a measured baseline the kind that the run had, which older versions chose otherwise."""
    value = getattr(cell.scoring, name)
    return cell.baseline_kind if name == "baseline" and cell.scoring.stated_baseline is None else str(value)


# Rows


def _curve(cell: MeasuredCell, shared: Common, ks: Sequence[int], like: Scoring, level: float) -> stats.FveCurve:
    n = shared.num_activations
    return stats.fve_curve(
        cell.errors[:n], cell.documents[:n], shared.baseline, ks=ks, failed_error=cell.scoring.failed_error,
        num_replicates=like.num_replicates, seed=like.seed, level=level, selection=like.selection,
    )  # fmt: skip


def _pair(a: MeasuredCell, b: MeasuredCell, level: float, memory: dict[Any, stats.FveCurve]) -> Iterator[dict[str, Any]]:
    shared = common_ground([a, b])
    everything = []
    for cell in (a, b):
        name = (cell.run_id, shared.num_activations, a.scoring.num_replicates, a.scoring.seed, a.scoring.selection)
        if name not in memory:
            memory[name] = _curve(cell, shared, range(1, cell.num_draws + 1), a.scoring, level)
        everything.append(memory[name])
    whole_a, whole_b = everything
    count = min(a.num_draws, b.num_draws)
    one, other = (_first(curve, count) for curve in everything)
    difference = stats.paired_difference(one, other, level)
    band = stats.difference_band(one, other, level)
    few = stats.few_subsets(count, one.k)
    same = {
        "cell": a.cell, "label": a.label, "run_id": a.run_id,
        "other_cell": b.cell, "other_label": b.label, "other_run_id": b.run_id,
        "level": level, "num_activations": shared.num_activations, "num_documents": one.num_documents,
        "effective_documents": one.effective_documents,
        "baseline": shared.baseline.value, "baseline_kind": shared.kind,
        "note": shared.note,
    }  # fmt: skip
    length_a, length_b = (float(cell.num_tokens[: shared.num_activations].mean()) for cell in (a, b))
    for i, k in enumerate(one.k.tolist()):
        yield same | _difference_row(difference, i) | {
            "k": k, "own_k": k, "other_k": k, "fve": float(one.fve[i]), "other_fve": float(other.fve[i]),
            "band_low": _known(band[0][i]), "band_high": _known(band[1][i]), "few_subsets": bool(few[i]),
            "tokens": length_a * k, "other_tokens": length_b * k,
        }  # fmt: skip
    k_a, k_b, best = stats.difference_at_own_best(whole_a, whole_b, level)
    yield same | _difference_row(best, 0) | {
        "own_k": k_a, "other_k": k_b, "fve": float(whole_a.fve.max()), "other_fve": float(whole_b.fve.max()),
        "few_subsets": 2 * k_a > a.num_draws > 1 or 2 * k_b > b.num_draws > 1,
        "tokens": length_a * k_a, "other_tokens": length_b * k_b,
    }  # fmt: skip


def _first(curve: stats.FveCurve, count: int) -> stats.FveCurve:
    """The curve up to K = count."""
    cut = {name: getattr(curve, name)[:count] for name in ("k", "fve", "fve_low", "fve_high", "error", "failure_rate")}
    return replace(curve, **cut, fve_over_successes=curve.fve_over_successes[:count], replicates=curve.replicates[:, :count])


def _difference_row(interval: stats.Interval, i: int) -> dict[str, Any]:
    return {
        "difference": float(interval.estimate[i]),
        "difference_low": _known(interval.low[i]),
        "difference_high": _known(interval.high[i]),
    }


def _numbers(curve: stats.FveCurve) -> list[dict[str, Any]]:
    """What every row of a curve has, by the names of the registry."""
    return [
        {
            "k": int(k),
            "fve": float(curve.fve[i]),
            "fve_low": _known(curve.fve_low[i]),
            "fve_high": _known(curve.fve_high[i]),
            "level": curve.level,
            "error": float(curve.error[i]),
            "failure_rate": float(curve.failure_rate[i]),
            "num_activations": curve.num_activations,
            "num_documents": curve.num_documents,
            "effective_documents": curve.effective_documents,
            "num_draws": curve.num_draws,
            "baseline": curve.baseline.value,
            "baseline_kind": curve.baseline.kind,
        }
        for i, k in enumerate(curve.k)
    ]


def _curve_rows(cell: MeasuredCell) -> Iterator[dict[str, Any]]:
    shared = common_ground([cell])
    ks = [k for k in cell.scoring.ks or range(1, cell.num_draws + 1) if k <= cell.num_draws] or [1]
    curve = _curve(cell, shared, ks, cell.scoring, cell.scoring.level)
    low, high = stats.curve_band(curve)
    few, tokens = stats.few_subsets(cell.num_draws, curve.k), stats.tokens_drawn(cell.num_tokens, curve.k)
    best = stats.best_errors(cell.errors, ks, cell.scoring.selection, cell.scoring.failed_error)
    gains = _gains(curve)
    for i, row in enumerate(_numbers(curve)):
        middle = stats.tails(best[:, i], shared.baseline)
        yield row | gains.get(row["k"], _NO_GAIN) | {
            "cell": cell.cell, "label": cell.label, "run_id": cell.run_id, "sweep": cell.sweep, "temperature": cell.temperature,
            "metric": "fve", "baseline_kind": shared.kind, "note": shared.note, "few_subsets": bool(few[i]),
            "band_low": _known(low[i]), "band_high": _known(high[i]),
            "tokens": float(tokens[i]), "fve_median": middle.fve_median, "fve_trimmed": middle.fve_trimmed,
            "worst_share": middle.worst_share,
        }  # fmt: skip


_NO_GAIN = {"gain_per_doubling": None, "gain_low": None, "gain_high": None}


def _gains(curve: stats.FveCurve) -> dict[int, dict[str, float | None]]:
    """Gain of each K over its half."""
    if not {2 * k for k in curve.k.tolist()} & set(curve.k.tolist()):
        return {}
    starts, gain = stats.gain_per_doubling(curve, curve.level)
    return {
        2 * k: {
            "gain_per_doubling": float(gain.estimate[i]),
            "gain_low": _known(gain.low[i]),
            "gain_high": _known(gain.high[i]),
        }
        for i, k in enumerate(starts)
    }


def _group_rows(cell: MeasuredCell, by: Grouping, ks: Sequence[int] | None) -> Iterator[dict[str, Any]]:
    if by not in (*activation_metadata.GROUPINGS, "document"):
        raise RequestError(f"activations are grouped by {', '.join(activation_metadata.GROUPINGS)} or document, not by {by!r}")
    shared = common_ground([cell])
    chosen = sorted({1, cell.num_draws}) if ks is None else [k for k in ks if k <= cell.num_draws]
    known = cell.known(cell.num_activations)
    if known is None and by != "document":
        raise RequestError(
            f"{cell.cell} ran before groups were kept, and its vectors are not at hand: give vector_cache, their directory"
        )
    known = pa.table({"document": pa.array(cell.documents, pa.string())}) if known is None else known
    found = False
    for row in group_rows(cell.errors, known, shared.baseline, cell.scoring, chosen, by):
        found = True
        yield row | {"cell": cell.cell, "label": cell.label, "run_id": cell.run_id, "temperature": cell.temperature}
    if not found:
        raise RequestError(f"no {by} is known of the activations of {cell.label}, so there are no groups")


def _table(rows: Sequence[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows with the columns of a schema; NaN, which SQL would sort above every number, becomes null."""
    return pa.Table.from_pylist([{name: _null(row.get(name)) for name in schema.names} for row in rows], schema=schema)


def _null(value: Any) -> Any:
    return _known(value) if isinstance(value, float) else value


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
