"""Find the role of each token: user, assistant, system, or part of the chat format. Works on token strings alone.

    template = detect_template(tokenizer.get_vocab())                       # gemma, chatml, llama3, harmony, or None
    tokens = tokenizer.convert_ids_to_tokens(ids)
    roles = token_roles(tokens, template, special=tokenizer.all_special_tokens, pad=tokenizer.pad_token)
    count_roles(roles)                                                      # {"user": 12, ..., "total": 40}

Tokens that a format adds around a message (markers, the role's name, the line break after it) are "special"; tokens between
messages and messages of other roles (tools) are "other". The reference continues a role after the end of a turn, knows Gemma
only, and calls all else "other" or "special".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

TokenRole = Literal["user", "assistant", "system", "special", "other", "pad"]
TOKEN_ROLES: tuple[TokenRole, ...] = get_args(TokenRole)
Template = Literal["gemma", "chatml", "llama3", "harmony"]


class SpokenTokens(NamedTuple):
    """Who says each token of a row."""

    roles: list[TokenRole]
    messages: list[int | None]
    """Number of the message that the token is in, special tokens inside it included; None outside of messages."""


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """Markers of a chat template. A header goes from `start` to the end of the role's line, or to a marker of `header_ends`."""

    start: str
    header_ends: tuple[str, ...]
    """Markers that end a header; empty if the first line break does."""
    ends: tuple[str, ...]
    """Markers that end a message."""
    break_after_header: bool = False
    """Whether line breaks between header and message are part of the format."""
    others: tuple[str, ...] = ()
    """Further markers, special wherever they stand."""
    name_ends: tuple[str, ...] = ()
    """Markers inside a header that end the role's name."""
    names: dict[str, TokenRole] = field(default_factory=dict)

    @property
    def markers(self) -> frozenset[str]:
        """All marker tokens of the format."""
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
    """Return the chat format whose tokens a tokenizer has; None for that of a base model."""
    for template, form in CHAT_FORMATS.items():
        if form.start in vocabulary and all(end in vocabulary for end in form.header_ends):
            return template
    return None


def token_roles(
    tokens: Sequence[str], template: Template | None, *, special: Collection[str] = (), pad: str | None = None
) -> list[TokenRole]:
    """Return the role of each token.

    Args:
        tokens: token strings, as decoded one by one or as the vocabulary spells them ("Ġ", "▁" and "Ċ" are understood).
        template: the chat format; without one every token is "other", "special" or "pad".
        special: tokens that are special wherever they stand, besides those of the format.
        pad: the padding token: a run of it at either end is "pad"; inside it is a token like any other (GPT-2 pads with EOS).
    """
    return spoken_tokens(tokens, template, special=special, pad=pad).roles


def spoken_tokens(
    tokens: Sequence[str], template: Template | None, *, special: Collection[str] = (), pad: str | None = None
) -> SpokenTokens:
    """Return the role of each token, and the message that it is in; arguments as of `token_roles`."""
    first, last = _without_padding(tokens, pad)
    reader = _Reader(CHAT_FORMATS[template] if template else None, frozenset(special))
    read: list[tuple[TokenRole, int | None]] = [(reader.role(token), reader.message) for token in tokens[first:last]]
    padding: tuple[TokenRole, None] = ("pad", None)
    row = [padding] * first + read + [padding] * (len(tokens) - last)
    return SpokenTokens([role for role, _ in row], [message for _, message in row])


def count_roles(roles: Iterable[TokenRole]) -> dict[str, int]:
    """Return the number of tokens of each role, "pad" among them; "total" counts all."""
    counts = Counter(roles)
    return {**{role: counts[role] for role in TOKEN_ROLES}, "total": counts.total()}


def role_proportions(counts: dict[str, int]) -> dict[str, float | None]:
    """Return the share of each role among the tokens that are not padding; None if all are padding."""
    num_tokens = counts["total"] - counts["pad"]
    return {role: counts[role] / num_tokens if num_tokens else None for role in TOKEN_ROLES if role != "pad"}


@dataclass
class _Reader:
    """Reads a row token by token. Its state is: outside any turn, in a header, or in a message."""

    form: ChatFormat | None
    special: frozenset[str]
    speaker: TokenRole = "other"
    header: str | None = None
    """Text of the header so far; None outside a header."""
    name: str | None = None
    """The role's name, if a marker inside the header has ended it."""
    fresh: bool = False
    """Whether the header has just ended and no message token came since."""
    count: int = 0
    """Messages so far."""
    message: int | None = None
    """Number of the message that the last token is in."""

    def role(self, token: str) -> TokenRole:
        """Return the role of the next token."""
        if self.form is None:
            return "special" if token in self.special else "other"
        # 1. A marker opens or ends a header or a message.
        if token in self.form.markers:
            self._marker(token, self.form)
            return "special"
        # 2. Inside a header, tokens spell the role's name.
        if self.header is not None:
            self._header_text(_plain(token), self.form)
            return "special"
        # 3. Otherwise the token belongs to the message, or to no message.
        return self._message_token(token, self.form)

    def _marker(self, token: str, form: ChatFormat) -> None:
        if token == form.start:
            self.speaker, self.header, self.name, self.message = "other", "", None, None
        elif token in form.header_ends:
            self._speak(form)
        elif token in form.name_ends:
            self.name = self.name if self.name is not None else self.header
        elif token in form.ends:
            self.speaker, self.header, self.message = "other", None, None

    def _header_text(self, text: str, form: ChatFormat) -> None:
        assert self.header is not None
        self.header += text
        if not form.header_ends and "\n" in text:
            self._speak(form)

    def _speak(self, form: ChatFormat) -> None:
        """End the header; its first word is the speaker: "assistant to=functions.x" calls, "functions.x to=assistant" answers."""
        words = (self.name if self.name is not None else self.header or "").split()
        self.speaker = form.names.get(words[0], "other") if words else "other"
        self.header, self.name, self.fresh = None, None, True
        self.message, self.count = self.count, self.count + 1

    def _message_token(self, token: str, form: ChatFormat) -> TokenRole:
        fresh, self.fresh = self.fresh, False
        if token in self.special:
            return "special"
        if fresh and form.break_after_header and _plain(token) and not _plain(token).strip("\n"):
            self.fresh = True
            return "special"
        return self.speaker


def _without_padding(tokens: Sequence[str], pad: str | None) -> tuple[int, int]:
    """Return the first index that is not padding and one past the last; (n, n) for a row of padding alone."""
    kept = [i for i, token in enumerate(tokens) if token != pad]
    return (kept[0], kept[-1] + 1) if kept else (len(tokens), len(tokens))


def _plain(token: str) -> str:
    """Return a vocabulary entry as text: byte-level BPE writes Ċ and Ġ, SentencePiece ▁ and <0x0A>."""
    return token.replace("Ċ", "\n").replace("Ġ", " ").replace("▁", " ").replace("<0x0A>", "\n")
