"""Rows of token ids: the reference's own numbers, padding on either side, and what must be refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ksweep.activations import ActivationTable, activations_key, ensure, plan_activations
from ksweep.activations.datasets import text_identity
from ksweep.config.spec import Activations
from ksweep.utils.errors import DataError
from tests.activations.chats import PAD, conversation, make_chat_base, roles_by_offset, written
from tests.activations.helpers import passages, shard_files, spec, write_jsonl
from tests.activations.test_hidden_states import make_gpt2, reference_model, relative
from tests.tiny_models import make_base

datasets = pytest.importorskip("datasets")

TAE = Path(__file__).parents[1] / "fixtures" / "tae"
CASES = sorted(path.parent.name for path in TAE.glob("*/expected.npz"))
SAVED = ("directory", "splits", "torch", "parquet", "jsonl")


def save(ids: list[Any], directory: Path, kind: str = "directory", **columns: list[Any]) -> Path:
    """A table with a column input_ids, and an attention mask that says nothing true, as nobody may read it."""
    path, table = directory / f"ids.{kind}", {"input_ids": ids, "attention_mask": [[7] for _ in ids], **columns}
    if kind == "parquet":
        pq.write_table(pa.table(table), path)
    elif kind == "jsonl":
        names = list(table)
        path.write_text("".join(json.dumps({name: table[name][i] for name in names}) + "\n" for i in range(len(ids))))
    else:
        rows = datasets.Dataset.from_dict(table)
        rows = rows.with_format("torch") if kind == "torch" else rows
        (datasets.DatasetDict({"train": rows, "validation": rows}) if kind == "splits" else rows).save_to_disk(str(path))
    return path


def tokens(base: Path, path: Path, count: int, **fields: Any) -> Activations:
    """A request for every position that is not padding."""
    every: dict[str, Any] = {"positions": "all", "candidates": "not_padding", "min_position": 0}
    every |= {"text_column": "input_ids", "max_length": 256}
    return spec(base, path, count, **(every | fields))


def by_place(table: ActivationTable) -> dict[tuple[int, int], np.ndarray]:
    rows = [int(row.removeprefix("row:")) for row in table.column("row_id")]
    return dict(zip(zip(rows, table.column("position").tolist(), strict=True), table.vectors(), strict=True))


# ---- the reference's numbers


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize("case", CASES)
def test_reference_activations_are_met_from_a_pretokenised_table(case: str, kind: str, tmp_path: Path) -> None:
    facts = json.loads((TAE / case / "expected.json").read_text())
    arrays = np.load(TAE / case / "expected.npz")
    path = save(arrays["input_ids"].tolist(), tmp_path, kind)
    request = tokens(TAE / case / "base", path, int(arrays["attention_mask"].sum()))
    table = ensure(request, facts["layer_l"], tmp_path / "cache")
    found = by_place(table)
    places = list(enumerate(arrays["positions"].tolist()))
    assert np.abs(np.stack([found[place] for place in places]) - arrays["activations"]).max() < 1e-4
    token = dict(zip(found, table.column("token_id"), strict=True))
    assert [token[place] for place in places] == arrays["current_token_ids"].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("at", range(3))
def test_reference_bounds_are_met_through_the_store(case: str, at: int, tmp_path: Path) -> None:
    expected = json.loads((TAE / case / "expected.json").read_text())
    arrays = np.load(TAE / case / "expected.npz")
    ids, pad = arrays["position_input_ids"], expected["position_pad_id"]
    bounds = {  # the reference returns position 0 of a row of padding; there is nothing to explain in it
        row: (int(arrays["position_lower"][at, row]), int(arrays["position_upper"][at, row]))
        for row in range(len(ids))
        if set(ids[row]) != {pad}
    }
    spans = [high - low + 1 for low, high in bounds.values()]
    every = tokens(TAE / case / "base", save(ids.tolist(), tmp_path), sum(spans), min_position=expected["position_min_pos"][at])
    layer = expected["layer_l"]

    def positions(request: Activations) -> dict[int, list[int]]:
        table = ensure(request, layer, tmp_path / "cache")
        out: dict[int, list[int]] = {}
        for row, position in zip(table.column("row_id"), table.column("position"), strict=True):
            out.setdefault(int(row.removeprefix("row:")), []).append(int(position))
        return out

    assert positions(every) == {row: list(range(low, high + 1)) for row, (low, high) in bounds.items()}
    middle = positions(replace(every, positions="midpoint", num_activations=len(bounds)))
    assert middle == {row: [int(arrays["position_midpoint"][at, row])] for row in bounds}
    count = sum(min(4, span) for span in spans)
    drawn = positions(replace(every, positions="random", positions_per_document=4, num_activations=count))
    assert {row: len(taken) for row, taken in drawn.items()} == {r: min(4, h - low + 1) for r, (low, h) in bounds.items()}
    assert all(
        len(set(taken)) == len(taken) and set(taken) <= set(range(bounds[r][0], bounds[r][1] + 1)) for r, taken in drawn.items()
    )


def test_a_row_of_nothing_but_padding_gives_no_activation(base: Path, tmp_path: Path) -> None:
    pad = AutoTokenizer.from_pretrained(base).eos_token_id
    path = save([[pad] * 6, [5, 6, 7, pad, pad, pad], [], None], tmp_path, "jsonl")
    table = ensure(tokens(base, path, 3), 1, tmp_path / "cache")
    assert list(by_place(table)) == [(1, 0), (1, 1), (1, 2)]
    with pytest.raises(DataError, match=r"gives 3 \(4 rows, 3 of them without an allowed position\)"):
        ensure(tokens(base, path, 4), 1, tmp_path / "cache")


# ---- padding


def rows_of(base: Path, count: int) -> list[list[int]]:
    return [list(ids) for ids in AutoTokenizer.from_pretrained(base)(passages(count), add_special_tokens=False)["input_ids"]]


def padded(rows: list[list[int]], pad: int, side: str) -> list[list[int]]:
    width = max(map(len, rows)) + 3
    filler = [[pad] * (width - len(row)) for row in rows]
    return [fill + row if side == "left" else row + fill for row, fill in zip(rows, filler, strict=True)]


@pytest.mark.slow
def test_rows_of_ids_give_what_the_text_they_were_made_of_gives(base: Path, tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "t.jsonl", passages(80))
    ids = AutoTokenizer.from_pretrained(base)(passages(80))["input_ids"]
    pad = AutoTokenizer.from_pretrained(base).eos_token_id
    of_text = ensure(spec(base, text, 160, positions_per_document=2, max_length=256), 1, tmp_path / "cache")
    for side, rows in (("none", ids), ("right", padded(ids, pad, "right"))):
        (tmp_path / side).mkdir()
        path = save(rows, tmp_path / side)
        request = spec(base, path, 160, positions_per_document=2, max_length=256, text_column="input_ids")
        table = ensure(request, 1, tmp_path / "cache")
        assert np.array_equal(table.vectors(), of_text.vectors())  # bit for bit: the same batches without a mask
        for name in ("row_id", "position", "token_id", "window", "role"):
            assert table.column(name).tolist() == of_text.column(name).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gemma3_multimodal"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_left_padding_changes_nothing_but_the_index_where_positions_are_relative(family: Any, dtype: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", family)
    tokenizer, rows = AutoTokenizer.from_pretrained(base), rows_of(base, 12)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    plain, left = save(rows, tmp_path, "jsonl"), save(padded(rows, pad, "left"), tmp_path, "parquet")
    fields: dict[str, Any] = {"text_column": "input_ids", "positions_per_document": 3, "dtype": dtype, "max_length": 256}
    one, two = (ensure(spec(base, path, 36, **fields), 1, tmp_path / "cache") for path in (plain, left))
    shift = {f"row:{i}": max(map(len, rows)) + 3 - len(row) for i, row in enumerate(rows)}
    moved = [position + shift[row] for row, position in zip(one.column("row_id"), one.column("position"), strict=True)]
    assert two.column("position").tolist() == moved and one.column("token_id").tolist() == two.column("token_id").tolist()
    assert one.column("window").tolist() == two.column("window").tolist()
    assert relative(two.vectors(), one.vectors()) < (1e-5 if dtype == "float32" else 0.03)


def test_left_padding_shifts_absolute_positions_as_in_the_reference(tmp_path: Path) -> None:
    base = make_gpt2(tmp_path / "base")
    rows, pad = [row[:20] for row in rows_of(base, 4)], AutoTokenizer.from_pretrained(base).pad_token_id
    left = padded(rows, pad, "left")
    found = by_place(ensure(tokens(base, save(left, tmp_path), sum(map(len, rows)), max_length=64), 1, tmp_path / "cache"))
    model = reference_model(base)
    for i, (row, wide) in enumerate(zip(rows, left, strict=True)):
        first = len(wide) - len(row)
        places = torch.arange(first, len(wide))[None]
        with torch.inference_mode():
            states = model(input_ids=torch.tensor([row]), position_ids=places, output_hidden_states=True).hidden_states[2][0]
        assert relative(np.stack([found[i, p] for p in range(first, len(wide))]), states.numpy()) < 1e-5


def test_nobody_sees_a_pad_id_inside_a_row(tmp_path: Path) -> None:
    base = make_gpt2(tmp_path / "base")
    row, pad = rows_of(base, 1)[0][:12], AutoTokenizer.from_pretrained(base).pad_token_id
    row[5] = pad
    other = [*rows_of(base, 2)[1][:9], pad, pad, pad]
    table = ensure(tokens(base, save([row, other], tmp_path), 21), 1, tmp_path / "cache")
    assert table.column("position").tolist() == [*range(12), *range(9)]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        mask = torch.tensor([[int(token != pad) for token in row]])
        expected = model(input_ids=torch.tensor([row]), attention_mask=mask, output_hidden_states=True).hidden_states[2][0]
    seen = [i for i in range(12) if i != 5]
    assert relative(table.vectors(0, 12)[seen], expected.numpy()[seen]) < 1e-5
    whole = by_place(ensure(tokens(base, save([row[:5] + row[6:]], tmp_path, "jsonl"), 11), 1, tmp_path / "cache"))
    assert relative(table.vectors(0, 5), np.stack([whole[0, p] for p in range(5)])) < 1e-5


def test_a_left_padded_row_keeps_min_position_tokens_of_context(base: Path, tmp_path: Path) -> None:
    pad = AutoTokenizer.from_pretrained(base).eos_token_id
    path = save([[pad] * 9 + [5, 6, 7, 8]], tmp_path)
    rule: dict[str, Any] = {"candidates": "not_special", "min_position": 2}
    assert list(by_place(ensure(tokens(base, path, 2, **rule), 1, tmp_path / "cache"))) == [(0, 11), (0, 12)]


# ---- provenance


@pytest.mark.parametrize("template", ["gemma", "chatml", "harmony"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_roles_of_padded_rows_are_those_of_their_text_and_padding_is_counted_apart(
    template: str, side: str, tmp_path: Path
) -> None:
    base = make_chat_base(tmp_path / "base", template)
    tokenizer = AutoTokenizer.from_pretrained(base)
    words = passages(16, low=2, high=9)
    chats = [conversation(template, ("user", words[i]), ("assistant", words[i + 8])) for i in range(8)]
    rows = [list(tokenizer(written(chat))["input_ids"]) for chat in chats]
    roles = [roles_by_offset(tokenizer, chat) for chat in chats]
    wide = padded(rows, tokenizer.convert_tokens_to_ids(PAD[template]), side)
    flat = [role for row in roles for role in row]
    table = ensure(tokens(base, save(wide, tmp_path), len(flat)), 1, tmp_path / "cache")
    assert table.column("role").tolist() == flat
    counts = table.role_counts()
    assert counts is not None and counts["total"] == 8 * len(wide[0]) and counts["pad"] == counts["total"] - len(flat)
    assert {role: counts[role] for role in ("user", "assistant", "special")} == {
        role: flat.count(role) for role in ("user", "assistant", "special")
    }


def test_an_embedding_without_a_token_has_a_role_all_the_same(tmp_path: Path) -> None:
    base = make_chat_base(tmp_path / "base", "chatml")
    beyond = len(AutoTokenizer.from_pretrained(base)) + 1  # the tiny model has more embeddings than its tokenizer tokens
    table = ensure(tokens(base, save([[5, beyond, 6]], tmp_path), 3), 1, tmp_path / "cache")
    assert table.column("role").tolist() == ["other"] * 3


def test_key_of_ids_differs_from_that_of_texts_and_holds_the_column(base: Path, tmp_path: Path) -> None:
    both = save([[5, 6, 7]], tmp_path, text=["words"], other=[[5, 6, 7]])
    keys = {activations_key(tokens(base, both, 1, text_column=column), 1)[0] for column in ("input_ids", "other", "text")}
    assert len(keys) == 3
    assert text_identity(tokens(base, both, 1))["holds"] == "token_ids"
    assert "holds" not in text_identity(tokens(base, both, 1, text_column="text"))


def test_splits_of_one_directory_are_kept_apart(base: Path, tmp_path: Path) -> None:
    path = save([[5, 6, 7]], tmp_path, "splits")
    keys = {activations_key(tokens(base, path, 1, text_split=split), 1)[0] for split in ("train", "validation")}
    below = activations_key(tokens(base, path / "validation", 1), 1)[0]
    assert len({*keys, below}) == 3
    assert plan_activations(tokens(base, path / "validation", 1), 1, tmp_path / "cache").missing == 1


# ---- what must be refused


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([[5, 6], "words"], r"row 1 of .* has a str in column 'input_ids', where earlier rows have lists of token ids"),
        (["words", [5, 6]], r"row 1 of .* has a list in column 'input_ids'; expected text"),
        ([None, [5, 6], "words"], r"row 2 of .* has a str in column 'input_ids'"),
        ([[5, 6.0]], r"row 0 of .* with '6.0' \(float\) at index 1; expected token ids"),
        ([[5], [6, None]], r"row 1 of .* \(NoneType\) at index 1"),
        ([[5, True]], r"row 0 of .* with 'True' \(bool\) at index 1"),
        ([[[5, 6]]], r"row 0 of .* a list in column 'input_ids' with '\[5, 6\]' \(list\) at index 0"),
        ([[5], [{"role": "user", "content": "x"}]], r"row 1 of .* \(dict\) at index 0"),
        ([["a", "b"]], r"row 0 of .* with 'a' \(str\) at index 0"),
        ([[5], {"ids": [5]}], r"row 1 of .* has a dict in column 'input_ids'"),
        ([[5], [5, -100]], r"row 1 of .* \(column 'input_ids'\) has token id -100 at index 1, and the model knows 0 to \d+"),
        ([[5, 123456]], r"row 0 of .* \(column 'input_ids'\) has token id 123456 at index 1.* another model"),
        ([[], None], r"holds no text in column 'input_ids'"),
    ],
)
def test_columns_that_are_no_token_ids_are_refused_by_row_and_column(
    base: Path, tmp_path: Path, rows: list[Any], says: str
) -> None:
    with pytest.raises(DataError, match=says):
        ensure(tokens(base, save(rows, tmp_path, "jsonl"), 1), 1, tmp_path / "cache")


@pytest.mark.parametrize("kind", ["directory", "parquet"])
def test_floats_in_a_typed_table_are_refused(base: Path, tmp_path: Path, kind: str) -> None:
    with pytest.raises(DataError, match=r"row 0 of .* with '5.0' \(float\) at index 0"):
        plan_activations(tokens(base, save([[5.0, 6.0]], tmp_path, kind), 1), 1, tmp_path / "cache")


def test_missing_column_of_a_directory_is_refused_when_planning(base: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'text'; it has input_ids, attention_mask. Set activations.text_column"):
        plan_activations(tokens(base, save([[5, 6]], tmp_path), 1, text_column="text"), 1, tmp_path / "cache")


def test_rows_longer_than_max_length_are_refused_unless_only_right_padding_is_cut(base: Path, tmp_path: Path) -> None:
    pad = AutoTokenizer.from_pretrained(base).eos_token_id
    right, left = [5, 6, 7, *[pad] * 9], [*[pad] * 9, 5, 6, 7]
    path = save([right], tmp_path, "jsonl")
    short = ensure(tokens(base, path, 3, max_length=4), 1, tmp_path / "cache")
    long = ensure(tokens(base, path, 3, max_length=100), 1, tmp_path / "cache")
    assert np.array_equal(short.vectors(), long.vectors())
    says = r"row 1 of .* \(column 'input_ids'\) has 12 token ids, .* the first 4: set activations.max_length=12"
    with pytest.raises(DataError, match=says):
        ensure(tokens(base, save([right, left], tmp_path, "parquet"), 3, max_length=4), 1, tmp_path / "cache")
    with pytest.raises(DataError, match=r"set activations\.max_length=5"):
        ensure(tokens(base, save([[5, 6, 7, 8, 9]], tmp_path), 3, max_length=4), 1, tmp_path / "cache")
    with pytest.raises(DataError, match=r"has 600 token ids, .* the first 512: the model's context ends there: .* at most 512"):
        ensure(tokens(base, save([[5] * 600], tmp_path, "splits"), 3, max_length=2048), 1, tmp_path / "cache")


@pytest.mark.slow
def test_growing_a_request_over_ids_keeps_every_byte(base: Path, tmp_path: Path) -> None:
    pad = AutoTokenizer.from_pretrained(base).eos_token_id
    path = save(padded(rows_of(base, 150), pad, "left"), tmp_path)
    rule: dict[str, Any] = {"positions": "random", "min_position": 4}
    small = ensure(tokens(base, path, 60, **rule), 1, tmp_path / "a")
    before = shard_files(small.directory)
    ensure(tokens(base, path, 150, **rule), 1, tmp_path / "a")
    at_once = ensure(tokens(base, path, 150, **rule), 1, tmp_path / "b")
    after = shard_files(tmp_path / "a")
    assert len(before) == 1 and before.items() <= after.items() and after == shard_files(at_once.directory)
