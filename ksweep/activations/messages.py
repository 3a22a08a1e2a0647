"""Read conversations as data sets spell them: every message as its role, its content, and what else chat templates write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ksweep.utils.errors import DataError
from ksweep.utils.plain_values import has_lone_surrogate
from ksweep.utils.text import bounded_repr

MESSAGE_KEYS = (("role", "from"), ("content", "value"))
"""Keys of a message, and what ShareGPT calls them."""
FIRST_ROLE_NAMES = {"human": "user", "gpt": "assistant"}
"""Names that earlier versions knew; all others went into the template as they stood."""
ROLE_NAMES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "chatbot", "ai", "model"), "assistant"),
    **{name: name for name in ("user", "assistant", "system", "developer", "tool", "function", "observation", "ipython")},
}
"""Roles by their names in small letters; templates know those of the last line themselves."""
OTHER_MESSAGE_KEYS = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
"""Keys beside role and content that chat templates write; all others (language, toxicity, ...) describe a message."""
TEXT_PARTS = (None, "text", "input_text", "output_text")
"""Types of the parts of a content that are text; the last two are those of OpenAI's responses."""
NOT_READ = {
    **dict.fromkeys(
        ("image", "images", "image_url", "audio", "audios", "input_audio", "video", "videos", "video_url"),
        "pictures and sound are not read, and without them it would be another conversation: leave such rows out",
    ),
    "function_call": "templates know calls as tool_calls: write it so",
}
"""Keys of messages and parts that would be lost, and what to do about them."""


def is_conversation(value: Any) -> bool:
    """Return whether a value is a list of messages, or lists of their roles and contents beside one another."""
    if isinstance(value, Mapping):
        return any(all(isinstance(value.get(key), list) for key in keys) for keys in zip(*MESSAGE_KEYS, strict=True))
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def read_messages(value: Any, row: str, column: str) -> tuple[Mapping[str, Any], ...]:
    """Return the messages of a conversation; none for null.

    Raises:
        DataError: no conversation, or a message that is not understood.
    """
    if value is None:
        return ()
    messages = _listed(value, row, column)
    return tuple(_message(message, f"message {i} of {row}", column) for i, message in enumerate(messages))


def messages_identity(first: Any) -> dict[str, str]:
    """Return what sets keys apart from those of earlier versions, which read some conversations in another way.

    That is told by the first conversation of a text: names of roles if one was not known, or if it is ShareGPT's, in which each
    conversation may have others; calls of tools where messages have a field for them.
    """
    messages = [message for message in _listed(first, "", "") if isinstance(message, Mapping)]
    roles = [message.get("role") for message in messages]
    identity = {}
    if any(role is None or ROLE_NAMES.get(_plain(role)) != FIRST_ROLE_NAMES.get(role, role) for role in roles):
        identity["roles"] = "by name"
    if any("tool_calls" in message for message in messages):
        identity["tool_calls"] = "without nulls"
    return identity


def _listed(value: Any, row: str, column: str) -> list[Any]:
    """Return a list of messages, also of one that `datasets.Sequence` has turned into a list for each key."""
    if isinstance(value, list):
        return value
    if not is_conversation(value):
        raise DataError(f"{row} has a {type(value).__name__} {column}, where earlier rows have conversations: make all alike")
    lists = {key: values for key, values in value.items() if isinstance(values, list)}
    if len(lengths := {len(values) for values in lists.values()}) > 1:
        raise DataError(
            f"{row} has lists of {sorted(lengths)} entries ({', '.join(lists)}) {column}; expected one for each message"
        )
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _message(message: Any, which: str, column: str) -> Mapping[str, Any]:
    """Return role, content and what else a template writes of a message.

    Raises:
        DataError: no role or an unknown one, a content that is no text, or something that would be lost.
    """
    if not isinstance(message, Mapping):
        raise DataError(f"{which} is a {type(message).__name__} {column}; expected {{'role': 'user', 'content': '...'}}")
    _refuse_lost(message, which, column)
    role, content = (message.get(old) if message.get(new) is None else message[new] for new, old in MESSAGE_KEYS)
    if isinstance(content, list):
        content = _joined(content, which, column)
    others = {key: _without_nulls(message[key]) for key in OTHER_MESSAGE_KEYS if message.get(key) not in (None, [])}
    if not isinstance(role, str) or not (isinstance(content, str) or (content is None and "tool_calls" in others)):
        raise DataError(
            f"{which} {column} has role {bounded_repr(role)} and a content of type {type(content).__name__}; expected texts: "
            "{'role': 'user', 'content': '...'}, or {'from': 'human', 'value': '...'}. Pictures and sound are not read"
        )
    if has_lone_surrogate(content or ""):
        raise DataError(f"{which} has half of a surrogate pair {column}, which is no character: correct or drop it")
    if not isinstance(others.get("tool_calls", []), list):
        raise DataError(f"{which} has tool_calls of type {type(others['tool_calls']).__name__} {column}; expected a list")
    return {"role": _role(role, which, column), "content": content, **others}


def _role(name: str, which: str, column: str) -> str:
    if (role := ROLE_NAMES.get(_plain(name))) is not None:
        return role
    raise DataError(f"{which} {column} has role {bounded_repr(name)}, which is none of {', '.join(ROLE_NAMES)}: rename it")


def _plain(name: Any) -> str:
    return str(name).strip().lower()


def _joined(parts: list[Any], which: str, column: str) -> str | list[Any]:
    """Return the text of a content's parts; the parts themselves if they are none.

    Raises:
        DataError: a part that is no text.
    """
    if not all(isinstance(part, Mapping) for part in parts):
        return parts
    for part in parts:
        _refuse_lost(part, which, column)
        if part.get("type") not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise DataError(
                f"{which} {column} has a content with a part of type {bounded_repr(part.get('type'))}; expected parts of text: "
                "{'type': 'text', 'text': '...'}. Pictures and sound are not read"
            )
    return "".join(part["text"] for part in parts)


def _refuse_lost(holder: Mapping[str, Any], which: str, column: str) -> None:
    for key, remedy in NOT_READ.items():
        if _says_something(holder.get(key)):
            raise DataError(f"{which} has {key} {column}: {remedy}")


def _says_something(value: Any) -> bool:
    """Return whether a value is neither null nor empty, nor made of such: Parquet has a place for what only other rows have."""
    if isinstance(value, Mapping):
        return any(map(_says_something, value.values()))
    return any(map(_says_something, value)) if isinstance(value, list) else value not in (None, "")


def _without_nulls(value: Any) -> Any:
    """Return a value without entries that are null: in a call of Parquet's they stand for arguments of other calls."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value
