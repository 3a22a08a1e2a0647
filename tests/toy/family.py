"""A third checkpoint family, written as a newcomer would: one class, and the models that it loads.

A file NAME.toy names a language model and a layer. The AV writes on behind the vector, which is the model's only input. The AR
takes the mean embedding of a text's words.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ksweep import Autoencoder
from ksweep.autoencoder.base import ActivationFacts, Explanation, Family, ParseOutcome
from ksweep.inference.prompts import FinishReason, Prompts
from ksweep.utils.errors import DataError
from ksweep.utils.hub import content_digest
from ksweep.utils.notes import Note


class ToyFamily(Family):
    """A .toy file."""

    source_field = "autoencoder.checkpoint"

    @staticmethod
    def claims(spec: Autoencoder) -> bool:
        return spec.checkpoint is not None and spec.checkpoint.endswith(".toy")

    @cached_property
    def stated(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(Path(self.autoencoder.source).read_text())
        return value

    @property
    def short_name(self) -> str:
        return Path(self.autoencoder.source).stem

    @property
    def layer(self) -> int:
        return int(self.stated["layer"])

    @property
    def activations_model(self) -> str:
        return str(self.stated["model"])

    def draws_identity(self) -> dict[str, str]:
        return {"toy": content_digest(Path(self.activations_model))}

    def scores_identity(self) -> dict[str, str]:
        return self.draws_identity()

    def check_activations(self, facts: ActivationFacts) -> tuple[Note, ...]:
        if facts.layer not in (None, self.layer):
            raise DataError(f"{self.autoencoder.source} is of layer {self.layer}, not {facts.layer}")
        return ()

    def weight_bytes(self) -> int:
        return 1_000_000

    def load_verbalizer(self, devices: Sequence[str]) -> ToyVerbalizer:
        return ToyVerbalizer(self.activations_model)

    def load_reconstructor(self, devices: Sequence[str], verbalizer: Any = None) -> ToyReconstructor:
        return ToyReconstructor(self.activations_model)


class ToyVerbalizer:
    """Writes on behind the vector."""

    def __init__(self, directory: str) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.d_model: int = self.model.config.hidden_size
        self.stop_token_ids = frozenset({self.tokenizer.eos_token_id})
        self.prompt_length = 1
        self.edits_blocks = False

    def inputs(self, vectors: torch.Tensor, positions: Sequence[int | None]) -> torch.Tensor:
        return vectors / vectors.norm(dim=1, keepdim=True)

    def prompts(self, vectors: torch.Tensor) -> Prompts:
        return Prompts(vectors[:, None])

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(token_ids))

    def parse(self, text: str, finish: FinishReason) -> tuple[str | None, ParseOutcome]:
        return (text, "ok") if text.strip() else (None, "empty")


class ToyReconstructor:
    """The mean embedding of a text's words."""

    reads_empty_text = False

    def __init__(self, directory: str) -> None:
        self.embeddings = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).get_input_embeddings().weight
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.d_model = self.embeddings.shape[1]

    @torch.inference_mode()
    def reconstruct(self, explanations: Sequence[Explanation], batch_size: int = 64) -> torch.Tensor:
        ids = [self.tokenizer.encode(explanation.text) or [0] for explanation in explanations]
        return torch.stack([self.embeddings[row].mean(dim=0) for row in ids]) if ids else torch.empty(0, self.d_model)
