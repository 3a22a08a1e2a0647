"""Text that already begins with BOS: it stands there once, under a key of its own, and files of both kinds are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ksweep.activations import activations_key, ensure
from ksweep.activations.hidden_states import BlockReader
from ksweep.activations.text_source import TextUnits
from ksweep.utils.errors import DataError
from tests.activations.helpers import passages, spec, write_jsonl
from tests.tiny_models import make_base

BOS, BOS_ID, LAYER = "<|begin_of_text|>", 537, 1


def chats(base: Path, count: int = 6) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = passages(count, low=20, high=40)
    return [tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False) for text in texts]


def expected(base: Path, text: str) -> tuple[list[int], np.ndarray]:
    """Token ids with one BOS, and block outputs, of plain transformers."""
    ids = AutoTokenizer.from_pretrained(base)(text, add_special_tokens=False)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.inference_mode():
        hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[LAYER + 1][0]
    return ids, hidden.numpy()


def everything(base: Path, text: Path, count: int, **fields: Any) -> Any:
    options = {"positions": "all", "candidates": "not_padding", "min_position": 0, "max_length": 64}
    return spec(base, text, count, **(options | fields))


def test_text_that_a_chat_template_began_is_read_as_it_stands(base: Path, tmp_path: Path) -> None:
    texts = chats(base)
    path = write_jsonl(tmp_path / "chats.jsonl", texts)
    ids, hidden = expected(base, texts[0])
    assert ids[0] == BOS_ID and ids.count(BOS_ID) == 1
    table = ensure(everything(base, path, 40), LAYER, tmp_path / "cache")
    of_first = [i for i, row in enumerate(table.column("row_id")) if row == "row:0"]
    assert [table.column("token_id")[i] for i in of_first] == ids[: len(of_first)]
    assert np.abs(table.vectors()[of_first] - hidden[: len(of_first)]).max() < 1e-4


@pytest.mark.parametrize("before", ["", "  ", "\n"])
@pytest.mark.parametrize("max_length", [8, 64])
def test_second_bos_leaves_no_trace_in_the_tokens(base: Path, before: str, max_length: int) -> None:
    reader = BlockReader(str(base), LAYER, "float32")
    plain, words = "the cat and the dog " * 6, reader.tokenizer("the cat and the dog " * 6)["input_ids"]
    assert words[0] == BOS_ID
    found = reader.tokenize([plain, f"{before}{BOS}{plain}", f"x {BOS} y", f"{before}{BOS}{BOS}\n{BOS}{plain}"], max_length)
    assert found[3] == found[1]
    assert found[0] == words[:max_length]
    assert found[1] == AutoTokenizer.from_pretrained(base)(BOS + plain, add_special_tokens=False)["input_ids"][:max_length]
    assert found[2] == reader.tokenizer(f"x {BOS} y")["input_ids"][:max_length]  # inside a text it is somebody's words


def test_text_is_taken_as_it_is_where_the_tokenizer_puts_no_bos(tmp_path: Path) -> None:
    model = make_base(tmp_path / "base", "qwen2", num_layers=2, d_model=16)
    config = model / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bos_token": "<|im_start|>"}))
    reader, text = BlockReader(str(model), 1, "float32"), "\n<|im_start|>the cat"
    assert reader.tokenize([text], 64) == [AutoTokenizer.from_pretrained(model)(text)["input_ids"]]


def test_key_is_another_one_only_where_a_second_bos_was(base: Path, tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / "plain.jsonl", passages(6))
    chat = write_jsonl(tmp_path / "chats.jsonl", chats(base))
    assert activations_key(spec(base, chat, 4), LAYER)[1]["bos"] == "once"
    assert "bos" not in activations_key(spec(base, plain, 4), LAYER)[1]


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_key_follows_what_the_tokenizer_does_and_not_what_a_token_is_called(family: Any, tmp_path: Path) -> None:
    """Qwen2's tokenizer puts nothing before a text: one that begins with its BOS is read as before."""
    model = make_base(tmp_path / "base", family, num_layers=2, d_model=16)
    tokenizer = AutoTokenizer.from_pretrained(model)
    begin = tokenizer.bos_token or "<|im_start|>"
    if family == "qwen2":
        config = model / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"bos_token": "<|im_start|>"}))
    path = write_jsonl(tmp_path / "t.jsonl", [begin + text for text in passages(4)])
    assert ("bos" in activations_key(spec(model, path, 4), 1)[1]) == (family == "gemma3")
    assert (tokenizer(begin + "x")["input_ids"][:2] == [tokenizer.bos_token_id] * 2) == (family == "gemma3")


def test_bos_that_only_the_tokenizer_file_knows_of_changes_the_key_too(tmp_path: Path) -> None:
    model = make_base(tmp_path / "base", "llama", num_layers=2, d_model=16)
    config = json.loads((model / "tokenizer_config.json").read_text())
    del config["bos_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    path = write_jsonl(tmp_path / "t.jsonl", [BOS + text for text in passages(4)])
    assert activations_key(spec(model, path, 4), 1)[1]["bos"] == "once"


# mixed files


def mixed(base: Path) -> list[str]:
    texts = passages(12, low=20, high=40)
    return [text if i in (0, 1, 2, 5) else BOS + text for i, text in enumerate(texts)]


def test_file_of_which_some_rows_begin_with_bos_is_refused_with_the_rows(base: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "mixed.jsonl", ["", *mixed(base)])
    with pytest.raises(DataError, match=r"is mixed: rows 4, 5, 7, 8, 9 and 3 more begin with .* and rows 1, 2, 3, 6 do not"):
        ensure(everything(base, path, 20), LAYER, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_mixed_file_is_refused_whichever_unit_a_rank_computes(base: Path, tmp_path: Path) -> None:
    """Rows of one unit are alike, and those of the next are of the other kind."""
    texts = passages(140, low=20, high=30)
    path = write_jsonl(tmp_path / "mixed.jsonl", [text if i < 64 else BOS + text for i, text in enumerate(texts)])
    units = TextUnits(spec(base, path, 10), LAYER)
    assert next(units.units([0]))[1].num_rows == 64
    for later in (1, 2):
        with pytest.raises(DataError, match=r"is mixed: rows \d+, .* begin with .* and rows 0 do not"):
            next(TextUnits(spec(base, path, 10), LAYER).units([later]))


def pretokenised(path: Path, rows: list[list[int]]) -> Path:
    pq.write_table(pa.table({"input_ids": rows}), path)
    return path


def test_pretokenised_rows_are_used_as_they_are_and_refused_when_mixed(base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [tokenizer(text)["input_ids"] for text in passages(6, low=20, high=30)]
    assert all(row[0] == BOS_ID for row in rows)
    fields = {"text_column": "input_ids", "max_length": 256}
    with_bos = pretokenised(tmp_path / "a.parquet", rows)
    table = ensure(everything(base, with_bos, 30, **fields), LAYER, tmp_path / "cache")
    assert table.column("token_id")[0] == BOS_ID and table.column("token_id")[1] != BOS_ID
    without = pretokenised(tmp_path / "b.parquet", [row[1:] for row in rows])
    table = ensure(everything(base, without, 30, **fields), LAYER, tmp_path / "cache")
    assert BOS_ID not in table.column("token_id").tolist()
    both = pretokenised(tmp_path / "c.parquet", [row[i % 2 :] for i, row in enumerate(rows)])
    with pytest.raises(DataError, match=r"is mixed: rows 0, 2, 4 begin with .* and rows 1, 3, 5 do not"):
        ensure(everything(base, both, 30, **fields), LAYER, tmp_path / "cache")


def test_token_that_opens_every_turn_is_no_bos_to_be_mixed(tmp_path: Path) -> None:
    """Chats beside plain text under a tokenizer whose BOS is <|im_start|>, which it does not put before texts."""
    model = make_base(tmp_path / "base", "qwen2", num_layers=2, d_model=16)
    config = model / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bos_token": "<|im_start|>"}))
    texts = [text if i % 2 else f"<|im_start|>user\n{text}<|im_end|>\n" for i, text in enumerate(passages(8, low=20, high=30))]
    path = write_jsonl(tmp_path / "t.jsonl", texts)
    assert len(ensure(everything(model, path, 20), LAYER, tmp_path / "cache")) == 20


def test_hub_rows_that_begin_with_bos_are_sent_to_a_file(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not read while planning, so that their key could not say it."""
    datasets = pytest.importorskip("datasets")
    rows = [{"text": text} for text in chats(base)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_options: iter(rows))
    request = spec(base, Path("owner/name@" + "0" * 40), 4)
    assert "bos" not in activations_key(request, LAYER)[1]
    with pytest.raises(DataError, match=r"rows of hub dataset owner/name@0+ begin with .*save it as"):
        ensure(request, LAYER, tmp_path / "cache")
