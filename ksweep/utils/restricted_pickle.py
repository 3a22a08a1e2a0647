"""Read the pickle of a torch.save file into plain values, without calling anything that it names.

The opcodes are those of pickle protocol 2 that torch.save writes. A name in the pickle stands for a constructor of this module:
plain containers, bytes, NumPy scalars as Python numbers, tensors (made by the caller from a storage whose range it has checked),
and `StandIn` objects for everything that is only carried along (schedulers, optimisers, NumPy arrays, dtypes, devices). Other
names are refused. Each step is charged against a budget of memory, so that a short pickle cannot ask for much.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

BUDGET = 48 << 20
"""Bytes that the values of a pickle may take. A checkpoint with 5,000 tensors takes about 10 MB."""
STEP_COST, PUT_COST, ITEM_COST = 16, 100, 100
"""Bytes charged for a step, a memo entry and an entry of a dictionary."""
LARGEST_KEY = 1 << 60
"""Whole numbers beyond it could have one hash in common, and a dictionary of them would take the square of their count."""


class UnknownNameError(Exception):
    """A pickle asks for a name that is not needed for tensors and plain values."""


class MalformedPickleError(Exception):
    """A pickle is cut off, or is not what torch.save writes."""


class StandIn:
    """An object that is carried along and does nothing; it keeps the attributes that the pickle gives it."""

    __slots__ = ("__dict__", "name")

    def __init__(self, name: str) -> None:
        """Take the dotted name of the class that the pickle names."""
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}>"


class PickledName(NamedTuple):
    """A class or function that a pickle names, and that reads as a constructor of this module when called."""

    name: str


class PickledDtype:
    """A NumPy dtype: "i8", "f4"; None if it is none of a plain number."""

    __slots__ = ("code", "order")

    def __init__(self, code: str | None) -> None:
        """Take the code; the byte order is that of this machine until the pickle states another."""
        self.code, self.order = code, "<"


class PickledStorage(NamedTuple):
    """The range of a torch storage in the file."""

    dtype: str
    """Name of the torch dtype; "" for an untyped storage."""
    offset: int
    num_bytes: int


MakeTensor = Callable[[PickledStorage, str, int, tuple[int, ...], tuple[int, ...]], Any]
"""Makes a tensor from a storage, the name of a dtype ("" for that of the storage), an offset, a shape and strides."""
FindStorage = Callable[[str, str, int], PickledStorage]
"""Returns the range of a storage by type name, key, and number of entries."""

_SCHEDULERS = ("CosineAnnealingLR", "CosineAnnealingWarmRestarts", "ExponentialLR", "LinearLR", "PolynomialLR", "StepLR")
_CARRIED = frozenset({
    *(f"torch.optim.lr_scheduler.{name}" for name in _SCHEDULERS),
    "torch.optim.adamw.AdamW", "torch.optim.adam.Adam", "torch.optim.sgd.SGD",
    "torch.device", "torch.serialization._get_layout", "builtins.bytearray", "builtins.complex",
    "numpy.ndarray", *(f"numpy.{name}" for name in ("uint32", "uint64", "int32", "int64", "float32", "float64", "bool_", "bool")),
    *(f"{module}.multiarray._reconstruct" for module in ("numpy._core", "numpy.core")),
    *(f"torch._utils._rebuild_{kind}" for kind in ("sparse_tensor", "qtensor", "sparse_csr_tensor", "nested_tensor")),
    "torch.per_tensor_affine", "torch.per_tensor_symmetric", "torch.per_channel_affine", "torch.per_channel_symmetric",
    "torch.Tensor", "torch.nn.parameter.Parameter",
})  # fmt: skip
"""Names whose objects become a `StandIn`."""
_STORAGES = {
    "FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
    "BoolStorage": "bool", "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128", "UntypedStorage": "",
}  # fmt: skip
_DTYPES = frozenset({
    "float16", "float32", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "int16", "int32", "int64", "uint8",
    "uint16", "uint32", "uint64", "bool", "complex64", "complex128",
})  # fmt: skip
_SCALARS = {
    "b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q",
    "f2": "e", "f4": "f", "f8": "d",
}  # fmt: skip
"""Codes of NumPy dtypes -> formats of `struct`."""


def read_pickle(data: bytes, find_storage: FindStorage, make_tensor: MakeTensor) -> Any:
    """Return the value of a pickle.

    Raises:
        UnknownNameError: it asks for a name that is not needed.
        MalformedPickleError: it is cut off, has other opcodes, gives a constructor other arguments, or is over the budget.
    """
    return _Reader(data, find_storage, make_tensor).read()


class _Reader:
    """The machine of a pickle: a stack, the stacks below marks, and a memo."""

    def __init__(self, data: bytes, find_storage: FindStorage, make_tensor: MakeTensor) -> None:
        self.data, self.at, self.find_storage, self.make_tensor = data, 0, find_storage, make_tensor
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.left = BUDGET

    def read(self) -> Any:
        """Carry out the opcodes up to STOP, and return the value on the stack."""
        try:
            while (opcode := self.take(1)) != b".":
                self.charge(STEP_COST)
                step = _STEPS.get(opcode)
                if step is None:
                    raise MalformedPickleError(f"its pickle has the opcode {opcode!r}, which torch.save does not write")
                step(self)
            return self.stack.pop()
        except (IndexError, KeyError, TypeError, ValueError, OverflowError, struct.error) as error:
            raise MalformedPickleError(f"its pickle makes no sense at byte {self.at} ({type(error).__name__})") from error

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        chunk = self.data[self.at : self.at + count]
        if len(chunk) < count:
            raise MalformedPickleError("its pickle ends too early")
        self.at += count
        return chunk

    def line(self) -> str:
        """Return the text up to the end of the line."""
        end = self.data.index(b"\n", self.at, self.at + 1000)
        text = self.data[self.at : end].decode()
        self.at = end + 1
        return text

    def charge(self, num_bytes: int) -> None:
        """Take bytes from the budget."""
        self.left -= num_bytes
        if self.left < 0:
            raise MalformedPickleError(f"its pickle asks for more than {BUDGET >> 20} MB besides tensors")

    def push(self, value: Any) -> None:
        """Put a new value on the stack."""
        self.charge(sys.getsizeof(value))
        self.stack.append(value)

    def unpack(self, form: str, size: int) -> Any:
        """Return a number of fixed size."""
        return struct.unpack(form, self.take(size))[0]

    def pop_mark(self) -> list[Any]:
        """Return the values above the last mark."""
        values, self.stack = self.stack, self.below.pop()
        return values

    def mark(self) -> None:
        """Begin a new stack."""
        self.charge(sys.getsizeof([]))
        self.below.append(self.stack)
        self.stack = []

    def name(self) -> None:
        """Push the name of a class or function, once it is one that is needed."""
        module, name = self.line(), self.line()
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if not _is_needed(full):
            raise UnknownNameError(full)
        self.push(PickledName(full))

    def call(self) -> None:
        """Replace a name and its arguments by the value that it stands for."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not PickledName or type(arguments) is not tuple:
            raise MalformedPickleError("its pickle calls something that is no function")
        self.push(self.made(function.name, arguments))

    def made(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """Return the value of a call."""
        if make := _CONSTRUCTORS.get(name):
            return make(self, *arguments)
        if name in _CARRIED:
            return StandIn(name)
        raise MalformedPickleError(f"its pickle calls {name}, which is no function")

    def build(self) -> None:
        """Give an object its state."""
        state, value = self.stack.pop(), self.stack[-1]
        if type(value) is PickledDtype:
            _set_dtype_state(value, state)
        elif type(value) is StandIn and type(state) is dict:
            attributes = {key: entry for key, entry in state.items() if type(key) is str}
            self.charge(ITEM_COST * len(attributes))
            value.__dict__.update(attributes)
        elif type(value) not in (StandIn, dict):  # a dictionary with attributes: the metadata of a state dict
            raise MalformedPickleError(f"its pickle sets the state of a {type(value).__name__}")

    def append(self, values: list[Any]) -> None:
        """Add values to a list."""
        if type(self.stack[-1]) is not list:
            raise MalformedPickleError(f"its pickle appends to a {type(self.stack[-1]).__name__}")
        self.charge(STEP_COST * len(values))
        self.stack[-1].extend(values)

    def set_items(self, values: list[Any]) -> None:
        """Add keys and values to a dictionary."""
        if type(self.stack[-1]) is not dict or len(values) % 2:
            raise MalformedPickleError(f"its pickle sets items of a {type(self.stack[-1]).__name__}")
        self.charge(ITEM_COST * len(values) // 2)
        for key, value in zip(values[::2], values[1::2], strict=True):
            self.stack[-1][_key(key)] = value

    def text(self) -> None:
        """Push a text."""
        self.push(self.take(self.unpack("<I", 4)).decode("utf-8", "surrogatepass"))

    def put(self, index: int) -> None:
        """Remember the value on the stack."""
        self.charge(PUT_COST)
        self.memo[index] = self.stack[-1]

    def storage(self) -> None:
        """Replace the id of a storage by its range."""
        match self.stack.pop():
            case ("storage", PickledName(name), str(key), _, int(count)) if name.rpartition(".")[2] in _STORAGES:
                self.push(self.find_storage(_STORAGES[name.rpartition(".")[2]], key, count))
            case _:
                raise MalformedPickleError("its pickle asks for a storage in another way than torch.save")

    def tuple_of(self, count: int) -> None:
        """Make the last values a tuple."""
        if len(self.stack) < count:
            raise IndexError
        values = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.push(values)

    def popped_pair(self) -> tuple[Any, Any]:
        """Return the last two values, and take them from the stack."""
        value, key = self.stack.pop(), self.stack.pop()
        return key, value

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *others: Any) -> Any:
        """Return the tensor of a range; the dtype is the last but one of seven arguments that later versions of torch give."""
        dtype = others[2] if len(others) > 2 else None
        name = dtype.name.removeprefix("torch.") if type(dtype) is PickledName else ""
        whole = type(offset) is int and all(type(n) is int for n in (*size, *stride))
        if type(storage) is not PickledStorage or not whole or (name and name not in _DTYPES):
            raise MalformedPickleError("a tensor has no storage, offset, shape and strides of whole numbers")
        return self.make_tensor(storage, name, offset, tuple(size), tuple(stride))

    def tensor_of_type(self, function: Any, kind: Any, arguments: Any, *state: Any) -> Any:
        """Return a tensor with attributes of its own, without them."""
        if type(function) is not PickledName or type(arguments) is not tuple or "rebuild" not in function.name:
            raise MalformedPickleError("a tensor of a class of its own is made by no function of torch")
        if function.name == "torch._tensor._rebuild_from_type_v2":
            raise MalformedPickleError("a tensor is made of itself")
        return self.made(function.name, arguments)


def _is_needed(name: str) -> bool:
    module, _, last = name.rpartition(".")
    is_torch = module in ("torch", "torch.storage") and (last in _STORAGES or last in _DTYPES)
    return is_torch or name in _CONSTRUCTORS or name in _CARRIED


def _key(key: Any) -> Any:
    """Return a key of a dictionary, once it is plain: hashes of whole numbers beyond 61 bits can be made to collide."""
    for part in key if type(key) is tuple else (key,):
        if isinstance(part, (int, float)) and not abs(part) < LARGEST_KEY:
            raise MalformedPickleError("its pickle has a number of more than 60 bits as a key")
    return key


def _set_dtype_state(dtype: PickledDtype, state: Any) -> None:
    """Take the byte order from a dtype's state; a dtype with fields or a shape of its own is none of a plain number."""
    match state:
        case (_, ("<" | ">" | "|" | "=") as order, None, None, None, *_):
            dtype.order = ">" if order == ">" else "<"
        case _:
            dtype.code = None


def _dtype(_reader: _Reader, code: Any = None, *_: Any) -> PickledDtype:
    return PickledDtype(code if type(code) is str and code in _SCALARS else None)


def _scalar(_reader: _Reader, dtype: Any = None, content: Any = None, *_: Any) -> Any:
    """Return a NumPy scalar as a Python number; one of another kind is only carried along."""
    if type(dtype) is PickledDtype and dtype.code is not None and type(content) is bytes:
        form = dtype.order + _SCALARS[dtype.code]
        if struct.calcsize(form) == len(content):
            return struct.unpack(form, content)[0]
    return StandIn("numpy.scalar")


def _encoded(reader: _Reader, text: Any, encoding: Any = "latin1") -> bytes:
    """Return bytes, which protocol 2 writes as a text."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise MalformedPickleError(f"its pickle encodes a {type(text).__name__} in another way than torch.save")
    return text.encode("latin1")


def _dict(reader: _Reader, *arguments: Any) -> dict[Any, Any]:
    """Return a dictionary of pairs, or an empty one if the arguments are none."""
    pairs = arguments[0] if len(arguments) == 1 and type(arguments[0]) is list else []
    reader.charge(ITEM_COST * len(pairs))
    return {_key(key): value for key, value in pairs}


def _set(reader: _Reader, values: Any = ()) -> set[Any]:
    if type(values) is not list:
        raise MalformedPickleError("its pickle makes a set of something that is no list")
    reader.charge(ITEM_COST * len(values))
    return set(map(_key, values))


def _without_content(reader: _Reader, *_: Any) -> Any:
    import torch

    return torch.empty(0, device="meta")


_CONSTRUCTORS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dict,
    "collections.Counter": lambda reader, *_: {},
    "collections.defaultdict": lambda reader, *_: {},
    "builtins.dict": lambda reader, *_: {},
    "builtins.set": _set,
    "builtins.bytes": lambda reader, *_: b"",
    "_codecs.encode": _encoded,
    "numpy.dtype": _dtype,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.core.multiarray.scalar": _scalar,
    "torch.Size": lambda reader, values=(): tuple(values),
    "torch._utils._rebuild_tensor": _Reader.tensor,
    "torch._utils._rebuild_tensor_v2": _Reader.tensor,
    "torch._utils._rebuild_tensor_v3": _Reader.tensor,
    "torch._utils._rebuild_parameter": lambda reader, data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda reader, data, *_: data,
    "torch._utils._rebuild_meta_tensor_no_storage": _without_content,
    "torch._tensor._rebuild_from_type_v2": _Reader.tensor_of_type,
}
"""What the names of a pickle stand for; none is the function of that name."""

_STEPS: Mapping[bytes, Callable[[_Reader], object]] = {
    b"\x80": lambda r: r.take(1),
    b"c": _Reader.name,
    b"R": _Reader.call,
    b"\x81": _Reader.call,
    b"b": _Reader.build,
    b"(": _Reader.mark,
    b"a": lambda r: r.append([r.stack.pop()]),
    b"e": lambda r: r.append(r.pop_mark()),
    b"s": lambda r: r.set_items([*r.popped_pair()]),
    b"u": lambda r: r.set_items(r.pop_mark()),
    b"t": lambda r: r.push(tuple(r.pop_mark())),
    b"\x85": lambda r: r.tuple_of(1),
    b"\x86": lambda r: r.tuple_of(2),
    b"\x87": lambda r: r.tuple_of(3),
    b"N": lambda r: r.push(None),
    b"\x88": lambda r: r.push(True),
    b"\x89": lambda r: r.push(False),
    b")": lambda r: r.push(()),
    b"]": lambda r: r.push([]),
    b"}": lambda r: r.push({}),
    b"\x8f": lambda r: r.push(set()),
    b"J": lambda r: r.push(r.unpack("<i", 4)),
    b"K": lambda r: r.push(r.unpack("<B", 1)),
    b"M": lambda r: r.push(r.unpack("<H", 2)),
    b"G": lambda r: r.push(r.unpack(">d", 8)),
    b"\x8a": lambda r: r.push(int.from_bytes(r.take(r.unpack("<B", 1)), "little", signed=True)),
    b"X": _Reader.text,
    b"U": lambda r: r.push(r.take(r.unpack("<B", 1))),
    b"Q": _Reader.storage,
    b"h": lambda r: r.stack.append(r.memo[r.unpack("<B", 1)]),
    b"j": lambda r: r.stack.append(r.memo[r.unpack("<I", 4)]),
    b"q": lambda r: r.put(r.unpack("<B", 1)),
    b"r": lambda r: r.put(r.unpack("<I", 4)),
}
"""The opcodes that torch.save writes."""
