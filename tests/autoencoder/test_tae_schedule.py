"""Checkpoints of talkative autoencoders without the base weights of a half: judged by step, schedule and the other half."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ksweep.autoencoder.tae.models import inspect_tae
from ksweep.utils.errors import CheckpointError
from tests.autoencoder.test_tae_fixtures import FIXTURES
from tests.autoencoder.test_tae_refusals import copy_case, edited

CASE = "gpt2_patch_all"


def made(
    tmp_path: Path, *, stored: tuple[str, ...] = (), trained: tuple[str, ...] = ("decoder", "encoder"), name: str = "model.pt",
    **values: Any,
) -> Path:  # fmt: skip
    """A checkpoint of a run that trained bases by a freeze schedule; `values` are laid over the file and its config."""
    base = load_file(FIXTURES / CASE / "base" / "model.safetensors")

    def change(value: dict[str, Any]) -> None:
        config = value["config"]
        config["gradient_accumulation_steps"] = 16
        config["freeze_schedule"] = {"enabled": True, "unfreeze_at": "256"} | values.pop("schedule", {})
        config["unfreeze_encoder"] = values.pop("unfreeze_encoder", {"enabled": False})
        for role in ("decoder", "encoder"):
            config["trainable_components"][role]["base_model"] = role in trained
        for role in stored:
            value["models"][role] |= {f"base.{name}": tensor for name, tensor in base.items()}
        for key, one in values.items():
            value.pop(key, None)
            if one is not None:
                value[key] = one

    path = edited(copy_case(CASE, tmp_path), change)
    return path.rename(path.with_name(name))


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        inspect_tae(path)
    message = str(raised.value)
    assert "\n" not in message and path.name in message and "no base.* tensors" in message
    return message


@pytest.mark.parametrize("role", ["decoder", "encoder"])
def test_half_without_its_base_is_refused_where_the_other_half_holds_one(role: str, tmp_path: Path) -> None:
    """Whatever the step: one base was shared, and files hold it as soon as it was unfrozen."""
    other = "encoder" if role == "decoder" else "decoder"
    for step in (31000, 3, None):
        message = refused(made(tmp_path / str(step), stored=(other,), step=step))
        assert f"the {role} in" in message and f"the {other}, which shared one base with it, holds them" in message


LATE: list[dict[str, Any]] = [
    {"step": 31000},
    {"step": 257},
    {"step": 31000, "schedule": {"unfreeze_at": 256}},
    {"step": 31000, "schedule": {"unfreeze_at": "1000s"}},
    {"step": 31000, "schedule": {"unfreeze_at": "20steps"}},
    {"step": 256 * 16 + 1, "schedule": {"unfreeze_at": "256os"}},
    {"step": 31000, "steps_per_epoch": 1666, "schedule": {"unfreeze_at": "2e"}},
    {"step": None, "current_epoch": 2, "schedule": {"unfreeze_at": "2epochs"}},
    {"step": None, "current_epoch": None, "epoch": 3, "schedule": {"unfreeze_at": "2e"}},
    {"step": 31000, "schedule": {"unfreeze_at": None, "unfreeze_at_step": 10000}},
    {"step": 31000, "steps_per_epoch": 1666, "schedule": {"unfreeze_at": None, "unfreeze_at_epoch": 2}},
    {"step": 31000, "schedule": {"unfreeze_at": "9e9", "components": {"decoder": {"base_model": {"unfreeze_at": "256s"}}}}},
    {"step": 256, "tau": 0.1},  # of the trainer's loop: unfrozen before that step was taken
    {"step": 31000, "schedule": {"enabled": False}, "unfreeze_encoder": {"enabled": True, "step": 10000}},
    {"step": 31000, "schedule": {"enabled": False}, "unfreeze_encoder": {"enabled": True, "at": "1000s"}},
]  # fmt: skip


@pytest.mark.parametrize("values", LATE, ids=str)
def test_file_without_bases_after_they_were_unfrozen_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    message = refused(made(tmp_path, **values))
    assert "the decoder in" in message and "after its schedule had unfrozen the base" in message


EARLY: list[dict[str, Any]] = [
    {"step": 255},
    {"step": 0},
    {"step": 256 * 16 - 1, "schedule": {"unfreeze_at": "256os"}},
    {"step": 1665, "steps_per_epoch": 1666, "schedule": {"unfreeze_at": "1e"}},
    {"step": None, "current_epoch": 1, "schedule": {"unfreeze_at": "2e"}},
    {"step": 100, "schedule": {"enabled": False}, "unfreeze_encoder": {"enabled": True, "step": 10000}},
    {"step": 256, "tau": None},  # the trainer saves one just before, without tau
]  # fmt: skip


@pytest.mark.parametrize("values", EARLY, ids=str)
def test_file_without_bases_before_they_were_unfrozen_is_read(values: dict[str, Any], tmp_path: Path) -> None:
    info = inspect_tae(made(tmp_path, **values))
    assert not info.decoder.has_base and not info.encoder.has_base


def test_step_in_the_name_stands_in_for_one_in_the_file(tmp_path: Path) -> None:
    assert "it was written at step 12000" in refused(made(tmp_path, step=None, name="gpt2_step12000_epoch3_.pt"))


def test_file_saved_just_before_unfreezing_is_read(tmp_path: Path) -> None:
    assert inspect_tae(made(tmp_path, step=256, name="checkpoint_step256_epoch1_pre_unfreeze.pt")).step == 256


def test_bases_in_both_halves_are_read_at_any_step(tmp_path: Path) -> None:
    info = inspect_tae(made(tmp_path, stored=("decoder", "encoder"), step=31000))
    assert info.decoder.has_base and info.encoder.has_base


def test_half_that_the_schedule_keeps_frozen_needs_no_base(tmp_path: Path) -> None:
    off = {"components": {role: {"base_model": {"enabled": False}} for role in ("decoder", "encoder")}}
    assert not inspect_tae(made(tmp_path / "off", step=31000, schedule=off)).decoder.has_base
    on = {"components": {"decoder": {"base_model": {"enabled": True}}}}
    assert "the decoder in" in refused(made(tmp_path / "on", step=31000, trained=(), schedule=on))


def test_file_that_says_no_step_is_read_where_nothing_contradicts_it(tmp_path: Path) -> None:
    assert inspect_tae(made(tmp_path, step=None, epoch=None, current_epoch=None)).step is None


def test_bases_trained_from_the_first_step_are_still_asked_for(tmp_path: Path) -> None:
    message = refused(made(tmp_path, step=3, schedule={"enabled": False}))
    assert "was trained together with its base model" in message
