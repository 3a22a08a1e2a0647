"""Job directories for missing cells: which cells share a job, and the job.json that its ranks run from."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ksweep.config.spec import Cell
from ksweep.config.sweep import Sweep
from ksweep.launch import hardware
from ksweep.launch.job import Job, create_job, logs_directory
from ksweep.launch.plan import Step
from ksweep.utils.provenance import provenance

ENTRY = "ksweep.evaluation.evaluate:run_job"

MissingCells = Sequence[tuple[Cell, Step]]


def group_by_av(sweep: Sweep, missing: MissingCells) -> list[list[tuple[Cell, Step]]]:
    """Group cells by AV, so that a job loads its models once and takes the draws that its cells share once.

    A group has at most resources.cells_per_job cells.
    """
    sharing: dict[tuple[Any, ...], list[tuple[Cell, Step]]] = {}
    for cell, step in missing:
        sharing.setdefault(cell.autoencoder.av_values, []).append((cell, step))
    most = sweep.resources.cells_per_job or len(missing)
    return [same[start : start + most] for same in sharing.values() for start in range(0, len(same), most)]


def create_job_for_cells(sweep: Sweep, group: MissingCells, cluster: str, code: dict[str, Any] | None = None) -> Job:
    """Create the job directory for a group of resolved cells; nobody after the launcher derives their keys from disk again."""
    keys = [step.keys for _, step in group]
    argument = {
        "cells": [asdict(cell) for cell, _ in group],
        "keys": [] if None in keys else [asdict(key) for key in keys if key is not None],
        "sweep": sweep.name,
        "registry": os.path.abspath(sweep.registry),
        "vector_cache": os.path.abspath(sweep.vector_cache),
        "batch_size": sweep.resources.batch_size,
        "resources": {**asdict(sweep.resources), "extra": dict(sweep.resources.extra)},
        "origin": {**provenance(), "directory": os.getcwd()},
        "order": secrets.randbelow(2**31),
    }
    resources = sweep.resources
    return create_job(
        logs_directory(sweep.registry), ENTRY, argument, hardware.total_ranks(resources),
        hardware.num_gpus(resources), cluster=cluster,
        gpus_per_model=resources.gpus_per_model, cells=[(step.cell_key, step.label) for _, step in group], code=code,
    )  # fmt: skip
