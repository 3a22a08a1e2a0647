"""Positions: the four rules, keyed by row."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksweep.activations.positions import most_per_row, row_positions, rule_identity
from ksweep.config.spec import Activations

TAE = Path(__file__).parents[1] / "fixtures" / "tae"
IDS = [1, 9, 9, 9, 1, 9, 9, 9, 9, 9]  # 1 is special


def request(**fields: Any) -> Activations:
    return Activations(model="m", text="t", min_position=2, **fields)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"positions": "all"}, [2, 3, 5, 6, 7, 8, 9]),
        ({"positions": "last"}, [9]),
        ({"positions": "stride", "stride": 2}, [2, 6, 8]),
        ({"positions": "stride", "stride": 3}, [2, 5, 8]),
    ],
)
def test_rules_take_the_positions_that_a_hand_count_gives(rule: dict[str, Any], expected: list[int]) -> None:
    assert row_positions(IDS, "row", {1}, request(**rule)) == expected


def test_random_rule_draws_as_the_public_pipeline_does() -> None:
    candidates = [i for i, token in enumerate(IDS) if i >= 2 and token != 1]
    rng = random.Random(hashlib.sha256(b"42|corpus:train:7").digest())
    assert row_positions(IDS, "corpus:train:7", {1}, request(positions_per_document=3)) == rng.sample(candidates, 3)


@pytest.mark.parametrize("rule", ["random", "last", "all", "stride"])
def test_row_without_an_allowed_position_gives_none(rule: Any) -> None:
    assert row_positions([9, 9], "row", {1}, request(positions=rule)) == []
    assert row_positions([9, 9, 1, 1], "row", {1}, request(positions=rule)) == []
    assert row_positions([], "row", {1}, request(positions=rule)) == []


@given(
    ids=st.lists(st.integers(0, 3), max_size=40),
    rule=st.sampled_from(["random", "last", "all", "stride"]),
    low=st.integers(0, 10),
    stride=st.integers(1, 7),
    count=st.integers(1, 5),
)
def test_positions_are_allowed_distinct_and_never_more_than_the_bound(
    ids: list[int], rule: Any, low: int, stride: int, count: int
) -> None:
    activations = Activations(
        model="m", text="t", positions=rule, min_position=low, stride=stride, positions_per_document=count, max_length=40
    )
    taken = row_positions(ids, "row", {0}, activations)
    assert len(set(taken)) == len(taken) <= most_per_row(activations, 40)
    assert all(low <= p < len(ids) and ids[p] != 0 for p in taken)


def test_rule_identity_leaves_out_what_the_rule_does_not_use() -> None:
    assert rule_identity(request(positions="last", seed=1)) == rule_identity(request(positions="last", seed=2, stride=5))
    assert rule_identity(request(seed=1)) != rule_identity(request(seed=2))
    assert rule_identity(request(positions="stride", stride=1)) != rule_identity(request(positions="stride", stride=2))


@pytest.mark.parametrize("case", sorted(p.parent.name for p in TAE.glob("*/expected.npz")))
def test_not_padding_bounds_and_midpoint_equal_the_reference(case: str) -> None:
    arrays = np.load(TAE / case / "expected.npz")
    expected = json.loads((TAE / case / "expected.json").read_text())
    for at, min_pos in enumerate(expected["position_min_pos"]):
        for row, ids in enumerate(arrays["position_input_ids"].tolist()):
            if set(ids) == {expected["position_pad_id"]}:  # the reference takes position 0 of a row of padding
                continue
            rule = Activations(
                model="m", text="t", min_position=min_pos, candidates="not_padding", positions="all", max_length=16
            )
            found = row_positions(ids, "r", set(), rule, expected["position_pad_id"])
            assert (found[0], found[-1]) == (arrays["position_lower"][at, row], arrays["position_upper"][at, row])
            middle = row_positions(ids, "r", set(), replace(rule, positions="midpoint"), expected["position_pad_id"])
            assert middle == [arrays["position_midpoint"][at, row]]
