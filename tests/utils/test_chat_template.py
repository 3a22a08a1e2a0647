"""The chat template in a tokenizer's files: what transformers itself finds there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer

from ksweep.utils.chat_template import chat_template_text, default_template, has_several_templates

JINJA, CONFIG, JSON = "of the jinja file", "of the configuration", "of the processor"
NAMED = [{"name": "tool_use", "template": "with tools"}, {"name": "default", "template": CONFIG}]


@pytest.mark.parametrize("jinja", [None, JINJA])
@pytest.mark.parametrize("config", [None, CONFIG, NAMED])
@pytest.mark.parametrize("of_processor", [None, JSON])
@pytest.mark.parametrize("more", [(), ("tool_use",), ("tool_use", "default")])
def test_the_template_is_the_one_that_transformers_takes(
    tmp_path: Path, jinja: str | None, config: object, of_processor: str | None, more: tuple[str, ...]
) -> None:
    Tokenizer(WordLevel({"a": 0}, "a")).save(str(tmp_path / "tokenizer.json"))
    stated = {"tokenizer_class": "PreTrainedTokenizerFast"} | ({"chat_template": config} if config else {})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(stated))
    if jinja:
        (tmp_path / "chat_template.jinja").write_text(jinja)
    if of_processor:
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": of_processor}))
    for name in more:
        (tmp_path / "additional_chat_templates").mkdir(exist_ok=True)
        (tmp_path / "additional_chat_templates" / f"{name}.jinja").write_text(f"in a file named {name}")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    try:
        expected = tokenizer.get_chat_template()
    except ValueError:  # none, or none named default
        expected = ""
    assert chat_template_text(tmp_path) == default_template(tokenizer.chat_template) == expected
    assert has_several_templates(tmp_path) == isinstance(tokenizer.chat_template, dict)


def test_a_directory_without_a_tokenizer_has_no_template(tmp_path: Path) -> None:
    assert chat_template_text(tmp_path) == ""
