"""What every checkpoint family must offer: an AV turns vectors into draws, an AR turns texts into vectors."""

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
    """What an AR may read of one draw: an NLA pair's reads the text, a talkative autoencoder's the tokens."""

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
        """What `prefill` is given: the activations, less what the AV was trained without (a position's embedding)."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of sampled tokens, stop token left out."""

    def parse(self, text: str, finish: FinishReason) -> tuple[str | None, ParseOutcome]:
        """The explanation in a sampled text, or None and why there is none."""


class Reconstructor(Protocol):
    """AR: text -> vector."""

    d_model: int
    reads_empty_text: bool
    """Whether an empty text leaves anything to read: a prompt around it."""

    def reconstruct(
        self, explanations: Sequence[Explanation], batch_size: int = 64
    ) -> Float[torch.Tensor, "explanation d_model"]:
        """Raw (not normalised) float32 reconstructions on the CPU, in the order given; equal explanations are run once."""
