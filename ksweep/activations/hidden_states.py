"""Base model + text -> residual-stream vectors. The output of block L is what is taken; nothing above block L runs.

    hidden_states[L + 1] of transformers = output of block L (0-based), before the final norm.

Public NLA data were made this way (stage0_extract.py: hook on layers[L], raw text, special tokens added, right padding, right
truncation).
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ksweep.activations.chat_roles import TokenRole, detect_template, token_roles
from ksweep.activations.model_config import cut_to_blocks, text_config
from ksweep.activations.source import STORED_DTYPES, WINDOW_CHARACTERS
from ksweep.inference import memory
from ksweep.inference.batching import length_batches
from ksweep.inference.device_map import Devices, as_devices, placed
from ksweep.utils.bos_token import document_bos, one_bos, puts_bos
from ksweep.utils.errors import CheckpointError, RequestError
from ksweep.utils.hub import MODEL_LOADING, resolve

EXTRACTION_BATCH_TOKENS = 16_384
"""Padded tokens in one forward pass. Changing it changes which rows share a batch, so the last bits: raise EXTRACTOR_VERSION."""

WINDOW_TOKENS = 100
"""Tokens decoded for a window: two characters a token is less than any tokenizer gives on prose."""

BLOCK_LISTS = ("layers", "h", "blocks", "block", "decoder.layers", "transformer.h", "transformer.blocks")
"""Where a decoder keeps its blocks: Llama, Qwen, Gemma, Mistral | GPT-2, Falcon, BLOOM | MPT, DBRX | RWKV | OPT | others."""


class _StopAfterLayer(Exception):
    """Block L has run: the rest of the forward pass is not needed."""


class BlockReader:
    """The lower part of a causal language model, up to the output of block `layer`."""

    def __init__(self, model: str, layer: int, dtype: str = "bfloat16", device: Devices = "cpu") -> None:
        """Load what is needed: embeddings and blocks 0..layer where the architecture can be cut, the whole backbone otherwise.

        Raises:
            RequestError: no such layer. CheckpointError: no such model, or one whose weights are not all there.
        """
        self.path = resolve(model, "base model")
        self.layer = layer
        self.dtype = dtype
        devices = as_devices(device)
        self.device, self.spread = devices[0], len(devices) > 1
        self.tokenizer = _load_tokenizer(self.path)
        backbone = _load_backbone(self.path, layer, getattr(torch, dtype))
        decoder = backbone.get_decoder() if hasattr(backbone, "get_decoder") else backbone
        self.decoder = placed(decoder.eval().requires_grad_(False), devices)
        self.block = _blocks(self.decoder, self.path, layer)[layer]
        self.special_ids = frozenset(self.tokenizer.all_special_ids)
        self.pad_id: int | None = self.tokenizer.pad_token_id
        # Pretokenised rows are padded with EOS where the tokenizer has nothing else (pretokenize_dataset.py of the reference).
        self.filler_id: int | None = self.tokenizer.eos_token_id if self.pad_id is None else self.pad_id
        self.template = detect_template(self.tokenizer.get_vocab())
        self.puts_bos = puts_bos(self.tokenizer)
        self.document_bos = document_bos(self.tokenizer)

    def tokenize(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Token ids with the model's own special tokens (Gemma, Llama: BOS), cut on the right.

        A text that begins with BOS, as chat templates write it, keeps one and gets no second; where the tokenizer puts none, the
        text is taken as it is.
        """
        if not texts:
            return []
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
        """Whether a text itself begins with what documents of this model begin with."""
        return self.document_bos is not None and text.lstrip().startswith(self.tokenizer.bos_token)

    def begins_with_bos(self, token_ids: Sequence[int]) -> bool:
        """The same of token ids."""
        return self.document_bos is not None and list(token_ids[:1]) == [self.document_bos]

    @torch.inference_mode()
    def outputs(self, token_ids: Sequence[Sequence[int]], pad_id: int | None = None) -> torch.Tensor:
        """Block output of rows: [row, token, d_model] in the compute dtype, on the device of the block; padding holds rubbish.

        No attention mask: a causal model cannot see padding on the right of a token, and without a mask the fast kernels apply.

        Args:
            pad_id: nobody sees tokens of this id, wherever they stand. No position ids are passed, as in the reference: a padded
                row keeps its places, and a model of absolute positions sees left padding as a shift.
        """
        ids = torch.zeros(len(token_ids), max(map(len, token_ids)), dtype=torch.long)
        filled = torch.zeros_like(ids, dtype=torch.bool)
        for row, one in enumerate(token_ids):
            ids[row, : len(one)] = torch.tensor(one)
            filled[row, : len(one)] = True
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
        return taken[0].to(getattr(torch, self.dtype))

    def vectors(
        self, token_ids: Sequence[Sequence[int]], positions: Sequence[Sequence[int]], pad_id: int | None = None
    ) -> np.ndarray:
        """Vectors at positions[i] of row i, rows one after the other: [activation, d_model] in the stored dtype."""
        return self.begin(token_ids, positions, pad_id)()

    def begin(
        self, token_ids: Sequence[Sequence[int]], positions: Sequence[Sequence[int]], pad_id: int | None = None
    ) -> Callable[[], np.ndarray]:
        """What `vectors` gives, when it is called; a GPU is at work on it meanwhile, and copies each batch beside the next one.

        Rows end at their last position (a causal model cannot see further) and run in batches of similar length; those with
        padding before that apart from the others, which need no mask. A batch that memory does not suffice for runs in halves.
        """
        needed = [list(ids[: max(p) + 1]) if p else [] for ids, p in zip(token_ids, positions, strict=True)]
        padded = [pad_id is not None and pad_id in ids for ids in needed]
        copies: list[tuple[list[int], torch.Tensor, torch.device]] = []
        for masked in (False, True):
            lengths = [len(ids) if has == masked else 0 for ids, has in zip(needed, padded, strict=True)]
            for batch in length_batches(lengths, EXTRACTION_BATCH_TOKENS):
                run = partial(self._taken, pad_id=pad_id if masked else None)
                taken = memory.in_halves(run, [(needed[i], positions[i]) for i in batch], self.device)
                copies.append((batch, _async_copy(taken), taken.device))
        first = np.cumsum([0, *map(len, positions)])

        def finished() -> np.ndarray:
            found = np.empty((int(first[-1]), self.d_model), dtype=STORED_DTYPES[self.dtype])
            for device in {device for _, _, device in copies if device.type == "cuda"}:
                torch.cuda.synchronize(device)
            for batch, copy, _ in copies:
                found[np.concatenate([np.arange(first[i], first[i + 1]) for i in batch])] = _stored(copy)
            return found

        return finished

    def _taken(self, rows: Sequence[tuple[list[int], Sequence[int]]], pad_id: int | None) -> torch.Tensor:
        """Of rows that fit into memory together: [activation, d_model] where the block is."""
        hidden = self.outputs([ids for ids, _ in rows], pad_id)
        places = [(row, position) for row, (_, taken) in enumerate(rows) for position in taken]
        row, position = torch.tensor(places, device=hidden.device).unbind(1)
        return hidden[row, position]

    @property
    def num_embeddings(self) -> int:
        """Token ids that there is an embedding for: often some more than the tokenizer has."""
        return int(self.decoder.get_input_embeddings().num_embeddings)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.decoder.config.get_text_config().hidden_size)

    def close(self) -> None:
        """Give the memory of the model back: the verbalizer needs it next."""
        del self.decoder, self.block
        if self.spread:
            gc.collect()  # such a model holds itself in cycles; any other is gone by now, and a collection takes 0.25 s
        memory.release(self.device)

    def roles(self, token_ids: Sequence[int], pad_id: int | None = None) -> list[TokenRole] | None:
        """Whose token each is, read off the whole row; None where the tokenizer has no chat template's tokens."""
        if self.template is None:
            return None
        # Embeddings have more rows than the vocabulary has tokens: those beyond have no name.
        tokens = [token or "" for token in self.tokenizer.convert_ids_to_tokens(list(token_ids))]
        pad = None if pad_id is None else self.tokenizer.convert_ids_to_tokens(pad_id)
        return token_roles(tokens, self.template, special=self.tokenizer.all_special_tokens, pad=pad)

    def window(self, token_ids: Sequence[int], position: int) -> str:
        """The end of the text up to and including a position, for showing."""
        tail = self.tokenizer.decode(token_ids[max(0, position + 1 - WINDOW_TOKENS) : position + 1], skip_special_tokens=True)
        # Decoding may start in the middle of a character.
        return str(tail).lstrip("\N{REPLACEMENT CHARACTER}")[-WINDOW_CHARACTERS:]


def _async_copy(vectors: torch.Tensor) -> torch.Tensor:
    """A copy on the host: from a GPU it has yet to arrive, and nobody waits for it here."""
    if vectors.device.type != "cuda":
        return vectors.cpu()
    return torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True).copy_(vectors, non_blocking=True)


def _stored(host: torch.Tensor) -> np.ndarray:
    """Vectors in the stored dtype, bit for bit."""
    return host.view(torch.int16).numpy().view(np.uint16) if host.dtype == torch.bfloat16 else host.numpy()


def _load_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # transformers raises whatever the damaged file happens to cause
        raise CheckpointError(f"base model {path} has no usable tokenizer ({type(error).__name__}: {error})") from error
    # Gemma's is "left" by default; positions are indices from the left.
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def _load_backbone(path: Path, layer: int, dtype: torch.dtype) -> Any:
    """The model without its head, and without the blocks above `layer` where that is easy. No weight in use is random."""
    from transformers import AutoConfig, AutoModel

    text_config(path, layer)
    try:
        config = AutoConfig.from_pretrained(path)
        cut_to_blocks(config.get_text_config(), layer + 1)
        with _quiet_transformers(), MODEL_LOADING:
            model, info = AutoModel.from_pretrained(
                path, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except RequestError:
        raise
    except Exception as error:  # as above
        raise CheckpointError(
            f"base model {path} cannot be loaded ({type(error).__name__}: {str(error)[:500]}): "
            "expected a transformers causal language model with all its weight files"
        ) from error
    _refuse_random_weights(model, info, path)
    return model


def _refuse_random_weights(model: Any, info: Mapping[str, Any], path: Path) -> None:
    """A weight that is not in the file, or has another shape there, was filled at random.

    What is not used may be absent: the final norm, and the vision tower of a multimodal wrapper.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")

    def used(keys: Iterable[str]) -> list[str]:
        inside = [key.removeprefix(prefix).lstrip(".") for key in keys if key.startswith(prefix)]
        return sorted(key for key in inside if not re.match(r"(norm|final_layernorm|final_layer_norm|ln_f)\.", key))

    if missing := used(info["missing_keys"]):
        raise CheckpointError(
            f"base model {path} lacks {len(missing)} weights, among them {', '.join(missing[:3])}: "
            "they would be random. Is a weight file missing, or is this an adapter or a checkpoint of another architecture?"
        )
    if wrong := used(key for key, *_ in info["mismatched_keys"]):
        raise CheckpointError(
            f"base model {path} has {len(wrong)} weights of another shape than config.json says, among them "
            f"{', '.join(wrong[:3])}: do weights and config.json belong together?"
        )


def _blocks(decoder: nn.Module, path: Path, layer: int) -> nn.ModuleList:
    """The list of blocks of a decoder."""
    modules = dict(decoder.named_modules())
    for name in BLOCK_LISTS:
        found = modules.get(name)
        if isinstance(found, nn.ModuleList) and len(found) > layer:
            return found
    lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList)]
    raise CheckpointError(
        f"base model {path} ({type(decoder).__name__}) keeps its blocks in none of {', '.join(BLOCK_LISTS)} "
        f"(its module lists: {', '.join(lists[:5]) or 'none'}): this architecture is not supported yet"
    )


class _quiet_transformers:
    """Without the report on the weights of the blocks that were left out on purpose."""

    def __enter__(self) -> None:
        from transformers.utils import logging as hf_logging

        self.logging, self.verbosity = hf_logging, hf_logging.get_verbosity()
        hf_logging.set_verbosity_error()
        hf_logging.disable_progress_bar()

    def __exit__(self, *exception: object) -> None:
        self.logging.set_verbosity(self.verbosity)
        self.logging.enable_progress_bar()
