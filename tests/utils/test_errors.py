"""The class of a failure, whatever raised it."""

from __future__ import annotations

import errno

import numpy as np
import pytest
import torch

from ksweep.utils.errors import (
    CheckpointError,
    DataError,
    DiskFullError,
    NotFiniteError,
    RunError,
    StoreError,
    class_of_type,
    classify,
)


def raised_from(cause: BaseException) -> StoreError:
    error = StoreError("a shard could not be written")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (CheckpointError("no such file"), "bad input"),
        (DataError("vector 30 is not finite"), "bad input"),
        (DiskFullError("no room"), "disk full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk full"),
        (raised_from(OSError(errno.ENOSPC, "No space left on device")), "disk full"),
        (OSError(errno.EIO, "Input/output error"), "disk error"),
        (raised_from(OSError(errno.ESTALE, "Stale file handle")), "disk error"),
        (PermissionError(errno.EACCES, "Permission denied"), "bug"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), "bug"),
        (MemoryError(), "out of memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), "out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out of memory"),
        (FloatingPointError("invalid value encountered"), "NaN"),
        (NotFiniteError("the verbalizer's logits are not finite for draw 3"), "NaN"),
        (RunError("out of memory is a word in this message, and NaN too"), "failure"),
        (RunError("draws are missing"), "failure"),
        (StoreError("a shard of 12 NaN bytes is damaged"), "failure"),
        (raised_from(KeyError("x")), "failure"),
        (KeyError("NaN"), "bug"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "bug"),
    ],
)
def test_a_failure_is_classified_by_what_is_to_be_done_about_it(error: BaseException, kind: str) -> None:
    assert classify(error) == kind


def test_what_torch_and_numpy_themselves_raise_is_classified() -> None:
    with pytest.raises(RuntimeError) as no_memory:
        torch.empty(2**55, dtype=torch.float32)
    with pytest.raises(RuntimeError) as not_a_number:
        torch.multinomial(torch.tensor([float("nan"), 1.0]), 1)
    with pytest.raises(MemoryError) as too_large:
        np.empty(2**55)
    assert [classify(e.value) for e in (no_memory, not_a_number, too_large)] == ["out of memory", "NaN", "out of memory"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("cancelled", "cancelled"), ("NaN", "NaN"), ("DataError", "bad input"), ("DiskFullError", "disk full"), ("KeyError", "bug"),
     ("RunError", "failure"), ("OutOfMemoryError", "out of memory")],
)  # fmt: skip
def test_the_type_or_class_of_an_old_record_has_a_class(name: str, kind: str) -> None:
    assert class_of_type(name) == kind
