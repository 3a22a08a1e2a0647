"""Apply key=value arguments and YAML files to a sweep, with the spec's types and a "did you mean" for unknown keys."""

from __future__ import annotations

import difflib
import logging
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ksweep.config.reference_options import is_old_config, translate_config
from ksweep.config.resources import Resources
from ksweep.config.spec import Autoencoder, Cell, Sampling
from ksweep.config.sweep import SPEC_GROUPS, SWEEP_FIELDS, Sweep, known_keys
from ksweep.config.validation import is_number
from ksweep.utils.errors import SpecError
from ksweep.utils.sidecar_keys import ShallowLoader
from ksweep.utils.text import bounded_repr

log = logging.getLogger(__name__)

MOST_YAML_BYTES = 1_000_000
MOST_YAML_VALUES = 100_000
"""Largest configuration file, in bytes and in values once its aliases are written out."""


def parse_overrides(arguments: Sequence[str] = (), config: str | Path | None = None) -> dict[str, Any]:
    """Return the settings that a YAML file and key=value arguments ask for, by whole key; the arguments win.

    A key is a dotted field ("sampling.num_draws"), or the last part of one where no other field ends in it ("num_draws").

    Raises:
        SpecError: an unknown or ambiguous key, an unreadable file or value.
    """
    settings: dict[str, Any] = {}
    if config is not None:
        settings |= _settings_in(Path(config))
    for argument in arguments:
        key, value = _split(argument)
        settings[_resolve(key)] = value
    return settings


def apply_overrides(sweep: Sweep, settings: Mapping[str, Any]) -> Sweep:
    """Return a copy of the sweep with settings, by whole key, in place of its own values.

    A list for a field that holds a single value makes that field an axis; a single value for an axis reduces the axis to it.

    Raises:
        SpecError: a value of the wrong type, or settings that contradict each other or the spec.
    """
    return _build(sweep, settings) if settings else sweep


def _settings_in(path: Path) -> dict[str, Any]:
    tree = _read_yaml(path)
    try:
        return _config_settings(tree)
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from None


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        _check_size(path)
        value = _plain_values(OmegaConf.load(path))
    except FileNotFoundError:
        raise SpecError(f"no configuration file at {path}: give --config an existing YAML file") from None
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from None
    except (OSError, OmegaConfBaseException, ValueError) as error:
        raise SpecError(f"{path} cannot be read as YAML: {error}") from error
    except Exception as error:  # yaml.YAMLError has no common base with the above
        raise SpecError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(value, Mapping):
        raise SpecError(f"{path} holds a {type(value).__name__}, expected keys such as\n  sampling:\n    num_draws: 32")
    return typing.cast("Mapping[str, Any]", value)


def _check_size(path: Path) -> None:
    """Refuse a file that is too long, or whose aliases stand for too many values: ten levels of ten are 10^10.

    Raises:
        SpecError: it is too large. YAMLError: it is not YAML.
    """
    if path.stat().st_size > MOST_YAML_BYTES:
        raise SpecError(f"a configuration of {path.stat().st_size:,} bytes: at most {MOST_YAML_BYTES:,} are read")
    with path.open(encoding="utf-8") as file:
        num_values = _num_values(yaml.compose(file, ShallowLoader), {})
    if num_values > MOST_YAML_VALUES:
        raise SpecError(f"with its aliases it holds {num_values:.3g} values, and at most {MOST_YAML_VALUES:,} are read")


def _num_values(node: Any, counts: dict[int, float]) -> float:
    """Return how many values a YAML node stands for once its aliases are written out; infinity if it contains itself."""
    if id(node) not in counts:
        counts[id(node)] = math.inf  # while its parts are counted
        pairs = isinstance(node, yaml.MappingNode)
        parts = [part for pair in node.value for part in pair] if pairs else node.value
        inside = sum(_num_values(part, counts) for part in parts) if isinstance(node, yaml.CollectionNode) else 0
        counts[id(node)] = 1 + inside
    return counts[id(node)]


def _plain_values(config: Any) -> Any:
    """Return what a configuration holds, with nothing in it resolved.

    OmegaConf's interpolations would write what they name, such as a token in the environment, into the registry.

    Raises:
        SpecError: a text has an interpolation.
    """
    return _without_interpolations(OmegaConf.to_container(config, resolve=False))


def _without_interpolations(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_interpolations(leaf) for key, leaf in value.items()}
    if isinstance(value, list):
        return [_without_interpolations(leaf) for leaf in value]
    if not isinstance(value, str):
        return value
    if re.search(r"(?<!\\)(\\\\)*\$\{", value):
        raise SpecError(
            f"{bounded_repr(value)} has an interpolation, and ${{...}} is not resolved in a spec: write the value itself, or "
            "\\${ where the text is to hold ${"
        )
    return value.replace("\\${", "${")


def _config_settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a file by dotted key, translated from the reference's old layout (all below `eval`)."""
    if not is_old_config(tree):
        return dict(_flatten(tree))
    settings, warnings = translate_config(tree)
    for warning in warnings:
        log.warning(warning)
    return {_resolve(key): value for key, value in settings.items()}


def _flatten(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a YAML tree by dotted key; a file may mix dotted keys and groups."""
    for key, value in tree.items():
        if key in SPEC_GROUPS and isinstance(value, Mapping):
            for name, leaf in _leaves(key, value):
                yield _resolve(name), leaf
        else:
            yield _resolve(str(key)), value


def _leaves(prefix: str, tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the values of a group by dotted key; a group within a group, as `prompting` in `autoencoder`, gives its own."""
    for name, value in tree.items():
        key = f"{prefix}.{name}"
        if isinstance(value, Mapping) and any(known.startswith(f"{key}.") for known in known_keys()):
            yield from _leaves(key, value)
        else:
            yield key, value


def _split(argument: str) -> tuple[str, Any]:
    key, equals, text = argument.partition("=")
    if not equals:
        raise SpecError(f"argument {argument!r} is neither an option nor key=value; expected for example sampling.num_draws=32")
    if re.fullmatch(r"[\d-]*\d+(:\d+)+", text.strip()):
        return key.strip().lstrip("+"), text.strip()  # 24:00:00 is a time; YAML reads a number in base 60
    try:
        parsed = _plain_values(OmegaConf.from_dotlist([f"value={text}"]))
    except SpecError as error:
        raise SpecError(f"{bounded_repr(argument)}: {error}") from None
    except Exception as error:
        raise SpecError(f"the value of {bounded_repr(argument)} cannot be read: {str(error)[:300]}") from error
    assert isinstance(parsed, dict)
    return key.strip().lstrip("+"), parsed["value"]


FIRST_OF_ITS_NAME = {"layer": "activations.layer"}
"""Short keys that mean what they meant before a second field was called so."""


def _resolve(key: str) -> str:
    keys = known_keys()
    if key in keys or key in SPEC_GROUPS:
        return key
    ends = [FIRST_OF_ITS_NAME[key]] if key in FIRST_OF_ITS_NAME else [k for k in keys if k.rpartition(".")[2] == key]
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise SpecError(f"{key!r} could be {' or '.join(ends)}: write the whole key")
    raise SpecError(f"unknown key {bounded_repr(key)}: {_hint(key, list(keys))}")


def _hint(key: str, keys: list[str]) -> str:
    if key == "axes":
        return "a list given for a field makes an axis, e.g. sampling.temperature=[0.5,1.0]"
    group = key.partition(".")[0]
    inside = [k for k in keys if k.startswith(f"{group}.")]
    tails = {k.rpartition(".")[2]: k for k in (inside or keys)}
    close = [] if inside else difflib.get_close_matches(key, keys, n=1, cutoff=0.7)
    close = close or [tails[t] for t in difflib.get_close_matches(key.rpartition(".")[2], tails, n=2, cutoff=0.7)]
    if close:
        return f"did you mean {' or '.join(close)}?"
    if inside:
        return f"{group} has {', '.join(k.rpartition('.')[2] for k in inside)}"
    return f"keys are {', '.join(SWEEP_FIELDS)}, and those of {', '.join(SPEC_GROUPS)}, e.g. sampling.num_draws"


def _build(sweep: Sweep, settings: Mapping[str, Any]) -> Sweep:
    """Build the sweep once, from all settings together, so that fields which depend on each other may come in any order."""
    hints = known_keys()
    axes = dict(sweep.axes)
    cell, resources, plain = _as_dict(sweep.cell), _as_dict(sweep.resources), {}
    settings = _clear_replaced_fields(settings, sweep.cell)
    changed: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        group, _, name = key.partition(".")
        if key in SWEEP_FIELDS:
            plain[key] = _convert(key, value, str)
        elif group == "resources" and name:
            resources[name] = _convert(key, value, hints[key])
        elif key in SPEC_GROUPS:
            axes[key] = tuple(_group_value(key, v) for v in (value if isinstance(value, list) else [value]))
        elif key in axes or (isinstance(value, list) and not _takes_list(hints[key])):
            axes[key] = tuple(_convert(key, v, hints[key]) for v in (value if isinstance(value, list) else [value]))
        else:
            converted = changed.setdefault(group, {})[name] = _convert(key, value, hints[key])
            _set(cell, key, converted)
    for group in changed.keys() & axes.keys():  # an axis of whole groups: the changes hold for each of its values
        axes[group] = tuple(_with_changes(v, changed[group]) for v in axes[group])
    for key in [k for k, values in axes.items() if "." in k and values and (k in settings or len(values) == 1)]:
        _set(cell, key, axes[key][0])
    built = Cell(**{name: spec(**cell[name]) for name, spec in SPEC_GROUPS.items() if name != "resources"})
    return replace(sweep, cell=built, axes=axes, resources=Resources(**resources), **plain)


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set the value at a dotted key of nested dictionaries."""
    *groups, name = key.split(".")
    for group in groups:
        tree = tree[group]
    tree[name] = value


def _with_changes(spec: Any, changes: Mapping[str, Any]) -> Any:
    """Return a spec with the fields at dotted paths changed, all at once: fields may depend on each other."""
    nested: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        name, _, rest = path.partition(".")
        if rest:
            nested.setdefault(name, {})[rest] = value
    plain = {path: value for path, value in changes.items() if "." not in path}
    return replace(spec, **plain, **{name: _with_changes(getattr(spec, name), of_name) for name, of_name in nested.items()})


def _clear_replaced_fields(settings: Mapping[str, Any], old: Cell) -> dict[str, Any]:
    """Return the settings together with null or default for the fields that they replace.

    A new AV or checkpoint replaces the old base; a checkpoint replaces a pair, and a pair a checkpoint. Texts replace an AV, and
    an AV replaces texts. A checkpoint names the model and layer of its activations and the length of its explanations, so it
    replaces those of a pair. Ready-made vectors replace model and text.
    """
    cleared: dict[str, Any] = {}
    if settings.get("autoencoder.checkpoint") is not None:
        cleared |= {"autoencoder.av": None, "autoencoder.ar": None, "autoencoder.base": None}
        if old.autoencoder.checkpoint is None:
            cleared |= {"activations.model": None, "activations.layer": None}
            cleared |= {"sampling.max_new_tokens": Sampling.max_new_tokens}
    elif "autoencoder.av" in settings:
        cleared |= {"autoencoder.checkpoint": None, "autoencoder.base": None, "autoencoder.encoder_prompt": "learned"}
    if settings.get("autoencoder.texts") is not None:
        cleared |= {"autoencoder.av": None}
    elif settings.get("autoencoder.av") is not None:
        cleared |= {f"autoencoder.{name}": None for name in ("texts", "texts_column", "max_text_tokens")}
    if settings.get("activations.vectors") is not None:
        cleared |= {"activations.model": None, "activations.text": None, "activations.row_id_column": None}
    return cleared | dict(settings)


def _as_dict(spec: Any) -> dict[str, Any]:
    return {f.name: _as_dict(v) if is_dataclass(v := getattr(spec, f.name)) else v for f in fields(spec)}


def _group_value(key: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        example = "{av: DIR, ar: DIR}" if SPEC_GROUPS[key] is Autoencoder else "{...}"
        raise SpecError(f"{key}={bounded_repr(value)}: expected a mapping of its fields, such as {example}, or a list of them")
    fields_of_group: dict[str, Any] = {}
    for name, leaf in _leaves(key, value):
        *groups, last = name.split(".")[1:]
        of_group = fields_of_group
        for group in groups:
            of_group = of_group.setdefault(group, {})
        of_group[last] = _convert(name, leaf, known_keys()[_resolve(name)])
    return SPEC_GROUPS[key](**fields_of_group)


def _takes_list(hint: Any) -> bool:
    return any(typing.get_origin(h) is tuple for h in _alternatives(hint))


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _convert(key: str, value: Any, hint: Any) -> Any:
    """Return a YAML value as the type of its field. Whole floats ("1e3") become integers; a float never becomes text.

    OmegaConf's structured configs are laxer (2.5 for text, 1 for a switch, "0.5" for a number) and refuse 1e3 for an integer.
    """
    for option in _alternatives(hint):
        origin = typing.get_origin(option)
        if option is type(None) and value is None:
            return None
        if origin is typing.Literal and value in typing.get_args(option):
            return value
        if origin is tuple and isinstance(value, (list, tuple, int)):
            inner = typing.get_args(option)[0]
            return tuple(_convert(key, v, inner) for v in (value if isinstance(value, (list, tuple)) else [value]))
        if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
            return dict(value)
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value) if is_number(value) else value  # the spec refuses what is not finite
        if option is int and _whole(value):
            return int(value)
        if option is bool and isinstance(value, bool):
            return value
        if option is str and isinstance(value, (str, int)) and not isinstance(value, bool):
            return str(value)
    as_axis = f"; to sweep over several, give a list: '{key}=[{value}]'" if isinstance(value, str) and "," in value else ""
    raise SpecError(f"{key}={bounded_repr(value)} has the wrong type: expected {_describe(hint)}{as_axis}")


def _whole(value: Any) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer())


def _describe(hint: Any) -> str:
    names = []
    for option in _alternatives(hint):
        if typing.get_origin(option) is typing.Literal:
            names.append("one of " + ", ".join(map(str, typing.get_args(option))))
        elif typing.get_origin(option) is tuple:
            names.append("a list such as [1,2,4]")
        else:
            names.append(
                {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}.get(
                    option, str(option)
                )
            )
    return " or ".join(names)
