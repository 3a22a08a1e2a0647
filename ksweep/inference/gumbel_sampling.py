"""Keyed sampling: draw k of activation i is the same token sequence on one GPU or on 64, alone or in a batch of 512.

A token is drawn by the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014, arXiv 1411.0030): argmax over tokens of log
weight + G with independent standard Gumbel G is an exact draw from the normalised weights. Two levels make it cheap: first a
block of `TOKENS_PER_BLOCK` neighbouring token ids by its summed weight, then a token within that block, because p(token) =
p(block) p(token | block). A vocabulary of 49,152 needs 192 + 256 noise numbers a row instead of 49,152.

The noise is a pure function of (seed, activation key, draw, step), computed by the splitmix64 generator (Steele et al. 2014) in
int64 tensor arithmetic, which wraps and is the same on every device. Batch shapes can then differ only in the rounding of the
logits, and draws only in the rare tie that rounding decides: a block's summed weight changes in its last digits, whereas the
running sum of an inverse-CDF sampler would move every boundary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

TOKENS_PER_BLOCK = 256
"""Part of the noise's definition, like the seed: another value gives other (equally good) draws. Never chosen from the batch,
the vocabulary or the device. Near the square root of the vocabularies in use (49k .. 262k), where noise is cheapest."""

UNIFORM_BITS = 23
"""(n + 1/2) / 2^23 is exact in float32 and lies strictly inside (0, 1); with 24 bits the largest rounds to 1.0: infinite
noise. Tokens below 2^-23 of their block, and blocks below 2^-23 of the row, are drawn less often than their weight says:
together they hold less than (256 + blocks) 2^-23, some 1e-4 at the very most and in practice nothing."""

UNDECIDED = -1
"""The token of a key whose row must be sampled again, with waits: its nucleus has more than `CANDIDATES_WITHOUT_WAIT` tokens."""
CANDIDATES_WITHOUT_WAIT = 4096
"""Largest weights among which the edge of a nucleus is sought where the host does not wait for the answer. On a GPU finding them
takes about as long as finding 64 does, sorting a whole vocabulary several times as long (an estimate)."""

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
_BLOCK_COUNTER = 1 << 32
"""Counters of the block noise start here, those of the noise within a block at 0: the two never meet."""


@dataclass(frozen=True)
class SharedRows:
    """Which rows of logits several keys sample from; the keys of a row follow one another."""

    counts: Sequence[int]
    """[row] number of keys."""
    origin: Int[torch.Tensor, " key"]
    """The row of each key."""


@dataclass(frozen=True)
class Sample:
    """One token per key."""

    token_ids: Int[torch.Tensor, " key"]
    """int64; meaningless where the row's logits are not finite, and perhaps `UNDECIDED` where the host did not wait."""
    log_probabilities: Float[torch.Tensor, " key"]
    """float32: the model's own log probability of the token, at temperature 1 and without top_p, whatever it was drawn with, so
    that temperatures can be compared. NaN exactly where the logits contain NaN or +inf, or nothing but -inf."""


def draw_keys(
    seed: int | Sequence[int], activation_keys: Sequence[int], draws: Sequence[int], device: torch.device | str = "cpu"
) -> Int[torch.Tensor, " draw"]:
    """Return the key of each (seed, activation, draw), from which all its noise follows.

    Activation keys are any 64-bit integers, signed or not.
    """
    seeds = [seed] * len(activation_keys) if isinstance(seed, int) else seed
    key, *parts = (torch.tensor(list(map(_signed, part)), dtype=torch.int64) for part in (seeds, activation_keys, draws))
    for part in parts:
        key = _mix(_mix(key + _GOLDEN) ^ part)
    return key.to(device)


def shared_rows(counts: Sequence[int], device: torch.device | str = "cpu") -> SharedRows | None:
    """Return which key samples from which row, given the number of keys of each row; None if every row has one key."""
    if all(count == 1 for count in counts):
        return None
    return SharedRows(counts, torch.tensor([row for row, count in enumerate(counts) for _ in range(count)], device=device))


def step_keys(draws: Int[torch.Tensor, " draw"], step: int | Int[torch.Tensor, " draw"]) -> Int[torch.Tensor, " draw"]:
    """Derive the keys of one decoding step from `draw_keys`; step 0 draws the first token. Draws may be at different steps."""
    return _mix(_mix(draws + _GOLDEN) ^ step)


def sample(
    logits: Float[torch.Tensor, "row vocabulary"],
    keys: Int[torch.Tensor, " key"],
    *,
    temperature: float | Float[torch.Tensor, " row"],
    top_p: float = 1.0,
    shared_rows: SharedRows | None = None,
    may_wait: bool | None = None,
) -> Sample:
    """Sample one token per key from softmax(logits / temperature), cut to the nucleus of top_p.

    At temperature 0 the largest logit is taken, the lowest token id on ties, and neither noise nor top_p is used.

    Args:
        keys: from `step_keys`.
        temperature: one for all rows, or one per row.
        shared_rows: which keys sample from which row; None: each from its own. What does not depend on the key is computed once
            per row.
        may_wait: whether the host may wait for the device, as it has to for some nuclei (see `nucleus`); without, keys of these
            are `UNDECIDED`. None: it may on a CPU, where there is nothing to wait for.
    """
    may_wait = logits.device.type == "cpu" if may_wait is None else may_wait
    size = _rows_per_chunk(logits)
    parts, first_key = [], 0
    for start in range(0, len(logits), size):
        chunk = slice(start, start + size)
        chunk_temperature = temperature[chunk] if isinstance(temperature, torch.Tensor) else temperature
        last_key = first_key + (len(logits[chunk]) if shared_rows is None else sum(shared_rows.counts[chunk]))
        chunk_keys = slice(first_key, last_key)
        origin = None if shared_rows is None else shared_rows.origin[chunk_keys] - start
        parts.append(_sample_rows(logits[chunk].float(), keys[chunk_keys], chunk_temperature, top_p, origin, may_wait))
        first_key = last_key
    return Sample(torch.cat([tokens for tokens, _ in parts]), torch.cat([log_p for _, log_p in parts]))


def nucleus(
    weights: Float[torch.Tensor, "row vocabulary"], top_p: float, may_wait: bool = True
) -> Float[torch.Tensor, "row vocabulary"]:
    """Return normalised weights with those outside the nucleus set to 0 (top-p, Holtzman et al. 2020, arXiv 1904.09751).

    The nucleus is the smallest set of most probable tokens whose probabilities sum to at least top_p; among equally probable
    tokens the lower ids come first, so at the edge exactly as many of them stay as are needed. Sums are taken in float64 over
    float32 probabilities. The edge is found among the 64 largest weights, and for rows where these do not reach top_p among 8
    times as many, and so on: sorting everything costs 40 times as much on a CPU. Each such round is a wait of the host. Without
    waits it is sought among `CANDIDATES_WITHOUT_WAIT` weights, and a row whose nucleus is larger becomes 0 everywhere.
    """
    edge, kept_at_edge = _nucleus_edge(weights, top_p, 64 if may_wait else CANDIDATES_WITHOUT_WAIT, may_wait)
    at_edge = weights == edge[:, None]
    keep = (weights > edge[:, None]) | (at_edge & (at_edge.cumsum(-1, dtype=torch.int32) <= kept_at_edge[:, None]))
    return weights * keep


def two_level_argmax(
    weights: Float[torch.Tensor, "row vocabulary"],
    keys: Int[torch.Tensor, " key"],
    origin: Int[torch.Tensor, " key"] | None = None,
) -> Int[torch.Tensor, " key"]:
    """Draw a token id per key in proportion to non-negative weights of any scale: a block, then a token within it.

    Args:
        origin: the row of weights that each key draws from; None: its own.
    """
    vocabulary = weights.shape[1]
    blocks = _per_key(_block_sums(weights).log(), origin)
    block = (blocks + _gumbel(keys, blocks.shape[1], _BLOCK_COUNTER)).argmax(-1, keepdim=True)
    ids = block * TOKENS_PER_BLOCK + torch.arange(TOKENS_PER_BLOCK, device=weights.device)
    inside = _gather(weights, ids.clamp(max=vocabulary - 1), origin).masked_fill(ids >= vocabulary, 0.0)
    chosen = (inside.log() + _gumbel(keys, TOKENS_PER_BLOCK, 0)).argmax(-1, keepdim=True)
    return ids.gather(1, chosen).squeeze(1)


def uniforms(keys: Int[torch.Tensor, " key"], count: int, first: int = 0) -> Float[torch.Tensor, "key count"]:
    """Return numbers `first` .. `first + count` of each key's random stream, strictly between 0 and 1, float32."""
    counters = torch.arange(first + 1, first + count + 1, device=keys.device) * _GOLDEN
    bits = _shift_right(_mix(keys[:, None] + counters), 64 - UNIFORM_BITS)
    return bits.float().add_(0.5).mul_(2.0**-UNIFORM_BITS)


def _sample_rows(
    logits: Float[torch.Tensor, "row vocabulary"],
    keys: Int[torch.Tensor, " key"],
    temperature: float | Float[torch.Tensor, " row"],
    top_p: float,
    origin: Int[torch.Tensor, " key"] | None,
    may_wait: bool,
) -> tuple[Int[torch.Tensor, " key"], Float[torch.Tensor, " key"]]:
    if isinstance(temperature, torch.Tensor):
        # Rows at temperature 0 are sampled slightly above it, so that the division is defined, and then replaced.
        weights = _probabilities(logits, temperature.clamp(min=1e-30)[:, None])
        tokens, undecided = _tokens_of_nucleus(weights, keys, top_p, origin, may_wait)
        tokens = torch.where(_per_key(temperature == 0, origin), _per_key(logits.argmax(-1), origin), tokens)
        undecided = None if undecided is None else undecided & _per_key(temperature != 0, origin)
        return _marked(tokens, undecided), _log_probabilities(logits, tokens, origin)
    if temperature == 0:
        tokens = _per_key(logits.argmax(-1), origin)
        return tokens, _log_probabilities(logits, tokens, origin)
    weights = _probabilities(logits, temperature)
    tokens, undecided = _tokens_of_nucleus(weights, keys, top_p, origin, may_wait)
    if temperature == 1:  # the weights are the model's own probabilities: one pass over the vocabulary less
        log_probabilities = _gather(weights, tokens[:, None], origin).squeeze(1).log()
    else:
        log_probabilities = _log_probabilities(logits, tokens, origin)
    return _marked(tokens, undecided), log_probabilities


def _tokens_of_nucleus(
    weights: Float[torch.Tensor, "row vocabulary"],
    keys: Int[torch.Tensor, " key"],
    top_p: float,
    origin: Int[torch.Tensor, " key"] | None,
    may_wait: bool,
) -> tuple[Int[torch.Tensor, " key"], Bool[torch.Tensor, " key"] | None]:
    """Draw a token id per key from the nucleus, and say which keys' nuclei could not be told without a wait."""
    if top_p >= 1:
        return two_level_argmax(weights, keys, origin), None
    kept = nucleus(weights, top_p, may_wait)
    tokens = two_level_argmax(kept, keys, origin)
    # Of weights that are all 0 some token is drawn; of others none whose weight is 0.
    return tokens, None if may_wait else _gather(kept, tokens[:, None], origin).squeeze(1) == 0


def _marked(tokens: Int[torch.Tensor, " key"], undecided: Bool[torch.Tensor, " key"] | None) -> Int[torch.Tensor, " key"]:
    return tokens if undecided is None else tokens.masked_fill(undecided, UNDECIDED)


def _probabilities(
    logits: Float[torch.Tensor, "row vocabulary"], temperature: float | Float[torch.Tensor, "row 1"]
) -> Float[torch.Tensor, "row vocabulary"]:
    if isinstance(temperature, float | int) and temperature == 1:
        return logits.softmax(-1)
    # The largest logit is subtracted first: a small temperature would magnify the rounding of logits / temperature.
    return (logits - logits.amax(-1, keepdim=True)).div_(temperature).softmax(-1)


def _log_probabilities(
    logits: Float[torch.Tensor, "row vocabulary"], tokens: Int[torch.Tensor, " key"], origin: Int[torch.Tensor, " key"] | None
) -> Float[torch.Tensor, " key"]:
    return _gather(logits.log_softmax(-1), tokens[:, None], origin).squeeze(1)


def _per_key(rows: torch.Tensor, origin: Int[torch.Tensor, " key"] | None) -> torch.Tensor:
    """Repeat each row for its keys."""
    return rows if origin is None else rows[origin]


def _gather(rows: torch.Tensor, ids: Int[torch.Tensor, "key id"], origin: Int[torch.Tensor, " key"] | None) -> torch.Tensor:
    """Return the values at `ids` of each key's row: [key, id]."""
    return rows.gather(1, ids) if origin is None else rows[origin[:, None], ids]


def _block_sums(weights: Float[torch.Tensor, "row vocabulary"]) -> Float[torch.Tensor, "row block"]:
    """Sum the weights of each block; the last block may be short, which equals padding it with zero weight."""
    full = weights.shape[1] // TOKENS_PER_BLOCK * TOKENS_PER_BLOCK
    sums = weights[:, :full].reshape(len(weights), -1, TOKENS_PER_BLOCK).sum(-1) if full else weights[:, :0]
    return sums if full == weights.shape[1] else torch.cat([sums, weights[:, full:].sum(-1, keepdim=True)], dim=1)


def _nucleus_edge(
    weights: Float[torch.Tensor, "row vocabulary"], top_p: float, candidates: int, may_wait: bool
) -> tuple[Float[torch.Tensor, " row"], Int[torch.Tensor, " row"]]:
    """Return the smallest weight in each row's nucleus, and how many tokens of exactly that weight belong to it.

    Where the candidates do not hold it and the host may not wait, it is infinite.
    """
    candidates = min(candidates, weights.shape[1])
    largest = weights.topk(candidates).values  # its values are sorted and reproducible; its choice of ids among ties is neither
    size = (largest.double().cumsum(-1) < top_p).sum(-1) + 1
    last = (size.clamp(max=candidates) - 1)[:, None]
    edge = largest.gather(1, last)
    kept_at_edge = last.squeeze(1) + 1 - (largest > edge).sum(-1)
    edge = edge.squeeze(1)
    too_few = size > candidates
    if candidates == weights.shape[1]:
        return edge, kept_at_edge
    if not may_wait:
        return edge.masked_fill(too_few, float("inf")), kept_at_edge
    if bool(too_few.any()):
        edge[too_few], kept_at_edge[too_few] = _nucleus_edge(weights[too_few], top_p, 8 * candidates, may_wait)
    return edge, kept_at_edge


def _gumbel(keys: Int[torch.Tensor, " key"], count: int, first: int) -> Float[torch.Tensor, "key count"]:
    """Return standard Gumbel noise from numbers `first` .. `first + count` of each key's random stream."""
    return uniforms(keys, count, first).log_().neg_().log_().neg_()


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Apply splitmix64's finaliser (Steele, Lea, Flood 2014; Stafford's variant 13): every input bit changes every output bit."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift 64 bits right as an unsigned number; torch's own shift repeats the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """Return the int64 with the same low 64 bits."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _rows_per_chunk(logits: torch.Tensor) -> int:
    # 16 rows of 49,152 floats stay in a CPU's cache: the softmax of 512 rows takes 16-23 ms there, 39 ms in chunks of 128.
    # On a GPU fewer, larger kernels win, bounded by the memory of the float32 copies.
    return 16 if logits.device.type == "cpu" else 256
