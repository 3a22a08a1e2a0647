"""What the launcher asks the registry before and after a sweep."""

from __future__ import annotations

from pathlib import Path

import pytest

from ksweep.registry.query import controls_of, curves_of, finished_runs, run_query, seconds_per_draw
from ksweep.registry.run_record import write_run
from ksweep.utils.errors import RequestError
from tests.registry.landed_runs import controls_of as landed_controls
from tests.registry.landed_runs import curve_of, record_of


def keys_of(*temperatures: float) -> list[str]:
    return [record_of("x", temperature=t).cell_key for t in temperatures]


def land_three(root: Path) -> None:
    for i, temperature in enumerate((0.4, 0.7, 1.0)):
        write_run(root, record_of(f"r{i}", temperature=temperature), curve_of(0.3 + 0.1 * i), landed_controls())


@pytest.mark.slow
def test_finished_runs_name_the_newest_and_are_empty_without_a_registry(root: Path, tmp_path: Path) -> None:
    assert finished_runs(tmp_path / "nowhere") == {} == finished_runs(root)
    write_run(root, record_of("old", minutes=0), curve_of())
    write_run(root, record_of("new", minutes=5), curve_of())
    write_run(root, record_of("failed", minutes=9, status="failed", error_type="RunError", error_message="x"))
    assert finished_runs(root) == {record_of("x").cell_key: "new"}


def test_seconds_per_draw_counts_drawing_on_all_ranks_of_a_run_that_sampled(root: Path, tmp_path: Path) -> None:
    assert seconds_per_draw(tmp_path / "nowhere", "demo/av") is None
    facts = {"num_ranks": 2, "num_draws_sampled": 400, "seconds": {"drawing": 100.0, "loading": 50.0}}
    write_run(root, record_of("r1", **facts), curve_of())
    write_run(root, record_of("r2", minutes=5, **(facts | {"num_draws_sampled": 0, "num_draws_reused": 400})), curve_of())
    assert seconds_per_draw(root, "demo/av") == 0.5  # 100 s x 2 ranks / 400
    assert seconds_per_draw(root, "other/av") is None


def test_curves_of_keeps_the_order_asked_for_and_renames(root: Path) -> None:
    land_three(root)
    table = curves_of(root, dict(zip(keys_of(1.0, 0.4), ("hot", "cold"), strict=True)))
    assert [(r["label"], r["k"]) for r in table.to_pylist()] == [(label, k) for label in ("hot", "cold") for k in (1, 2, 3, 4)]
    assert {"temperature", "shuffled_fve", "failure_rate", "tokens_per_second", "level"} <= set(table.column_names)


def test_controls_of_keeps_the_order_asked_for(root: Path) -> None:
    land_three(root)
    table = controls_of(root, dict(zip(keys_of(1.0, 0.4), ("hot", "cold"), strict=True)))
    names = ("empty_text", "mean_vector", "retrieval_top1")
    assert [(r["label"], r["control"]) for r in table.to_pylist()] == [
        (label, name) for label in ("hot", "cold") for name in names
    ]


def test_ask_answers_sql_and_names_a_mistake(root: Path) -> None:
    land_three(root)
    assert run_query(root, "select count(*) as n from v_latest").to_pylist() == [{"n": 3}]
    with pytest.raises(RequestError, match=r"DuckDB does not accept that.*curvs"):
        run_query(root, "select * from curvs")
