"""Tiny decoders and encoders over GPT-2, Gemma-2, Gemma-3, Qwen2 and Llama against a slow recomputation of the same arithmetic.

The recomputation knows nothing of ours: it puts modules of its own in front of the blocks, uses no cache, runs prompt and
tokens in one pass, computes every layer, and takes the scale of embeddings from the name of the family.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
)

from ksweep.autoencoder.tae.models import (
    Explanation,
    TaeInfo,
    TaeReconstructor,
    TaeVerbalizer,
    inspect_tae,
    load_tae_reconstructor,
    load_tae_verbalizer,
)
from ksweep.utils.errors import CheckpointError, DataError
from tests.autoencoder.test_tae_fixtures import FIXTURES, drawn
from tests.tiny_models import make_base, prefilled

D, BLOCKS, VOCABULARY, TOKENS, N = 32, 4, 400, 5, 3


@dataclass(frozen=True)
class Tiny:
    """One checkpoint to be made."""

    family: str
    patch: Any = False
    stacked: bool = False
    new_decoder: bool = False
    left: int = 4
    right: int = 3
    subtracts: bool = False
    output_layer: int = 1
    projection: bool = True
    soft: int = 6
    postfix: int = 0
    current: bool = False
    special: bool = False
    adds: bool = False
    stored: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def num_patched(self) -> int:
        return (
            {True: BLOCKS, False: 0}[self.patch]
            if isinstance(self.patch, bool)
            else 0
            if self.patch == "just_input"
            else self.patch
        )


CASES = {
    "gpt2, single, no patch, positions": Tiny("gpt2", subtracts=True, adds=True, output_layer=-1, postfix=2),
    "gpt2, first 2, extra projection, bases stored": Tiny(
        "gpt2", patch=2, stacked=True, new_decoder=True, stored=("decoder", "encoder"), subtracts=True
    ),
    "gpt2, just input, stack of one": Tiny("gpt2", patch="just_input", stacked=True, new_decoder=True, output_layer=-2),
    "gemma2, all": Tiny("gemma2", patch=True, stacked=True, postfix=1, special=True),
    "gemma2, just input": Tiny("gemma2", patch="just_input", output_layer=-2, projection=False),
    "gemma3, single, no patch": Tiny("gemma3", output_layer=-1, current=True, special=True),
    "gemma3, all blocks one projection, nothing right": Tiny("gemma3", patch=True, right=0, current=True),
    "gemma3 in a multimodal wrapper": Tiny(
        "gemma3_multimodal", patch=2, stacked=True, current=True, special=True, output_layer=2
    ),
    "gemma3 wrapper, base stored": Tiny("gemma3_multimodal", patch=2, stacked=True, stored=("decoder", "encoder")),
    "qwen2, the first block": Tiny("qwen2", patch=1, stacked=True, current=True, special=True, output_layer=3),
    "qwen2, decoder's base stored": Tiny("qwen2", patch=2, stacked=True, stored=("decoder",)),
    "qwen2, encoder's base stored": Tiny("qwen2", patch=2, stacked=True, stored=("encoder",), current=True),
    "llama, first 2, nothing left": Tiny("llama", patch=2, stacked=True, left=0, projection=False, output_layer=-2),
    "llama, all, no soft prompt": Tiny("llama", patch=True, stacked=True, soft=0, output_layer=0),
    "gpt2, no prompt at all": Tiny("gpt2", patch=True, stacked=True, left=0, right=0, soft=0),
    "gemma2, first 3, extra projection, base stored": Tiny(
        "gemma2", patch=3, stacked=True, new_decoder=True, stored=("decoder", "encoder"), current=True, output_layer=-1
    ),
}

WAYS: list[dict[str, Any]] = [
    {"patch": False},
    {"patch": True},
    {"patch": True, "stacked": True},
    {"patch": 1},
    {"patch": 1, "stacked": True},
    {"patch": 3, "stacked": True},
    {"patch": 3, "stacked": True, "new_decoder": True},
    {"patch": 0},
    {"patch": 0, "stacked": True, "new_decoder": True},
    {"patch": "just_input"},
    {"patch": "just_input", "stacked": True, "new_decoder": True},
    {"patch": BLOCKS, "stacked": True},
]
PROMPTS: list[dict[str, Any]] = [{}, {"left": 0}, {"right": 0}, {"left": 0, "right": 0}]
ENCODERS: list[dict[str, Any]] = [
    {"output_layer": -1, "postfix": 2},
    {"output_layer": -2, "current": True},
    {"output_layer": 0, "projection": False, "special": True, "current": True},
    {"output_layer": 3, "soft": 0, "special": True},
]
STORED: list[dict[str, Any]] = [{}, {"stored": ("decoder",)}, {"stored": ("encoder",)}, {"stored": ("decoder", "encoder")}, {}]


def make(directory: Path, tiny: Tiny) -> Path:
    """Base and checkpoint, seeded."""
    base = directory / "base"
    torch.manual_seed(7)
    if tiny.family == "gemma3_multimodal":
        make_base(base, "gemma3_multimodal", num_layers=BLOCKS, d_model=D)
    else:
        shutil.copytree(FIXTURES / "gpt2_patch_all" / "base", base, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
        model = AutoModelForCausalLM.from_config(config(tiny.family))
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(base)
    checkpoint = {"step": 1, "models": states(tiny, base), "config": configuration(tiny)}
    torch.save(checkpoint, directory / "tiny_step1_epoch1_.pt")
    return directory / "tiny_step1_epoch1_.pt"


def config(family: str) -> Any:
    """Small everything; windows shorter than the prompts, soft-capping that can be seen, heads of their own where possible."""
    same = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    if family == "gpt2":
        return GPT2Config(n_embd=D, n_layer=BLOCKS, n_head=4, n_positions=64, **same)
    llama = {
        "hidden_size": D, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, **same,
    }  # fmt: skip
    gemma = {**llama, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5}
    if family == "gemma2":
        return Gemma2Config(**gemma, attn_logit_softcapping=2.0, final_logit_softcapping=1.0)
    if family == "gemma3":
        kinds = ["sliding_attention", "full_attention"] * (BLOCKS // 2)
        return Gemma3TextConfig(**gemma, layer_types=kinds)
    if family == "qwen2":
        return Qwen2Config(**llama, tie_word_embeddings=False)
    return LlamaConfig(**llama, tie_word_embeddings=False)


def states(tiny: Tiny, base: Path) -> dict[str, dict[str, torch.Tensor]]:
    def random(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape)

    p = tiny.num_patched + tiny.new_decoder
    prompt = tiny.left + tiny.right
    decoder = {"prompt_ids": torch.arange(prompt + 1 if prompt else 0)}  # nothing sets it where there is no prompt
    decoder |= {name: random(n, D) for name, n in (("prompt_left_emb", tiny.left), ("prompt_right_emb", tiny.right)) if n}
    decoder |= (
        {"proj_weight": random(p, D, D), "proj_bias": random(p, D)}
        if tiny.stacked
        else {"proj.weight": random(D, D), "proj.bias": random(D)}
    )
    encoder = {"soft_prompt_embeddings": random(tiny.soft, D)} if tiny.soft else {}
    encoder |= {"soft_prompt_embeddings_postfix": random(tiny.postfix, D)} if tiny.postfix else {}
    encoder |= {"special_last_token_vector": random(D)} if tiny.special else {}
    encoder |= {"proj.weight": random(D, D), "proj.bias": random(D)} if tiny.projection else {}
    for state, wanted in ((decoder, tiny.subtracts), (encoder, tiny.adds)):
        state |= {"activation_pos_embedder.weight": random(64, D)} if wanted else {}
    for role in tiny.stored:
        {"decoder": decoder, "encoder": encoder}[role].update(stored_base(tiny, base))
    return {"decoder": decoder, "encoder": encoder}


def stored_base(tiny: Tiny, base: Path) -> dict[str, torch.Tensor]:
    """All of a base's weights, trained on (other ones at every call), as the reference's module spells them."""
    state = {name: value + 0.05 * torch.randn_like(value) for name, value in plain(base).state_dict().items()}
    state = {name: value for name, value in state.items() if name != "lm_head.weight" or tiny.family in ("qwen2", "llama")}
    if tiny.family == "gemma3_multimodal":
        state = {name.replace("model.", "model.language_model.", 1): value for name, value in state.items()}
        state |= {"model.vision_tower.embeddings.weight": torch.ones(2, 2)}
    if tiny.family == "gpt2":
        state["lm_head.weight"] = state["transformer.wte.weight"]
        state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64)  # a buffer that old versions stored
    return {f"base.{name}": value for name, value in state.items()}


def configuration(tiny: Tiny) -> dict[str, Any]:
    text = ("<|endoftext|>In other words:" if tiny.soft else "") + (
        "<text> That was it." if tiny.postfix else "<text>" if tiny.soft else ""
    )
    decoder = {
        "base_model": "decoder" in tiny.stored, "patch_all_layers": tiny.patch, "per_layer_projections": tiny.stacked,
        "new_decoder": tiny.new_decoder, "subtract_add_pos_embeddings": tiny.subtracts, "pos_embeddings": False,
    }  # fmt: skip
    encoder = {
        "base_model": "encoder" in tiny.stored, "use_base_model": True, "use_projection_layer": tiny.projection,
        "output_layer": tiny.output_layer, "add_current_token": tiny.current, "special_last_token_vector": tiny.special,
        "subtract_add_pos_embeddings": tiny.adds, "soft_prompt_init_text": text or None, "pos_embeddings": False,
    }  # fmt: skip
    return {
        "model_name": "base", "orig_model_name": "base", "layer_l": 1, "t_text": TOKENS,
        "decoder_prompt": "of <embed>:" if tiny.left + tiny.right else "",
        "trainable_components": {"decoder": decoder, "encoder": encoder},
    }  # fmt: skip


# the slow way


class Overwrite(nn.Module):
    """A block whose input is overwritten at one position first."""

    def __init__(self, block: nn.Module, row: torch.Tensor, position: int) -> None:
        super().__init__()
        self.block, self.row, self.position = block, row, position

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden_states = torch.cat(
            [hidden_states[:, : self.position], self.row[:, None], hidden_states[:, self.position + 1 :]], dim=1
        )
        return self.block(hidden_states, *args, **kwargs)


def plain(base: Path, stored: dict[str, torch.Tensor] | None = None) -> Any:
    """The text model out of its files, eager attention (the only kind that soft-caps), stored weights where there are some."""
    whole = AutoConfig.from_pretrained(base)
    model = AutoModelForCausalLM.from_config(whole.get_text_config(), attn_implementation="eager")
    given = {name.removeprefix("base."): value for name, value in (stored or load_file(base / "model.safetensors")).items()}
    given = {name.replace("model.language_model.", "language_model."): value for name, value in given.items()}
    given = {name.replace("language_model.model.", "model."): value for name, value in given.items()}
    given = {name.replace("language_model.", "model."): value for name, value in given.items()}
    given.setdefault("lm_head.weight", next(v for k, v in given.items() if k.endswith(("wte.weight", "embed_tokens.weight"))))
    model.load_state_dict({name: given[name] for name in model.state_dict()})
    return model.eval().double()  # but for transformers' norms and softmax, which are taken in float32


def halves(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What a checkpoint holds, in float64."""
    models = torch.load(path, weights_only=True)["models"]
    return {role: {name: tensor.double() for name, tensor in state.items()} for role, state in models.items()}


def body(model: Any) -> tuple[Any, str]:
    return (model.transformer, "h") if hasattr(model, "transformer") else (model.model, "layers")


def scale(tiny: Tiny) -> float:
    return math.sqrt(D) if tiny.family.startswith("gemma") else 1.0


@torch.no_grad()
def slow_logits(tiny: Tiny, path: Path, vectors: torch.Tensor, positions: list[int], tokens: torch.Tensor) -> torch.Tensor:
    """Logits after the prompt and after every token: [row, token + 1, vocabulary]."""
    state, vectors = halves(path)["decoder"], vectors.double()
    model = plain(path.parent / "base", stored_in(state))
    if tiny.subtracts:
        vectors = vectors - state["activation_pos_embedder.weight"][positions]

    def projected(i: int) -> torch.Tensor:
        weight = state["proj_weight"][i] if tiny.stacked else state["proj.weight"]
        bias = state["proj_bias"][i] if tiny.stacked else state["proj.bias"]
        return vectors @ weight.T + bias

    pieces = [projected(0)[:, None], model.get_input_embeddings().weight[tokens]]
    if tiny.left:
        pieces.insert(0, state["prompt_left_emb"].repeat(len(vectors), 1, 1))
    if tiny.right:
        pieces.insert(-1, state["prompt_right_emb"].repeat(len(vectors), 1, 1))
    decoder, name = body(model)
    blocks = getattr(decoder, name)
    for i in range(tiny.num_patched):
        blocks[i] = Overwrite(blocks[i], projected(i + 1 if tiny.new_decoder else i), tiny.left)
    hidden = decoder(inputs_embeds=torch.cat(pieces, dim=1) * scale(tiny), use_cache=False).last_hidden_state
    return model.lm_head(hidden[:, tiny.left + tiny.right :])  # type: ignore[no-any-return]


@torch.no_grad()
def slow_vectors(
    tiny: Tiny,
    path: Path,
    tokens: torch.Tensor,
    current: list[int],
    positions: list[int],
    instead: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    models = halves(path)
    state = models["encoder"] | (instead or {})
    of_decoder = plain(path.parent / "base", stored_in(models["decoder"])).get_input_embeddings().weight
    model = plain(path.parent / "base", stored_in(state))
    pieces = [of_decoder[tokens]]
    if tiny.soft:
        pieces.insert(0, state["soft_prompt_embeddings"].repeat(len(tokens), 1, 1))
    if tiny.postfix:
        pieces.append(state["soft_prompt_embeddings_postfix"].repeat(len(tokens), 1, 1))
    if tiny.current:
        pieces.append(model.get_input_embeddings().weight[current][:, None])
    inputs = torch.cat(pieces, dim=1)
    if tiny.special:
        inputs[:, -1] += state["special_last_token_vector"]
    decoder, _ = body(model)
    setattr(decoder, "ln_f" if tiny.family == "gpt2" else "norm", nn.Identity())
    output = decoder(inputs_embeds=inputs * scale(tiny), use_cache=False, output_hidden_states=True)
    last = tiny.output_layer == -1
    hidden = (output.last_hidden_state if last else output.hidden_states[max(0, tiny.output_layer + 1)])[:, -1]
    if tiny.projection:
        hidden = hidden @ state["proj.weight"].T + state["proj.bias"]
    return hidden + state["activation_pos_embedder.weight"][positions] if tiny.adds else hidden


def stored_in(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if name.startswith("base.")}


def loaded(tiny: Tiny, directory: Path) -> tuple[TaeInfo, TaeVerbalizer, TaeReconstructor]:
    info = inspect_tae(make(directory, tiny))
    av = load_tae_verbalizer(info, dtype="float32")
    return info, av, load_tae_reconstructor(info, dtype="float32", sharing=av)


@pytest.mark.heavy(3)
@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gemma3", "gemma3_multimodal", "qwen2", "llama"])
def test_every_way_of_patching_equals_a_slow_recomputation(family: str, tmp_path: Path) -> None:
    """Each in turn with other prompts, encoders and stored bases: their numbers have no common factor with one another."""
    for i, way in enumerate(WAYS):
        positions = {"subtracts": i % 2 == 0, "adds": i % 3 == 0} if family == "gpt2" else {}
        tiny = Tiny(family, **way, **PROMPTS[(i // 3) % 4], **ENCODERS[i % 4], **STORED[i % 5], **positions)
        (tmp_path / str(i)).mkdir()
        compare(tiny, tmp_path / str(i))


@pytest.mark.parametrize("tiny", CASES.values(), ids=CASES)
def test_decoder_and_encoder_equal_a_slow_recomputation(tiny: Tiny, tmp_path: Path) -> None:
    compare(tiny, tmp_path)


def compare(tiny: Tiny, tmp_path: Path) -> None:
    info, av, ar = loaded(tiny, tmp_path)
    generator = torch.Generator().manual_seed(1)
    vectors, positions = 2 * torch.randn(N, D, generator=generator), [0, 9, 63]
    found = drawn(av, av.inputs(vectors, positions), 1, temperature=0.0)
    tokens = torch.tensor([d.token_ids for d in found])
    logits = slow_logits(tiny, info.path, vectors, positions, tokens)
    assert (prefilled(av, av.inputs(vectors, positions)).logits - logits[:, 0]).abs().max() < 1e-4
    best = logits[:, :-1].gather(-1, tokens[..., None])[..., 0]
    assert (best >= logits[:, :-1].amax(-1) - 2e-4).all()  # twice the allowed difference: a tie may go either way
    log_probabilities = (best - logits[:, :-1].logsumexp(-1)).sum(-1)
    said = torch.tensor([d.log_probability for d in found], dtype=torch.float64)
    assert torch.allclose(said, log_probabilities, atol=1e-4)
    current = [5, 6, 7]
    reconstructions = ar.reconstruct_tokens(tokens, current, positions, batch_size=2)
    expected = slow_vectors(tiny, info.path, tokens, current, positions)
    assert (reconstructions - expected).abs().max() < 1e-4 * expected.abs().max().clamp_min(1)
    assert (ar.model is av.model) == (not tiny.stored)


TEXT_CASES = {
    "gpt2, postfix, positions": Tiny("gpt2", postfix=2, adds=True),
    "gpt2, base stored": Tiny("gpt2", postfix=2, stored=("decoder", "encoder")),
    "gemma2, special vector": Tiny("gemma2", patch=True, stacked=True, special=True, output_layer=-1),
    "gemma3, current token": Tiny("gemma3", patch=2, stacked=True, current=True, special=True),
    "gemma3 wrapper, encoder's base stored": Tiny("gemma3_multimodal", stored=("encoder",), postfix=3),
    "qwen2": Tiny("qwen2", patch=2, stacked=True, current=True, postfix=1),
    "llama": Tiny("llama", output_layer=-2),
}


@pytest.mark.parametrize("tiny", TEXT_CASES.values(), ids=TEXT_CASES)
def test_the_text_prompt_is_the_plain_embedding_of_its_words_in_the_encoders_base(tiny: Tiny, tmp_path: Path) -> None:
    info, av, learned = loaded(tiny, tmp_path)
    ar = load_tae_reconstructor(info, dtype="float32", sharing=av, encoder_prompt="text")
    tokenizer = Tokenizer.from_file(str(info.base / "tokenizer.json"))  # no library of ours, no special tokens around
    table = plain(info.base, stored_in(halves(info.path)["encoder"])).get_input_embeddings().weight
    prefix, _, postfix = (info.soft_prompt_text or "").partition("<text>")
    assert prefix == "<|endoftext|>In other words:" and bool(postfix) == bool(tiny.postfix)
    ids = [tokenizer.encode(words, add_special_tokens=False).ids for words in (prefix, postfix)]
    assert len(ids[0]) != tiny.soft
    instead = {"soft_prompt_embeddings": table[ids[0]], "soft_prompt_embeddings_postfix": table[ids[1]]}
    tokens, current, positions = torch.randint(1, 300, (N, TOKENS)), [5, 6, 7], [0, 9, 63]
    found = ar.reconstruct_tokens(tokens, current, positions)
    expected = slow_vectors(tiny, info.path, tokens, current, positions, instead)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max().clamp_min(1)
    if tiny.output_layer != -2:  # which reads the last token alone
        assert (learned.reconstruct_tokens(tokens, current, positions) - found).abs().max() > 1e-3
    assert (ar.model is av.model) == (not tiny.stored)


def test_a_text_prompt_without_words_or_with_two_places_is_refused(tmp_path: Path) -> None:
    info = inspect_tae(make(tmp_path, Tiny("gpt2")))
    for text in (None, "a <text> b <text> c"):
        with pytest.raises(CheckpointError, match="at most one <text>"):
            load_tae_reconstructor(replace(info, soft_prompt_text=text), encoder_prompt="text")
    with pytest.raises(CheckpointError, match="positions, but the base has 64"):
        load_tae_reconstructor(replace(info, soft_prompt_text="words " * 60), encoder_prompt="text")


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gemma3", "qwen2", "llama"])
def test_the_vector_and_its_place_matter(family: str, tmp_path: Path) -> None:
    """Guards the comparison above: opposite vectors give other texts, other current tokens other reconstructions."""
    _, av, ar = loaded(Tiny(family, patch=2, stacked=True, current=True), tmp_path)
    vectors = torch.randn(2, D, generator=torch.Generator().manual_seed(2))
    logits = prefilled(av, torch.cat([vectors, -vectors])).logits
    assert (logits[:2] - logits[2:]).abs().max() > 0.1
    tokens = torch.ones(2, TOKENS, dtype=torch.long)
    assert (ar.reconstruct_tokens(tokens, [1, 2])[0] - ar.reconstruct_tokens(tokens, [1, 2])[1]).abs().max() > 1e-2


def test_positions_are_asked_for_and_bounded_where_the_file_uses_them(tmp_path: Path) -> None:
    _, av, ar = loaded(Tiny("gpt2", subtracts=True, adds=True), tmp_path)
    vectors = torch.randn(2, D)
    with pytest.raises(DataError, match="uses the position of every activation, and 2 of 2 are unknown"):
        av.inputs(vectors)
    with pytest.raises(DataError, match="positions 0 to 63, but an activation is at position 64"):
        av.inputs(vectors, [1, 64])
    with pytest.raises(DataError, match="positions"):
        ar.reconstruct([Explanation("", (1, 2), position=3), Explanation("", (1, 2))])
    same = ar.reconstruct([Explanation("", (1, 2), position=p) for p in (3, 4)])
    table = torch.load(ar.info.path, weights_only=True)["models"]["encoder"]["activation_pos_embedder.weight"]
    assert torch.allclose(same[1] - same[0], table[4] - table[3], atol=1e-5)


def test_attention_is_soft_capped_as_in_training_and_final_logits_are_not(tmp_path: Path) -> None:
    """Gemma-2: with SDPA, or with the model's own final cap of 1, both halves would be silently off."""
    _, av, ar = loaded(Tiny("gemma2", patch=True, stacked=True), tmp_path)
    assert av.model.config._attn_implementation == "eager" and ar.model.config._attn_implementation == "eager"
    assert prefilled(av, torch.randn(4, D)).logits.abs().max() > 1.0


@pytest.mark.slow
def test_base_of_other_shape_under_stored_weights_is_refused_by_name(tmp_path: Path) -> None:
    tiny = Tiny("qwen2", patch=2, stacked=True, stored=("decoder", "encoder"))
    path = make(tmp_path, tiny)
    value = torch.load(path, weights_only=True)
    decoder = value["models"]["decoder"]
    decoder["base.model.layers.1.mlp.up_proj.weight"] = torch.ones(48, D + 1)
    decoder["base.model.layers.9.mlp.up_proj.weight"] = decoder.pop("base.model.norm.weight")
    value["models"]["encoder"].pop("base.model.layers.0.mlp.up_proj.weight")
    torch.save(value, path)
    with pytest.raises(CheckpointError, match=r"lack model\.norm\.weight.*layers\.1\.mlp\.up_proj\.weight \[48, 33\]"):
        load_tae_verbalizer(path, dtype="float32")
    with pytest.raises(CheckpointError, match=r"lack layers\.0\.mlp\.up_proj\.weight"):
        load_tae_reconstructor(path, dtype="float32")
