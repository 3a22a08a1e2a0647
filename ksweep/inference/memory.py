"""How much memory is free, what running out of it looks like, and going on with less at once."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ksweep.utils import machine

log = logging.getLogger(__name__)

T = TypeVar("T")

KEPT_BYTES = 256 * 2**20
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch ran out of memory: on a CPU it says so in a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error) and "allocate memory" in str(error)
    )


def release(device: torch.device) -> None:
    """Give back what torch or the C library keeps for later, so that it can be had in pieces of another size."""
    if device.type == "cuda":
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:  # torch before 2.13 refuses for good once the recording of a CUDA graph has failed
            log.warning("torch keeps the memory that it does not use: %s", str(error).split("\n")[0])
    elif hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that a rank can still have on its device, on a CPU its share of them; None where nobody says."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type != "cpu" or (free := machine.free_memory()) is None:
        return None
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # the other ranks of this machine fill theirs meanwhile


def keep_freed(device: torch.device) -> bool:
    """Let the C library keep what is freed of tensors up to `KEPT_BYTES` for their next use; whether it does.

    Otherwise it maps and unmaps every tensor of more than 32 MiB, and the kernel fills its pages with zeros each time: 15 of 105
    ms of a product with 50 MB of logits. `release` gives back what is kept. glibc before 2.35 refuses (32 MiB is the most).
    """
    libc = ctypes.CDLL(None)
    if device.type != "cpu" or not hasattr(libc, "mallopt"):
        return False
    # In this order: any call that succeeds stops glibc from finding its own thresholds.
    return bool(libc.mallopt(_MMAP_THRESHOLD, KEPT_BYTES) and libc.mallopt(_TRIM_THRESHOLD, KEPT_BYTES))


def in_halves(run: Callable[[Sequence[T]], torch.Tensor], items: Sequence[T], device: torch.device) -> torch.Tensor:
    """run(items); where memory does not suffice, of one half after the other."""
    try:
        return run(items)
    except RuntimeError as error:
        if len(items) == 1 or not is_out_of_memory(error):
            raise
    # Out here the handler is left, and with it the failed attempt's tensors are free.
    release(device)
    half = len(items) // 2
    log.warning("out of memory with %d rows at once; going on with halves of them", len(items))
    return torch.cat([in_halves(run, items[:half], device), in_halves(run, items[half:], device)])
