"""The three keys of a cell: activations, draws, cell; each from what changes its content, and from nothing else.

Nothing heavy is imported and no model is loaded: the launcher plans with these. Checkpoints are inspected on the way, so a
wrong directory is refused before anything is submitted.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ksweep.activations.caching import activations_key
from ksweep.activations.model_config import text_config
from ksweep.activations.vector_source import POSITIONS, read_sidecar, vectors_layer, vectors_say_positions, vectors_shape
from ksweep.autoencoder.nla.checkpoint import CheckpointInfo, base_notes, check_pair, check_same_architecture, digest, inspect
from ksweep.config.spec import Autoencoder, Cell, Sampling
from ksweep.config.sweep import Sweep
from ksweep.utils.bos_token import text_gets_second_bos
from ksweep.utils.errors import DataError, SpecError
from ksweep.utils.files import HUB_ID, resolve
from ksweep.utils.fingerprint import fingerprint
from ksweep.utils.notes import Note, notes_of

if TYPE_CHECKING:
    from ksweep.autoencoder.tae.checkpoint import TaeInfo

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
    cell = complete(cell)
    layer, digests, notes = _layer_and_digests(cell)
    activations, identity = activations_key(cell.activations, layer)
    draws = {
        "activations": activations,
        **digests,
        "dtype": cell.autoencoder.dtype,
        "temperature": cell.sampling.temperature,
        "top_p": cell.sampling.top_p if cell.sampling.temperature > 0 else None,
        "max_new_tokens": cell.sampling.max_new_tokens,
        "seed": cell.sampling.seed if cell.sampling.temperature > 0 else None,
        "sampler_version": SAMPLER_VERSION,
        "scorer_version": SCORER_VERSION,
    }
    if cell.autoencoder.encoder_prompt != "learned":  # so that keys from before there was a choice hold
        draws["encoder_prompt"] = cell.autoencoder.encoder_prompt
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
    """The cell with what its checkpoint decides put in: a talkative autoencoder names the activations' model, and fixes how
    long explanations are. A directory becomes the file that it stands for now: a training run may write a later one before the
    job starts. Everything else is as it was."""
    if cell.autoencoder.checkpoint is None:
        if cell.activations.model is None and cell.activations.vectors is None:
            raise SpecError("an NLA pair does not say which model its activations are from: set activations.model")
        return cell
    info = inspect_file(cell.autoencoder)
    autoencoder, activations = cell.autoencoder, cell.activations
    if Path(cell.autoencoder.checkpoint).expanduser().is_dir():
        autoencoder = replace(autoencoder, checkpoint=str(info.path))
    if activations.model is None and activations.vectors is None:
        activations = replace(activations, model=info.activations_model)
    sampling = replace(cell.sampling, max_new_tokens=info.num_tokens)
    return replace(cell, autoencoder=autoencoder, activations=activations, sampling=sampling)


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


def inspect_file(autoencoder: Autoencoder) -> TaeInfo:
    """The checked talkative-autoencoder file."""
    from ksweep.autoencoder.tae.checkpoint import inspect_tae, soft_prompt_sides

    assert autoencoder.checkpoint is not None
    info = inspect_tae(autoencoder.checkpoint, base=autoencoder.base)
    if autoencoder.encoder_prompt == "text":
        soft_prompt_sides(info)  # refused before anything is submitted
    return info


def _layer_and_digests(cell: Cell) -> tuple[int, dict[str, str], tuple[Note, ...]]:
    """The layer that the vectors are of, what stands for AV and AR in the identity of draws, and what was noted of them."""
    if cell.autoencoder.checkpoint is None:
        av, ar = inspect_pair(cell.autoencoder)
        notes = (*notes_of(av, ar), *_check_activations(cell, av, ar))
        return _layer(cell, av.layer, ar.layer), {"av": digest(av), "ar": digest(ar), **_reading(av, ar)}, notes
    from ksweep.autoencoder.tae.checkpoint import digest_tae

    info = inspect_file(cell.autoencoder)
    if cell.activations.layer not in (None, info.layer):
        raise DataError(
            f"the activations are of layer {cell.activations.layer}, but {info.path} was trained on layer {info.layer}: leave "
            "activations.layer out"
        )
    _check_width(cell, info)
    if cell.activations.vectors is not None:
        _check_vectors_suffice(cell.activations.vectors, info)
    vectors = None if cell.activations.vectors is None else read_sidecar(cell.activations.vectors)
    source = cell.activations.model if vectors is None else vectors.base_model
    notes = () if source is None else base_notes(source, info.activations_model, str(info.path))
    return info.layer, {"checkpoint": digest_tae(info)}, (*notes_of(info), *notes)


def _reading(av: CheckpointInfo, ar: CheckpointInfo) -> dict[str, str]:
    """What the same checkpoints are read by otherwise than before; nothing for most, so that their keys hold."""
    reading = {}
    if av.thinks:  # thoughts before the answer are passed over
        reading["parser"] = "after_thoughts"
    if text_gets_second_bos(ar.sidecar.ar_template or "", ar.tokenizer):
        reading["ar_bos"] = "once"
    return reading


def _check_width(cell: Cell, info: TaeInfo) -> None:
    """That the activations are of the width and layer that the checkpoint was trained on, as far as anyone says."""
    given = cell.activations
    layer = None if given.vectors is None else vectors_layer(given.vectors)
    if given.vectors is not None:
        width = _width_of_vectors(given.vectors)
    else:
        width = text_config(resolve(given.model or "", "base model"))["hidden_size"]
    if width != info.d_model or layer not in (None, info.layer):
        raise DataError(
            f"{given.vectors or given.model} gives activations of width {width}{'' if layer is None else f', layer {layer}'}, "
            f"but {info.path} was trained on width {info.d_model}, layer {info.layer}: give it those of its own model "
            f"({info.activations_model})"
        )


def _width_of_vectors(vectors: str) -> int:
    """Raises DataError: the sidecar says another width than the file has."""
    (_, width), said = vectors_shape(vectors), read_sidecar(vectors)
    if said is not None and said.d_model not in (None, width):
        raise DataError(
            f"{vectors} holds vectors of {width} dimensions and its sidecar says {said.d_model}: the two are of different files"
        )
    return width


def _check_vectors_suffice(vectors: str, info: TaeInfo) -> None:
    """That ready-made vectors say of each activation what decoder and encoder were trained with."""
    lacking = []
    if info.encoder.adds_current_token:  # no column of the public files is read as a token id
        lacking.append("the token that it was taken at")
    if (info.decoder.subtracts_position or info.encoder.adds_position) and not vectors_say_positions(vectors):
        lacking.append(f"its position (column {POSITIONS})")
    if lacking:
        raise DataError(
            f"{info.path} needs of every activation {' and '.join(lacking)}, which {vectors} does not say: extract the "
            "activations from text (activations.text), or use a checkpoint that was trained without"
        )


def _check_activations(cell: Cell, av: CheckpointInfo, ar: CheckpointInfo) -> tuple[Note, ...]:
    """That the vectors are of the layer, width and model that the pair was trained on, as far as anyone says."""
    given = cell.activations
    if given.vectors is None:
        notes = check_pair(av, ar, activations_layer=given.layer, activations_base=given.model)
        if given.model and not Path(given.model).expanduser().exists() and notes:  # another hub id than the base's
            check_same_architecture(av, resolve(given.model, "base model"), given.model)
        return notes
    width = _width_of_vectors(given.vectors)
    said, layer = read_sidecar(given.vectors), vectors_layer(given.vectors)
    if layer is not None and given.layer not in (None, layer):
        whose = "the sidecar of " if said is not None and said.layer is not None else ""
        raise SpecError(f"activations.layer={given.layer}, but {whose}{given.vectors} says layer {layer}: leave it out")
    layer, base = given.layer if layer is None else layer, None if said is None else said.base_model
    return check_pair(av, ar, activations_layer=layer, activations_d_model=width, activations_base=base)


def inspect_pair(autoencoder: Autoencoder) -> tuple[CheckpointInfo, CheckpointInfo]:
    """AV and AR, each checked by itself and against the other."""
    av = inspect(resolve(autoencoder.av or "", "AV checkpoint"), "av", base=autoencoder.base)
    ar = inspect(resolve(autoencoder.ar or "", "AR checkpoint"), "ar", base=autoencoder.base)
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
    return " ".join(_parts(cell, layer).values())


def _parts(cell: Cell, layer: int) -> dict[str, str]:
    """What a cell is, by the field of the spec that says so."""
    source = "autoencoder.checkpoint" if cell.autoencoder.checkpoint else "autoencoder.av"
    parts = {
        source: pair_name(cell.autoencoder), "activations.layer": f"L{layer}",
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


def pair_name(autoencoder: Autoencoder) -> str:
    """A short name of a pair: the hub name without -av, or the directory that holds av/."""
    source = autoencoder.source
    is_hub_id = HUB_ID.match(source) is not None and not Path(source).exists()
    path = Path(source.partition("@")[0] if is_hub_id else source)
    if autoencoder.checkpoint is not None:
        return path.stem.rstrip("_") if path.suffix else path.name
    if path.name.lower() in ("av", "nla-av", "actor"):
        return path.resolve().parent.name if path.exists() else path.parent.name
    return re.sub(r"^nla-|[-_]av$", "", path.name, flags=re.IGNORECASE) or path.name
