"""The family of NLA pairs: two directories, an AV and an AR, in the layout of any of their trainers."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ksweep.autoencoder.base import ActivationFacts, Family
from ksweep.autoencoder.nla.checkpoint import (
    CheckpointInfo,
    check_pair,
    check_same_architecture,
    digest_nla,
    inspect_half,
)
from ksweep.autoencoder.nla.layout import told_depth
from ksweep.autoencoder.prompting import DEPTH_FIELD, AddAfterBlock
from ksweep.config.spec import Autoencoder, PromptingOverrides
from ksweep.inference.prompts import PlannedAv
from ksweep.utils import files, hub
from ksweep.utils.bos_token import text_gets_second_bos
from ksweep.utils.chat_template import chat_template_text, has_several_templates
from ksweep.utils.errors import RequestError
from ksweep.utils.notes import Note, notes_of
from ksweep.utils.safetensors_header import bytes_of_weights
from ksweep.utils.template_date import TEMPLATE_DATE, was_misdated

if TYPE_CHECKING:
    import numpy as np

    from ksweep.autoencoder.base import Reconstructor, Verbalizer

REPORT = "training_report.json"
"""Beside AV and AR where scripts/train_demo_pair.py made them."""


class NlaPair(Family):
    """A pair of directories: an AV and an AR."""

    source_field = "autoencoder.av"

    @staticmethod
    def claims(spec: Autoencoder) -> bool:
        """Return whether the spec names an AV and an AR."""
        return spec.checkpoint is None

    @cached_property
    def pair(self) -> tuple[CheckpointInfo, CheckpointInfo]:
        """AV and AR, each checked alone and against the other."""
        av = inspect_half(self.autoencoder, "av")
        ar = inspect_half(self.autoencoder, "ar", beside=av)
        check_pair(av, ar)
        return av, ar

    @property
    def short_name(self) -> str:
        """`short_name_of` of the AV."""
        return short_name_of(self.autoencoder.source)

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
        """Return `av_identity` of the AV."""
        return av_identity(self.pair[0], self.autoencoder.prompting)

    def scores_identity(self) -> dict[str, Any]:
        """Return `ar_identity` of the AR."""
        return ar_identity(self.pair[1], self.autoencoder.prompting)

    def check_activations(self, facts: ActivationFacts) -> tuple[Note, ...]:
        """Check layer, width and base model; a fine-tune of the base is noted."""
        av, ar = self.pair
        width = facts.d_model if facts.model_directory is None else None  # a model's is compared with its architecture
        notes = check_pair(av, ar, activations_layer=facts.layer, activations_d_model=width, activations_base=facts.model)
        if facts.model_directory is not None and notes:
            check_same_architecture(av, facts.model_directory, facts.source)
        return notes

    @property
    def space(self) -> str | None:
        """Name and digest of the whitening that AV and AR were trained on; None for raw activations."""
        return self.pair[0].space

    def transform(self) -> Callable[[np.ndarray], np.ndarray]:
        """Return the whitening."""
        return self.pair[0].read_whitening().apply

    def training_norm(self) -> float | None:
        """Return the norm from a sidecar, or from the training report beside the pair."""
        return stated_training_norm(*self.pair)

    def weight_bytes(self) -> int:
        """Return the size of the weights of both."""
        return sum(self.half_bytes())

    def half_bytes(self) -> tuple[int, int]:
        """Return the sizes of the AV and of the AR, whose upper blocks are not loaded from a base."""
        av, ar = self.pair
        return (
            bytes_of_weights(av.weights, self.autoencoder.dtype, av.num_layers),
            bytes_of_weights(ar.weights, self.autoencoder.reconstructor_dtype, ar.num_layers),
        )

    def load_verbalizer(self, devices: Sequence[str]) -> Verbalizer:
        """Load the AV of the pair."""
        from ksweep.autoencoder.nla.models import load_nla_verbalizer

        return load_nla_verbalizer(self.pair[0], dtype=self.autoencoder.dtype, device=devices)

    def planned_av(self) -> PlannedAv:
        """Return `planned_av` of the AV."""
        return planned_av(self.pair[0])

    def load_prompter(self, devices: Sequence[str]) -> Verbalizer:
        """Load the AV of the pair without its blocks."""
        from ksweep.autoencoder.nla.models import load_nla_prompter

        return load_nla_prompter(self.pair[0], dtype=self.autoencoder.dtype, devices=devices)

    def load_reconstructor(self, devices: Sequence[str], verbalizer: Verbalizer | None = None) -> Reconstructor:
        """Load the AR of the pair; it shares no weights with the AV."""
        from ksweep.autoencoder.nla.models import load_nla_reconstructor

        return load_nla_reconstructor(self.pair[1], dtype=self.autoencoder.reconstructor_dtype, device=devices)


def short_name_of(source: str) -> str:
    """Return the hub name of an AV without -av, or the name of the directory that holds av/."""
    path = Path(hub.without_revision(source))
    if path.name.lower() in ("av", "nla-av", "actor", "ar", "nla-ar", "critic"):
        return path.resolve().parent.name if os.path.exists(path) else path.parent.name
    return re.sub(r"^nla-|[-_]a[vr]$", "", path.name, flags=re.IGNORECASE) or path.name


def av_identity(av: CheckpointInfo, prompting: PromptingOverrides) -> dict[str, Any]:
    """Return the AV's digest, and where they are not the usual ones the parser of explanations and the prompting."""
    # An AV that thinks gets its thoughts before the answer skipped.
    parser = {"parser": "after_thoughts"} if av.thinks else {}
    # Behind a prefill the prompt that the run's configuration states was once replaced by the chat template's default.
    begun = {"av_prompt": "as stated, then the prefill"} if prompting.prefill and av.av_prompting.states_prompt else {}
    identity = {"av": digest_nla(av)} | parser | begun | _choices(av) | _date_of_template(av)
    return identity | ({"av_prompting": prompting.of_av} if prompting.of_av else {})


def _date_of_template(av: CheckpointInfo) -> dict[str, Any]:
    """Return the date that the chat template gets, if earlier versions gave it that of the day, or took escapes for letters."""
    if not av.av_prompting.is_chat or "strftime_now" not in (template := chat_template_text(av.tokenizer)):
        return {}
    is_new = has_several_templates(av.tokenizer) or was_misdated(template)
    return {"av_template_date": TEMPLATE_DATE.isoformat()} if is_new else {}


def ar_identity(ar: CheckpointInfo, prompting: PromptingOverrides) -> dict[str, Any]:
    """Return the AR's digest, and where they are not the usual ones the BOS rule and the prompting."""
    bos = {"ar_bos": "once"} if text_gets_second_bos(ar.ar_prompting.template, ar.tokenizer) else {}
    return {"ar": digest_nla(ar)} | bos | _choices(ar) | ({"ar_prompting": prompting.of_ar} if prompting.of_ar else {})


def planned_av(av: CheckpointInfo) -> PlannedAv:
    """Return what an engine that loads an AV's files may ask of them before it does."""
    return PlannedAv(
        model_type=str(av.config.get("model_type")),
        edits_blocks=isinstance(av.av_prompting.injection, AddAfterBlock),
    )


def _choices(info: CheckpointInfo) -> dict[str, Any]:
    """Return what changes a half's prompt or reading and is in no file: its layout, and the layer of one for all layers.

    Keys from before there was a choice stay valid: kitft's layout adds nothing.
    """
    layout = {} if info.layout == "kitft" else {f"{info.role}_layout": info.layout}
    return layout | ({f"{info.role}_layer": info.layer} if info.sidecar.is_universal else {}) | _told_depth(info)


def _told_depth(info: CheckpointInfo) -> dict[str, Any]:
    """Return the depth that an AR is told, if earlier versions told it another: its layer's share of its own cut model."""
    if info.role == "av" or info.base is not None or DEPTH_FIELD not in (info.sidecar.ar_template or ""):
        return {}
    told = told_depth(info.sidecar, info.model_depth)
    return {"ar_depth": told} if told != told_depth(info.sidecar, info.num_layers) else {}


def stated_training_norm(*infos: CheckpointInfo) -> float | None:
    """Return the median norm of the vectors a pair was trained on, from a sidecar or the training report; None if unstated."""
    for info in infos:
        if info.sidecar.activation_norm is not None:
            return info.sidecar.activation_norm
    for info in infos:
        report = info.path.resolve().parent / REPORT
        if report.is_file() and (norm := _reported_norm(report)) is not None:
            return norm
    return None


def _reported_norm(report: Path) -> float | None:
    """Return held_out.activation_norm, which is of other texts than the training's, but of the same model and layer."""
    try:
        held_out = files.read_json(report, "training report").get("held_out")
    except RequestError:
        return None
    norm = held_out.get("activation_norm") if isinstance(held_out, dict) else None
    return float(norm) if isinstance(norm, (int, float)) and 0 < norm < math.inf else None
