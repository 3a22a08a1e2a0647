"""`ksweep doctor`: is this installation fit to run, and are its stores intact? A finding says what was checked and what to do."""

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

import typer

from ksweep.cli.output import JsonOption, RegistryOption, VectorCacheOption, print_json, print_text
from ksweep.utils.console import bytes_text
from ksweep.utils.errors import SpecError

LOW_DISK_BYTES = 5e9
"""Free bytes below which a disk gets a note."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    subject: str
    state: Literal["ok", "note", "bad"]
    """note: it works, but is worth knowing. bad: something will fail."""
    message: str


def doctor_command(
    registry: RegistryOption = Path("registry"),
    vector_cache: VectorCacheOption = Path("vector_cache"),
    as_json: JsonOption = False,
) -> None:
    """Check this installation: packages, GPU, stores, cluster, the engine on a tiny model; exit code 1 if something fails."""
    any_bad = False
    for finding in examine(registry, vector_cache):
        any_bad |= finding.state == "bad"
        if as_json:
            print_json({"subject": finding.subject, "state": finding.state, "said": finding.message})
        else:
            print_text(f"{finding.state:<5} {finding.subject:<22} {finding.message}", soft_wrap=True)
    raise typer.Exit(1 if any_bad else 0)


def examine(registry: Path, vector_cache: Path) -> Iterator[Finding]:
    """Yield the findings of all checks, the quick ones first. A check that raises is itself a finding."""
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
        ("engine vllm", _vllm),
    ]
    for subject, check in checks:
        try:
            yield from check()
        except Exception as error:  # whatever is broken is what the user wants to know
            yield Finding(subject, "bad", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def _machine() -> Iterator[Finding]:
    import psutil

    from ksweep.utils import machine

    memory = psutil.virtual_memory()
    yield Finding(
        "machine", "ok",
        f"{platform.node()}: {platform.platform()}, Python {platform.python_version()} ({sys.prefix}), "
        f"{machine.num_cores()} cores, {bytes_text(memory.available)} of {bytes_text(memory.total)} memory free",
    )  # fmt: skip


def _packages() -> Iterator[Finding]:
    """Compare the requirements of ksweep with what is installed."""
    from packaging.requirements import Requirement

    from ksweep.utils.provenance import PACKAGES

    try:
        requirements = [Requirement(line) for line in metadata.requires("ksweep") or ()]
    except metadata.PackageNotFoundError:
        yield Finding("packages", "note", "ksweep runs from a checkout without being installed: its requirements are not known")
        requirements = [Requirement(name) for name in PACKAGES if name != "ksweep"]
    versions, bad = [], []
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            bad.append(f"{requirement.name} is missing (needs {requirement.specifier or 'any'})")
            continue
        versions.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            bad.append(f"{requirement.name} {version} does not satisfy {requirement.specifier}")
    if bad:
        yield Finding("packages", "bad", f"{'; '.join(bad)}: run `pip install -e .` again")
    yield Finding("packages", "ok", ", ".join(versions))


def _gpu() -> Iterator[Finding]:
    import torch

    from ksweep.launch import gpu_support, hardware

    if not torch.cuda.is_available():
        problem = gpu_support.gpu_problem(gpu_support.torch_build(), gpu_support.gpu_driver())
        if number := hardware.visible_gpus():
            reason = problem or "torch does not say why: try `nvidia-smi`"
            yield Finding(
                "gpu", "bad", f"{_number(number, 'GPU')} here, of which torch can use none: {reason}. gpus=0 runs without"
            )
        else:
            built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
            yield Finding("gpu", "note", f"there is none that this process sees (torch is built {built}): runs use the CPU")
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name, bfloat16 = torch.cuda.get_device_name(index), torch.cuda.is_bf16_supported()
        message = f"{name}: {bytes_text(free)} of {bytes_text(total)} free, CUDA {torch.version.cuda}"
        yield Finding(f"gpu {index}", "ok" if bfloat16 else "note", message + ("" if bfloat16 else "; no bfloat16"))


def _registry(registry: Path) -> Iterator[Finding]:
    from ksweep.registry.database import ingest_landings
    from ksweep.registry.query import run_query

    if not registry.is_dir():
        yield Finding("registry", "note", f"none at {registry.absolute()} yet: the first sweep creates it")
        return
    report = ingest_landings(registry)
    [counts] = run_query(registry, "SELECT count(*) FILTER (status <> 'finished') AS failed FROM runs").to_pylist()
    yield Finding(
        "registry", "ok", f"{report.database}: {_number(report.num_runs, 'run')} ({counts['failed']} did not finish), checked in "
        f"{report.seconds:.2f} s",
    )  # fmt: skip
    for landing in report.quarantined:
        yield Finding("registry", "bad", f"{landing.path} is not believed: {landing.reason}")


def _draws(registry: Path) -> Iterator[Finding]:
    """Look at names and sizes only; a sweep reads what it uses."""
    for store, pattern, again in (("draws", "draws/*/", "drawn"), ("scores", "scores/*/*/", "scored")):
        keys = [path for path in registry.glob(pattern) if not path.name.startswith("_")]
        files = [file for key in keys for file in key.glob("part-*")]
        damaged = [file for file in files if ".damaged-" in file.name]
        size = sum(file.stat().st_size for file in files)
        if keys or (store == "draws" and (registry / "draws").is_dir()):
            counted = f"{_number(len(keys), 'key')}, {_number(len(files) - len(damaged), 'part')}, {bytes_text(size)}"
            yield Finding(store, "ok", counted)
        if damaged:
            text = f"{_number(len(damaged), 'damaged part')} set aside, such as {damaged[0]}: {again} again when needed"
            yield Finding(store, "note", text)


def _vector_cache(vector_cache: Path) -> Iterator[Finding]:
    from ksweep.activations import maintenance

    if not vector_cache.is_dir():
        yield Finding("vector cache", "note", f"none at {vector_cache.absolute()} yet: the first sweep creates it")
        return
    entries = maintenance.entries(vector_cache)
    size = sum(entry.bytes for entry in entries)
    yield Finding("vector cache", "ok", f"{_number(len(entries), 'key')}, {bytes_text(size)}; `ksweep cache verify` checks them")
    leftovers = maintenance.leftovers_in(vector_cache)
    if leftovers:
        yield Finding(
            "vector cache", "note", f"{_number(len(leftovers), 'crash leftover')}: `ksweep cache gc --yes` removes them"
        )


def _file_system(registry: Path) -> Iterator[Finding]:
    """Check space, renames and locks where results go."""
    import fcntl

    directory = next(path for path in (registry.absolute(), *registry.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(directory).free
    yield Finding("disk", "ok" if free > LOW_DISK_BYTES else "note", f"{bytes_text(free)} free at {directory}")
    with tempfile.TemporaryDirectory(dir=directory, prefix=".doctor-") as scratch:
        first, second = Path(scratch) / "a", Path(scratch) / "b"
        first.write_text("new")
        second.write_text("old")
        os.replace(first, second)
        renamed = second.read_text() == "new" and not first.exists()
        yield Finding(
            "file system",
            "ok" if renamed else "bad",
            f"{directory}: a rename {'replaces' if renamed else 'does not replace'} a file",
        )
        try:
            with second.open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            yield Finding("file system", "note", f"{directory} has no locks ({error.strerror}): two ingests may do the same work")


def _cluster() -> Iterator[Finding]:
    from ksweep.launch.slurm import commands

    if not commands.has_cluster():
        yield Finding("cluster", "note", "there is no Slurm: sweeps run on this machine")
        return
    for partition in commands.partitions().values():
        limit = "no time limit" if partition.minutes is None else f"at most {partition.minutes / 60:.0f} h"
        yield Finding(
            f"partition {partition.name}", "ok",
            f"{partition.num_nodes} nodes of {partition.gpus} GPUs, {partition.cpus} cores, {partition.memory_mb / 1000:.0f} GB; "
            f"{limit}{'; the default' if partition.is_default else ''}",
        )  # fmt: skip
    accounting = "accounting is on" if shutil.which("sacct") and commands.associations(getpass.getuser()) else "no accounting"
    yield Finding("cluster", "ok", f"arrays of up to {commands.max_array_size()}; {accounting}")


def _engine() -> Iterator[Finding]:
    """Test the engine with a tiny model, on every kind of device there is."""
    import torch

    from ksweep.cli.selftest import failures

    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        began = time.perf_counter()
        problems = failures(device)
        message = "; ".join(problems) or "greedy equals plain decoding, draws do not depend on the batch, vectors reach the model"
        yield Finding(f"engine on {device}", "bad" if problems else "ok", f"{message} ({time.perf_counter() - began:.1f} s)")


def _vllm() -> Iterator[Finding]:
    """Say whether vLLM can be used, which is not imported."""
    from ksweep.inference.vllm_engine import vllm_version

    try:
        yield Finding("engine vllm", "ok", f"vLLM {vllm_version()}: sampling.engine=vllm can be used for NLA pairs")
    except SpecError as error:
        yield Finding("engine vllm", "note", f"{error}; every other engine works without it")


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"
