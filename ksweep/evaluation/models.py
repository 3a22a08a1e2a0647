"""The AV and AR of a job: loaded when first needed, kept while cells share them."""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING

from ksweep.config.spec import Autoencoder
from ksweep.evaluation.identity import inspect_file, inspect_pair
from ksweep.utils.machine import WAIT_POLICY

if TYPE_CHECKING:
    from ksweep.autoencoder.base import Reconstructor, Verbalizer


class Models:
    """AV and AR of a job, loaded when first needed and kept while the cells of one autoencoder follow one another."""

    def __init__(self, devices: tuple[str, ...]) -> None:
        """`devices` are torch device names; a model is spread over them."""
        self.devices = devices
        self._of: Autoencoder | None = None
        self._av: Verbalizer | None = None
        self._ar: Reconstructor | None = None

    def _turn_to(self, autoencoder: Autoencoder) -> None:
        if autoencoder != self._of:
            self._of, self._av, self._ar = autoencoder, None, None
            if len(self.devices) > 1:
                gc.collect()  # a model that is spread holds itself in cycles: its memory is needed for the next one

    def verbalizer(self, autoencoder: Autoencoder) -> Verbalizer:
        """The AV, ready on the device."""
        self._turn_to(autoencoder)
        if self._av is None:
            self._av = self._load_verbalizer(autoencoder)
        return self._av

    def reconstructor(self, autoencoder: Autoencoder) -> Reconstructor:
        """The AR, ready on the device; a talkative autoencoder's stands on its AV's model where that is the same."""
        self._turn_to(autoencoder)
        if self._ar is None:
            self._ar = self._load_reconstructor(autoencoder)
        return self._ar

    def numerics(self, max_new_tokens: int) -> dict[str, str]:
        """How this rank's AV is computed in texts of that length, for the record; nothing where it was not needed."""
        if self._av is None:
            return {}
        from ksweep.inference import cuda_graphs, kv_cache

        model, length = self._av.model, self._av.prompt_length + max_new_tokens
        fits = kv_cache.fits(model, length)
        threads = threads_in_use() if model.device.type == "cpu" else {}
        return kv_cache.numerics(model, length) | threads | {
            "dtype": str(model.dtype).removeprefix("torch."),
            "sampler": "slots" if fits else "plain",
            "cuda_graphs": cuda_graphs.state(model) if fits else "off",
        }  # fmt: skip

    def _load_verbalizer(self, autoencoder: Autoencoder) -> Verbalizer:
        from ksweep.autoencoder.nla import models as nla
        from ksweep.autoencoder.tae import models as tae

        if autoencoder.checkpoint is not None:
            return tae.load_verbalizer(inspect_file(autoencoder), dtype=autoencoder.dtype, device=self.devices)
        return nla.load_verbalizer(inspect_pair(autoencoder)[0], dtype=autoencoder.dtype, device=self.devices)

    def _load_reconstructor(self, autoencoder: Autoencoder) -> Reconstructor:
        from ksweep.autoencoder.nla import models as nla
        from ksweep.autoencoder.tae import models as tae

        if autoencoder.checkpoint is None:
            return nla.load_reconstructor(inspect_pair(autoencoder)[1], dtype=autoencoder.dtype, device=self.devices)
        decoder = self._av if isinstance(self._av, tae.TaeVerbalizer) else None
        info = inspect_file(autoencoder) if decoder is None else decoder.info
        return tae.load_reconstructor(
            info, dtype=autoencoder.dtype, device=self.devices, sharing=decoder, encoder_prompt=autoencoder.encoder_prompt
        )


def threads_in_use() -> dict[str, str]:
    """How many threads this rank's torch has and how they wait, for the record of a run."""
    import torch

    policy = {"omp_wait_policy": os.environ.get(WAIT_POLICY), "gomp_spincount": os.environ.get("GOMP_SPINCOUNT")}
    return {"threads": str(torch.get_num_threads())} | {name: value for name, value in policy.items() if value}
