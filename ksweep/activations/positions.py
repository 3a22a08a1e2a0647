"""Choose the token positions of a row that become activations. They depend on that row alone."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Collection, Sequence

from ksweep.activations.chat_roles import SpokenTokens
from ksweep.config.spec import Activations
from ksweep.utils.errors import DataError

SPEAKERS = ("user", "assistant", "system")
"""Roles whose messages have an end; "other" is also what stands between messages."""


def row_positions(
    token_ids: Sequence[int],
    row_id: str,
    special_ids: Collection[int],
    activations: Activations,
    pad_id: int | None = None,
    spoken: SpokenTokens | None = None,
) -> list[int]:
    """Return the token indices taken from a row, in order; empty if no token is allowed.

    Allowed are indices >= min_position whose token is not special. "random" is the public NLA rule (stage0_extract.py): in
    drawing order, not ascending, from a generator seeded by (seed, row id), so independent of other rows. Without replacement: a
    row with fewer candidates than positions_per_document gives all of them (the reference draws some twice).

    Under "prompt_end" a row that may have been cut, of max_length tokens, has no end; nor has its last message under "turn_ends".

    Args:
        pad_id: padding token at either end of the row; min_position counts from the first other token. None: no padding.
        spoken: who says each token, for rules that go by it.

    Raises:
        DataError: the rule goes by the roles of tokens, and `spoken` is None.
    """
    rule = activations.positions
    if rule == "prompt_end":
        is_cut = len(token_ids) >= activations.max_length
        return [] if is_cut else [i for i in unpadded(token_ids, pad_id)[-1:] if i >= activations.min_position]
    candidates = _candidates(token_ids, special_ids, activations, pad_id)
    if needs_roles(activations):
        if spoken is None:
            raise DataError(f"activations.{asks_for_roles(activations)} goes by the roles of tokens, and those are not known")
        candidates = _of_roles(candidates, spoken, activations)
    if rule == "last":
        return candidates[-1:]
    if rule == "midpoint":
        return candidates[(len(candidates) - 1) // 2 :][:1]
    if rule == "random":
        count = min(activations.positions_per_document, len(candidates))
        return row_generator(activations.seed, row_id).sample(candidates, count)
    return candidates


def needs_roles(activations: Activations) -> bool:
    """Return whether the rule goes by the roles of tokens."""
    return bool(asks_for_roles(activations))


def asks_for_roles(activations: Activations) -> str:
    """Return the setting by which the rule goes by the roles of tokens; empty if none does."""
    return "roles" if activations.roles else "positions=turn_ends" if activations.positions == "turn_ends" else ""


def _of_roles(candidates: Sequence[int], spoken: SpokenTokens, activations: Activations) -> list[int]:
    """Return the candidates of the roles that are asked for; under turn_ends the last one of each message.

    A message that the end of the row may have cut has no last token.
    """
    roles, messages = spoken
    of_roles = [i for i in candidates if roles[i] in (activations.roles or SPEAKERS)]
    if activations.positions != "turn_ends":
        return of_roles[:: _step(activations)]
    cut = messages[-1] if len(messages) >= activations.max_length else None
    return list({messages[i]: i for i in of_roles if messages[i] not in (None, cut)}.values())


def _step(activations: Activations) -> int:
    return activations.stride if activations.positions == "stride" else 1


def _candidates(
    token_ids: Sequence[int], special_ids: Collection[int], activations: Activations, pad_id: int | None
) -> list[int]:
    """Return the allowed indices; none in a row of padding alone, of which the reference takes position 0."""
    step = 1 if activations.roles else _step(activations)
    inside = unpadded(token_ids, pad_id)
    if activations.candidates == "not_special":
        return [i for i in inside[activations.min_position :: step] if token_ids[i] not in special_ids]
    return list(inside[min(activations.min_position, max(len(inside) - 1, 0)) :: step])


def unpadded(token_ids: Sequence[int], pad_id: int | None) -> range:
    """Return the range from the first to the last token that is not padding. Inside, the id is a token: GPT-2 pads with EOS."""
    first, end = 0, len(token_ids)
    while end > first and token_ids[end - 1] == pad_id:
        end -= 1
    while first < end and token_ids[first] == pad_id:
        first += 1
    return range(first, end)


def row_generator(seed: int, row_id: str) -> random.Random:
    """Return the generator of a row, seeded as in the public pipeline: SHA-256 of "seed|row id"."""
    return random.Random(hashlib.sha256(f"{seed}|{row_id}".encode()).digest())


def most_per_row(activations: Activations, max_length: int) -> int:
    """Return an upper bound of the positions in a row of at most `max_length` tokens."""
    span = max(max_length - activations.min_position, 0 if activations.candidates == "not_special" else 1)
    most = {
        "last": 1,
        "midpoint": 1,
        "random": activations.positions_per_document,
        "all": span,
        "stride": math.ceil(span / activations.stride),
        "turn_ends": span,
        "prompt_end": 1,
    }
    return min(most[activations.positions], span)


def rule_identity(activations: Activations) -> dict[str, object]:
    """Return the part of the position rule that decides which activations there are; of the seed, only if the rule uses it."""
    rule: dict[str, object] = {"rule": activations.positions, "min_position": activations.min_position}
    if activations.candidates != "not_special":  # left out otherwise, so that keys from before there was a choice hold
        rule["candidates"] = activations.candidates
    if activations.max_norm is not None:
        rule["max_norm"] = activations.max_norm
    if activations.roles:
        rule["roles"] = list(activations.roles)
    if needs_roles(activations):  # before, by the role of each token alone
        rule["spoken"] = "by message"
    if activations.positions == "prompt_end":  # before, rows that max_length cut had their last token taken
        rule["cut"] = "skipped"
    if activations.positions == "random":
        rule |= {"per_row": activations.positions_per_document, "seed": activations.seed}
    if activations.positions == "stride":
        rule["stride"] = activations.stride
    return rule
