"""What makes a model unfit for activations is said before a job: by its files, without their contents."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ksweep import Autoencoder, Cell
from ksweep.activations.base_model import BaseModel, check_model
from ksweep.activations.hidden_states import BlockReader
from ksweep.evaluation.identity import cell_keys
from ksweep.inference.quantized_weights import BITSANDBYTES
from ksweep.inference.transformers_models import options_to_lay_out
from ksweep.utils import weights_check
from ksweep.utils.errors import CheckpointError
from tests.activations.helpers import passages, spec, write_jsonl
from tests.tiny_models import edit_weights, make_base, make_pair

LAYER = 1
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def edit_config(base: Path, **values: object) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | values))


def into_shards(base: Path) -> list[Path]:
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, max_shard_size="20KB")
    (base / "model.safetensors").unlink()
    return sorted(base.glob("model-*.safetensors"))


def into_pickle(base: Path, *dropped: str) -> None:
    state = {name: weight for name, weight in load_file(base / "model.safetensors").items() if name not in dropped}
    torch.save(state, base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard": (lambda base: into_shards(base)[-1].unlink(), "which is not in .* Download the missing shard"),
    "no weights": (lambda base: (base / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "lost": (lambda base: edit_weights(base, change=lambda s: [s.pop(n) for n in list(s) if ".1.mlp." in n]), "lacks 3 weights"),
    "lost in .bin": (lambda base: into_pickle(base, Q_PROJ), "lacks 1 weights, among them layers.0.self_attn.q_proj"),
    "shape": (
        lambda base: edit_weights(base, change=lambda s: s.update({Q_PROJ: s[Q_PROJ][:5].clone()})),
        "1 weights of another shape than config.json says, among them layers.0.self_attn.q_proj",
    ),
    "architecture": (lambda base: edit_config(base, model_type="deepseek_v9"), "cannot be loaded .*deepseek_v9"),
    "quantised": (
        lambda base: edit_config(base, quantization_config={"quant_method": "gptq", "bits": 4}),
        "its weights are quantised by gptq",
    ),
    "tokenizer": (lambda base: (base / "tokenizer.json").write_text("{}"), "has no usable tokenizer"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_model_that_no_job_could_load_is_refused(damage: str, tmp_path: Path) -> None:
    change, words = DAMAGES[damage]
    base = make_base(tmp_path / "base", "qwen2")
    assert check_model(BaseModel(base), LAYER) == ()
    change(base)
    with pytest.raises(CheckpointError, match=words):
        check_model(BaseModel(base), LAYER)
    with pytest.raises(CheckpointError):
        BlockReader(str(base), LAYER, "float32")


def test_weights_above_the_layer_may_be_missing_and_weights_may_be_pickled(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2")
    into_pickle(base, "model.layers.2.mlp.up_proj.weight")
    assert check_model(BaseModel(base), LAYER) == ()
    with pytest.raises(CheckpointError, match="lacks 1 weights"):
        check_model(BaseModel(base), 2)


def test_a_cell_is_planned_once_its_base_was_found_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSWEEP_HOME", str(tmp_path / "home"))
    pair = make_pair(tmp_path, "qwen2")
    text = write_jsonl(tmp_path / "rows.jsonl", passages(20))
    cell = Cell(autoencoder=Autoencoder(av=str(pair.av), ar=str(pair.ar)), activations=spec(pair.base, text, 4))
    asked: list[str] = []
    call = weights_check.call_heavy
    monkeypatch.setattr(weights_check, "call_heavy", lambda function, what: (asked.append(function), call(function, what)))
    for _ in range(2):
        cell_keys(cell)
    assert len(asked) == 3 and asked[-1].endswith("check_lower_blocks"), "AV, AR and base, once"
    edit_weights(pair.base, change=lambda state: state.pop(Q_PROJ))
    with pytest.raises(CheckpointError, match=r"base model .* lacks 1 weights"):
        cell_keys(cell)


def test_weights_of_4_bits_stand_for_those_of_the_multimodal_base_that_they_were_packed_from(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(make_base(tmp_path / "base", "gemma3_multimodal"))
    with torch.device("meta"):
        empty = AutoModel.from_config(config)
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    own = empty.get_parameter("language_model.layers.0.mlp.up_proj.weight")
    packed = torch.empty(own.numel() // 2, 1, dtype=torch.uint8, device="meta")
    config.quantization_config = {"load_in_4bit": True}
    options, method = options_to_lay_out(empty, config, BITSANDBYTES, {name: packed, f"{name}.absmax": torch.empty(4)})
    assert options["state_dict"][name].shape == own.shape and list(options["state_dict"]) == [name] and method is None
