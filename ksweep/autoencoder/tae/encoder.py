"""Run the encoder of a talkative autoencoder as an AR: tokens between trained embeddings -> output of one block -> vector.

    soft prompt | explanation | postfix | current token      embeddings, times sqrt(d) for Gemma
                                 + special vector             on the last embedding
    output of block `output_layer` at the last position -> projection -> + embedding of the activation's position

It reads the sampled token ids, because tokenising their text again may give other tokens. Blocks above `output_layer` do not
run, and are not in memory unless the decoder needs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import DynamicCache

from ksweep.autoencoder.base import Explanation
from ksweep.autoencoder.tae.base_model import check_contents, embedding_scale, exact_embedding_scale, is_identity
from ksweep.autoencoder.tae.checkpoint import TaeInfo, soft_prompt_sides
from ksweep.autoencoder.tae.decoder import position_rows
from ksweep.autoencoder.tae.layout import BASE
from ksweep.inference import memory
from ksweep.inference.kv_cache import expand_prefix
from ksweep.inference.transformers_models import blocks_of
from ksweep.utils.errors import CheckpointError, DataError
from ksweep.utils.notes import Note

if TYPE_CHECKING:
    from jaxtyping import Float, Int

TextPrompt = tuple[tuple[int, ...], tuple[int, ...]]
"""Tokens before and after an explanation whose embeddings replace the trained ones."""
BEFORE_BLOCKS = -2
"""output_layer of an encoder that reads the input of block 0."""


class TaeReconstructor:
    """An AR, which maps explanations to vectors. Implements `base.Reconstructor`."""

    def __init__(
        self,
        info: TaeInfo,
        model: Any,
        token_embeddings: Float[torch.Tensor, "token d_model"] | None = None,
        prompt: TextPrompt | None = None,
    ) -> None:
        """Combine a model from `base_model`, the encoder's own or the decoder's, with the checkpoint's own tensors.

        Args:
            token_embeddings: table of the decoder's base, which embeds explanations; None takes the model's own table.
            prompt: what `text_prompt` returned, to replace the trained prompt.

        Raises:
            CheckpointError: a tensor of the encoder is not finite, or a projection is all zero.
        """
        self.info = info
        self.model = model
        self.d_model = info.d_model
        self._decoder = model.get_decoder()
        self._block = _read_out(blocks_of(model), info.encoder.output_layer)
        self._parts = _parts(info, model, token_embeddings, prompt)
        self.notes = tuple(_untrained(info.states["encoder"], info))
        self.reads_empty_text = bool(len(self._parts.soft_prompt) + len(self._parts.postfix))
        self._own_scale, self._scale = exact_embedding_scale(model), embedding_scale(model)
        self._past: Any | None = None

    def reconstruct(
        self, explanations: Sequence[Explanation], batch_size: int = 64
    ) -> Float[torch.Tensor, "explanation d_model"]:
        """Return raw float32 reconstructions on the CPU, in the order of `explanations`; equal ones run once.

        An explanation without tokens and without a current token is the soft prompt alone: the control with an empty text, for an
        encoder that has a soft prompt (`reads_empty_text`).

        Raises:
            DataError: an explanation lacks the current token or the position that the encoder was trained with.
            CheckpointError: an output is not finite.
        """
        # 1. Run each distinct explanation once.
        inputs = [(e.token_ids, self._current_token(e)) for e in explanations]
        row_of = {row: i for i, row in enumerate(dict.fromkeys(inputs))}
        rows = list(row_of)
        out = torch.empty(len(rows), self.d_model)
        for batch in _batches(rows, batch_size):
            out[batch] = memory.run_in_halves(self._forward, [rows[i] for i in batch], self.model.device)
        if not torch.isfinite(out).all():
            raise CheckpointError(
                f"the encoder in {self.info.path} gives NaN or infinite values in {self.model.dtype}. Use "
                "autoencoder.dtype=bfloat16 or float32."
            )
        # 2. Return one vector for every explanation, with its position embedding added.
        vectors = out[[row_of[row] for row in inputs]]
        if self._parts.positions is None or not len(vectors):
            return vectors
        return vectors + self._position_rows(explanations)

    def reconstruct_tokens(
        self,
        token_ids: Int[torch.Tensor, "explanation token"],
        current_token_ids: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
        batch_size: int = 64,
    ) -> Float[torch.Tensor, "explanation d_model"]:
        """Return `reconstruct` of explanations given as token ids alone, all of one length."""
        n = len(token_ids)
        current: Sequence[int | None] = [None] * n if current_token_ids is None else current_token_ids
        indices: Sequence[int | None] = [None] * n if positions is None else positions
        rows = zip(token_ids.tolist(), current, indices, strict=True)
        explanations = [Explanation("", tuple(tokens), token, position) for tokens, token, position in rows]
        return self.reconstruct(explanations, batch_size)

    def embed(self, token_ids: Int[torch.Tensor, "explanation token"]) -> Float[torch.Tensor, "explanation token d_model"]:
        """Return the embeddings of explanations that the encoder's first block reads, without GPT-2's position embeddings.

        They come from the decoder's base, even if training changed the encoder's.
        """
        return nn.functional.embedding(token_ids.to(self.model.device), self._parts.table) * self._scale

    def _current_token(self, explanation: Explanation) -> int | None:
        if not self.info.encoder.adds_current_token or (explanation.current_token_id is None and not explanation.token_ids):
            return None
        if explanation.current_token_id is None:
            raise DataError(
                f"the encoder in {self.info.path} reads the token that an activation was taken at, and an explanation came "
                "without it: extract the activations from text, which provides it"
            )
        return explanation.current_token_id

    def _position_rows(self, explanations: Sequence[Explanation]) -> Float[torch.Tensor, "explanation d_model"]:
        assert self._parts.positions is not None
        if not any(e.token_ids for e in explanations):  # the control with an empty text has no activation
            return torch.zeros(len(explanations), self.d_model)
        who = f"the encoder in {self.info.path}"
        return position_rows(self._parts.positions, [e.position for e in explanations], len(explanations), who).cpu()

    @torch.inference_mode()
    def _forward(self, rows: Sequence[tuple[tuple[int, ...], int | None]]) -> Float[torch.Tensor, "row d_model"]:
        """Return the reconstructions of one batch: explanations of one length, all with or all without a current token.

        The soft prompt runs once and is reused as a KV cache.
        """
        sequence, prompt = self._sequence(rows), len(self._parts.soft_prompt)
        prefix = self._soft_prompt_past() if prompt < sequence.shape[1] else None
        rest = sequence if prefix is None else sequence[:, prompt:]
        hidden = self._hidden(rest, expand_prefix(prefix, len(rows)))[:, -1].float().to(self.model.device)
        if self._parts.weight is not None:
            hidden = nn.functional.linear(hidden, self._parts.weight, self._parts.bias)
        return hidden.cpu()

    def _sequence(self, rows: Sequence[tuple[tuple[int, ...], int | None]]) -> Float[torch.Tensor, "row token d_model"]:
        """Return the embeddings that the first block reads, including the special vector."""
        n, parts = len(rows), self._parts
        text = self.embed(torch.tensor([tokens for tokens, _ in rows], dtype=torch.long).reshape(n, -1))
        pieces = [
            (self._own_scale * parts.soft_prompt).expand(n, -1, -1),
            text,
            (self._own_scale * parts.postfix).expand(n, -1, -1),
        ]
        if rows[0][1] is not None:
            current = torch.tensor([[token] for _, token in rows], device=text.device)
            pieces.append(self._own_scale * nn.functional.embedding(current, self.model.get_input_embeddings().weight))
        sequence = torch.cat(pieces, dim=1)
        if parts.special is not None:
            sequence[:, -1] += self._own_scale * parts.special
        return sequence

    def _soft_prompt_past(self) -> Any | None:
        """Return the KV cache of the soft prompt, one row; None without a soft prompt or if no block runs."""
        if self._past is None and len(self._parts.soft_prompt) and not self._block[1]:
            self._past = DynamicCache(config=self._decoder.config)
            self._hidden(self._own_scale * self._parts.soft_prompt[None], self._past)
        return self._past

    def _hidden(
        self, sequence: Float[torch.Tensor, "row token d_model"], past: Any | None = None
    ) -> Float[torch.Tensor, "row token d_model"]:
        """Return the output of the read-out block (or the input of the first) after `past`; blocks above it do not run."""
        block, reads_input = self._block
        read_out: list[torch.Tensor] = []

        def read(value: Any) -> None:
            read_out.append(value[0] if isinstance(value, tuple) else value)
            raise _ReadOutReached

        if reads_input:
            handle = block.register_forward_pre_hook(
                lambda _module, args, kwargs: read(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
        else:
            handle = block.register_forward_hook(lambda _module, _args, output: read(output))
        try:
            self._decoder(inputs_embeds=sequence, past_key_values=past, use_cache=past is not None)
        except _ReadOutReached:
            pass
        finally:
            handle.remove()
        assert read_out, "the forward pass ended without reaching the block"
        return read_out[0]


def text_prompt(info: TaeInfo, tokenizer: Any) -> TextPrompt:
    """Return the tokens of the words that the encoder's prompt was initialised with, without special tokens.

    Raises:
        CheckpointError: the file does not state the words, or they leave too few positions for the explanation.
    """
    sides = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else () for text in soft_prompt_sides(info)]
    learned = info.encoder.soft_prompt + info.encoder.postfix
    needed = info.encoder.num_around - learned + sum(map(len, sides)) + info.num_tokens
    available = info.model_config.get("max_position_embeddings")
    if info.model_config.get("model_type") == "gpt2" and isinstance(available, int) and needed > available:
        raise CheckpointError(
            f"{info.path}: with the words of soft_prompt_init_text ({sum(map(len, sides))} tokens) around it an explanation "
            f"needs {needed} positions, but the base has {available}. Use autoencoder.encoder_prompt=learned."
        )
    return sides[0], sides[1]


class _ReadOutReached(Exception):
    """Ends a forward pass once the read-out block has run."""


@dataclass(frozen=True)
class _Parts:
    """The encoder's own tensors on its model's device: embeddings in the model's dtype, tensors after the read-out in float32."""

    table: Float[torch.Tensor, "token d_model"]
    """Token embeddings of the decoder's base."""
    soft_prompt: Float[torch.Tensor, "soft_prompt d_model"]
    postfix: Float[torch.Tensor, "postfix d_model"]
    special: Float[torch.Tensor, " d_model"] | None
    weight: Float[torch.Tensor, "d_model d_model"] | None
    bias: Float[torch.Tensor, " d_model"] | None
    positions: Float[torch.Tensor, "position d_model"] | None


def _parts(info: TaeInfo, model: Any, table: torch.Tensor | None, prompt: TextPrompt | None) -> _Parts:
    state = {name: tensor for name, tensor in info.states["encoder"].items() if not name.startswith(BASE)}
    check_contents(state, "encoder", info.path)

    def part(name: str, dtype: torch.dtype) -> torch.Tensor | None:
        return state[name].to(device=model.device, dtype=dtype) if name in state else None

    own = model.get_input_embeddings().weight
    if prompt is None:
        learned = [part(name, model.dtype) for name in ("soft_prompt_embeddings", "soft_prompt_embeddings_postfix")]
        soft_prompt, postfix = (own.new_empty(0, info.d_model) if side is None else side for side in learned)
    else:
        soft_prompt, postfix = (own[torch.tensor(side, dtype=torch.long, device=own.device)] for side in prompt)
    return _Parts(
        table=own if table is None else table.to(device=model.device, dtype=model.dtype),
        soft_prompt=soft_prompt,
        postfix=postfix,
        special=part("special_last_token_vector", model.dtype),
        weight=part("proj.weight", torch.float32),
        bias=part("proj.bias", torch.float32),
        positions=part("activation_pos_embedder.weight", torch.float32),
    )


def _untrained(state: Mapping[str, torch.Tensor], info: TaeInfo) -> Iterator[Note]:
    if "proj.weight" in state and is_identity(state["proj.weight"]):
        yield Note("checkpoint", f"The encoder's projection in {info.path} is still the identity that training starts from.")
    if "special_last_token_vector" in state and not state["special_last_token_vector"].any():
        yield Note("checkpoint", f"The encoder's special vector in {info.path} is still the zero that training starts from.")


def _read_out(blocks: nn.ModuleList, output_layer: int) -> tuple[nn.Module, bool]:
    """Return the block to read, and whether its input is read instead of its output."""
    return blocks[max(output_layer, -1) if output_layer != BEFORE_BLOCKS else 0], output_layer == BEFORE_BLOCKS


def _batches(rows: Sequence[tuple[tuple[int, ...], int | None]], batch_size: int) -> Iterator[list[int]]:
    """Yield batches of row indices with tokens of one length, so that no row is padded."""
    groups: dict[tuple[int, bool], list[int]] = {}
    for i, (tokens, current) in enumerate(rows):
        groups.setdefault((len(tokens), current is None), []).append(i)
    for group in groups.values():
        yield from (group[start : start + batch_size] for start in range(0, len(group), batch_size))
