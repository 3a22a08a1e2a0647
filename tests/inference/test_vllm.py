"""vLLM itself against the built-in engine, in float32, on tiny models: texts, log probabilities, what a request depends on.

make vllm-environment && .venv-vllm/bin/python -m pytest -m vllm
"""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ksweep.autoencoder.nla.checkpoint import inspect_nla
from ksweep.autoencoder.nla.models import NlaVerbalizer, load_nla_prompter, load_nla_verbalizer
from ksweep.inference.backend import load_engine
from ksweep.inference.engine import Draw, Request, draw
from ksweep.inference.vllm_engine import MODEL_TYPES
from ksweep.inference.vllm_process import STEP_TOKENS
from ksweep.utils.errors import RunError
from tests import tiny_families
from tests.tiny_models import TinyPair, edit_weights, make_pair

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make vllm-environment"),
]
D = 128
"""Four heads of 32: vLLM's attention on a CPU has no smaller ones."""
VECTORS = torch.randn(6, D, generator=torch.Generator().manual_seed(1))
MODEL_TYPE_OF = {
    "Qwen2, Qwen2.5": "qwen2", "Qwen3": "qwen3", "Llama": "llama", "Mistral": "mistral", "Gemma 1": "gemma", "Gemma 2": "gemma2",
    "Gemma 3": "gemma3_text", "Granite": "granite", "Phi-3, Phi-4": "phi3", "OLMo 2": "olmo2",
}  # fmt: skip
CLOSE = 16 * 4e-5
"""Of sums over 16 tokens: float32 logits of up to 20, 2^-24 of that for each of some 30 roundings one after the other."""


def wide_talking_pair(folder: Path) -> TinyPair:
    """Adapters whose AV stops in half of its texts within 16 tokens; so wide, it would seldom stop without another head."""

    def stop_often(state: dict[str, torch.Tensor]) -> None:
        state["lm_head.weight"][:, 4:] *= 0.5
        state["lm_head.weight"][-1, 2] *= 6  # the closing tag, behind a word

    pair = make_pair(folder, "qwen2", adapters=True, talks=True, d_model=D)
    edit_weights(pair.base, change=stop_often)
    return pair


def both(av: Path) -> tuple[NlaVerbalizer, NlaVerbalizer]:
    info = inspect_nla(av, "av")
    return load_nla_verbalizer(info, dtype="float32"), load_nla_prompter(info, dtype="float32", devices=("cpu",))


def requests(rows: Sequence[int], draws: Sequence[int]) -> list[Request]:
    return [Request(row, activation_key=1000 + row, draw=k) for row in rows for k in draws]


def drawn(av: NlaVerbalizer, asked: Sequence[Request], engine: str = "vllm", **options: Any) -> dict[tuple[int, int], Draw]:
    options = {"temperature": 1.0, "max_new_tokens": 16, "seed": 7} | options
    found = list(draw(av, VECTORS, asked, engine=engine, **options))
    assert len(found) == len(asked)
    return {(d.request.row, d.request.draw): d for d in found}


def texts(found: dict[tuple[int, int], Draw]) -> dict[tuple[int, int], tuple[int, ...]]:
    return {key: d.token_ids for key, d in found.items()}


@torch.inference_mode()
def log_probability(av: NlaVerbalizer, found: Draw) -> float:
    """In float64, one pass over prompt and text."""
    model = av.model.double()
    prompt = av.prompts(VECTORS[found.request.row : found.request.row + 1]).embeddings.double()
    text = model.get_input_embeddings()(torch.tensor([found.token_ids]))
    logits = model(inputs_embeds=torch.cat([prompt, text], dim=1), use_cache=False).logits[0, av.prompt_length - 1 : -1]
    return float(logits.log_softmax(-1)[range(len(found.token_ids)), found.token_ids].sum())


def test_every_model_type_that_is_not_refused_is_compared() -> None:
    assert frozenset(MODEL_TYPE_OF.values()) == MODEL_TYPES


@pytest.mark.parametrize("family", MODEL_TYPE_OF)
def test_texts_and_log_probabilities_are_those_of_the_built_in_engine(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_families, "D", D)
    for name in ("COMMON", "GROUPED"):
        sizes = getattr(tiny_families, name)
        monkeypatch.setattr(tiny_families, name, sizes | {"hidden_size": D} | ({"head_dim": 32} if "head_dim" in sizes else {}))
    av = tiny_families.make_family_pair(tmp_path, family).av
    if family.startswith("Gemma"):  # its embeddings are its head too: as large as these they would repeat the last token for ever
        edit_weights(av, change=lambda state: state["model.embed_tokens.weight"].mul_(0.02))
    whole, light = both(av)
    assert whole.info.config["model_type"] == MODEL_TYPE_OF[family]
    # 1. Greedy texts are equal, and their log probabilities.
    asked = requests(range(6), [0])
    ours, theirs = (drawn(av, asked, engine, temperature=0.0) for av, engine in ((whole, "builtin"), (light, "vllm")))
    assert texts(ours) == texts(theirs) and len(set(texts(theirs).values())) > 1
    for key in ours:
        assert theirs[key].log_probability == pytest.approx(ours[key].log_probability, abs=CLOSE)
        assert theirs[key].finish == ours[key].finish
    # 2. Sampled texts have the log probabilities of the model itself, whatever they were sampled with.
    sampled = drawn(light, requests(range(6), range(3)), temperature=1.3, top_p=0.9)
    assert len(set(texts(sampled).values())) == 18
    for found in sampled.values():
        assert found.log_probability == pytest.approx(log_probability(whole, found), abs=CLOSE)


def test_what_a_draw_depends_on(tmp_path: Path) -> None:
    """On the engine itself, with its prefix cache: one process draws everything here."""
    whole, light = both(wide_talking_pair(tmp_path).av)
    everything = drawn(light, requests(range(6), range(8)))
    # 1. Other vectors and other k give other texts; both kinds of end occur.
    assert len(set(texts(everything).values())) > 40
    assert {d.finish for d in everything.values()} == {"stop", "length"}
    assert all((d.token_ids[-1] in light.stop_token_ids) == (d.finish == "stop") for d in everything.values())
    assert all(not light.stop_token_ids & set(d.token_ids[:-1]) for d in everything.values())
    # 2. Fewer draws, another order, one at a time: the same texts.
    few = drawn(light, requests(range(6), range(4)))
    assert texts(few) == {key: tokens for key, tokens in texts(everything).items() if key[1] < 4}
    assert texts(drawn(light, requests([5, 2], [7, 0])[::-1], batch_size=1)) == {
        (row, k): everything[row, k].token_ids for row in (5, 2) for k in (7, 0)
    }
    # 3. The same vector under another activation's key gives other texts, under its own the same ones.
    vectors = VECTORS[[0, 0]]
    twin = [Request(0, activation_key=1000, draw=k) for k in range(4)] + [
        Request(1, activation_key=1005, draw=k) for k in range(4)
    ]
    found = {(d.request.row, d.request.draw): d.token_ids for d in
             draw(light, vectors, twin, engine="vllm", temperature=1.0, max_new_tokens=16, seed=7)}  # fmt: skip
    assert [found[0, k] for k in range(4)] == [everything[0, k].token_ids for k in range(4)]
    assert all(found[1, k] != found[0, k] for k in range(4))
    # 4. The adapter is in the weights: log probabilities are those of the merged model.
    for key in [(0, 0), (3, 5)]:
        assert everything[key].log_probability == pytest.approx(log_probability(whole, everything[key]), abs=CLOSE)
    # 5. More prompts than fit into one step of vLLM.
    many = [Request(i % 6, activation_key=i, draw=0) for i in range(600)]
    assert 600 * light.prompt_length > 2 * STEP_TOKENS
    assert len({d.request.activation_key for d in draw(light, VECTORS, many, engine="vllm", temperature=1.0, max_new_tokens=2,
                                                       seed=7)}) == 600  # fmt: skip
    # 6. If its process dies in the middle, the draws end with its exit status.
    stream = draw(light, VECTORS, requests(range(6), range(8)), engine="vllm", temperature=1.0, max_new_tokens=200, seed=7)
    next(stream)
    process = load_engine("vllm")._processes[light]  # type: ignore[attr-defined]
    os.kill(process._process.pid, signal.SIGKILL)
    with pytest.raises(RunError, match="process of vLLM ended with exit status -9"):
        list(stream)
