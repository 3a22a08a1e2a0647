"""When the base of a talkative autoencoder was unfrozen in training, and whether a file was written before or after that.

While its base is frozen a half is saved without it, and the base directory holds the right weights. Afterwards every file holds
the base's trained weights, so that one without them is not whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

SPEC = re.compile(r"(\d+)\s*(s|steps?|os|e|epochs?)?", re.IGNORECASE)
"""A point of training as configurations spell it: "1000s" and 1000 are steps, "256os" optimiser steps, "5e" epochs."""


@dataclass(frozen=True)
class Written:
    """When a file was written; None where nothing says so."""

    step: int | None
    """Steps, of which the optimiser takes one in every `accumulation`."""
    epoch: int | None
    """Whole epochs before it."""
    steps_per_epoch: int | None
    accumulation: int | None
    is_before_unfreezing: bool | None
    """Saved on purpose just before the base was unfrozen, at the same step; None: it may be."""


def is_scheduled(config: Mapping[str, Any]) -> bool:
    """Whether training began with frozen bases that a schedule unfreezes."""
    return any(_mapping(config.get(name)).get("enabled") for name in ("freeze_schedule", "unfreeze_encoder"))


def was_enabled(config: Mapping[str, Any], role: str, component: str) -> bool | None:
    """What an enabled freeze schedule puts in the place of a trainable component's own flag; None: nothing."""
    schedule = _mapping(config.get("freeze_schedule"))
    said = _component(schedule, role, component).get("enabled") if schedule.get("enabled") else None
    return said if isinstance(said, bool) else None


def unfreezing(config: Mapping[str, Any], role: str) -> list[str]:
    """Where training unfreezes the base of a half, as the configuration spells it."""
    return [str(spec) for spec in _specs(config, role)]


def was_unfrozen(config: Mapping[str, Any], role: str, written: Written) -> bool | None:
    """Whether the base of a half had been unfrozen when a file was written; None where that cannot be told."""
    answers = [_reached(spec, written) for spec in _specs(config, role)]
    return True if True in answers else None if None in answers or not answers else False


def _specs(config: Mapping[str, Any], role: str) -> Iterator[str | int]:
    """Points of training, the component's own before the schedule's."""
    schedule, encoder = (_mapping(config.get(name)) for name in ("freeze_schedule", "unfreeze_encoder"))
    if schedule.get("enabled"):
        epoch = schedule.get("unfreeze_at_epoch")
        own = _component(schedule, role, "base_model").get("unfreeze_at")
        places = (own, schedule.get("unfreeze_at"), schedule.get("unfreeze_at_step"), None if epoch is None else f"{epoch}e")
        yield from [spec for spec in places if isinstance(spec, (str, int))][:1]
    if encoder.get("enabled"):
        yield from [spec for spec in (encoder.get("at"), encoder.get("step")) if isinstance(spec, (str, int))][:1]


def _reached(spec: str | int, written: Written) -> bool | None:
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
    if written.step is None:
        return None
    if written.step == value:
        return None if written.is_before_unfreezing is None else not written.is_before_unfreezing
    return written.step > value


def _component(schedule: Mapping[str, Any], role: str, component: str) -> Mapping[str, Any]:
    return _mapping(_mapping(_mapping(schedule.get("components")).get(role)).get(component))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
