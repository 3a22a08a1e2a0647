"""Find the chat template of a tokenizer, in its files without transformers, or among those that transformers has loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ksweep.utils.files import read_json

MORE_TEMPLATES = "additional_chat_templates"
"""Folder of further templates, one a file, beside chat_template.jinja."""


def default_template(stated: Any) -> str:
    """Return the template that chats are rendered with; empty if there is none.

    Args:
        stated: `tokenizer.chat_template` of transformers, or what tokenizer_config.json has under that name: one template, or
            several by their names, of which transformers takes the one named default.
    """
    if isinstance(stated, list):
        stated = {item.get("name"): item.get("template") for item in stated if isinstance(item, dict)}
    return str((stated.get("default") if isinstance(stated, dict) else stated) or "")


def chat_template_text(directory: Path) -> str:
    """Return the chat template that transformers' tokenizers take from a directory; empty if there is none.

    Raises:
        CheckpointError: tokenizer_config.json is damaged.
    """
    return default_template(_stated(directory))


def has_several_templates(directory: Path) -> bool:
    """Return whether the tokenizer in a directory has chat templates by their names.

    Raises:
        CheckpointError: tokenizer_config.json is damaged.
    """
    return isinstance(_stated(directory), (dict, list))


def _stated(directory: Path) -> Any:
    """Return one template, or several with their names; None if there is none.

    `chat_template.jinja` and further ones in a folder beside it come before `tokenizer_config.json`. `chat_template.json` is for
    processors of images and is not read (transformers 5.23, `tokenization_utils_base.py`).
    """
    more = {path.name.removesuffix(".jinja"): path for path in sorted((directory / MORE_TEMPLATES).glob("*.jinja"))}
    file, config = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    files = ({"default": file} if file.is_file() else {}) | more
    texts = {name: path.read_text(encoding="utf-8", errors="replace") for name, path in files.items()}
    if [*texts] == ["default"]:
        return texts["default"]
    if texts:
        return texts
    return read_json(config, "tokenizer configuration").get("chat_template") if config.is_file() else None
