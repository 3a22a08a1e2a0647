"""The past of the rows that are being decoded: what the prompt has in common stored once, the rest in slots written in place.

    past of row i =  shared prompt [P]  |  slot i: the rest of its prompt, then its tokens [lengths[i]]

A slot that is given up is filled by the copy of a row that forks or by the last row, so that the rows alive always lie in slots
0 .. n - 1: every step reads n rows and nothing else. transformers' own cache appends by copying, holds the prompt once for every
row, and its attention on one query is a product of a vector with a matrix for every head; here the queries of all rows meet the
shared prompt in one matrix product, and those of one row that share a key head meet its slot in another. Measured on a CPU (512
rows, 9 heads over 3 key heads of 64, 24 past tokens, bf16): 2.2 ms against 22 ms for a block. On a CPU with a C compiler a
function of our own reads the slots, see `compiled`; the one in torch is its oracle.

The models themselves run unchanged: attention is a function registered with transformers' AttentionInterface, and what a block's
cache hands it in the place of keys is a `Past`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface

from ksweep.inference import compiled

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

ATTENTION = "ksweep_slots"

LANES = 16
"""Widths of the past are multiples of this, the surplus masked: sums over it then add zeros lane by lane, and a row's numbers do
not depend on how long its neighbours are (bfloat16, 128 draws at 512, 100 and 48 slots: all texts equal; 109 without)."""

ARCHITECTURES = frozenset({"gemma2", "gemma3", "gemma3_text", "gpt2", "llama", "mistral", "qwen2", "qwen3"})
"""Whose attention is all that `attend` knows: softmax of scaled scores, perhaps capped, over everything in reach."""


@dataclass(frozen=True)
class Past:
    """What one block's queries look at."""

    shared_keys: Float[torch.Tensor, "key_head head_dim shared"] | None
    shared_values: Float[torch.Tensor, "key_head shared head_dim"] | None
    keys: Float[torch.Tensor, "row key_head token head_dim"]
    values: Float[torch.Tensor, "row key_head token head_dim"]
    unused: Bool[torch.Tensor, "row token"]
    """Places behind a row's own length."""
    reach: Int[torch.Tensor, " row"]
    """Places up to and with a row's last token."""
    longest: int
    """Of them."""
    compiled: bool
    """Whether the compiled function reads it."""


class SlotLayer:
    """Keys and values of one block; what attention asks of a transformers cache layer."""

    def __init__(self, shared: tuple[torch.Tensor, torch.Tensor] | None, book: _Book) -> None:
        """`shared`: keys and values [1, key_head, P, head_dim] of the common prompt."""
        self.keys: torch.Tensor | None = None
        """[slot, key_head, token, head_dim]"""
        self.values: torch.Tensor | None = None
        self._book = book
        self._shared_keys = None if shared is None else _precise(shared[0][0].transpose(1, 2).contiguous())
        self._shared_values = None if shared is None else _precise(shared[1][0].contiguous())
        self._compiled = False

    def put(self, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """The beginning of new rows in the slots from `first` on."""
        rows, tokens = slice(first, first + len(keys)), keys.shape[2]
        if self.keys is None or self.values is None or tokens > self.keys.shape[2]:
            self._make_room(keys, values, tokens)
            assert self.keys is not None and self.values is not None
        self.keys[rows, :, :tokens] = keys
        self.values[rows, :, :tokens] = values

    def reserve(self, tokens: int) -> None:
        """Room for at least that many tokens in slots that have been put to use."""
        assert self.keys is not None and self.values is not None
        if tokens > self.keys.shape[2]:
            self._make_room(self.keys, self.values, tokens)

    def spoil(self, lengths: torch.Tensor) -> None:
        """NaN into the places behind these lengths, of as many slots."""
        assert self.keys is not None and self.values is not None
        rows = torch.arange(len(lengths), device=lengths.device)
        for array in (self.keys, self.values):
            array[rows, :, lengths] = float("nan")

    def _make_room(self, keys: torch.Tensor, values: torch.Tensor, needed: int) -> None:
        """Room in every slot for that many tokens and some more; not for all that may come, most rows end early."""
        tokens = min(self._book.capacity, max(2 * needed, needed + 2 * LANES))
        self._compiled = compiled.fits(keys)
        made = []
        for had, like in ((self.keys, keys), (self.values, values)):
            shape = (self._book.num_slots, like.shape[1], tokens, like.shape[3])
            # A place that is not used yet has weight 0, and 0 times whatever lay in that memory may be NaN: so values start at 0.
            # Scores of unused places are replaced, so keys need not.
            room = _stored(like[:0]).new_zeros(shape) if like is values else _stored(like[:0]).new_empty(shape)
            if had is not None:
                room[:, :, : had.shape[2]] = had
            made.append(room)
        self.keys, self.values = made

    def move(self, sources: torch.Tensor, targets: torch.Tensor, length: int) -> None:
        """Rows into the slots of others."""
        assert self.keys is not None and self.values is not None
        sources, targets = sources.to(self.keys.device), targets.to(self.keys.device)
        self.keys[targets, :, :length] = self.keys[sources, :, :length]
        self.values[targets, :, :length] = self.values[sources, :, :length]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[Past, Past]:
        """Write one token of every row; what attention is to look at, twice: in the place of keys and of values."""
        assert self.keys is not None and self.values is not None
        book = self._book
        lengths, rows, unused, reach = book.on(self.keys.device)
        n, width = len(key_states), book.width
        if width > self.keys.shape[2]:
            self._make_room(key_states, value_states, width)
            assert self.keys is not None and self.values is not None
        if rows is None:
            self.keys[:n, :, book.longest] = key_states[:, :, 0]
            self.values[:n, :, book.longest] = value_states[:, :, 0]
        else:
            self.keys[rows, :, lengths] = key_states[:, :, 0].to(self.keys.dtype)
            self.values[rows, :, lengths] = value_states[:, :, 0].to(self.values.dtype)
        keys, values = self.keys[:n, :, :width], self.values[:n, :, :width]
        past = Past(self._shared_keys, self._shared_values, keys, values, unused, reach, book.longest + 1, self._compiled)
        return past, past


def _stored(past: torch.Tensor) -> torch.Tensor:
    """Keys or values in the precision that slots have: the model's own where the compiled function or a GPU reads them."""
    return past if compiled.fits(past) else _precise(past)


def _precise(past: torch.Tensor) -> torch.Tensor:
    """In float32 on a CPU, whose bfloat16 products have bfloat16 results; on scores that is an error of 3 % in a weight, which
    torch's fused attention does not make."""
    return past.float() if past.device.type == "cpu" else past


@dataclass
class _Book:
    """What all blocks of a cache have in common."""

    num_slots: int
    capacity: int
    shared: int
    longest: int = 0
    width: int = 0
    lengths: Any = None
    """[row] int64 on the first device: tokens in each row's slot."""
    rows: Any = None
    """[row] 0, 1, 2, ...; None where all rows have the same length, and a slice does."""
    unused: Any = None
    """[row, place] bool: behind the row's last token."""
    reach: Any = None
    """[row] int64: tokens in each row's slot once it has the new one."""
    copies: dict[torch.device, tuple[Any, Any, Any, Any]] = field(default_factory=dict)

    def on(self, device: torch.device) -> tuple[Any, Any, Any, Any]:
        """Lengths, rows, unused places and reaches for the blocks of a device."""
        if device not in self.copies:
            tensors = (self.lengths, self.rows, self.unused, self.reach)
            self.copies[device] = tuple(t if t is None else t.to(device) for t in tensors)  # type: ignore[assignment]
        return self.copies[device]


class SlotCache:
    """Slots of a model's every block; passed to the model as its past_key_values."""

    def __init__(self, prefix: Any | None, num_layers: int, num_slots: int, capacity: int) -> None:
        """Empty slots.

        Args:
            prefix: transformers cache with one row, the common beginning of all prompts; None without one.
            num_layers: blocks of the model.
            num_slots: rows at once.
            capacity: tokens in a slot.
        """
        length = 0 if prefix is None else prefix.get_seq_length()
        self.book = _Book(num_slots, -(-(capacity + length) // LANES) * LANES - length, length)
        shared = [None if prefix is None else (prefix.layers[i].keys, prefix.layers[i].values) for i in range(num_layers)]
        self.layers = [SlotLayer(one, self.book) for one in shared]
        self.lengths: list[int] = []
        """Tokens in each row's slot."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Past, Past]:
        """What a block calls with the keys and values of its new tokens; what it then hands to `attend`."""
        return self.layers[layer_idx].update(keys, values)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Of the longest row; only masks would ask, and there are none."""
        return self.book.shared + self.book.longest

    def put(self, keys_and_values: Sequence[tuple[torch.Tensor, torch.Tensor]], length: int) -> None:
        """New rows behind those alive, each with `length` tokens."""
        first, count = len(self.lengths), len(keys_and_values[0][0])
        assert first + count <= self.book.num_slots, (first, count, self.book.num_slots)
        for layer, (keys, values) in zip(self.layers, keys_and_values, strict=True):
            layer.put(first, keys, values)
        self.lengths += [length] * count

    def select(self, rows: Sequence[int]) -> list[int]:
        """Give up all slots but these; a row that is named more than once is copied. Returns the places in `rows` in their new
        order: slot i holds what was rows[order[i]].

        What stays keeps its slot where it can; the rows at the end and the copies fill the gaps, then follow.
        """
        n = len(rows)
        assert n <= self.book.num_slots, (n, self.book.num_slots)
        order: list[int | None] = [None] * n
        others = []
        for i, row in enumerate(rows):
            if row < n and order[row] is None:
                order[row] = i
            else:
                others.append(i)
        gaps = [slot for slot, i in enumerate(order) if i is None]
        if others:
            sources, targets = (torch.tensor(found, device=self._device()) for found in ([rows[i] for i in others], gaps))
            longest = max(self.lengths[rows[i]] for i in others)
            for layer in self.layers:
                layer.move(sources, targets, longest)
        left = iter(others)
        placed = [next(left) if i is None else i for i in order]
        self.lengths = [self.lengths[rows[i]] for i in placed]
        return placed

    def _device(self) -> torch.device:
        keys = self.layers[0].keys
        assert keys is not None
        return keys.device

    def begin_step(self, device: torch.device) -> Int[torch.Tensor, "row 1"]:
        """Prepare for one more token in every row; their positions."""
        shared, longest = self.book.shared, max(self.lengths)
        width = -(-(longest + 1 + shared) // LANES) * LANES - shared
        even = min(self.lengths) == longest
        return self._begin(torch.tensor(self.lengths, device=device), longest, width, even)

    def reserve(self, tokens: int) -> None:
        """Room for at least that many tokens in every slot."""
        for layer in self.layers:
            layer.reserve(tokens)

    def spoil(self, lengths: Int[torch.Tensor, " row"]) -> None:
        """NaN where the next step of these rows is to write: what it reads without having written there shows."""
        for layer in self.layers:
            layer.spoil(lengths)

    def begin_static_step(self, lengths: Int[torch.Tensor, " row"], width: int) -> Int[torch.Tensor, "row 1"]:
        """As `begin_step`, for as many rows as there are lengths and `width` places; the host never looks at the lengths.

        Args:
            lengths: on the device of all blocks, each below `width`.
        """
        return self._begin(lengths, width - 1, width, even=False)

    def _begin(self, lengths: Int[torch.Tensor, " row"], longest: int, width: int, even: bool) -> Int[torch.Tensor, "row 1"]:
        """`even`: whether all rows are as long as the longest."""
        book, device = self.book, lengths.device
        book.lengths, book.longest, book.width = lengths, longest, width
        book.rows = None if even else torch.arange(len(lengths), device=device)
        book.unused = torch.arange(width, device=device) > lengths[:, None]
        book.reach = lengths + 1
        book.copies.clear()
        return (lengths + book.shared)[:, None]

    def end_step(self) -> None:
        """Every row has one more token."""
        self.lengths = [length + 1 for length in self.lengths]


def attend(
    module: Any,
    query: Float[torch.Tensor, "row head one head_dim"],
    key: Any,
    value: Any,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Float[torch.Tensor, "row one head head_dim"], None]:
    """Attention of one query a row over a `Past`; scores and softmax in float32 as the models' own functions have them."""
    past: Past = key
    n, heads, _, width = query.shape
    scaling = width**-0.5 if scaling is None else scaling
    if past.compiled:
        out = compiled.attend(
            query[:, :, 0], past.keys, past.values, past.reach, past.longest, past.shared_keys, past.shared_values,
            scaling=scaling, softcap=softcap,
        )  # fmt: skip
        return out[:, None], None
    key_heads, length = past.keys.shape[1:3]
    group = heads // key_heads
    grouped = query.reshape(n * key_heads, group, width)
    own = torch.bmm(grouped.to(past.keys.dtype), past.keys.flatten(0, 1).transpose(1, 2)).view(n, key_heads, group, length)
    shared = _shared_scores(query, past, group)
    scores = (own if shared is None else torch.cat([shared, own], dim=-1)).float()
    scores *= scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores[..., -length:].masked_fill_(past.unused[:, None, None], float("-inf"))
    weights = scores.softmax(-1).to(past.values.dtype)
    mine = weights[..., -length:].reshape(n * key_heads, group, length)
    out = torch.bmm(mine, past.values.flatten(0, 1)).view(n, key_heads, group, -1)
    if past.shared_values is not None:
        theirs = weights[..., :-length].transpose(0, 1).reshape(key_heads, n * group, -1)
        out = out + torch.bmm(theirs, past.shared_values).view(key_heads, n, group, -1).transpose(0, 1)
    return out.to(query.dtype).reshape(n, 1, heads, -1), None


def _shared_scores(query: torch.Tensor, past: Past, group: int) -> torch.Tensor | None:
    """[row, key_head, group, shared]: all rows' queries against the common prompt, a product a key head."""
    if past.shared_keys is None:
        return None
    n, heads, _, width = query.shape
    key_heads = heads // group
    queries = (
        query.to(past.shared_keys.dtype).view(n, key_heads, group, width).transpose(0, 1).reshape(key_heads, n * group, width)
    )
    return torch.bmm(queries, past.shared_keys).view(key_heads, n, group, -1).transpose(0, 1)


AttentionInterface.register(ATTENTION, attend)


@contextmanager
def attending(model: Any) -> Iterator[None]:
    """While open, the model attends over a SlotCache. transformers makes no mask for an attention that it does not know; that
    GPT-2 is given none would have it look for padding in every step, on the host."""
    config = model.get_decoder().config.get_text_config()
    before = config._attn_implementation, getattr(config, "pad_token_id", None)
    config._attn_implementation, config.pad_token_id = ATTENTION, None
    try:
        yield
    finally:
        config._attn_implementation, config.pad_token_id = before


def next_logits(
    model: Any, cache: SlotCache, tokens: Int[torch.Tensor, " row"], positions: Int[torch.Tensor, "row 1"]
) -> Float[torch.Tensor, "row vocabulary"]:
    """Logits after each row's token, whose keys and values go into its slot; `positions` are those of the step that has begun.

    The hidden state of a single position is contiguous, so lm_head folds it into one 2-D product (measured 1.0-1.1x of a 2-D
    input). A slice out of several positions does not fold: 12x in float32 and 340x in bfloat16 for the last of 9.
    """
    with attending(model):
        output = model(input_ids=tokens[:, None], position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits: torch.Tensor = output.logits[:, -1]
    return logits


def fits(model: Any, length: int) -> bool:
    """Whether a model's rows of up to `length` tokens, prompt included, can lie in slots: its attention is known, no window cuts
    them, and a cap on scores is one that its own attention applies (transformers' SDPA leaves Gemma-2's out).
    """
    config = model.get_decoder().config.get_text_config()
    if config.model_type not in ARCHITECTURES or getattr(config, "reorder_and_upcast_attn", False):
        return False
    if getattr(config, "attn_logit_softcapping", None) is not None and config._attn_implementation != "eager":
        return False
    window = getattr(config, "sliding_window", None)
    return window is None or length <= window


def numerics(model: Any, length: int) -> dict[str, str]:
    """How a model is computed, for the record: attention of prompts and of single tokens, and whether float32 is TF32."""
    prompts = str(model.get_decoder().config.get_text_config()._attn_implementation)
    parameter = next(model.parameters())
    config = model.get_decoder().config.get_text_config()
    head = parameter.new_empty(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    slots = f"{ATTENTION} (compiled)" if compiled.fits(head) else ATTENTION
    attention = f"{prompts}, {slots} while decoding" if fits(model, length) else prompts
    return {"attention": attention, "tf32": "on" if torch.backends.cuda.matmul.allow_tf32 else "off"}


def bytes_per_row(keys_and_values: Sequence[tuple[torch.Tensor, torch.Tensor]], capacity: int) -> int:
    """Of a slot with room for `capacity` tokens, for prompts with these keys and values."""
    heads = [_stored(one[:1, :, :1]).nbytes for both in keys_and_values for one in both]
    return capacity * sum(heads)


def repeated(prefix: Any | None, count: int) -> Any | None:
    """A cache of `count` rows that all begin with `prefix`, to go on from; nothing is copied before it grows."""
    if prefix is None:
        return None
    cache = copy.copy(prefix)
    cache.layers = [copy.copy(layer) for layer in prefix.layers]
    for layer in cache.layers:
        if layer.keys is not None:  # of a block that ran
            layer.keys = layer.keys.expand(count, -1, -1, -1)
            layer.values = layer.values.expand(count, -1, -1, -1)
    return cache
