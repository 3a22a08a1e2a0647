"""Texts that begin alike: what packs hold, and that a model reads them as it reads each text by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModel,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from ksweep.autoencoder import trie
from ksweep.autoencoder.nla.models import NlaReconstructor, load_reconstructor
from ksweep.inference.kv_cache import ARCHITECTURES, repeated
from tests.tiny_models import FAMILIES, Family, make_pair

ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), max_size=12)
TEXTS = [
    "a red house",
    "a red car and a long way home",
    "",
    "a red",
    "a red house",
    "a",
    "\n",
    "日本",
    *(f"a red car, number {i} of {'many ' * (i % 3)}cars" for i in range(12)),
]


def ancestors(pack: trie.Pack, node: int) -> list[int]:
    return [j for j in range(len(pack)) if j <= node <= pack.last[j]]


@given(ROWS, st.integers(1, 5), st.integers(1, 12))
def test_every_text_is_its_last_node_with_its_ancestors(rows: list[list[int]], most_texts: int, most_nodes: int) -> None:
    packs = trie.packs(rows, most_texts, most_nodes)
    assert sorted(text for pack in packs for text in pack.texts) == list(range(len(rows)))
    for pack in packs:
        assert len(pack.texts) <= most_texts and (len(pack) <= most_nodes or len(pack.texts) == 1)
        for text, end in zip(pack.texts, pack.ends, strict=True):
            path = ancestors(pack, end)
            assert [pack.tokens[j] for j in path] == rows[text]
            assert [pack.depths[j] for j in path] == list(range(len(path)))
        beginnings = {tuple(rows[text][: n + 1]) for text in pack.texts for n in range(len(rows[text]))}
        assert len(pack) == len(beginnings)


def test_the_example_of_the_module() -> None:
    (pack,) = trie.packs([[0, 1, 2], [0, 1, 3], [0, 4]], most_texts=9, most_nodes=9)
    assert (pack.tokens, pack.depths, pack.last, pack.ends) == ([0, 1, 2, 3, 4], [0, 1, 2, 2, 1], [4, 3, 2, 3, 4], [2, 3, 4])


def test_texts_share_packs_only_where_that_is_less_to_read() -> None:
    different = [[i, *[50] * 9] for i in range(40)]
    alike = [[*range(9), i] for i in range(40)]
    assert all(len(pack.texts) == 1 for batch in trie.batches(different, 10_000, 64) for pack in batch)
    assert all(len(pack.texts) > 1 for batch in trie.batches(alike, 10_000, 64) for pack in batch)
    long = [[*range(200), *[i] * 50] for i in range(40)]
    assert all(len(pack.texts) > 1 for batch in trie.batches(long, 10_000, 64) for pack in batch)
    assert all(len(pack.texts) == 1 for batch in trie.batches(alike, 10_000, 64, alike=False) for pack in batch)


@given(ROWS, st.integers(1, 5))
def test_a_batch_has_no_more_texts_than_allowed(rows: list[list[int]], most: int) -> None:
    batches = trie.batches(rows, 10_000, most)
    assert sorted(text for batch in batches for pack in batch for text in pack.texts) == list(range(len(rows)))
    assert all(sum(len(pack.texts) for pack in batch) <= most for batch in batches)


SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WINDOW = 12
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=WINDOW),
    "gemma2": Gemma2Config(**SIZES, sliding_window=WINDOW, attn_logit_softcapping=5.0),
    "gemma3_text": Gemma3TextConfig(**SIZES, sliding_window=WINDOW, layer_types=["sliding_attention"] * 2 + ["full_attention"]),
    "gpt2": GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.3),
}

CAPPED = ("gemma2", "sdpa")
"""transformers refuses SDPA for it: a cap on scores."""


def test_every_known_architecture_is_tried() -> None:
    assert {*CONFIGS, "gemma3"} == ARCHITECTURES  # gemma3: the wrapper, whose text part is gemma3_text


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, attention) for name in CONFIGS for attention in ("eager", "sdpa") if (name, attention) != CAPPED],
)
@torch.inference_mode()
def test_a_model_reads_packs_as_it_reads_each_text(name: str, attention: str) -> None:
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIGS[name], attn_implementation=attention).eval().double()
    before = [7, 8, 9]
    rows = [[i % 4, i % 3, *[5] * (i % 5), i] for i in range(30)]
    assert trie.fits(model, WINDOW)
    past = model(input_ids=torch.tensor([before]), use_cache=True).past_key_values
    batch = trie.packs(rows, 64, most_nodes=40)
    read = trie.inputs(batch, len(before), torch.float64, model.device)
    assert len(batch) > 1 and read.ids.numel() < sum(map(len, rows)) and read.mask is not None
    cache = repeated(past, len(batch))
    hidden = model(
        input_ids=read.ids, position_ids=read.positions, attention_mask=read.mask, past_key_values=cache
    ).last_hidden_state
    order = [text for pack in batch for text in pack.texts]
    alone = torch.stack([model(input_ids=torch.tensor([before + rows[text]])).last_hidden_state[0, -1] for text in order])
    # In float64, where transformers takes norms and softmax alone in float32.
    assert torch.allclose(hidden.flatten(0, 1)[read.ends], alone, rtol=1e-5, atol=1e-5)


def test_a_text_longer_than_a_window_or_an_attention_without_masks_does_not_fit() -> None:
    for name in ("mistral", "gemma3_text"):
        model = AutoModel.from_config(CONFIGS[name])
        assert trie.fits(model, WINDOW) and not trie.fits(model, WINDOW + 1)
    model = AutoModel.from_config(CONFIGS["llama"])
    assert trie.fits(model, 10_000)
    model.config._attn_implementation = "flash_attention_2"
    assert not trie.fits(model, 3)


@pytest.fixture(scope="module", params=FAMILIES)
def reconstructor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> NlaReconstructor:
    return in_a_wide_window(load_reconstructor(tiny_ar(tmp_path_factory.mktemp("pair"), request.param), dtype=torch.float64))


def tiny_ar(directory: Path, family: Family) -> Path:
    return make_pair(directory, family).ar


def in_a_wide_window(ar: NlaReconstructor, window: int = 128) -> NlaReconstructor:
    """The tiny Gemma's window of 16 cuts every prompt."""
    config = ar.model.config
    if getattr(config, "sliding_window", None):
        config.sliding_window = window
        for block in ar.model.layers:
            if block.self_attn.sliding_window:
                block.self_attn.sliding_window = window
    return ar


@contextmanager
def reading(ar: NlaReconstructor) -> Iterator[list[tuple[int, bool]]]:
    """Tokens of every forward pass behind the template, and whether it had a mask."""
    seen: list[tuple[int, bool]] = []

    def note(_module: Any, _args: Any, given: dict[str, Any]) -> None:
        seen.append((given["input_ids"].numel(), given.get("attention_mask") is not None))

    handle = ar.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Of models in float64: reconstructions are rounded to float32 (6e-8), as are norms within."""
    return float((one - other).abs().max() / other.abs().max()) < 1e-5


@pytest.mark.parametrize("order", [1, -1])
def test_beginnings_that_texts_share_run_once_and_change_nothing(reconstructor: NlaReconstructor, order: int) -> None:
    texts: Sequence[str] = TEXTS[::order]
    alone = reconstructor.reconstruct_texts(texts, batch_size=1)
    with reading(reconstructor) as seen:
        together = reconstructor.reconstruct_texts(texts)
    assert close(together, alone)
    common = reconstructor.prompts.common
    rows = [row for row in reconstructor.prompts.ids(list(dict.fromkeys(texts))) if row[: len(common)] == list(common)]
    in_packs = sum(tokens for tokens, masked in seen if masked)
    assert 0 < in_packs < sum(len(row) - len(common) for row in rows)


def test_a_single_text_and_a_very_long_one(reconstructor: NlaReconstructor) -> None:
    long = "a red car " * 20
    texts = ["a red", long, long + "stops", "a red car"]
    alone = torch.cat([reconstructor.reconstruct_texts([text]) for text in texts])
    assert close(reconstructor.reconstruct_texts(texts), alone)


def test_texts_that_merge_with_the_template_are_read_whole(reconstructor: NlaReconstructor) -> None:
    alone, common = reconstructor.reconstruct_texts(TEXTS, batch_size=1), reconstructor.prompts.common
    try:
        reconstructor.prompts.common = (*common[:-1], common[-1] + 1)
        with reading(reconstructor) as seen:
            assert close(reconstructor.reconstruct_texts(TEXTS), alone)
        assert not any(masked for _, masked in seen)
    finally:
        reconstructor.prompts.common = common


def test_one_text_longer_than_the_window_leaves_all_to_rows_of_their_own(tmp_path: Path) -> None:
    ar = in_a_wide_window(load_reconstructor(tiny_ar(tmp_path, "gemma3"), dtype=torch.float64), 64)
    for texts, masked in ((TEXTS, True), ([*TEXTS, "a red car " * 20], False)):
        alone = ar.reconstruct_texts(texts, batch_size=1)
        with reading(ar) as seen:
            assert close(ar.reconstruct_texts(texts), alone)
        assert any(had for _, had in seen) is masked


def test_bfloat16_differs_by_its_rounding(tmp_path: Path) -> None:
    path = tiny_ar(tmp_path, "llama")
    exact = load_reconstructor(path, dtype="float32").reconstruct_texts(TEXTS, batch_size=1)
    rough = load_reconstructor(path, dtype="bfloat16")
    errors = [
        float(1 - torch.cosine_similarity(rough.reconstruct_texts(TEXTS, batch_size=size), exact).min()) for size in (1, 64)
    ]
    assert errors[1] < 2 * errors[0] + 1e-5


def test_out_of_memory_packs_are_read_in_halves(reconstructor: NlaReconstructor, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"a red {'very ' * (i % 7)}long text, the {i}th" for i in range(60)]
    expected, forward, failed = reconstructor.reconstruct_texts(texts), reconstructor.model.forward, []

    def small(**given: Any) -> Any:
        if len(given["input_ids"]) > 1 and given["attention_mask"] is not None:
            failed.append(len(given["input_ids"]))
            raise torch.OutOfMemoryError("CUDA out of memory (a test says so)")
        return forward(**given)

    monkeypatch.setattr(reconstructor.model, "forward", small)
    assert close(reconstructor.reconstruct_texts(texts), expected) and failed


def test_the_last_block_runs_for_the_last_tokens_alone(reconstructor: NlaReconstructor) -> None:
    read: dict[str, int] = {}
    first, last = reconstructor.model.layers[0], reconstructor.model.layers[-1]
    parts = {"first": first.mlp.down_proj, "last": last.mlp.down_proj, "values": last.self_attn.v_proj}
    handles = [
        part.register_forward_pre_hook(lambda _m, args, name=name: read.update({name: args[0].shape[:-1].numel()}))
        for name, part in parts.items()
    ]
    reconstructor.reconstruct_texts(["a text", "another text"])
    for handle in handles:
        handle.remove()
    assert read["last"] == 2 and read["first"] == read["values"] > 6
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in reconstructor.model.modules())
