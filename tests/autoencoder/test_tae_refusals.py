"""TAE files that are damaged, hostile or contradict themselves: every change in tests/fixtures/tae/bad_inputs.json, and more."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from ksweep.autoencoder.tae.models import (
    Explanation,
    TaeReconstructor,
    TaeVerbalizer,
    digest_tae,
    highest_step,
    inspect_tae,
    is_tae,
    load_tae_reconstructor,
    load_tae_verbalizer,
)
from ksweep.utils.errors import CheckpointError, DataError, RequestError
from ksweep.utils.torch_file import read_checkpoint
from tests.autoencoder.test_tae_fixtures import FIXTURES, arrays, said
from tests.tiny_models import prefilled

BAD = json.loads((FIXTURES / "bad_inputs.json").read_text())


class Touch:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def copy_case(case: str, directory: Path) -> Path:
    """A case of its own to damage; returns its checkpoint."""
    target = directory / case
    target.mkdir(parents=True)
    (target / "base").symlink_to(FIXTURES / case / "base")
    return Path(shutil.copyfile(FIXTURES / case / said(case)["checkpoint_file"], target / said(case)["checkpoint_file"]))


def edited(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    value = torch.load(path, weights_only=False)
    change(value)
    torch.save(value, path)
    return path


def damage(path: Path, ops: list[dict[str, Any]], marker: Path) -> None:
    for op in ops:
        if op["op"] == "truncate_file":
            path.write_bytes(path.read_bytes()[: int(path.stat().st_size * op["keep"])])
        elif op["op"] == "replace_file":
            path.write_text(op["text"])
        elif op["op"] == "pickle_rename":
            rename_in_pickle(path, op["from"], op["to"])
        else:
            edited(path, lambda value, op=op: change_value(value, op, marker))


def change_value(value: dict[str, Any], op: dict[str, Any], marker: Path) -> None:
    *way, last = op["path"]
    inside = value
    for key in way:
        inside = inside[key]
    kind = op["op"]
    if kind == "delete":
        del inside[last]
    elif kind == "set":
        inside[last] = op["value"]
    elif kind == "slice":
        inside[last] = inside[last].narrow(op["dim"], 0, op["length"]).clone()
    elif kind == "copy":
        source = value
        for key in op["from"]:
            source = source[key]
        inside[last] = source.clone()
    elif kind == "prefix":
        inside[last] = {op["prefix"] + name: tensor for name, tensor in inside[last].items()}
    elif kind == "pickle_call":
        inside[last] = Touch(marker)
    else:
        assert kind == "nan", kind
        inside[last].view(-1)[0] = float("nan")


def rename_in_pickle(path: Path, old: str, new: str) -> None:
    """Module names in data.pkl are lines of text under pickle protocol 2."""
    with zipfile.ZipFile(path) as archive:
        entries = [(item, archive.read(item)) for item in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for item, data in entries:
            if item.filename.endswith("/data.pkl"):
                assert old.encode() in data
                data = data.replace(old.encode() + b"\n", new.encode() + b"\n")
            archive.writestr(item, data)


def load(path: Path) -> tuple[TaeVerbalizer, TaeReconstructor]:
    info = inspect_tae(path)
    av = load_tae_verbalizer(info, dtype="float32")
    return av, load_tae_reconstructor(info, dtype="float32", sharing=av)


def refused(path: Path) -> str:
    """The message with which a file is refused: one paragraph that names the file."""
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("bad", [one for one in BAD if one["expect"] != "accept"], ids=lambda one: one["name"])
def test_bad_input_is_refused_before_anything_is_generated(bad: dict[str, Any], tmp_path: Path) -> None:
    path = copy_case(bad["case"], tmp_path)
    damage(path, bad["ops"], marker=tmp_path / "executed")
    message = refused(path)
    print(f"{bad['name']}: {message}")
    assert not (tmp_path / "executed").exists()
    for op in bad["ops"]:
        if op.get("path", [""])[0] == "models":  # models, role, tensor: the deepest is named
            assert op["path"][-1] in message


@pytest.mark.parametrize("bad", [one for one in BAD if one["expect"] == "accept"], ids=lambda one: one["name"])
def test_harmless_variant_is_accepted_with_the_same_numbers(bad: dict[str, Any], tmp_path: Path) -> None:
    path = copy_case(bad["case"], tmp_path)
    damage(path, bad["ops"], marker=tmp_path / "executed")
    av, ar = load(path)
    given = arrays(bad["case"])
    logits = prefilled(av, torch.tensor(given["activations"])).logits.numpy()
    assert np.abs(logits - given["decoder_next_token_logits"]).max() < 1e-4
    found = ar.reconstruct_tokens(torch.tensor(given["fixed_tokens"]), given["current_token_ids"].tolist()).numpy()
    assert np.abs(found - given["encoder_reconstruction"]).max() < 1e-4


def test_hostile_pickle_is_refused_by_name_and_never_run(tmp_path: Path) -> None:
    path, marker = copy_case("gpt2_patch_all", tmp_path), tmp_path / "executed"
    edited(path, lambda value: value["metrics"].update(loss=Touch(marker)))
    message = refused(path)
    assert "mkdir" in message and "nothing of it was run" in message and not marker.exists()
    path.write_bytes(pickle.dumps({"models": Touch(marker)}))  # the format from before torch 1.6 as well
    assert "torch 1.6" in refused(path) and not marker.exists()
    with pytest.raises(FileExistsError):  # it would have been run
        marker.mkdir()
        pickle.loads(path.read_bytes())


def test_numpy_numbers_in_metrics_are_read(tmp_path: Path) -> None:
    path = copy_case("gpt2_patch_all", tmp_path)
    metrics = {"a": np.float64(1.5), "b": np.float32(2.5), "c": np.int64(3), "d": np.arange(3.0), "e": np.bool_(True)}
    edited(path, lambda value: value["metrics"].update(metrics))
    assert {k: v for k, v in read_checkpoint(path)["metrics"].items() if k in "abc"} == {"a": 1.5, "b": 2.5, "c": 3}
    load(path)


def test_optimiser_state_stays_on_disk(tmp_path: Path) -> None:
    """128 MB of optimiser state are mapped, not read: resident memory grows by a fraction of it."""
    import psutil

    path = copy_case("gpt2_patch_all", tmp_path)
    edited(path, lambda value: value["optim"].update(huge=torch.zeros(1 << 25)))
    before = psutil.Process().memory_info().rss
    info = inspect_tae(path)
    assert psutil.Process().memory_info().rss - before < 40 << 20
    assert info.states["decoder"]["proj_weight"].shape == (4, 48, 48)


# what is not in bad_inputs.json


def gpt2(change: Callable[[dict[str, Any]], Any]) -> tuple[str, Callable[[dict[str, Any]], Any]]:
    return "gpt2_patch_all", change


def gemma3(change: Callable[[dict[str, Any]], Any]) -> tuple[str, Callable[[dict[str, Any]], Any]]:
    return "gemma3_patch_two", change


def options(value: dict[str, Any], role: str) -> dict[str, Any]:
    found: dict[str, Any] = value["config"]["trainable_components"][role]
    return found


CHANGES: dict[str, tuple[tuple[str, Callable[[dict[str, Any]], Any]], str]] = {
    "integer weights": (gpt2(lambda v: v["models"]["decoder"].update(proj_weight=torch.ones(4, 48, 48).long())), "int64"),
    "floating ids": (gpt2(lambda v: v["models"]["decoder"].update(prompt_ids=torch.ones(27))), "float32"),
    "infinite bias": (gpt2(lambda v: v["models"]["decoder"]["proj_bias"].fill_(torch.inf)), "proj_bias"),
    "zero projection": (gpt2(lambda v: v["models"]["decoder"]["proj_weight"][2].zero_()), "nothing but zeros in proj_weight"),
    "zero prompt": (gpt2(lambda v: v["models"]["decoder"]["prompt_left_emb"].zero_()), "nothing but zeros in prompt_left_emb"),
    "zero encoder": (gpt2(lambda v: v["models"]["encoder"]["proj.weight"].zero_()), "nothing but zeros in proj.weight"),
    "not a tensor": (gpt2(lambda v: v["models"]["decoder"].update(proj_bias=[1.0])), "'proj_bias' is a list"),
    "no prompt ids": (gpt2(lambda v: v["models"]["decoder"].pop("prompt_ids")), "lacks prompt_ids"),
    "empty soft prompt": (
        gpt2(lambda v: v["models"]["encoder"].update(soft_prompt_embeddings=torch.ones(0, 48))),
        "soft_prompt_embeddings [0, 48] instead of [n, 48]",
    ),
    "missing postfix": (
        gpt2(lambda v: options(v, "encoder").update(soft_prompt_init_text="a <text> b")),
        "lacks soft_prompt_embeddings_postfix",
    ),
    "unexpected postfix": (
        gpt2(lambda v: v["models"]["encoder"].update(soft_prompt_embeddings_postfix=torch.ones(1, 48))),
        "unexpected soft_prompt_embeddings_postfix",
    ),
    "unexpected special vector": (
        gemma3(lambda v: options(v, "encoder").update(special_last_token_vector=False)),
        "unexpected special_last_token_vector",
    ),
    "single and stack": (
        gpt2(lambda v: options(v, "decoder").update(per_layer_projections=False)),
        "lacks proj.bias, proj.weight",
    ),
    "just input without a projection": (
        gpt2(lambda v: options(v, "decoder").update(patch_all_layers="just_input")),
        "patch_all_layers='just_input' leaves no projection",
    ),
    "too many blocks": (gemma3(lambda v: options(v, "decoder").update(patch_all_layers=6)), "from 0 to 5"),
    "true is not one": (gemma3(lambda v: options(v, "decoder").update(patch_all_layers=True)), "instead of [5, 48, 48]"),
    "word for a flag": (gpt2(lambda v: options(v, "encoder").update(add_current_token="no")), "add_current_token is 'no'"),
    "layer is a word": (gpt2(lambda v: v["config"].update(layer_l="2")), "layer_l is '2'"),
    "layer is true": (gpt2(lambda v: v["config"].update(layer_l=True)), "layer_l is True"),
    "output layer -3": (gpt2(lambda v: options(v, "encoder").update(output_layer=-3)), "from -2 to 3"),
    "encoder without base": (gpt2(lambda v: options(v, "encoder").update(use_base_model=False)), "without a base model"),
    "base trained, not stored": (gpt2(lambda v: options(v, "decoder").update(base_model=True)), "the decoder in"),
    "positions trained, not stored": (gpt2(lambda v: options(v, "encoder").update(pos_embeddings=True)), "no base.* tensors"),
    "half a base": (
        gpt2(lambda v: v["models"]["decoder"].update({"base.transformer.wpe.weight": torch.ones(128, 48)})),
        "lack transformer.h.0.attn.c_attn.bias",
    ),
    "no name of the base": (gpt2(lambda v: v["config"].pop("model_name")), "model_name=None"),
    "no room": (gpt2(lambda v: v["config"].update(t_text=103)), "need 130 positions, but the base has 128"),
    "both spellings": (
        gpt2(lambda v: v["models"]["decoder"].update({"_orig_mod.proj_bias": torch.ones(4, 48)})),
        "holds proj_bias twice",
    ),
    "a list": (gpt2(lambda v: v.update(models=[v["models"]])), "'models' is a list"),
}


@pytest.mark.parametrize(("case_and_change", "named"), CHANGES.values(), ids=CHANGES)
def test_change_is_refused_by_name(case_and_change: tuple[str, Callable[..., Any]], named: str, tmp_path: Path) -> None:
    case, change = case_and_change
    message = refused(edited(copy_case(case, tmp_path), change))
    assert named in message, message


def noted(*sources: Any) -> list[str]:
    return [note.text for source in sources for note in source.notes]


def test_options_that_an_old_file_lacks_are_the_references_defaults_and_noted(tmp_path: Path) -> None:
    path = copy_case("gpt2_patch_all", tmp_path)
    assert inspect_tae(path).notes == ()
    edited(path, lambda v: [options(v, "encoder").pop(name) for name in ("output_layer", "add_current_token")])
    info = inspect_tae(path)
    assert (info.encoder.output_layer, info.encoder.adds_current_token) == (-1, False)
    first, second = noted(info)
    assert "does not say encoder.output_layer: taken as -1" in first and "encoder.add_current_token: taken as False" in second


def test_base_weights_of_the_encoder_alone_are_noted(tmp_path: Path) -> None:
    """Decoder and encoder shared one base in training, so trained position embeddings belong to both."""
    path = copy_case("gpt2_patch_all", tmp_path)
    base = load_file(FIXTURES / "gpt2_patch_all" / "base" / "model.safetensors")

    def train_positions(value: dict[str, Any]) -> None:
        options(value, "encoder").pop("pos_embeddings")  # the default is true
        value["models"]["encoder"] |= {f"base.{name}": tensor for name, tensor in base.items()}

    edited(path, train_positions)
    load(path)
    [text] = noted(inspect_tae(path))
    assert "holds base weights of the encoder and none of the decoder" in text


def test_untrained_projections_and_vectors_are_noted(tmp_path: Path) -> None:
    path = copy_case("gemma3_patch_two", tmp_path)

    def untrain(value: dict[str, Any]) -> None:
        value["models"]["decoder"]["proj_weight"].copy_(torch.eye(48))
        value["models"]["encoder"]["proj.weight"].copy_(torch.eye(48))
        value["models"]["encoder"]["special_last_token_vector"].zero_()

    edited(path, untrain)
    decoder, encoder = map(noted, load(path))
    assert len(decoder) == 1 and "decoder's projections" in decoder[0]
    assert "encoder's projection" in encoder[0] and "special vector" in encoder[1]


def test_missing_current_token_or_wrong_width_is_a_data_error(tmp_path: Path) -> None:
    av, ar = load(copy_case("gemma3_patch_two", tmp_path))
    with pytest.raises(DataError, match="reads the token that an activation was taken at"):
        ar.reconstruct([Explanation("x", (1, 2, 3))])
    with pytest.raises(DataError, match=r"shape \[activation, 48\]"):
        prefilled(av, torch.ones(2, 40))
    with pytest.raises(DataError, match="NaN"):
        prefilled(av, torch.full((2, 48), torch.nan))


# which file, which base


def test_directory_gives_the_highest_step_not_the_newest_file(tmp_path: Path) -> None:
    first = copy_case("gpt2_patch_all", tmp_path)
    for name, step in (("a.pt", 500), ("b_step9.pt", 90000), ("c_step80000.pt", 80000)):
        edited(Path(shutil.copyfile(first, first.parent / name)), lambda value, step=step: value.update(step=step))
    os.utime(first.parent / "a.pt", (2e9, 2e9))
    assert is_tae(first.parent) and not is_tae(first.parent / "base")
    assert highest_step(first.parent).name == "b_step9.pt"  # its name lies: the file itself says 90000
    info = inspect_tae(first.parent)
    assert info.path.name == "b_step9.pt" and info.step == 90000


def test_directory_with_a_damaged_file_passes_over_an_early_one_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = copy_case("gpt2_patch_all", tmp_path)
    early, late = path.parent / "x_step100.pt", path.parent / "x_step13000.pt"
    early.write_text("cut")
    assert highest_step(path.parent) == path and "x_step100.pt is skipped" in caplog.text
    late.write_text("cut")
    with pytest.raises(CheckpointError, match=r"x_step13000\.pt is not a whole torch checkpoint"):
        inspect_tae(path.parent)


def test_directory_of_several_runs_or_of_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        inspect_tae(tmp_path / "empty")
    copy_case("gpt2_patch_all", tmp_path / "one")
    copy_case("gpt2_patch_all", tmp_path / "two")
    with pytest.raises(CheckpointError, match="several runs"):
        inspect_tae(tmp_path)
    assert inspect_tae(tmp_path / "one").path.parent.parent.name == "one"


def test_base_is_found_beside_the_file_or_where_the_caller_says(tmp_path: Path) -> None:
    path = copy_case("gpt2_patch_all", tmp_path)
    beside, base = inspect_tae(path), str(FIXTURES / "gpt2_patch_all" / "base")
    assert beside.base == Path(base) and beside.shares_base_with_activations
    edited(path, lambda v: v["config"].update(model_name="lab/base", orig_model_name="lab/base"))
    elsewhere = inspect_tae(path, base=base)
    assert elsewhere.base == Path(base) and elsewhere.activations_model == str(elsewhere.base)
    edited(path, lambda v: v["config"].update(model_name="lab/base-pt", orig_model_name="lab/base-it"))
    apart = inspect_tae(path, base=base)
    assert apart.activations_model == "lab/base-it" and not apart.shares_base_with_activations
    assert inspect_tae(path, base=base, activations_base=base).activations_model == base
    edited(path, lambda v: v["config"].update(model_name="./not/there"))
    with pytest.raises(CheckpointError, match=r"Set autoencoder\.base"):
        inspect_tae(path)


def test_width_of_another_base_is_refused_by_the_tensors_it_does_not_fit(tmp_path: Path) -> None:
    path = copy_case("gpt2_patch_all", tmp_path)
    config = AutoConfig.from_pretrained(FIXTURES / "gpt2_patch_all" / "base")
    config.n_embd, other = 64, tmp_path / "other"
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    with pytest.raises(CheckpointError, match=r"proj_weight \[4, 48, 48\] instead of \[4, 64, 64\]"):
        inspect_tae(path, base=str(other))


def test_digest_changes_with_the_file_and_with_the_base(tmp_path: Path) -> None:
    path = copy_case("gpt2_patch_all", tmp_path)
    before = digest_tae(inspect_tae(path))
    assert digest_tae(inspect_tae(FIXTURES / "gpt2_patch_all")) == before
    base = tmp_path / "base"
    shutil.copytree(FIXTURES / "gpt2_patch_all" / "base", base)
    config = json.loads((base / "config.json").read_text()) | {"layer_norm_epsilon": 1e-6}
    (base / "config.json").write_text(json.dumps(config))
    other_base = digest_tae(inspect_tae(path, base=str(base)))
    edited(path, lambda v: v["models"]["decoder"]["proj_bias"].add_(1))
    assert len({before, other_base, digest_tae(inspect_tae(path))}) == 3


def test_errors_are_request_errors() -> None:
    with pytest.raises(RequestError):
        inspect_tae("no/such/file.pt")
