"""The protocol of a model that continues a prompt with a vector in it: all that an engine uses of an AV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float


FinishReason = Literal["stop", "length"]
"""stop: the AV ended the text itself; length: it was cut off at max_new_tokens."""


@dataclass(frozen=True)
class Prefill:
    """The prompts of some activations after one forward pass; draws are forked from them."""

    cache: Any
    """transformers Cache of the whole prompt, one row per activation."""
    logits: Float[torch.Tensor, "activation vocabulary"]
    """Next-token logits after the prompt, float32."""
    prompt_length: int
    """Tokens in the prompt; the same for every activation."""


class PromptedModel(Protocol):
    """A model that continues a prompt with a vector in it: the part of an AV that the engines use."""

    model: Any
    """transformers causal LM that continues the prompt token by token."""
    stop_token_ids: frozenset[int]
    """Tokens that end a text; empty where all texts have one length."""
    prompt_length: int
    """Tokens in the prompt, including the place of the vector."""

    def prefix(self) -> Any | None:
        """Run the part of the prompt before the vector, which all activations share. Returns a transformers Cache with one row.

        Returns None where the prompt has no such part.
        """

    def prefill(self, vectors: Float[torch.Tensor, "activation d_model"], prefix: Any | None = None) -> Prefill:
        """Run the prompt once per vector, with the vector injected; after `prefix`, only the rest of the prompt."""
