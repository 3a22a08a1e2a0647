"""What every checkpoint family must offer: an AV turns vectors into draws, an AR turns texts into vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float

FinishReason = Literal["stop", "length"]
"""stop: the AV ended by itself; length: cut off at max_new_tokens."""
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


@dataclass(frozen=True)
class Prefill:
    """The prompt of some activations, run once: what a draw is forked from."""

    cache: Any
    """transformers Cache of the whole prompt, one row per activation."""
    logits: Float[torch.Tensor, "activation vocabulary"]
    """Next-token logits after the prompt, float32."""
    prompt_length: int
    """Tokens in the prompt; the same for every activation."""


class Verbalizer(Protocol):
    """AV: residual-stream vectors -> text."""

    model: Any
    """transformers causal LM that continues the prompt token by token."""
    d_model: int
    stop_token_ids: frozenset[int]
    """Tokens that end a text; none where every text has one length."""
    prompt_length: int
    """Tokens of the prompt, the vector's own place included."""

    def inputs(
        self, vectors: Float[torch.Tensor, "activation d_model"], positions: Sequence[int | None]
    ) -> Float[torch.Tensor, "activation d_model"]:
        """What `prefill` is given: the activations, less what the AV was trained without (a position's embedding)."""

    def prefix(self) -> Any | None:
        """transformers Cache, one row, of the prompt before the vector, which is the same for all; run once. None without one."""

    def prefill(self, vectors: Float[torch.Tensor, "activation d_model"], prefix: Any | None = None) -> Prefill:
        """Run the prompt once per vector, the vector injected; behind `prefix`, only what is left of it."""

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
