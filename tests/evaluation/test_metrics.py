"""Metrics of draws: hand values of the text metric, what is stored and computed again, and SQL beside Python."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest

from ksweep import connect
from ksweep.evaluation import metrics
from ksweep.evaluation.metrics import TextMetric, compute_metric, metric_keys, metric_named
from ksweep.registry.cell_draws import CellDraws
from ksweep.registry.metric_scores import open_metric, stored_metrics
from ksweep.registry.work_units import WorkUnit
from ksweep.utils.errors import SpecError
from tests.stored_rows import publish_unit, rows_of, write_earlier_part

CONTEXT = "The cat's mat is on THE floor"
TEXTS = [None, "a cat's MAT, a mat", "...", "floor_2 the", "ß", "on the floor"]
NAN = np.nan
# words: a cat's mat a mat -> 3 of 5 distinct, of a, cat's, mat two in the context; "..." has none; floor_2 is one word
EXPECTED = {
    "num_tokens": [NAN, 7, 7, 7, 7, 7],
    "num_words": [NAN, 5, 0, 2, 1, 3],
    "distinct_words": [NAN, 0.6, NAN, 1, 1, 1],
    "context_overlap": [NAN, 2 / 3, NAN, 0.5, 0, 1],
}


def unit_rows(unit: WorkUnit, texts: list[Any] = TEXTS) -> pa.Table:
    n = unit.num_draws
    return rows_of(
        unit, explanation=texts, context=[CONTEXT] * n, num_tokens=[7] * n, document=["d"] * n,
        parse=["ok" if text is not None else "empty" for text in texts], finish=["stop"] * n,
        error=[None if text is None else 0.5 for text in texts], cosine=[0.75] * n,
    )  # fmt: skip


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    """A registry with 2 activations x 3 draws in one part."""
    unit = WorkUnit(0, 2, 0, 3)
    publish_unit(CellDraws(tmp_path, "draws", "ar"), unit, unit_rows(unit))
    return tmp_path


def no_vectors(num: int) -> np.ndarray:
    raise AssertionError("the activations were asked for")


def values_of(registry: Path, grid: tuple[int, int] = (2, 3), draws_key: str = "draws") -> tuple[dict[str, Any], Any]:
    [stored] = stored_metrics(registry, draws_key)
    values, scored = open_metric(registry, stored).values(*grid)
    return {name: array.ravel().tolist() for name, array in values.items()}, scored


def test_text_metric_gives_hand_values_and_nothing_for_a_failed_draw(registry: Path) -> None:
    assert compute_metric(TextMetric(), registry, "draws", (2, 3), no_vectors) == 6
    values, scored = values_of(registry)
    assert scored.all()
    for name, expected in EXPECTED.items():
        np.testing.assert_allclose(values[name], expected, err_msg=name)


def test_computing_again_computes_nothing(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute_metric(TextMetric(), registry, "draws", (2, 3), no_vectors)
    monkeypatch.setattr(TextMetric, "__call__", no_vectors)
    assert compute_metric(TextMetric(), registry, "draws", (2, 3), no_vectors) == 0


def test_more_draws_are_computed_and_earlier_ones_stay(registry: Path) -> None:
    compute_metric(TextMetric(), registry, "draws", (2, 3), no_vectors)
    more = WorkUnit(0, 2, 3, 4)
    publish_unit(CellDraws(registry, "draws", "ar"), more, unit_rows(more, ["one two", None]))
    values, scored = values_of(registry, (2, 4))
    assert scored.tolist() == [[True, True, True, False]] * 2
    assert compute_metric(TextMetric(), registry, "draws", (2, 4), no_vectors) == 2
    values, scored = values_of(registry, (2, 4))
    np.testing.assert_equal(values["num_words"], [NAN, 5, 0, 2, 2, 1, 3, NAN])


def test_scores_of_other_texts_are_not_read_and_are_computed_again(registry: Path) -> None:
    compute_metric(TextMetric(), registry, "draws", (2, 3), no_vectors)
    [part] = (registry / "draws" / "draws").glob("part-*")
    part.unlink()
    unit = WorkUnit(0, 2, 0, 3)
    publish_unit(CellDraws(registry, "draws", "ar"), unit, unit_rows(unit, ["x"] * 6))
    values, scored = values_of(registry)
    assert not scored.any() and np.isnan(values["num_words"]).all()
    assert compute_metric(TextMetric(), registry, "draws", (2, 3), no_vectors) == 6
    assert values_of(registry)[0]["num_words"] == [1] * 6


def test_where_two_parts_hold_a_draw_the_first_counts_in_python_and_in_sql(registry: Path) -> None:
    other = WorkUnit(1, 3, 0, 3)
    publish_unit(CellDraws(registry, "draws", "ar"), other, unit_rows(other, ["one"] * 6))
    compute_metric(TextMetric(), registry, "draws", (3, 3), no_vectors)
    values, _ = values_of(registry, (3, 3))
    np.testing.assert_equal(values["num_words"], [*EXPECTED["num_words"], 1, 1, 1])
    assert_sql_equals_python(registry, (3, 3))


def assert_sql_equals_python(registry: Path, grid: tuple[int, int]) -> None:
    values, _ = values_of(registry, grid)
    with connect(registry) as connection:
        rows = connection.execute(
            "SELECT name, list(value ORDER BY activation, draw) FROM draw_scores WHERE metric = 'text' GROUP BY name"
        ).fetchall()
    assert {name for name, _ in rows} == set(values)
    for name, in_sql in rows:
        np.testing.assert_equal([NAN if value is None else value for value in in_sql], values[name])


@pytest.mark.slow
def test_sql_has_every_score_of_a_draw_and_says_what_it_measures(registry: Path) -> None:
    compute_metric(TextMetric(), registry, "draws", (2, 3), no_vectors)
    assert_sql_equals_python(registry, (2, 3))
    with connect(registry) as connection:
        per_ar = (
            "SELECT metric, name, scores_key, count(value) FROM draw_scores WHERE scores_key IS NOT NULL GROUP BY ALL ORDER BY 2"
        )
        assert connection.execute(per_ar).fetchall() == [
            ("reconstruction", "cosine", "ar", 6),
            ("reconstruction", "error", "ar", 5),
        ]
        about = connection.execute("SELECT name, description, better FROM stored_metrics ORDER BY name").fetchall()
        assert about == sorted((name, *column) for name, column in TextMetric.columns.items())
        for view in ("draw_scores", "stored_metrics"):
            without = f"SELECT column_name FROM duckdb_columns() WHERE table_name = '{view}' AND comment IS NULL"
            assert connection.execute(without).fetchall() == []


def test_draws_of_earlier_versions_have_metrics_too(tmp_path: Path) -> None:
    unit = WorkUnit(0, 2, 0, 3)
    write_earlier_part(tmp_path / "draws" / "earlier", unit_rows(unit))
    assert compute_metric(TextMetric(), tmp_path, "earlier", (2, 3), no_vectors) == 6
    values, _ = values_of(tmp_path, draws_key="earlier")
    np.testing.assert_allclose(values["context_overlap"], EXPECTED["context_overlap"])
    assert compute_metric(TextMetric(), tmp_path, "earlier", (2, 3), no_vectors) == 0


class Counting:
    """A metric of two columns that needs the activations."""

    name = "counting"
    columns: ClassVar = {"draw_number": ("0, 1, ...", "lower"), "first_entry": ("of the activation", "neither")}
    needs_activations = True

    def __init__(self, version: int = 1) -> None:
        self.version = version

    def identity(self) -> dict[str, Any]:
        return {"version": self.version}

    def __call__(self, draws: pa.Table, activations: Any) -> pa.Table:
        assert activations is not None
        first = activations[draws["activation"].to_numpy(), 0]
        return pa.table({"draw_number": pa.array(draws["draw"].to_pylist()), "first_entry": first + self.version})


def test_the_key_that_was_recorded_last_counts(registry: Path) -> None:
    def vectors(num: int) -> np.ndarray:
        return np.arange(num * 2, dtype=np.float32).reshape(num, 2)

    for version in (1, 2):
        assert compute_metric(Counting(version), registry, "draws", (1, 3), vectors) == 6
        assert values_of(registry)[0]["first_entry"][3:] == [2 + version] * 3
    # Asked for the first one again: nothing is computed, and it counts again.
    assert compute_metric(Counting(1), registry, "draws", (2, 3), no_vectors) == 0
    np.testing.assert_equal(values_of(registry)[0], {"draw_number": [NAN, 1, 2, 0, 1, 2], "first_entry": [NAN, 1, 1, 3, 3, 3]})
    with connect(registry) as connection:
        question = "SELECT DISTINCT value FROM draw_scores WHERE name = 'first_entry' AND activation = 1"
        assert connection.execute(question).fetchall() == [(3.0,)]
    assert len(list((registry / "scores" / "draws").iterdir())) == 3


def test_identity_names_the_metric_its_columns_and_its_key(registry: Path) -> None:
    compute_metric(TextMetric(), registry, "draws", (2, 3), no_vectors)
    [key] = metric_keys(["text"]).values()
    content = json.loads((registry / "scores" / "draws" / key / "identity.json").read_text())
    assert content["metric"] == "text" and content["scores"] == {"metric": "text", "version": 1}
    assert content["columns"]["num_words"] == {"description": "words in the explanation", "better": "neither"}


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        (lambda draws: [1.0], "returned list"),
        (
            lambda draws: pa.table({"a": [1.0]}),
            "returned 1 rows of a; expected an Arrow table with a row for each of the 5 draws",
        ),
        (lambda draws: pa.table({"b": [1.0] * 5}), "the columns a"),
        (lambda draws: pa.table({"a": ["many"] * 5}), "column a is no number"),
    ],
)
def test_metric_that_breaks_its_promise_is_refused(registry: Path, returned: Any, reason: str) -> None:
    class Broken(TextMetric):
        columns: ClassVar = {"a": ("a", "lower")}

        def __call__(self, draws: pa.Table, activations: Any) -> pa.Table:
            return returned(draws)

    with pytest.raises(SpecError, match=reason):
        compute_metric(Broken(), registry, "draws", (2, 3), no_vectors)
    assert stored_metrics(registry, "draws") == []


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("reconstruction", "is computed for every cell"),
        ("words", "is not a metric; it takes text"),
        ("no_metrics:Words", "no module 'no_metrics'"),
        ("tests.evaluation.test_metrics:registry", "has no columns"),
        ("tests.evaluation.test_metrics:BadColumns", r"column 'a' is 'lower'; expected"),
        ("tests.evaluation.test_metrics:TakenName", "'text' is taken"),
    ],
)
def test_name_that_is_no_metric_is_refused(source: str, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        metric_named(source)


class BadColumns(Counting):
    columns: ClassVar = {"a": "lower"}


class TakenName(Counting):
    name = "text"


def test_two_metrics_of_one_name_are_refused() -> None:
    assert set(metrics.METRICS) == {"text"}
    with pytest.raises(SpecError, match="two of them have the same name"):
        metric_keys(["tests.evaluation.test_metrics:Counting", "tests.evaluation.test_metrics:SameName"])


class SameName(Counting):
    pass


def test_metric_of_the_page_scores_by_name_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
    [block] = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class Hedges" in block]
    (tmp_path / "hedging.py").write_text(block)
    monkeypatch.syspath_prepend(str(tmp_path))
    unit = WorkUnit(0, 1, 0, 4)
    publish_unit(CellDraws(tmp_path, "draws", "ar"), unit, unit_rows(unit, ["Maybe a cat or a dog", "a cat", "", None]))
    metric = metric_named("hedging:Hedges")
    assert (metric.name, metric.needs_activations) == ("Hedges", False)
    compute_metric(metric, tmp_path, "draws", (1, 4), no_vectors)
    np.testing.assert_allclose(values_of(tmp_path, (1, 4))[0]["share"], [2 / 6, 0, NAN, NAN])
