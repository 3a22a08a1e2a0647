"""What the engines need of a model that continues a prompt with a vector in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float


FinishReason = Literal["stop", "length"]
"""stop: the AV ended by itself; length: cut off at max_new_tokens."""


@dataclass(frozen=True)
class Prefill:
    """The prompt of some activations, run once: what a draw is forked from."""

    cache: Any
    """transformers Cache of the whole prompt, one row per activation."""
    logits: Float[torch.Tensor, "activation vocabulary"]
    """Next-token logits after the prompt, float32."""
    prompt_length: int
    """Tokens in the prompt; the same for every activation."""


class PromptedModel(Protocol):
    """A model that continues a prompt with a vector in it. An AV is one; an engine needs no more of an AV than this."""

    model: Any
    """transformers causal LM that continues the prompt token by token."""
    stop_token_ids: frozenset[int]
    """Tokens that end a text; none where every text has one length."""
    prompt_length: int
    """Tokens of the prompt, the vector's own place included."""

    def prefix(self) -> Any | None:
        """transformers Cache, one row, of the prompt before the vector, which is the same for all; run once. None without one."""

    def prefill(self, vectors: Float[torch.Tensor, "activation d_model"], prefix: Any | None = None) -> Prefill:
        """Run the prompt once per vector, the vector injected; behind `prefix`, only what is left of it."""
