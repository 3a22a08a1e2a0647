"""The demo pair: the AV's prompt and loss, how the AR reads a text, and how both are saved.

Layout and sidecar follow the public NLA release, with PEFT adapters in place of full weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedTokenizerBase

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
LAYER = 20
WIDTH = 576
MARKER = "●"
# Every token of the prompt costs time in each example and each draw, so both templates are as short as possible.
AV_TEMPLATE = "[{injection_char}]"
AR_TEMPLATE = "... {explanation}"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n' }}{% endif %}"
)
OPENING, CLOSING = "<explanation>", "</explanation>"
INJECTION_SCALE = 60.0
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 8


# ---- base model and tokenizer


def load_tokenizer(base: Path) -> PreTrainedTokenizerBase:
    """Load the base model's tokenizer with the demo's chat template (no system message)."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def load_base(base: Path) -> nn.Module:
    """Load the base in bfloat16, or in float32 where the processor would emulate that, which is 50 times slower."""
    dtype = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()


def load_truncated(base: Path) -> nn.Module:
    """Load blocks 0 to LAYER without the final norm: the last hidden state is the activation, or the AR's read-out."""
    model = load_base(base)
    model.model.layers = model.model.layers[: LAYER + 1]
    model.config.num_hidden_layers = LAYER + 1
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[: LAYER + 1]
    model.model.norm = nn.Identity()
    model.lm_head = nn.Identity()
    return model


def with_lora(model: nn.Module, adapter: Path | None) -> PeftModel:
    """Add adapters in the dtype of the base, in which they compute and are saved; `Trainer` has fp32 copies for the optimizer."""
    if adapter is not None:
        return PeftModel.from_pretrained(model, adapter, is_trainable=True, autocast_adapter_dtype=False)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    return get_peft_model(model, config, autocast_adapter_dtype=False)


class _LoraProduct(torch.autograd.Function):
    """x W' + scale (x A') B' with the low-rank part added in place: on a CPU the full-width temporaries cost as much as
    the products. The frozen W gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ a.t()
        ctx.save_for_backward(rows, low, weight, a, b)
        ctx.scale, ctx.shape = scale, x.shape
        return (rows @ weight.t()).addmm_(low, b.t(), alpha=scale).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor, Tensor, None]:
        rows, low, weight, a, b = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        low_gradient = (gradient @ b) * ctx.scale
        back = (gradient @ weight).addmm_(low_gradient, a).view(ctx.shape)
        return back, None, low_gradient.t() @ rows, (gradient.t() @ low) * ctx.scale, None


def with_fast_lora(model: PeftModel) -> PeftModel:
    """Replace peft's forward by `_LoraProduct` (no dropout, no bias); function and parameters stay the same."""

    def forward(layer: Any, x: Tensor) -> Tensor:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return _LoraProduct.apply(x, layer.base_layer.weight, a, b, layer.scaling["default"])

    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.forward = MethodType(forward, module)
    return model


# ---- prompt


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Token ids around the marker: `before` is the same for every vector, so its keys and values are computed once."""

    before: list[int]
    marker: int
    after: list[int]
    opening: list[int]
    closing: list[int]
    """The closing tag and the end-of-turn token."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        message = {"role": "user", "content": AV_TEMPLATE.format(injection_char=MARKER)}
        text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(text, add_special_tokens=False)
        (marker,) = tokenizer.encode(MARKER, add_special_tokens=False)
        assert ids.count(marker) == 1
        at = ids.index(marker)
        return cls(
            before=ids[:at],
            marker=marker,
            after=ids[at + 1 :],
            opening=tokenizer.encode(OPENING, add_special_tokens=False),
            closing=tokenizer.encode(CLOSING + "<|im_end|>", add_special_tokens=False),
        )


def scaled(vectors: Tensor, norm: float) -> Tensor:
    return vectors.float() * (norm / vectors.float().norm(dim=-1, keepdim=True).clamp_min(1e-12))


def av_hidden(model: nn.Module, prompt: Prompt, vectors: Tensor, continuation: Tensor, cache: DynamicCache) -> Tensor:
    """Return last hidden states [row, position, width] over marker, rest of the prompt and continuation.

    `cache` is empty at first and holds the whole sequence afterwards; the part before the marker runs once, with gradient.
    """
    rows = len(vectors)
    embed = model.get_input_embeddings()
    model.model(input_ids=torch.tensor([prompt.before]), past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1)
    injected = scaled(vectors, INJECTION_SCALE).to(embed.weight.dtype)[:, None]
    ids = torch.cat([torch.tensor([prompt.after]).expand(rows, -1), continuation], dim=1)
    embedded = torch.cat([injected, embed(ids)], dim=1)
    return model.model(inputs_embeds=embedded, past_key_values=cache, use_cache=True).last_hidden_state


# ---- sampling


@torch.inference_mode()
def draw(
    av: nn.Module,
    prompt: Prompt,
    vectors: Tensor,
    *,
    num_draws: int,
    temperature: float,
    max_new_tokens: int,
    generator: torch.Generator,
    only_text: bool = False,
) -> list[list[int]]:
    """Return token ids of `num_draws` continuations per vector, row-major; rows leave the batch as they end.

    `only_text` puts the opening tag into the prompt and ends at the closing tag's first token, for training samples.
    """
    opening = torch.tensor([prompt.opening if only_text else []], dtype=torch.long).expand(len(vectors), -1)
    stop = prompt.closing[0] if only_text else prompt.closing[-1]
    cache = DynamicCache(config=av.config)
    hidden = av_hidden(av, prompt, vectors, opening, cache)[:, -1].repeat_interleave(num_draws, dim=0)
    cache.batch_repeat_interleave(num_draws)
    found: list[list[int]] = [[] for _ in range(len(hidden))]
    alive = torch.arange(len(hidden))
    for _ in range(max_new_tokens):
        tokens = _sample(av.lm_head(hidden).float(), temperature, generator)
        for row, token in zip(alive.tolist(), tokens.tolist(), strict=True):
            found[row].append(token)
        keep = (tokens != stop).nonzero().squeeze(1)
        if len(keep) == 0:
            break
        if len(keep) < len(alive):
            alive, tokens = alive[keep], tokens[keep]
            cache.batch_select_indices(keep)
        hidden = av.model(input_ids=tokens[:, None], past_key_values=cache, use_cache=True).last_hidden_state[:, 0]
    return found


def _sample(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    noise = torch.empty_like(logits).exponential_(generator=generator).clamp_min_(1e-20).log_()
    return (logits.div_(temperature) - noise).argmax(-1)


def payload(output: str) -> str | None:
    """Return the stripped text between the tags, or None for a failed draw."""
    if OPENING not in output or CLOSING not in output:
        return None
    return output.split(OPENING, 1)[1].split(CLOSING, 1)[0].strip() or None


# ---- reconstruction


class Reconstructor(nn.Module):
    """The AR: a truncated base with LoRA, read out at the last token, and a square head without bias."""

    def __init__(self, model: PeftModel, head: Tensor | None = None) -> None:
        super().__init__()
        self.model = model
        self.value_head = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.eye_(self.value_head.weight) if head is None else self.value_head.weight.data.copy_(head)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Read texts with right padding; under a causal mask padding cannot affect the last real token."""
        hidden = self.model.base_model.model.model(input_ids=ids, use_cache=False).last_hidden_state
        return self.value_head(hidden[torch.arange(len(ids)), lengths - 1].float())


def ar_error(predicted: Tensor, vectors: Tensor) -> Tensor:
    """Return 2 (1 - cos), the mean squared difference once both have norm sqrt(width)."""
    return 2 * (1 - nn.functional.cosine_similarity(predicted.float(), vectors.float(), dim=-1))


def padded(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> tuple[Tensor, Tensor]:
    rows = [tokenizer(AR_TEMPLATE.format(explanation=text)).input_ids for text in texts]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids, lengths


@torch.inference_mode()
def reconstruct(ar: Reconstructor, tokenizer: PreTrainedTokenizerBase, texts: list[str], batch: int = 128) -> Tensor:
    """Return vectors for `texts`; identical texts are computed once, in batches of similar length."""
    distinct = sorted(set(texts), key=lambda text: (len(tokenizer(text).input_ids), text))
    parts = [ar(*padded(tokenizer, distinct[i : i + batch])) for i in range(0, len(distinct), batch)]
    place = {text: i for i, text in enumerate(distinct)}
    return torch.cat(parts)[[place[text] for text in texts]]


# ---- training


class Trainer:
    """AdamW on fp32 copies of bf16 parameters, with warm-up, a constant rate, and linear decay over the last third."""

    def __init__(self, parameters: list[nn.Parameter], rates: list[float]) -> None:
        self.parameters = parameters
        for parameter in parameters:  # peft initializes the adapters at random in each worker
            dist.broadcast(parameter.data, src=0)
        self.masters = [p.detach().float().clone() for p in parameters]
        groups = [{"params": [m], "lr": r, "peak": r} for m, r in zip(self.masters, rates, strict=True)]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.98))

    def step(self, progress: float) -> float:
        """Update from the workers' mean gradient; `progress` runs from 0 to 1 over the whole training.

        Returns the mean progress of the workers, so that all of them end at the same step.
        """
        flat = torch.cat([p.grad.float().flatten() for p in self.parameters] + [torch.tensor([progress])])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        progress = float(flat[-1])
        factor = min(1.0, progress / 0.03 + 0.05, (1 - progress) / 0.33 + 0.02)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        parts = flat[:-1].split([p.numel() for p in self.parameters])
        for master, parameter, part in zip(self.masters, self.parameters, parts, strict=True):
            master.grad, parameter.grad = part.view_as(master), None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                parameter.copy_(master)
        return progress

    def state(self) -> dict[str, Any]:
        return {"masters": self.masters, "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for master, parameter, saved in zip(self.masters, self.parameters, state["masters"], strict=True):
                parameter.copy_(master.copy_(saved))
        self.optimizer.load_state_dict(state["optimizer"])


def av_loss(av: nn.Module, prompt: Prompt, vectors: Tensor, texts: Tensor, *, whole: bool) -> tuple[Tensor, Tensor]:
    """Return (weighted loss, unweighted loss per text token and the closing token) of texts of one length [row, token].

    The last tokens count more: they carry most of the activation. Tags are certain after a few steps, so most batches
    (`whole` false) skip the opening tag's logits and end at the closing tag's first token.
    """
    rows, length = texts.shape
    opening = torch.tensor([prompt.opening]).expand(rows, -1)
    closing = torch.tensor([prompt.closing]).expand(rows, -1)
    target = torch.cat([opening, texts, closing], dim=1)
    stop = len(prompt.opening) + length + (len(prompt.closing) if whole else 1)
    start = 0 if whole else len(prompt.opening)
    hidden = av_hidden(av, prompt, vectors, target[:, : stop - 1], DynamicCache(config=av.config))
    hidden = hidden[:, hidden.shape[1] - (stop - start) :]
    logits = av.lm_head(hidden.reshape(-1, hidden.shape[-1])).float()  # 2-D: a 3-D product copies the weights per row
    losses = nn.functional.cross_entropy(logits, target[:, start:stop].reshape(-1), reduction="none").view(rows, -1)
    weights = torch.ones(stop - start)
    first_text = len(prompt.opening) - start
    weights[first_text + length - 3 : first_text + length] = 2.0
    text_losses = losses[:, first_text : first_text + length + 1].detach().mean(0)
    return (losses * weights).sum() / (rows * weights[first_text:].sum()), text_losses


def batches_of_one_length(lengths: np.ndarray, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield endless batches of row numbers in which every text has the same length, so that nothing is padded."""
    while True:
        order = rng.permutation(len(lengths))
        groups = [order[lengths[order] == n] for n in np.unique(lengths)]
        cut = [group[i : i + size] for group in groups for i in range(0, len(group) - size + 1, size)]
        for i in rng.permutation(len(cut)):
            yield cut[i]


# ---- saving


def sidecar(role: str, prompt: Prompt, digest: str, training: dict[str, Any]) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "kind": "nla_model",
        "schema_version": 2,
        "role": role,
        "stage": "sl",
        "base_checkpoint": HUB_ID,
        "base_digest": digest,
        "d_model": WIDTH,
        "extraction": {"injection_scale": INJECTION_SCALE, "mse_scale": math.sqrt(WIDTH)},
        "tokens": {
            "injection_char": MARKER,
            "injection_token_id": prompt.marker,
            "injection_left_neighbor_id": prompt.before[-1],
            "injection_right_neighbor_id": prompt.after[0],
            "critic_suffix_ids": None,
        },
        "prompt_templates": {"av": AV_TEMPLATE, "ar": AR_TEMPLATE},
        "extraction_layer_index": LAYER,
        "trained_on": ["four Austen novels, Moby-Dick, Wikipedia articles; see scripts/train_demo_pair.py"],
        "parent_checkpoints": [HUB_ID],
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "created_by": "scripts/train_demo_pair.py",
        "training": training,
    }
    if role == "ar":
        meta["critic"] = {"extraction_layer_index": LAYER}
    return meta


def save_adapter(model: PeftModel, into: Path, meta: dict[str, Any]) -> None:
    into.mkdir(parents=True, exist_ok=True)
    model.peft_config["default"].base_model_name_or_path = HUB_ID
    model.peft_config["default"].inference_mode = True
    model.save_pretrained(into, save_embedding_layers=False)
    (into / "README.md").unlink(missing_ok=True)
    (into / "nla_meta.yaml").write_text(yaml.safe_dump(meta, sort_keys=False, allow_unicode=True), encoding="utf-8")


def save_ar(ar: Reconstructor, into: Path, meta: dict[str, Any]) -> None:
    save_adapter(ar.model, into, meta)
    weight = ar.value_head.weight.detach().to(torch.bfloat16).contiguous()
    save_file({"weight": weight}, into / "value_head.safetensors", metadata={"format": "pt"})


def load_ar(base: Path, adapter: Path | None) -> Reconstructor:
    head = None if adapter is None else load_file(adapter / "value_head.safetensors")["weight"].float()
    return Reconstructor(with_lora(load_truncated(base), adapter), head)


def digest_of(path: Path) -> str:
    with path.open("rb") as handle:
        return "sha256:" + hashlib.file_digest(handle, "sha256").hexdigest()
