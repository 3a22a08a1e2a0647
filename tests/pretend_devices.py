"""Devices that a machine without GPUs does not have: CPU tensors that say they lie on maia:0, maia:1, ...

    with PretendDevices():
        torch.ones(3, device="maia:0") + torch.ones(3, device="maia:1")        # RuntimeError, as between two GPUs

Values are computed for real; what torch refuses between two GPUs is refused here: an operation on tensors of different devices
(but for CPU scalars, and CPU indices). maia is a device that torch knows by name and has no code for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CROSSING = {aten.copy_.default, aten._copy_from.default, torch.Tensor.copy_}
BY_PYTHON = {
    getattr(torch.Tensor, name)
    for name in ("__getitem__", "__setitem__", "contiguous", "tolist", "item", "__float__", "__int__", "__bool__", "copy_")
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default} | {
    torch.Tensor.__getitem__,
    torch.Tensor.__setitem__,
}


class Elsewhere(torch.Tensor):
    """A CPU tensor that says it lies on another device."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> Elsewhere:
        with torch.inference_mode(False):  # a view of a tensor of outside must not become one of inside
            made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=device
            )
        made.inner = inner
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in BY_PYTHON:  # torch's own would look for a driver
            return _run(func, args, kwargs or {})
        if func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]  # torch's own would leave `inner` as it is
            args[0].inner = args[1].inner
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class PretendDevices(TorchDispatchMode):
    """While open, tensors can be made on devices of type maia."""

    def __enter__(self) -> Any:
        # torch.tensor(values, device=...) would go past the mode: this makes it a CPU tensor that is then moved.
        self.before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> Any:
        torch._C._set_only_lift_cpu_tensors(self.before)
        return super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    # In inference mode operations that are made of others come whole, tensor.to(device) among them.
    if func not in BY_PYTHON and func.name().startswith("aten::to."):
        with PretendDevices():
            return func.decompose(*args, **kwargs)
    tensors = [t for t in _leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    asked = kwargs.get("device")
    where = asked if asked is not None else _device_of(func, args, tensors)
    if asked is not None and asked.type == "maia":
        kwargs = kwargs | {"device": torch.device("cpu")}
    found = func(*_mapped(_inner, args), **_mapped(_inner, kwargs))
    if where is None or where.type != "maia":
        return found
    given = {id(t.inner): t for t in tensors if isinstance(t, Elsewhere)}

    def outer(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return given[id(value)] if id(value) in given else Elsewhere(value, where)

    return _mapped(outer, found)


def _device_of(func: Any, args: Any, tensors: list[torch.Tensor]) -> torch.device | None:
    """Where an operation takes place."""
    if func in CROSSING:
        return tensors[0].device
    if func in INDEXING:
        on_cpu = [t for t in _leaves(args[1]) if isinstance(t, torch.Tensor) and t.device.type == "cpu"]
        tensors = [t for t in tensors if not any(t is one for one in on_cpu)]
    devices = set(_devices(t for t in tensors if t.ndim or t.device.type != "cpu")) or set(_devices(tensors))
    if len(devices) > 1:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {sorted(map(str, devices))}")
    return next(iter(devices), None)


# torch.utils._pytree does the same for any class of container; it took half the time of these tests.
def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)
    else:
        yield value


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _mapped(function, part) for name, part in value.items()}
    if isinstance(value, (tuple, list)):  # what torch returns with names, such as that of max, takes a sequence too
        return type(value)([_mapped(function, part) for part in value])
    return function(value)


def _devices(tensors: Iterable[torch.Tensor]) -> Iterable[torch.device]:
    return (t.device for t in tensors)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Elsewhere) else value
