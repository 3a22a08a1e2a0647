"""Models on the devices of a rank: whole on one device, or in whole blocks on several.

accelerate decides which block goes where (transformers' device_map="balanced"), and its hooks move what flows from one device to
the next. Inputs go to the first device and outputs come back to it; keys and values stay with their block. The devices work one
after the other: this is for a model that does not fit on one of them, and makes nothing faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ksweep.inference import memory
from ksweep.utils import machine
from ksweep.utils.errors import RunError

Devices = str | torch.device | Sequence[str | torch.device]
"""A torch device or its name; or several, over which a model is spread."""
WEIGHTS_SHARE = 0.9
"""Of the free memory; the rest is for keys, values and activations. transformers' own share of a single GPU."""


def as_devices(devices: Devices) -> tuple[torch.device, ...]:
    """Return the devices as a tuple, in their order."""
    names = [devices] if isinstance(devices, (str, torch.device)) else devices
    return tuple(torch.device(name) for name in names)


def streaming_options(devices: Sequence[torch.device], num_bytes: int = 0) -> dict[str, Any]:
    """Return the options with which `from_pretrained` reads weights file by file straight onto their device.

    Eight ranks of a node would otherwise hold eight whole models in its memory at once. There are none for a CPU, which is where
    weights are read to anyway; for several devices, over which a whole model is spread; and for a device with less room than
    `num_bytes`.
    """
    [device, *others] = devices
    if others or device.type == "cpu" or num_bytes > WEIGHTS_SHARE * _free_bytes(device):
        return {}
    return {"device_map": {"": str(device)}}


def place_model(model: Any, devices: Sequence[torch.device]) -> Any:
    """Move a frozen model to its device, or spread its blocks over several, and return it.

    Raises:
        RunError: it does not fit on them. Nothing is ever left to the CPU or to the disk instead.
    """
    if len(devices) == 1:
        return model.to(devices[0])
    from accelerate import dispatch_model

    device_of = block_map(model, [int(WEIGHTS_SHARE * _free_bytes(device)) for device in devices])
    names = {module: str(devices[number]) for module, number in device_of.items()}
    return dispatch_model(model, names, main_device=str(devices[0]), skip_keys=model._skip_keys_device_placement)


def _free_bytes(device: torch.device) -> int:
    """Return the free memory of a device, or of the machine for a device that does not report any; a full GPU has 0."""
    of_device = memory.free_device_bytes(device)
    return of_device if of_device is not None else machine.free_memory() or 0


def block_map(model: Any, max_bytes: Sequence[int]) -> dict[str, int]:
    """Return the device number of each module of a transformers model, in about equal shares of at most `max_bytes` each.

    Raises:
        RunError: it does not fit.
    """
    from accelerate.utils import get_balanced_memory, infer_auto_device_map

    whole, limits = list(model._no_split_modules), dict(enumerate(max_bytes))
    # Equal shares first; where a device is too small for its share, the devices are filled one after the other.
    for shares in (get_balanced_memory(model, dict(limits), no_split_module_classes=whole), limits):
        device_of: dict[str, Any] = infer_auto_device_map(model, shares, no_split_module_classes=whole)
        # Modules that fit nowhere are assigned to "disk"; a first device without room for the embeddings is left empty.
        if "disk" not in device_of.values() and 0 in device_of.values():
            return device_of
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    raise RunError(
        f"a {type(model).__name__} of {size / 1e9:.3g} GB does not fit on {len(max_bytes)} devices that have room for "
        f"{', '.join(f'{limit / 1e9:.3g}' for limit in max_bytes)} GB of weights, in whole blocks: raise "
        "resources.gpus_per_model, or choose a smaller autoencoder.dtype"
    )
