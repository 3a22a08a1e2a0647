"""--checkpoint-data: the text, positions and norm filter that a talkative-autoencoder file says it was trained on.

The reference's sweep took them from the checkpoint, always; here they are asked for, and any key=value setting wins over them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from ksweep.autoencoder.tae.checkpoint import highest_step, read_checkpoint
from ksweep.autoencoder.tae.layout import section
from ksweep.config.overrides import apply_overrides
from ksweep.config.reference_options import translate_checkpoint_config
from ksweep.config.spec import Activations
from ksweep.config.sweep import Sweep
from ksweep.utils.errors import SpecError
from ksweep.utils.hub import resolve

RULE = ("positions", "candidates", "min_position", "positions_per_document", "max_norm")
"""Which vectors of a text; where a config is silent about one, the reference's default holds."""
REFERENCE_RULE = {"candidates": "not_padding", "min_position": 8}
"""Where the reference's defaults are not ours."""
TEXT = ("text", "text_column", "text_split", "document_column", "vectors", "max_length")


def with_checkpoint_data(sweep: Sweep, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, and below them those of the data of the checkpoint that they name.

    Raises:
        SpecError: no checkpoint, one that names no text, a text that is not on this machine, or ready-made vectors beside it.
        CheckpointError: a file that cannot be read.
    """
    for key in ("activations", "activations.vectors"):
        if given.get(key) is not None:
            raise SpecError(f"--checkpoint-data says which activations are meant, and so does {key}: leave one of them out")
    cells = apply_overrides(sweep, given).cells()
    found = [_data(cell.autoencoder.checkpoint, given) for cell in cells]
    if any(data != found[0] for data in found):
        raise SpecError("--checkpoint-data: the checkpoints of this sweep were trained on different data; give one at a time")
    return {f"activations.{name}": value for name, value in found[0].items()} | dict(given)


def _data(checkpoint: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `Activations`; no text of its own where another one is given."""
    if checkpoint is None:
        raise SpecError("--checkpoint-data needs a talkative-autoencoder file: set autoencoder.checkpoint=PATH.pt")
    path = resolve(checkpoint, "talkative-autoencoder checkpoint")
    path = highest_step(path) if path.is_dir() else path
    config = section(read_checkpoint(path), "config", f"{path} holds no training configuration")
    said = {key.removeprefix("activations."): value for key, value in translate_checkpoint_config(config).items()}
    usual = {f.name: f.default for f in fields(Activations) if f.default is not MISSING}
    data = {name: said.get(name, REFERENCE_RULE.get(name, usual[name])) for name in RULE}
    if given.get("activations.text") is not None:
        return data
    column = {"text_column": said.get("text_column", "input_ids")}
    return data | {name: usual[name] for name in TEXT} | column | {"text": _text(said.get("text"), path)}


def _text(named: str | None, checkpoint: Path) -> str:
    """The pretokenised split, where the configuration says or beside the checkpoint."""
    advice = (
        "set activations.text=PATH beside --checkpoint-data (a pretokenised `datasets` directory: with "
        "activations.text_column=input_ids); its positions and norm filter hold all the same"
    )
    if named is None:
        raise SpecError(
            f"{checkpoint} was not trained on pretokenised text (its config lacks dataset.on_the_fly.pretokenized_path): {advice}"
        )
    for place in (Path(named).expanduser(), checkpoint.parent / named):
        if place.exists():
            return str(place)
    raise SpecError(f"{checkpoint} was trained on {named}, which is not on this machine: copy it there, or {advice}")
