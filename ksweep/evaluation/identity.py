"""Compute the keys of a cell: activations, draws, scores, cell; each from what changes its content, and from nothing else.

The launcher plans with these keys, so nothing heavy is imported and no model is loaded. Checkpoints are inspected on the way: a
wrong directory is refused before anything is submitted.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ksweep.activations.base_model import adapter_notes, check_model, locate_model
from ksweep.activations.caching import activations_key
from ksweep.activations.group_columns import check_group_columns
from ksweep.activations.model_config import text_config
from ksweep.activations.vector_source import (
    POSITION_COLUMN,
    read_vectors_sidecar,
    vectors_layer,
    vectors_say_positions,
    vectors_shape,
)
from ksweep.autoencoder.base import ActivationFacts, Family
from ksweep.autoencoder.family import family_of
from ksweep.config.spec import Activations, Cell, Sampling
from ksweep.config.sweep import Sweep, token_limit_text
from ksweep.evaluation.metrics import metric_keys
from ksweep.inference.backend import DEFAULT_ENGINE, engine_identity, planned_refusal
from ksweep.registry.scores import RECONSTRUCTION
from ksweep.utils.errors import DataError, SpecError
from ksweep.utils.fingerprint import fingerprint
from ksweep.utils.hub import noted_revisions
from ksweep.utils.notes import Note

log = logging.getLogger(__name__)

SAMPLER_VERSION = 2
"""Raised whenever the same seed would give other texts: 2 decodes in slots, which round differently in bfloat16."""
SCORER_VERSION = 1
"""Raised whenever the same texts would give other errors."""
STATISTICS_VERSION = 2
"""Raised whenever the same errors would give other numbers: 2 measures the baseline between documents, and intervals use the
effective number of documents. Draws are kept; only the statistics of a cell are computed again."""
ROUNDED = (
    "Activations are stored in {} and whitened then, which amplifies their rounding in directions of small variance: "
    "activations.dtype=float32 leaves it out."
)
FIRST_SCORING_FIELDS = ("ks", "baseline", "failed_error", "level", "num_replicates", "seed")
"""Fields that every cell key holds; those added later are left out at their defaults, so that earlier keys stay valid."""


@dataclass(frozen=True)
class CellKeys:
    """The keys and names of a cell, and the readable identities that the keys were hashed from."""

    activations: str
    """Key of the activations that are explained and compared."""
    draws: str
    """Key of what the AV said. It does not depend on the AR."""
    scores: str
    """Key of what the draws are worth to the AR; it does not depend on the draws."""
    combined: str
    """Key of draws and scores together, under which earlier versions stored both in one file. The cell key is hashed from it, so
    that finished runs of earlier versions stay finished."""
    cell: str
    layer: int
    label: str
    """What differs from the other cells of its sweep ("temperature=0.8"); outside a sweep, a short description of the cell."""
    identity: dict[str, Any]
    notes: tuple[Note, ...] = ()
    """Notes from the checks of checkpoints and activations."""
    revisions: tuple[str, ...] = ()
    """What comes from the model hub, with its commit: "owner/name@commit/folder"."""
    title: str = ""
    """Name of a cell that is shown alone: what the cells of its sweep share, then the label: "demo L20 temperature=0.8"."""

    stored_activations: str = ""
    """Key under which they are in the activation store: that of the vectors before a transform."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", self.title or self.label)
        object.__setattr__(self, "stored_activations", self.stored_activations or self.activations)

    @property
    def name(self) -> str:
        """The title and the first eight digits of the key: unique, for tables and messages."""
        return f"{self.title} @{self.cell[:8]}"

    def with_names(self, label: str, title: str) -> CellKeys:
        """Return the same keys under the cell's names within a sweep."""
        return replace(self, label=label, title=title)


def cell_keys(cell: Cell) -> CellKeys:
    """Compute the keys of a cell from its spec and from the files that it names.

    Raises:
        CheckpointError, DataError: a file is missing, is of another kind than stated, or does not fit the others.
    """
    with noted_revisions() as revisions:
        keys = _keys_of_content(cell)
    return replace(keys, revisions=tuple(sorted(revisions)))


def _keys_of_content(cell: Cell) -> CellKeys:
    """Return the keys of a cell, whose computation digests every file that it names."""
    # 1. Inspect the checkpoints, and check that the activations fit them.
    family = family_of(cell.autoencoder)
    family.check_scoring(cell.scoring)
    cell = _resolve(cell, family)
    _check_engine(cell, family)
    facts = _activation_facts(cell.activations)
    layer = _layer(family, facts)
    notes = (*family.notes, *family.check_activations(facts))
    check_group_columns(cell.activations, columns_of_activations(cell, family))
    # 2. Hash what changes the activations, the draws, the numbers.
    stored_activations, activations_identity = activations_key(cell.activations, layer)
    activations = stored_activations
    if cell.activations.vectors is None:
        model = locate_model(cell.activations)
        notes += (*adapter_notes(model), *check_model(model, layer))
    if family.space is not None:
        if cell.activations.vectors is None and cell.activations.dtype != "float32":
            notes = (*notes, Note("activations", ROUNDED.format(cell.activations.dtype)))
        activations = fingerprint({"activations": stored_activations, "space": family.space})
        activations_identity = activations_identity | {"space": family.space}
    draws: dict[str, Any] = {
        "activations": activations,
        **family.draws_identity(),
        **({} if family.draws_are_given else _sampling_identity(cell)),
    }
    scores = scores_identity(cell, family)
    combined = {"dtype": cell.autoencoder.dtype} | draws | family.scores_identity() | {"scorer_version": SCORER_VERSION}
    if cell.autoencoder.reconstructor_dtype != cell.autoencoder.dtype:  # keys from before this choice existed stay valid
        combined |= {"ar_dtype": cell.autoencoder.reconstructor_dtype}
    combined_key = fingerprint(combined)
    numbers = {
        "draws": combined_key,
        "num_activations": cell.activations.num_activations,
        "num_draws": cell.sampling.effective_num_draws,
        "scoring": _scoring_identity(cell, family),
        "statistics_version": STATISTICS_VERSION,
    }
    return CellKeys(
        activations=activations, stored_activations=stored_activations, draws=fingerprint(draws),
        scores=RECONSTRUCTION.key(scores), combined=combined_key, cell=fingerprint(numbers), layer=layer, label=cell_label(cell,
        layer), notes=notes, identity={"activations": activations_identity, "draws": draws, "scores": scores, "layer": layer},
    )  # fmt: skip


def scores_identity(cell: Cell, family: Family) -> dict[str, Any]:
    """Return what changes the scores of draws: the readable identity that their key is hashed from."""
    return {
        **family.scores_identity(),
        "dtype": cell.autoencoder.reconstructor_dtype,
        "scorer_version": SCORER_VERSION,
    }


def _sampling_identity(cell: Cell) -> dict[str, Any]:
    """Return what changes the draws that an AV is asked for."""
    sampling = cell.sampling
    identity = {
        "dtype": cell.autoencoder.dtype,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p if sampling.temperature > 0 else None,
        "max_new_tokens": sampling.max_new_tokens,
        "seed": sampling.seed if sampling.temperature > 0 else None,
        "sampler_version": SAMPLER_VERSION,
    }
    engine = engine_identity(sampling.engine)
    return identity | ({"engine": engine} if engine else {})


def _check_engine(cell: Cell, family: Family) -> None:
    """Check that the engine draws such texts from the AV, as far as it can say before the AV is loaded.

    Raises:
        SpecError: it does not.
    """
    sampling = cell.sampling
    if family.draws_are_given:
        return
    if reason := planned_refusal(sampling.engine, family.planned_av(), temperature=sampling.temperature):
        raise SpecError(
            f"sampling.engine={sampling.engine} does not draw these texts from {family.autoencoder.source}: {reason}. Leave "
            "sampling.engine out: the built-in engine draws them."
        )


def _layer(family: Family, facts: ActivationFacts) -> int:
    """Return the layer of the autoencoder or, where that may be used on any, of the activations."""
    layer = facts.layer if family.layer is None else family.layer
    if layer is None:
        raise SpecError(
            f"neither {family.autoencoder.source} nor {facts.source} says which layer it is for: set activations.layer"
        )
    return layer


def _scoring_identity(cell: Cell, family: Family) -> dict[str, Any]:
    """Return the scoring's fields, without those beyond FIRST_SCORING_FIELDS that have their default.

    The key of the activations covers groups that stand beside them; those in a file of given texts are covered here.
    """
    defaults = {f.name: f.default for f in fields(cell.scoring)}
    values = asdict(cell.scoring)
    if cell.scoring.metrics:
        values["metrics"] = metric_keys(cell.scoring.metrics)
    identity = {name: value for name, value in values.items() if name in FIRST_SCORING_FIELDS or value != defaults[name]}
    if in_texts := [column for column in cell.scoring.groups if column not in columns_of_activations(cell, family)]:
        identity["groups_digest"] = fingerprint({column: family.given_texts.digest_of_groups(column) for column in in_texts})
    return identity


def one_document_error(cell: Cell, name: str) -> DataError:
    """Return the error for a cell that asks for a baseline between documents and has activations of one document only."""
    return DataError(
        f"all {cell.activations.num_activations} activations of {name} are of one document, and the baseline compares those of "
        "different documents: evaluate more documents, state the baseline (scoring.baseline=0.7335), or measure it from the "
        "mean (scoring.baseline=distance_from_mean)"
    )


def resolve_cell(cell: Cell) -> Cell:
    """Return the cell with everything filled in that its autoencoder decides.

    That is the activations' model, the file that a directory of checkpoints stands for, and the length of explanations where it
    is fixed.

    Raises:
        SpecError: neither the request nor the autoencoder says which model the activations are from.
    """
    return _resolve(cell, family_of(cell.autoencoder))


def _resolve(cell: Cell, family: Family) -> Cell:
    activations = cell.activations
    if activations.model is None and activations.vectors is None:
        if family.activations_model is None:
            raise SpecError(f"{cell.autoencoder.source} does not say which model its activations are from: set activations.model")
        activations = replace(activations, model=family.activations_model)
    sampling = family.resolve_sampling(cell.sampling)
    return replace(cell, autoencoder=family.located, activations=activations, sampling=sampling)


def resolve_cells(cells: Sequence[Cell]) -> list[Cell]:
    """Resolve the cells of a sweep; a stated max_new_tokens that the checkpoint overrides is logged once."""
    resolved = [resolve_cell(cell) for cell in cells]
    warnings = {
        f"sampling.max_new_tokens={old.sampling.max_new_tokens} is replaced by {new.sampling.max_new_tokens}: every explanation "
        f"of {new.autoencoder.source} has the length that it was trained with (t_text)"
        for old, new in zip(cells, resolved, strict=True)
        if old.sampling.max_new_tokens not in (Sampling.max_new_tokens, new.sampling.max_new_tokens)
    }
    for text in sorted(warnings):
        log.warning(text)
    return resolved


def columns_of_activations(cell: Cell, family: Family) -> list[str]:
    """Return the columns of `scoring.groups` that are looked up beside the activations; those of given texts come first."""
    in_texts = family.given_texts.columns if family.draws_are_given and cell.scoring.groups else ()
    return [column for column in cell.scoring.groups if column not in in_texts]


def _activation_facts(activations: Activations) -> ActivationFacts:
    """Collect what the spec, the base model's config.json, or the file of vectors and its sidecar say about the activations.

    Raises:
        SpecError, DataError: the spec or the sidecar contradicts the file of vectors.
    """
    if activations.vectors is None:
        model = locate_model(activations)
        return ActivationFacts(
            source=activations.model or "",
            model=activations.model if model.base is None else model.base,
            model_directory=model.weights,
            layer=activations.layer,
            d_model=text_config(model.weights)["hidden_size"],
        )
    vectors, column = activations.vectors, activations.vector_column
    _, width = vectors_shape(vectors, column)
    sidecar, layer = read_vectors_sidecar(vectors), vectors_layer(vectors, column)
    if sidecar is not None and sidecar.d_model not in (None, width):
        raise DataError(
            f"{vectors} holds vectors of {width} dimensions and its sidecar says {sidecar.d_model}: the two are of different "
            "files"
        )
    if layer is not None and activations.layer not in (None, layer):
        whose = "the sidecar of " if sidecar is not None and sidecar.layer is not None else ""
        raise SpecError(f"activations.layer={activations.layer}, but {whose}{vectors} says layer {layer}: leave it out")
    unknown = {"token": "the token that it was taken at"}  # no column of the public files is read as a token id
    if not vectors_say_positions(vectors, column):
        unknown["position"] = f"its position (column {POSITION_COLUMN})"
    return ActivationFacts(
        source=vectors,
        model=None if sidecar is None else sidecar.base_model,
        model_directory=None,
        layer=activations.layer if layer is None else layer,
        d_model=width,
        unknown=unknown,
    )


def cell_label(cell: Cell, layer: int) -> str:
    """Describe a cell in a few words, which are the same in every sweep."""
    return " ".join(_label_parts(cell, layer).values())


def _label_parts(cell: Cell, layer: int) -> dict[str, str]:
    """Return the words of a label by the field of the spec that they come from."""
    family = family_of(cell.autoencoder)
    parts = {
        family.source_field: family.short_name, "activations.layer": f"L{layer}",
    }  # fmt: skip
    if family.draws_are_given:
        if (limit := cell.autoencoder.max_text_tokens) is not None:
            parts["autoencoder.max_text_tokens"] = token_limit_text(limit, cell.autoencoder.kept_tokens)
    else:
        parts["sampling.temperature"] = f"T={cell.sampling.temperature:g}"
    if cell.sampling.top_p < 1:
        parts["sampling.top_p"] = f"top_p={cell.sampling.top_p:g}"
    if cell.sampling.engine != DEFAULT_ENGINE:
        parts["sampling.engine"] = f"engine={cell.sampling.engine.rpartition(':')[2]}"
    if cell.autoencoder.encoder_prompt != "learned":
        parts["autoencoder.encoder_prompt"] = f"encoder_prompt={cell.autoencoder.encoder_prompt}"
    return parts


def sweep_keys(sweep: Sweep, cells: Sequence[Cell]) -> list[CellKeys]:
    """Compute the keys of a sweep's resolved cells, with their names within the sweep: what all share, then what differs."""
    keys = [cell_keys(cell) for cell in cells]
    parts = [_label_parts(cell, key.layer) for cell, key in zip(cells, keys, strict=True)]
    shared = [text for name, text in parts[0].items() if all(other.get(name) == text for other in parts)]
    in_labels = {text for name, text in parts[0].items() if name in sweep.axes}
    prefix = [text for text in shared if text not in in_labels]
    titles = (" ".join([*prefix, *([label] if sweep.axes else [])]) for label in sweep.labels())
    return [key.with_names(label, title) for key, label, title in zip(keys, sweep.labels(), titles, strict=True)]
