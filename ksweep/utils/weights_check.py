"""Whether a checkpoint can be loaded: asked before a job is submitted, and remembered.

The model of config.json is built on the meta device, without contents, by its own class, and takes the tensors that the headers
of the safetensors files list. So every architecture says itself what belongs to it (blocks of several kinds, experts, tied
heads), and what loading would refuse is refused here. That needs transformers, which the launcher does not load: see
`utils.heavy_calls`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from ksweep.utils.errors import CheckpointError
from ksweep.utils.files import home, publish, read_json
from ksweep.utils.heavy_calls import call_heavy
from ksweep.utils.model_sizes import implausible_size
from ksweep.utils.notes import Note
from ksweep.utils.safetensors_header import model_tensors
from ksweep.utils.sidecar_keys import abbreviated
from ksweep.utils.tensor_headers import Tensor

CHECK_VERSION = 3
"""Raised when the check becomes stricter: what earlier versions found whole is then checked again."""
DEPENDS_ON = ("transformers", "peft", "torch", "compressed-tensors", "bitsandbytes")
"""Packages that what can be loaded depends on."""


def check_loadable(function: str, checkpoint: Any, weights: Path, facts: Sequence[Any]) -> tuple[Note, ...]:
    """Check once that a checkpoint can be loaded; the next time that nothing has changed is answered from $KSWEEP_HOME.

    Args:
        function: the "package.module:name" of what checks `checkpoint`, and raises what is wrong.
        weights: directory with config.json and full weights.
        facts: what the check depends on: `headers_of` the files or their digest, role, number of blocks, configurations.

    Returns:
        A note if it could not be checked, as a launcher may be too small for that; the job does when it loads the weights.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    if (size := implausible_size(read_json(weights / "config.json", "model configuration"))) is not None:
        raise CheckpointError(
            f"{weights / 'config.json'} has {size[0]}={abbreviated(size[1])}, more than any model has. Check that it is the "
            "configuration of these weights, or download it again."
        )
    key = hashlib.sha256(json.dumps([CHECK_VERSION, _versions(), function, facts]).encode()).hexdigest()
    remembered = home() / "loadable" / key[:32]
    with suppress(OSError):
        if remembered.read_text(encoding="ascii", errors="replace") == key:
            return ()
    try:
        call_heavy(function, checkpoint)
    except ChildProcessError as error:
        text = (
            f"Whether the weights of {weights} are all there and fit its config.json could not be checked before the job, which "
            f"does when it loads them: {error}."
        )
        return (Note("checkpoint", text),)
    with suppress(OSError):  # with a read-only home it is checked again next time
        publish(remembered, key.encode())
    return ()


def headers_of(weights: Path, adapters: Sequence[Mapping[str, Tensor]] = ()) -> list[Any]:
    """Return config.json of a model, and name, dtype and shape of every tensor of it and of adapters."""
    config = (weights / "config.json").read_text(encoding="utf-8", errors="replace")
    headers = [
        sorted((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())
        for tensors in (model_tensors(weights), *adapters)
    ]
    return [config, headers]


@cache
def _versions() -> list[str | None]:
    return [_version(package) for package in DEPENDS_ON]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
