"""Find the model that activations come from: a directory, a hub id, or a LoRA adapter over one of these. No torch here."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksweep.config.spec import Activations
from ksweep.utils.errors import CheckpointError, SpecError
from ksweep.utils.files import read_json
from ksweep.utils.hub import content_digest, resolve
from ksweep.utils.lora_config import check_lora_config, named_base
from ksweep.utils.notes import Note
from ksweep.utils.planning_pass import once_per_pass
from ksweep.utils.safetensors_header import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ksweep.utils.text import some_of
from ksweep.utils.weights_check import check_loadable


@dataclass(frozen=True)
class BaseModel:
    """The files of a model: its weights, its tokenizer, and the adapter over the weights if there is one."""

    weights: Path
    adapter: Path | None = None
    base: str | None = None
    """Path or hub id of the model under the adapter."""

    @property
    def tokenizer(self) -> Path:
        """Directory of the tokenizer: that of the adapter, where it has one of its own."""
        has_own = self.adapter is not None and (self.adapter / "tokenizer.json").is_file()
        return self.adapter if self.adapter is not None and has_own else self.weights

    def digest(self) -> str:
        """Return what identifies the content."""
        if self.adapter is None:
            return content_digest(self.weights)
        both = f"{content_digest(self.weights)} under {content_digest(self.adapter)}"
        return hashlib.sha256(both.encode()).hexdigest()[:32]


def locate_model(activations: Activations) -> BaseModel:
    """Return the files of the model that activations come from; a hub id is downloaded first.

    Raises:
        CheckpointError: the model, or the base under an adapter, cannot be found; or an adapter of another kind.
        SpecError: a base under an adapter is stated for a model that is no adapter.
    """
    path = resolve(activations.model or "", "base model")
    if not path.is_dir() or not (path / ADAPTER_CONFIG).is_file() or (path / "config.json").is_file():
        if activations.adapter_base not in (None, activations.model):  # a sweep over a base and adapters of it names it, too
            raise SpecError(
                f"activations.adapter_base={activations.adapter_base} is the base under a LoRA adapter, and activations.model="
                f"{activations.model} is none (no {ADAPTER_CONFIG}): leave it out"
            )
        return BaseModel(path)
    config = adapter_config(path)
    base = activations.adapter_base or named_base(config, path / ADAPTER_CONFIG)
    if base is None:
        raise CheckpointError(
            f"{path} is an adapter that names no base model: set activations.adapter_base to its path or hub id"
        )
    try:
        return BaseModel(resolve(base, "base model"), path, base)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} is an adapter over {base}: {error} Set activations.adapter_base to the base model."
        ) from error


def adapter_config(path: Path) -> dict[str, Any]:
    """Return the configuration of a LoRA adapter.

    Raises:
        CheckpointError: another kind of adapter, one that replaces modules, or one without safetensors.
    """
    config = read_json(path / ADAPTER_CONFIG, "adapter configuration")
    if str(config.get("peft_type", "")).upper() != "LORA":
        raise CheckpointError(f"{path} is an adapter of type {config.get('peft_type')!r}, expected LORA: merge it into its base")
    check_lora_config(config, path / ADAPTER_CONFIG)
    replaced = [name for name in config.get("modules_to_save") or () if name != "lm_head"]  # type: ignore[attr-defined]
    if replaced:
        raise CheckpointError(f"{path} replaces whole modules ({some_of(map(str, replaced))}): merge it into its base")
    if not (path / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(f"{path} has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}: save its weights as safetensors")
    return config


def adapter_notes(model: BaseModel) -> tuple[Note, ...]:
    """Return the note that activations come from a fine-tune, for a model that is an adapter over its base."""
    if model.adapter is None:
        return ()
    text = f"The activations come from {model.adapter}, a LoRA adapter over {model.base}: a fine-tune of that model."
    return (Note("base model", text),)


@once_per_pass
def check_model(model: BaseModel, layer: int) -> tuple[Note, ...]:
    """Check, before a job, that activations of a layer can be computed; a note if that cannot be told here (`check_loadable`).

    Raises:
        CheckpointError: weights are missing or of another shape, an architecture or quantisation that cannot be loaded, an
            adapter that does not fit its base or changes nothing, or no usable tokenizer.
    """
    function = "ksweep.activations.lower_blocks:check_lower_blocks"
    return check_loadable(function, (model, layer), model.weights, (model.digest(), layer))
