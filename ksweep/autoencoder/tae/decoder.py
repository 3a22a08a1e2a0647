"""Run the decoder of a talkative autoencoder as an AV: a trained prompt surrounds the vector, which also overwrites block inputs.

    prompt    left | p0(a) | right                            embeddings, times sqrt(d) for Gemma
    blocks    input of block i at the vector's position := pi(a)    for every patched block, not scaled
    then      num_tokens sampled tokens, each fed back as a token; nothing more is patched, and no token ends a text

Prompt and patches are data for the engine, which runs them through the model's own forward pass with hooks on its blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ksweep.autoencoder.injection import check_vectors
from ksweep.autoencoder.tae.base_model import check_contents, embedding_scale, is_identity
from ksweep.autoencoder.tae.checkpoint import TaeInfo
from ksweep.autoencoder.tae.layout import BASE
from ksweep.inference.prompts import BlockEdit, Prompts
from ksweep.inference.transformers_models import blocks_of
from ksweep.utils.errors import DataError
from ksweep.utils.notes import Note

if TYPE_CHECKING:
    from jaxtyping import Float

    from ksweep.autoencoder.base import ParseOutcome
    from ksweep.inference.prompts import FinishReason


class TaeVerbalizer:
    """An AV, which maps vectors to texts. Implements `base.Verbalizer`."""

    def __init__(self, info: TaeInfo, model: Any, tokenizer: Any) -> None:
        """Combine a model from `base_model.load_decoder_model` with the checkpoint's own tensors.

        Raises:
            CheckpointError: a tensor of the decoder is not finite, or projects everything to zero.
        """
        self.info = info
        self.model = model
        self.tokenizer = tokenizer
        self.d_model = info.d_model
        self.stop_token_ids: frozenset[int] = frozenset()
        self.num_tokens: int | None = info.num_tokens
        self.prompt_length = info.decoder.prefix_length
        self.edits_blocks = info.decoder.num_patched > 0
        self._blocks = list(blocks_of(model))[: info.decoder.num_patched]
        self._scale = embedding_scale(model)
        self._parts = _parts(info, model)
        self.notes = _untrained(info)

    def inputs(
        self, vectors: Float[torch.Tensor, "activation d_model"], positions: Sequence[int | None] | None = None
    ) -> Float[torch.Tensor, "activation d_model"]:
        """Return the input of `prompts`: the activations, minus their position embeddings if the decoder was trained that way.

        Args:
            positions: index of each activation's token in its row of text; not needed by decoders without position embeddings.

        Raises:
            DataError: positions are needed and missing, or beyond the trained ones.
        """
        if self._parts.positions is None:
            return vectors
        rows = position_rows(self._parts.positions, positions, len(vectors), f"the decoder in {self.info.path}")
        return vectors.float() - rows.to(vectors.device)

    def prompts(self, vectors: Float[torch.Tensor, "activation d_model"]) -> Prompts:
        """Return the prompt around each vector's projection, and the replacements of the patched blocks' inputs.

        Raises:
            DataError: a vector is not finite, all zero, or of another width.
        """
        check_vectors(vectors, self.d_model)
        with torch.inference_mode():
            rows = self._projected(vectors.to(self._parts.weight))
            left = self._parts.left
            embeddings = self._scale * _around(left, rows[0], self._parts.right)
        patches = zip(self._blocks, rows[1:], strict=True)
        edits = tuple(BlockEdit(block, "input", len(left), partial(_replaced, row)) for block, row in patches)
        return Prompts(embeddings, len(left), edits)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of sampled tokens, including special ones: an end-of-text token is a token like any other."""
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def parse(self, text: str, finish: FinishReason) -> tuple[str | None, ParseOutcome]:
        """Return the whole text and "ok": there are no tags, so no draw fails, and all draws have the same length."""
        return text, "ok"

    def _projected(self, vectors: Float[torch.Tensor, "activation d_model"]) -> list[Float[torch.Tensor, "activation d_model"]]:
        """Return the prompt embedding and each patched block's input; a projection that serves several is applied once."""
        used = self.info.decoder.projections
        projected = {i: nn.functional.linear(vectors, self._parts.weight[i], self._parts.bias[i]) for i in dict.fromkeys(used)}
        return [projected[i] for i in used]


def _replaced(row: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Return the row in place of what the block would have read."""
    return row


def position_rows(
    table: Float[torch.Tensor, "position d_model"], positions: Sequence[int | None] | None, count: int, who: str
) -> Float[torch.Tensor, "activation d_model"]:
    """Return the position embedding of each activation in float32; `who` names the model in messages.

    Raises:
        DataError: a position is unknown or beyond the table, or there are not `count` of them.
    """
    indices = [position for position in positions or () if position is not None]
    if len(indices) != count:
        raise DataError(
            f"{who} uses the position of every activation, and {count - len(indices)} of {count} are unknown: extract the "
            "activations from text, or use vectors with positions"
        )
    if beyond := [position for position in indices if not 0 <= position < len(table)]:
        raise DataError(
            f"{who} has embeddings of positions 0 to {len(table) - 1}, but an activation is at position {beyond[0]}. Cut the "
            f"text to {len(table)} tokens."
        )
    return table[torch.tensor(indices, dtype=torch.long, device=table.device)].float()


def _around(
    left: Float[torch.Tensor, "left d_model"],
    middle: Float[torch.Tensor, "activation d_model"],
    right: Float[torch.Tensor, "right d_model"],
) -> Float[torch.Tensor, "activation token d_model"]:
    n = len(middle)
    return torch.cat([left.expand(n, -1, -1), middle[:, None], right.expand(n, -1, -1)], dim=1)


@dataclass(frozen=True)
class _Parts:
    """The decoder's own tensors, on its model's device and in its dtype."""

    weight: Float[torch.Tensor, "projection d_model d_model"]
    bias: Float[torch.Tensor, "projection d_model"]
    left: Float[torch.Tensor, "left d_model"]
    right: Float[torch.Tensor, "right d_model"]
    positions: Float[torch.Tensor, "position d_model"] | None
    """Position embeddings that are subtracted from activations, float32; None if the decoder has none."""


def _parts(info: TaeInfo, model: Any) -> _Parts:
    state = {name: tensor for name, tensor in info.states["decoder"].items() if not name.startswith(BASE)}
    check_contents(state, "decoder", info.path)
    stacked = info.decoder.is_stacked
    weight = state["proj_weight"] if stacked else state["proj.weight"][None]
    bias = state["proj_bias"] if stacked else state["proj.bias"][None]
    empty = torch.empty(0, info.d_model)
    left, right = (state.get(name, empty) for name in ("prompt_left_emb", "prompt_right_emb"))
    weight, bias, left, right = (tensor.to(device=model.device, dtype=model.dtype) for tensor in (weight, bias, left, right))
    positions = state.get("activation_pos_embedder.weight")
    return _Parts(weight, bias, left, right, None if positions is None else positions.float().to(model.device))


def _untrained(info: TaeInfo) -> tuple[Note, ...]:
    weight = info.states["decoder"]["proj_weight" if info.decoder.is_stacked else "proj.weight"]
    if not is_identity(weight if info.decoder.is_stacked else weight[None]):
        return ()
    return (Note("checkpoint", f"The decoder's projections in {info.path} are still the identity that training starts from."),)
