"""Read `nla_meta.yaml`, the sidecar of an NLA checkpoint, in every published spelling and layout. Nothing here imports torch.

A key that is not understood raises an error with its name; `ksweep.utils.sidecar_keys` lists the keys that only inform. The three
layouts are those of kitft/natural_language_autoencoders, of EasyNLA (and nanoNLA), and of anicka-net/nla-at-home; docs/layouts.md
says how they differ.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from ksweep.autoencoder.nla.whitening import WhiteningStated, stated_whitening
from ksweep.autoencoder.prompting import DEPTH_FIELD, MARKER_FIELD, TEXT_FIELD
from ksweep.config.spec import AS_THE_CHECKPOINT_SAYS, LayoutName, PromptingOverrides
from ksweep.utils import files
from ksweep.utils.errors import CheckpointError
from ksweep.utils.hub import folders_upwards
from ksweep.utils.notes import Note
from ksweep.utils.plain_values import has_lone_surrogate
from ksweep.utils.sidecar_keys import (
    LAYER_KEYS,
    abbreviated,
    base_model,
    check_keys,
    is_done,
    read_layer,
    read_yaml,
    requests,
    value_at,
)

NlaRole = Literal["av", "ar"]
FILE_NAME = "nla_meta.yaml"
ROLE_SPELLINGS: Mapping[str, NlaRole] = {"av": "av", "actor": "av", "ar": "ar", "critic": "ar"}
"""Released sidecars use av and ar, sidecars of the training code actor and critic."""
TEMPLATE_KEYS: Mapping[NlaRole, tuple[str, str]] = {
    "av": ("prompt_templates.av", "prompt_templates.actor"), "ar": ("prompt_templates.ar", "prompt_templates.critic"),
}  # fmt: skip
NLA_SIDECAR_KEYS = frozenset({
    "kind", "schema_version", "role", "d_model", "extraction.d_model", "hidden_size", "base_checkpoint", "base_digest",
    "base_model", "extraction.base_model", "extraction.injection_scale", "extraction.mse_scale", "tokens.injection_char",
    "tokens.injection_token_id", "tokens.injection_left_neighbor_id", "tokens.injection_right_neighbor_id",
    "tokens.critic_suffix_ids", "training.activation_norm", "extraction.norm", "extraction.whitening",
    *LAYER_KEYS, *TEMPLATE_KEYS["av"], *TEMPLATE_KEYS["ar"],
})  # fmt: skip
AR_LORA = "ar_lora_value_head.safetensors"
"""EasyNLA's AR over a base: its LoRA and its head in one file."""
HEADS = "value_heads.safetensors"
"""Heads of an AR for all layers."""
AR_HEAD_FILES = ("value_head.safetensors", AR_LORA, HEADS)
"""Files that only an AR directory contains."""
CONFIG_NAME = "nla_config.json"
"""Beside or above an EasyNLA checkpoint: what its sidecar leaves open, the rendered prompt among it."""
AT_HOME_METHODS = (
    "lora_sft", "full_ft_sft", "grpo", "lora_sl", "value_head+frozen", "value_head+finetune",
    "per_layer_value_heads+frozen_backbone",
)  # fmt: skip
"""Values of training.method in sidecars of nla-at-home, which never state a base model or tokens beside the marker."""
AT_HOME_KEYS = frozenset({
    "training.method", "training.injection_mode", "training.chat_template",
    "training.mean_subtract", "training.min_layer", "training.backbone_layers",
})  # fmt: skip
DEPTH_KEYS = frozenset({"variant", "depth_percentages"})
CONFIG_KEYS = frozenset({
    "base_model", "layer", "d_model", "injection_char", "injection_token_id", "injection", "actor_prompt_rendered",
    "actor_prompt_ids", "critic_prompt_template", "ar_lora_r", "ar_num_layers", "lora_targets",
})  # fmt: skip
REPLACES, ADDS = re.compile(r"replac|embedding row", re.IGNORECASE), re.compile(r"\badd|norm.?match|\+", re.IGNORECASE)
"""Words on how a vector enters a prompt; the known file has "additive norm-matched (Karvonen) at block-1 output"."""
DECIDED_BY: Mapping[str, tuple[str, ...]] = {
    "prefill": ("prefill", "assistant_prefill", "actor_prefill", "prompt_prefill", "reasoning_mode", "actor_reasoning_mode"),
    "chat_arguments": (
        "enable_thinking", "chat_template_kwargs", "chat_template_args", "chat_kwargs", "reasoning_mode", "actor_reasoning_mode",
    ),
    "injection": ("injection", "injection_mode", "injection_method", "injection_type", "injection_site", "injection_layer"),
}  # fmt: skip
"""Keys that say nothing any more once the spec states the field of `autoencoder.prompting`."""
DEPTHS = (4, 10, 17, 25, 32, 40, 47, 55, 63, 71, 80, 90, 96)
"""Percentages that nla-at-home's pairs for all layers are told, where the sidecar lists none."""
UNIVERSAL_AR_TEMPLATE = (
    f"Summary of the following text from depth {DEPTH_FIELD}%: <text>{TEXT_FIELD}</text> <summary>{MARKER_FIELD}"
)
"""Prompt of nla-at-home's AR for all layers, which its sidecar does not state (train_universal_ar.py of cc84bc1)."""
FIELD = re.compile(r"\{[\w\s-]*(?:[.\[!:][^{}]*)?\}|<<[\w\s-]+>>|\[\[[\w\s-]+\]\]|%\(\w+\)[sdfgr]")
"""A field of `str.format` or of another template syntax; braces around anything else (JSON, code) are text."""
OPEN_TAG = re.compile(r"<[A-Za-z][\w-]*>\s*$")
AR_OF_AT_HOME = "; an AR of nla-at-home is read at its marker: set autoencoder.layout=nla-at-home"
ANSWER_TAG = re.compile(r"<(explanation|answer|think|thinking|thought|reasoning)>")
"""A tag that opens an answer, or thoughts before it."""
ENCLOSING_TAGS = ("<explanation>", "<answer>")
"""Answer tags that an explanation may begin inside of, where the spec says so; behind the others stand thoughts."""
MENTION = re.compile(r"\s*(?:xml\s+)?(?:tags?|elements?|brackets|markers?)\b|[.,;!?)`'\"]|\s+(?:and|or|to)\b", re.IGNORECASE)
"""What follows a tag that is only mentioned, as in "within <explanation> tags"."""


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """A parsed nla_meta.yaml. None means that the sidecar does not state the value."""

    role: NlaRole
    layout: LayoutName
    d_model: int
    layer: int | None
    """L: the block whose output was verbalized, 0-based."""
    is_universal: bool
    """Whether it was trained for all layers, and is told the depth of the one that it is used at."""
    depths: tuple[int, ...]
    """Depths that it may be told, in percent of the model."""
    model_depth: int | None
    """Blocks of the model that one for all layers was trained for."""
    method: str | None
    """How nla-at-home trained it, which says which files it has."""
    base_checkpoint: str | None
    base_digest: str | None
    """"sha256:<hex>" of the base's model.safetensors. Only ksweep writes it, for adapters, which fit one set of weights."""
    injection_scale: float | None
    """Norm of the injected row; where `multiplies` is set, the number that vectors are multiplied by."""
    multiplies: bool
    is_chat: bool
    """Whether the AV's message goes through the chat template."""
    prompt_ids: tuple[int, ...] | None
    """Token ids of the AV's whole prompt."""
    prompt_text: str | None
    """The AV's whole prompt, where its ids are not stated."""
    min_layer: int
    """Lowest layer that it was trained for."""
    subtracts_mean: bool
    """Whether the AR gives vectors less the mean of their layer."""
    whitening: WhiteningStated | None
    """What is stated of the transform that vectors went through before training."""
    activation_norm: float | None
    """Median norm of the training vectors. Only ksweep writes it; no public sidecar has it."""
    mse_scale: float | None
    """Norm that both vectors are scaled to before the error is taken."""
    marker: str | None
    marker_id: int | None
    left_id: int | None
    right_id: int | None
    suffix_ids: tuple[int, ...] | None
    """Last token ids of every AR prompt."""
    av_template: str | None
    ar_template: str | None
    asks_for_thinking: bool
    """Whether the sidecar has enable_thinking: true, which must then be the chat template's default."""
    notes: tuple[Note, ...]

    @property
    def av_message(self) -> str:
        """The AV's user message, with the marker filled in."""
        assert self.av_template is not None and self.marker is not None
        return self.av_template.replace(MARKER_FIELD, self.marker)


def read_nla_sidecar(
    directory: Path,
    expected_role: NlaRole,
    overrides: PromptingOverrides = AS_THE_CHECKPOINT_SAYS,
    layout: LayoutName | None = None,
) -> Sidecar:
    """Return the parsed and checked sidecar of a checkpoint, with the spec's marker, templates and scale in place of its own.

    Args:
        directory: the checkpoint. The sidecar of an EasyNLA run may lie above it.
        layout: by whose rules the sidecar is read; None recognises them.

    Raises:
        CheckpointError: the sidecar is missing, is not of an NLA model, has another role, or lacks a value that its role needs.
    """
    # 1. Read the YAML, and check that it describes an NLA model of the expected role.
    path = sidecar_file(directory) or directory / FILE_NAME
    meta = _read(path, directory, expected_role)
    is_recognised, layout = layout is None, layout or recognised_layout(meta, directory)
    _check_kind(meta, path, expected_role, layout)
    notes: list[Note] = []
    role = _role(meta, path, directory, expected_role, notes, layout)
    config = _config_of_run(directory, meta, path, notes, overrides) if layout == "easynla" else {}
    # 2. Refuse keys that could change a number and are not understood.
    decided = frozenset(key for field, keys in DECIDED_BY.items() if getattr(overrides, field) is not None for key in keys)
    check_keys(meta, _understood_keys(meta, role, layout), path, CheckpointError, informs=decided)
    # 3. Parse the values, each with a check of its type, and put the spec's in their place.
    if is_recognised and layout == "kitft":
        notes += _notes_on_layout(directory, meta, role)
    sidecar = _overridden(_parsed(meta, config, path, role, layout, notes), overrides)
    if role == "ar" and sidecar.layer is None and (directory / HEADS).exists():
        sidecar = replace(sidecar, is_universal=True)
    # 4. Check that the values this role needs are there and usable.
    more = _check_values(sidecar, meta, path, overrides)
    return replace(sidecar, notes=(*sidecar.notes, *more))


def _understood_keys(meta: Mapping[str, Any], role: NlaRole, layout: LayoutName) -> frozenset[str]:
    """Return the keys that are read of a sidecar of this role and layout."""
    is_at_home = layout == "nla-at-home"
    is_told_depth = any(DEPTH_FIELD in str(value_at(meta, key)) for key in TEMPLATE_KEYS[role])
    return (
        NLA_SIDECAR_KEYS
        | (AT_HOME_KEYS if is_at_home else frozenset())
        | (DEPTH_KEYS if is_told_depth or is_at_home else frozenset())
    )


def _parsed(
    meta: Mapping[str, Any], config: Mapping[str, Any], path: Path, role: NlaRole, layout: LayoutName, notes: list[Note]
) -> Sidecar:
    """Return the values of a sidecar and of its run's configuration; notes are added to `notes`."""
    d_model = _d_model(meta, path, notes if layout == "kitft" else [])
    variant = value_at(meta, "variant")
    is_universal = variant == "universal"
    if not (is_universal or variant is None or is_done("variant", variant)):
        _wrong(path, "variant", variant, "'universal', or none: another could be prompted in another way")
    mode = value_at(meta, "training.injection_mode")
    sidecar = Sidecar(
        role=role,
        layout=layout,
        d_model=d_model,
        layer=read_layer(meta, path, CheckpointError),
        is_universal=is_universal,
        depths=_ids(meta, "depth_percentages", path, "a list of whole numbers, percentages") or DEPTHS,
        model_depth=_whole(meta, "n_layers", path, minimum=1) if is_universal else None,
        method=_text(meta, "training.method", path) if layout == "nla-at-home" else None,
        multiplies=layout == "nla-at-home" and role == "av" and mode is None,
        is_chat=layout != "nla-at-home" or _flag(meta, "training.chat_template", path),
        prompt_ids=_ids(config, "actor_prompt_ids", path) if role == "av" else None,
        prompt_text=_text(config, "actor_prompt_rendered", path) if role == "av" else None,
        min_layer=_whole(meta, "training.min_layer", path) or 0,
        subtracts_mean=_flag(meta, "training.mean_subtract", path),
        whitening=stated_whitening(meta.get("extraction"), path),
        base_checkpoint=base_model(meta, path, CheckpointError, notes),
        base_digest=_text(meta, "base_digest", path),
        injection_scale=_scale(meta, "injection_scale", d_model, path, absent=None),
        activation_norm=_positive(meta, "training.activation_norm", path),
        mse_scale=_scale(meta, "mse_scale", d_model, path, absent=math.sqrt(d_model)),
        marker=_text(meta, "tokens.injection_char", path),
        marker_id=_whole(meta, "tokens.injection_token_id", path),
        left_id=_whole(meta, "tokens.injection_left_neighbor_id", path),
        right_id=_whole(meta, "tokens.injection_right_neighbor_id", path),
        suffix_ids=_ids(meta, "tokens.critic_suffix_ids", path),
        av_template=_template(meta, "av", path, is_universal),
        ar_template=_template(meta, "ar", path, is_universal, has_marker=layout == "nla-at-home" and role == "ar"),
        asks_for_thinking=requests(meta, "enable_thinking"),
        notes=tuple(notes),
    )
    if is_universal and layout == "nla-at-home" and role == "ar" and sidecar.ar_template is None and sidecar.marker is not None:
        sidecar = replace(sidecar, ar_template=UNIVERSAL_AR_TEMPLATE)
    return sidecar


def _check_values(sidecar: Sidecar, meta: Mapping[str, Any], path: Path, overrides: PromptingOverrides) -> list[Note]:
    """Check that the values that a role needs are there and usable, and return notes on unusual ones.

    Raises:
        CheckpointError: one is missing, or could not have been used in training.
    """
    if sidecar.layout == "easynla" and sidecar.layer is None:
        _wrong(
            path,
            "extraction.layer_index",
            None,
            "the block whose output was verbalized: without it the depth of the AR is unknown",
        )
    if sidecar.role == "ar":
        _check_ar(sidecar, path)
        blocks = _whole(meta, "training.backbone_layers", path) if sidecar.layout == "nla-at-home" else None
        if None not in (blocks, sidecar.layer) and blocks != sidecar.layer + 1:  # type: ignore[operator]
            _wrong(path, "training.backbone_layers", blocks, f"L + 1 with the stated L of {sidecar.layer}: blocks 0 to L")
        return []
    mode, method = value_at(meta, "training.injection_mode"), value_at(meta, "training.method")
    if sidecar.layout == "kitft" and mode is None and method in ("lora_sft", "full_ft_sft"):
        raise CheckpointError(
            f"{path} has training.method={method!r} and no training.injection_mode: the first version of nla-at-home multiplied "
            "vectors by injection_scale instead of scaling them to that norm, without a chat template, but this sidecar states "
            "a base model or tokens beside the marker as that trainer never did. Set autoencoder.layout=nla-at-home if it is "
            "of that trainer."
        )
    if sidecar.layout == "nla-at-home" and mode not in (None, "normalize"):
        _wrong(path, "training.injection_mode", mode, "'normalize', or no such key where vectors were multiplied by the scale")
    return _check_av(sidecar, path, overrides)


def sidecar_file(directory: Path) -> Path | None:
    """Return the sidecar of a checkpoint: the one in its directory, else that of the training run above it; None without one."""
    own = directory / FILE_NAME
    if own.exists():
        return own
    above = beside_or_above(directory, FILE_NAME)
    return above if above is not None and _is_of_data_set(above) else None


def beside_or_above(directory: Path, name: str) -> Path | None:
    """Return the nearest file of a name in a checkpoint's directory or those above it; None without one."""
    return next((folder / name for folder in folders_upwards(directory) if (folder / name).is_file()), None)


def _is_of_data_set(path: Path) -> bool:
    meta = read_yaml(path, CheckpointError)
    return isinstance(meta, dict) and meta.get("kind") == "nla_dataset"


def is_av(directory: Path) -> bool:
    """Return whether the sidecar in a directory says that it is an AV; where it states no role, the files decide."""
    file = directory / FILE_NAME
    meta = read_yaml(file, CheckpointError) if file.is_file() else None
    if not isinstance(meta, dict):
        return False
    role = meta.get("role")
    if role is not None:
        return isinstance(role, str) and ROLE_SPELLINGS.get(role) == "av"
    return not any((directory / name).exists() for name in AR_HEAD_FILES)


def check_stack(path: Path, sidecar: Sidecar, below: Sequence[Path], overrides: PromptingOverrides) -> None:
    """Check what lies under an AV's adapter, as far as it has sidecars.

    Raises:
        CheckpointError: a directory is there twice, is an AR, or is of another width, layer or marker.
    """
    for i, entry in enumerate(below):
        if entry in (path, *below[:i]):
            raise CheckpointError(
                f"autoencoder.av_stack: {entry} would be applied twice. Name each part once, the AV in av alone."
            )
        file = sidecar_file(entry) or entry / FILE_NAME
        read = read_yaml(file, CheckpointError) if file.is_file() else None
        meta = read if isinstance(read, dict) else {}
        role = meta.get("role")
        if (isinstance(role, str) and ROLE_SPELLINGS.get(role) == "ar") or any((entry / name).exists() for name in AR_HEAD_FILES):
            raise CheckpointError(f"autoencoder.av_stack: {entry} is an AR. Name what the AV's adapter was trained on top of.")
        width = _whole(meta, "d_model", file) or _whole(meta, "extraction.d_model", file)
        marker = sidecar.marker if overrides.marker is None else None
        for name, expected, stated in (
            ("d_model", sidecar.d_model, width), ("layer", sidecar.layer, read_layer(meta, file, CheckpointError)),
            ("marker", marker, _text(meta, "tokens.injection_char", file)),
        ):  # fmt: skip
            if None not in (expected, stated) and expected != stated:
                raise CheckpointError(
                    f"autoencoder.av_stack: {name} is {stated!r} in {entry}, {expected!r} in {path}, which lies on it. Name what "
                    "the AV's adapter was trained on top of."
                )


def recognised_layout(meta: Mapping[str, Any], directory: Path) -> LayoutName:
    """Return the layout that a sidecar and the files beside it are of."""
    if meta.get("kind") == "nla_dataset" or (directory / AR_LORA).exists():
        return "easynla"
    others = ("base_checkpoint", "base_model", "extraction.base_model", "tokens.injection_left_neighbor_id")
    is_at_home = value_at(meta, "training.method") in AT_HOME_METHODS and not any(value_at(meta, key) for key in others)
    return "nla-at-home" if is_at_home else "kitft"


def _notes_on_layout(directory: Path, meta: Mapping[str, Any], role: NlaRole) -> list[Note]:
    """Return notes on what speaks for another layout than kitft's, by whose rules a checkpoint is read if none is recognised."""
    easynla = ["ar_meta.json"] if role == "ar" and (directory / "ar_meta.json").exists() else []
    easynla += [CONFIG_NAME] if beside_or_above(directory, CONFIG_NAME) else []
    template = next((text for key in TEMPLATE_KEYS[role] if isinstance(text := value_at(meta, key), str)), "")
    signs = [("easynla", f"{name}, which EasyNLA writes, lies beside or above it") for name in easynla[:1]]
    if role == "av" and template.rstrip().endswith(ENCLOSING_TAGS[0]):
        signs.append(("nla-at-home", "its prompt ends in <explanation>, as nla-at-home's do"))
    return [
        Note("checkpoint", f"{directory} is read by kitft's rules, but {why}: if it is of {name}, set autoencoder.layout={name}.")
        for name, why in signs
    ]


def _config_of_run(
    directory: Path, meta: Mapping[str, Any], path: Path, notes: list[Note], overrides: PromptingOverrides
) -> dict[str, Any]:
    """Return nla_config.json of an EasyNLA run, once it agrees with the sidecar; empty without one.

    What it says of the injection is a sentence of any wording, which is noted unless it speaks of another way than EasyNLA's.
    """
    file = beside_or_above(directory, CONFIG_NAME)
    if file is None:
        return {}
    config = files.read_json(file, "run configuration")
    check_keys(config, CONFIG_KEYS, file, CheckpointError)
    templates = {value_at(meta, key) for key in TEMPLATE_KEYS["ar"]} - {None}
    stated = config.get("critic_prompt_template")
    if templates and stated not in (None, *templates):
        raise CheckpointError(
            f"{file} has critic_prompt_template={abbreviated(stated)}, {path} {abbreviated(next(iter(templates)))}. Keep the "
            "one that was used in training."
        )
    for key, dotted in (
        ("layer", "extraction.layer_index"), ("d_model", "extraction.d_model"), ("injection_char", "tokens.injection_char"),
        ("injection_token_id", "tokens.injection_token_id"), ("base_model", "extraction.base_model"),
    ):  # fmt: skip
        a, b = config.get(key), value_at(meta, dotted)
        if None not in (a, b) and a != b:
            raise CheckpointError(f"{file} has {key}={abbreviated(a)}, {path} has {dotted}={abbreviated(b)}. Make them equal.")
    _ids(config, "actor_prompt_ids", file)
    _text(config, "actor_prompt_rendered", file)
    layer, blocks = read_layer(meta, path, CheckpointError), _whole(config, "ar_num_layers", file)
    if None not in (layer, blocks) and blocks != layer + 1:  # type: ignore[operator]
        raise CheckpointError(f"{file} has ar_num_layers={blocks}, {path} layer {layer}, which needs L + 1. Make them agree.")
    if (sentence := config.get("injection")) is not None:
        replaces = isinstance(sentence, str) and REPLACES.search(sentence) and not ADDS.search(sentence)
        if overrides.injection is None and (replaces or not isinstance(sentence, str)):
            raise CheckpointError(
                f"{file} has injection={abbreviated(sentence)}, expected a sentence on a vector that is added to the output of "
                "block 1, as EasyNLA does. Say how it enters: autoencoder.prompting.injection."
            )
        text = f"{file} describes the injection as {abbreviated(sentence)}. The vector is added to the output of block 1."
        notes.append(Note("prompt", text))
    return config


def _overridden(sidecar: Sidecar, overrides: PromptingOverrides) -> Sidecar:
    """Return the sidecar with the spec's marker, templates and scale, and without the token ids that they make void.

    Raises:
        CheckpointError: a template has a field that nothing fills in.
    """
    if overrides.marker is not None and sidecar.role == "av":
        sidecar = replace(sidecar, marker=overrides.marker, marker_id=None, left_id=None, right_id=None)
    if overrides.av_template is not None:
        _check_fields(overrides.av_template, (MARKER_FIELD,), "autoencoder.prompting.av_template")
        sidecar = replace(sidecar, av_template=overrides.av_template, left_id=None, right_id=None)
    if overrides.ar_template is not None:
        _check_fields(overrides.ar_template, (TEXT_FIELD,), "autoencoder.prompting.ar_template", unescapes=True)
        sidecar = replace(sidecar, ar_template=overrides.ar_template, suffix_ids=None)
    if overrides.injection_scale is not None:
        sidecar = replace(sidecar, injection_scale=overrides.injection_scale, multiplies=False)
    return sidecar


def _read(path: Path, directory: Path, expected: NlaRole) -> dict[str, Any]:
    try:
        meta = read_yaml(path, CheckpointError)
    except FileNotFoundError:
        raise CheckpointError(_no_sidecar(directory, expected)) from None
    if not isinstance(meta, dict):
        raise CheckpointError(
            f"{path} holds a {type(meta).__name__}, expected keys and values (kind, role, d_model, ...). The file may "
            "be incomplete."
        )
    return meta


def _check_kind(meta: Mapping[str, Any], path: Path, expected: NlaRole, layout: LayoutName) -> None:
    kind, version = meta.get("kind"), meta.get("schema_version")
    if kind == "nla_dataset" and (meta.get("role") is not None or version not in (None, 1)):
        raise CheckpointError(
            f"{path} has kind='nla_dataset', expected 'nla_model' beside role={abbreviated(meta.get('role'))} and "
            f"schema_version={abbreviated(version)}: the sidecar of a data set, which EasyNLA copies beside a checkpoint, has "
            "no role and version 1. Use the sidecar that was released with the weights."
        )
    if kind != "nla_model" and not (kind == "nla_dataset" and layout == "easynla"):
        raise CheckpointError(
            f"{path} has kind={abbreviated(kind)}, expected 'nla_model' (or 'nla_dataset' in the layout easynla): it does not "
            f"describe an AV or AR. Pass the directory of the {_name(expected)}."
        )
    if version not in (None, 1, 2):
        _wrong(path, "schema_version", version, "1 or 2, the supported versions")


def _no_sidecar(directory: Path, expected: NlaRole) -> str:
    if (directory / "config.json").exists():
        return (
            f"{directory} has no {FILE_NAME}: it looks like a plain language model, not an {_name(expected)}. Pass the "
            f"{_name(expected)} checkpoint as "
            f"`{expected}`; the plain model belongs in activations.model, or in autoencoder.base under adapters."
        )
    return (
        f"{directory} has no {FILE_NAME}: expected an {_name(expected)} directory in the public NLA layout. Pass the "
        "directory that holds the sidecar and the weights."
    )


def _role(
    meta: Mapping[str, Any], path: Path, directory: Path, expected: NlaRole, notes: list[Note], layout: LayoutName
) -> NlaRole:
    stated_role = meta.get("role")
    if stated_role is None:
        heads = [name for name in AR_HEAD_FILES if (directory / name).exists()]
        if expected == "av" and heads:
            raise CheckpointError(
                f"{directory} is an {_name('ar')} checkpoint (it holds {heads[0]}), given as the {_name('av')}. Pass it as "
                "`ar`, and the AV (verbalizer) as `av`."
            )
        if layout == "easynla":  # its sidecars never state one: the files decide
            if expected == "ar" and not heads:
                raise CheckpointError(
                    f"{directory} holds none of {', '.join(AR_HEAD_FILES[:2])}, the head of an {_name('ar')}: it is an "
                    f"{_name('av')}, or the head was not saved. Pass the AR's directory as `ar`."
                )
            return expected
        notes.append(Note("checkpoint", f"{path} states no role. It was given as the {_name(expected)} and used as such."))
        return expected
    role = ROLE_SPELLINGS.get(stated_role) if isinstance(stated_role, str) else None
    if role is None:
        raise CheckpointError(
            f"{path} has role={abbreviated(stated_role)}; expected one of {', '.join(ROLE_SPELLINGS)}. Correct the sidecar, "
            "or use the released one."
        )
    if role != expected:
        raise CheckpointError(
            f"{directory} is an {_name(role)} checkpoint (role={stated_role!r}), given as the {_name(expected)}. Pass it as "
            f"`{role}`, and the {_name(expected)} as `{expected}`."
        )
    return role


def _name(role: NlaRole) -> str:
    return "AV (verbalizer)" if role == "av" else "AR (reconstructor)"


def _d_model(meta: Mapping[str, Any], path: Path, notes: list[Note]) -> int:
    top_level = _whole(meta, "d_model", path, minimum=1)
    in_extraction = _whole(meta, "extraction.d_model", path, minimum=1)
    if top_level is None and in_extraction is None:
        raise CheckpointError(
            f"{path} does not say d_model, the width of the vectors. Add it, or use the sidecar that was released with the "
            "weights."
        )
    if top_level is not None and in_extraction not in (None, top_level):
        raise CheckpointError(f"{path} has d_model={top_level} and extraction.d_model={in_extraction}. Make them equal.")
    if top_level is None:
        notes.append(Note("checkpoint", f"{path} has d_model under `extraction` only; that value was used."))
    width = in_extraction if top_level is None else top_level
    assert width is not None
    if (hidden := _whole(meta, "hidden_size", path)) not in (None, width):
        raise CheckpointError(f"{path} has d_model={width} and hidden_size={hidden}. Make them equal.")
    return width


def _wrong(path: Path, key: str, value: Any, expected: str) -> NoReturn:
    raise CheckpointError(
        f"{path} has {key}={abbreviated(value)}, expected {expected}. Correct it, or use the sidecar that was released with the "
        "weights."
    )


def _text(meta: Mapping[str, Any], key: str, path: Path) -> str | None:
    value = value_at(meta, key)
    if value is not None and (not isinstance(value, str) or has_lone_surrogate(value)):
        _wrong(path, key, value, "text")
    return value


def _whole(meta: Mapping[str, Any], key: str, path: Path, minimum: int = 0) -> int | None:
    value = value_at(meta, key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not minimum <= value < 2**31):
        _wrong(path, key, value, f"a whole number >= {minimum}")
    return value


def _flag(meta: Mapping[str, Any], key: str, path: Path) -> bool:
    value = value_at(meta, key)
    if value not in (None, True, False) or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        _wrong(path, key, value, "true or false")
    return value is True


def _positive(meta: Mapping[str, Any], key: str, path: Path) -> float | None:
    value = value_at(meta, key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e300:
        _wrong(path, key, value, "a finite number > 0")
    return float(value)


def _ids(meta: Mapping[str, Any], key: str, path: Path, what: str = "a list of token ids") -> tuple[int, ...] | None:
    value = value_at(meta, key)
    if value is None:
        return None
    is_list = isinstance(value, list) and all(type(i) is int and 0 <= i < 2**31 for i in value)
    if not is_list or (key == "actor_prompt_ids" and not value):  # no prompt is empty; the other lists may be
        _wrong(path, key, value, what)
    return tuple(value)


def _template(meta: Mapping[str, Any], role: NlaRole, path: Path, is_universal: bool, has_marker: bool = False) -> str | None:
    """Return the role's prompt template, stored under either of its keys; None if there is none.

    Its only field is the marker (AV) or the explanation (AR), in a pair for all layers also the depth, in an AR that is read at
    a marker also that. The AV's template is filled by replacement, which keeps doubled braces, the AR's by `str.format`, which
    halves them.
    """
    keys = TEMPLATE_KEYS[role]
    templates = {key: text for key in keys if (text := _text(meta, key, path)) is not None}
    if len(set(templates.values())) > 1:
        raise CheckpointError(f"{path} has {' and '.join(templates)}, which differ. Keep the one that was used in training.")
    template = next(iter(templates.values()), None)
    if template is not None:
        own = (MARKER_FIELD,) if role == "av" else (TEXT_FIELD, *((MARKER_FIELD,) if has_marker else ()))
        fields = (*own, *((DEPTH_FIELD,) if is_universal else ()))
        _check_fields(template, fields, f"{path}: {next(iter(templates))}", unescapes=role == "ar")
    return template


def _check_fields(template: str, fields: Sequence[str], where: str, unescapes: bool = False) -> None:
    for field in fields:
        template = template.replace(field, "")
    if unfilled := FIELD.search(re.sub(r"\{\{|\}\}", "", template) if unescapes else template):
        raise CheckpointError(
            f"{where} has {abbreviated(unfilled[0])}, a field that nothing fills in: it would appear literally in the prompt. "
            f"Use a checkpoint whose templates have no fields other than {MARKER_FIELD} (AV) and {TEXT_FIELD} (AR), and with "
            f"variant: universal {DEPTH_FIELD}{AR_OF_AT_HOME if unfilled[0] == MARKER_FIELD and TEXT_FIELD in fields else ''}."
        )


def _scale(meta: Mapping[str, Any], name: str, d_model: int, path: Path, absent: float | None) -> float | None:
    """Return extraction.<name> as a number, or None for null and the words of the training code that mean null.

    `absent` is returned where the key is missing.
    """
    extraction = meta.get("extraction")
    if not isinstance(extraction, dict) or name not in extraction:
        return absent
    value = extraction[name]
    if value is None or (isinstance(value, str) and value.strip().lower() in ("raw", "none", "null")):
        return None
    if isinstance(value, str) and value.strip().lower() == "sqrt_d_model":
        return math.sqrt(d_model)
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        _wrong(path, f"extraction.{name}", value, 'a number, null, or "sqrt_d_model"')


def _check_av(sidecar: Sidecar, path: Path, overrides: PromptingOverrides) -> list[Note]:
    """Check the values that an AV needs, and return notes on unusual ones that are accepted.

    Raises:
        CheckpointError: the injection scale, the marker or the template is missing or unusable.
    """
    scale, tag = sidecar.injection_scale, OPEN_TAG.search(sidecar.av_template or "")
    if sidecar.layout != "easynla" and scale is None:
        raise CheckpointError(
            f"{path} has no extraction.injection_scale, the norm that vectors are scaled to before injection. An AV cannot run "
            "without the value it was trained with. Take it from the released sidecar or the training log."
        )
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        _wrong(path, "extraction.injection_scale", scale, "a finite number > 0")
    _require(sidecar, path, "marker", *(("marker_id",) if overrides.marker is None else ()), "av_template")
    assert sidecar.marker is not None and sidecar.av_template is not None
    if not sidecar.marker:
        _wrong(path, "tokens.injection_char", sidecar.marker, "one token, usually one character")
    if (count := sidecar.av_message.count(sidecar.marker)) != 1:
        raise CheckpointError(
            f"{path}: prompt_templates.av has {count} places for the marker ({MARKER_FIELD}), expected exactly one, where the "
            "vector is injected. Use the released template."
        )
    open_tag = tag[0].strip() if tag else opened_answer_tag(sidecar.av_message.partition(sidecar.marker)[2])
    begins_inside = overrides.opening_tag == "" or sidecar.layout == "nla-at-home"
    if open_tag and not (begins_inside and open_tag in ENCLOSING_TAGS):
        raise CheckpointError(
            f"{path}: prompt_templates.av ends with the open tag {abbreviated(open_tag)}, so the AV's answers do not repeat it. "
            "Every draw would count as failed. If it is of nla-at-home, set autoencoder.layout=nla-at-home; else say that "
            "answers begin inside the tag (autoencoder.prompting.opening_tag=''), or use an AV whose answers contain "
            "<explanation>...</explanation>."
        )
    return _prompt_notes(sidecar, path)


def opened_answer_tag(text: str) -> str | None:
    """Return the last answer tag in a prompt if it is left open; None if it is closed, only mentioned, or there is none."""
    tags = list(ANSWER_TAG.finditer(text))
    if not tags:
        return None
    after = text[tags[-1].end() :]
    return None if f"</{tags[-1][1]}>" in after or MENTION.match(after) else tags[-1][0]


def _prompt_notes(sidecar: Sidecar, path: Path) -> list[Note]:
    """Return notes on a marker of several characters, and on missing ids of the tokens around it."""
    notes, marker = [], sidecar.marker or ""
    if len(marker) != 1:
        notes.append(
            Note("prompt", f"{path} has the marker {abbreviated(marker)} of {len(marker)} characters; one character is usual.")
        )
    ids = {"injection_left_neighbor_id": sidecar.left_id, "injection_right_neighbor_id": sidecar.right_id}
    if sidecar.layout == "nla-at-home":  # none of its sidecars has them
        return notes
    if missing := [name for name, value in ids.items() if value is None]:
        keys = " and ".join(f"tokens.{name}" for name in missing)
        notes.append(Note("prompt", f"{path} lacks {keys}, so the tokens around the marker are not all checked."))
    return notes


def _check_ar(sidecar: Sidecar, path: Path) -> None:
    scale = sidecar.mse_scale
    if scale is None:
        raise CheckpointError(
            f"{path} has extraction.mse_scale null: this AR was trained on raw vectors, so its normalised error 2(1 - cos) is "
            "meaningless. Use an AR that has a number there, such as sqrt(d_model)."
        )
    if not (math.isfinite(scale) and scale > 0):
        _wrong(path, "extraction.mse_scale", scale, "a finite number > 0")
    _require(sidecar, path, "ar_template")
    assert sidecar.ar_template is not None
    if MARKER_FIELD in sidecar.ar_template:
        _require(sidecar, path, "marker", "marker_id")
    if (count := sidecar.ar_template.count(TEXT_FIELD)) != 1:
        raise CheckpointError(
            f"{path}: prompt_templates.ar has {count} places for the explanation ({TEXT_FIELD}), expected exactly one. Use the "
            "released template."
        )


def _require(sidecar: Sidecar, path: Path, *names: str) -> None:
    keys = {
        "marker": "tokens.injection_char",
        "marker_id": "tokens.injection_token_id",
        "av_template": "prompt_templates.av",
        "ar_template": "prompt_templates.ar",
    }
    missing = [keys[name] for name in names if getattr(sidecar, name) is None]
    if missing:
        raise CheckpointError(
            f"{path} lacks {', '.join(missing)}: without it the {_name(sidecar.role)}'s prompt cannot be built. Use the "
            "sidecar that was released with the weights."
        )
