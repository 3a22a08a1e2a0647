"""Products of attention keep float32 results, on CUDA without a copy of the keys. Draws themselves: test_engine.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ksweep.inference import attention
from ksweep.inference.kv_cache import Past


class Operations(TorchDispatchMode):
    """Notes the name of every operation and the dtypes of the tensors that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[str, list[torch.dtype]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.done.append((str(func), [arg.dtype for arg in args if isinstance(arg, torch.Tensor)]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("device", "dtype", "has", "product", "given"),
    [
        ("cuda", torch.bfloat16, True, "aten.bmm.dtype", torch.bfloat16),
        ("cuda", torch.float16, True, "aten.bmm.dtype", torch.float16),
        ("cuda", torch.bfloat16, False, "aten.bmm.default", torch.float32),  # torch before 2.8
        ("cuda", torch.float32, True, "aten.bmm.default", torch.float32),
        ("cpu", torch.bfloat16, True, "aten.bmm.default", torch.float32),
    ],
)
def test_a_product_has_float32_results_whatever_its_factors(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype, has: bool, product: str, given: torch.dtype
) -> None:
    monkeypatch.setattr(attention, "HAS_FLOAT32_RESULTS", has)
    with FakeTensorMode(), Operations() as operations:
        first, second = (torch.empty(2, 3, 3, device=device, dtype=dtype) for _ in range(2))
        result = attention.float32_product(first, second)
    assert (result.dtype, result.device.type) == (torch.float32, device)
    assert [done for done in operations.done if "bmm" in done[0]] == [(product, [given, given])]


@pytest.mark.parametrize("shared", [0, 5])
def test_attention_has_no_product_but_those_with_float32_results(monkeypatch: pytest.MonkeyPatch, shared: int) -> None:
    products = []

    def product(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        products.append((first.dtype, second.dtype))
        return torch.einsum("bij,bjk->bik", first.float(), second.float())

    torch.manual_seed(0)
    query, keys = torch.randn(3, 4, 1, 8).bfloat16(), torch.randn(3, 2, 16, 8).bfloat16()
    prompt = torch.randn(2, 8, shared).bfloat16()
    past = Past(
        prompt if shared else None, prompt.transpose(1, 2).contiguous() if shared else None, keys, keys,
        torch.zeros(3, 16, dtype=torch.bool),
    )  # fmt: skip
    expected, _ = attention.slot_attention(None, query, past, past, None)
    monkeypatch.setattr(attention, "float32_product", product)
    monkeypatch.delattr(torch, "bmm")
    found, _ = attention.slot_attention(None, query, past, past, None)
    assert products == [(torch.bfloat16, torch.bfloat16)] * (4 if shared else 2)
    assert found.dtype == torch.bfloat16 and torch.allclose(found.float(), expected.float(), atol=1e-2)
