"""Drawing in slots, and plainly, against the naive loop: one row, no cache, everything recomputed for every token."""

import copy
import logging
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as sps
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
)

from ksweep.inference import attention, engine, gumbel_sampling, memory, naive_engine
from ksweep.inference.backend import load_engine
from ksweep.inference.engine import DecodingOptions, DrawBatch, Request, draw
from ksweep.inference.naive_engine import MIN_LIVE_SHARE
from ksweep.inference.prefill import Prefill, prefill
from ksweep.inference.prompts import Prompts
from ksweep.utils.errors import RequestError, RunError

VOCABULARY = 300  # two noise blocks, the second one short
PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26]
MARKER = 7
WINDOW = 8
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.25, "tie_word_embeddings": False,
}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "gemma3": lambda: gemma3(WINDOW),
    "gemma3_wide": lambda: gemma3(8 * WINDOW),
    "gemma2_capped": lambda: Gemma2ForCausalLM(Gemma2Config(
        **SIZES, head_dim=8, query_pre_attn_scalar=8, attn_logit_softcapping=2.0, attn_implementation="eager", sliding_window=64,
    )),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=90, initializer_range=0.25)
    ),
}  # fmt: skip
IN_SLOTS = [name for name in MODELS if name != "gemma3"]  # whose window is shorter than the prompt


def gemma3(window):
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, head_dim=8, query_pre_attn_scalar=8, sliding_window=window, layer_types=types)
    )


STOPS = frozenset(range(0, VOCABULARY, 20))
FITS = attention.supports_slots


@dataclass
class TinyVerbalizer:
    """The protocol, bare: a fixed prompt, one of whose embeddings is the vector."""

    model: Any
    stop_token_ids: frozenset[int] = frozenset()
    d_model: int = 32
    prompts_run: int = 0
    prefill_sizes: list[int] = field(default_factory=list)

    def embeddings(self, vectors, tail=()):
        ids = torch.tensor([*PROMPT, *tail], device=self.model.device)
        embedded = self.model.get_input_embeddings()(ids).repeat(len(vectors), 1, 1)
        embedded[:, MARKER] = vectors.to(embedded)
        return embedded

    prompt_length = len(PROMPT)

    edits_blocks = False
    shared_length = MARKER

    def prompts(self, vectors):
        self.prompts_run += len(vectors)
        self.prefill_sizes.append(len(vectors))
        return Prompts(self.embeddings(vectors), self.shared_length)

    def decode(self, token_ids):
        return " ".join(map(str, token_ids))

    def parse(self, text, finish):
        return text, "ok"


@pytest.fixture(scope="module")
def models():
    built = {}
    for name, build in MODELS.items():
        torch.manual_seed(0)
        built[name] = build().eval()
        built[name].generation_config.repetition_penalty = 5.0  # must not leak into draws
        built[name].generation_config.top_k = 1
    return built


@pytest.fixture(scope="module", params=["slots", "plain"], autouse=True)
def sampler(request):
    """Every test runs with both engines; models that slots do not support are drawn by the naive one in either case."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            patch.setattr(attention, "supports_slots", lambda model, length: False)
        yield request.param


@pytest.fixture
def verbalizer(models):
    return TinyVerbalizer(models["llama"], STOPS)


VECTORS = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))


def requests_for(rows, draws):
    return [Request(row, activation_key=1000 + row, draw=k) for row in rows for k in draws]


def take(verbalizer, requests, vectors=VECTORS, **options):
    options = {"temperature": 1.0, "max_new_tokens": 12, "seed": 7} | options
    drawn = list(draw(verbalizer, vectors, requests, **options))
    assert sorted(map(repr, requests)) == sorted(repr(d.request) for d in drawn)  # each once, none twice
    return {(d.request.activation_key, d.request.draw): d for d in drawn}


def stream_draws(verbalizer, batches, **options):
    return load_engine("builtin").generate(verbalizer, batches, DecodingOptions(**options))


def texts(draws):
    return {key: (d.token_ids, d.finish) for key, d in draws.items()}


ROUNDING = 2e-5
"""By how much float32 logits of these models (up to 10 in size, through 4 blocks of sums of 32 to 48) may be off: 2^-24 of 10 for
each of some 30 roundings one after the other."""


@torch.inference_mode()
def assert_is_naive(ours, verbalizer, *, temperature, top_p=1.0, max_new_tokens=12, seed=7):
    """The draw is what plain logits give, with nothing shared: no cache, no batch, in float64, one pass over its whole text.

    Where logits that differ by rounding give different tokens, ours may be any of them, and what follows is held to ours.
    """
    exact = TinyVerbalizer(copy.deepcopy(verbalizer.model).double(), verbalizer.stop_token_ids)
    keys = gumbel_sampling.draw_keys(seed, 9 * [ours.request.activation_key], 9 * [ours.request.draw])
    vector, tokens = VECTORS[ours.request.row : ours.request.row + 1].double(), list(ours.token_ids)
    logits = exact.model(inputs_embeds=exact.embeddings(vector, tokens[:-1]), use_cache=False).logits[0, len(PROMPT) - 1 :].cpu()
    off = ROUNDING * (2 * torch.rand(len(tokens), 9, VOCABULARY, generator=torch.Generator().manual_seed(0)) - 1)
    off[:, 0] = 0.0
    near = (logits[:, None] + off).float().flatten(0, 1)
    step_keys = torch.cat([gumbel_sampling.step_keys(keys, step) for step in range(len(tokens))])
    sampled = gumbel_sampling.sample(near, step_keys, temperature=temperature, top_p=top_p).token_ids
    allowed = (near.argmax(-1) if temperature == 0 else sampled).reshape(len(tokens), 9)
    assert (allowed == torch.tensor(tokens)[:, None]).any(1).all()
    assert not exact.stop_token_ids & set(tokens[:-1])
    assert tokens[-1] in exact.stop_token_ids or len(tokens) == max_new_tokens
    total = float(torch.log_softmax(logits, -1)[torch.arange(len(tokens)), tokens].sum())
    assert ours.log_probability == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.0, 1.0), (1.4, 0.9)])
def test_draws_equal_the_naive_loop(models, family, temperature, top_p):
    verbalizer = TinyVerbalizer(models[family], STOPS)
    requests = requests_for(range(4), range(3))
    drawn = take(verbalizer, requests, temperature=temperature, top_p=top_p)
    for request in requests:
        ours = drawn[request.activation_key, request.draw]
        assert_is_naive(ours, verbalizer, temperature=temperature, top_p=top_p)
    if (family, temperature) != ("gpt2", 0.0):  # greedy, this one repeats itself whatever its vector
        assert len({d.token_ids for d in drawn.values()}) > (2 if temperature == 0 else 8)  # the vectors and the draws matter


def test_nuclei_that_are_not_told_without_a_wait_are_sampled_again_and_change_no_draw(verbalizer, monkeypatch):
    options = {"temperature": 0.5, "top_p": 0.8}
    reference, asked = texts(take(verbalizer, requests_for(range(3), range(4)), **options)), []
    sample = gumbel_sampling.sample

    def as_on_a_gpu(*args, may_wait=False, **kw):
        asked.append(may_wait)
        return sample(*args, may_wait=may_wait, **kw)

    monkeypatch.setattr(gumbel_sampling, "sample", as_on_a_gpu)
    monkeypatch.setattr(gumbel_sampling, "CANDIDATES_WITHOUT_WAIT", 20)
    assert texts(take(verbalizer, requests_for(range(3), range(4)), **options)) == reference
    assert 0 < sum(asked) < len(asked) / 2


def test_gemma3_window_is_shorter_than_the_prompt_and_still_exact(models):
    verbalizer = TinyVerbalizer(models["gemma3"])
    with torch.inference_mode():
        layers = prefill(verbalizer.model, verbalizer.prompts(VECTORS)).cache.layers
    assert [layer.keys.shape[2] for layer in layers] == [WINDOW - 1, len(PROMPT), WINDOW - 1, len(PROMPT)]
    request = Request(2, 5, 0)
    (ours,) = take(verbalizer, [request], temperature=0.0, max_new_tokens=3 * WINDOW).values()
    assert_is_naive(ours, verbalizer, temperature=0.0, max_new_tokens=3 * WINDOW)


@pytest.mark.heavy(6)
@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_texts_are_identical_at_every_batch_size(models, family):
    verbalizer = TinyVerbalizer(models[family], STOPS)
    requests = requests_for(range(5), range(3))
    reference = texts(take(verbalizer, requests, batch_size=32))
    assert texts(take(verbalizer, requests, batch_size=4, prefill_batch_size=2)) == reference
    assert texts(take(verbalizer, requests, batch_size=1)) == reference
    assert texts(take(verbalizer, requests, batch_size=512, prefill_batch_size=1)) == reference


@pytest.mark.slow
@given(data=st.data(), batch_size=st.integers(1, 20), prefill_batch_size=st.integers(1, 6))
@settings(max_examples=12, deadline=None)
def test_texts_do_not_depend_on_order_or_company(models, data, batch_size, prefill_batch_size):
    verbalizer = TinyVerbalizer(models["qwen2"], STOPS)
    everything = requests_for(range(4), range(4))
    chosen = data.draw(st.lists(st.sampled_from(everything), min_size=1, max_size=16, unique=True))
    alone = texts(take(verbalizer, everything, max_new_tokens=6))
    some = texts(take(verbalizer, chosen, max_new_tokens=6, batch_size=batch_size, prefill_batch_size=prefill_batch_size))
    assert some == {key: alone[key] for key in some}


def test_sixteen_draws_are_the_first_sixteen_of_sixty_four(verbalizer):
    few = texts(take(verbalizer, requests_for([0, 1], range(16)), max_new_tokens=6))
    many = texts(take(verbalizer, requests_for([0, 1], range(64)), max_new_tokens=6))
    assert few == {key: many[key] for key in few}
    assert len(set(many.values())) > 100


def test_noise_belongs_to_the_activation_not_to_its_place(verbalizer):
    same = VECTORS[:1].repeat(3, 1)
    by_row = {d.request.row: d.token_ids for d in draw(
        verbalizer, same, [Request(0, 11, 0), Request(1, 22, 0), Request(2, 11, 0)], temperature=1.0, max_new_tokens=12, seed=7
    )}  # fmt: skip
    assert by_row[0] == by_row[2] != by_row[1]


def test_another_seed_gives_other_draws(verbalizer):
    requests = requests_for(range(3), range(3))
    one, two = (texts(take(verbalizer, requests, seed=seed)) for seed in (7, 8))
    assert all(one[key] != two[key] for key in one)


def test_first_tokens_follow_the_models_distribution(verbalizer):
    drawn = take(verbalizer, requests_for([3], range(4000)), temperature=1.3, max_new_tokens=1)
    with torch.inference_mode():
        logits = prefill(verbalizer.model, verbalizer.prompts(VECTORS[3:4])).logits[0]
        p = torch.softmax(logits.double() / 1.3, -1).cpu().numpy()
    counts = np.bincount([d.token_ids[0] for d in drawn.values()], minlength=VOCABULARY)
    common = p * 4000 > 5
    observed, expected = np.append(counts[common], counts[~common].sum()), np.append(p[common], p[~common].sum()) * 4000
    assert sps.power_divergence(observed, expected, lambda_="log-likelihood").pvalue > 1e-4


@pytest.mark.parametrize("batch_size", [1, 3, 8, 512])
def test_each_prompt_runs_once_however_many_draws_are_forked_from_it(verbalizer, batch_size):
    take(verbalizer, requests_for(range(5), range(8)), batch_size=batch_size, prefill_batch_size=3, max_new_tokens=3)
    assert verbalizer.prompts_run == 5
    assert max(verbalizer.prefill_sizes) <= 3


def test_a_stop_token_ends_a_row_and_only_there(verbalizer):
    drawn = take(verbalizer, requests_for(range(6), range(10)), max_new_tokens=40).values()
    stopped = [d for d in drawn if d.finish == "stop"]
    assert len(stopped) > 30
    for d in stopped:
        assert d.token_ids[-1] in STOPS and not STOPS & set(d.text_token_ids)
        assert d.text_token_ids == d.token_ids[:-1]
    for d in set(drawn) - set(stopped):
        assert d.finish == "length" and len(d.token_ids) == 40 and not STOPS & set(d.token_ids)


def test_max_new_tokens_cuts_off_and_a_stop_token_in_the_last_place_still_counts(verbalizer):
    requests = requests_for([1], range(6))
    long = take(verbalizer, requests, max_new_tokens=60)
    stopped = next(d for d in long.values() if d.finish == "stop" and len(d.token_ids) > 1)
    length = len(stopped.token_ids)
    key = (stopped.request.activation_key, stopped.request.draw)
    assert take(verbalizer, requests, max_new_tokens=length)[key] == stopped
    cut = take(verbalizer, requests, max_new_tokens=length - 1)[key]
    assert (cut.finish, cut.token_ids, cut.text_token_ids) == ("length", stopped.token_ids[:-1], stopped.token_ids[:-1])


def rows_of_each_step(verbalizer, requests, **options):
    """Rows of every forward pass behind the prompts, and the draws."""
    sizes = []
    handle = verbalizer.model.register_forward_pre_hook(lambda _, __, kw: sizes.append(kw.get("input_ids")), with_kwargs=True)
    try:
        drawn = take(verbalizer, requests, **({"max_new_tokens": 40} | options))
    finally:
        handle.remove()
    return [len(ids) for ids in sizes if ids is not None and ids.shape[1] == 1], drawn


def rows_needed(drawn, step):
    """How many different beginnings of that many tokens the draws that are longer have."""
    return len({(d.request.activation_key, d.token_ids[:step]) for d in drawn.values() if len(d.token_ids) > step})


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 0.6), (0.0, 1.0)])
def test_rows_that_ended_leave_the_batch(verbalizer, sampler, temperature, top_p):
    rows, drawn = rows_of_each_step(verbalizer, requests_for(range(6), range(6)), temperature=temperature, top_p=top_p)
    lengths = np.array([len(d.token_ids) for d in drawn.values()])
    if sampler == "plain":
        assert rows == sorted(rows, reverse=True)
        live = [(lengths > step).sum() for step in range(1, len(rows) + 1)]
        assert all(MIN_LIVE_SHARE * r <= n <= r for n, r in zip(live, rows, strict=True))
    else:
        assert rows == [rows_needed(drawn, step) for step in range(1, max(lengths))]


@pytest.mark.parametrize("sampler", ["slots"], indirect=True)
def test_draws_of_an_activation_share_a_row_until_they_part(verbalizer, sampler):
    rows, _ = rows_of_each_step(verbalizer, requests_for(range(3), range(8)), temperature=0.0)
    assert rows[0] == 3 and max(rows) == 3, "all greedy draws of an activation are one row"
    rows, drawn = rows_of_each_step(verbalizer, requests_for(range(3), range(8)), temperature=0.5, top_p=0.6)
    assert rows[0] < max(rows) <= 24, "some begin together and part later"
    assert sum(rows) < sum(len(d.token_ids) - 1 for d in drawn.values())


@pytest.mark.slow
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 0.6)])
@pytest.mark.parametrize("sampler", ["slots"], indirect=True)
def test_free_slots_are_refilled_while_draws_are_waiting(verbalizer, sampler, temperature, top_p):
    """A quarter of 32 is room for the eight draws of an activation, which begin together."""
    under_way: list[int] = []
    vectors = torch.randn(18, 32, generator=torch.Generator().manual_seed(2))
    options = {"temperature": temperature, "top_p": top_p, "batch_size": 32, "on_step": under_way.append, "vectors": vectors}
    rows, drawn = rows_of_each_step(verbalizer, requests_for(range(18), range(8)), **options)
    assert max(rows) <= max(under_way) == 32
    most = max(len(d.token_ids) for d in drawn.values())
    assert sum(rows) == sum(rows_needed(drawn, step) for step in range(1, most)), "no row of a step is one too many"
    steps = under_way[: len(under_way) - under_way[::-1].index(32)]
    begins = [i for i, n in enumerate(steps) if n in (8, 16) or (i and n > steps[i - 1])]
    assert len(begins) > 3 and min(n for i, n in enumerate(steps) if i not in begins) > 32 - 8


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["slots"], indirect=True)
def test_an_activation_with_more_draws_than_slots_is_drawn_in_parts(verbalizer, sampler):
    under_way: list[int] = []
    rows, drawn = rows_of_each_step(verbalizer, requests_for(range(3), range(40)), batch_size=16, on_step=under_way.append)
    assert len(drawn) == 120 and max(rows) <= 16
    steps = [n for n in under_way if n > 12]
    assert len(steps) > len(under_way) / 2, "slots are refilled with parts of an activation"


def batches_of(temperatures, taken=None):
    """One batch per temperature, of other activations and seeds; `taken` records when each is requested."""
    for number, temperature in enumerate(temperatures):
        if taken is not None:
            taken.append(number)
        rows = range(number % 3, 6)
        yield DrawBatch(vectors=VECTORS, requests=requests_for(rows, range(4)), temperature=temperature, seed=number)


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "top_p"), [(5, 0.9), (16, 1.0), (512, 0.9)])
def test_batches_in_one_stream_give_the_draws_of_each_by_itself(verbalizer, batch_size, top_p):
    temperatures = [1.0, 0.0, 0.7, 1.3, 1.0]
    drawn = list(stream_draws(verbalizer, batches_of(temperatures), max_new_tokens=12, top_p=top_p, batch_size=batch_size))
    for number, batch in enumerate(batches_of(temperatures)):
        mine = texts({(d.request.activation_key, d.request.draw): d for n, d in drawn if n == number})
        options = {"temperature": batch.temperature, "top_p": top_p, "seed": batch.seed}
        assert mine == texts(take(verbalizer, batch.requests, **options))
    assert len(drawn) == sum(len(batch.requests) for batch in batches_of(temperatures))


@pytest.mark.parametrize("sampler", ["slots"], indirect=True)
def test_a_batch_is_requested_when_slots_would_stay_idle_and_not_before(verbalizer, sampler):
    taken, seen = [], []
    drawn = stream_draws(verbalizer, batches_of([1.0] * 6, taken), max_new_tokens=12, batch_size=16)
    assert taken == []
    counts = np.zeros(6, dtype=int)
    for number, _ in drawn:
        counts[number] += 1
        seen.append((max(taken), [n for n in range(max(taken)) if 0 < counts[n] < len(requests_for(range(n % 3, 6), range(4)))]))
    assert max(len(unfinished) for _, unfinished in seen) >= 1, "rows of several batches are in flight at once"
    assert seen[0][0] == 0 and seen[20][0] < 3, "16 rows need no more than two batches of 16 to 24 draws"


def test_a_stop_leaves_the_batches_that_follow_untaken(verbalizer):
    taken, steps = [], []
    drawn = stream_draws(
        verbalizer, batches_of([1.0] * 6, taken), max_new_tokens=50, batch_size=8, should_stop=lambda: len(steps) >= 3,
        on_step=steps.append,
    )  # fmt: skip
    assert len(list(drawn)) < 24 and taken == [0]


def test_no_more_rows_are_made_than_draws_are_expected(verbalizer):
    taken = []
    drawn = stream_draws(verbalizer, batches_of([1.0] * 6, taken), max_new_tokens=12, num_draws=24)
    next(drawn)
    assert taken == [0], "the next batch of 20 draws is left to ranks that have none"


@pytest.mark.heavy(9)
@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["slots"], indirect=True)
@pytest.mark.parametrize("family", IN_SLOTS)
@pytest.mark.parametrize(("temperature", "top_p", "batch_size"), [(0.0, 1.0, 7), (1.0, 1.0, 3), (0.8, 0.9, 7), (1.2, 1.0, 64)])
def test_slots_give_the_draws_of_the_plain_sampler(models, monkeypatch, sampler, family, temperature, top_p, batch_size):
    verbalizer = TinyVerbalizer(models[family], STOPS)
    requests = requests_for(range(6), range(5))
    options = {"temperature": temperature, "top_p": top_p, "batch_size": batch_size, "max_new_tokens": 24}
    assert FITS(models[family], len(PROMPT) + 24)
    ours = take(verbalizer, requests, **options)
    monkeypatch.setattr(attention, "supports_slots", lambda model, length: False)
    plain = take(verbalizer, requests, **options)
    assert temperature == 0 or len({len(d.token_ids) for d in ours.values()}) > 3, "rows of many lengths were alive at once"
    same = [key for key in ours if texts(ours)[key] == texts(plain)[key]]
    for key in ours:
        if key in same:
            assert ours[key].log_probability == pytest.approx(plain[key].log_probability, abs=1e-4)
        else:  # a tie that rounding decides
            for one in (ours[key], plain[key]):
                assert_is_naive(one, verbalizer, temperature=temperature, top_p=top_p, max_new_tokens=24)
    assert len(same) >= len(ours) - 1


def test_a_prompt_without_a_common_beginning_needs_none(models, monkeypatch):
    whole = TinyVerbalizer(models["llama"], STOPS)
    reference = texts(take(whole, requests_for(range(4), range(3))))
    monkeypatch.setattr(TinyVerbalizer, "shared_length", 0)
    assert texts(take(whole, requests_for(range(4), range(3)))) == reference


class OutOfMemoryModel:
    """Fails above a number of rows, as CUDA does or as torch does on a CPU."""

    def __init__(self, model, most, from_length=0, on_cpu=False):
        self.model, self.most, self.from_length, self.on_cpu = model, most, from_length, on_cpu

    @property
    def device(self):
        return self.model.device

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def get_decoder(self):
        return self.model.get_decoder()

    def __call__(self, **kw):
        past = kw.get("past_key_values")
        rows = len(kw["input_ids"] if "input_ids" in kw else kw["inputs_embeds"])
        if rows > self.most and (past.get_seq_length() if past else 0) >= self.from_length:
            if self.on_cpu:
                torch.empty(1 << 50)
            raise torch.OutOfMemoryError("CUDA out of memory (a test says so)")
        return self.model(**kw)


@pytest.mark.slow
@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize("from_length", [0, len(PROMPT) + 5])
def test_out_of_memory_halves_the_batch_and_changes_no_draw(models, caplog, from_length, on_cpu):
    requests = requests_for(range(6), range(6))
    reference = texts(take(TinyVerbalizer(models["llama"], STOPS), requests))
    small = TinyVerbalizer(OutOfMemoryModel(models["llama"], most=5, from_length=from_length, on_cpu=on_cpu), STOPS)
    with caplog.at_level(logging.WARNING):
        assert texts(take(small, requests)) == reference
    assert "out of memory" in caplog.text


@pytest.mark.slow
def test_out_of_memory_in_a_stream_takes_no_draw_of_any_batch_twice(models):
    drawn, reference = (
        sorted((n, d.request.activation_key, d.request.draw, d.token_ids) for n, d in stream_draws(
            TinyVerbalizer(model, STOPS), batches_of([1.0, 0.7, 1.3]), max_new_tokens=12, batch_size=40
        ))
        for model in (OutOfMemoryModel(models["llama"], most=9, from_length=len(PROMPT) + 3), models["llama"])
    )  # fmt: skip
    assert drawn == reference


@pytest.mark.parametrize("sampler", ["slots"], indirect=True)
def test_rows_at_once_are_as_many_as_free_memory_holds_unless_their_number_is_given(models, monkeypatch, sampler):
    own, heads, width, blocks, tokens = len(PROMPT) - MARKER, 2, 8, 4, 20
    row = 2 * 4 * heads * width * blocks * (own + tokens) + 4 * VOCABULARY  # keys, values, float32; its prompt's logits
    monkeypatch.setattr(memory, "free_device_bytes", lambda device: 2 * 10 * row + 5)
    verbalizer, requests = TinyVerbalizer(models["llama"], STOPS), requests_for(range(6), range(6))
    free, _ = rows_of_each_step(verbalizer, requests, max_new_tokens=tokens)
    given, _ = rows_of_each_step(verbalizer, requests, max_new_tokens=tokens, batch_size=30)
    assert max(free) == 10 and 25 < max(given) <= 30


def test_rows_at_once_are_those_that_every_device_of_a_spread_model_has_memory_for(monkeypatch):
    """One block on the first device, where the logits are too, and three on the second."""
    capacity, numbers = 10, 2 * 4  # key heads x their width
    pair = {name: torch.empty(1, 2, 3, 4, device=name) for name in ("cpu", "meta")}
    held = [(pair[name], pair[name]) for name in ("cpu", "meta", "meta", "meta")]
    prompts = SimpleNamespace(keys_and_values=held, logits=torch.empty(1, 100))
    slots = {"cpu": 2 * 4 * numbers * capacity + 4 * 100, "meta": 3 * 2 * 4 * numbers * capacity}
    free = {"cpu": 2 * 7 * slots["cpu"], "meta": 2 * 5 * slots["meta"] + 5}
    monkeypatch.setattr(memory, "free_device_bytes", lambda device: free[device.type])
    assert sorted(engine._slots_in_memory(prompts, capacity)) == [5, 7]


def test_out_of_memory_with_a_single_row_says_what_to_do(models):
    nothing_fits = TinyVerbalizer(OutOfMemoryModel(models["llama"], most=0))
    with pytest.raises(RunError, match="max_new_tokens"):
        take(nothing_fits, requests_for(range(3), range(3)))


def test_should_stop_ends_the_draws_at_once(verbalizer):
    steps = []
    stop = lambda: len(steps) >= 3  # noqa: E731
    drawn = list(draw(
        verbalizer, VECTORS, requests_for(range(6), range(4)), temperature=1.0, max_new_tokens=50, seed=0,
        should_stop=stop, on_step=steps.append,
    ))  # fmt: skip
    assert len(steps) == 3 and len(drawn) < 24


def test_on_step_hears_of_every_token_once(verbalizer):
    steps = []
    drawn = take(verbalizer, requests_for(range(6), range(4)), batch_size=8, on_step=steps.append)
    assert sum(steps) == sum(len(d.token_ids) for d in drawn.values())


def test_the_callers_grad_mode_is_its_own_between_draws(verbalizer):
    modes = []
    handle = verbalizer.model.register_forward_pre_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
    for _ in draw(verbalizer, VECTORS, requests_for([0], range(3)), temperature=1.0, max_new_tokens=4, seed=0):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        assert (torch.ones(1, requires_grad=True) * 2).requires_grad
    handle.remove()
    assert len(modes) > 1 and all(modes)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused_by_name(verbalizer, temperature):
    vectors = VECTORS.clone()
    vectors[3] = torch.nan
    with pytest.raises(RunError, match=r"row 3 \(key 1003\), at token 0"):
        take(verbalizer, requests_for(range(6), range(2)), vectors=vectors, temperature=temperature)


def test_a_cache_that_cannot_be_copied_is_not_used(models, monkeypatch, caplog):
    verbalizer, requests = TinyVerbalizer(models["llama"], STOPS), requests_for(range(3), range(3))
    expected = texts(take(verbalizer, requests))

    def static(model, prompts):
        return Prefill(StaticCache(config=model.config, max_cache_len=64), prefill(model, prompts).logits)

    monkeypatch.setattr(attention, "supports_slots", lambda model, length: False)
    monkeypatch.setattr(naive_engine, "prefill", static)
    naive_engine.say_once.cache_clear()
    caplog.clear()
    assert texts(take(verbalizer, requests, batch_size=4, prefill_batch_size=2)) == expected
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "drawing by the naive engine, which is slower",
        "the whole context runs again for every token",
    ]


@pytest.mark.parametrize(
    ("window", "why"), [(0, "has no fast path for LlamaForCausalLM"), (1, "more than the sliding window of Llama")]
)
def test_why_the_naive_engine_draws_is_said(models, monkeypatch, caplog, window, why):
    monkeypatch.setattr(attention, "supports_slots", lambda model, length: length <= window)
    naive_engine.say_once.cache_clear()
    take(TinyVerbalizer(models["llama"], STOPS), requests_for(range(1), range(1)))
    assert why in caplog.text and "which is slower" in caplog.text


def test_forking_leaves_the_prefilled_cache_as_it_was(models, monkeypatch):
    runs = []

    def remembered(model, prompts):
        run = prefill(model, prompts)
        runs.append((run.cache, [layer.keys.clone() for layer in run.cache.layers]))
        return run

    monkeypatch.setattr(naive_engine, "prefill", remembered)
    take(TinyVerbalizer(models["gemma3"]), requests_for(range(3), range(3)))
    [(cache, before)] = runs
    assert isinstance(cache, DynamicCache)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))


@pytest.mark.parametrize(
    ("requests", "options", "message"),
    [
        (requests_for([6], [0]), {}, "6 vectors"),
        (requests_for([-1], [0]), {}, "rows -1"),
        (requests_for([0], [0]), {"batch_size": 0}, "batch_size=0"),
        (requests_for([0], [0]), {"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_impossible_requests_are_refused_before_anything_runs(verbalizer, requests, options, message):
    with pytest.raises(RequestError, match=message):
        draw(verbalizer, VECTORS, requests, **({"temperature": 1.0, "max_new_tokens": 4, "seed": 0} | options))
    assert verbalizer.prompts_run == 0


def test_no_requests_give_no_draws(verbalizer):
    assert take(verbalizer, []) == {}
