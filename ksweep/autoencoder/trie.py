"""Texts that begin alike, read as a trie: every distinct beginning runs once.

    texts       a red house | a red car | a tree        node    0    1      2    3     4
                                                        token   a   red  house  car  tree
    as a trie   a -> red -> house                       depth   0    1      2    2     1
                       \\-> car                          last    4    3      2    3     4
                  \\-> tree

Nodes lie depth first in a row of a batch, those of many texts in one row. A node has the position of its depth and sees what
comes before all texts, its ancestors and itself, so it is computed as it would be in a text of its own ("tree attention":
SpecInfer, Miao et al. 2023, arXiv 2305.09781). Node j is i or an ancestor of i where j <= i <= last[j].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ksweep.inference import kv_cache
from ksweep.inference.batching import BATCH_COST, length_batches

if TYPE_CHECKING:
    from jaxtyping import Float, Int

PACK_NODES = 96
"""Nodes in a row of a batch. Attention has a score for every two of them, and what two rows share runs twice. 128 texts of the
demo pair, 21 blocks of 576, one CPU thread, against rows of their own and the whole last block: 48 nodes 1.14 and 1.16 times as
fast (T = 0.7 and 0.4), 64 1.19 and 1.22, 96 1.20 and 1.23, 128 1.13 and 1.22, 192 1.13 and 1.11. Not measured on a GPU."""
PACK_TEXTS = 4
"""Texts of mean length that a row has room for at least, where they are long."""
MASKED = 1.08
"""What a token costs in a row that texts share, in tokens of rows of their own, for attention over all nodes of the row: 9 %
fewer padded tokens took as long (texts of random words, same machine)."""


@dataclass
class Pack:
    """Texts that share a row of a batch; a list with an entry for each node unless it says otherwise."""

    texts: list[int] = field(default_factory=list)
    """Indices of the texts."""
    ends: list[int] = field(default_factory=list)
    """Of each text the node of its last token."""
    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    """Tokens before it in its texts."""
    last: list[int] = field(default_factory=list)
    """The last node behind it in any text, itself where there is none."""

    def __len__(self) -> int:
        """Nodes."""
        return len(self.tokens)


@dataclass(frozen=True)
class Inputs:
    """What a model reads for the packs of a batch."""

    ids: Int[torch.Tensor, "pack node"]
    positions: Int[torch.Tensor, "pack node"] | None
    """None where they are those of rows, which models find themselves."""
    mask: Float[torch.Tensor, "pack 1 node seen"] | None
    """0 where a node sees a token, the least number where it does not; None where each sees all before it."""
    ends: Int[torch.Tensor, " text"]
    """Of each text, pack after pack, the place of its last token in the flattened batch."""


def batches(rows: Sequence[Sequence[int]], most_tokens: int, most_texts: int, alike: bool = True) -> list[list[Pack]]:
    """Texts, as token ids, in batches of packs: each in a pack of its own or many in one, whichever is less to read.

    Args:
        rows: token ids, none without any.
        most_tokens: padded tokens of a batch; a single pack may have more.
        most_texts: of a batch.
        alike: whether a pack may hold more than one text.
    """
    room = max(PACK_NODES, PACK_TEXTS * sum(map(len, rows)) // max(1, len(rows)))
    ways = [_cut(packs(rows, most, room), most_tokens, most_texts) for most in ([1, most_texts] if alike else [1])]
    return min(ways, key=_cost)


def _cut(found: Sequence[Pack], most_tokens: int, most_texts: int) -> list[list[Pack]]:
    most_packs = most_texts // max((len(pack.texts) for pack in found), default=1)
    return [[found[i] for i in batch] for batch in length_batches([len(pack) for pack in found], most_tokens, most_packs)]


def _cost(cut: Sequence[Sequence[Pack]]) -> float:
    """Padded tokens, dearer where texts share a row, and what a batch costs beside them."""
    return sum(max(map(len, batch)) * len(batch) * (MASKED if _is_shared(batch) else 1) + BATCH_COST for batch in cut)


def _is_shared(batch: Sequence[Pack]) -> bool:
    return any(len(pack.texts) > 1 for pack in batch)


def packs(rows: Sequence[Sequence[int]], most_texts: int, most_nodes: int) -> list[Pack]:
    """Token ids of texts, none empty, as packs of at most `most_texts` texts and `most_nodes` nodes, a single text perhaps more.

    Texts are taken in lexicographic order, so those that begin alike follow one another; what two packs share is in both.
    """
    found: list[Pack] = []
    path: list[int] = []  # nodes of the text before
    before: Sequence[int] = ()
    for text in sorted(range(len(rows)), key=lambda i: tuple(rows[i])):
        row = rows[text]
        shared = _shared(before, row)
        if not found or len(found[-1].texts) == most_texts or len(found[-1]) + len(row) - shared > most_nodes:
            found.append(Pack())
            path, shared = [], 0
        pack = found[-1]
        new = range(len(pack), len(pack) + len(row) - shared)
        path[shared:] = new
        pack.tokens += row[shared:]
        pack.depths += range(shared, len(row))
        pack.last += new
        for node in path:
            pack.last[node] = len(pack) - 1
        pack.texts.append(text)
        pack.ends.append(path[-1])
        before = row
    return found


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of their common beginning."""
    least = min(len(one), len(other))
    return next((i for i in range(least) if one[i] != other[i]), least)


def inputs(batch: Sequence[Pack], num_before: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Packs side by side behind `num_before` tokens that every node sees; padding, at the end, is seen by nobody else."""
    width = max(map(len, batch))

    def padded(rows: Sequence[Sequence[int]], fill: int) -> Int[torch.Tensor, "pack node"]:
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], device=device)

    ids = padded([pack.tokens for pack in batch], 0)
    ends = torch.tensor([i * width + end for i, pack in enumerate(batch) for end in pack.ends], device=device)
    if not _is_shared(batch):
        return Inputs(ids, None, None, ends)
    last, node = padded([pack.last for pack in batch], width), torch.arange(width, device=device)
    unseen = (node[:, None] < node) | (node[:, None] > last[:, None, :])
    mask = torch.zeros(len(batch), 1, width, num_before + width, dtype=dtype, device=device)
    mask[:, 0, :, num_before:].masked_fill_(unseen, torch.finfo(dtype).min)
    return Inputs(ids, padded([pack.depths for pack in batch], 0) + num_before, mask, ends)


def fits(model: Any, length: int) -> bool:
    """Whether a text of up to `length` tokens, template included, can lie in a trie: the model's attention is known and takes a
    mask of our own, and no window cuts the text."""
    implementation = model.get_decoder().config.get_text_config()._attn_implementation
    return implementation in ("sdpa", "eager") and kv_cache.fits(model, length)
