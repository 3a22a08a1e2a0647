"""`ksweep doctor`: the engine's self-test is passed by a good engine and by no other, and bad stores are named."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ksweep.cli import main
from ksweep.cli.selftest import MAX_TOKENS, NUM_ACTIVATIONS, NUM_DRAWS, VOCABULARY, WIDTH, TinyVerbalizer, failures
from ksweep.inference import gumbel_sampling, kv_cache
from ksweep.registry.run_record import write_run
from tests.registry.landed_runs import curve_of, record_of


@pytest.mark.slow
def test_the_engine_passes_its_self_test() -> None:
    assert failures("cpu") == []


@pytest.mark.slow
def test_slots_that_mix_up_rows_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = kv_cache.KVCacheLayer.write_prompts

    def of_the_first(layer: kv_cache.KVCacheLayer, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        real(layer, first, keys[:1].expand_as(keys), values[:1].expand_as(values))

    monkeypatch.setattr(kv_cache.KVCacheLayer, "write_prompts", of_the_first)
    assert "greedy text from the forked cache differs from plain decoding without one" in failures("cpu")


def test_doctor_names_a_landing_that_is_not_believed_and_exits_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "registry", record_of("r1"), curve_of())
    (tmp_path / "registry" / "landing" / "r1" / "curve.parquet").write_bytes(b"cut short")
    monkeypatch.setattr("ksweep.cli.selftest.failures", lambda device: [])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["ksweep", "doctor", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    findings = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    bad = [finding for finding in findings if finding["state"] == "bad"]
    assert ended.value.code == 1 and [finding["subject"] for finding in bad] == ["registry"]
    assert "r1/curve.parquet is not what was written" in bad[0]["said"]
    assert {"machine", "packages", "vector cache", "disk", "engine on cpu", "engine vllm"} <= {
        finding["subject"] for finding in findings
    }


@pytest.mark.slow
@torch.inference_mode()
def test_no_token_of_the_self_test_is_near_a_tie_that_another_processor_could_decide() -> None:
    exact, generator = TinyVerbalizer("cpu", torch.float64), torch.Generator().manual_seed(0)
    vectors = 3 * np.random.default_rng(0).normal(size=(NUM_ACTIVATIONS, WIDTH))
    off = 3e-3 * (2 * torch.rand(64, VOCABULARY, generator=generator) - 1)
    off[0] = 0.0
    for temperature, num_draws in ((0.0, 1), (1.0, NUM_DRAWS)):
        for row, k in itertools.product(range(NUM_ACTIVATIONS), range(num_draws)):
            keys, sequence = (
                gumbel_sampling.draw_keys(0, 64 * [row + 1], 64 * [k]),
                exact.prompts(torch.from_numpy(vectors[row : row + 1])).embeddings,
            )
            for step in range(MAX_TOKENS):
                logits = exact.model(inputs_embeds=sequence, use_cache=False).logits[:, -1] + off
                tokens = gumbel_sampling.sample(
                    logits.float(), gumbel_sampling.step_keys(keys, step), temperature=temperature
                ).token_ids
                assert len(tokens.unique()) == 1
                if int(tokens[0]) in exact.stop_token_ids:
                    break
                sequence = torch.cat([sequence, exact.model.get_input_embeddings()(tokens[:1, None])], dim=1)
