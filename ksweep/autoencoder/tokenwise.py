"""The last block for the tokens alone that are read out: the others need only their keys and values there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from jaxtyping import Int

NAMES = ("q_proj", "o_proj", "mlp")
"""Parts of a block that treat each token by itself; keys and values are not among them."""


@contextmanager
def only_at(block: torch.nn.Module, places: Int[torch.Tensor, " read"]) -> Iterator[None]:
    """While open, the block's output is its own at these places of the flattened batch, and anything finite elsewhere.

    Its `NAMES`, as far as it has them, run at these places; what they give elsewhere is 0.
    """
    shapes: dict[torch.nn.Module, torch.Size] = {}

    def take(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        shapes[module] = args[0].shape
        return (args[0].flatten(0, -2)[None, places.to(args[0].device)], *args[1:])

    def put(module: torch.nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        out = output.new_zeros(*shapes[module][:-1], output.shape[-1])
        out.view(-1, out.shape[-1])[places.to(out.device)] = output[0]
        return out

    parts = [module for name, module in block.named_modules() if name.rpartition(".")[2] in NAMES]
    handles = [hook for part in parts for hook in (part.register_forward_pre_hook(take), part.register_forward_hook(put))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
