"""The AV and AR of a job, loaded when first needed and kept while cells share them."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ksweep.autoencoder.base import Family
from ksweep.autoencoder.family import family_of
from ksweep.config.spec import Autoencoder, Sampling
from ksweep.evaluation.identity import CellKeys
from ksweep.inference.backend import DEFAULT_ENGINE, load_engine, loads_weights
from ksweep.utils.errors import CheckpointError
from ksweep.utils.fingerprint import canonical_json
from ksweep.utils.machine import WAIT_POLICY

if TYPE_CHECKING:
    from ksweep.autoencoder.base import Reconstructor, Verbalizer


class Models:
    """The AV and the AR that were used last. A second AR for the same AV replaces the first alone."""

    def __init__(self, devices: tuple[str, ...], planned: Mapping[Autoencoder, CellKeys] | None = None) -> None:
        """Load nothing yet.

        Args:
            devices: torch device names; each model is spread over all of them.
            planned: keys that the launcher computed for a cell of each autoencoder; its files must still be those.
        """
        self.devices, self.planned = devices, planned or {}
        self._families: dict[Autoencoder, Family] = {}
        self._ars: dict[Autoencoder, tuple[Any, ...]] = {}
        self._av: Verbalizer | None = None
        self._ar: Reconstructor | None = None
        self._av_values: tuple[Any, ...] = ()
        self._av_in_files = False
        """Whether the AV was loaded without the model, for an engine that loads it itself."""
        self._ar_values: tuple[Any, ...] = ()

    def verbalizer(self, autoencoder: Autoencoder, engine: str = DEFAULT_ENGINE) -> Verbalizer:
        """Return the AV on the devices, as an engine takes it, loading it if necessary."""
        in_files = loads_weights(engine)
        if self._av is None or (self._av_values, self._av_in_files) != (autoencoder.av_values, in_files):
            self.release_verbalizer()
            if self._ar is not None and self._ar_values != self._values_of_ar(autoencoder):
                self.release_reconstructor()
            family = self._family_of(autoencoder)
            self._av = family.load_prompter(self.devices) if in_files else family.load_verbalizer(self.devices)
            self._av_values, self._av_in_files = autoencoder.av_values, in_files
        return self._av

    def reconstructor(self, autoencoder: Autoencoder) -> Reconstructor:
        """Return the AR on the devices, loading it if necessary; where its family can, it shares the loaded AV's model."""
        if self._ar is None or self._ar_values != self._values_of_ar(autoencoder):
            self.release_reconstructor()
            if self._av_values != autoencoder.av_values:
                self.release_verbalizer()
            self._ar = self._family_of(autoencoder).load_reconstructor(self.devices, self._av)
            self._ar_values = self._values_of_ar(autoencoder)
        return self._ar

    def _values_of_ar(self, autoencoder: Autoencoder) -> tuple[Any, ...]:
        """Return the spec's values for its AR, and the identity of its files: a pair's AR may take the base of the AV."""
        if autoencoder not in self._ars:
            identity = self._family_of(autoencoder).scores_identity()
            self._ars[autoencoder] = (*autoencoder.ar_values, canonical_json(identity))
        return self._ars[autoencoder]

    def _family_of(self, autoencoder: Autoencoder) -> Family:
        """Return the autoencoder's family, after checking that its files are those that were planned."""
        if autoencoder not in self._families:
            family = family_of(autoencoder)
            if (keys := self.planned.get(autoencoder)) is not None:
                check_as_planned(family, keys)
            self._families = {autoencoder: family}
        return self._families[autoencoder]

    def release_verbalizer(self) -> None:
        """Free the memory of the AV."""
        if self._av is not None:
            self._av, self._av_values = None, ()
            _free_memory(self.devices)

    def release_reconstructor(self) -> None:
        """Free the memory of the AR."""
        if self._ar is not None:
            self._ar, self._ar_values = None, ()
            _free_memory(self.devices)

    def numerics(self, sampling: Sampling) -> dict[str, str]:
        """Return how this rank's AV computes such texts, for the run record; empty where the AV was not loaded."""
        if self._av is None:
            return {}
        engine = load_engine(sampling.engine)
        threads = threads_in_use() if self.devices[0] == "cpu" else {}
        return {**engine.identity, **threads, **engine.numerics(self._av, sampling.max_new_tokens)}


def _free_memory(devices: tuple[str, ...]) -> None:
    """Give the memory of models that are no longer referred to back to the devices."""
    gc.collect()  # a model that is spread over devices is part of reference cycles
    if devices[0] != "cpu":
        import torch

        torch.cuda.empty_cache()


def check_as_planned(family: Family, keys: CellKeys) -> None:
    """Check that an autoencoder's files have the digests that its cells' keys were computed from.

    Raises:
        CheckpointError: a file was changed after the launcher had planned the job.
    """
    parts = [part for part in keys.identity.values() if isinstance(part, dict)]
    planned = {name: value for part in parts for name, value in part.items()}
    current = family.draws_identity() | family.scores_identity()
    changed = [name for name, value in current.items() if planned.get(name, value) != value]
    if changed:
        raise CheckpointError(
            f"{family.autoencoder.source} has changed since this job was planned ({', '.join(changed)}: another digest): nothing "
            "of it was loaded. Run the sweep's command again, which plans with the files as they are now; draws of the "
            "earlier files are kept under their own key."
        )


def threads_in_use() -> dict[str, str]:
    """Return how many threads this rank's torch has and how they wait at barriers, for the run record."""
    import torch

    policy = {"omp_wait_policy": os.environ.get(WAIT_POLICY), "gomp_spincount": os.environ.get("GOMP_SPINCOUNT")}
    return {"threads": str(torch.get_num_threads())} | {name: value for name, value in policy.items() if value}
