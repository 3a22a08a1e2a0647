"""A tiny random pair and base of every model family that ksweep is checked with: against full-context transformers.

    row = check_family(tmp_path, "Qwen3-Next")  # row.line() is what docs/families.md says of it

The reference runs whole prompts and texts in one forward pass, with eager attention and without a cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from ksweep.activations.base_model import BaseModel, check_model
from ksweep.activations.hidden_states import BlockReader
from ksweep.autoencoder.nla.models import NlaReconstructor, NlaVerbalizer, load_nla_reconstructor, load_nla_verbalizer
from ksweep.inference import attention
from ksweep.inference.engine import Request, draw
from ksweep.inference.model_parts import blocks_of, decoder_of, final_norm_of
from ksweep.inference.naive_engine import can_be_copied
from ksweep.inference.transformers_models import cut_blocks, load_or_lay_out, quiet
from ksweep.utils.errors import CheckpointError
from tests.tiny_models import AR_TEMPLATE, AV_TEMPLATE, prefilled, save_tokenizer

D, MARKER = 32, "\u320e"
TEXTS = ["a few words", "", "a much longer text than the others, with a second clause"]
MAX_NEW_TOKENS = 8
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
"""Of float32 numbers that other kernels sum in another order."""

COMMON: dict[str, Any] = {
    "hidden_size": D, "intermediate_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512,
    "initializer_range": 0.15, "bos_token_id": 537, "eos_token_id": 539, "pad_token_id": 536,
}  # fmt: skip
GROUPED = COMMON | {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
ROUTED: dict[str, Any] = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip


def mixed(num_layers: int, usual: str, every_second: str) -> dict[str, Any]:
    return {"layer_types": [every_second if i % 2 else usual for i in range(num_layers)]}


FAMILIES: dict[str, Callable[[int, int], Any]] = {
    "Qwen2, Qwen2.5": lambda n, v: hf.Qwen2Config(**COMMON, num_key_value_heads=2, num_hidden_layers=n, vocab_size=v),
    "Qwen2-MoE": lambda n, v: hf.Qwen2MoeConfig(
        **COMMON, **EXPERTS, num_key_value_heads=2, shared_expert_intermediate_size=16, mlp_only_layers=[0], num_hidden_layers=n,
        vocab_size=v,
    ),
    "Qwen3": lambda n, v: hf.Qwen3Config(**GROUPED, num_hidden_layers=n, vocab_size=v),
    "Qwen3-MoE": lambda n, v: hf.Qwen3MoeConfig(**GROUPED, **EXPERTS, mlp_only_layers=[0], num_hidden_layers=n, vocab_size=v),
    "Qwen3.5": lambda n, v: hf.Qwen3_5TextConfig(
        **GROUPED, **LINEAR, **mixed(n, "linear_attention", "full_attention"), num_hidden_layers=n, vocab_size=v
    ),
    "Qwen3.5-MoE": lambda n, v: hf.Qwen3_5MoeTextConfig(
        **GROUPED, **LINEAR, **EXPERTS, **mixed(n, "linear_attention", "full_attention"), shared_expert_intermediate_size=16,
        num_hidden_layers=n, vocab_size=v,
    ),
    "Qwen3-Next": lambda n, v: hf.Qwen3NextConfig(
        **GROUPED, **LINEAR, **EXPERTS, **mixed(n, "linear_attention", "full_attention"), shared_expert_intermediate_size=16,
        num_hidden_layers=n, vocab_size=v,
    ),
    "Llama": lambda n, v: hf.LlamaConfig(**GROUPED, num_hidden_layers=n, vocab_size=v),
    "Mistral": lambda n, v: hf.MistralConfig(**GROUPED, sliding_window=16, num_hidden_layers=n, vocab_size=v),
    "Ministral": lambda n, v: hf.MinistralConfig(
        **GROUPED, **mixed(n, "sliding_attention", "full_attention"), sliding_window=16, num_hidden_layers=n, vocab_size=v
    ),
    "Mixtral": lambda n, v: hf.MixtralConfig(
        **GROUPED, num_local_experts=4, num_experts_per_tok=2, num_hidden_layers=n, vocab_size=v
    ),
    "Gemma 1": lambda n, v: hf.GemmaConfig(**GROUPED, num_hidden_layers=n, vocab_size=v),
    "Gemma 2": lambda n, v: hf.Gemma2Config(
        **GROUPED, query_pre_attn_scalar=8, sliding_window=16, num_hidden_layers=n, vocab_size=v
    ),
    "Gemma 3": lambda n, v: hf.Gemma3TextConfig(
        **GROUPED, **mixed(n, "sliding_attention", "full_attention"), query_pre_attn_scalar=8, sliding_window=16,
        num_hidden_layers=n, vocab_size=v,
    ),
    "Gemma 3n": lambda n, v: hf.Gemma3nTextConfig(
        **GROUPED, **mixed(n, "sliding_attention", "full_attention"), sliding_window=16, num_hidden_layers=n, vocab_size=v,
        vocab_size_per_layer_input=v, hidden_size_per_layer_input=8, num_kv_shared_layers=0, laurel_rank=4,
        activation_sparsity_pattern=[0.0] * n,
    ),
    "Gemma 4": lambda n, v: hf.Gemma4TextConfig(
        **GROUPED, **mixed(n, "sliding_attention", "full_attention"), sliding_window=16, num_hidden_layers=n, vocab_size=v,
        hidden_size_per_layer_input=0, num_kv_shared_layers=0, global_head_dim=8,
    ),
    "Gemma 4 E2B, E4B": lambda n, v: hf.Gemma4TextConfig(
        **GROUPED, **mixed(n, "sliding_attention", "full_attention"), sliding_window=16, num_hidden_layers=n, vocab_size=v,
        vocab_size_per_layer_input=v, hidden_size_per_layer_input=8, num_kv_shared_layers=max(0, n - 2),
        global_head_dim=8,
    ),
    "Gemma 4 26B-A4B": lambda n, v: hf.Gemma4TextConfig(
        **GROUPED, **mixed(n, "sliding_attention", "full_attention"), sliding_window=16, num_hidden_layers=n, vocab_size=v,
        hidden_size_per_layer_input=0, num_kv_shared_layers=0, global_head_dim=8, enable_moe_block=True, num_experts=4,
        top_k_experts=2, moe_intermediate_size=16,
    ),
    "Phi-1, Phi-2": lambda n, v: hf.PhiConfig(**COMMON, num_hidden_layers=n, vocab_size=v),
    "Phi-3, Phi-4": lambda n, v: hf.Phi3Config(**COMMON, num_key_value_heads=2, num_hidden_layers=n, vocab_size=v),
    "OLMo 1": lambda n, v: hf.OlmoConfig(**COMMON, num_hidden_layers=n, vocab_size=v),
    "OLMo 2": lambda n, v: hf.Olmo2Config(**COMMON, num_hidden_layers=n, vocab_size=v),
    "OLMo 3": lambda n, v: hf.Olmo3Config(
        **COMMON, **mixed(n, "sliding_attention", "full_attention"), sliding_window=16, num_hidden_layers=n, vocab_size=v
    ),
    "GPT-2": lambda n, v: hf.GPT2Config(
        vocab_size=v, n_embd=D, n_layer=n, n_head=4, n_positions=512, bos_token_id=537, eos_token_id=539, initializer_range=0.15
    ),
    "GPT-NeoX, Pythia": lambda n, v: hf.GPTNeoXConfig(**COMMON, num_hidden_layers=n, vocab_size=v),
    "OPT": lambda n, v: hf.OPTConfig(**COMMON, ffn_dim=64, word_embed_proj_dim=D, num_hidden_layers=n, vocab_size=v),
    "OPT-350m": lambda n, v: hf.OPTConfig(
        **COMMON, ffn_dim=64, word_embed_proj_dim=16, do_layer_norm_before=False, num_hidden_layers=n, vocab_size=v
    ),
    "Falcon": lambda n, v: hf.FalconConfig(**COMMON, num_hidden_layers=n, vocab_size=v),
    "BLOOM": lambda n, v: hf.BloomConfig(
        hidden_size=D, n_layer=n, n_head=4, vocab_size=v, bos_token_id=537, eos_token_id=539, initializer_range=0.15
    ),
    "GLM-4": lambda n, v: hf.Glm4Config(**GROUPED, num_hidden_layers=n, vocab_size=v),
    "GLM-4-MoE": lambda n, v: hf.Glm4MoeConfig(**GROUPED, **ROUTED, num_hidden_layers=n, vocab_size=v),
    "DeepSeek-V3": lambda n, v: hf.DeepseekV3Config(
        **COMMON, **ROUTED, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        num_key_value_heads=4, num_hidden_layers=n, vocab_size=v,
    ),
    "gpt-oss": lambda n, v: hf.GptOssConfig(
        **GROUPED, num_local_experts=4, num_experts_per_tok=2, sliding_window=16, num_hidden_layers=n, vocab_size=v,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "LFM2": lambda n, v: hf.Lfm2Config(
        **COMMON, **mixed(n, "conv", "full_attention"), num_key_value_heads=2, num_hidden_layers=n, vocab_size=v
    ),
    "SmolLM3": lambda n, v: hf.SmolLM3Config(**COMMON, num_key_value_heads=2, num_hidden_layers=n, vocab_size=v),
    "Granite": lambda n, v: hf.GraniteConfig(
        **COMMON, num_key_value_heads=2, embedding_multiplier=3.0, residual_multiplier=0.5, num_hidden_layers=n, vocab_size=v
    ),
    "Cohere": lambda n, v: hf.CohereConfig(**COMMON, num_key_value_heads=2, num_hidden_layers=n, vocab_size=v),
    "MPT": lambda n, v: hf.MptConfig(
        d_model=D, n_heads=4, n_layers=n, vocab_size=v, max_seq_len=512, bos_token_id=537, eos_token_id=539,
        initializer_range=0.15,
    ),
    "Mamba": lambda n, v: hf.MambaConfig(
        hidden_size=D, num_hidden_layers=n, vocab_size=v, state_size=8, bos_token_id=537, eos_token_id=539, pad_token_id=536,
        initializer_range=0.15,
    ),
    "Mamba 2": lambda n, v: hf.Mamba2Config(
        hidden_size=D, num_hidden_layers=n, vocab_size=v, state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=16,
        bos_token_id=537, eos_token_id=539, pad_token_id=536,
    ),
    "RWKV": lambda n, v: hf.RwkvConfig(hidden_size=D, num_hidden_layers=n, vocab_size=v, bos_token_id=537, eos_token_id=539),
}  # fmt: skip
"""Name of a family -> its configuration for a number of blocks and a vocabulary."""


@dataclass(frozen=True)
class FamilyPair:
    """Directories of a tiny pair; the AV's serves as base model too."""

    av: Path
    ar: Path
    layer: int


def make_family_pair(directory: Path, family: str, layer: int = 1, num_layers: int = 4) -> FamilyPair:
    """An AV and an AR of full weights in the public layout, the AR without final norm and head as the public trainer saves it."""
    pair = FamilyPair(directory / "av", directory / "ar", layer)
    save_family_model(pair.av, family, num_layers, seed=1)
    save_family_model(pair.ar, family, layer + 1, seed=2, is_ar=True)
    head = torch.eye(D) + 0.05 * torch.randn(D, D, generator=torch.Generator().manual_seed(3))
    save_file({"weight": head}, pair.ar / "value_head.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(pair.av)
    (marker_id,) = tokenizer.encode(MARKER, add_special_tokens=False)
    message = [{"role": "user", "content": AV_TEMPLATE.replace("{injection_char}", MARKER)}]
    prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    at = prompt.index(marker_id)
    for role, path in (("av", pair.av), ("ar", pair.ar)):
        meta = {
            "kind": "nla_model", "schema_version": 2, "role": role, "base_checkpoint": "tiny/family", "d_model": D,
            "extraction": {"injection_scale": 20.0, "mse_scale": math.sqrt(D)},
            "tokens": {
                "injection_char": MARKER, "injection_token_id": marker_id, "injection_left_neighbor_id": prompt[at - 1],
                "injection_right_neighbor_id": prompt[at + 1],
            },
            "prompt_templates": {"av": AV_TEMPLATE, "ar": AR_TEMPLATE}, "extraction_layer_index": layer,
        }  # fmt: skip
        (path / "nla_meta.yaml").write_text(yaml.safe_dump(meta, allow_unicode=True))
    return pair


def save_family_model(path: Path, family: str, num_layers: int, seed: int, is_ar: bool = False) -> None:
    path.mkdir(parents=True)
    save_tokenizer(path, "qwen2")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](num_layers, len(AutoTokenizer.from_pretrained(path)))).eval()
    for parameter in model.parameters():  # biases and norms away from 0 and 1, so that a wrong one shows
        parameter.data += 0.05 * torch.randn_like(parameter)
    if is_ar:
        if norm := final_norm_of(model):
            setattr(decoder_of(model), norm, torch.nn.Identity())
        head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
        model.set_submodule(head, torch.nn.Identity())
    model.save_pretrained(path)


@dataclass(frozen=True)
class Row:
    """What was found to hold for a family."""

    family: str
    model_type: str
    av: str
    ar: str
    base: str
    engine: str
    reasons: tuple[str, ...] = ()
    """Why a part is refused."""

    def line(self) -> str:
        """Return the row of docs/families.md."""
        return f"| {self.family} | `{self.model_type}` | {self.av} | {self.ar} | {self.base} | {self.engine} |"


def plain_model(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


@contextmanager
def block_output(model: Any, layer: int) -> Iterator[list[torch.Tensor]]:
    """Collect the outputs of a block; found here by name, as its family spells it."""
    names = ("model.layers", "transformer.h", "gpt_neox.layers", "model.decoder.layers", "transformer.blocks", "backbone.layers",
             "rwkv.blocks")  # fmt: skip
    modules = dict(model.named_modules())
    block = next(modules[name][layer] for name in names if name in modules)
    outputs: list[torch.Tensor] = []
    hook = block.register_forward_hook(lambda _m, _a, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    yield outputs
    hook.remove()


@torch.inference_mode()
def check_av(pair: FamilyPair) -> NlaVerbalizer:
    """Sampled draws have the log probabilities that the reference gives their tokens behind the prompt, in one pass."""
    av, plain = load_nla_verbalizer(pair.av, dtype="float32"), plain_model(pair.av)
    vectors = torch.randn(2, D, generator=torch.Generator().manual_seed(5))
    requests = [Request(row=i, activation_key=i, draw=k) for i in range(2) for k in range(3)]
    draws = []
    for sizes in ({"prefill_batch_size": 1}, {"batch_size": 2}):  # prompts run apart and joined; one prompt is continued twice
        draws += draw(av, vectors, requests, temperature=1.0, max_new_tokens=MAX_NEW_TOKENS, seed=0, **sizes)
    assert len(draws) == 2 * len(requests)
    assert len({found.token_ids for found in draws}) > 1
    for found in draws:
        embeds = plain.get_input_embeddings()(torch.tensor([[*av.prompt_ids, *found.token_ids]])).clone()
        embeds[0, av.injection_position] = 20.0 * torch.nn.functional.normalize(vectors[found.request.row], dim=0)
        logits = plain(inputs_embeds=embeds, use_cache=False).logits[0, len(av.prompt_ids) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(found.token_ids)), found.token_ids].sum()
        assert torch.allclose(torch.tensor(found.log_probability), expected, **CLOSE)
    return av


@torch.inference_mode()
def check_ar(pair: FamilyPair) -> NlaReconstructor:
    """Reconstructions are the head's map of what the last block puts out at the last token of each prompt, run alone."""
    ar, plain = load_nla_reconstructor(pair.ar, dtype="float32"), plain_model(pair.ar)
    head = load_file(pair.ar / "value_head.safetensors")["weight"]
    with block_output(plain, pair.layer) as outputs:
        for ids in ar.prompts.ids(TEXTS):
            plain(input_ids=torch.tensor([ids]), use_cache=False)
    expected = torch.stack([out[0, -1] @ head.T for out in outputs])
    assert torch.allclose(ar.reconstruct_texts(TEXTS, batch_size=2), expected, **CLOSE)
    return ar


@torch.inference_mode()
def check_cut(pair: FamilyPair) -> bool:
    """The first blocks of a base, as an AR's adapter or head alone uses them, put out what they do in the whole model.

    Returns False where ksweep refuses to cut a model.
    """
    whole_config, plain = AutoConfig.from_pretrained(pair.av), plain_model(pair.av)
    try:
        cut_blocks(config := AutoConfig.from_pretrained(pair.av), pair.layer + 1)
    except CheckpointError:
        return False
    with quiet():
        model, _ = load_or_lay_out(AutoModel, pair.av, config, whole_config, torch.float32)
    assert len(blocks_of(model)) == pair.layer + 1
    if norm := final_norm_of(model):
        setattr(decoder_of(model), norm, torch.nn.Identity())
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    with block_output(plain, pair.layer) as outputs:
        plain(input_ids=ids, use_cache=False)
    assert torch.allclose(model(input_ids=ids, use_cache=False).last_hidden_state, outputs[0], **CLOSE)
    return True


@torch.inference_mode()
def check_base(pair: FamilyPair) -> None:
    """Activations are the outputs of the block in the whole model, at every token, for rows of unlike length in one batch.

    What can be loaded is found fit before.
    """
    assert check_model(BaseModel(pair.av), pair.layer) == ()
    reader, plain = BlockReader(str(pair.av), pair.layer, dtype="float32"), plain_model(pair.av)
    rows = reader.tokenize(TEXTS[::2], 64)
    found = reader.outputs(rows)
    with block_output(plain, pair.layer) as outputs:
        for i, ids in enumerate(rows):
            plain(input_ids=torch.tensor([ids]), use_cache=False)
            assert torch.allclose(found[i, : len(ids)], outputs[i][0], **CLOSE)


def check_family(directory: Path, family: str) -> Row:
    """Make a tiny pair and run the three checks. A part that ksweep refuses is a no with its reason; any other failure raises."""
    pair = make_family_pair(directory, family)
    results: dict[str, Any] = {}
    for part, check in (("AV", check_av), ("AR", check_ar), ("base", check_base)):
        try:
            results[part] = check(pair)
        except CheckpointError as error:
            results[part] = str(error).replace(f" {directory}/av", "").replace(f" {directory}/ar", "")
    reasons = tuple(f"{family}, {part}: {result}" for part, result in results.items() if isinstance(result, str))
    av, ar, base = ("no" if isinstance(result, str) else "yes" for result in results.values())
    if ar == "yes":
        whole = () if results["AR"]._past is not None else ("prompts run whole",)
        ar = ", ".join(("yes", *whole, *(() if check_cut(pair) else ("of full weights alone",))))
    engine = engine_of(results["AV"]) if av == "yes" else "–"
    return Row(family, FAMILIES[family](4, 8).model_type, av, ar, base, engine, reasons)


def engine_of(av: NlaVerbalizer) -> str:
    """Return how draws are taken where texts are shorter than a sliding window, as those of a real model are."""
    config = av.model.config
    if getattr(config, "sliding_window", None):
        config.sliding_window = 4096
    if attention.supports_slots(av.model, 512):
        return "slots"
    if can_be_copied(prefilled(av, torch.randn(1, D)).cache):
        return "naive"
    return "naive, whole context for every token"
