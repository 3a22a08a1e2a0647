"""TAE files that are odd but right, odd and wrong, or hostile: types, ties, links, temporary files, pickles of every kind."""

from __future__ import annotations

import io
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from ksweep.autoencoder.tae.models import highest_step, inspect_tae
from ksweep.utils.errors import CheckpointError
from ksweep.utils.torch_file import read_checkpoint
from tests.autoencoder.test_tae_fixtures import arrays
from tests.autoencoder.test_tae_refusals import BAD, copy_case, damage, edited, load, options, refused
from tests.tiny_models import prefilled

OTHER = {"gpt2_patch_all": "gemma3_patch_two", "gemma3_patch_two": "gpt2_patch_all"}


def numbers(path: Path, case: str) -> tuple[float, float]:
    """Worst difference of logits and reconstructions from what the reference computed."""
    av, ar = load(path)
    given = arrays(case)
    logits = prefilled(av, torch.tensor(given["activations"])).logits.numpy()
    found = ar.reconstruct_tokens(torch.tensor(given["fixed_tokens"]), given["current_token_ids"].tolist()).numpy()
    differences = (logits - given["decoder_next_token_logits"], found - given["encoder_reconstruction"])
    return float(np.abs(differences[0]).max()), float(np.abs(differences[1]).max())


# bad_inputs.json on the architecture that it was not written for


def on_the_other(bad: dict[str, Any], directory: Path) -> Path:
    """The other case's file with the same damage; slices cut off a row wherever they stood."""
    path = copy_case(OTHER[bad["case"]], directory)
    value = torch.load(path, weights_only=False)
    for op in bad["ops"]:
        if op["op"] == "slice":
            tensor = value["models"][op["path"][1]][op["path"][2]]
            op = {**op, "length": min(op["length"], tensor.shape[op["dim"]] - 1)}
        damage(path, [op], marker=directory / "executed")
    return path


FITS_AFTER_ALL = ("patch_count_differs",)
"""Four blocks patched of four: the same as all of them."""
NOTHING_THERE = ("no_special_vector",)


@pytest.mark.parametrize("bad", [one for one in BAD if one["name"] not in NOTHING_THERE], ids=lambda one: one["name"])
def test_bad_input_is_judged_alike_on_the_other_architecture(bad: dict[str, Any], tmp_path: Path) -> None:
    path = on_the_other(bad, tmp_path)
    if bad["expect"] == "accept" or bad["name"] in FITS_AFTER_ALL:
        assert max(numbers(path, OTHER[bad["case"]])) < 1e-4
    else:
        refused(path)
    assert not (tmp_path / "executed").exists()


# odd but right


def cast(dtype: torch.dtype) -> Callable[[dict[str, Any]], Any]:
    def change(value: dict[str, Any]) -> None:
        for state in value["models"].values():
            state.update({name: tensor.to(dtype) for name, tensor in state.items() if tensor.is_floating_point()})

    return change


@pytest.mark.parametrize("case", OTHER)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_of_another_precision_are_computed_with_in_the_one_asked_for(
    case: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    (tmp_path / "twin").mkdir()
    path, twin = (copy_case(case, tmp_path / name) for name in ("here", "twin"))
    edited(path, cast(dtype))
    edited(edited(twin, cast(dtype)), cast(torch.float32))  # the same rounded values, stored as the reference does
    given = arrays(case)
    vectors, tokens = torch.tensor(given["activations"]), torch.tensor(given["fixed_tokens"])
    (av, ar), (other_av, other_ar) = load(path), load(twin)
    assert av.model.dtype == torch.float32
    assert torch.equal(prefilled(av, vectors).logits, prefilled(other_av, vectors).logits)
    current = given["current_token_ids"].tolist()
    assert torch.equal(ar.reconstruct_tokens(tokens, current), other_ar.reconstruct_tokens(tokens, current))
    if dtype == torch.float64:
        assert max(numbers(path, case)) < 1e-4


def share(value: dict[str, Any]) -> None:
    """One big storage that several tensors are views of, as torch.save keeps ties."""
    decoder = value["models"]["decoder"]
    flat = torch.cat([decoder["proj_weight"].flatten(), decoder["proj_bias"].flatten()])
    count = decoder["proj_weight"].numel()
    decoder["proj_weight"] = flat[:count].view_as(decoder["proj_weight"])
    decoder["proj_bias"] = flat[count:].view_as(decoder["proj_bias"])
    value["optim"] = {"state": {0: {"exp_avg": flat}}}


class Transition(torch.optim.lr_scheduler.LRScheduler):
    """One scheduler around another, whose state holds the inner one and its optimiser as objects."""

    def __init__(self, optimizer: Any, base: Any) -> None:
        self.base_scheduler = base
        super().__init__(optimizer)

    def get_lr(self) -> Any:
        return self.base_scheduler.get_last_lr()


def resume(value: dict[str, Any]) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer = torch.optim.AdamW([parameter])
    scheduler = Transition(optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10))
    optimizer.step()
    scheduler.step()
    value.update(scheduler=scheduler.state_dict(), optim=optimizer.state_dict())


def transpose(value: dict[str, Any]) -> None:
    encoder = value["models"]["encoder"]
    encoder["proj.weight"] = encoder["proj.weight"].T.contiguous().T


ODD: dict[str, Callable[[dict[str, Any]], Any]] = {
    "views of one storage": share,
    "a strided matrix": transpose,
    "parameters instead of tensors": lambda v: v["models"]["encoder"].update(
        {k: torch.nn.Parameter(t) for k, t in v["models"]["encoder"].items()}
    ),
    "ordered dictionaries": lambda v: v["models"].update({k: OrderedDict(s) for k, s in v["models"].items()}),
    "no step": lambda v: v.pop("step"),
    "step as a NumPy number": lambda v: v.update(step=np.int64(7)),
    "step as a tensor": lambda v: v.update(step=torch.tensor(7)),
    "compiled inside": lambda v: v["models"].update(
        decoder={f"_orig_mod.{k.replace('.', '._orig_mod.')}": t for k, t in v["models"]["decoder"].items()}
    ),
    "more of everything": lambda v: v.update(ema={"decay": 0.9}, models={**v["models"], "orig_model": {}}),
    "a scheduler within another": resume,
    "a scheduler with a history": lambda v: v.update(scheduler={"last_lr": [1e-3], "base_lrs": (1e-3,), "_step_count": 3}),
}


@pytest.mark.parametrize("case", OTHER)
@pytest.mark.parametrize("change", ODD.values(), ids=ODD)
def test_odd_file_has_the_numbers_of_the_usual_one(change: Callable[..., Any], case: str, tmp_path: Path) -> None:
    assert max(numbers(edited(copy_case(case, tmp_path), change), case)) < 1e-4


def test_what_a_scheduler_was_made_of_is_an_empty_shell(tmp_path: Path) -> None:
    """No class of torch.optim is made while reading, and no __setstate__ of one is called."""
    scheduler = read_checkpoint(edited(copy_case("gpt2_patch_all", tmp_path), resume))["scheduler"]
    inner = scheduler["base_scheduler"]
    assert not isinstance(inner, torch.optim.lr_scheduler.LRScheduler) and inner.T_max == 10
    assert type(inner.optimizer) is type(inner) and type(inner.optimizer.state) is dict


def test_step_is_none_where_the_file_has_none_and_whole_where_it_is_a_number(tmp_path: Path) -> None:
    path = copy_case("gpt2_patch_all", tmp_path)
    for step, expected in ((np.int64(7), 7), (torch.tensor(7), 7), ("7", None), (7.0, None), (True, None)):
        assert inspect_tae(edited(path, lambda v, step=step: v.update(step=step))).step == expected
    assert inspect_tae(edited(path, lambda v: v.pop("step"))).step is None


# options that a file does not have


DEFAULTS: dict[str, dict[str, Any]] = {
    "decoder": {
        "base_model": False, "pos_embeddings": False, "embedding_head": False, "patch_all_layers": False,
        "per_layer_projections": False, "subtract_add_pos_embeddings": False, "new_decoder": False,
    },
    "encoder": {
        "base_model": True, "pos_embeddings": True, "embedding_head": False, "use_base_model": True,
        "use_projection_layer": True, "soft_prompt_length": 0, "soft_prompt_init_text": None, "output_layer": -1,
        "subtract_add_pos_embeddings": False, "add_current_token": False, "special_last_token_vector": False,
    },
}  # fmt: skip
"""DecoderConfig and EncoderConfig of the reference (the same at 7de72fe and c20bd7d; new_decoder came with the former)."""


def outcome(path: Path) -> object:
    """Both layouts, or the refusal."""
    try:
        info = inspect_tae(path)
    except CheckpointError as error:
        return re_without_values(str(error))
    return info.decoder, info.encoder


def re_without_values(text: str) -> str:
    return text.replace("False", "None")  # a message may quote the value that is not there


@pytest.mark.parametrize("case", OTHER)
@pytest.mark.parametrize(("role", "name"), [(role, name) for role, found in DEFAULTS.items() for name in found])
def test_an_absent_option_is_the_references_default(role: str, name: str, case: str, tmp_path: Path) -> None:
    path = copy_case(case, tmp_path)
    said = outcome(edited(path, lambda v: options(v, role).update({name: DEFAULTS[role][name]})))
    assert outcome(edited(path, lambda v: options(v, role).pop(name))) == said


# odd and wrong


class Loud(dict[str, Any]):
    """A dictionary of a class that the loader does not know."""


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "configuration as an OmegaConf object": (lambda v: v.update(config=OmegaConf.create(v["config"])), "omegaconf"),
    "configuration of a class of its own": (lambda v: v.update(config=Loud(v["config"])), "Loud"),
    "a path object": (lambda v: v["config"].update(run_dir=Path("/x")), "pathlib"),
    "length as text": (lambda v: v["config"].update(t_text="8"), "t_text is '8'"),
    "length as a float": (lambda v: v["config"].update(t_text=8.0), "t_text is 8.0"),
    "layer as a NumPy number": (lambda v: v["config"].update(layer_l=np.float64(2)), "layer_l"),
    "output layer as text": (lambda v: options(v, "encoder").update(output_layer="1"), "output_layer is '1'"),
    "patching as text": (lambda v: options(v, "decoder").update(patch_all_layers="2"), "patch_all_layers is '2'"),
    "patching as a float": (lambda v: options(v, "decoder").update(patch_all_layers=2.0), "patch_all_layers is 2.0"),
    "models as a list of pairs": (lambda v: v.update(models=list(v["models"].items())), "'models' is a list"),
    "a sparse matrix": (
        lambda v: v["models"]["encoder"].update({"proj.weight": v["models"]["encoder"]["proj.weight"].to_sparse()}),
        "proj.weight",
    ),
    "complex numbers": (
        lambda v: v["models"]["encoder"].update({"proj.bias": v["models"]["encoder"]["proj.bias"].to(torch.complex64)}),
        "complex64",
    ),
    "true and false": (lambda v: v["models"]["decoder"].update(proj_bias=v["models"]["decoder"]["proj_bias"] > 0), "torch.bool"),
    "a tensor without storage": (
        lambda v: v["models"]["encoder"].update({"proj.weight": torch.empty(48, 48, device="meta")}), "proj.weight",
    ),
    "beyond float32": (
        lambda v: v["models"]["encoder"].update({"proj.bias": torch.full((48,), 1e300, dtype=torch.float64)}), "proj.bias",
    ),
    "embeddings trained, not stored": (lambda v: options(v, "encoder").update(embedding_head=True), "no base.* tensors"),
    "no prompt, ids left": (
        lambda v: [v["models"]["decoder"].pop(f"prompt_{side}_emb") for side in ("left", "right")],
        "A side of the prompt is missing",
    ),
    "no ids, a prompt": (
        lambda v: v["models"]["decoder"].update(prompt_ids=torch.empty(0, dtype=torch.long)), "prompt_ids [0] instead of [n]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER)
@pytest.mark.parametrize(("change", "named"), WRONG.values(), ids=WRONG)
def test_wrong_file_is_refused_by_name(change: Callable[..., Any], named: str, case: str, tmp_path: Path) -> None:
    message = refused(edited(copy_case(case, tmp_path), change))
    assert named in message, message


def test_files_without_a_prompt_load_where_the_configuration_has_none(tmp_path: Path) -> None:
    def bare(value: dict[str, Any]) -> None:
        for side in ("left", "right"):
            value["models"]["decoder"].pop(f"prompt_{side}_emb")
        value["models"]["decoder"]["prompt_ids"] = torch.empty(0, dtype=torch.long)
        value["config"]["decoder_prompt"] = None

    av, _ = load(edited(copy_case("gpt2_patch_all", tmp_path), bare))
    assert av.prompts(torch.ones(2, 48)).embeddings.shape[:2] == (2, av.prompt_length) == (2, 1)


# hostile


class Run:
    """Unpickling it runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


class Subclass(torch.Tensor):
    """A tensor that brings code of its own along."""


class StateRuns:
    """Nothing happens when it is made, a command runs when its state is set."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), {"x": Run(self.marker)}


@pytest.mark.parametrize("place", ["top", "config", "optim", "rng_states", "metrics", "key", "tensor"])
@pytest.mark.parametrize("made", [Run, StateRuns])
def test_a_pickle_that_runs_a_command_is_refused_wherever_it_hides(made: type, place: str, tmp_path: Path) -> None:
    path, marker = copy_case("gpt2_patch_all", tmp_path), tmp_path / "executed"

    def hide(value: dict[str, Any]) -> None:
        if place == "top":
            value["payload"] = made(marker)
        elif place == "key":
            value["metrics"][(made(marker), 1)] = 0.0
        elif place == "tensor":
            value["models"]["decoder"]["proj_bias"] = made(marker)
        else:
            value[place] = {**(value.get(place) or {}), "x": made(marker)}

    message = refused(edited(path, hide))
    assert "system" in message and "nothing of it was run" in message and not marker.exists()


def test_a_tensor_of_a_foreign_class_is_refused(tmp_path: Path) -> None:
    path = copy_case("gpt2_patch_all", tmp_path)
    edited(path, lambda v: v["models"]["decoder"].update(proj_bias=torch.ones(4, 48).as_subclass(Subclass)))
    assert "Subclass" in refused(path)


def test_formats_of_other_times_are_refused_and_never_run(tmp_path: Path) -> None:
    """torch's formats before 1.6 (a bare pickle, a tar), a TorchScript archive, a plain zip, a zip around a bare pickle."""
    path, marker = copy_case("gpt2_patch_all", tmp_path), tmp_path / "executed"
    hostile = {"models": Run(marker), "config": {}}
    torch.save(hostile, path, _use_new_zipfile_serialization=False)
    assert "torch 1.6" in refused(path)
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(hostile, protocol=2)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    assert "torch 1.6" in refused(path)
    with zipfile.ZipFile(path, "w") as file:
        for name in ("data.pkl", "constants.pkl", "version"):
            file.writestr(f"archive/{name}", pickle.dumps(hostile, protocol=2))
    assert "TorchScript" in refused(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "nothing")
    refused(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(hostile, protocol=2))
        file.writestr("archive/version", "3\n")
    refused(path)
    assert not marker.exists()
    os.system(f"touch {marker}")  # it would have been there
    assert marker.exists()


def test_opcodes_that_reach_further_than_globals_are_refused(tmp_path: Path) -> None:
    """Hand-written pickles: a builtin by name, a persistent id of an unknown kind, an extension code, an endless memo."""
    path, marker = copy_case("gpt2_patch_all", tmp_path), tmp_path / "executed"
    for data in (
        b"cbuiltins\neval\n(X" + len(f"open('{marker}', 'w')").to_bytes(4, "little") + f"open('{marker}', 'w')".encode() + b"tR.",
        b"\x80\x02(X\x05\x00\x00\x00nonesK\x01tQ.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02h\xff.",
        b"\x80\x02.",
        b"",
    ):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", data)
            file.writestr("archive/version", "3\n")
        refused(path)
    assert not marker.exists()


# which file


def test_temporary_hidden_and_dangling_files_beside_a_checkpoint_are_nobody(tmp_path: Path) -> None:
    path = copy_case("gpt2_patch_all", tmp_path)
    for name in ("._x_step999.pt", ".x_step999.pt", "x_step999.pt.tmp", "x_step999.pt.part", "x_step999.safetensors"):
        (path.parent / name).write_text("half")
    (path.parent / "x_step999.pt").symlink_to(tmp_path / "gone.pt")
    (path.parent / "x_step998.pt").mkdir()
    assert highest_step(path.parent) == path


def test_links_to_a_file_and_to_a_directory_are_followed(tmp_path: Path) -> None:
    path = copy_case("gpt2_patch_all", tmp_path)
    (path.parent / "latest.pt").symlink_to(path.name)
    (tmp_path / "run").symlink_to(path.parent)
    (tmp_path / "best.pt").symlink_to(path)
    found = [inspect_tae(place) for place in (tmp_path / "run", tmp_path / "best.pt", path.parent)]
    assert len({info.base for info in found}) == 1 and {info.path.resolve() for info in found} == {path.resolve()}


def test_a_file_of_optimiser_state_alone_is_not_the_latest_checkpoint(tmp_path: Path) -> None:
    path = copy_case("gpt2_patch_all", tmp_path)
    torch.save({"step": 10**9, "optim": {}}, path.parent / "optimizer_step1000000000.pt")
    assert highest_step(path.parent) == path


@pytest.mark.trials
@pytest.mark.slow
def test_a_quarter_of_a_gigabyte_of_optimiser_state_costs_no_memory(tmp_path: Path) -> None:
    """In a process of its own, so that the peak is that of loading alone."""
    plain, large = copy_case("gpt2_patch_all", tmp_path / "plain"), copy_case("gpt2_patch_all", tmp_path / "large")
    edited(large, lambda v: v.update(optim={"state": {0: {"exp_avg": torch.zeros(1 << 26)}}}))
    assert large.stat().st_size > 1 << 28
    measure = (
        "import resource, sys; from ksweep.autoencoder.tae.checkpoint import inspect_tae\n"
        "from ksweep.autoencoder.tae.models import load_tae_reconstructor, load_tae_verbalizer\n"
        "def peak_after_loading(path):\n"
        "    info = inspect_tae(path)\n"
        "    av = load_tae_verbalizer(info, dtype='float32'); load_tae_reconstructor(info, dtype='float32', sharing=av)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(-peak_after_loading(sys.argv[1]) + peak_after_loading(sys.argv[2]))"
    )
    command = [sys.executable, "-c", measure, str(plain), str(large)]
    assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) < 64 << 10


def test_a_file_without_a_step_goes_by_its_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = copy_case("gpt2_patch_all", tmp_path)
    for name in ("x_step20.pt", "x_step3.pt"):
        edited(Path(shutil.copyfile(path, path.parent / name)), lambda v: v.pop("step"))
    path.unlink()
    with caplog.at_level(logging.WARNING):
        assert highest_step(path.parent).name == "x_step20.pt"
    assert read_checkpoint(path.parent / "x_step20.pt").keys() >= {"models", "config"}
