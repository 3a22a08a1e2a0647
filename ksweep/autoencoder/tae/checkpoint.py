"""Read and check talkative-autoencoder checkpoints (.pt files), and choose the file of a directory.

A file is read by `torch_file.py`: nothing that its pickle names is called, and tensor contents stay on disk, so an optimiser
state of gigabytes costs nothing. Names, shapes and options are checked here, contents when a rank loads them (`decoder.py`,
`encoder.py`). torch is imported only when a file is read.
"""

from __future__ import annotations

import hashlib
import logging
import operator
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ksweep.autoencoder.tae.layout import (
    DecoderLayout,
    EncoderLayout,
    check_unfreezing,
    decoder_layout,
    encoder_layout,
    layout_notes,
    section,
    soft_prompt_text,
    whole_number,
)
from ksweep.autoencoder.tae.schedule import Written
from ksweep.utils import files, hub
from ksweep.utils.errors import CheckpointError
from ksweep.utils.model_sizes import LARGEST_SIZES, language_model
from ksweep.utils.notes import Note
from ksweep.utils.planning_pass import once_per_pass
from ksweep.utils.restricted_pickle import StandIn
from ksweep.utils.safetensors_header import check_attention, check_names, model_tensors
from ksweep.utils.sidecar_keys import abbreviated
from ksweep.utils.text import some_of
from ksweep.utils.torch_file import read_checkpoint
from ksweep.utils.weights_check import check_loadable, headers_of

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

SUFFIXES = (".pt", ".pth", ".ckpt")
STEP_IN_NAME = re.compile(r"step[_=-]?(\d+)")
COMPILED = "_orig_mod."
"""Prefix that torch.compile adds to the names of a module's tensors."""
BARE_NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
"""Hub ids by the names without owner that training configurations still use."""


@dataclass(frozen=True)
class TaeInfo:
    """A file with a decoder (AV) and an encoder (AR) that passed every check that needs no tensor contents."""

    path: Path
    step: int | None
    """Training step at which the file was written; None if the file does not state it."""
    layer: int
    """Block whose output is the activation, 0-based."""
    num_tokens: int
    """Number of tokens in every explanation (t_text); no token ends one early."""
    d_model: int
    num_layers: int
    """Number of blocks of the decoder's base."""
    base: Path
    """Directory of the base model of decoder and encoder (model_name)."""
    activations_model: str
    """Model that activations come from (orig_model_name): a local path, or a hub id that is not yet downloaded."""
    decoder: DecoderLayout
    encoder: EncoderLayout
    model_config: Mapping[str, Any] = field(repr=False)
    """config.json of the base; of a multimodal base, the language model's part."""
    soft_prompt_text: str | None
    """Words that the encoder's soft prompt and, after "<text>", its postfix were initialised with."""
    states: Mapping[str, Mapping[str, torch.Tensor]] = field(repr=False, compare=False)
    """Tensors of "decoder" and "encoder", under names without torch.compile's prefix; contents are still on disk."""
    notes: tuple[Note, ...] = ()
    """Assumptions about what the file does not state."""

    @property
    def shares_base_with_activations(self) -> bool:
        """Whether activations come from the base model of decoder and encoder."""
        return self.activations_model == str(self.base)


@once_per_pass
def inspect_tae(path: Path | str, *, base: str | None = None, activations_base: str | None = None) -> TaeInfo:
    """Return what a checkpoint's configuration, tensor names and shapes say, once all are checked.

    Args:
        path: a .pt file, or a directory, whose file with the highest step is taken.
        base: path or hub id of the base model of decoder and encoder; None takes `model_name` from the file. It is also the
            activations' model if the file names one model for both.
        activations_base: path or hub id of the activations' model; None takes `orig_model_name`.

    Raises:
        CheckpointError: the message says what is wrong, what was expected and what to do.
    """
    # 1. Read the file.
    path = checkpoint_file(path)
    checkpoint = read_checkpoint(path)
    states = {role: _state(checkpoint, role, path) for role in ("decoder", "encoder")}
    config = section(checkpoint, "config", f"{path} holds no training configuration")
    # 2. Find the base model, and check the options against it.
    directory = _base(config, base, path)
    model, unchecked = _model_config(directory)
    depth = model["num_hidden_layers"]
    layer = whole_number(config, "layer_l", 0, depth - 1, path, f"the base {directory} has {depth} blocks")
    num_tokens = whole_number(config, "t_text", 1, None, path, "an explanation has at least one token")
    # 3. Derive the layouts from options and tensors.
    decoder = decoder_layout(config, states["decoder"], model, path)
    encoder = encoder_layout(config, states["encoder"], model, path)
    _check_positions(decoder, encoder, num_tokens, model, path)
    # 4. Check that base weights are stored if they were trained.
    notes = _check_base_weights(checkpoint, config, decoder, encoder, model, path)
    return TaeInfo(
        path=path,
        step=_step(checkpoint),
        layer=layer,
        num_tokens=num_tokens,
        d_model=model["hidden_size"],
        num_layers=depth,
        base=directory,
        activations_model=_activations_model(config, activations_base, directory, path),
        decoder=decoder,
        encoder=encoder,
        model_config=model,
        soft_prompt_text=soft_prompt_text(config),
        states=states,
        notes=(*notes, *unchecked),
    )


def checkpoint_file(path: Path | str) -> Path:
    """Return the .pt file of a path or hub id: the file itself, or the one with the highest step of a directory."""
    path = hub.resolve(str(path), "talkative-autoencoder checkpoint")
    return highest_step(path) if path.is_dir() else path


def _check_base_weights(
    checkpoint: Mapping[str, Any],
    config: Mapping[str, Any],
    decoder: DecoderLayout,
    encoder: EncoderLayout,
    model: Mapping[str, Any],
    path: Path,
) -> tuple[Note, ...]:
    """Check that base weights are stored if they were trained, and return notes on what the file does not state or hold."""
    layouts: dict[str, DecoderLayout | EncoderLayout] = {"decoder": decoder, "encoder": encoder}
    check_unfreezing(config, layouts, model, _written(checkpoint, config, path), path)
    notes = tuple(layout_notes(config, layouts, model, path))
    if not encoder.has_base or decoder.has_base or encoder.trains_base:
        return notes
    text = f"{path} holds base weights of the encoder and none of the decoder, which shared one base in training."
    return (*notes, Note("checkpoint", text))


def soft_prompt_sides(info: TaeInfo) -> tuple[str, str]:
    """Return the words before and after an explanation that the encoder's soft prompt was initialised with.

    Raises:
        CheckpointError: the file does not state the words, or marks more than one position for the explanation.
    """
    before, *after = (info.soft_prompt_text or "").split("<text>")
    if not info.soft_prompt_text or len(after) > 1:
        raise CheckpointError(
            f"autoencoder.encoder_prompt=text needs the words of the encoder's prompt, and the config of {info.path} has "
            f"soft_prompt_init_text={info.soft_prompt_text!r}; expected text with at most one <text> in it. Use "
            "encoder_prompt=learned, which the file contains."
        )
    return before, "".join(after)


def digest_tae(info: TaeInfo) -> str:
    """Return the digest of the file and its base, 32 hex digits; the trained tensors are valid only over that base."""
    return hashlib.sha256(f"{hub.content_digest(info.path)} over {hub.content_digest(info.base)}".encode()).hexdigest()[:32]


def is_tae(path: Path) -> bool:
    """Return whether a path is a checkpoint file by its name, or a directory with such files and no NLA sidecar."""
    if path.is_dir():
        return not (path / "nla_meta.yaml").exists() and bool(_candidates(path))
    return path.is_file() and path.suffix in SUFFIXES


def highest_step(directory: Path) -> Path:
    """Return the checkpoint of a training run that was written at the highest step, by the step in the file and not by its date.

    A file that cannot be read is skipped with a warning if its name states an earlier step.

    Raises:
        CheckpointError: there is no checkpoint, there are several runs below the directory, or the latest file is damaged.
    """
    # 1. List the files, which must be of one run.
    paths = _candidates(directory)
    if not paths:
        raise CheckpointError(f"{directory} holds no checkpoint ({', '.join(SUFFIXES)}): give the .pt file, or its directory")
    if len({path.parent for path in paths}) > 1:
        runs = some_of({str(path.parent.relative_to(directory)) for path in paths})
        raise CheckpointError(f"{directory} holds the checkpoints of several runs ({runs}): give the directory of one run")
    # 2. Read where in training each was written.
    written_at: dict[Path, tuple[int, int, str]] = {}
    broken: dict[Path, CheckpointError] = {}
    for path in paths:
        try:
            written_at[path] = _training_order(read_checkpoint(path), path)
        except CheckpointError as error:
            broken[path] = error
    latest = max(written_at, key=lambda path: written_at[path], default=None)
    # 3. Refuse a damaged file that may be the latest.
    for path, damage in broken.items():
        step = _step_in_name(path)
        if latest is None or step is None or step >= written_at[latest][0]:
            raise damage
        log.warning("%s is skipped: %s", path, damage)
    assert latest is not None, "there is no file, or every file is broken"
    return latest


def _state(checkpoint: Mapping[str, Any], role: str, path: Path) -> dict[str, torch.Tensor]:
    """Return one half's tensors under their names without torch.compile's prefixes."""
    import torch

    models = section(checkpoint, "models", f"{path} holds no models (optimiser only?)")
    state = section(models, role, f"{path} holds no {role}; a checkpoint has a decoder and an encoder")
    named: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            kind = tensor.name if isinstance(tensor, StandIn) else type(tensor).__name__
            raise CheckpointError(f"{path}: {role} entry {abbreviated(name)} is a {kind}, expected a tensor")
        if tensor.is_meta:
            raise CheckpointError(f"{path}: {role} tensor {name} has a shape but no content: it was saved without its weights")
        bare = name.replace(COMPILED, "")
        if bare in named:
            raise CheckpointError(f"{path}: the {role} holds {bare} twice, with and without {COMPILED}")
        named[bare] = tensor
    return named


def _base(config: Mapping[str, Any], base: str | None, path: Path) -> Path:
    """Return the directory of the base model of decoder and encoder."""
    name = base if base is not None else config.get("model_name")
    if not isinstance(name, str) or not name:
        raise CheckpointError(
            f"{path}: its config has model_name={abbreviated(name)}, expected a path or hub id. Set autoencoder.base."
        )
    try:
        return hub.resolve(name if base is not None else _source(name, path), "base model")
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} needs a base model that cannot be found (model_name {name!r}): {error} Set autoencoder.base to the path or "
            "hub id of the base model."
        ) from error


def _activations_model(config: Mapping[str, Any], activations_base: str | None, directory: Path, path: Path) -> str:
    """Return the path or hub id of the activations' model; it is the decoder's base only if the file names one model for both."""
    decoder_name, name = config.get("model_name"), config.get("orig_model_name") or config.get("model_name")
    if activations_base is None and (name is None or name == decoder_name):
        return str(directory)
    source = activations_base if activations_base is not None else _source(str(name), path)
    local = files.named_path(source)
    return str(local.resolve()) if local.exists() else source


def _source(name: str, path: Path) -> str:
    """Return the path or hub id of a model in a training configuration; a directory beside the checkpoint is preferred."""
    beside = path.parent / name
    return str(beside) if os.path.isdir(beside) else BARE_NAMES.get(name, name)


def _model_config(directory: Path) -> tuple[dict[str, Any], tuple[Note, ...]]:
    """Return config.json of the language model under the usual names, once its weight files are complete, and notes on that."""
    config = language_model(files.read_json(directory / "config.json", "model configuration"))
    for name in ("num_hidden_layers", "hidden_size"):
        whole_number(config, name, 1, LARGEST_SIZES[name], directory / "config.json", "a causal language model has it")
    check_names(model_tensors(directory), directory)
    check_attention(config, directory)
    return config, check_loadable(
        "ksweep.autoencoder.tae.base_model:check_base_on_meta", directory, directory, headers_of(directory)
    )


def _check_positions(
    decoder: DecoderLayout, encoder: EncoderLayout, num_tokens: int, model: Mapping[str, Any], path: Path
) -> None:
    """Check that prompts fit GPT-2's learned position embeddings; rotary ones have no limit."""
    available = model.get("max_position_embeddings")
    needed = max(decoder.prefix_length, encoder.num_around) + num_tokens
    if model.get("model_type") == "gpt2" and isinstance(available, int) and needed > available:
        raise CheckpointError(
            f"{path}: prompt and {num_tokens} tokens need {needed} positions, but the base has {available}. Base and checkpoint "
            "do not belong together."
        )


def _step(checkpoint: Mapping[str, Any]) -> int | None:
    return _whole(checkpoint.get("step"))


def _whole(value: object) -> int | None:
    """Return a count as an int, also if it was saved as a NumPy number or a tensor; None if it is something else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return None


def _written(checkpoint: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> Written:
    step, epoch = _step(checkpoint), _whole(checkpoint.get("epoch"))
    current = _whole(checkpoint.get("current_epoch"))
    return Written(
        step=_step_in_name(path) if step is None else step,
        epoch=current if current is not None else None if epoch is None else epoch - 1,
        steps_per_epoch=_whole(checkpoint.get("steps_per_epoch")),
        accumulation=_whole(config.get("gradient_accumulation_steps")),
        is_before_unfreezing=True if "pre_unfreeze" in path.name else False if "tau" in checkpoint else None,
    )


def _training_order(checkpoint: Mapping[str, Any], path: Path) -> tuple[int, int, str]:
    """Return the sort key of a run's checkpoints: step, then epoch, then name; files without models come first."""
    if "models" not in checkpoint:
        return -1, -1, path.name
    step, epoch = _step(checkpoint), _whole(checkpoint.get("epoch"))
    if step is None:
        step = _step_in_name(path)
    return (-1 if step is None else step), (-1 if epoch is None else epoch), path.name


def _step_in_name(path: Path) -> int | None:
    match = STEP_IN_NAME.search(path.stem)
    return int(match[1]) if match else None


def _candidates(directory: Path) -> list[Path]:
    """Return the checkpoint files in a directory; if it has none itself, those below it."""
    for paths in (directory.glob("*"), directory.rglob("*")):
        if checkpoints := _checkpoint_files(paths):
            return checkpoints
    return []


def _checkpoint_files(paths: Iterable[Path]) -> list[Path]:
    """Return the checkpoint files among paths, without hidden ones, which are temporary files (._name.pt, .name.pt)."""
    return sorted(path for path in paths if path.suffix in SUFFIXES and not path.name.startswith(".") and path.is_file())
