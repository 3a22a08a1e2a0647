"""Prompts of AV and AR: what a chat template and a sidecar ask for, BOS once, and thoughts before an answer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from ksweep.autoencoder.nla.checkpoint import inspect_nla
from ksweep.autoencoder.nla.models import load_nla_reconstructor, load_nla_verbalizer
from ksweep.autoencoder.nla.prompts import parse_explanation
from ksweep.config.spec import Activations, Autoencoder, Cell
from ksweep.evaluation.identity import cell_keys
from ksweep.utils.errors import CheckpointError
from tests.tiny_models import AR_TEMPLATE, TinyPair, edit_sidecar, make_pair, prefilled

CHAT = (
    "{%- for m in messages %}{{- '<|im_start|>'+m['role']+'\\n'+m['content']+'<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}BEGIN{%- endif %}"
)
SWITCH = "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
"""As Qwen3: thinking unless told otherwise, which leaves the prompt as it is."""
OFF_UNLESS_ASKED = "{%- if enable_thinking is defined and enable_thinking %}{{- 'Think.' }}{%- endif %}"
"""As Gemma-4."""


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyPair]:
    return {family: make_pair(tmp_path_factory.mktemp(family), family) for family in ("qwen2", "llama")}  # type: ignore[arg-type]


def av_with_chat(originals: dict[str, TinyPair], tmp_path: Path, begin: str) -> Path:
    path = Path(shutil.copytree(originals["qwen2"].av, tmp_path / "nla-av"))
    prompting = inspect_nla(path, "av").av_prompting
    (path / "chat_template.jinja").write_text(CHAT.replace("BEGIN", begin))
    tokenizer = AutoTokenizer.from_pretrained(path)
    message = [{"role": "user", "content": prompting.message}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    at = ids.index(prompting.marker_id)
    edit_sidecar(path, tokens__injection_left_neighbor_id=ids[at - 1], tokens__injection_right_neighbor_id=ids[at + 1])
    return path


def test_chat_template_with_a_switch_for_thinking_is_noted(originals: dict[str, TinyPair], tmp_path: Path) -> None:
    path = av_with_chat(originals, tmp_path, SWITCH)
    [note] = inspect_nla(path, "av").notes
    assert note.about == "prompt" and "thinking on or off (enable_thinking), and the sidecar does not say" in note.text
    assert inspect_nla(originals["qwen2"].av, "av").notes == ()


def test_thinking_that_the_template_does_by_default_is_understood(originals: dict[str, TinyPair], tmp_path: Path) -> None:
    path = av_with_chat(originals, tmp_path, SWITCH)
    before = load_nla_verbalizer(path, dtype="float32").prompt_ids
    edit_sidecar(path, enable_thinking=True)
    assert inspect_nla(path, "av").notes == () and load_nla_verbalizer(path, dtype="float32").prompt_ids == before


def test_thinking_that_the_template_does_not_do_by_default_is_refused(originals: dict[str, TinyPair], tmp_path: Path) -> None:
    path = av_with_chat(originals, tmp_path, OFF_UNLESS_ASKED)
    edit_sidecar(path, chat_template_kwargs={"enable_thinking": True})
    with pytest.raises(CheckpointError, match="says enable_thinking: true, with which its chat template renders another prompt"):
        load_nla_verbalizer(path, dtype="float32")


@pytest.mark.parametrize("behind", ["", "Sure:", "- "])
@pytest.mark.parametrize("tag", ["<explanation>", "<think>"])
def test_prompt_that_the_chat_template_ends_with_an_open_tag_is_refused(
    tag: str, behind: str, originals: dict[str, TinyPair], tmp_path: Path
) -> None:
    path = av_with_chat(originals, tmp_path, "{{- '" + tag + "\\n" + behind + "' }}")
    remedy = {"<explanation>": "opening_tag=''", "<think>": "enable_thinking: false"}[tag]
    with pytest.raises(CheckpointError, match=rf"ends the prompt with the open tag {tag}.*{remedy}"):
        load_nla_verbalizer(path, dtype="float32")


@pytest.mark.parametrize("missing", [("left",), ("right",), ("left", "right")])
def test_prompt_is_built_without_the_ids_around_the_marker(
    missing: tuple[str, ...], originals: dict[str, TinyPair], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(originals["qwen2"].av, tmp_path / "nla-av"))
    whole = load_nla_verbalizer(path, dtype="float32")
    edit_sidecar(path, **{f"tokens__injection_{side}_neighbor_id": ... for side in missing})
    av = load_nla_verbalizer(path, dtype="float32")
    assert (av.prompt_ids, av.injection_position) == (whole.prompt_ids, whole.injection_position)
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(prefilled(av, vectors).logits, prefilled(whole, vectors).logits)


def test_id_beside_the_marker_is_compared_though_the_other_is_missing(originals: dict[str, TinyPair], tmp_path: Path) -> None:
    path = Path(shutil.copytree(originals["qwen2"].av, tmp_path / "nla-av"))
    edit_sidecar(path, tokens__injection_left_neighbor_id=..., tokens__injection_right_neighbor_id=7)
    with pytest.raises(CheckpointError, match=r"the sidecar says None and 7"):
        load_nla_verbalizer(path, dtype="float32")


def test_marker_of_one_token_and_many_characters_is_replaced(originals: dict[str, TinyPair], tmp_path: Path) -> None:
    path = Path(shutil.copytree(originals["qwen2"].av, tmp_path / "nla-av"))
    marker_id = AutoTokenizer.from_pretrained(path).convert_tokens_to_ids("<|endoftext|>")
    edit_sidecar(path, tokens__injection_char="<|endoftext|>", tokens__injection_token_id=marker_id)
    av = load_nla_verbalizer(path, dtype="float32")
    assert av.prompt_ids[av.injection_position] == marker_id and av.prompt_ids.count(marker_id) == 1
    assert len(prefilled(av, torch.randn(2, 32)).logits) == 2
    edit_sidecar(path, tokens__injection_char="two words")
    with pytest.raises(CheckpointError, match="the marker 'two words' is tokenized as"):
        load_nla_verbalizer(path, dtype="float32")


# --- the AR's template ---


def cell(pair: TinyPair, ar: Path, text: Path) -> Cell:
    text.write_text("Some words of text. " * 30)
    return Cell(
        autoencoder=Autoencoder(av=str(pair.av), ar=str(ar)),
        activations=Activations(model=str(pair.base), text=str(text), num_activations=2, min_position=4),
    )


@pytest.mark.parametrize("begin", ["<|begin_of_text|>", "\n<|begin_of_text|>", "<|begin_of_text|><|begin_of_text|>"])
def test_ar_template_that_begins_with_bos_gets_no_second_one(begin: str, originals: dict[str, TinyPair], tmp_path: Path) -> None:
    """The same prompt as of a template without BOS, before which the tokenizer puts it; and scores of their own key."""
    pair = originals["llama"]
    path = Path(shutil.copytree(pair.ar, tmp_path / "nla-ar"))
    edit_sidecar(path, prompt_templates__ar=begin + AR_TEMPLATE)
    plain, written = load_nla_reconstructor(pair.ar, dtype="float32"), load_nla_reconstructor(path, dtype="float32")
    texts = ["x", "", "a few words", "<|begin_of_text|> inside"]
    assert written.prompts.ids(texts) == plain.prompts.ids(texts)
    assert [row[:2].count(537) for row in written.prompts.ids(texts)] == [1, 1, 1, 1]
    assert torch.equal(written.reconstruct_texts(texts), plain.reconstruct_texts(texts))
    reading = [cell_keys(cell(pair, ar, tmp_path / "t.txt")).identity["scores"].get("ar_bos") for ar in (pair.ar, path)]
    assert reading == [None, "once"]


# --- answers ---

ANSWERS: list[tuple[str, Any, tuple[str | None, str]]] = [
    ("<explanation>cats</explanation>", "stop", ("cats", "ok")),
    ("<think>In <explanation> and </explanation> tags.</think>\n<explanation>cats</explanation>", "stop", ("cats", "ok")),
    ("\n<think>\n\n</think>\n\n<explanation> cats </explanation>", "stop", ("cats", "ok")),
    ("<think>A <explanation>draft</explanation> at first", "length", (None, "cut_off")),
    ("<think>A <explanation>draft</explanation> at first", "stop", (None, "no_open_tag")),
    ("<think>x</think><explanation>cats", "stop", (None, "no_close_tag")),
    ("<think>x</think><explanation></explanation>", "stop", (None, "empty")),
    ("<explanation>the tag <think> and </think></explanation>", "stop", ("the tag <think> and </think>", "ok")),
    ("cats and dogs</explanation>", "stop", (None, "no_open_tag")),
]  # fmt: skip


@pytest.mark.parametrize(("text", "finish", "expected"), ANSWERS)
def test_explanation_is_read_from_the_answer_and_not_from_thoughts(
    text: str, finish: Any, expected: tuple[str | None, str]
) -> None:
    assert parse_explanation(text, finish) == expected


def test_draws_of_an_av_that_may_think_have_a_key_of_their_own(originals: dict[str, TinyPair], tmp_path: Path) -> None:
    """Their texts may be read otherwise than before; those of other AVs cannot be."""
    pair = originals["qwen2"]
    ordinary = cell_keys(cell(pair, pair.ar, tmp_path / "t.txt"))
    assert "parser" not in ordinary.identity["draws"]
    thinking = av_with_chat(originals, tmp_path, SWITCH)
    given = Cell(
        autoencoder=Autoencoder(av=str(thinking), ar=str(pair.ar)),
        activations=cell(pair, pair.ar, tmp_path / "t.txt").activations,
    )
    keys = cell_keys(given)
    assert keys.identity["draws"]["parser"] == "after_thoughts"
    assert any("enable_thinking" in note.text for note in keys.notes)
