"""Models on the devices of a rank: on its one device, or whole blocks of them on each of several.

What lies where is accelerate's decision (transformers' device_map="balanced"), and its hooks carry what flows from one device to
the next. Inputs go to the first device and outputs come back to it; keys and values stay with their block. The devices take
turns: this is for a model that one of them cannot hold, and makes nothing faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ksweep.utils.errors import RunError

Devices = str | torch.device | Sequence[str | torch.device]
"""A torch device or its name; or several, over which a model is spread."""
SHARE_FOR_WEIGHTS = 0.9
"""Of the free memory; the rest is for keys, values and activations. transformers' own share of a single GPU."""


def as_devices(devices: Devices) -> tuple[torch.device, ...]:
    """Every device, the first one first."""
    named = [devices] if isinstance(devices, (str, torch.device)) else devices
    return tuple(torch.device(device) for device in named)


def placed(model: Any, devices: Sequence[torch.device]) -> Any:
    """The model, frozen before, on its device or spread over several.

    Raises:
        RunError: it does not fit on them. Nothing is ever left to the CPU or to the disk instead.
    """
    if len(devices) == 1:
        return model.to(devices[0])
    from accelerate import dispatch_model

    where = block_map(model, [int(SHARE_FOR_WEIGHTS * free_bytes(device)) for device in devices])
    names = {module: str(devices[number]) for module, number in where.items()}
    return dispatch_model(model, names, main_device=str(devices[0]), skip_keys=model._skip_keys_device_placement)


def block_map(model: Any, room: Sequence[int]) -> dict[str, int]:
    """Modules of a transformers model -> number of their device, in about equal shares; `room` is what each may hold, bytes.

    Raises:
        RunError: it does not fit.
    """
    from accelerate.utils import get_balanced_memory, infer_auto_device_map

    whole, most = list(model._no_split_modules), dict(enumerate(room))
    # Equal shares first; where a device has not even room for its share, one after the other is filled.
    for shares in (get_balanced_memory(model, dict(most), no_split_module_classes=whole), most):
        found: dict[str, Any] = infer_auto_device_map(model, shares, no_split_module_classes=whole)
        # What has no place comes out as "disk"; a first device without room for the embeddings is left empty.
        if "disk" not in found.values() and 0 in found.values():
            return found
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    raise RunError(
        f"a {type(model).__name__} of {size / 1e9:.3g} GB does not fit on {len(room)} devices that have room for "
        f"{', '.join(f'{one / 1e9:.3g}' for one in room)} GB of weights, in whole blocks: raise resources.gpus_per_model, or "
        "choose a smaller autoencoder.dtype"
    )


def free_bytes(device: torch.device) -> int:
    """Memory of a device that nobody uses, what torch only keeps for itself included."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    import psutil

    return int(psutil.virtual_memory().available)
