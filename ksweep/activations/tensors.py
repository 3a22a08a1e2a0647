"""Stored vectors as torch tensors over the memory map: the one place where the store meets torch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import torch

from ksweep.activations.store import ActivationTable


def tensors(table: ActivationTable, start: int = 0, stop: int | None = None) -> Iterator[torch.Tensor]:
    """Vectors of activations start..stop-1 in their stored dtype, one tensor a shard, nothing copied.

    They are read-only, which torch has no notion of: writing into one ends the process. `.to(...)` or `.clone()` first.
    """
    for view in table.stored(start, stop):
        yield _tensor(view)


def _tensor(view: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        if view.dtype == np.uint16:
            return torch.from_numpy(view.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(view)
