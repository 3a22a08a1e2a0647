"""Translate options of the reference sweep (talkative autoencoder) from their old names; reference_options.yaml has the table.

    translate(["num_gpus=8", "+eval.k_values=[1,2,4]"])   -> new key=value arguments, warnings
    translate_config(yaml_tree)                           -> new settings of a file of the old conf/eval shape, warnings
    translate_checkpoint_config(config)                   -> settings of activations and sampling from the config in a checkpoint
    python -m ksweep.legacy experiments/k_sweep.py ...    -> runs a sweep with old names (scripts/submit_k_sweep.sh)

docs/options.md is printed from the table (python -m ksweep.legacy --table).
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ksweep.config.resources import parse_time_limit
from ksweep.config.sweep import known_keys
from ksweep.utils.console import remark, say
from ksweep.utils.errors import RequestError, SpecError

Settings = dict[str, Any]
"""New dotted key -> value."""

Table = Literal["submission", "evaluation", "checkpoint"]
Kind = Literal["translated", "not needed", "no effect"]

CONFIG_DIRECTORY = Path("conf") / "eval"
"""Directory in which `+eval=NAME` looks for NAME.yaml."""

FROM_ENVIRONMENT = ("num_gpus", "time", "job_name", "nodes", "nice", "force_direct")
"""Submission options that the old script also took from environment variables: NUM_GPUS, TIME, ..."""

SAYS_DATA = ("--checkpoint-data", "activations.text=", "text=", "activations.vectors=", "vectors=")
_NOT_ITS_DATA = (
    "eval.checkpoint_path: the reference took text, positions and norm filter from the checkpoint's config; here those of the "
    "experiment hold unless --checkpoint-data, activations.text=PATH or activations.vectors=FILE is given"
)

TAKE_A_VALUE = ("--config", "--base", "--config-name", "--config-path", "-cn", "-cp")
"""Dashed options whose value may be the next argument; the last four are Hydra's."""

IGNORED_SECTIONS = ("dataset", "data", "on_the_fly", "activation_dumper", "defaults", "hydra")
"""Sections of an old evaluation file that Hydra put where the reference did not read them."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of the reference: a row of reference_options.yaml, which says what the fields mean."""

    name: str
    table: Table
    keys: tuple[str, ...] = ()
    note: str
    conversion: str = "as_is"
    values: Mapping[bool, Any] = field(default_factory=dict)
    choices: Sequence[str] = ()
    also: Mapping[str, Any] = field(default_factory=dict)
    kind: Kind = "translated"
    warns: bool = False

    def settings(self, value: Any, given: Mapping[str, Any]) -> Settings:
        """Return the new settings; none where nothing is translated or null stands for the default."""
        if self.kind != "translated" or value is None:
            return {}
        return CONVERSIONS[self.conversion](self, value, given)

    def warning(self, value: Any) -> str | None:
        """Return what the user who gave this value should know."""
        if value is None or (self.kind == "translated" and not self.warns):
            return None
        if self.kind == "translated":
            return f"{self.name}: {self.note}"
        what = "never had an effect in the reference" if self.kind == "no effect" else "is not needed here"
        return f"{self.name} {what} and is left out: {self.note}"


def _read_options() -> tuple[Option, ...]:
    tables = yaml.load(Path(__file__).with_suffix(".yaml").read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return tuple(
        Option(name=name, table=table, keys=tuple(row.pop("keys", ())), **row)
        for table, rows in tables.items()
        for name, row in rows.items()
    )


OPTIONS = _read_options()
"""Every option of the reference's submission script, of its evaluation, and what it read from the checkpoint's config."""

BY_NAME = {option.name: option for option in OPTIONS}


# Conversions: (option, its value, every option that was given) -> new settings


def _as_is(option: Option, value: Any, given: Mapping[str, Any]) -> Settings:
    return {option.keys[0]: value}


def _whole_number(option: Option, value: Any, given: Mapping[str, Any]) -> Settings:
    return {**dict.fromkeys(option.keys, _whole(option.name, value)), **option.also}


def _switch(option: Option, value: Any, given: Mapping[str, Any]) -> Settings:
    new = option.values[_truth(option.name, value)]
    return {} if new is None else {option.keys[0]: new}


def _choice(option: Option, value: Any, given: Mapping[str, Any]) -> Settings:
    if value not in option.choices:
        raise SpecError(f"{option.name}={value!r} is not one of {', '.join(option.choices)}")
    return {option.keys[0]: value, **option.also}


def _k_values(option: Option, value: Any, given: Mapping[str, Any]) -> Settings:
    ks = sorted({_whole(option.name, k) for k in (value if isinstance(value, (list, tuple)) else [value])})
    if not ks or ks[0] < 1:
        raise SpecError(f"{option.name}={value!r}: expected whole numbers of at least 1, such as [1,2,4,8]")
    return {"scoring.ks": ks, "sampling.num_draws": ks[-1]}


def _max_val_samples(option: Option, value: Any, given: Mapping[str, Any]) -> Settings:
    per_row = given.get("eval.num_positions")
    factor = 1 if per_row is None else _whole("eval.num_positions", per_row)
    return {"activations.num_activations": _whole(option.name, value) * factor, "activations.rows": "first"}


def _checkpoint(option: Option, value: Any, given: Mapping[str, Any]) -> Settings:
    if not str(value).strip():
        raise SpecError(f"{option.name} is empty: give a checkpoint_*.pt file, or a directory of them")
    return {"autoencoder.checkpoint": str(value)}


def _export_json(option: Option, value: Any, given: Mapping[str, Any]) -> Settings:
    folder = given.get("eval.output_dir") or "eval_results"
    return {"export_json": os.path.join(str(folder), str(given.get("eval.output_file") or "k_sweep_results.json"))}


def _pretokenized(option: Option, value: Any, given: Mapping[str, Any]) -> Settings:
    split = str(given.get("dataset.val_split") or "validation")
    return {"activations.text": os.path.join(str(value), split), "activations.text_column": "input_ids"}


def _max_norm(option: Option, value: Any, given: Mapping[str, Any]) -> Settings:
    switch, limit = "dataset.on_the_fly.filter_large_norms", given.get("dataset.on_the_fly.max_activation_norm")
    if given.get(switch) is None or not _truth(switch, given[switch]):
        return {}
    return {"activations.max_norm": 300_000.0 if limit is None else limit}


def _time_limit(option: Option, value: Any, given: Mapping[str, Any]) -> Settings:
    parse_time_limit(str(value))
    return {"resources.time": str(value)}


def _nice(option: Option, value: Any, given: Mapping[str, Any]) -> Settings:
    text = str(value).strip().lower()
    if text in ("", "0", "false", "no"):
        return {}
    level = int(text) if text.isdigit() and text != "1" else True
    return {"resources.qos": "preemptable", "resources.nice": level}


CONVERSIONS: dict[str, Callable[[Option, Any, Mapping[str, Any]], Settings]] = {
    "as_is": _as_is,
    "whole": _whole_number,
    "switch": _switch,
    "choice": _choice,
    "nothing": lambda option, value, given: {},
    "k_values": _k_values,
    "max_val_samples": _max_val_samples,
    "checkpoint": _checkpoint,
    "export_json": _export_json,
    "pretokenized": _pretokenized,
    "max_norm": _max_norm,
    "time_limit": _time_limit,
    "nice": _nice,
}


# Translation


def translate(arguments: Sequence[str], config_directory: Path | str = CONFIG_DIRECTORY) -> tuple[list[str], list[str]]:
    """Translate arguments with old names; return arguments with new names, and warnings for the user.

    Accepted are `key=value` with Hydra's `+` and `++` in front, `+eval=NAME` (a file of the old layout), and new names, which are
    kept and win. `--config FILE` of the old layout means `+eval=FILE`; other dashed options pass through with their value,
    except Hydra's own --config-name.

    Raises:
        SpecError: an unknown name (the message suggests similar ones), or an invalid value.
    """
    given: dict[str, Any] = {}
    named: dict[str, Any] = {}
    new: list[str] = []
    warnings: list[str] = []
    for argument in _with_values(arguments):
        option, _, value = argument.partition("=")
        if option in ("--config-name", "--config-path", "-cn", "-cp"):
            warnings.append(f"{argument} never had an effect beside a checkpoint and is left out: its own config decides")
            continue
        if option == "--config" and _is_old_file(Path(value)):
            named |= _old_options(_read_yaml(Path(value)))
            continue
        key, setting = ("", None) if argument.startswith("-") else _split(argument)
        if key == "eval":
            named |= _named_config(str(setting), Path(config_directory))
        elif key and (key in BY_NAME or _ignored(key) or not _is_new(key)):
            given[_known(key)] = setting
        else:
            new.append(argument.lstrip("+") if key else argument)
    settings, more = translate_options(named | given, from_checkpoint=False)
    if "autoencoder.checkpoint" in settings and not any(argument.startswith(SAYS_DATA) for argument in new):
        warnings.append(_NOT_ITS_DATA)
    return [f"{key}={_text(value)}" for key, value in settings.items()] + new, warnings + more


def translate_options(given: Mapping[str, Any], *, from_checkpoint: bool) -> tuple[Settings, list[str]]:
    """Return new settings and warnings for old options by full name ("eval.k_values").

    `from_checkpoint`: the options are the config inside a checkpoint; only there did the third table have an effect.

    Raises:
        SpecError: an unknown name or an invalid value.
    """
    settings: Settings = {}
    warnings: list[str] = []
    sections: dict[str, None] = {}
    for name, value in given.items():
        if not from_checkpoint and _ignored(name):
            sections[_section(name)] = None
            continue
        option = BY_NAME[_known(name)]
        _refuse_interpolation(name, value)
        if option.table == "checkpoint" and not from_checkpoint:
            where = f"; here set {' and '.join(option.keys)}" if option.keys else ""
            warnings.append(f"{name} never had an effect here: the reference read it from the checkpoint's config{where}")
            continue
        settings |= option.settings(value, given)
        warnings += [text for text in [option.warning(value)] if text]
    warnings += [_section_warning(section) for section in sections]
    return settings, warnings


def translate_config(tree: Mapping[str, Any]) -> tuple[Settings, list[str]]:
    """Return new settings and warnings for a YAML tree of the old conf/eval shape.

    Raises:
        SpecError: as `translate_options`.
    """
    return translate_options(_old_options(tree), from_checkpoint=False)


def is_old_config(tree: Mapping[str, Any]) -> bool:
    """Return whether a YAML tree has the old conf/eval shape, with its settings below `eval`."""
    return isinstance(tree.get("eval"), Mapping)


def read_config(path: Path | str) -> tuple[Settings, list[str]]:
    """Return new settings and warnings for a YAML file of the old conf/eval shape.

    Raises:
        SpecError: it cannot be read, has another shape, or as `translate_options`.
    """
    return translate_config(_read_yaml(Path(path)))


def translate_checkpoint_config(config: Mapping[str, Any]) -> Settings:
    """Return the settings of activations and sampling from the config inside a checkpoint; the rest of it is for the loader.

    Defaults are the reference's: orig_model_name is model_name, min_pos is 8.
    """
    leaves = dict(_leaves(config))
    given = {option.name: leaves[option.name] for option in OPTIONS if option.table == "checkpoint" and option.name in leaves}
    if given.get("orig_model_name") is None and given.get("model_name") is not None:
        given["orig_model_name"] = given["model_name"]
    if given.get("dataset.on_the_fly.pretokenized_path") is not None:
        given.setdefault("dataset.on_the_fly.min_pos", 8)
    return translate_options(given, from_checkpoint=True)[0]


def from_environment(environment: Mapping[str, str]) -> list[str]:
    """Return submission options from environment variables, as the old script took them."""
    return [f"{name}={environment[name.upper()]}" for name in FROM_ENVIRONMENT if environment.get(name.upper())]


def _old_options(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return leaves by full old name: `eval.eval.x` means `eval.x`, and the outer of two wins, as in the reference."""
    leaves = dict(_leaves(tree))
    inner = {name.removeprefix("eval."): value for name, value in leaves.items() if name.startswith("eval.eval.")}
    return inner | {name: value for name, value in leaves.items() if not name.startswith("eval.eval.")}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def _named_config(name: str, directory: Path) -> dict[str, Any]:
    path = Path(name) if name.endswith((".yaml", ".yml")) else directory / f"{name}.yaml"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in directory.glob("*.yaml"))) if directory.is_dir() else "none: no such directory"
        raise SpecError(f"eval={name}: no file {path} (there are: {there}). Give the file itself, as eval=PATH.yaml")
    return _old_options(_read_yaml(path))


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SpecError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(tree, Mapping) or not is_old_config(tree):
        raise SpecError(f"{path} does not have the old layout: expected a key `eval` with settings such as k_values below it")
    return tree


def _with_values(arguments: Sequence[str]) -> Iterator[str]:
    """Yield the arguments with dashed options and their values joined: --config FILE becomes --config=FILE."""
    rest = iter(arguments)
    for argument in rest:
        value = next(rest, "") if argument in TAKE_A_VALUE else ""
        yield f"{argument}={value}" if value else argument


def _is_old_file(path: Path) -> bool:
    """Return whether a file has the old layout; any other file is left to the reader of new ones."""
    with suppress(SpecError):
        return bool(_read_yaml(path))
    return False


def _split(argument: str) -> tuple[str, Any]:
    """Return key and value of an old `+key=value`, which may be quoted as a whole or in its value."""
    text = argument.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    key, equals, value = text.partition("=")
    if key.startswith("~"):
        raise SpecError(f"{argument!r}: an option cannot be removed here; leave it out")
    if not equals:
        raise SpecError(f"argument {argument!r} is neither an option nor key=value; expected for example eval.k_values=[1,2,4]")
    key = key.lstrip("+").strip()
    key = key.removeprefix("eval.") if key.startswith("eval.eval.") else key
    if key == "time":  # YAML reads 24:00:00 as a number in base 60
        return key, value
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SpecError(f"the value of {argument!r} cannot be read: {error}") from error


def _known(key: str) -> str:
    if key in BY_NAME or _ignored(key):
        return key
    names = {*BY_NAME, *known_keys()}
    tails = {name.rpartition(".")[2]: name for name in (*known_keys(), *BY_NAME)}  # an old name wins
    close = difflib.get_close_matches(key, names, n=2, cutoff=0.6)
    close += [tails[t] for t in difflib.get_close_matches(key.rpartition(".")[2], tails, n=2, cutoff=0.75)]
    hint = f"did you mean {' or '.join(dict.fromkeys(close))}?" if close else "docs/options.md lists the old names and the new"
    raise SpecError(f"unknown option {key!r}: {hint}")


def _is_new(key: str) -> bool:
    """Return whether a key is a current one: in full, a whole group, or the last part of exactly one key."""
    keys = known_keys()
    return key in keys or any(k.startswith(f"{key}.") for k in keys) or [k.rpartition(".")[2] for k in keys].count(key) == 1


def _section(name: str) -> str:
    return name.removeprefix("eval.").partition(".")[0]


def _ignored(name: str) -> bool:
    return _section(name) in IGNORED_SECTIONS and name not in BY_NAME


def _section_warning(section: str) -> str:
    return f"`{section}` settings never had an effect in the reference and are left out: the checkpoint's own config decided"


def _refuse_interpolation(name: str, value: Any) -> None:
    if isinstance(value, str) and "${" in value:
        raise SpecError(f"{name}={value!r} refers to a setting that is not there: write the value itself")


def _truth(name: str, value: Any) -> bool:
    text = str(value).strip().lower()
    if text in ("true", "1", "yes", "on"):
        return True
    if text in ("false", "0", "no", "off", ""):
        return False
    raise SpecError(f"{name}={value!r} has the wrong type: expected true or false")


def _whole(name: str, value: Any) -> int:
    try:
        number = float(value)  # YAML reads 1e5 as text
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not number.is_integer():
        raise SpecError(f"{name}={value!r} has the wrong type: expected a whole number")
    return int(number)


def _text(value: Any) -> str:
    """Return a value as it is written behind key= in an override."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_text, value)) + "]"
    if isinstance(value, str):
        plain = re.fullmatch(r"[\w./@~:+-]*[\w./]", value) and yaml.safe_load(value) == value
        return value if plain else json.dumps(value)
    return json.dumps(value)


# The table, and the wrapper


def options_document() -> str:
    """Return the text of docs/options.md."""
    parts = [_HEAD]
    for table, title in _TITLES.items():
        parts.append(f"## {title}\n\n| old | new | |\n|---|---|---|\n")
        parts += [_row(option) for option in OPTIONS if option.table == table]
        parts.append(_REST if table == "evaluation" else "")
        parts.append("\n")
    return "".join(parts).rstrip("\n") + "\n"


_TITLES: dict[Table, str] = {
    "submission": "Submission (`scripts/submit_k_sweep.sh name=value`, or NUM_GPUS, TIME, ... in the environment)",
    "evaluation": "Evaluation (`eval.*`, on the command line or in a file of the old `conf/eval` shape)",
    "checkpoint": "What the reference read from the checkpoint's config (its data: with `--checkpoint-data`)",
}

_HEAD = """<!-- Printed from ksweep/config/reference_options.py: python -m ksweep.legacy --table > docs/options.md -->
# Old names, new names

Every option of the reference sweep and what it is called here. The old names work on `scripts/submit_k_sweep.sh` (also with `+`
in front, and with `+eval=NAME`), the old files with `--config FILE`; a new name may stand beside old ones and wins. An option
without a new name is accepted with a warning that says why; an unknown one is refused with what it may have meant.

"""

_REST = (
    "| `dataset.*`, `data.*` in such a file | – | never had an effect: Hydra filed them below `eval`, where nothing read them |\n"
)


def _row(option: Option) -> str:
    new = ", ".join(f"`{key}`" for key in option.keys) or "–"
    why = {"no effect": "never had an effect: ", "not needed": "not needed: ", "translated": ""}[option.kind]
    return f"| `{option.name}` | {new} | {why}{option.note} |\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sweep as `python -m ksweep.legacy SCRIPT old=value ...`; --print shows its arguments, --table docs/options.md."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        remark("usage: python -m ksweep.legacy SCRIPT [old=value ...] | --print [old=value ...] | --table")
        return 2
    first, *rest = arguments
    if first == "--table":
        say(options_document(), end="")
        return 0
    try:
        new, warnings = translate([*from_environment(os.environ), *rest])
    except RequestError as error:
        remark(f"error: {error}")
        return 2
    for warning in warnings:
        remark(f"warning: {warning}")
    if first == "--print":
        say("\n".join(new))
        return 0
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, first, *new])


if __name__ == "__main__":
    raise SystemExit(main())
