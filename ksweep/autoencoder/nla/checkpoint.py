"""Inspect an NLA checkpoint: its role, layer, width and base model, whether its files are complete, and its content digest.

No weights are read and torch is not imported: the launcher runs these checks before it submits a job. Checks that need weights or
a tokenizer run when a rank loads the model (`loading.py`, `prompts.py`).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ksweep.autoencoder.nla.layout import ar_prompting, at_layer, av_prompting, depth_of_model
from ksweep.autoencoder.nla.same_tokens import check_same_tokens
from ksweep.autoencoder.nla.sidecar import (
    CONFIG_NAME,
    FILE_NAME,
    NlaRole,
    Sidecar,
    beside_or_above,
    check_stack,
    is_av,
    read_nla_sidecar,
    sidecar_file,
)
from ksweep.autoencoder.nla.weight_files import LAYER_MEANS, Adapter, WeightFiles, check_head, find_weights
from ksweep.autoencoder.nla.whitening import METHOD, Whitening, check_same_space, find_statistics, read_statistics
from ksweep.autoencoder.prompting import ArPrompting, AvPrompting
from ksweep.config.spec import AS_THE_CHECKPOINT_SAYS, Autoencoder, LayoutName, PromptingOverrides
from ksweep.utils import files, hub
from ksweep.utils.chat_template import chat_template_text
from ksweep.utils.errors import CheckpointError, DataError
from ksweep.utils.hub_repository import NEVER_NEEDED
from ksweep.utils.model_sizes import LARGEST_SIZES, language_model
from ksweep.utils.notes import Note
from ksweep.utils.planning_pass import once_per_pass
from ksweep.utils.safetensors_header import check_names, model_tensors
from ksweep.utils.sidecar_keys import abbreviated
from ksweep.utils.tensor_headers import Tensor, read_header
from ksweep.utils.text import some_of
from ksweep.utils.weights_check import check_loadable, headers_of

LOADER = "ksweep.autoencoder.nla.loading_check:check_loading"
WHITENED = (
    "AV and AR were trained on whitened activations. Vectors are whitened before they are explained and compared: errors, "
    "baseline and FVE are not comparable with those of raw vectors. Norms, and groups by norm, are those of the raw vectors."
)
BESIDE_TOKENIZERS = (
    "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "additional_chat_templates",
)  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


@dataclass(frozen=True)
class CheckpointInfo:
    """An AV or AR that passed every check that needs no weights."""

    path: Path
    sidecar: Sidecar
    layer: int | None
    """L, from the sidecar or, for an AR whose sidecar has none, from its depth; None for an AV whose sidecar has none."""
    num_layers: int
    """Number of blocks that are loaded: all of an AV, L + 1 of an AR."""
    config: Mapping[str, Any]
    """config.json of the model or, for an adapter, of its base; of a multimodal model the language model's part. Sizes are under
    their usual names."""
    base: Path | None
    """Directory of the model under adapters or a head; None for full weights."""
    files: WeightFiles
    """Where its adapters and its head are."""
    tensors: Mapping[str, Tensor]
    """Headers of the weights (or of the last adapter), under their names in the files; empty where a head alone lies in
    `path`."""
    model_depth: int
    """Number of blocks of the whole model, which a half for all layers is told its layer's share of."""
    prompting: AvPrompting | ArPrompting
    """How it is prompted and read: as its sidecar says, or as the spec overrides it."""
    tokenizer: Path
    """Directory with the tokenizer: the checkpoint's, its base's or, where neither has one, that of the spec's base."""
    whitening: Path | None = None
    """Statistics file of the transform that vectors went through before training; None for raw vectors."""
    notes: tuple[Note, ...] = ()
    """Accepted but unusual properties, to be shown with the numbers."""

    @property
    def layout(self) -> LayoutName:
        """By whose rules it is prompted and read."""
        return self.sidecar.layout

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """What is merged into `base`, in this order."""
        return self.files.adapters

    @property
    def role(self) -> NlaRole:
        """Role of the checkpoint, av or ar."""
        return self.sidecar.role

    @property
    def av_prompting(self) -> AvPrompting:
        """The prompting of an AV."""
        assert isinstance(self.prompting, AvPrompting)
        return self.prompting

    @property
    def ar_prompting(self) -> ArPrompting:
        """The prompting of an AR."""
        assert isinstance(self.prompting, ArPrompting)
        return self.prompting

    @property
    def d_model(self) -> int:
        """Width of the vectors."""
        return self.sidecar.d_model

    @property
    def is_adapter(self) -> bool:
        """Whether the checkpoint consists of adapters over `base`."""
        return bool(self.adapters)

    @property
    def space(self) -> str | None:
        """Name and digest of the whitening that it was trained on; None for raw activations."""
        stated = self.sidecar.whitening
        return None if stated is None else f"{METHOD} {stated.sha256}"

    def read_whitening(self) -> Whitening:
        """Return the transform of vectors before the AV.

        Raises:
            CheckpointError: the statistics are not those that the sidecar states.
        """
        assert self.whitening is not None and self.sidecar.whitening is not None
        return read_statistics(self.whitening, self.sidecar.whitening, self.d_model)

    @property
    def weights(self) -> Path:
        """Directory with config.json and the full weights."""
        return self.base or self.path

    @property
    def thinks(self) -> bool:
        """Whether the AV's chat template allows thoughts before the answer."""
        return self.role == "av" and "<think>" in chat_template_text(self.tokenizer)


def inspect_half(autoencoder: Autoencoder, role: NlaRole, beside: CheckpointInfo | None = None) -> CheckpointInfo:
    """Return `inspect_nla` of the AV or AR that a spec names, with what the spec says of it.

    Args:
        beside: the pair's AV, which lends its AR what that lacks.
    """
    source = (autoencoder.av if role == "av" else autoencoder.ar) or ""
    base = None if beside is None or beside.base is None or beside.files.base_is_merged else str(beside.base)
    return inspect_nla(
        hub.resolve(source, f"{role.upper()} checkpoint"), role, autoencoder.base, autoencoder.prompting,
        layout=autoencoder.layout, stack=autoencoder.av_stack if role == "av" else (), layer=autoencoder.layer,
        whitening=autoencoder.whitening, lent_base=base, lent_tokenizer=None if beside is None else beside.tokenizer,
        lent_depth=None if beside is None else beside.num_layers,
    )  # fmt: skip


def _checked_headers(path: Path, base: Path | None, weights: WeightFiles, covered: int) -> Mapping[str, Tensor]:
    """Return the headers of the weights or of the last adapter, once their names are sound; empty where a head alone lies there.

    Args:
        covered: blocks that an adapter may have weights of. nla-at-home trains an AR's adapter on every block and reads it at
            block L; those above change nothing.
    """
    tensors: Mapping[str, Tensor] = {}
    for adapter in weights.adapters:
        tensors = _adapter_tensors(adapter, covered)
    if base is None:
        tensors = model_tensors(path)
    check_names(tensors if base is None else model_tensors(base), base or path)
    return tensors


@once_per_pass
def inspect_nla(
    path: Path | str,
    expected_role: NlaRole,
    base: str | None = None,
    overrides: PromptingOverrides = AS_THE_CHECKPOINT_SAYS,
    *,
    layout: LayoutName | None = None,
    stack: tuple[str, ...] = (),
    layer: int | None = None,
    whitening: str | None = None,
    lent_base: str | None = None,
    lent_tokenizer: Path | None = None,
    lent_depth: int | None = None,
) -> CheckpointInfo:
    """Return what the sidecar, configuration and weight headers of an AV or AR directory say, once all are checked.

    Args:
        path: directory or hub id.
        base: base model under adapters or a head, a path or hub id; None takes the one that the checkpoint names. Full weights
            ignore it.
        overrides: values of the prompting that replace the sidecar's.
        layout, stack, layer, whitening: as the fields of `Autoencoder`; `stack` is that of an AV.
        lent_base: base of the AV, for EasyNLA's LoRA of an AR, whose sidecar names a hub id at most.
        lent_tokenizer: directory with the AV's tokenizer, for an AR of full weights that has none.
        lent_depth: blocks of the AV, for an AR of full weights that is told the depth of its layer.

    Raises:
        CheckpointError: the message says what is wrong, what was expected and what to do.
    """
    # 1. Find the directory and read its sidecar.
    path = hub.resolve(str(path), f"{expected_role.upper()} checkpoint")
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is a file; expected an {expected_role.upper()} directory with nla_meta.yaml. Give a talkative-autoencoder "
            ".pt file as autoencoder.checkpoint."
        )
    sidecar = at_layer(read_nla_sidecar(path, expected_role, overrides, layout), layer, path)
    if whitening is not None and sidecar.whitening is None:
        raise CheckpointError(f"autoencoder.whitening={whitening}, but {path} was trained on raw activations. Leave it out.")
    # 2. Find its weights, and check width, kinds of blocks, depth and layer against config.json.
    weights = find_weights(path, sidecar, expected_role, base, stack, sidecar.layer, lent_base)
    base_path = None if weights.base is None else _base(path, weights.base, base, sidecar)
    if expected_role == "ar" and weights.base is not None and (weights.base == base or sidecar.layout != "kitft"):
        _refuse_av_as_base(path, base_path or path)
    if stack:
        check_stack(path, sidecar, [hub.resolve(source, "adapter of autoencoder.av_stack") for source in stack], overrides)
    if expected_role == "av" and base_path is not None and is_av(base_path):
        weights = replace(weights, base_is_merged=True)
    config = _config(base_path or path)
    _check_width(config, sidecar, base_path or path)
    depth = _positive(config, "num_hidden_layers", base_path or path)
    stated_layer, layer = layer, _layer(sidecar, depth, path, has_base=base_path is not None)
    if None not in (stated_layer, layer) and stated_layer != layer:
        raise CheckpointError(f"autoencoder.layer={stated_layer}, but {path} is of layer {layer} by its depth. Leave it out.")
    num_layers = layer + 1 if expected_role == "ar" and layer is not None else depth
    if weights.num_layers not in (None, num_layers):
        raise CheckpointError(
            f"AR {path}: ar_meta.json says {weights.num_layers} blocks, its sidecar layer {layer}, which needs {num_layers} (0 "
            f"to {layer}). Use the files that were saved together."
        )
    # 3. Check the weight headers, as far as that needs no model.
    tensors = _checked_headers(path, base_path, weights, depth if sidecar.layout == "nla-at-home" else num_layers)
    if weights.head is not None:
        check_head(weights.head, sidecar.d_model)
    # 4. Fill in how it is prompted.
    is_cut = expected_role == "ar" and base_path is None
    whole = depth_of_model(sidecar, depth, is_cut, lent_depth, path)
    filled = (
        av_prompting(sidecar, overrides, depth) if expected_role == "av" else ar_prompting(sidecar, overrides, weights, whole)
    )
    if isinstance(filled, ArPrompting) and weights.head is None and overrides.ar_readout is None:
        _check_read_at_marker(path, filled)
    tokenizer = _tokenizer_directory(path, base_path or path, base, lent_tokenizer if base_path is None else None)
    notes = (*sidecar.notes, *weights.notes, *_thinking_notes(filled, path, tokenizer))
    statistics = None
    if sidecar.whitening is not None:
        statistics = find_statistics(sidecar.whitening, path, whitening, sidecar.d_model)
        notes = (*notes, Note("activations", WHITENED))
    info = CheckpointInfo(
        path=path, sidecar=sidecar, layer=layer, num_layers=num_layers, config=config, base=base_path, files=weights,
        tensors=tensors, prompting=filled, model_depth=whole, tokenizer=tokenizer, whitening=statistics, notes=notes,
    )  # fmt: skip
    # 5. Check that every tensor of its model is listed in the headers, and no other.
    headers = headers_of(info.weights, [read_header(adapter.file) for adapter in weights.adapters])
    stated = [adapter.configuration() for adapter in weights.adapters]
    unchecked = check_loadable(
        LOADER, info, info.weights, (*headers, expected_role, num_layers, weights.keeps_final_norm, stated, _read_whole(info))
    )
    return replace(info, notes=(*notes, *unchecked))


def _read_whole(info: CheckpointInfo) -> list[Any]:
    """Return what the check of a half depends on beside the headers of weights: its prompting, and files that it reads whole."""
    small = [info.tokenizer / name for name in (*TOKENIZER_FILES, *BESIDE_TOKENIZERS)]
    for place in (info.path, info.weights):
        small += [place / name for name in ("config.json", "generation_config.json", LAYER_MEANS)]
    small += [adapter.file for adapter in info.adapters] + ([info.files.head.file] if info.files.head is not None else [])
    with hub.noted_revisions():  # apart: a record names whole checkpoints
        digests = [(path.name, hub.content_digest(path)) for path in small if path.exists()]
    return [repr(info.prompting), info.layout, info.layer, info.sidecar.subtracts_mean, digests]


def check_pair(
    av: CheckpointInfo,
    ar: CheckpointInfo,
    activations_layer: int | None = None,
    activations_d_model: int | None = None,
    activations_base: str | None = None,
) -> tuple[Note, ...]:
    """Check that AV, AR and activations belong together: the same layer, width, base model and marker.

    Args:
        activations_layer, activations_d_model, activations_base: properties of the vectors; None is not checked. A base given as
            a local path is compared by the digest of its weights if a sidecar has one, else by its config.json. A hub id is
            compared by name, and another name is noted but accepted: pairs are often used on fine-tunes of their base.

    Returns:
        Notes on accepted differences, to be shown with the numbers.

    Raises:
        CheckpointError: AV and AR do not fit each other.
        DataError: the activations do not fit the pair.
    """
    # 1. Compare the two halves in every value that both of them state.
    a, b = av.sidecar, ar.sidecar
    for name, av_value, ar_value in (
        ("d_model", a.d_model, b.d_model),
        ("layer", av.layer, ar.layer),
        ("base model", _hub_name(a.base_checkpoint), _hub_name(b.base_checkpoint)),
        ("base digest", a.base_digest, b.base_digest),
        ("digest of the base model", *(_base_digests(av, ar) if {av.layout, ar.layout} != {"easynla"} else (None, None))),
        *(_markers(av, ar) if _must_share_marker(av, ar) else ()),
    ):
        if av_value is not None and ar_value is not None and av_value != ar_value:
            raise CheckpointError(
                f"AV {av.path} and AR {ar.path} do not belong together: {name} is {av_value!r} in the AV and {ar_value!r} in the "
                "AR. Pass both halves of one pair."
            )
    check_same_space(a.whitening, b.whitening)
    # 2. Compare the pair with the activations.
    notes = _marker_notes(av, ar) if av.layout == ar.layout == "kitft" else ()
    if {av.layout, ar.layout} != {"kitft"}:
        notes = (*notes, *_layout_notes(av, ar), *check_same_tokens(av.tokenizer, ar.tokenizer))
    return (*notes, *_stack_notes(av, ar), *_check_activations(av, ar, activations_layer, activations_d_model, activations_base))


def _layout_notes(av: CheckpointInfo, ar: CheckpointInfo) -> tuple[Note, ...]:
    """Return a note where the halves are read by the rules of two trainers, as an AR that judges another group's AV is."""
    text = (
        f"{av.path} is read by the rules of {av.layout}, {ar.path} by those of {ar.layout}. If they are one pair, say whose: "
        "autoencoder.layout (docs/layouts.md)."
    )
    return (Note("checkpoint", text),) if av.layout != ar.layout else ()


def _must_share_marker(av: CheckpointInfo, ar: CheckpointInfo) -> bool:
    """Return whether different markers mean different pairs.

    They do not where the spec states the AV's, nor in an AR of nla-at-home with a head, which never sees one: its trainer writes
    one marker for every model (train_ar_truncated.py).
    """
    if av.layout != ar.layout or av.layout == "kitft" or av.sidecar.marker_id is None:
        return False
    return av.layout == "easynla" or ar.ar_prompting.marker is not None


def _markers(av: CheckpointInfo, ar: CheckpointInfo) -> tuple[tuple[str, Any, Any], ...]:
    a, b = av.sidecar, ar.sidecar
    return (("marker", a.marker, b.marker), ("marker token id", a.marker_id, b.marker_id))


def _marker_notes(av: CheckpointInfo, ar: CheckpointInfo) -> tuple[Note, ...]:
    """Return a note where the sidecars state different markers: the AR of another pair, which never sees one."""
    different = [name for name, x, y in _markers(av, ar) if None not in (x, y) and x != y]
    text = f"{av.path.name} and {ar.path.name} state different markers: they are of different pairs. The AR never sees one."
    return (Note("checkpoint", text),) if different else ()


def digest_nla(info: CheckpointInfo) -> str:
    """Return the digest of a checkpoint's content, 32 hex digits, with all that lies under it: adapters and base model."""
    digests = [_own_digest(info)]
    below = [adapter.directory for adapter in reversed(info.adapters) if adapter.directory != info.path]
    digests += [hub.content_digest(directory, *_leaves_out(info)) for directory in below]
    in_base = info.layout == "kitft" or not info.files.base_is_merged
    digests += [hub.content_digest(info.base, in_base)] if info.base is not None else []
    if info.tokenizer not in (info.path, info.weights):
        names = (*TOKENIZER_FILES, *BESIDE_TOKENIZERS)
        digests += [hub.content_digest(info.tokenizer / name) for name in names if (info.tokenizer / name).exists()]
    if info.sidecar.whitening is not None:
        digests.append(f"whitened {info.sidecar.whitening.sha256}")
    return digests[0] if len(digests) == 1 else hashlib.sha256(" over ".join(digests).encode()).hexdigest()[:32]


def _leaves_out(info: CheckpointInfo) -> tuple[bool, tuple[str, ...]]:
    """Return whether digests of adapters cover subdirectories, and which files they do not: other checkpoints, the optimiser's.

    Keys of kitft's layout from before these were left out stay valid.
    """
    return (True, ()) if info.layout == "kitft" else (False, NEVER_NEEDED)


def _own_digest(info: CheckpointInfo) -> str:
    """Return the digest of a checkpoint's own files. In an EasyNLA run the sidecar may lie above, and other checkpoints below."""
    if info.layout != "easynla":
        leaves_out = () if info.layout == "kitft" else NEVER_NEEDED
        return hub.content_digest(info.path, leave_out=leaves_out)
    above = [file for name in (FILE_NAME, CONFIG_NAME) if (file := _run_file(info.path, name)) and file.parent != info.path]
    parts = [hub.content_digest(info.path, *_leaves_out(info)), *map(hub.content_digest, above)]
    return parts[0] if len(parts) == 1 else hashlib.sha256(" beside ".join(parts).encode()).hexdigest()[:32]


def _run_file(path: Path, name: str) -> Path | None:
    return sidecar_file(path) if name == FILE_NAME else beside_or_above(path, name)


def _check_activations(
    av: CheckpointInfo, ar: CheckpointInfo, activations_layer: int | None, d_model: int | None, base: str | None
) -> tuple[Note, ...]:
    layer = ar.layer if ar.layer is not None else av.layer
    if None not in (activations_layer, layer) and activations_layer != layer:
        raise DataError(
            f"the activations are of layer {activations_layer}, but AV {av.path} and AR {ar.path} were trained on layer "
            f"{layer}. Extract layer {layer}, or use a pair of layer {activations_layer}."
        )
    if d_model is not None and d_model != av.d_model:
        raise DataError(
            f"the activations have {d_model} dimensions, but AV {av.path} and AR {ar.path} take {av.d_model}. Use "
            f"activations of the pair's base model ({av.sidecar.base_checkpoint})."
        )
    return () if base is None else _check_activations_base(av, ar, base)


def _base_digests(av: CheckpointInfo, ar: CheckpointInfo) -> tuple[str | None, str | None]:
    """Return the digests of two adapters' bases; None and None where they are one directory or one half does not lie on it."""
    if av.files.base_is_merged or av.base is None or ar.base is None or av.base == ar.base:
        return None, None
    return hub.content_digest(av.base), hub.content_digest(ar.base)


def _stack_notes(av: CheckpointInfo, ar: CheckpointInfo) -> tuple[Note, ...]:
    """Return a note where the two adapters of an EasyNLA pair name different bases: its RL may start from a merged SFT model."""
    first, second = _base_digests(av, ar) if {av.layout, ar.layout} == {"easynla"} else (None, None)
    text = (
        f"The AV's adapter lies over {av.base}, the AR over {ar.base}, whose weights differ: the AV's is a merged model, or one "
        "of the two is wrong. autoencoder.av_stack or autoencoder.base says which."
    )
    return (Note("base model", text),) if first != second else ()


def _base(path: Path, source: str, stated: str | None, sidecar: Sidecar) -> Path:
    """Return the directory of the base model under a checkpoint, once its weights match the sidecar's base_digest."""
    try:
        directory = hub.resolve(source, "base model")
    except CheckpointError as error:
        where = "autoencoder.base" if source == stated else "the checkpoint's own files"
        raise CheckpointError(
            f"{path} lies over a base model that cannot be found (from {where}): {error} Set autoencoder.base to the "
            "path or hub id of the base model; if it was trained on top of another adapter or on merged weights, name that in "
            "autoencoder.av_stack."
        ) from error
    if sidecar.base_digest is not None:
        _check_base_digest(directory, sidecar.base_digest, path)
    return directory


def _check_read_at_marker(path: Path, prompting: ArPrompting) -> None:
    """Raise CheckpointError unless an AR without a head has a marker in its prompt, where it is read."""
    if prompting.marker is None or prompting.marker_id is None or prompting.marker not in prompting.template:
        raise CheckpointError(
            f"AR {path} has no head, so it is read at the marker of its prompt, and its sidecar gives none: "
            f"tokens.injection_char={prompting.marker!r}, injection_token_id={prompting.marker_id}, prompt "
            f"{abbreviated(prompting.template)}. Use the released sidecar, or state the token that is read "
            "(autoencoder.prompting.ar_readout)."
        )


def _refuse_av_as_base(path: Path, base: Path) -> None:
    """Raise CheckpointError where the base that an AR does not name itself is an AV by the sidecar in its directory."""
    if is_av(base):
        raise CheckpointError(
            f"AR {path} would lie over {base}, which is an AV by its {FILE_NAME}. Set autoencoder.base to the plain base model; "
            f"where the AV's adapter was trained on top of that AV, set autoencoder.av_stack=[{base}]."
        )


def _check_base_digest(base: Path, expected: str, path: Path) -> None:
    weights = base / "model.safetensors"
    if not weights.exists():
        raise CheckpointError(
            f"{path} was trained over a base whose model.safetensors has digest {expected}; {base} has no such single file to "
            "compare. Use the base that it was trained on (see set-up in the README)."
        )
    if (digest := _weights_digest(weights)) != _short(expected):
        raise CheckpointError(
            f"{path} was trained over other base weights: expected model.safetensors with sha256 {_short(expected)}..., but "
            f"{weights} has {digest}... It may be requantised or of another revision. An adapter is valid only over the weights "
            "it was trained on: set autoencoder.base to them, or run the set-up step again."
        )


def _weights_digest(weights: Path) -> str:
    return hub.content_digest(weights)


def _short(expected: str) -> str:
    """Return the first 32 hex digits of "sha256:<hex>", the length that ksweep.utils.hub keeps."""
    return expected.removeprefix("sha256:").lower()[:32]


def _config(directory: Path) -> dict[str, Any]:
    if not (directory / "config.json").exists():
        raise CheckpointError(
            f"{directory} has no config.json, so its model is unknown. Copy the file from the source of the weights."
        )
    return language_model(files.read_json(directory / "config.json", "model configuration"))


def _positive(config: Mapping[str, Any], key: str, directory: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_SIZES[key]:
        raise CheckpointError(
            f"{directory / 'config.json'} has {key}={abbreviated(value)}, expected a whole number from 1 to "
            f"{LARGEST_SIZES[key]:,}. Check that it is the configuration of a causal language model."
        )
    return value


def _check_width(config: Mapping[str, Any], sidecar: Sidecar, directory: Path) -> None:
    width = _positive(config, "hidden_size", directory)
    if width != sidecar.d_model:
        raise CheckpointError(
            f"the sidecar says d_model={sidecar.d_model}, but the model in {directory} has hidden_size={width}. Sidecar and "
            "weights are of different checkpoints, or the base is another model."
        )


def _layer(sidecar: Sidecar, depth: int, path: Path, has_base: bool) -> int | None:
    """Return L, once it fits the depth: exactly L + 1 blocks for an AR of full weights, at least L + 1 for every other model.

    nla-at-home's trainer leaves the base's depth in the config.json of an AR that it has cut: there the files tell its blocks.
    """
    layer, depth_is_exact = sidecar.layer, sidecar.layout != "nla-at-home"
    if sidecar.role == "ar" and layer is None:
        if has_base:
            raise CheckpointError(
                f"{path / FILE_NAME} names no layer, so the number of base blocks that this AR adapter uses is unknown. "
                "Add critic.extraction_layer_index."
            )
        return depth - 1
    if layer is not None and sidecar.role == "ar" and not has_base and depth_is_exact and depth != layer + 1:
        raise CheckpointError(
            f"AR {path} has num_hidden_layers={depth} in config.json, but its sidecar says layer {layer}, which needs "
            f"{layer + 1} blocks (0 to {layer}). An error of one block halves the "
            "variance explained and is hard to notice. Use the config.json and sidecar that were released together."
        )
    if layer is not None and layer >= depth:
        raise CheckpointError(
            f"{path} is of layer {layer}, but its model has {depth} blocks (0 to {depth - 1}). Sidecar and model are of "
            "different checkpoints."
        )
    return layer


def _adapter_tensors(adapter: Adapter, num_layers: int) -> dict[str, Tensor]:
    if not adapter.file.exists():
        raise CheckpointError(
            f"{adapter.directory} has {adapter.config_name} but no {adapter.file.name}: the adapter's weights are missing, or "
            "are saved as .bin. Download them again, or save them as safetensors."
        )
    tensors = read_header(adapter.file)
    unused = [name for name in tensors if (match := re.search(r"\blayers\.(\d+)\.", name)) and int(match[1]) >= num_layers]
    if unused or not tensors:
        raise CheckpointError(
            f"{adapter.file} holds {'weights of blocks that are not used: ' + some_of(unused) if unused else 'no tensors'}; "
            f"expected adapter weights of blocks 0 to {num_layers - 1}. "
            "An AR adapter covers the first L + 1 blocks of its base. Check the layer in the sidecar, and that this is the file "
            "meant."
        )
    return tensors


def _hub_name(source: str | None) -> str | None:
    """Return a hub id in the form for comparison; None for a local path or None."""
    if source is None or source.startswith(("/", ".", "~")) or not hub.HUB_ID.match(source):
        return None
    return source.partition("@")[0].lower()


def _check_activations_base(av: CheckpointInfo, ar: CheckpointInfo, source: str) -> tuple[Note, ...]:
    path = files.named_path(source)
    if path.exists():
        return _check_base_directory(av, ar, path, source)
    return next((notes for info in (av, ar) if (notes := base_notes(source, info.sidecar.base_checkpoint, "the pair"))), ())


def base_notes(source: str, trained_on: str | None, whose: str) -> tuple[Note, ...]:
    """Return a note if the model of the activations and the one that `whose` was trained on differ by name.

    A `source` that is a local path is not compared.
    """
    source_id, trained_id = _hub_name(source), _hub_name(trained_on)
    if source_id and trained_on and os.path.isdir(trained_on):
        text = f"Could not verify that {source} is {trained_on}, the model that {whose} was trained on."
        return () if hub.is_named_after(source, Path(trained_on)) else (Note("base model", text),)
    if (
        source_id is None or trained_id is None or source_id.split("/")[1] == trained_id.split("/")[1]
    ):  # a mirror has another owner
        return ()
    return (Note("base model", f"The activations come from {source}, but {whose} was trained on {trained_on}."),)


def _check_base_directory(av: CheckpointInfo, ar: CheckpointInfo, path: Path, source: str) -> tuple[Note, ...]:
    """Return a note if a local model cannot be verified as the pair's base.

    Raises:
        DataError: it has another architecture or size.
    """
    # 1. Compare architecture and sizes.
    if not (path / "config.json").exists():
        return ()
    check_same_architecture(av, path, source)
    # 2. Compare the weights, if a sidecar states their digest.
    weights = path / "model.safetensors"
    expected = next((info.sidecar.base_digest for info in (av, ar) if info.sidecar.base_digest), None)
    if expected and weights.exists():
        if _weights_digest(weights) == _short(expected):
            return ()
        text = f"The activations come from {source}, whose weights are not those that the pair was trained over ({expected})."
        return (Note("base model", f"{text} It has the same architecture and sizes, so it may be a fine-tune."),)
    # 3. Otherwise compare the names.
    base = av.sidecar.base_checkpoint or "the pair's base model"
    if (av.base is not None and av.base == path.resolve()) or hub.is_named_after(base, path):
        return ()
    text = f"Could not verify that {source} is {base}: it has the same architecture and sizes, but its name does not say so."
    return (Note("base model", text),)


def check_same_architecture(av: CheckpointInfo, directory: Path, source: str) -> None:
    """Check that the activations' model has the AV's architecture, depth and width, as the AV's base or a fine-tune of it does.

    Raises:
        DataError: one of them differs.
    """
    activations_config = _config(directory)
    for key in ("model_type", "num_hidden_layers", "hidden_size"):
        expected, actual = (str(config.get(key)).removesuffix("_text") for config in (av.config, activations_config))
        if actual != expected:
            raise DataError(
                f"the activations come from {source}, whose config.json says {key}={actual}; AV {av.path} was trained over a "
                f"model with {key}={expected} ({av.sidecar.base_checkpoint or 'unnamed'}). Set activations.model to the pair's "
                "base model, or to a fine-tune of it."
            )


def _tokenizer_directory(path: Path, weights: Path, base: str | None, lent: Path | None) -> Path:
    """Return the first directory with a tokenizer: the checkpoint's, that of its weights, the spec's base, `lent`.

    Raises:
        CheckpointError: none has one, as beside an AR that EasyNLA's RL saves (`critic_latest`).
    """
    places = [
        path,
        *([weights] if weights != path else []),
        *([hub.resolve(base, "base model")] if base else []),
        *([lent] if lent else []),
    ]
    for place in places:
        if any((place / name).exists() for name in TOKENIZER_FILES):
            return place
    raise CheckpointError(
        f"{path} holds no tokenizer ({', '.join(TOKENIZER_FILES)}), nor does its base. Copy the tokenizer files that were "
        "released with it, or set autoencoder.base to the base model that has them."
    )


def _thinking_notes(prompting: AvPrompting | ArPrompting, path: Path, tokenizer: Path) -> tuple[Note, ...]:
    if isinstance(prompting, ArPrompting) or prompting.asks_for_thinking or "enable_thinking" in dict(prompting.chat_arguments):
        return ()
    if prompting.states_prompt or not prompting.is_chat:
        return ()
    if "enable_thinking" not in chat_template_text(tokenizer):
        return ()
    text = (
        f"The chat template of {path} can be rendered with thinking on or off (enable_thinking), and the sidecar does not say "
        "which setting the AV was trained with. The template's default was used."
    )
    return (Note("prompt", text),)
