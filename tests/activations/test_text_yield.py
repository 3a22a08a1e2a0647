"""What a plan says a text gives: what the run finds, before any model is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ksweep.activations import ensure, plan_activations, text_yield
from ksweep.utils.errors import DataError
from tests.activations.helpers import passages, spec, write_jsonl

LAYER = 1
RULES: list[dict[str, Any]] = [
    {},
    {"positions_per_document": 3, "min_position": 30},
    {"positions": "all", "min_position": 20},
    {"positions": "stride", "stride": 5},
    {"positions": "last", "min_position": 25, "rows": "random"},
    {"positions": "midpoint", "candidates": "not_padding", "min_position": 60},
]


@pytest.mark.parametrize("rule", RULES)
def test_a_text_gives_as_many_as_its_plan_says(base: Path, text: Path, tmp_path: Path, rule: dict[str, Any]) -> None:
    found = text_yield.text_yield(spec(base, text, 100_000, **rule))
    assert found is not None and found.is_whole and found.rows == 200
    assert len(ensure(spec(base, text, found.activations, **rule), LAYER, tmp_path)) == found.activations
    with pytest.raises(DataError, match=rf"gives {found.activations} \(200 rows, {found.skipped} of them"):
        ensure(spec(base, text, found.activations + 1, **rule), LAYER, tmp_path)


def test_a_text_of_short_documents_is_refused_while_planning(base: Path, tmp_path: Path) -> None:
    texts = ["No."] * 38 + passages(2, low=70, high=80)
    path = write_jsonl(tmp_path / "short.jsonl", texts)
    with pytest.raises(DataError, match=r"gives 2 \(40 rows, 38 of them without an allowed position\)"):
        plan_activations(spec(base, path, 40, min_position=50), LAYER, tmp_path)
    with pytest.raises(DataError, match=r"no row of .* \(38 rows\) has an allowed position: lower activations.min_position"):
        plan_activations(spec(base, write_jsonl(path, texts[:38]), 40, min_position=50), LAYER, tmp_path)


def test_a_plan_reads_no_more_rows_than_it_needs_and_says_what_a_longer_text_gives(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = text_yield.text_yield(spec(base, text, 50))
    assert found is not None and (found.rows, found.activations >= 50) == (64, True)
    monkeypatch.setattr(text_yield, "MOST_ROWS", 64)
    said = plan_activations(spec(base, text, 150), LAYER, tmp_path).text_yield
    assert said == f"{text}: 7 of the first 64 rows have no allowed position; 150 activations need about 168 rows"
    assert plan_activations(spec(base, write_jsonl(tmp_path / "all.jsonl", passages(300)), 150), LAYER, tmp_path).text_yield == ""


def test_a_plan_says_which_texts_it_did_not_count_or_see_the_end_of(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = [{"role": "user", "content": "How long is a piece of string?"}]
    files: dict[str, list[dict[str, Any]]] = {
        "rows of token ids are read by the run": [{"held": [5, 6, 7, 8, 9, 10]}],
        "conversations are written by the run": [{"held": talk}],
        "no readable tokenizer.json": [{"held": "No."}],
    }
    for number, (why, rows) in enumerate(files.items()):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        model = base
        if "tokenizer.json" in why:
            model = Path(shutil.copytree(base, tmp_path / "base"))
            (model / "tokenizer.json").write_text("{}")
        said = plan_activations(spec(model, path, 1500, text_column="held"), LAYER, tmp_path).text_yield
        assert said.startswith(f"{path}: the plan did not count the activations that it gives (") and why in said
        assert "fewer than 1,500" in said
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "endless_rows.py").write_text(
        "def rows():\n    while True:\n        yield 'the river canal lock keeper wrote ' * 4\n"
    )
    for rows, says in (("random", True), ("first", False)):
        endless = spec(base, Path("endless_rows:rows"), 7, rows=rows)
        said = plan_activations(endless, LAYER, tmp_path).text_yield
        assert ("endless_rows:rows: rows=random reads it to its end before the first activation" in said) is says
    of_hub = spec(base, Path("owner/texts"), 7)
    assert (
        text_yield.not_counted(of_hub).startswith("owner/texts: the plan did not count") and text_yield.text_yield(of_hub) is None
    )
