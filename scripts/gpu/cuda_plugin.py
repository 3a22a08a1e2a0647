"""`pytest -p cuda_plugin`: the engine's tests with their models on the GPU and real CUDA graphs, recorded at a shape's third use.

Vectors stay where the tests leave them, on the CPU, so that a tensor of the product on the wrong device fails. Without a GPU
everything stays on the CPU, so that the plugin itself can be tried.
"""

from __future__ import annotations

import inspect

import pytest
import torch

from ksweep.inference import cuda_graphs

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
COUNTS_PASSES = "rows_of_each_step"
"""What tests call that count forward passes, of which a replayed graph has none."""


def pytest_configure(config: pytest.Config) -> None:
    from tests.inference import test_engine

    cuda_graphs.USES_BEFORE_RECORDING = 2
    for name, build in list(test_engine.MODELS.items()):
        test_engine.MODELS[name] = lambda build=build: build().to(DEVICE)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if DEVICE.type == "cpu":
        return
    counting = [item for item in items if COUNTS_PASSES in inspect.getsource(item.function)]  # type: ignore[attr-defined]
    config.hook.pytest_deselected(items=counting)
    items[:] = [item for item in items if item not in counting]
