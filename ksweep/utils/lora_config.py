"""Check PEFT's configuration of a LoRA (adapter_config.json) before anything is built by it.

PEFT takes values of any type, and leaves out keys that it does not know with a warning that nobody sees: the adapter would be
merged with another scale, or computed in another way than it was trained in.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from ksweep.utils.errors import CheckpointError
from ksweep.utils.hub import HUB_ID
from ksweep.utils.sidecar_keys import abbreviated

NO_ROLE = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "init_lora_weights",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type", "velora_config",
})  # fmt: skip
"""Keys of PEFT 0.21 that say how a LoRA was trained or begun; what it computes does not depend on them."""
BY_PEFT = frozenset({"ensure_weight_tying", "target_parameters", "trainable_token_indices"})
"""Keys that PEFT reads, and checks."""


def check_lora_config(config: Mapping[str, Any], where: Path) -> None:
    """Check that the configuration of a PEFT adapter is that of a LoRA, with values that PEFT reads as they are meant.

    Raises:
        CheckpointError: another kind of adapter, a value of another type, or a key that is not known.
    """
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        _wrong(where, "peft_type", config["peft_type"], "LORA: merge an adapter of another kind into its base")
    for key, value in config.items():
        if value is None or key in NO_ROLE | BY_PEFT:
            continue
        if key in KINDS:
            is_so, expected = KINDS[key]
            if not is_so(value):
                _wrong(where, key, value, expected)
        elif not (value is False or value in ({}, [], "")):
            raise CheckpointError(
                f"{where} has {abbreviated(key)[1:-1]}={abbreviated(value)}, with which the adapter would be computed in a way "
                "that is not supported here. Merge it into its base with the package that trained it."
            )


def named_base(config: Mapping[str, Any], where: Path) -> str | None:
    """Return the base model that an adapter's configuration names, a hub id with the revision that it states; None for none.

    Raises:
        CheckpointError: the revision is no text.
    """
    source, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(source, str) or not source:
        return None
    if revision is None or "@" in source or os.path.exists(source) or not HUB_ID.match(source):
        return source
    if not isinstance(revision, str):
        _wrong(where, "revision", revision, "text: a branch or commit of the base model")
    return source if revision in ("", "main") else f"{source}@{revision}"


def _wrong(where: Path, key: str, value: Any, expected: str) -> NoReturn:
    raise CheckpointError(
        f"{where} has {key}={abbreviated(value)}, expected {expected}. Use the file that was saved with the adapter."
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_text_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_by_name(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(kind, value.values()))


def _is_block_numbers(value: Any) -> bool:
    return all(type(number) is int and number >= 0 for number in (value if isinstance(value, list) else [value]))


def _are_names(value: Any) -> bool:
    names = [value] if isinstance(value, str) else value
    return _is_text_list(names) and all(re.fullmatch(r"[\w.]*", name) for name in names)


KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a whole number >= 1"),
    "lora_alpha": (_is_number, "a number > 0"),
    **dict.fromkeys(
        ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"), (lambda value: isinstance(value, bool), "true or false")
    ),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "rank_pattern": (_is_by_name(_is_rank), "whole numbers >= 1 by name of module"),
    "alpha_pattern": (_is_by_name(_is_number), "numbers > 0 by name of module"),
    **dict.fromkeys(
        ("target_modules", "exclude_modules"),
        (lambda value: isinstance(value, str) or _is_text_list(value), "a list of names or a pattern"),
    ),
    "modules_to_save": (_are_names, "a list of names"),
    "layers_to_transform": (_is_block_numbers, "numbers of blocks"),
    "layers_pattern": (_are_names, "a name or a list of names"),
}
"""Keys that what a LoRA computes depends on: whether a value is of their kind, and what that is."""
