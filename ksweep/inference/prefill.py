"""Run the prompts of an AV once, for engines that fork draws from a transformers cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ksweep.inference.kv_cache import expand_prefix
from ksweep.inference.prompts import BlockEdit, Prompts
from ksweep.utils.errors import CheckpointError

if TYPE_CHECKING:
    from jaxtyping import Float

    from ksweep.inference.prompts import PromptedModel


@dataclass(frozen=True)
class Prefill:
    """The prompts of some activations after one forward pass; draws are forked from them."""

    cache: Any
    """transformers Cache of the whole prompt, one row per activation; None for a model that has none."""
    logits: Float[torch.Tensor, "activation vocabulary"]
    """Next-token logits after the prompt, float32."""


def lacks_model(verbalizer: PromptedModel) -> str | None:
    """Return why an AV cannot be run by engines that run torch models, or None if it can."""
    if getattr(verbalizer, "model", None) is None:
        return "it has no causal LM of transformers (attribute `model`)"
    return None


def prompts_of(verbalizer: PromptedModel, vectors: Float[torch.Tensor, "activation d_model"]) -> Prompts:
    """Return the AV's prompts of some vectors.

    Raises:
        CheckpointError: they are of another number or length than the AV says.
    """
    prompts = verbalizer.prompts(vectors)
    size, expected = tuple(prompts.embeddings.shape[:2]), (len(vectors), verbalizer.prompt_length)
    if size != expected or not 0 <= prompts.shared_length < verbalizer.prompt_length:
        raise CheckpointError(
            f"the AV gave embeddings of {size[0]} prompts of {size[1]} tokens, of which {prompts.shared_length} are shared, for "
            f"{expected[0]} vectors and a prompt_length of {expected[1]}"
        )
    return prompts


@torch.inference_mode()
def prefill_prefix(model: Any, prompts: Prompts) -> Any | None:
    """Run the tokens that all prompts share. Returns a transformers Cache with one row, or None if there are no such tokens."""
    if not prompts.shared_length:
        return None
    shared = prompts.embeddings[:1, : prompts.shared_length]
    return model(inputs_embeds=shared, use_cache=True, logits_to_keep=1).past_key_values


@torch.inference_mode()
def prefill(model: Any, prompts: Prompts, prefix: Any | None = None) -> Prefill:
    """Run every prompt once; after `prefix` (from `prefill_prefix`), only the rest of it.

    Raises:
        CheckpointError: a block that is to be edited did not run exactly once.
    """
    num_cached = 0 if prefix is None else prefix.get_seq_length()
    rest = prompts.embeddings[:, num_cached:].contiguous()
    with editing_blocks(prompts.edits, num_cached):
        output = model(inputs_embeds=rest, past_key_values=expand_prefix(prefix, len(rest)), use_cache=True, logits_to_keep=1)
    return Prefill(getattr(output, "past_key_values", None), output.logits[:, -1].float())


@contextmanager
def editing_blocks(edits: Sequence[BlockEdit], num_cached: int = 0) -> Iterator[None]:
    """Apply edits during exactly one forward pass, which begins at the prompt's token number `num_cached`.

    Raises:
        CheckpointError: a block did not run exactly once, so it was not edited as in training.
    """
    num_calls = [0] * len(edits)

    def edited(i: int, hidden: torch.Tensor) -> torch.Tensor:
        num_calls[i] += 1
        hidden, position = hidden.clone(), edits[i].position - num_cached
        hidden[:, position] = edits[i].change(hidden[:, position]).to(hidden)
        return hidden

    with ExitStack() as hooks:
        for i, edit in enumerate(edits):
            hooks.callback(_add_hook(edit, lambda hidden, i=i: edited(i, hidden)).remove)
        yield
    if any(count != 1 for count in num_calls):
        raise CheckpointError(
            f"blocks of the AV's base ran {sorted(set(num_calls))} times in one prefill, expected once each: its architecture "
            "calls them in another way. Use a checkpoint over another architecture (docs/families.md)."
        )


def _add_hook(edit: BlockEdit, edited: Any) -> Any:
    """Hook a function of hidden states into a block's input or output. Returns the hook's handle."""

    def on_input(_block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (edited(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edited(kwargs["hidden_states"])}

    def on_output(_block: Any, _args: Any, output: Any) -> Any:
        return (edited(output[0]), *output[1:]) if isinstance(output, tuple) else edited(output)

    if edit.side == "input":
        return edit.block.register_forward_pre_hook(on_input, with_kwargs=True, prepend=True)
    return edit.block.register_forward_hook(on_output)
