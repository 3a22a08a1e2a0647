"""Prompting as data: how a vector enters the AV's prompt, how its answers are read, and how the AR's prompt is made.

A layout fills these records from a checkpoint's files (`nla/layout.py`), and the fields of `autoencoder.prompting` in the spec
replace single values. Code that loads models reads the records, and never a sidecar.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MARKER_FIELD, TEXT_FIELD, DEPTH_FIELD = "{injection_char}", "{explanation}", "{depth_pct}"
"""The fields of templates: the marker, the explanation, and the depth of the layer in percent of the model."""


@dataclass(frozen=True)
class ReplaceEmbedding:
    """Put the vector in place of the marker's embedding row."""

    scale: float
    """Norm that the vector is scaled to, or the number that it is multiplied by."""
    multiplies: bool = False


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
    is_chat: bool = True
    """Whether the message goes through the chat template; if not, it is the whole prompt, without special tokens."""
    chat_arguments: tuple[tuple[str, Any], ...] = ()
    """Arguments of the chat template by name."""
    prompt_ids: tuple[int, ...] | None = None
    """Token ids of the whole rendered prompt; `prefill` may follow it."""
    prompt_text: str | None = None
    """The whole rendered prompt, where its ids are not stated."""
    asks_for_thinking: bool = False
    """Whether enable_thinking must be the chat template's default."""
    prefill: str = ""
    """Beginning of the answer, which is part of the prompt."""
    opening_tag: str = "<explanation>"
    """What an explanation follows; empty: it begins with the answer."""
    closing_tag: str = "</explanation>"
    """What ends an explanation; empty: it ends with the answer."""
    must_close: bool = True
    """Whether an answer without the closing tag has failed; if not, its end closes it."""
    empty_counts: bool = False
    """Whether an empty explanation is one, which the AR reads, rather than a failure."""
    skips_special_tokens: bool = False
    """Whether special tokens are left out of the answer's text."""
    stop_tokens: tuple[str, ...] | None = None
    """Tokens that end an answer; None: the end-of-sequence tokens of the model."""

    @property
    def states_prompt(self) -> bool:
        """Whether the whole rendered prompt is stated."""
        return self.prompt_ids is not None or self.prompt_text is not None

    @property
    def message(self) -> str:
        """The user message, with the marker filled in."""
        return self.template.replace(MARKER_FIELD, self.marker)


@dataclass(frozen=True, kw_only=True)
class ArPrompting:
    """How an AR is prompted and read."""

    template: str
    """The prompt; its one field is the explanation."""
    doubled_braces: bool = True
    """Whether doubled braces in the template stand for single ones, as in `str.format`."""
    special_tokens: bool = True
    """Whether the tokenizer adds its special tokens, such as a BOS; a template that begins with BOS gets no second one."""
    suffix_ids: tuple[int, ...] | None = None
    """Last token ids of every prompt; None is not checked."""
    readout: int = -1
    """Token of the prompt whose hidden state is read, counted from the end: -1 is the last one."""
    marker: str | None = None
    """The token that is read instead, where it first occurs."""
    marker_id: int | None = None
    longest: int | None = None
    """Most tokens of a prompt in training; None is not limited."""
    normalises: bool = False
    """Whether the hidden state is scaled to norm sqrt(d_model) before the head."""

    @property
    def affixes(self) -> tuple[str, str]:
        """The prompt before and after the explanation."""
        before, _, after = self.template.partition(TEXT_FIELD)
        return (_unescaped(before), _unescaped(after)) if self.doubled_braces else (before, after)


def _unescaped(text: str) -> str:
    return text.replace("{{", "{").replace("}}", "}")
