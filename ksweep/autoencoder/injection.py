"""Inject a vector into the AV's prompt, in the prefill only: in place of an embedding row, or on top of a block's output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ksweep.autoencoder.prompting import Injection, ReplaceEmbedding
from ksweep.autoencoder.transformers_models import blocks_of
from ksweep.utils.errors import CheckpointError, DataError

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


@contextmanager
def injecting(
    injection: Injection, model: Any, vectors: Float[torch.Tensor, "activation d_model"], position: int
) -> Iterator[None]:
    """Inject vectors into a model at `position` of its input while the context is open, for exactly one forward pass.

    A replaced row is the embedding module's output, which is what the first block sees, after a Gemma's multiplication by
    sqrt(d_model): the rows need no factor of their own and the same code serves every architecture.

    Raises:
        CheckpointError: the module did not run exactly once, so the vectors were not injected as they should be.
    """
    num_calls = 0

    def change(_module: torch.nn.Module, _args: Any, output: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        if isinstance(injection, ReplaceEmbedding):
            hidden[:, position] = scaled(vectors.to(hidden.device), injection.scale).to(hidden)
        else:
            hidden[:, position] = added(hidden[:, position], vectors).to(hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    if isinstance(injection, ReplaceEmbedding):
        name, module = "embedding module", model.get_input_embeddings()
    else:
        name, module = f"block {injection.block}", blocks_of(model)[injection.block]
    handle = module.register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()
    if num_calls != 1:
        raise CheckpointError(
            f"the AV's {name} ran {num_calls} times in one prefill, expected once: its architecture takes its input from "
            "elsewhere, so vectors cannot be injected. Use a Qwen2, Llama or Gemma-3 text model."
        )
