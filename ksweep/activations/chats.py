"""Conversations as rows: read lists of messages, and write them as the base model's own chat template does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ksweep.activations.chat_roles import CHAT_FORMATS, SpokenTokens, TokenRole, detect_template
from ksweep.activations.datasets import TextRow, first_row, text_format
from ksweep.activations.positions import asks_for_roles, needs_roles
from ksweep.config.spec import Activations
from ksweep.utils.bos_token import may_put_behind, one_bos
from ksweep.utils.chat_template import chat_template_text, default_template, has_several_templates
from ksweep.utils.errors import CheckpointError, DataError
from ksweep.utils.notes import Note
from ksweep.utils.template_date import TEMPLATE_DATE, dated, was_misdated

FILES_OF_TOKENS = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")
"""Files that name the tokens of a tokenizer."""
NOT_ARGUMENTS = frozenset({"messages", "tools", "documents", "bos_token", "eos_token", "chat_template", "strftime_now"})
"""Variables of templates that are not the user's to state."""

SPOKEN_ROLES: dict[str, TokenRole] = {
    "user": "user", "assistant": "assistant", "model": "assistant", "system": "system", "developer": "system",
}  # fmt: skip


def check_chats(activations: Activations, directory: Path) -> dict[str, object]:
    """Return the part of the identity that says how conversations are written; empty where the text holds none.

    Raises:
        DataError: settings for chats beside a text that holds none, or an argument that the template does not know.
        CheckpointError: the base model has no chat template, or one that computes the date.
    """
    asked = {name: getattr(activations, name) for name in ("chat_arguments", "system_prompt")}
    stated = [name for name, value in asked.items() if value is not None]
    stated += ["positions=prompt_end"] if activations.positions == "prompt_end" else []
    is_hub = text_format(activations) == "hub"  # whose rows are not read while planning
    first = None if is_hub else first_row(activations)
    if not is_hub and (first is None or first.messages is None):
        if stated:
            raise DataError(
                f"activations.{stated[0]} is for conversations, and column {activations.text_column!r} of {activations.text} "
                "holds none: set activations.text_column to a column of messages, or leave it out"
            )
        _check_known_format(activations, directory)
        return {}
    template = chat_template_text(directory)
    if stated or not is_hub:
        check_arguments(activations, template, directory)
        dated(template, directory)
    written = {name: value for name, value in asked.items() if value is not None}
    date = {"date": TEMPLATE_DATE.isoformat()} if stated or not is_hub else {}
    chat = {**date, **_mended(template, directory), **written}
    return {"chat": chat} if chat else {}


def _mended(template: str, directory: Path) -> dict[str, object]:
    """Return what sets keys apart from those of earlier versions, which wrote conversations of such a base in another way."""
    mended: dict[str, object] = {}
    if has_several_templates(directory):  # before, the text of all of them was taken for one
        mended["template"] = "default"
    if was_misdated(template):
        mended["template_date"] = "as formatted"
    if may_put_behind(directory):  # before, an end-of-sequence token stood behind each conversation
        mended["end"] = "as written"
    return mended


def _check_known_format(activations: Activations, directory: Path) -> None:
    """Check that a tokenizer may know a chat format, where positions in texts or token ids go by roles.

    Raises:
        DataError: none of its files names the tokens of one.
    """
    files = [path for name in FILES_OF_TOKENS if (path := directory / name).is_file()]
    if not needs_roles(activations) or not (directory / FILES_OF_TOKENS[0]).is_file():
        return
    named = "".join(path.read_text(encoding="utf-8", errors="replace") for path in files)
    marks = {mark for form in CHAT_FORMATS.values() for mark in (form.start, *form.header_ends)}
    if detect_template({mark for mark in marks if json.dumps(mark) in named}) is None:
        raise DataError(
            f"activations.{asks_for_roles(activations)} goes by the roles of tokens, and {activations.text} holds no "
            f"conversations in column {activations.text_column!r}: {no_known_format(activations.model)}"
        )


def no_known_format(model: str | None) -> str:
    """Return what to do where a tokenizer does not tell the roles of tokens."""
    return (
        f"the tokenizer of {model} has no chat format that ksweep knows. Give conversations (a column of messages) to a model "
        "tuned to chat"
    )


def check_arguments(activations: Activations, template: str, directory: Path) -> None:
    """Check that there is a chat template, and that it uses every argument that the spec states.

    Raises:
        CheckpointError: there is none. DataError: an argument would change nothing.
    """
    if not template:
        raise CheckpointError(
            f"base model {directory} has no chat template to write conversations of {activations.text} with "
            f"(column {activations.text_column!r}): take the model that was tuned to chat, or a column of text"
        )
    for name in dict(activations.chat_arguments or ()):
        if name in NOT_ARGUMENTS or not re.search(rf"\b{re.escape(name)}\b", template):
            raise DataError(
                f"activations.chat_arguments has {name!r}, which is no argument of the chat template of {directory}: leave it "
                "out, or check the spelling"
            )


MOST_NOTES = 10
MANY_REFUSED = 64
"""Conversations, none of which a template accepts, after which it is taken to fit none of a text."""


class ChatWriter:
    """Writes conversations as the chat template of a tokenizer does."""

    def __init__(self, tokenizer: Any, activations: Activations, directory: Path) -> None:
        """Check the template and its arguments.

        Raises:
            CheckpointError, DataError: as `check_arguments`; and a template that computes the date.
        """
        self.tokenizer, self.activations = tokenizer, activations
        template = default_template(tokenizer.chat_template)
        check_arguments(activations, template, directory)
        self.template = dated(template, directory)
        self.notes: set[Note] = set()
        """What the template said of conversations that it refused."""
        self._num_written = self._num_refused = 0

    def write(self, row: TextRow) -> TextRow:
        """Return the row with its conversation as text, empty if the template refuses it; then a note says what it said.

        Under positions=prompt_end a conversation has no last answer; one that is nothing else is empty.

        Raises:
            DataError: the template has refused MANY_REFUSED conversations, and accepted none.
        """
        text, messages = "", self.messages(row)
        try:
            text = self._text(messages) if messages else ""
        except Exception as error:  # templates raise what they like
            self._refused(row, messages, error)
        self._num_written += bool(text)
        return replace(row, text=text, messages=row.messages if text else ())

    def _refused(self, row: TextRow, messages: Sequence[Mapping[str, Any]], error: Exception) -> None:
        self._num_refused += 1
        text = f"Conversations of {self.activations.text} that the base model's chat template refuses give no activations"
        if len(self.notes) < MOST_NOTES:  # a template may say what stands in the conversation
            self.notes.add(Note("text", f"{text}: {str(error)[:200]}"))
        if self._num_refused >= MANY_REFUSED and not self._num_written:
            raise DataError(
                f"{self.activations.text} does not fit the chat template of the base model, which refuses its first "
                f"{self._num_refused} conversations. Of row {row.index} it says: {str(error)[:300]} "
                f"(roles: {', '.join(str(m['role']) for m in messages)[:200]})"
            ) from error

    def _text(self, messages: Sequence[Mapping[str, Any]]) -> str:
        arguments = dict(self.activations.chat_arguments or ())
        if self.activations.positions == "prompt_end":
            arguments["add_generation_prompt"] = True
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, chat_template=self.template, **arguments))

    def spoken(self, row: TextRow, ids: Sequence[int]) -> SpokenTokens | None:
        """Return who says each token of a conversation that was written; None where its messages are not found in the text."""
        if not self.tokenizer.is_fast:
            return None
        alone, messages = one_bos(row.text, self.tokenizer), self.messages(row)
        places = message_places(alone, messages, lambda others: one_bos(self._text(others), self.tokenizer))
        encoded = self.tokenizer(alone, add_special_tokens=True, return_offsets_mapping=True)
        begin = next((i for i in (0, 1) if encoded["input_ids"][i : i + len(ids)] == list(ids)), None)
        if places is None or begin is None:  # 1: the tokenizer has put a second BOS there
            return None
        numbers = tokens_at(places, encoded["offset_mapping"][begin : begin + len(ids)])
        special = frozenset(self.tokenizer.all_special_ids)
        roles: list[TokenRole] = [
            "special" if number is None or i in special else SPOKEN_ROLES.get(str(messages[number]["role"]), "other")
            for i, number in zip(ids, numbers, strict=True)
        ]
        return SpokenTokens(roles, numbers)

    def messages(self, row: TextRow) -> list[dict[str, Any]]:
        """Return the messages that are written: the system prompt before those that have none, and of a prompt no last answer."""
        messages = [dict(message) for message in row.messages or ()]
        if self.activations.positions == "prompt_end":
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
        system = self.activations.system_prompt
        if system is not None and messages and messages[0]["role"] not in ("system", "developer"):
            messages.insert(0, {"role": "system", "content": system})
        return messages


def message_places(
    text: str, messages: Sequence[Mapping[str, Any]], write: Callable[[list[dict[str, Any]]], str]
) -> list[tuple[int, int]] | None:
    """Return where in a written conversation each message stands, as first character and one past the last; for any format.

    The same conversation is written with a mark in place of each message: what stands around the marks is the format. None where
    it does not stand around the messages themselves, or where a message is written more than once.
    """
    contents = [str(message.get("content") or "") for message in messages]
    marks = [f"\ue000{k}\ue001" for k in range(len(messages))]  # of Unicode's private use: no letter, no space
    for pattern in ("", r".*</think>\s*"):  # 1. a message as a whole; 2. what follows the thoughts, which templates move or drop
        heads = [match[0] if (match := re.match(pattern, content, re.DOTALL)) else "" for content in contents]
        changed = [{**m, "content": head + mark} for m, head, mark in zip(messages, heads, marks, strict=True)]
        try:
            written = write(changed)
        except Exception:  # templates raise what they like
            return None
        said = [content.removeprefix(head) for content, head in zip(contents, heads, strict=True)]
        if (places := _between(text, written, marks, said)) is not None:
            return places
    return None


def _between(text: str, written: str, marks: Sequence[str], contents: Sequence[str]) -> list[tuple[int, int]] | None:
    """Return where contents stand in a text that is like `written` with them in place of the marks, trimmed or not."""
    if any(written.count(mark) > 1 for mark in marks):
        return None
    order = sorted((at, k) for k, mark in enumerate(marks) if (at := written.find(mark)) >= 0)
    places, after, at = [(0, 0)] * len(marks), 0, 0
    ends = [*(start for start, _ in order[1:]), len(written)]
    for (start, k), end in zip(order, ends, strict=True):
        if not text.startswith(written[after:start], at):
            return None
        at, after = at + start - after, start + len(marks[k])
        content, behind = contents[k], written[after:end]
        forms = (content, content.lstrip(), content.rstrip(), content.strip())
        fitting = [len(form) for form in forms if text.startswith(form + behind, at)]
        if not fitting:
            return None
        places[k] = (at, at + max(fitting))
        at = places[k][1]
    return places if text[at:] == written[after:] else None


def tokens_at(places: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]]) -> list[int | None]:
    """Return the number of the message that each token ends in, as many begin with the space before; None between messages.

    Args:
        places: as `message_places` returns them.
        offsets: the first character of each token and one past the last, as fast tokenizers say.
    """
    return [
        None if start == end else next((k for k, (first, stop) in enumerate(places) if first < end <= stop), None)
        for start, end in offsets
    ]
