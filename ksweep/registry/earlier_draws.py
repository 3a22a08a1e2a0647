"""Draws of earlier versions: a part holds draws and scores together, in a directory named after the key of both.

They stay where they are, for the runs that were recorded over them. A cell that needs them copies them into the stores of this
version (`CellDraws.take_over_earlier`): nothing is sampled or scored that is stored in either layout.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ksweep.registry.draws import DrawsDirectory
from ksweep.registry.part_store import read_identity, stored_reconstructions
from ksweep.registry.work_units import WorkUnit
from ksweep.utils.fingerprint import fingerprint

SETTLED = 10 * 10**9
"""Nanoseconds after which the list of a directory is kept."""
AR_ENTRIES = ("ar", "ar_bos", "encoder_prompt", "scorer_version")
"""Entries of an earlier identity of draws that belong to their scores."""


@dataclass(frozen=True)
class SplitKeys:
    """The keys that the draws and the scores of an earlier directory have now."""

    draws: str
    scores: str


def split_identity(combined: Mapping[str, Any]) -> SplitKeys:
    """Return the keys of draws and of scores for what an earlier version hashed into one key.

    Raises:
        KeyError: it lacks what every earlier version wrote.
    """
    draws = {name: value for name, value in combined.items() if name not in AR_ENTRIES}
    of_ar = {name: value for name, value in combined.items() if name in (*AR_ENTRIES, "checkpoint")}
    scores = {"metric": "reconstruction", "dtype": combined["dtype"], "scorer_version": combined["scorer_version"]} | of_ar
    return SplitKeys(fingerprint(draws), fingerprint(scores))


class EarlierDraws(DrawsDirectory):
    """The draws and scores of one directory of an earlier version. Its parts have no label."""

    def _label_mismatch(self, table: pa.Table) -> str | None:
        return None

    def read_json(self, name: str) -> Any:
        """Return the content of a JSON file, which earlier versions wrote without a digest; None where it cannot be read."""
        try:
            return json.loads((self.path / name).read_bytes())
        except (OSError, ValueError):
            return None

    @property
    def split_keys(self) -> SplitKeys | None:
        """The keys that its draws and scores have now; None where identity.json is missing or of this version."""
        return _split_keys(self.path / "identity.json")

    def scored_parts(self) -> list[WorkUnit]:
        """Return its parts: each holds draws with their scores."""
        return self.parts()

    def read_scored(self, unit: WorkUnit, columns: Iterable[str]) -> pa.Table | None:
        """Return the draws of a part with their scores; None, with the part set aside, if it is damaged."""
        return self.read_part(unit, list(columns))

    def reconstructions(
        self, activations: np.ndarray, draws: np.ndarray, d_model: int, parts: Sequence[WorkUnit] | None = None
    ) -> np.ndarray:
        """Return the reconstruction of each (activation, draw): see `stored_reconstructions`."""
        return stored_reconstructions(self, self.parts() if parts is None else parts, activations, draws, d_model)


def earlier_draws(root: Path, draws_key: str, combined_key: str) -> Iterator[EarlierDraws]:
    """Yield the directories of earlier versions below `root` (registry/draws) that hold draws of this key.

    One without identity.json is known by its name alone, the key of draws and scores together.
    """
    try:
        changed = root.stat().st_mtime_ns
        # A directory that has just been made may get its identity.json in a moment.
        list_them = _directories if time.time_ns() - changed > SETTLED else _directories.__wrapped__
        directories = list_them(root, changed)
    except FileNotFoundError:
        return
    for name, keys in directories.items():
        if name == combined_key or (keys is not None and keys.draws == draws_key != name):
            yield EarlierDraws(root, name)


@lru_cache(maxsize=4)
def _directories(root: Path, changed: int) -> Mapping[str, SplitKeys | None]:
    """Return the keys of each directory of draws, by name. The cells of a sweep ask for them in turn: they are listed once.

    `changed` is when an entry was last added to `root`.
    """
    names = sorted(name for name in os.listdir(root) if not name.startswith(("_", ".")))
    return {name: EarlierDraws(root, name).split_keys for name in names}


def _split_keys(path: Path) -> SplitKeys | None:
    try:
        return _split_keys_of_file(path, path.stat().st_mtime_ns)
    except OSError:
        return None


@cache
def _split_keys_of_file(path: Path, changed: int) -> SplitKeys | None:
    """Return the keys of one identity.json, which is read once per process."""
    try:
        combined = read_identity(path)["draws"]
        return split_identity(combined) if "scorer_version" in combined else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
