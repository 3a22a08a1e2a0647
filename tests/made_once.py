"""What several workers of a test run read and none changes: made by the first that needs it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from filelock import FileLock

T = TypeVar("T")


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], T]) -> T:
    """Return what `make` returned for an empty directory, in this worker or in another; it is passed on as a pickle."""
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent  # each worker has a directory of its own in there
    made = place / f"{name}.pickle"
    with FileLock(place / f"{name}.lock"):
        if not made.exists():
            (place / name).mkdir()
            made.write_bytes(pickle.dumps(make(place / name)))
        value: Any = pickle.loads(made.read_bytes())
    return value  # type: ignore[no-any-return]
