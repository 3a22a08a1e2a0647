"""Engines by name, what each must be, and several of them in one process."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, cache_utils

from ksweep.inference import cuda_graphs
from ksweep.inference.backend import ENGINES, engine_for, engine_identity, load_engine
from ksweep.inference.engine import BuiltinEngine, DecodingOptions, draw
from ksweep.inference.model_parts import attention_for
from ksweep.inference.naive_engine import NaiveEngine, can_be_copied
from ksweep.inference.prefill import prefill, prefill_prefix
from ksweep.inference.prompts import BlockEdit, Prompts
from ksweep.utils.errors import CheckpointError, RequestError, SpecError
from tests.inference.test_engine import (
    MARKER,
    PROMPT,
    STOPS,
    VECTORS,
    TinyVerbalizer,
    batches_of,
    models,  # noqa: F401  # a fixture
    requests_for,
)

TABLE = "tests.toy.engine:TableEngine"


def in_turns(*streams: Any) -> list[list[Any]]:
    """Advance generators alternately, one draw each, until all are empty."""
    drawn: list[list[Any]] = [[] for _ in streams]
    for step in itertools.zip_longest(*streams):
        for draws, one in zip(drawn, step, strict=True):
            draws += [] if one is None else [one]
    return drawn


def exactly(numbered: Any) -> list[tuple[Any, ...]]:
    """Every draw with its tokens and its log probability to the last bit."""
    return sorted((number, d.request.row, d.request.draw, d.token_ids, d.log_probability.hex()) for number, d in numbered)


@pytest.mark.parametrize("name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "gemma2_capped"))])
def test_engines_in_turns_on_one_model_give_the_draws_of_each_alone(models: Any, name: str) -> None:  # noqa: F811
    verbalizer = TinyVerbalizer(models[name], STOPS)
    settings = vars(models[name].config).copy()
    sides = [
        (BuiltinEngine(), DecodingOptions(max_new_tokens=12, batch_size=10)),
        (NaiveEngine(), DecodingOptions(max_new_tokens=12, batch_size=10)),
        (BuiltinEngine(), DecodingOptions(max_new_tokens=17, batch_size=7, top_p=0.9)),
    ]
    alone = [exactly(engine.generate(verbalizer, batches_of([1.0, 0.0, 0.7]), options)) for engine, options in sides]
    together = in_turns(*(engine.generate(verbalizer, batches_of([1.0, 0.0, 0.7]), options) for engine, options in sides))
    assert [exactly(draws) for draws in together] == alone
    assert vars(models[name].config) == settings, "a stream leaves the model's configuration as it was"


def test_a_stream_that_is_dropped_half_way_leaves_the_model_to_others(models: Any) -> None:  # noqa: F811
    model = models["qwen2"]
    settings, verbalizer = vars(model.config).copy(), TinyVerbalizer(model, STOPS)
    plain = model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits
    dropped = BuiltinEngine().generate(verbalizer, batches_of([1.0]), DecodingOptions(max_new_tokens=12))
    next(dropped)
    assert vars(model.config) == settings and torch.equal(model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits, plain)
    dropped.close()  # type: ignore[attr-defined]
    assert vars(model.config) == settings and not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_whose_graphs_differ_leaves_recording_to_the_other_models(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setitem(cuda_graphs._differing, models["llama"], "a graph's logits differ")
    assert cuda_graphs.recording_problem(models["llama"]) == "a graph's logits differ"
    assert cuda_graphs.recording_problem(models["gpt2"]) is None
    monkeypatch.setattr(cuda_graphs, "_failed_recording", ["out of memory"])
    assert cuda_graphs.recording_problem(models["gpt2"]) == "out of memory", "torch's allocator is the process's"


def test_engines_load_once_by_name_and_the_builtin_one_adds_nothing_to_keys() -> None:
    assert isinstance(load_engine("builtin"), BuiltinEngine) and isinstance(load_engine("naive"), NaiveEngine)
    assert load_engine("builtin") is load_engine("builtin")
    assert engine_identity("builtin") == {} and set(ENGINES) == {"builtin", "naive", "vllm"}
    assert engine_identity("naive")["engine"] == "naive"
    assert engine_identity(TABLE) == {"engine": "table", "version": "1", "noise": "none"}


def test_the_keys_of_the_builtin_engine_need_no_torch() -> None:
    code = "import sys; from ksweep.inference.backend import *; engine_identity('builtin'); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("sglang", "neither one of builtin, naive, vllm nor a dotted name"),
        ("no_such_module:Engine", "no module"),
        ("tests.toy.engine:Nameless", "its identity is empty"),
        ("tests.toy.engine:Unfinished", "has no identity, supports, numerics"),
    ],
)
def test_engines_that_cannot_be_used_are_refused_by_name(name: str, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        load_engine(name)


def test_an_engine_says_which_avs_it_cannot_draw_from(models: Any) -> None:  # noqa: F811
    edited = TinyVerbalizer(models["llama"], STOPS)
    edited.edits_blocks = True
    with pytest.raises(RequestError, match=rf"{TABLE} cannot draw from this AV: it edits blocks"):
        engine_for(TABLE, edited)
    with pytest.raises(RequestError, match="naive cannot draw from this AV: it has no causal LM"):
        engine_for("naive", TinyVerbalizer(None, STOPS))


def test_a_past_is_copied_where_transformers_has_not_every_kind_of_it(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Before 5.20 it has no DummyLayer."""
    past = prefill(models["llama"], TinyVerbalizer(models["llama"]).prompts(VECTORS)).cache
    monkeypatch.delattr(cache_utils, "DummyLayer")
    assert can_be_copied(past) and not can_be_copied(None)


def test_scores_that_a_model_caps_are_never_left_to_attention_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 5.20 transformers says of Gemma-2 that it supports sdpa, which then computes uncapped scores."""
    monkeypatch.setattr(Gemma2ForCausalLM, "_supports_sdpa", True)
    assert attention_for(Gemma2ForCausalLM, Gemma2Config(attn_logit_softcapping=50.0)) == "eager"
    assert attention_for(Gemma2ForCausalLM, Gemma2Config(attn_logit_softcapping=None)) == "sdpa"


def test_prompts_that_are_not_as_long_as_the_av_says_are_refused(models: Any) -> None:  # noqa: F811
    longer = TinyVerbalizer(models["llama"], STOPS)
    longer.prompt_length = len(PROMPT) + 1
    with pytest.raises(CheckpointError, match=r"6 prompts of 12 tokens, .* for 6 vectors and a prompt_length of 13"):
        list(draw(longer, VECTORS, requests_for(range(6), [0]), temperature=1.0, max_new_tokens=3, seed=0))


@pytest.mark.parametrize("side", ["input", "output"])
def test_block_edits_equal_a_model_whose_block_is_replaced(models: Any, side: Any) -> None:  # noqa: F811
    """h + 2 v after (before) block 1, at the marker; the oracle is the same sum in a hook of a plain forward pass."""
    model, verbalizer = models["llama"], TinyVerbalizer(models["llama"], STOPS)
    embeddings = verbalizer.embeddings(torch.zeros_like(VECTORS))
    edit = BlockEdit(model.model.layers[1], side, MARKER, lambda hidden: hidden + 2 * VECTORS)
    prompts = Prompts(embeddings, MARKER, (edit,))

    def added(module: Any, args: Any, output: Any = None) -> Any:
        hidden = (args if side == "input" else output if isinstance(output, tuple) else (output,))[0].clone()
        hidden[:, MARKER] += 2 * VECTORS
        return (hidden, *args[1:]) if side == "input" else hidden

    block = model.model.layers[1]
    handle = block.register_forward_pre_hook(added) if side == "input" else block.register_forward_hook(added)
    with torch.inference_mode():
        expected = model(inputs_embeds=embeddings, use_cache=False).logits[:, -1]
        handle.remove()
        unedited = model(inputs_embeds=embeddings, use_cache=False).logits[:, -1]
    for prefix in (None, prefill_prefix(model, prompts)):
        assert torch.allclose(prefill(model, prompts, prefix).logits, expected, atol=1e-5)
    assert (expected - unedited).abs().max() > 1e-2
    assert not block._forward_hooks and not block._forward_pre_hooks


def test_a_block_that_does_not_run_is_not_edited_in_silence(models: Any) -> None:  # noqa: F811
    elsewhere = BlockEdit(models["gpt2"].transformer.h[0], "input", MARKER, lambda hidden: hidden)
    prompts = Prompts(TinyVerbalizer(models["llama"]).embeddings(VECTORS), MARKER, (elsewhere,))
    with pytest.raises(CheckpointError, match=r"ran \[0\] times in one prefill"):
        prefill(models["llama"], prompts)
