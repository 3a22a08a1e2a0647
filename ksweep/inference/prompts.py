"""What an AV gives to an engine: the prompts of vectors as embeddings, and the tokens that end a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float

FinishReason = Literal["stop", "length"]
"""stop: the AV ended the text itself; length: it was cut off at max_new_tokens."""


@dataclass(frozen=True)
class BlockEdit:
    """A change of the residual stream at one token of the prompt, made while the prompt runs and not while tokens follow."""

    block: torch.nn.Module
    """The block of the AV's `model` whose input or output is changed."""
    side: Literal["input", "output"]
    position: int
    """Index of the token in the prompt, behind the tokens that all prompts share."""
    change: Callable[[Float[torch.Tensor, "activation d_model"]], Float[torch.Tensor, "activation d_model"]]
    """Returns the new values for those that the block has at this token, one row per prompt."""


@dataclass(frozen=True)
class Prompts:
    """The prompts of some vectors, ready to run: one row per vector, all of one length."""

    embeddings: Float[torch.Tensor, "activation token d_model"]
    """What the causal LM takes as `inputs_embeds` for the whole prompt, with the vector in place."""
    shared_length: int = 0
    """Number of leading tokens that the prompts of all vectors have in common; fewer than there are tokens."""
    edits: tuple[BlockEdit, ...] = ()
    """Changes inside the model that come on top; empty unless the AV says `edits_blocks`."""
    embeddings_are_equal: bool = False
    """Whether all rows of `embeddings` are one prompt, so that up to the first edited block the rows are one as well."""


@dataclass(frozen=True)
class ModelFiles:
    """A causal LM in files: the attribute `files` of an AV that was loaded for an engine with `loads_weights`."""

    directory: Path
    """config.json and plain safetensors of the language model alone."""
    dtype: str
    """Compute precision: "bfloat16", "float16" or "float32"."""
    devices: tuple[str, ...]
    """Torch devices of the rank, over which it is spread."""


@dataclass(frozen=True)
class PlannedAv:
    """What is known of an AV in files before a job is submitted."""

    model_type: str
    """Its language model, as config.json has it: "qwen2", "gemma3_text"."""
    edits_blocks: bool
    """Whether vectors enter behind a block, and not as embeddings."""


class PromptedModel(Protocol):
    """A model that continues a prompt with a vector in it: the part of an AV that engines use."""

    model: Any
    """transformers causal LM that continues the prompt token by token; None where an engine loads it itself (`ModelFiles`)."""
    stop_token_ids: frozenset[int]
    """Tokens that end a text; empty where all texts have one length."""
    prompt_length: int
    """Tokens in the prompt, including the place of the vector."""
    edits_blocks: bool
    """Whether vectors also enter by `Prompts.edits`; if not, embeddings are all that an engine needs."""

    def prompts(self, vectors: Float[torch.Tensor, "activation d_model"]) -> Prompts:
        """Return the prompt of every vector.

        Raises:
            DataError: a vector cannot be injected.
        """
