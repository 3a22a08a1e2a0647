"""What can be known of a checkpoint before its weights are read: most of the fixtures' "Must be refused", and more."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ksweep.autoencoder.nla.checkpoint import check_pair, digest_nla, inspect_nla
from ksweep.utils import hub
from ksweep.utils.errors import CheckpointError, DataError
from ksweep.utils.notes import Note
from tests.tiny_models import FIXTURES, TinyPair, edit_sidecar, edit_weights, make_pair

CASES = ("qwen2_text", "gemma3_text")
PART = {"av": "nla-av", "ar": "nla-ar"}


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSWEEP_HOME", str(tmp_path_factory.mktemp("home")))


@dataclass(frozen=True)
class Refusal:
    name: str
    role: Any
    change: Callable[[Path], Any]
    message: str
    """Part of the message: a regular expression."""


def side(**changes: Any) -> Callable[[Path], None]:
    return lambda path: edit_sidecar(path, **changes)


def special_marker(path: Path) -> None:
    """A special token of each tokenizer that no prompt holds."""
    marker, token_id = ("<mask>", 4) if "gemma" in path.parent.name else ("<|endoftext|>", 537)
    edit_sidecar(path, tokens__injection_char=marker, tokens__injection_token_id=token_id)


def weights(change: Callable[[dict[str, torch.Tensor]], Any], file: str = "model.safetensors") -> Callable[[Path], None]:
    return lambda path: edit_weights(path, change=change, file=file)


def head(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    return weights(change, "value_head.safetensors")


def depth(by: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        config["num_hidden_layers"] += by
        types = config["layer_types"]
        config["layer_types"] = types[:by] if by < 0 else types + types[:by]
        (path / "config.json").write_text(json.dumps(config))

    return change


def replace_by(part: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        shutil.rmtree(path)
        shutil.copytree(path.parent / part, path)

    return change


def cut_file(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-100])


UP = "model.layers.1.mlp.up_proj.weight"
REFUSED = [
    Refusal("ar_as_av", "av", replace_by("nla-ar"), r"is an AR \(reconstructor\) checkpoint .*given as the AV"),
    Refusal(
        "ar_as_av_with_scale",
        "av",
        lambda p: (replace_by("nla-ar")(p), edit_sidecar(p, extraction__injection_scale=24.0)),
        "is an AR",
    ),
    Refusal("av_as_ar", "ar", replace_by("nla-av"), r"is an AV \(verbalizer\) checkpoint .*given as the AR"),
    Refusal("base_as_av", "av", replace_by("base"), r"no nla_meta.yaml: it looks like a plain language model, not an AV"),
    Refusal("base_as_ar", "ar", replace_by("base"), r"no nla_meta.yaml: it looks like a plain language model, not an AR"),
    Refusal("role_unknown", "av", side(role="reader"), r"role='reader'; expected one of av, actor, ar, critic"),
    Refusal(
        "ar_as_av_without_role",
        "av",
        lambda p: (replace_by("nla-ar")(p), edit_sidecar(p, role=...)),
        r"holds value_head.safetensors\), given as the AV",
    ),
    Refusal("no_sidecar", "av", lambda p: (p / "nla_meta.yaml").unlink(), r"has no nla_meta.yaml"),
    Refusal("sidecar_broken", "av", lambda p: (p / "nla_meta.yaml").write_text("kind: [nla"), r"cannot be read as YAML"),
    Refusal("sidecar_a_list", "av", lambda p: (p / "nla_meta.yaml").write_text("- 1"), r"holds a list"),
    Refusal("kind_other", "av", side(kind="other"), r"kind='other', expected 'nla_model'"),
    Refusal("kind_dataset", "ar", side(kind="nla_dataset"), r"kind='nla_dataset', expected 'nla_model'"),
    Refusal("no_head", "ar", lambda p: (p / "value_head.safetensors").unlink(), r"has no value_head.safetensors"),
    Refusal(
        "head_key",
        "ar",
        head(lambda s: s.update({"value_head.weight": s.pop("weight")})),
        r"value_head.weight; expected exactly one",
    ),
    Refusal("head_bias", "ar", head(lambda s: s.update(bias=torch.zeros(64))), r"bias, weight; expected exactly one"),
    Refusal("head_half", "ar", head(lambda s: s.update(weight=s["weight"][:, :32])), r"shape \[64, 32\]; expected .*\[64, 64\]"),
    Refusal("head_integers", "ar", head(lambda s: s.update(weight=s["weight"].int())), r"weight is I32"),
    Refusal("head_cut_off", "ar", cut_file("value_head.safetensors"), r"not a whole safetensors file.*cut off"),
    Refusal("ar_block_short", "ar", depth(-1), r"needs \d blocks"),
    Refusal("ar_block_more", "ar", depth(1), r"needs \d blocks"),
    Refusal("av_depth_short", "av", depth(-1), r"has unexpected model\.layers\.[0-9]\."),
    Refusal("av_depth_more", "av", depth(1), r"it lacks model\.layers\.[0-9]\."),
    Refusal("ar_layer_less_1", "ar", lambda p: shift_layers(p, -1), r"needs \d blocks"),
    Refusal(
        "ar_layers_disagree",
        "ar",
        side(critic__extraction_layer_index=1),
        r"names different layers: .*critic.extraction_layer_index=1",
    ),
    Refusal("av_layers_disagree", "av", side(layer=0), r"names different layers"),
    Refusal("av_layer_elsewhere", "av", side(extraction__layer_index=0), r"names different layers: .*extraction.layer_index=0"),
    Refusal("ar_layer_elsewhere", "ar", side(training__layer_index=0), r"names different layers: .*training.layer_index=0"),
    Refusal("two_widths", "ar", side(extraction__d_model=32), r"d_model=64 and extraction.d_model=32"),
    Refusal("two_bases", "av", side(base_model="other/model"), r"different base models: .*base_model='other/model'"),
    Refusal(
        "two_templates",
        "av",
        side(prompt_templates__actor="Another <x>{injection_char}</x>."),
        r"av and .*actor, which differ",
    ),
    Refusal("schema_version_3", "ar", side(schema_version=3), r"schema_version=3, expected 1 or 2"),
    Refusal("av_layer_beyond", "av", side(extraction_layer_index=9), r"is of layer 9"),
    Refusal("layer_no_number", "av", side(extraction_layer_index="two"), r"extraction_layer_index='two'"),
    Refusal("av_lacks_tensor", "av", weights(lambda s: s.pop(UP)), rf"it lacks {UP}"),
    Refusal("ar_lacks_tensor", "ar", weights(lambda s: s.pop(UP)), r"it lacks layers\.1\.mlp\.up_proj\.weight"),
    Refusal(
        "av_extra_block",
        "av",
        weights(lambda s: s.update({UP.replace(".1.", ".6."): s[UP]})),
        r"has unexpected model\.layers\.6\.mlp",
    ),
    Refusal(
        "ar_extra_block",
        "ar",
        weights(lambda s: s.update({UP.replace(".1.", ".4."): s[UP]})),
        r"has unexpected model\.layers\.4\.mlp",
    ),
    Refusal("two_spellings", "av", weights(lambda s: s.update({"language_model." + UP: s[UP]})), r"under two spellings"),
    Refusal("weights_cut_off", "av", cut_file("model.safetensors"), r"not a whole safetensors file.*cut off"),
    Refusal(
        "weights_garbage",
        "av",
        lambda p: (p / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage!"),
        r"not a whole safetensors",
    ),
    Refusal("weights_empty", "av", lambda p: (p / "model.safetensors").write_bytes(b""), r"not a whole safetensors"),
    Refusal("no_weights", "ar", lambda p: (p / "model.safetensors").unlink(), r"neither model.safetensors nor"),
    Refusal("no_config", "ar", lambda p: (p / "config.json").unlink(), r"has no config.json"),
    Refusal("scale_absent", "av", side(extraction__injection_scale=...), r"no extraction.injection_scale"),
    Refusal("scale_null", "av", side(extraction__injection_scale=None), r"no extraction.injection_scale"),
    Refusal("scale_raw", "av", side(extraction__injection_scale="raw"), r"no extraction.injection_scale"),
    Refusal("scale_zero", "av", side(extraction__injection_scale=0), r"injection_scale=0.0, expected a finite number > 0"),
    Refusal("scale_negative", "av", side(extraction__injection_scale=-24.0), r"expected a finite number > 0"),
    Refusal("scale_nan", "av", side(extraction__injection_scale=float("nan")), r"expected a finite number > 0"),
    Refusal("scale_infinite", "av", side(extraction__injection_scale=float("inf")), r"expected a finite number > 0"),
    Refusal("scale_words", "av", side(extraction__injection_scale="large"), r"injection_scale='large', expected a number"),
    Refusal("mse_scale_null", "ar", side(extraction__mse_scale=None), r"mse_scale null"),
    Refusal("mse_scale_zero", "ar", side(extraction__mse_scale=0), r"expected a finite number > 0"),
    Refusal("av_d_model", "av", side(d_model=32), r"d_model=32, but .* hidden_size=64"),
    Refusal("ar_d_model", "ar", side(d_model=128), r"d_model=128, but .* hidden_size=64"),
    Refusal("no_d_model", "ar", side(d_model=...), r"does not say d_model"),
    Refusal("av_no_marker", "av", side(prompt_templates__av="Describe it."), r"0 places for the marker"),
    Refusal("av_two_markers", "av", side(prompt_templates__av="{injection_char} {injection_char}"), r"2 places for the marker"),
    Refusal("av_no_template", "av", side(prompt_templates={}), r"lacks prompt_templates.av"),
    Refusal("av_no_tokens", "av", side(tokens=...), r"lacks tokens.injection_char, tokens.injection_token_id"),
    Refusal("av_marker_id_text", "av", side(tokens__injection_token_id="536"), r"injection_token_id='536'"),
    Refusal("ar_no_explanation", "ar", side(prompt_templates__ar="Summary: <text></text>"), r"0 places for the explanation"),
    Refusal("ar_no_template", "ar", side(prompt_templates={"av": "{injection_char}"}), r"lacks prompt_templates.ar"),
    Refusal("ar_suffix_text", "ar", side(tokens__critic_suffix_ids="1 2"), r"expected a list of token ids"),
]


def shift_layers(path: Path, by: int) -> None:
    meta = yaml.safe_load((path / "nla_meta.yaml").read_text())
    layer = meta["extraction_layer_index"] + by
    edit_sidecar(path, extraction_layer_index=layer, critic__extraction_layer_index=layer)


def copied(case: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / case, tmp_path / case))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("refusal", REFUSED, ids=lambda r: r.name)
def test_inspect_of_a_changed_checkpoint_says_what_is_wrong(case: str, refusal: Refusal, tmp_path: Path) -> None:
    path = copied(case, tmp_path) / PART[refusal.role]
    inspect_nla(path, refusal.role)
    refusal.change(path)
    with pytest.raises(CheckpointError, match=refusal.message) as raised:
        inspect_nla(path, refusal.role)
    assert "\n" not in str(raised.value) and str(path.parent) in str(raised.value)


ACCEPTED = {
    "role_absent": ("av", side(role=...)),
    "ar_role_absent": ("ar", side(role=...)),
    "d_model_under_extraction": ("av", side(d_model=..., extraction__d_model=64)),
    "ar_d_model_under_extraction": ("ar", side(d_model=..., extraction__d_model=64)),
    "no_neighbour_ids": (
        "av",
        side(tokens__injection_left_neighbor_id=..., tokens__injection_right_neighbor_id=...),
    ),
    "one_neighbour_id": ("av", side(tokens__injection_left_neighbor_id=...)),
    "marker_of_many_characters": ("av", special_marker),
    "role_actor": ("av", side(role="actor")),
    "role_critic": ("ar", side(role="critic")),
    "ar_scale_null": ("ar", side(extraction__injection_scale=None)),
    "ar_scale_number": ("ar", side(extraction__injection_scale=150.0)),
    "mse_scale_absent": ("ar", side(extraction__mse_scale=...)),
    "scale_text_number": ("av", side(extraction__injection_scale="24.0")),
    "scale_sentinel": ("av", side(extraction__injection_scale="sqrt_d_model")),
    "av_without_layer": ("av", side(extraction_layer_index=...)),
    "ar_without_layer": ("ar", side(extraction_layer_index=..., critic=...)),
    "template_actor": ("av", side(prompt_templates={"actor": "<concept>{injection_char}</concept>"})),
    "template_critic": ("ar", side(prompt_templates={"critic": "<text>{explanation}</text> <summary>"})),
    "ar_with_final_norm": ("ar", weights(lambda s: s.update({"model.norm.weight": torch.ones(64)}))),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ACCEPTED)
def test_inspect_accepts_what_was_published(case: str, name: str, tmp_path: Path) -> None:
    role, change = ACCEPTED[name]
    path = copied(case, tmp_path) / PART[role]
    change(path)
    assert inspect_nla(path, role).role == role  # type: ignore[arg-type]


NOTED = {  # of those above, what is noted of each
    "role_absent": ("checkpoint", "states no role. It was given as the AV"),
    "ar_role_absent": ("checkpoint", "states no role. It was given as the AR"),
    "d_model_under_extraction": ("checkpoint", "d_model under `extraction` only"),
    "ar_d_model_under_extraction": ("checkpoint", "d_model under `extraction` only"),
    "no_neighbour_ids": ("prompt", "lacks tokens.injection_left_neighbor_id and tokens.injection_right_neighbor_id"),
    "one_neighbour_id": ("prompt", "lacks tokens.injection_left_neighbor_id,"),
    "marker_of_many_characters": ("prompt", "has the marker '<|endoftext|>' of 13 characters"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_inspect_notes_what_a_check_lacks_and_nothing_of_an_ordinary_sidecar(name: str, tmp_path: Path) -> None:
    role, change = ACCEPTED[name]
    path = copied("qwen2_text", tmp_path) / PART[role]
    change(path)
    notes = inspect_nla(path, role).notes  # type: ignore[arg-type]
    assert len(notes) == (name in NOTED)
    for note in notes:
        about, text = NOTED[name]
        assert note.about == about and text in note.text and note.text.endswith(".")


@pytest.mark.parametrize(
    "key",
    [
        "critic.extraction_layer_index",
        "critic.num_hidden_layers",
        "ar.num_hidden_layers",
        "extraction_layer_index",
        "layer",
        "extraction.layer_index",
        "extraction.extraction_layer_index",
        "layer_index",
        "av.layer_index",
        "training.layer",
    ],
)
@pytest.mark.parametrize("role", ["av", "ar"])
def test_layer_is_read_under_each_of_its_spellings(key: str, role: Any, tmp_path: Path) -> None:
    path = copied("qwen2_text", tmp_path) / PART[role]
    edit_sidecar(path, extraction_layer_index=..., critic=...)
    edit_sidecar(path, **{key.replace(".", "__"): 2})
    assert inspect_nla(path, role).layer == 2


def test_inspect_reads_the_fixture_values() -> None:
    info = inspect_nla(FIXTURES / "gemma3_text" / "nla-ar", "ar")
    said = info.sidecar
    assert (info.layer, info.num_layers, info.d_model, said.mse_scale, said.marker_id) == (3, 4, 64, 8.0, 366)
    assert said.suffix_ids == (448, 295, 434, 520, 295) and said.base_checkpoint == "tiny-fixture/gemma3-text-base"
    assert info.ar_prompting.affixes == ("Summary of the following text: <text>", "</text> <summary>")


def test_sharded_weights_are_read_and_a_missing_shard_is_refused(tmp_path: Path) -> None:
    path = copied("qwen2_text", tmp_path) / "nla-av"
    names = list(inspect_nla(path, "av").tensors)
    from safetensors.torch import load_file, save_file

    state, weight_map = load_file(path / "model.safetensors"), {}
    for shard, part in enumerate((names[:20], names[20:])):
        file = f"model-{shard}.safetensors"
        save_file({name: state[name] for name in part}, path / file)
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert set(inspect_nla(path, "av").tensors) == set(names)
    (path / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lists model-1.safetensors, which is not in"):
        inspect_nla(path, "av")


def test_inspect_of_a_file_or_of_nothing_says_what_was_expected(tmp_path: Path) -> None:
    file = tmp_path / "tae.pt"
    file.write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"expected an AV directory .* autoencoder\.checkpoint"):
        inspect_nla(file, "av")
    with pytest.raises(CheckpointError, match="no AV checkpoint at"):
        inspect_nla(tmp_path / "nothing", "av")


# --- pairs ---


def fixture_pair(tmp_path: Path, case: str = "qwen2_text") -> tuple[Path, Path]:
    directory = copied(case, tmp_path)
    return directory / "nla-av", directory / "nla-ar"


def checked(av: Path, ar: Path, *args: Any, **kwargs: Any) -> tuple[Note, ...]:
    return check_pair(inspect_nla(av, "av"), inspect_nla(ar, "ar"), *args, **kwargs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"base_checkpoint": "other/model"},
            r"base model is 'tiny-fixture/qwen2-text-base' in the AV and 'other/model' in the AR",
        ),
    ],
)
def test_check_pair_of_halves_that_differ_in_one_value_refuses(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    av, ar = fixture_pair(tmp_path)
    checked(av, ar)
    edit_sidecar(ar, **changes)
    with pytest.raises(CheckpointError, match=message):
        checked(av, ar)


def test_ar_of_another_pair_over_the_same_base_is_noted_for_its_marker(tmp_path: Path) -> None:
    """An AR never sees the AV's marker, so that another group's AR may judge its explanations."""
    av, ar = fixture_pair(tmp_path)
    edit_sidecar(ar, tokens__injection_char="x", tokens__injection_token_id=77)
    [note] = checked(av, ar)
    assert "different markers" in note.text


def test_check_pair_of_another_layer_width_or_family_refuses(tmp_path: Path) -> None:
    av, _ = fixture_pair(tmp_path)
    with pytest.raises(CheckpointError, match="do not belong together: layer is 2 in the AV and 3 in the AR"):
        checked(av, FIXTURES / "gemma3_text" / "nla-ar")
    narrow = make_pair(tmp_path / "narrow", "qwen2", layer=2)
    with pytest.raises(CheckpointError, match="d_model is 64 in the AV and 32 in the AR"):
        checked(av, narrow.ar)


def test_check_pair_of_activations_compares_layer_width_and_base(tmp_path: Path) -> None:
    av, ar = fixture_pair(tmp_path)
    checked(av, ar, 2, 64, "tiny-fixture/qwen2-text-base@main")
    checked(av, ar, 2, 64, "a-mirror/Qwen2-text-base")
    checked(av, ar, 2, 64, str(FIXTURES / "qwen2_text" / "base"))
    with pytest.raises(DataError, match=r"activations are of layer 1, but .* layer 2"):
        checked(av, ar, 1)
    with pytest.raises(DataError, match="have 32 dimensions"):
        checked(av, ar, 2, 32)


def test_check_pair_notes_that_the_activations_are_of_another_model_by_name(tmp_path: Path) -> None:
    """A fine-tune of the base is a use of a pair like another."""
    av, ar = fixture_pair(tmp_path)
    assert checked(av, ar, activations_base="tiny-fixture/qwen2-text-base") == ()
    [note] = checked(av, ar, activations_base="someone/qwen2-text-base-dpo")
    assert note.about == "base model"
    assert note.text == (
        "The activations come from someone/qwen2-text-base-dpo, but the pair was trained on tiny-fixture/qwen2-text-base."
    )


@pytest.mark.parametrize("place", ["Qwen2-text-base", "hub/models--tiny-fixture--qwen2-text-base/snapshots/0123"])
def test_check_pair_believes_a_directory_that_is_named_after_the_base(tmp_path: Path, place: str) -> None:
    av, ar = fixture_pair(tmp_path)
    model = shutil.copytree(FIXTURES / "qwen2_text" / "base", tmp_path / place)
    assert checked(av, ar, activations_base=str(model)) == ()


BELOW_THE_BASE = [
    "runs/qwen2-text-base/sft-step-300", "out/Qwen2-text-base/merged_lora/final", "qwen2-text-base/snapshots/0123",
    "models--tiny-fixture--qwen2-text-base/snapshots/0123/merged", "models--tiny-fixture--qwen2-text-base/0123",
    "models--someone--qwen2-text-base-dpo/snapshots/0123",
]  # fmt: skip


@pytest.mark.parametrize("place", BELOW_THE_BASE)
def test_check_pair_notes_a_directory_below_one_that_is_named_after_the_base(tmp_path: Path, place: str) -> None:
    """A fine-tune lies below the name of its base in the commonest layouts."""
    av, ar = fixture_pair(tmp_path)
    model = shutil.copytree(FIXTURES / "qwen2_text" / "base", tmp_path / place)
    [note] = checked(av, ar, activations_base=str(model))
    assert note.text.startswith(f"Could not verify that {model} is tiny-fixture/qwen2-text-base: ")


def test_check_pair_compares_a_directory_by_its_config(tmp_path: Path) -> None:
    av, ar = fixture_pair(tmp_path)
    model = Path(shutil.copytree(FIXTURES / "qwen2_text" / "base", tmp_path / "fine-tune"))
    [note] = checked(av, ar, activations_base=str(model))
    assert note.about == "base model" and note.text.startswith(f"Could not verify that {model} is tiny-fixture/qwen2-text-base: ")
    config = json.loads((model / "config.json").read_text())
    others = {"hidden_size": 128, "num_hidden_layers": config["num_hidden_layers"] + 1, "model_type": "llama"}
    for key, value in others.items():
        (model / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(DataError, match=rf"config.json says {key}={value}; AV .* {key}={config[key]}"):
            checked(av, ar, activations_base=str(model))


def test_check_pair_says_nothing_of_the_base_that_the_adapters_lie_over(adapters: TinyPair) -> None:
    assert checked(adapters.av, adapters.ar, activations_base=str(adapters.base)) == ()


def test_check_pair_ignores_local_paths_left_by_training(tmp_path: Path) -> None:
    av, ar = fixture_pair(tmp_path)
    edit_sidecar(av, base_checkpoint="/checkpoints/sft-av")
    checked(av, ar)


# --- adapters and digests ---


@pytest.fixture
def adapters(tmp_path: Path) -> TinyPair:
    return make_pair(tmp_path / "tiny", "qwen2", adapters=True)


def test_adapters_take_depth_and_width_from_the_base(adapters: TinyPair) -> None:
    av, ar = inspect_nla(adapters.av, "av"), inspect_nla(adapters.ar, "ar")
    assert (av.is_adapter, av.num_layers, ar.num_layers, ar.base) == (True, 3, 2, adapters.base.resolve())
    check_pair(av, ar)


def test_adapter_base_argument_goes_before_the_configuration(adapters: TinyPair, tmp_path: Path) -> None:
    moved = adapters.base.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"over a base model that cannot be found .*Set autoencoder.base"):
        inspect_nla(adapters.av, "av")
    assert inspect_nla(adapters.av, "av", base=str(moved)).base == moved.resolve()


def test_adapter_over_other_base_weights_is_refused_by_digest(adapters: TinyPair, tmp_path: Path) -> None:
    import hashlib

    sha = hashlib.sha256((adapters.base / "model.safetensors").read_bytes()).hexdigest()
    for path in (adapters.av, adapters.ar):
        edit_sidecar(path, base_digest=f"sha256:{sha}")
    av, ar = inspect_nla(adapters.av, "av"), inspect_nla(adapters.ar, "ar")
    assert check_pair(av, ar, activations_base=str(adapters.base)) == ()
    other = make_pair(tmp_path / "other", "qwen2", seed=7).base
    [note] = check_pair(av, ar, activations_base=str(other))
    assert note.about == "base model" and "weights are not those" in note.text and sha in note.text
    with pytest.raises(CheckpointError, match="was trained over other base weights"):
        inspect_nla(adapters.av, "av", base=str(other))
    (other / "model.safetensors").rename(other / "weights.safetensors")
    with pytest.raises(CheckpointError, match="has no such single file"):
        inspect_nla(adapters.av, "av", base=str(other))


def test_adapters_over_two_bases_do_not_belong_together(adapters: TinyPair, tmp_path: Path) -> None:
    same = shutil.copytree(adapters.base, tmp_path / "same")
    other = make_pair(tmp_path / "other", "qwen2", seed=7).base
    av = inspect_nla(adapters.av, "av")
    check_pair(av, inspect_nla(adapters.ar, "ar", base=str(same)))
    with pytest.raises(CheckpointError, match="digest of the base model"):
        check_pair(av, inspect_nla(adapters.ar, "ar", base=str(other)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: (p.ar / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
        (lambda p: shutil.copy(p.base / "model.safetensors", p.ar), "both full weights and adapter_config.json"),
        (lambda p: edit_sidecar(p.ar, extraction_layer_index=0), "blocks that are not used: .*layers.1"),
        (lambda p: edit_sidecar(p.ar, extraction_layer_index=3), "is of layer 3, but its model has 3 blocks"),
        (lambda p: edit_sidecar(p.ar, extraction_layer_index=...), "names no layer"),
        (lambda p: (p.ar / "adapter_config.json").write_text("{}"), "names no base model"),
        (lambda p: (p.ar / "adapter_config.json").write_text("{"), "not valid JSON"),
        (lambda p: edit_weights(p.base, change=lambda s: s.pop(UP)), rf"base do not fit .* lacks {UP}"),
    ],
)
def test_inspect_of_a_changed_adapter_says_what_is_wrong(adapters: TinyPair, change: Any, message: str) -> None:
    change(adapters)
    with pytest.raises(CheckpointError, match=message):
        inspect_nla(adapters.ar, "ar")


def test_digest_follows_the_content_of_checkpoint_and_base(adapters: TinyPair, tmp_path: Path) -> None:
    before = digest_nla(inspect_nla(adapters.av, "av"))
    (adapters.av / "README.md").write_text("words")
    moved = adapters.base.rename(tmp_path / "moved")
    assert digest_nla(inspect_nla(adapters.av, "av", base=str(moved))) == before
    edit_weights(moved, change=lambda s: s[UP].add_(1))
    changed = digest_nla(inspect_nla(adapters.av, "av", base=str(moved)))
    edit_sidecar(adapters.av, extraction__injection_scale=21.0)
    assert len({before, changed, digest_nla(inspect_nla(adapters.av, "av", base=str(moved)))}) == 3
    full = FIXTURES / "qwen2_text" / "nla-av"
    assert digest_nla(inspect_nla(full, "av")) == hub.content_digest(full)


def test_checkpoint_module_needs_neither_torch_nor_numpy() -> None:
    asked = "[m for m in ('torch', 'transformers', 'numpy') if m in sys.modules]"
    code = f"import sys, ksweep.autoencoder.nla.checkpoint; print({asked})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert out.stdout.strip() == "[]"
