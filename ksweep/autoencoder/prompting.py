"""Prompting as data: how a vector enters the AV's prompt, how its answers are read, and how the AR's prompt is made.

A layout fills these records from a checkpoint's files (`nla/layout.py`), and the fields of `autoencoder.prompting` in the spec
replace single values. Code that loads models reads the records, and never a sidecar.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MARKER_FIELD, TEXT_FIELD = "{injection_char}", "{explanation}"
"""The fields of the AV's and of the AR's template."""


@dataclass(frozen=True)
class ReplaceEmbedding:
    """Put the vector, scaled to norm `scale`, in place of the marker's embedding row."""

    scale: float


@dataclass(frozen=True)
class AddAfterBlock:
    """Add the vector to the output of block `block` at the marker, scaled to the norm of that output."""

    block: int
    """0-based."""


Injection = ReplaceEmbedding | AddAfterBlock


@dataclass(frozen=True, kw_only=True)
class AvPrompting:
    """How an AV is prompted and its answers are read. None: the checkpoint does not state it, and it is not checked."""

    injection: Injection
    template: str
    """User message; its one field is the marker."""
    marker: str
    marker_id: int | None = None
    left_id: int | None = None
    """Token before the marker."""
    right_id: int | None = None
    """Token after the marker."""
    chat_arguments: tuple[tuple[str, Any], ...] = ()
    """Arguments of the chat template by name."""
    asks_for_thinking: bool = False
    """Whether enable_thinking must be the chat template's default."""
    prefill: str = ""
    """Beginning of the answer, which is part of the prompt."""
    opening_tag: str = "<explanation>"
    """What an explanation follows; empty: it begins with the answer."""
    closing_tag: str = "</explanation>"
    """What ends an explanation; empty: it ends with the answer."""
    stop_tokens: tuple[str, ...] | None = None
    """Tokens that end an answer; None: the end-of-sequence tokens of the model."""

    @property
    def message(self) -> str:
        """The user message, with the marker filled in."""
        return self.template.replace(MARKER_FIELD, self.marker)


@dataclass(frozen=True, kw_only=True)
class ArPrompting:
    """How an AR is prompted and read."""

    template: str
    """The prompt; its one field is the explanation. Doubled braces stand for single ones."""
    special_tokens: bool = True
    """Whether the tokenizer adds its special tokens, such as a BOS; a template that begins with BOS gets no second one."""
    suffix_ids: tuple[int, ...] | None = None
    """Last token ids of every prompt; None is not checked."""
    readout: int = -1
    """Token of the prompt whose hidden state is read, counted from the end: -1 is the last one."""

    @property
    def affixes(self) -> tuple[str, str]:
        """The prompt before and after the explanation, as `template.format` would leave it."""
        before, _, after = self.template.partition(TEXT_FIELD)
        return _unescaped(before), _unescaped(after)


def _unescaped(text: str) -> str:
    return text.replace("{{", "{").replace("}}", "}")
