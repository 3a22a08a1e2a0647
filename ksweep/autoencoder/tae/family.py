"""The family of talkative autoencoders: one file with a decoder (AV) and an encoder (AR)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ksweep.autoencoder.base import ActivationFacts, Family
from ksweep.autoencoder.nla.checkpoint import base_notes
from ksweep.autoencoder.tae.checkpoint import TaeInfo, digest_tae, inspect_tae, soft_prompt_sides
from ksweep.config.spec import Autoencoder
from ksweep.utils import hub
from ksweep.utils.errors import DataError, SpecError
from ksweep.utils.files import named_path
from ksweep.utils.notes import Note, notes_of
from ksweep.utils.safetensors_header import bytes_of_weights

if TYPE_CHECKING:
    from ksweep.autoencoder.base import Reconstructor, Verbalizer
    from ksweep.stats import ScoringKind


class TaeFile(Family):
    """A talkative-autoencoder file: decoder (AV) and encoder (AR) over one base model."""

    source_field = "autoencoder.checkpoint"
    scoring_kind: ScoringKind = "raw"  # the errors of the reference sweep
    texts_have_fixed_length = True
    has_reference_quantities = True

    @staticmethod
    def claims(spec: Autoencoder) -> bool:
        """Return whether the spec names a checkpoint."""
        return spec.checkpoint is not None

    @cached_property
    def info(self) -> TaeInfo:
        """The checked file; of a directory, the file with the highest step."""
        assert self.autoencoder.checkpoint is not None
        info = inspect_tae(self.autoencoder.checkpoint, base=self.autoencoder.base)
        if stated := (self.autoencoder.prompting.of_av | self.autoencoder.prompting.of_ar):
            raise SpecError(
                f"autoencoder.prompting.{next(iter(stated))} is for NLA pairs, and {info.path} is a talkative autoencoder, whose "
                "prompts are trained and in the file. Leave it out."
            )
        if option := self.autoencoder.without_effect("layout", "av_stack", "layer", "whitening"):
            raise SpecError(f"{option} is for NLA pairs, and {info.path} is a talkative autoencoder. Leave it out.")
        if self.autoencoder.encoder_prompt == "text":
            soft_prompt_sides(info)  # raises before a job is submitted
        return info

    @property
    def short_name(self) -> str:
        """The name of the file without its suffix."""
        source = self.autoencoder.checkpoint or ""
        path = Path(hub.without_revision(source))
        return path.stem.rstrip("_") if path.suffix else path.name

    @property
    def located(self) -> Autoencoder:
        """The spec with a directory replaced by its current file: training may write a later one before the job starts."""
        if named_path(self.autoencoder.checkpoint or "").is_dir():
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
        return {"checkpoint": digest_tae(self.info)}

    def scores_identity(self) -> dict[str, Any]:
        """Return the digest of file and base, and the encoder's prompt if it is not the trained one."""
        prompt = self.autoencoder.encoder_prompt  # keys from before this choice existed stay valid
        return {"checkpoint": digest_tae(self.info)} | ({} if prompt == "learned" else {"encoder_prompt": prompt})

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
        return () if facts.model is None else base_notes(facts.model, info.activations_model, str(info.path))

    def weight_bytes(self) -> int:
        """Return twice the size of the base: decoder and encoder may each have weights of their own."""
        return sum(self.half_bytes())

    def half_bytes(self) -> tuple[int, int]:
        """Return the sizes of the decoder and of the encoder."""
        encoder = self.autoencoder.reconstructor_dtype
        return bytes_of_weights(self.info.base, self.autoencoder.dtype), bytes_of_weights(self.info.base, encoder)

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
