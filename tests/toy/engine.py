"""A toy engine outside the package: a table and the AV's prompt embeddings give tokens, without torch model or keyed noise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch

from ksweep.inference.prompts import PromptedModel
from ksweep.inference.request import DecodingOptions, Draw, DrawBatch

SENTENCES = ("the cat sat on the mat", "it was for the king", "they had not come")


class TableEngine:
    """Says one of three sentences; which one, the sign of two of the prompt's numbers and k decide."""

    identity: ClassVar[dict[str, str]] = {"engine": "table", "version": "1", "noise": "none"}

    def __init__(self) -> None:
        self.batches_pulled = 0

    def supports(self, verbalizer: PromptedModel) -> str | None:
        """Refuse AVs that embeddings alone do not describe, as an engine without a torch model must."""
        return "it edits blocks, and this engine takes embeddings alone" if verbalizer.edits_blocks else None

    def generate(self, verbalizer: Any, batches: Iterable[DrawBatch], options: DecodingOptions) -> Iterator[tuple[int, Draw]]:
        """One batch after the other; every token is as likely as any other of 300."""
        options.on_batch_sizes(1, 1)
        stop = min(verbalizer.stop_token_ids)
        for number, batch in enumerate(batches):
            self.batches_pulled += 1
            embeddings = verbalizer.prompts(batch.vectors).embeddings.float()
            choices = (embeddings.sum(dim=1)[:, :2] > 0).int() @ torch.tensor([1, 2], dtype=torch.int32)
            for request in batch.requests:
                if options.should_stop():
                    return
                sentence = SENTENCES[(int(choices[request.row]) + request.draw) % len(SENTENCES)]
                text = f"<explanation>{sentence}</explanation>"
                tokens = (*verbalizer.tokenizer.encode(text, add_special_tokens=False), stop)[: options.max_new_tokens]
                options.on_step(len(tokens))
                yield number, Draw(request, tokens, "stop" if tokens[-1] == stop else "length", -5.7 * len(tokens))

    def numerics(self, verbalizer: PromptedModel, max_new_tokens: int) -> dict[str, str]:
        """Say for the run record where tokens come from."""
        return {"sampler": "a table"}


class Forgetful(TableEngine):
    """An engine that leaves out a draw."""

    identity: ClassVar[dict[str, str]] = {"engine": "forgetful"}

    def generate(self, verbalizer: Any, batches: Iterable[DrawBatch], options: DecodingOptions) -> Iterator[tuple[int, Draw]]:
        """All but the last draw."""
        yield from list(super().generate(verbalizer, batches, options))[:-1]


class Nameless(TableEngine):
    """An engine whose draws could not be told from the built-in's."""

    identity: ClassVar[dict[str, str]] = {}


class Unfinished:
    """An engine that generates and cannot say what it is."""

    def generate(self) -> None:
        """Generate nothing."""
