"""The golden TAE fixtures: what the reference computes, to the tolerances of tests/fixtures/tae/README.md.

`python -m tests.autoencoder.test_tae_fixtures` prints the worst absolute difference of every array.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ksweep.autoencoder.tae.models import (
    Explanation,
    TaeInfo,
    TaeReconstructor,
    TaeVerbalizer,
    inspect_tae,
    load_tae_reconstructor,
    load_tae_verbalizer,
)
from ksweep.inference.engine import Draw, Request, draw
from tests.tiny_models import prefilled

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tae"
CASES = sorted(path.parent.name for path in FIXTURES.glob("*/expected.json"))
TOLERANCE = {"encoder_input_embeddings": 1e-5, "candidate_mse": 1e-5}
"""Absolute 1e-4 for every other array, except that candidate_mse is relative; token arrays are met exactly."""


@cache
def said(case: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((FIXTURES / case / "expected.json").read_text())
    return values


@cache
def arrays(case: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / case / "expected.npz") as file:
        return {name: file[name] for name in file.files}


@cache
def loaded(case: str) -> tuple[TaeVerbalizer, TaeReconstructor]:
    info = inspect_tae(FIXTURES / case / said(case)["checkpoint_file"])
    av = load_tae_verbalizer(info, dtype="float32")
    return av, load_tae_reconstructor(info, dtype="float32", sharing=av)


def differences(case: str) -> dict[str, float]:
    """Worst absolute difference of each array (candidate_mse: relative), everything computed from the given arrays."""
    given, (av, ar) = arrays(case), loaded(case)
    found = {"activations": activations(av.info, given), **decoder_arrays(av, given), **encoder_arrays(ar, given)}
    worst = {name: float(np.abs(value.astype(np.float64) - given[name]).max()) for name, value in found.items()}
    worst["candidate_mse"] = float((np.abs(found["candidate_mse"] - given["candidate_mse"]) / given["candidate_mse"]).max())
    return worst


@torch.inference_mode()
def activations(info: TaeInfo, given: dict[str, np.ndarray]) -> np.ndarray:
    """Output of block `layer` of the model that the checkpoint says activations come from."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(info.activations_model, attn_implementation="eager").eval()
    ids, mask = torch.tensor(given["input_ids"]), torch.tensor(given["attention_mask"])
    hidden = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[info.layer + 1]
    return hidden[torch.arange(len(ids)), torch.tensor(given["positions"])].numpy()


@torch.inference_mode()
def decoder_arrays(av: TaeVerbalizer, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Forced, greedy and sampled continuations over prefill and cache."""
    vectors = av.inputs(torch.tensor(given["activations"]), given["positions"].tolist())
    fixed, noise = torch.tensor(given["fixed_tokens"]), torch.tensor(given["sample_gumbel_noise"])
    forced, _ = continued(av, vectors, lambda step, logits: fixed[:, step])
    greedy_logits, greedy = continued(av, vectors, lambda step, logits: logits.argmax(-1))
    _, sampled = continued(av, vectors, lambda step, logits: (logits / 0.7 + noise[:, step]).argmax(-1))
    return {
        "decoder_next_token_logits": forced[:, 0].numpy(),
        "decoder_forced_logits": forced.numpy(),
        "decoder_greedy_tokens": greedy.numpy(),
        "decoder_greedy_logits": greedy_logits[:, :-1].numpy(),
        "sample_tokens": sampled.numpy(),
    }


def continued(av: TaeVerbalizer, vectors: torch.Tensor, choose: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits before every token and after the last, and the tokens that were chosen from them."""
    prefill = prefilled(av, vectors)
    logits, tokens = [prefill.logits], []
    for step in range(av.num_tokens or 0):
        tokens.append(choose(step, logits[-1]))
        output = av.model(input_ids=tokens[-1][:, None], past_key_values=prefill.cache, use_cache=True)
        logits.append(output.logits[:, -1])
    return torch.stack(logits, dim=1), torch.stack(tokens, dim=1)


def encoder_arrays(ar: TaeReconstructor, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    embeddings = ar.embed(torch.tensor(given["fixed_tokens"]))
    if ar.model.config.model_type == "gemma2":  # the reference scales these inside the model
        embeddings = embeddings / ar.d_model**0.5
    n, k, t = given["candidate_tokens"].shape
    current, positions = given["current_token_ids"].tolist(), given["positions"].tolist()
    flat = torch.tensor(given["candidate_tokens"].reshape(n * k, t))
    each = [[value for value in values for _ in range(k)] for values in (current, positions)]
    candidates = ar.reconstruct_tokens(flat, *each, batch_size=7).numpy().reshape(n, k, -1)
    errors = ((candidates - given["activations"][:, None]) ** 2).mean(-1)
    return {
        "encoder_input_embeddings": embeddings.detach().numpy(),
        "encoder_reconstruction": ar.reconstruct_tokens(torch.tensor(given["fixed_tokens"]), current, positions).numpy(),
        "candidate_reconstructions": candidates,
        "candidate_mse": errors,
        "candidate_best_index": errors.argmin(-1),
    }


@pytest.mark.parametrize("case", CASES)
def test_fixture_arrays_are_met(case: str) -> None:
    found = differences(case)
    allowed = {name: 0.0 if np.issubdtype(arrays(case)[name].dtype, np.integer) else TOLERANCE.get(name, 1e-4) for name in found}
    assert len(found) == 11 and {name: worst for name, worst in found.items() if worst > allowed[name]} == {}


@pytest.mark.parametrize("case", CASES)
def test_layout_is_what_the_reference_built(case: str) -> None:
    info, expected = loaded(case)[0].info, said(case)
    decoder, encoder = expected["decoder_layout"], expected["encoder_layout"]
    assert (info.decoder.left, info.decoder.right, info.decoder.prefix_length) == (
        decoder["left"],
        decoder["right"],
        decoder["prefix_length"],
    )
    assert (info.encoder.soft_prompt, info.encoder.postfix) == (encoder["soft_prompt"], encoder["postfix"])
    assert info.encoder.num_around + info.num_tokens == encoder["total"]
    assert info.encoder.output_layer == encoder["output_layer"] and info.encoder.has_projection == encoder["projection"]
    assert (info.layer, info.num_tokens, info.d_model) == (expected["layer_l"], expected["t_text"], expected["hidden_size"])
    assert info.num_layers == expected["num_layers"] and len(set(info.decoder.projections)) == expected["num_projections"]


@pytest.mark.parametrize("case", CASES)
def test_sampler_draws_t_text_tokens_greedily_as_the_reference_did_in_any_batch(case: str) -> None:
    given, (av, _) = arrays(case), loaded(case)
    vectors = av.inputs(torch.tensor(given["activations"]), given["positions"].tolist())
    for batch_size, prefill_batch_size in ((64, 64), (4, 2)):
        found = drawn(av, vectors, 2, temperature=0.0, batch_size=batch_size, prefill_batch_size=prefill_batch_size)
        tokens = np.array([d.token_ids for d in found]).reshape(len(vectors), 2, -1)
        assert (tokens == given["decoder_greedy_tokens"][:, None]).all()
        assert {d.finish for d in found} == {"length"}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_draws_do_not_depend_on_batches_and_score_as_their_tokens(case: str) -> None:
    """Sampled tokens over a forked cache have the log probability of one pass over the prompt and all of them."""
    given, (av, _) = arrays(case), loaded(case)
    vectors = av.inputs(torch.tensor(given["activations"]), given["positions"].tolist())
    together = drawn(av, vectors, 3, temperature=1.0, batch_size=64)
    alone = drawn(av, vectors, 3, temperature=1.0, batch_size=1)
    assert [d.token_ids for d in together] == [d.token_ids for d in alone]
    tokens = torch.tensor([d.token_ids for d in together])
    assert tokens.shape == (3 * len(vectors), av.num_tokens) and len({d.token_ids for d in together}) > len(vectors)
    exact = load_tae_verbalizer(av.info, dtype=torch.float64)
    with torch.inference_mode():
        logits, _ = continued(exact, vectors.repeat_interleave(3, dim=0), lambda step, _: tokens[:, step])
    expected = logits.double()[:, :-1].log_softmax(-1).gather(-1, tokens[:, :, None]).sum((1, 2))
    assert np.allclose([d.log_probability for d in together], expected.numpy(), atol=1e-4)


def drawn(av: TaeVerbalizer, vectors: torch.Tensor, num_draws: int, **options: Any) -> list[Draw]:
    requests = [Request(row, 1000 + row, k) for row in range(len(vectors)) for k in range(num_draws)]
    found = draw(av, vectors, requests, max_new_tokens=av.num_tokens or 0, seed=0, **options)
    return sorted(found, key=lambda d: (d.request.row, d.request.draw))


@pytest.mark.parametrize("case", CASES)
def test_encoder_with_its_own_blocks_equals_the_one_on_the_decoders_model(case: str) -> None:
    given, (av, shared) = arrays(case), loaded(case)
    own = load_tae_reconstructor(av.info, dtype="float32")
    tokens, current = torch.tensor(given["fixed_tokens"]), given["current_token_ids"].tolist()
    assert shared.model is av.model and own.model is not av.model
    assert (
        len(list(own.model.get_decoder().children())) and own.model.config.num_hidden_layers == av.info.encoder.output_layer + 1
    )
    positions = given["positions"].tolist()
    a, b = (ar.reconstruct_tokens(tokens, current, positions) for ar in (own, shared))
    assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_every_text_is_an_explanation_and_special_tokens_stay_in_it(case: str) -> None:
    av, _ = loaded(case)
    text = av.decode([*arrays(case)["fixed_tokens"][0].tolist(), av.tokenizer.eos_token_id])
    assert text.endswith(av.tokenizer.eos_token) and av.parse(text, "length") == (text, "ok")
    assert av.parse("", "length") == ("", "ok") and av.stop_token_ids == frozenset()


@pytest.mark.parametrize("case", CASES)
def test_reconstructions_keep_their_order_among_repeated_and_unequal_explanations(case: str) -> None:
    given, (_, ar) = arrays(case), loaded(case)
    mixed = [
        Explanation("", tuple(given["candidate_tokens"][i, j].tolist()), int(given["current_token_ids"][i]))
        for i, j in [(3, 1), (0, 0), (3, 1), (5, 4), (1, 2)]
    ]
    empty = Explanation("", ())
    found = ar.reconstruct([mixed[0], empty, *mixed[1:]], batch_size=2)
    expected = given["candidate_reconstructions"][[3, 0, 3, 5, 1], [1, 0, 1, 4, 2]]
    assert np.abs(found[[0, 2, 3, 4, 5]].numpy() - expected).max() < 1e-4
    assert ar.reconstruct([]).shape == (0, ar.d_model) and torch.equal(ar.reconstruct([empty])[0], found[1])


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_stays_near_float32(case: str) -> None:
    given, info = arrays(case), loaded(case)[0].info
    av = load_tae_verbalizer(info, dtype="bfloat16")
    logits = prefilled(av, torch.tensor(given["activations"])).logits.numpy()
    expected = given["decoder_next_token_logits"]
    assert logits.dtype == np.float32 and np.abs(logits - expected).max() < 0.1 * np.abs(expected).max()


if __name__ == "__main__":
    for name in CASES:
        for array, worst in differences(name).items():
            print(f"{name:20} {array:28} {worst:.2e}{' relative' if array == 'candidate_mse' else ''}")
