"""Can this installation's torch use this machine's GPUs? Told from torch's build and the driver, without importing torch."""

from __future__ import annotations

import ctypes
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from ksweep.config.resources import Resources
from ksweep.launch import hardware
from ksweep.utils.errors import SpecError

DRIVER_VERSION_FILE = Path("/proc/driver/nvidia/version")
CUDA_12_INDEX = "https://download.pytorch.org/whl/cu129"
"""Has torch 2.8 to 2.13 for CUDA 12.9, which runs on every driver for CUDA 12, from 525 on (minor version compatibility). The
indices cu126 and cu128 end with earlier versions of torch; PyPI has CUDA 13 since 2.11, which needs driver 580."""


@dataclass(frozen=True)
class TorchBuild:
    """Which torch is installed."""

    version: str
    cuda: str | None
    """CUDA version that it is built for, e.g. "13.0"; None for a build without CUDA."""
    is_rocm: bool = False


@dataclass(frozen=True)
class GpuDriver:
    """NVIDIA's driver of this machine."""

    version: str | None
    """E.g. "550.54.14"; None where no kernel module is loaded."""
    cuda: tuple[int, int] | None
    """Newest CUDA version that it supports, major and minor; None where its library is missing."""


def torch_build() -> TorchBuild | None:
    """Return which torch is installed, from its version file; None if there is none, or one without such a file."""
    spec = importlib.util.find_spec("torch")
    file = None if spec is None or spec.origin is None else Path(spec.origin).with_name("version.py")
    if file is None or not file.is_file():
        return None
    values = dict(re.findall(r"^(\w+)(?:: [^=]*)? = '([^']*)'", file.read_text(encoding="utf-8"), flags=re.MULTILINE))
    return TorchBuild(values.get("__version__", "?"), values.get("cuda"), "hip" in values)


def gpu_driver() -> GpuDriver:
    """Return the driver of this machine, as far as there is one."""
    try:
        found = re.search(r"(\d+\.\d+(?:\.\d+)?) ", DRIVER_VERSION_FILE.read_text())
    except OSError:
        found = None
    number = ctypes.c_int(0)
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        failed = 1
    cuda = None if failed else (number.value // 1000, number.value % 1000 // 10)
    return GpuDriver(None if found is None else found[1], cuda)


def gpu_problem(build: TorchBuild | None, driver: GpuDriver) -> str | None:
    """Return why a torch cannot use GPUs behind a driver and what to do, None if nothing is known against it."""
    if build is None or build.is_rocm:
        return None
    version = build.version.partition("+")[0]
    if driver.version is None and driver.cuda is None:
        return (
            f"no NVIDIA driver is loaded ({DRIVER_VERSION_FILE} is missing, nor is there a libcuda.so.1): install one, and let a "
            "container see it (docker run --gpus all, apptainer --nv)"
        )
    name = f"the driver {driver.version or '(of unknown version)'}"
    supports = f"{name} supports CUDA {driver.cuda[0]}.{driver.cuda[1]}" if driver.cuda else f"{name} is loaded"
    for_cuda_12 = f"`pip install torch=={version} --index-url {CUDA_12_INDEX}`"
    if build.cuda is None:
        new = driver.cuda is None or driver.cuda[0] >= 13
        command = f"`pip install --force-reinstall torch=={version} --index-url https://pypi.org/simple`" if new else for_cuda_12
        return f"torch {build.version} is built without CUDA, while {supports}: install a build with it, {command}"
    major = int(build.cuda.partition(".")[0])
    if driver.cuda is None or driver.cuda[0] >= major:
        return None
    older = f"install a build for CUDA 12, {for_cuda_12}, or update" if driver.cuda[0] == 12 else "update"
    least = {12: "525", 13: "580"}.get(major, "a newer one")
    return f"torch {build.version} is built for CUDA {build.cuda}, while {supports}: {older} the driver to {least} or newer"


def check_local_gpus(resources: Resources) -> None:
    """Check before a job is created that torch can use the GPUs that the job is to get on this machine.

    Raises:
        SpecError: it cannot; the message names driver, CUDA build and remedy.
    """
    if hardware.resolve_cluster(resources) == "slurm" or not (gpus := hardware.num_gpus(resources)):
        return
    if problem := gpu_problem(torch_build(), gpu_driver()):
        raise SpecError(f"resources.gpus={gpus}, but torch can use none: {problem}. gpus=0 runs on the processor instead.")
