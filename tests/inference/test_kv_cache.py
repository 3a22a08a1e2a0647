"""Slots by themselves: what is moved, copied and given up, against lists that do the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ksweep.inference import kv_cache

LAYERS, HEADS, WIDTH = 2, 2, 4


def past_of(rows: list[list[float]], length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of `length` tokens a row: x and -x in every head, and 1000 more in block 1."""
    x = torch.tensor([row[:length] for row in rows])[:, None, :, None].expand(-1, HEADS, -1, WIDTH)
    return [(x + 1000 * layer, -(x + 1000 * layer)) for layer in range(LAYERS)]


def held(cache: kv_cache.KVCache) -> list[list[float]]:
    """Every slot's tokens, which have to be the same in all blocks and heads."""
    found = []
    for slot, length in enumerate(cache.lengths):
        for number, layer in enumerate(cache.layers):
            keys, values = (
                sign * array[slot, :, :length].float() - 1000 * number for sign, array in ((1, layer.keys), (-1, layer.values))
            )
            assert torch.equal(keys, values) and torch.equal(keys, keys[:1, :, :1].expand_as(keys))
            if number == 0:
                found.append(keys[0, :, 0].tolist())
            else:
                assert keys[0, :, 0].tolist() == found[-1]
    return found


@pytest.mark.parametrize("seed", range(40))
def test_slots_hold_what_lists_hold(seed: int) -> None:
    """Rows come, are given up, reordered and copied at random; rows of different lengths side by side."""
    rng = np.random.default_rng(seed)
    num_slots = int(rng.integers(1, 9))
    cache = kv_cache.KVCache(None, LAYERS, num_slots, capacity=6)
    expected: list[list[float]] = []
    number = 0
    for _ in range(20):
        if (room := num_slots - len(expected)) and rng.random() < 0.6:
            length = int(rng.integers(1, 6))
            new = [[float(number + 10 * i + t) for t in range(length)] for i in range(int(rng.integers(1, room + 1)))]
            number += 100
            cache.append_rows(past_of(new, length), length)
            expected += new
        if not expected:
            continue
        named = rng.integers(0, len(expected), size=rng.integers(0, num_slots + 1)).tolist()
        order = cache.select(named)
        assert sorted(order) == list(range(len(named)))
        expected = [expected[named[i]] for i in order]
        assert held(cache) == expected


def test_rows_that_stay_are_not_moved() -> None:
    """Three slots, the middle one given up and the first copied: one row is written, and that is the copy."""
    cache = kv_cache.KVCache(None, LAYERS, 3, capacity=4)
    cache.append_rows(past_of([[1.0], [2.0], [3.0]], 1), 1)
    moves: list[tuple[list[int], list[int]]] = []
    move = kv_cache.KVCacheLayer.copy_rows
    cache.layers[0].copy_rows = lambda sources, targets, length: (  # type: ignore[method-assign]
        moves.append((sources.tolist(), targets.tolist())),
        move(cache.layers[0], sources, targets, length),
    )
    assert cache.select([0, 0, 2]) == [0, 1, 2]
    assert moves == [([0], [1])] and held(cache) == [[1.0], [1.0], [3.0]]
    cache.select([0, 1, 2])
    assert len(moves) == 1


def test_spoiled_places_are_those_that_come_next() -> None:
    cache = kv_cache.KVCache(None, LAYERS, 3, capacity=4)
    cache.append_rows(past_of([[1.0, 2.0], [3.0, 4.0]], 2), 2)
    cache.poison_with_nan(torch.tensor([2, 2, 0]))
    assert held(cache) == [[1.0, 2.0], [3.0, 4.0]]
    for layer in cache.layers:
        assert layer.keys is not None and layer.values is not None
        assert layer.values.isnan().all(-1).all(1).nonzero().tolist() == [[0, 2], [1, 2], [2, 0]]
        assert layer.keys[[0, 1, 2], :, [2, 2, 0]].isnan().all()
