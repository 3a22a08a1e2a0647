"""How much memory is free, how an out-of-memory error is recognised, and running a batch in halves after one."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ksweep.utils import machine

log = logging.getLogger(__name__)

_Item = TypeVar("_Item")

KEPT_BYTES = 256 * 2**20
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether torch ran out of memory. On a CPU it raises a plain RuntimeError that only its message distinguishes."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error) and "allocate memory" in str(error)
    )


def release_cached_memory(device: torch.device) -> None:
    """Return the memory that torch or the C library keeps for reuse, so that it can be allocated in other sizes."""
    if device.type == "cuda":
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:  # torch before 2.13 refuses for good once the recording of a CUDA graph has failed
            log.warning("torch keeps the memory that it does not use: %s", str(error).split("\n")[0])
    elif hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def total_device_bytes(devices: Sequence[str]) -> list[int] | None:
    """Return the memory of each GPU, used or not; None for a CPU."""
    if not devices[0].startswith("cuda"):
        return None
    return [int(torch.cuda.get_device_properties(device).total_memory) for device in devices]


def free_device_bytes(device: torch.device) -> int | None:
    """Return the bytes that this rank can still allocate on a device, on a CPU its share of them; None where that is unknown."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu" or (free := machine.free_memory()) is None:
        return None
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # the other ranks of this machine allocate theirs meanwhile


def keep_freed_memory(device: torch.device) -> bool:
    """Let the C library keep freed tensors of up to `KEPT_BYTES` for reuse. Returns whether it agreed.

    Otherwise it maps and unmaps every tensor of more than 32 MiB, and the kernel fills its pages with zeros each time: 15 of 105
    ms of a product with 50 MB of logits. `release_cached_memory` returns what is kept. glibc before 2.35 refuses (32 MiB is its
    limit). This is a setting of the process that has no way back; it changes no result, and any number of engines may ask for it.
    """
    libc = ctypes.CDLL(None)
    if device.type != "cpu" or not hasattr(libc, "mallopt"):
        return False
    # In this order: any call that succeeds stops glibc from adapting its own thresholds.
    return bool(libc.mallopt(_MMAP_THRESHOLD, KEPT_BYTES) and libc.mallopt(_TRIM_THRESHOLD, KEPT_BYTES))


def run_in_halves(run: Callable[[Sequence[_Item]], torch.Tensor], items: Sequence[_Item], device: torch.device) -> torch.Tensor:
    """Return run(items); if memory runs out, the concatenated results of both halves, each halved again if need be."""
    try:
        return run(items)
    except RuntimeError as error:
        if len(items) == 1 or not is_out_of_memory(error):
            raise
    # The handler is left, and with it the failed attempt's tensors are free.
    release_cached_memory(device)
    half = len(items) // 2
    log.warning("out of memory with %d rows at once; continuing with halves of them", len(items))
    return torch.cat([run_in_halves(run, items[:half], device), run_in_halves(run, items[half:], device)])
