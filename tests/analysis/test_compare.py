"""Cells compared from what a real sweep of a tiny pair has left, against brute force over its draws."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ksweep import Cell, Resources, Sweep, replace_at
from ksweep.analysis.compare import MeasuredCell, best_held_out, compare, curves_of_cells, groups_of_cells, load_cells
from ksweep.registry.activation_metadata import position_bucket
from ksweep.stats import between_documents_baseline, effective_documents, interval_reach
from ksweep.stats.bootstrap import document_weights
from ksweep.utils.errors import RequestError
from tests.tiny_sweeps import ask, run, talking_pair, tiny_cell

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Greedy, and three temperatures with 8 draws of 40 activations; the hottest also over the first 24, and over others."""
    folder = tmp_path_factory.mktemp("tiny")
    cell = tiny_cell(talking_pair(folder, 40), num_replicates=300)
    plain = Sweep(
        name="temps", cell=cell, axes={"sampling.temperature": (0.0, 0.5, 0.9, 1.3)}, registry=str(folder / "registry"),
        vector_cache=str(folder / "vectors"), resources=Resources(cluster="inprocess", gpus=0),
    )  # fmt: skip
    assert run(plain) == 0
    for name, path, value in (
        ("fewer", "activations.num_activations", 24),
        ("others", "activations.min_position", 12),
        ("stated", "scoring.baseline", 0.9),
    ):
        hot = replace_at(replace_at(cell, "sampling.temperature", 1.3), path, value)
        assert run(replace(plain, name=name, cell=hot, axes={})) == 0
    return plain


def cells_of(sweep: Sweep, *names: str) -> list[MeasuredCell]:
    return load_cells(sweep.registry, names or ["temps"])


def best_of_all(cell: MeasuredCell) -> np.ndarray:
    """The smallest error of each activation; 2 where every draw failed."""
    return np.array([min([e for e in errors if e == e], default=2.0) for errors in cell.errors.tolist()])


def row_at(table: pa.Table, **wanted: Any) -> dict[str, Any]:
    (row,) = [r for r in table.to_pylist() if all(r[name] == value for name, value in wanted.items())]
    return row


def test_curves_of_cells_repeat_what_the_runs_landed(sweep: Sweep) -> None:
    found = curves_of_cells(cells_of(sweep)).to_pylist()
    landed = ask(
        sweep, "SELECT run_id, k, fve, fve_low, fve_high, error, baseline FROM curves WHERE sweep = 'temps' ORDER BY run_id, k"
    )
    found = sorted(found, key=lambda r: (r["run_id"], r["k"]))
    assert [(r["run_id"], r["k"]) for r in found] == [row[:2] for row in landed]
    numbers = [[r[name] for name in ("fve", "fve_low", "fve_high", "error", "baseline")] for r in found]
    np.testing.assert_allclose(np.array(numbers, dtype=float), np.array([row[2:] for row in landed], dtype=float), rtol=1e-9)
    assert all(r["band_low"] < r["fve"] < r["band_high"] for r in found)


def test_curves_of_cells_state_gain_tokens_tails_and_few_subsets(sweep: Sweep) -> None:
    (cell,) = [c for c in cells_of(sweep) if c.temperature == 0.9]
    table = curves_of_cells([cell])
    by_k = {r["k"]: r for r in table.to_pylist()}
    assert by_k[8]["gain_per_doubling"] == pytest.approx(by_k[8]["fve"] - by_k[4]["fve"])
    assert by_k[8]["gain_low"] < by_k[8]["gain_per_doubling"] < by_k[8]["gain_high"]
    assert by_k[7]["gain_per_doubling"] is None
    assert by_k[4]["tokens"] == pytest.approx(4 * cell.num_tokens.mean())
    assert [by_k[k]["few_subsets"] for k in (4, 5)] == [False, True]
    best = best_of_all(cell)
    assert by_k[8]["fve_median"] == pytest.approx(1 - np.median(best) / by_k[8]["baseline"])
    assert by_k[8]["worst_share"] == pytest.approx(best.max() / best.sum())


def test_compare_equals_brute_force_over_the_draws(sweep: Sweep) -> None:
    cells = cells_of(sweep)
    cold, hot = cells[1], cells[3]
    row = row_at(compare([cold, hot]), k=8)
    best = [best_of_all(cell) for cell in (cold, hot)]
    known = cold.metadata(40)
    assert known is not None
    distances = known["between"].to_numpy()
    names, membership = np.unique(cold.documents.astype(str), return_inverse=True)
    weights = document_weights(len(names), 300, 0)[:, membership]
    replicates = (weights @ best[1] - weights @ best[0]) / (weights @ distances)
    assert row["difference"] == pytest.approx((best[1] - best[0]).sum() / distances.sum())
    assert row["difference"] == pytest.approx(row["fve"] - row["other_fve"])
    reach = interval_reach(effective_documents(cold.documents), 0.95)
    below, above = np.quantile(replicates, [0.025, 0.975])
    middle, half = row["difference"] + 1.5 * ((below + above) / 2 - row["difference"]), reach * (above - below) / 2
    ends = [middle - half, middle + half]
    np.testing.assert_allclose([row["difference_low"], row["difference_high"]], ends, atol=1e-6)
    assert row["band_low"] < row["difference"] < row["band_high"]
    assert (row["num_activations"], row["num_documents"], row["baseline_kind"]) == (40, 7, "between documents")


def test_compare_gives_every_pair_every_common_k_and_each_at_its_own_best(sweep: Sweep) -> None:
    table = compare(cells_of(sweep))
    assert len(table) == 3 * (1 + 1) + 3 * (8 + 1)  # greedy has one draw
    greedy, cold, *_ = (c.label for c in cells_of(sweep))
    own_best = row_at(table, k=None, label=greedy, other_label=cold)
    assert (own_best["own_k"], own_best["other_k"]) == (1, 8)
    assert own_best["difference"] == pytest.approx(own_best["fve"] - own_best["other_fve"])
    assert own_best["few_subsets"] and own_best["other_tokens"] > own_best["tokens"]


def test_compare_with_a_reference_takes_it_from_every_other_cell(sweep: Sweep) -> None:
    cells = cells_of(sweep)
    table = compare(cells, reference=cells[1].label)
    assert set(table["other_label"].to_pylist()) == {cells[1].label}
    assert set(table["label"].to_pylist()) == {c.label for c in cells} - {cells[1].label}
    with pytest.raises(RequestError, match="0 of these cells are called 'T=2'"):
        compare(cells, reference="T=2")


def test_compare_of_cells_of_two_sizes_is_over_the_activations_that_both_have(sweep: Sweep) -> None:
    (cold,) = [c for c in cells_of(sweep) if c.temperature == 0.5]
    (fewer,) = cells_of(sweep, "fewer")
    row = row_at(compare([cold, fewer]), k=1)
    known = fewer.metadata(24)
    assert known is not None
    errors = [np.where(np.isnan(c.errors[:24]), 2.0, c.errors[:24]).mean(axis=1) for c in (cold, fewer)]
    assert row["num_activations"] == 24
    assert row["difference"] == pytest.approx((errors[1] - errors[0]).sum() / known["between"].to_numpy().sum())


def test_compare_refuses_other_activations_and_other_baselines(sweep: Sweep) -> None:
    (hot,) = [c for c in cells_of(sweep) if c.temperature == 1.3]
    with pytest.raises(RequestError, match="different activations"):
        compare([hot, *cells_of(sweep, "others")])
    with pytest.raises(RequestError, match=r"scoring\.baseline=between documents and .* 0\.9"):
        compare([hot, *cells_of(sweep, "stated")])
    with pytest.raises(RequestError, match="needs two cells"):
        compare([hot])


def test_compare_of_cells_with_a_stated_baseline_divides_by_it(sweep: Sweep) -> None:
    (stated,) = cells_of(sweep, "stated")
    other = replace(stated, run_id="again", label="again")
    row = row_at(compare([stated, other]), k=2)
    assert (row["difference"], row["baseline"], row["baseline_kind"]) == (0, 0.9, "stated constant")


def test_runs_of_before_distances_were_kept_say_so_or_take_them_from_the_vectors(sweep: Sweep, tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    shutil.copytree(sweep.registry, registry)
    shutil.rmtree(registry / "activations")
    whole = compare(cells_of(sweep))
    without = compare(load_cells(registry, ["temps"]))
    np.testing.assert_allclose(whole["difference"].to_numpy(), without["difference"].to_numpy(), rtol=1e-9)
    assert "treat the baseline as a constant" in without["note"][0].as_py() and whole["note"][0].as_py() is None
    from_vectors = compare(load_cells(registry, ["temps"], vector_cache=sweep.vector_cache))
    assert from_vectors.drop_columns(["note"]) == whole.drop_columns(["note"])
    with pytest.raises(RequestError, match="give vector_cache"):
        groups_of_cells(load_cells(registry, ["temps"]), "norm")


def test_best_held_out_names_a_cell_for_each_k_and_promises_less_than_the_maximum(sweep: Sweep) -> None:
    cells = cells_of(sweep)
    table = best_held_out(cells)
    assert table["k"].to_pylist() == [1, 2, 4, 8]
    assert table["num_cells"].to_pylist() == [4, 3, 3, 3]
    curves = curves_of_cells(cells).to_pylist()
    for row in table.to_pylist():
        at_k = {r["label"]: r["fve"] for r in curves if r["k"] == row["k"]}
        assert at_k[row["best"]] == pytest.approx(max(at_k.values())) == pytest.approx(row["naive_fve"])
        assert {row["chosen_on_first_half"], row["chosen_on_second_half"]} <= set(at_k)
        assert row["fve"] <= row["naive_fve"] + 1e-12
    with pytest.raises(RequestError, match="fewer than two of these cells have 16 draws"):
        best_held_out(cells, ks=[16])


def test_groups_of_cells_average_to_the_cell_and_give_both_baselines(sweep: Sweep) -> None:
    (cell,) = [c for c in cells_of(sweep) if c.temperature == 0.9]
    rows = groups_of_cells([cell], "norm").to_pylist()
    assert {(r["part"], r["against"], r["k"]) for r in rows} == {
        (f"quarter {q} of 4", against, k) for q in (1, 2, 3, 4) for against in ("own", "overall") for k in (1, 8)
    }
    overall = [r for r in rows if r["against"] == "overall" and r["k"] == 8]
    whole = row_at(curves_of_cells([cell]), k=8)
    assert np.average([r["fve"] for r in overall], weights=[r["num_activations"] for r in overall]) == pytest.approx(whole["fve"])
    documents = groups_of_cells([cell], "document", ks=[1]).to_pylist()
    assert len(documents) == 7 and {r["against"] for r in documents} == {"overall"}
    assert all(r["fve_low"] is None for r in documents)  # one cluster says nothing of its spread
    roles = groups_of_cells([cell], "role", ks=[1])["part"].to_pylist()
    assert roles and set(roles) <= {"user", "assistant", "system", "special", "other"}
    with pytest.raises(RequestError, match="grouped by role, position, norm or document, not by 'colour'"):
        groups_of_cells([cell], "colour")  # type: ignore[arg-type]


def test_groups_of_cells_own_baseline_is_that_of_the_group_alone(sweep: Sweep) -> None:
    from ksweep.activations.store import ActivationStore

    (cell,) = [c for c in cells_of(sweep) if c.temperature == 0.9]
    table = ActivationStore(sweep.vector_cache, cell.activations_key, {}).open(40)
    vectors, documents = table.vectors(), table.column("document")
    norms = np.linalg.norm(vectors, axis=1)
    lowest = norms <= np.quantile(norms, 0.25)
    row = row_at(groups_of_cells([cell], "norm", ks=[1]), part="quarter 1 of 4", against="own")
    assert row["baseline"] == pytest.approx(between_documents_baseline(vectors[lowest], documents[lowest]).value)
    assert row["num_activations"] == lowest.sum() == 10


def test_evaluated_activations_are_kept_once_and_average_to_the_baseline(sweep: Sweep) -> None:
    files = sorted(Path(sweep.registry, "activations").glob("*/*.parquet"))
    assert [f.name for f in files].count("normalised-40.parquet") == 2  # temps and others; fewer has 24
    key = cells_of(sweep)[0].activations_key
    table = pq.read_table(Path(sweep.registry, "activations", key, "normalised-40.parquet"))
    ((baseline,),) = ask(sweep, "SELECT DISTINCT baseline FROM curves WHERE sweep = 'temps'")
    assert np.mean(table["between"].to_numpy()) == pytest.approx(baseline, rel=1e-9)
    ((from_mean,),) = ask(sweep, "SELECT DISTINCT baseline_from_mean FROM curves WHERE sweep = 'temps'")
    assert np.mean(table["distance"].to_numpy()) == pytest.approx(from_mean, rel=1e-9)
    assert set(table["position_bucket"].to_pylist()) == {position_bucket(p) for p in table["position"].to_pylist()}


@pytest.mark.parametrize(
    ("position", "bucket"),
    [(0, "0 to 31"), (31, "0 to 31"), (32, "32 to 63"), (1023, "512 to 1023"), (9999, "1024 and later")],
)
def test_position_buckets_are_named_after_their_ends(position: int, bucket: str) -> None:
    assert position_bucket(position) == bucket


def test_load_cells_takes_labels_sweeps_and_runs_and_refuses_the_unknown(sweep: Sweep) -> None:
    cells = cells_of(sweep)
    assert [c.temperature for c in cells] == [0.0, 0.5, 0.9, 1.3]
    assert [c.run_id for c in cells_of(sweep, cells[2].run_id, cells[0].cell)] == [cells[2].run_id, cells[0].run_id]
    assert len(load_cells(sweep.registry)) == 7
    labels = [c.label for c in load_cells(sweep.registry)]
    assert len(set(labels)) == 7, "cells of several sweeps are told apart"
    with pytest.raises(RequestError, match="no finished run, cell, label or sweep 'nothing'"):
        cells_of(sweep, "nothing")


def test_missing_draws_say_where_they_were_looked_for(sweep: Sweep, tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    shutil.copytree(sweep.registry, registry)
    cells = load_cells(registry, ["temps"])
    for part in (registry / "draws" / cells[1].draws_key).glob("part-*"):
        part.unlink()
    with pytest.raises(RequestError, match=r"draws of .* are missing in"):
        compare(cells)


def test_a_cell_of_ks_that_are_not_all_is_compared_at_every_k(sweep: Sweep) -> None:
    cell: Cell = sweep.cell
    some = replace(sweep, name="some", cell=replace_at(cell, "scoring.ks", (1, 8)), axes={"sampling.temperature": (0.5, 0.9)})
    assert run(some) == 0
    assert compare(cells_of(sweep, "some"))["k"].to_pylist() == [1, 2, 3, 4, 5, 6, 7, 8, None]
    assert set(curves_of_cells(cells_of(sweep, "some"))["k"].to_pylist()) == {1, 8}
