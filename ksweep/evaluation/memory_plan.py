"""Do an AV and an AR fit on the devices of a rank together, one after the other, or not at all? Told before they are loaded."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Literal

from ksweep.autoencoder.family import family_of
from ksweep.config.spec import Autoencoder
from ksweep.evaluation.cell_run import CellRun
from ksweep.evaluation.distributed import Ranks
from ksweep.inference.backend import loads_weights
from ksweep.inference.device_map import WEIGHTS_SHARE
from ksweep.inference.memory import total_device_bytes
from ksweep.utils.console import bytes_text
from ksweep.utils.errors import RunError

log = logging.getLogger(__name__)

Fit = Literal["together", "one at a time", "too large"]


def fit_of_weights(av_bytes: int, ar_bytes: int, device_bytes: Sequence[int]) -> Fit:
    """Return how an AV and an AR of these sizes fit on devices over which each of them is spread.

    A tenth of the devices' memory is for keys, values and activations at least.
    """
    room = WEIGHTS_SHARE * sum(device_bytes)
    if av_bytes + ar_bytes <= room:
        return "together"
    return "one at a time" if max(av_bytes, ar_bytes) <= room else "too large"


def draws_before_scoring(runs: Sequence[CellRun], asked: bool | None, ranks: Ranks, stream: int) -> bool:
    """Return whether everything is drawn before the AR is loaded: for all ranks what the first one finds.

    Args:
        runs: the cells of a stream.
        asked: `resources.phases`; None decides by the sizes of the models and of the rank's GPUs.
        ranks: the ranks of the job.
        stream: number of the stream in the job.

    Raises:
        RunError: a model that is needed is larger than the GPUs.
    """
    phases = bool(asked)
    if (device_bytes := total_device_bytes(ranks.devices)) is not None:
        family = family_of(runs[0].cell.autoencoder)
        av_bytes, ar_bytes = family.half_bytes()
        # An engine that loads the AV itself finds its own place for it.
        draws = any(run.units for run in runs) and not loads_weights(runs[0].cell.sampling.engine)
        needed = av_bytes if draws else 0, ar_bytes if any(run.num_unscored for run in runs) else 0
        fit = fit_of_weights(*needed, device_bytes)
        if fit == "too large":
            raise RunError(too_large_message(family.autoencoder, *needed, device_bytes, ranks.device_name))
        phases = fit == "one at a time" if asked is None else asked
        if fit == "one at a time" and ranks.rank == 0:
            log.warning(
                "AV (%s) and AR (%s) do not fit into %s of GPU memory together: %s", *map(bytes_text, needed),
                bytes_text(sum(device_bytes)),
                "all draws are taken before they are scored" if phases else "resources.phases=null would draw before it scores",
            )  # fmt: skip
    return ranks.from_first_rank(f"phases/{stream}", b"1" if phases else b"0") == b"1"


def too_large_message(
    autoencoder: Autoencoder, av_bytes: int, ar_bytes: int, device_bytes: Sequence[int], device_name: str
) -> str:
    """Return the message for a model that is larger than the GPUs over which it would be spread."""
    name, size = ("AV", av_bytes) if av_bytes >= ar_bytes else ("AR", ar_bytes)
    least = math.ceil(size / (WEIGHTS_SHARE * min(device_bytes)))
    halve = "autoencoder.dtype=bfloat16, or " if autoencoder.dtype == "float32" else ""
    return (
        f"the {name} of {autoencoder.source} takes {bytes_text(size)}, and {device_name} has {bytes_text(sum(device_bytes))}, of "
        f"which {WEIGHTS_SHARE:.0%} are for weights: nothing was loaded. Set {halve}resources.gpus_per_model={least} (and "
        "resources.gpus to a multiple of it), or use larger GPUs: docs/large_models.md."
    )
