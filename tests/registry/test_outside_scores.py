"""A judge's scores: exported draws carry their ids, imported rows are matched to them, and what fits no draw is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from ksweep import connect
from ksweep.registry.cell_draws import CellDraws
from ksweep.registry.metric_scores import open_metric, stored_metrics
from ksweep.registry.outside_scores import WantedDraws, export_draws, import_scores, read_scores_file
from ksweep.registry.work_units import WorkUnit
from ksweep.utils.errors import RequestError
from tests.stored_rows import publish_unit, rows_of

TEXTS = ["a", "b", None, "d", "e", "f"]


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    """Two draws keys with 2 activations x 3 draws each, in two parts; draw 2 of activation 0 failed."""
    for key in ("111", "222"):
        for draws in ((0, 2), (2, 3)):
            unit = WorkUnit(0, 2, *draws)
            texts = [TEXTS[a * 3 + d] for a in range(2) for d in range(*draws)]
            publish_unit(CellDraws(tmp_path, key, "ar"), unit, rows_of(unit, explanation=texts, context=["c"] * len(texts)))
    return tmp_path


def wanted(key: str, n: int = 2, d: int = 3, scores_key: str | None = "ar") -> WantedDraws:
    return WantedDraws(draws_key=key, scores_key=scores_key, num_activations=n, num_draws=d)


def judged(registry: Path, **changes: Any) -> pa.Table:
    """What a judge returns for all draws of both keys: the number of the row, from the last to the first."""
    table = export_draws(registry, [wanted("111"), wanted("222")])
    rows = [row | {"score": float(number)} | changes for number, row in enumerate(table.to_pylist())]
    return pa.Table.from_pylist(rows[::-1])


def values_of(registry: Path, key: str, column: str = "score") -> list[float]:
    [stored] = stored_metrics(registry, key)
    return open_metric(registry, stored).values(2, 3)[0][column].ravel().tolist()


def test_export_has_each_draw_with_an_explanation_once_with_its_ids(registry: Path) -> None:
    table = export_draws(registry, [wanted("111", 1), wanted("111", 2, 2, "other"), wanted("222", 1, 1)])
    ids = table.select(["draws_key", "scores_key", "activation", "draw", "explanation"]).to_pylist()
    expected = [
        ("111", 0, 0, "a"),
        ("111", 0, 1, "b"),
        ("111", 1, 0, "d"),
        ("111", 1, 1, "e"),
        ("111", 1, 2, "f"),
        ("222", 0, 0, "a"),
    ]
    assert [(r["draws_key"], r["activation"], r["draw"], r["explanation"]) for r in ids] == expected
    assert {r["scores_key"] for r in ids} == {"ar"} and set(table["context"].to_pylist()) == {"c"}


def test_scores_come_back_to_their_draws_in_python_and_in_sql(registry: Path) -> None:
    done = import_scores(registry, judged(registry), "judge", better="higher")
    assert (done.num_scores, done.num_draws, done.left_out, done.replaced) == (10, 10, {}, ())
    np.testing.assert_equal(values_of(registry, "111"), [0, 1, np.nan, 2, 3, 4])
    np.testing.assert_equal(values_of(registry, "222"), [5, 6, np.nan, 7, 8, 9])
    with connect(registry) as connection:
        question = "SELECT name, value FROM draw_scores WHERE metric = 'judge' AND draws_key = '222' ORDER BY activation, draw"
        assert connection.execute(question).fetchall() == [("score", v) for v in (5, 6, None, 7, 8, 9)]
        assert connection.execute("SELECT DISTINCT better FROM stored_metrics").fetchall() == [("higher",)]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_files_of_every_type_are_read_alike(registry: Path, tmp_path: Path, suffix: str) -> None:
    table, path = judged(registry).select(["draws_key", "activation", "draw", "score"]), tmp_path / f"scores.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    elif suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, table.to_pylist())))
    else:
        pyarrow.csv.write_csv(table, path)
    assert import_scores(registry, read_scores_file(path), "judge", better="neither").num_scores == 10
    np.testing.assert_equal(values_of(registry, "111"), [0, 1, np.nan, 2, 3, 4])


def test_the_same_scores_again_change_nothing_and_other_ones_count_from_then_on(registry: Path) -> None:
    first = judged(registry)
    second = first.set_column(first.column_names.index("score"), "score", pa.array([-1.0] * 10))
    for scores, replaced, value in ((first, (), 0), (first, (), 0), (second, ("111", "222"), -1), (first, ("111", "222"), 0)):
        done = import_scores(registry, scores, "judge", better="higher")
        assert set(done.replaced) == set(replaced)
        assert values_of(registry, "111")[0] == value
    assert len(list((registry / "scores" / "111").glob("*/metric-*"))) == 2 * 2


def test_rows_that_fit_no_draw_are_counted_by_reason_and_left_out(registry: Path) -> None:
    rows = judged(registry).to_pylist()
    rows[0] |= {"explanation": "another text"}
    rows[1] |= {"score": None}
    extra = [{"draws_key": "333"}, {"draw": 2, "activation": 0}, {"draw": 99}, {"draws_key": None}]
    table = pa.Table.from_pylist(rows + [rows[-1] | change for change in extra] + [rows[-1]])
    done = import_scores(registry, table, "judge", better="higher")
    assert done.left_out == {
        "without a score": 1, "of draws that are not in this registry": 2,
        "of draws that are not stored or have no explanation": 2, "of another text than the stored one": 1,
    }  # fmt: skip
    assert done.num_scores == 8 and done.num_draws == 10
    np.testing.assert_equal(values_of(registry, "222"), [5, 6, np.nan, 7, np.nan, np.nan])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"score": "good"}, "no number.*good"),
        ({"score": float("inf")}, "10 scores are infinite"),
        ({"draws_key": "333"}, "no row of the scores is of a draw.*10 of draws that are not in this registry"),
        ({"activation": 1, "draw": 1, "explanation": "e"}, "draw 1 of activation 1 .* has two scores, 9 and 8"),
        ({"draw": 0.5}, "no number"),
    ],
)
def test_scores_that_cannot_be_used_are_refused_and_nothing_is_stored(
    registry: Path, change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RequestError, match=reason):
        import_scores(registry, judged(registry, **change), "judge", better="higher")
    assert stored_metrics(registry, "111") == []


def test_missing_columns_bad_names_and_other_files_are_refused(registry: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no column mark; they have .*score"):
        import_scores(registry, judged(registry), "judge", column="mark", better="higher")
    for name in ("reconstruction", "my judge", "a.b"):
        with pytest.raises(RequestError, match="cannot be called"):
            import_scores(registry, judged(registry), name, better="higher")
    for file in ("scores.xlsx", "missing.parquet"):
        with pytest.raises(RequestError, match=file):
            read_scores_file(tmp_path / file)
