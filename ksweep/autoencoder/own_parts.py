"""The family of pairs of which at least one half is the user's own: "package.module:name" as autoencoder.av or autoencoder.ar.

The name is that of a class, which every rank calls with `dtype` and `devices`, or of an object that is used as it is. An AV has
the methods of `base.Verbalizer`, an AR those of `base.Reconstructor`. While planning, these attributes are read, where they are:

digest          identifies the part in keys; without it, the digest of its module's source file does, which covers no weights
layer           block whose output it is for; without it, activations.layer decides
d_model         width of its vectors
scoring_kind    of an AR: "normalised" (default) or "raw"
num_tokens      of an AV: length of every text where that is fixed
weight_bytes    memory of its weights, for the plan

The other half may be a checkpoint in the public NLA layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

from ksweep.autoencoder.base import ActivationFacts, Family
from ksweep.autoencoder.nla.checkpoint import CheckpointInfo, base_notes, check_pair, inspect_half
from ksweep.autoencoder.nla.family import ar_identity, av_identity, planned_av, short_name_of, stated_training_norm
from ksweep.autoencoder.nla.sidecar import NlaRole
from ksweep.config.spec import Autoencoder
from ksweep.inference.prompts import PlannedAv
from ksweep.stats.fve import ScoringKind
from ksweep.utils.errors import CheckpointError, DataError, SpecError
from ksweep.utils.imports import check_has, digest_of_named, is_dotted_name, load_named
from ksweep.utils.notes import Note, notes_of
from ksweep.utils.safetensors_header import bytes_of_weights

if TYPE_CHECKING:
    from ksweep.autoencoder.base import Reconstructor, Verbalizer

METHODS: dict[NlaRole, tuple[str, ...]] = {
    "av": ("inputs", "prompts", "decode", "parse"),
    "ar": ("reconstruct",),
}
LOADED: dict[NlaRole, tuple[str, ...]] = {
    "av": (*METHODS["av"], "stop_token_ids", "prompt_length", "edits_blocks", "d_model"),
    "ar": (*METHODS["ar"], "d_model", "reads_empty_text"),
}
"""What a loaded half must have: its methods, and attributes that its constructor may set."""


class OwnParts(Family):
    """An AV and an AR, of which the user wrote at least one."""

    source_field = "autoencoder.av"

    @staticmethod
    def claims(spec: Autoencoder) -> bool:
        """Return whether AV or AR is a dotted name."""
        return is_dotted_name(spec.av) or is_dotted_name(spec.ar)

    @cached_property
    def av(self) -> OwnPart | CheckpointInfo:
        """The AV: the user's own, or an inspected checkpoint."""
        return half_of(self.autoencoder, "av")

    @cached_property
    def ar(self) -> OwnPart | CheckpointInfo:
        """The AR: the user's own, or an inspected checkpoint."""
        return half_of(self.autoencoder, "ar")

    @property
    def _checkpoints(self) -> list[CheckpointInfo]:
        return [half for half in (self.av, self.ar) if isinstance(half, CheckpointInfo)]

    @property
    def short_name(self) -> str:
        """The names of both halves, or of the AV alone where the AR has the same."""
        names = [short_name_of_half(source or "") for source in (self.autoencoder.av, self.autoencoder.ar)]
        return " + ".join(dict.fromkeys(names))

    @property
    def scoring_kind(self) -> ScoringKind:
        """What the user's AR states; a checkpoint's AR is scored by direction."""
        return scoring_kind_of(self.ar)

    @property
    def num_tokens(self) -> int | None:
        """num_tokens of the user's AV."""
        return self.av.number("num_tokens") if isinstance(self.av, OwnPart) else None

    @property
    def layer(self) -> int | None:
        """The layer that the halves state; None if neither does."""
        layers = {half.layer for half in (self.av, self.ar)} - {None}
        if len(layers) > 1:
            raise CheckpointError(
                f"autoencoder.av={self.autoencoder.av} is for layer {self.av.layer}, autoencoder.ar={self.autoencoder.ar} for "
                f"layer {self.ar.layer}: use two halves of one layer"
            )
        return layers.pop() if layers else None

    @property
    def notes(self) -> tuple[Note, ...]:
        """Notes of the half that is a checkpoint."""
        return notes_of(*self._checkpoints)

    def draws_identity(self) -> dict[str, Any]:
        """Return digest and name of the user's AV, or the identity of the checkpoint."""
        return self.av.identity() if isinstance(self.av, OwnPart) else av_identity(self.av, self.autoencoder.prompting)

    def scores_identity(self) -> dict[str, Any]:
        """Return digest and name of the user's AR, or the identity of the checkpoint."""
        return ar_half_identity(self.ar, self.autoencoder)

    def check_activations(self, facts: ActivationFacts) -> tuple[Note, ...]:
        """Check layer and width as far as the halves state them, and the base model of a half that is a checkpoint."""
        for half, source in ((self.av, self.autoencoder.av), (self.ar, self.autoencoder.ar)):
            check_half(half, source or "", facts)
            if isinstance(half, CheckpointInfo) and half.space is not None:
                raise CheckpointError(
                    f"{source} was trained on whitened activations, and the other half is your own class, which gets and gives "
                    "raw ones: use both halves of the pair, or one trained on raw activations"
                )
        if facts.model is None:
            return ()
        if isinstance(self.av, CheckpointInfo):
            return check_pair(self.av, self.av, activations_base=facts.model)
        # An AR holds its base's lower blocks alone, so that only the names can be compared.
        return base_notes(facts.model, self.ar.sidecar.base_checkpoint, "the AR") if isinstance(self.ar, CheckpointInfo) else ()

    def training_norm(self) -> float | None:
        """Return the norm that a checkpoint states."""
        return stated_training_norm(*self._checkpoints)

    def weight_bytes(self) -> int:
        """Return the size of a checkpoint's weights, and what the user's parts state."""
        return sum(self.half_bytes())

    def half_bytes(self) -> tuple[int, int]:
        """Return the same of AV and AR."""
        dtype = self.autoencoder.dtype
        av, ar = (
            (half.number("weight_bytes") or 0) if isinstance(half, OwnPart) else bytes_of_weights(half.weights, dtype)
            for half in (self.av, self.ar)
        )
        return av, ar

    def load_verbalizer(self, devices: Sequence[str]) -> Verbalizer:
        """Make the user's AV, or load the checkpoint."""
        from ksweep.autoencoder.nla.models import load_nla_verbalizer

        if isinstance(self.av, OwnPart):
            av: Verbalizer = self.av.make(self.autoencoder.dtype, devices)
            return av
        return load_nla_verbalizer(self.av, dtype=self.autoencoder.dtype, device=devices)

    def planned_av(self) -> PlannedAv | None:
        """Return `planned_av` of an AV that is a checkpoint."""
        return None if isinstance(self.av, OwnPart) else planned_av(self.av)

    def load_prompter(self, devices: Sequence[str]) -> Verbalizer:
        """Load the checkpoint's AV without its blocks."""
        from ksweep.autoencoder.nla.models import load_nla_prompter

        assert not isinstance(self.av, OwnPart)
        return load_nla_prompter(self.av, dtype=self.autoencoder.dtype, devices=devices)

    def load_reconstructor(self, devices: Sequence[str], verbalizer: Verbalizer | None = None) -> Reconstructor:
        """Make the user's AR, or load the checkpoint."""
        return load_ar_half(self.ar, self.autoencoder, devices)


class OwnPart:
    """A half that the user wrote, before it is made."""

    def __init__(self, role: NlaRole, source: str) -> None:
        """Import what `source` names, which is made only when it is loaded."""
        self.role, self.source, self.field = role, source, f"autoencoder.{role}"
        self.named = load_named(source, self.field)
        if isinstance(self.named, type) or not callable(self.named):  # what a function returns is checked when it is called
            check_has(self.named, METHODS[role], f"{self.field}={source}")

    @property
    def layer(self) -> int | None:
        """Its attribute `layer`."""
        return self.number("layer")

    @property
    def d_model(self) -> int | None:
        """Its attribute `d_model`."""
        return self.number("d_model")

    @property
    def scoring_kind(self) -> ScoringKind:
        """Its attribute `scoring_kind`; "normalised" without one."""
        kind: ScoringKind = getattr(self.named, "scoring_kind", "normalised")
        if kind not in get_args(ScoringKind):
            raise SpecError(f"{self.field}={self.source}: scoring_kind={kind!r} is not one of {', '.join(get_args(ScoringKind))}")
        return kind

    def number(self, name: str) -> int | None:
        """Return a whole number that the named part states; None if it does not, or only its constructor sets it."""
        value = getattr(self.named, name, None)
        if value is None or isinstance(value, (property, cached_property)):
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise SpecError(f"{self.field}={self.source}: its attribute {name} is {value!r}; expected a whole number")
        return value

    def identity(self) -> dict[str, Any]:
        """Return digest and dotted name, for keys."""
        return {self.role: digest_of_named(self.source, self.named, self.field), f"{self.role}_name": self.source}

    def make(self, dtype: str, devices: Sequence[str]) -> Any:
        """Return the part: what the named class or function returns, or the named object itself."""
        made = self.named(dtype=dtype, devices=tuple(devices)) if callable(self.named) else self.named
        check_has(made, LOADED[self.role], f"{self.field}={self.source}: what it makes")
        return made


def half_of(autoencoder: Autoencoder, role: NlaRole) -> OwnPart | CheckpointInfo:
    """Return the AV or AR that a spec names: the user's own, or an inspected checkpoint.

    Raises:
        CheckpointError, SpecError: it cannot be used, or its prompting is overridden and it makes its prompts itself.
    """
    source = getattr(autoencoder, role) or ""
    if not is_dotted_name(source):
        return inspect_half(autoencoder, role)
    if option := autoencoder.without_effect(*(("av_stack",) if role == "av" else ())):
        raise SpecError(f"{option} is for a checkpoint, and autoencoder.av={source} is your own: leave it out")
    overrides = autoencoder.prompting.of_av if role == "av" else autoencoder.prompting.of_ar
    if overrides:
        raise SpecError(
            f"autoencoder.prompting.{next(iter(overrides))} is for checkpoints, and autoencoder.{role}={source} makes its "
            "prompts itself: leave it out"
        )
    return OwnPart(role, source)


def short_name_of_half(source: str) -> str:
    """Return the name of the user's class, or `short_name_of` a checkpoint."""
    return source.partition(":")[2] if is_dotted_name(source) else short_name_of(source)


def check_half(half: OwnPart | CheckpointInfo, source: str, facts: ActivationFacts) -> None:
    """Check that activations have the width and layer of a half, as far as both are known.

    Raises:
        DataError: they have another.
    """
    for name, value in (("d_model", facts.d_model), ("layer", facts.layer)):
        stated = getattr(half, name)
        if None not in (stated, value) and stated != value:
            raise DataError(
                f"{facts.source} gives activations of {name} {value}, but {source} is for {name} {stated}: give it those "
                "that it was made for"
            )


def scoring_kind_of(ar: OwnPart | CheckpointInfo) -> ScoringKind:
    """Return what the user's AR states; a checkpoint's AR is scored by direction."""
    return ar.scoring_kind if isinstance(ar, OwnPart) else "normalised"


def ar_half_identity(ar: OwnPart | CheckpointInfo, autoencoder: Autoencoder) -> dict[str, Any]:
    """Return digest and name of the user's AR, or the identity of the checkpoint."""
    return ar.identity() if isinstance(ar, OwnPart) else ar_identity(ar, autoencoder.prompting)


def load_ar_half(ar: OwnPart | CheckpointInfo, autoencoder: Autoencoder, devices: Sequence[str]) -> Reconstructor:
    """Make the user's AR, or load the checkpoint."""
    from ksweep.autoencoder.nla.models import load_nla_reconstructor

    dtype = autoencoder.reconstructor_dtype
    if isinstance(ar, OwnPart):
        made: Reconstructor = ar.make(dtype, devices)
        return made
    return load_nla_reconstructor(ar, dtype=dtype, device=devices)
