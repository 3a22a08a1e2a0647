"""Talkative-autoencoder checkpoints: what a .pt file says, which file of a directory is meant, and whether it is whole.

A file is read with torch.load(weights_only=True, mmap=True): its pickle may build tensors, plain containers and a few NumPy
values (schedulers become empty shells), and is refused if it wants anything else; no tensor's content is read, so an optimiser
state of gigabytes costs nothing. Everything that names, shapes and options can tell is checked here; contents are checked when
a rank loads them (`tae_decoder.py`, `tae_encoder.py`). torch is imported when a file is read, not before.
"""

from __future__ import annotations

import hashlib
import logging
import operator
import re
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ksweep.autoencoder.safetensors_header import check_attention, check_blocks, model_tensors
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
from ksweep.utils.model_sizes import language_model
from ksweep.utils.notes import Note
from ksweep.utils.text import some_of

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

SUFFIXES = (".pt", ".pth", ".ckpt")
STEP_IN_NAME = re.compile(r"step[_=-]?(\d+)")
COMPILED = "_orig_mod."
"""What torch.compile puts into the names of a module's tensors."""
BARE_NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
"""Hub ids from before every model had an owner, as training configurations still spell them."""


@dataclass(frozen=True)
class TaeInfo:
    """A decoder (AV) and an encoder (AR) in one file that passed every check that needs no tensor's content."""

    path: Path
    step: int | None
    """Training step that the file was written at."""
    layer: int
    """Block whose output is the activation, 0-based."""
    num_tokens: int
    """t_text: tokens in every explanation; no token ends one early."""
    d_model: int
    num_layers: int
    """Blocks of the decoder's base."""
    base: Path
    """Base model of decoder and encoder (model_name)."""
    activations_model: str
    """Model that activations come from (orig_model_name): a local path, or a hub id that has not been fetched."""
    decoder: DecoderLayout
    encoder: EncoderLayout
    model_config: Mapping[str, Any] = field(repr=False)
    """config.json of the base; the language model's part of a multimodal one."""
    soft_prompt_text: str | None
    """Words that the encoder's soft prompt, and behind "<text>" its postfix, were initialised with."""
    states: Mapping[str, Mapping[str, torch.Tensor]] = field(repr=False, compare=False)
    """Tensors of "decoder" and "encoder", names without torch.compile's prefix, contents still on disk."""
    notes: tuple[Note, ...] = ()
    """What was taken for granted."""

    @property
    def shares_base_with_activations(self) -> bool:
        """Activations come from the very model that decoder and encoder stand on."""
        return self.activations_model == str(self.base)


def inspect_tae(path: Path | str, *, base: str | None = None, activations_base: str | None = None) -> TaeInfo:
    """Check everything about a checkpoint that can be known without reading weights.

    Args:
        path: a .pt file, or a directory, of which the file with the highest step is taken.
        base: where decoder's and encoder's base model is; None takes `model_name` from the file. It stands for the activations'
            model as well if the file names the same one for both.
        activations_base: where the activations' model is; None takes `orig_model_name`.

    Raises:
        CheckpointError: what is wrong, what was expected, what to do.
    """
    path = hub.resolve(str(path), "talkative-autoencoder checkpoint")
    path = highest_step(path) if path.is_dir() else path
    checkpoint = read_checkpoint(path)
    states = {role: _state(checkpoint, role, path) for role in ("decoder", "encoder")}
    config = section(checkpoint, "config", f"{path} holds no training configuration")
    directory = _base(config, base, path)
    model = _model_config(directory)
    depth, width = model["num_hidden_layers"], model["hidden_size"]
    layer = whole_number(config, "layer_l", 0, depth - 1, path, f"the base {directory} has {depth} blocks")
    num_tokens = whole_number(config, "t_text", 1, None, path, "an explanation has at least one token")
    decoder = decoder_layout(config, states["decoder"], model, path)
    encoder = encoder_layout(config, states["encoder"], model, path)
    _check_room(decoder, encoder, num_tokens, model, path)
    notes = list(layout_notes(config, {"decoder": decoder, "encoder": encoder}, model, path))
    check_unfreezing(config, {"decoder": decoder, "encoder": encoder}, model, _written(checkpoint, config, path), path)
    if encoder.has_base and not (decoder.has_base or encoder.trains_base):
        text = f"{path} holds base weights of the encoder and none of the decoder, which shared one base in training."
        notes.append(Note("checkpoint", text))
    return TaeInfo(
        path=path,
        step=_step(checkpoint),
        layer=layer,
        num_tokens=num_tokens,
        d_model=width,
        num_layers=depth,
        base=directory,
        activations_model=_activations_model(config, base, activations_base, directory, path),
        decoder=decoder,
        encoder=encoder,
        model_config=model,
        soft_prompt_text=soft_prompt_text(config),
        states=states,
        notes=tuple(notes),
    )


def soft_prompt_sides(info: TaeInfo) -> tuple[str, str]:
    """The words before and after an explanation that the encoder's soft prompt was initialised with.

    Raises:
        CheckpointError: the file does not say them, or not where the explanation stands.
    """
    before, *after = (info.soft_prompt_text or "").split("<text>")
    if not info.soft_prompt_text or len(after) > 1:
        raise CheckpointError(
            f"autoencoder.encoder_prompt=text needs the words of the encoder's prompt, and the config of {info.path} has "
            f"soft_prompt_init_text={info.soft_prompt_text!r}; expected text with at most one <text> in it. Use "
            "encoder_prompt=learned, which is in the file."
        )
    return before, "".join(after)


def digest_tae(info: TaeInfo) -> str:
    """Content of file and base as 32 hex digits: the trained tensors mean nothing over another base."""
    return hashlib.sha256(f"{hub.content_digest(info.path)} over {hub.content_digest(info.base)}".encode()).hexdigest()[:32]


def is_tae(path: Path) -> bool:
    """A checkpoint file by its name, or a directory that holds some and no NLA sidecar."""
    if path.is_dir():
        return not (path / "nla_meta.yaml").exists() and bool(_candidates(path))
    return path.is_file() and path.suffix in SUFFIXES


def highest_step(directory: Path) -> Path:
    """The checkpoint of a training run that was written at the highest step, whenever its file was touched.

    The step is the one in the file. A file that cannot be read is passed over with a warning if its name says that it is an
    earlier one.

    Raises:
        CheckpointError: no checkpoint, several runs below one directory, or the latest one is damaged.
    """
    found = _candidates(directory)
    if not found:
        raise CheckpointError(f"{directory} holds no checkpoint ({', '.join(SUFFIXES)}): give the .pt file, or its directory")
    if len({path.parent for path in found}) > 1:
        runs = some_of({str(path.parent.relative_to(directory)) for path in found})
        raise CheckpointError(f"{directory} holds the checkpoints of several runs ({runs}): give the one that is meant")
    places: dict[Path, tuple[int, int, str]] = {}
    broken: dict[Path, CheckpointError] = {}
    for path in found:
        try:
            places[path] = _place_in_training(read_checkpoint(path), path)
        except CheckpointError as error:
            broken[path] = error
    latest = max(places, key=lambda path: places[path], default=None)
    for path, damage in broken.items():
        step = _step_in_name(path)
        if latest is None or step is None or step >= places[latest][0]:
            raise damage
        log.warning("%s is passed over: %s", path, damage)
    assert latest is not None, "nothing was found, or all of it is broken"
    return latest


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The dictionary in a .pt file; tensors stay on disk until they are used.

    Raises:
        CheckpointError: not a whole torch file, or its pickle calls for anything but tensors, containers and NumPy numbers.
    """
    import pickle

    import torch

    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} is not a whole torch checkpoint: it has no zip directory at its end, so it was cut off in copying, is "
            "something else, or was saved before torch 1.6. Copy it again, or save it anew with torch.save."
        )
    if _is_torchscript(path):
        raise CheckpointError(
            f"{path} is a TorchScript archive, a program with its weights, and nothing of it was run. Expected the dictionary "
            "that the training run saved with torch.save."
        )
    try:
        with torch.serialization.safe_globals([*_numpy_names(), *_training_names()]):
            value = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: reading it would run more than is needed to read tensors ({_what_was_wanted(error)}), and "
            "nothing of it was run. If you trust where it comes from, load it there and save its models and config alone with "
            "torch.save."
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{path} is not a whole torch checkpoint ({type(error).__name__}: {' '.join(str(error).split())[:200]}). "
            "Copy or download it again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; expected the dictionary that the training run saved")
    return value


def _is_torchscript(path: Path) -> bool:
    """As torch.load tells them; a directory of names that cannot be read is for torch to refuse."""
    with suppress(zipfile.BadZipFile, OSError), zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())
    return False


def _numpy_names() -> list[Any]:
    """What NumPy's random state and metrics are pickled through, under the module names of NumPy 1 and 2."""
    import numpy as np
    from numpy._core import multiarray

    functions = [multiarray._reconstruct, multiarray.scalar]
    named: list[Any] = [
        (function, f"{module}.multiarray.{function.__name__}")
        for function in functions
        for module in ("numpy._core", "numpy.core")
    ]
    numbers = (np.uint32, np.uint64, np.int32, np.int64, np.float32, np.float64, np.bool_)
    return [*named, np.ndarray, np.dtype, *(type(np.dtype(number)) for number in numbers)]


class _Left:
    """Stands where a learning-rate scheduler or an optimiser was; it has what it had, and does nothing."""


def _plain_dict(*_: object) -> dict[Any, Any]:
    return {}


def _training_names() -> list[Any]:
    """What a scheduler within a scheduler is pickled through, as resumed runs hold them; none of torch's own code is called."""
    schedulers = ("CosineAnnealingLR", "CosineAnnealingWarmRestarts", "ExponentialLR", "LinearLR", "PolynomialLR", "StepLR")
    optimisers = ("adamw.AdamW", "adam.Adam", "sgd.SGD")
    names = [f"lr_scheduler.{name}" for name in schedulers] + list(optimisers)
    inert = [(_Left, f"torch.optim.{name}") for name in names]
    return [*inert, (_plain_dict, "collections.defaultdict"), (_plain_dict, "builtins.dict"), (_plain_dict, "__builtin__.dict")]


def _what_was_wanted(error: Exception) -> str:
    text = " ".join(str(error).split())
    match = re.search(r"GLOBAL (\S+)|(?:class|type|function) (\S+)", text)
    return f"it asks for {match[1] or match[2]}" if match else text[:200]


def _state(checkpoint: Mapping[str, Any], role: str, path: Path) -> dict[str, torch.Tensor]:
    """One module's tensors, torch.compile's prefixes taken off their names."""
    models = section(checkpoint, "models", f"{path} holds no models (optimiser only?)")
    state = section(models, role, f"{path} holds no {role}; a checkpoint has both halves")
    named: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if not hasattr(tensor, "is_floating_point"):
            raise CheckpointError(f"{path}: {role} entry {name!r} is a {type(tensor).__name__}, expected a tensor")
        if tensor.is_meta:
            raise CheckpointError(f"{path}: {role} tensor {name} has a shape and no content: it was saved without its weights")
        bare = name.replace(COMPILED, "")
        if bare in named:
            raise CheckpointError(f"{path}: the {role} holds {bare} twice, with and without {COMPILED}")
        named[bare] = tensor
    return named


def _base(config: Mapping[str, Any], base: str | None, path: Path) -> Path:
    """Directory of decoder's and encoder's base model."""
    name = base if base is not None else config.get("model_name")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{path}: its config has model_name={name!r}, expected a path or hub id. Set autoencoder.base.")
    try:
        return hub.resolve(name if base is not None else _source(name, path), "base model")
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} stands on a base model that cannot be had (model_name {name!r}): {error} Set autoencoder.base to where the "
            "base model is."
        ) from error


def _activations_model(config: Mapping[str, Any], base: str | None, asked: str | None, directory: Path, path: Path) -> str:
    """Where activations come from; the decoder's base only if both names say so."""
    decoder_name, name = config.get("model_name"), config.get("orig_model_name") or config.get("model_name")
    if asked is None and (name is None or name == decoder_name):
        return str(directory)
    source = asked if asked is not None else _source(str(name), path)
    local = Path(source).expanduser()
    return str(local.resolve()) if local.exists() else source


def _source(name: str, path: Path) -> str:
    """A model's name in a training configuration: a directory beside the checkpoint, a path, or a hub id."""
    beside = path.parent / name
    return str(beside) if beside.is_dir() else BARE_NAMES.get(name, name)


def _model_config(directory: Path) -> dict[str, Any]:
    """config.json of the language model, depth, width and context under these names; its weight files are complete."""
    config = language_model(files.read_json(directory / "config.json", "model configuration"))
    for name in ("num_hidden_layers", "hidden_size"):
        whole_number(config, name, 1, None, directory / "config.json", "is it a causal language model's?")
    check_blocks(model_tensors(directory), config, directory)
    check_attention(config, directory)
    return config


def _check_room(decoder: DecoderLayout, encoder: EncoderLayout, num_tokens: int, model: Mapping[str, Any], path: Path) -> None:
    """Learned position embeddings end somewhere; rotary ones do not."""
    room = model.get("max_position_embeddings")
    needed = max(decoder.prefix_length, encoder.num_around) + num_tokens
    if model.get("model_type") == "gpt2" and isinstance(room, int) and needed > room:
        raise CheckpointError(
            f"{path}: prompt and {num_tokens} tokens need {needed} positions, but the base has {room}. Base and checkpoint do "
            "not belong together."
        )


def _step(checkpoint: Mapping[str, Any]) -> int | None:
    return _whole(checkpoint.get("step"))


def _whole(value: object) -> int | None:
    """A count as an int, also one that was saved as a NumPy number or a tensor."""
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


def _place_in_training(checkpoint: Mapping[str, Any], path: Path) -> tuple[int, int, str]:
    """What checkpoints of a run are ordered by: step, then epoch, then name."""
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
    """Checkpoint files in a directory; where it has none itself, those below it."""
    for found in (directory.glob("*"), directory.rglob("*")):
        if paths := _files(found):
            return paths
    return []


def _files(found: Iterable[Path]) -> list[Path]:
    """Hidden ones are somebody's temporary files (._name.pt, .name.pt)."""
    return sorted(path for path in found if path.suffix in SUFFIXES and not path.name.startswith(".") and path.is_file())
