"""Which token positions of a row become activations. Keyed by row: a row's positions depend on that row alone."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Collection, Sequence

from ksweep.spec import Activations


def row_positions(
    token_ids: Sequence[int], row_id: str, special_ids: Collection[int], activations: Activations, pad_id: int | None = None
) -> list[int]:
    """Token indices taken from one row, in order; empty where no token is allowed.

    Allowed are indices >= min_position whose token is not special. "random" is the public NLA rule (stage0_extract.py): in the
    order of drawing, not ascending; a generator seeded by (seed, row id) makes it independent of every other row.
    """
    rule = activations.positions
    candidates = _candidates(token_ids, special_ids, activations, pad_id)
    if rule == "last":
        return candidates[-1:]
    if rule == "midpoint":
        return candidates[(len(candidates) - 1) // 2 :][:1]
    if rule == "random":
        count = min(activations.positions_per_document, len(candidates))
        return row_generator(activations.seed, row_id).sample(candidates, count)
    return candidates


def _candidates(
    token_ids: Sequence[int], special_ids: Collection[int], activations: Activations, pad_id: int | None
) -> list[int]:
    """Allowed indices. Padding is what has its id at either end of the row: GPT-2 pads with EOS, which may stand inside too."""
    step = activations.stride if activations.positions == "stride" else 1
    if activations.candidates == "not_special":
        return [i for i in range(activations.min_position, len(token_ids), step) if token_ids[i] not in special_ids]
    kept = [i for i, token in enumerate(token_ids) if token != pad_id]
    return list(range(min(kept[0] + activations.min_position, kept[-1]), kept[-1] + 1, step)) if kept else []


def row_generator(seed: int, row_id: str) -> random.Random:
    """The generator of one row, seeded as the public pipeline does: SHA-256 of "seed|row id"."""
    return random.Random(hashlib.sha256(f"{seed}|{row_id}".encode()).digest())


def most_per_row(activations: Activations, max_length: int) -> int:
    """Upper bound of the positions in a row of at most `max_length` tokens."""
    span = max(max_length - activations.min_position, 0 if activations.candidates == "not_special" else 1)
    most = {
        "last": 1,
        "midpoint": 1,
        "random": activations.positions_per_document,
        "all": span,
        "stride": math.ceil(span / activations.stride),
    }
    return min(most[activations.positions], span)


def rule_identity(activations: Activations) -> dict[str, object]:
    """What of the position rule changes which activations there are: the seed of an unseeded rule, for one, does not."""
    rule: dict[str, object] = {"rule": activations.positions, "min_position": activations.min_position}
    if activations.candidates != "not_special":  # left out otherwise, so that keys from before there was a choice hold
        rule["candidates"] = activations.candidates
    if activations.max_norm is not None:
        rule["max_norm"] = activations.max_norm
    if activations.positions == "random":
        rule |= {"per_row": activations.positions_per_document, "seed": activations.seed}
    if activations.positions == "stride":
        rule["stride"] = activations.stride
    return rule
