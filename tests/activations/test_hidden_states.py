"""Vectors against the public extractor's fixtures and against transformers' own hidden states."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PhiConfig, PhiForCausalLM

from ksweep.activations import ensure
from ksweep.activations.hidden_states import BlockReader
from ksweep.activations.source import to_float32
from ksweep.utils.errors import CheckpointError, DataError, RequestError
from tests.activations.helpers import passages, spec, write_jsonl
from tests.tiny_models import FAMILIES, FIXTURES, make_base, save_tokenizer

CASES = ("qwen2_text", "gemma3_text")


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("case", CASES)
def test_fixture_positions_and_vectors_are_met(case: str, tmp_path: Path) -> None:
    facts = json.loads((FIXTURES / case / "expected.json").read_text())["extraction"]
    arrays = np.load(FIXTURES / case / "expected.npz")
    text = write_jsonl(tmp_path / "t.jsonl", facts["texts"], row_id=facts["document_ids"])
    request = spec(FIXTURES / case / "base", text, 12, positions_per_document=4, min_position=50, max_length=2048)
    table = ensure(request, facts["layer"], tmp_path / "cache")
    assert table.column("position").reshape(3, 4).tolist() == arrays["extraction_positions"].tolist()
    assert table.column("token_id").tolist() == [
        facts["token_ids"][row][p] for row, taken in enumerate(arrays["extraction_positions"]) for p in taken
    ]
    assert relative(table.vectors().reshape(3, 4, -1), arrays["extraction_vectors"]) < 1e-4  # 3e-7 seen


@pytest.mark.parametrize("case", CASES)
def test_fixture_token_ids_are_met(case: str) -> None:
    facts = json.loads((FIXTURES / case / "expected.json").read_text())["extraction"]
    reader = BlockReader(str(FIXTURES / case / "base"), facts["layer"], "float32")
    assert reader.tokenize(facts["texts"], 2048) == facts["token_ids"]
    assert reader.tokenize(facts["texts"], 60) == [ids[:60] for ids in facts["token_ids"]]


def test_activations_above_the_norm_are_left_out_and_the_others_stay_as_they_were(tmp_path: Path) -> None:
    facts = json.loads((FIXTURES / CASES[0] / "expected.json").read_text())["extraction"]
    text = write_jsonl(tmp_path / "t.jsonl", facts["texts"], row_id=facts["document_ids"])
    everything = spec(FIXTURES / CASES[0] / "base", text, 12, positions_per_document=4, min_position=50, max_length=2048)
    table = ensure(everything, facts["layer"], tmp_path / "cache")
    norms = np.linalg.norm(table.vectors().astype(np.float64), axis=1)
    limit = float(np.sort(norms)[6])
    kept = ensure(replace(everything, num_activations=7, max_norm=limit), facts["layer"], tmp_path / "cache")
    np.testing.assert_array_equal(kept.vectors(), table.vectors()[norms <= limit])
    assert kept.column("position").tolist() == table.column("position")[norms <= limit].tolist()
    assert kept.key != table.key


def make_gpt2(path: Path) -> Path:
    save_tokenizer_in(path)
    config = GPT2Config(n_layer=3, n_embd=16, n_head=2, n_positions=64, vocab_size=700, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(path)
    return path


def make_phi(path: Path) -> Path:
    """An architecture with parallel blocks and a final norm of another name."""
    save_tokenizer_in(path)
    config = PhiConfig(num_hidden_layers=3, hidden_size=16, intermediate_size=16, num_attention_heads=2, vocab_size=700)
    PhiForCausalLM(config).save_pretrained(path)
    return path


def save_tokenizer_in(path: Path) -> None:
    path.mkdir(parents=True)
    save_tokenizer(path, "qwen2")
    torch.manual_seed(0)


def make_model(family: str, path: Path) -> Path:
    if family in ("gpt2", "phi"):
        return {"gpt2": make_gpt2, "phi": make_phi}[family](path)
    if family == "gemma3_multimodal_new_names":
        return rename_as_transformers_now_does(make_base(path, "gemma3_multimodal"))
    return make_base(path, family)  # type: ignore[arg-type]


def rename_as_transformers_now_does(path: Path) -> Path:
    """model.language_model.layers...; google/gemma-3-*-it on the hub has language_model.model.layers..., from before."""
    old, new = "language_model.model.", "model.language_model."
    state = load_file(path / "model.safetensors")
    renamed = {new + k.removeprefix(old): v for k, v in state.items() if k.startswith(old)}
    assert renamed
    save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3_multimodal_new_names", "gpt2", "phi"])
def test_block_output_equals_hidden_states_of_transformers(family: str, tmp_path: Path) -> None:
    path = make_model(family, tmp_path / "base")
    reader = BlockReader(str(path), 1, "float32")
    ids = reader.tokenize(passages(3), 40)
    model = reference_model(path)
    for row in ids:
        with torch.inference_mode():
            expected = model(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states[2][0].numpy()
        assert relative(reader.vectors([row], [range(len(row))]), expected) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_multimodal"])
def test_last_block_is_taken_before_the_final_norm(family: str, tmp_path: Path) -> None:
    path = make_model(family, tmp_path / "base")
    reader = BlockReader(str(path), 2, "float32")
    ids = reader.tokenize(passages(1), 40)[0]
    model = reference_model(path)
    seen: list[Any] = []
    block = reader_blocks(model.get_decoder())[2]
    block.register_forward_hook(lambda module, inputs, output: seen.append(output[0] if isinstance(output, tuple) else output))
    with torch.inference_mode():
        after_norm = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[3][0].numpy()
    got = reader.vectors([ids], [range(len(ids))])
    assert relative(got, seen[0][0].numpy()) < 1e-5 < relative(got, after_norm)


def reference_model(path: Path) -> Any:
    """The whole model, by transformers, in float64 but for norms. The tiny multimodal wrapper's vision part does not fit
    together, and is not looked at."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, ignore_mismatched_sizes=True).eval()


def reader_blocks(decoder: Any) -> Any:
    return decoder.layers if hasattr(decoder, "layers") else decoder.h


def test_blocks_above_the_layer_are_not_loaded_and_never_run(base: Path) -> None:
    reader = BlockReader(str(base), 0, "float32")
    assert len(reader.decoder.layers) == 1
    assert not hasattr(reader.decoder, "lm_head")


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma3_multimodal", "gpt2"])
def test_batch_and_single_row_extraction_agree(family: str, tmp_path: Path) -> None:
    reader = BlockReader(str(make_model(family, tmp_path / "base")), 1, "float32")
    ids = reader.tokenize(passages(12), 64)
    positions = [[len(row) - 1, len(row) // 2] for row in ids]
    together = reader.vectors(ids, positions)
    alone = np.concatenate([reader.vectors([row], [taken]) for row, taken in zip(ids, positions, strict=True)])
    # The whole row, too: tokens behind the last position change nothing.
    whole = np.stack([reader.outputs([row])[0, p].numpy() for row, taken in zip(ids, positions, strict=True) for p in taken])
    assert relative(together, alone) < 1e-5 and relative(together, whole) < 1e-5


def test_bfloat16_is_kept_bit_for_bit(base: Path) -> None:
    reader = BlockReader(str(base), 1, "bfloat16")
    ids = reader.tokenize(passages(2), 128)
    stored = reader.vectors(ids[:1], [range(len(ids[0]))])
    expected = reader.outputs(ids[:1])[0]
    assert expected.dtype == torch.bfloat16 and stored.dtype == np.uint16
    assert np.array_equal(to_float32(stored), expected.float().numpy())


class _Operations(TorchDispatchMode):
    """Notes the names of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_forward_pass_is_followed_by_nothing_that_a_gpu_would_wait_for(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from the host to a GPU waits for all before it, and so would the tokens of the next batch."""
    reader = BlockReader(str(base), 1, "float32")
    outputs = reader.outputs
    with torch.inference_mode(), _Operations() as operations:

        def noted(*args: Any) -> torch.Tensor:
            hidden = outputs(*args)
            operations.names.clear()
            return hidden

        monkeypatch.setattr(reader, "outputs", noted)
        reader._taken([([3, 4, 5], [0, 2]), ([6, 7], [1])], None)
        assert operations.names == ["index"]


def test_bfloat16_batch_against_single_differs_by_rounding_only(base: Path) -> None:
    # bfloat16 has 8 bits: another batch shape may round another way. That is why units have fixed batches.
    reader = BlockReader(str(base), 1, "bfloat16")
    ids = reader.tokenize(passages(20), 128)
    positions = [[len(row) - 1] for row in ids]
    together = to_float32(reader.vectors(ids, positions))
    alone = to_float32(np.concatenate([reader.vectors([row], [p]) for row, p in zip(ids, positions, strict=True)]))
    assert relative(together, alone) < 0.02


def test_a_batch_that_memory_does_not_suffice_for_is_run_in_halves(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = BlockReader(str(base), 1, "float32")
    ids = reader.tokenize(passages(12), 8)  # of one length, so that they are one batch
    positions = [[len(row) - 1, *range(row_number % 3)] for row_number, row in enumerate(ids)]
    expected, whole, sizes = reader.vectors(ids, positions), reader.outputs, list[int]()

    def with_room_for_three(rows: list[list[int]], pad_id: int | None = None) -> torch.Tensor:
        sizes.append(len(rows))
        if len(rows) > 3:
            raise torch.OutOfMemoryError("no room")
        return whole(rows, pad_id)

    monkeypatch.setattr(reader, "outputs", with_room_for_three)
    assert relative(reader.vectors(ids, positions), expected) < 1e-5
    assert sizes == [12, 6, 3, 3, 6, 3, 3]
    monkeypatch.setattr(reader, "outputs", lambda rows, pad_id: with_room_for_three(rows * 4))
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        reader.vectors(ids, positions)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma3_multimodal", "gpt2"])
def test_closing_frees_the_weights_without_a_garbage_collection(family: str, tmp_path: Path) -> None:
    reader = BlockReader(str(make_model(family, tmp_path / "base")), 1, "float32")
    gc.collect()
    gc.disable()
    try:
        assert len(reader.vectors([list(range(9)), list(range(5))], [[8], [0, 4]])) == 3
        weights = [weakref.ref(parameter) for parameter in reader.decoder.parameters()]
        reader.close()
        assert weights and not any(one() is not None for one in weights)
    finally:
        gc.enable()


def test_layer_beyond_the_model_is_refused_with_its_depth(base: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"layer 3 .*has 3 blocks, so activations.layer is 0 to 2"):
        ensure(spec(base, text, 3), 3, tmp_path)
    with pytest.raises(RequestError, match="layer 3"):
        BlockReader(str(base), 3)


def test_missing_weight_is_refused(base: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(base, tmp_path / "broken"))
    state = load_file(broken / "model.safetensors")
    kept = {k: v for k, v in state.items() if "layers.0.mlp.up_proj" not in k}
    save_file(kept, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 weights, among them layers.0.mlp.up_proj.weight"):
        BlockReader(str(broken), 1, "float32")


def test_weight_of_another_shape_is_refused(base: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(base, tmp_path / "broken"))
    state = load_file(broken / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"] = state["model.layers.1.mlp.up_proj.weight"][:-1].clone()
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights of another shape than .*, among them layers.1.mlp.up_proj"):
        BlockReader(str(broken), 1, "float32")


def test_missing_weight_above_the_layer_does_not_matter(base: Path, tmp_path: Path) -> None:
    cut = Path(shutil.copytree(base, tmp_path / "cut"))
    state = {k: v for k, v in load_file(cut / "model.safetensors").items() if "layers.2." not in k and "model.norm" not in k}
    save_file(state, cut / "model.safetensors", metadata={"format": "pt"})
    ids = [[1, 5, 9, 4, 8]]
    taken = [BlockReader(str(path), 1, "float32").vectors(ids, [[4]]) for path in (base, cut)]
    assert np.array_equal(*taken)


def test_damaged_or_foreign_model_directory_is_refused(base: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(base, tmp_path / "damaged"))
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        BlockReader(str(damaged), 1)
    (damaged / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not say how many blocks"):
        BlockReader(str(damaged), 1)
    with pytest.raises(CheckpointError, match="no base model at"):
        BlockReader(str(tmp_path / "nowhere"), 1)


def test_vectors_that_are_not_finite_are_refused_by_row_and_position(base: Path, text: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(base, tmp_path / "broken"))
    state = load_file(broken / "model.safetensors")
    state["model.layers.0.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"row 'row:1', position \d+ of .*rows.jsonl.* is not finite"):
        ensure(spec(broken, text, 5), 1, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.arrow"))
