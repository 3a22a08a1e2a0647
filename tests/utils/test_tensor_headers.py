"""Headers of safetensors files that say what the file does not hold are refused with file and tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ksweep.utils.errors import CheckpointError
from ksweep.utils.tensor_headers import Tensor, read_header

Header = dict[str, Any]


def header_of(path: Path) -> Header:
    data = path.read_bytes()
    content: Header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return content


def with_header(path: Path, change: Callable[[Header], Any], raw: bytes | None = None) -> None:
    """Write another header before the same tensors."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode() if raw is None else raw
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def entry(**values: Any) -> Callable[[Header], Any]:
    return lambda header: header["b"].update(values)


LIES: dict[str, tuple[Callable[[Header], Any], str]] = {
    "another shape of more bytes": (entry(shape=[4, 4]), "'b' is F32 of shape [4, 4], which is 64 bytes, and lies at"),
    "a shape without end": (entry(shape=[1 << 40, 1 << 40]), "'b' is F32 of shape"),
    "a product beyond 64 bits": (entry(shape=[1 << 32, 1 << 32, 0], data_offsets=[16, 40]), "'b' is F32 of shape"),
    "a negative shape": (entry(shape=[-2, -3]), "'b' has the shape [-2, -3]"),
    "a shape of fractions": (entry(shape=[2.0, 3]), "'b' has the shape"),
    "a shape of truth values": (entry(shape=[True, 6]), "'b' has the shape"),
    "a shape that is no list": (entry(shape={"0": 2}), "'b' has the shape"),
    "a hundred dimensions": (entry(shape=[1] * 100), "'b' has the shape"),
    "no shape": (lambda header: header["b"].pop("shape"), "'b' has the shape None"),
    "an unknown dtype": (entry(dtype="OBJECT"), "'b' has the dtype 'OBJECT'"),
    "a wider dtype": (entry(dtype="F64"), "'b' is F64 of shape [2, 3], which is 48 bytes"),
    "a dtype of no bytes": (entry(dtype="F0"), "'b' is F0"),
    "offsets in another tensor": (entry(data_offsets=[0, 24]), "overlaps the tensor before it"),
    "offsets beyond the file": (entry(data_offsets=[16, 40 + (1 << 40)]), "'b' is F32"),
    "offsets after a gap": (entry(data_offsets=[20, 44]), "leaves a gap before it"),
    "negative offsets": (entry(data_offsets=[-8, 16]), "'b' has the data_offsets [-8, 16]"),
    "offsets in reverse": (entry(data_offsets=[40, 16]), "'b' is F32"),
    "three offsets": (entry(data_offsets=[16, 40, 40]), "'b' has the data_offsets"),
    "an entry that is a text": (lambda header: header.update(b="F32"), "'b' has the dtype None"),
    "a tensor that is not listed": (lambda header: header.pop("b"), "24 bytes behind its last tensor belong to none"),
    "a tensor behind the end": (
        lambda header: header.update(c={"dtype": "F32", "shape": [1], "data_offsets": [40, 44]}), "'c' ends at byte 44 of 40",
    ),
}  # fmt: skip


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(2, 3)}, path)
    return path


@pytest.mark.parametrize(("change", "reason"), LIES.values(), ids=LIES)
def test_header_that_lies_is_refused_with_file_and_tensor(change: Callable[[Header], Any], reason: str, weights: Path) -> None:
    assert header_of(weights)["b"]["data_offsets"] == [16, 40]  # what the changes above stand on
    with_header(weights, change)
    with pytest.raises(CheckpointError) as caught:
        read_header(weights)
    assert reason in str(caught.value) and str(weights) in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("raw", [b"[" * 20_000, b"{", b"[]", b'{"a": ' + b"9" * 5000 + b"}", b"\xff", b"null"])
def test_header_that_is_no_object_is_refused(raw: bytes, weights: Path) -> None:
    with_header(weights, lambda header: None, raw)
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        read_header(weights)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 60, -1])
def test_file_that_is_cut_off_is_refused(length: int, weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        read_header(weights)
    weights.write_bytes((1 << 63).to_bytes(8, "little") + bytes(100))
    with pytest.raises(CheckpointError, match="9,223,372,036,854,775,808 bytes, and the file has 108"):
        read_header(weights)


DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
)  # fmt: skip


def test_headers_are_read_as_the_library_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {f"t{i}": torch.zeros(2, i % 3, 3).to(dtype) for i, dtype in enumerate(DTYPES)}
    save_file({**tensors, "scalar": torch.tensor(1.0)}, path, metadata={"format": "pt"})
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        expected = {name: Tensor(tuple(part.get_shape()), part.get_dtype(), path.name) for name, part in slices.items()}
    assert read_header(path) == expected and len(expected) == len(DTYPES) + 1


def test_what_the_library_refuses_is_refused(weights: Path) -> None:
    """Random changes of header bytes: whatever the library will not open is refused here, by the launcher."""
    good, rng = weights.read_bytes(), np.random.default_rng(0)
    length, refused = int.from_bytes(good[:8], "little"), 0
    for _ in range(400):
        data = bytearray(good)
        for at in rng.integers(0, 8 + length, rng.integers(1, 4)):
            data[at] = rng.choice(list(b'0123456789[]{}",:-FISU\x00\xff'))
        weights.write_bytes(data)
        try:
            load_file(weights)
        except (SafetensorError, KeyError):
            refused += 1
            with pytest.raises(CheckpointError):
                read_header(weights)
    assert refused > 200
