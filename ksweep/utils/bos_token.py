"""The token that a text begins with (BOS): who puts it there, and that it stands there once.

A chat template writes it into the text, and a tokenizer then puts a second one before it: all vectors behind it are other ones.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any


def puts_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts its BOS before a text."""
    bos: int | None = tokenizer.bos_token_id
    begins: list[int] = tokenizer.encode("x")[:1]
    return bool(bos is not None and begins == [bos])


def marks_turns(tokenizer: Any) -> bool:
    """Whether what is called BOS opens every turn of a chat, as <|im_start|> of SmolLM2 does."""
    if not tokenizer.chat_template:
        return False
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    ids: list[int] = tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False)
    return ids.count(tokenizer.bos_token_id) > 1


def document_bos(tokenizer: Any) -> int | None:
    """The id of the BOS that documents begin with; None for what is called so and is an end of text or the start of a turn."""
    bos: int | None = tokenizer.bos_token_id
    if bos is None or puts_bos(tokenizer):
        return bos
    return None if bos in (tokenizer.eos_token_id, tokenizer.unk_token_id) or marks_turns(tokenizer) else bos


def one_bos(text: str, tokenizer: Any) -> str:
    """A text whose own BOS stands at its very beginning, once; the text as it is where it has none or the tokenizer puts none."""
    bos: str | None = tokenizer.bos_token
    begin = text.lstrip()
    if not bos or not begin.startswith(bos) or not puts_bos(tokenizer):
        return text
    while (rest := begin[len(bos) :].lstrip()).startswith(bos):
        begin = rest
    return begin


def text_gets_second_bos(text: str, directory: Path) -> bool:
    """Whether a text begins with the token that the tokenizer in a directory puts before texts; from its files alone.

    Where they do not tell what the tokenizer puts there, it is taken to put the BOS that they name.
    """
    begin = text.lstrip()[:200]
    if begin[:1].isalnum():
        return False  # special tokens begin with a bracket
    config = _read(directory / "tokenizer_config.json")
    named = [_content(said.get("bos_token")) for said in (config, _read(directory / "special_tokens_map.json"))]
    if any(named) and not any(name and begin.startswith(name) for name in named):
        return False  # plain text: no tokenizer need be loaded
    path = directory / "tokenizer.json"
    put = _put_before_texts(path, path.stat().st_mtime_ns) if path.is_file() else None
    if put is None or config.get("add_bos_token") is True:
        return any(name and begin.startswith(name) for name in named)
    return bool(put) and begin.startswith(put)


@cache
def _put_before_texts(path: Path, _modified: int) -> str | None:
    """What a tokenizer.json puts before a text, empty for nothing; None if this version of tokenizers cannot read it."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception:  # the library raises a bare Exception
        return None
    ids, plain = tokenizer.encode("x").ids, tokenizer.encode("x", add_special_tokens=False).ids
    return "" if ids[:1] == plain[:1] else str(tokenizer.id_to_token(ids[0]))


def _content(said: Any) -> str | None:
    value = said.get("content") if isinstance(said, dict) else said
    return value if isinstance(value, str) else None


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
