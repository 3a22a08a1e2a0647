"""Units: the activations of a fixed range of source rows, with their provenance. NumPy only.

A unit is what the store publishes at once and what ranks divide among themselves. Unit u always holds rows u * rows_per_unit to
(u + 1) * rows_per_unit - 1 of the text (or vector file), so neither the number of ranks nor an interruption changes a bit of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ksweep.utils.errors import DataError
from ksweep.utils.notes import Note

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
    """Contents of a unit. Lists are parallel to the rows of `vectors`."""

    vectors: np.ndarray
    """[activation, d_model] in the stored dtype; bfloat16 as uint16 bit patterns."""
    row_ids: list[str]
    """Row of the source; it keys the positions drawn in that row."""
    documents: list[str]
    """Document of the row: the cluster of the bootstrap."""
    positions: list[int | None]
    """Token index in the row, special tokens counted; None if the source has none."""
    token_ids: list[int | None]
    windows: list[str]
    """The last `WINDOW_CHARACTERS` characters of text, up to and including the position."""
    roles: list[str | None]
    """Role of the token: user, assistant, system, special or other; None without a known chat template."""
    num_rows: int
    """Source rows that were read."""
    num_skipped: int
    """Those of them that gave no activation: empty, or without an allowed position."""
    is_last: bool
    """Whether the source ends with this unit."""
    notes: tuple[Note, ...] = ()
    """What is to be known of the rows that were read so far."""
    role_counts: dict[str, int] | None = None
    """Tokens of each role, of "pad" and in "total", in all source rows that were read; None without a known chat template."""


class UnitSource(Protocol):
    """Source of units: a model that runs over text, or a file of vectors."""

    @property
    def dtype(self) -> str:
        """Stored dtype: bfloat16, float16 or float32."""

    @property
    def most_per_unit(self) -> int:
        """Upper bound of the activations in a unit."""

    def units(self, indices: Iterable[int]) -> Iterator[tuple[int, ActivationUnit]]:
        """Yield the units asked for, each computed when it is taken; ascending order is fastest. A unit past the end is empty."""

    def close(self) -> None:
        """Free the memory of a loaded model."""


class TextSource(Protocol):
    """Rows of text that a user names as activations.text="package.module:name": a function without arguments, or an iterable.

    Every call gives the same rows in the same order. A record has the text column; "document" and "row_id" are read where they
    are, and any other column may be named in scoring.groups.
    """

    digest: str
    """Identifies the rows in keys; may be left out, and is then the digest of the module's source file."""

    def __call__(self) -> Iterable[str | Mapping[str, Any]]:
        """Yield texts or records."""


UNIT_COLUMNS = ("row_ids", "documents", "positions", "token_ids", "windows", "roles")
"""Lists of a unit that are parallel to its vectors."""


def kept_rows(unit: ActivationUnit, keep: np.ndarray) -> ActivationUnit:
    """Return a unit with some of its activations, given by their indices."""
    columns: dict[str, Any] = {name: [getattr(unit, name)[i] for i in keep] for name in UNIT_COLUMNS}
    return replace(unit, vectors=unit.vectors[keep], **columns)


def activation_key(row_id: str, position: int | None) -> int:
    """Return a signed 64-bit key of an activation, whatever the others are. It keys the sampling noise of its draws."""
    digest = hashlib.sha256(f"{row_id}|{position}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def to_float32(stored: np.ndarray) -> Float32[np.ndarray, "*shape"]:
    """Return the exact float32 values of vectors in a stored dtype; a float32 array is returned itself."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)


def to_bfloat16_bits(vectors: Float[np.ndarray, "*shape"]) -> UInt16[np.ndarray, "*shape"]:
    """Return the bfloat16 bit patterns of finite float32 values, rounded to nearest even as in torch."""
    bits = np.ascontiguousarray(vectors, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def norms_of(stored: np.ndarray) -> Float32[np.ndarray, " activation"]:
    """Return L2 norms, summed in float64: Gemma's reach 1e5 and would overflow float16."""
    return np.asarray(np.sqrt(np.square(to_float32(stored), dtype=np.float64).sum(axis=-1)), dtype=np.float32)


def unit_keys(unit: ActivationUnit) -> Int64[np.ndarray, " activation"]:
    """Return the `activation_key` of each activation of a unit."""
    pairs = zip(unit.row_ids, unit.positions, strict=True)
    return np.array([activation_key(row, position) for row, position in pairs], dtype=np.int64)


def refuse_unusable(unit: ActivationUnit, source: str) -> None:
    """Check that every vector has a direction, which is all that an NLA sees: it is finite and not zero.

    Raises:
        DataError: a vector without direction; the message has the row and position of the first.
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
