"""Whether a checkpoint can be loaded: asked before a job is submitted, and remembered.

The model of config.json is built on the meta device, without contents, by its own class, and takes the tensors that the headers
of the safetensors files list. So every architecture says itself what belongs to it (blocks of several kinds, experts, tied
heads), and what loading would refuse is refused here. That needs transformers, which the launcher does not load: see
`utils.heavy_calls`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from ksweep.autoencoder.safetensors_header import model_tensors
from ksweep.utils.errors import CheckpointError
from ksweep.utils.files import home, publish, read_json
from ksweep.utils.heavy_calls import call_heavy
from ksweep.utils.model_sizes import implausible_size
from ksweep.utils.sidecar_keys import abbreviated
from ksweep.utils.tensor_headers import Tensor

log = logging.getLogger(__name__)

CHECK_VERSION = 1
"""Raised when the check becomes stricter: what earlier versions found whole is then checked again."""
DEPENDS_ON = ("transformers", "peft", "torch", "compressed-tensors", "bitsandbytes")
"""Packages that what can be loaded depends on."""


def check_loadable(
    function: str, checkpoint: Any, weights: Path, adapters: Sequence[Mapping[str, Tensor]] = (), facts: Sequence[Any] = ()
) -> None:
    """Check once that a checkpoint can be loaded; the next time that nothing has changed is answered from $KSWEEP_HOME.

    Args:
        function: the "package.module:name" of what checks `checkpoint`, and raises what is wrong.
        weights: directory with config.json and full weights.
        adapters: headers of the adapters' weights.
        facts: what else the check depends on: role, number of blocks, the adapters' configurations.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    headers = [
        sorted((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())
        for tensors in (model_tensors(weights), *adapters)
    ]
    if (size := implausible_size(read_json(weights / "config.json", "model configuration"))) is not None:
        raise CheckpointError(
            f"{weights / 'config.json'} has {size[0]}={abbreviated(size[1])}, more than any model has. Check that it is the "
            "configuration of these weights, or download it again."
        )
    config = (weights / "config.json").read_text(encoding="utf-8", errors="replace")
    question = json.dumps([CHECK_VERSION, _versions(), function, config, headers, facts])
    key = hashlib.sha256(question.encode()).hexdigest()
    remembered = home() / "loadable" / key[:32]
    with suppress(OSError):
        if remembered.read_text(encoding="ascii", errors="replace") == key:
            return
    try:
        call_heavy(function, checkpoint)
    except ChildProcessError as error:
        log.warning("%s could not be checked before a job is submitted (%s); the job checks it", weights, error)
        return
    with suppress(OSError):  # with a read-only home it is checked again next time
        publish(remembered, key.encode())


@cache
def _versions() -> list[str | None]:
    return [_version(package) for package in DEPENDS_ON]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
