"""Parts about the machine and its limits: versions and ceilings, host waits, running out of memory, ranks of one GPU."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import queue
import sys
import time
import traceback
import warnings
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import bench_gpu
import torch
from gpu_common import ROOT, Setting, counted_launches, large_verbalizer, same_texts, say, texts_of, timed_steps
from parts_parity import drawn_texts, family_verbalizers
from transformers import Qwen2Config

from ksweep.inference import cuda_graphs
from ksweep.launch import hardware
from ksweep.launch.worker.devices import device_text, gpu_ids_text

OPTIONAL = ("peft", "accelerate", "submitit", "omegaconf", "duckdb", "altair", "flashinfer", "flash_attn", "vllm", "kernels")
MEMORY_LIMITS = (16.0, 4.0, 3.0, 2.5, 2.0, 1.6)
"""GiB that the process may take, from plenty to too little for all rows."""


def env(setting: Setting) -> None:
    """Versions, the GPU's name and memory, and what a copy, a product, a transfer and a launch take."""
    import transformers

    versions = f"Python {sys.version.split()[0]}, torch {torch.__version__}, transformers {transformers.__version__}"
    say(f"{versions}, CUDA {torch.version.cuda}")
    say("packages:", ", ".join(f"{name} {'there' if importlib.util.find_spec(name) else 'MISSING'}" for name in OPTIONAL))
    device = str(setting.device)
    say(f"ksweep sees {hardware.visible_devices()}, calls it {device_text((device,))}; {gpu_ids_text((device,))}")
    if setting.on_gpu:
        found = torch.cuda.get_device_properties(0)
        say(
            f"{found.multi_processor_count} multiprocessors, {torch.cuda.mem_get_info()[0] / 1e9:.0f} of "
            f"{found.total_memory / 1e9:.0f} GB free"
        )
    bench_gpu.measured_peaks(setting.bench_options())
    began = time.perf_counter()
    for _ in range(200):
        torch.tensor([1] * 700, device=setting.device)
    say(f"torch.tensor of 700 numbers to the device: {(time.perf_counter() - began) / 200 * 1e6:.0f} us")
    counter = torch.zeros(1, device=setting.device)
    setting.synchronize()
    began = time.perf_counter()
    for _ in range(1000):
        counter.add_(1)
    launched = time.perf_counter() - began
    setting.synchronize()
    say(f"launch of a kernel from Python: {launched / 1000 * 1e6:.1f} us")


def syncs(setting: Setting) -> None:
    """Which lines wait for the device, and how often a step? On a CPU: operations that would wait."""
    av = family_verbalizers(setting.device)["qwen2"]
    for top_p in (1.0, 0.9):
        steps: list[int] = []
        waits = _waits_of(lambda top_p=top_p, steps=steps: drawn_texts(av, top_p=top_p, on_step=steps.append), setting)
        say(f"top_p={top_p}: {sum(waits.values())} waits in {len(steps)} steps")
        for place, count in waits.most_common(25):
            say(f"  {count / len(steps):6.2f} a step  {place}")


def _waits_of(work: Any, setting: Setting) -> Counter[str]:
    if not setting.on_gpu:
        with counted_launches() as count:
            work()
        return count.waits
    where: Counter[str] = Counter()

    def note(_message: object, _category: object, filename: str, lineno: int, *_rest: object) -> None:
        frames = [frame for frame in traceback.extract_stack() if f"{ROOT}/ksweep/" in frame.filename]
        calls = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[:-4:-1])
        where[calls or f"{filename}:{lineno}"] += 1

    with warnings.catch_warnings(), patch.object(warnings, "showwarning", note):
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return where


def memory(setting: Setting) -> None:
    """Running out of memory for real: are the draws the same, do graphs go on, and does drawing?"""
    if not setting.on_gpu:
        say("only a GPU can tell")
        return
    shape = {
        "vocab_size": 152064, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 8, "tie_word_embeddings": False,
    }  # fmt: skip
    total, first = torch.cuda.get_device_properties(0).total_memory, None
    with torch.inference_mode(), patch.object(bench_gpu, "config", lambda tiny, layers=None: Qwen2Config(**shape)):
        av = large_verbalizer(setting, dtype="float32")
        for gib in MEMORY_LIMITS:
            torch.cuda.empty_cache()
            torch.cuda.memory.set_per_process_memory_fraction(gib * 2**30 / total)
            began = time.perf_counter()
            try:
                steps, drawn = timed_steps(av, setting, 512, recorded=True)
            except Exception as error:  # what it is, is the answer
                say(f"{gib} GiB: {type(error).__name__}: {str(error)[:300]}")
                continue
            texts = texts_of(drawn)
            first = first or texts
            say(
                f"{gib} GiB: {same_texts(first, texts)}, {time.perf_counter() - began:.1f} s, at most {max(n for _, n in steps)} "
                f"rows a step, graphs {cuda_graphs.cuda_graphs_state(av.model)}"
            )
        torch.cuda.memory.set_per_process_memory_fraction(1.0)


def ranks(setting: Setting) -> None:
    """Do two ranks of one machine meet, pass a barrier and share a counter, and what does their process group cost?"""
    import torch.multiprocessing as processes

    context = processes.get_context("spawn")
    for backend in ("gloo", "nccl") if setting.on_gpu else ("gloo",):
        with contextlib.ExitStack() as stack:
            heard, meeting = context.Queue(), context.Queue()
            for rank in range(2):
                process = context.Process(target=_rank, args=(rank, backend, setting.on_gpu, heard, meeting))
                process.start()
                stack.callback(_end, process)
            answers = []
            for _ in range(2):
                with contextlib.suppress(queue.Empty):
                    answers.append(heard.get(timeout=120))
        for answer in sorted(answers):
            say(f"{backend}, 2 ranks: {answer}")
        if len(answers) < 2 or (backend == "gloo" and any("FAILED" in answer for answer in answers)):
            raise RuntimeError(f"{2 - len(answers)} of two ranks said nothing in 120 s, the others: {answers}")


def _end(process: Any) -> None:
    process.join(10)
    if process.is_alive():
        process.kill()


def _rank(rank: int, backend: str, on_gpu: bool, heard: Any, meeting: Any) -> None:
    """Meet the other rank as launch/worker/process_group.py does: rank 0 serves the store at a port that is free."""
    import torch.distributed as dist

    try:
        if on_gpu:
            torch.cuda.set_device(0)
        limit = timedelta(seconds=60)
        store = dist.TCPStore(
            "127.0.0.1", 0 if rank == 0 else meeting.get(), is_master=rank == 0, wait_for_workers=False, timeout=limit
        )
        if rank == 0:
            meeting.put(store.port)
        dist.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=limit)
        began = time.perf_counter()
        dist.barrier()
        took = time.perf_counter() - began
        numbers = [dist.distributed_c10d._get_default_store().add("queue", 1) - 1 for _ in range(3)]
        free = f", {torch.cuda.mem_get_info()[0] / 1e9:.1f} GB of the GPU free" if on_gpu else ""
        heard.put(f"rank {rank}, process {os.getpid()}: barrier {took:.3f} s, numbers {numbers}{free}")
        dist.barrier()
        dist.destroy_process_group()
    except Exception as error:  # what it is, is the answer
        heard.put(f"rank {rank} FAILED: {type(error).__name__}: {str(error).splitlines()[0][:300]}")
