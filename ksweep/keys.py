"""The three keys of a cell: activations, draws, cell; each from what changes its content, and from nothing else.

Nothing heavy is imported and no model is loaded: the launcher plans with these. Checkpoints are inspected on the way, so a
wrong directory is refused before anything is submitted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksweep.activations.fill import activations_key
from ksweep.activations.vectors import read_sidecar, vectors_shape
from ksweep.autoencoder.checkpoint import CheckpointInfo, check_pair, digest, inspect
from ksweep.errors import DataError, SpecError
from ksweep.files import HUB_ID, resolve
from ksweep.identity import fingerprint
from ksweep.spec import Autoencoder, Cell

SAMPLER_VERSION = 1
"""Raised whenever the same seed would give other texts."""
SCORER_VERSION = 1
"""Raised whenever the same texts would give other errors."""


@dataclass(frozen=True)
class Keys:
    """What names a cell's results, with the readable identities they were hashed from."""

    activations: str
    draws: str
    cell: str
    layer: int
    label: str
    identity: dict[str, Any]

    @property
    def name(self) -> str:
        """What a person reads in tables: the label, and enough of the key to be unique."""
        return f"{self.label} @{self.cell[:8]}"


def cell_keys(cell: Cell) -> Keys:
    """Identify a cell.

    Raises:
        CheckpointError, DataError: something is missing, is not what it was given as, or does not belong together.
    """
    av, ar = inspect_pair(cell.autoencoder)
    _check_activations(cell, av, ar)
    layer = _layer(cell, av.layer, ar.layer)
    activations, identity = activations_key(cell.activations, layer)
    draws = {
        "activations": activations,
        "av": digest(av),
        "ar": digest(ar),
        "dtype": cell.autoencoder.dtype,
        "temperature": cell.sampling.temperature,
        "top_p": cell.sampling.top_p if cell.sampling.temperature > 0 else None,
        "max_new_tokens": cell.sampling.max_new_tokens,
        "seed": cell.sampling.seed if cell.sampling.temperature > 0 else None,
        "sampler_version": SAMPLER_VERSION,
        "scorer_version": SCORER_VERSION,
    }
    draws_key = fingerprint(draws)
    whole = {
        "draws": draws_key,
        "num_activations": cell.activations.num_activations,
        "num_draws": cell.sampling.effective_num_draws,
        "scoring": cell.scoring,
    }
    identity = {"activations": identity, "draws": draws, "layer": layer}
    return Keys(activations, draws_key, fingerprint(whole), layer, label(cell, layer), identity)


def _check_activations(cell: Cell, av: CheckpointInfo, ar: CheckpointInfo) -> None:
    """That the vectors are of the layer, width and model that the pair was trained on, as far as anyone says."""
    given = cell.activations
    if given.vectors is None:
        check_pair(av, ar, activations_layer=given.layer, activations_base=given.model)
        return
    _, width = vectors_shape(given.vectors)
    said = read_sidecar(given.vectors)
    if said is None:
        check_pair(av, ar, activations_layer=given.layer, activations_d_model=width)
        return
    if said.d_model not in (None, width):
        raise DataError(
            f"{given.vectors} holds vectors of {width} dimensions and its sidecar says {said.d_model}: "
            "the two are of different files"
        )
    if said.layer is not None and given.layer not in (None, said.layer):
        raise SpecError(
            f"activations.layer={given.layer}, but the sidecar of {given.vectors} says layer {said.layer}: leave it out"
        )
    layer = given.layer if said.layer is None else said.layer
    check_pair(av, ar, activations_layer=layer, activations_d_model=width, activations_base=said.base_model)


def inspect_pair(autoencoder: Autoencoder) -> tuple[CheckpointInfo, CheckpointInfo]:
    """AV and AR, each checked by itself and against the other."""
    av = inspect(resolve(autoencoder.av, "AV checkpoint"), "av", base=autoencoder.base)
    ar = inspect(resolve(autoencoder.ar, "AR checkpoint"), "ar", base=autoencoder.base)
    check_pair(av, ar)
    return av, ar


def _layer(cell: Cell, av: int | None, ar: int | None) -> int:
    """check_pair has refused layers that differ."""
    layer = next((x for x in (cell.activations.layer, ar, av) if x is not None), None)
    if layer is None:
        raise SpecError("no sidecar of the autoencoder says which layer it was trained on: set activations.layer")
    return layer


def label(cell: Cell, layer: int) -> str:
    """What a cell is, in a few words; the same in every sweep it is part of."""
    parts = [f"{pair_name(cell.autoencoder)} L{layer}", f"T={cell.sampling.temperature:g}"]
    if cell.sampling.top_p < 1:
        parts.append(f"top_p={cell.sampling.top_p:g}")
    return " ".join(parts)


def pair_name(autoencoder: Autoencoder) -> str:
    """A short name of a pair: the hub name without -av, or the directory that holds av/."""
    is_hub_id = HUB_ID.match(autoencoder.av) is not None and not Path(autoencoder.av).exists()
    path = Path(autoencoder.av.partition("@")[0] if is_hub_id else autoencoder.av)
    if path.name.lower() in ("av", "nla-av", "actor"):
        return path.resolve().parent.name if path.exists() else path.parent.name
    return re.sub(r"^nla-|[-_]av$", "", path.name, flags=re.IGNORECASE) or path.name
