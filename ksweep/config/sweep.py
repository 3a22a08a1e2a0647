"""A sweep: a question, one cell, and the values along which the cell is varied."""

from __future__ import annotations

import itertools
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from ksweep.config.resources import Resources
from ksweep.config.spec import Autoencoder, Cell, TextEnd, replace_at
from ksweep.config.validation import PLAIN_NAME, one_line, plain_name
from ksweep.utils.cell_names import duplicate_names, short_names
from ksweep.utils.checkpoint_series import steps_of
from ksweep.utils.errors import SpecError

PATHS = ("av", "ar", "checkpoint", "texts", "base", "model", "text", "vectors")
"""Fields of a cell that hold a path or a hub id."""


MOST_CELLS = 10_000


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A question: one cell, and the values along which it is varied."""

    name: str
    """Names the sweep in the registry and its job directories, e.g. temp_sweep."""
    cell: Cell
    """The spec that all cells share, except along the axes."""
    axes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Dotted field of the cell -> its values, e.g. {"sampling.temperature": (0.5, 1.0)}. Cells are the product of all axes."""
    question: str = ""
    """What the sweep is to find out; kept in the registry and shown in the report."""
    resources: Resources = field(default_factory=Resources)
    """Where and how the cells run."""
    registry: str = "registry"
    """Directory of the draws, scores, run records and the database."""
    vector_cache: str = "vector_cache"
    """Directory of the activation store."""
    export_json: str = ""
    """File to which results are also written in the reference sweep's JSON schema; with several cells one file each, by label."""

    def __post_init__(self) -> None:
        plain_name("name", self.name, PLAIN_NAME, "temp_sweep")
        one_line("question", " ".join(self.question.split()), longest=100_000)
        for name in ("registry", "vector_cache"):
            if not (value := getattr(self, name)) or not str(value).strip():
                raise SpecError(f"{name}={value!r} is no directory: give its path, or leave it out ({name}={name})")
        for name in ("registry", "vector_cache", "export_json"):
            one_line(name, str(getattr(self, name)))
        for path, values in self.axes.items():
            if not isinstance(values, (tuple, list)):
                raise SpecError(
                    f"axis {path!r} of sweep {self.name!r} is {values!r}: give its values as a tuple, e.g. ({values!r},)"
                )
            if not values:
                raise SpecError(f"axis {path!r} of sweep {self.name!r} has no values")
        num_cells = math.prod(map(len, self.axes.values()))
        if num_cells > MOST_CELLS:
            raise SpecError(f"the axes of sweep {self.name!r} make {num_cells:,} cells, and a sweep has at most {MOST_CELLS:,}")
        self.cells()

    def cells(self) -> list[Cell]:
        """Return the cells: the product of the axes, in order and without duplicates."""
        out = []
        for values in itertools.product(*self.axes.values()):
            cell = self.cell
            for path, value in zip(self.axes, values, strict=True):
                cell = replace_at(cell, path, value)
            if cell not in out:
                out.append(cell)
        return out

    def labels(self) -> list[str]:
        """Return what differs between the cells, one label each: "temperature=0.5", "ar=untrained"."""
        fields_of = _axis_names(list(self.axes))
        texts = {path: _axis_texts(fields_of[path], values) for path, values in self.axes.items()}
        steps = {path: found for path, values in self.axes.items() if (found := _axis_steps(path, values)) is not None}
        for path, of_path in steps.items():
            texts[path] = [f"step={step}" if len(steps) == 1 else f"{fields_of[path]} step={step}" for step in of_path]
        if limits := self.axes.get("autoencoder.max_text_tokens"):
            kept = self.cell.autoencoder.kept_tokens
            texts["autoencoder.max_text_tokens"] = [token_limit_text(limit, kept) for limit in limits]
        labels: dict[Cell, str] = {}
        for indices in itertools.product(*(range(len(values)) for values in self.axes.values())):
            cell = self.cell
            for (path, values), index in zip(self.axes.items(), indices, strict=True):
                cell = replace_at(cell, path, values[index])
            label = ", ".join(filter(None, (texts[path][index] for path, index in zip(self.axes, indices, strict=True))))
            labels.setdefault(cell, label or self.name)
        again = duplicate_names(list(labels.values()))
        return [f"{text} #{i}" if text in again else text for i, text in enumerate(labels.values())]


def _axis_names(paths: Sequence[str]) -> dict[str, str]:
    """Return the last part of each dotted path, or all of it where two paths end alike."""
    last = [path.rpartition(".")[2] for path in paths]
    again = duplicate_names(last)
    return {path: path if name in again else name for path, name in zip(paths, last, strict=True)}


def _axis_steps(path: str, values: Sequence[Any]) -> list[int] | None:
    """Return the steps of an axis of checkpoints that differ in nothing but their step; None of any other axis."""
    if len(values) < 2:
        return None
    if path.rpartition(".")[2] in PATHS:
        return steps_of(values) if all(isinstance(value, str) for value in values) else None
    if not all(isinstance(value, Autoencoder) for value in values):
        return None
    varying = [f.name for f in fields(Autoencoder) if len({getattr(value, f.name) for value in values}) > 1]
    steps = [_axis_steps(name, [getattr(value, name) for value in values]) for name in varying]
    return steps[0] if steps and all(found == steps[0] for found in steps) else None


def _axis_texts(name: str, values: Sequence[Any]) -> list[str]:
    """Return a label for each value of an axis: the value itself, or for a dataclass the fields that differ."""
    if not all(is_dataclass(value) for value in values):
        return [f"{name}={text}" for text in _value_texts(name, values)]
    if all(isinstance(value, Autoencoder) for value in values):
        sources = short_names([value.source for value in values])
        if len(set(sources)) == len(set(values)):
            return [f"{name}={source}" for source in sources]
    parts: list[list[str]] = [[] for _ in values]
    for field_name in (f.name for f in fields(values[0])):
        column = [getattr(value, field_name) for value in values]
        for i, (value, text) in enumerate(zip(column, _value_texts(field_name, column), strict=True)):
            parts[i] += [f"{field_name}={text}"] if value is not None and len(set(column)) > 1 else []
    return [", ".join(part) for part in parts]


def token_limit_text(max_text_tokens: int | None, kept_tokens: TextEnd) -> str:
    """Return which tokens of given texts a cell has: "8 tokens", "last 8 tokens", or "all" where texts are whole."""
    if max_text_tokens is None:
        return "all"
    return f"{'last ' * (kept_tokens == 'last')}{max_text_tokens} token{'s' * (max_text_tokens != 1)}"


def _value_texts(name: str, values: Sequence[Any]) -> list[str]:
    """Return values as text; paths and hub ids as short as keeps them distinct."""
    if name.rpartition(".")[2] in PATHS:
        paths = [value for value in values if value is not None]
        texts = dict(zip(paths, short_names(paths), strict=True)) if paths else {}
        return [texts.get(value, str(value)) for value in values]
    return [f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value) for value in values]


SPEC_GROUPS: dict[str, type] = {**typing.get_type_hints(Cell), "resources": Resources}


SWEEP_FIELDS = ("name", "question", "registry", "vector_cache", "export_json")


def known_keys() -> dict[str, Any]:
    """Return every key that a user can set, dotted, with its type."""
    keys: dict[str, Any] = dict.fromkeys(SWEEP_FIELDS, str)
    for group, spec in SPEC_GROUPS.items():
        keys |= _field_types(group, spec)
    return keys


def _field_types(prefix: str, spec: Any) -> dict[str, Any]:
    """Return the type of each field below a dotted prefix; a field that is a dataclass itself gives its own fields."""
    types: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(spec).items():
        types |= _field_types(f"{prefix}.{name}", hint) if is_dataclass(hint) else {f"{prefix}.{name}": hint}
    return types
