"""Parts that a user wrote: the example of docs/extending.md runs as it stands; what cannot be used is refused with the reason."""

from __future__ import annotations

import importlib
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ksweep import Activations, Autoencoder, Cell, Resources, Sweep
from ksweep.activations.group_columns import group_values
from ksweep.activations.store import ActivationStore
from ksweep.config.spec import PromptingOverrides, Scoring, replace_at
from ksweep.evaluation.identity import cell_keys
from ksweep.utils.errors import DataError, RequestError, SpecError
from tests.activations.helpers import random_vectors, write_vectors
from tests.tiny_models import TinyPair
from tests.tiny_sweeps import ask, run, talking_pair, tiny_cell

ROOT = Path(__file__).parents[2]
EXAMPLE = "\n\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    return talking_pair(tmp_path_factory.mktemp("pair"), 60)


@pytest.fixture
def parts(pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example as my_parts.py, in the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("MY_MODEL", str(pair.base))
    (tmp_path / "my_parts.py").write_text(EXAMPLE)
    reload()
    return tmp_path / "my_parts.py"


def reload() -> None:
    sys.modules.pop("my_parts", None)
    importlib.invalidate_caches()


def sweep(pair: TinyPair, folder: Path, av: str, ar: str, text: str | None = None, **scoring: Any) -> Sweep:
    cell = tiny_cell(pair, num_replicates=20)
    cell = replace(
        cell,
        autoencoder=Autoencoder(av=av, ar=ar, dtype="float32"),
        activations=replace(cell.activations, text=text or cell.activations.text),
        sampling=replace(cell.sampling, num_draws=2, max_new_tokens=12),
        scoring=replace(cell.scoring, **scoring),
    )
    return Sweep(
        name="own", cell=cell, resources=Resources(cluster="inprocess", gpus=0), registry=str(folder / "registry"),
        vector_cache=str(folder / "vector_cache"),
    )  # fmt: skip


def test_example_is_short() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
    assert all(len(block.splitlines()) <= 36 for block in blocks)


@pytest.mark.slow
def test_own_av_ar_text_and_groups_run_end_to_end(pair: TinyPair, parts: Path, tmp_path: Path) -> None:
    own = sweep(pair, tmp_path, "my_parts:FirstInputAv", "my_parts:WordsAr", "my_parts:rows", groups=("language",))
    assert run(own) == 0
    assert ask(own, "select status, layer, av, ar, text_source, num_activations from runs") == [
        ("finished", 1, "my_parts:FirstInputAv", "my_parts:WordsAr", "my_parts:rows", 40)
    ]
    groups = ask(
        own, "select part, against, num_activations, baseline from metrics where breakdown = 'language' and k = 2 order by all"
    )
    assert [row[:2] for row in groups] == [("en", "overall"), ("en", "own"), ("fr", "overall"), ("fr", "own")]
    assert groups[0][2] + groups[2][2] == 40
    check_errors(own)


def check_errors(own: Sweep) -> None:
    """The error of each draw is 2 (1 - cosine) between the sum of its words' directions and its activation."""
    words = importlib.import_module("my_parts").WordsAr("float32", ("cpu",))
    [(key,)] = ask(own, "select activations_key from runs")
    vectors = ActivationStore(own.vector_cache, key, {}).open(40).vectors(0, 40)
    draws = ask(own, "select activation, explanation, error from draws where error is not null")
    assert draws
    for activation, text, error in draws:
        made = sum(words.direction(word) for word in text.split()).double().numpy()
        cosine = made @ vectors[activation] / np.linalg.norm(made) / np.linalg.norm(vectors[activation])
        assert error == pytest.approx(2 * (1 - cosine), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("own_half", ["av", "ar"])
def test_own_half_beside_a_checkpoint(pair: TinyPair, parts: Path, tmp_path: Path, own_half: str) -> None:
    names = {"av": "my_parts:FirstInputAv", "ar": "my_parts:WordsAr"}
    halves = {"av": str(pair.av), "ar": str(pair.ar)} | {own_half: names[own_half]}
    mixed = sweep(pair, tmp_path, **halves)
    assert run(mixed) == 0
    assert ask(mixed, "select status, num_draws_sampled from runs") == [("finished", 80)]


@pytest.mark.slow
def test_groups_average_to_the_whole_and_are_those_of_the_text(pair: TinyPair, parts: Path, tmp_path: Path) -> None:
    grouped = sweep(pair, tmp_path, str(pair.av), str(pair.ar), "my_parts:rows", groups=("language",))
    assert run(grouped) == 0
    rows = ask(
        grouped,
        "select breakdown, part, fve, num_activations from metrics where breakdown in ('all', 'language') "
        "and against = 'overall' and k = 2 order by all",
    )
    (_, _, whole, total), *parts_of_it = rows
    assert sum(n for *_, n in parts_of_it) == total
    assert sum(fve * n for _, _, fve, n in parts_of_it) / total == pytest.approx(whole, abs=1e-9)


# Keys


def test_key_holds_name_and_digest_of_each_part(pair: TinyPair, parts: Path, tmp_path: Path) -> None:
    cell = sweep(pair, tmp_path, "my_parts:FirstInputAv", "my_parts:WordsAr", "my_parts:rows").cell
    before = cell_keys(cell)
    assert cell_keys(cell).cell == before.cell
    parts.write_text(EXAMPLE + "\nOTHER = 1\n")
    reload()
    changed = cell_keys(cell)
    assert changed.activations != before.activations and changed.draws != before.draws
    # With stated digests the source file no longer counts.
    stated = EXAMPLE + "\nrows.digest = FirstInputAv.digest = WordsAr.digest = 'v1'\n"
    keys = []
    for source in (stated, stated + "OTHER = 2\n", stated.replace("'v1'", "'v2'")):
        parts.write_text(source)
        reload()
        keys.append(cell_keys(cell).cell)
    assert keys[0] == keys[1] != keys[2]


def test_groups_change_the_cell_but_neither_activations_nor_draws(pair: TinyPair, tmp_path: Path) -> None:
    cell = sweep(pair, tmp_path, str(pair.av), str(pair.ar)).cell
    before, after = cell_keys(cell), cell_keys(replace_at(cell, "scoring.groups", ("text",)))
    assert (before.activations, before.draws) == (after.activations, after.draws) and before.cell != after.cell


# Refusals


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        ({"autoencoder.ar": "my_parts:Nothing"}, ["autoencoder.ar=my_parts:Nothing", "WordsAr"]),
        ({"autoencoder.ar": "no_parts:WordsAr"}, ["no module 'no_parts'"]),
        ({"autoencoder.av": "my_parts:WordsAr"}, ["has no inputs, prompts, decode, parse"]),
        ({"autoencoder.ar": "my_parts:FirstInputAv"}, ["has no reconstruct"]),
        ({"activations.text": "my_parts:nothing"}, ["activations.text=my_parts:nothing", "rows"]),
        ({"activations.text": "my_parts:zlib"}, ["module", "expected texts or records"]),
        ({"activations.layer": 2}, ["layer", "2", "1"]),
        ({"scoring.groups": ("dialect",)}, ["'dialect'", "text, document, language"]),
        ({"scoring.baseline": 3.0}, ["(0, 2]"]),
    ],
)
def test_part_that_cannot_be_used_is_refused_while_planning(
    pair: TinyPair, parts: Path, tmp_path: Path, change: dict[str, Any], reasons: list[str]
) -> None:
    cell: Cell = sweep(pair, tmp_path, "my_parts:FirstInputAv", "my_parts:WordsAr", "my_parts:rows").cell
    for path, value in change.items():
        cell = replace_at(cell, path, value)
    with pytest.raises(RequestError) as refused:
        cell_keys(cell)
    assert all(reason in str(refused.value) for reason in reasons), refused.value


def test_layer_comes_from_the_request_where_no_part_states_it(pair: TinyPair, parts: Path, tmp_path: Path) -> None:
    parts.write_text(EXAMPLE.replace("layer, d_model = 1, 32", "d_model = 32"))
    reload()
    cell = sweep(pair, tmp_path, "my_parts:FirstInputAv", "my_parts:WordsAr").cell
    with pytest.raises(SpecError, match=r"set activations\.layer"):
        cell_keys(cell)
    assert cell_keys(replace_at(cell, "activations.layer", 0)).layer == 0


def test_prompting_of_an_own_part_is_refused(pair: TinyPair, parts: Path, tmp_path: Path) -> None:
    cell = sweep(pair, tmp_path, "my_parts:FirstInputAv", str(pair.ar)).cell
    with pytest.raises(SpecError, match=r"autoencoder\.prompting\.prefill is for checkpoints"):
        cell_keys(replace_at(cell, "autoencoder.prompting", PromptingOverrides(prefill="x")))
    with pytest.raises(SpecError, match=r"autoencoder\.av_stack=\('x',\) is for a checkpoint"):
        cell_keys(replace_at(cell, "autoencoder.av_stack", ("x",)))


@pytest.mark.parametrize("name", ["role", "position", "norm", "document", "all"])
def test_group_cannot_take_the_name_of_a_breakdown(name: str) -> None:
    with pytest.raises(SpecError, match=f"'{name}'"):
        Scoring(groups=(name,))


# Lookup


def test_values_are_those_of_the_rows_of_jsonl_parquet_and_vectors(pair: TinyPair, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": ["a", "b", "c"], "row_id": ["x", "y", "z"], "tag": ["p", None, "q"], "n": [1, 2, 3]})
    pq.write_table(table, tmp_path / "t.parquet")
    (tmp_path / "t.jsonl").write_text(
        '{"text": "a", "tag": "p", "n": 1}\n{"text": "b", "n": 2}\n{"text": "c", "tag": "q", "n": 3}\n'
    )
    of_parquet = Activations(model="m", text=str(tmp_path / "t.parquet"))
    of_jsonl = Activations(model="m", text=str(tmp_path / "t.jsonl"))
    assert group_values(of_parquet, ("tag", "n"), ["z", "x", "x", "y"]) == {
        "tag": ["q", "p", "p", None],
        "n": ["3", "1", "1", "2"],
    }
    assert group_values(of_jsonl, ("tag",), ["row:1", "row:2"]) == {"tag": [None, "q"]}
    vectors = write_vectors(tmp_path / "v.parquet", random_vectors(4, 8))
    with_tags = pq.read_table(vectors).append_column("tag", pa.array(list("abca")))
    pq.write_table(with_tags, vectors)
    assert group_values(Activations(vectors=str(vectors)), ("tag",), ["row:3", "row:1"]) == {"tag": ["a", "b"]}
    assert group_values(of_jsonl, (), ["row:1"]) == {}


def test_columns_of_numbers_and_texts_without_columns_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("".join(f'{{"text": "a", "n": {i}}}\n' for i in range(200)))
    (tmp_path / "t.txt").write_text("a paragraph")
    with pytest.raises(DataError, match="200 values"):
        group_values(Activations(model="m", text=str(tmp_path / "t.jsonl")), ("n",), [f"row:{i}" for i in range(200)])
    with pytest.raises(DataError, match="has no columns"):
        group_values(Activations(model="m", text=str(tmp_path / "t.txt")), ("n",), ["row:0"])
