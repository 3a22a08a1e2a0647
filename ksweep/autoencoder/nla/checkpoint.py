"""Which family a checkpoint is of, whether it is whole and what it was given as, and its content digest.

No weights are read and no torch is needed: the launcher runs these checks before anything is submitted. What needs weights or a
tokenizer is checked when a rank loads the model (`nla.py`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksweep.autoencoder.nla.sidecar import NlaRole, Sidecar, read_nla_sidecar
from ksweep.autoencoder.safetensors_header import Tensor, check_attention, check_blocks, model_tensors, read_header
from ksweep.utils import files, hub
from ksweep.utils.errors import CheckpointError, DataError
from ksweep.utils.model_sizes import language_model
from ksweep.utils.notes import Note
from ksweep.utils.text import some_of

HEAD, ADAPTER, ADAPTER_CONFIG = "value_head.safetensors", "adapter_model.safetensors", "adapter_config.json"
HEAD_DTYPES = ("F32", "BF16", "F16", "F64")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


@dataclass(frozen=True)
class CheckpointInfo:
    """One AV or AR that passed every check that needs no weights."""

    path: Path
    sidecar: Sidecar
    layer: int | None
    """L, from the sidecar, or for an AR without one from its depth; None only for an AV that does not say."""
    num_layers: int
    """Blocks that will be loaded: all of an AV's, L + 1 of an AR's."""
    config: Mapping[str, Any]
    """config.json of the model, or under an adapter of its base; the language model's part of a multimodal one, its sizes under
    their usual names."""
    base: Path | None
    """Base model of an adapter; None: full weights."""
    tensors: Mapping[str, Tensor]
    """Headers of the weights (or adapter weights) in `path`, names as they are in the files."""
    notes: tuple[Note, ...] = ()
    """What is unusual, was accepted, and should stand beside the numbers."""

    @property
    def role(self) -> NlaRole:
        """av or ar."""
        return self.sidecar.role

    @property
    def d_model(self) -> int:
        """Width of the vectors."""
        return self.sidecar.d_model

    @property
    def is_adapter(self) -> bool:
        """PEFT adapter over `base`, not full weights."""
        return self.base is not None

    @property
    def weights(self) -> Path:
        """Directory that config.json and the full weights are in."""
        return self.base or self.path

    @property
    def tokenizer(self) -> Path:
        """Directory that the tokenizer is in: the checkpoint's, or its base's."""
        return _tokenizer_directory(self.path, self.weights)

    @property
    def thinks(self) -> bool:
        """Whether the AV may think aloud before it answers."""
        return self.role == "av" and "<think>" in _chat_template(self.tokenizer)


def inspect_nla(path: Path | str, expected_role: NlaRole, base: str | None = None) -> CheckpointInfo:
    """Check everything about an AV or AR directory that can be known from sidecar, configuration and weight headers.

    Args:
        path: directory, or hub id.
        base: base model of an adapter, path or hub id; None takes the one that adapter_config.json names. Full weights ignore it.

    Raises:
        CheckpointError: what is wrong, what was expected, what to do.
    """
    path = hub.resolve(str(path), f"{expected_role.upper()} checkpoint")
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is a file; expected an {expected_role.upper()} directory with nla_meta.yaml. Give a talkative-autoencoder "
            ".pt file as autoencoder.checkpoint."
        )
    sidecar = read_nla_sidecar(path, expected_role)
    base_path = _base(path, base, sidecar) if (path / ADAPTER_CONFIG).exists() else None
    config = _config(base_path or path)
    _check_width(config, sidecar, base_path or path)
    depth = _positive(config, "num_hidden_layers", base_path or path)
    check_attention(config, base_path or path)
    layer = _layer(sidecar, depth, path, is_adapter=base_path is not None)
    num_layers = layer + 1 if expected_role == "ar" and layer is not None else depth
    tensors = _adapter_tensors(path, num_layers) if base_path else model_tensors(path)
    if base_path:
        check_blocks(model_tensors(base_path), config, base_path)
    else:
        check_blocks(tensors, config, path)
    if expected_role == "ar":
        _check_head(path, sidecar.d_model)
    notes = (*sidecar.notes, *_thinking_notes(sidecar, path, _tokenizer_directory(path, base_path or path)))
    return CheckpointInfo(path, sidecar, layer, num_layers, config, base_path, tensors, notes)


def check_pair(
    av: CheckpointInfo,
    ar: CheckpointInfo,
    activations_layer: int | None = None,
    activations_d_model: int | None = None,
    activations_base: str | None = None,
) -> tuple[Note, ...]:
    """AV, AR and the activations belong together: one layer, one width, one base model, one marker.

    Args:
        activations_layer, activations_d_model, activations_base: of the vectors; None is not checked. A base given as a local
            path is compared by the digest of its weights where the sidecars have one, else by its config.json; of a hub id
            only the name is compared, and another one is noted: fine-tunes of a base are what pairs are often used on.

    Returns:
        What was accepted and should stand beside the numbers.

    Raises:
        CheckpointError: AV and AR do not fit. DataError: the activations fit neither.
    """
    a, b = av.sidecar, ar.sidecar
    for what, ours, theirs in (
        ("d_model", a.d_model, b.d_model),
        ("layer", av.layer, ar.layer),
        ("base model", _hub_name(a.base_checkpoint), _hub_name(b.base_checkpoint)),
        ("base digest", a.base_digest, b.base_digest),
        ("digest of the base model", *_base_digests(av, ar)),
        ("marker", a.marker, b.marker),
        ("marker token id", a.marker_id, b.marker_id),
    ):
        if ours is not None and theirs is not None and ours != theirs:
            raise CheckpointError(
                f"AV {av.path} and AR {ar.path} do not belong together: {what} is {ours!r} in the AV and {theirs!r} in the AR. "
                "Pass both halves of one pair."
            )
    return _check_activations(av, ar, activations_layer, activations_d_model, activations_base)


def digest_nla(info: CheckpointInfo) -> str:
    """Content of a checkpoint as 32 hex digits; an adapter's includes its base, since they only mean something together."""
    own = hub.content_digest(info.path)
    if info.base is None:
        return own
    return hashlib.sha256(f"{own} over {hub.content_digest(info.base)}".encode()).hexdigest()[:32]


def _check_activations(
    av: CheckpointInfo, ar: CheckpointInfo, asked_layer: int | None, d_model: int | None, base: str | None
) -> tuple[Note, ...]:
    layer = ar.layer if ar.layer is not None else av.layer
    if None not in (asked_layer, layer) and asked_layer != layer:
        raise DataError(
            f"the activations are of layer {asked_layer}, but AV {av.path} and AR {ar.path} were trained on layer "
            f"{layer}. Extract layer {layer}, or use a pair of layer {asked_layer}."
        )
    if d_model is not None and d_model != av.d_model:
        raise DataError(
            f"the activations have {d_model} dimensions, but AV {av.path} and AR {ar.path} take {av.d_model}. Use "
            f"activations of the pair's base model ({av.sidecar.base_checkpoint})."
        )
    return () if base is None else _check_activations_base(av, ar, base)


def _base_digests(av: CheckpointInfo, ar: CheckpointInfo) -> tuple[str | None, str | None]:
    """What two adapters lie over, where that is not plainly the same directory."""
    if av.base is None or ar.base is None or av.base == ar.base:
        return None, None
    return hub.content_digest(av.base), hub.content_digest(ar.base)


def _base(path: Path, base: str | None, sidecar: Sidecar) -> Path:
    """Local directory of an adapter's base model, its weights verified against the sidecar's base_digest."""
    if (path / "model.safetensors").exists() or (path / "model.safetensors.index.json").exists():
        raise CheckpointError(
            f"{path} holds both full weights and {ADAPTER_CONFIG}: it is not clear which are meant. Keep one of the two in the "
            "directory."
        )
    config = files.read_json(path / ADAPTER_CONFIG, "adapter configuration")
    source = base or config.get("base_model_name_or_path")
    if not isinstance(source, str) or not source:
        raise CheckpointError(
            f"{path} is an adapter, and its {ADAPTER_CONFIG} names no base model. Set autoencoder.base to the base model's "
            "path or hub id."
        )
    try:
        found = hub.resolve(source, "base model")
    except CheckpointError as error:
        where = "autoencoder.base" if base else f"base_model_name_or_path in {path / ADAPTER_CONFIG}"
        raise CheckpointError(
            f"{path} is an adapter over a base model that cannot be had (from {where}): {error} Set autoencoder.base to where "
            "the base model is."
        ) from error
    if sidecar.base_digest is not None:
        _check_base_digest(found, sidecar.base_digest, path)
    return found


def _check_base_digest(base: Path, expected: str, path: Path) -> None:
    weights = base / "model.safetensors"
    if not weights.exists():
        raise CheckpointError(
            f"{path} was trained over a base whose model.safetensors has digest {expected}; {base} has no such single file to "
            "compare. Use the base it was trained on (see set-up in the README)."
        )
    if (found := _weights_digest(weights)) != _short(expected):
        raise CheckpointError(
            f"{path} was trained over other base weights: expected model.safetensors with sha256 {_short(expected)}..., but "
            f"{weights} has {found}... (requantised or another revision?). "
            "An adapter means nothing over other weights: set autoencoder.base to the base it was trained on, or run the "
            "set-up step again."
        )


def _weights_digest(weights: Path) -> str:
    return hub.content_digest(weights)


def _short(expected: str) -> str:
    """First 32 hex digits of "sha256:<hex>", what ksweep.utils.hub keeps."""
    return expected.removeprefix("sha256:").lower()[:32]


def _config(directory: Path) -> dict[str, Any]:
    if not (directory / "config.json").exists():
        raise CheckpointError(
            f"{directory} has no config.json, so its model is unknown. Copy it from where the weights came from."
        )
    return language_model(files.read_json(directory / "config.json", "model configuration"))


def _positive(config: Mapping[str, Any], key: str, directory: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(
            f"{directory / 'config.json'} has {key}={value!r}, expected a whole number >= 1: is it a causal language model's?"
        )
    return value


def _check_width(config: Mapping[str, Any], sidecar: Sidecar, directory: Path) -> None:
    width = _positive(config, "hidden_size", directory)
    if width != sidecar.d_model:
        raise CheckpointError(
            f"the sidecar says d_model={sidecar.d_model}, but the model in {directory} has hidden_size={width}. Sidecar and "
            "weights are not of the same checkpoint, or the base is another model."
        )


def _layer(sidecar: Sidecar, depth: int, path: Path, is_adapter: bool) -> int | None:
    """L; an AR of full weights is exactly L + 1 blocks deep, everything else at least."""
    layer = sidecar.layer
    if sidecar.role == "ar" and layer is None:
        if is_adapter:
            raise CheckpointError(
                f"{path / 'nla_meta.yaml'} names no layer, so how many blocks of the base this AR adapter uses is unknown. Add "
                "critic.extraction_layer_index."
            )
        return depth - 1
    if layer is not None and sidecar.role == "ar" and not is_adapter and depth != layer + 1:
        raise CheckpointError(
            f"AR {path} has num_hidden_layers={depth} in config.json, but its sidecar says layer {layer}, which needs "
            f"{layer + 1} blocks (0 to {layer}). One block off costs half of the "
            "variance explained and looks plausible: use the config.json and sidecar that were released together."
        )
    if layer is not None and layer >= depth:
        raise CheckpointError(
            f"{path} is of layer {layer}, but its model has {depth} blocks (0 to {depth - 1}). Sidecar and model are not of "
            "the same checkpoint."
        )
    return layer


def _adapter_tensors(path: Path, num_layers: int) -> dict[str, Tensor]:
    if not (path / ADAPTER).exists():
        raise CheckpointError(
            f"{path} has {ADAPTER_CONFIG} but no {ADAPTER}: the adapter's weights are missing (or saved as .bin: save them as "
            "safetensors). Download them again."
        )
    tensors = read_header(path / ADAPTER)
    beyond = [name for name in tensors if (match := re.search(r"\blayers\.(\d+)\.", name)) and int(match[1]) >= num_layers]
    if beyond or not tensors:
        raise CheckpointError(
            f"{path / ADAPTER} holds {'weights of blocks that are not used: ' + some_of(beyond) if beyond else 'no tensors'}; "
            f"expected adapter weights of blocks 0 to {num_layers - 1}. "
            "An AR adapter is made over the base cut to L + 1 blocks: check the layer in the sidecar, and that the right file "
            "was saved."
        )
    return tensors


def _check_head(path: Path, d_model: int) -> None:
    file = path / HEAD
    if not file.exists():
        raise CheckpointError(
            f"{path} has no {HEAD}, the d x d map that an AR ends with. Without it this is no AR: download it again, and check "
            "that an AV or base model was not given as `ar`."
        )
    head = read_header(file)
    if set(head) != {"weight"}:
        raise CheckpointError(
            f"{file} holds the tensors {some_of(head) or '(none)'}; expected exactly one, named weight (no bias). Save the head "
            f"as {{'weight': W}}, or download it again."
        )
    if head["weight"].shape != (d_model, d_model) or head["weight"].dtype not in HEAD_DTYPES:
        raise CheckpointError(
            f"{file}: weight is {head['weight'].dtype} of shape {list(head['weight'].shape)}; expected floating point of shape "
            f"[{d_model}, {d_model}]. The head is half-saved, or of another model."
        )


def _hub_name(source: str | None) -> str | None:
    """A hub id for comparison; None for what says nothing: a local path, or nothing."""
    if source is None or source.startswith(("/", ".", "~")) or not hub.HUB_ID.match(source):
        return None
    return source.partition("@")[0].lower()


def _check_activations_base(av: CheckpointInfo, ar: CheckpointInfo, source: str) -> tuple[Note, ...]:
    path = Path(source).expanduser()
    if path.exists():
        return _check_base_directory(av, ar, path, source)
    return next((notes for info in (av, ar) if (notes := base_notes(source, info.sidecar.base_checkpoint, "the pair"))), ())


def base_notes(source: str, trained_on: str | None, whose: str) -> tuple[Note, ...]:
    """A note where two names are of other models. A path that activations come from is compared with nothing."""
    theirs, ours = _hub_name(source), _hub_name(trained_on)
    if theirs and trained_on and Path(trained_on).is_dir():
        text = f"Could not verify that {source} is {trained_on}, the model that {whose} was trained on."
        return () if _is_named(source, Path(trained_on)) else (Note("base model", text),)
    if theirs is None or ours is None or theirs.split("/")[1] == ours.split("/")[1]:  # mirrors keep the name under another owner
        return ()
    return (Note("base model", f"The activations come from {source}, but {whose} was trained on {trained_on}."),)


def _check_base_directory(av: CheckpointInfo, ar: CheckpointInfo, path: Path, source: str) -> tuple[Note, ...]:
    if not (path / "config.json").exists():
        return ()
    check_same_architecture(av, path, source)
    weights = path / "model.safetensors"
    expected = next((info.sidecar.base_digest for info in (av, ar) if info.sidecar.base_digest), None)
    if expected and weights.exists():
        if _weights_digest(weights) == _short(expected):
            return ()
        text = f"The activations come from {source}, whose weights are not those that the pair was trained over ({expected})."
        return (Note("base model", f"{text} It has the same architecture and sizes: a fine-tune?"),)
    base = av.sidecar.base_checkpoint or "the pair's base model"
    if (av.base is not None and av.base == path.resolve()) or _is_named(base, path):
        return ()
    text = f"Could not verify that {source} is {base}: it has the same architecture and sizes, but another name."
    return (Note("base model", text),)


def _is_named(hub_id: str, path: Path) -> bool:
    """Whether a directory is named after a model: .../Qwen2.5-7B-Instruct, or .../models--*--*/snapshots/<revision> of the hub.

    Directories above it say nothing: outputs of training lie below the name of the base as often as the base itself does.
    """
    name, parts = hub_id.partition("@")[0].rpartition("/")[2].lower(), path.absolute().parts
    if len(parts) > 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].lower().rpartition("--")[2] == name
    return path.absolute().name.lower() == name


def check_same_architecture(av: CheckpointInfo, directory: Path, source: str) -> None:
    """Raises DataError: the activations' model has another architecture, depth or width than the AV, and so is not its base."""
    config = _config(directory)
    for key in ("model_type", "num_hidden_layers", "hidden_size"):
        ours, theirs = (str(one.get(key)).removesuffix("_text") for one in (av.config, config))
        if ours != theirs:
            raise DataError(
                f"the activations come from {source}, whose config.json says {key}={theirs}; AV {av.path} was trained over a "
                f"model of {key}={ours} ({av.sidecar.base_checkpoint or 'unnamed'}). Set activations.model to the pair's base "
                "model, or to a fine-tune of it."
            )


def _tokenizer_directory(path: Path, weights: Path) -> Path:
    return path if any((path / name).exists() for name in TOKENIZER_FILES) else weights


def _chat_template(directory: Path) -> str:
    """The chat template's text, wherever a tokenizer keeps it; empty where there is none."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    found = [directory / name for name in ("tokenizer_config.json", "chat_template.json") if (directory / name).is_file()]
    return " ".join(str(files.read_json(path, "tokenizer configuration").get("chat_template") or "") for path in found)


def _thinking_notes(sidecar: Sidecar, path: Path, tokenizer: Path) -> tuple[Note, ...]:
    if sidecar.role == "ar" or sidecar.asks_for_thinking or "enable_thinking" not in _chat_template(tokenizer):
        return ()
    text = (
        f"The chat template of {path} can be rendered with thinking on or off (enable_thinking), and the sidecar does not say "
        "which the AV was trained with; the template's default was used."
    )
    return (Note("prompt", text),)
