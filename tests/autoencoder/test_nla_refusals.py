"""What only weights, a tokenizer or a vector can show: the rest of the fixtures' "Must be refused" list, and more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ksweep.activations.base_model import BaseModel
from ksweep.activations.lower_blocks import check_lower_blocks
from ksweep.autoencoder.nla import checkpoint
from ksweep.autoencoder.nla.models import load_nla_reconstructor, load_nla_verbalizer
from ksweep.utils.errors import CheckpointError, DataError
from tests.tiny_models import FIXTURES, Family, TinyPair, edit_sidecar, edit_weights, make_pair, prefilled

CASES = ("qwen2_text", "gemma3_text", "llama")
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("originals")
    for case in CASES[:2]:
        shutil.copytree(FIXTURES / case, directory / case)
    make_pair(directory / "llama", "llama")
    return directory


def load(path: Path, role: str, **options: Any) -> Any:
    loader = load_nla_verbalizer if role == "av" else load_nla_reconstructor
    return loader(path, dtype=options.pop("dtype", "float32"), **options)


def set_head(value: float) -> Callable[[Path], None]:
    def change(state: dict[str, torch.Tensor]) -> None:
        state["weight"][3, 5] = value

    return lambda path: edit_weights(path, change=change, file="value_head.safetensors")


def set_weight(name: str, value: float) -> Callable[[Path], None]:
    def change(state: dict[str, torch.Tensor]) -> None:
        state[name].view(-1)[7] = value

    return lambda path: edit_weights(path, change=change)


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    return lambda path: edit_weights(path, change=change)


def token_id(key: str, by: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        said = checkpoint.inspect_nla(path, "av").sidecar
        old = {
            "injection_token_id": said.marker_id,
            "injection_left_neighbor_id": said.left_id,
            "injection_right_neighbor_id": said.right_id,
        }
        edit_sidecar(path, **{f"tokens__{key}": (old[key] or 0) + by})

    return change


def tokenizer(change: Callable[[dict[str, Any]], Any], name: str = "tokenizer.json") -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        values = json.loads((path / name).read_text())
        change(values)
        (path / name).write_text(json.dumps(values))

    return rewrite


def without_bos(path: Path) -> None:
    tokenizer(lambda t: t.update(post_processor=None))(path)


def with_eos(path: Path) -> None:
    """A post-processor that appends the EOS as well."""

    def change(values: dict[str, Any]) -> None:
        eos = next(t for t in values["added_tokens"] if t["content"] in ("<|im_end|>", "<eos>", "<|eot_id|>"))
        processors = values["post_processor"].get("processors", [values["post_processor"]])
        template = next((p for p in processors if p["type"] == "TemplateProcessing"), None)
        special = {"id": eos["content"], "ids": [eos["id"]], "tokens": [eos["content"]]}
        if template is None:
            template = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}], "special_tokens": {}}
            template["pair"] = [*template["single"], {"Sequence": {"id": "B", "type_id": 1}}]
            values["post_processor"] = template
        template["single"].append({"SpecialToken": {"id": eos["content"], "type_id": 0}})
        template["special_tokens"][eos["content"]] = special

    tokenizer(change)(path)


def no_chat_template(path: Path) -> None:
    (path / "chat_template.jinja").unlink()


def chat_template(change: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda path: (path / "chat_template.jinja").write_text(change((path / "chat_template.jinja").read_text())) and None


ALL, UNTIED, WITH_BOS, BYTE_BPE = CASES, ("qwen2_text", "llama"), ("gemma3_text", "llama"), ("qwen2_text", "llama")
REFUSED: list[tuple[str, str, tuple[str, ...], Callable[[Path], None], str]] = [
    ("head_nan", "ar", ALL, set_head(float("nan")), r"1 of \d+ weights are NaN, .* the first at \[3, 5\] \(nan\)"),
    ("head_inf", "ar", ALL, set_head(float("inf")), r"the first at \[3, 5\] \(inf\)"),
    ("head_huge", "ar", ALL, set_head(3e38), r"the first at \[3, 5\]"),
    ("ar_nan", "ar", ALL, set_weight(UP, float("nan")), r"AR .* has NaN, .* in layers.1.mlp.up_proj.weight"),
    ("av_nan", "av", ALL, set_weight(UP, float("nan")), rf"AV .* has NaN, .* in {UP}"),
    ("av_huge", "av", ALL, set_weight("model.embed_tokens.weight", -3e38), r"absurdly large weights .* in model.embed_tokens"),
    ("av_extra", "av", ALL, weights(lambda s: s.update({"model.extra.weight": torch.ones(3)})),
     r"has unexpected model.extra.weight"),
    ("ar_extra", "ar", ALL, weights(lambda s: s.update({"model.extra.weight": torch.ones(3)})),
     r"has unexpected model.extra.weight"),
    ("ar_extra_in_block", "ar", ALL, weights(lambda s: s.update({"model.layers.1.x": torch.ones(3)})),
     r"has unexpected model.layers.1.x"),
    ("av_vision", "av", ALL, weights(lambda s: s.update({"vision_tower.x": torch.ones(3)})), r"has unexpected vision_tower.x"),
    ("av_no_embedding", "av", ALL, weights(lambda s: s.pop("model.embed_tokens.weight")), r"lacks .*embed_tokens.weight"),
    ("ar_no_embedding", "ar", ALL, weights(lambda s: s.pop("model.embed_tokens.weight")), r"lacks embed_tokens.weight"),
    ("av_no_norm", "av", ALL, weights(lambda s: s.pop("model.norm.weight")), r"lacks model.norm.weight"),
    ("av_no_lm_head", "av", UNTIED, weights(lambda s: s.pop("lm_head.weight")), r"lacks lm_head.weight"),
    ("ar_shape", "ar", ALL, weights(lambda s: s.update({UP: s[UP][:-1]})),
     r"in another shape than config.json implies, .*up_proj"),
    ("ar_all_blocks_lack", "ar", ALL, weights(lambda s: [s.pop(k) for k in list(s) if "o_proj" in k]),
     r"lacks layers.0.self_attn.o_proj"),
    ("marker_id", "av", ALL, token_id("injection_token_id", 1),
     r"marker .* is tokenized as \[\d+\]; the sidecar says injection_token_id"),
    ("left_id", "av", ALL, token_id("injection_left_neighbor_id", -1), r"marker is between the tokens \d+ and \d+"),
    ("right_id", "av", ALL, token_id("injection_right_neighbor_id", 1), r"marker is between the tokens \d+ and \d+"),
    ("merge_dropped", "av", BYTE_BPE, tokenizer(lambda t: t["model"]["merges"].pop()), r"marker .* is tokenized as \[\d+, \d+\]"),
    ("no_chat_template", "av", ALL, no_chat_template, r"has no chat template"),
    ("chat_drops_message", "av", ALL, chat_template(lambda t: t.replace("message['content']", "'x'")),
     r"is at positions \[\] of the \d+ prompt tokens"),
    ("chat_two_bos", "av", WITH_BOS, chat_template(lambda t: t.replace("bos_token", "bos_token + bos_token", 1)),
     r"starts with two BOS"),
    ("suffix_ids", "ar", ALL, lambda p: edit_sidecar(p, tokens__critic_suffix_ids=[1, 2]), r"critic_suffix_ids are \[1, 2\]"),
    ("ar_without_bos", "ar", WITH_BOS, without_bos, r"has the BOS token .* but does not put it before a text"),
    ("ar_with_eos", "ar", ALL, with_eos, r"The AR is read at the last token"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "role", "change", "message"),
    [
        pytest.param(case, role, change, message, id=f"{name}-{case}")
        for name, role, cases, change, message in REFUSED
        for case in cases
    ],
)
def test_loading_a_changed_checkpoint_says_what_is_wrong(
    case: str, role: str, change: Callable[[Path], None], message: str, originals: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(originals / case / f"nla-{role}", tmp_path / f"nla-{role}"))
    change(path)
    with pytest.raises(CheckpointError, match=message) as raised:
        load(path, role)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)


def test_role_edited_over_is_still_refused(originals: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(originals / "qwen2_text" / "nla-ar", tmp_path / "x"))
    edit_sidecar(path, role="av", extraction__injection_scale=24.0)
    with pytest.raises(CheckpointError, match=r"lacks lm_head.weight, model.norm.weight"):
        load(path, "av")


def test_info_of_the_other_role_is_refused(originals: Path) -> None:
    info = checkpoint.inspect_nla(originals / "llama" / "nla-ar", "ar")
    with pytest.raises(CheckpointError, match="is an AR checkpoint; expected the AV"):
        load_nla_verbalizer(info)


@pytest.mark.parametrize("case", CASES)
def test_megatron_compat_tensors_and_a_final_norm_are_never_applied(case: str, originals: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = Path(shutil.copytree(originals / case / "nla-ar", tmp_path / "nla-ar"))
    before = load(path, "ar").reconstruct_texts(["some text"])
    state = load_file(path / "model.safetensors")
    width = state["model.embed_tokens.weight"].shape[1]
    compat = {"model.norm.weight": torch.full((width,), 3.0), "lm_head.weight": torch.eye(width)}
    save_file(compat, path / "model-megatron-compat.safetensors", metadata={"format": "pt"})
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(state, "model-00001-of-00001.safetensors") | dict.fromkeys(
        compat, "model-megatron-compat.safetensors"
    )
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert torch.equal(load(path, "ar").reconstruct_texts(["some text"]), before)


# --- BOS ---


def test_bos_that_is_a_turn_marker_is_not_asked_of_the_ar(tmp_path: Path) -> None:
    """SmolLM2 calls <|im_start|>, which opens every turn, its BOS and does not prepend it."""
    pair = make_pair(tmp_path, "qwen2")
    tokenizer(lambda c: c.update(bos_token="<|im_start|>"), "tokenizer_config.json")(pair.ar)
    ar = load(pair.ar, "ar")
    assert ar.prompts.ids(["x"])[0][0] != 538


def test_add_bos_token_false_says_that_the_ar_was_trained_without(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama")
    without_bos(pair.ar)
    tokenizer(lambda c: c.update(add_bos_token=False), "tokenizer_config.json")(pair.ar)
    assert load(pair.ar, "ar").prompts.ids(["x"])[0][0] != 537


def test_llama_ar_prompt_starts_with_one_bos_and_the_av_chat_too(originals: Path) -> None:
    av, ar = load(originals / "llama" / "nla-av", "av"), load(originals / "llama" / "nla-ar", "ar")
    assert av.prompt_ids.count(537) == 1 and av.prompt_ids[0] == 537
    assert ar.prompts.ids(["x"])[0].count(537) == 1


def test_chat_template_without_bos_is_accepted(originals: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(originals / "llama" / "nla-av", tmp_path / "nla-av"))
    chat_template(lambda t: t.replace("{{ bos_token }}", ""))(path)
    assert 537 not in load(path, "av").prompt_ids


# --- program code beside a model ---

CODE = {"AutoConfig": "own.C", "AutoModel": "own.M", "AutoModelForCausalLM": "own.M"}
CODE_OF_TOKENIZER = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.T", "own.T"]}}


@pytest.mark.parametrize(
    ("file", "changes"),
    [("config.json", {"model_type": "own", "auto_map": CODE}), ("tokenizer_config.json", CODE_OF_TOKENIZER)],
)
def test_code_beside_a_model_is_neither_run_nor_asked_about(
    file: str, changes: Any, originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask "Do you wish to run the custom code? [y/N]", and advise an option that ksweep does not have."""
    path = Path(shutil.copytree(originals / "llama" / "nla-av", tmp_path / "av"))
    (path / "own.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w').close()")
    tokenizer(lambda c: c.update(changes), file)(path)
    monkeypatch.setattr("builtins.input", lambda _question: "y")
    uses: tuple[Callable[[], object], ...] = (
        lambda: load(path, "av"),
        lambda: check_lower_blocks((BaseModel(path), 1)),
    )
    for use in uses:
        with pytest.raises(CheckpointError, match="wants program code of its own to be run") as error:
            use()
        assert str(path) in str(error.value) and "trust_remote_code" not in str(error.value)
    assert not (tmp_path / "was_run").exists()


# --- vectors ---


@pytest.fixture(scope="module")
def av(originals: Path) -> Any:
    return load(originals / "llama" / "nla-av", "av")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.__setitem__((2, 0), float("nan")), "row 2 of the vectors holds NaN"),
        (lambda v: v.__setitem__((1, 3), float("-inf")), "row 1 of the vectors holds NaN or infinite"),
        (lambda v: v.__setitem__(3, 0.0), "row 3 of the vectors holds nothing but zeros"),
    ],
)
def test_prefill_of_a_vector_without_direction_names_its_row(av: Any, change: Any, message: str) -> None:
    vectors = torch.randn(4, 32)
    change(vectors)
    with pytest.raises(DataError, match=message):
        prefilled(av, vectors)


@pytest.mark.parametrize("shape", [(2, 31), (2, 64), (32,)])
def test_prefill_of_vectors_of_another_width_is_refused(av: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"shape \[activation, 32\], got"):
        prefilled(av, torch.randn(*shape))


def test_differential_check_catches_an_av_that_does_not_read_its_vector(originals: Path, tmp_path: Path) -> None:
    """Blocks that write nothing into the residual stream: the last token never hears of the marker's row."""
    path = Path(shutil.copytree(originals / "llama" / "nla-av", tmp_path / "nla-av"))
    edit_weights(path, change=lambda s: [s[k].zero_() for k in s if "o_proj" in k])
    with pytest.raises(CheckpointError, match="does not read its vector: opposite vectors change"):
        prefilled(load(path, "av"), torch.randn(2, 32))


def test_float16_overflow_is_named(originals: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(originals / "gemma3_text" / "nla-av", tmp_path / "nla-av"))
    edit_sidecar(path, extraction__injection_scale=1e7)
    with pytest.raises(CheckpointError, match=r"NaN or infinite logits in torch.float16"):
        prefilled(load(path, "av", dtype="float16"), torch.randn(2, 64))


def test_vectors_of_another_length_than_the_injection_scale_are_not_remarked_upon(
    originals: Path, caplog: pytest.LogCaptureFixture
) -> None:
    verbalizer = load(originals / "llama" / "nla-av", "av")
    prefilled(verbalizer, torch.nn.functional.normalize(torch.randn(4, 32)))
    assert not caplog.records


# --- texts ---


def test_text_longer_than_the_ar_takes_is_refused_and_never_cut(originals: Path) -> None:
    ar = load(originals / "llama" / "nla-ar", "ar")
    assert ar.reconstruct_texts(["word " * 150]).isfinite().all()
    with pytest.raises(DataError, match=r"makes an AR prompt of \d+ tokens; AR .* takes 512 at most"):
        ar.reconstruct_texts(["x", "word " * 600])


# --- adapters ---

LORA = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
ADAPTER_CHANGES: list[tuple[str, Callable[[dict[str, torch.Tensor]], Any], str]] = [
    ("lacks", lambda s: s.pop(LORA), r"lacks model.layers.1.self_attn.q_proj.lora_B.weight"),
    (
        "extra",
        lambda s: s.update({LORA.replace("q_proj", "k_proj"): s[LORA]}),
        r"has unexpected model.layers.1.self_attn.k_proj.lora_B",
    ),
    (
        "shape",
        lambda s: s.update({LORA: s[LORA][:, :1]}),
        r"in another shape .* imply, model.layers.1.self_attn.q_proj.lora_B.weight",
    ),
    (
        "nan",
        lambda s: s[LORA].fill_(float("nan")),
        r"NaN, infinite or absurdly large values in model.layers.1.self_attn.q_proj.lora_B",
    ),
]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    return make_pair(tmp_path_factory.mktemp("adapters"), "llama", adapters=True)


@pytest.mark.parametrize("role", ["av", "ar"])
@pytest.mark.parametrize(("name", "change", "message"), ADAPTER_CHANGES, ids=[c[0] for c in ADAPTER_CHANGES])
def test_adapter_that_does_not_fit_its_configuration_is_refused(
    role: str, name: str, change: Any, message: str, adapters: TinyPair, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(adapters.av if role == "av" else adapters.ar, tmp_path / role))
    edit_weights(path, change=change, file="adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load(path, role)


def test_adapter_over_a_base_of_another_architecture_is_refused(adapters: TinyPair, tmp_path: Path) -> None:
    other: Family = "gemma3"
    base = make_pair(tmp_path, other).base
    with pytest.raises(CheckpointError):
        load(adapters.av, "av", base=str(base))


def test_adapter_whose_targets_are_not_its_tensors_is_refused_with_both(adapters: TinyPair, tmp_path: Path) -> None:
    path = Path(shutil.copytree(adapters.av, tmp_path / "av"))
    tokenizer(lambda c: c.update(target_modules=["nothing_like_it"]), "adapter_config.json")(path)
    with pytest.raises(CheckpointError, match=r"target_modules=\['nothing_like_it'\] chooses .* has unexpected model\.layers\.0"):
        load(path, "av")


def test_random_vectors_of_numpy_are_not_silently_transposed(av: Any) -> None:
    vectors = torch.from_numpy(np.random.default_rng(0).standard_normal((5, 32)))
    assert prefilled(av, vectors).logits.shape == (5, 540)
