"""The protocols of loaded models: an AV turns vectors into draws, an AR turns explanations into vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from ksweep.inference.backend import FinishReason, PromptedModel

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float

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


class Verbalizer(PromptedModel, Protocol):
    """AV: residual-stream vectors -> text."""

    d_model: int

    def inputs(
        self, vectors: Float[torch.Tensor, "activation d_model"], positions: Sequence[int | None]
    ) -> Float[torch.Tensor, "activation d_model"]:
        """Return the input of `prefill`: the activations, less their position embedding if the AV was trained so."""

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
