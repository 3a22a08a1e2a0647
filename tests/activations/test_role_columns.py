"""Roles end to end: from text with a chat format in it to the column of the store and the counts beside it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from ksweep.activations import ActivationTable, ensure
from tests.activations.chats import TEMPLATES, Piece, conversation, make_chat_base, roles_by_offset, written
from tests.activations.helpers import passages, random_vectors, spec, vector_spec, write_jsonl, write_vectors


@pytest.fixture(scope="module", params=TEMPLATES)
def chat(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, make_chat_base(tmp_path_factory.mktemp("chat") / "base", request.param)


def conversations(template: str, count: int) -> list[list[Piece]]:
    """Every third without a system message; every fourth begins in the middle of a message, every fifth ends there."""
    out, words = [], iter(passages(3 * count, low=2, high=9))
    for i in range(count):
        turns = [("system", next(words)), ("user", next(words)), ("assistant", next(words))]
        pieces = conversation(template, *turns[i % 3 == 0 :])
        if i % 4 == 0:
            pieces = [(pieces[1][0], "other"), *pieces[2:]]
        out.append(pieces[:-1][: -1 if template in ("llama3", "harmony") else -2] if i % 5 == 0 else pieces)
    return out


def extract(base: Path, rows: list[list[Piece]], directory: Path, count: int, **fields: Any) -> ActivationTable:
    text = write_jsonl(directory / "rows.jsonl", [written(row) for row in rows])
    return ensure(spec(base, text, count, **({"min_position": 0} | fields)), 1, directory / "cache")


def counted(roles: list[list[str]]) -> dict[str, int]:
    counts = Counter(role for row in roles for role in row)
    names = ("user", "assistant", "system", "special", "other", "pad")
    return {**{name: counts[name] for name in names}, "total": counts.total()}


def test_every_token_of_a_chat_has_the_role_of_the_message_it_lies_in(chat: tuple[str, Path], tmp_path: Path) -> None:
    template, base = chat
    rows, tokenizer = conversations(template, 20), AutoTokenizer.from_pretrained(base)
    expected = [roles_by_offset(tokenizer, row) for row in rows]
    flat = [role for row in expected for role in row]
    assert {"user", "assistant", "system", "special", "other"} == set(flat)
    table = extract(base, rows, tmp_path, len(flat), positions="all", candidates="not_padding")
    assert table.column("role").tolist() == flat
    assert table.role_counts() == counted(expected)
    assert json.loads((table.directory / "manifest.json").read_text())["role_counts"] == counted(expected)


def test_drawn_positions_have_the_roles_of_exactly_these_tokens(chat: tuple[str, Path], tmp_path: Path) -> None:
    template, base = chat
    rows, tokenizer = conversations(template, 20), AutoTokenizer.from_pretrained(base)
    expected = [roles_by_offset(tokenizer, row) for row in rows]
    table = extract(base, rows, tmp_path, 60, positions_per_document=3, min_position=5)
    places = zip(table.column("row_id"), table.column("position"), strict=True)
    assert table.column("role").tolist() == [expected[int(row.removeprefix("row:"))][at] for row, at in places]
    assert len(set(table.column("role"))) > 2
    assert table.role_counts() == counted(expected)  # all tokens of the rows, whatever was drawn


def test_roles_of_a_row_that_is_cut_are_those_of_what_is_left(chat: tuple[str, Path], tmp_path: Path) -> None:
    template, base = chat
    rows, tokenizer = conversations(template, 20), AutoTokenizer.from_pretrained(base)
    cut = [roles_by_offset(tokenizer, row)[:12] for row in rows]
    table = extract(base, rows, tmp_path, 20, positions="last", candidates="not_padding", max_length=12)
    assert table.column("role").tolist() == [row[-1] for row in cut] and table.role_counts() == counted(cut)


def test_role_counts_are_those_of_the_shards_a_request_touches(chat: tuple[str, Path], tmp_path: Path) -> None:
    template, base = chat
    rows, tokenizer = conversations(template, 70), AutoTokenizer.from_pretrained(base)
    expected = [roles_by_offset(tokenizer, row) for row in rows]
    large = extract(base, rows, tmp_path, 70, positions="last", candidates="not_padding")
    small = extract(base, rows, tmp_path, 3, positions="last", candidates="not_padding")
    assert large.role_counts() == counted(expected) and small.role_counts() == counted(expected[:64])
    assert large.key == small.key


def test_role_counts_hold_rows_without_an_activation(chat: tuple[str, Path], tmp_path: Path) -> None:
    template, base = chat
    rows, tokenizer = (
        [conversation(template, ("user", "the"))] * 64 + conversations(template, 6),
        AutoTokenizer.from_pretrained(base),
    )
    expected = [roles_by_offset(tokenizer, row) for row in rows]
    table = extract(base, rows, tmp_path, 4, positions="last", min_position=len(expected[0]))
    assert table.column("row_id")[0] >= "row:64" and table.role_counts() == counted(expected)


def test_activations_above_the_norm_take_their_roles_with_them(chat: tuple[str, Path], tmp_path: Path) -> None:
    template, base = chat
    rows = conversations(template, 10)
    request: dict[str, Any] = {"positions": "all", "candidates": "not_padding"}
    everything = extract(base, rows, tmp_path, 100, **request)
    norms = everything.column("norm")
    limit = float(sorted(norms)[49] + sorted(norms)[50]) / 2
    table = extract(base, rows, tmp_path, 50, **request, max_norm=limit)
    assert table.column("role").tolist() == everything.column("role")[norms <= limit][:50].tolist()


def test_without_a_chat_format_roles_are_unknown(base: Path, text: Path, tmp_path: Path) -> None:
    table = ensure(spec(base, text, 20), 1, tmp_path)
    assert set(table.column("role")) == {None} and table.role_counts() is None
    assert json.loads((table.directory / "manifest.json").read_text())["role_counts"] is None


def test_ready_made_vectors_have_the_roles_that_their_file_says(tmp_path: Path) -> None:
    plain = ensure(vector_spec(write_vectors(tmp_path / "a.parquet", random_vectors(3)), 3), None, tmp_path / "c")
    said = write_vectors(tmp_path / "b.parquet", random_vectors(3), role=["user", None, "assistant"])
    named = ensure(vector_spec(said, 3), None, tmp_path / "c")
    assert plain.column("role").tolist() == [None] * 3 and named.column("role").tolist() == ["user", None, "assistant"]
    assert plain.role_counts() is None and named.role_counts() is None
