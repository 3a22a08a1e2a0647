"""Pairs over other architectures: read as plain transformers computes them, or refused for what they are and not as damaged."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ksweep.autoencoder.nla.checkpoint import inspect_nla
from ksweep.autoencoder.nla.models import load_nla_reconstructor, load_nla_verbalizer
from ksweep.inference.engine import Request, draw
from ksweep.utils.errors import CheckpointError
from tests.tiny_models import AR_TEMPLATE, AV_TEMPLATE, edit_weights, prefilled, save_tokenizer

D, LAYERS, MARKER = 32, 4, "\u320e"
TEXTS = ["a few words", "", "a much longer text than the others, with a second clause"]
FINAL_NORMS, HEADS = ("norm", "final_layernorm", "ln_f", "final_layer_norm"), ("lm_head", "embed_out")


def config(family: str, num_layers: int, vocab_size: int) -> Any:
    common: dict[str, Any] = {
        "vocab_size": vocab_size, "hidden_size": D, "intermediate_size": 64, "num_hidden_layers": num_layers,
        "num_attention_heads": 4, "max_position_embeddings": 512, "initializer_range": 0.15, "bos_token_id": 537,
        "eos_token_id": 539,
    }  # fmt: skip
    grouped = common | {"num_key_value_heads": 2, "head_dim": 8}
    hybrid = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(num_layers)]
    linear = {f"linear_{name}": size for name, size in (("num_key_heads", 2), ("num_value_heads", 4))}
    made: dict[str, Callable[[], Any]] = {
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=vocab_size, n_embd=D, n_layer=num_layers, n_head=4, n_positions=512, bos_token_id=537, eos_token_id=539,
            initializer_range=0.15,
        ),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**common),
        "phi": lambda: transformers.PhiConfig(**common),
        "qwen3": lambda: transformers.Qwen3Config(**grouped),
        "gemma2": lambda: transformers.Gemma2Config(**grouped, query_pre_attn_scalar=8, sliding_window=16),
        "glm4_moe": lambda: transformers.Glm4MoeConfig(
            **grouped, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1,
            n_shared_experts=1, n_group=1, topk_group=1,
        ),
        "qwen3_5": lambda: transformers.Qwen3_5TextConfig(
            **grouped, **linear, linear_key_head_dim=8, linear_value_head_dim=8, layer_types=hybrid
        ),
    }  # fmt: skip
    return made[family]()


def save_model(path: Path, family: str, num_layers: int, seed: int, is_ar: bool = False) -> None:
    path.mkdir()
    save_tokenizer(path, "qwen2")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(family, num_layers, len(AutoTokenizer.from_pretrained(path)))).eval()
    inner = getattr(model, model.base_model_prefix)
    for parameter in model.parameters():  # biases and norms away from 0 and 1, so that a wrong one shows
        parameter.data += 0.05 * torch.randn_like(parameter)
    if is_ar:  # as the public trainer saves it: without final norm and head
        for owner, names in ((inner, FINAL_NORMS), (model, HEADS)):
            name = next(name for name in names if hasattr(owner, name))
            setattr(owner, name, torch.nn.Identity())
    model.save_pretrained(path)


def make_family_pair(directory: Path, family: str, layer: int = 2, num_layers: int = LAYERS) -> tuple[Path, Path]:
    """An AV and an AR of full weights in the public layout."""
    av, ar = directory / "av", directory / "ar"
    save_model(av, family, num_layers, seed=1)
    save_model(ar, family, layer + 1, seed=2, is_ar=True)
    head = torch.eye(D) + 0.05 * torch.randn(D, D, generator=torch.Generator().manual_seed(3))
    from safetensors.torch import save_file

    save_file({"weight": head}, ar / "value_head.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(av)
    (marker_id,) = tokenizer.encode(MARKER, add_special_tokens=False)
    message = [{"role": "user", "content": AV_TEMPLATE.replace("{injection_char}", MARKER)}]
    prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    at = prompt.index(marker_id)
    for role, path in (("av", av), ("ar", ar)):
        meta = {
            "kind": "nla_model", "schema_version": 2, "role": role, "base_checkpoint": f"tiny/{family}", "d_model": D,
            "extraction": {"injection_scale": 20.0, "mse_scale": math.sqrt(D)},
            "tokens": {
                "injection_char": MARKER, "injection_token_id": marker_id, "injection_left_neighbor_id": prompt[at - 1],
                "injection_right_neighbor_id": prompt[at + 1],
            },
            "prompt_templates": {"av": AV_TEMPLATE, "ar": AR_TEMPLATE}, "extraction_layer_index": layer,
        }  # fmt: skip
        (path / "nla_meta.yaml").write_text(yaml.safe_dump(meta, allow_unicode=True))
    return av, ar


def blocks(model: Any) -> Any:
    inner = getattr(model, model.base_model_prefix)
    return inner.h if hasattr(inner, "h") else inner.layers


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi", "qwen3", "glm4_moe"])
@torch.inference_mode()
def test_pair_over_another_architecture_equals_plain_transformers(family: str, tmp_path: Path) -> None:
    """GPT-2 says n_embd and n_layer; GPT-NeoX calls its final norm, which has a bias, final_layer_norm; GLM's first block has no
    experts; none of them lacks anything."""
    av_path, ar_path = make_family_pair(tmp_path, family)
    av, ar = load_nla_verbalizer(av_path, dtype="float32"), load_nla_reconstructor(ar_path, dtype="float32")
    assert (av.info.layer, av.info.num_layers, ar.info.num_layers, ar.info.d_model) == (2, LAYERS, 3, D)
    vectors = torch.randn(3, D, generator=torch.Generator().manual_seed(5))
    plain_av, plain_ar = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (av_path, ar_path))
    # 1. the verbalizer: the marker's embedding row is the vector at norm 20
    embeds = plain_av.get_input_embeddings()(torch.tensor([av.prompt_ids] * 3)).clone()
    embeds[:, av.injection_position] = 20.0 * torch.nn.functional.normalize(vectors)
    assert torch.allclose(prefilled(av, vectors).logits, plain_av(inputs_embeds=embeds).logits[:, -1], atol=1e-4)
    # 2. the reconstructor: output of the last block, before the final norm, at the last token
    outputs: list[torch.Tensor] = []
    blocks(plain_ar)[2].register_forward_hook(lambda _m, _a, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    for row in ar.prompts.ids(TEXTS):
        plain_ar(input_ids=torch.tensor([row]))
    head = load_file(ar_path / "value_head.safetensors")["weight"]
    expected = torch.stack([out[0, -1] @ head.T for out in outputs])
    assert torch.allclose(ar.reconstruct_texts(TEXTS, batch_size=2), expected, atol=1e-4)
    # 3. greedy draws: tokens of a loop without cache
    ids: list[int] = []
    for _ in range(4):
        rest = plain_av.get_input_embeddings()(torch.tensor([ids], dtype=torch.long))
        ids.append(int(plain_av(inputs_embeds=torch.cat([embeds[:1], rest], dim=1)).logits[0, -1].argmax()))
        if ids[-1] in av.stop_token_ids:
            break
    [found] = draw(av, vectors[:1], [Request(0, 1, 0)], temperature=0.0, max_new_tokens=4, seed=0)
    assert list(found.token_ids)[: len(ids)] == ids


def test_whole_hybrid_model_is_refused_for_its_blocks_and_not_as_damaged(tmp_path: Path) -> None:
    """Three of four blocks are of linear attention: no block lacks what others have."""
    av, ar = make_family_pair(tmp_path, "qwen3_5", layer=5, num_layers=8)
    _, report = AutoModelForCausalLM.from_pretrained(av, output_loading_info=True)
    assert not report["missing_keys"]
    for path, role in ((av, "av"), (ar, "ar")):
        with pytest.raises(CheckpointError, match=r"is a qwen3_5_text model: \d of its \d blocks are .* linear_att") as raised:
            inspect_nla(path, role)  # type: ignore[arg-type]
        message = str(raised.value)
        assert "lacks" not in message and "random" not in message and "not supported yet" in message


@pytest.mark.parametrize("name", ["model.layers.2.mlp.gate.weight", "model.layers.3.self_attn.o_proj.weight"])
def test_block_of_experts_that_lacks_a_weight_is_named(name: str, tmp_path: Path) -> None:
    av, _ = make_family_pair(tmp_path, "glm4_moe")
    inspect_nla(av, "av")
    edit_weights(av, change=lambda state: state.pop(name))
    with pytest.raises(CheckpointError, match=f"lacks weights: {name}"):
        inspect_nla(av, "av")


def test_absent_block_is_named_in_a_model_of_unlike_blocks(tmp_path: Path) -> None:
    av, _ = make_family_pair(tmp_path, "glm4_moe")
    edit_weights(av, change=lambda state: [state.pop(name) for name in list(state) if ".layers.2." in name])
    with pytest.raises(CheckpointError, match=r"lacks weights: model\.layers\.2\.input_layernorm\.weight"):
        inspect_nla(av, "av")


def test_model_without_sdpa_attention_is_not_called_damaged(tmp_path: Path) -> None:
    av, ar = make_family_pair(tmp_path, "gemma2")
    for load, path in ((load_nla_verbalizer, av), (load_nla_reconstructor, ar)):
        with pytest.raises(CheckpointError, match=r"is a gemma2 model, which transformers .* not supported yet") as raised:
            load(path, dtype="float32")
        assert "whole" not in str(raised.value)


def test_sizes_of_a_model_are_the_same_under_either_name(tmp_path: Path) -> None:
    from ksweep.activations.model_config import text_config

    av, _ = make_family_pair(tmp_path, "gpt2")
    info, read = inspect_nla(av, "av"), text_config(av)
    assert "hidden_size" not in AutoConfig.from_pretrained(av).to_dict()
    for name, size in (("num_hidden_layers", LAYERS), ("hidden_size", D), ("max_position_embeddings", 512)):
        assert info.config[name] == read[name] == size
