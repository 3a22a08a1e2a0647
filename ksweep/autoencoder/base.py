"""What the other rooms know of an autoencoder: its family while planning, and the protocols of its loaded models.

An AV (verbalizer) turns vectors into draws, an AR (reconstructor) turns explanations into vectors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from ksweep.autoencoder.texts_file import TextsFile
from ksweep.config.spec import Autoencoder, Sampling, Scoring
from ksweep.inference.prompts import FinishReason, PlannedAv, PromptedModel
from ksweep.utils.errors import SpecError
from ksweep.utils.notes import Note

if TYPE_CHECKING:
    import numpy as np
    import torch
    from jaxtyping import Float

    from ksweep.stats import ScoringKind

ParseOutcome = Literal["ok", "no_open_tag", "no_close_tag", "empty", "cut_off"]
"""ok, or why a draw failed. A draw that reached max_new_tokens without a closing tag is "cut_off"."""


@dataclass(frozen=True)
class Explanation:
    """One draw as an AR may read it: the AR of an NLA pair reads the text, the encoder of a TAE file the tokens."""

    text: str
    token_ids: tuple[int, ...] = ()
    """Sampled tokens without a stop token."""
    current_token_id: int | None = None
    """The token that the activation was taken at."""
    position: int | None = None
    """Its index in its row of text."""


@dataclass(frozen=True)
class CutText:
    """A given text as its AR is to read it: stripped, and cut to the number of tokens that the spec allows."""

    text: str
    num_tokens: int
    """Tokens that are left."""
    token_ids: tuple[int, ...] = ()
    """Their ids where the AR reads tokens; else none."""


class Verbalizer(PromptedModel, Protocol):
    """AV: residual-stream vectors -> text."""

    d_model: int

    def inputs(
        self, vectors: Float[torch.Tensor, "activation d_model"], positions: Sequence[int | None]
    ) -> Float[torch.Tensor, "activation d_model"]:
        """Return the input of `prompts`: the activations, less their position embedding if the AV was trained so."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of sampled tokens, without the stop token."""

    def parse(self, text: str, finish: FinishReason) -> tuple[str | None, ParseOutcome]:
        """Return the explanation in a sampled text, or None and the reason why there is none."""


class Reconstructor(Protocol):
    """AR: text -> vector."""

    d_model: int
    reads_empty_text: bool
    """Whether the AR can read an empty text, because a prompt surrounds it."""

    def reconstruct(
        self, explanations: Sequence[Explanation], batch_size: int = 64
    ) -> Float[torch.Tensor, "explanation d_model"]:
        """Return raw (not normalised) float32 reconstructions on the CPU, in the order given; equal explanations run once."""


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
    draws_are_given: ClassVar[bool] = False
    """Whether the user gives the texts, so that nothing is sampled and there is no AV."""
    has_reference_quantities: bool = False
    """Whether the quantities of the reference sweep are reported, which need the raw reconstructions of the best draws."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        """Keep the spec; files are read when they are first needed."""
        self.autoencoder = autoencoder

    @staticmethod
    @abstractmethod
    def claims(spec: Autoencoder) -> bool:
        """Return whether a spec names an autoencoder of this family. A file may be looked at, but need not exist."""

    @property
    @abstractmethod
    def short_name(self) -> str:
        """Short name for labels."""

    @property
    def scoring_kind(self) -> ScoringKind:
        """How reconstructions are compared with activations: normalised (both scaled to norm sqrt(d)) or raw (as they are)."""
        return "normalised"

    @property
    def texts_have_fixed_length(self) -> bool:
        """Whether every explanation has the number of tokens of training, so that none is cut off."""
        return self.num_tokens is not None

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
    def given_texts(self) -> TextsFile:
        """The texts of a family whose draws are given.

        Raises:
            DataError: the file cannot be read as texts of activations.
        """
        raise AssertionError(f"{type(self).__name__} samples its draws")

    def cut_texts(self, texts: Sequence[str]) -> list[CutText]:
        """Return given texts as the AR is to read them."""
        raise AssertionError(f"{type(self).__name__} samples its draws")

    def resolve_sampling(self, sampling: Sampling) -> Sampling:
        """Return the sampling settings with those replaced that the autoencoder fixes: the length of texts, their number.

        Raises:
            SpecError: settings that have no meaning for it.
        """
        return sampling if self.num_tokens is None else replace(sampling, max_new_tokens=self.num_tokens)

    @property
    @abstractmethod
    def layer(self) -> int | None:
        """Index of the block whose output it was trained on, 0-based; None where activations.layer decides."""

    @property
    def notes(self) -> tuple[Note, ...]:
        """Notes on accepted but unusual properties of its files."""
        return ()

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

    def check_scoring(self, scoring: Scoring) -> None:
        """Check that the scoring has a meaning for this family's errors.

        Raises:
            SpecError: a stated baseline that normalised errors cannot have, or quantities that the family does not have.
        """
        baseline = scoring.stated_baseline
        if self.scoring_kind == "normalised" and baseline is not None and baseline > 2:
            raise SpecError(
                f"scoring.baseline={baseline!r} must lie in (0, 2] (of vectors scaled to norm sqrt(d)), or be None to measure "
                "it; only a checkpoint is scored on raw vectors"
            )
        if scoring.reference_replicates and not self.has_reference_quantities:
            raise SpecError(
                f"scoring.reference_replicates={scoring.reference_replicates}: the reference's quantities are of raw "
                "reconstructions, which only a checkpoint has. Leave it out (0); the pair's FVE has its interval from "
                "scoring.num_replicates"
            )

    @property
    def space(self) -> str | None:
        """Name of the transform that activations go through before they are explained and compared; None for vectors as they
        are."""
        return None

    def transform(self) -> Callable[[np.ndarray], np.ndarray]:
        """Return the transform of `space`, of arrays [activation, d_model].

        Raises:
            CheckpointError: its file is not the one that the autoencoder was trained with.
        """
        raise AssertionError(f"{type(self).__name__} takes activations as they are")

    def training_norm(self) -> float | None:
        """Return the median norm of the activations that it was trained on; None if its files do not state it."""
        return None

    @abstractmethod
    def weight_bytes(self) -> int:
        """Return an upper bound of the memory of AV and AR in a process that has loaded both."""

    def half_bytes(self) -> tuple[int, int]:
        """Return the memory of the AV's weights and of the AR's; of what a family does not tell apart, half each."""
        return self.weight_bytes() // 2, self.weight_bytes() // 2

    def reconstruction_bytes(self) -> int:
        """Return the bytes of each reconstruction that is stored with its draw; 0 if none is stored."""
        return 0

    @abstractmethod
    def load_verbalizer(self, devices: Sequence[str]) -> Verbalizer:
        """Load the AV, spread over torch devices."""

    def planned_av(self) -> PlannedAv | None:
        """Return what an engine that loads the AV's files itself may ask of them; None where no engine can load them."""
        return None

    def load_prompter(self, devices: Sequence[str]) -> Verbalizer:
        """Load what makes prompts and reads texts, for an engine that loads the model from the AV's `files` onto the devices."""
        raise AssertionError(f"{type(self).__name__} has no `planned_av`")

    @abstractmethod
    def load_reconstructor(self, devices: Sequence[str], verbalizer: Verbalizer | None = None) -> Reconstructor:
        """Load the AR; it shares the weights of `verbalizer`, the loaded AV, if both use the same model."""
