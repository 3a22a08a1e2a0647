"""KV cache of the rows in flight: the prompt that all rows share is stored once, the rest of each row in a slot of its own.

    keys and values of row i =  shared prompt [P]  |  slot i: the rest of its prompt, then its tokens [lengths[i]]

The n rows in flight always occupy slots 0 .. n - 1, so every step reads n slots and nothing else: a slot that becomes free is
filled with a copy of a row that forks, or with the last row. transformers' own cache appends by copying and stores the prompt
once per row. Slots hold the model's dtype on a GPU and float32 on a CPU (`_attention_dtype`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

LANES = 16
"""The number of places that attention reads (shared prompt and slot) is a multiple of this, with the surplus masked. Sums then
add zeros lane by lane, so a row's numbers do not depend on how long its neighbours are (bfloat16, 128 draws in 512, 100 and 48
slots: all texts equal; without it 109)."""


@dataclass(frozen=True)
class Past:
    """The keys and values that one block's queries attend to."""

    shared_keys: Float[torch.Tensor, "key_head head_dim shared"] | None
    shared_values: Float[torch.Tensor, "key_head shared head_dim"] | None
    keys: Float[torch.Tensor, "row key_head token head_dim"]
    values: Float[torch.Tensor, "row key_head token head_dim"]
    mask: Bool[torch.Tensor, "row token"]
    """True for places behind a row's last token: nothing may attend to them."""


@dataclass
class _StepState:
    """Sizes of the cache and the current step's lengths, common to all blocks."""

    num_slots: int
    capacity: int
    """Tokens that a slot can hold."""
    shared_length: int
    """Tokens of the shared prompt."""
    longest: int = 0
    """Tokens in the fullest slot before this step."""
    width: int = 0
    """Places of a slot that this step reads."""
    lengths: Any = None
    """[row] int64 on the first device: tokens in each row's slot before this step."""
    rows: Any = None
    """[row] 0, 1, 2, ...; None where all rows have the same length and a slice can be written."""
    mask: Any = None
    """[row, place] bool: behind the row's last token."""
    by_device: dict[torch.device, tuple[Any, Any, Any]] = field(default_factory=dict)

    def on(self, device: torch.device) -> tuple[Any, Any, Any]:
        """Return `lengths`, `rows` and `mask` on a block's device, copied once per step."""
        if device not in self.by_device:
            tensors = (self.lengths, self.rows, self.mask)
            self.by_device[device] = tuple(t if t is None else t.to(device) for t in tensors)  # type: ignore[assignment]
        return self.by_device[device]


class KVCacheLayer:
    """Keys and values of one block, with the methods that attention calls on a layer of a transformers cache."""

    def __init__(self, shared: tuple[torch.Tensor, torch.Tensor] | None, state: _StepState) -> None:
        """Store the shared prompt's keys and values, each [1, key_head, P, head_dim]; slots are allocated by the first rows."""
        self.keys: torch.Tensor | None = None
        """[slot, key_head, token, head_dim]"""
        self.values: torch.Tensor | None = None
        self._state = state
        self._shared_keys = None if shared is None else _attention_dtype(shared[0][0].transpose(1, 2).contiguous())
        self._shared_values = None if shared is None else _attention_dtype(shared[1][0].contiguous())

    def write_prompts(self, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write the first tokens of new rows into the slots from `first` on."""
        rows, tokens = slice(first, first + len(keys)), keys.shape[2]
        if self.keys is None or self.values is None or tokens > self.keys.shape[2]:
            self._grow(keys, values, tokens)
            assert self.keys is not None and self.values is not None
        self.keys[rows, :, :tokens] = keys
        self.values[rows, :, :tokens] = values

    def reserve(self, tokens: int) -> None:
        """Make every slot at least `tokens` tokens long."""
        assert self.keys is not None and self.values is not None
        if tokens > self.keys.shape[2]:
            self._grow(self.keys, self.values, tokens)

    def poison_with_nan(self, lengths: torch.Tensor) -> None:
        """Write NaN to the place behind `lengths[i]` tokens of each slot i."""
        assert self.keys is not None and self.values is not None
        rows = torch.arange(len(lengths), device=lengths.device)
        for array in (self.keys, self.values):
            array[rows, :, lengths] = float("nan")

    def copy_rows(self, sources: torch.Tensor, targets: torch.Tensor, length: int) -> None:
        """Copy the first `length` tokens of slots `sources` to slots `targets`."""
        assert self.keys is not None and self.values is not None
        sources, targets = sources.to(self.keys.device), targets.to(self.keys.device)
        self.keys[targets, :, :length] = self.keys[sources, :, :length]
        self.values[targets, :, :length] = self.values[sources, :, :length]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[Past, Past]:
        """Write one token of every row. Returns what to attend to twice: as a model's "keys" and as its "values"."""
        assert self.keys is not None and self.values is not None
        state = self._state
        lengths, rows, mask = state.on(self.keys.device)
        n, width = len(key_states), state.width
        if width > self.keys.shape[2]:
            self._grow(key_states, value_states, width)
            assert self.keys is not None and self.values is not None
        if rows is None:
            self.keys[:n, :, state.longest] = key_states[:, :, 0]
            self.values[:n, :, state.longest] = value_states[:, :, 0]
        else:
            self.keys[rows, :, lengths] = key_states[:, :, 0].to(self.keys.dtype)
            self.values[rows, :, lengths] = value_states[:, :, 0].to(self.values.dtype)
        past = Past(self._shared_keys, self._shared_values, self.keys[:n, :, :width], self.values[:n, :, :width], mask)
        return past, past

    def _grow(self, keys: torch.Tensor, values: torch.Tensor, needed: int) -> None:
        """Reallocate the slots for `needed` tokens and some more, but not for the capacity at once: most rows end early."""
        tokens = min(self._state.capacity, max(2 * needed, needed + 2 * LANES))
        grown = []
        for old, like in ((self.keys, keys), (self.values, values)):
            shape = (self._state.num_slots, like.shape[1], tokens, like.shape[3])
            # A masked place has weight 0, and 0 times what an allocation happens to hold may be NaN: so values start at 0.
            # Scores of masked places are replaced, so keys need not.
            empty = _attention_dtype(like[:0])
            new = empty.new_zeros(shape) if like is values else empty.new_empty(shape)
            if old is not None:
                new[:, :, : old.shape[2]] = old
            grown.append(new)
        self.keys, self.values = grown


def _attention_dtype(tensor: torch.Tensor) -> torch.Tensor:
    """Convert keys or values to the dtype that they are stored in: float32 on a CPU, unchanged elsewhere.

    A CPU's bfloat16 products have bfloat16 results. On scores that is an error of 3 % in a weight, which torch's fused attention
    does not make.
    """
    return tensor.float() if tensor.device.type == "cpu" else tensor


class KVCache:
    """Slots for every block of a model; passed to the model as `past_key_values`."""

    def __init__(self, prefix: Any | None, num_layers: int, num_slots: int, capacity: int) -> None:
        """Create empty slots.

        Args:
            prefix: transformers cache with one row, the shared beginning of all prompts; None without one.
            num_layers: blocks of the model.
            num_slots: most rows in flight.
            capacity: tokens in a slot.
        """
        shared_length = 0 if prefix is None else prefix.get_seq_length()
        capacity = -(-(capacity + shared_length) // LANES) * LANES - shared_length
        self.state = _StepState(num_slots, capacity, shared_length)
        shared = [None if prefix is None else (prefix.layers[i].keys, prefix.layers[i].values) for i in range(num_layers)]
        self.layers = [KVCacheLayer(keys_and_values, self.state) for keys_and_values in shared]
        self.lengths: list[int] = []
        """Tokens in each row's slot."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Past, Past]:
        """Write a block's new keys and values. Called by the block, which passes the result on to the attention function."""
        return self.layers[layer_idx].update(keys, values)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the length of the longest row. transformers asks for it to build masks, of which there are none here."""
        return self.state.shared_length + self.state.longest

    def append_rows(self, keys_and_values: Sequence[tuple[torch.Tensor, torch.Tensor]], length: int) -> None:
        """Add new rows of `length` tokens behind those in flight; one pair of keys and values per block."""
        first, count = len(self.lengths), len(keys_and_values[0][0])
        assert first + count <= self.state.num_slots, (first, count, self.state.num_slots)
        for layer, (keys, values) in zip(self.layers, keys_and_values, strict=True):
            layer.write_prompts(first, keys, values)
        self.lengths += [length] * count

    def select(self, rows: Sequence[int]) -> list[int]:
        """Keep only these rows; a row that is named twice is copied. Returns the permutation: slot i now holds rows[order[i]]."""
        n = len(rows)
        assert n <= self.state.num_slots, (n, self.state.num_slots)
        # 1. A row below n stays where it is, the first time that it is named.
        order: list[int | None] = [None] * n
        movers = []
        for i, row in enumerate(rows):
            if row < n and order[row] is None:
                order[row] = i
            else:
                movers.append(i)
        # 2. Rows from n on and further copies of a row fill the free slots below n: there are as many.
        free = [slot for slot, i in enumerate(order) if i is None]
        if movers:
            device = self._device()
            sources, targets = (torch.tensor(slots, device=device) for slots in ([rows[i] for i in movers], free))
            longest = max(self.lengths[rows[i]] for i in movers)
            for layer in self.layers:
                layer.copy_rows(sources, targets, longest)
        # 3. Lengths follow the rows.
        remaining = iter(movers)
        placed = [next(remaining) if i is None else i for i in order]
        self.lengths = [self.lengths[rows[i]] for i in placed]
        return placed

    def reserve(self, tokens: int) -> None:
        """Make every slot at least `tokens` tokens long."""
        for layer in self.layers:
            layer.reserve(tokens)

    def poison_with_nan(self, lengths: Int[torch.Tensor, " row"]) -> None:
        """Write NaN where the next step of these rows will write, so that a step that does not write there gives NaN."""
        for layer in self.layers:
            layer.poison_with_nan(lengths)

    def begin_step(self, device: torch.device) -> Int[torch.Tensor, "row 1"]:
        """Prepare to write one more token of every row. Returns the tokens' positions."""
        shared, longest = self.state.shared_length, max(self.lengths)
        width = -(-(longest + 1 + shared) // LANES) * LANES - shared
        same_length = min(self.lengths) == longest
        return self._begin(torch.tensor(self.lengths, device=device), longest, width, same_length)

    def begin_static_step(self, lengths: Int[torch.Tensor, " row"], width: int) -> Int[torch.Tensor, "row 1"]:
        """Do as `begin_step` for given lengths and `width` places; nothing on the host depends on the lengths' values.

        Args:
            lengths: on the device of all blocks, each below `width`.
        """
        return self._begin(lengths, width - 1, width, same_length=False)

    def _begin(self, lengths: Int[torch.Tensor, " row"], longest: int, width: int, same_length: bool) -> torch.Tensor:
        state, device = self.state, lengths.device
        state.lengths, state.longest, state.width = lengths, longest, width
        state.rows = None if same_length else torch.arange(len(lengths), device=device)
        state.mask = torch.arange(width, device=device) > lengths[:, None]
        state.by_device.clear()
        return (lengths + state.shared_length)[:, None]

    def end_step(self) -> None:
        """Count the token that the step wrote to every row."""
        self.lengths = [length + 1 for length in self.lengths]

    def _device(self) -> torch.device:
        keys = self.layers[0].keys
        assert keys is not None
        return keys.device


def bytes_per_slot(keys_and_values: Sequence[tuple[torch.Tensor, torch.Tensor]], capacity: int) -> int:
    """Return the size of a slot of `capacity` tokens, over all blocks, for keys and values of these shapes."""
    per_token = [_attention_dtype(tensor[:1, :, :1]).nbytes for pair in keys_and_values for tensor in pair]
    return capacity * sum(per_token)


def keeps_keys_and_values(cache: Any) -> bool:
    """Return whether a transformers cache holds the keys and values of every token, or of a window, and nothing else.

    Linear attention, convolutions and state spaces keep states that are overwritten: those cannot be continued for several rows
    from one.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    return cache is not None and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def expand_prefix(prefix: Any | None, count: int) -> Any | None:
    """Return a transformers cache of `count` rows that begin with the one row of `prefix`, which is copied only as they grow."""
    if prefix is None:
        return None
    cache = copy.copy(prefix)
    cache.layers = [copy.copy(layer) for layer in prefix.layers]
    for layer in cache.layers:
        if layer.keys is not None:  # None for a block that has not run
            layer.keys = layer.keys.expand(count, -1, -1, -1)
            layer.values = layer.values.expand(count, -1, -1, -1)
    return cache
