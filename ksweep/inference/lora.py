"""Say a LoRA's configuration in the names of the model that it is merged into, once it fits the tensors of its file.

PEFT matches patterns of modules, ranks and scales against the names of the model at hand. Those that the adapter was trained with
may be others: of a multimodal wrapper, of a backbone alone. What is built here names every module, as the file has it, so that a
rank or a pattern of somebody else costs no more than the file's own tensors.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import regex
import torch
import transformers

from ksweep.utils.errors import CheckpointError
from ksweep.utils.sidecar_keys import abbreviated
from ksweep.utils.text import some_of

PREFIX = "base_model.model."
"""What PEFT puts before the names of modules in its files."""
PATTERN_SECONDS = 5.0
"""After which a pattern is given up; those in use take milliseconds."""
CHOOSES_MODULES = ("exclude_modules", "layers_to_transform", "layers_pattern")
ADAPTED = (torch.nn.Linear, torch.nn.Embedding, torch.nn.modules.conv._ConvNd, transformers.pytorch_utils.Conv1D)
"""Modules that a LoRA can lie on."""


def lora_over(model: Any, config: Mapping[str, Any], ranks: Mapping[str, int], spelled: Mapping[str, str], where: Path) -> Any:
    """Return peft's LoraConfig of an adapter over a model, with every module by its name there.

    Args:
        model: what the adapter is to be merged into.
        config: what the adapter's own file says, checked (`utils.lora_config`).
        ranks: rank of each adapted module by its name in the model, from the shapes of the adapter's tensors.
        spelled: name of these modules and of those that were left out of the model -> name in the adapter's file.
        where: file of `config`, for messages.

    Raises:
        CheckpointError: modules, ranks or patterns do not fit the tensors.
    """
    from peft import LoraConfig

    known = LoraConfig.__dataclass_fields__
    stated = {key: value for key, value in config.items() if key in known and value is not None} | {"task_type": "CAUSAL_LM"}
    patterns = _Patterns(where)
    # 1. Take the rank and the scale of each module.
    alphas = _by_module(stated, "alpha_pattern", "lora_alpha", ranks, spelled, patterns)
    stated_ranks = _by_module(stated, "rank_pattern", "r", ranks, spelled, patterns)
    if stated.get("target_parameters"):  # the shapes may be those of all experts together
        stated_ranks = {module: max(stated_ranks[module], rank) for module, rank in ranks.items()}
    if not ranks:
        raise CheckpointError(f"the file beside {where} holds no lora_A of a block in use. Get the trained adapter.")
    if wrong := sorted(module for module, rank in ranks.items() if rank != stated_ranks[module]):
        raise CheckpointError(
            f"{where} says rank {stated_ranks[wrong[0]]}, and {some_of(wrong)} has, in another shape than that implies, a "
            f"lora_A of rank {ranks[wrong[0]]}. Use the configuration and the weights that were saved together."
        )
    # 2. Take the modules that the adapter lies on, by their names in its file, or else in the model.
    targets = stated.get("target_modules")
    if targets is None or targets == "all-linear" or stated.get("target_parameters"):
        return LoraConfig(**stated)
    candidates = [name for name, module in model.named_modules() if isinstance(module, ADAPTED)]
    choices = [_chosen(stated, candidates, spell, patterns) for spell in (_speller(spelled), str)]
    if set(ranks) not in choices:
        nearest = min(choices, key=lambda choice: len(choice ^ set(ranks)))
        faults = (("lacks", nearest - ranks.keys()), ("has unexpected", ranks.keys() - nearest))
        problems = [f"{fault} {some_of(names)}" for fault, names in faults if names]
        raise CheckpointError(
            f"the tensors beside {where} are not of the modules that target_modules={abbreviated(targets)} chooses in its base: "
            f"the file {'; it '.join(problems)}. Use the configuration, weights and base that belong together."
        )
    # 3. Name each of them, with its rank and its scale.
    others = {"rank_pattern": (ranks, stated.get("r")), "alpha_pattern": (alphas, stated.get("lora_alpha"))}
    own = {"target_modules": sorted(ranks)} | {key: _grouped(values, usual) for key, (values, usual) in others.items()}
    return LoraConfig(**{key: value for key, value in stated.items() if key not in CHOOSES_MODULES} | own)


def _by_module(
    stated: Mapping[str, Any],
    pattern_key: str,
    default_key: str,
    modules: Iterable[str],
    spelled: Mapping[str, str],
    patterns: _Patterns,
) -> dict[str, Any]:
    """Return what a configuration says of each module, by the first pattern that its name ends in.

    Raises:
        CheckpointError: a pattern is of no module of the file.
    """
    values = stated.get(pattern_key) or {}
    if idle := [key for key in values if not any(patterns.ends(key, module) for module in spelled)]:
        raise CheckpointError(
            f"{patterns.where}: {pattern_key} has {some_of(idle)}, which no module of the adapter is called, so that these would "
            f"have the usual {default_key}. Spell its keys as the text model does, such as {next(iter(spelled), 'q_proj')}."
        )
    usual = stated.get(default_key, 8)  # PEFT's own default
    return {m: next((value for key, value in values.items() if patterns.ends(key, m)), usual) for m in modules}


def _grouped(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """Return one pattern for all modules of each unusual value: as PEFT compiles them, one for each would take seconds."""
    names: dict[Any, list[str]] = defaultdict(list)
    for module, value in sorted(values.items()):
        if value != usual:
            names[value].append(re.escape(module))
    return {"|".join(modules): value for value, modules in names.items()}


def _speller(spelled: Mapping[str, str]) -> Callable[[str], str]:
    """Return a function from a module's name in the model to that in the adapter's file, also for modules that it lacks."""
    beginnings: dict[str, str] = {}
    for own, theirs in spelled.items():
        sections, others = own.split("."), theirs.split(".")
        while sections and others and sections[-1] == others[-1]:
            sections, others = sections[:-1], others[:-1]
        beginnings["".join(f"{section}." for section in sections)] = "".join(f"{section}." for section in others)

    def spell(name: str) -> str:
        if name in spelled:
            return spelled[name]
        own = max((beginning for beginning in beginnings if name.startswith(beginning)), key=len, default="")
        return beginnings.get(own, own) + name.removeprefix(own)

    return spell


def _chosen(config: Mapping[str, Any], candidates: Iterable[str], spell: Callable[[str], str], patterns: _Patterns) -> set[str]:
    """Return the modules that a configuration chooses by what `spell` makes of their names; the rules are PEFT's."""
    targets, excluded = config["target_modules"], config.get("exclude_modules") or ()
    replaced = config.get("modules_to_save") or ()
    blocks = config.get("layers_to_transform")
    numbers = [blocks] if isinstance(blocks, int) else blocks
    before = config.get("layers_pattern") or r"[^.]*"
    block = rf"(?:^|.*?\.)(?:{before if isinstance(before, str) else '|'.join(before)})\.(\d+)\."

    def is_named(name: str, by: Any) -> bool:
        return patterns.is_whole(by, name) if isinstance(by, str) else any(name == n or name.endswith(f".{n}") for n in by)

    def is_chosen(name: str) -> bool:
        if is_named(name, excluded) or any(f".{part}." in f".{name}." for part in replaced) or not is_named(name, targets):
            return False
        if not numbers or isinstance(targets, str) or name in targets:
            return True
        found = re.match(block, name)
        return found is not None and int(found[1]) in numbers

    return {name for name in candidates if is_chosen(spell(name))}


class _Patterns:
    """Regular expressions of somebody else's file, given up after `PATTERN_SECONDS` together."""

    def __init__(self, where: Path) -> None:
        self.where, self.end = where, time.monotonic() + PATTERN_SECONDS

    def is_whole(self, pattern: str, name: str) -> bool:
        """Return whether a pattern matches a whole name."""
        try:
            return regex.fullmatch(pattern, name, timeout=max(0.01, self.end - time.monotonic())) is not None
        except (regex.error, RecursionError, OverflowError) as error:
            raise CheckpointError(
                f"{self.where} has {abbreviated(pattern)}, which is no pattern ({error}). Use the file that was saved with the "
                "adapter."
            ) from error
        except TimeoutError as error:
            raise CheckpointError(
                f"{self.where} has {abbreviated(pattern)}, a pattern that takes more than {PATTERN_SECONDS:g} s to be compared "
                "with the names of modules. Name the modules in a list, or simplify it."
            ) from error

    def ends(self, pattern: str, name: str) -> bool:
        """Return whether a name is what a pattern matches, with or without sections before it."""
        return self.is_whole(rf"(.*\.)?({pattern})", name)
