"""Read a file of torch.save into plain values and tensors whose contents stay on disk. torch is imported where tensors are made.

Nothing that the file names is called, and none of its numbers is used before it is checked: each record is stored as it is within
the file, each storage is as long as its record, each tensor lies in its storage and has no more entries than that.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ksweep.utils.errors import CheckpointError
from ksweep.utils.plain_values import PlainValueError, check_plain
from ksweep.utils.restricted_pickle import MalformedPickleError, PickledStorage, UnknownNameError, read_pickle

if TYPE_CHECKING:
    import torch

LARGEST_DIRECTORY = 4 << 20
"""Bytes of the list of records; that of 5,000 tensors has 0.5 MB."""
LARGEST_PICKLE = 16 << 20
"""Bytes of data.pkl; that of 5,000 tensors has 1.5 MB."""
LOCAL_HEADER = 30
MOST_DIMENSIONS, LARGEST_SIZE = 16, 1 << 40


class _TorchFileError(Exception):
    """A file that is not whole, or that asks for more than a checkpoint needs."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the dictionary in a .pt file.

    Raises:
        CheckpointError: as `read_torch_file`; or it holds something else.
    """
    value = read_torch_file(path)
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise CheckpointError(f"{path} holds a {kind}; expected the dictionary that the training run saved")
    return value


def read_torch_file(path: Path) -> Any:
    """Return what a .pt file holds: plain values, containers and tensors.

    Raises:
        CheckpointError: the file is incomplete or no torch file, its pickle needs more than tensors, containers and NumPy
            numbers, or it asks for more memory than a checkpoint needs.
    """
    # 1. Refuse files that are no zip archive.
    if not _is_zip(path):
        raise CheckpointError(
            f"{path} is not a whole torch checkpoint: it has no zip directory at its end, so it was cut off in copying, has "
            "another format, or was saved before torch 1.6. Copy it again, or save it again with torch.save."
        )
    # 2. Read the records and the pickle.
    try:
        with _BoundedFile(path) as file:
            value = _TorchFile(path, file).value()
        check_plain(value)
    except UnknownNameError as error:
        raise CheckpointError(
            f"{path} is refused: reading it would run code beyond what tensors need (it asks for {str(error)[:200]!r}), and "
            "nothing of it was run. If you trust its source, load it there and save only its models and config with torch.save."
        ) from error
    except PlainValueError as error:
        raise CheckpointError(
            f"{path} is refused: {error}, which no checkpoint needs. Save only its models and config."
        ) from error
    except (_TorchFileError, MalformedPickleError, zipfile.BadZipFile, RuntimeError, OSError, ValueError, NotImplementedError,
            struct.error, EOFError, LookupError, MemoryError) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{path} is not a whole torch checkpoint ({reason}). Copy or download it again.") from error
    return value


class _BoundedFile(io.FileIO):
    """A file of which no more than the list of records is read at once, whatever it says of its lengths."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Read up to `size` bytes."""
        if size is not None and size > LARGEST_PICKLE:
            raise _TorchFileError(f"its directory is said to have {size:,} bytes")
        return super().read(LARGEST_DIRECTORY if size is None or size < 0 else size) or b""


def _is_zip(path: Path) -> bool:
    try:
        with _BoundedFile(path) as file:
            return zipfile.is_zipfile(file)
    except (OSError, _TorchFileError):
        return False


class _TorchFile:
    """The records of a file, and the storages that tensors are made from."""

    def __init__(self, path: Path, file: _BoundedFile) -> None:
        # 1. List the records.
        self.path, self.file, self.size = path, file, path.stat().st_size
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
        self.records = {entry.filename: entry for entry in entries}
        if len(self.records) < len(entries):
            raise _TorchFileError("it holds several records of one name")
        if any(name.endswith("/constants.pkl") for name in self.records):
            raise CheckpointError(
                f"{path} is a TorchScript archive, a program with its weights, and nothing of it was run. Expected the "
                "dictionary that the training run saved with torch.save."
            )
        # 2. Find the pickle among them.
        pickles = [name for name in self.records if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise _TorchFileError(f"it holds {len(pickles)} records data.pkl, expected one")
        self.root = pickles[0].removesuffix("data.pkl")

    def value(self) -> Any:
        """Return the value of the pickle."""
        if f"{self.root}byteorder" in self.records and self.content("byteorder", 16).strip() != b"little":
            raise _TorchFileError("its tensors are not little-endian")
        return read_pickle(self.content("data.pkl", LARGEST_PICKLE), self.find_storage, self.make_tensor)

    def content(self, name: str, largest: int) -> bytes:
        """Return the bytes of a short record."""
        offset, num_bytes = self.place(name)
        if num_bytes > largest:
            raise _TorchFileError(f"its record {name} has {num_bytes:,} bytes, expected at most {largest:,}")
        self.file.seek(offset)
        content = bytearray()
        while len(content) < num_bytes:
            if not (part := self.file.read(num_bytes - len(content))):
                raise _TorchFileError(f"its record {name} ends too early")
            content += part
        return bytes(content)

    def place(self, name: str) -> tuple[int, int]:
        """Return where in the file a record begins, and its length, once it is stored as it is."""
        entry = self.records.get(self.root + name)
        if entry is None:
            raise _TorchFileError(f"it lacks the record {name[:100]}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise _TorchFileError(f"its record {name[:100]} is compressed or encrypted, which torch.save never does")
        self.file.seek(entry.header_offset)
        header = self.file.read(LOCAL_HEADER)
        if len(header) < LOCAL_HEADER or header[:4] != b"PK\x03\x04":
            raise _TorchFileError(f"its record {name[:100]} is not where its directory says")
        offset = entry.header_offset + LOCAL_HEADER + sum(struct.unpack("<HH", header[26:30]))
        if entry.file_size < 0 or offset + entry.file_size > self.size:
            raise _TorchFileError(f"its record {name[:100]} ends beyond the file")
        return offset, entry.file_size

    def find_storage(self, dtype: str, key: str, count: int) -> PickledStorage:
        """Return the range of a storage, once its number of entries fits the length of its record."""
        offset, num_bytes = self.place(f"data/{key}")
        if count < 0 or count * _item_size(dtype or "uint8") != num_bytes:
            raise _TorchFileError(f"its storage {key[:50]} has {num_bytes:,} bytes, and its pickle says {count:,} of {dtype}")
        return PickledStorage(dtype, offset, num_bytes)

    def make_tensor(
        self, storage: PickledStorage, dtype: str, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
    ) -> torch.Tensor:
        """Return a tensor over a storage, once it lies within it and has no more entries than that."""
        import torch

        name = dtype or storage.dtype
        if not name or len(size) != len(stride) or len(size) > MOST_DIMENSIONS:
            raise _TorchFileError("a tensor has no dtype, or other numbers of sizes and strides")
        if any(not 0 <= number <= LARGEST_SIZE for number in (offset, *size, *stride)):
            raise _TorchFileError(f"a tensor has the shape {list(size)[:8]}, strides {list(stride)[:8]} and offset {offset}")
        entries, available = math.prod(size), storage.num_bytes // _item_size(name)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1 if entries else 0
        if last > available or entries > available:
            raise _TorchFileError(f"a tensor of shape {list(size)[:8]} needs more than the {available:,} entries of its storage")
        content = self.storage[storage.offset : storage.offset + storage.num_bytes]
        return torch.empty(0, dtype=getattr(torch, name)).set_(content, offset, size, stride)

    @cached_property
    def storage(self) -> Any:
        """The whole file, mapped into memory and not read."""
        import torch

        return torch.UntypedStorage.from_file(str(self.path), False, self.size)


def _item_size(dtype: str) -> int:
    import torch

    return int(getattr(torch, dtype).itemsize)
