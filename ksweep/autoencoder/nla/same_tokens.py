"""Whether AV and AR have one tokenizer. Tokens, ids and merges are compared; bytes change with the version of a library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksweep.utils import hub
from ksweep.utils.errors import CheckpointError
from ksweep.utils.notes import Note
from ksweep.utils.planning_pass import once_per_pass
from ksweep.utils.text import some_of

FAST = "tokenizer.json"
LARGEST_TOKENIZER = 256 << 20
"""Largest tokenizer that is parsed, bytes; Gemma's has 33 million."""


@dataclass(frozen=True)
class Tokens:
    """What a tokenizer.json says of tokens."""

    ids: Mapping[str, int]
    """Ids by token, of the vocabulary and of added tokens."""
    added: frozenset[str]
    """Tokens that were added to the vocabulary."""
    merges: tuple[str, ...]


def check_same_tokens(av: Path, ar: Path) -> tuple[Note, ...]:
    """Compare the tokenizers in two directories, and return a note on added tokens that one of them lacks.

    Directories without a tokenizer.json are not compared.

    Raises:
        CheckpointError: a token has two ids or is in one vocabulary alone, or the merges differ.
    """
    first, second = av / FAST, ar / FAST
    if av == ar or not (first.is_file() and second.is_file()) or hub.content_digest(first) == hub.content_digest(second):
        return ()
    a, b = _tokens_of(first), _tokens_of(second)
    if a is None or b is None:
        return ()
    moved = [token for token in a.ids.keys() & b.ids.keys() if a.ids[token] != b.ids[token]]
    added = a.added | b.added
    alone = a.ids.keys() ^ b.ids.keys()
    differing = sorted(moved) or sorted(alone - added) or (["the order of merges"] if a.merges != b.merges else [])
    if differing:
        raise CheckpointError(
            f"the tokenizers of AV and AR differ in {some_of(differing)} ({first}, {second}): the two are of different models. "
            "Pass both halves of one pair, each with the tokenizer that was released with it."
        )
    text = f"{first} and {second} are one tokenizer but for added tokens that only one of them has: {some_of(sorted(alone))}."
    return (Note("checkpoint", text),) if alone else ()


@once_per_pass
def _tokens_of(path: Path) -> Tokens | None:
    """Return the tokens of a tokenizer.json; None where it cannot be read, which loading it says."""
    try:
        if path.stat().st_size > LARGEST_TOKENIZER:
            return None
        content = json.loads(path.read_bytes())
        model: Mapping[str, Any] = content["model"]
        vocabulary = model["vocab"]
        if not isinstance(vocabulary, dict):  # of a unigram model: tokens with their scores
            vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
        merges = tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or ())
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return Tokens({**vocabulary, **added}, frozenset(added), merges)
