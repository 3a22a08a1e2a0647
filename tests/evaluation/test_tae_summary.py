"""The reference's quantities from a draws store, cut in whatever way, against those of all draws at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ksweep.evaluation import tae_summary
from ksweep.evaluation.tae_summary import StoredDraws, reference_quantities
from ksweep.registry.cell_draws import CellDraws
from ksweep.stats.tae_metrics import ReferenceSums, reference_intervals, reference_rows, selected
from tests.stored_rows import publish_unit, rows_of

N, NUM_DRAWS, D = 70, 9, 5
KS = (1, 2, 5, 9)
ROLES = ["user"] * 30 + ["assistant"] * 20 + [None] * 8 + ["other"] * 12


def stored(folder: Path, lacking: frozenset[tuple[int, int]] = frozenset()) -> tuple[StoredDraws, np.ndarray]:
    """A store that grew from 4 draws, with every reconstruction but those lacking; and the reconstructions."""
    rng = np.random.default_rng(3)
    activations = (rng.normal(size=(N, D)) * 2 + 1).astype(np.float32)
    made = (activations[:, None] + rng.normal(size=(N, NUM_DRAWS, D)) + 0.4).astype(np.float32)
    errors = np.square(made.astype(np.float64) - activations[:, None]).mean(axis=2)
    store = CellDraws(folder, "draws", "scores")
    for num_draws in (4, NUM_DRAWS):
        for unit in store.draws.missing(N, num_draws):
            pairs = [(a, k) for a in range(unit.first_row, unit.last_row) for k in range(unit.first_draw, unit.last_draw)]
            kept = [None if pair in lacking else made[pair].tolist() for pair in pairs]
            publish_unit(store, unit, rows_of(unit, reconstruction=kept))
    return StoredDraws(store=store, activations=activations, errors=errors, roles=ROLES), made


def at_once(draws: StoredDraws, made: np.ndarray, num_replicates: int = 0) -> list[dict[str, Any]]:
    chunk = selected(draws.activations, made, KS, "prefix", draws.roles)
    sums = ReferenceSums(KS)
    sums.add(chunk)
    return reference_rows(sums, reference_intervals(sums, [chunk], num_replicates=num_replicates) if num_replicates else None)


def by_name(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, Any]]:
    return {
        (row["quantity"], row["role"], row["k"]): {n: v for n, v in row.items() if n not in ("quantity", "role", "k")}
        for row in rows
    }


@pytest.mark.parametrize(("chunk_values", "replicate_values"), [(2**24, 2**26), (4 * D * 7, 30 * D * 3), (1, 1)])
def test_quantities_do_not_depend_on_how_activations_and_ks_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_values: int, replicate_values: int
) -> None:
    monkeypatch.setattr(tae_summary, "CHUNK_VALUES", chunk_values)
    monkeypatch.setattr(tae_summary, "REPLICATE_VALUES", replicate_values)
    draws, made = stored(tmp_path)
    for num_replicates in (0, 30):
        found = reference_quantities(draws, KS, num_replicates)
        rows, expected = by_name(found.rows), by_name(at_once(draws, made, num_replicates))
        assert found.notes == () and rows.keys() == expected.keys()
        assert {role for _, role, _ in rows} == {None, "user", "assistant", "other"}
        for name, row in expected.items():
            assert rows[name] == pytest.approx(row, rel=1e-9, abs=1e-12)


def test_one_lacking_reconstruction_leaves_unknown_what_needs_it_and_no_more(tmp_path: Path) -> None:
    draws, made = stored(tmp_path)
    winner = (3, int(draws.errors[3].argmin()))  # of a user's token
    draws, _ = stored(tmp_path / "lacking", frozenset({winner}))
    found = reference_quantities(draws, KS, 30)
    whole, rows = by_name(at_once(draws, made)), by_name(found.rows)
    gone = whole.keys() - rows.keys()
    assert gone == {(q, role, k) for q in ("variance_recovery", "residual_variance") for role in (None, "user") for k in KS}
    for name, row in rows.items():
        assert row == pytest.approx(whole[name], rel=1e-9)
    first, _ = found.notes
    assert "of 1 of 70 activations" in first.text and str(draws.store.scores.path) in first.text
    kept_unneeded, _ = stored(tmp_path / "unneeded", frozenset({(3, int(draws.errors[3].argmax()))}) - {(3, 0)})
    assert reference_quantities(kept_unneeded, KS[-1:]).notes == ()


def test_intervals_of_two_activations_are_unknown_and_said_so(tmp_path: Path) -> None:
    draws, _ = stored(tmp_path)
    few = StoredDraws(store=draws.store, activations=draws.activations[:2], errors=draws.errors[:2], roles=ROLES[:2])
    found = reference_quantities(few, KS, 30)
    assert any(row["quantity"] == "variance_recovery" for row in found.rows) and not any("low" in row for row in found.rows)
    assert "at least 3" in found.notes[0].text


def test_failed_draws_leave_everything_unknown(tmp_path: Path) -> None:
    draws, _ = stored(tmp_path)
    errors = draws.errors.copy()
    errors[0, 0] = np.nan
    found = reference_quantities(StoredDraws(store=draws.store, activations=draws.activations, errors=errors), KS)
    assert found.rows == [] and "1 draws have no finite error" in found.notes[0].text
