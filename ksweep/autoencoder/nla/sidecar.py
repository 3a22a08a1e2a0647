"""Read `nla_meta.yaml`, the sidecar of an NLA checkpoint, in every published spelling. Nothing here imports torch.

A key that is not understood raises an error with its name; `ksweep.utils.sidecar_keys` lists the keys that only inform.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from ksweep.autoencoder.prompting import MARKER_FIELD, TEXT_FIELD
from ksweep.config.spec import AS_THE_CHECKPOINT_SAYS, PromptingOverrides
from ksweep.utils.errors import CheckpointError
from ksweep.utils.notes import Note
from ksweep.utils.plain_values import has_lone_surrogate
from ksweep.utils.sidecar_keys import LAYER_KEYS, abbreviated, base_model, check_keys, read_layer, read_yaml, requests, value_at

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
    "tokens.critic_suffix_ids", "training.activation_norm", *LAYER_KEYS, *TEMPLATE_KEYS["av"], *TEMPLATE_KEYS["ar"],
})  # fmt: skip
AR_HEAD_FILES = ("value_head.safetensors", "ar_lora_value_head.safetensors")
"""Files that only an AR directory contains."""
FIELD = re.compile(r"\{[\w\s-]*(?:[.\[!:][^{}]*)?\}|<<[\w\s-]+>>|\[\[[\w\s-]+\]\]|%\(\w+\)[sdfgr]")
"""A field of `str.format` or of another template syntax; braces around anything else (JSON, code) are text."""
OPEN_TAG = re.compile(r"<[A-Za-z][\w-]*>\s*$")
ANSWER_TAG = re.compile(r"<(explanation|answer|think|thinking|thought|reasoning)>")
"""A tag that opens an answer, or thoughts before it."""
ENCLOSING_TAGS = ("<explanation>", "<answer>")
"""Answer tags that an explanation may begin inside of, where the spec says so; behind the others stand thoughts."""
MENTION = re.compile(r"\s*(?:xml\s+)?(?:tags?|elements?|brackets|markers?)\b|[.,;!?)`'\"]|\s+(?:and|or|to)\b", re.IGNORECASE)
"""What follows a tag that is only mentioned, as in "within <explanation> tags"."""
WITHOUT_INJECTION_MODE = ("lora_sft", "full_ft_sft")
"""Values of training.method that one trainer writes. Its first version injected vector x scale, unnormalised, into a prompt
without chat template; only the absence of training.injection_mode and training.chat_template shows it."""


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """A parsed nla_meta.yaml. None means that the sidecar does not state the value."""

    role: NlaRole
    d_model: int
    layer: int | None
    """L: the block whose output was verbalized, 0-based."""
    base_checkpoint: str | None
    base_digest: str | None
    """"sha256:<hex>" of the base's model.safetensors. Only ksweep writes it, for adapters, which fit one set of weights."""
    injection_scale: float | None
    """Norm of the injected row."""
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


def read_nla_sidecar(directory: Path, expected_role: NlaRole, overrides: PromptingOverrides = AS_THE_CHECKPOINT_SAYS) -> Sidecar:
    """Return the parsed and checked `directory/nla_meta.yaml`, with the spec's marker, templates and scale in place of its own.

    Raises:
        CheckpointError: the sidecar is missing, is not of an NLA model, has another role, or lacks a value that its role needs.
    """
    # 1. Read the YAML, and check that it describes an NLA model of the expected role.
    path = directory / FILE_NAME
    meta = _read(path, directory, expected_role)
    _check_kind(meta, path, expected_role)
    notes: list[Note] = []
    role = _role(meta, path, expected_role, notes)
    # 2. Refuse keys that could change a number and are not understood.
    check_keys(meta, NLA_SIDECAR_KEYS, path, CheckpointError)
    # 3. Parse the values, each with a check of its type.
    d_model = _d_model(meta, path, notes)
    sidecar = Sidecar(
        role=role,
        d_model=d_model,
        layer=read_layer(meta, path, CheckpointError),
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
        av_template=_template(meta, "av", path),
        ar_template=_template(meta, "ar", path),
        asks_for_thinking=requests(meta, "enable_thinking"),
        notes=tuple(notes),
    )
    # 4. Put the spec's values in place of the sidecar's.
    sidecar = _overridden(sidecar, overrides)
    # 5. Check that the values this role needs are there and usable.
    if role == "ar":
        _check_ar(sidecar, path)
        return sidecar
    _check_injection(meta, path)
    return replace(sidecar, notes=(*notes, *_check_av(sidecar, path, overrides)))


def _overridden(sidecar: Sidecar, overrides: PromptingOverrides) -> Sidecar:
    """Return the sidecar with the spec's marker, templates and scale, and without the token ids that they make void.

    Raises:
        CheckpointError: a template has a field that nothing fills in.
    """
    if overrides.marker is not None:
        sidecar = replace(sidecar, marker=overrides.marker, marker_id=None, left_id=None, right_id=None)
    if overrides.av_template is not None:
        _check_fields(overrides.av_template, "av", "autoencoder.prompting.av_template")
        sidecar = replace(sidecar, av_template=overrides.av_template, left_id=None, right_id=None)
    if overrides.ar_template is not None:
        _check_fields(overrides.ar_template, "ar", "autoencoder.prompting.ar_template")
        sidecar = replace(sidecar, ar_template=overrides.ar_template, suffix_ids=None)
    if overrides.injection_scale is not None:
        sidecar = replace(sidecar, injection_scale=overrides.injection_scale)
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


def _check_kind(meta: Mapping[str, Any], path: Path, expected: NlaRole) -> None:
    kind, version = meta.get("kind"), meta.get("schema_version")
    if kind == "nla_dataset":
        raise CheckpointError(
            f"{path} has kind='nla_dataset', expected 'nla_model': it is the sidecar of a data set, which some trainers "
            "(EasyNLA, nanoNLA) copy beside a checkpoint. It states neither how the AV's vector is injected nor how the chat "
            "template and the AR's prompt are used, so such pairs are not supported yet. Use a pair in the public NLA layout."
        )
    if kind != "nla_model":
        raise CheckpointError(
            f"{path} has kind={abbreviated(kind)}, expected 'nla_model': it does not describe an AV or AR. Pass the directory "
            f"of the {_name(expected)}."
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


def _role(meta: Mapping[str, Any], path: Path, expected: NlaRole, notes: list[Note]) -> NlaRole:
    stated_role = meta.get("role")
    if stated_role is None:
        if expected == "av" and (heads := [name for name in AR_HEAD_FILES if (path.parent / name).exists()]):
            raise CheckpointError(
                f"{path.parent} is an {_name('ar')} checkpoint (it holds {heads[0]}), given as the {_name('av')}. Pass it as "
                "`ar`, and the AV (verbalizer) as `av`."
            )
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
            f"{path.parent} is an {_name(role)} checkpoint (role={stated_role!r}), given as the {_name(expected)}. Pass it as "
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


def _positive(meta: Mapping[str, Any], key: str, path: Path) -> float | None:
    value = value_at(meta, key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e300:
        _wrong(path, key, value, "a finite number > 0")
    return float(value)


def _ids(meta: Mapping[str, Any], key: str, path: Path) -> tuple[int, ...] | None:
    value = value_at(meta, key)
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(i) is int and 0 <= i < 2**31 for i in value):
        _wrong(path, key, value, "a list of token ids")
    return tuple(value)


def _template(meta: Mapping[str, Any], role: NlaRole, path: Path) -> str | None:
    """Return the role's prompt template, stored under either of its keys; None if there is none.

    Its only field is the marker (AV) or the explanation (AR). The AV's template is filled by replacement, which keeps doubled
    braces, the AR's by `str.format`, which halves them.
    """
    keys = TEMPLATE_KEYS[role]
    templates = {key: text for key in keys if (text := _text(meta, key, path)) is not None}
    if len(set(templates.values())) > 1:
        raise CheckpointError(f"{path} has {' and '.join(templates)}, which differ. Keep the one that was used in training.")
    template = next(iter(templates.values()), None)
    if template is not None:
        _check_fields(template, role, f"{path}: {next(iter(templates))}")
    return template


def _check_fields(template: str, role: NlaRole, where: str) -> None:
    remainder = template.replace(MARKER_FIELD if role == "av" else TEXT_FIELD, "")
    if unfilled := FIELD.search(re.sub(r"\{\{|\}\}", "", remainder) if role == "ar" else remainder):
        raise CheckpointError(
            f"{where} has {abbreviated(unfilled[0])}, a field that nothing fills in: it would appear literally in the prompt. "
            f"Use a checkpoint whose templates have no fields other than {MARKER_FIELD} (AV) and {TEXT_FIELD} (AR)."
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


def _check_injection(meta: Mapping[str, Any], path: Path) -> None:
    method = value_at(meta, "training.method")
    if method in WITHOUT_INJECTION_MODE and value_at(meta, "training.injection_mode") is None:
        raise CheckpointError(
            f"{path} has training.method={method!r} and no training.injection_mode: this trainer multiplied vectors by "
            "injection_scale instead of scaling them to that norm, and used a prompt without chat template, which is not "
            "supported yet. Use an AV with training.injection_mode: normalize."
        )


def _check_av(sidecar: Sidecar, path: Path, overrides: PromptingOverrides) -> list[Note]:
    """Check the values that an AV needs, and return notes on unusual ones that are accepted.

    Raises:
        CheckpointError: the injection scale, the marker or the template is missing or unusable.
    """
    scale = sidecar.injection_scale
    if scale is None:
        raise CheckpointError(
            f"{path} has no extraction.injection_scale, the norm that vectors are scaled to before injection. An AV cannot run "
            "without the value it was trained with. Take it from the released sidecar or the training log."
        )
    if not (math.isfinite(scale) and scale > 0):
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
    tag = OPEN_TAG.search(sidecar.av_template)
    open_tag = tag[0].strip() if tag else opened_answer_tag(sidecar.av_message.partition(sidecar.marker)[2])
    if open_tag and not (overrides.opening_tag == "" and open_tag in ENCLOSING_TAGS):
        raise CheckpointError(
            f"{path}: prompt_templates.av ends with the open tag {abbreviated(open_tag)}, so the AV's answers do not repeat it. "
            "A prefilled answer is not supported yet: every draw would count as failed. Use an AV whose answers contain "
            "<explanation>...</explanation>, or say that they begin inside the tag (autoencoder.prompting.opening_tag='')."
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
