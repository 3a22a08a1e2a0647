"""Find out when training unfroze the base of a talkative autoencoder, and whether a file was written before or after that.

While its base is frozen, a half is saved without it, and the base directory holds the right weights. After that every file holds
the base's trained weights, so a file without them is incomplete.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

SPEC = re.compile(r"([0-9]{1,15})\s*(s|steps?|os|e|epochs?)?", re.IGNORECASE)
"""A point in training as configurations write it: "1000s" and 1000 are steps, "256os" optimiser steps, "5e" epochs."""


@dataclass(frozen=True)
class Written:
    """The point in training at which a file was written; None where it is unknown."""

    step: int | None
    """Training steps; the optimiser takes one step for every `accumulation` of them."""
    epoch: int | None
    """Complete epochs before it."""
    steps_per_epoch: int | None
    accumulation: int | None
    is_before_unfreezing: bool | None
    """Whether the file was saved just before the base was unfrozen, at the same step; None if unknown."""


def is_scheduled(config: Mapping[str, Any]) -> bool:
    """Return whether training began with frozen bases that a schedule unfreezes."""
    return any(_mapping(config.get(name)).get("enabled") for name in ("freeze_schedule", "unfreeze_encoder"))


def was_enabled(config: Mapping[str, Any], role: str, component: str) -> bool | None:
    """Return the flag of an enabled freeze schedule that overrides a trainable component's own; None if there is none."""
    schedule = _mapping(config.get("freeze_schedule"))
    flag = _component(schedule, role, component).get("enabled") if schedule.get("enabled") else None
    return flag if isinstance(flag, bool) else None


def unfreezing(config: Mapping[str, Any], role: str) -> list[str]:
    """Return the points at which training unfreezes the base of a half, as the configuration writes them."""
    return [str(spec) for spec in _specs(config, role)]


def was_unfrozen(config: Mapping[str, Any], role: str, written: Written) -> bool | None:
    """Return whether the base of a half had been unfrozen when a file was written; None if that is unknown."""
    reached = [_was_reached(spec, written) for spec in _specs(config, role)]
    return True if True in reached else None if None in reached or not reached else False


def _specs(config: Mapping[str, Any], role: str) -> Iterator[str | int]:
    """Yield the points in training at which a base is unfrozen; the component's own overrides the schedule's."""
    schedule, encoder = (_mapping(config.get(name)) for name in ("freeze_schedule", "unfreeze_encoder"))
    if schedule.get("enabled"):
        epoch = schedule.get("unfreeze_at_epoch")
        own = _component(schedule, role, "base_model").get("unfreeze_at")
        specs = (own, schedule.get("unfreeze_at"), schedule.get("unfreeze_at_step"), None if epoch is None else f"{epoch}e")
        yield from [spec for spec in specs if isinstance(spec, (str, int))][:1]
    if encoder.get("enabled"):
        yield from [spec for spec in (encoder.get("at"), encoder.get("step")) if isinstance(spec, (str, int))][:1]


def _was_reached(spec: str | int, written: Written) -> bool | None:
    """Return whether a file was written after a point in training; None if that is unknown."""
    # 1. Convert the point to training steps, or compare whole epochs where steps are unknown.
    match = SPEC.fullmatch(str(spec).strip())
    if match is None:
        return None
    value, unit = int(match[1]), (match[2] or "s").lower()
    if unit.startswith("e"):
        if written.step is None or written.steps_per_epoch is None:
            return None if written.epoch is None else written.epoch >= value
        value *= written.steps_per_epoch
    if unit == "os":
        if written.accumulation is None:
            return False if written.step is not None and written.step < value else None
        value *= written.accumulation
    # 2. Compare steps. At the very step, the file's name or content says whether it was saved before the base was unfrozen.
    if written.step is None:
        return None
    if written.step == value:
        return None if written.is_before_unfreezing is None else not written.is_before_unfreezing
    return written.step > value


def _component(schedule: Mapping[str, Any], role: str, component: str) -> Mapping[str, Any]:
    return _mapping(_mapping(_mapping(schedule.get("components")).get(role)).get(component))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
