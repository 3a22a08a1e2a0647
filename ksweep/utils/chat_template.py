"""Find the chat template of a tokenizer in its files, without transformers."""

from __future__ import annotations

from pathlib import Path

from ksweep.utils.files import read_json


def chat_template_text(directory: Path) -> str:
    """Return the chat template that transformers' tokenizers take from a directory; empty if there is none.

    `chat_template.jinja` comes before `tokenizer_config.json`; of several templates in that, the one named default is taken.
    `chat_template.json` belongs to processors of images and is not read (transformers 5.23, `tokenization_utils_base.py`).

    Raises:
        CheckpointError: tokenizer_config.json is damaged.
    """
    if (file := directory / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    if not (config := directory / "tokenizer_config.json").is_file():
        return ""
    template = read_json(config, "tokenizer configuration").get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return str(template or "")
