"""What the parts share: where they run, a model of the shape of Qwen2.5-7B, a timed stream of draws, a count of launches."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import bench_gpu  # noqa: E402

from ksweep.inference import attention, cuda_graphs, engine, gumbel_sampling, kv_cache  # noqa: E402
from ksweep.inference.engine import Draw, Request, draw  # noqa: E402

WAITS = ("item", "_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "repeat_interleave")
"""Operations whose result's size or value the host must know: on a GPU it waits for them. So does an index that is a mask."""


@dataclass(frozen=True)
class Setting:
    """Where a part runs, and how much of it."""

    tiny: bool
    device: torch.device

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def rows(self) -> list[int]:
        """Draws in flight."""
        return [8, 16] if self.tiny else [64, 256, 512, 768]

    @property
    def tokens(self) -> int:
        """New tokens of a text; those of the released pair have 120 to 140."""
        return 24 if self.tiny else 128

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def milliseconds(self, work: Callable[[], object], repeats: int = 10, warm: int = 3) -> float:
        """Return the median time of a run, by the GPU's own clock where there is one."""
        for _ in range(1 if self.tiny else warm):
            work()
        return statistics.median(self._one_run(work) for _ in range(2 if self.tiny else repeats))

    def _one_run(self, work: Callable[[], object]) -> float:
        if not self.on_gpu:
            began = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - began)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))

    def bench_options(self, **others: Any) -> argparse.Namespace:
        """Return the options of scripts/bench_gpu.py."""
        common = {
            "tiny": self.tiny,
            "dtype": "bfloat16",
            "device": self.device,
            "temperature": 1.0,
            "batch_size": None,
            "tokens": self.tokens,
            "layers": None,
        }
        return argparse.Namespace(**common | others)


def say(*words: object, end: str = "\n") -> None:
    print(*words, end=end, flush=True)


def large_verbalizer(setting: Setting, **others: Any) -> Any:
    """Return an AV of the shape of Qwen2.5-7B with random weights, or a tiny one."""
    began = time.perf_counter()
    av = bench_gpu.verbalizer(setting.bench_options(**others))
    setting.synchronize()
    size = sum(p.nbytes for p in av.model.parameters()) / 1e9
    say(f"model of {size:.3g} GB made in {time.perf_counter() - began:.1f} s")
    return av


def requests(activations: Sequence[int] | range, k: int) -> list[Request]:
    return [Request(row, row * 7919, number) for row in activations for number in range(k)]


@contextmanager
def graphs(on: bool) -> Iterator[None]:
    """Record steps as CUDA graphs, or do not."""
    with patch.dict(os.environ, {cuda_graphs.CUDA_GRAPHS_VARIABLE: "1" if on else "0"}):
        yield


@contextmanager
def stop_tokens(av: Any, one_in: int | None) -> Iterator[None]:
    """Let one token in so many end a text; None: every text is as long as it may be."""
    before = av.stop_token_ids
    av.stop_token_ids = frozenset(range(0, av.model.config.vocab_size, one_in)) if one_in else frozenset()
    try:
        yield
    finally:
        av.stop_token_ids = before


def timed_steps(
    av: Any, setting: Setting, rows: int, *, recorded: bool, natural: bool = False, fills: int = 1, k: int = 16, **options: Any
) -> tuple[list[tuple[float, int]], list[Draw]]:
    """Draw a whole stream. Returns seconds and tokens of every step, and the draws.

    Args:
        rows: draws in flight.
        natural: texts end by chance; otherwise all have `setting.tokens` tokens.
        fills: how many times every slot is filled.
    """
    activations = max(1, fills * rows // k)
    vectors = torch.randn(activations, av.d_model, generator=torch.Generator().manual_seed(0))
    steps: list[tuple[float, int]] = []
    last = time.perf_counter()

    def on_step(tokens: int) -> None:
        nonlocal last
        now = time.perf_counter()
        steps.append((now - last, tokens))
        last = now

    options = {"temperature": 1.0, "max_new_tokens": setting.tokens * (1 + natural), "seed": 0, "batch_size": rows} | options
    with graphs(recorded), stop_tokens(av, setting.tokens if natural else None):
        drawn = list(draw(av, vectors, requests(range(activations), k), on_step=on_step, **options))
    setting.synchronize()
    return steps, drawn


def texts_of(drawn: Sequence[Draw]) -> dict[tuple[int, int], tuple[int, ...]]:
    return {(one.request.row, one.request.draw): one.token_ids for one in drawn}


def same_texts(first: Mapping[Any, Any], second: Mapping[Any, Any]) -> str:
    return f"{sum(first[key] == second[key] for key in first)} of {len(first)} texts equal"


class LaunchCount(TorchDispatchMode):
    """Counts by phase the operations that would launch a kernel or a copy on a GPU, and those that the host would wait for.

    Views, and tensors whose contents are not set, cost nothing and are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "other"
        self.launches: dict[str, Counter[str]] = defaultdict(Counter)
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = [t.untyped_storage().data_ptr() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        is_view = not func._schema.is_mutable and bool(made) and set(made) <= given
        if made and not is_view and "empty" not in name:
            self.launches[self.phase][name] += 1
        if name in WAITS or (name.startswith("index") and _has_mask(args)):
            self.waits[f"{name} ({self.phase})"] += 1
        return out

    def counted(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, with what it does counted as a phase."""

        def inside(*args: Any, **kwargs: Any) -> Any:
            before, self.phase = self.phase, phase
            try:
                return function(*args, **kwargs)
            finally:
                self.phase = before

        return inside


def _has_mask(args: Sequence[Any]) -> bool:
    return any(isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in tree_leaves(args[1:2]))


@contextmanager
def counted_launches() -> Iterator[LaunchCount]:
    """Count the operations of drawing, phase by phase, as they are on a GPU: keys in the model's dtype, 256 rows a sampling."""
    count, decoder = LaunchCount(), engine._SlotDecoder
    with (
        patch.object(kv_cache, "_attention_dtype", lambda tensor: tensor),
        patch.object(gumbel_sampling, "_rows_per_chunk", lambda logits: 256),
        patch.object(attention, "float32_product", torch.bmm),  # one kernel there; copies in float32 here
        patch.object(attention, "next_logits", count.counted("model's step (in the graph)", attention.next_logits)),
        patch.object(kv_cache.KVCache, "select", count.counted("moves of rows", kv_cache.KVCache.select)),
        patch.object(kv_cache.KVCache, "begin_step", count.counted("model's step (in the graph)", kv_cache.KVCache.begin_step)),
        patch.object(gumbel_sampling, "sample", count.counted("sampling", partial(gumbel_sampling.sample, may_wait=False))),
        patch.object(gumbel_sampling, "step_keys", count.counted("keys of the step", gumbel_sampling.step_keys)),
        patch.object(decoder, "_refill", _counted_generator(count, "prompts and first tokens", decoder._refill)),
        count,
    ):
        yield count


def _counted_generator(count: LaunchCount, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a generator function, with what it does between its yields counted as a phase."""

    def inside(*args: Any, **kwargs: Any) -> Iterator[Any]:
        source = function(*args, **kwargs)
        advance = count.counted(phase, lambda: next(source, inside))
        while (found := advance()) is not inside:
            yield found

    return inside
