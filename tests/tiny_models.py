"""Tiny random AV / AR / base directories in the public NLA layout, made on the spot: real files, no meaning.

    pair = make_pair(tmp_path, "llama", layer=1)             # full weights
    pair = make_pair(tmp_path, "qwen2", adapters=True)       # LoRA adapters over pair.base
    pair = make_pair(tmp_path, "llama", talks=True)          # its AV writes <explanation>words</explanation> and stops

The tokenizers are those of tests/fixtures/nla (540 and 640 tokens), for Llama with a BOS and its chat format written over it.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ksweep.inference.prefill import Prefill, prefill

Family = Literal["qwen2", "llama", "gemma3", "gemma3_multimodal"]
FAMILIES: tuple[Family, ...] = ("qwen2", "llama", "gemma3", "gemma3_multimodal")
FIXTURES = Path(__file__).parent / "fixtures" / "nla"
AV_TEMPLATE = "Describe <concept>{injection_char}</concept> within <explanation> tags."
AR_TEMPLATE = "Summary of the following text: <text>{explanation}</text> <summary>"
LLAMA_CHAT = (
    "{{ bos_token }}{%- for message in messages %}{{ '<|start_header_id|>' + message['role'] + '\\n\\n' + message['content'] + "
    "'<|eot_id|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant\\n\\n' }}{%- endif %}"
)


@dataclass(frozen=True)
class TinyPair:
    """Where the three directories are, and what they were made with."""

    av: Path
    ar: Path
    base: Path
    family: Family
    layer: int
    d_model: int
    num_layers: int


def make_pair(
    directory: Path,
    family: Family = "qwen2",
    *,
    layer: int = 1,
    num_layers: int = 3,
    d_model: int = 32,
    dtype: torch.dtype = torch.float32,
    adapters: bool = False,
    talks: bool = False,
    seed: int = 0,
) -> TinyPair:
    """AV, AR and base under `directory`: nla-av, nla-ar, base. Same arguments, same bits.

    Args:
        adapters: AV and AR are rank-2 LoRA adapters over the base, which they name in adapter_config.json.
        talks: the AV opens and closes its tags and stops (qwen2 and llama): about one word in five ends an explanation.
    """
    base = make_base(
        directory / "base", family, num_layers=num_layers, d_model=d_model, dtype=dtype, seed=seed, talks=talks and adapters
    )
    pair = TinyPair(directory / "nla-av", directory / "nla-ar", base, family, layer, d_model, num_layers)
    if adapters:
        _save_adapter(pair, pair.av, num_layers, seed + 1)
        _save_adapter(pair, pair.ar, layer + 1, seed + 2)
    else:
        make_base(pair.av, family, num_layers=num_layers, d_model=d_model, dtype=dtype, seed=seed + 1, talks=talks)
        make_base(pair.ar, family, num_layers=layer + 1, d_model=d_model, dtype=dtype, seed=seed + 2, talks=False, is_ar=True)
        if talks:
            _copy_tokenizer(pair.av, pair.ar)
            _grow_embedding(pair.ar, 2)
    _save_head(pair.ar, d_model, dtype, seed + 3)
    for role, path in (("av", pair.av), ("ar", pair.ar)):
        _save_sidecar(path, role, pair)
    return pair


def make_base(
    path: Path,
    family: Family = "qwen2",
    *,
    num_layers: int = 3,
    d_model: int = 32,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    talks: bool = False,
    is_ar: bool = False,
) -> Path:
    """A random causal LM with its tokenizer; `is_ar` leaves out final norm and lm_head as the public AR files do."""
    path.mkdir(parents=True)
    save_tokenizer(path, family)
    if talks:
        _add_tags(path)
    torch.manual_seed(seed)
    model = _random_model(family, num_layers, d_model, vocab_size=_vocab_size(path))
    if talks:
        _teach_to_talk(model, AutoTokenizer.from_pretrained(path))
    state = {k: v.to(dtype).contiguous() for k, v in model.state_dict().items()}
    if model.config.tie_word_embeddings or is_ar:
        state.pop("lm_head.weight", None)
    if is_ar:
        state.pop("model.norm.weight")
    config = model.config.to_dict() | {"dtype": str(dtype).removeprefix("torch."), "architectures": [type(model).__name__]}
    if family == "gemma3_multimodal" and not is_ar:  # public ARs are the bare text model
        state, config = _wrapped(state, config)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config, indent=2))
    generation = {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 20,
        "repetition_penalty": 1.3,
        "eos_token_id": config["eos_token_id"],
    }
    (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def save_tokenizer(path: Path, family: Family) -> None:
    """Tokenizer files of a fixture case; for Llama with BOS, header and end-of-turn tokens."""
    case = FIXTURES / ("gemma3_text" if family.startswith("gemma3") else "qwen2_text") / "nla-av"
    names = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
    for name in names:
        shutil.copyfile(case / name, path / name)
    if family == "llama":
        _make_llama_tokenizer(path)


def merge_adapters(pair: TinyPair, directory: Path) -> TinyPair:
    """The same pair as full float32 weights, merged by peft's own loader: what the adapters must be equal to."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    paths = {}
    for role, path in (("av", pair.av), ("ar", pair.ar)):
        out = paths[role] = directory / path.name
        model = AutoModelForCausalLM.from_pretrained(_cut_base(pair, directory / f"base-{role}", role), dtype=torch.float32)
        merged = PeftModel.from_pretrained(model, str(path)).merge_and_unload()
        merged.save_pretrained(out)
        _copy_tokenizer(pair.base, out)
        for name in ("nla_meta.yaml", "value_head.safetensors"):
            if (path / name).exists():
                shutil.copyfile(path / name, out / name)
    return TinyPair(paths["av"], paths["ar"], pair.base, pair.family, pair.layer, pair.d_model, pair.num_layers)


def edit_sidecar(path: Path, **changes: Any) -> None:
    """Set (or, with None under a dotted key "a__b", null) values of nla_meta.yaml; `...` deletes the key."""
    file = path / "nla_meta.yaml"
    meta = yaml.safe_load(file.read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        at = meta
        for parent in parents:
            at = at.setdefault(parent, {})
        if value is ...:
            at.pop(last, None)
        else:
            at[last] = value
    file.write_text(yaml.safe_dump(meta, allow_unicode=True))


def edit_weights(path: Path, **changes: Any) -> None:
    """Rewrite model.safetensors (or `file=`): keyword `change` is a function of the state dict, changed in place."""
    file = path / changes.get("file", "model.safetensors")
    state = load_file(file)
    changes["change"](state)
    save_file({k: v.clone().contiguous() for k, v in state.items()}, file, metadata={"format": "pt"})


def _random_model(family: Family, num_layers: int, d_model: int, vocab_size: int) -> Any:
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": d_model,
        "intermediate_size": 2 * d_model,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": d_model // 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,  # the default 0.02 leaves a model this small without any context in its logits
    }
    if family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**common, eos_token_id=539, bos_token_id=537)).eval()
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**common, eos_token_id=539, bos_token_id=537)).eval()
    types = ["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(num_layers)]
    config = Gemma3TextConfig(
        **common, layer_types=types, sliding_window=16, query_pre_attn_scalar=d_model // 4, eos_token_id=[1, 6], bos_token_id=2
    )
    return Gemma3ForCausalLM(config).eval()


def _wrapped(state: dict[str, torch.Tensor], text: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Gemma-3's multimodal layout: nested text_config, prefixed keys, some vision weights."""
    state = {f"language_model.{name}": tensor for name, tensor in state.items()}
    state["vision_tower.vision_model.post_layernorm.weight"] = torch.ones(4)
    state["multi_modal_projector.mm_input_projection_weight"] = torch.ones(4, 4)
    vision = {
        "hidden_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    config = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": text,
        "vision_config": vision,
    }
    return state, config | {"eos_token_id": text["eos_token_id"], "dtype": text["dtype"]}


def _vocab_size(path: Path) -> int:
    return len(AutoTokenizer.from_pretrained(path))


def _make_llama_tokenizer(path: Path) -> None:
    names = {"<|endoftext|>": "<|begin_of_text|>", "<|im_start|>": "<|start_header_id|>", "<|im_end|>": "<|eot_id|>"}
    text = (path / "tokenizer.json").read_text()
    for old, new in names.items():
        text = text.replace(old, new)
    tokenizer = json.loads(text)
    bos = {"id": "<|begin_of_text|>", "type_id": 0}
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": bos}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"SpecialToken": bos}, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos["id"]: {"id": bos["id"], "ids": [537], "tokens": [bos["id"]]}},
    }
    tokenizer["post_processor"] = {"type": "Sequence", "processors": [tokenizer["post_processor"], template]}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos["id"],
        "eos_token": "<|eot_id|>",
        "model_max_length": 512,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "special_tokens_map.json").unlink()
    (path / "chat_template.jinja").write_text(LLAMA_CHAT)


def _copy_tokenizer(source: Path, target: Path) -> None:
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "generation_config.json",
    ):
        (target / name).unlink(missing_ok=True)
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def _add_tags(path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["<explanation>", "</explanation>"])
    tokenizer.save_pretrained(path)


def _grow_embedding(path: Path, by: int) -> None:
    edit_weights(
        path,
        change=lambda s: s.update(
            {"model.embed_tokens.weight": torch.nn.functional.pad(s["model.embed_tokens.weight"], (0, 0, 0, by), value=0.1)}
        ),
    )
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + by}))


@torch.no_grad()
def _teach_to_talk(model: Any, tokenizer: Any) -> None:
    """Dimensions 0 to 3 of the residual stream say what the last token was; lm_head reads from them what must follow."""
    assert not model.config.tie_word_embeddings, "talks=True needs an untied lm_head: qwen2 or llama"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], add_generation_prompt=True, return_dict=False)
    last, (opening, closing) = chat[-1], tokenizer.convert_tokens_to_ids(["<explanation>", "</explanation>"])
    embed, head = model.model.embed_tokens.weight, model.lm_head.weight
    vocabulary = embed.shape[0]
    words = [i for i in range(vocabulary) if tokenizer.decode([i]).strip().isalpha() and i not in (last, opening, closing)]
    flag = torch.full((vocabulary,), 2)  # 0: the prompt ended, 1: opened, 2: in a word, 3: closed
    flag[last], flag[opening], flag[closing] = 0, 1, 3
    embed[:, :4] = 4.0 * torch.nn.functional.one_hot(flag, 4)
    for block in model.model.layers:
        block.self_attn.o_proj.weight[:4] = 0
        block.mlp.down_proj.weight[:4] = 0
    head.mul_(2.0)
    head[:, :4] = -30.0
    head[words, 1:3] = 0.0
    head[opening, 0], head[tokenizer.eos_token_id, 3] = 30.0, 30.0
    head[closing] = 0.0
    head[closing, :4] = torch.tensor([-30.0, -30.0, 1.6, -30.0])


def _save_head(path: Path, d_model: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    head = torch.eye(d_model) + 0.3 / math.sqrt(d_model) * torch.randn(d_model, d_model, generator=generator)
    save_file({"weight": head.to(dtype)}, path / "value_head.safetensors")


def _cut_base(pair: TinyPair, path: Path, role: str) -> Path:
    """Text-only copy of the base in float32, for the AR with the blocks above the layer left out."""
    from transformers import AutoConfig

    shutil.copytree(pair.base, path)
    config = AutoConfig.from_pretrained(path).get_text_config()
    if role == "ar":
        config.num_hidden_layers = pair.layer + 1
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: pair.layer + 1]
    edit_weights(path, change=lambda s: _unwrap(s))
    config.save_pretrained(path)
    return path


def _unwrap(state: dict[str, torch.Tensor]) -> None:
    for name in list(state):
        tensor = state.pop(name)
        if not name.startswith(("vision_tower", "multi_modal")):
            state[name.removeprefix("language_model.")] = tensor


def _save_adapter(pair: TinyPair, path: Path, num_layers: int, seed: int) -> None:
    from peft import LoraConfig, PeftModel

    torch.manual_seed(seed)
    model = _random_model(pair.family, num_layers, pair.d_model, _vocab_size(pair.base))
    lora = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["q_proj", "v_proj", "o_proj", "up_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    adapter = PeftModel(model, lora)
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.1
        if "o_proj.lora_B" in name:
            parameter.data[:4] = 0  # dimensions that a talking AV keeps its place in
    adapter.save_pretrained(str(path), save_embedding_layers=False)
    file = path / "adapter_config.json"

    config = json.loads(file.read_text()) | {"base_model_name_or_path": str(pair.base)}
    config["target_modules"] = sorted(config["target_modules"])  # peft writes a set: another order in every process
    file.write_text(json.dumps(config, indent=2))


def _save_sidecar(path: Path, role: str, pair: TinyPair) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pair.base if (path / "adapter_config.json").exists() else path)
    marker = "\u321c" if pair.family.startswith("gemma3") else "\u320e"
    (marker_id,) = tokenizer.encode(marker, add_special_tokens=False)
    message = {"role": "user", "content": AV_TEMPLATE.replace("{injection_char}", marker)}
    prompt = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=False)
    at = prompt.index(marker_id)
    meta = {
        "kind": "nla_model",
        "schema_version": 2,
        "role": role,
        "stage": "rl" if role == "av" else "sl",
        "base_checkpoint": f"tiny/{pair.family}",
        "d_model": pair.d_model,
        "extraction": {"injection_scale": 20.0 if role == "av" else None, "mse_scale": math.sqrt(pair.d_model)},
        "tokens": {
            "injection_char": marker,
            "injection_token_id": marker_id,
            "injection_left_neighbor_id": prompt[at - 1],
            "injection_right_neighbor_id": prompt[at + 1],
            "critic_suffix_ids": tokenizer.encode("</text> <summary>", add_special_tokens=False)[1:] if role == "ar" else None,
        },
        "prompt_templates": {"av": AV_TEMPLATE, "ar": AR_TEMPLATE},
        "extraction_layer_index": pair.layer,
    }
    (path / "nla_meta.yaml").write_text(yaml.safe_dump(meta, allow_unicode=True, sort_keys=False))


def prefilled(av: Any, vectors: torch.Tensor) -> Prefill:
    """Run an AV's prompts of some vectors."""
    return prefill(av.model, av.prompts(vectors))
