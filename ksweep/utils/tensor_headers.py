"""Read headers of safetensors files: which tensors a file holds, once what it says of them fits it. No weights are read.

A file is 8 bytes with the length of the header, the header (JSON: dtype, shape and data_offsets of each tensor), and the tensors
without gaps. Files come from somebody else, and what reads the weights maps them into memory: a shape or an offset that is not so
is refused here, by the launcher, with the names of file and tensor.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksweep.utils.errors import CheckpointError
from ksweep.utils.plain_values import bounded_json
from ksweep.utils.planning_pass import once_per_pass
from ksweep.utils.sidecar_keys import abbreviated

LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""
LARGEST_SIZE = 1 << 48
MOST_DIMENSIONS = 16
BITS = re.compile(r"BOOL|(?:[IUF]|BF|C)([0-9]{1,3})(?:_E[0-9]M[0-9](?:FNUZ|FN)?)?")
"""Dtypes as safetensors spells them, and their bits: F32, BF16, I64, F8_E4M3, ..."""


@dataclass(frozen=True)
class Tensor:
    """One entry of a safetensors header."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors spells it: F32, BF16, ..."""
    file: str


def read_header(path: Path) -> dict[str, Tensor]:
    """Return names, shapes and types of the tensors in one .safetensors file.

    Raises:
        CheckpointError: the file is unreadable or cut off, or a tensor's dtype, shape and bytes do not fit each other or the
            file.
    """
    # 1. Read the header.
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            data = file.read(min(length, LARGEST_HEADER))
    except OSError as error:
        raise _not_whole(path, error.strerror or type(error).__name__) from error
    if size < 8 or length > len(data):
        raise _not_whole(path, f"its header is said to have {length:,} bytes, and the file has {size:,}")
    try:
        header = bounded_json(data)
    except ValueError as error:
        raise _not_whole(path, f"its header is no JSON within bounds: {error}") from error
    if not isinstance(header, dict):
        raise _not_whole(path, f"its header is a {type(header).__name__}, not an object")
    # 2. Check each entry by itself.
    header.pop("__metadata__", None)
    ranges = {name: _byte_range(name, entry, path) for name, entry in header.items()}
    # 3. Check that the tensors lie one behind another and fill the file.
    end = 0
    for name, (first, last) in sorted(ranges.items(), key=lambda item: item[1]):
        if first != end:
            fault = "overlaps the tensor before it" if first < end else "leaves a gap before it"
            raise _refusal(path, name, f"is said to lie at bytes {first:,} to {last:,}, which {fault}")
        end = last
        if end > size - 8 - length:
            raise _not_whole(path, f"tensor {abbreviated(name)} ends at byte {end:,} of {size - 8 - length:,}")
    if end != size - 8 - length:
        raise _not_whole(path, f"{size - 8 - length - end:,} bytes behind its last tensor belong to none")
    return {name: Tensor(tuple(entry["shape"]), entry["dtype"], path.name) for name, entry in header.items()}


@once_per_pass
def check_headers(directory: Path) -> None:
    """Check the header of every safetensors file in a directory.

    Raises:
        CheckpointError: as `read_header`.
    """
    for path in sorted(directory.glob("*.safetensors")):
        read_header(path)


def _byte_range(name: str, entry: Any, path: Path) -> tuple[int, int]:
    """Return the first byte of a tensor and that behind it, once they fit its dtype and shape."""
    described: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (described.get(key) for key in ("dtype", "shape", "data_offsets"))
    kind = BITS.fullmatch(dtype) if isinstance(dtype, str) else None
    if kind is None:
        raise _refusal(path, name, f"has the dtype {abbreviated(dtype)}, which is not known")
    if not isinstance(shape, list) or len(shape) > MOST_DIMENSIONS or not all(map(_is_size, shape)):
        raise _refusal(path, name, f"has the shape {abbreviated(shape)}, expected at most {MOST_DIMENSIONS} whole numbers >= 0")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise _refusal(path, name, f"has the data_offsets {abbreviated(offsets)}, expected where it begins and ends")
    first, last = offsets
    bits = math.prod(shape) * int(kind[1] or 8)
    if bits != 8 * (last - first):
        sizes = f"which is {bits // 8:,} bytes, and lies at bytes {first:,} to {last:,}"
        raise _refusal(path, name, f"is {dtype} of shape {abbreviated(shape)}, {sizes}")
    return first, last


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number <= LARGEST_SIZE


def _not_whole(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a whole safetensors file ({reason}). Copy or download it again: it may have been cut off."
    )


def _refusal(path: Path, name: str, fault: str) -> CheckpointError:
    return CheckpointError(f"{path}: tensor {abbreviated(name)} {fault}. The file is damaged or made up: get it from its source.")
