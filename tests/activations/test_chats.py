"""Conversations through the base's own chat template: one BOS, positions by role, and roles that are landed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from ksweep.activations import activations_key, ensure, plan_activations
from ksweep.activations.chats import check_chats, dated, message_places, tokens_at
from ksweep.activations.datasets import read_documents, text_identity
from ksweep.activations.positions import row_positions
from ksweep.config.spec import Activations
from ksweep.utils.errors import CheckpointError, DataError, SpecError
from ksweep.utils.template_date import was_misdated
from tests.activations.chats import BOS, MARKERS, make_chat_base
from tests.activations.helpers import passages, spec, write_jsonl
from tests.tiny_models import make_base

LAYER = 0
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if thinks is defined and not thinks %}<think></think>{% endif %}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
PLAIN = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }} {% endfor %}"
"""A format whose marks ksweep does not know."""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA, "gemma": PLAIN}


def set_template(base: Path, template: str) -> Path:
    (base / "chat_template.jinja").write_text(template)
    return base


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("chat")
    made = {form: make_chat_base(folder / form, form) for form in TEMPLATES}
    return {form: set_template(path, TEMPLATES[form]) for form, path in made.items()}


def talks(count: int = 6) -> list[list[dict[str, str]]]:
    words = [text.rstrip(".") for text in passages(4 * count, low=4, high=9)]  # the tokenizer like Gemma's has no full stop
    roles = ("user", "assistant", "user", "assistant")
    return [[{"role": r, "content": words[4 * i + j]} for j, r in enumerate(roles)] for i in range(count)]


def write(path: Path, conversations: list[Any], **columns: Any) -> Path:
    rows = [{"conversation": talk, "conversation_hash": f"c{i}", **columns} for i, talk in enumerate(conversations)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def request(base: Path, text: Path, count: int, **fields: Any) -> Activations:
    options = {"text_column": "conversation", "document_column": "conversation_hash", "min_position": 0}
    return spec(base, text, count, **(options | fields))


def token_ids(base: Path, messages: list[dict[str, str]], **arguments: Any) -> list[int]:
    """What transformers itself gives a model that is to answer."""
    found = AutoTokenizer.from_pretrained(base).apply_chat_template(messages, tokenize=True, return_dict=False, **arguments)
    return list(found)


@pytest.mark.parametrize("form", list(TEMPLATES))
def test_tokens_are_those_of_the_models_own_template_with_one_bos(form: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base, conversations = bases[form], talks()
    path = write(tmp_path / "chat.jsonl", conversations)
    wanted = [token_ids(base, talk) for talk in conversations]
    asked = request(base, path, sum(map(len, wanted)), positions="all", candidates="not_padding", max_length=512)
    table = ensure(asked, LAYER, tmp_path / "cache")
    assert table.column("token_id").tolist() == [i for ids in wanted for i in ids]
    bos = AutoTokenizer.from_pretrained(base).bos_token_id
    assert [ids.count(bos) for ids in wanted] == [0 if form == "chatml" else 1] * 6


@pytest.mark.parametrize("form", list(TEMPLATES))
def test_positions_by_role_are_tokens_of_messages_of_that_role(form: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base, conversations = bases[form], talks()
    path = write(tmp_path / "chat.jsonl", conversations)
    tokenizer = AutoTokenizer.from_pretrained(base)
    # 1. The last token of each message ends it, and has its role.
    ends = ensure(request(base, path, 24, positions="turn_ends", max_length=512), LAYER, tmp_path / "cache")
    assert ends.column("role").tolist() == ["user", "assistant"] * 12
    contents = [message["content"] for talk in conversations for message in talk]
    assert all(window.endswith(content[-10:]) for window, content in zip(ends.column("window"), contents, strict=True))
    # 2. Every token of the answers: together they spell them.
    said = [m["content"] for talk in conversations for m in talk if m["role"] == "assistant"]
    fields = {"positions": "all", "roles": ("assistant",), "max_length": 512}
    with pytest.raises(DataError) as error:
        ensure(request(base, path, 10_000, **fields), LAYER, tmp_path / "cache")
    count = int(str(error.value).partition(" gives ")[2].split()[0])
    every = ensure(request(base, path, count, **fields), LAYER, tmp_path / "cache")
    assert set(every.column("role")) == {"assistant"}
    spelled = tokenizer.decode(every.column("token_id").tolist())
    assert "".join(spelled.split()) == "".join("".join(said).split())


def test_prompt_end_is_where_the_model_begins_to_answer(bases: dict[str, Path], tmp_path: Path) -> None:
    base, conversations = bases["llama3"], talks(3)
    table = ensure(
        request(base, write(tmp_path / "chat.jsonl", conversations), 3, positions="prompt_end", max_length=512),
        LAYER, tmp_path / "cache",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for i, talk in enumerate(conversations):
        ids = token_ids(base, talk[:-1], add_generation_prompt=True)
        with torch.inference_mode():
            hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[LAYER + 1][0, -1]
        assert table.column("position")[i] == len(ids) - 1
        assert np.abs(table.vectors()[i] - hidden.numpy()).max() < 1e-4


def test_every_format_of_file_and_of_message_gives_the_same_conversations(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    conversations = talks(3)
    rows = {"conversation": conversations}
    pq.write_table(pa.table(rows), tmp_path / "chat.parquet")
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    shared = [
        [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"], "toxic": False} for m in talk]
        for talk in conversations
    ]
    parts = [[m | {"content": [{"type": "text", "text": m["content"]}]} for m in talk] for talk in conversations]
    beside: list[Any] = [{key: [m[key] for m in talk] for key in ("role", "content")} for talk in conversations]
    named = [[m | {"role": {"user": " Human", "assistant": "ChatGPT"}[m["role"]]} for m in talk] for talk in conversations]
    forms = [conversations, shared, parts, beside, named, ["", *conversations], [[], *conversations]]
    paths = [write(tmp_path / f"{i}.jsonl", form) for i, form in enumerate(forms)]
    for path in (*paths, tmp_path / "chat.parquet", tmp_path / "saved"):
        read = list(read_documents(Activations(model="m", text=str(path), text_column="conversation")))
        assert [list(map(dict, row.messages)) for row in read if row.messages] == conversations


CALL = {"function": {"name": "weather", "arguments": {"city": "Paris"}}}


def test_calls_of_tools_are_those_of_every_format_of_file(tmp_path: Path) -> None:
    asks = [{"role": "user", "content": "hi", "tool_calls": []}, {"role": "assistant", "tool_calls": [CALL]}]
    other = [{"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": {"c": 2}}}}]}]
    pq.write_table(pa.table({"conversation": [asks, other]}), tmp_path / "chat.parquet")
    read = [
        [
            list(map(dict, row.messages or ()))
            for row in read_documents(Activations(model="m", text=str(path), text_column="conversation"))
        ]
        for path in (write(tmp_path / "chat.jsonl", [asks, other]), tmp_path / "chat.parquet")
    ]
    wanted = [[{"role": "user", "content": "hi"}, asks[1] | {"content": None}], [other[0] | {"content": None}]]
    assert read == [wanted, wanted]


@pytest.mark.parametrize(
    ("messages", "changes"),
    [
        ([{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}], {}),
        ([{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}], {}),
        ([{"role": "Human", "content": "a"}], {"roles": "by name"}),
        ([{"from": "human", "value": "a"}], {"roles": "by name"}),
        ([{"role": "user", "content": "a", "tool_calls": None}], {"tool_calls": "without nulls"}),
    ],
)
def test_keys_change_for_conversations_that_were_read_in_another_way(
    messages: list[dict[str, Any]], changes: dict[str, str], tmp_path: Path
) -> None:
    identity = text_identity(
        Activations(model="m", text=str(write(tmp_path / "c.jsonl", [messages])), text_column="conversation")
    )
    before = {"format", "document_column", "column", "holds", "digest"}
    assert {name: value for name, value in identity.items() if name not in before} == changes


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "narrator", "content": "a"}, "role 'narrator', which is none of human, .*assistant.*: rename it"),
        ({"role": "user", "content": [{"type": "image", "text": ""}, {"type": "text", "text": "a"}]}, "part of type 'image'"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "image_url": {"url": "x"}}]}, "has image_url"),
        ({"role": "user", "content": "a", "images": ["x"]}, "has images .*pictures and sound are not read"),
        ({"role": "assistant", "content": "a", "function_call": {"name": "f"}}, "has function_call .*write it so"),
        ({"role": "assistant", "content": "a", "tool_calls": "[]"}, "tool_calls of type str"),
    ],
)
def test_what_would_be_lost_of_a_message_is_refused_by_name(message: dict[str, Any], words: str, tmp_path: Path) -> None:
    empty = {"images": [], "audio": None, "function_call": {"name": None}}
    path = write(tmp_path / "chat.jsonl", [[{"role": "user", "content": "hi"} | empty, message]])
    with pytest.raises(DataError, match=f"message 1 of row 0 of .*{words}"):
        list(read_documents(Activations(model="m", text=str(path), text_column="conversation")))


def test_a_conversation_written_as_json_is_no_plain_text(tmp_path: Path) -> None:
    for number, written in enumerate((json.dumps(talks(1)[0]), str(talks(1)[0]))):
        path = write(tmp_path / f"{number}.jsonl", ["", written])
        with pytest.raises(DataError, match=r"row 1 of .* has a conversation written as JSON .*json\.loads"):
            list(read_documents(Activations(model="m", text=str(path), text_column="conversation")))
    listed = write(tmp_path / "lists.jsonl", [{"role": ["user"], "content": ["a", "b"]}])
    with pytest.raises(DataError, match=r"lists of \[1, 2\] entries \(role, content\)"):
        list(read_documents(Activations(model="m", text=str(listed), text_column="conversation")))


def test_what_is_stated_of_the_template_is_written_and_in_the_key(bases: dict[str, Path], tmp_path: Path) -> None:
    base, talk = bases["chatml"], talks(1)[0][:1]
    path, other = write(tmp_path / "chat.jsonl", [talk, talk]), {"thinks": False, "add_generation_prompt": True}
    fields = {"positions": "all", "candidates": "not_padding", "rows": "first"}
    asked = request(base, path, 2, chat_arguments=other, system_prompt="Be brief.", **fields)
    ids = token_ids(base, [{"role": "system", "content": "Be brief."}, *talk], **other)
    table = ensure(
        request(base, path, len(ids), chat_arguments=other, system_prompt="Be brief.", **fields), LAYER, tmp_path / "c"
    )
    assert table.column("token_id").tolist() == ids and "system" in table.column("role")
    assert asked == Activations(**{**asked.__dict__, "chat_arguments": [["thinks", False], ["add_generation_prompt", True]]})
    assert activations_key(asked, LAYER)[1]["chat"] == {
        "date": "2024-07-26",
        "chat_arguments": asked.chat_arguments,
        "system_prompt": "Be brief.",
    }
    changes: list[dict[str, Any]] = [{}, {"chat_arguments": other}, {"system_prompt": "Be brief."}, {"positions": "prompt_end"}]
    assert len({activations_key(request(base, path, 2, **change), LAYER)[0] for change in changes}) == 4


def test_what_cannot_be_written_is_refused_by_name(bases: dict[str, Path], base: Path, tmp_path: Path) -> None:
    chatml, path = bases["chatml"], write(tmp_path / "chat.jsonl", talks(2), text="plain words")

    def refused(words: str, asked: Activations, error: type[Exception] = DataError) -> None:
        with pytest.raises(error, match=words):
            ensure(asked, LAYER, tmp_path / "cache")

    unknown = request(chatml, path, 2, chat_arguments={"enable_thinking": False})
    refused("'enable_thinking', which is no argument of the chat template", unknown)
    refused("chat_arguments is for conversations", request(chatml, path, 2, text_column="text", chat_arguments={"thinks": False}))
    refused("prompt_end is for conversations", request(chatml, path, 2, text_column="text", positions="prompt_end"))
    refused("goes by the roles of tokens", request(base, path, 2, text_column="text", positions="turn_ends"))
    bare = make_base(tmp_path / "bare", "llama", num_layers=2, d_model=16)
    (bare / "chat_template.jinja").unlink()
    refused("has no chat template", request(bare, path, 2), CheckpointError)
    picture = [{"role": "user", "content": [{"type": "image", "url": "x"}]}]
    refused("message 0 of row 1 .* has a content with a part of type 'image'", request(
        chatml, write(tmp_path / "picture.jsonl", [talks(1)[0], picture]), 2
    ))  # fmt: skip
    strict = set_template(make_chat_base(tmp_path / "strict", "chatml"), "{{ raise_exception('Roles must alternate') }}" + CHATML)
    refused("no row of .* has an allowed position: .*chat template refuses .*: Roles must alternate", request(strict, path, 2))
    many = write(tmp_path / "many.jsonl", talks(70))
    refused(
        r"refuses its first 64 conversations\. Of row 63 it says: Roles must alternate \(roles: user,", request(strict, many, 2)
    )
    for fields in ({"roles": ("user",)}, {"chat_arguments": {"add_generation_prompt": False}}):
        with pytest.raises(SpecError, match=r"positions=prompt_end.*leave one out"):
            request(chatml, path, 2, positions="prompt_end", **fields)
    with pytest.raises(DataError, match="'enabel_thinking', which is no argument"):  # of a hub data set no row is read for that
        check_chats(request(chatml, Path("owner/chats"), 2, chat_arguments={"enabel_thinking": False}), chatml)
    with pytest.raises(CheckpointError, match="has no chat template"):
        check_chats(request(bare, Path("owner/chats"), 2, positions="prompt_end"), bare)


def test_roles_by_where_messages_stand_are_those_by_marks(bases: dict[str, Path]) -> None:
    """The two ways of finding who speaks, on one conversation."""
    from ksweep.activations.chat_roles import spoken_tokens

    tokenizer, talk = AutoTokenizer.from_pretrained(bases["chatml"]), talks(1)[0]
    text = tokenizer.apply_chat_template(talk, tokenize=False)
    encoded = tokenizer(text, return_offsets_mapping=True)
    roles, by_marks = spoken_tokens(tokenizer.convert_ids_to_tokens(encoded["input_ids"]), "chatml", special=MARKERS["chatml"])
    places = message_places(text, talk, lambda other: tokenizer.apply_chat_template(other, tokenize=False))
    assert places is not None
    by_place = tokens_at(places, encoded["offset_mapping"])
    assert by_place == [m if role in ("user", "assistant") else None for m, role in zip(by_marks, roles, strict=True)]
    assert {0, 1, 2, 3, None} == set(by_place)


def plain(messages: list[dict[str, Any]]) -> str:
    """A format of words alone: a default system prompt, names of roles, messages trimmed and without thoughts."""
    spoken = [f"{m['role']}: {m['content'].rpartition('</think>')[2].strip()}\n" for m in messages]
    return "You are a helpful assistant.\n" + "".join(spoken)


def said(*messages: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in messages]


def test_messages_are_found_where_the_template_puts_them_and_not_where_their_words_stand_first() -> None:
    talk = said(
        ("user", "help"), ("assistant", "<think>help</think> user "), ("user", "user"), ("user", ""), ("user", "assistant")
    )
    text = plain(talk)
    places = message_places(text, talk, plain)
    assert places is not None
    assert [text[first:stop] for first, stop in places] == ["help", "user", "user", "", "assistant"]
    assert [text[:first].rpartition("\n")[2] for first, _ in places] == [f"{m['role']}: " for m in talk]


def test_messages_that_a_template_changes_or_says_twice_are_not_found() -> None:
    talk = said(("user", "help me"))
    assert message_places(plain(talk).replace("help me", "help"), talk, plain) is None
    assert message_places(plain(talk).upper(), talk, lambda other: plain(other).upper()) is None
    assert message_places(plain(talk) * 2, talk, lambda other: plain(other) * 2) is None
    assert message_places(plain(talk), talk, lambda other: other[5]["content"]) is None  # it raises


def test_a_turn_ends_where_its_message_does() -> None:
    from ksweep.activations.chat_roles import SpokenTokens, spoken_tokens

    rule = Activations(model="m", text="t", positions="turn_ends", min_position=0, max_length=99)
    message = ["<|im_start|>", "user", "\n", "see", "<img>"]
    tokens = [*message, "this", "<|im_end|>", "\n", *message, "<|im_end|>"]
    spoken = spoken_tokens(tokens, "chatml", special=["<img>"])
    ids = [1 if token.startswith("<") else 9 for token in tokens]
    assert row_positions(ids, "r", {1}, rule, spoken=spoken) == [5, 11]  # special tokens inside a message end none
    cut = replace(rule, max_length=13)
    assert row_positions(ids[:13], "r", {1}, cut, spoken=SpokenTokens(spoken.roles[:13], spoken.messages[:13])) == [5]
    beside = SpokenTokens(["user", "user", "user", "assistant"], [0, 0, 1, 2])  # two messages of one role, nothing between
    assert row_positions([9] * 4, "r", {1}, rule, spoken=beside) == [1, 2, 3]


@pytest.mark.parametrize(
    ("template", "written"),
    [
        ("on {{ strftime_now('%d %b %Y') }}.", "on 26 Jul 2024."),
        ('{% if strftime_now is defined %}{{ strftime_now ( "%Y" ) }}{% endif %}{# strftime_now #}', "2024"),
        (r"{{ strftime_now('%Y\n') }}{{ strftime_now('it\'s %y') }}", "2024\nit's 24"),
        ("{{ strftime_now(form) }}", None),
        ("{% set f = strftime_now %}{{ f('%Y') }}", None),
    ],
)
def test_a_template_that_writes_the_date_writes_the_same_one_every_day(template: str, written: str | None) -> None:
    if written is None:
        with pytest.raises(CheckpointError, match="today's date"):
            dated(template, Path("b"))
    else:
        [text], _ = render_jinja_template([[]], chat_template=dated(template, Path("b")))
        assert text == written
    assert was_misdated(template) == (" (" in template or "\\" in template)


@pytest.mark.parametrize("in_files", [False, True])
def test_of_several_templates_the_one_named_default_writes(in_files: bool, bases: dict[str, Path], tmp_path: Path) -> None:
    base, path = Path(shutil.copytree(bases["chatml"], tmp_path / "base")), write(tmp_path / "chat.jsonl", talks(2))
    fields = {"positions": "all", "candidates": "not_padding", "max_length": 512}
    _, before = activations_key(request(base, path, 2, **fields), LAYER)
    if in_files:
        (base / "additional_chat_templates").mkdir()
        (base / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    else:
        (base / "chat_template.jinja").unlink()
        named = [{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": CHATML}]
        config = base / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": named}))
    wanted = [i for talk in talks(2) for i in token_ids(base, talk)]
    asked = request(base, path, len(wanted), **fields)
    assert ensure(asked, LAYER, tmp_path / "cache").column("token_id").tolist() == wanted
    assert activations_key(asked, LAYER)[1]["chat"] == before["chat"] | {"template": "default"}


def test_conversations_that_a_template_refuses_are_skipped_with_what_it_says(bases: dict[str, Path], tmp_path: Path) -> None:
    says = "{% if messages[0].role == 'system' %}{{ raise_exception('No system turn') }}{% endif %}"
    base = set_template(Path(shutil.copytree(bases["llama3"], tmp_path / "base")), says + LLAMA)
    talk = talks(1)[0]
    refused, unasked = [{"role": "system", "content": "Be brief."}, *talk], [{"role": "assistant", "content": "Hello."}]
    path = write(tmp_path / "chat.jsonl", [refused, talk, unasked, refused, talk])
    table = ensure(request(base, path, 2, positions="prompt_end", max_length=512), LAYER, tmp_path / "c")
    assert table.column("row_id").tolist() == ["row:1", "row:4"]
    assert [(note.about, note.text) for note in table.notes] == [
        ("text", f"Conversations of {path} that the base model's chat template refuses give no activations: No system turn")
    ]
    with pytest.raises(
        DataError, match=r"gives 2 \(5 rows, 3 of them without an allowed position\): .*refuses .*: No system turn"
    ):
        ensure(request(base, path, 3, positions="prompt_end", max_length=512), LAYER, tmp_path / "c")


@pytest.mark.parametrize("form", list(TEMPLATES))
def test_nothing_stands_behind_a_conversation_where_the_tokenizer_ends_texts(
    form: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base, talk = Path(shutil.copytree(bases[form], tmp_path / "base")), talks(1)[0]
    path, eos = write(tmp_path / "chat.jsonl", [talk, talk]), MARKERS[form][-1]
    _, before = activations_key(request(base, path, 2), LAYER)
    ends = Tokenizer.from_file(str(base / "tokenizer.json"))
    around = f"{BOS[form]} $A {eos}" if form in BOS else f"$A {eos}"
    tokens = [(token, ends.token_to_id(token)) for token in around.split() if token != "$A"]
    ends.post_processor = TemplateProcessing(single=around, special_tokens=tokens)
    ends.save(str(base / "tokenizer.json"))
    assert AutoTokenizer.from_pretrained(base)("the")["input_ids"][-1] == ends.token_to_id(eos)
    wanted = token_ids(base, talk)
    for cut in (0, 3):  # whole, and cut
        taken = wanted[: len(wanted) - cut]
        fields = {"positions": "all", "candidates": "not_padding", "max_length": len(taken)}
        table = ensure(request(base, path, len(taken), **fields), LAYER, tmp_path / "cache")
        assert table.column("token_id").tolist() == taken
    at = ensure(request(base, path, 2, positions="prompt_end", max_length=512), LAYER, tmp_path / "cache").column("position")
    assert at.tolist() == [len(token_ids(base, talk[:-1], add_generation_prompt=True)) - 1] * 2
    assert activations_key(request(base, path, 2), LAYER)[1]["chat"] == before["chat"] | {"end": "as written"}


@pytest.mark.parametrize("rule", [{"positions": "turn_ends"}, {"positions": "all", "roles": ("assistant",)}])
def test_roles_in_texts_that_are_written_as_chats_are_planned_and_found_and_in_others_refused(
    rule: dict[str, Any], bases: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in talks(1)[0])
    asked = spec(bases["chatml"], write_jsonl(tmp_path / "t.jsonl", [text, text]), 4, min_position=0, max_length=512, **rule)
    assert "who says each token is found by the run" in plan_activations(asked, LAYER, tmp_path / "c").text_yield
    assert "assistant" in ensure(asked, LAYER, tmp_path / "c").column("role")
    plain = replace(asked, text=str(write_jsonl(tmp_path / "plain.jsonl", passages(4))), num_activations=2)
    with pytest.raises(DataError, match=r"allowed position: .* takes tokens of messages alone.* no chat format"):
        ensure(plain, LAYER, tmp_path / "c")
    with pytest.raises(DataError, match=r"goes by the roles of tokens, and .* holds no conversations"):
        plan_activations(replace(plain, model=str(base)), LAYER, tmp_path / "c")


def test_a_prompt_that_was_cut_has_no_end() -> None:
    rule = Activations(model="m", text="t", positions="prompt_end", min_position=0, max_length=12)
    assert [row_positions([9] * count, "r", {1}, rule) for count in (11, 12)] == [[10], []]
