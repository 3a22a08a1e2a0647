"""`nla_meta.yaml`: what a public NLA checkpoint says about itself, in all the spellings that were published. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

from ksweep.errors import CheckpointError

Role = Literal["av", "ar"]
FILE_NAME = "nla_meta.yaml"
ROLES: Mapping[str, Role] = {"av": "av", "actor": "av", "ar": "ar", "critic": "ar"}
"""Released sidecars say av / ar, those of the training code actor / critic."""
LAYER_KEYS = (
    "critic.extraction_layer_index",
    "critic.num_hidden_layers",  # schema 1: the value is L, not L + 1
    "ar.extraction_layer_index",
    "ar.num_hidden_layers",
    "extraction_layer_index",
    "layer",
)
MARKER_FIELD, TEXT_FIELD = "{injection_char}", "{explanation}"


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """A parsed nla_meta.yaml; None is "not said". Unknown keys are dropped: writers added them over time."""

    role: Role
    d_model: int
    layer: int | None
    """L: the block whose output was verbalized, 0-based."""
    base_checkpoint: str | None
    base_digest: str | None
    """"sha256:<hex>" of the base's model.safetensors; ours, for adapters: they fit one set of weights only."""
    injection_scale: float | None
    """Norm of the injected row."""
    activation_norm: float | None
    """Median length of the vectors that it was trained on; ours, in no public sidecar."""
    mse_scale: float | None
    """Norm that both vectors are scaled to for the error."""
    marker: str | None
    marker_id: int | None
    left_id: int | None
    right_id: int | None
    suffix_ids: tuple[int, ...] | None
    """Last token ids of every AR prompt."""
    av_template: str | None
    ar_template: str | None

    @property
    def ar_affixes(self) -> tuple[str, str]:
        """What stands before and after the explanation in the AR's prompt, as `template.format` would leave it."""
        assert self.ar_template is not None
        before, _, after = self.ar_template.partition(TEXT_FIELD)
        return _unescaped(before), _unescaped(after)

    @property
    def av_message(self) -> str:
        """The AV's user message, the marker in its place."""
        assert self.av_template is not None and self.marker is not None
        return self.av_template.replace(MARKER_FIELD, self.marker)


def read_sidecar(directory: Path, expected_role: Role) -> Sidecar:
    """Parse and check `directory/nla_meta.yaml`.

    Raises:
        CheckpointError: missing, not an NLA model's, of another role, or unusable in a value that this role needs.
    """
    path = directory / FILE_NAME
    meta = _read_yaml(path, directory, expected_role)
    if meta.get("kind") != "nla_model":
        raise CheckpointError(
            f"{path} has kind={meta.get('kind')!r}, expected 'nla_model': it does not describe an AV or AR. Pass the directory "
            f"of the {_name(expected_role)}."
        )
    role = _role(meta, path, expected_role)
    d_model = _whole(meta, "d_model", path, minimum=1)
    if d_model is None:
        raise CheckpointError(
            f"{path} does not say d_model, the width of the vectors. Add it, or use the sidecar that was released with the "
            "weights."
        )
    sidecar = Sidecar(
        role=role,
        d_model=d_model,
        layer=_layer(meta, path),
        base_checkpoint=_text(meta, "base_checkpoint", path),
        base_digest=_text(meta, "base_digest", path),
        injection_scale=_scale(meta, "injection_scale", d_model, path, absent=None),
        activation_norm=_positive(meta, "training.activation_norm", path),
        mse_scale=_scale(meta, "mse_scale", d_model, path, absent=math.sqrt(d_model)),
        marker=_text(meta, "tokens.injection_char", path),
        marker_id=_whole(meta, "tokens.injection_token_id", path),
        left_id=_whole(meta, "tokens.injection_left_neighbor_id", path),
        right_id=_whole(meta, "tokens.injection_right_neighbor_id", path),
        suffix_ids=_ids(meta, "tokens.critic_suffix_ids", path),
        av_template=_text(meta, "prompt_templates.av", path) or _text(meta, "prompt_templates.actor", path),
        ar_template=_text(meta, "prompt_templates.ar", path) or _text(meta, "prompt_templates.critic", path),
    )
    (_check_av if role == "av" else _check_ar)(sidecar, path)
    return sidecar


def _read_yaml(path: Path, directory: Path, expected: Role) -> dict[str, Any]:
    try:
        meta = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(_no_sidecar(directory, expected)) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{path} cannot be read as YAML ({str(error).splitlines()[0]}). Copy the sidecar again, whole."
        ) from error
    if not isinstance(meta, dict):
        raise CheckpointError(
            f"{path} holds a {type(meta).__name__}, expected keys and values (kind, role, d_model, ...). Is the file whole?"
        )
    return meta


def _no_sidecar(directory: Path, expected: Role) -> str:
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


def _role(meta: Mapping[str, Any], path: Path, expected: Role) -> Role:
    said = meta.get("role")
    role = ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise CheckpointError(
            f"{path} has role={said!r}; expected one of {', '.join(ROLES)}. Correct the sidecar, or use the released one."
        )
    if role != expected:
        raise CheckpointError(
            f"{path.parent} is an {_name(role)} checkpoint (role={said!r}), given as the {_name(expected)}. Pass it as "
            f"`{role}`, and the {_name(expected)} as `{expected}`."
        )
    return role


def _name(role: Role) -> str:
    return "AV (verbalizer)" if role == "av" else "AR (reconstructor)"


def _at(meta: Mapping[str, Any], dotted: str) -> Any:
    """Value under a dotted key; None where it or a parent is absent."""
    value: Any = meta
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _wrong(path: Path, key: str, value: Any, expected: str) -> NoReturn:
    raise CheckpointError(
        f"{path} has {key}={value!r}, expected {expected}. Correct it, or use the sidecar that was released with the weights."
    )


def _text(meta: Mapping[str, Any], key: str, path: Path) -> str | None:
    value = _at(meta, key)
    if value is not None and not isinstance(value, str):
        _wrong(path, key, value, "text")
    return value


def _whole(meta: Mapping[str, Any], key: str, path: Path, minimum: int = 0) -> int | None:
    value = _at(meta, key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < minimum):
        _wrong(path, key, value, f"a whole number >= {minimum}")
    return value


def _positive(meta: Mapping[str, Any], key: str, path: Path) -> float | None:
    value = _at(meta, key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
        _wrong(path, key, value, "a finite number > 0")
    return float(value)


def _ids(meta: Mapping[str, Any], key: str, path: Path) -> tuple[int, ...] | None:
    value = _at(meta, key)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in value):
        _wrong(path, key, value, "a list of token ids")
    return tuple(value)


def _layer(meta: Mapping[str, Any], path: Path) -> int | None:
    said = {key: _whole(meta, key, path) for key in LAYER_KEYS if _at(meta, key) is not None}
    if len(set(said.values())) > 1:
        spelled = ", ".join(f"{key}={value}" for key, value in said.items())
        raise CheckpointError(
            f"{path} names different layers: {spelled}. All of them mean the block that was verbalized: make them agree."
        )
    return next(iter(said.values()), None)


def _scale(meta: Mapping[str, Any], name: str, d_model: int, path: Path, absent: float | None) -> float | None:
    """A scale under `extraction`: a number, null, or one of the sentinels of the training code."""
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
    except (TypeError, ValueError):
        _wrong(path, f"extraction.{name}", value, 'a number, null, or "sqrt_d_model"')


def _check_av(sidecar: Sidecar, path: Path) -> None:
    scale = sidecar.injection_scale
    if scale is None:
        raise CheckpointError(
            f"{path} has no extraction.injection_scale, the norm that a vector is given before it is injected. An AV cannot be "
            "run without the value it was trained with: "
            "take it from the released sidecar or the training log."
        )
    if not (math.isfinite(scale) and scale > 0):
        _wrong(path, "extraction.injection_scale", scale, "a finite number > 0")
    _require(sidecar, path, "marker", "marker_id", "left_id", "right_id", "av_template")
    assert sidecar.marker is not None
    if len(sidecar.marker) != 1:
        _wrong(path, "tokens.injection_char", sidecar.marker, "one character")
    if (count := sidecar.av_message.count(sidecar.marker)) != 1:
        raise CheckpointError(
            f"{path}: prompt_templates.av has {count} places for the marker ({MARKER_FIELD}), expected exactly one, where the "
            "vector is injected. Use the released template."
        )


def _check_ar(sidecar: Sidecar, path: Path) -> None:
    scale = sidecar.mse_scale
    if scale is None:
        raise CheckpointError(
            f"{path} has extraction.mse_scale null: an AR trained on raw vectors, whose normalised error 2(1 - cos) means "
            "nothing. Use an AR with a number there (sqrt(d_model))."
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
        "left_id": "tokens.injection_left_neighbor_id",
        "right_id": "tokens.injection_right_neighbor_id",
        "av_template": "prompt_templates.av",
        "ar_template": "prompt_templates.ar",
    }
    missing = [keys[name] for name in names if getattr(sidecar, name) is None]
    if missing:
        raise CheckpointError(
            f"{path} lacks {', '.join(missing)}: without it the {_name(sidecar.role)}'s prompt cannot be built. Use the "
            "sidecar that was released with the weights."
        )


def _unescaped(text: str) -> str:
    return text.replace("{{", "{").replace("}}", "}")
