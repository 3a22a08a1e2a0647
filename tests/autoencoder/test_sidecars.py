"""Keys of nla_meta.yaml that say how vectors, prompts or readings are made: understood, or refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from ksweep.autoencoder.nla.checkpoint import inspect_nla
from ksweep.autoencoder.nla.sidecar import read_nla_sidecar
from ksweep.utils.errors import CheckpointError
from tests.tiny_models import FIXTURES, edit_sidecar

Role = Literal["av", "ar"]
ROLES: tuple[Role, Role] = ("av", "ar")
WHITENED = {"method": "whitened_zca_v1", "stats_path": "whitening_stats.npz", "stats_sha256": "0" * 64, "n_samples": 1000}


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "qwen2_text", tmp_path / "pair"))


def refused(path: Path, role: Role) -> str:
    with pytest.raises(CheckpointError) as raised:
        inspect_nla(path, role)
    message = str(raised.value)
    assert "\n" not in message and str(path / "nla_meta.yaml") in message and len(message) < 1500
    return message


REFUSED: list[tuple[dict[str, Any], str]] = [
    # how vectors were made
    ({"extraction__norm": "whitened_zca_v1"}, "extraction.norm='whitened_zca_v1'"),
    ({"norm": "unit"}, "norm='unit'"),
    ({"extraction__whitening": WHITENED}, "extraction.whitening={'method': 'whitened_zca_v1'"),
    ({"whitening": True}, "whitening=True"),
    ({"whitened": "zca"}, "whitened='zca'"),
    ({"training__pca_whiten": True}, "training.pca_whiten=True"),
    ({"training__mean_subtract": True}, "training.mean_subtract=True"),
    ({"provenance": {"vectors": {"whitening": WHITENED}}}, "provenance.vectors.whitening="),
    ({"extraction__normalization": "l2"}, "extraction.normalization='l2'"),
    ({"extraction__centered": True}, "extraction.centered=True"),
    ({"training__normalize_activations": True}, "training.normalize_activations=True"),
    ({"training__l2_normalized": True}, "training.l2_normalized=True"),
    # several checkpoints, layers or depths in one
    ({"variant": "universal"}, "variant='universal'"),
    ({"checkpoints": ["a", "b"]}, "checkpoints=['a', 'b']"),
    ({"extraction__checkpoints": {"20": "av"}}, "extraction.checkpoints="),
    ({"depth_percentages": [10, 40, 70]}, "depth_percentages=[10, 40, 70]"),
    ({"layers": [1, 2]}, "layers=[1, 2]"),
    ({"critic__layers": [1, 2]}, "critic.layers=[1, 2]"),
    ({"provenance": {"extractor": {"layer_index": 1}}}, "provenance.extractor.layer_index=1"),
    ({"layer_idx": 1}, "layer_idx=1"),
    # how the prompt is built
    ({"actor_reasoning_mode": "forced_final"}, "actor_reasoning_mode='forced_final'"),
    ({"training__actor_reasoning_mode": "forced_final"}, "training.actor_reasoning_mode='forced_final'"),
    ({"enable_thinking": False}, "enable_thinking=False"),
    ({"enableThinking": False}, "enableThinking=False"),
    ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs.enable_thinking=False"),
    ({"training__chat_template_kwargs": {"enable_thinking": False}}, "training.chat_template_kwargs.enable_thinking=False"),
    ({"chat": {"thinking": False}}, "chat.thinking=False"),
    ({"chat_template_kwargs": {"add_day": "monday"}}, "chat_template_kwargs.add_day='monday'"),
    ({"training__chat_template": False}, "training.chat_template=False"),
    ({"chat_template": "{{ messages }}"}, "chat_template='{{ messages }}'"),
    ({"prefill": "<explanation>"}, "prefill='<explanation>'"),
    ({"tokens__assistant_prefill": "- "}, "tokens.assistant_prefill='- '"),
    ({"prompt_templates__prefill": "<explanation>"}, "prompt_templates.prefill='<explanation>'"),
    ({"prompt_templates__system": "You are an AV."}, "prompt_templates.system='You are an AV.'"),
    ({"system_prompt": "You are an AV."}, "system_prompt='You are an AV.'"),
    ({"add_bos": False}, "add_bos=False"),
    ({"training__response_prefix": "- "}, "training.response_prefix='- '"),
    ({"training__nothink": True}, "training.nothink=True"),
    # how a vector gets in, where a reading is taken
    ({"injection_mode": "add"}, "injection_mode='add'"),
    ({"extraction__injection_layer": 1}, "extraction.injection_layer=1"),
    ({"training__injection_mode": "raw"}, "training.injection_mode='raw'"),
    ({"training__injection_scale": 7.5}, "training.injection_scale=7.5"),
    ({"injection": {"site": "block_1"}}, "injection.site='block_1'"),
    ({"tokens__n_slots": 2}, "tokens.n_slots=2"),
    ({"tokens__second_marker": "x"}, "tokens.second_marker='x'"),
    ({"critic__final_norm": "kept"}, "critic.final_norm='kept'"),
    ({"critic__summary_token_id": 7}, "critic.summary_token_id=7"),
    # keys that nobody knows
    ({"colour": "blue"}, "colour='blue', a key that is not known"),
    ({"tokens__smell": 1}, "tokens.smell=1, a key that is not known"),
    ({"critic__depth": {"a": 1}}, "critic.depth={'a': 1}"),
    ({"extraction__position": "last"}, "extraction.position='last', which says how"),
    ({"extraction__method": "mean_pool"}, "extraction.method='mean_pool', a key that is not known"),
    ({"scaled_by": 2.0}, "scaled_by=2.0, which says how"),
    ({"critic__version": 2}, "critic.version=2, a key that is not known"),
    ({"extraction__layerIndex": 0}, "extraction.layerIndex=0, a key that is not known"),
    ({"provenance": {"made": [{"hook_point": "mlp"}]}}, "provenance.made.hook_point='mlp'"),
    ({"tokens": ["x"]}, "tokens=['x'], expected keys and values"),
]  # fmt: skip


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("changes", "says"), REFUSED, ids=[says.partition("=")[0] for _, says in REFUSED])
def test_key_that_changes_numbers_is_refused_by_name(changes: dict[str, Any], says: str, role: Role, pair: Path) -> None:
    edit_sidecar(pair / f"nla-{role}", **changes)
    assert says in refused(pair / f"nla-{role}", role)


CHANGING: dict[str, Any] = {
    # vectors
    "zca": True, "mean_center": True, "mean_centered": True, "demean": True, "remove_mean": True, "l2norm": True, "normed": True,
    "layernorm": True, "layer_norm": True, "rms_norm": True, "norm_activations": True, "input_norm": "l2",
    "activation_transform": "pca",
    "preprocessing": "center", "affine": {"a": 1}, "activation_scale": 2.0, "rescale": 2.0, "clip_norm": 1.0, "zcaMode": "x",
    "subtract_baseline": True, "activation_scaling": "mean", "vector_preprocessing": "x", "removed_mean": True, "rescaled": True,
    # where a reading is taken
    "site": "attn_out", "module": "mlp", "component": "attn", "target": "mlp_out", "tap": "pre", "pooling": "mean",
    "readout": "mean",
    "read_position": 3, "token_position": "first", "position": "mean", "read_layer": 5, "output_layer": 5, "num_vectors": 4,
    "hook_point": "resid_pre", "activation_site": "mlp_out",
    # prompts
    "system": "You are", "instruction": "Describe.", "conversation": "vicuna", "format": "chatml", "concept_tag": "vec",
    "open_tag": "<a>", "stop_strings": ["x"], "add_special_tokens": False, "cot": True, "mode": "reasoning",
    # heads
    "head_type": "mlp", "head_bias": True,
}  # fmt: skip
PLACES: dict[str, Any] = {
    "at the top": lambda key, value: {key: value},
    "below training": lambda key, value: {"training": {"injection_mode": "normalize", key: value}},
    "below provenance": lambda key, value: {"provenance": {"made": [{key: value}]}},
    "of a parent": lambda key, value: {"parent_checkpoints": [{"extraction": {key: value}}]},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("key", CHANGING)
def test_key_that_changes_numbers_passes_nowhere(key: str, place: str, pair: Path) -> None:
    for role in ROLES:
        edit_sidecar(pair / f"nla-{role}", **PLACES[place](key, CHANGING[key]))
        assert f"{key}=" in refused(pair / f"nla-{role}", role)


@pytest.mark.parametrize("section", ["parent_datasets", "trained_on", "parent_dataset", "role_aliases"])
def test_whitened_parents_are_refused(section: str, pair: Path) -> None:
    for made in ({"norm": "whitened_zca_v1"}, {"whitening": WHITENED}):
        edit_sidecar(pair / "nla-av", **{section: [{"extraction": made}, "words"]})
        assert f"{section}.extraction.{next(iter(made))}=" in refused(pair / "nla-av", "av")


@pytest.mark.parametrize("key", ["refine_steps", "diffusion_steps", "denoising_steps", "use_score", "hidden_time"])
def test_name_that_only_ends_like_a_result_is_not_known(key: str, pair: Path) -> None:
    edit_sidecar(pair / "nla-av", **{key: 3})
    assert f"{key}=3, a key that is not known" in refused(pair / "nla-av", "av")


@pytest.mark.parametrize(
    "said", [{"training": {"extraction": {"layer": 5}}}, {"training_data": {"layer": 5}}, {"provenance": {"layerIndex": 5}}]
)
def test_layer_that_disagrees_is_refused_wherever_it_stands(said: dict[str, Any], pair: Path) -> None:
    edit_sidecar(pair / "nla-ar", **said)
    assert "names different layers" in refused(pair / "nla-ar", "ar")


def test_hidden_size_must_equal_the_width(pair: Path) -> None:
    width = inspect_nla(pair / "nla-av", "av").d_model
    edit_sidecar(pair / "nla-av", hidden_size=width)
    assert inspect_nla(pair / "nla-av", "av").d_model == width
    edit_sidecar(pair / "nla-av", hidden_size=width + 1)
    assert f"d_model={width} and hidden_size={width + 1}" in refused(pair / "nla-av", "av")


@pytest.mark.parametrize("left", ["outputs/run3", "checkpoints/sft_av", "my_runs/a", "someone/step-300"])
def test_directory_of_training_beside_the_base_is_noted(left: str, pair: Path) -> None:
    base = inspect_nla(pair / "nla-av", "av").sidecar.base_checkpoint
    edit_sidecar(pair / "nla-av", base_model=left)
    info = inspect_nla(pair / "nla-av", "av")
    [note] = info.notes
    assert note.about == "base model" and f"base_model='{left}', taken as a directory of its training" in note.text
    assert info.sidecar.base_checkpoint == base
    edit_sidecar(pair / "nla-av", base_model=base, base_checkpoint=left)
    assert inspect_nla(pair / "nla-av", "av").sidecar.base_checkpoint == base


ACCEPTED: dict[str, dict[str, Any]] = {
    "runs and hashes": {
        "wandb_id": "x", "job_id": 7, "slurm_job_id": 7, "sha256": "0", "checksum": "0", "uuid": "0", "repo": "a/b",
        "hf_repo": "a/b",
        "source": "web", "iteration": 4200, "kl_coef": 0.01, "group_size": 8, "held_out": 0.7, "heldout_fve_pct": 75.2,
        "nla_baseline_rawvar": 0.73, "shuffle_seed": 42, "splits": ["a"], "metrics": {"layer": 7}, "mean_baseline": 0.7,
    },
    "training options": {
        "training": {
            "injection_mode": "normalize", "max_grad_norm": 1.0, "grad_clip_norm": 1.0, "lora": {"target_modules": ["q"],
            "alpha": 4},
            "num_positions": 10, "rms_norm_eps": 1e-6, "num_heads": 4, "head_dim": 8, "preprocessing_num_workers": 4,
            "format": "parquet",
            "loss_scale": 2, "gradient_accumulation_steps": 4, "max_position_embeddings": 512, "num_layers": 28, "mode": "lora",
            "num_prompts": 8, "rescale_rewards": True,
        },
        "architecture": {"layer_norm_eps": 1e-5}, "site": "resid_post", "head_bias": False, "num_vectors": 1,
    },
    "raw vectors": {"extraction__norm": "none", "whitening": None, "extraction__whitening": False, "training__pca_whiten": False},
    "no norm": {"norm": None, "extraction__norm": "None"},
    "no variant": {"variant": "none", "depth_percentages": [], "checkpoints": None},
    "thinking as by default": {"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": True}, "prefill": ""},
    "a chat template": {"training__chat_template": True, "chat_template_kwargs": {}, "system_prompt": None},
    "a row that is replaced": {"training__injection_mode": "normalize", "injection_mode": "replace", "tokens__n_slots": 1},
    "the same value twice": {"training__injection_token_id": 536},
    "null": {"actor_reasoning_mode": None, "whatever": None, "critic": None},
    "the training code's": {
        "stage": "rl", "trained_on": ["web"], "parent_checkpoints": ["/checkpoints/sft"], "created_at": "2026-03-16T00:00:00",
        "created_by": "nla.train_actor.NLAFSDPActor", "git_commit": "abc1234", "role_aliases": {"actor": "av"},
        "training": {"rollout_id": 4199, "lr": 1.41e-05, "loss_type": "policy_loss", "global_batch_size": 1024, "num_layers": 28},
    },
    "nla-at-home's": {
        "n_layers": 28, "training": {
            "method": "full_ft_sft", "injection_mode": "normalize", "chat_template": True, "lora_r": 4, "lora_alpha": 8,
            "best_val_loss": 2.0, "best_val_cosine": 0.9, "n_train": 10, "description_file": "x.json", "mse_scale": 59.87,
            "corpus": "nla-at-home", "backbone_layers": 21, "normalize_mse": True,
        },
    },
    "a data set's": {
        "dataset_id": "base_x_L2_0", "row_count": 1000, "keep_debug_metadata": True, "parent_datasets": ["a", "b"],
        "api_summaries": {"model": "m", "max_tokens": 300, "temperature": 1.0, "instruction_prompt": "{text}"},
        "extraction__corpus": "web", "extraction__corpus_slice": {"start": 0, "length": 10}, "extraction__positions_per_doc": 10,
    },
    "losses and dates": {
        "final_loss": 0.3, "eval_fve": 0.75, "fve_nrm": 0.75, "best_step": 4200, "wandb_run": "x", "release_date": "2026-04-01",
        "license": "mit", "description": "An AV.", "transformers_version": "4.57.1", "training_steps": 4200, "notes": ["a", "b"],
        "best_val_cosine": 0.9, "commit": "abc", "base_commit": "abc", "created_on": "2026-03-16", "num_tokens": 1e9, "loss": 0.2,
        "training": {"held_out_loss": {"text": 3.9, "shuffled": 5.6}, "grad_norm": 1.0, "optimizer": {"name": "adamw"}},
    },
}  # fmt: skip


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", ACCEPTED)
def test_key_that_informs_or_asks_for_what_is_done_is_accepted_without_a_word(name: str, role: Role, pair: Path) -> None:
    before = inspect_nla(pair / f"nla-{role}", role)
    edit_sidecar(pair / f"nla-{role}", **ACCEPTED[name])
    after = inspect_nla(pair / f"nla-{role}", role)
    assert (after.layer, after.d_model, after.notes) == (before.layer, before.d_model, ())
    assert after.sidecar.marker_id == before.sidecar.marker_id


FIELDS = [
    ("av", "av", "At depth {depth_pct}%: <c>{injection_char}</c>", "{depth_pct}"),
    ("av", "actor", "At depth {{depth_pct}}: <c>{injection_char}</c>", "{depth_pct}"),
    ("av", "av", "Of ${ model }: <c>{injection_char}</c>", "{ model }"),
    ("av", "av", "<c>{injection_char}</c> {explanation}", "{explanation}"),
    ("av", "ar", "From depth {depth}%: <text>{explanation}</text>", "{depth}"),
    ("ar", "ar", "From depth {depth}%: <text>{explanation}</text> <summary>", "{depth}"),
    ("ar", "critic", "<text>{explanation}</text> <summary>{injection_char}", "{injection_char}"),
    ("ar", "ar", "{0} <text>{explanation}</text>", "{0}"),
    ("ar", "ar", "<text>{explanation}</text> {layer!r:>3}", "{layer!r:>3}"),
    ("av", "av", "{} <c>{injection_char}</c>", "{}"),
    ("av", "av", "At {depth-pct}: <c>{injection_char}</c>", "{depth-pct}"),
    ("av", "av", "At {layer index}: <c>{injection_char}</c>", "{layer index}"),
    ("av", "av", "At <<depth>>: <c>{injection_char}</c>", "<<depth>>"),
    ("av", "av", "At [[layer]]: <c>{injection_char}</c>", "[[layer]]"),
    ("ar", "ar", "{} <text>{explanation}</text>", "{}"),
    ("ar", "ar", "{depth-pct} <text>{explanation}</text>", "{depth-pct}"),
    ("ar", "ar", "{layer index} <text>{explanation}</text>", "{layer index}"),
    ("ar", "av", "At {depth_pct}: <c>{injection_char}</c>", "{depth_pct}"),
]  # fmt: skip


@pytest.mark.parametrize(("role", "key", "template", "left"), FIELDS)
def test_field_left_over_in_a_template_is_refused_by_name(role: Role, key: str, template: str, left: str, pair: Path) -> None:
    path = pair / f"nla-{role}"
    templates = yaml.safe_load((path / "nla_meta.yaml").read_text())["prompt_templates"]
    templates.pop({"actor": "av", "critic": "ar"}.get(key, key), None)
    edit_sidecar(path, prompt_templates=templates | {key: template})
    assert f"prompt_templates.{key} has '{left}', a field that nothing fills in" in refused(path, role)


def test_braces_that_are_no_field_stay_text(pair: Path) -> None:
    edit_sidecar(pair / "nla-av", prompt_templates__av='Answer as {"text": "..."}: <c>{injection_char}</c> [1] <a> {"}')
    template = '{{"depth": 1}} {{x}} <text>{explanation}</text>'
    edit_sidecar(pair / "nla-ar", prompt_templates__ar=template, tokens__critic_suffix_ids=...)
    assert inspect_nla(pair / "nla-av", "av").av_prompting.message.startswith('Answer as {"text": "..."}')
    before, after = inspect_nla(pair / "nla-ar", "ar").ar_prompting.affixes
    expected = '{{"depth": 1}} {{x}} <text>{explanation}</text>'.format(explanation="EXPLANATION")
    assert f"{before}EXPLANATION{after}" == expected


@pytest.mark.parametrize("end", ["<explanation>", "\n\n<explanation>\n", "<answer> "])
def test_template_that_ends_with_an_open_tag_is_refused(end: str, pair: Path) -> None:
    """The AV was trained to answer without the tag: every draw would be called failed."""
    edit_sidecar(pair / "nla-av", prompt_templates__av=f"<c>{{injection_char}}</c> Answer.{end}")
    assert f"ends with the open tag '{end.strip()}'" in refused(pair / "nla-av", "av")


@pytest.mark.parametrize(
    "end", ["<explanation>\n- ", "<explanation>Sure:", "<explanation>x</explanation> <explanation>\n1.", "<think>\nI"]
)
def test_template_that_begins_the_answer_is_refused(end: str, pair: Path) -> None:
    edit_sidecar(pair / "nla-av", prompt_templates__av=f"<c>{{injection_char}}</c> Answer.{end}")
    assert "ends with the open tag" in refused(pair / "nla-av", "av")


SPOKEN_OF = [
    "Within <explanation> tags: <c>{injection_char}</c> Go.", "<c>{injection_char}</c> Answer within <explanation> tags.",
    "<c>{injection_char}</c> Between <explanation> and </explanation>.", "<c>{injection_char}</c> Use `<explanation>` once.",
    "<c>{injection_char}</c> Begin with <explanation>.", "<c>{injection_char}</c> As in <explanation>words</explanation>.",
]  # fmt: skip


@pytest.mark.parametrize("template", SPOKEN_OF)
def test_template_that_only_speaks_of_the_tag_is_accepted(template: str, pair: Path) -> None:
    edit_sidecar(pair / "nla-av", prompt_templates__av=template)
    assert inspect_nla(pair / "nla-av", "av").sidecar.av_template == template


@pytest.mark.parametrize("method", ["lora_sft", "full_ft_sft"])
def test_av_of_a_trainer_that_injects_unnormalised_unless_it_says_otherwise_is_refused(method: str, pair: Path) -> None:
    edit_sidecar(pair / "nla-av", training={"method": method, "lr": 1e-5})
    assert f"training.method='{method}' and no training.injection_mode" in refused(pair / "nla-av", "av")


@pytest.mark.parametrize("changes", [{"role": ...}, {"schema_version": 1}], ids=["version 2", "a role"])
def test_sidecar_of_a_data_set_with_keys_of_a_model_is_refused(changes: dict[str, Any], pair: Path) -> None:
    edit_sidecar(pair / "nla-av", kind="nla_dataset", **changes)
    assert "the sidecar of a data set, which EasyNLA copies beside a checkpoint, has no role" in refused(pair / "nla-av", "av")


def test_every_sidecar_that_comes_with_the_library_is_read_without_a_note() -> None:
    import ksweep

    found = [*FIXTURES.rglob("nla_meta.yaml"), *(Path(ksweep.__file__).parent / "demo").rglob("nla_meta.yaml")]
    assert len(found) == 7
    for path in found:
        role: Role = "av" if path.parent.name.endswith("av") else "ar"
        assert read_nla_sidecar(path.parent, role).notes == ()


def test_mapping_that_holds_itself_is_read_to_an_end(pair: Path) -> None:
    file = pair / "nla-av" / "nla_meta.yaml"
    file.write_text(f"{file.read_text()}\nprovenance: &a\n  again: [*a, *a]\n  chat: &b\n    injection: *b\n    chat: *b\n")
    assert inspect_nla(pair / "nla-av", "av").layer == 2


# hostile files


def bomb(levels: int) -> str:
    """YAML of aliases that would be 10 ** levels strings if it were written out."""
    lines = ["x0: &x0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines)


ANY = ("whitening", "colour", "training", "extraction", "d_model", "kind", "role", "layer", "base_model", "chat")


@pytest.mark.parametrize("key", ANY)
def test_value_of_any_size_makes_a_short_message_or_none(key: str, pair: Path) -> None:
    file = pair / "nla-av" / "nla_meta.yaml"
    meta = {name: value for name, value in yaml.safe_load(file.read_text()).items() if name != key}
    own = yaml.safe_dump(meta, allow_unicode=True)
    inside = "{nested: *x29, deeper: [{again: *x29}]}" if key in ("training", "extraction") else "*x29"
    before = "parent_datasets:\n  " + bomb(30).replace("\n", "\n  ")
    file.write_text(f"{before}\n{own}{key}: {inside}\n")
    if key == "training":
        assert inspect_nla(pair / "nla-av", "av").layer == 2
    else:
        assert key in refused(pair / "nla-av", "av")


@pytest.mark.parametrize(
    "key", ["d_model", "layer", "tokens__injection_token_id", "extraction__injection_scale", "extraction__mse_scale"]
)
def test_number_beyond_all_sizes_is_refused_by_its_key(key: str, pair: Path) -> None:
    edit_sidecar(pair / "nla-av", **{key: int("f" * 3000, 16)})
    assert f"{key.replace('__', '.')}=" in refused(pair / "nla-av", "av")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kind: nla_model\nrole: av\n" + "x: " + "[" * 5000, "cannot be read as YAML"),
        ("kind: nla_model\ncreated_at: 2026-13-45\n", "cannot be read as YAML"),
        ("kind: nla_model\n# " + "x" * 2_000_000, "bytes, expected a sidecar of a few thousand"),
        ("kind: nla_model\nrole: av\n? [1, 2]\n: 3\n", "cannot be read as YAML|not known"),
        ("kind: nla_model\nrole: av\n7: 3\n", "has 7=3, a key that is not known"),
        ("kind: nla_model\nextraction:\n  norm: whitened\n  norm: none\n", "the key 'norm' occurs twice"),
        ("kind: nla_model\nrole: av\nwhitening: 0x" + "f" * 50_000, "whitening=a huge int"),
        ("kind: !!python/object/apply:os.system ['true']\n", "cannot be read as YAML"),
    ],
)  # fmt: skip
def test_damaged_or_hostile_yaml_is_refused_in_one_line(text: str, says: str, pair: Path) -> None:
    (pair / "nla-av" / "nla_meta.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=says):
        inspect_nla(pair / "nla-av", "av")
    refused(pair / "nla-av", "av")
