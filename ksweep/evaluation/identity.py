"""The three keys of a cell: activations, draws, cell; each from what changes its content, and from nothing else.

Nothing heavy is imported and no model is loaded: the launcher plans with these. Checkpoints are inspected on the way, so a
wrong directory is refused before anything is submitted.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ksweep.activations.caching import activations_key
from ksweep.activations.model_config import text_config
from ksweep.activations.vector_source import POSITIONS, read_sidecar, vectors_layer, vectors_say_positions, vectors_shape
from ksweep.autoencoder.family import ActivationFacts, Family, family_of
from ksweep.config.spec import Activations, Cell, Sampling
from ksweep.config.sweep import Sweep
from ksweep.utils.errors import DataError, SpecError
from ksweep.utils.files import resolve
from ksweep.utils.fingerprint import fingerprint
from ksweep.utils.notes import Note

log = logging.getLogger(__name__)

SAMPLER_VERSION = 2
"""Raised whenever the same seed would give other texts: 2 decodes in slots, which rounds otherwise in bfloat16."""
SCORER_VERSION = 1
"""Raised whenever the same texts would give other errors."""
STATISTICS_VERSION = 2
"""Raised whenever the same errors would give other numbers: 2 measures the baseline between documents, and intervals go by the
effective number of documents. Draws are kept; only the statistics of a cell are computed anew."""


FIRST_SCORING_FIELDS = ("ks", "baseline", "failed_error", "level", "num_replicates", "seed")
"""Those that every cell key holds."""


@dataclass(frozen=True)
class Keys:
    """What names a cell's results, with the readable identities they were hashed from."""

    activations: str
    draws: str
    cell: str
    layer: int
    label: str
    """What tells the cell from the others of its sweep ("temperature=0.8"); of a cell by itself, what it is."""
    identity: dict[str, Any]
    notes: tuple[Note, ...] = ()
    """What the checks of checkpoints and activations say that refuse nothing."""
    title: str = ""
    """Where the cell stands alone: what the cells of its sweep share, and the label: "demo L20 temperature=0.8"."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", self.title or self.label)

    @property
    def name(self) -> str:
        """What a person reads in tables: the title, and enough of the key to be unique."""
        return f"{self.title} @{self.cell[:8]}"

    def called(self, label: str, title: str) -> Keys:
        """The same under the names that it has in a sweep."""
        return replace(self, label=label, title=title)


def cell_keys(cell: Cell) -> Keys:
    """Identify a cell.

    Raises:
        CheckpointError, DataError: something is missing, is not what it was given as, or does not belong together.
    """
    family = family_of(cell.autoencoder)
    cell = _completed(cell, family)
    layer = family.layer
    notes = (*family.notes, *family.check_activations(_facts(cell.activations)))
    activations, identity = activations_key(cell.activations, layer)
    draws = {
        "activations": activations,
        **family.identity(),
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
        "scoring": _scoring_identity(cell),
        "statistics_version": STATISTICS_VERSION,
    }
    identity = {"activations": identity, "draws": draws, "layer": layer}
    return Keys(activations, draws_key, fingerprint(whole), layer, label(cell, layer), identity, notes)


def _scoring_identity(cell: Cell) -> dict[str, Any]:
    """Fields of the scoring; later ones are left out where they are at their default, so that keys from before them hold."""
    defaults = {f.name: f.default for f in fields(cell.scoring)}
    scoring = asdict(cell.scoring).items()
    return {name: value for name, value in scoring if name in FIRST_SCORING_FIELDS or value != defaults[name]}


def one_document_error(cell: Cell, name: str) -> DataError:
    """What is said of a cell whose activations, all of one document, allow no baseline between documents."""
    return DataError(
        f"all {cell.activations.num_activations} activations of {name} are of one document, and the baseline compares those of "
        "different documents: evaluate more documents, state the baseline (scoring.baseline=0.7335), or measure it from the "
        "mean (scoring.baseline=distance_from_mean)"
    )


def complete(cell: Cell) -> Cell:
    """The cell with what its autoencoder decides filled in: the activations' model, the file that a directory of checkpoints
    stands for, and the length of explanations where it is fixed.

    Raises:
        SpecError: neither the request nor the autoencoder says which model the activations are from.
    """
    return _completed(cell, family_of(cell.autoencoder))


def _completed(cell: Cell, family: Family) -> Cell:
    activations, sampling = cell.activations, cell.sampling
    if activations.model is None and activations.vectors is None:
        if family.activations_model is None:
            raise SpecError("an NLA pair does not say which model its activations are from: set activations.model")
        activations = replace(activations, model=family.activations_model)
    if family.num_tokens is not None:
        sampling = replace(sampling, max_new_tokens=family.num_tokens)
    return replace(cell, autoencoder=family.located, activations=activations, sampling=sampling)


def complete_all(cells: Sequence[Cell]) -> list[Cell]:
    """`complete` for the cells of a sweep; says once where a length that was asked for is not the checkpoint's."""
    completed = [complete(cell) for cell in cells]
    pairs = zip(cells, completed, strict=True)
    replaced = {
        f"sampling.max_new_tokens={old.sampling.max_new_tokens} is replaced by {new.sampling.max_new_tokens}: every explanation "
        f"of {new.autoencoder.source} has the length that it was trained with (t_text)"
        for old, new in pairs
        if old.sampling.max_new_tokens not in (Sampling.max_new_tokens, new.sampling.max_new_tokens)
    }
    for text in sorted(replaced):
        log.warning(text)
    return completed


def _facts(given: Activations) -> ActivationFacts:
    """What the request, the base model's config.json, or the file of vectors and its sidecar say of the activations.

    Raises:
        SpecError, DataError: the request or the sidecar contradicts the file of vectors.
    """
    if given.vectors is None:
        directory = resolve(given.model or "", "base model")
        return ActivationFacts(
            source=given.model or "",
            model=given.model,
            model_directory=directory,
            layer=given.layer,
            d_model=text_config(directory)["hidden_size"],
        )
    vectors, (_, width) = given.vectors, vectors_shape(given.vectors)
    sidecar, layer = read_sidecar(vectors), vectors_layer(vectors)
    if sidecar is not None and sidecar.d_model not in (None, width):
        raise DataError(
            f"{vectors} holds vectors of {width} dimensions and its sidecar says {sidecar.d_model}: the two are of different "
            "files"
        )
    if layer is not None and given.layer not in (None, layer):
        whose = "the sidecar of " if sidecar is not None and sidecar.layer is not None else ""
        raise SpecError(f"activations.layer={given.layer}, but {whose}{vectors} says layer {layer}: leave it out")
    unknown = {"token": "the token that it was taken at"}  # no column of the public files is read as a token id
    if not vectors_say_positions(vectors):
        unknown["position"] = f"its position (column {POSITIONS})"
    return ActivationFacts(
        source=vectors,
        model=None if sidecar is None else sidecar.base_model,
        model_directory=None,
        layer=given.layer if layer is None else layer,
        d_model=width,
        unknown=unknown,
    )


def label(cell: Cell, layer: int) -> str:
    """What a cell is, in a few words; the same in every sweep it is part of."""
    return " ".join(_parts(cell, layer).values())


def _parts(cell: Cell, layer: int) -> dict[str, str]:
    """What a cell is, by the field of the spec that says so."""
    family = family_of(cell.autoencoder)
    parts = {
        family.source_field: family.short_name, "activations.layer": f"L{layer}",
        "sampling.temperature": f"T={cell.sampling.temperature:g}",
    }  # fmt: skip
    if cell.sampling.top_p < 1:
        parts["sampling.top_p"] = f"top_p={cell.sampling.top_p:g}"
    if cell.autoencoder.encoder_prompt != "learned":
        parts["autoencoder.encoder_prompt"] = f"encoder_prompt={cell.autoencoder.encoder_prompt}"
    return parts


def keys_of(sweep: Sweep, cells: Sequence[Cell]) -> list[Keys]:
    """`cell_keys` of a sweep's cells, completed, under the names that they have in it: what differs, behind what all share."""
    keys = [cell_keys(cell) for cell in cells]
    parts = [_parts(cell, key.layer) for cell, key in zip(cells, keys, strict=True)]
    shared = [text for name, text in parts[0].items() if all(other.get(name) == text for other in parts)]
    own = {text for name, text in parts[0].items() if name in sweep.axes}  # its label says so already
    before = [text for text in shared if text not in own]
    titles = (" ".join([*before, *([label_] if sweep.axes else [])]) for label_ in sweep.labels())
    return [key.called(label_, title) for key, label_, title in zip(keys, sweep.labels(), titles, strict=True)]
