"""Inject a vector into the AV's prompt: in place of an embedding row, or on top of a block's output."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ksweep.autoencoder.prompting import Injection, ReplaceEmbedding
from ksweep.inference.prompts import BlockEdit, Prompts
from ksweep.inference.transformers_models import blocks_of
from ksweep.utils.errors import DataError

if TYPE_CHECKING:
    from jaxtyping import Float


def check_vectors(vectors: torch.Tensor, d_model: int) -> None:
    """Check that vectors have the shape [activation, d_model], are finite, and have a direction.

    Raises:
        DataError: the shape is another, or a row is not; the first such row is named.
    """
    if vectors.ndim != 2 or vectors.shape[1] != d_model:
        raise DataError(
            f"the AV takes vectors of shape [activation, {d_model}], got {list(vectors.shape)}. "
            "Use activations of the base model and layer that the pair was trained on."
        )
    finite = torch.isfinite(vectors).all(dim=1)
    for is_wrong, fault in ((~finite, "NaN or infinite values"), (finite & (vectors == 0).all(dim=1), "nothing but zeros")):
        if rows := is_wrong.nonzero()[:, 0].tolist():
            raise DataError(
                f"row {rows[0]} of the vectors holds {fault} ({len(rows)} such rows of {len(vectors)}): it has no direction to "
                "inject. "
                "Remove these rows, or extract them again in a wider dtype."
            )


def scaled(vectors: Float[torch.Tensor, "activation d_model"], scale: float) -> Float[torch.Tensor, "activation d_model"]:
    """Scale each vector to norm `scale` in float32, by the public code's order of operations; only directions reach the AV."""
    vectors = vectors.float()
    rows: torch.Tensor = vectors / (torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp_min(1e-12) / scale)
    return rows


def added(
    hidden: Float[torch.Tensor, "activation d_model"], vectors: Float[torch.Tensor, "activation d_model"]
) -> Float[torch.Tensor, "activation d_model"]:
    """Add each vector, scaled to the norm of its hidden state, in float32; only directions reach the AV."""
    hidden, vectors = hidden.float(), vectors.float().to(hidden.device)
    norms, lengths = (torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (hidden, vectors))
    total: torch.Tensor = hidden + norms * vectors / (lengths + 1e-9)
    return total


def injected(
    injection: Injection,
    model: Any,
    embeddings: Float[torch.Tensor, "activation token d_model"],
    vectors: Float[torch.Tensor, "activation d_model"],
    position: int,
) -> Prompts:
    """Return prompts with a vector injected into each, at token `position`; all tokens before it are shared.

    A replaced row is the embedding module's output, which is what the first block sees, after a Gemma's multiplication by
    sqrt(d_model): the rows need no factor of their own and the same code serves every architecture.

    Args:
        embeddings: what the embedding module makes of the prompts; rows are replaced in place.
    """
    if isinstance(injection, ReplaceEmbedding):
        vectors = vectors.to(embeddings.device)
        rows = vectors.float() * injection.scale if injection.multiplies else scaled(vectors, injection.scale)
        embeddings[:, position] = rows.to(embeddings)
        return Prompts(embeddings, position)
    edit = BlockEdit(blocks_of(model)[injection.block], "output", position, partial(added, vectors=vectors))
    return Prompts(embeddings, position, (edit,), embeddings_are_equal=True)
