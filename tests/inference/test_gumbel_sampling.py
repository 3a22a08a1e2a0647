"""Keyed two-level Gumbel sampling against exact probabilities, integer arithmetic and brute force."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as sps
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ksweep.inference import gumbel_sampling

MASK = (1 << 64) - 1
ALPHA = 1e-4
"""Seeds are fixed, so these tests cannot flake; a broken sampler misses this by many orders of magnitude."""


def keys_of_draws(n, seed=0, activation=1, step=0, first=0):
    return gumbel_sampling.step_keys(gumbel_sampling.draw_keys(seed, [activation] * n, range(first, first + n)), step)


def test_uniforms_are_splitmix64_of_the_key():
    published = {  # the reference implementation's outputs, https://prng.di.unimi.it/splitmix64.c
        0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F],
        1234567: [6457827717110365317, 3203168211198807973, 9817491932198370423],
    }
    drawn = gumbel_sampling.uniforms(torch.tensor(list(published)), 3)
    expected = [[((x >> 41) + 0.5) / 2**23 for x in row] for row in published.values()]
    assert drawn.tolist() == expected


def python_mix(x):
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


@given(
    seed=st.integers(0, 2**70), activation=st.integers(-(2**63), 2**64 - 1), draw=st.integers(0, 10**6), step=st.integers(0, 4096)
)
@settings(max_examples=50, deadline=None)
def test_step_keys_equal_the_same_mixing_in_unbounded_integers(seed, activation, draw, step):
    key = seed & MASK
    for part in (activation, draw, step):
        key = python_mix(python_mix((key + 0x9E3779B97F4A7C15) & MASK) ^ (part & MASK))
    (ours,) = gumbel_sampling.step_keys(gumbel_sampling.draw_keys(seed, [activation], [draw]), step).tolist()
    assert ours & MASK == key


def test_keys_of_neighbouring_seeds_activations_draws_and_steps_all_differ():
    keys = [
        key
        for seed in range(4)
        for step in range(10)
        for key in gumbel_sampling.step_keys(
            gumbel_sampling.draw_keys(seed, [a for a in range(50) for _ in range(50)], list(range(50)) * 50), step
        ).tolist()
    ]
    assert len(set(keys)) == len(keys) == 4 * 10 * 2500


@pytest.mark.slow
def test_uniforms_lie_strictly_between_zero_and_one_and_give_finite_gumbels():
    u = gumbel_sampling.uniforms(keys_of_draws(20_000), 512)  # 10^7
    assert u.min() > 0 and u.max() < 1
    assert u.max() > 1 - 1e-6  # the top of the range is reached, so the line above says something
    assert torch.isfinite(-torch.log(-torch.log(u))).all()
    assert sps.kstest(u[:1000].flatten().numpy(), "uniform").pvalue > ALPHA


def test_largest_uniform_is_below_one_only_because_it_has_23_bits():
    def largest(bits):
        return torch.tensor(2**bits - 1).float().add_(0.5).mul_(2.0**-bits)

    assert largest(gumbel_sampling.UNIFORM_BITS) < 1
    assert largest(24) == 1


def test_noise_of_neighbours_is_uncorrelated():
    n, columns = 4000, 64
    base = gumbel_sampling.uniforms(keys_of_draws(n), columns)
    activations = gumbel_sampling.draw_keys(0, range(n), [0] * n)
    others = {
        "next draw": gumbel_sampling.uniforms(keys_of_draws(n, first=1), columns),
        "next step": gumbel_sampling.uniforms(keys_of_draws(n, step=1), columns),
        "next seed": gumbel_sampling.uniforms(keys_of_draws(n, seed=1), columns),
        "next activation": gumbel_sampling.uniforms(keys_of_draws(n, activation=2), columns),
        "block noise": gumbel_sampling.uniforms(keys_of_draws(n), columns, first=1 << 32),
        "next token": base.roll(1, dims=1),
        "draw instead of activation": gumbel_sampling.uniforms(gumbel_sampling.step_keys(activations, 0), columns),
    }
    for name, other in others.items():
        r = np.corrcoef(base.flatten().numpy(), other.flatten().numpy())[0, 1]
        assert abs(r) < 4.5 / np.sqrt(n * columns), name


def g_test_p_value(tokens, probabilities):
    """Likelihood-ratio test; tokens expected fewer than 5 times are pooled, impossible ones must not occur at all."""
    expected = probabilities * len(tokens)
    observed = np.bincount(tokens, minlength=len(probabilities)).astype(float)
    assert observed[expected == 0].sum() == 0
    rare = expected < 5
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] == 0:
        observed, expected = observed[:-1], expected[:-1]
    return sps.power_divergence(observed, expected, lambda_="log-likelihood").pvalue if len(expected) > 1 else 1.0


def exact_probabilities(logits, temperature, top_p):
    p = torch.softmax(logits.double() / temperature, -1).numpy()
    kept = brute_force_nucleus(p, top_p)
    p = np.where(kept, p, 0)
    return p / p.sum()


def brute_force_nucleus(p, top_p):
    kept, total = np.zeros(len(p), dtype=bool), 0.0
    for token in sorted(range(len(p)), key=lambda i: (-p[i], i)):
        kept[token] = True
        total += float(p[token])
        if total >= top_p:
            break
    return kept


@pytest.mark.trials
@pytest.mark.slow
@pytest.mark.parametrize(
    ("vocabulary", "temperature", "top_p"),
    [
        (7, 0.5, 1.0),
        (7, 1.0, 0.9),
        (7, 1.3, 0.95),
        (256, 1.0, 1.0),
        (256, 0.8, 0.5),
        (700, 0.5, 1.0),
        (700, 1.7, 1.0),
        (700, 1.0, 0.9),
    ],
)
def test_sample_follows_the_exact_distribution(vocabulary, temperature, top_p):
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 2
    n = 20_000
    sampled = gumbel_sampling.sample(logits.expand(n, -1), keys_of_draws(n, seed=3), temperature=temperature, top_p=top_p)
    probabilities = exact_probabilities(logits, temperature, top_p)
    assert g_test_p_value(sampled.token_ids.numpy(), probabilities) > ALPHA


@pytest.mark.slow
def test_sample_from_equal_logits_treats_a_short_last_block_fairly():
    n, vocabulary = 30_000, gumbel_sampling.TOKENS_PER_BLOCK + 44  # second block: 44 of 300 tokens
    tokens = gumbel_sampling.sample(torch.zeros(1, vocabulary).expand(n, -1), keys_of_draws(n), temperature=1.0).token_ids.numpy()
    assert tokens.max() < vocabulary
    assert sps.binomtest(int((tokens >= gumbel_sampling.TOKENS_PER_BLOCK).sum()), n, 44 / 300).pvalue > ALPHA
    assert g_test_p_value(tokens, np.full(vocabulary, 1 / vocabulary)) > ALPHA


@pytest.mark.trials
@pytest.mark.slow
@pytest.mark.parametrize("pair", [("draw", 1), ("step", 1), ("seed", 1), ("activation", 1)])
def test_tokens_of_neighbours_are_independent(pair):
    n = 20_000
    logits = torch.zeros(1, 512).expand(n, -1)
    name, offset = pair
    shifted = {
        "draw": {"first": offset},
        "step": {"step": offset},
        "seed": {"seed": offset},
        "activation": {"activation": 1 + offset},
    }
    a = gumbel_sampling.sample(logits, keys_of_draws(n), temperature=1.0).token_ids.numpy()
    b = gumbel_sampling.sample(logits, keys_of_draws(n, **shifted[name]), temperature=1.0).token_ids.numpy()
    for bins in (lambda t: t // 64, lambda t: t % 8):  # by block and by place within the block
        table = np.zeros((8, 8))
        np.add.at(table, (bins(a), bins(b)), 1)
        assert sps.chi2_contingency(table).pvalue > ALPHA


LOG_PROBABILITY = 1e-5
"""Logits of up to 16 and as much below the largest: five roundings of numbers below 32 (2^-24 of them each), and the logarithm of
a sum that is off by a few units more, are below it."""


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (0.7, 1.0), (1.0, 1.0), (1.0, 0.8)])
def test_sample_of_a_row_does_not_depend_on_its_batch(temperature, top_p):
    logits = torch.randn(70, 1000, generator=torch.Generator().manual_seed(0)) * 3
    keys = gumbel_sampling.step_keys(gumbel_sampling.draw_keys(5, range(70), [2] * 70), 4)
    together = gumbel_sampling.sample(logits, keys, temperature=temperature, top_p=top_p)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    shuffled = gumbel_sampling.sample(logits[order], keys[order], temperature=temperature, top_p=top_p)
    alone = [gumbel_sampling.sample(logits[i : i + 1], keys[i : i + 1], temperature=temperature, top_p=top_p) for i in range(70)]
    assert torch.equal(shuffled.token_ids, together.token_ids[order])
    assert [int(s.token_ids) for s in alone] == together.token_ids.tolist()
    exact = torch.log_softmax(logits.double(), -1)[torch.arange(70), together.token_ids]
    for found in (together.log_probabilities, torch.cat([s.log_probabilities for s in alone])):
        assert (found - exact).abs().max() < LOG_PROBABILITY


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (0.3, 1.0), (1.0, 1.0), (4.0, 1.0), (1.0, 0.6)])
def test_log_probability_is_the_models_own_at_temperature_one(temperature, top_p):
    logits = torch.randn(200, 900, generator=torch.Generator().manual_seed(0)) * 4
    sampled = gumbel_sampling.sample(logits, keys_of_draws(200), temperature=temperature, top_p=top_p)
    expected = torch.log_softmax(logits.double(), -1)[torch.arange(200), sampled.token_ids]
    assert sampled.log_probabilities.dtype == torch.float32
    assert (sampled.log_probabilities - expected).abs().max() < LOG_PROBABILITY


def test_log_probability_stays_finite_where_float32_probability_underflows():
    logits = torch.zeros(500, 300)
    logits[:, 0] = 150.0  # every other token: e^-150 at temperature 1, likely at temperature 100
    sampled = gumbel_sampling.sample(logits, keys_of_draws(500), temperature=100.0)
    assert (sampled.token_ids > 0).any()
    assert torch.allclose(sampled.log_probabilities, torch.where(sampled.token_ids == 0, 0.0, -150.0), atol=1e-4)


def test_temperature_zero_takes_the_lowest_id_among_ties():
    logits = torch.zeros(2, 600)
    logits[0, [5, 300, 599]] = 2.0
    logits[1, [599]] = 2.0
    assert gumbel_sampling.sample(logits, keys_of_draws(2), temperature=0.0).token_ids.tolist() == [5, 599]


def test_a_tiny_temperature_is_greedy_even_between_large_logits():
    logits = torch.full((64, 400), 20.0)
    logits[:, 123] = 20.0001
    assert set(gumbel_sampling.sample(logits, keys_of_draws(64), temperature=1e-6).token_ids.tolist()) == {123}


def test_tokens_of_probability_zero_are_never_drawn():
    logits = torch.full((5000, 520), -torch.inf)
    logits[:, [0, 255, 256, 519]] = 0.0
    sampled = gumbel_sampling.sample(logits, keys_of_draws(5000), temperature=1.0)
    assert set(sampled.token_ids.tolist()) == {0, 255, 256, 519}
    assert torch.allclose(sampled.log_probabilities, torch.tensor(0.25).log())


def test_half_precision_logits_are_sampled_as_their_float32_values():
    logits = torch.randn(50, 700, generator=torch.Generator().manual_seed(0)).bfloat16()
    half, full = (gumbel_sampling.sample(x, keys_of_draws(50), temperature=0.9) for x in (logits, logits.float()))
    assert torch.equal(half.token_ids, full.token_ids)
    assert torch.equal(half.log_probabilities, full.log_probabilities)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.0, 1.0), (0.7, 1.0), (0.7, 0.9)])
def test_rows_with_logits_that_are_not_finite_are_marked_by_a_nan(poison, temperature, top_p):
    logits = torch.randn(40, 700, generator=torch.Generator().manual_seed(0))
    logits[17, 650] = poison
    logits[30] = -torch.inf
    sampled = gumbel_sampling.sample(logits, keys_of_draws(40), temperature=temperature, top_p=top_p)
    assert sampled.log_probabilities.isnan().nonzero().flatten().tolist() == [17, 30]
    assert sampled.token_ids.min() >= 0 and sampled.token_ids.max() < 700


@given(
    seed=st.integers(0, 10_000),
    vocabulary=st.integers(1, 800),
    top_p=st.floats(0.01, 0.999),
    spread=st.sampled_from([0.0, 0.5, 2.0, 6.0]),
)
@settings(max_examples=60, deadline=None)
def test_nucleus_equals_brute_force_with_ties_in_the_order_of_ids(seed, vocabulary, top_p, spread):
    logits = torch.randn(5, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread
    weights = torch.softmax((logits * 2).round() / 2, -1)  # halves only: many ties, as in bfloat16
    kept = gumbel_sampling.nucleus(weights, top_p)
    for row, ours in zip(weights.numpy(), kept.numpy(), strict=True):
        np.testing.assert_array_equal(ours, np.where(brute_force_nucleus(row, top_p), row, 0))


def test_nucleus_of_equal_probabilities_keeps_just_as_many_of_the_lowest_ids_as_needed():
    kept = gumbel_sampling.nucleus(torch.full((1, 8), 1 / 8), 0.5)[0]
    assert kept.tolist() == [1 / 8] * 4 + [0.0] * 4
    kept = gumbel_sampling.nucleus(torch.tensor([[0.125, 0.5, 0.125, 0.125, 0.125]]), 0.75)[0]
    assert kept.tolist() == [0.125, 0.5, 0.125, 0.0, 0.0]


@pytest.mark.parametrize("candidates", [8, 4096])
@pytest.mark.parametrize("temperature", [1.0, 0.7, torch.tensor([0.7, 0.0, 1.4]).repeat(30)])
def test_without_waits_tokens_are_the_same_but_for_large_nuclei(monkeypatch, candidates, temperature):
    monkeypatch.setattr(gumbel_sampling, "CANDIDATES_WITHOUT_WAIT", candidates)
    logits = torch.randn(90, 700, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 9, 90)[:, None]
    options = {"temperature": temperature, "top_p": 0.9}
    waited = gumbel_sampling.sample(logits, keys_of_draws(90), may_wait=True, **options)
    at_once = gumbel_sampling.sample(logits, keys_of_draws(90), may_wait=False, **options)
    t = torch.as_tensor(temperature).expand(90)
    p = torch.softmax(logits.double() / t.clamp(min=1e-9)[:, None], -1)
    nucleus_size = (p.sort(descending=True).values.cumsum(-1) < 0.9).sum(-1) + 1
    undecided = (nucleus_size > candidates) & (t > 0)
    assert torch.equal(at_once.token_ids == gumbel_sampling.UNDECIDED, undecided)
    assert undecided.any() == (candidates == 8) and not undecided.all()
    for before, after in ((waited.token_ids, at_once.token_ids), (waited.log_probabilities, at_once.log_probabilities)):
        assert torch.equal(before[~undecided], after[~undecided])


@pytest.mark.slow
def test_a_nucleus_is_told_without_looking_at_a_value_on_the_host():
    """Fake tensors have no values: an operation that asks for one raises."""
    with FakeTensorMode():
        logits, keys = torch.empty(3, 9000), torch.empty(3, dtype=torch.long)
        for temperature in (1.0, torch.empty(3)):
            gumbel_sampling.sample(logits, keys, temperature=temperature, top_p=0.9, may_wait=False)
        with pytest.raises(DataDependentOutputException):
            gumbel_sampling.sample(logits, keys, temperature=1.0, top_p=0.9, may_wait=True)


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_each_row_is_sampled_at_its_own_temperature(top_p):
    temperatures = [0.0, 1.0, 0.4, 1.7, 0.0] * 8
    logits = torch.randn(40, 700, generator=torch.Generator().manual_seed(3)) * 3
    logits[0, 650] = logits[0, 20] = logits[0].max() + 1  # the lower id wins
    keys = keys_of_draws(40)
    together = gumbel_sampling.sample(logits, keys, temperature=torch.tensor(temperatures), top_p=top_p)
    for i, temperature in enumerate(temperatures):
        alone = gumbel_sampling.sample(logits[i : i + 1], keys[i : i + 1], temperature=temperature, top_p=top_p)
        assert together.token_ids[i] == alone.token_ids
        exact = float(torch.log_softmax(logits[i].double(), -1)[together.token_ids[i]])
        for found in (together.log_probabilities[i], alone.log_probabilities):
            assert float(found) == pytest.approx(exact, abs=LOG_PROBABILITY)
    assert together.token_ids[0] == 20
