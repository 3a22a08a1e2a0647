"""Overrides of prompting: what they change in prompts, readings and keys, and which are refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from ksweep import Activations, Autoencoder, Cell, Sweep
from ksweep.autoencoder.family import family_of
from ksweep.autoencoder.nla.checkpoint import inspect_nla
from ksweep.autoencoder.nla.models import NlaReconstructor, NlaVerbalizer
from ksweep.config.overrides import apply_overrides, parse_overrides
from ksweep.config.spec import PromptingOverrides, cell_from_dict, replace_at
from ksweep.inference.model_parts import blocks_of
from ksweep.inference.prefill import prefill, prefill_prefix
from ksweep.utils.errors import CheckpointError, RequestError, SpecError
from tests.tiny_models import FIXTURES, TinyPair, make_pair, prefilled

THINKING_CHAT = (
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{ 'No thoughts. ' }}{%- endif %}{%- endif %}"
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    return make_pair(tmp_path_factory.mktemp("tiny"), "qwen2", layer=1, num_layers=3)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    return make_pair(tmp_path_factory.mktemp("gemma"), "gemma3", layer=1)


def autoencoder(pair: TinyPair, **overrides: Any) -> Autoencoder:
    return Autoencoder(av=str(pair.av), ar=str(pair.ar), dtype="float32", prompting=PromptingOverrides(**overrides))


def verbalizer(pair: TinyPair, **overrides: Any) -> NlaVerbalizer:
    av = family_of(autoencoder(pair, **overrides)).load_verbalizer(("cpu",))
    assert isinstance(av, NlaVerbalizer)
    return av


def reconstructor(pair: TinyPair, **overrides: Any) -> NlaReconstructor:
    ar = family_of(autoencoder(pair, **overrides)).load_reconstructor(("cpu",))
    assert isinstance(ar, NlaReconstructor)
    return ar


# Keys


@pytest.mark.parametrize(
    ("overrides", "in_draws", "in_scores"),
    [
        ({}, False, False),
        ({"prefill": "<explanation>"}, True, False),
        ({"injection_scale": 7.0}, True, False),
        ({"injection": "add_after_block", "injection_block": 1}, True, False),
        ({"stop_tokens": ("<|im_end|>",)}, True, False),
        ({"ar_readout": -2}, False, True),
        ({"ar_special_tokens": False}, False, True),
    ],
)
def test_overrides_of_the_av_change_draws_and_those_of_the_ar_scores(
    pair: TinyPair, overrides: dict[str, Any], in_draws: bool, in_scores: bool
) -> None:
    plain, changed = family_of(autoencoder(pair)), family_of(autoencoder(pair, **overrides))
    assert (changed.draws_identity() != plain.draws_identity()) is in_draws
    assert (changed.scores_identity() != plain.scores_identity()) is in_scores


# The AV


def test_prefill_ends_the_prompt_and_begins_the_answer(pair: TinyPair) -> None:
    plain, begun = verbalizer(pair), verbalizer(pair, prefill="<explanation>so ")
    added = AutoTokenizer.from_pretrained(pair.av).encode("<explanation>so ", add_special_tokens=False)
    assert begun.prompt_ids == (*plain.prompt_ids, *added) and begun.prompt_length == len(begun.prompt_ids)
    assert begun.parse("it goes</explanation>", "stop") == ("so it goes", "ok")
    assert plain.parse("it goes</explanation>", "stop") == (None, "no_open_tag")


def test_chat_arguments_reach_the_chat_template(pair: TinyPair, tmp_path: Path) -> None:
    made = make_pair(tmp_path, "qwen2", layer=1)
    (made.av / "chat_template.jinja").write_text(THINKING_CHAT)
    plain, thinking = verbalizer(made), verbalizer(made, chat_arguments={"enable_thinking": False})
    added = AutoTokenizer.from_pretrained(made.av).encode("No thoughts. ", add_special_tokens=False)
    assert thinking.prompt_ids == (*plain.prompt_ids, *added)
    about = "can be rendered with thinking on or off"
    assert any(about in note.text for note in family_of(autoencoder(made)).notes)
    assert not any(about in note.text for note in family_of(autoencoder(made, chat_arguments={"enable_thinking": False})).notes)


def test_marker_and_template_replace_those_of_the_sidecar(pair: TinyPair) -> None:
    av = verbalizer(pair, marker="x", av_template="Name <c>{injection_char}</c>.")
    text = av.tokenizer.decode(av.prompt_ids)
    assert "Name <c>x</c>." in text and av.tokenizer.decode(av.prompt_ids[av.injection_position]).strip() == "x"


@pytest.mark.parametrize(
    ("overrides", "text", "finish", "expected"),
    [
        ({"opening_tag": "<a>", "closing_tag": "</a>"}, "<a> it </a>", "stop", ("it", "ok")),
        ({"opening_tag": ""}, "it goes</explanation> on", "stop", ("it goes", "ok")),
        ({"opening_tag": "", "closing_tag": ""}, " it goes ", "length", ("it goes", "ok")),
        ({"opening_tag": "", "closing_tag": ""}, " ", "stop", (None, "empty")),
        ({"opening_tag": ""}, "it goes", "length", (None, "cut_off")),
        ({"closing_tag": "<|im_end|>", "stop_tokens": ("<|im_end|>",)}, "<explanation>it goes", "stop", ("it goes", "ok")),
        ({"closing_tag": "<|im_end|>", "stop_tokens": ("<|im_end|>",)}, "<explanation>it goes", "length", (None, "cut_off")),
    ],
)
def test_tags_and_stop_tokens_decide_where_an_explanation_begins_and_ends(
    pair: TinyPair, overrides: dict[str, Any], text: str, finish: Any, expected: tuple[str | None, str]
) -> None:
    assert verbalizer(pair, **overrides).parse(text, finish) == expected


def test_stop_tokens_replace_those_of_the_model(pair: TinyPair) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pair.av)
    assert verbalizer(pair, stop_tokens=("<|im_start|>",)).stop_token_ids == {tokenizer.convert_tokens_to_ids("<|im_start|>")}


@pytest.mark.parametrize("scale", [3.0, 80.0])
def test_replaced_row_has_the_stated_norm(pair: TinyPair, scale: float) -> None:
    av, seen = verbalizer(pair, injection_scale=scale), []
    block = av.model.model.layers[0]
    handle = block.register_forward_pre_hook(lambda _module, args, kwargs: seen.append(args[0].clone()), with_kwargs=True)
    prefilled(av, torch.randn(2, pair.d_model))
    handle.remove()
    assert seen[-1][:, av.injection_position].norm(dim=1).tolist() == pytest.approx([scale, scale], rel=1e-5)


@pytest.mark.parametrize("block", [0, 1])
def test_added_vector_raises_the_hidden_state_by_its_own_norm(pair: TinyPair, block: int) -> None:
    av = verbalizer(pair, injection="add_after_block", injection_block=block)
    vectors = torch.randn(3, pair.d_model, generator=torch.Generator().manual_seed(0))
    before, after = hidden_after(av, block, None), hidden_after(av, block, vectors)
    at, h = av.injection_position, before[0, av.injection_position]
    expected = h + h.norm() * vectors / vectors.norm(dim=1, keepdim=True)
    assert torch.allclose(after[:, at], expected, atol=1e-5)
    others = [i for i in range(av.prompt_length) if i != at]
    assert torch.allclose(after[:, others], before[:, others].expand(3, -1, -1), atol=1e-6)


def hidden_after(av: NlaVerbalizer, block: int, vectors: torch.Tensor | None) -> torch.Tensor:
    """What the block behind `block` receives; without vectors, from a plain forward pass."""
    seen: list[torch.Tensor] = []
    behind = av.model.model.layers[block + 1]
    handle = behind.register_forward_pre_hook(lambda _module, args, kwargs: seen.append(args[0].clone()), with_kwargs=True)
    if vectors is None:
        av.model(input_ids=torch.tensor([av.prompt_ids]))
    else:
        prefilled(av, vectors)
    handle.remove()
    return seen[-1]


def test_added_vector_gives_the_same_prompt_behind_a_shared_prefix(pair: TinyPair) -> None:
    av = verbalizer(pair, injection="add_after_block", injection_block=1)
    vectors = torch.randn(3, pair.d_model, generator=torch.Generator().manual_seed(1))
    prompts = av.prompts(vectors)
    whole, behind = prefill(av.model, prompts), prefill(av.model, prompts, prefill_prefix(av.model, prompts))
    assert torch.allclose(whole.logits, behind.logits, atol=1e-4)
    assert (whole.logits - prefilled(verbalizer(pair), vectors).logits).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma3"])
@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("behind_prefix", [True, False])
def test_blocks_before_the_vector_run_once_for_all_prompts(family: Any, block: int, behind_prefix: bool, tmp_path: Path) -> None:
    """The same logits, keys and values as with every row passing through every block."""
    made = make_pair(tmp_path, family)
    av = verbalizer(made, injection="add_after_block", injection_block=block)
    vectors = torch.randn(5, made.d_model, generator=torch.Generator().manual_seed(1))
    prompts = av.prompts(vectors)
    prefix = prefill_prefix(av.model, prompts) if behind_prefix else None
    rows: list[int] = []
    hooks = [each.register_forward_hook(lambda *seen: rows.append(len(hidden_of(seen[-1])))) for each in blocks_of(av.model)]
    plain = prefill(av.model, prompts, prefix)
    shared = prefill(av.model, prompts, prefix, shares_first_blocks=True)
    for hook in hooks:
        hook.remove()
    # The hook of a test sees what the last shared block puts out before it is handed to every row.
    assert rows == [5] * len(hooks) + [1] * (block + 1) + [5] * (len(hooks) - block - 1)
    assert torch.allclose(plain.logits, shared.logits, atol=1e-5)
    for a, b in zip(plain.cache.layers, shared.cache.layers, strict=True):
        assert a.keys.shape == b.keys.shape
        assert torch.allclose(a.keys, b.keys, atol=1e-5) and torch.allclose(a.values, b.values, atol=1e-5)


def hidden_of(output: Any) -> torch.Tensor:
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


# The AR


def test_special_tokens_of_the_ar_can_be_left_out(gemma: TinyPair) -> None:
    [with_bos], [without] = (reconstructor(gemma, **o).prompts.ids(["a text"]) for o in ({}, {"ar_special_tokens": False}))
    assert with_bos == [2, *without]


def test_template_of_the_ar_is_the_stated_one(pair: TinyPair) -> None:
    ar = reconstructor(pair, ar_template="{{x}} {explanation} end")
    [ids] = ar.prompts.ids(["a {text}"])
    assert AutoTokenizer.from_pretrained(pair.ar).decode(ids) == "{x} a {text} end"


@pytest.mark.parametrize("readout", [-1, -2, -9])
def test_ar_is_read_at_the_stated_token(pair: TinyPair, readout: int) -> None:
    ar, texts = reconstructor(pair, ar_readout=readout), ["one", "a longer text of several words"]
    expected = []
    for text in texts:
        [ids] = ar.prompts.ids([text])
        with torch.no_grad():
            hidden = ar.model(input_ids=torch.tensor([ids])).last_hidden_state
            expected.append(ar.head(hidden[0, len(ids) + readout]))
    assert torch.allclose(ar.reconstruct_texts(texts), torch.stack(expected), atol=1e-4)


# Refusals


@pytest.mark.parametrize(
    ("overrides", "reasons"),
    [
        ({"marker": "two words"}, ["marker", "'two words'", "expected one token"]),
        ({"av_template": "Describe {injection_char} in {language}."}, ["autoencoder.prompting.av_template", "{language}"]),
        ({"av_template": "Describe it."}, ["0 places for the marker"]),
        ({"ar_template": "no field"}, ["0 places for the explanation"]),
        ({"chat_arguments": {"enable_thinkin": False}}, ["chat_arguments", "'enable_thinkin'"]),
        ({"chat_arguments": {"add_generation_prompt": False}}, ["chat_arguments", "'add_generation_prompt'"]),
        ({"stop_tokens": ("</explanation>",)}, ["stop_tokens", "'</explanation>'"]),
        ({"stop_tokens": ("<|im_end|>", "</explanation>")}, ["stop_tokens", "beside others"]),
        ({"injection": "add_after_block", "injection_block": 3}, ["injection_block=3", "3 blocks"]),
        ({"prefill": "\u320e"}, ["marker", "positions"]),
        ({"ar_readout": -500}, ["ar_readout=-500", "tokens"]),
    ],
)
def test_override_that_the_checkpoint_cannot_follow_is_refused_by_name(
    pair: TinyPair, overrides: dict[str, Any], reasons: list[str]
) -> None:
    load: Callable[..., Any] = reconstructor if any(name.startswith("ar_") for name in overrides) else verbalizer
    with pytest.raises(CheckpointError) as refused:
        load(pair, **overrides)
    assert all(reason in str(refused.value) for reason in reasons), refused.value


@pytest.mark.parametrize(
    "overrides",
    [
        {"injection": "somewhere"},
        {"injection": "add_after_block"},
        {"injection_block": 1},
        {"injection": "add_after_block", "injection_block": 1, "injection_scale": 2.0},
        {"injection_scale": -1.0},
        {"ar_readout": 0},
        {"ar_readout": 3},
    ],
)
def test_override_that_contradicts_itself_is_refused(overrides: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=r"autoencoder\.prompting"):
        PromptingOverrides(**overrides)


@pytest.mark.parametrize(
    "field",
    [
        {"layout": "easynla"},
        {"layer": 2},
        {"av_stack": ("x",)},
        {"whitening": "x"},
        {"prompting": PromptingOverrides(prefill="x")},
    ],
    ids=str,
)
def test_talkative_autoencoder_takes_no_field_of_pairs(field: dict[str, Any]) -> None:
    folder = Path(__file__).parents[1] / "fixtures" / "tae" / "gpt2_patch_all"
    [file] = folder.glob("*.pt")
    spec = Autoencoder(checkpoint=str(file), **field)
    with pytest.raises(RequestError, match=rf"autoencoder\.{next(iter(field))}.* is for NLA pairs"):
        _ = family_of(spec).layer


def test_given_texts_and_raw_files_take_no_option_without_effect(tmp_path: Path) -> None:
    spec = Autoencoder(texts="x.jsonl", ar=str(FIXTURES / "qwen2_text" / "nla-ar"), av_stack=("x",))
    with pytest.raises(SpecError, match=r"autoencoder\.av_stack=\('x',\) is for an AV, and the texts are given"):
        _ = family_of(spec).layer
    with pytest.raises(SpecError, match=r"autoencoder\.whitening=5 must be the path"):
        Autoencoder(av="av", ar="ar", whitening=5)  # type: ignore[arg-type]


# The spec


def sweep() -> Sweep:
    activations = Activations(model="base", text="text.txt")
    return Sweep(name="tiny", cell=Cell(autoencoder=Autoencoder(av="av", ar="ar"), activations=activations))


def test_overrides_come_from_arguments_files_axes_and_json(tmp_path: Path) -> None:
    expected = PromptingOverrides(prefill="<explanation>", chat_arguments={"enable_thinking": False}, stop_tokens=("x",))
    arguments = ["prefill=<explanation>", "autoencoder.prompting.chat_arguments={enable_thinking: false}", "stop_tokens=[x]"]
    by_argument = apply_overrides(sweep(), parse_overrides(arguments)).cell
    file = tmp_path / "config.yaml"
    file.write_text(
        "autoencoder:\n  prompting:\n    prefill: <explanation>\n    stop_tokens: [x]\n"
        "    chat_arguments: {enable_thinking: false}\n"
    )
    by_file = apply_overrides(sweep(), parse_overrides(config=file)).cell
    assert by_argument == by_file and by_argument.autoencoder.prompting == expected
    assert cell_from_dict(json.loads(json.dumps(asdict(by_argument)))) == by_argument
    axis = apply_overrides(sweep(), parse_overrides(["autoencoder.prompting.prefill=[a,b]"]))
    assert [cell.autoencoder.prompting.prefill for cell in axis.cells()] == ["a", "b"]
    assert replace_at(sweep().cell, "autoencoder.prompting.prefill", "a").autoencoder.prompting.prefill == "a"
    assert hash(by_argument) == hash(replace(by_argument))


@pytest.mark.parametrize(
    ("key", "value", "overrides"),
    [
        ("actor_reasoning_mode", "forced_final", {"prefill": "<|channel|>final<|message|>"}),
        ("enable_thinking", False, {"chat_arguments": {"enable_thinking": False}}),
        ("injection_mode", "add", {"injection": "add_after_block", "injection_block": 1}),
    ],
)
def test_key_of_the_sidecar_is_refused_until_the_spec_states_what_it_asks_for(
    key: str, value: Any, overrides: dict[str, Any], pair: TinyPair, tmp_path: Path
) -> None:
    path = shutil.copytree(pair.av, tmp_path / "av")
    with (path / "chat_template.jinja").open("a") as template:
        template.write("{%- if enable_thinking is defined %}{%- endif %}")
    meta = yaml.safe_load((path / "nla_meta.yaml").read_text())
    (path / "nla_meta.yaml").write_text(yaml.safe_dump(meta | {key: value}, allow_unicode=True))
    with pytest.raises(CheckpointError, match=key):
        inspect_nla(path, "av")
    assert inspect_nla(path, "av", overrides=PromptingOverrides(**overrides)).role == "av"
