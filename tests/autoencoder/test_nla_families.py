"""Qwen2, Llama, Gemma-3 and its multimodal wrapper, full weights and adapters: each against plain transformers and peft."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ksweep.autoencoder.nla.checkpoint import inspect_nla
from ksweep.autoencoder.nla.models import load_nla_reconstructor, load_nla_verbalizer
from ksweep.autoencoder.nla.prompts import parse_explanation
from ksweep.inference.engine import Request, draw
from ksweep.inference.prefill import prefill, prefill_prefix
from tests.tiny_models import FAMILIES, Family, TinyPair, edit_sidecar, edit_weights, make_pair, merge_adapters, prefilled

TEXTS = [
    "a few words",
    "",
    "Braces {explanation} {{and}} {0}",
    "a few words",
    "a much longer text than the others, with a second clause",
]


@pytest.fixture(
    scope="module",
    params=[(f, a) for f in FAMILIES for a in (False, True)],
    ids=lambda p: f"{p[0]}-{'adapters' if p[1] else 'full'}",
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    family, adapters = request.param
    return make_pair(tmp_path_factory.mktemp("pair"), family, adapters=adapters)


def vectors(num: int = 3, width: int = 32) -> torch.Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(5))


def plain(path: Path) -> Any:
    """In float64, but for transformers' norms, which take each number in float32: an error of 1e-7, in any order of sums."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)


EXACT = torch.float64
"""What sharing work must not change is compared in float64, where only the final rounding to float32 is left."""
ROUNDED = {"rtol": 1e-6, "atol": 1e-6}
"""That rounding is 6e-8 of a number; transformers' norms add 1e-7."""


def reference(pair: TinyPair, tmp_path: Path) -> tuple[Any, Any]:
    """AV and AR as transformers' plain text models; adapters merged by peft, the wrapper's text part taken out by hand."""
    if inspect_nla(pair.av, "av").is_adapter:
        merged = merge_adapters(pair, tmp_path)
        return plain(merged.av), plain(merged.ar)
    av = Path(shutil.copytree(pair.av, tmp_path / "text"))
    if pair.family == "gemma3_multimodal":
        state = {
            k.removeprefix("language_model."): v for k, v in load_file(av / "model.safetensors").items() if k.startswith("lang")
        }
        edit_weights(av, change=lambda s: (s.clear(), s.update(state)))
        (av / "config.json").write_text(json.dumps(json.loads((av / "config.json").read_text())["text_config"]))
    return plain(av), plain(pair.ar)


@torch.inference_mode()
def test_av_and_ar_equal_plain_transformers(pair: TinyPair, tmp_path: Path) -> None:
    av, ar = load_nla_verbalizer(pair.av, dtype="float32"), load_nla_reconstructor(pair.ar, dtype="float32")
    plain_av, plain_ar = reference(pair, tmp_path)
    embeds = plain_av.get_input_embeddings()(torch.tensor([av.prompt_ids] * 3)).clone()
    embeds[:, av.injection_position] = 20.0 * torch.nn.functional.normalize(vectors().double())
    logits = plain_av(inputs_embeds=embeds).logits[:, -1]
    assert torch.allclose(prefilled(av, vectors()).logits.double(), logits, atol=1e-5)
    head = load_file(pair.ar / "value_head.safetensors")["weight"].double()
    outputs: list[torch.Tensor] = []
    plain_ar.model.layers[pair.layer].register_forward_hook(
        lambda _m, _a, out: outputs.append(out[0] if isinstance(out, tuple) else out)
    )
    for row in ar.prompts.ids(TEXTS):
        plain_ar(input_ids=torch.tensor([row]))
    expected = torch.stack([out[0, -1] @ head.T for out in outputs])
    assert len(plain_ar.model.layers) == pair.layer + 1
    assert torch.allclose(ar.reconstruct_texts(TEXTS, batch_size=2).double(), expected, atol=1e-4)


def test_hook_is_gone_after_prefill_and_the_prompt_is_run_once(pair: TinyPair) -> None:
    av = load_nla_verbalizer(pair.av, dtype="float32")
    prefilled(av, vectors())
    seen: list[int] = []
    av.model.get_input_embeddings().register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[1]))
    prompts_run = prefilled(av, vectors())
    assert seen == [len(av.prompt_ids)] and len(av.model.get_input_embeddings()._forward_hooks) == 1
    assert (av.prompt_length, prompts_run.cache.get_seq_length()) == (len(av.prompt_ids),) * 2


def test_models_are_frozen_and_the_ar_is_cut_and_bare(pair: TinyPair) -> None:
    av, ar = load_nla_verbalizer(pair.av), load_nla_reconstructor(pair.ar)
    assert not any(p.requires_grad for m in (av.model, ar.model, ar.head) for p in m.parameters())
    assert {p.dtype for m in (av.model, ar.model, ar.head) for p in m.parameters()} == {torch.bfloat16}
    assert len(ar.model.layers) == pair.layer + 1 and not hasattr(ar.model, "lm_head")
    assert isinstance(ar.model.norm, torch.nn.Identity) and not any("lora" in name for name, _ in av.model.named_modules())
    rotary = [b for name, b in av.model.named_buffers() if "inv_freq" in name]
    assert rotary and all(b.dtype == torch.float32 for b in rotary)


def test_what_prompts_have_in_common_runs_once_and_changes_nothing(pair: TinyPair) -> None:
    av, ar = load_nla_verbalizer(pair.av, dtype=EXACT), load_nla_reconstructor(pair.ar, dtype=EXACT)
    prompts = av.prompts(vectors())
    prefix = prefill_prefix(av.model, prompts)
    assert torch.allclose(prefill(av.model, prompts, prefix).logits, prefill(av.model, prompts).logits, **ROUNDED)
    assert prefix is not None and prefix.get_seq_length() == prompts.shared_length == av.injection_position

    texts = ["a", "two words", "", " leading", "\n", "x" * 50, "日本", "2", "naïve", "a b c d e f g h i j"]
    read: list[int] = []
    handle = ar.model.register_forward_pre_hook(lambda _m, _a, kw: read.append(kw["input_ids"].numel()), with_kwargs=True)
    shared, tokens = ar.reconstruct_texts(texts, batch_size=4), sum(read)
    read.clear()
    num_common, ar.prompts.common = len(ar.prompts.common), ()
    whole = ar.reconstruct_texts(texts, batch_size=4)
    handle.remove()
    assert torch.allclose(shared, whole, **ROUNDED)
    assert num_common and tokens < sum(read) - num_common * (len(texts) - 4)


def test_an_ar_that_runs_out_of_memory_goes_on_with_fewer_texts_at_once(pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    ar = load_nla_reconstructor(pair.ar, dtype=EXACT)
    texts = [f"{i} is the number of a text of {'several ' * (i % 4)}words" for i in range(20)]
    expected, forward, failed = ar.reconstruct_texts(texts), ar.model.forward, []

    def small(**given: Any) -> Any:
        if len(given["input_ids"]) > 3:
            failed.append(len(given["input_ids"]))
            raise torch.OutOfMemoryError("CUDA out of memory (a test says so)")
        return forward(**given)

    monkeypatch.setattr(ar.model, "forward", small)
    assert torch.allclose(ar.reconstruct_texts(texts), expected, **ROUNDED) and failed


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "gemma3_multimodal"])
def test_adapters_change_what_their_base_computes(family: Family, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, family, adapters=True)
    before = (
        prefilled(load_nla_verbalizer(pair.av, dtype="float32"), vectors()).logits,
        load_nla_reconstructor(pair.ar, dtype="float32").reconstruct_texts(["x"]),
    )
    for path in (pair.av, pair.ar):
        edit_weights(path, change=lambda s: [v.zero_() for k, v in s.items() if "lora_B" in k], file="adapter_model.safetensors")
    after = (
        prefilled(load_nla_verbalizer(pair.av, dtype="float32"), vectors()).logits,
        load_nla_reconstructor(pair.ar, dtype="float32").reconstruct_texts(["x"]),
    )
    assert all(float((a - b).abs().max()) > 1e-2 for a, b in zip(before, after, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "prefix", ["base_model.model.", "base_model.model.language_model.model.", "base_model.model.model.language_model."]
)
def test_adapter_keys_of_backbone_and_wrapper_mean_the_same(prefix: str, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "gemma3_multimodal", adapters=True)
    before = prefilled(load_nla_verbalizer(pair.av, dtype="float32"), vectors()).logits

    def rename(state: dict[str, torch.Tensor]) -> None:
        for name in list(state):
            state[name.replace("base_model.model.model.", prefix, 1)] = state.pop(name)

    edit_weights(pair.av, change=rename, file="adapter_model.safetensors")
    assert torch.equal(prefilled(load_nla_verbalizer(pair.av, dtype="float32"), vectors()).logits, before)
    # A pattern of the wrapper's names, as its trainer wrote it.
    config = json.loads((pair.av / "adapter_config.json").read_text())
    pattern = re.escape(prefix.removeprefix("base_model.model.")) + r"layers\.\d+\..*(q_proj|v_proj|o_proj|up_proj)"
    (pair.av / "adapter_config.json").write_text(json.dumps(config | {"target_modules": pattern}))
    assert torch.equal(prefilled(load_nla_verbalizer(pair.av, dtype="float32"), vectors()).logits, before)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_wrapper_key_spellings_mean_the_same(prefix: str, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "gemma3_multimodal")
    before = prefilled(load_nla_verbalizer(pair.av, dtype="float32"), vectors()).logits

    def rename(state: dict[str, torch.Tensor]) -> None:
        for name in list(state):
            state[name.replace("language_model.model.", prefix, 1)] = state.pop(name)

    edit_weights(pair.av, change=rename)
    assert torch.equal(prefilled(load_nla_verbalizer(pair.av, dtype="float32"), vectors()).logits, before)


def test_adapter_directory_may_bring_its_own_tokenizer(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", adapters=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(pair.base / name, pair.av / name)
    ids = load_nla_verbalizer(pair.av, dtype="float32").prompt_ids
    (pair.base / "chat_template.jinja").unlink()
    assert load_nla_verbalizer(pair.av, dtype="float32").prompt_ids == ids


def test_ar_template_is_formatted_as_python_does(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "qwen2")
    edit_sidecar(pair.ar, prompt_templates__ar="{{A}} <text>{explanation}</text> <summary>")
    ar = load_nla_reconstructor(pair.ar, dtype="float32")
    tokenizer = load_nla_verbalizer(pair.av, dtype="float32").tokenizer
    assert tokenizer.decode(ar.prompts.ids(["{x} {explanation}"])[0]) == "{A} <text>{x} {explanation}</text> <summary>"


def test_same_seed_makes_the_same_tiny_pair(tmp_path: Path) -> None:
    a, b = (make_pair(tmp_path / name, "qwen2", talks=True) for name in "ab")
    assert (a.av / "model.safetensors").read_bytes() == (b.av / "model.safetensors").read_bytes()


# --- text of a draw ---


@pytest.mark.parametrize(
    ("text", "finish", "expected"),
    [
        ("<explanation>\n two\n\nlines \n</explanation>", "stop", ("two\n\nlines", "ok")),
        ("x <explanation>first</explanation><explanation>second</explanation>", "stop", ("first", "ok")),
        ("<explanation>whole</explanation> and the", "length", ("whole", "ok")),
        ("<explanation>a <explanation>b</explanation>", "stop", ("a <explanation>b", "ok")),
        ("<explanation>open", "stop", (None, "no_close_tag")),
        ("words</explanation>", "stop", (None, "no_open_tag")),
        ("", "stop", (None, "no_open_tag")),
        ("<explanation>open", "length", (None, "cut_off")),
        ("words", "length", (None, "cut_off")),
        ("<explanation> \n </explanation>", "stop", (None, "empty")),
    ],
)
def test_parse_takes_the_first_complete_explanation(text: str, finish: Any, expected: Any) -> None:
    assert parse_explanation(text, finish) == expected


def test_decode_leaves_out_the_stop_token_and_what_follows(tmp_path: Path) -> None:
    av = load_nla_verbalizer(make_pair(tmp_path, "qwen2").av, dtype="float32")
    ids = av.tokenizer.encode("<explanation>naïve 日本</explanation>")
    assert av.decode([*ids, 539, 40]) == av.decode(ids) == "<explanation>naïve 日本</explanation>"
    assert av.decode([]) == "" and av.decode([538]) == "<|im_start|>"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("adapters", [False, True])
def test_talking_pair_is_drawn_parsed_and_reconstructed(family: Family, adapters: bool, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, family, talks=True, adapters=adapters)
    av, ar = load_nla_verbalizer(pair.av, dtype="float32"), load_nla_reconstructor(pair.ar, dtype="float32")
    requests = [Request(row=i, activation_key=i, draw=k) for i in range(2) for k in range(8)]
    draws = list(draw(av, vectors(2), requests, temperature=1.0, max_new_tokens=40, seed=0))
    parsed = [av.parse(av.decode(d.token_ids), d.finish) for d in draws]
    texts = [text for text, outcome in parsed if text is not None and outcome == "ok"]
    assert len(texts) >= 8 and len(set(texts)) > 4
    assert ar.reconstruct_texts(texts).shape == (len(texts), 32)
