"""Rows by seed: a sample of the text that grows, and whose order depends on nothing but the rows themselves."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ksweep.activations import datasets, ensure, row_order
from ksweep.activations.datasets import HubDataset, read_documents
from ksweep.activations.row_order import ordered_rows
from ksweep.config.spec import Activations, cell_from_dict
from tests.activations.helpers import passages, spec, write_jsonl

LAYER = 1


def request(path: Path, **fields: object) -> Activations:
    return Activations(model="unused", text=str(path), **fields)  # type: ignore[arg-type]


def ids(activations: Activations) -> list[str]:
    return [row.row_id for row in ordered_rows(activations)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    texts = passages(60, low=3, high=8)
    return write_jsonl(tmp_path / "rows.jsonl", texts, document=[f"d{i // 4}" for i in range(60)])


def test_rows_in_random_order_are_all_rows_once_and_rows_first_are_those_of_the_text(rows: Path) -> None:
    in_text = [row.row_id for row in read_documents(request(rows))]
    assert ids(request(rows, rows="first")) == in_text
    assert sorted(ids(request(rows))) == sorted(in_text) and ids(request(rows)) != in_text


def test_each_row_comes_first_under_as_many_seeds_as_any_other(rows: Path) -> None:
    """Six documents of unequal size: a row's chance does not depend on how many rows its document has."""
    lines = rows.read_text().splitlines()[:10]
    rows.write_text("\n".join(lines))
    first = Counter(next(ordered_rows(request(rows, seed=seed))).index for seed in range(500))
    chi_squared = sum((first[i] - 50) ** 2 / 50 for i in range(10))
    assert chi_squared < 27.9  # 99.9 % quantile for 9 degrees of freedom


def test_rows_that_are_appended_leave_the_order_of_the_others(rows: Path) -> None:
    before = ids(request(rows))
    with rows.open("a") as file:
        file.writelines(f'\n{{"text": "another row {i}"}}' for i in range(30))
    after = ids(request(rows))
    assert len(after) == 90 and [name for name in after if name in set(before)] == before


def test_windows_of_a_few_rows_give_the_same_order(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(ordered_rows(request(rows)))
    monkeypatch.setattr(row_order, "WINDOW_ROWS", 7)
    assert list(ordered_rows(request(rows))) == whole


def test_a_stream_from_the_hub_is_put_in_order_pool_by_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "hub_dataset", lambda source: HubDataset("owner/corpus", None, "0" * 40))
    monkeypatch.setattr(datasets, "_hub_rows", lambda hub, activations: ({"text": f"words {i}"} for i in range(25)))
    monkeypatch.setattr(row_order, "POOL_ROWS", 10)
    pools = [row.index for row in ordered_rows(request(Path("owner/corpus")))]
    assert [sorted(pools[i : i + 10]) for i in (0, 10, 20)] == [[*range(10)], [*range(10, 20)], [*range(20, 25)]]
    assert pools != sorted(pools)


@pytest.mark.slow
def test_more_activations_keep_the_first_and_all_are_those_of_rows_first(base: Path, text: Path, tmp_path: Path) -> None:
    few, more = (ensure(spec(base, text, n, rows="random"), LAYER, tmp_path / "cache") for n in (30, 100))
    whole, first = (ensure(spec(base, text, 180, rows=rule), LAYER, tmp_path / "cache") for rule in ("random", "first"))
    assert few.key == more.key == whole.key != first.key
    assert np.array_equal(more.vectors()[:30], few.vectors())
    places = [list(zip(t.column("row_id"), t.column("position"), strict=True)) for t in (whole, first)]
    assert sorted(places[0]) == sorted(places[1]) and places[0] != places[1]
    assert few.num_documents() > 20  # of 67; the first 30 activations are of 12
    where = {place: i for i, place in enumerate(places[1])}
    assert np.allclose(whole.vectors(), first.vectors()[[where[place] for place in places[0]]], atol=1e-5)


def test_cells_of_earlier_versions_keep_their_first_rows() -> None:
    from dataclasses import asdict

    from ksweep import Autoencoder, Cell

    cell = Cell(autoencoder=Autoencoder(av="av", ar="ar"), activations=Activations(model="m", text="t.txt"))
    stored = asdict(cell)
    assert cell_from_dict(stored) == cell
    del stored["activations"]["rows"]
    assert cell_from_dict(stored) == replace(cell, activations=replace(cell.activations, rows="first"))
