"""NLA pairs: an AV that reads a vector from one row of its prompt, and an AR that maps a text to a vector.

    av = load_nla_verbalizer("kitft/nla-qwen2.5-7b-L20-av", device="cuda")
    ar = load_nla_reconstructor("kitft/nla-qwen2.5-7b-L20-ar", device="cuda")

Both follow the public code (kitft/natural_language_autoencoders), but raise CheckpointError where that code continues silently
with broken weights or prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ksweep.autoencoder.injection import check_vectors, injected
from ksweep.autoencoder.nla.checkpoint import CheckpointInfo, inspect_nla
from ksweep.autoencoder.nla.loading import (
    load_ar_head,
    load_ar_model,
    load_av_model,
    load_embeddings,
    load_layer_mean,
    load_nla_tokenizer,
)
from ksweep.autoencoder.nla.plain_weights import plain_directory
from ksweep.autoencoder.nla.prompts import ArPrompts, AvPrompt, av_prompt, check_embedded, parse_explanation, stop_token_ids
from ksweep.autoencoder.nla.sidecar import NlaRole
from ksweep.autoencoder.prompting import AddAfterBlock, ArPrompting, AvPrompting
from ksweep.inference import memory
from ksweep.inference.batching import length_batches
from ksweep.inference.device_map import Devices, as_devices
from ksweep.inference.kv_cache import expand_prefix, keeps_keys_and_values
from ksweep.inference.prefill import prefill
from ksweep.inference.prompts import ModelFiles, Prompts
from ksweep.inference.transformers_models import torch_dtype
from ksweep.utils.errors import CheckpointError

if TYPE_CHECKING:
    from jaxtyping import Float

    from ksweep.autoencoder.base import Explanation, ParseOutcome
    from ksweep.inference.prompts import FinishReason

AR_BATCH_TOKENS = 16_384
"""Largest number of tokens in an AR's batch, with padding and without the template's tokens before the text."""

LEAST_LOGIT_CHANGE = 1e-4
"""Smallest change of the logits between opposite vectors, as a share of the largest logit; the fixtures' AVs change by half."""


def load_nla_verbalizer(
    checkpoint: CheckpointInfo | Path | str,
    *,
    base: str | None = None,
    dtype: str = "bfloat16",
    device: Devices = "cpu",
) -> NlaVerbalizer:
    """Load an AV and run every check that needs no vectors.

    Args:
        checkpoint: what `inspect_nla` returned, a directory, or a hub id.
        base: base model of an adapter; see `inspect_nla`.
        dtype: compute precision, "bfloat16", "float16" or "float32"; weights are converted to it.
        device: one device, or several that its blocks are spread over.

    Raises:
        CheckpointError: the message says in one paragraph what is wrong.
    """
    info = _inspected(checkpoint, "av", base)
    tokenizer = load_nla_tokenizer(info)
    prompt, stops = av_prompt(info, tokenizer), stop_token_ids(info, tokenizer)
    model = load_av_model(info, torch_dtype(dtype), as_devices(device))
    return NlaVerbalizer(info, info.av_prompting, model, tokenizer, prompt, stops)


def load_nla_prompter(info: CheckpointInfo, *, dtype: str, devices: Sequence[str]) -> NlaVerbalizer:
    """Load the part of an AV that makes prompts and reads texts, for an engine that loads its blocks from `files`.

    Raises:
        CheckpointError, DiskFullError: as `load_nla_verbalizer`; there is no room for a merged copy of its weights.
    """
    tokenizer = load_nla_tokenizer(info)
    prompt, stops = av_prompt(info, tokenizer), stop_token_ids(info, tokenizer)
    files = ModelFiles(plain_directory(info, dtype), dtype, tuple(devices))
    embeddings = load_embeddings(files.directory, torch_dtype(dtype))
    return NlaVerbalizer(info, info.av_prompting, None, tokenizer, prompt, stops, embeddings=embeddings, files=files)


def load_nla_reconstructor(
    checkpoint: CheckpointInfo | Path | str,
    *,
    base: str | None = None,
    dtype: str = "bfloat16",
    device: Devices = "cpu",
) -> NlaReconstructor:
    """Load an AR; arguments and errors as for `load_nla_verbalizer`."""
    info = _inspected(checkpoint, "ar", base)
    tokenizer = load_nla_tokenizer(info)
    devices = as_devices(device)
    head = load_ar_head(info, torch_dtype(dtype), devices[0])
    model = load_ar_model(info, torch_dtype(dtype), devices)
    prompts = ArPrompts(info, tokenizer, model.get_input_embeddings().num_embeddings)
    return NlaReconstructor(info, info.ar_prompting, model, head, prompts, load_layer_mean(info))


class NlaVerbalizer:
    """An AV, which maps vectors to texts. Implements `base.Verbalizer`."""

    def __init__(
        self,
        info: CheckpointInfo,
        prompting: AvPrompting,
        model: Any,
        tokenizer: Any,
        prompt: AvPrompt,
        stops: frozenset[int],
        *,
        embeddings: Any = None,
        files: ModelFiles | None = None,
    ) -> None:
        """Combine the parts that are loaded: `model`, or its `embeddings` and `files` for an engine that loads the rest.

        Raises:
            CheckpointError: the prompt has a token without embedding.
        """
        embeddings = model.get_input_embeddings() if embeddings is None else embeddings
        check_embedded(info, prompt, embeddings.num_embeddings)
        self.info = info
        self.prompting = prompting
        self.model = model
        self.files = files
        self.embeddings = embeddings
        self.tokenizer = tokenizer
        self.d_model = info.d_model
        self.prompt_ids = prompt.ids
        self.injection_position = prompt.position
        self.stop_token_ids = stops
        self.prompt_length = len(prompt.ids)
        self.edits_blocks = isinstance(prompting.injection, AddAfterBlock)
        self._checked = False

    def inputs(
        self, vectors: Float[torch.Tensor, "activation d_model"], positions: Sequence[int | None]
    ) -> Float[torch.Tensor, "activation d_model"]:
        """Return the activations unchanged."""
        return vectors

    def prompts(self, vectors: Float[torch.Tensor, "activation d_model"]) -> Prompts:
        """Return the prompt with each vector injected; the first call also runs the differential check.

        Without `model` the engine that loads `files` has to run that check.

        Raises:
            DataError: a vector is not finite, all zero, or of another width.
            CheckpointError: the AV does not read its vector.
        """
        check_vectors(vectors, self.d_model)
        if len(vectors) and self.model is not None and not self._checked:
            self.differential_check(vectors[0])
            self._checked = True
        return self._prompts(vectors)

    def differential_check(self, vector: Float[torch.Tensor, " d_model"]) -> None:
        """Check that opposite vectors give different logits, and the same vector twice equal ones.

        Raises:
            CheckpointError: the AV ignores the injected vector, is not deterministic, or overflows in its dtype.
        """
        logits = prefill(self.model, self._prompts(torch.stack([vector, vector, -vector]))).logits
        if not torch.isfinite(logits).all():
            raise CheckpointError(
                f"AV {self.info.path} gives NaN or infinite logits in {self.model.dtype}. Use autoencoder.dtype=bfloat16 or "
                "float32 (float16 overflows on Gemma)."
            )
        same, opposite = ((logits[0] - logits[i]).abs().max().item() for i in (1, 2))
        if opposite <= LEAST_LOGIT_CHANGE * logits.abs().max().item() or opposite <= 10 * same:
            raise CheckpointError(
                f"AV {self.info.path} does not read its vector: opposite vectors change the next-token logits by "
                f"{opposite:.2g}, the same vector twice by {same:.2g}. "
                "Its weights may be damaged, or it may be an AV of a layout that injects vectors at another position or in "
                "another way."
            )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of sampled tokens up to the first stop token, with special tokens if the layout keeps them."""
        end = next((i for i, token in enumerate(token_ids) if token in self.stop_token_ids), len(token_ids))
        text: str = self.tokenizer.decode(
            list(token_ids[:end]), skip_special_tokens=self.prompting.skips_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def parse(self, text: str, finish: FinishReason) -> tuple[str | None, ParseOutcome]:
        """Return the explanation in a sampled text and "ok", or None and the failure; see `prompts.parse_explanation`.

        The text has neither the answer's beginning in the prompt nor the stop token, which may be the closing tag.
        """
        prompting = self.prompting
        ended = prompting.closing_tag if finish == "stop" and prompting.closing_tag in (prompting.stop_tokens or ()) else ""
        return parse_explanation(prompting.prefill + text + ended, finish, prompting)

    @torch.inference_mode()
    def _prompts(self, vectors: Float[torch.Tensor, "activation d_model"]) -> Prompts:
        ids = torch.tensor([self.prompt_ids], device=self.embeddings.weight.device)
        embeddings = self.embeddings(ids).repeat(len(vectors), 1, 1)
        return injected(self.prompting.injection, self.model, embeddings, vectors, self.injection_position)


class NlaReconstructor:
    """An AR, which maps texts to vectors. Implements `base.Reconstructor`."""

    reads_empty_text = True
    """True, because the template's tokens surround even an empty text."""

    def __init__(
        self,
        info: CheckpointInfo,
        prompting: ArPrompting,
        model: Any,
        head: torch.nn.Linear | None,
        prompts: ArPrompts,
        mean: torch.Tensor | None = None,
    ) -> None:
        """Combine the parts that `load_nla_reconstructor` loads."""
        self.info = info
        self.prompting = prompting
        self.model = model
        self.head = head
        self.mean = mean
        """[d_model] what is added to its output; None for an AR that gives whole vectors."""
        self.prompts = prompts
        self.d_model = info.d_model
        self._past: Any | None = None
        self._shares_template = True

    def reconstruct(
        self, explanations: Sequence[Explanation], batch_size: int = 64
    ) -> Float[torch.Tensor, "explanation d_model"]:
        """Return `reconstruct_texts` of the explanations' texts."""
        return self.reconstruct_texts([explanation.text for explanation in explanations], batch_size)

    def reconstruct_texts(self, texts: Sequence[str], batch_size: int = 64) -> Float[torch.Tensor, "text d_model"]:
        """Return raw (not normalised) float32 reconstructions on the CPU, in the order of `texts`; identical texts run once.

        Texts are inserted verbatim, so they must be parsed and stripped already. The template's tokens before the text run once.
        Texts of similar length share a batch of at most `batch_size`, which changes a vector by rounding alone.

        Raises:
            DataError: a text is too long for the AR.
            CheckpointError: a prompt does not end as in the AR's training, or an output is not finite.
        """
        # 1. Tokenize each distinct text.
        row_of = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        ids = self.prompts.ids(list(row_of))
        # 2. Run the prompts that begin with the template's tokens behind their KV cache, and the others whole.
        out = torch.empty(len(ids), self.d_model)
        for rows, prefix in self._groups(ids):
            num_cached = 0 if prefix is None else len(self.prompts.common)
            suffixes = [ids[i][num_cached:] for i in rows]
            for batch in length_batches(list(map(len, suffixes)), AR_BATCH_TOKENS, batch_size):
                forward = partial(self._forward, prefix=prefix, num_cached=num_cached)
                vectors = memory.run_in_halves(forward, [ids[rows[i]] for i in batch], self.model.device)
                out[[rows[i] for i in batch]] = vectors
        # 3. Check the vectors, and return one for every text.
        if not torch.isfinite(out).all():
            broken = list(row_of)[int((~torch.isfinite(out).all(dim=1)).nonzero()[0, 0])]
            raise CheckpointError(
                f"AR {self.info.path} gives NaN or infinite values for {broken[:60]!r} in {self.model.dtype}. Use "
                "autoencoder.dtype=bfloat16 or float32."
            )
        return out[[row_of[text] for text in texts]]

    def _groups(self, ids: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Any | None]]:
        """Yield the prompts that begin with the template's tokens, with their KV cache; then the others, with None."""
        common = list(self.prompts.common) if self._template() is not None else []
        begins_with_template = [bool(common) and list(row[: len(common)]) == common for row in ids]
        for shared in (True, False):
            if group := [i for i, begins in enumerate(begins_with_template) if begins is shared]:
                yield group, self._template() if shared else None

    @torch.inference_mode()
    def _template(self) -> Any | None:
        """Return the KV cache of the template's tokens before the text, one row.

        None if there are no such tokens, or the model keeps its past in another way than keys and values.
        """
        if self._past is None and self.prompts.common and self._shares_template:
            ids = torch.tensor([self.prompts.common], device=self.model.device)
            past = getattr(self.model(input_ids=ids, use_cache=True), "past_key_values", None)
            self._shares_template = keeps_keys_and_values(past)
            self._past = past if self._shares_template else None
        return self._past

    @torch.inference_mode()
    def _forward(
        self, prompts: Sequence[Sequence[int]], prefix: Any | None, num_cached: int
    ) -> Float[torch.Tensor, "text d_model"]:
        """Return the reconstructions of whole prompts, whose first `num_cached` tokens are in `prefix`."""
        rows, device = [row[num_cached:] for row in prompts], self.model.device
        width = max(map(len, rows))
        # No mask is needed: padding is at the end, and tokens of a causal model do not attend to later ones.
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
        past = expand_prefix(prefix, len(rows))
        hidden = self.model(input_ids=ids, past_key_values=past, use_cache=past is not None).last_hidden_state
        ends = torch.tensor([self.prompts.read_position(row) - num_cached for row in prompts], device=hidden.device)
        return self._read(hidden[torch.arange(len(rows), device=hidden.device), ends])

    def _read(self, hidden: Float[torch.Tensor, "text d_model"]) -> Float[torch.Tensor, "text d_model"]:
        """Return reconstructions of hidden states, float32 on the CPU."""
        if self.prompting.normalises:
            hidden = hidden.to(self.head.weight.dtype if self.head is not None else hidden.dtype)
            norms = torch.linalg.vector_norm(hidden, dim=1, keepdim=True).clamp_min(1e-12)
            hidden = hidden * (self.d_model**0.5 / norms)
        out = hidden if self.head is None else self.head(hidden)
        out = out.float().cpu()
        return out if self.mean is None else out + self.mean


def _inspected(checkpoint: CheckpointInfo | Path | str, role: NlaRole, base: str | None) -> CheckpointInfo:
    if not isinstance(checkpoint, CheckpointInfo):
        return inspect_nla(checkpoint, role, base)
    if checkpoint.role != role:
        raise CheckpointError(
            f"{checkpoint.path} is an {checkpoint.role.upper()} checkpoint; expected the {role.upper()}. Pass it as "
            f"`{checkpoint.role}`."
        )
    return checkpoint
