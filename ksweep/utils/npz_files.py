"""Arrays of .npz files: their shapes by their headers, before anything is unpacked, and one of them without the others."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def npz_headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Return shape and type of each array of an archive: a small archive can hold arrays of any size.

    Raises:
        Whatever zipfile and NumPy raise of a damaged archive.
    """
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        return {name: _header(archive, name) for name in names}


def read_npz_array(path: Path, name: str) -> np.ndarray:
    """Return one array of an archive, unpacked.

    Raises:
        Whatever zipfile and NumPy raise of a damaged archive.
    """
    from numpy.lib import format as npy

    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        array: np.ndarray = npy.read_array(file, allow_pickle=False)
        return array


def _header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    from numpy.lib import format as npy

    with archive.open(f"{name}.npy") as file:
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(file)]
        shape, _, dtype = read(file)
    return tuple(shape), dtype
