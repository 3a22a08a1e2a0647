"""Whose token is it: user, assistant, system, or the chat format's own? Read off token strings; no model, no tokenizer.

    template = detect_template(tokenizer.get_vocab())                       # gemma, chatml, llama3, harmony, or None
    tokens = tokenizer.convert_ids_to_tokens(ids)
    roles = token_roles(tokens, template, special=tokenizer.all_special_tokens, pad=tokenizer.pad_token)
    count_roles(roles)                                                      # {"user": 12, ..., "total": 40}

What a format adds around a message (markers, the role's name, the line break after it) is "special"; what lies between messages,
and what someone else says (tools), is "other". The reference lets a role go on after the end of a turn, knows Gemma only, and
calls everything else "other" or "special" (tae_reference.md 5).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

TokenRole = Literal["user", "assistant", "system", "special", "other", "pad"]
TOKEN_ROLES: tuple[TokenRole, ...] = get_args(TokenRole)
Template = Literal["gemma", "chatml", "llama3", "harmony"]


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """Markers of a chat template. A header is all from `start` to the end of the role's line, or to one of `header_ends`."""

    start: str
    header_ends: tuple[str, ...]
    """Markers that end a header; empty where the first line break does."""
    ends: tuple[str, ...]
    """Markers after which nobody speaks."""
    break_after_header: bool = False
    """Whether line breaks between header and message belong to the format."""
    others: tuple[str, ...] = ()
    """Further markers, special wherever they stand."""
    name_ends: tuple[str, ...] = ()
    """Markers inside a header after which the role's name is over."""
    names: dict[str, TokenRole] = field(default_factory=dict)

    @property
    def markers(self) -> frozenset[str]:
        """Every token of the format that is one by itself."""
        return frozenset({self.start, *self.header_ends, *self.ends, *self.others, *self.name_ends})


_NAMES: dict[str, TokenRole] = {"user": "user", "assistant": "assistant", "system": "system"}

CHAT_FORMATS: dict[Template, ChatFormat] = {
    # <|start|>assistant<|channel|>analysis<|message|>...<|end|>; developer instructions rank as system (OpenAI Harmony guide).
    "harmony": ChatFormat(
        start="<|start|>",
        header_ends=("<|message|>",),
        ends=("<|end|>", "<|return|>", "<|call|>"),
        name_ends=("<|channel|>", "<|constrain|>"),
        others=("<|startoftext|>", "<|endoftext|>"),
        names=_NAMES | {"developer": "system"},
    ),
    # <bos><start_of_turn>user\n...<end_of_turn>\n; a system message is put into the first user turn.
    "gemma": ChatFormat(
        start="<start_of_turn>",
        header_ends=(),
        ends=("<end_of_turn>",),
        others=("<bos>", "<eos>", "<pad>", "<unk>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        names={"user": "user", "model": "assistant", "system": "system"},
    ),
    # <|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n...<|eot_id|>
    "llama3": ChatFormat(
        start="<|start_header_id|>",
        header_ends=("<|end_header_id|>",),
        ends=("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
        break_after_header=True,
        others=("<|begin_of_text|>", "<|python_tag|>", "<|finetune_right_pad_id|>"),
        names=_NAMES,
    ),
    # <|im_start|>user\n...<|im_end|>\n (Qwen, and others)
    "chatml": ChatFormat(
        start="<|im_start|>", header_ends=(), ends=("<|im_end|>", "<|endoftext|>"), names=_NAMES | {"developer": "system"}
    ),
}


def detect_template(vocabulary: Collection[str]) -> Template | None:
    """Which chat format a tokenizer has the tokens of; None for a base model's."""
    for template, form in CHAT_FORMATS.items():
        if form.start in vocabulary and all(end in vocabulary for end in form.header_ends):
            return template
    return None


def token_roles(
    tokens: Sequence[str], template: Template | None, *, special: Collection[str] = (), pad: str | None = None
) -> list[TokenRole]:
    """The role of each token.

    Args:
        tokens: token strings, as decoded one by one or as the vocabulary spells them ("Ġ", "▁" and "Ċ" are understood).
        template: the chat format; without one every token is "other", "special" or "pad".
        special: tokens that are special wherever they stand, beside the format's own.
        pad: the padding token: a run of it at either end is "pad". In between it is a token like others (GPT-2 pads with EOS).
    """
    first, last = _without_padding(tokens, pad)
    reader = _Reader(CHAT_FORMATS[template] if template else None, frozenset(special))
    read: list[TokenRole] = [reader.role(token) for token in tokens[first:last]]
    before: list[TokenRole] = ["pad"] * first
    after: list[TokenRole] = ["pad"] * (len(tokens) - last)
    return before + read + after


def count_roles(roles: Iterable[TokenRole]) -> dict[str, int]:
    """How many tokens of each role, padding by itself; "total" is all of them."""
    counts = Counter(roles)
    return {**{role: counts[role] for role in TOKEN_ROLES}, "total": counts.total()}


def role_proportions(counts: dict[str, int]) -> dict[str, float | None]:
    """Share of each role among the tokens that are not padding; None where there are none."""
    known = counts["total"] - counts["pad"]
    return {role: counts[role] / known if known else None for role in TOKEN_ROLES if role != "pad"}


@dataclass
class _Reader:
    """Goes through a row: outside any turn, in a header, or in somebody's message."""

    form: ChatFormat | None
    special: frozenset[str]
    speaker: TokenRole = "other"
    header: str | None = None
    """What a header has said so far; None outside one."""
    name: str | None = None
    """The role's name, once a marker inside the header has ended it."""
    fresh: bool = False
    """Nothing has been said since the header."""

    def role(self, token: str) -> TokenRole:
        """Role of the next token."""
        if self.form is None:
            return "special" if token in self.special else "other"
        if token in self.form.markers:
            self._marker(token, self.form)
            return "special"
        if self.header is not None:
            self._header_text(_plain(token), self.form)
            return "special"
        return self._said(token, self.form)

    def _marker(self, token: str, form: ChatFormat) -> None:
        if token == form.start:
            self.speaker, self.header, self.name = "other", "", None
        elif token in form.header_ends:
            self._speak(form)
        elif token in form.name_ends:
            self.name = self.name if self.name is not None else self.header
        elif token in form.ends:
            self.speaker, self.header = "other", None

    def _header_text(self, text: str, form: ChatFormat) -> None:
        assert self.header is not None
        self.header += text
        if not form.header_ends and "\n" in text:
            self._speak(form)

    def _speak(self, form: ChatFormat) -> None:
        """The header is over, and its first word speaks: "assistant to=functions.x" calls, "functions.x to=assistant" answers."""
        words = (self.name if self.name is not None else self.header or "").split()
        self.speaker = form.names.get(words[0], "other") if words else "other"
        self.header, self.name, self.fresh = None, None, True

    def _said(self, token: str, form: ChatFormat) -> TokenRole:
        fresh, self.fresh = self.fresh, False
        if token in self.special:
            return "special"
        if fresh and form.break_after_header and _plain(token) and not _plain(token).strip("\n"):
            self.fresh = True
            return "special"
        return self.speaker


def _without_padding(tokens: Sequence[str], pad: str | None) -> tuple[int, int]:
    """First token that is not padding, and one after the last; (n, n) for a row of nothing else."""
    kept = [i for i, token in enumerate(tokens) if token != pad]
    return (kept[0], kept[-1] + 1) if kept else (len(tokens), len(tokens))


def _plain(token: str) -> str:
    """A vocabulary's spelling as text: byte-level BPE writes Ċ and Ġ, SentencePiece ▁ and <0x0A>."""
    return token.replace("Ċ", "\n").replace("Ġ", " ").replace("▁", " ").replace("<0x0A>", "\n")
