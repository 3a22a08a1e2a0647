"""Parts about speed: drawing beside its bound and generate(), a step's pieces, a profile, scoring and extraction."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import bench_gpu
import numpy as np
import torch
from bench_drawing import generated
from gpu_common import Setting, graphs, large_verbalizer, requests, say, stop_tokens, timed_steps
from torch.nn import functional
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from ksweep.inference import attention, cuda_graphs, gumbel_sampling, kv_cache
from ksweep.inference.engine import draw


@torch.inference_mode()
def bench(setting: Setting) -> None:
    """Tokens a second by draws in flight, beside the bound and generate()."""
    bandwidth, flops = bench_gpu.measured_peaks(setting.bench_options())
    av = large_verbalizer(setting)
    say(
        "| draws in flight | graphs | tokens/s of the run | ms a step, late median | tokens/s there | bound | share |\n"
        "|---|---|---|---|---|---|---|"
    )
    for rows in setting.rows:
        for recorded in (True, False) if cuda_graphs.supports_cuda_graphs(av.model) else (False,):
            steps, _ = timed_steps(av, setting, rows, recorded=recorded)
            late = [seconds for seconds, tokens in steps[-len(steps) // 3 :] if tokens > 0.9 * rows]
            step, limit = statistics.median(late), bench_gpu.rate_bound(av.model, rows, bandwidth, flops)
            whole = sum(tokens for _, tokens in steps) / sum(seconds for seconds, _ in steps)
            say(
                f"| {rows} | {recorded} | {whole:,.0f} | {1e3 * step:.2f} | {rows / step:,.0f} | {limit:,.0f} | "
                f"{rows / step / limit:.1%} |"
            )
    say("state of graphs:", cuda_graphs.cuda_graphs_state(av.model))
    # Texts of natural lengths: rows fork, end and are refilled.
    steps, drawn = timed_steps(av, setting, setting.rows[-1], recorded=True, natural=True, fills=2)
    times = sorted(seconds for seconds, _ in steps)
    shares = ", ".join(f"p{p} {1e3 * times[p * (len(times) - 1) // 100]:.1f}" for p in (10, 50, 90, 100))
    say(
        f"natural lengths, mean {statistics.mean(len(one.token_ids) for one in drawn):.0f} tokens: "
        f"{sum(tokens for _, tokens in steps) / sum(times):,.0f} tokens/s over {len(steps)} steps; ms a step {shares}"
    )
    for rows in (16,) if setting.tiny else (16, 256):
        vectors = torch.randn(rows // 16, av.d_model)
        seconds = setting.milliseconds(lambda rows=rows, v=vectors: _generate(av, v, rows, setting), repeats=1, warm=1) / 1e3
        say(f"generate(), {rows} rows a batch: {rows * setting.tokens / seconds:,.0f} tokens/s")
    if setting.on_gpu:
        say(f"memory at peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


def _generate(av: Any, vectors: torch.Tensor, rows: int, setting: Setting) -> int:
    return generated(av, vectors, 16, rows, True, setting.bench_options(generated=rows))


@torch.inference_mode()
def pieces(setting: Setting) -> None:
    """Where a step's time goes on the device, and what could take a piece's place."""
    av, rows = large_verbalizer(setting), setting.rows[-1]
    layers = [module for module in av.model.modules() if isinstance(module, torch.nn.Linear)]
    for count in setting.rows:
        inputs = {layer.in_features: _random(setting, count, layer.in_features) for layer in layers}
        taken = setting.milliseconds(
            lambda given=inputs: [functional.linear(given[m.in_features], m.weight, m.bias) for m in layers]
        )
        rate = 2 * count * sum(layer.weight.numel() for layer in layers) / taken / 1e9
        say(f"products of a step, {count} rows: {taken:.2f} ms, {rate:,.2f} TFLOP/s")
    logits, counters = 3 * _random(setting, rows, av.model.config.vocab_size), list(range(rows))
    keys = gumbel_sampling.step_keys(gumbel_sampling.draw_keys(0, counters, [0] * rows, setting.device), 3)
    for options in ({"temperature": 1.0}, {"temperature": 0.7}, {"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.95}):
        taken = setting.milliseconds(lambda o=options: gumbel_sampling.sample(logits, keys, **o))
        say(f"sampling, {rows} rows, {options}: {taken:.2f} ms")
    attention_pieces(setting, av.model.config, rows)
    moves(setting, av.model.config, rows)


def _random(setting: Setting, *shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=setting.device)


def attention_pieces(setting: Setting, config: Any, rows: int) -> None:
    """Attention of a step over slots, its error against float64, and other ways to compute the same."""
    # 1. A block's queries and what they attend to.
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    width, shared, own = config.hidden_size // heads, bench_gpu.INJECTED_AT, 192
    query = _random(setting, rows, heads, 1, width)
    keys, values = _random(setting, rows, key_heads, own, width), _random(setting, rows, key_heads, own, width)
    shared_keys, shared_values = _random(setting, 1, key_heads, shared, width), _random(setting, 1, key_heads, shared, width)
    lengths = torch.randint(20, own - 1, (rows,), device=setting.device)
    mask = torch.arange(own, device=setting.device) > lengths[:, None]
    past = kv_cache.Past(shared_keys[0].transpose(1, 2).contiguous(), shared_values[0].contiguous(), keys, values, mask)
    whole = [torch.cat([s.expand(rows, -1, -1, -1), o], 2) for s, o in ((shared_keys, keys), (shared_values, values))]
    seen = torch.cat([torch.ones_like(mask[:, :1]).expand(-1, shared), ~mask], 1)[:, None, None]
    # 2. The same in float64, in chunks of rows.
    exact = torch.cat(
        [_sdpa(query[i : i + 8].double(), *(w[i : i + 8].double() for w in whole), seen[i : i + 8]) for i in range(0, rows, 8)]
    )
    # 3. Ours and others.
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "ours": lambda: attention.slot_attention(None, query, past, past, None)[0],
        "SDPA, a mask, the prompt in every row": lambda: _sdpa(query, *whole, seen),
    }
    if setting.on_gpu:
        ways["flash in two levels"] = two_level_flash(query, past, lengths)
    for name, way in ways.items():
        error = float((way().double() - exact).norm() / exact.norm())
        taken = setting.milliseconds(way)
        say(
            f"attention of a block, {rows} rows, {shared} + {own} places, {name}: {taken:.3f} ms, "
            f"{2 * keys.nbytes / taken / 1e6:,.0f} GB/s of slots, error {error:.1e}"
        )


def _sdpa(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def two_level_flash(query: torch.Tensor, past: kv_cache.Past, lengths: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return torch's flash kernel over own places as far as they are used and over the prompt once, merged by their log sums."""
    rows, _, own, width = past.keys.shape
    assert past.shared_keys is not None and past.shared_values is not None
    shared, heads, device = past.shared_keys.shape[2], query.shape[1], query.device
    keys, values = (x.transpose(1, 2).contiguous().flatten(0, 1) for x in (past.keys, past.values))
    prompt_keys, prompt_values = past.shared_keys.permute(2, 0, 1).contiguous(), past.shared_values.transpose(0, 1).contiguous()
    starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
    all_rows, prompt = (torch.tensor([0, end], dtype=torch.int32, device=device) for end in (rows, shared))
    used, flash, q = (lengths + 1).int(), torch.ops.aten._flash_attention_forward, query[:, :, 0]
    ends = starts * own

    def run() -> torch.Tensor:
        scale = width**-0.5
        a, log_a = flash(q, keys, values, starts, ends, 1, own, 0.0, False, False, scale=scale, seqused_k=used)[:2]
        b, log_b = flash(q, prompt_keys, prompt_values, all_rows, prompt, rows, shared, 0.0, False, False, scale=scale)[:2]
        share = torch.sigmoid(log_a - log_b).reshape(heads, rows).t()[..., None]
        return (a.float() * share + b.float() * (1 - share)).to(q.dtype)[:, None]

    return run


def moves(setting: Setting, config: Any, rows: int) -> None:
    """A step in which some rows end and others fork."""
    key_heads, width, length = config.num_key_value_heads, config.hidden_size // config.num_attention_heads, 96
    cache = kv_cache.KVCache(None, config.num_hidden_layers, rows, 192)
    part = _random(setting, rows * 3 // 4, key_heads, length, width)
    cache.append_rows([(part, part)] * config.num_hidden_layers, length)
    before, kept = list(cache.lengths), [row for row in range(len(part)) if row % 30]

    def select() -> None:
        cache.lengths = list(before)
        cache.select(kept + kept[: rows // 32 + 1])

    setting.milliseconds(select)
    began = time.perf_counter()
    select()
    launched = time.perf_counter() - began
    say(f"rows that end and fork: {setting.milliseconds(select):.2f} ms; the host is busy for {1e3 * launched:.2f} ms of it")


@torch.inference_mode()
def profile(setting: Setting) -> None:
    """Operations of a few steps by the time they take, and how busy the device is."""
    av, rows = large_verbalizer(setting), setting.rows[-2]
    for recorded in (True, False) if setting.on_gpu else (False,):
        tokens = 12 if setting.tiny else 48
        window = _Window(tokens - 9, tokens - 3, setting)
        wanted, vectors = requests(range(max(1, rows // 16)), 16), torch.randn(max(1, rows // 16), av.d_model)
        with graphs(recorded), stop_tokens(av, 512), patch.object(cuda_graphs, "USES_BEFORE_RECORDING", 3):
            list(
                draw(av, vectors, wanted, temperature=0.8, max_new_tokens=tokens, seed=0, batch_size=rows, on_step=window.on_step)
            )
        window.report(rows, cuda_graphs.cuda_graphs_state(av.model) if recorded else "off")


class _Window:
    """Profiles the steps from `first` to `last` of a stream."""

    def __init__(self, first: int, last: int, setting: Setting) -> None:
        self.first, self.last, self.setting = first, last, setting
        self.seen, self.times = 0, list[float]()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.on_gpu else [])]
        self.profiler = torch_profile(activities=activities)

    def on_step(self, _tokens: int) -> None:
        self.seen += 1
        if self.seen not in (self.first, self.last):
            return
        self.setting.synchronize()
        if self.seen == self.first:
            self.profiler.__enter__()
            self.times.append(time.perf_counter())
        else:
            self.times.append(time.perf_counter())
            self.profiler.__exit__(None, None, None)

    def report(self, rows: int, state: str) -> None:
        events, steps = self.profiler.key_averages(), self.last - self.first
        key = "self_device_time_total" if self.setting.on_gpu else "self_cpu_time_total"
        counted = [e for e in events if not self.setting.on_gpu or str(e.device_type).endswith("CUDA")]
        busy, wall = sum(getattr(e, key) for e in counted) / 1e3, 1e3 * (self.times[1] - self.times[0])
        say(f"\n{rows} rows, graphs {state}: {wall / steps:.2f} ms a step, device busy {busy / steps:.2f} ms ({busy / wall:.0%})")
        say(events.table(sort_by=key, row_limit=5 if self.setting.tiny else 25, max_name_column_width=70))
        calls = sorted((e for e in events if e.key.startswith("cuda")), key=lambda e: -e.self_cpu_time_total)
        for e in calls[:8]:
            say(f"  host: {e.key:34} {e.count / steps:8.1f} a step {e.self_cpu_time_total / 1e3 / steps:8.3f} ms a step")


@torch.inference_mode()
def scoring(setting: Setting) -> None:
    """Texts a second by the AR, activations a second by the extractor."""
    ar, texts = bench_gpu.reconstructor(setting.bench_options()), [str(i) for i in range(8 if setting.tiny else 1024)]
    for batch in (8,) if setting.tiny else (64, 512):
        taken = setting.milliseconds(lambda batch=batch: ar.reconstruct_texts(texts, batch), repeats=1, warm=1)
        say(f"AR: {1e3 * len(texts) / taken:,.0f} texts/s of {bench_gpu.TEXT} tokens, {batch} at once")
    reader, generator = bench_gpu.block_reader(setting.bench_options()), np.random.default_rng(0)
    rows = [generator.integers(0, 500, n).tolist() for n in generator.integers(64, 257, 2 if setting.tiny else 512)]
    places = [sorted({*generator.integers(0, len(row), 3).tolist(), len(row) - 1}) for row in rows]
    taken = setting.milliseconds(lambda: reader.vectors(rows, places), repeats=1, warm=1)
    say(f"extraction: {1e3 * sum(map(len, places)) / taken:,.0f} activations/s")
