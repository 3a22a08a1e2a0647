"""Implement --checkpoint-data: use the text, positions and norm filter that a talkative-autoencoder file was trained with.

The reference's sweep always took them from the checkpoint. Here they are optional, and key=value settings override them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from ksweep.autoencoder.tae.checkpoint import checkpoint_file
from ksweep.autoencoder.tae.layout import section
from ksweep.config.overrides import apply_overrides
from ksweep.config.reference_options import translate_checkpoint_config
from ksweep.config.series import expand_series
from ksweep.config.spec import Activations
from ksweep.config.sweep import Sweep
from ksweep.utils.errors import SpecError
from ksweep.utils.files import named_path
from ksweep.utils.torch_file import read_checkpoint

RULE = ("rows", "positions", "candidates", "min_position", "positions_per_document", "max_norm")
"""Fields that choose the vectors of a text. A field that the config lacks has the reference's default."""
REFERENCE_RULE = {"rows": "first", "candidates": "not_padding", "min_position": 8}
"""Defaults of the reference that differ from those of `Activations`."""
TEXT = ("text", "text_column", "text_split", "document_column", "vectors", "max_length")


def with_checkpoint_data(sweep: Sweep, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the checkpoint's training data, overridden by the given settings.

    Raises:
        SpecError: no checkpoint is set, it names no text, its text is not on this machine, or ready-made vectors are set as well.
        CheckpointError: the file cannot be read.
    """
    for key in ("activations", "activations.vectors"):
        if given.get(key) is not None:
            raise SpecError(f"--checkpoint-data and {key} both choose the activations: leave one of them out")
    cells = expand_series(apply_overrides(sweep, given)).cells()
    data_of_cells = [_data(cell.autoencoder.checkpoint, given) for cell in cells]
    if any(data != data_of_cells[0] for data in data_of_cells):
        raise SpecError("--checkpoint-data: the checkpoints of this sweep were trained on different data; give one at a time")
    return {f"activations.{name}": value for name, value in data_of_cells[0].items()} | dict(given)


def _data(checkpoint: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `Activations` that a checkpoint states; without its text if the settings give another."""
    # 1. Read the checkpoint's training configuration.
    if checkpoint is None:
        raise SpecError("--checkpoint-data needs a talkative-autoencoder file: set autoencoder.checkpoint=PATH.pt")
    path = checkpoint_file(checkpoint)
    config = section(read_checkpoint(path), "config", f"{path} holds no training configuration")
    # 2. Take the rule for positions and norms, then the reference's defaults, then those of `Activations`.
    stated = {key.removeprefix("activations."): value for key, value in translate_checkpoint_config(config).items()}
    defaults = {f.name: f.default for f in fields(Activations) if f.default is not MISSING}
    data = {name: stated.get(name, REFERENCE_RULE.get(name, defaults[name])) for name in RULE}
    if given.get("activations.text") is not None:
        return data
    # 3. Take the text.
    column = {"text_column": stated.get("text_column", "input_ids")}
    return data | {name: defaults[name] for name in TEXT} | column | {"text": _text(stated.get("text"), path)}


def _text(trained_on: str | None, checkpoint: Path) -> str:
    """Return the path of the pretokenised split: as the configuration states it, or relative to the checkpoint."""
    advice = (
        "set activations.text=PATH beside --checkpoint-data (a pretokenised `datasets` directory: with "
        "activations.text_column=input_ids); the checkpoint's positions and norm filter still apply"
    )
    if trained_on is None:
        raise SpecError(
            f"{checkpoint} was not trained on pretokenised text (its config lacks dataset.on_the_fly.pretokenized_path): {advice}"
        )
    for path in (named_path(trained_on), checkpoint.parent / trained_on):
        if path.exists():
            return str(path)
    raise SpecError(f"{checkpoint} was trained on {trained_on}, which is not on this machine: copy it there, or {advice}")
