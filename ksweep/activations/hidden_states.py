"""Compute residual-stream vectors of a base model over text: the output of block L. No block above L runs.

    hidden_states[L + 1] of transformers = output of block L (0-based), before the final norm.

Public NLA data are made this way (stage0_extract.py: hook on layers[L], raw text, special tokens added, right padding, right
truncation).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ksweep.activations.base_model import BaseModel
from ksweep.activations.chat_roles import SpokenTokens, detect_template, spoken_tokens
from ksweep.activations.lower_blocks import load_decoder, load_model_tokenizer
from ksweep.activations.source import STORED_DTYPES, WINDOW_CHARACTERS
from ksweep.inference import memory
from ksweep.inference.batching import length_batches
from ksweep.inference.device_map import Devices, as_devices, place_model
from ksweep.inference.model_parts import blocks_of
from ksweep.utils.bos_token import count_put_behind, document_bos, one_bos, puts_bos
from ksweep.utils.errors import CheckpointError
from ksweep.utils.hub import resolve

EXTRACTION_BATCH_TOKENS = 16_384
"""Padded tokens in a forward pass. Another value batches rows differently, which changes the last bits of the vectors: raise
EXTRACTOR_VERSION with it."""

WINDOW_TOKENS = 100
"""Tokens decoded for a window: any tokenizer gives more than two characters per token on prose."""


class _StopAfterLayer(Exception):
    """Raised by the hook on block L to end the forward pass there."""


class BlockReader:
    """The lower part of a causal language model, up to the output of block `layer`."""

    def __init__(self, model: str | BaseModel, layer: int, dtype: str = "bfloat16", device: Devices = "cpu") -> None:
        """Load embeddings and blocks 0..layer, or the whole backbone of an architecture that cannot be cut, and its adapter.

        Raises:
            RequestError: the layer does not exist.
            CheckpointError: the model does not exist, or lacks weights.
        """
        files = model if isinstance(model, BaseModel) else BaseModel(resolve(model, "base model"))
        self.path = files.weights
        self.layer = layer
        self.dtype = dtype
        devices = as_devices(device)
        self.device, self.spread = devices[0], len(devices) > 1
        self.tokenizer = load_model_tokenizer(files.tokenizer)
        decoder = load_decoder(files, layer, getattr(torch, dtype), devices)
        self.decoder = place_model(decoder.eval().requires_grad_(False), devices)
        self.block = blocks_of(self.decoder)[layer]
        self.special_ids = frozenset(self.tokenizer.all_special_ids)
        self.pad_id: int | None = self.tokenizer.pad_token_id
        # Pretokenised rows are padded with EOS if the tokenizer has no padding token (pretokenize_dataset.py of the reference).
        self.filler_id: int | None = self.tokenizer.eos_token_id if self.pad_id is None else self.pad_id
        self.template = detect_template(self.tokenizer.get_vocab())
        self.puts_bos = puts_bos(self.tokenizer)
        self.document_bos = document_bos(self.tokenizer)
        self.num_behind = count_put_behind(self.tokenizer)

    def tokenize(self, texts: Sequence[str], max_length: int, *, are_chats: bool = False) -> list[list[int]]:
        """Return token ids with the model's own special tokens (Gemma, Llama: BOS), cut on the right.

        A text that already begins with BOS, as chat templates write it, gets no second BOS. If the tokenizer adds none, the text
        is tokenized unchanged.

        Args:
            are_chats: the texts are what the chat template wrote, behind which nothing is put.
        """
        if not texts:
            return []
        if are_chats and self.num_behind:
            return [ids[: -self.num_behind] for ids in self.tokenize(texts, max_length + self.num_behind)]
        alone = [one_bos(text, self.tokenizer) if self.puts_bos and self.text_begins_with_bos(text) else text for text in texts]
        encoded = self.tokenizer(alone, add_special_tokens=True, truncation=True, max_length=max_length)
        rows = [list(ids) for ids in encoded["input_ids"]]
        twice = [self.tokenizer.bos_token_id] * 2
        for i, ids in enumerate(rows):
            if self.puts_bos and ids[:2] == twice:
                whole = self.tokenizer(alone[i], add_special_tokens=True, truncation=True, max_length=max_length + 1)
                rows[i] = list(whole["input_ids"][1:])
        return rows

    def text_begins_with_bos(self, text: str) -> bool:
        """Return whether a text already begins with the BOS that documents of this model begin with."""
        return self.document_bos is not None and text.lstrip().startswith(self.tokenizer.bos_token)

    def begins_with_bos(self, token_ids: Sequence[int]) -> bool:
        """Return whether token ids begin with the BOS that documents of this model begin with."""
        return self.document_bos is not None and list(token_ids[:1]) == [self.document_bos]

    @torch.inference_mode()
    def outputs(self, token_ids: Sequence[Sequence[int]], pad_id: int | None = None) -> torch.Tensor:
        """Return the block output of rows, [row, token, d_model], in the compute dtype on the block's device. Padded entries are
        meaningless.

        Without `pad_id` there is no attention mask: a causal model cannot see padding on the right of a token, and without a mask
        the fast kernels apply.

        Args:
            pad_id: tokens of this id are masked wherever they stand. No position ids are passed, as in the reference: tokens keep
                their indices, so a model with absolute positions sees left padding as a shift.
        """
        ids = torch.zeros(len(token_ids), max(map(len, token_ids)), dtype=torch.long)
        filled = torch.zeros_like(ids, dtype=torch.bool)
        for row, row_ids in enumerate(token_ids):
            ids[row, : len(row_ids)] = torch.tensor(row_ids)
            filled[row, : len(row_ids)] = True
        mask = None if pad_id is None else (filled & (ids != pad_id)).long().to(self.device)
        taken: list[torch.Tensor] = []

        def take(module: nn.Module, inputs: Any, output: Any) -> None:
            taken.append(output[0] if isinstance(output, tuple) else output)
            raise _StopAfterLayer

        hook = self.block.register_forward_hook(take)
        try:
            self.decoder(input_ids=ids.to(self.device), attention_mask=mask, use_cache=False)
        except _StopAfterLayer:
            pass
        finally:
            hook.remove()
        assert taken, "the forward pass ended without reaching the block"
        if taken[0].ndim != 3:
            raise CheckpointError(
                f"block {self.layer} of base model {self.path} puts out numbers of shape {list(taken[0].shape)}, expected [row, "
                f"token, d_model]: a {type(self.decoder).__name__} keeps no single residual stream. Use another "
                "base model."
            )
        return taken[0].to(getattr(torch, self.dtype))

    def vectors(
        self, token_ids: Sequence[Sequence[int]], positions: Sequence[Sequence[int]], pad_id: int | None = None
    ) -> np.ndarray:
        """Return the vectors at positions[i] of row i, row after row: [activation, d_model] in the stored dtype."""
        return self.begin(token_ids, positions, pad_id)()

    def begin(
        self, token_ids: Sequence[Sequence[int]], positions: Sequence[Sequence[int]], pad_id: int | None = None
    ) -> Callable[[], np.ndarray]:
        """Start `vectors` and return a function that waits for the result. A GPU computes a batch while it copies the one before.

        A batch that does not fit in memory runs in halves.
        """
        # 1. Cut each row behind its last position: a causal model cannot see further.
        needed = [list(ids[: max(p) + 1]) if p else [] for ids, p in zip(token_ids, positions, strict=True)]
        padded = [pad_id is not None and pad_id in ids for ids in needed]
        # 2. Run rows in batches of similar length, rows with padding apart: the others need no mask.
        copies: list[tuple[list[int], torch.Tensor, torch.device]] = []
        for masked in (False, True):
            lengths = [len(ids) if has == masked else 0 for ids, has in zip(needed, padded, strict=True)]
            for batch in length_batches(lengths, EXTRACTION_BATCH_TOKENS):
                run = partial(self._taken, pad_id=pad_id if masked else None)
                taken = memory.run_in_halves(run, [(needed[i], positions[i]) for i in batch], self.device)
                copies.append((batch, _async_copy(taken), taken.device))
        first = np.cumsum([0, *map(len, positions)])

        # 3. When the result is asked for: wait for the copies, and put the rows back in order.
        def finish() -> np.ndarray:
            vectors = np.empty((int(first[-1]), self.d_model), dtype=STORED_DTYPES[self.dtype])
            for device in {device for _, _, device in copies if device.type == "cuda"}:
                torch.cuda.synchronize(device)
            for batch, copy, _ in copies:
                vectors[np.concatenate([np.arange(first[i], first[i + 1]) for i in batch])] = _stored(copy)
            return vectors

        return finish

    def _taken(self, rows: Sequence[tuple[list[int], Sequence[int]]], pad_id: int | None) -> torch.Tensor:
        """Return the vectors of rows that fit in memory together, [activation, d_model], on the device of the block."""
        places = [(row, position) for row, (_, taken) in enumerate(rows) for position in taken]
        # Before the forward pass: a copy to a GPU waits for all that the GPU was given before it.
        row, position = torch.tensor(places, device=next(self.block.parameters()).device).unbind(1)
        return self.outputs([ids for ids, _ in rows], pad_id)[row, position]

    @property
    def num_embeddings(self) -> int:
        """Number of token embeddings, often a few more than the tokenizer has tokens."""
        return int(self.decoder.get_input_embeddings().num_embeddings)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.decoder.config.get_text_config().hidden_size)

    def close(self) -> None:
        """Free the memory of the model: the verbalizer needs it next."""
        del self.decoder, self.block
        if self.spread:
            gc.collect()  # spread models refer to themselves in cycles; others are freed already, and a collection takes 0.25 s
        memory.release_cached_memory(self.device)

    def spoken(self, token_ids: Sequence[int], pad_id: int | None = None) -> SpokenTokens | None:
        """Return who says each token of a row; None if the tokenizer has no tokens of a known chat template."""
        if self.template is None:
            return None
        # There can be more embeddings than tokens; an id without a token has no name.
        tokens = [token or "" for token in self.tokenizer.convert_ids_to_tokens(list(token_ids))]
        pad = None if pad_id is None else self.tokenizer.convert_ids_to_tokens(pad_id)
        return spoken_tokens(tokens, self.template, special=self.tokenizer.all_special_tokens, pad=pad)

    def window(self, token_ids: Sequence[int], position: int) -> str:
        """Return the end of the text up to and including a position, for display."""
        tail = self.tokenizer.decode(token_ids[max(0, position + 1 - WINDOW_TOKENS) : position + 1], skip_special_tokens=True)
        # Decoding may start in the middle of a character.
        return str(tail).lstrip("\N{REPLACEMENT CHARACTER}")[-WINDOW_CHARACTERS:]


def _async_copy(vectors: torch.Tensor) -> torch.Tensor:
    """Return a copy on the host. From a GPU it arrives later: synchronise before reading it."""
    if vectors.device.type != "cuda":
        return vectors.cpu()
    return torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True).copy_(vectors, non_blocking=True)


def _stored(host: torch.Tensor) -> np.ndarray:
    """Return vectors as a NumPy array in the stored dtype, bit for bit."""
    return host.view(torch.int16).numpy().view(np.uint16) if host.dtype == torch.bfloat16 else host.numpy()
