"""The tokens that a tokenizer puts around a text: who puts the beginning-of-sequence token (BOS) there, and how often.

A chat template writes it into the text, and a tokenizer may then add a second one, which changes every vector behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from ksweep.utils.chat_template import default_template
from ksweep.utils.plain_values import bounded_json


def puts_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer itself puts its BOS before a text."""
    bos: int | None = tokenizer.bos_token_id
    begins: list[int] = tokenizer.encode("x")[:1]
    return bool(bos is not None and begins == [bos])


def count_put_behind(tokenizer: Any) -> int:
    """Return how many tokens the tokenizer itself puts behind a text: 1 where it is an end-of-sequence token."""
    return _count_behind(lambda text, special: list(tokenizer.encode(text, add_special_tokens=special)))


def _count_behind(encode: Callable[[str, bool], list[int]]) -> int:
    for text in ("x", "a", "\n"):  # of which small tokenizers may have no token
        ids, plain = encode(text, True), encode(text, False)
        if plain and (begin := next((i for i in range(len(ids)) if ids[i : i + len(plain)] == plain), None)) is not None:
            return len(ids) - begin - len(plain)
    return 0


def marks_turns(tokenizer: Any) -> bool:
    """Return whether the token called BOS opens every turn of a chat, as <|im_start|> of SmolLM2 does."""
    if not default_template(tokenizer.chat_template):
        return False
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    ids: list[int] = tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False)
    return ids.count(tokenizer.bos_token_id) > 1


def document_bos(tokenizer: Any) -> int | None:
    """Return the id of the BOS that documents begin with; None if the token called BOS ends a text or starts a turn."""
    bos: int | None = tokenizer.bos_token_id
    if bos is None or puts_bos(tokenizer):
        return bos
    return None if bos in (tokenizer.eos_token_id, tokenizer.unk_token_id) or marks_turns(tokenizer) else bos


def one_bos(text: str, tokenizer: Any) -> str:
    """Return the text with its own BOS once, at its very beginning; unchanged if it has none or the tokenizer puts none."""
    bos: str | None = tokenizer.bos_token
    begin = text.lstrip()
    if not bos or not begin.startswith(bos) or not puts_bos(tokenizer):
        return text
    while (rest := begin[len(bos) :].lstrip()).startswith(bos):
        begin = rest
    return begin


def text_gets_second_bos(text: str, directory: Path) -> bool:
    """Return whether a text begins with the token that the tokenizer in a directory puts before texts, from its files alone.

    If the files do not tell what the tokenizer puts there, the BOS that they name is assumed.
    """
    begin = text.lstrip()[:200]
    if begin[:1].isalnum():
        return False  # special tokens begin with a bracket
    config = _read(directory / "tokenizer_config.json")
    named = [_content(tokens.get("bos_token")) for tokens in (config, _read(directory / "special_tokens_map.json"))]
    if any(named) and not any(name and begin.startswith(name) for name in named):
        return False  # plain text: no tokenizer need be loaded
    path = directory / "tokenizer.json"
    put = _put_around_texts(path, path.stat().st_mtime_ns) if path.is_file() else None
    if put is None or config.get("add_bos_token") is True:
        return any(name and begin.startswith(name) for name in named)
    return bool(put[0]) and begin.startswith(put[0])


def may_put_behind(directory: Path) -> bool:
    """Return whether the tokenizer in a directory puts a token behind texts, as its files say; the loaded one may not do so."""
    path = directory / "tokenizer.json"
    put = _put_around_texts(path, path.stat().st_mtime_ns) if path.is_file() else None
    return _read(directory / "tokenizer_config.json").get("add_eos_token") is True or (put is not None and put[1])


@cache
def _put_around_texts(path: Path, _modified: int) -> tuple[str, bool] | None:
    """Return the token that a tokenizer.json puts before a text, "" for none, and whether it puts one behind; None if tokenizers
    cannot read it."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception:  # the library raises a bare Exception
        return None
    ids, plain = tokenizer.encode("x").ids, tokenizer.encode("x", add_special_tokens=False).ids
    behind = _count_behind(lambda text, special: list(tokenizer.encode(text, add_special_tokens=special).ids))
    return "" if ids[:1] == plain[:1] else str(tokenizer.id_to_token(ids[0])), behind > 0


def _content(token: Any) -> str | None:
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None


def _read(path: Path) -> dict[str, Any]:
    try:
        value = bounded_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
