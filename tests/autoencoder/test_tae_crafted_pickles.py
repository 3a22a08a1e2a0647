"""Crafted .pt files, opcode by opcode: what they ask for is never allocated, called, or used as an address."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ksweep.utils.errors import CheckpointError
from ksweep.utils.torch_file import read_checkpoint
from tests.autoencoder.test_tae_refusals import copy_case, edited, refused

NONE, TRUE, FALSE, EMPTY_TUPLE, STOP, REDUCE, BUILD = b"N", b"\x88", b"\x89", b")", b".", b"R", b"b"


def name(dotted: str) -> bytes:
    module, _, last = dotted.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def whole(value: int) -> bytes:
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def sequence(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def call(function: str, *arguments: bytes) -> bytes:
    return name(function) + sequence(*arguments) + REDUCE


def content(length: int) -> bytes:
    """`length` bytes of "A", as protocol 2 writes bytes: on the machine of the finding they were used as an address."""
    return call("_codecs.encode", text("A" * length), text("latin1"))


def dtype(code: str, state: bytes = b"") -> bytes:
    return call("numpy.dtype", text(code), FALSE, TRUE) + (state + BUILD if state else b"")


def storage(key: str, count: int, kind: str = "FloatStorage", root: str = "storage") -> bytes:
    return sequence(text(root), name(f"torch.{kind}"), text(key), text("cpu"), whole(count)) + b"Q"


def tensor(of: bytes, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    sizes, strides = (sequence(*map(whole, numbers)) for numbers in (size, stride))
    return call("torch._utils._rebuild_tensor_v2", of, whole(offset), sizes, strides, FALSE, call("collections.OrderedDict"))


OBJECTS = sequence(whole(3), text("|"), sequence(call("numpy.dtype", text("O"), FALSE, TRUE), sequence(whole(1))), *[NONE] * 2,
                   whole(8), whole(1), whole(0))  # fmt: skip
"""The state of a dtype that is an array of one object: of R4."""
FIELDS = sequence(whole(3), text("|"), NONE, sequence(text("a")), b"}" + text("a") + sequence(dtype("O"), whole(-8)) + b"s",
                  whole(-1), whole(1 << 40), whole(63))  # fmt: skip
HUGE = sequence(whole(3), text("<"), NONE, NONE, NONE, whole(1 << 62), whole(1 << 62), whole(-1))

CARRIED: dict[str, bytes] = {
    "an array over bytes of the file as objects": call(
        "numpy.ndarray", sequence(whole(1)), dtype("f8", OBJECTS), content(64)
    ),
    "an array of 64 GiB": call("numpy.ndarray", sequence(whole(1 << 33)), text("f8")),
    "an array of a negative shape": call("numpy.ndarray", sequence(whole(-5)), dtype("f8")),
    "an array with strides out of its buffer": call(
        "numpy.ndarray", sequence(whole(4)), dtype("f8"), content(8), whole(1 << 40), sequence(whole(1 << 40))
    ),
    "a dtype of objects": dtype("O"),
    "a dtype with fields before its beginning": dtype("V8", FIELDS),
    "a dtype of a huge size": dtype("f8", HUGE),
    "a dtype described by a text": dtype("(1000000000,)(1000000000,)f8"),
    "a scalar of objects": call("numpy._core.multiarray.scalar", dtype("f8", OBJECTS), content(64)),
    "a scalar of an object dtype": call("numpy._core.multiarray.scalar", dtype("O"), content(8)),
    "a scalar of too few bytes": call("numpy._core.multiarray.scalar", dtype("f8"), content(3)),
    "a scalar of no bytes": call("numpy.core.multiarray.scalar", dtype("f8"), whole(1 << 60)),
    "a reconstructed array with a state of objects": call(
        "numpy._core.multiarray._reconstruct", name("numpy.ndarray"), sequence(whole(1 << 40)), content(1)
    ) + sequence(whole(1), sequence(whole(1)), dtype("f8", OBJECTS), FALSE, content(64)) + BUILD,
    "a bytearray of 1 TiB": call("builtins.bytearray", whole(1 << 40)),
    "a tensor of 1 TiB": call("torch.Tensor", whole(1 << 38)),
    "a NumPy number from an address": call("numpy.float64", content(8)),
    "a quantized tensor": call("torch._utils._rebuild_qtensor", NONE, whole(-1)),
    "a sparse tensor": call("torch._utils._rebuild_sparse_tensor", NONE, NONE),
    "a scheduler with attributes of Python": call("torch.optim.lr_scheduler.StepLR")
    + b"}" + text("__class__") + name("numpy.dtype") + b"s" + text("__dict__") + NONE + b"s" + BUILD,
}  # fmt: skip
"""Values beside the models: carried along as objects that do nothing, wherever the reference's files have such ones."""

LISTS = b"".join(b"]" for _ in range(20_000)) + b"a" * 19_999
TUPLES = NONE + b"\x85" * 20_000
REPEATS = sequence(b"]q\x00", *(b"](" + (b"h" + bytes([i])) * 10 + b"eq" + bytes([i + 1]) for i in range(20)))
CYCLE = b"]q\x00h\x00a"

REFUSED: dict[str, tuple[bytes, str]] = {
    "20,000 lists in one another": (LISTS, "nested more than 64 levels"),
    "20,000 tuples in one another": (TUPLES, "nested more than 64 levels"),
    "ten to the twentieth entries": (REPEATS, "stands for more than 2,000,000 entries"),
    "a list in itself": (CYCLE, "contains itself"),
    "a number of 2,000 bits": (whole(1 << 2000), "2001 bits"),
    "half of a surrogate pair": (text("\ud800"), "surrogate pair"),
    "a text of 4 GiB": (b"X\xff\xff\xff\xff", "ends too early"),
    "a memo entry that is not there": (b"j\xff\xff\xff\xff", "makes no sense"),
    "a mark that is not there": (b"e", "makes no sense"),
    "keys of one hash": (b"}" + whole((1 << 61) - 1) + NONE + b"s", "more than 60 bits as a key"),
    "a list as a key": (b"}]Ns", "makes no sense"),
    "a set of lists": (call("builtins.set", b"]]a"), "makes no sense"),
    "a call of a text": (text("eval") + EMPTY_TUPLE + REDUCE, "no function"),
    "a call with a list": (name("numpy.dtype") + b"]" + REDUCE, "no function"),
    "a state of a tuple": (EMPTY_TUPLE + NONE + BUILD, "sets the state of a tuple"),
    "an append to a dictionary": (b"}Na", "appends to a dict"),
    "a frame of protocol 4": (b"\x95" + struct.pack("<Q", 1 << 62), "opcode"),
    "a bytearray of protocol 5": (b"\x96" + struct.pack("<Q", 1 << 62), "opcode"),
    "a number as digits": (b"I" + b"9" * 5000 + b"\n", "opcode"),
    "a name of a megabyte": (b"c" + b"a" * (1 << 20) + b"\nb\n", "makes no sense"),
    "another kind of storage": (storage("0", 2, root="module"), "in another way"),
    "a storage that is not there": (storage("7", 2), "lacks the record data/7"),
    "a storage by a path": (storage("../../etc/passwd", 2), "lacks the record"),
    "a storage longer than its record": (storage("0", 3), "8 bytes, and its pickle says 3"),
    "a storage of a negative length": (storage("0", -2), "says -2"),
    "a storage of 2^62 entries": (storage("0", 1 << 62), "8 bytes"),
    "a storage of another type": (storage("0", 2, "DoubleStorage"), "2 of float64"),
    "a tensor longer than its storage": (tensor(storage("0", 2), 0, (3,), (1,)), "needs more than the 2 entries"),
    "a tensor that begins beyond its storage": (tensor(storage("0", 2), 1 << 39, (1,), (1,)), "needs more than"),
    "a tensor before its storage": (tensor(storage("0", 2), -1, (1,), (1,)), "offset -1"),
    "a tensor with strides beyond its storage": (tensor(storage("0", 2), 0, (2,), (1 << 30,)), "needs more than"),
    "a tensor with negative strides": (tensor(storage("0", 2), 1, (2,), (-1,)), "strides [-1]"),
    "a tensor of 2^40 equal entries": (tensor(storage("0", 2), 0, (1 << 40,), (0,)), "needs more than"),
    "a tensor of no rows and 2^63 columns": (tensor(storage("0", 2), 0, (0, 1 << 63), (1, 1)), "the shape [0,"),
    "a tensor of 5,000 dimensions": (tensor(storage("0", 2), 0, (1,) * 5000, (1,) * 5000), "other numbers of sizes"),
    "sizes without strides": (tensor(storage("0", 2), 0, (1,), ()), "other numbers of sizes"),
    "a tensor without a storage": (tensor(text("0"), 0, (1,), (1,)), "no storage"),
    "a tensor made of itself": (
        call("torch._tensor._rebuild_from_type_v2", name("torch._tensor._rebuild_from_type_v2"), NONE, EMPTY_TUPLE, NONE),
        "made of itself",
    ),
    "eval": (call("builtins.eval", text("1")), "asks for 'builtins.eval'"),
    "a class of torch that is not needed": (name("torch.jit.load"), "asks for 'torch.jit.load'"),
    "a path through a module": (name("numpy.os.system"), "asks for 'numpy.os.system'"),
    "a NumPy name beyond the list": (call("numpy.fromfile", text("/etc/passwd")), "asks for 'numpy.fromfile'"),
}
BOMBS: dict[str, bytes] = {
    "empty sets": b"\x8f" * (10 << 20),
    "empty lists": b"]" * (10 << 20),
    "marks": b"(" * (10 << 20),
    "nulls": NONE * (10 << 20),
    "memo entries": NONE + b"".join(b"r" + struct.pack("<I", i) for i in range(1 << 20)),
    "one long text by reference": text("A" * 1000) + b"q\x00" + b"(" + (b"h\x00" * (4 << 20)) + b"t",
}
"""Short pickles that would take gigabytes."""


def crafted(path: Path, data: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    """A file of torch.save with this pickle and one storage of two floats."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", b"\x80\x02" + data + STOP)
        file.writestr("archive/data/0", struct.pack("<2f", 1.5, 2.5), zipfile.ZIP_STORED)
        file.writestr("archive/version", "3\n")
    return path


def in_dictionary(value: bytes) -> bytes:
    return b"}" + text("x") + value + b"s"


@pytest.mark.parametrize("value", CARRIED.values(), ids=CARRIED)
def test_numpy_and_torch_values_are_carried_along_and_do_nothing(value: bytes, tmp_path: Path) -> None:
    [(key, carried)] = read_checkpoint(crafted(tmp_path / "x.pt", in_dictionary(value))).items()
    assert key == "x" and type(carried).__module__ == "ksweep.utils.restricted_pickle"
    assert not isinstance(carried, (np.ndarray, np.generic, np.dtype, torch.Tensor)) and len(repr(carried)) < 100


@pytest.mark.parametrize(("value", "reason"), REFUSED.values(), ids=REFUSED)
def test_crafted_pickle_is_refused_with_its_reason(value: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(crafted(tmp_path / "x.pt", in_dictionary(value)))
    assert reason in str(caught.value) and str(tmp_path / "x.pt") in str(caught.value) and len(str(caught.value)) < 600


def test_the_crafted_file_without_a_fault_is_read(tmp_path: Path) -> None:
    """The scaffold of the files above is right, so that they are refused for their fault alone."""
    whole_file = crafted(tmp_path / "x.pt", in_dictionary(tensor(storage("0", 2), 1, (1, 1), (1, 1))))
    assert torch.equal(read_checkpoint(whole_file)["x"], torch.tensor([[2.5]]))
    assert torch.equal(torch.load(whole_file, weights_only=True)["x"], torch.tensor([[2.5]]))


@pytest.mark.parametrize(
    "value",
    [np.float64(0.1), np.float32(2.5), np.float16(-3), np.int8(-7), np.uint64(2**63), np.int64(-(2**40)), np.bool_(True),
     np.bool_(False), np.array(5, dtype=">i4")[()], np.float64("inf")],
    ids=lambda value: f"{value.dtype.name} {value}",
)  # fmt: skip
def test_numpy_scalars_are_python_numbers_of_their_value(value: Any, tmp_path: Path) -> None:
    torch.save({"x": value, "config": {"y": [value]}}, tmp_path / "x.pt")
    content = read_checkpoint(tmp_path / "x.pt")
    assert type(content["x"]) is type(value.item()) and content["x"] == content["config"]["y"][0] == value.item()


def test_a_number_of_the_configuration_may_be_of_numpy(tmp_path: Path) -> None:
    path = copy_case("gpt2_patch_all", tmp_path)
    layer = read_checkpoint(path)["config"]["layer_l"]
    edited(path, lambda v: v["config"].update(layer_l=np.int64(layer)))
    assert read_checkpoint(path)["config"]["layer_l"] == layer


def as_layer(value: bytes) -> Callable[[Path], Path]:
    """The crafted value as config.layer_l of a file that is right otherwise."""

    def craft(path: Path) -> Path:
        edited(path, lambda v: v["config"].update(layer_l="TO BE REPLACED"))
        with zipfile.ZipFile(path) as file:
            records = {entry.filename: file.read(entry) for entry in file.infolist()}
        with zipfile.ZipFile(path, "w") as file:
            for record, data in records.items():
                file.writestr(record, data.replace(text("TO BE REPLACED"), value) if record.endswith("data.pkl") else data)
        return path

    return craft


@pytest.mark.parametrize("case", [*list(CARRIED)[:3], "a scalar of objects"])
def test_a_crafted_layer_is_refused_as_no_whole_number(case: str, tmp_path: Path) -> None:
    assert "layer_l is <numpy" in refused(as_layer(CARRIED[case])(copy_case("gpt2_patch_all", tmp_path)))


def test_a_compressed_pickle_is_refused_before_it_is_inflated(tmp_path: Path) -> None:
    """3 MB of deflated zeros are 3 GB."""
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("archive/data.pkl", "w", force_zip64=True) as record:
        for _ in range(64):
            record.write(bytes(1 << 20))
    with pytest.raises(CheckpointError, match="compressed or encrypted"):
        read_checkpoint(path)


def test_a_directory_that_lies_about_places_and_lengths_is_refused(tmp_path: Path) -> None:
    good = crafted(tmp_path / "x.pt", in_dictionary(tensor(storage("0", 2), 0, (2,), (1,)))).read_bytes()
    first = good.index(b"PK\x01\x02")
    sizes, offset = slice(first + 20, first + 28), slice(first + 42, first + 46)
    for place, value in (
        (sizes, struct.pack("<2I", 1 << 31, 1 << 31)),
        (sizes, struct.pack("<2I", len(good), len(good))),
        (offset, struct.pack("<I", 1 << 31)),
        (offset, struct.pack("<I", 5)),
        (slice(first + 10, first + 12), struct.pack("<H", 8)),
        (slice(first + 8, first + 10), struct.pack("<H", 1)),
    ):
        (tmp_path / "x.pt").write_bytes(good[: place.start] + value + good[place.stop :])
        with pytest.raises(CheckpointError, match="not a whole torch checkpoint"):
            read_checkpoint(tmp_path / "x.pt")
    end = good.rindex(b"PK\x05\x06")
    (tmp_path / "x.pt").write_bytes(good[: end + 12] + struct.pack("<I", 1 << 31) + good[end + 16 :])
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "x.pt")


def test_big_endian_tensors_and_several_pickles_are_refused(tmp_path: Path) -> None:
    path = crafted(tmp_path / "x.pt", b"}")
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/byteorder", "big")
    with pytest.raises(CheckpointError, match="little-endian"):
        read_checkpoint(path)
    with zipfile.ZipFile(crafted(path, b"}"), "a") as file:
        file.writestr("other/data.pkl", b".")
    with pytest.raises(CheckpointError, match="2 records data"):
        read_checkpoint(path)


READ_ALL = """
import json, resource, sys, time
from pathlib import Path
import torch
from ksweep.utils.torch_file import read_checkpoint
from ksweep.utils.errors import CheckpointError
torch.empty(1), torch.UntypedStorage(1)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]), -1))
def peak_kib():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
Path("/proc/self/clear_refs").write_text("5")  # the peak of the imports is forgotten
before, outcomes = peak_kib(), {}
for path in sys.argv[2:]:
    begin = time.monotonic()
    try:
        outcome = type(read_checkpoint(Path(path))).__name__
    except CheckpointError as error:
        outcome = str(error)
    outcomes[path] = outcome, time.monotonic() - begin
print(json.dumps([outcomes, peak_kib() - before]))
"""


@pytest.mark.trials
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory by /proc")
def test_nothing_crafted_needs_more_than_96_megabytes(tmp_path: Path) -> None:
    """In a process of its own, which may take 160 MB of addresses and must stay below 96 MB of memory."""
    paths = [crafted(tmp_path / f"{i}.pt", in_dictionary(value)) for i, value in enumerate(CARRIED.values())]
    paths += [crafted(tmp_path / f"r{i}.pt", in_dictionary(value)) for i, (value, _) in enumerate(REFUSED.values())]
    bombs = [crafted(tmp_path / f"b{i}.pt", value) for i, value in enumerate(BOMBS.values())]
    bombs.append(crafted(tmp_path / "deflated.pt", NONE * (64 << 20), zipfile.ZIP_DEFLATED))
    bombs.append(crafted(tmp_path / "long.pt", NONE * (64 << 20)))
    arguments = [sys.executable, "-c", READ_ALL, str(160 << 20), *map(str, [*paths, *bombs])]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes, peak_kib = json.loads(done.stdout)
    for path in bombs:
        assert "not a whole torch checkpoint" in outcomes[str(path)][0], outcomes[str(path)]
    print(f"{len(outcomes)} crafted files: {peak_kib >> 10} MB, the slowest {max(s for _, s in outcomes.values()):.1f} s")
    assert peak_kib < 96 << 10
