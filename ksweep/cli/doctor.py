"""`ksweep doctor`: is this installation fit to run, are the stores whole? A finding says what was looked at and what to do."""

from __future__ import annotations

import getpass
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from ksweep.utils import machine
from ksweep.utils.console import bytes_text
from ksweep.utils.provenance import PACKAGES

State = Literal["ok", "note", "bad"]
LITTLE_ROOM = 5e9
"""Free bytes below which a disk is worth a word."""


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    subject: str
    state: State
    """note: it works, but somebody should know. bad: something will fail."""
    said: str


def examine(registry: Path, vector_cache: Path) -> Iterator[Finding]:
    """Everything, the quick first; a check that breaks is itself a finding."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("machine", _machine),
        ("packages", _packages),
        ("gpu", _gpu),
        ("registry", lambda: _registry(registry)),
        ("draws", lambda: _draws(registry)),
        ("vector cache", lambda: _vector_cache(vector_cache)),
        ("file system", lambda: _file_system(registry)),
        ("cluster", _cluster),
        ("engine", _engine),
    ]
    for subject, check in checks:
        try:
            yield from check()
        except Exception as error:  # whatever is broken is what one wants to be told
            yield Finding(subject, "bad", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def _machine() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    yield Finding(
        "machine", "ok",
        f"{platform.node()}: {platform.platform()}, Python {platform.python_version()} ({sys.prefix}), "
        f"{machine.num_cores()} cores, {bytes_text(memory.available)} of {bytes_text(memory.total)} memory free",
    )  # fmt: skip


def _packages() -> Iterator[Finding]:
    """What ksweep asks for against what is installed."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in metadata.requires("ksweep") or ()]
    except metadata.PackageNotFoundError:
        yield Finding("packages", "note", "ksweep is run from a checkout without being installed: what it needs is not compared")
        wanted = [Requirement(name) for name in PACKAGES if name != "ksweep"]
    versions, bad = [], []
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            bad.append(f"{requirement.name} is missing (needs {requirement.specifier or 'any'})")
            continue
        versions.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            bad.append(f"{requirement.name} {version} does not fit {requirement.specifier}")
    if bad:
        yield Finding("packages", "bad", f"{'; '.join(bad)}: pip install -e . again")
    yield Finding("packages", "ok", ", ".join(versions))


def _gpu() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield Finding("gpu", "note", f"none that torch can use ({built}): runs go to the CPU")
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name, bfloat16 = torch.cuda.get_device_name(index), torch.cuda.is_bf16_supported()
        said = f"{name}: {bytes_text(free)} of {bytes_text(total)} free, CUDA {torch.version.cuda}"
        yield Finding(f"gpu {index}", "ok" if bfloat16 else "note", said + ("" if bfloat16 else "; no bfloat16"))


def _registry(registry: Path) -> Iterator[Finding]:
    from ksweep.registry.database import ingest_landings
    from ksweep.registry.query import run_query

    if not registry.is_dir():
        yield Finding("registry", "note", f"none at {registry.absolute()} yet: the first sweep makes it")
        return
    report = ingest_landings(registry)
    [counted] = run_query(registry, "SELECT count(*) FILTER (status <> 'finished') AS failed FROM runs").to_pylist()
    yield Finding(
        "registry", "ok", f"{report.database}: {report.num_runs} runs ({counted['failed']} did not finish), looked at in "
        f"{report.seconds:.2f} s",
    )  # fmt: skip
    for one in report.quarantined:
        yield Finding("registry", "bad", f"{one.path} is not believed: {one.reason}")


def _draws(registry: Path) -> Iterator[Finding]:
    """Names and sizes only; `ksweep run` reads what it uses."""
    if not (registry / "draws").is_dir():
        return
    keys = [path for path in (registry / "draws").iterdir() if path.is_dir() and not path.name.startswith("_")]
    files = [file for key in keys for file in key.glob("part-*")]
    damaged = [file for file in files if ".damaged-" in file.name]
    size = sum(file.stat().st_size for file in files)
    yield Finding("draws", "ok", f"{len(keys)} keys, {len(files) - len(damaged)} parts, {bytes_text(size)}")
    if damaged:
        yield Finding(
            "draws", "note", f"{len(damaged)} damaged parts were set aside, such as {damaged[0]}: drawn again when needed"
        )


def _vector_cache(vector_cache: Path) -> Iterator[Finding]:
    from ksweep.activations import maintenance

    if not vector_cache.is_dir():
        yield Finding("vector cache", "note", f"none at {vector_cache.absolute()} yet: the first sweep makes it")
        return
    entries = maintenance.entries(vector_cache)
    size = sum(entry.bytes for entry in entries)
    yield Finding("vector cache", "ok", f"{len(entries)} keys, {bytes_text(size)}; `ksweep cache verify` compares checksums")
    left = maintenance.leftovers_in(vector_cache)
    if left:
        yield Finding("vector cache", "note", f"{len(left)} leftovers of crashes: `ksweep cache gc --yes` removes them")


def _file_system(registry: Path) -> Iterator[Finding]:
    """Renames, locks and room where results go."""
    import fcntl

    place = next(path for path in (registry.absolute(), *registry.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    yield Finding("disk", "ok" if free > LITTLE_ROOM else "note", f"{bytes_text(free)} free at {place}")
    with tempfile.TemporaryDirectory(dir=place, prefix=".doctor-") as directory:
        first, second = Path(directory) / "a", Path(directory) / "b"
        first.write_text("new")
        second.write_text("old")
        os.replace(first, second)
        renamed = second.read_text() == "new" and not first.exists()
        yield Finding(
            "file system", "ok" if renamed else "bad", f"{place}: a file is {'' if renamed else 'not '}replaced by a rename"
        )
        try:
            with second.open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            yield Finding("file system", "note", f"{place} has no locks ({error.strerror}): two ingests may do the same work")


def _cluster() -> Iterator[Finding]:
    from ksweep.launch.slurm import commands

    if not commands.has_cluster():
        yield Finding("cluster", "note", "no Slurm here: sweeps run on this machine")
        return
    for partition in commands.partitions().values():
        limit = "no time limit" if partition.minutes is None else f"at most {partition.minutes / 60:.0f} h"
        yield Finding(
            f"partition {partition.name}", "ok",
            f"{partition.num_nodes} nodes of {partition.gpus} GPUs, {partition.cpus} cores, {partition.memory_mb / 1000:.0f} GB; "
            f"{limit}{'; the default' if partition.is_default else ''}",
        )  # fmt: skip
    accounting = "there is accounting" if shutil.which("sacct") and commands.associations(getpass.getuser()) else "no accounting"
    yield Finding("cluster", "ok", f"arrays of up to {commands.max_array_size()}; {accounting}")


def _engine() -> Iterator[Finding]:
    """The engine on a tiny model, on every kind of device there is."""
    import torch

    from ksweep.cli.selftest import failures
    from ksweep.inference import compiled

    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        began = time.perf_counter()
        found = failures(device)
        said = "; ".join(found) or "greedy equals plain decoding, draws do not depend on the batch, vectors arrive"
        if device == "cpu":
            said += "; attention is compiled" if compiled.library() else f"; attention is torch's: {compiled.why_not()}"
        yield Finding(f"engine on {device}", "bad" if found else "ok", f"{said} ({time.perf_counter() - began:.1f} s)")
