"""Checkpoint families: what the other rooms ask of an autoencoder without knowing whether it is an NLA pair or a TAE file.

    family = family_of(cell.autoencoder)
    family.layer, family.draws_identity()                    # planning: no weights are read, torch is not imported for a pair
    av = family.load_verbalizer(("cuda",))
    ar = family.load_reconstructor(("cuda",), av)

A new family is one class here and one line in `family_of`. Files are inspected once, by the first question that needs them, so
any method or property may raise the CheckpointError of a file that is missing, damaged or of another kind.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ksweep.autoencoder.nla import checkpoint as nla
from ksweep.autoencoder.norms import training_norm
from ksweep.autoencoder.safetensors_header import model_tensors
from ksweep.autoencoder.tae import checkpoint as tae
from ksweep.config.spec import Autoencoder
from ksweep.utils.bos_token import text_gets_second_bos
from ksweep.utils.errors import DataError, SpecError
from ksweep.utils.hub import HUB_ID, resolve
from ksweep.utils.notes import Note, notes_of

if TYPE_CHECKING:
    from ksweep.autoencoder.base import Reconstructor, Verbalizer


@dataclass(frozen=True, kw_only=True)
class ActivationFacts:
    """Properties of a cell's activations that are known before any is computed."""

    source: str
    """Base model, or file of ready-made vectors."""
    model: str | None
    """Path or hub id of the model that they come from; None if the file of vectors does not state it."""
    model_directory: Path | None
    """Directory of that model; None for ready-made vectors."""
    layer: int | None
    """Layer of the activations; None if neither the request nor the file of vectors states it."""
    d_model: int
    unknown: Mapping[str, str] = field(default_factory=dict)
    """Descriptions of what is unknown of each activation, under "token" and "position"."""


class Family(ABC):
    """An autoencoder whose checkpoints are read in the way of their family."""

    source_field: ClassVar[str]
    """Spec field that identifies the autoencoder in labels."""
    texts_have_fixed_length: ClassVar[bool]
    """Whether every explanation has the number of tokens of training, so that none is cut off."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        """Keep the spec; files are read when they are first needed."""
        self.autoencoder = autoencoder

    @property
    @abstractmethod
    def short_name(self) -> str:
        """Short name for labels."""

    @property
    def located(self) -> Autoencoder:
        """The spec, with a directory of several checkpoints replaced by the file to load."""
        return self.autoencoder

    @property
    def activations_model(self) -> str | None:
        """Path or hub id of the model whose activations it was trained on; None if the checkpoint does not state it."""
        return None

    @property
    def num_tokens(self) -> int | None:
        """Number of tokens in every explanation; None if texts end with a stop token."""
        return None

    @property
    @abstractmethod
    def layer(self) -> int:
        """Index of the block whose output it was trained on, 0-based."""

    @property
    @abstractmethod
    def notes(self) -> tuple[Note, ...]:
        """Notes on accepted but unusual properties of its files."""

    @abstractmethod
    def draws_identity(self) -> dict[str, Any]:
        """Return what its AV adds to the identity of draws: a digest, and how texts are parsed where there is a choice."""

    @abstractmethod
    def scores_identity(self) -> dict[str, Any]:
        """Return what its AR adds to the identity of scores: a digest, and how texts are read where there is a choice."""

    @abstractmethod
    def check_activations(self, facts: ActivationFacts) -> tuple[Note, ...]:
        """Check that it can be used on activations, and return notes on accepted differences from its training.

        Raises:
            DataError: they are of another layer, width or architecture than it was trained on, or lack something it needs.
        """

    @abstractmethod
    def training_norm(self) -> float | None:
        """Return the median norm of the activations that it was trained on; None if its files do not state it."""

    @abstractmethod
    def weight_bytes(self) -> int:
        """Return an upper bound of the memory of AV and AR in a process that has loaded both."""

    @abstractmethod
    def reconstruction_bytes(self) -> int:
        """Return the bytes of each reconstruction that is stored with its draw; 0 if none is stored."""

    @abstractmethod
    def load_verbalizer(self, devices: Sequence[str]) -> Verbalizer:
        """Load the AV, spread over torch devices."""

    @abstractmethod
    def load_reconstructor(self, devices: Sequence[str], verbalizer: Verbalizer | None = None) -> Reconstructor:
        """Load the AR; it shares the weights of `verbalizer`, the loaded AV, if both use the same model."""


def family_of(autoencoder: Autoencoder) -> Family:
    """Return the autoencoder as an object of its family."""
    return NlaPair(autoencoder) if autoencoder.checkpoint is None else TaeFile(autoencoder)


class NlaPair(Family):
    """A pair of directories in the public NLA layout: an AV and an AR."""

    source_field = "autoencoder.av"
    texts_have_fixed_length = False

    @cached_property
    def pair(self) -> tuple[nla.CheckpointInfo, nla.CheckpointInfo]:
        """AV and AR, each checked alone and against the other."""
        spec = self.autoencoder
        av = nla.inspect_nla(resolve(spec.av or "", "AV checkpoint"), "av", spec.base, spec.prompting)
        ar = nla.inspect_nla(resolve(spec.ar or "", "AR checkpoint"), "ar", spec.base, spec.prompting)
        nla.check_pair(av, ar)
        return av, ar

    @property
    def short_name(self) -> str:
        """The hub name without -av, or the name of the directory that holds av/."""
        source = self.autoencoder.source
        path = Path(source.partition("@")[0] if _is_hub_id(source) else source)
        if path.name.lower() in ("av", "nla-av", "actor"):
            return path.resolve().parent.name if path.exists() else path.parent.name
        return re.sub(r"^nla-|[-_]av$", "", path.name, flags=re.IGNORECASE) or path.name

    @property
    def layer(self) -> int:
        """Layer of the AR, from its sidecar or else its depth; the AV's sidecar states the same layer or none."""
        layer = self.pair[1].layer
        assert layer is not None, "an AR without a layer was refused"
        return layer

    @property
    def notes(self) -> tuple[Note, ...]:
        """Notes on sidecars and prompts."""
        return notes_of(*self.pair)

    def draws_identity(self) -> dict[str, Any]:
        """Return the AV's digest, and where they are not the usual ones the parser of explanations and the prompting."""
        av, _ = self.pair
        overrides = self.autoencoder.prompting.of_av
        # An AV that thinks gets its thoughts before the answer skipped.
        parser = {"parser": "after_thoughts"} if av.thinks else {}
        return {"av": nla.digest_nla(av)} | parser | ({"av_prompting": overrides} if overrides else {})

    def scores_identity(self) -> dict[str, Any]:
        """Return the AR's digest, and where they are not the usual ones the BOS rule and the prompting."""
        _, ar = self.pair
        overrides = self.autoencoder.prompting.of_ar
        bos = {"ar_bos": "once"} if text_gets_second_bos(ar.ar_prompting.template, ar.tokenizer) else {}
        return {"ar": nla.digest_nla(ar)} | bos | ({"ar_prompting": overrides} if overrides else {})

    def check_activations(self, facts: ActivationFacts) -> tuple[Note, ...]:
        """Check layer, width and base model; a fine-tune of the base is noted."""
        av, ar = self.pair
        width = facts.d_model if facts.model_directory is None else None  # a model's is compared with its architecture
        notes = nla.check_pair(av, ar, activations_layer=facts.layer, activations_d_model=width, activations_base=facts.model)
        if facts.model_directory is not None and notes:
            nla.check_same_architecture(av, facts.model_directory, facts.source)
        return notes

    def training_norm(self) -> float | None:
        """Return the norm from a sidecar, or from the training report beside the pair."""
        return training_norm(*self.pair)

    def weight_bytes(self) -> int:
        """Return the size of all weights of both; an AR adapter's base counts whole, although its upper blocks are not loaded."""
        dtypes = (self.autoencoder.dtype, self.autoencoder.reconstructor_dtype)
        return sum(_weight_bytes(info.weights, dtype) for info, dtype in zip(self.pair, dtypes, strict=True))

    def reconstruction_bytes(self) -> int:
        """Return 0: a pair is scored by direction alone, and no reconstruction is stored."""
        return 0

    def load_verbalizer(self, devices: Sequence[str]) -> Verbalizer:
        """Load the AV of the pair."""
        from ksweep.autoencoder.nla.models import load_nla_verbalizer

        return load_nla_verbalizer(self.pair[0], dtype=self.autoencoder.dtype, device=devices)

    def load_reconstructor(self, devices: Sequence[str], verbalizer: Verbalizer | None = None) -> Reconstructor:
        """Load the AR of the pair; it shares no weights with the AV."""
        from ksweep.autoencoder.nla.models import load_nla_reconstructor

        return load_nla_reconstructor(self.pair[1], dtype=self.autoencoder.reconstructor_dtype, device=devices)


class TaeFile(Family):
    """A talkative-autoencoder file: decoder (AV) and encoder (AR) over one base model."""

    source_field = "autoencoder.checkpoint"
    texts_have_fixed_length = True

    @cached_property
    def info(self) -> tae.TaeInfo:
        """The checked file; of a directory, the file with the highest step."""
        assert self.autoencoder.checkpoint is not None
        info = tae.inspect_tae(self.autoencoder.checkpoint, base=self.autoencoder.base)
        if stated := (self.autoencoder.prompting.of_av | self.autoencoder.prompting.of_ar):
            raise SpecError(
                f"autoencoder.prompting.{next(iter(stated))} is for NLA pairs, and {info.path} is a talkative autoencoder, whose "
                "prompts are trained and in the file. Leave it out."
            )
        if self.autoencoder.encoder_prompt == "text":
            tae.soft_prompt_sides(info)  # raises before a job is submitted
        return info

    @property
    def short_name(self) -> str:
        """The name of the file without its suffix."""
        source = self.autoencoder.source
        path = Path(source.partition("@")[0] if _is_hub_id(source) else source)
        return path.stem.rstrip("_") if path.suffix else path.name

    @property
    def located(self) -> Autoencoder:
        """The spec with a directory replaced by its current file: training may write a later one before the job starts."""
        if Path(self.autoencoder.source).expanduser().is_dir():
            return replace(self.autoencoder, checkpoint=str(self.info.path))
        return self.autoencoder

    @property
    def activations_model(self) -> str | None:
        """orig_model_name of its configuration."""
        return self.info.activations_model

    @property
    def num_tokens(self) -> int | None:
        """t_text of its configuration."""
        return self.info.num_tokens

    @property
    def layer(self) -> int:
        """layer_l of its configuration."""
        return self.info.layer

    @property
    def notes(self) -> tuple[Note, ...]:
        """Notes on options and base weights that the file lacks."""
        return notes_of(self.info)

    def draws_identity(self) -> dict[str, Any]:
        """Return the digest of file and base."""
        return {"checkpoint": tae.digest_tae(self.info)}

    def scores_identity(self) -> dict[str, Any]:
        """Return the digest of file and base, and the encoder's prompt if it is not the trained one."""
        prompt = self.autoencoder.encoder_prompt  # keys from before this choice existed stay valid
        return self.draws_identity() | ({} if prompt == "learned" else {"encoder_prompt": prompt})

    def check_activations(self, facts: ActivationFacts) -> tuple[Note, ...]:
        """Check layer and width, and that tokens and positions are known if decoder or encoder were trained with them."""
        info = self.info
        if facts.d_model != info.d_model:
            layer = "" if facts.layer is None else f", layer {facts.layer}"
            raise DataError(
                f"{facts.source} gives activations of width {facts.d_model}{layer}, but {info.path} was trained on width "
                f"{info.d_model}, layer {info.layer}: give it those of its own model ({info.activations_model})"
            )
        if facts.layer not in (None, info.layer):
            is_text = facts.model_directory is not None  # only the request can have named the layer
            remedy = "leave activations.layer out" if is_text else f"give it vectors of layer {info.layer}"
            raise DataError(
                f"the activations of {facts.source} are of layer {facts.layer}, but {info.path} was trained on layer "
                f"{info.layer}: {remedy}"
            )
        needs = {
            "token": info.encoder.adds_current_token,
            "position": info.decoder.subtracts_position or info.encoder.adds_position,
        }
        if missing := [description for name, description in facts.unknown.items() if needs[name]]:
            raise DataError(
                f"{info.path} needs for every activation {' and '.join(missing)}, which {facts.source} does not state. Extract "
                "the activations from text (activations.text), or use a checkpoint that was trained without them."
            )
        return () if facts.model is None else nla.base_notes(facts.model, info.activations_model, str(info.path))

    def training_norm(self) -> float | None:
        """Return None: such files do not state it."""
        return None

    def weight_bytes(self) -> int:
        """Return twice the size of the base: decoder and encoder may each have weights of their own."""
        dtypes = (self.autoencoder.dtype, self.autoencoder.reconstructor_dtype)
        return sum(_weight_bytes(self.info.base, dtype) for dtype in dtypes)

    def reconstruction_bytes(self) -> int:
        """Return the size of a float32 vector: the reference system's metrics need the reconstructions themselves."""
        return 4 * self.info.d_model

    def load_verbalizer(self, devices: Sequence[str]) -> Verbalizer:
        """Load the decoder."""
        from ksweep.autoencoder.tae.models import load_tae_verbalizer

        return load_tae_verbalizer(self.info, dtype=self.autoencoder.dtype, device=devices)

    def load_reconstructor(self, devices: Sequence[str], verbalizer: Verbalizer | None = None) -> Reconstructor:
        """Load the encoder; it shares the decoder's model if neither has base weights of its own."""
        from ksweep.autoencoder.tae.decoder import TaeVerbalizer
        from ksweep.autoencoder.tae.models import load_tae_reconstructor

        spec = self.autoencoder
        same_dtype = spec.reconstructor_dtype == spec.dtype
        return load_tae_reconstructor(
            self.info,
            dtype=spec.reconstructor_dtype,
            device=devices,
            sharing=verbalizer if isinstance(verbalizer, TaeVerbalizer) and same_dtype else None,
            encoder_prompt=spec.encoder_prompt,
        )


def _is_hub_id(source: str) -> bool:
    return HUB_ID.match(source) is not None and not Path(source).exists()


def _weight_bytes(model: Path, dtype: str) -> int:
    num_weights = sum(math.prod(tensor.shape) for tensor in model_tensors(model).values())
    return (4 if dtype == "float32" else 2) * num_weights
