"""Run the prompts of an AV once, for engines that fork draws from a transformers cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ksweep.inference.kv_cache import expand_prefix
from ksweep.inference.model_parts import blocks_of
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
def prefill(model: Any, prompts: Prompts, prefix: Any | None = None, *, shares_first_blocks: bool = False) -> Prefill:
    """Run every prompt once; after `prefix` (from `prefill_prefix`), only the rest of it.

    Args:
        shares_first_blocks: run equal prompts as one row up to the block whose output the vectors enter (`FirstBlocks`); only
            for models whose cache is plain keys and values.

    Raises:
        CheckpointError: a block that is to be edited did not run exactly once.
    """
    num_cached = 0 if prefix is None else prefix.get_seq_length()
    rest, past = prompts.embeddings[:, num_cached:].contiguous(), expand_prefix(prefix, len(prompts.embeddings))
    can_share = shares_first_blocks and prompts.embeddings_are_equal and len(rest) > 1
    shared = FirstBlocks(model, prompts.edits, len(rest)) if can_share else None
    with ExitStack() as hooks:
        if shared is not None:
            shared.narrow(past)
            hooks.enter_context(shared.as_one_row())
        hooks.enter_context(editing_blocks(prompts.edits, num_cached))
        output = model(inputs_embeds=rest, past_key_values=past, use_cache=True, logits_to_keep=1)
    if shared is not None:
        shared.widen(output.past_key_values)
    return Prefill(getattr(output, "past_key_values", None), output.logits[:, -1].float())


class FirstBlocks:
    """The blocks of a model up to the one whose output is edited: equal prompts pass through them as one row.

    So a vector that is added behind block 1 of 36 costs 34 blocks of its prompt and not 36, and the keys and values of the first
    two are kept once.
    """

    def __init__(self, model: Any, edits: Sequence[BlockEdit], num_rows: int) -> None:
        """Take the blocks up to the first that is edited; an edited input counts with the block before."""
        blocks = list(blocks_of(model))
        self.blocks = blocks[: min(blocks.index(edit.block) + (edit.side == "output") for edit in edits)]
        self.num_rows = num_rows

    @contextmanager
    def as_one_row(self) -> Iterator[None]:
        """Pass the first row alone through the blocks, and hand what the last of them puts out to every row."""
        with ExitStack() as hooks:
            for block in self.blocks:
                hooks.callback(block.register_forward_pre_hook(self._first_row_of_inputs, with_kwargs=True, prepend=True).remove)
            if self.blocks:
                hooks.callback(self.blocks[-1].register_forward_hook(self._every_row).remove)
            yield

    def narrow(self, past: Any | None) -> None:
        """Leave one row in the cached prefix of the blocks."""
        for layer in [] if past is None else past.layers[: len(self.blocks)]:
            layer.keys, layer.values = layer.keys[:1], layer.values[:1]

    def widen(self, cache: Any) -> None:
        """Give the blocks' keys and values as many rows as the others have, without a copy."""
        for layer in cache.layers[: len(self.blocks)]:
            layer.keys = layer.keys.expand(self.num_rows, -1, -1, -1)
            layer.values = layer.values.expand(self.num_rows, -1, -1, -1)

    def _first_row_of_inputs(self, _block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tuple(map(self._first_row, args)), {name: self._first_row(value) for name, value in kwargs.items()}

    def _first_row(self, value: Any) -> Any:
        """Return the first row of tensors that have all rows: hidden states, masks, rotations."""
        if isinstance(value, torch.Tensor):
            return value[:1] if value.dim() > 1 and len(value) == self.num_rows else value
        return type(value)(map(self._first_row, value)) if type(value) in (tuple, list) else value

    def _every_row(self, _block: Any, _args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        wide = hidden.expand(self.num_rows, *hidden.shape[1:])
        return (wide, *output[1:]) if isinstance(output, tuple) else wide


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
