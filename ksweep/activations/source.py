"""A unit: the activations of a fixed range of source rows, and where each of them comes from. NumPy only.

Units are what the store keeps and what ranks share. Unit u holds the rows u * rows_per_unit .. (u + 1) * rows_per_unit - 1 of the
text (or of the vector file) whoever computes it, so neither the number of ranks nor where work stopped changes a bit of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ksweep.utils.errors import DataError

if TYPE_CHECKING:
    from jaxtyping import Float, Float32, Int64, UInt16

STORED_DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(np.uint16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
"""NumPy type of the vectors in memory and on disk. NumPy and Arrow have no bfloat16: its bit pattern is kept as uint16."""

WINDOW_CHARACTERS = 200
"""Length of the stored text up to a position, characters."""


@dataclass(frozen=True, kw_only=True)
class ActivationUnit:
    """What one unit holds. Lists are parallel to the rows of `vectors`."""

    vectors: np.ndarray
    """[activation, d_model] in the stored dtype; bfloat16 as uint16 bit patterns."""
    row_ids: list[str]
    """Row of the source: what the positions of that row were keyed by."""
    documents: list[str]
    """Document that the row belongs to: the cluster of the bootstrap."""
    positions: list[int | None]
    """Token index in the row, special tokens counted; None where the source does not say."""
    token_ids: list[int | None]
    windows: list[str]
    """About the last 200 characters of text up to and including the position."""
    roles: list[str | None]
    """Whose token it is: user, assistant, system, special or other; None where no chat template tells."""
    num_rows: int
    """Source rows that were looked at."""
    num_skipped: int
    """Of these, rows that gave no activation: empty, or without an allowed position."""
    is_last: bool
    """The source ends with this unit."""
    role_counts: dict[str, int] | None = None
    """Tokens of each role, of "pad" and in "total", in all source rows that were looked at; None where no chat template tells."""


class UnitSource(Protocol):
    """Where units come from: a model running over text, or a file of vectors."""

    @property
    def dtype(self) -> str:
        """Stored dtype: bfloat16, float16 or float32."""

    @property
    def most_per_unit(self) -> int:
        """Upper bound of the activations in one unit."""

    def units(self, indices: Iterable[int]) -> Iterator[tuple[int, ActivationUnit]]:
        """The units asked for, each computed when it is taken; ascending is quickest. One beyond the end is empty and last."""

    def close(self) -> None:
        """Give back the memory of a loaded model."""


def activation_key(row_id: str, position: int | None) -> int:
    """A signed 64-bit name of an activation that does not depend on order or count: keys the sampling noise of its draws."""
    digest = hashlib.sha256(f"{row_id}|{position}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def to_float32(stored: np.ndarray) -> Float32[np.ndarray, "*shape"]:
    """Exact float32 values of vectors in a stored dtype; float32 is returned as it is, without a copy."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)


def to_bfloat16_bits(vectors: Float[np.ndarray, "*shape"]) -> UInt16[np.ndarray, "*shape"]:
    """bfloat16 bit patterns of finite float32 values, rounded to nearest even as torch does."""
    bits = np.ascontiguousarray(vectors, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def norms_of(stored: np.ndarray) -> Float32[np.ndarray, " activation"]:
    """L2 norms, summed in float64: Gemma's reach 1e5 and would overflow float16."""
    return np.asarray(np.sqrt(np.square(to_float32(stored), dtype=np.float64).sum(axis=-1)), dtype=np.float32)


def unit_keys(unit: ActivationUnit) -> Int64[np.ndarray, " activation"]:
    """`activation_key` of each row of a unit."""
    pairs = zip(unit.row_ids, unit.positions, strict=True)
    return np.array([activation_key(row, position) for row, position in pairs], dtype=np.int64)


def refuse_unusable(unit: ActivationUnit, source: str) -> None:
    """An NLA only sees the direction of a vector: one that is not finite, or zero, has none.

    Raises:
        DataError: names the first such vector by row and position.
    """
    norms = norms_of(unit.vectors)
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if not bad.size:
        return
    first = int(bad[0])
    values = to_float32(unit.vectors[first])
    num_bad = int((~np.isfinite(values)).sum())
    what = "zero everywhere" if norms[first] == 0 else f"not finite in {num_bad} of {values.size} values"
    where = "" if unit.positions[first] is None else f", position {unit.positions[first]}"
    raise DataError(
        f"the activation at row {unit.row_ids[first]!r}{where} of {source} is {what} "
        f"({bad.size} such in this unit of {len(norms)}). Overflow in float16 is the usual cause: take activations.dtype="
        "bfloat16 or float32. Otherwise the weights or the file are damaged."
    )
