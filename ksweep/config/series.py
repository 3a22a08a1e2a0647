"""A series of checkpoints as an axis: `autoencoder.av="runs/iter_*/av"` becomes the checkpoints that match, by step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ksweep.config.spec import Autoencoder, replace_at
from ksweep.config.sweep import Sweep
from ksweep.utils.checkpoint_series import is_pattern, members, step_in_series
from ksweep.utils.errors import SpecError
from ksweep.utils.text import some_of

SERIES_FIELDS = {"av": "AV", "ar": "AR", "checkpoint": "checkpoint"}
"""Field of the autoencoder that may name a series -> what it holds."""


def expand_series(sweep: Sweep) -> Sweep:
    """Return the sweep with each pattern of checkpoints replaced by those that match, as an axis in the order of their steps.

    AV and AR that are both patterns vary together: a cell has both of one step.

    Raises:
        CheckpointError: nothing matches a pattern, or the hub cannot be asked.
        SpecError: of AV and AR one lacks a step that the other has, or two lists of several have patterns.
    """
    axes, cell = dict(sweep.axes), sweep.cell
    # 1. What is said for all cells stands in the cell, also where the command line has it as an axis of one value.
    for path in (f"autoencoder.{name}" for name in SERIES_FIELDS):
        if len(axes.get(path, ())) == 1 and is_pattern(axes[path][0]):
            cell = replace_at(cell, path, axes.pop(path)[0])
    # 2. An axis of autoencoders gets those that each of its values stands for.
    if "autoencoder" in axes:
        axes["autoencoder"] = tuple(dict.fromkeys(member for value in axes["autoencoder"] for member in _autoencoders(value)))
        cell = replace(cell, autoencoder=axes["autoencoder"][0]) if _patterns(cell.autoencoder) else cell
    elif varying := _patterns(cell.autoencoder):
        series = _autoencoders(cell.autoencoder)
        alone = next(iter(varying)) if len(varying) == 1 else None
        axes |= {f"autoencoder.{alone}": tuple(getattr(a, alone) for a in series)} if alone else {"autoencoder": tuple(series)}
        cell = replace(cell, autoencoder=series[0])
    # 3. An axis of paths may have patterns among them.
    listed = [path for name in SERIES_FIELDS if any(map(is_pattern, axes.get(path := f"autoencoder.{name}", ())))]
    if len(listed) > 1:
        raise SpecError(
            f"{' and '.join(listed)} are lists with patterns in them: give one pattern each, and they vary together by step"
        )
    for path in listed:
        what = SERIES_FIELDS[path.rpartition(".")[2]]
        axes[path] = tuple(m for value in axes[path] for m in (members(value, what) if is_pattern(value) else [value]))
    return sweep if (axes, cell) == (sweep.axes, sweep.cell) else replace(sweep, cell=cell, axes=axes)


def _patterns(autoencoder: Autoencoder) -> dict[str, str]:
    """Return the fields of an autoencoder that are patterns."""
    return {name: value for name in SERIES_FIELDS if is_pattern(value := getattr(autoencoder, name))}


def _autoencoders(autoencoder: Autoencoder) -> list[Autoencoder]:
    """Return the autoencoders that one with patterns stands for, by step; one without stands for itself."""
    patterns = _patterns(autoencoder)
    found = {name: members(pattern, SERIES_FIELDS[name]) for name, pattern in patterns.items()}
    if len(found) < 2:
        return [replace_at(autoencoder, name, source) for name, sources in found.items() for source in sources] or [autoencoder]
    by_step = {name: _by_step(name, patterns[name], sources) for name, sources in found.items()}
    _check_same_steps(by_step, patterns)
    (a, of_a), (b, of_b) = by_step.items()
    return [replace_at(replace_at(autoencoder, a, of_a[step]), b, of_b[step]) for step in of_a]


def _by_step(name: str, pattern: str, sources: list[str]) -> dict[int, str]:
    """Return the sources of a series by their step.

    Raises:
        SpecError: one has no step, or two have the same.
    """
    out: dict[int, str] = {}
    for source in sources:
        step = step_in_series(source)
        if step is None or step in out:
            why = "states no step (iter_0000500, step500, checkpoint-500)" if step is None else f"has the step of {out[step]}"
            raise SpecError(
                f"autoencoder.{name}={pattern!r} and the other half are to vary together by step, but {source} {why}: narrow the "
                "pattern"
            )
        out[step] = source
    return out


def _check_same_steps(by_step: Mapping[str, Mapping[int, Any]], patterns: Mapping[str, str]) -> None:
    (a, of_a), (b, of_b) = by_step.items()
    alone = {a: sorted(of_a.keys() - of_b.keys()), b: sorted(of_b.keys() - of_a.keys())}
    if any(alone.values()):
        texts = [f"only an {SERIES_FIELDS[name]} at {some_of(map(str, steps), 10)}" for name, steps in alone.items() if steps]
        both = ", ".join(f"autoencoder.{name}={pattern!r}" for name, pattern in patterns.items())
        raise SpecError(
            f"{both} vary together by step, and there is {' and '.join(texts)}. Narrow the patterns to steps that have both "
            "(iter_000[1-4]00), or vary one of them alone"
        )
