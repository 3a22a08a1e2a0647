"""The golden fixtures: what the public code computes, to the tolerances of tests/fixtures/nla/README.md."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from ksweep.autoencoder.nla.models import load_nla_reconstructor, load_nla_verbalizer
from tests.report_fixture_differences import CASES, FIXTURES, differences
from tests.tiny_models import prefilled


@cache
def expected(case: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((FIXTURES / case / "expected.json").read_text())
    return values


@pytest.mark.parametrize("case", CASES)
def test_fixture_arrays_are_met(case: str) -> None:
    found = differences(case)
    print("\n", *found, sep="\n")
    assert len(found) == 6 and [d for d in found if not d.ok] == []


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_av_prompt_marker_and_stop_tokens_are_the_expected_ones(case: str) -> None:
    av, said = load_nla_verbalizer(FIXTURES / case / "nla-av", dtype="float32"), expected(case)["av"]
    assert list(av.prompt_ids) == said["prompt_token_ids"]
    assert av.injection_position == said["injection_position"]
    assert av.stop_token_ids == set(said["stop_token_ids"])
    assert av.tokenizer.decode(av.prompt_ids) == said["prompt_text"]


@pytest.mark.parametrize("case", CASES)
def test_ar_prompts_hold_each_text_verbatim_between_the_expected_tokens(case: str) -> None:
    ar, said = load_nla_reconstructor(FIXTURES / case / "nla-ar", dtype="float32"), expected(case)["ar"]
    assert ar.prompts.ids(said["texts"]) == said["token_ids"]
    assert all(row[-len(said["suffix_ids"]) :] == said["suffix_ids"] for row in ar.prompts.ids(said["texts"]))


@pytest.mark.parametrize("case", CASES)
def test_reconstructions_do_not_depend_on_batch_order_or_repetition(case: str) -> None:
    ar, texts = load_nla_reconstructor(FIXTURES / case / "nla-ar", dtype=torch.float64), expected(case)["ar"]["texts"]
    together, alone = ar.reconstruct_texts(texts), ar.reconstruct_texts(texts, batch_size=1)
    mixed = [3, 0, 3, 7, 1, 0]
    assert float((together - alone).abs().max() / alone.abs().max()) < 1e-5
    assert float((ar.reconstruct_texts([texts[i] for i in mixed], batch_size=3) - alone[mixed]).abs().max()) < 1e-4
    assert ar.reconstruct_texts([]).shape == (0, ar.d_model)


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_equals_plain_transformers_with_inputs_embeds(case: str) -> None:
    """The other way to inject: look the prompt up, overwrite one row, pass inputs_embeds. Bit-equal."""
    from transformers import AutoModelForCausalLM

    path = FIXTURES / case / "nla-av"
    vectors = torch.tensor(np.load(FIXTURES / case / "expected.npz")["activations"])
    av, said = load_nla_verbalizer(path), expected(case)["av"]
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    with torch.inference_mode():
        embeds = plain.get_input_embeddings()(torch.tensor(said["prompt_token_ids"]).repeat(len(vectors), 1)).clone()
        rows = vectors / (vectors.norm(dim=1, keepdim=True) / said["injection_scale"])
        embeds[:, said["injection_position"]] = rows.bfloat16()
        logits = plain(inputs_embeds=embeds).logits[:, -1].float()
    assert torch.equal(prefilled(av, vectors).logits, logits)


def test_vectors_are_injected_by_direction_whatever_their_norm_and_dtype() -> None:
    av = load_nla_verbalizer(FIXTURES / "qwen2_text" / "nla-av", dtype=torch.float64)
    vectors = torch.tensor(np.load(FIXTURES / "qwen2_text" / "expected.npz")["activations"])
    logits = prefilled(av, vectors).logits
    assert torch.allclose(prefilled(av, vectors.double() * 1e-3).logits, logits, atol=1e-4)
    assert torch.allclose(prefilled(av, vectors.flip(0)).logits.flip(0), logits, atol=1e-4)


def test_nothing_of_generation_config_is_left_on_the_model() -> None:
    model = load_nla_verbalizer(FIXTURES / "qwen2_text" / "nla-av", dtype="float32").model
    kept = model.generation_config
    assert kept.repetition_penalty in (None, 1.0) and kept.top_k in (None, 50) and not kept.do_sample
